"""Every implementation of convolution and pooling agrees with plain XLA and its autodiff, or with NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_sim.core.conv_impl import CONV_IMPLS, conv_impl
from fedjax_sim.models.kernels import conv, tiles


def arrays(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def with_gradients(function, *args):
    """The value and its pull-back of a fixed random cotangent."""

    @jax.jit
    def both(*args):
        value, pull = jax.vjp(function, *args)
        return value, *pull(arrays(value.shape, seed=1)[0].astype(value.dtype))

    return both(*args)


def tolerance(name: str) -> float:
    """Relative to the largest entry. Winograd's transforms amplify rounding."""
    return 4e-5 if name == "winograd" else 2e-6


def assert_same(got, wanted, tolerance=2e-6):
    for a, b in zip(got, wanted, strict=True):
        scale = float(np.abs(b).max()) + 1e-12
        np.testing.assert_allclose(np.asarray(a) / scale, np.asarray(b) / scale, atol=tolerance)


GEOMETRIES = [
    # height, width, in, out, kernel, stride, padding, dilation, groups
    (8, 8, 3, 4, (3, 3), (1, 1), "SAME", (1, 1), 1),
    (9, 7, 3, 4, (3, 3), (2, 2), "SAME", (1, 1), 1),
    (11, 10, 2, 6, (5, 5), (1, 1), "VALID", (1, 1), 1),
    (11, 10, 4, 6, (3, 3), (2, 2), "VALID", (2, 2), 2),
    (8, 8, 4, 8, (3, 3), (1, 1), "SAME", (2, 1), 4),
    (12, 12, 3, 5, (7, 7), (2, 2), ((3, 3), (3, 3)), (1, 1), 1),
    (8, 8, 5, 6, (1, 1), (2, 2), "VALID", (1, 1), 1),
    (10, 9, 4, 4, (3, 2), (3, 1), ((1, 0), (0, 2)), (1, 1), 1),
    (7, 7, 9, 2, (2, 2), (2, 2), "VALID", (1, 1), 1),
    (6, 6, 3, 3, (3, 3), (1, 2), "SAME", (1, 1), 3),
]


