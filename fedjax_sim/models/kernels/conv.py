"""Convolution and pooling whose gradients stay fast inside loops and over stacked clients.

Why not plain XLA: on its CPU backend the gradient of a convolution inside `lax.scan` or `lax.map` is some
80 times slower than outside (jax-ml/jax#12868; the pass that brings JAX's gradients into the form of the
fast kernel looks at the entry computation only), and under `vmap` over clients every convolution becomes
a grouped one, a slow path on CPUs and GPUs alike (jax-ml/jax#13800). So a convolution can be written in
four ways, with equal results up to float rounding:

- `xla`: `lax.conv_general_dilated` and its autodiff.
- `canonical`: the same forward; both gradients written as explicit transposes and plain
  NHWC/HWIO/NHWC convolutions.
- `patches`: a matrix product over the patches that tiles of outputs read. Stacked kernels under `vmap`
  become a batched product.
- `winograd`: a fraction of the multiplications (a quarter, for 3×3 and tiles of 4×4), for square kernels of
  3 and 5, stride 1 and float32; others are computed canonically. Layers of few features take it along the
  width only, and patches along the height. Rounds ten times as coarsely: a forward pass is off by up to 3e-6
  of its size (root mean squares) where the others are by 2e-7. That is enough for some maxima of pooling and
  some ReLUs to be taken elsewhere, and such a one moves a gradient by a hundredth: two rounds of the McMahan
  CNN end at a loss that is off in the fourth digit. So it is taken only where it is asked for, and never by
  default. Without it a round takes 1.18 (McMahan CNN), 1.56 (FEMNIST CNN), 1.12 (LIPS's ResNet-8), 1.04
  (LeNet), 1.03 (ResNet-20) and 0.94 (VGG-16-BN) of the time; medians of 7 to 9 rounds in turn on two cores,
  the machine not quite idle.
- `auto`: for each layer the faster of `canonical` and `patches`, by what was measured on a CPU.

`conv_relu_pool` fuses convolution, bias, ReLU and 2×2 max pooling, so that over tiles neither the
unpooled outputs nor their gradients are ever brought back into image layout.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from fedjax_sim.core.conv_impl import current_conv_impl
from fedjax_sim.models.kernels import tiles
from fedjax_sim.models.kernels.tiles import Geometry, Tile

_NUMBERS = ("NHWC", "HWIO", "NHWC")


def conv(
    x: jax.Array,
    kernel: jax.Array,
    *,
    strides: Sequence[int] = (1, 1),
    padding: str | Sequence[tuple[int, int]] = "VALID",
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    impl: str | None = None,
) -> jax.Array:
    """2-D convolution, differentiable in reverse mode, by the context's implementation unless one is given.

    Args:
      x: f32[B, H, W, C].
      kernel: f32[kh, kw, C / groups, F].
      strides: of the window.
      padding: SAME, VALID, or ((top, bottom), (left, right)).
      dilation: of the kernel.
      groups: of features.
      impl: one of CONV_IMPLS or auto.

    Returns:
      f32[B, H', W', F].
    """
    extent = [(k - 1) * d + 1 for k, d in zip(kernel.shape[:2], dilation, strict=True)]
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(x.shape[1:3], extent, strides, padding)
    geometry = Geometry(
        (strides[0], strides[1]),
        ((int(padding[0][0]), int(padding[0][1])), (int(padding[1][0]), int(padding[1][1]))),
        (dilation[0], dilation[1]),
        groups,
    )
    chosen = impl or current_conv_impl()
    way = _way(chosen, x, kernel, geometry)
    if way is not None:
        return _tiled_conv(way, x, kernel)
    if chosen == "xla":
        return _forward(geometry, x, kernel)
    return _canonical_conv(geometry, x, kernel)


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    precision: Any = None,
    **unused: Any,
) -> jax.Array:
    """Takes the place of `lax.conv_general_dilated` in `flax.linen.Conv`.

    What the implementations do not cover (other than two spatial axes, transposed convolutions, an explicit
    precision) goes to XLA as it is.

    Args:
      lhs: f32[B, H, W, C], the input.
      rhs: f32[kh, kw, C / groups, F], the kernel.
      window_strides: of the window, one for each spatial axis.
      padding: SAME, VALID, or (low, high) for each spatial axis.
      lhs_dilation: of the input; None: 1.
      rhs_dilation: of the kernel; None: 1.
      dimension_numbers: read only where XLA does it; the implementations take NHWC and HWIO, as flax has
        them.
      feature_group_count: groups of features.
      precision: None, or XLA does it.
      **unused: further arguments of `lax.conv_general_dilated`; ignored.

    Returns:
      f32[B, H', W', F].
    """
    odd = lhs.ndim != 4 or precision is not None or any(d != 1 for d in lhs_dilation or ())
    if odd:
        return jax.lax.conv_general_dilated(
            lhs, rhs, window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers,
            feature_group_count=feature_group_count, precision=precision,
        )  # fmt: skip
    return conv(
        lhs, rhs, strides=window_strides, padding=padding, dilation=rhs_dilation or (1, 1),
        groups=feature_group_count,
    )  # fmt: skip


class Conv(nn.Conv):
    """`flax.linen.Conv` (NHWC, kernel HWIO) whose gradients stay fast inside loops."""

    # The annotation makes it the dataclass field that Flax reads; without one Flax would not see it.
    conv_general_dilated: Any = conv_general_dilated


class ConvReluPool(nn.Module):
    """Convolution, bias, ReLU, 2×2 max pooling, fused; the parameters are those of `Conv`.

    Attributes:
      features: F.
      kernel_size: (kh, kw).
      padding: SAME or VALID.
      kernel_init, bias_init: initialisers.
      dtype: of the arithmetic.
    """

    features: int
    kernel_size: tuple[int, int]
    padding: str = "VALID"
    kernel_init: Any = nn.initializers.lecun_normal()
    bias_init: Any = nn.initializers.zeros_init()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """f32[B, H, W, C] -> f32[B, H'//2, W'//2, F]."""
        shape = (*self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        bias = self.param("bias", self.bias_init, (self.features,), jnp.float32)
        x, kernel, bias = (jnp.asarray(v, self.dtype) for v in (x, kernel, bias))
        return conv_relu_pool(x, kernel, bias, padding=self.padding)


def max_pool(x: jax.Array, window: int = 2, strides: int | None = None) -> jax.Array:
    """Maximum over windows, no padding. f32[B, H, W, C] -> f32[B, H', W', C].

    Maxima of strided slices: six times faster on a CPU than XLA's `reduce_window`, whose gradient is slower
    still. Windows that overlap share the maxima of their rows.
    """
    strides = strides or window
    if strides != window:
        for axis in (2, 1):
            span = (x.shape[axis] - window) // strides * strides + 1
            slices = [jax.lax.slice_in_dim(x, i, i + span, strides, axis) for i in range(window)]
            x = functools.reduce(jnp.maximum, slices)
        return x
    height, width = (size // window * window for size in x.shape[1:3])
    x = x[:, :height, :width]
    phases = [x[:, i::window, j::window] for i in range(window) for j in range(window)]
    return functools.reduce(jnp.maximum, phases)


def conv_relu_pool(x: jax.Array, kernel: jax.Array, bias: jax.Array, *, padding: str = "VALID") -> jax.Array:
    """max_pool(relu(conv(x, kernel) + bias), 2), stride 1.

    Where several of a window's four values are the maximum, the first (row by row) takes the gradient.

    Args:
      x: f32[B, H, W, C].
      kernel: f32[kh, kw, C, F].
      bias: f32[F].
      padding: SAME or VALID.

    Returns:
      f32[B, H'//2, W'//2, F], where H' and W' are the convolution's.
    """
    pads = jax.lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], (1, 1), padding)
    geometry = Geometry((1, 1), (tuple(pads[0]), tuple(pads[1])), (1, 1), 1)  # type: ignore[arg-type]
    way = _way(current_conv_impl(), x, kernel, geometry, pooled=True)
    if way is not None:
        return _tiled_relu_pool(way, x, kernel, bias)
    return max_pool(nn.relu(conv(x, kernel, padding=padding) + bias[None, None, None]))


# --- canonical ----------------------------------------------------------------------------------------


def _forward(g: Geometry, x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, g.strides, g.padding, rhs_dilation=g.dilation, dimension_numbers=_NUMBERS,
        feature_group_count=g.groups,
    )  # fmt: skip


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _canonical_conv(g: Geometry, x, kernel):
    return _forward(g, x, kernel)


def _canonical_forward(g, x, kernel):
    return _forward(g, x, kernel), (x, kernel)


def _canonical_backward(g, saved, dy):
    x, kernel = saved
    kh, kw, inner, features = kernel.shape
    extent = [(k - 1) * d + 1 for k, d in zip((kh, kw), g.dilation, strict=True)]
    spread = [(n - 1) * s + 1 for n, s in zip(dy.shape[1:3], g.strides, strict=True)]
    # by x: dy, its stride undone by zeros between, against the mirrored kernel
    flipped = kernel[::-1, ::-1].reshape(kh, kw, inner, g.groups, features // g.groups)
    flipped = flipped.transpose(0, 1, 4, 3, 2).reshape(kh, kw, features // g.groups, g.groups * inner)
    before = [e - 1 - p[0] for e, p in zip(extent, g.padding, strict=True)]
    after = [n + e - 1 - s - b for n, e, s, b in zip(x.shape[1:3], extent, spread, before, strict=True)]
    dx = jax.lax.conv_general_dilated(
        dy, flipped, (1, 1), list(zip(before, after, strict=True)), lhs_dilation=g.strides,
        rhs_dilation=g.dilation, dimension_numbers=_NUMBERS, feature_group_count=g.groups,
    )  # fmt: skip
    # by the kernel: channels of x as the batch, samples as the channels that are summed over
    lead = [p[0] for p in g.padding]
    trail = [s + (e - 1) - n - low for n, s, e, low in zip(x.shape[1:3], spread, extent, lead, strict=True)]
    dk = jax.lax.conv_general_dilated(
        x.transpose(3, 1, 2, 0), dy.transpose(1, 2, 0, 3), g.dilation, list(zip(lead, trail, strict=True)),
        rhs_dilation=g.strides, dimension_numbers=_NUMBERS, batch_group_count=g.groups,
    )  # fmt: skip
    return dx, dk.transpose(1, 2, 0, 3)


_canonical_conv.defvjp(_canonical_forward, _canonical_backward)


# --- over tiles ---------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tiled_conv(way: tiles.Way, x, kernel):
    return _tiled_forward(way, x, kernel)[0]


def _tiled_forward(way, x, kernel):
    at = way.layout(x.shape, kernel.shape)
    y, saved = way.forward(x, kernel, tiles.rowwise(way.tile))
    return way.image(y, x.shape[0], at.tiles, way.tile)[:, : at.out[0], : at.out[1]], (x, kernel, saved)


def _tiled_backward(way, saved, dy):
    x, kernel, saved = saved
    dy = way.rows(dy, way.layout(x.shape, kernel.shape).tiles, way.tile)
    return way.backward(x.shape, kernel.shape, saved, dy, tiles.rowwise(way.tile))


_tiled_conv.defvjp(_tiled_forward, _tiled_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tiled_relu_pool(way: tiles.Way, x, kernel, bias):
    return _relu_pool_forward(way, x, kernel, bias)[0]


def _relu_pool_forward(way, x, kernel, bias):
    at = way.layout(x.shape, kernel.shape)
    y, saved = way.forward(x, kernel, tiles.phasewise(way.tile))
    top = functools.reduce(jnp.maximum, _phases(way, y))
    out = jax.nn.relu(top + _along(bias, top))
    pooled = way.image(out, x.shape[0], at.tiles, (way.tile[0] // 2, way.tile[1] // 2))
    return pooled[:, : at.out[0] // 2, : at.out[1] // 2], (x, kernel, bias, y, top, saved)


def _relu_pool_backward(way, saved, dz):
    x, kernel, bias, y, top, saved = saved
    at = way.layout(x.shape, kernel.shape)
    dz = way.rows(dz, at.tiles, (way.tile[0] // 2, way.tile[1] // 2))
    dz = jnp.where(top + _along(bias, top) > 0, dz, jnp.zeros_like(dz))
    # Written phase by phase into one array: as a concatenation XLA's CPU backend asks for every number
    # which part it comes from, and takes three times as long.
    dy, taken = jnp.zeros(y.shape, dz.dtype), jnp.zeros(dz.shape, bool)
    for phase, start in zip(_phases(way, y), way.quarters(y.shape)[1], strict=True):
        wins = (phase == top) & ~taken
        taken = taken | wins
        dy = jax.lax.dynamic_update_slice(dy, jnp.where(wins, dz, jnp.zeros_like(dz)), start)
    dx, dk = way.backward(x.shape, kernel.shape, saved, dy, tiles.phasewise(way.tile))
    return dx, dk, dz.reshape(-1, bias.shape[0]).sum(0)


_tiled_relu_pool.defvjp(_relu_pool_forward, _relu_pool_backward)


def _phases(way, y):
    """The four outputs of every pooling window."""
    size, starts = way.quarters(y.shape)
    return [jax.lax.slice(y, start, np.add(start, size)) for start in starts]


def _along(bias, y):
    """A bias for each column of `y`, whose columns end in the features."""
    return jnp.tile(bias, y.shape[-1] // bias.shape[0]).reshape((1,) * (y.ndim - 1) + (-1,))


# --- choice -------------------------------------------------------------------------------------------


def _way(impl: str, x, kernel, g: Geometry, pooled: bool = False) -> tiles.Way | None:
    """The tiled way to compute a layer; None where it has none, or (`auto`) where it does not pay."""
    if impl not in ("patches", "winograd", "auto"):
        return None
    if g.groups != 1 or g.dilation != (1, 1) or min(min(p) for p in g.padding) < 0:
        return None
    shapes = x.shape, kernel.shape
    if impl == "winograd":
        tile = winograd_tile(*shapes, g) if x.dtype == jnp.float32 else None
        narrow = min(kernel.shape[2:]) < _WIDE
        return (tiles.Strips if narrow else tiles.Winograd)(g, tile) if tile else None
    if impl == "patches" or _patches_pay(*shapes, g):
        return tiles.Patches(g, best_tile(*shapes, g, even=pooled))
    return None


def winograd_tile(shape: Sequence[int], kernel_shape: Sequence[int], g: Geometry) -> Tile | None:
    """The tile of fewest multiplications, 2×2 or 4×4; None where Winograd does not apply."""
    side = kernel_shape[0]
    if side not in (3, 5) or kernel_shape[1] != side or g.strides != (1, 1):
        return None

    def products(m: int) -> int:
        at = tiles.layout(shape, kernel_shape, g, (m, m))
        return at.tiles[0] * at.tiles[1] * (m + side - 1) ** 2

    m = min((4, 2), key=products)
    return (m, m)


_WIDE = 16
"""Features from which on both sides Winograd's products are wide enough in two dimensions; else in one."""


def best_tile(shape: Sequence[int], kernel_shape: Sequence[int], g: Geometry, even: bool = False) -> Tile:
    """The a×b tile of least estimated cost on one CPU core; see `_cost`.

    Args:
      shape: [B, H, W, C], of the input.
      kernel_shape: [kh, kw, C, F].
      g: strides, padding, dilation and groups.
      even: a and b have to be even, as for pooling.

    Returns:
      (a, b), outputs at a time.
    """
    sides = (2, 4) if even else (1, 2, 4)
    return min(((a, b) for a in sides for b in sides), key=lambda t: _cost(shape, kernel_shape, g, t))


def _cost(shape, kernel_shape, g: Geometry, tile: Tile) -> float:
    """Nanoseconds for an image's forward pass.

    The product at 100 GFLOP/s, less for narrow outputs, and the patches at 0.7 ns a float; both measured,
    see scripts/benchmark/conv.py.
    """
    at = tiles.layout(shape, kernel_shape, g, tile)
    rows = at.tiles[0] * at.tiles[1]
    depth = at.blocks[0] * at.blocks[1] * at.step[0] * at.step[1] * shape[-1]
    columns = tile[0] * tile[1] * kernel_shape[-1]
    return rows * depth * (2 * columns / 100 * (1 + 12 / columns) + 0.7)


def _patches_pay(shape, kernel_shape, g: Geometry) -> bool:
    """Whether patches beat the canonical implementation, as measured by scripts/benchmark/conv.py on a CPU.

    XLA's own kernel lays patches out as it goes and reaches the peak of the product from some 16 channels
    on; it is poor at few input channels, at 1×1 kernels, and where the outputs are smaller than the kernel
    (5×5 and 32 channels: 0.10 to 0.15 of its time on outputs of 4×4, 2.2 on 5×5).
    """
    kh, kw, channels, _ = kernel_shape
    at = tiles.layout(shape, kernel_shape, g, (1, 1))
    pointwise = (kh, kw) == (1, 1)
    shallow = channels <= 8 and g.strides == (1, 1)
    return pointwise or shallow or at.out[0] < kh or at.out[1] < kw
