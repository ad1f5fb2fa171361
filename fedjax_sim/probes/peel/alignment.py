"""How well features lie in the directions that the weights after them read: principal angles (PABS).

U_w and U_m are the leading left singular vectors of the next layer's kernel and of the features' class
means, both as matrices over the layer's input channels; the singular values of U_wᵀ U_m are the cosines of
the principal angles between the two subspaces, and their mean is PABS, in [0, 1]. Transcribed from the code
of Rangamani, Lindegaard, Galanti and Poggio, "Feature Learning in Deep Classifiers through Intermediate
Neural Collapse", ICML 2023 (FOUND there, uncentred means). That the layer-peeled paper uses principal
angles is FOUND; its rank, centring and matricisation are not. OUR CHOICE: r = the number of classes present,
or the rank if that is less; the centred variant (r one less) beside it, because features after a ReLU share
a positive mean that lifts the other; the level that random subspaces reach subtracted in `corrected`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def kernel_matrix(kernel: jax.Array) -> jax.Array:
    """Input channels first: f32[d, F] as it is, f32[kh, kw, C, F] -> f32[C, kh·kw·F]."""
    if kernel.ndim == 4:
        kernel = jnp.moveaxis(kernel, 2, 0)
    return kernel.reshape(kernel.shape[0], -1)


def means_matrix(means: jax.Array) -> jax.Array:
    """Class means of a layer's input, channels first: f32[K, …, C] -> f32[C, K·…]."""
    return jnp.moveaxis(means, -1, 0).reshape(means.shape[-1], -1)


def basis(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Left singular vectors and values, largest first. f32[d, p] -> (f32[d, q], f32[q]), q = min(d, p).

    A wide matrix is first cut to d×d by a QR decomposition of its transpose, which keeps both.
    """
    if matrix.shape[1] > matrix.shape[0]:
        matrix = jnp.linalg.qr(matrix.T, mode="r").T
    vectors, values, _ = jnp.linalg.svd(matrix, full_matrices=False)
    return vectors, values


def kernel_basis(kernel: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
    """The leading part of `basis` of a kernel's matrix, from its products of rows or of columns.

    That takes less than half the time, unless there are no more columns than are wanted. OUR CHOICE, not for
    class means: these products hold squares, so that singular values below the largest times √(d · 1.2e-7)
    pass for 0 here. Among the leading ones of a kernel there are none, among those of means that nearly
    coincide there are.

    Args:
      kernel: f32[d, F] or f32[kh, kw, C, F].
      most: how many vectors are wanted.

    Returns:
      (f32[d, q], f32[q]) as of `basis`, most at most; d is C for a convolution.
    """
    matrix = kernel_matrix(kernel)
    wide = matrix.shape[1] > matrix.shape[0]
    if not wide and matrix.shape[1] <= most:
        return basis(matrix)
    rows = matrix if wide else matrix.T
    vectors, squares = jax.lax.linalg.eigh(_product(rows, rows.T), symmetrize_input=False)
    told = squares > squares[-1] * len(squares) * jnp.finfo(jnp.float32).eps
    values, vectors = jnp.sqrt(jnp.where(told, squares, 0))[::-1][:most], vectors[:, ::-1][:, :most]
    if not wide:
        vectors = _product(matrix, vectors) / jnp.where(values > 0, values, 1)[None]
    return vectors, values


def overlap(
    weights: tuple[jax.Array, jax.Array], features: tuple[jax.Array, jax.Array], most: int
) -> tuple[jax.Array, jax.Array]:
    """What `cosines` makes principal angles of, of the same shape whatever the layer.

    Args:
      weights: `kernel_basis` of the kernel.
      features: `basis` of the means' matrix.
      most: the largest dimension that is asked for.

    Returns:
      (U_wᵀ U_m f32[most, most]; f32[2, 1 + most], for either the least singular value that float32 can tell
      from 0, and the singular values). Where there are no more, 0.
    """
    size = min(most, weights[0].shape[1], features[0].shape[1])
    u, v = weights[0][:, :size], features[0][:, :size]
    product = _product(u.T, v)
    eps = jnp.finfo(jnp.float32).eps
    rows = [jnp.concatenate([s[:1] * len(s) * eps, s[:size]]) for _, s in (weights, features)]
    return jnp.pad(product, (0, most - size)), jnp.pad(jnp.stack(rows), ((0, 0), (0, most - size)))


def cosines(product: jax.Array, values: jax.Array, wanted: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines of the principal angles between leading subspaces of kernels and features.

    Args:
      product: f32[…, most, most] of `overlap`.
      values: f32[…, 2, 1 + most] of `overlap`.
      wanted: i32[…], dimension of the subspaces; less where a matrix has less rank.

    Returns:
      (f32[…, most] in [0, 1], largest first and 0 beyond r; r i32[…]).
    """
    most = product.shape[-1]
    rank = (values[..., 1:] > values[..., :1]).sum(-1).min(-1).astype(jnp.int32)
    r = jnp.minimum(wanted, rank)
    used = (jax.lax.broadcasted_iota(jnp.int32, (*r.shape, most), r.ndim) < r[..., None]).astype(jnp.float32)
    product = product * used[..., :, None] * used[..., None, :]
    flat = product.reshape(-1, most, most)  # one by one, see `Peeling`
    found = jax.lax.map(lambda own: jnp.linalg.svd(own, compute_uv=False), flat)
    return jnp.clip(found.reshape(used.shape), 0, 1) * used, r


@functools.cache
def chance(d: int, r: int, draws: int = 64) -> float:
    """Mean PABS of two random r-dimensional subspaces of R^d, by simulation with a fixed seed. In [0, 1]."""
    if r <= 0 or r >= d:
        return float(r >= d > 0)
    generator = np.random.default_rng([d, r])
    total = 0.0
    for _ in range(draws):
        # By symmetry one of the two may be the span of the first r axes.
        other = np.linalg.qr(generator.standard_normal((d, r)))[0]
        total += np.linalg.svd(other[:r], compute_uv=False).mean()
    return float(total / draws)


def corrected(pabs: float, d: int, r: int) -> float:
    """(PABS - chance) / (1 - chance): 0 for random subspaces, 1 for equal ones.

    NaN where it is undefined: r = d, where both subspaces are the whole space and PABS is 1 whatever they
    hold, and r = 0, where there is no subspace.
    """
    return (pabs - chance(d, r)) / (1 - chance(d, r)) if 0 < r < d else np.nan


def _product(a, b):
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
