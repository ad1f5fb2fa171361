"""Convolution and pooling whose gradients stay fast inside loops and over stacked clients.

Why not plain XLA: on its CPU backend the gradient of a convolution inside `lax.scan` or `lax.map` is some
80 times slower than outside (jax-ml/jax#12868; the pass that brings JAX's gradients into the form of the
fast kernel looks at the entry computation only), and under `vmap` over clients every convolution becomes
a grouped one, a slow path on CPUs and GPUs alike (jax-ml/jax#13800). So a convolution can be spelled in
three ways, with equal results up to float rounding:

- `xla`: `lax.conv_general_dilated` and its autodiff.
- `canonical`: the same forward; both gradients written as explicit transposes and plain
  NHWC/HWIO/NHWC convolutions.
- `patches`: a matrix product over patches. A patch serves a tile of a×b outputs at once, its matrix the
  kernel in block-Toeplitz form: fewer, wider rows make the product run near the machine's peak and the
  patches small, for some products with zeros. (A tile of 1×1 is the usual im2col.) Stacked kernels under
  `vmap` become a batched product.
- `auto`: `patches` or `canonical` for each layer, by the cost measured on the backend.

`conv_relu_pool` fuses convolution, bias, ReLU and 2×2 max pooling, so that under `patches` neither the
unpooled outputs nor their gradients are ever brought back into image layout.
"""

import contextlib
import contextvars
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

SPELLINGS = ("xla", "canonical", "patches")
_NUMBERS = ("NHWC", "HWIO", "NHWC")
_spelling = contextvars.ContextVar("conv_spelling", default="auto")


@contextlib.contextmanager
def spelling(name: str) -> Iterator[None]:
    """Models traced inside this context spell their convolutions `name` (one of SPELLINGS, or auto)."""
    token = _spelling.set(name)
    try:
        yield
    finally:
        _spelling.reset(token)


class Geometry(NamedTuple):
    """The static part of a 2-D convolution.

    Attributes:
      strides: of the window.
      padding: ((top, bottom), (left, right)), zeros.
      dilation: of the kernel.
      groups: of features.
    """

    strides: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]
    dilation: tuple[int, int]
    groups: int


def conv(
    x: jax.Array,
    kernel: jax.Array,
    *,
    strides: Sequence[int] = (1, 1),
    padding: str | Sequence[tuple[int, int]] = "VALID",
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    spelling: str | None = None,
) -> jax.Array:
    """2-D convolution, differentiable once, in the spelling of the context unless one is given.

    Args:
      x: f32[B, H, W, C].
      kernel: f32[kh, kw, C / groups, F].
      strides: of the window.
      padding: SAME, VALID, or ((top, bottom), (left, right)).
      dilation: of the kernel.
      groups: of features.
      spelling: one of SPELLINGS or auto.

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
    chosen = spelling or _spelling.get()
    plain = groups == 1 and tuple(dilation) == (1, 1) and min(min(p) for p in geometry.padding) >= 0
    if chosen in ("patches", "auto") and plain:
        tile = best_tile(x.shape, kernel.shape, geometry)
        if chosen == "patches" or _patches_pay(x.shape, kernel.shape, geometry):
            return _patches_conv(geometry, tile, x, kernel)
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

    What the spellings do not cover (other than two spatial axes, transposed convolutions, an explicit
    precision) goes to XLA as it is.
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

    Windows that do not overlap are maxima of strided slices: six times faster on a CPU than XLA's
    `reduce_window`, whose gradient is slower still.
    """
    strides = strides or window
    if strides != window:
        return nn.max_pool(x, (window, window), (strides, strides))
    height, width = (size // window * window for size in x.shape[1:3])
    x = x[:, :height, :width]
    phases = [x[:, i::window, j::window] for i in range(window) for j in range(window)]
    return functools.reduce(jnp.maximum, phases)


def conv_relu_pool(x: jax.Array, kernel: jax.Array, bias: jax.Array, *, padding: str = "VALID") -> jax.Array:
    """max_pool(relu(conv(x, kernel) + bias), 2), stride 1. f32[B, H, W, C] -> f32[B, H'//2, W'//2, F].

    Where several of a window's four values are the maximum, the first (row by row) takes the gradient.
    """
    pads = jax.lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], (1, 1), padding)
    geometry = Geometry((1, 1), (tuple(pads[0]), tuple(pads[1])), (1, 1), 1)  # type: ignore[arg-type]
    chosen = _spelling.get()
    if chosen in ("patches", "auto"):
        tile = best_tile(x.shape, kernel.shape, geometry, even=True)
        if chosen == "patches" or _patches_pay(x.shape, kernel.shape, geometry):
            return _patches_relu_pool(geometry, tile, x, kernel, bias)
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


