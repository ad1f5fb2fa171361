"""SCAFFOLD, FedDyn, FedExP, FedNova, FedMut: rounds of each against NumPy, and where they become FedAvg."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedjax_sim as fs
from fedjax_sim import models
from fedjax_sim.algorithms import CONFIGS, FedDyn, FedExP, FedMut, FedNova, Scaffold
from fedjax_sim.algorithms.fednova import total
from fedjax_sim.core.algorithm import Cohort, Results
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.rng import SERVER, key_for
from fedjax_sim.engine.round import _DISPATCH
from tests import oracles
from tests.engine.test_round import poisoned
from tests.oracles import map_trees, weighted_mean

SIZES = (12, 7, 20, 3, 31)  # at batch 10 and 2 epochs 4, 2, 4, 2 and 8 steps, most last batches partial
MODEL = models.create("mlp", (3, 3, 1), 3, hidden=(4,))
CONTEXT = oracles.context(MODEL, num_clients=5, cohort_size=3, rounds=4)
WIDE = {"wave": 3}  # clients of unlike lengths side by side
ROOT = jax.random.key(0)


def zeros(tree):
    return map_trees(np.zeros_like, tree)


def plain(gradient, w):
    return gradient


# --- NumPy ----------------------------------------------------------------------------------------------


def own_data(simulation, client):
    own = simulation.setup.partition.train[client]
    dataset = simulation.setup.dataset
    return oracles.normalised(dataset.train_images[own]), dataset.train_labels[own]


def batches_of(simulation, index, client):
    setup = simulation.setup
    count = len(setup.partition.train[client])
    return list(oracles.client_batches(setup.config.seed, index, client, count, setup.config.local))


def rate_of(simulation, index):
    return simulation.setup.config.local.lr_at(index, simulation.setup.config.rounds)


def train(simulation, index, client, start, direction=plain):
    """SGD along `direction(gradient, w)`, then clipping, L2 and momentum as the run has them."""
    local, lr = simulation.setup.config.local, rate_of(simulation, index)
    x, y = own_data(simulation, client)
    w, buffer = start, zeros(start)
    for chosen in batches_of(simulation, index, client):
        g = direction(oracles.mlp_gradient(w, x[chosen], y[chosen])[1], w)
        if local.clip_norm is not None:
            norm = np.sqrt(sum((leaf**2).sum() for leaf in oracles.leaves(g)))
            g = map_trees(lambda g, norm=norm: g * min(1.0, local.clip_norm / norm), g)
        g = map_trees(lambda g, w: g + local.weight_decay * w, g, w)
        buffer = map_trees(lambda b, g: local.momentum * b + g, buffer, g)
        step = map_trees(lambda g, b: g + local.momentum * b, g, buffer) if local.nesterov else buffer
        w = map_trees(lambda w, s: w - lr * s, w, step)
    return w


def cohort_of(simulation, index, out=()):
    return [c for c in simulation.inputs(index)[0].cohort.ids.tolist() if c not in out]


def initial(simulation):
    """The first model, in float64."""
    return oracles.doubled(simulation.variables["params"])


def squares(tree):
    return sum((leaf**2).sum() for leaf in oracles.leaves(tree))


def minus(a, b):
    return map_trees(np.subtract, a, b)


def kept_by(simulation):
    """What clients keep: client -> tree."""
    stack = jax.device_get(simulation.state.clients["rule"])
    return [jax.tree.map(lambda leaf, c=c: leaf[c], stack) for c in range(simulation.setup.num_clients)]


def scaffold(simulation, rounds, out=()):
    """-> (x, c, [c_i])."""
    config, clients = simulation.setup.config.algorithm, simulation.setup.num_clients
    x = initial(simulation)
    c, own = zeros(x), [zeros(x)] * clients
    for index in range(rounds):
        trained, changes = [], []
        for client in cohort_of(simulation, index, out):
            y = train(
                simulation, index, client, x,
                lambda g, w, c=c, c_i=own[client]: map_trees(lambda g, c, c_i: g + c - c_i, g, c, c_i),
            )  # fmt: skip
            steps = batches_of(simulation, index, client)
            if config.option == "I":
                data, labels = own_data(simulation, client)
                seen = np.concatenate(steps[: -(-len(labels) // 10)])  # of the first epoch
                new = oracles.mlp_gradient(x, data[seen], labels[seen])[1]
            else:
                local = simulation.setup.config.local
                momentum = local.momentum if config.divisor == "gradients" else 0.0
                scale = 1 / (entries(len(steps), momentum, local.nesterov) * rate_of(simulation, index))
                new = map_trees(lambda i, c, x, y, s=scale: i - c + s * (x - y), own[client], c, x, y)
            trained.append(y)
            changes.append(minus(new, own[client]))
            own[client] = new
        mean = weighted_mean(trained, [1] * len(trained))
        x = map_trees(lambda x, y: x + config.server_lr * (y - x), x, mean)
        c = map_trees(lambda c, *d: c + sum(d) / clients, c, *changes)
    return x, c, own


def feddyn(simulation, rounds, out=()):
    """-> (x, h, [∇L_k])."""
    alpha, clients = simulation.setup.config.algorithm.alpha, simulation.setup.num_clients
    x = initial(simulation)
    h, own = zeros(x), [zeros(x)] * clients
    for index in range(rounds):
        trained = []
        for client in cohort_of(simulation, index, out):
            w = train(
                simulation, index, client, x,
                lambda g, w, x=x, own=own[client]: map_trees(
                    lambda g, o, w, x: g - o + alpha * (w - x), g, own, w, x
                ),
            )  # fmt: skip
            own[client] = map_trees(lambda o, w, x: o - alpha * (w - x), own[client], w, x)
            trained.append(w)
        for w in trained:
            h = map_trees(lambda h, w, x: h - alpha / clients * (w - x), h, w, x)
        mean = weighted_mean(trained, [1] * len(trained))
        x = map_trees(lambda w, h: w - h / alpha, mean, h)
    return x, h, own


def fedexp(simulation, rounds, out=()):
    """-> (iterates from the first model on, server learning rates)."""
    config = simulation.setup.config.algorithm
    size = simulation.setup.cohort_size
    iterates, rates = [initial(simulation)], []
    for index in range(rounds):
        x, ids = iterates[-1], cohort_of(simulation, index, out)
        moves = [minus(train(simulation, index, client, x), x) for client in ids]
        weights = [1] * len(ids) if config.variant == "paper" else oracles.sizes_of(simulation)[ids]
        mean, spread = weighted_mean(moves, weights), np.average([squares(m) for m in moves], weights=weights)
        epsilon = config.epsilon or (1e-3 if config.variant == "paper" else 0.1 * size)
        rates.append(max(1, spread / (2 * (squares(mean) + epsilon))))
        iterates.append(map_trees(lambda x, d, r=rates[-1]: x + r * d, x, mean))
    return iterates, rates


def entries(steps, momentum, nesterov):
    """‖a‖₁ by counting: how often each of the gradients, by itself, enters the displacement."""
    counted = 0.0
    for alone in range(steps):
        buffer = 0.0
        for s in range(steps):
            g = float(s == alone)
            buffer = momentum * buffer + g
            counted += g + momentum * buffer if nesterov else buffer
    return counted


def fednova(simulation, rounds, out=()):
    """-> (x, effective steps)."""
    setup = simulation.setup
    local = setup.config.local
    x, effective = initial(simulation), []
    for index in range(rounds):
        ids = cohort_of(simulation, index, out)
        sizes = oracles.sizes_of(simulation)[ids]
        p = sizes / sizes.sum() if setup.config.algorithm.weights == "samples" else [1 / len(ids)] * len(ids)
        a = [entries(len(batches_of(simulation, index, c)), local.momentum, local.nesterov) for c in ids]
        effective.append(np.dot(p, a))
        moves = [minus(train(simulation, index, client, x), x) for client in ids]
        factors = effective[-1] * np.divide(p, a)
        x = map_trees(lambda x, *d, f=factors: x + sum(np.multiply(k, m) for k, m in zip(f, d)), x, *moves)  # noqa: B905
    return x, effective


# --- rounds ---------------------------------------------------------------------------------------------


def simulate(algorithm, **keywords):
    return oracles.simulate(SIZES, algorithm=algorithm, **{"cohort": 3, "rounds": 3, **keywords})


@pytest.mark.parametrize(
    ("algorithm", "keywords"),
    [
        (Scaffold(), {}),
        (Scaffold(server_lr=0.5), {"momentum": 0.5, "weight_decay": 0.05, "clip_norm": 0.3, **WIDE}),
        pytest.param(Scaffold(), {"momentum": 0.9, "nesterov": True}, marks=pytest.mark.slow),
        (Scaffold(divisor="steps"), {"momentum": 0.5}),
        (Scaffold(option="I", server_lr=1.5), WIDE),
        (Scaffold(option="I"), {"devices": 2, "wave": 2, "rounds": 2}),
        (Scaffold(option="I"), {"steps": 3, **WIDE}),  # the largest client has no time for all its samples
    ],
    ids=["II", "II-momentum", "II-nesterov", "II-by-steps", "I", "I-two-devices", "I-steps"],
)
def test_scaffold(algorithm, keywords):
    simulation = simulate(algorithm, **keywords)
    start, rounds = initial(simulation), simulation.setup.config.rounds
    averaged, _ = oracles.fedavg_round(start, simulation, 0, "uniform")
    x, c, own = scaffold(simulation, rounds)
    oracles.run(simulation, 1)
    first = simulation.variables["params"]
    if algorithm.server_lr == 1:  # no control variates yet
        oracles.assert_trees_close(first, averaged)
    else:
        assert oracles.far_apart(first, averaged) > 1e-3
    oracles.run(simulation)
    oracles.assert_trees_close(simulation.variables["params"], x)
    oracles.assert_trees_close(simulation.state.algorithm.control, c)
    drawn = {client for index in range(rounds) for client in cohort_of(simulation, index)}
    for client, kept in enumerate(kept_by(simulation)):
        oracles.assert_trees_close(kept, own[client])
        assert (oracles.far_apart(kept, zeros(kept)) > 1e-3) == (client in drawn)
    oracles.assert_trees_close(c, weighted_mean(own, [1] * 5))
    assert oracles.far_apart(c, zeros(c)) > 1e-3


def test_momentum_does_not_drive_control_variates_apart():
    """Divided by steps they hold 1/(1 − ρ) times too much, and what is too much comes back larger."""
    sizes = {}
    for divisor in ("gradients", "steps"):
        simulation = simulate(Scaffold(divisor=divisor), momentum=0.9, lr=0.01, steps=30, rounds=12)
        oracles.run(simulation)
        sizes[divisor] = np.sqrt(max(squares(kept) for kept in kept_by(simulation)))
    assert sizes["gradients"] < 10 < sizes["steps"] / 10


@pytest.mark.parametrize("lr", [0.0, 1e-60, 1e-45, 1e-39, 1e-37, 1e-20, 0.1])
def test_a_client_that_cannot_move_keeps_its_control_variate(lr):
    """Of SGD's displacement −η τ g what float32 leaves: at tiny rates only a weight that is 0 moves."""
    x, g = jnp.asarray([0.5, -2.0, 0.0]), jnp.asarray([1.0, -4.0, 3.0])
    c_i, c, steps = jnp.asarray([0.25, 1.0, -1.0]), jnp.asarray([2.0, -0.5, 0.5]), jnp.int32(4)
    rate = jnp.asarray(np.float32(lr))
    y = x - 4 * rate * (g + c - c_i)
    new, change = (
        Scaffold()
        .build(CONTEXT)
        .local.finish_round({"params": x}, {"params": y}, c_i, {"c": c, "c_i": c_i}, steps, rate, None)
    )
    renewed = {0.1: [True] * 3, 1e-20: [False, False, True], 1e-37: [False, False, True]}.get(lr, [False] * 3)
    np.testing.assert_allclose(new, np.where(renewed, g, c_i), rtol=1e-5)
    np.testing.assert_array_equal(change, new - c_i)


