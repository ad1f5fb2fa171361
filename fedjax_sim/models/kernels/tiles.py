"""Convolutions as matrix products over tiles, a×b blocks of outputs: by im2col patches, by Winograd, by both.

All ways cut the padded input into overlapping windows, one for each tile, and differ in what they do with
a window; `fedjax_sim.models.kernels.conv` says which is used where. Outputs come as an array `y` that ends in
the features and is ordered by the outputs of a tile (`rowwise`, or `phasewise` for pooling) along the one or
two axes that `Way.quarters` cuts.
"""

import functools
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

Tile = tuple[int, int]


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


class Layout(NamedTuple):
    """Where a tile's outputs and inputs lie. Per axis (height, width)."""

    out: Tile  # outputs of the convolution
    tiles: Tile  # how many tiles
    step: Tile  # input pixels from one tile to the next
    blocks: Tile  # blocks of `step` pixels that a tile reads
    padded: Tile  # input size with padding and what the last tile still reads


def layout(shape: Sequence[int], kernel_shape: Sequence[int], g: Geometry, tile: Tile) -> Layout:
    """Cuts the outputs of a convolution into tiles.

    Args:
      shape: [B, H, W, C], of the input.
      kernel_shape: [kh, kw, C, F].
      g: strides and padding; no dilation.
      tile: (a, b), outputs at a time.
    """
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
    return Layout(*map(tuple, (out, tiles, step, blocks, padded)))  # type: ignore[arg-type]


def rowwise(tile: Tile) -> list[Tile]:
    """Outputs of a tile, row by row."""
    return [(i, j) for i in range(tile[0]) for j in range(tile[1])]


def phasewise(tile: Tile) -> list[Tile]:
    """Outputs of a tile so ordered that the four of each pooling window stand a quarter apart."""
    halves = [(i, j) for i in range(0, tile[0], 2) for j in range(0, tile[1], 2)]
    return [(i + di, j + dj) for di in (0, 1) for dj in (0, 1) for i, j in halves]


class Way(Protocol):
    """A convolution with its geometry and tile fixed, linear in the kernel and in the input."""

    @property
    def tile(self) -> Tile:
        """(a, b), outputs at a time."""
        ...

    def quarters(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
        """Of a phasewise `y`, what each of the four outputs of a pooling window has: (size, starts)."""
        ...

    def layout(self, shape: Sequence[int], kernel_shape: Sequence[int]) -> Layout:
        """Where everything lies."""
        ...

    def forward(self, x: jax.Array, kernel: jax.Array, order: list[Tile]) -> tuple[jax.Array, Any]:
        """The convolution of tiles.

        Args:
          x: f32[B, H, W, C].
          kernel: f32[kh, kw, C, F].
          order: the a * b outputs of a tile, `rowwise` or `phasewise`.

        Returns:
          (y […, columns], what `backward` needs). The module says how y is ordered.
        """
        ...

    def backward(
        self,
        shape: Sequence[int],
        kernel_shape: Sequence[int],
        saved: Any,
        dy: jax.Array,
        order: list[Tile],
    ) -> tuple[jax.Array, jax.Array]:
        """The gradients by the input and by the kernel.

        Args:
          shape: [B, H, W, C], of the input.
          kernel_shape: [kh, kw, C, F].
          saved: what `forward` gave besides y.
          dy: […, columns], cotangent of y.
          order: as `forward` had it.

        Returns:
          (f32[B, H, W, C], f32[kh, kw, C, F]).
        """
        ...

    def image(self, y: jax.Array, count: int, tiles: Tile, tile: Tile) -> jax.Array:
        """`y` as images. Its tiles are now `tile` large and in rowwise order.

        Args:
          y: […, columns], as `forward` gives it.
          count: B.
          tiles: how many there are in height and width.
          tile: how large they now are.

        Returns:
          f32[B, tiles[0] * tile[0], tiles[1] * tile[1], F].
        """
        ...

    def rows(self, image: jax.Array, tiles: Tile, tile: Tile) -> jax.Array:
        """The transpose of `image`.

        Args:
          image: f32[B, H', W', F], outputs of the convolution.
          tiles: how many there are in height and width.
          tile: how large they are.

        Returns:
          […, columns], in the form of y, rowwise.
        """
        ...


def _padded(x, at: Layout, g: Geometry):
    """Zeros around; of the far rows that no window reads, none. f32[B, H, W, C] -> f32[B, *at.padded, C]."""
    ends = [(low, p - n - low) for (low, _), p, n in zip(g.padding, at.padded, x.shape[1:3], strict=True)]
    return jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *((a, b, 0) for a, b in ends), (0, 0, 0)])


