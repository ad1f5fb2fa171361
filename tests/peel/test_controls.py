"""What is measured in the place of the merged model, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util

from fedjax_sim import models
from fedjax_sim.config import PeelConfig
from fedjax_sim.core.errors import UserError
from fedjax_sim.probes.peel import controls
from fedjax_sim.probes.peel.forward import Forward
from fedjax_sim.runs.federation import Simulation
from tests import oracles
from tests.peel.test_feature_probe import DEEP, rows_of, settings_of, table


def forward_of(name="resnet6", **options):
    model = models.create(name, (8, 8, 3), 4, **options)
    return Forward(model, oracles.task_of(model, mean=(0.0,) * 3, std=(1.0,) * 3), PeelConfig(every=1), 10)


def test_a_network_is_traced_once_for_all_places_that_look_at_its_features(monkeypatch):
    forward = forward_of("mlp", hidden=[3])
    variables, traced, images = forward.model.abstract, [], jnp.zeros((20, 8, 8, 3), jnp.uint8)
    features = models.Model.features
    monkeypatch.setattr(models.Model, "features", lambda *args: traced.append(1) or features(*args))

    def look(variables, images):
        chosen = {"index": jnp.arange(20, dtype=jnp.int32), "count": jnp.int32(17)}
        pool = oracles.examples(images, jnp.zeros(20, jnp.int32))
        one = lambda x, *_: forward.features(variables, x)[1]  # noqa: E731
        return [forward.over(chosen, pool, one, lambda a, b: jax.tree.map(jnp.add, a, b)) for _ in range(3)]

    jax.eval_shape(look, variables, images)
    assert len(traced) == 1


def test_noise_has_the_norm_of_the_merge_leaf_by_leaf_and_no_direction_of_it():
    model = models.create("mlp", (8, 8, 1), 4, hidden=[40, 30])
    before, after = (model.init(jax.random.key(k)) for k in range(2))
    after = {"params": {**after["params"], "fc1": before["params"]["fc1"]}}  # a layer that does not change
    moved = controls.perturbed(before, after, jax.random.key(5))
    for path, old in traverse_util.flatten_dict(before).items():
        new, merged = (traverse_util.flatten_dict(tree)[path] for tree in (moved, after))
        step, wanted = np.asarray(new - old, np.float64).ravel(), np.asarray(merged - old, np.float64).ravel()
        if path[1] == "fc1":
            np.testing.assert_array_equal(new, old)
        elif wanted.any():
            assert np.linalg.norm(step) == pytest.approx(np.linalg.norm(wanted), rel=1e-4)
            if step.size > 500:
                assert abs(step @ wanted) < 0.2 * np.linalg.norm(step) * np.linalg.norm(wanted)
    again = controls.perturbed(before, after, jax.random.key(6))
    assert not np.array_equal(again["params"]["fc2"]["kernel"], moved["params"]["fc2"]["kernel"])


def test_statistics_are_those_of_the_samples():
    """Of the first normalisation, whose input no other statistics touch, against plain means in float64."""
    forward = forward_of()
    variables = forward.model.init(jax.random.key(0))
    draw = np.random.default_rng(0)
    x = draw.integers(0, 256, (40, 8, 8, 3)).astype(np.uint8)
    pool = oracles.examples(jnp.asarray(x), jnp.zeros(40, jnp.int32))
    index = draw.permutation(40).astype(np.int32)[:30]
    chosen = {"index": jnp.asarray(index), "count": jnp.int32(24)}  # batches of 10, 10 and 4
    old = jax.tree.map(lambda leaf: leaf + 3, variables["batch_stats"])
    got = controls.reestimated(forward, {**variables, "batch_stats": old}, chosen, pool, jax.random.key(1))
    z = jax.lax.conv_general_dilated(
        jnp.asarray(x[index[:24]] / 255.0, jnp.float32),
        variables["params"]["conv1"]["kernel"],
        (2, 2),
        ((3, 3), (3, 3)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    parts = [np.asarray(z, np.float64)[a:b] for a, b in ((0, 10), (10, 20), (20, 24))]
    mean = sum(len(part) * part.mean((0, 1, 2)) for part in parts) / 24
    np.testing.assert_allclose(got["batch_stats"]["norm1"]["mean"], mean, rtol=1e-3, atol=1e-5)
    # Running variances are unbiased, as PyTorch's.
    each = [len(part) * part.reshape(-1, part.shape[-1]).var(0, ddof=1) for part in parts]
    np.testing.assert_allclose(got["batch_stats"]["norm1"]["var"], sum(each) / 24, rtol=1e-3)
    jax.tree.map(np.testing.assert_array_equal, got["params"], variables["params"])


def test_no_samples_leave_the_statistics_alone():
    forward = forward_of()
    variables = forward.model.init(jax.random.key(0))
    pool = oracles.examples(jnp.zeros((4, 8, 8, 3), jnp.uint8), jnp.zeros(4, jnp.int32))
    chosen = {"index": jnp.zeros(10, jnp.int32), "count": jnp.int32(0)}
    got = controls.reestimated(forward, variables, chosen, pool, jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, got, dict(variables))


def test_controls_are_measured_like_the_merged_model():
    """Under Local nothing is merged: the matched noise is none, and all states agree."""
    peel = {"every": 1, "clients": 2, "samples": 60, "class_samples": 2, "controls": ["perturbed"]}
    for name in ("local", "fedavg"):
        config = settings_of(algorithm=name, rounds=1, model=DEEP, peel=peel)
        found = table(rows_of(Simulation(config)))
        pairs = {key: value for key, value in found.items() if key[3] == "perturbed"}
        assert {"log_c", "pabs", "ridge", "shift_cka", "peel_accuracy"} <= {key[4] for key in pairs}
        twins = [(value, found.get((*key[:3], "before", key[4]), value)) for key, value in pairs.items()]
        same = [value == pytest.approx(twin, rel=1e-4, abs=1e-4) for value, twin in twins]
        assert all(same) if name == "local" else sum(same) < len(same) / 2


def test_statistics_need_a_model_that_has_them():
    with pytest.raises(UserError, match=r"peel\.controls.*no batch statistics"):
        Simulation(settings_of(peel={"every": 1, "controls": ["reestimated"]}))


def test_a_count_among_the_statistics_stays(rng):
    class Counting(nn.Module):
        @nn.compact
        def __call__(self, x, *, train=False, mask=None):
            mean = self.variable("batch_stats", "mean", lambda: jnp.float32(0))
            count = self.variable("batch_stats", "count", lambda: jnp.int32(2**24 + 1))
            ready = self.variable("batch_stats", "ready", lambda: jnp.asarray(False))
            if train:
                share = jnp.where(mask[:, None, None, None], x, 0).mean((1, 2, 3)).sum() / mask.sum().astype(
                    jnp.float32
                )
                mean.value = 0.75 * mean.value + 0.25 * share
                count.value, ready.value = count.value + 1, jnp.asarray(True)
            x = x.reshape(len(x), -1)
            models.peel(self, "fc", x)
            return nn.Dense(4, name="fc")(x)

    model = models.from_flax(Counting(), (2, 2, 1), 4, name="counting")
    forward = Forward(model, oracles.task_of(model, mean=(0.0,), std=(1.0,)), PeelConfig(every=1), 10)
    images = rng.integers(0, 256, (25, 2, 2, 1)).astype(np.uint8)
    pool = oracles.examples(jnp.asarray(images), jnp.zeros(25, jnp.int32))
    chosen = {"index": jnp.arange(30, dtype=jnp.int32) % 25, "count": jnp.int32(25)}
    variables = model.init(jax.random.key(0))
    got = controls.reestimated(forward, variables, chosen, pool, jax.random.key(1))["batch_stats"]
    assert got["count"].dtype == jnp.int32 and got["count"] == 2**24 + 1
    assert got["ready"].dtype == bool and not got["ready"]
    np.testing.assert_allclose(got["mean"], images.mean() / 255, rtol=1e-5)