def test_scaffold_wants_sgd_for_option_ii():
    adam = dataclasses.replace(CONTEXT, local=fs.LocalConfig(optimizer="adam"))
    with pytest.raises(UserError, match="sum of gradients") as caught:
        Scaffold().build(adam)
    assert caught.value.field == "local.optimizer"
    Scaffold(option="I").build(adam)


@pytest.mark.parametrize("keywords", [{"momentum": 0.5}, WIDE], ids=["momentum", "wide"])
def test_feddyn(keywords):
    simulation = simulate(FedDyn(alpha=0.3), **keywords)
    start = initial(simulation)
    x, h, own = feddyn(simulation, 3)
    oracles.run(simulation)
    oracles.assert_trees_close(simulation.variables["params"], x)
    oracles.assert_trees_close(simulation.state.algorithm.shift, map_trees(lambda h: h / 0.3, h))
    for client, kept in enumerate(kept_by(simulation)):
        oracles.assert_trees_close(kept, own[client])
    oracles.assert_trees_close(h, weighted_mean(own, [1] * 5))  # sums of the same displacements
    averaged = start
    for index in range(3):
        averaged, _ = oracles.fedavg_round(averaged, simulation, index, "uniform")
    assert oracles.far_apart(x, averaged) > 1e-2


def by_class():
    """A client for each of three classes, and two mixed ones: their updates disagree."""
    dataset, _ = oracles.world((73,))
    order = np.argsort(dataset.train_labels, kind="stable")
    parts = [order[np.sort(dataset.train_labels) == label] for label in range(3)]
    mixed = [np.concatenate([part[:3] for part in parts]), np.concatenate([part[3:8] for part in parts])]
    return dataset, oracles.Partition((parts[0][8:], parts[1][8:], parts[2][8:], *mixed))