@pytest.mark.parametrize("name", CONV_IMPLS[1:])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_implementations_agree_with_autodiff(geometry, name):
    height, width, inner, outer, kernel, strides, padding, dilation, groups = geometry
    x, k = arrays((2, height, width, inner), (*kernel, inner // groups, outer))
    call = functools.partial(conv.conv, strides=strides, padding=padding, dilation=dilation, groups=groups)
    wanted = with_gradients(functools.partial(call, impl="xla"), x, k)
    assert_same(with_gradients(functools.partial(call, impl=name), x, k), wanted, tolerance(name))


def by_hand(x, k, strides, padding):
    """As `with_gradients` of a convolution, in float64 NumPy, one kernel entry at a time."""
    x, k = (np.asarray(v, np.float64) for v in (x, k))
    around = np.pad(x, ((0, 0), *padding, (0, 0)))
    size = [(around.shape[1 + axis] - k.shape[axis]) // strides[axis] + 1 for axis in (0, 1)]
    pull = np.asarray(arrays((len(x), *size, k.shape[-1]), seed=1)[0], np.float64)
    value, of_x, of_k = np.zeros(pull.shape), np.zeros(around.shape), np.zeros(k.shape)
    for i, j in np.ndindex(*k.shape[:2]):
        at = tuple(
            slice(first, first + step * (count - 1) + 1, step)
            for first, step, count in zip((i, j), strides, size, strict=True)
        )
        seen = (slice(None), *at)
        value += around[seen] @ k[i, j]
        of_x[seen] += pull @ k[i, j].T
        of_k[i, j] = np.einsum("bhwc,bhwf->cf", around[seen], pull)
    inside = tuple(slice(low, low + n) for (low, _), n in zip(padding, x.shape[1:3], strict=True))
    return value, of_x[:, *inside], of_k


@settings(max_examples=10, deadline=None)
@given(st.data())
def test_patches_of_any_geometry(data):
    """Against NumPy: of some geometries, a 2×4 kernel of stride 2 on 6×5 say, XLA aborts the process while it
    compiles its own gradient.
    """
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    kernel, strides = (draw(1, 4), draw(1, 4)), (draw(1, 3), draw(1, 3))
    padding = ((draw(0, 2), draw(0, 2)), (draw(0, 2), draw(0, 2)))
    x, k = arrays((2, draw(5, 9), draw(5, 9), draw(1, 9)), (*kernel, 1, 3))
    k = jnp.broadcast_to(k, (*kernel, x.shape[-1], 3))
    call = functools.partial(conv.conv, strides=strides, padding=padding, impl="patches")
    assert_same(with_gradients(call, x, k), by_hand(x, k, strides, padding))


def test_patches_are_written_in_place_on_a_cpu_and_joined_in_one_elsewhere():
    geometry = tiles.Geometry((1, 1), ((0, 0), (0, 0)), (1, 1), 1)
    at = tiles.layout((2, 14, 14, 6), (5, 5, 6, 16), geometry, (2, 2))
    patches = jax.jit(lambda x: tiles._to_patches(x, geometry, at)).trace(*arrays((2, 14, 14, 6)))
    for platform, joined in (("cpu", False), ("cuda", True)):
        program = patches.lower(lowering_platforms=(platform,)).as_text()
        assert ("concatenate" in program) is joined
    parts = arrays(*[(3, 5, 4)] * 3)
    np.testing.assert_array_equal(tiles._written(*parts), tiles._joined(*parts))


@settings(max_examples=10, deadline=None)
@given(st.data())
def test_winograd_of_any_geometry(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    side = data.draw(st.sampled_from([3, 5]))
    padding = ((draw(0, 2), draw(0, 2)), (draw(0, 2), draw(0, 2)))
    outer = data.draw(st.sampled_from([3, 17]))  # in one dimension, or in two where the inner are 16
    x, k = arrays((2, draw(5, 13), draw(5, 13), draw(1, 9) if outer == 3 else 16), (side, side, 1, outer))
    k = jnp.broadcast_to(k, (side, side, x.shape[-1], outer))
    call = functools.partial(conv.conv, padding=padding, impl="winograd")
    assert_same(with_gradients(call, x, k), by_hand(x, k, (1, 1), padding), 4e-5)


@pytest.mark.parametrize(("m", "r"), [(2, 3), (4, 3), (2, 5), (4, 5)])
def test_winograd_transforms_are_a_correlation(m, r):
    """Aᵀ[(G g Gᵀ) ⊙ (Bᵀ d B)]A is the m×m outputs of g on d, and Aᵀ[(G g) ⊙ (Bᵀ d)] those of one line.

    The transforms are exact but for float32.
    """
    n = m + r - 1
    d, g = (np.random.default_rng(0).normal(size=(size, size)) for size in (n, r))
    read, grow, write = (a.astype(np.float64) for a in tiles._squared(m, r))
    got = (write @ ((grow @ g.reshape(-1)) * (read @ d.reshape(-1)))).reshape(m, m)
    wanted = [[(d[i : i + r, j : j + r] * g).sum() for j in range(m)] for i in range(m)]
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    read, grow, write = (a.astype(np.float64) for a in tiles._transforms(m, r))
    line = write @ ((grow @ g[0]) * (read @ d[0]))
    np.testing.assert_allclose(line, np.correlate(d[0], g[0], "valid"), atol=1e-5)


def test_auto_never_takes_winograd_and_that_only_float32():
    def jaxpr(x, k, **options):
        return str(jax.make_jaxpr(functools.partial(conv.conv, padding="SAME", **options))(x, k))

    for side in (3, 5):
        for inner, outer in ((32, 32), (3, 32), (8, 8)):
            x, k = arrays((2, 8, 8, inner), (side, side, inner, outer))
            winograd, auto = jaxpr(x, k, impl="winograd"), jaxpr(x, k, impl="auto")
            assert winograd != auto
            assert auto in (jaxpr(x, k, impl="canonical"), jaxpr(x, k, impl="patches"))
            assert winograd != jaxpr(x, k, impl="canonical")
            x, k = x.astype(jnp.bfloat16), k.astype(jnp.bfloat16)
            assert jaxpr(x, k, impl="winograd") == jaxpr(x, k, impl="canonical")


def test_winograd_of_few_features_is_one_dimensional():
    geometry = tiles.Geometry((1, 1), ((0, 0), (0, 0)), (1, 1), 1)

    def way(inner, outer, name="winograd", side=5):
        return type(conv._way(name, *arrays((2, 12, 12, inner), (side, side, inner, outer)), geometry))

    assert way(16, 16) is tiles.Winograd
    assert way(3, 6) is way(15, 64) is tiles.Strips
    assert way(2, 6, "auto") is way(3, 6, "auto", side=3) is tiles.Patches


@pytest.mark.parametrize(
    ("image", "kernel", "padding", "patches"),
    [(8, 5, 0, True), (9, 5, 0, False), (4, 5, 2, True), (5, 5, 2, False), (2, 3, 1, True), (3, 3, 1, False)],
)
def test_auto_takes_patches_where_outputs_are_smaller_than_the_kernel(image, kernel, padding, patches):
    geometry = tiles.Geometry((1, 1), ((padding, padding),) * 2, (1, 1), 1)
    way = conv._way("auto", *arrays((2, image, image, 32), (kernel, kernel, 32, 64)), geometry)
    assert isinstance(way, tiles.Patches) is patches


@pytest.mark.parametrize(
    ("side", "inner", "outer", "kernel", "padding"),
    [(32, 3, 6, 5, "VALID"), (16, 32, 64, 5, "SAME"), (8, 64, 64, 3, "SAME"), (4, 32, 64, 5, "SAME")],
)
def test_the_default_rounds_as_finely_as_xla(side, inner, outer, kernel, padding):
    """Against float64, in root mean squares: value and both gradients. Winograd has 2 to 10 times it."""
    x, k = arrays((2, side, side, inner), (kernel, kernel, inner, outer))
    got = with_gradients(functools.partial(conv.conv, padding=padding), x, k)
    with jax.enable_x64(True):
        plain = functools.partial(conv.conv, padding=padding, impl="xla")
        value, pull = jax.vjp(plain, *(jnp.asarray(np.asarray(v, np.float64)) for v in (x, k)))
        wanted = value, *pull(jnp.asarray(np.asarray(arrays(value.shape, seed=1)[0], np.float64)))
    for a, b in zip(got, wanted, strict=True):
        error = np.asarray(a, np.float64) - np.asarray(b)
        assert np.sqrt((error**2).mean() / (np.asarray(b) ** 2).mean()) < 6e-7


@pytest.mark.parametrize("name", CONV_IMPLS)
def test_stacked_kernels_are_one_convolution_each(name):
    x, k = arrays((3, 2, 8, 8, 2), (3, 3, 3, 2, 4))
    call = functools.partial(conv.conv, padding="SAME", impl=name)
    got = jax.vmap(lambda x, k: with_gradients(call, x, k)[1:])(x, k)
    xla = functools.partial(conv.conv, padding="SAME", impl="xla")
    cotangent = arrays((2, 8, 8, 4), seed=1)[0]
    for client in range(3):
        pull = jax.vjp(xla, x[client], k[client])[1]
        assert_same([part[client] for part in got], pull(cotangent), tolerance(name))


@pytest.mark.parametrize("name", CONV_IMPLS)
@pytest.mark.parametrize(
    ("shape", "kernel", "padding"),
    [((32, 32, 3, 6), 5, "VALID"), ((14, 14, 6, 16), 5, "VALID"), ((9, 11, 3, 5), 3, "SAME")],
)
def test_fused_relu_and_pooling(shape, kernel, padding, name):
    height, width, inner, outer = shape
    x, k, bias = arrays((3, height, width, inner), (kernel, kernel, inner, outer), (outer,))

    def plain(x, k, bias):
        y = nn.relu(conv.conv(x, k, padding=padding, impl="xla") + bias[None, None, None])
        return nn.max_pool(y, (2, 2), (2, 2))

    def fused(x, k, bias):
        with conv_impl(name):
            return conv.conv_relu_pool(x, k, bias, padding=padding)

    assert_same(with_gradients(fused, x, k, bias), with_gradients(plain, x, k, bias), tolerance(name))


@pytest.mark.parametrize(
    ("name", "features"),
    [("patches", 16), ("winograd", 1)]
    + [pytest.param(*other, marks=pytest.mark.slow) for other in (("patches", 1), ("winograd", 16))],
)
def test_fused_pooling_gives_a_tie_to_the_first(name, features):
    """Without a kernel all four of a window are equal: the gradient must go to the first of them, once."""
    x, k = arrays((1, 6, 6, features))[0], jnp.zeros((3, 3, features, features))
    bias = jnp.ones(features)

    def total(k):
        with conv_impl(name):
            return conv.conv_relu_pool(x, k, bias).sum()

    firsts = sum(np.asarray(x)[0, i : i + 3, j : j + 3] for i in (0, 2) for j in (0, 2))
    wanted = np.broadcast_to(firsts[..., None], k.shape)
    np.testing.assert_allclose(jax.grad(total)(k), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "window", "strides"),
    [(8, 2, None), (9, 2, None), (9, 3, None), (8, 3, 2), (9, 3, 2), (6, 3, 1), (7, 2, 1), (8, 2, 3)],
)
def test_max_pool(size, window, strides):
    x = arrays((2, size, size, 3))[0]
    step = strides or window
    plain = functools.partial(nn.max_pool, window_shape=(window, window), strides=(step, step))
    ours = functools.partial(conv.max_pool, window=window, strides=strides)
    assert_same(with_gradients(ours, x), with_gradients(plain, x))


def test_the_layer_takes_the_implementation_of_its_context():
    layer = conv.Conv(4, (3, 3))
    x = arrays((1, 8, 8, 2))[0]
    variables = layer.init(jax.random.key(0), x)

    def traced(name):
        with conv_impl(name):
            return str(jax.make_jaxpr(lambda v: layer.apply(v, x))(variables))

    assert "conv_general_dilated" in traced("xla") and "custom_vjp" not in traced("xla")
    assert "custom_vjp" in traced("canonical") and "conv_general_dilated" in traced("canonical")
    assert "conv_general_dilated" not in traced("patches")


def test_transposed_and_one_dimensional_convolutions_go_to_xla():
    x, k = arrays((2, 9, 3), (3, 3, 4))
    wanted = jax.lax.conv_general_dilated(x, k, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"))
    got = conv.conv_general_dilated(x, k, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"))
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("name", ["canonical", "patches"])
def test_half_precision(name):
    x, k = (a.astype(jnp.bfloat16) for a in arrays((2, 8, 8, 3), (3, 3, 3, 4)))
    got = with_gradients(functools.partial(conv.conv, padding="SAME", impl=name), x, k)
    assert all(part.dtype == jnp.bfloat16 for part in got)
