"""The probe inside the round: against NumPy on the features of real models, and what must not show."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from fedjax_sim import models
from fedjax_sim.algorithms import CONFIGS, Cohort
from fedjax_sim.config import PeelConfig, from_dict
from fedjax_sim.core import memo
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.rng import run_key
from fedjax_sim.data import Preprocessing
from fedjax_sim.engine import placement
from fedjax_sim.engine.device_data import DeviceData
from fedjax_sim.engine.round import MergeView
from fedjax_sim.models import layers
from fedjax_sim.probes.peel.feature_probe import EACH, STATES, Probe
from fedjax_sim.probes.peel.forward import Forward
from fedjax_sim.runs.federation import Simulation
from tests import oracles
from tests.peel import reference

CLASSES = 5


def settings_of(**more):
    """A small run on the embedded digits."""
    return from_dict(
        {
            "rounds": 3,
            "model": {"name": "mlp", "options": {"hidden": [16]}},  # every layer is compiled anew
            "partition": {"kind": "dirichlet", "alpha": 1.0, "clients": 8, "min_size": 20},
            "cohort": {"size": 4},
            "local": {"epochs": 1, "batch_size": 20, "lr": 0.1},
            "evaluation": {"every": 0},
            "execution": {"devices": 1},
            "peel": {"every": 2, "clients": 3, "samples": 120, "class_samples": 2, "ranks": True},
            **more,
        }
    )


DEEP = {"name": "mlp", "options": {"hidden": [24, 16]}}


def rows_of(simulation):
    return [row for part in simulation.advance() for row in part]


def table(rows):
    return {(r.round, r.client, r.layer, r.state, r.metric): r.value for r in rows}


# --- against NumPy --------------------------------------------------------------------------------------


class Small(nn.Module):
    """A convolution and two dense layers; the images first scaled by a weight of the model, if asked for."""

    num_classes: int
    scaled: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, *, train=False, mask=None):
        if self.scaled:
            x = x * self.param("scale", nn.initializers.uniform(2.0), (1, 1, 1, 3))
        x = layers.conv_relu_pool(self, x, "conv1", 4, 5)
        x = nn.relu(layers.dense(self, layers.flatten(x), "fc1", 12))
        return layers.classifier(self, x, "fc2")


MODELS = {
    "lenet": {},
    "resnet6": {},
    "vit": {"depth": 1, "width": 32, "heads": 2, "patch": 8},
}


def view_of(*stacks):
    """The view of a round with clients 0, 1 … and stacks of models: start, before, after."""
    count = jax.tree.leaves(stacks)[0].shape[0]
    cohort = Cohort(jnp.arange(count, dtype=jnp.int32), jnp.full((count,), 10, jnp.int32), jnp.int32(0))
    return MergeView(cohort, *stacks, jnp.float32(0.1), run_key(0))


@functools.cache
def nine(name):
    """A model, and variables of nine."""
    shape = (32, 32, 3)
    if name in ("small", "scaled"):
        model = models.from_flax(Small(CLASSES, name == "scaled"), shape, CLASSES, name=name)
    else:
        model = models.create(name, shape, CLASSES, **MODELS[name])
    return model, jax.jit(jax.vmap(model.init))(jax.random.split(jax.random.key(0), 9))


@functools.cache
def observed(name, devices=1, batch_size=32):
    """What a probe says of three clients' random models and real-looking images, and all that went in."""
    (model, inits), count = nine(name), 3
    draw = np.random.default_rng(0)
    y = draw.integers(0, CLASSES, 400).astype(np.int32)
    patterns = draw.uniform(0, 255, (CLASSES, 32, 32, 3))
    x = np.clip(0.5 * patterns[y] + draw.uniform(0, 128, (400, 32, 32, 3)), 0, 255).astype(np.uint8)
    stacks = [jax.tree.map(lambda leaf, k=k: leaf[k::3], inits) for k in range(3)]
    length = 64
    index = {
        part: draw.permutation(400)[: count * length].reshape(count, length) for part in ("fit", "measured")
    }
    counts = np.asarray([64, 50, 33], np.int32)
    given = {part: {"index": index[part].astype(np.int32), "count": counts} for part in index}
    mesh = placement.make_mesh(devices)
    forward = Forward(model, oracles.task_of(model), PeelConfig(every=1), batch_size)
    probe = Probe(forward, mesh, 1)
    view = view_of(*stacks)
    data = DeviceData(
        oracles.examples(jnp.asarray(x), jnp.asarray(y)), jnp.zeros(0, jnp.int32), jnp.zeros(0, jnp.int32)
    )
    with jax.set_mesh(mesh):
        out = probe.by_name(jax.device_get(jax.jit(probe.observe)(view, given | {"test": None}, data)))
    return model, stacks, x, y, index, counts, out


