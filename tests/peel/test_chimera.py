"""Chimeras: which leaves go together, the decomposition's laws, and the models themselves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim import models
from fedjax_sim.config import PeelConfig
from fedjax_sim.data import Preprocessing
from fedjax_sim.engine import placement
from fedjax_sim.engine.device_data import DeviceData
from fedjax_sim.probes.peel import chimera
from fedjax_sim.probes.peel.forward import Forward
from fedjax_sim.runs.federation import Simulation
from tests import oracles
from tests.peel import reference
from tests.peel.test_feature_probe import DEEP, rows_of, settings_of, view_of


@pytest.mark.parametrize("name", ["lenet", "resnet8", "resnet20", "vit", "vgg16_bn"])
def test_every_leaf_has_a_block_and_blocks_follow_the_network(name):
    """A layer's bias goes with its kernel, whichever is made first."""
    model = models.create(name, (32, 32, 3), 10)
    place = model.blocks()
    assert set(place) == set(model.layer_order())
    assert set(place.values()) == set(range(len(model.peel_points)))
    for number, point in enumerate(model.peel_points):
        assert place[("params", *point.kernel)] == number
        assert place.get(("params", *point.kernel[:-1], "bias"), number) == number


@functools.cache
def world():
    """A model, and the compiled function that looks at its chimeras, on two devices."""
    model = models.create("mlp", (8, 8, 1), 4, hidden=[12, 10, 8])
    forward = Forward(model, oracles.task_of(model), PeelConfig(every=1), 20)
    return model, jax.jit(chimera.Chimeras(forward, placement.make_mesh(2)).observe)


@functools.cache
def made(before_after_same=False):
    model, observe = world()
    draw = np.random.default_rng(0)
    x = draw.integers(0, 256, (120, 8, 8, 1)).astype(np.uint8)
    y = draw.integers(0, 4, 120).astype(np.int32)
    inits = jax.jit(jax.vmap(model.init))(jax.random.split(jax.random.key(0), 6))
    stacks = [jax.tree.map(lambda leaf, s=s: leaf[3 * s :][:3], inits) for s in range(2)]
    if before_after_same:
        stacks[1] = stacks[0]
    index = draw.permutation(120).reshape(3, 40).astype(np.int32)
    given = {"measured": {"index": index, "count": np.asarray([40, 40, 29], np.int32)}, "test": None}
    view = view_of(stacks[0], *stacks)
    data = DeviceData(
        oracles.examples(jnp.asarray(x), jnp.asarray(y)), jnp.zeros(0, jnp.int32), jnp.zeros(0, jnp.int32)
    )
    with jax.set_mesh(placement.make_mesh(2)):
        out = observe(view, given, data)
    return model, stacks, x, y, given["measured"], jax.device_get(out)


def test_chimeras_are_the_models_that_their_masks_say():
    """Built by hand from the two models' layers, in NumPy's float64 metrics."""
    model, (before, after), x, y, measured, out = made()
    layers = [point.kernel[0] for point in model.peel_points]
    for client in range(3):
        rows = measured["index"][client][: measured["count"][client]]
        scaled = (x[rows] / 255.0 - np.asarray(Preprocessing().mean)) / np.asarray(Preprocessing().std)
        for number, mask in enumerate(chimera.masks(4)):
            chosen = {layer: (before, after)[int(m)] for layer, m in zip(layers, mask, strict=True)}
            mixed = {layer: stack["params"][layer] for layer, stack in chosen.items()}
            mixed = {"params": jax.tree.map(lambda leaf, client=client: leaf[client], mixed)}
            logits, features = model.features(mixed, jnp.asarray(scaled, jnp.float32))
            hits = (np.asarray(logits).argmax(1) == y[rows]).mean()
            assert out["accuracy"][client, number] == pytest.approx(hits)
            for layer, point in enumerate(model.peel_points):
                z = np.asarray(features[point.name], np.float64).reshape(len(rows), -1)
                within, between, _ = reference.traces(z, y[rows])
                wanted = np.log(within / between)
                assert out["log_c"][client, number, layer] == pytest.approx(wanted, abs=1e-3)


def test_the_first_layer_injects_all_of_its_change_and_inherits_none():
    *_, out = made()
    for log_c in out["log_c"]:
        parts = chimera.decompose(log_c)
        assert parts["injected"][0] == parts["total"][0] != 0
        assert parts["inherited"][0] == 0
        np.testing.assert_allclose(
            parts["total"], parts["injected"] + parts["inherited"] + parts["interaction"], atol=1e-12
        )
        # All blocks aggregated, as a prefix or as a suffix, is the merged model.
        np.testing.assert_array_equal(log_c[4], log_c[9])


def test_what_does_not_change_has_no_cause():
    *_, out = made(before_after_same=True)
    for log_c, accuracy in zip(out["log_c"], out["accuracy"], strict=True):
        assert all(not part.any() for part in chimera.decompose(log_c).values())
        assert len(set(accuracy.tolist())) == 1


def test_a_run_records_them_beside_the_probe():
    peel = {"every": 1, "clients": 3, "samples": 80, "class_samples": 2, "chimeras": True}
    config = settings_of(model=DEEP, peel=peel, rounds=1)
    rows = rows_of(Simulation(config))
    have = {(row.metric, row.layer) for row in rows}
    assert {(f"chimera_{part}", layer) for part in chimera.PARTS for layer in ("fc2", "fc3")} <= have
    assert {(f"stitched_{stitch}", "fc1") for stitch in chimera.STITCHES} <= have
    value = {(row.metric, row.layer, row.client, row.state): row.value for row in rows}
    for client in {row.client for row in rows if row.client >= 0 and row.metric == "stitched_none"}:
        change = value["log_c", "fc2", client, "after"] - value["log_c", "fc2", client, "before"]
        assert value["chimera_total", "fc2", client, ""] == pytest.approx(change, abs=1e-4)
        none = value["stitched_none", "", client, ""]
        assert none == pytest.approx(value["peel_accuracy", "", client, "before"])
        last = value["stitched_prefix", max(layer for _, layer in have if layer.startswith("fc")), client, ""]
        assert last == pytest.approx(value["peel_accuracy", "", client, "after"])