@pytest.mark.parametrize(
    "algorithm",
    [FedExP(epsilon=1e-4), FedExP(variant="fedmr", epsilon=1e-4), FedExP(variant="fedmr", averages=False)],
    ids=["paper", "fedmr", "fedmr-last"],
)
def test_fedexp(algorithm):
    simulation = oracles.simulate(
        given=by_class(), algorithm=algorithm, cohort=3, rounds=3, epochs=4, lr=0.5, wave=2
    )
    iterates, rates = fedexp(simulation, 3)
    for number, expected in enumerate(iterates):
        if number:
            rows = oracles.run(simulation, 1)
            assert oracles.value_of(rows, "server_lr", number) == pytest.approx(rates[number - 1], rel=1e-5)
        if algorithm.averages and number > 1:
            expected = weighted_mean([expected, iterates[number - 1]], [1, 1])
        oracles.assert_trees_close(simulation.variables["params"], expected)
        two = jnp.arange(2, dtype=jnp.int32)
        held = simulation.setup.algorithm.client_models(simulation.state.algorithm, two, two)
        oracles.assert_trees_close(jax.tree.map(lambda leaf: leaf[1], held)["params"], iterates[number])
    assert max(rates) > 1.05


def test_fedexp_with_a_huge_epsilon_is_fedavg():
    simulation = simulate(FedExP(epsilon=1e9, averages=False), rounds=2)
    expected = initial(simulation)
    oracles.run(simulation)
    for index in range(2):
        expected, _ = oracles.fedavg_round(expected, simulation, index, "uniform")
    oracles.assert_trees_close(simulation.variables["params"], expected)