@pytest.mark.parametrize(
    "name", ["small", "scaled", *(pytest.param(name, marks=pytest.mark.slow) for name in MODELS)]
)  # test_finetuning.py has features of resnet6 by hand
def test_figures_agree_with_float64_numpy_on_real_features(name):
    model, stacks, x, y, index, counts, out = observed(name)
    images = Preprocessing()

    def features(stack, client, part):
        rows, own = index[part][client], slice(counts[client])
        one = jax.tree.map(lambda leaf: leaf[client], stack)
        scaled = (x[rows] / 255.0 - np.asarray(images.mean)) / np.asarray(images.std)
        # Of all 64, so that one program serves all clients.
        logits, found = jax.jit(model.features)(one, jnp.asarray(scaled, jnp.float32))
        found = {k: np.asarray(v, np.float64)[own] for k, v in found.items()}
        return np.asarray(logits)[own], found, y[rows][own], one

    pool = lambda z: z.mean(tuple(range(1, z.ndim - 1))) if z.ndim > 2 else z  # noqa: E731
    for client in range(3):
        pooled = {}
        for s, stack in enumerate(stacks[1:]):
            logits, measured, labels, one = features(stack, client, "measured")
            _, fit, fit_labels, _ = features(stack, client, "fit")
            assert out["peel_accuracy"][client, s + 1] == pytest.approx((logits.argmax(1) == labels).mean())
            for layer, point in enumerate(model.peel_points):
                z, here = measured[point.name], (client, s, layer)
                flat = pool(z) if z.ndim == 3 else z.reshape(len(z), -1)
                figure = lambda key, here=here: out[key][here]  # noqa: E731
                within, between, total = reference.traces(flat, labels)
                found = [figure(f"trace_{part}") for part in ("within", "between", "total")]
                np.testing.assert_allclose(found, [within, between, total], rtol=1e-4)
                np.testing.assert_allclose(figure("log_c"), np.log(within / between), atol=2e-4)
                np.testing.assert_allclose(figure("cdnv"), reference.cdnv(flat, labels), rtol=2e-3)
                classes = np.unique(labels)
                maps = np.stack([(z if z.ndim != 3 else pool(z))[labels == c].mean(0) for c in classes])
                kernel = one["params"]
                for key in point.kernel:
                    kernel = kernel[key]
                r = int(figure("pabs_rank"))
                wanted = reference.principal_cosines(np.asarray(kernel, np.float64), maps, r)
                assert figure("pabs") == pytest.approx(wanted.mean(), abs=1e-3)
                assert figure("pabs_smallest") == pytest.approx(wanted.min(), abs=3e-3)
                guess = reference.ridge_guess(pool(fit[point.name]), fit_labels, pool(z), CLASSES)
                assert abs(figure("ridge") - (guess == labels).mean()) <= 1.01 / len(labels)
                pooled.setdefault(point.name, []).append(pool(z))
        for layer, point in enumerate(model.peel_points):
            a, b = pooled[point.name]
            wanted = 1 - reference.linear_cka(a, b) if np.ptp(a - b) else 0.0
            assert out["shift_cka"][client, 0, layer] == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize(("devices", "batch"), [(4, 16), pytest.param(1, 64, marks=pytest.mark.slow)])