# --- patches ------------------------------------------------------------------------------------------

Tile = tuple[int, int]


class _Layout(NamedTuple):
    """Where a tile's outputs and inputs lie. Per axis (height, width)."""

    out: Tile  # outputs of the convolution
    tiles: Tile  # how many tiles
    step: Tile  # input pixels from one tile to the next
    blocks: Tile  # blocks of `step` pixels that a tile reads
    padded: Tile  # input size with padding and what the last tile still reads


def _layout(shape, kernel_shape, g: Geometry, tile: Tile) -> _Layout:
    out, tiles, step, blocks, padded = [], [], [], [], []
    for axis in (0, 1):
        size, low_high = shape[1 + axis], g.padding[axis]
        outputs = (size + sum(low_high) - kernel_shape[axis]) // g.strides[axis] + 1
        reads = (tile[axis] - 1) * g.strides[axis] + kernel_shape[axis]
        out.append(outputs)
        tiles.append(-(-outputs // tile[axis]))
        step.append(tile[axis] * g.strides[axis])
        blocks.append(-(-reads // step[-1]))
        padded.append((tiles[-1] + blocks[-1] - 1) * step[-1])
    return _Layout(*map(tuple, (out, tiles, step, blocks, padded)))  # type: ignore[arg-type]


def _to_patches(x, g: Geometry, at: _Layout):
    """f32[B, H, W, C] -> f32[B*th*tw, qh*qw*sh*sw*C]: what each tile reads, block by block."""
    count, channels = x.shape[0], x.shape[-1]
    (th, tw), (sh, sw), (qh, qw), (ph, pw) = at.tiles, at.step, at.blocks, at.padded
    ends = [(low, p - n - low) for (low, _), p, n in zip(g.padding, (ph, pw), x.shape[1:3], strict=True)]
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *((a, b, 0) for a, b in ends), (0, 0, 0)])
    x = x.reshape(count, ph // sh, sh, pw // sw, sw * channels)
    if channels <= 4:  # an image, which lies in memory as it came
        blocks = x.transpose(0, 1, 3, 2, 4).reshape(count, ph // sh, pw // sw, sh * sw * channels)
    else:
        # Written row by row into one array, so that what made `x` is not computed again for each part below.
        blocks = jnp.zeros((count, ph // sh, pw // sw, sh * sw * channels), x.dtype)
        for i in range(sh):
            blocks = jax.lax.dynamic_update_slice(blocks, x[:, :, i], (0, 0, 0, i * sw * channels))
    parts = [blocks[:, i : i + th, j : j + tw] for i in range(qh) for j in range(qw)]
    return jnp.concatenate(parts, -1).reshape(count * th * tw, -1)


def _from_patches(dp, shape, g: Geometry, at: _Layout):
    """The transpose of `_to_patches`: blocks of `step` pixels, each summed over the tiles that read it."""
    count, channels = shape[0], shape[-1]
    (th, tw), (sh, sw), (qh, qw), (ph, pw) = at.tiles, at.step, at.blocks, at.padded
    dp = dp.reshape(count, th, tw, qh, qw, sh, sw * channels)
    total = jnp.zeros((count, ph // sh, pw // sw, sh, sw * channels), dp.dtype)
    for i in range(qh):
        for j in range(qw):
            total = total.at[:, i : i + th, j : j + tw].add(dp[:, :, :, i, j])
    x = total.transpose(0, 1, 3, 2, 4).reshape(count, ph, pw, channels)
    (top, _), (left, _) = g.padding
    # Rows that no window reads (a stride that does not divide) may lie beyond the padded extent.
    short = [max(0, low + n - p) for low, n, p in zip((top, left), shape[1:3], (ph, pw), strict=True)]
    x = jnp.pad(x, ((0, 0), (0, short[0]), (0, short[1]), (0, 0)))
    return x[:, top : top + shape[1], left : left + shape[2]]


def _to_matrix(kernel, g: Geometry, at: _Layout, tile: Tile, order):
    """Block-Toeplitz form: f32[kh, kw, C, F] -> f32[qh*qw*sh*sw*C, a*b*F]; columns by `order` of (i, j)."""
    kh, kw, channels, features = kernel.shape
    (sh, sw), (qh, qw) = at.step, at.blocks
    columns = []
    for i, j in order:
        top, left = i * g.strides[0], j * g.strides[1]
        grown = [(top, qh * sh - kh - top, 0), (left, qw * sw - kw - left, 0), (0, 0, 0), (0, 0, 0)]
        columns.append(jax.lax.pad(kernel, jnp.zeros((), kernel.dtype), grown))
    matrix = jnp.stack(columns, 3).reshape(qh, sh, qw, sw, channels, len(order) * features)
    return matrix.transpose(0, 2, 1, 3, 4, 5).reshape(-1, len(order) * features)


def _from_matrix(dm, kernel_shape, g: Geometry, at: _Layout, order):
    """The transpose of `_to_matrix`."""
    kh, kw, channels, features = kernel_shape
    (sh, sw), (qh, qw) = at.step, at.blocks
    dm = dm.reshape(qh, qw, sh, sw, channels, len(order), features).transpose(0, 2, 1, 3, 4, 5, 6)
    dm = dm.reshape(qh * sh, qw * sw, channels, len(order), features)
    total = None
    for position, (i, j) in enumerate(order):
        top, left = i * g.strides[0], j * g.strides[1]
        part = dm[top : top + kh, left : left + kw, :, position]
        total = part if total is None else total + part
    return total


def _rowwise(tile: Tile) -> list[Tile]:
    return [(i, j) for i in range(tile[0]) for j in range(tile[1])]


def _phasewise(tile: Tile) -> list[Tile]:
    """Outputs of a tile so ordered that the four of each pooling window stand a quarter apart."""
    halves = [(i, j) for i in range(0, tile[0], 2) for j in range(0, tile[1], 2)]
    return [(i + di, j + dj) for di in (0, 1) for dj in (0, 1) for i, j in halves]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _patches_conv(g: Geometry, tile: Tile, x, kernel):
    return _patches_forward(g, tile, x, kernel)[0]


def _patches_forward(g, tile, x, kernel):
    at, features = _layout(x.shape, kernel.shape, g, tile), kernel.shape[-1]
    patches = _to_patches(x, g, at)
    y = patches @ _to_matrix(kernel, g, at, tile, _rowwise(tile))
    y = _untile(y, x.shape[0], at.tiles, tile, features)
    return y[:, : at.out[0], : at.out[1]], (patches, kernel, x)


def _patches_backward(g, tile, saved, dy):
    patches, kernel, x = saved
    at = _layout(x.shape, kernel.shape, g, tile)
    order = _rowwise(tile)
    dy = _tiled(dy, at.tiles, tile)
    dk = _from_matrix(patches.T @ dy, kernel.shape, g, at, order)
    dx = _from_patches(dy @ _to_matrix(kernel, g, at, tile, order).T, x.shape, g, at)
    return dx, dk


_patches_conv.defvjp(_patches_forward, _patches_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _patches_relu_pool(g: Geometry, tile: Tile, x, kernel, bias):
    return _relu_pool_forward(g, tile, x, kernel, bias)[0]


def _relu_pool_forward(g, tile, x, kernel, bias):
    at, features = _layout(x.shape, kernel.shape, g, tile), kernel.shape[-1]
    patches = _to_patches(x, g, at)
    y = patches @ _to_matrix(kernel, g, at, tile, _phasewise(tile))
    top = functools.reduce(jnp.maximum, jnp.split(y, 4, 1))
    out = jax.nn.relu(top + jnp.tile(bias, tile[0] * tile[1] // 4)[None])
    pooled = _untile(out, x.shape[0], at.tiles, (tile[0] // 2, tile[1] // 2), features)
    return pooled[:, : at.out[0] // 2, : at.out[1] // 2], (patches, kernel, bias, x, y, top)


def _relu_pool_backward(g, tile, saved, dz):
    patches, kernel, bias, x, y, top = saved
    at, features = _layout(x.shape, kernel.shape, g, tile), kernel.shape[-1]
    order = _phasewise(tile)
    dz = _tiled(dz, at.tiles, (tile[0] // 2, tile[1] // 2))
    dz = jnp.where(top + jnp.tile(bias, tile[0] * tile[1] // 4)[None] > 0, dz, jnp.zeros_like(dz))
    # Written phase by phase into one array: as a concatenation XLA's CPU backend asks for every number
    # which part it comes from, and takes three times as long.
    dy, taken = jnp.zeros(y.shape, dz.dtype), jnp.zeros(dz.shape, bool)
    for number, phase in enumerate(jnp.split(y, 4, 1)):
        wins = (phase == top) & ~taken
        taken = taken | wins
        part = jnp.where(wins, dz, jnp.zeros_like(dz))
        dy = jax.lax.dynamic_update_slice(dy, part, (0, number * dz.shape[1]))
    dk = _from_matrix(patches.T @ dy, kernel.shape, g, at, order)
    dx = _from_patches(dy @ _to_matrix(kernel, g, at, tile, order).T, x.shape, g, at)
    return dx, dk, dz.reshape(-1, features).sum(0)


_patches_relu_pool.defvjp(_relu_pool_forward, _relu_pool_backward)


def _untile(y, count, tiles, tile, features):
    """f32[B*th*tw, a*b*F] -> f32[B, th*a, tw*b, F]."""
    y = y.reshape(count, tiles[0], tiles[1], tile[0], tile[1], features).transpose(0, 1, 3, 2, 4, 5)
    return y.reshape(count, tiles[0] * tile[0], tiles[1] * tile[1], features)


def _tiled(dy, tiles, tile):
    """The transpose of `_untile`, what was cropped filled with zeros."""
    height, width = tiles[0] * tile[0], tiles[1] * tile[1]
    dy = jnp.pad(dy, ((0, 0), (0, height - dy.shape[1]), (0, width - dy.shape[2]), (0, 0)))
    dy = dy.reshape(dy.shape[0], tiles[0], tile[0], tiles[1], tile[1], dy.shape[-1])
    return dy.transpose(0, 1, 3, 2, 4, 5).reshape(-1, tile[0] * tile[1] * dy.shape[-1])


# --- choice -------------------------------------------------------------------------------------------


def best_tile(shape: Sequence[int], kernel_shape: Sequence[int], g: Geometry, even: bool = False) -> Tile:
    """The a×b tile of least estimated cost on one CPU core; see `_cost`."""
    sides = (2, 4) if even else (1, 2, 4)
    return min(((a, b) for a in sides for b in sides), key=lambda t: _cost(shape, kernel_shape, g, t))


def _cost(shape, kernel_shape, g: Geometry, tile: Tile) -> float:
    """Nanoseconds for an image's forward pass.

    The product at 100 GFLOP/s, less for narrow outputs, and the patches at 0.7 ns a float; both measured,
    see scripts/benchmark/conv.py.
    """
    at = _layout(shape, kernel_shape, g, tile)
    rows = at.tiles[0] * at.tiles[1]
    depth = at.blocks[0] * at.blocks[1] * at.step[0] * at.step[1] * shape[-1]
    columns = tile[0] * tile[1] * kernel_shape[-1]
    return rows * depth * (2 * columns / 100 * (1 + 12 / columns) + 0.7)


def _patches_pay(shape, kernel_shape, g: Geometry) -> bool:
    """Whether patches beat the canonical spelling, as measured by scripts/benchmark/conv.py on a CPU.

    XLA's own kernel lays patches out as it goes and reaches the peak of the product from some 16 channels
    on; it is poor at few input channels, at 1×1 kernels, and at images of a few pixels.
    """
    kh, kw, channels, _ = kernel_shape
    at = _layout(shape, kernel_shape, g, (1, 1))
    pointwise = (kh, kw) == (1, 1)
    shallow = channels <= 8 and g.strides == (1, 1)
    return pointwise or shallow or at.out[0] * at.out[1] <= 4