def with_statistics(*values):
    return [{"params": {"w": jnp.float32([p, p])}, "batch_stats": {"m": jnp.float32([s])}} for p, s in values]


COHORT = Cohort(jnp.arange(3), jnp.asarray([1, 2, 3]), jnp.int32(1), jnp.asarray([1, 2, 3]))


def test_which_coordinates_fedexp_extends():
    """Norms are of parameters in both variants; only FedMR's extends batch statistics too."""
    start, mean = with_statistics((1.0, 10.0), (2.0, 14.0))
    results = Results(None, mean, jnp.float32([2, 20, 9]), jnp.asarray([True, True, False]), jnp.zeros(3))
    for variant, rate, statistics in (
        ("paper", 11 / (2 * (2 + 0.5)), 14.0),
        ("fedmr", 14 / (2 * (2 + 0.5)), 10 + 4 * 2.8),
    ):
        record = FedExP(variant=variant, epsilon=0.5).build(CONTEXT)
        state, metrics = record.merge(record.init(ROOT, start), COHORT, None, results, ROOT)
        np.testing.assert_allclose(metrics["server_lr"], rate, rtol=1e-6)
        np.testing.assert_allclose(state.model["params"]["w"], [1 + rate] * 2, rtol=1e-6)
        np.testing.assert_allclose(state.model["batch_stats"]["m"], statistics, rtol=1e-6)
        deployed = record.deploy(state)["params"]["w"]
        np.testing.assert_allclose(deployed, [1 + rate / 2] * 2, rtol=1e-6)


