"""Server optimisers against NumPy, around every algorithm that averages, and where they are refused."""

import dataclasses

import jax
import numpy as np
import pytest

from fedjax_sim import models
from fedjax_sim.algorithms import CONFIGS, FedAdam, FedAvg, FedAvgM, FedOpt, FedProx, FedYogi, Scaffold
from fedjax_sim.core.algorithm import Cohort, Results, Starts
from fedjax_sim.core.errors import UserError
from tests import oracles
from tests.algorithms import personal
from tests.algorithms.families import one_of_each

SIZES = (12, 7, 20, 3, 31)
CONTEXT = oracles.context(
    models.create("mlp", (2, 2, 1), 2, hidden=()),
    5,
    3,
    10,
    epochs=5,
)
COHORT = Cohort(np.arange(3), np.array([1, 2, 3]), np.int32(0))
AVERAGING = (
    "fedavg", "fednova", "clusamp", "fedgen", "fedrod", "fedper", "fedrep", "lg_fedavg", "fedbabu", "partial",
    "fedprox", "fedntd", "moon", "fedsam", "fedasam", "pfedsd", "scaffold", "ditto",
)  # fmt: skip
MORE = ("fedmr", "fedindep", "local", "interpolation", "feddyn", "fedexp", "fedmut", "fedcac", "fedadam")
NEEDED = {"fedrep": {"head_epochs": 1}, "partial": {"first": 1}, "fedgen": {"generator_steps": 2}}


# --- the rules ------------------------------------------------------------------------------------------


def merges(algorithm, means, included=True):
    """The models that a server holds after each of the given cohort means."""
    record = algorithm.build(CONTEXT)
    start = {"params": {"w": np.float32([1.0, -2.0, 0.5])}, "batch_stats": {"m": np.float32([0.0])}}
    state = record.init(jax.random.key(0), start)
    out = []
    for mean in means:
        results = Results(None, mean, None, np.full(3, included), np.zeros(3))
        state, metrics = record.merge(state, COHORT, record.dispatch(state, COHORT, None), results, None)
        assert metrics == {}
        out.append(jax.device_get(record.deploy(state)))
    return out, state


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
    got, _ = merges(algorithm, means)
    for model, x, mean in zip(got, trajectory(means, step), means, strict=True):
        np.testing.assert_allclose(model["params"]["w"], x, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(model["batch_stats"]["m"], mean["batch_stats"]["m"])


@pytest.mark.parametrize("config", [FedOpt(), FedOpt("sgd", 1.0), FedAvgM(momentum=0.0)])
def test_sgd_at_rate_one_is_plain_averaging(config, means):
    check(config, means, lambda g, t: g)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("named", [False, True], ids=["by optax's name", "FedAvgM"])
def test_fedavgm(named, nesterov, means):
    memory = np.zeros(3)

    def step(g, t):
        memory[:] = 0.9 * memory + g
        return 0.5 * (g + 0.9 * memory if nesterov else memory)

    options = {"momentum": 0.9, "nesterov": nesterov}
    check(FedAvgM(0.5, **options) if named else FedOpt("sgd", 0.5, options), means, step)


@pytest.mark.parametrize("kind", ["adam", "yogi"])
@pytest.mark.parametrize("named", [False, True], ids=["by optax's name", "its own"])
def test_fedadam_and_fedyogi(named, kind, means):
    """With optax's bias correction, which the authors' algorithm does not have."""
    m, v = np.zeros(3), np.zeros(3)
    if kind == "yogi":
        v[:] = 1e-6
        if not named:  # optax's own
            m[:] = 1e-6

    def step(g, t):
        m[:] = 0.9 * m + 0.1 * g
        v[:] = 0.99 * v + 0.01 * g**2 if kind == "adam" else v - 0.01 * np.sign(v - g**2) * g**2
        return 0.1 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.99**t)) + 1e-3)

    own = {"adam": FedAdam, "yogi": FedYogi}[kind](lr=0.1)
    check(own if named else FedOpt(kind, 0.1, {"b1": 0.9, "b2": 0.99, "eps": 1e-3}), means, step)


@pytest.mark.parametrize("config", [FedAvgM(), FedAdam(lr=1.0), FedYogi(lr=1.0)])
def test_a_weight_without_any_gradient_stays(config, means):
    """The pixel that is black in every image: its weight comes back from all clients as it was sent."""
    start = [1.0, -2.0, 0.5]
    for mean in means:
        mean["params"]["w"][1] = start[1]
    got, _ = merges(config, means)
    for model in got:
        np.testing.assert_array_equal(model["params"]["w"] == start, [False, True, False])


def test_a_round_that_nobody_survived_changes_nothing(means):
    algorithm = FedAvgM(0.5)
    _, state = merges(algorithm, means)
    record = algorithm.build(CONTEXT)
    x = record.deploy(state)
    lost = Results(None, x, None, np.zeros(3, bool), np.zeros(3))
    after, _ = record.merge(state, COHORT, Starts(x), lost, None)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(after), jax.device_get(state))
    assert np.abs(jax.tree.leaves(state.memory)[0]).max() > 1e-2