def _unpadded(x, shape, g: Geometry):
    """The transpose of `_padded`."""
    (top, _), (left, _) = g.padding
    # Rows that no window reads (a stride that does not divide) may lie beyond the padded extent.
    short = [max(0, low + n - p) for low, n, p in zip((top, left), shape[1:3], x.shape[1:3], strict=True)]
    x = jnp.pad(x, ((0, 0), (0, short[0]), (0, short[1]), (0, 0)))
    return x[:, top : top + shape[1], left : left + shape[2]]


def _cropped_to(dy, tiles: Tile, tile: Tile):
    """Zeros where outputs were cropped off the last tiles."""
    height, width = tiles[0] * tile[0], tiles[1] * tile[1]
    return jnp.pad(dy, ((0, 0), (0, height - dy.shape[1]), (0, width - dy.shape[2]), (0, 0)))


# --- patches ------------------------------------------------------------------------------------------


class Patches(NamedTuple):
    """y = patches · matrix: f32[B*th*tw, window*C] · f32[window*C, a*b*F], the kernel in block-Toeplitz form.

    Fewer, wider rows than im2col's (which is a tile of 1×1) make the product run near the machine's peak
    and the patches small, for some products with zeros.
    """

    geometry: Geometry
    tile: Tile

    def quarters(self, shape):
        """See `Way`."""
        rows, columns = shape[0], shape[1] // 4
        return (rows, columns), [(0, number * columns) for number in range(4)]

    def layout(self, shape, kernel_shape) -> Layout:
        """See `Way`."""
        return layout(shape, kernel_shape, self.geometry, self.tile)

    def forward(self, x, kernel, order):
        """See `Way`."""
        at = self.layout(x.shape, kernel.shape)
        patches = _to_patches(x, self.geometry, at)
        return patches @ self._to_matrix(kernel, at, order), (patches, kernel)

    def backward(self, shape, kernel_shape, saved, dy, order):
        """See `Way`."""
        patches, kernel = saved
        at = self.layout(shape, kernel_shape)
        dk = self._from_matrix(patches.T @ dy, kernel_shape, at, order)
        dx = _from_patches(dy @ self._to_matrix(kernel, at, order).T, shape, self.geometry, at)
        return dx, dk

    def image(self, y, count, tiles, tile):
        """See `Way`."""
        features = y.shape[-1] // (tile[0] * tile[1])
        y = y.reshape(count, tiles[0], tiles[1], tile[0], tile[1], features).transpose(0, 1, 3, 2, 4, 5)
        return y.reshape(count, tiles[0] * tile[0], tiles[1] * tile[1], features)

    def rows(self, image, tiles, tile):
        """See `Way`."""
        image = _cropped_to(image, tiles, tile)
        count, features = image.shape[0], image.shape[-1]
        image = image.reshape(count, tiles[0], tile[0], tiles[1], tile[1], features)
        return image.transpose(0, 1, 3, 2, 4, 5).reshape(-1, tile[0] * tile[1] * features)

    def _to_matrix(self, kernel, at: Layout, order):
        """f32[kh, kw, C, F] -> f32[qh*qw*sh*sw*C, a*b*F]; columns by `order` of (i, j)."""
        kh, kw, channels, features = kernel.shape
        (sh, sw), (qh, qw), strides = at.step, at.blocks, self.geometry.strides
        columns = []
        for i, j in order:
            top, left = i * strides[0], j * strides[1]
            grown = [(top, qh * sh - kh - top, 0), (left, qw * sw - kw - left, 0), (0, 0, 0), (0, 0, 0)]
            columns.append(jax.lax.pad(kernel, jnp.zeros((), kernel.dtype), grown))
        matrix = jnp.stack(columns, 3).reshape(qh, sh, qw, sw, channels, len(order) * features)
        return matrix.transpose(0, 2, 1, 3, 4, 5).reshape(-1, len(order) * features)

    def _from_matrix(self, dm, kernel_shape, at: Layout, order):
        """The transpose of `_to_matrix`."""
        kh, kw, channels, features = kernel_shape
        (sh, sw), (qh, qw), strides = at.step, at.blocks, self.geometry.strides
        dm = dm.reshape(qh, qw, sh, sw, channels, len(order), features).transpose(0, 2, 1, 3, 4, 5, 6)
        dm = dm.reshape(qh * sh, qw * sw, channels, len(order), features)
        total = jnp.zeros(kernel_shape, dm.dtype)
        for position, (i, j) in enumerate(order):
            top, left = i * strides[0], j * strides[1]
            part = dm[top : top + kh, left : left + kw, :, position]
            total = total + part
        return total


