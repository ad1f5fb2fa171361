"""The representation: what a model's classifier reads, in evaluation and in training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from fedjax_sim import models
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.model import apply_dense
from fedjax_sim.models import norms, peel
from fedjax_sim.models.zoo import TABLE
from tests import oracles
from tests.models.test_zoo import SMALL, flat, start

KEY = jax.random.key(0)


class Normed(nn.Module):
    """conv – batch norm – dropout – heads/out, a classifier inside a module, without a bias."""

    @nn.compact
    def __call__(self, x, *, train=False, mask=None):
        peel(self, "conv", x)
        x = models.Conv(4, (3, 3), name="conv")(x)
        x = nn.relu(norms.BatchNorm(name="bn")(x, train=train, mask=mask)).mean((1, 2))
        return Head(name="heads")(nn.Dropout(0.5, deterministic=not train)(x))


class Head(nn.Module):
    @nn.compact
    def __call__(self, x):
        peel(self, "out", x)
        return nn.Dense(3, use_bias=False, name="out")(x)


def normed():
    return models.from_flax(Normed(), (4, 4, 2), 3, name="normed")


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", TABLE)
def test_it_is_what_the_classifier_reads_and_the_classifier_gives_the_logits(name, train):
    """The very arrays, while the forward pass is traced: nothing is compiled."""
    shape, options = SMALL[name]
    model = models.create(name, shape, 5, **options)
    model.check_classifier("a test")
    seen = []

    def watch(call, args, keywords, context):
        out = call(*args, **keywords)
        if context.module.path == model.classifier and context.method_name == "__call__":
            assert isinstance(context.module, nn.Dense)
            seen.append((args[0], out))
        return out

    def forward(variables, images, rng):
        mask = jnp.asarray([True, True, False, True])
        with nn.intercept_methods(watch):
            logits, z, new = model.represent(variables, images, train=train, mask=mask, rng=rng)
        ((read, out),) = seen
        assert z is read and logits is out
        assert jax.tree.structure(new) == jax.tree.structure(variables)
        return logits, z, apply_dense(model.head(variables), z)

    variables = jax.eval_shape(model.init, KEY)
    images = jax.ShapeDtypeStruct((4, *model.input_shape), jnp.float32)
    logits, z, again = jax.eval_shape(forward, variables, images, KEY)
    assert logits.shape == again.shape == (4, 5)
    assert z.ndim == 2 and z.dtype == logits.dtype == again.dtype == jnp.float32


def test_everything_but_the_representation_is_what_apply_gives():
    """Logits, and statistics moved on past padding, in training; dropout included."""
    model = normed()
    variables = start(model)
    images = jax.random.normal(KEY, (4, *model.input_shape))
    mask = jnp.asarray([True, True, False, True])
    assert model.classifier == ("heads", "out") and set(model.head(variables)) == {"kernel"}
    for settings in ({}, {"train": True, "mask": mask, "rng": jax.random.key(3)}):
        plain, moved = jax.jit(lambda x, s=settings: model.apply(variables, x, **s))(images)
        represent = jax.jit(lambda x, s=settings: model.represent(variables, x, **s))
        logits, z, new = represent(images)
        np.testing.assert_allclose(logits, plain, rtol=1e-6, atol=1e-6)
        oracles.assert_trees_close(new, moved, atol=1e-6)
        assert (oracles.far_apart(new["batch_stats"], variables["batch_stats"]) > 1e-2) == bool(settings)
        oracles.assert_trees_equal(new["params"], variables["params"])
        np.testing.assert_allclose(apply_dense(model.head(variables), z), logits, rtol=1e-6, atol=1e-6)
        assert bool((z == 0).any()) == bool(settings)  # what dropout took away is away before the classifier
    padded, _, same = represent(images.at[2].set(50.0))
    np.testing.assert_array_equal(padded[mask], logits[mask])
    oracles.assert_trees_equal(same, new)


def test_it_is_the_last_peel_points_feature():
    shape, options = SMALL["lenet"]
    model = models.create("lenet", shape, 5, **options)
    variables = start(model)
    images = jax.random.normal(KEY, (2, *shape))
    logits, z, _ = model.represent(variables, images)
    np.testing.assert_array_equal(z, model.features(variables, images)[1]["fc3"])
    np.testing.assert_allclose(apply_dense(model.head(variables), z), logits, rtol=1e-5, atol=1e-6)
    assert flat(variables)[("params", "fc3", "kernel")] is model.head(variables)["kernel"]


@pytest.mark.parametrize("case", ["no peel points", "a convolution last", "not the classifier last"])
def test_a_model_without_a_marked_classifier_is_refused(case):
    model = models.create("lenet", (16, 16, 3), 5)
    points = {"no peel points": (), "a convolution last": model.peel_points[:1]}
    broken = dataclasses.replace(model, peel_points=points.get(case, model.peel_points[:-1]))
    with pytest.raises(UserError, match="MOON wants the representation") as caught:
        broken.check_classifier("MOON")
    assert caught.value.field == "model" and caught.value.value == "lenet"


def test_what_is_asked_of_a_model_is_traced_once():
    calls = []

    class Counted(nn.Module):
        @nn.compact
        def __call__(self, x, *, train=False, mask=None):
            calls.append(train)
            x = nn.Dense(3, name="second")(nn.Dense(4, name="last")(x.reshape(len(x), -1)))
            models.peel(self, "fc", x)
            return nn.Dense(2, name="fc")(x)

    model = models.from_flax(Counted(), (2, 2, 1), 2, name="counted")
    wanted = jax.eval_shape(model.init, jax.random.key(0))
    calls.clear()
    for _ in range(2):
        assert model.abstract == wanted
        assert [path[1] for path in model.layer_order()[::2]] == ["last", "second", "fc"]
        assert set(model.blocks()) == set(model.layer_order())
        assert (model.num_params(), model.convolves) == (20 + 15 + 8, False)
    assert len(calls) == 1
    model.abstract["params"].clear()
    assert model.abstract == wanted