@pytest.mark.parametrize(("variant", "epsilon"), [("paper", 1e-3), ("fedmr", 0.3)], ids=["paper", "fedmr"])
def test_fedexps_epsilon_if_none_is_given(variant, epsilon):
    start, mean = with_statistics((1.0, 0.0), (1.0, 0.0))
    results = Results(None, mean, jnp.float32([2, 2, 2]), jnp.ones(3, bool), jnp.zeros(3))
    record = FedExP(variant=variant).build(CONTEXT)
    _, metrics = record.merge(record.init(ROOT, start), COHORT, None, results, ROOT)
    np.testing.assert_allclose(metrics["server_lr"], 1 / epsilon, rtol=1e-6)


@pytest.mark.parametrize(
    ("algorithm", "keywords"),
    [
        (FedNova(), {"wave": 2}),
        (FedNova(weights="uniform"), {"momentum": 0.9, **WIDE}),
        (FedNova(), {"momentum": 0.9, "nesterov": True, "weight_decay": 0.05}),
    ],
    ids=["sgd", "momentum", "nesterov"],
)
def test_fednova(algorithm, keywords):
    simulation = simulate(algorithm, **keywords)
    averaged, _ = oracles.fedavg_round(initial(simulation), simulation, 0, algorithm.weights)
    assert oracles.far_apart(fednova(simulation, 1)[0], averaged) > 1e-3
    x, effective = fednova(simulation, 3)
    rows = oracles.run(simulation)
    oracles.assert_trees_close(simulation.variables["params"], x)
    for number, steps in enumerate(effective, start=1):
        assert oracles.value_of(rows, "effective_steps", number) == pytest.approx(steps, rel=1e-5)


def test_fednova_with_equal_steps_is_fedavg():
    simulation = simulate(FedNova(), steps=3, momentum=0.9, rounds=2, **WIDE)
    expected = initial(simulation)
    oracles.run(simulation)
    for index in range(2):
        expected, _ = oracles.fedavg_round(expected, simulation, index)
    oracles.assert_trees_close(simulation.variables["params"], expected)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.5, 0.9, 0.99])
def test_how_often_gradients_enter(momentum, nesterov):
    steps = np.array([1, 2, 3, 10, 40])
    got = total(jnp.asarray(steps, jnp.int32), momentum, nesterov)
    wanted = [entries(tau, momentum, nesterov) for tau in steps.tolist()]
    np.testing.assert_allclose(got, wanted, rtol=2e-5)
    assert total(jnp.zeros(1, jnp.int32), momentum)[0] == pytest.approx(1, rel=1e-5)  # an empty place


def test_fednova_averages_statistics_with_its_own_weights():
    """The engine's mean has them; the merge must leave it alone where it moves the parameters on."""
    record = FedNova().build(CONTEXT)
    np.testing.assert_allclose(record.weights(COHORT), [1, 1, 1])
    start, mean = with_statistics((1.0, 10.0), (2.0, 14.0))
    results = Results(None, mean, None, jnp.ones(3, bool), jnp.zeros(3))
    state, _ = record.merge(start, COHORT, None, results, ROOT)
    assert state["batch_stats"]["m"] == 14
    # τ_eff Σ p/τ = (1 + 4 + 9)/6 · 3/6
    np.testing.assert_allclose(state["params"]["w"], [1 + 14 / 6 / 2] * 2, rtol=1e-6)


# --- FedMut ---------------------------------------------------------------------------------------------


def starts_of(simulation, index):
    """What the slots of the round to come start from, in float64."""
    inputs, _ = simulation.inputs(index)
    key = key_for(key_for(inputs.key, SERVER, np.int32(index)), _DISPATCH)
    starts = simulation.setup.algorithm.dispatch(simulation.state.algorithm, inputs.cohort, key)
    stack = oracles.doubled(starts.models["params"])
    return [map_trees(lambda leaf, k=k: leaf[k], stack) for k in range(simulation.setup.cohort_size)]


