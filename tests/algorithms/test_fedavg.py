"""Server optimisers against NumPy, and the settings in which they do nothing. (Rounds: test_rounds.py.)"""

import jax
import numpy as np
import pytest

from fedjax_sim import models
from fedjax_sim.algorithms import FedAvg
from fedjax_sim.algorithms.base import Cohort, Context, Results
from fedjax_sim.errors import UserError
from tests import oracles

CONTEXT = Context(models.create("mlp", (2, 2, 1), 2, hidden=()), 5, 3, 10)
COHORT = Cohort(np.arange(3), np.array([1, 2, 3]), np.int32(0))


def merges(algorithm, means):
    """The models that a server holds after each of the given cohort means."""
    record = algorithm.build(CONTEXT)
    start = {"params": {"w": np.float32([1.0, -2.0, 0.5])}, "batch_stats": {"m": np.float32([0.0])}}
    state = record.init(jax.random.key(0), start)
    out = []
    with jax.numpy_dtype_promotion("standard"):  # optax's bias correction mixes a float with an int32
        for mean in means:
            results = Results(None, mean, None, np.ones(3, bool), np.zeros(3))
            state, metrics = record.merge(state, COHORT, record.dispatch(state, COHORT, None), results, None)
            assert metrics == {}
            out.append(jax.device_get(record.deploy(state)))
    return out


@pytest.fixture
def means(rng):
    draw = lambda n: rng.normal(size=n).astype(np.float32)  # noqa: E731
    return [{"params": {"w": draw(3)}, "batch_stats": {"m": draw(1)}} for _ in range(4)]


def trajectory(means, step):
    """x after each round, where step(gradient, t) is what is subtracted."""
    x, out = np.array([1.0, -2.0, 0.5]), []
    for t, mean in enumerate(means, start=1):
        x = x - step(x - mean["params"]["w"].astype(np.float64), t)
        out.append(x)
    return out


def check(algorithm, means, step):
    got = merges(algorithm, means)
    for model, x, mean in zip(got, trajectory(means, step), means, strict=True):
        np.testing.assert_allclose(model["params"]["w"], x, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(model["batch_stats"]["m"], mean["batch_stats"]["m"])


def test_without_a_server_optimiser_the_mean_is_the_model(means):
    for model, mean in zip(merges(FedAvg(), means), means, strict=True):
        oracles.assert_trees_equal(model, mean)


def test_server_sgd_at_rate_one_is_plain_averaging(means):
    check(FedAvg(server_optimizer="sgd"), means, lambda g, t: g)


def test_fedavgm(means):
    memory = np.zeros(3)

    def step(g, t):
        memory[:] = 0.9 * memory + g
        return 0.5 * memory

    check(FedAvg(server_optimizer="sgd", server_lr=0.5, server_options={"momentum": 0.9}), means, step)


@pytest.mark.parametrize("kind", ["adam", "yogi"])
def test_fedadam_and_fedyogi_as_optax_has_them(kind, means):
    """With optax's bias correction, which the authors' algorithm does not have."""
    m, v = np.zeros(3), np.zeros(3) if kind == "adam" else np.full(3, 1e-6)
    m0 = m + (0 if kind == "adam" else 1e-6)
    m[:] = m0

    def step(g, t):
        m[:] = 0.9 * m + 0.1 * g
        v[:] = 0.99 * v + 0.01 * g**2 if kind == "adam" else v - 0.01 * np.sign(v - g**2) * g**2
        return 0.1 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.99**t)) + 1e-3)

    options = {"b1": 0.9, "b2": 0.99, "eps": 1e-3}
    check(FedAvg(server_optimizer=kind, server_lr=0.1, server_options=options), means, step)


def test_the_engine_need_not_hold_all_models():
    record = FedAvg().build(CONTEXT)
    assert not record.needs_models
    np.testing.assert_array_equal(record.weights(COHORT), [1, 2, 3])
    np.testing.assert_array_equal(FedAvg(weights="uniform").build(CONTEXT).weights(COHORT), [1, 1, 1])


@pytest.mark.parametrize(
    ("name", "options"), [("adamm", {}), ("sgd", {"beta": 1}), ("apply_updates", {}), ("__doc__", {})]
)
def test_what_is_no_optimiser_is_refused(name, options):
    with pytest.raises(UserError) as caught:
        FedAvg(server_optimizer=name, server_options=options).build(CONTEXT)
    assert caught.value.field == "algorithm.server_optimizer"


@pytest.mark.parametrize("lr", [0.0, -1.0, float("nan"), float("inf")])
def test_a_rate_that_is_no_rate_is_refused(lr):
    with pytest.raises(UserError, match=r"algorithm\.server_lr"):
        FedAvg(server_optimizer="sgd", server_lr=lr).build(CONTEXT)


def test_settings_without_effect_are_refused():
    """A server rate or options without a server optimiser would be ignored in silence."""
    with pytest.raises(UserError, match=r"algorithm\.server_lr"):
        FedAvg(server_lr=0.1).build(CONTEXT)


@pytest.mark.parametrize("optimizer", ["none", "sgd"])
def test_one_client_and_identical_clients_are_that_client(optimizer):
    """One full batch each: the order of samples then cannot matter."""
    dataset, partition = oracles.world((8,))
    same = oracles.Partition(partition.train * 3)
    local = {"batch_size": 8, "epochs": 3, "rounds": 1}
    alone = oracles.simulate(given=(dataset, partition), **local)
    algorithm = FedAvg(server_optimizer=optimizer)
    together = oracles.simulate(given=(dataset, same), algorithm=algorithm, wave=3, **local)
    start = jax.device_get(alone.variables)
    for simulation in (alone, together):
        oracles.run(simulation)
    oracles.assert_trees_close(together.variables, alone.variables, atol=1e-6)
    assert oracles.far_apart(start, alone.variables) > 1e-2
