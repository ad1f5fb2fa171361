"""The dense layer's own gradients agree with autodiff: few samples or many, a small layer or a large one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from fedjax_sim.core.conv_impl import conv_impl
from fedjax_sim.models.kernels import dense_gradients
from fedjax_sim.models.kernels.dense_gradients import Dense

SMALL, LARGE = (7, 5), (1031, 257)  # the latter in blocks of 255 rows and a last one of 11


def problem(layer, batch, sizes, wave=None):
    """(loss of (variables, x), variables, x), stacked for a wave."""
    x = jax.random.normal(jax.random.key(0), (batch, sizes[0])) / sizes[0] ** 0.5
    variables = layer.init(jax.random.key(1), x)
    weights = jax.random.normal(jax.random.key(2), (batch, sizes[1]))
    if wave:
        variables, x = (
            jax.tree.map(lambda a: np.stack([a * k for k in range(wave)]), t) for t in (variables, x)
        )
    return lambda v, x: (weights * layer.apply(v, x) ** 2).sum(), variables, x


def gradients(features, batch, sizes, wave=None, by=(0, 1)):
    loss, variables, x = problem(features, batch, sizes, wave)
    pull = jax.grad(loss, by)
    return jax.tree.leaves((jax.vmap(pull) if wave else pull)(variables, x))


def assert_close(got, wanted):
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("wave", [None, 3])
@pytest.mark.parametrize("batch", [1, 16, 17])
@pytest.mark.parametrize("sizes", [SMALL, LARGE], ids=["small", "large"])
def test_gradients_are_those_of_flax(sizes, batch, wave):
    got, wanted = (gradients(kind(sizes[1]), batch, sizes, wave) for kind in (Dense, nn.Dense))
    assert_close(got, wanted)


@pytest.mark.parametrize("by", [(0,), (1,)], ids=["parameters", "input"])
@pytest.mark.parametrize(("sizes", "wave"), [(SMALL, 3), (LARGE, None)], ids=["small", "large"])
def test_gradients_by_one_alone_are_those_of_flax(sizes, wave, by, batch=17):
    got, wanted = (gradients(kind(sizes[1]), batch, sizes, wave, by) for kind in (Dense, nn.Dense))
    assert_close(got, wanted)


def test_bfloat16_samples_are_summed_in_float32():
    """Added one by one in bfloat16 256 + 1 + … + 1 would stay 256."""
    x = jnp.ones((9, 1), jnp.bfloat16).at[0].set(256)  # 256 + 1 rounds to 256
    with conv_impl("auto"):
        pull = jax.grad(lambda kernel: dense_gradients.dot_general(x, kernel, None).sum())
        got = pull(jnp.zeros((1, 3), jnp.bfloat16))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(got, np.float32), 264)


@pytest.mark.parametrize(
    "sizes", [SMALL, pytest.param(LARGE, marks=pytest.mark.slow)], ids=["small", "large"]
)
def test_second_derivatives_are_those_of_flax(sizes):
    def twice(kind):
        loss, variables, x = problem(kind(sizes[1]), 4, sizes)
        size = lambda v, x: sum((g**2).sum() for g in jax.tree.leaves(jax.grad(loss, (0, 1))(v, x)))  # noqa: E731
        return jax.tree.leaves(jax.grad(size, (0, 1))(variables, x))

    assert_close(twice(Dense), twice(nn.Dense))


def test_a_large_layer_goes_by_blocks_and_a_small_one_does_not(monkeypatch):
    calls = []
    real = dense_gradients._by_blocks
    monkeypatch.setattr(
        dense_gradients, "_by_blocks", lambda *args: calls.append(args[1].shape) or real(*args)
    )
    gradients(Dense(SMALL[1]), 4, SMALL)
    gradients(Dense(LARGE[1]), 17, LARGE)  # more samples than few
    gradients(Dense(LARGE[1]), 4, LARGE, by=(0,))  # a first layer
    with conv_impl("patches"):  # an accelerator's
        gradients(Dense(LARGE[1]), 4, LARGE)
    assert not calls
    gradients(Dense(LARGE[1]), 4, LARGE)
    assert calls == [LARGE]


def test_weights_are_updated_where_they_lie():
    """In a loop of steps, XLA makes no copy of a large layer's weights."""
    layers = [Dense(LARGE[0]), Dense(LARGE[1])]
    x = jax.random.normal(jax.random.key(0), (10, 33))
    first = layers[0].init(jax.random.key(1), x)["params"]
    second = layers[1].init(jax.random.key(2), layers[0].apply({"params": first}, x))["params"]

    def loss(params, x):
        hidden = nn.relu(layers[0].apply({"params": params[0]}, x))
        return (layers[1].apply({"params": params[1]}, hidden) ** 2).mean()

    def steps(params):
        def step(_, params):
            return jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params, x))

        return jax.lax.fori_loop(0, 5, step, params)

    text = jax.jit(steps, donate_argnums=0).lower([first, second]).compile().as_text()
    shape = jnp.shape(second["kernel"])
    assert f"f32[{shape[0]},{shape[1]}]" in text
    assert f"= f32[{shape[0]},{shape[1]}]{{1,0}} copy(" not in text


def test_only_xla_has_a_forward_mode():
    layer, x = Dense(5), np.ones((4, 7), np.float32)
    variables = layer.init(jax.random.key(1), x)
    with conv_impl("xla"):
        jax.jvp(lambda v: layer.apply(v, x), (variables,), (variables,))
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda v: layer.apply(v, x), (variables,), (variables,))