def test_batches_and_devices_do_not_show(devices, batch):
    wanted, got = observed("small")[-1], observed("small", devices=devices, batch_size=batch)[-1]
    for key in ("log_c", "cdnv", "pabs", "shift_cka", "shift_cosine", "peel_loss"):
        np.testing.assert_allclose(got[key], wanted[key], rtol=2e-3, atol=2e-3, err_msg=key)


# --- inside a run ---------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_a_measured_run_is_the_same_run():
    with_probe = Simulation(settings_of(model=DEEP))
    without = Simulation(settings_of(model=DEEP, peel={"every": 0}))
    told = rows_of(with_probe)
    plain = [row for row in told if not row.layer and not row.metric.startswith(("peel_", "undefined/"))]
    assert plain == rows_of(without)
    jax.tree.map(np.testing.assert_array_equal, with_probe.variables, without.variables)


def test_measured_rounds_are_the_first_the_last_and_every_so_many_and_compile_once():
    memo.forget()
    simulation = Simulation(settings_of(rounds=5))
    rows = rows_of(simulation)
    assert {row.round for row in rows if row.metric == "log_c"} == {1, 2, 4, 5}
    assert oracles.rounds_compiled(simulation) == 2  # measured, and not
    keys = {(row.state, row.metric) for row in rows if row.layer == "fc2" and row.round == 4}
    assert {(state, metric) for state in STATES for metric in EACH} <= keys


@pytest.mark.parametrize("name", [pytest.param("fedindep", marks=pytest.mark.slow), "local"])
def test_what_nobody_merges_does_not_change(name):
    """Before is after, bit for bit: every change is exactly zero."""
    found = table(rows_of(Simulation(settings_of(algorithm=name, rounds=2))))
    pairs = {key: value for key, value in found.items() if key[3] == "before"}
    assert len(pairs) > 50
    for (number, client, layer, _, metric), value in pairs.items():
        assert found[number, client, layer, "after", metric] == value
    assert all(value == 0 for key, value in found.items() if key[4] == "spread")


@functools.cache
def on_one_device(name):
    execution = {"devices": 1, "wave": 4}
    return table(rows_of(Simulation(settings_of(algorithm=name, execution=execution))))


@pytest.mark.parametrize(
    ("name", "execution"),
    [
        # On equal devices the two share the probe's program.
        ("fedmr", {"devices": 4, "wave": 1}),
        ("fedavg", {"devices": 4, "wave": 1}),
        *(
            pytest.param(*more, marks=pytest.mark.slow)
            for more in (
                ("fedmr", {"devices": 1}),
                ("fedmr", {"devices": 2, "wave": 2}),
                ("fedavg", {"devices": 1}),
                ("fedavg", {"devices": 2, "wave": 2}),
            )
        ),
    ],
)
def test_layout_does_not_show(name, execution):
    wanted = on_one_device(name)
    got = table(rows_of(Simulation(settings_of(algorithm=name, execution=execution))))
    assert set(got) == set(wanted)
    for key, value in wanted.items():
        if key[4] in ("ridge", "ncm"):
            assert abs(got[key] - value) < 0.05, key  # a sample or two
            continue
        loose = key[4] == "discrimination" or key[4].startswith("pabs")
        if key[4] not in ("padding_waste",):
            assert got[key] == pytest.approx(value, rel=5e-3, abs=2e-2 if loose else 5e-3), key


