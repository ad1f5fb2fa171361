"""FedProx, FedSAM, FedASAM, FedNTD, MOON, pFedSD: rounds against NumPy, and when they change nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim import models
from fedjax_sim.algorithms import MOON, FedASAM, FedAvg, FedMR, FedNTD, FedProx, FedSAM, PFedSD
from fedjax_sim.algorithms.distillation import divergence
from fedjax_sim.algorithms.moon import cosine
from fedjax_sim.data import Partition
from tests import oracles
from tests.algorithms import objectives, personal
from tests.algorithms.families import but_slow
from tests.algorithms.objectives import entropy

ROUNDS = 3
DRAWN = [[0, 1, 4], [0, 1, 3], [0, 1, 4]]
METHODS = {
    "fedprox": (FedProx(mu=0.5), objectives.proximal(entropy, 0.5)),
    "fedprox_norm": (FedProx(mu=0.05, distance="norm"), objectives.proximal(entropy, 0.05, "norm")),
    "fedsam": (FedSAM(rho=0.3), objectives.flat(entropy, 0.3, objectives.ones)),
    "fedasam": (FedASAM(rho=0.3, eta=0.2), objectives.flat(entropy, 0.3, objectives.adaptive(0.2))),
    "fedntd": (FedNTD(beta=0.7, temperature=2.0), objectives.not_true(entropy, 0.7, 2.0)),
    "moon": (MOON(mu=2.0, temperature=0.3), objectives.contrast(entropy, 2.0, 0.3)),
    "pfedsd": (PFedSD(weight=0.6, temperature=2.0), objectives.taught(entropy, 0.6, 2.0)),
}


def simulate(algorithm, **keywords):
    """Three rounds of 3 in 5 clients: 12 samples are batches of 10 and 2, 3 are one, 31 end with one of 1."""
    settings = {"cohort": 3, "rounds": ROUNDS, "momentum": 0.5, "seed": 1, **keywords}
    # No sample without any active unit, for which a cosine would not be defined.
    model = settings.pop("model", None) or models.create("mlp", (3, 3, 1), 3, hidden=(6, 8))
    return oracles.simulate(personal.SIZES, algorithm=algorithm, model=model, **settings)


# --- rounds ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_rounds_equal_numpy(name):
    """Three unequal clients share a wave: neither padded samples nor steps that a client sits out show.

    FedProx takes its first step at x itself, where a norm that is not squared must not be differentiated.
    """
    algorithm, objective = METHODS[name]
    simulation = simulate(algorithm, wave=3)
    wanted, last, losses = objectives.rounds(simulation, objective, ROUNDS)
    plain, _, _ = objectives.rounds(simulation, entropy, ROUNDS)
    assert oracles.far_apart(wanted, plain) > 2e-3
    # Client 4 sits a round out and comes back, 3 comes later and stays away, 2 is never drawn.
    assert [sorted(simulation.inputs(index)[0].cohort.ids.tolist()) for index in range(ROUNDS)] == DRAWN
    rows = oracles.run(simulation)
    oracles.assert_trees_close(simulation.variables["params"], wanted)
    for number, loss in enumerate(losses, 1):
        assert oracles.value_of(rows, "train_loss", number) == pytest.approx(loss, rel=1e-5)
    if name in ("moon", "pfedsd"):
        kept = jax.device_get(simulation.state.clients["rule"]["own"])
        assert kept.exists.tolist() == [True, True, False, True, True]
        for client, model in last.items():
            oracles.assert_trees_close(personal.row(kept.model, client)["params"], model)


# --- when they are the algorithm inside -----------------------------------------------------------------

ZEROS = {
    "fedprox": FedProx(mu=0.0),
    "fedsam": FedSAM(rho=0.0),
    "fedntd": FedNTD(beta=0.0),
    "moon": MOON(mu=0.0),
    "pfedsd": PFedSD(weight=0.0),
}


@pytest.fixture
def fedavg(optimised):
    return _fedavg()


@functools.cache
def _fedavg():
    simulation = simulate(FedAvg(), model=personal.normed())
    start = jax.device_get(simulation.variables)
    oracles.run(simulation)
    assert oracles.far_apart(simulation.variables, start) > 1e-2
    return jax.device_get(simulation.variables)


@pytest.mark.parametrize("name", but_slow(ZEROS, "fedprox", "fedntd", "pfedsd"))
def test_with_no_weight_it_is_fedavg_batch_statistics_included(name, fedavg):
    """Up to float rounding: the compiler fuses another program."""
    simulation = simulate(ZEROS[name], model=personal.normed())
    oracles.run(simulation)
    oracles.assert_trees_close(simulation.variables, fedavg, atol=1e-6)


@pytest.mark.slow
def test_with_no_weight_all_of_them_around_fedmr_are_fedmr():
    around = FedMR(similarity=False)
    plain = simulate(around)
    for config in (*ZEROS.values(), FedProx(mu=0.0, distance="norm"), FedASAM(rho=0.0)):
        around = type(config)(**{**vars(config), "inner": around})
    nested = simulate(around)
    start = jax.device_get(plain.variables)
    for simulation in (plain, nested):
        oracles.run(simulation)
    oracles.assert_trees_close(nested.variables, plain.variables, atol=1e-6)
    oracles.assert_trees_close(nested.state.algorithm.slots, plain.state.algorithm.slots, atol=1e-6)
    assert oracles.far_apart(plain.variables, start) > 1e-2


# --- what each is about ---------------------------------------------------------------------------------


@pytest.mark.parametrize("adaptive", [False, True])
def test_sam_climbs_to_the_edge_of_the_neighbourhood(adaptive, rng):
    """The second gradient is taken at w + ε: ‖T⁻¹ε‖ = ρ, along T g; biases of any shape have T = 1."""
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    like = {"a": {"kernel": (3, 2), "bias": (2, 2)}, "n": {"scale": (4,), "bias": (4,)}, "table": (2, 3)}
    w, g = (jax.tree.map(lambda s: draw(*s), like, is_leaf=lambda s: isinstance(s, tuple)) for _ in range(2))
    config = FedASAM(rho=0.7, eta=0.1) if adaptive else FedSAM(rho=0.7)
    rule = config.build(oracles.context(personal.deep(), 5, 3, 10)).local
    asked = []

    def loss_and_grad(variables, batch):
        asked.append(variables["params"])
        return (len(asked), {"moved": len(asked)}), g

    told, moved, *_ = rule.gradient(loss_and_grad, {"params": w}, None, {"inner": None, "own": None})
    assert (told, moved) == (1, {"moved": 1})
    oracles.assert_trees_equal(asked[0], w)
    tree = oracles.doubled(w)
    t = objectives.ones(tree)
    if adaptive:
        t["a"]["kernel"], t["n"]["scale"], t["table"] = (
            np.abs(leaf) + 0.1 for leaf in (tree["a"]["kernel"], tree["n"]["scale"], tree["table"])
        )
    epsilon = objectives.added(oracles.doubled(asked[1]), tree, -1)
    inside = oracles.map_trees(lambda e, t: e / t, epsilon, t)
    assert objectives.norm(inside) == pytest.approx(0.7, rel=1e-5)
    along = oracles.map_trees(lambda t, g: t * g, t, oracles.doubled(g))
    along = oracles.map_trees(lambda leaf: 0.7 * leaf / objectives.norm(along), along)
    oracles.assert_trees_close(inside, along)


def test_sam_stays_where_there_is_no_gradient():
    w = {"fc": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
    for config in (FedSAM(), FedASAM()):
        rule = config.build(oracles.context(personal.deep(), 5, 3, 10)).local
        asked = []

        def loss_and_grad(variables, batch, asked=asked):
            asked.append(variables["params"])
            return (0.0, {}), jax.tree.map(jnp.zeros_like, w)

        rule.gradient(loss_and_grad, {"params": w}, None, {"inner": None, "own": None})
        oracles.assert_trees_equal(asked[1], w)


def test_cosine_of_rows_that_are_zero_tiny_or_huge():
    a = jnp.asarray([[0.0, 0], [3, 4], [1e-15, 0], [1e15, 1e15], [1, 2]])
    b = jnp.asarray([[1.0, 2], [0, 0], [1e-15, 1e-15], [1e15, 0], [-2, -4]])
    half = 0.5**0.5
    np.testing.assert_allclose(cosine(a, b), [0, 0, half, half, -1], rtol=1e-6)
    of_a, of_b = jax.grad(lambda a, b: cosine(a, b).sum(), (0, 1))(a, b)
    assert np.isfinite(of_a).all() and not np.asarray(of_b).any()


def test_divergence_leaves_padding_the_teacher_and_ruled_out_classes_alone(rng):
    teacher, student = rng.normal(size=(2, 4, 5)) * 3
    teacher[3, 0] = student[3, 0] = 1e4  # padding
    mask = np.array([True, True, True, False])
    value, slope = objectives.divergence(teacher[:3, 1:], student[:3, 1:], 2.0)
    out = np.where(np.arange(5) == 0, -np.inf, 0)[None]
    single = lambda x: jnp.asarray(x + out, jnp.float32)  # noqa: E731
    got, slopes = jax.value_and_grad(divergence, (0, 1))(single(teacher), single(student), mask, 2.0)
    assert got == pytest.approx(value, rel=1e-5)
    np.testing.assert_allclose(slopes[1][:3, 1:], slope, rtol=1e-4, atol=1e-6)
    assert not np.asarray(slopes[0]).any()
    assert not np.asarray(slopes[1])[3].any() and not np.asarray(slopes[1])[:, 0].any()


def test_under_pfedsd_a_client_uses_what_it_last_trained_or_the_global_model():
    dataset, partition = oracles.world(personal.SIZES, tests=200)
    tests = tuple(np.split(np.arange(200), 5))
    simulation = oracles.simulate(
        given=(dataset, Partition(partition.train, tests, "test")),
        algorithm=PFedSD(),
        model=personal.deep(),
        cohort=2,
        rounds=2,
        seed=3,
        lr=0.3,
        evaluation=oracles.EvaluationConfig(every=2, per_client=True),
    )
    wanted, last, _ = objectives.rounds(simulation, objectives.taught(entropy, 0.5, 3.0), 2)
    assert sorted(last) == [0, 1, 3, 4]
    rows = oracles.run(simulation)
    got = {row.client: row.value for row in rows if row.metric == "client_accuracy"}
    right = {}
    for client, own in enumerate(tests):
        for name, model in (("mine", last.get(client, wanted)), ("global", wanted)):
            logits, _ = oracles.mlp(model, oracles.normalised(dataset.test_images[own]))
            right[name, client] = (logits.argmax(1) == dataset.test_labels[own]).mean()
    assert got == pytest.approx({client: right["mine", client] for client in range(5)})
    assert any(right["mine", client] != right["global", client] for client in last)