@pytest.mark.parametrize(
    "keywords", [pytest.param({"cohort": 3}, marks=pytest.mark.slow), {"cohort": 4, "devices": 2, "wave": 2}]
)
def test_fedmut(keywords):
    """Starts as the algorithm draws them; means and steps from there on as NumPy has them."""
    simulation = simulate(FedMut(alpha=2.0, until=1), **keywords)
    x = initial(simulation)
    slots = simulation.setup.cohort_size
    for index in range(3):
        starts = starts_of(simulation, index)
        spread = max(oracles.far_apart(start, x) for start in starts)
        assert spread == pytest.approx(0, abs=1e-6) if index == 0 else spread > 1e-2
        total_of_starts = map_trees(lambda *leaves: sum(leaves), *starts)
        off = oracles.far_apart(total_of_starts, map_trees(lambda leaf: slots * leaf, x))
        assert off < 1e-4 if index != 1 else off > 1e-3  # β_1 = β₀, β_2 = 0
        _, trained, _ = oracles.train_cohort(starts, simulation, index)
        new = weighted_mean(trained, [1] * slots)
        step = minus(new, x)
        oracles.run(simulation, 1)
        x = new
        oracles.assert_trees_close(simulation.variables["params"], x)
        oracles.assert_trees_close(simulation.state.algorithm.step, step)
        x = oracles.doubled(simulation.variables["params"])  # no drift of single precision, four times over


def dispatched(slots, number, key=ROOT, **settings):
    """Multiples of Δ at which slots start, f64[tensors, K]; batch statistics must not move."""
    record = FedMut(**settings).build(oracles.context(MODEL, 9, slots, 100))
    names = "abcde"
    start = {
        "params": {name: jnp.full((2, 3), float(n)) for n, name in enumerate(names)},
        "batch_stats": {"m": jnp.ones(4)},
    }
    step = {name: jnp.full((2, 3), 0.5) for name in names}
    state = record.init(ROOT, start).replace(step=step)
    cohort = Cohort(jnp.arange(slots), jnp.ones(slots, jnp.int32), jnp.int32(number))
    starts = record.dispatch(state, cohort, key)
    assert not starts.shared
    np.testing.assert_array_equal(starts.models["batch_stats"]["m"], np.ones((slots, 4)))
    moved = [np.asarray(starts.models["params"][name]) - n for n, name in enumerate(names)]
    for leaf in moved:
        assert (leaf == leaf[:, :1, :1]).all()  # the whole tensor one way
    return np.stack([leaf[:, 0, 0] / 0.5 for leaf in moved])


@pytest.mark.parametrize("slots", [2, 3, 6, 7])
def test_pairs_of_mutations(slots):
    for number, beta in ((1, 0.5), (3, 0.25), (5, 0.0), (50, 0.0)):
        drawn = dispatched(slots, number, alpha=2.0, beta=0.5, until=4)
        pairs = slots // 2
        wanted = sorted([2.0] * pairs + [2 * (beta - 1)] * pairs)
        for row in drawn:
            np.testing.assert_allclose(sorted(row[: 2 * pairs]), wanted, atol=1e-6)
            np.testing.assert_array_equal(row[2 * pairs :], 0)


def test_one_slot_has_no_pair():
    with pytest.raises(UserError, match=r"cohort\.size = 1.*pairs"):
        dispatched(1, 1)
    dispatched(1, 1, alpha=0.0)


def test_each_tensor_and_each_round_draws_anew():
    draws = np.stack([dispatched(6, 9, jax.random.key(n), until=1) for n in range(30)])
    assert len({row.tobytes() for row in draws.reshape(-1, 6)}) == 20  # 6 over 3, all of them
    assert max(len({row.tobytes() for row in one}) for one in draws) >= 4


@pytest.mark.parametrize("slots", [2, 5])
def test_mutation_of_no_size_is_uniform_fedavg(slots):
    simulation = simulate(FedMut(alpha=0.0), cohort=slots, rounds=2)
    expected = initial(simulation)
    oracles.run(simulation)
    for index in range(2):
        expected, _ = oracles.fedavg_round(expected, simulation, index, "uniform")
    oracles.assert_trees_close(simulation.variables["params"], expected)


# --- clients that are left out --------------------------------------------------------------------------


def overflowed(simulation):
    """The state after a further round at an infinite rate, which nobody survives."""
    inputs, _ = simulation.inputs(simulation.round)
    with jax.set_mesh(simulation.mesh):
        simulation.state, outputs = simulation.program(
            simulation.state, inputs.replace(lr=np.float32(np.inf)), simulation.data, None
        )
    assert not np.asarray(outputs.included).any()
    return simulation.state


