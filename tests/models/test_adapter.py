from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from fedjax_sim import models
from fedjax_sim.core.errors import UserError
from fedjax_sim.models import adapter

KEY = jax.random.key(0)
SHAPE = (6, 6, 2)


class Plain(nn.Module):
    """No `train`, no `mask`."""

    classes: int = 3

    @nn.compact
    def __call__(self, x):
        models.peel(self, "hidden", x.reshape(x.shape[0], -1))
        x = nn.relu(nn.Dense(7, name="hidden")(x.reshape(x.shape[0], -1)))
        models.peel(self, "out", x)
        return nn.Dense(self.classes, name="out")(x)


class Normed(nn.Module):
    """Flax's batch norm, and the opposite of `train`."""

    @nn.compact
    def __call__(self, x, deterministic=True):
        x = models.Conv(4, (3, 3), name="conv")(x)
        x = nn.BatchNorm(use_running_average=deterministic, name="bn")(x)
        x = nn.Dropout(0.0, deterministic=deterministic)(nn.relu(x))
        return nn.Dense(3, dtype=jnp.bfloat16)(x.mean((1, 2)))


class OwnStatistics(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        mean = self.variable("batch_stats", "centre", jnp.zeros, (), jnp.float32)
        if train and not self.is_initializing():
            mean.value = x.mean()
        return nn.Dense(3)(x.reshape(x.shape[0], -1) - mean.value)


class Masked(nn.Module):
    @nn.compact
    def __call__(self, x, train, mask=None):
        x = nn.Dense(3)(x.reshape(x.shape[0], -1))
        return x if mask is None else jnp.where(mask[:, None], x, 0.0)


def images(rows):
    return jax.random.normal(jax.random.key(1), (rows, *SHAPE), jnp.float32)


def test_a_module_without_train_and_mask_takes_both_and_keeps_its_paths():
    model = models.from_flax(Plain(), SHAPE, 3, name="mine")
    variables = jax.jit(model.init)(KEY)
    assert set(variables["params"]) == {"hidden", "out"}
    logits, _ = model.apply(variables, images(4), train=True, mask=jnp.asarray([True] * 3 + [False]))
    np.testing.assert_array_equal(logits, Plain().apply(variables, images(4)))
    assert [point.name for point in model.peel_points] == ["hidden", "out"]
    again, features = model.features(variables, images(4))
    assert features["out"].shape == (4, 7)
    np.testing.assert_array_equal(again, logits)


def test_peel_points_may_be_chosen():
    model = models.from_flax(Plain(), SHAPE, 3, name="mine", peel_points=["out"])
    assert model.peel_points == (models.PeelPoint("out", ("out", "kernel")),)
    with pytest.raises(UserError, match="hidden, out"):
        models.from_flax(Plain(), SHAPE, 3, name="mine", peel_points=["conv9"])
    with pytest.raises(UserError, match="no such parameter"):
        models.from_flax(
            Plain(), SHAPE, 3, name="mine", peel_points=[models.PeelPoint("out", ("out", "weight"))]
        )


def test_flax_batch_norms_are_given_the_mask():
    model = models.from_flax(Normed(), SHAPE, 3, name="normed")
    variables = jax.jit(model.init)(KEY)
    x = images(4).at[3].set(1e3)
    mask = jnp.asarray([True, True, True, False])
    logits, new = model.apply(variables, x, train=True, mask=mask)
    short, short_new = model.apply(variables, x[:3], train=True)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits[:3], short, rtol=1e-2, atol=1e-2)
    for name in ("mean", "var"):
        new_leaf, short_leaf = (v["batch_stats"]["bn"][name] for v in (new, short_new))
        np.testing.assert_allclose(new_leaf, short_leaf, rtol=1e-5, atol=1e-6)
        assert not np.array_equal(new_leaf, variables["batch_stats"]["bn"][name])
    _, empty = model.apply(variables, x, train=True, mask=jnp.zeros(4, bool))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(empty))


def test_evaluation_is_evaluation_under_every_name():
    model = models.from_flax(Normed(), SHAPE, 3, name="normed")
    variables = jax.jit(model.init)(KEY)
    one, _ = model.apply(variables, images(4))
    np.testing.assert_allclose(one[:1], model.apply(variables, images(4)[:1])[0], rtol=1e-2, atol=1e-3)


class Ends(nn.Module):
    """A dense layer, and `last` of what it gives."""

    last: Callable

    @nn.compact
    def __call__(self, x, train=False):
        return self.last(nn.Dense(3)(x.reshape(x.shape[0], -1)))


def test_own_batch_statistics_without_a_mask_are_warned_about():
    with pytest.warns(UserWarning, match="padding would count"):
        models.from_flax(OwnStatistics(), SHAPE, 3, name="own")


def test_a_module_with_a_mask_gets_it():
    model = models.from_flax(Masked(), SHAPE, 3, name="masked")
    logits, _ = model.apply(jax.jit(model.init)(KEY), images(2), mask=jnp.asarray([True, False]))
    assert np.any(np.asarray(logits[0]))
    np.testing.assert_array_equal(logits[1], np.float32(0))