def test_after_is_the_average_under_fedavg_and_the_recombined_slot_under_fedmr():
    """Under FedAvg all clients hold one model; under FedMR the K models are those that were trained."""
    config = settings_of(peel={"every": 1, "clients": 4, "samples": 60, "class_samples": 1}, rounds=1)
    for name in ("fedavg", "fedmr"):
        simulation = Simulation(dataclasses.replace(config, algorithm=CONFIGS[name]()))
        inputs, _ = simulation.inputs(0)
        slots = simulation.instruments[0].slots(np.asarray(inputs.cohort.ids))
        with jax.set_mesh(simulation.mesh):
            state, outputs = simulation.program(simulation.state, inputs, simulation.data, slots)
        got = jax.device_get(outputs.view)
        for before, after, one in zip(
            *map(
                jax.tree.leaves,
                (
                    got.before,
                    got.after,
                    state.algorithm.mean if name == "fedmr" else simulation._deploy(state.algorithm),
                ),
            ),
            strict=True,
        ):
            if name == "fedavg":
                np.testing.assert_array_equal(after, np.broadcast_to(one, after.shape))
            else:
                assert sorted(a.tobytes() for a in after) == sorted(b.tobytes() for b in before)


# --- what cannot be measured ----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:peel. of")
def test_clients_with_too_few_of_a_class_are_said_to_be_undefined_and_never_nan():
    config = settings_of(
        partition={"kind": "pathological", "clients": 10, "classes_per_client": 1},
        peel={"every": 1, "clients": 4, "samples": 80},
        rounds=1,
    )
    rows = rows_of(Simulation(config))
    assert all(np.isfinite(row.value) for row in rows)
    undefined = {row.metric for row in rows if row.metric.startswith("undefined/")}
    assert {"undefined/log_c", "undefined/pabs_centred"} <= undefined
    assert any(row.metric == "trace_within" for row in rows)


@pytest.mark.filterwarnings("ignore:peel. of")
def test_of_a_client_without_measured_samples_nothing_is_said_but_of_its_weights():
    """No class has enough samples; 0 in their place would enter the means over clients."""
    peel = {"every": 1, "clients": 4, "samples": 80, "class_samples": 60, "chimeras": True, "ranks": True}
    rows = [row for row in rows_of(Simulation(settings_of(peel=peel, rounds=1))) if row.client >= 0]
    assert {row.value for row in rows if row.metric in ("peel_samples", "peel_classes")} == {0}
    told = {row.metric for row in rows if not row.metric.startswith("undefined/")}
    assert told == {"peel_samples", "peel_classes", "spread", "update_cosine"}
    undefined = {row.metric.removeprefix("undefined/") for row in rows} - told
    assert {"peel_accuracy", "trace_within", "cdnv", "pabs", "shift_cka", "ridge", "rank"} <= undefined
    assert {"stitched_none", "stitched_prefix", "chimera_inherited"} <= undefined


def test_a_model_without_peel_points_is_refused():
    simulation = Simulation(settings_of(peel={"every": 0}))
    bare = dataclasses.replace(simulation.setup.model, peel_points=())
    with pytest.raises(UserError, match="no peel points"):
        Simulation(settings_of(), model=bare)


def test_a_split_that_nobody_has_is_refused():
    with pytest.raises(UserError, match=r"peel\.split"):
        Simulation(settings_of(peel={"every": 1, "split": "test"}))


def test_own_test_samples_are_measured_where_clients_have_them():
    config = settings_of(
        partition={"kind": "iid", "clients": 6, "local_test": "holdout"},
        peel={"every": 1, "split": "test"},
        rounds=1,
    )
    simulation = Simulation(config)
    samples = simulation.instruments[0]._samples
    for client in range(6):
        fit, measured = samples.of_client(client)
        assert set(fit) <= set(simulation.setup.partition.train[client])
        assert set(measured) <= set(simulation.setup.partition.test[client])
    assert any(row.metric == "ridge" for row in rows_of(simulation))


@pytest.mark.parametrize(("name", "given"), [("small", 1), ("scaled", 0)])
def test_what_images_alone_decide_is_told_from_what_the_model_does(name, given):
    assert observed(name)[-1]["shift_cka"][:, 0, 0].any() == (given == 0)
    model = nine(name)[0]
    assert Forward(model, oracles.task_of(model), PeelConfig(), 10).given == given
