"""Models on other clients' samples: against plain loops in float64, and what may be left out of the work."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim import models
from fedjax_sim.config import PeelConfig
from fedjax_sim.engine import placement
from fedjax_sim.engine.device_data import DeviceData
from fedjax_sim.probes.peel.forward import Forward
from fedjax_sim.probes.peel.generality import STATES, Generality
from fedjax_sim.runs.federation import Simulation
from tests import oracles
from tests.peel import reference
from tests.peel.test_feature_probe import DEEP, rows_of, settings_of, view_of

CLASSES, COUNTS = 3, {"fit": (40, 31, 22), "measured": (40, 17, 33)}


@functools.cache
def network():
    return models.create("mlp", (4, 4, 1), CLASSES, hidden=[10, 6])


@functools.cache
def start():
    """The compiled function that makes models of a vector of keys."""
    return jax.jit(jax.vmap(network().init))


@functools.cache
def instrument(devices, batch):
    """What measures, and its compiled function."""
    forward = Forward(network(), oracles.task_of(network()), PeelConfig(every=1), batch)
    found = Generality(forward, placement.make_mesh(devices))
    return found, jax.jit(found.observe)


def world(same=(), counts=COUNTS, clients=3):
    """Random models of clients, samples of which a class shows in the mean, and where they are measured.

    Models of the states `same` are one for all clients.
    """
    model, init = network(), start()
    draw = np.random.default_rng(3)
    y = draw.integers(0, CLASSES, 300).astype(np.int32)
    patterns = draw.uniform(0, 255, (CLASSES, 4, 4, 1))
    x = np.clip(0.3 * patterns[y] + draw.uniform(0, 178, (300, 4, 4, 1)), 0, 255).astype(np.uint8)
    stacks = []
    for s, state in enumerate(STATES):
        seeds = [10 * s + (0 if state in same else k) for k in range(clients)]
        stacks.append(init(jnp.stack([jax.random.key(seed) for seed in seeds])))
    index = draw.permutation(240).reshape(2, 3, 40).astype(np.int32)[:, :clients]
    given = {
        name: {"index": index[part], "count": np.asarray(counts[name][:clients], np.int32)}
        for part, name in enumerate(("fit", "measured"))
    }
    return model, stacks, (x[:240], y[:240]), (x[240:], y[240:]), given


def observed(made, devices=2, batch=20):
    _, stacks, train, test, given = made
    found, observe = instrument(devices, batch)
    data = DeviceData(
        oracles.examples(*map(jnp.asarray, train)), jnp.zeros(0, jnp.int32), jnp.zeros(0, jnp.int32)
    )
    given = {**given, "test": None, "global": oracles.examples(*test)}
    with jax.set_mesh(found.mesh):
        out = jax.device_get(observe(view_of(*stacks), given, data))
    count = len(given["measured"]["count"])
    rows = found.rows(4, np.arange(count) + 7, out, given["measured"]["count"])
    return out, {(row.client - 7, row.state, row.layer, row.metric): row.value for row in rows}


def by_hand(made):
    """The same table, client by client and sample set by sample set."""
    _, stacks, (x, y), (test_x, test_y), given = made
    clients, table = len(given["fit"]["count"]), {}

    def samples(part, client):
        rows = given[part]["index"][client][: given[part]["count"][client]]
        return oracles.normalised(x[rows]), y[rows]

    def score(params, z, labels):
        logits, _ = oracles.mlp(params, z)
        return (logits.argmax(1) == labels).mean(), oracles.cross_entropies(logits, labels).mean()

    for state, stack in zip(STATES, stacks, strict=True):
        for k in range(clients):
            params = oracles.doubled(jax.tree.map(lambda leaf, k=k: leaf[k], stack["params"]))
            others = [j for j in range(clients) if j != k]
            accuracy, loss = zip(*(score(params, *samples("measured", j)) for j in others), strict=True)
            table[k, state, "", "peel_accuracy_others"] = np.mean(accuracy)
            table[k, state, "", "peel_loss_others"] = np.mean(loss)
            accuracy, loss = score(params, oracles.normalised(test_x), test_y)
            table[k, state, "", "peel_accuracy_global"] = accuracy
            table[k, state, "", "peel_loss_global"] = loss
            for layer in (1, 2):
                right = []
                for j in others:
                    (fit, fit_y), (own, own_y) = samples("fit", j), samples("measured", j)
                    z_fit, z = oracles.mlp(params, fit)[1][layer], oracles.mlp(params, own)[1][layer]
                    right.append((reference.ridge_guess(z_fit, fit_y, z, CLASSES) == own_y).mean())
                table[k, state, f"fc{layer + 1}", "ridge_others"] = np.mean(right)
    return table


def test_figures_agree_with_plain_loops_in_float64():
    made = world()
    wanted, (_, got) = by_hand(made), observed(made)
    assert set(got) == set(wanted)
    for key, value in wanted.items():
        assert got[key] == pytest.approx(value, abs=1e-4), key
    assert len({value for key, value in got.items() if key[3] == "ridge_others"}) > 3


@pytest.mark.parametrize("same", [("start", "after"), STATES])
def test_one_model_for_all_is_measured_as_if_each_had_it(same):
    made = world(same=same)
    wanted, (out, got) = by_hand(made), observed(made, devices=1, batch=40)
    for key, value in wanted.items():
        assert got[key] == pytest.approx(value, abs=1e-4), key
    for figures in out.values():
        np.testing.assert_array_equal(figures[0, 2], figures[1, 2])


def test_devices_and_batches_do_not_show():
    made = world()
    (_, wanted), (_, got) = observed(made, devices=1, batch=40), observed(made, devices=2, batch=8)
    for key, value in wanted.items():
        assert got[key] == pytest.approx(value, abs=1e-5), key


def test_a_client_without_samples_to_measure_is_nobodys_other():
    counts = {**COUNTS, "measured": (40, 0, 33)}
    _, got = observed(world(counts=counts))
    made = world()  # of which clients 0 and 2 alone are left: each is the other's only one
    for part in made[4].values():
        part["index"], part["count"] = part["index"][[0, 2]], part["count"][[0, 2]]
    stacks = [jax.tree.map(lambda leaf: leaf[np.asarray([0, 2])], stack) for stack in made[1]]
    wanted = by_hand((made[0], stacks, *made[2:]))
    for (k, *where), value in wanted.items():
        assert got[2 * k, *where] == pytest.approx(value, abs=1e-4)


def test_a_client_alone_has_no_others():
    _, got = observed(world(clients=1))
    metrics = {key[3] for key in got}
    assert "peel_accuracy_global" in metrics
    assert {"undefined/ridge_others", "undefined/peel_loss_others"} <= metrics
    assert not metrics & {"ridge_others", "peel_accuracy_others"}


def test_a_run_records_them_and_they_agree_with_its_own_evaluation():
    peel = {"every": 1, "clients": 3, "samples": 60, "class_samples": 1, "others": True}
    config = settings_of(rounds=1, model=DEEP, peel=peel, evaluation={"every": 1}, cohort={"size": 3})
    rows = rows_of(Simulation(config))
    value = {(row.client, row.state, row.metric): row.value for row in rows if not row.layer}
    clients = {client for client, *_ in value if client >= 0}
    assert len(clients) == 3
    for client in clients:
        assert value[client, "after", "peel_accuracy_global"] == pytest.approx(value[-1, "", "accuracy"])
        assert value[client, "after", "peel_loss_global"] == pytest.approx(value[-1, "", "loss"], rel=1e-4)
    assert len({value[client, "before", "peel_loss_global"] for client in clients}) == 3
    assert {row.layer for row in rows if row.metric == "ridge_others"} == {"fc2", "fc3"}


def test_a_model_of_one_layer_has_no_layer_to_probe():
    peel = {"every": 1, "clients": 2, "samples": 40, "class_samples": 1, "others": True, "chimeras": True}
    model = {"name": "mlp", "options": {"hidden": []}}
    rows = rows_of(Simulation(settings_of(rounds=1, peel=peel, model=model)))
    metrics = {row.metric for row in rows}
    assert {"log_c", "ridge", "peel_accuracy_others"} <= metrics and "ridge_others" not in metrics