def test_plain_convolutions_are_warned_about():
    class Slow(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            return nn.Dense(3)(nn.Conv(4, (3, 3), name="edges")(x).mean((1, 2)))

    with pytest.warns(UserWarning, match="edges.*80 times slower"):
        models.from_flax(Slow(), SHAPE, 3, name="slow")


@pytest.mark.parametrize(
    "last",
    [
        nn.softmax,
        jax.nn.softmax,
        nn.sigmoid,
        jax.jit(nn.softmax),
        lambda x: nn.softmax(x[:, None]).squeeze(1),
    ],
    ids=["flax", "jax", "sigmoid", "jitted", "reshaped"],
)
@pytest.mark.parametrize("custom_rule", [False, True])
def test_probabilities_in_the_place_of_logits_are_warned_about(last, custom_rule):
    with (
        jax.softmax_custom_jvp(custom_rule),
        pytest.warns(UserWarning, match="^ends ends in a softmax or a sig"),
    ):
        models.from_flax(Ends(last), SHAPE, 3, name="ends")


@pytest.mark.parametrize(
    "last",
    [
        lambda x: x,
        nn.log_softmax,
        nn.relu,
        lambda x: nn.softmax(x) * x,
        lambda x: jnp.exp(x) / jnp.exp(2 * x),
    ],
    ids=["logits", "log softmax", "relu", "attention", "a quotient"],
)
def test_other_ends_of_a_network_are_not(last):
    models.from_flax(Ends(last), SHAPE, 3, name="ends")


@pytest.mark.parametrize(
    "layer",
    [lambda: nn.Dropout(0.5, deterministic=False), lambda: nn.Dropout(0.5), nn.BatchNorm],
    ids=["always", "dropout", "batch norm"],
)
def test_layers_that_are_not_told_of_training_get_one_advice(layer):
    class Untold(nn.Module):
        @nn.compact
        def __call__(self, x):
            return layer()(nn.Dense(3)(x.reshape(x.shape[0], -1)))

    with pytest.raises(UserError, match=r"keyword `train`, and write nn\.Dropout\(rate, deterministic=not"):
        models.from_flax(Untold(), SHAPE, 3, name="untold")


def test_another_random_stream_in_evaluation_is_told():
    class Noisy(nn.Module):
        @nn.compact
        def __call__(self, x):
            noise = jax.random.normal(self.make_rng("noise"), (), jnp.float32)
            return nn.Dense(3)(x.reshape(x.shape[0], -1)) + noise

    with pytest.raises(UserError, match=r"draws random numbers in evaluation .*Draw only in training"):
        models.from_flax(Noisy(), SHAPE, 3, name="noisy")


def test_a_field_num_classes_is_named_where_the_width_is_wrong():
    class Own(nn.Module):
        num_classes: int = 10

        @nn.compact
        def __call__(self, x):
            return nn.Dense(self.num_classes)(x.reshape(x.shape[0], -1))

    with pytest.raises(UserError, match=r"Give num_classes=3: an instance keeps its own"):
        models.from_flax(Own(), SHAPE, 3, name="own")
    made = adapter.adapted(Own, SHAPE, 3, name="own")
    assert jax.eval_shape(made.init, KEY)["params"]["Dense_0"]["bias"].shape == (3,)


def test_mistakes_in_a_module():
    class Pair(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x, x

    class Half(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, param_dtype=jnp.bfloat16, dtype=jnp.float32)(x.reshape(x.shape[0], -1))

    class Keyed(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.variable("random", "state", lambda: jax.random.key(0))
            return nn.Dense(3)(x.reshape(x.shape[0], -1))

    class Misnamed(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = x.reshape(x.shape[0], -1)
            models.peel(self, "head", x)
            return nn.Dense(3, name="out")(x)

    for module, options, says in [
        (Plain(), {"num_classes": 4}, "(1, 3)"),
        (Plain(), {"takes_mask": True}, "no keyword `mask`"),
        (Plain(), {"input_shape": (6, 6)}, "positive integers"),
        (Pair(), {}, "a tuple"),
        (Half(), {}, "bfloat16"),
        (Keyed(), {}, "random/state is a random key"),
        (Misnamed(), {}, "no layer of that name"),
        (jnp.sin, {}, "flax.linen.Module"),
    ]:
        with pytest.raises(UserError) as caught:
            models.from_flax(module, **{"input_shape": SHAPE, "num_classes": 3, "name": "bad", **options})
        assert says in str(caught.value)


class Marked(nn.Module):
    """Two layers of one shape and a last one; `marks` says what is marked where."""

    marks: Callable

    @nn.compact
    def __call__(self, x, train=False):
        x = x.reshape(x.shape[0], -1)[:, :8]
        seen = [x]
        for name in ("a", "b"):
            self.marks(self, name, seen)
            x = nn.Dense(8, name=name)(x)
            seen.append(x)
        self.marks(self, "out", seen)
        return nn.Dense(3, name="out")(x)


def both_as_the_other(module, name, seen):
    models.peel(module, {"a": "b", "b": "a", "out": "out"}[name], seen[-1])


def twice(module, name, seen):
    models.peel(module, "a" if name == "b" else name, seen[-1])


def logits_of_a(module, name, seen):
    models.peel(module, name, seen[-1][:, :3] if name == "b" else seen[-1])


@pytest.mark.parametrize(
    ("marks", "name", "why"),
    [
        (both_as_the_other, "b", "what is marked with this name is read by the layer a"),
        (twice, "a", "it is marked more than once"),
        (logits_of_a, "b", "what is marked with this name is 3 wide, and the layer reads 8"),
    ],
)
def test_a_mark_that_is_not_what_its_layer_reads_is_refused(marks, name, why):
    with pytest.raises(UserError, match=f"^model.peel_points = '{name}': {why}"):
        models.from_flax(Marked(marks), SHAPE, 3, name="marked")


@pytest.mark.parametrize(
    "change", [lambda x: x, lambda x: x + 0, lambda x: x.reshape(x.shape)], ids=["same", "copy", "reshaped"]
)
def test_what_is_marked_need_not_be_the_very_array_that_is_read(change):
    given = Marked(lambda module, name, seen: models.peel(module, name, change(seen[-1])))
    made = models.from_flax(given, SHAPE, 3, name="marked")
    assert [point.name for point in made.peel_points] == ["a", "b", "out"]
