"""The classifier trained alone: against a plain loop in float64, and what it must leave as it was."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim import models
from fedjax_sim.algorithms import Cohort
from fedjax_sim.config import LocalConfig, PeelConfig
from fedjax_sim.core import memo
from fedjax_sim.core.algorithm import LocalRule
from fedjax_sim.core.rng import PEEL, key_for, run_key
from fedjax_sim.engine import placement
from fedjax_sim.engine.clients import Lanes, Trainer, shuffled
from fedjax_sim.engine.device_data import DeviceData
from fedjax_sim.engine.observing import observer_request
from fedjax_sim.probes.peel.feature_probe import Probe
from fedjax_sim.probes.peel.forward import Forward
from fedjax_sim.probes.peel.head_finetuning import FIGURES, Finetuning
from fedjax_sim.runs.federation import Simulation
from tests import oracles
from tests.peel import reference
from tests.peel.test_feature_probe import DEEP, rows_of, settings_of, view_of

CLASSES, SIZES, IDS, ROUND, EPOCHS, LR = 3, (25, 8, 19, 31), (5, 0, 2), 4, 2, 0.5
LOCAL = LocalConfig(
    epochs=None, steps=1, batch_size=8, momentum=0.5, weight_decay=0.01, clip_norm=0.5, keep_optimizer=True
)


@functools.cache
def world(name):
    """Four clients of a population of six, of whom three are measured; a model that each holds."""
    model = models.create(name, (8, 8, 1), CLASSES, **MODELS[name])
    draw = np.random.default_rng(5)
    y = draw.integers(0, CLASSES, 160).astype(np.int32)
    patterns = draw.uniform(0, 255, (CLASSES, 8, 8, 1))
    x = np.clip(0.4 * patterns[y] + draw.uniform(0, 150, (160, 8, 8, 1)), 0, 255).astype(np.uint8)
    rows = [np.zeros(0, np.int32)] * 6
    for client, size in zip((5, 0, 2, 3), SIZES, strict=True):
        rows[client] = draw.permutation(160)[:size].astype(np.int32)
    offsets = np.cumsum([0, *map(len, rows)]).astype(np.int32)
    stacks = jax.jit(jax.vmap(model.init))(jax.random.split(jax.random.key(0), 9))
    stacks = [jax.tree.map(lambda leaf, s=s: leaf[3 * s :][:3], stacks) for s in range(3)]
    cohort = Cohort(jnp.asarray(IDS, jnp.int32), jnp.asarray(SIZES[:3], jnp.int32), jnp.int32(ROUND))
    view = dataclasses.replace(view_of(*stacks), cohort=cohort, lr=jnp.float32(LR))
    index = draw.permutation(160)[:120].reshape(3, 40).astype(np.int32)
    measured = {"index": index, "count": np.asarray((40, 12, 29), np.int32)}
    samples = jnp.asarray(np.concatenate(rows))
    data = DeviceData(oracles.examples(jnp.asarray(x), jnp.asarray(y)), samples, jnp.asarray(offsets))
    return model, view, data, measured


def instrument(model, devices=2, width=1, batch=20, **preprocessing):
    mesh, task = placement.make_mesh(devices), oracles.task_of(model, **preprocessing)
    forward = Forward(model, task, PeelConfig(every=1, finetune=EPOCHS), batch)
    lengths = (max(SIZES),)
    trainer = Trainer(model, LocalRule(), LOCAL, task, width, lengths, ragged=False, partial=True)
    return Finetuning(Probe(forward, mesh, width), trainer)


@functools.cache
def observed(name, **layout):
    model, view, data, measured = world(name)
    found = instrument(model, **layout)
    with jax.set_mesh(found.probe.mesh):
        out = jax.jit(found.observe)(view, {"measured": measured, "test": None}, data)
    return jax.device_get(out)


MODELS = {"mlp": {"hidden": [9, 7]}, "resnet6": {"norm": "batch"}}


@pytest.mark.parametrize("name", ["mlp", pytest.param("resnet6", marks=pytest.mark.slow)])
def test_it_is_logistic_regression_on_the_penultimate_features(name):
    """Clip, decay, momentum and steps by hand, on features in evaluation mode."""
    model, view, data, measured = world(name)
    out = observed(name)
    x, y, samples, offsets = (np.asarray(leaf) for leaf in jax.tree.leaves(data))
    (layer, _), point = model.peel_points[-1].kernel, model.peel_points[-1].name
    local = dataclasses.replace(LOCAL, epochs=EPOCHS, steps=None)
    for place, (client, count) in enumerate(zip(IDS, SIZES, strict=False)):
        one = jax.tree.map(lambda leaf, place=place: leaf[place], view.after)

        def features(samples, one=one):
            padded = np.resize(samples, 40)  # one program for all numbers of samples
            images = jnp.asarray((x[padded] / 255 - 0.5) / 0.5, jnp.float32)
            found = np.asarray(jax.jit(model.features)(one, images)[1][point], np.float64)
            return found[: len(samples)], y[samples]

        key, batches = key_for(run_key(0), PEEL, ROUND, client), []
        for epoch in range(EPOCHS):
            order = np.asarray(shuffled(key, jnp.int32(epoch), jnp.int32(count), count))
            batches += [order[first : first + 8] for first in range(0, count, 8)]
        head = {"fc1": oracles.doubled(one["params"][layer])}
        before = head["fc1"]["kernel"]
        head, _, _ = oracles.local_sgd(
            head, *features(samples[offsets[client] :][:count]), batches, local, LR
        )
        assert np.abs(head["fc1"]["kernel"] - before).max() > 1e-2

        z, labels = features(measured["index"][place][: measured["count"][place]])
        logits, _ = oracles.mlp(head, z)
        assert out["peel_accuracy"][place] == pytest.approx((logits.argmax(1) == labels).mean())
        loss = oracles.cross_entropies(logits, labels).mean()
        assert out["peel_loss"][place] == pytest.approx(loss, rel=1e-4)
        means = np.stack([z[labels == c].mean(0) for c in np.unique(labels)])
        for metric, centre, r in (("pabs", 0, len(means)), ("pabs_centred", z.mean(0), len(means) - 1)):
            wanted = reference.principal_cosines(head["fc1"]["kernel"], means - centre, r).mean()
            assert out[metric][place] == pytest.approx(wanted, abs=1e-3), metric


@pytest.mark.parametrize("width", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_body_and_its_statistics_stay_bit_for_bit(width):
    model, view, data, _ = world("resnet6")
    trainer = instrument(model, flip=True).classifier_trainer(width)
    start = jax.tree.map(lambda leaf: leaf[:width], view.after)
    lanes = Lanes(
        client_state=trainer.init_client(None),
        ids=view.cohort.ids[:width],
        counts=view.cohort.counts[:width],
        weights=jnp.ones((width,), jnp.float32),
    )

    def train(start, lanes, data):
        ready = trainer.ready(lanes, run_key(1), data)
        return trainer.train_wave(start, None, ready, jnp.int32(8), jnp.float32(LR), data)[0]

    trained, place = jax.jit(train)(start, lanes, data), model.blocks()
    moved = jax.tree_util.tree_map_with_path(
        lambda path, a, b: (tuple(key.key for key in path), bool((a != b).any())), dict(start), dict(trained)
    )
    pairs = dict(jax.tree.leaves(moved, is_leaf=lambda node: isinstance(node, tuple)))
    assert pairs == {path: block == max(place.values()) for path, block in place.items()}
    assert any(path[0] == "batch_stats" for path in pairs)


def test_layout_does_not_show():
    wanted = observed("mlp")  # on two devices
    got = observed("mlp", devices=1, width=2, batch=40)
    for name, value in wanted.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=1e-4, err_msg=name)


# --- inside a run ---------------------------------------------------------------------------------------

PEEL_ALL = {
    "every": 1, "clients": 3, "samples": 60, "class_samples": 1, "chimeras": True, "others": True,
    "finetune": 3,
}  # fmt: skip


def test_a_run_with_everything_on_is_the_same_run_and_compiles_once():
    memo.forget()
    simulation = Simulation(settings_of(algorithm="fedmr", peel=PEEL_ALL))
    told = rows_of(simulation)
    assert oracles.rounds_compiled(simulation) == 1
    without = Simulation(settings_of(algorithm="fedmr", peel={"every": 0}))
    plain = [row for row in told if row.client < 0]
    assert plain == rows_of(without)
    jax.tree.map(np.testing.assert_array_equal, simulation.variables, without.variables)

    metrics = {row.metric for row in told}
    assert {"log_c", "chimera_total", "ridge_others", "peel_accuracy_global"} <= metrics
    held = [row.value for row in told if (row.metric, row.state) == ("peel_loss_global", "after")]
    assert len(set(held)) == 3 * 3  # every slot has a model of its own
    tuned = [row for row in told if row.state == "finetuned"]
    assert {(row.metric, row.layer) for row in tuned} == {
        ("peel_accuracy", ""), ("peel_loss", ""), *((name, "fc2") for name in FIGURES)
    }  # fmt: skip
    assert {row.round for row in tuned} == {1, 2, 3}
    loss = {
        state: np.mean([row.value for row in told if (row.metric, row.state) == ("peel_loss", state)])
        for state in ("after", "finetuned")
    }
    assert loss["finetuned"] < loss["after"]


def test_no_decomposition_is_batched_on_a_cpu():
    """A batch of them can wait for ever, see `Peeling`."""
    config = settings_of(model=DEEP, peel=PEEL_ALL, execution={"devices": 2, "wave": 2})
    simulation = Simulation(config)
    inputs, _ = simulation.inputs(0)
    request = observer_request(simulation.instruments, np.asarray(inputs.cohort.ids))
    with jax.set_mesh(simulation.mesh):
        state = simulation.abstract_state()
        _, outputs = jax.eval_shape(simulation.function, state, inputs, simulation.data, request.slots)
        text = simulation.observe.lower(outputs.view, request.inputs, simulation.data).as_text()
    calls = [line for line in text.splitlines() if "@lapack_" in line]
    assert len(calls) > 10
    assert not [line for line in calls if re.search(r"tensor<\d+x\d+x\d+xf32>", line)]


@pytest.mark.filterwarnings("ignore:peel. of")
def test_clients_of_one_class_are_tuned_too():
    config = settings_of(
        partition={"kind": "pathological", "clients": 10, "classes_per_client": 1},
        peel={**PEEL_ALL, "chimeras": False, "others": False},
        rounds=1,
    )
    tuned = [row for row in rows_of(Simulation(config)) if row.state == "finetuned"]
    assert {row.metric for row in tuned} == {"peel_accuracy", "peel_loss", "pabs", "undefined/pabs_centred"}
    assert all(np.isfinite(row.value) for row in tuned)
