"""Movement of layers: every figure against NumPy in float64, and what measuring must not change."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from fedjax_sim import models
from fedjax_sim.algorithms import FedAvg, FedMR
from fedjax_sim.config import InertiaConfig
from fedjax_sim.core.errors import UserError
from fedjax_sim.engine.round import ServerState
from fedjax_sim.probes.inertia.movement import METRICS, OF_REFERENCE, weight_layers
from fedjax_sim.runs.checkpoint import Checkpoints
from fedjax_sim.runs.federation import Simulation
from tests import oracles
from tests.algorithms import personal
from tests.engine.test_round import Poisonable

SIZES = (12, 7, 31, 7, 31, 12)
REFERENCE, ROUNDS = 2, 4
LAYERS = ("fc1", "fc2", "fc3")


def measured(simulation, **settings):
    """The same run, with what is measured of its inertia."""
    setup = simulation.setup
    config = dataclasses.replace(setup.config, inertia=InertiaConfig(**settings))
    return Simulation(oracles.configured(setup, config))


def plain(algorithm, devices, wave):
    """Five clients of six: the layouts below leave a place or more empty."""
    return oracles.simulate(
        SIZES,
        algorithm=algorithm,
        model=personal.deep(),
        cohort=5,
        rounds=ROUNDS,
        momentum=0.9,
        clip_norm=1.0,
        devices=devices,
        wave=wave,
    )


# --- by hand --------------------------------------------------------------------------------------------


def train(starts, simulation, index):
    """Every client of a round. -> (ids, trained models, gradients of the last steps, not yet clipped)."""
    setup = simulation.setup
    local, ids = setup.config.local, simulation.inputs(index)[0].cohort.ids.tolist()
    trained, gradients = [], []
    for client, start in zip(ids, starts, strict=True):
        own = setup.partition.train[client]
        x, labels = oracles.normalised(setup.dataset.train_images[own]), setup.dataset.train_labels[own]
        batches = list(oracles.client_batches(setup.config.seed, index, client, len(own), local))
        there, buffer, _ = oracles.local_sgd(start, x, labels, batches[:-1], local, local.lr)
        gradients.append(oracles.mlp_gradient(there, x[batches[-1]], labels[batches[-1]])[1])
        trained.append(oracles.local_sgd(there, x, labels, batches[-1:], local, local.lr, buffer)[0])
    return ids, trained, gradients


def figures(layer, old, new, reference, starts, trained, gradients):
    """All figures of one layer. Models as nested dicts; `reference` None: nothing is said of it."""
    vector = lambda tree: tree[layer]["kernel"].ravel()  # noqa: E731
    norm = np.linalg.norm
    moves = np.asarray([vector(b) - vector(a) for a, b in zip(starts, trained, strict=True)])
    g = np.asarray([vector(tree) for tree in gradients])
    out = {
        "inertia_step": norm(vector(new) - vector(old)) / norm(vector(old)),
        "inertia_update": norm(moves, axis=1).mean(),
        "inertia_cancellation": norm(moves.mean(0)) / norm(moves, axis=1).mean(),
        "gradient_norm": norm(g, axis=1).mean(),
        "gradient_diversity": (norm(g, axis=1) ** 2).mean() / norm(g.mean(0)) ** 2,
        "gradient_spread": math.sqrt((norm(g - g.mean(0), axis=1) ** 2).mean()),
    }
    if reference is not None:
        a, b = vector(reference), vector(new)
        out |= {
            "inertia_displacement": norm(b - a) / norm(a),
            "inertia_cosine": a @ b / (norm(a) * norm(b)),
            "inertia_l1": np.abs(b - a).sum(),
            "inertia_l2": norm(b - a),
        }
    return out


def expected(simulation, initial, slots):
    """(round, layer, metric) -> value. slots: K starts of each round; None: all start from the last mean."""
    deployed = [oracles.doubled(simulation.setup.algorithm.deploy(initial.algorithm)["params"])]
    out = {}
    for index in range(ROUNDS):
        starts = [deployed[-1]] * 5 if slots is None else slots[index]
        ids, trained, gradients = train(starts, simulation, index)
        weights = [SIZES[client] for client in ids] if slots is None else [1.0] * 5
        deployed.append(oracles.weighted_mean(trained, weights))
        reference = deployed[REFERENCE] if index + 1 > REFERENCE else None
        old, new = deployed[-2:]
        for layer in LAYERS:
            of_layer = figures(layer, old, new, reference, starts, trained, gradients)
            out |= {(index + 1, layer, metric): value for metric, value in of_layer.items()}
    return out


# --- whole runs -----------------------------------------------------------------------------------------

RUNS = {
    "two devices": (FedAvg(), 2, 1),
    "side by side": (FedAvg(), 1, 3),
    "fedmr": (FedMR(), 2, 2),
}


@dataclasses.dataclass
class Ran:
    """A measured run, its first state, its rows, what they should be, and its twin, which is not yet run."""

    simulation: Simulation
    initial: ServerState
    rows: list
    wanted: dict
    twin: Simulation


@pytest.fixture(scope="module")
def ran():
    """Name -> the run, done once."""
    done, by_hand = {}, {}

    def of(name):
        if name not in done:
            algorithm, devices, wave = RUNS[name]
            twin = plain(algorithm, devices, wave)
            simulation = measured(twin, measure=True, reference=REFERENCE)
            initial = jax.device_get(simulation.state)
            rows, slots = [], None if isinstance(algorithm, FedAvg) else []
            for _ in range(ROUNDS):
                if slots is not None:
                    stack = oracles.doubled(simulation.state.algorithm.slots["params"])
                    slots.append([personal.row(stack, k) for k in range(5)])
                rows += oracles.run(simulation, 1)
            kind = type(algorithm)
            if kind not in by_hand:
                by_hand[kind] = expected(simulation, initial, slots)
            done[name] = Ran(simulation, initial, rows, by_hand[kind], twin)
        return done[name]

    return of


def own(rows):
    """(round, layer, metric) -> value of the rows that are of layers."""
    found = {(row.round, row.layer, row.metric): row.value for row in rows if row.layer}
    assert len(found) == sum(1 for row in rows if row.layer)
    return found


@pytest.mark.parametrize("name", list(RUNS))
def test_every_figure_agrees_with_float64_numpy(ran, name):
    wanted, got = ran(name).wanted, own(ran(name).rows)
    assert set(got) == set(wanted)
    assert {metric for _, _, metric in wanted} == set(METRICS)
    for key, value in wanted.items():
        assert got[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
    # The figures tell something: moves cancel in part, and gradients differ.
    assert all(0 < got[key] < 0.99 for key in got if key[2] == "inertia_cancellation")
    assert all(got[key] > 1.01 for key in got if key[2] == "gradient_diversity")


def test_layout_does_not_show(ran):
    wanted, got = (own(ran(name).rows) for name in ("two devices", "side by side"))
    assert set(got) == set(wanted)
    for key, value in wanted.items():
        assert got[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key


@pytest.mark.parametrize("name", ["side by side", "fedmr"])
def test_a_measured_run_is_the_same_run(ran, name):
    one = ran(name)
    rows = oracles.run(one.twin)
    assert rows == [row for row in one.rows if not row.layer]
    oracles.assert_trees_equal(one.simulation.variables, one.twin.variables)
    states = (jax.device_get(simulation.state.algorithm) for simulation in (one.simulation, one.twin))
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_nothing_is_compiled_after_the_first_round(ran):
    assert {oracles.rounds_compiled(ran(name).simulation) for name in RUNS} == {1}


def test_rows_are_tidy(ran):
    rows = [row for row in ran("fedmr").rows if row.layer]
    assert {(row.client, row.state) for row in rows} == {(-1, "")}
    for number in range(1, ROUNDS + 1):
        for metric in METRICS:
            layers = tuple(row.layer for row in rows if (row.round, row.metric) == (number, metric))
            later = metric not in OF_REFERENCE or number > REFERENCE
            assert layers == (LAYERS if later else ()), (number, metric)


@pytest.mark.parametrize("name", ["side by side", "fedmr"])
def test_the_reference_survives_a_checkpoint(ran, name, tmp_path):
    """Cut after the reference was taken: from then on the rows are those of the uncut run, bit for bit."""
    one = ran(name)
    simulation, cut = one.simulation, REFERENCE + 1
    simulation.restore(one.initial, 0)
    oracles.run(simulation, cut)
    store = Checkpoints(tmp_path / "checkpoints")
    store.save(cut, simulation.state)
    store.wait()
    final = [row for row in one.rows if row.round > cut]
    assert oracles.run(simulation) == final
    found = store.restore(simulation.abstract_state())
    store.close()
    assert found is not None
    simulation.restore(*found)
    assert oracles.run(simulation) == final
    # It is the state that brings the reference back, and nothing else.
    simulation.restore(found[0].replace(meters=one.initial.meters), cut)
    other = own(oracles.run(simulation))
    changed = {key[2] for key, value in own(final).items() if other[key] != value}
    assert changed == set(OF_REFERENCE)


def test_abstract_state_describes_the_state(ran):
    simulation = ran("fedmr").simulation
    told = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), tree)  # noqa: E731
    assert told(simulation.abstract_state()) == told(simulation.state)


# --- clients that do not count --------------------------------------------------------------------------


def test_clients_that_are_left_out_do_not_count():
    """Clients 1 and 2 are never finite. Beside client 0 they do not show; alone nothing is defined."""
    dataset, partition = oracles.world((12, 7, 7))
    for client in (1, 2):
        dataset.train_images[partition.train[client][0]] = 255
    model = models.from_flax(Poisonable(), (3, 3, 1), 3, name="poisonable")
    simulation = measured(
        oracles.simulate(
            given=(dataset, partition), model=model, cohort=2, rounds=4, wave=2, epochs=1, non_finite="skip"
        ),
        measure=True,
        reference=1,
    )
    old, met = oracles.doubled(simulation.variables["params"]), set()
    for index in range(4):
        ids, trained, gradients = train([old] * 2, simulation, index)
        rows = oracles.run(simulation, 1)
        got, new = own(rows), oracles.doubled(simulation.variables["params"])
        met.add(0 in ids)
        if 0 in ids:
            k = ids.index(0)
            wanted = figures("fc1", old, new, None, [old], [trained[k]], [gradients[k]])
            for metric, value in wanted.items():
                # The spread of one gradient is a difference of squares, and zero but for their rounding.
                loose = 1e-3 * wanted["gradient_norm"] if metric == "gradient_spread" else 1e-6
                assert got[index + 1, "fc1", metric] == pytest.approx(value, rel=1e-4, abs=loose), metric
            assert wanted["inertia_cancellation"] == pytest.approx(1) and wanted["inertia_step"] > 0
        else:
            of_clients = ("inertia_cancellation", "gradient_diversity")
            for metric in METRICS:
                if index == 0 and metric in OF_REFERENCE:
                    continue
                name = f"undefined/{metric}" if metric in of_clients else metric
                assert (index + 1, "fc1", name) in got
            zero = ("inertia_step", "inertia_update", "gradient_norm", "gradient_spread")
            assert {got[index + 1, "fc1", metric] for metric in zero} == {0}
        assert all(np.isfinite(value) for value in got.values())
        old = new
    assert met == {True, False}


# --- names ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "options", "first", "last"),
    [
        ("mlp", (8, 8, 1), {"hidden": (5, 4)}, "fc1", "fc3"),
        ("cnn8", (8, 8, 1), {}, "conv1", "fc2"),
        ("resnet8", (32, 32, 3), {}, "conv1", "fc"),
        ("vit", (8, 8, 1), {"depth": 1}, "embed", "head"),
    ],
)
def test_every_weight_tensor_has_a_name_of_its_own(name, shape, options, first, last):
    model = models.create(name, shape, 10, **options)
    shapes = personal.flat(jax.eval_shape(model.init, jax.random.key(0)))
    weights = [path for path in model.layer_order() if path[0] == "params" and shapes[path].ndim > 1]
    layers = weight_layers(model)
    assert list(layers.values()) == weights
    assert all(layer == "/".join(path[1:]).removesuffix("/kernel") for layer, path in layers.items())
    assert (next(iter(layers)), list(layers)[-1]) == (first, last)


# --- mistakes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"), [("reference", 0), ("every", -1), ("clients", 0), ("samples", 0), ("measure", 2)]
)
def test_mistakes_are_named(field, value):
    with pytest.raises(UserError, match=str(value)) as caught:
        InertiaConfig(**{field: value})
    assert caught.value.field == f"inertia.{field}"