# --- around others --------------------------------------------------------------------------------------


def simulated(algorithm):
    return oracles.simulate(SIZES, algorithm=algorithm, cohort=3, momentum=0.5)


# SCAFFOLD and CluSamp, too, keep state beside the average and get more than models from clients.
@pytest.mark.parametrize("name", one_of_each(AVERAGING, "fednova", "fedgen", "fedrod", "ditto"))
def test_an_optimiser_that_takes_the_step_as_it_is_does_not_show(name):
    inner = CONFIGS[name](**NEEDED.get(name, {}))
    alone, around = simulated(inner), simulated(FedOpt(inner=inner))
    for simulation in (alone, around):
        oracles.run(simulation)
    oracles.assert_trees_close(around.variables, alone.variables, rtol=1e-5, atol=1e-5)


def test_half_a_step_shows():
    whole, half = (simulated(algorithm) for algorithm in (FedAvg(), FedOpt("sgd", 0.5)))
    for simulation in (whole, half):
        oracles.run(simulation)
    assert oracles.far_apart(half.variables, whole.variables) > 1e-3


@pytest.mark.parametrize("name", MORE)
def test_where_a_round_is_more_than_an_average_there_is_no_place_for_one(name):
    with pytest.raises(UserError, match="more than an average") as caught:
        FedAdam(inner=CONFIGS[name]()).build(dataclasses.replace(CONTEXT, model=personal.deep()))
    assert caught.value.field == "algorithm.inner"


def test_every_algorithm_takes_one_or_is_refused():
    elsewhere = {"fedopt", "fedavgm", "fedyogi", "fedbn", "lips"}  # or as fedadam
    assert set(AVERAGING) | set(MORE) | elsewhere == set(CONFIGS)


def test_a_client_s_rule_may_stand_on_either_side():
    """What changes the step on the client and what changes it on the server do not meet."""
    finals = []
    for algorithm in (FedProx(FedAvgM(0.5), mu=1.0), FedAvgM(0.5, inner=FedProx(mu=1.0))):
        simulation = simulated(algorithm)
        oracles.run(simulation)
        finals.append(jax.device_get(simulation.variables))
    oracles.assert_trees_equal(*finals)


def test_control_variates_do_not_feel_the_server():
    """c is a mean of gradients at clients' models, whatever step the server takes from them."""
    one, other = simulated(Scaffold(server_lr=0.5)), simulated(FedOpt("sgd", 0.5, inner=Scaffold()))
    for simulation in (one, other):
        oracles.run(simulation)
    oracles.assert_trees_close(other.variables, one.variables, atol=1e-5)
    oracles.assert_trees_close(
        other.state.algorithm.inner.control, one.state.algorithm.control, rtol=1e-4, atol=1e-5
    )


# --- mistakes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "field", "told"),
    [
        ("adamm", {}, "optimizer", "Did you mean adam"),
        ("Adam", {}, "optimizer", "Did you mean adam"),
        ("sgd", {"beta": 1}, "options.beta", "no such option"),
        ("adam", {"eps": "1e-3"}, "options.eps", "a number"),
        ("apply_updates", {}, "optimizer", "optax"),
        ("__doc__", {}, "optimizer", "no such optimiser"),
        ("l2_loss", {}, "optimizer", "optax"),
    ],
)
def test_what_is_no_optimiser_is_refused(name, options, field, told):
    with pytest.raises(UserError, match=told) as caught:
        FedOpt(name, 0.1, options).build(CONTEXT)
    assert caught.value.field == f"algorithm.{field}"


@pytest.mark.parametrize("lr", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("make", [lambda lr: FedOpt("sgd", lr), FedAvgM, FedAdam, FedYogi])
def test_a_rate_that_is_no_rate_is_refused(make, lr):
    with pytest.raises(UserError, match=r"algorithm\.lr"):
        make(lr)


def test_others_than_sgd_must_be_told_their_rate():
    with pytest.raises(UserError, match=r"algorithm\.lr.*adam"):
        FedOpt("adam")


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (lambda: FedAvgM(momentum=1.0), "momentum"),
        (lambda: FedAdam(b1=1.0), "b1"),
        (lambda: FedAdam(b2=-0.1), "b2"),
        (lambda: FedYogi(tau=0.0), "tau"),
        (lambda: dataclasses.replace(FedOpt(), inner="fedavg"), "inner"),
    ],
)
def test_mistakes_are_named(config, field):
    with pytest.raises(UserError) as caught:
        config()
    assert caught.value.field == f"algorithm.{field}"


def test_inside_is_fedavg_unless_told_otherwise():
    assert all(cls().inner == FedAvg() for cls in (FedOpt, FedAvgM, FedAdam, FedYogi))