@pytest.mark.parametrize(
    ("algorithm", "oracle"),
    [
        (Scaffold(server_lr=0.5), scaffold),
        pytest.param(Scaffold(option="I"), scaffold, marks=pytest.mark.slow),
        (FedDyn(alpha=0.3), feddyn),
        (FedExP(averages=False, epsilon=1e-4), fedexp),
        pytest.param(FedExP(variant="fedmr", averages=False), fedexp, marks=pytest.mark.slow),
        (FedNova(), fednova),
        (FedMut(alpha=2.0), None),
    ],
    ids=["scaffold", "scaffold-I", "feddyn", "fedexp", "fedexp-fedmr", "fednova", "fedmut"],
)
def test_a_client_that_is_left_out(algorithm, oracle):
    """It counts in N only; and a round of such clients alone changes nothing."""
    simulation = poisoned(algorithm, non_finite="skip", rounds=3, wave=2, donate=False)
    if oracle is None:
        x = initial(simulation)
        for index in range(2):
            ids, trained, _ = oracles.train_cohort(starts_of(simulation, index), simulation, index)
            kept = [model for client, model in zip(ids, trained, strict=True) if client != 2]
            before, x = x, weighted_mean(kept, [1] * 3)
            rows = oracles.run(simulation, 1)
        oracles.assert_trees_close(simulation.state.algorithm.step, minus(x, before))
        result = [x]
    else:
        result = list(oracle(simulation, 2, out=(2,)))
        rows = oracles.run(simulation, 2)
    assert [row.client for row in rows if row.metric == "left_out" and row.round == 2] == [2]
    x = result[0][-1] if isinstance(result[0], list) else result[0]
    oracles.assert_trees_close(simulation.variables["params"], x)
    if isinstance(algorithm, Scaffold):
        oracles.assert_trees_close(simulation.state.algorithm.control, result[1])
    if isinstance(algorithm, Scaffold | FedDyn):
        for client, kept in enumerate(kept_by(simulation)):
            oracles.assert_trees_close(kept, result[2][client])
            assert (oracles.far_apart(kept, zeros(kept)) > 1e-3) == (client != 2)
    before, mine = jax.device_get((simulation.variables, simulation.state.clients))
    after = overflowed(simulation)
    oracles.assert_trees_close(simulation.variables, before, rtol=0, atol=1e-7)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(after.clients), mine)
    if isinstance(algorithm, FedMut):
        assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(after.algorithm.step))


# --- mistakes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "field"),
    [
        ("scaffold", {"option": "III"}, "algorithm.option"),
        ("scaffold", {"divisor": "step"}, "algorithm.divisor"),
        ("scaffold", {"server_lr": 0.0}, "algorithm.server_lr"),
        ("scaffold", {"server_lr": float("nan")}, "algorithm.server_lr"),
        ("feddyn", {"alpha": 0.0}, "algorithm.alpha"),
        ("feddyn", {"alpha": float("inf")}, "algorithm.alpha"),
        ("fedexp", {"variant": "code"}, "algorithm.variant"),
        ("fedexp", {"epsilon": 0.0}, "algorithm.epsilon"),
        ("fedexp", {"epsilon": 1e-46}, "algorithm.epsilon"),
        ("fedadam", {"tau": 1e-40}, "algorithm.tau"),
        ("moon", {"temperature": 1e-40}, "algorithm.temperature"),
        ("pfedsd", {"temperature": 1e-40}, "algorithm.temperature"),
        ("fedntd", {"temperature": 1e-40}, "algorithm.temperature"),
        ("fedexp", {"averages": 2}, "algorithm.averages"),
        ("fednova", {"weights": "even"}, "algorithm.weights"),
        ("fedmut", {"alpha": -1.0}, "algorithm.alpha"),
        ("fedmut", {"beta": 1.5}, "algorithm.beta"),
        ("fedmut", {"until": 0}, "algorithm.until"),
        ("fedmut", {"until": 1.5}, "algorithm.until"),
    ],
)
def test_mistakes_are_named(name, settings, field):
    with pytest.raises(UserError) as caught:
        CONFIGS[name](**settings)
    assert caught.value.field == field


def test_fednova_wants_sgd():
    with pytest.raises(UserError, match="SGD") as caught:
        oracles.simulate(SIZES, algorithm=FedNova(), optimizer="adam")
    assert caught.value.field == "local.optimizer"