def _to_patches(x, g: Geometry, at: Layout):
    """f32[B, H, W, C] -> f32[B*th*tw, qh*qw*sh*sw*C]: what each tile reads, block by block."""
    count, channels = x.shape[0], x.shape[-1]
    (th, tw), (sh, sw), (qh, qw), (ph, pw) = at.tiles, at.step, at.blocks, at.padded
    x = _padded(x, at, g).reshape(count, ph // sh, sh, pw // sw, sw * channels)
    blocks = _written(*(x[:, :, i] for i in range(sh)))
    parts = [blocks[:, i : i + th, j : j + tw] for i in range(qh) for j in range(qw)]
    rows = [part.reshape(count * th * tw, -1) for part in parts]
    # A GPU, which has a kernel to start for each part, joins them in one.
    return jax.lax.platform_dependent(*rows, cpu=_written, default=_joined)


def _joined(*parts):
    """Arrays f[..., w] side by side along the last axis."""
    return jnp.concatenate(parts, -1)


def _written(*parts):
    """As `_joined`, of arrays of one shape, written one by one into one array.

    XLA's CPU backend then computes what made them once, and takes half the time or less to write them.
    """
    *lead, width = parts[0].shape
    out = jnp.zeros((*lead, len(parts) * width), parts[0].dtype)
    for number, part in enumerate(parts):
        out = jax.lax.dynamic_update_slice(out, part, (0,) * len(lead) + (number * width,))
    return out


def _from_patches(dp, shape, g: Geometry, at: Layout):
    """The transpose of `_to_patches`: blocks of `step` pixels, each summed over the tiles that read it."""
    count, channels = shape[0], shape[-1]
    (th, tw), (sh, sw), (qh, qw), (ph, pw) = at.tiles, at.step, at.blocks, at.padded
    dp = dp.reshape(count, th, tw, qh, qw, sh, sw * channels)
    total = jnp.zeros((count, ph // sh, pw // sw, sh, sw * channels), dp.dtype)
    for i in range(qh):
        for j in range(qw):
            total = total.at[:, i : i + th, j : j + tw].add(dp[:, :, :, i, j])
    x = total.transpose(0, 1, 3, 2, 4).reshape(count, ph, pw, channels)
    return _unpadded(x, shape, g)


# --- Winograd -----------------------------------------------------------------------------------------


class Winograd(NamedTuple):
    """Minimal filtering F(m×m, r×r): (m + r - 1)² products for a tile where there were m²r². Stride 1.

        Y = Aᵀ [ (G g Gᵀ) ⊙ (Bᵀ d B) ] A

    for each pair of channels, with the sum over input channels under Aᵀ · A: so (m + r - 1)² independent
    matrix products over (tiles, C, F), between three small linear transforms. Each transform is one product
    with a Kronecker square; both gradients are the transposes, and share the transformed cotangent.
    Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016 (arXiv 1509.09308).

    The transforms amplify rounding: errors relative to the largest output are some 1e-5 for 8 points, 5e-6
    for 6, where a plain product has 1e-6. float32 only.
    """

    geometry: Geometry
    tile: Tile

    def quarters(self, shape):
        """See `Way`."""
        rows, columns = shape[0] // 4, shape[1]
        return (rows, columns), [(number * rows, 0) for number in range(4)]

    def layout(self, shape, kernel_shape) -> Layout:
        """See `Way`."""
        return layout(shape, kernel_shape, self.geometry, self.tile)

    def forward(self, x, kernel, order):
        """See `Way`."""
        at = self.layout(x.shape, kernel.shape)
        read, grow, write = _squared(self.tile[0], kernel.shape[0])
        points, channels, features = len(read), kernel.shape[2], kernel.shape[3]
        windows = _to_windows(x, self.geometry, at, kernel.shape[0])
        v = _dot(read, windows.reshape(points, -1)).reshape(points, -1, channels)
        u = _dot(grow, kernel.reshape(-1, channels * features)).reshape(points, channels, features)
        y = _dot(write[_positions(order, self.tile)], _batched(v, u).reshape(points, -1))
        return y.reshape(-1, features), (v, u)

    def backward(self, shape, kernel_shape, saved, dy, order):
        """See `Way`."""
        v, u = saved
        points, features = len(u), u.shape[-1]
        at = self.layout(shape, kernel_shape)
        read, grow, write = _squared(self.tile[0], kernel_shape[0])
        dm = _dot(write[_positions(order, self.tile)].T, dy.reshape(len(order), -1))
        dm = dm.reshape(points, -1, features)
        dk = _dot(grow.T, _batched(v.transpose(0, 2, 1), dm).reshape(points, -1))
        windows = _dot(read.T, _batched(dm, u.transpose(0, 2, 1)).reshape(points, -1))
        dx = _from_windows(windows, shape, self.geometry, at, kernel_shape[0])
        return dx, dk.reshape(kernel_shape)

    def image(self, y, count, tiles, tile):
        """See `Way`."""
        features = y.shape[-1]
        y = y.reshape(*tile, count, *tiles, features).transpose(2, 3, 0, 4, 1, 5)
        return y.reshape(count, tiles[0] * tile[0], tiles[1] * tile[1], features)

    def rows(self, image, tiles, tile):
        """See `Way`."""
        image = _cropped_to(image, tiles, tile)
        count, features = image.shape[0], image.shape[-1]
        image = image.reshape(count, tiles[0], tile[0], tiles[1], tile[1], features)
        return image.transpose(2, 4, 0, 1, 3, 5).reshape(-1, features)


class Strips(NamedTuple):
    """Winograd's minimal filtering along the width, patches along the height. Stride 1.

    For layers of few features, where the products of `Winograd` would be too narrow: those here have the
    a rows of a tile side by side, as `Patches` has them. (m + r - 1)/m products for each row of the kernel
    where there were r; a·F columns. float32 only; rounds nearly as finely as a plain product.
    """

    geometry: Geometry
    tile: Tile

    def quarters(self, shape):
        """See `Way`."""
        size = shape[0] // 2, shape[1], shape[2] // 2
        return size, [(j * size[0], 0, i * size[2]) for i in range(2) for j in range(2)]

    def layout(self, shape, kernel_shape) -> Layout:
        """See `Way`."""
        return layout(shape, kernel_shape, self.geometry, self.tile)

    def forward(self, x, kernel, order):
        """See `Way`."""
        at = self.layout(x.shape, kernel.shape)
        (th, tw), qh = at.tiles, at.blocks[0]
        rows, columns = _apart(order)
        read, grow, write = _transforms(self.tile[1], kernel.shape[1])
        points = len(read)
        v = _dot(read, _to_columns(x, self.geometry, at, points).reshape(points, -1))
        v = v.reshape(points, len(x), th + qh - 1, tw, -1)
        patches = jnp.concatenate([v[:, :, i : i + th] for i in range(qh)], -1)
        patches = patches.reshape(points, len(x) * th * tw, -1)
        u = self._to_matrices(kernel, grow, at, rows)
        y = _dot(write[columns], _batched(patches, u).reshape(points, -1))
        return y.reshape(len(columns), -1, u.shape[-1]), (patches, u)

    def backward(self, shape, kernel_shape, saved, dy, order):
        """See `Way`."""
        patches, u = saved
        at = self.layout(shape, kernel_shape)
        (th, tw), qh = at.tiles, at.blocks[0]
        rows, columns = _apart(order)
        read, grow, write = _transforms(self.tile[1], kernel_shape[1])
        points, features = len(u), u.shape[-1]
        dm = _dot(write[columns].T, dy.reshape(len(columns), -1)).reshape(points, -1, features)
        du = _batched(patches.transpose(0, 2, 1), dm)
        dk = self._from_matrices(du, kernel_shape, grow, at, rows)
        dpatches = _batched(dm, u.transpose(0, 2, 1)).reshape(points, shape[0], th, tw, qh, -1)
        dv = jnp.zeros((points, shape[0], th + qh - 1, tw, dpatches.shape[-1]), dy.dtype)
        for i in range(qh):
            dv = dv.at[:, :, i : i + th].add(dpatches[:, :, :, :, i])
        dx = _from_columns(_dot(read.T, dv.reshape(points, -1)), shape, self.geometry, at, points)
        return dx, dk

    def image(self, y, count, tiles, tile):
        """See `Way`."""
        features = y.shape[-1] // tile[0]
        y = y.reshape(tile[1], count, *tiles, tile[0], features).transpose(1, 2, 4, 3, 0, 5)
        return y.reshape(count, tiles[0] * tile[0], tiles[1] * tile[1], features)

    def rows(self, image, tiles, tile):
        """See `Way`."""
        image = _cropped_to(image, tiles, tile)
        count, features = image.shape[0], image.shape[-1]
        image = image.reshape(count, tiles[0], tile[0], tiles[1], tile[1], features)
        return image.transpose(4, 0, 1, 3, 2, 5).reshape(tile[1], -1, tile[0] * features)

    def _to_matrices(self, kernel, grow, at: Layout, rows):
        """f32[kh, kw, C, F] -> f32[n, qh*a*C, a*F]: each point's rows in block-Toeplitz form."""
        kh, kw, channels, features = kernel.shape
        reach = at.blocks[0] * at.step[0]
        grown = _dot(grow, kernel.swapaxes(0, 1).reshape(kw, -1)).reshape(-1, kh, channels, features)
        columns = [jnp.pad(grown, ((0, 0), (i, reach - kh - i), (0, 0), (0, 0))) for i in rows]
        return jnp.stack(columns, 3).reshape(len(grow), reach * channels, -1)

    def _from_matrices(self, du, kernel_shape, grow, at: Layout, rows):
        """The transpose of `_to_matrices`."""
        kh, kw, channels, features = kernel_shape
        du = du.reshape(len(grow), at.blocks[0] * at.step[0], channels, len(rows), features)
        grown = jnp.zeros((len(grow), kh, channels, features), du.dtype)
        for position, i in enumerate(rows):
            grown = grown + du[:, i : i + kh, :, position]
        return _dot(grow.T, grown.reshape(len(grow), -1)).reshape(kw, kh, channels, features).swapaxes(0, 1)


def _apart(order: list[Tile]) -> tuple[list[int], list[int]]:
    """The rows and the columns of a tile, each in the order in which `order` first has them."""
    rows, columns = (list(dict.fromkeys(positions)) for positions in zip(*order, strict=True))
    return rows, columns


def _to_columns(x, g: Geometry, at: Layout, points: int):
    """f32[B, H, W, C] -> f32[n, B, th + qh - 1, tw, a*C]: column j of each tile's window, a rows a time."""
    count, channels = x.shape[0], x.shape[-1]
    tw, (a, m), (ph, pw) = at.tiles[1], at.step, at.padded
    x = _padded(x, at, g).reshape(count, ph // a, a, pw // m, m, channels)
    parts = [x[:, :, :, j // m : j // m + tw, j % m].transpose(0, 1, 3, 2, 4) for j in range(points)]
    return jnp.stack(parts)


def _from_columns(columns, shape, g: Geometry, at: Layout, points: int):
    """The transpose of `_to_columns`. f32[n, …] -> f32[B, H, W, C]."""
    count, channels = shape[0], shape[-1]
    tw, (a, m), (ph, pw) = at.tiles[1], at.step, at.padded
    columns = columns.reshape(points, count, ph // a, tw, a, channels)
    total = jnp.zeros((m, count, ph // a, pw // m, a, channels), columns.dtype)
    for b in range(at.blocks[1]):
        part = columns[b * m : (b + 1) * m]
        total = total.at[: len(part), :, :, b : b + tw].add(part)
    return _unpadded(total.transpose(1, 2, 4, 3, 0, 5).reshape(count, ph, pw, channels), shape, g)


def _dot(a, b):
    return jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST)


def _batched(a, b):
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _positions(order: list[Tile], tile: Tile) -> list[int]:
    return [i * tile[1] + j for i, j in order]


def _to_windows(x, g: Geometry, at: Layout, side: int):
    """f32[B, H, W, C] -> f32[n*n, B, th, tw, C]: pixel (i, j) of every tile's window, n = step + side - 1."""
    count, channels = x.shape[0], x.shape[-1]
    (th, tw), (step, _), (ph, pw) = at.tiles, at.step, at.padded
    n = step + side - 1
    x = _padded(x, at, g).reshape(count, ph // step, step, pw // step, step, channels)
    parts = []
    for i in range(n):
        for j in range(n):
            top, left = i // step, j // step
            parts.append(x[:, top : top + th, i % step, left : left + tw, j % step])
    return jnp.stack(parts)


def _from_windows(windows, shape, g: Geometry, at: Layout, side: int):
    """The transpose of `_to_windows`. f32[n*n, B*th*tw*C] -> f32[B, H, W, C]."""
    count, channels = shape[0], shape[-1]
    (th, tw), (step, _), (qh, qw), (ph, pw) = at.tiles, at.step, at.blocks, at.padded
    n = step + side - 1
    windows = windows.reshape(n, n, count, th, tw, channels)
    total = jnp.zeros((step, step, count, ph // step, pw // step, channels), windows.dtype)
    for a in range(qh):
        for b in range(qw):
            part = windows[a * step : (a + 1) * step, b * step : (b + 1) * step]
            total = total.at[: part.shape[0], : part.shape[1], :, a : a + th, b : b + tw].add(part)
    x = total.transpose(2, 3, 0, 4, 1, 5).reshape(count, ph, pw, channels)
    return _unpadded(x, shape, g)


@functools.cache
def _transforms(m: int, r: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(Bᵀ, G, Aᵀ) of F(m, r): f32[n, n], f32[n, r], f32[m, n], n = m + r - 1.

    Toom and Cook's interpolation at the points 0, ±1, ±2, ±1/2 … and infinity, in exact fractions.
    """
    n = m + r - 1
    points = [Fraction(p) for p in ("0", "1", "-1", "2", "-2", "1/2", "-1/2")][: n - 1]
    read = np.zeros((n, n))
    grow, write = np.zeros((n, r)), np.zeros((m, n))
    for row, point in enumerate(points):
        others = [p for p in points if p != point]
        scale = functools.reduce(lambda product, p: product * (point - p), others, Fraction(1))
        read[row, : n - 1] = [float(c) for c in _polynomial(others)]
        grow[row] = [float(point**k / scale) for k in range(r)]
        write[:, row] = [float(point**k) for k in range(m)]
    read[-1] = [float(c) for c in _polynomial(points)]
    grow[-1, -1] = write[-1, -1] = 1.0
    read, grow, write = (a.astype(np.float32) for a in (read, grow, write))
    return read, grow, write


@functools.cache
def _squared(m: int, r: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The transforms of F(m×m, r×r): each one's Kronecker square."""
    read, grow, write = (np.kron(a, a) for a in _transforms(m, r))
    return read, grow, write


def _polynomial(roots: list[Fraction]) -> list[Fraction]:
    """Coefficients of the monic polynomial with these roots, the constant first."""
    coefficients = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *coefficients]
        scaled = [*(root * c for c in coefficients), Fraction(0)]
        coefficients = [a - b for a, b in zip(shifted, scaled, strict=True)]
    return coefficients
