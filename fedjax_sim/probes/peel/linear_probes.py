"""Linear probes, similarity and ranks of pooled features.

All of them need products of features with each other, of the p features or of the s samples, whichever are
fewer: what is wanted is the same.
"""

from functools import partial

import jax
import jax.numpy as jnp


def ridge_scores(
    x: jax.Array, target: jax.Array, mask: jax.Array, new: jax.Array, penalty: float = 1e-2
) -> jax.Array:
    """Outputs of the one-vs-all ridge probe in closed form, f32[t, C].

    OUR CHOICE (the paper's probe is NOT FOUND): features standardised, a bias column that is penalised like
    the rest, penalty · n on the diagonal. Centring makes the bias column orthogonal to the others, so its
    weight is ȳ / (1 + penalty). A constant feature has scale 1e-6 and weight 0.

    Args:
      x: f32[s, p], features that the probe is fitted to.
      target: f32[s, C], one-hot labels.
      mask: bool[s], False for what is no sample.
      new: f32[t, p], features to classify.
      penalty: of weights, times the number of samples.
    """
    (x, mean), (target, bias) = centred(x, mask), centred(target, mask)
    n = jnp.maximum(mask.sum(), 1).astype(jnp.float32)
    scale = jnp.sqrt((x * x).sum(0) / n) + 1e-6
    x, new = x / scale[None], (new - mean[None]) / scale[None]

    def solved(products, right):
        system = products + penalty * n * jnp.eye(len(products), dtype=products.dtype)
        # As jax.scipy.linalg.solve does it, without making symmetric what is.
        factor = jax.lax.linalg.cholesky(system, symmetrize_input=False)
        half = partial(jax.lax.linalg.triangular_solve, factor, left_side=True, lower=True)
        return half(half(right), transpose_a=True)

    if x.shape[0] < x.shape[1]:
        weights = _product(x.T, solved(_product(x, x.T), target))
    else:
        weights = solved(_product(x.T, x), _product(x.T, target))
    return _product(new, weights) + bias[None] / (1 + penalty)


def linear_cka(stack: jax.Array, mask: jax.Array) -> jax.Array:
    """‖C_xy‖² / (‖C_xx‖ ‖C_yy‖) of the first features x with all, in [0, 1]: f32[S].

    1 where both are constant, 0 where one is. Kornblith et al., "Similarity of Neural Network Representations
    Revisited", ICML 2019.

    Args:
      stack: f32[S, s, p], features of S models for the same samples.
      mask: bool[s], False for what is no sample.
    """
    x = jax.vmap(lambda one: centred(one, mask)[0])(stack)
    if x.shape[1] < x.shape[2]:  # ‖XᵀY‖² = ⟨XXᵀ, YYᵀ⟩
        products = _product(x, x.swapaxes(1, 2))
        own, cross = ((products * other).sum((1, 2)) for other in (products, products[:1]))
    else:
        turned = x.swapaxes(1, 2)
        first = jnp.broadcast_to(turned[:1], turned.shape)
        # One product for both, so that models whose features are the same have the same bits twice.
        both = _product(jnp.concatenate([turned, first]), jnp.concatenate([x, x]))
        own, cross = jnp.split((both * both).sum((1, 2)), 2)
    size, xy = jnp.sqrt(own), jnp.sqrt(jnp.maximum(cross, 0))
    scale = size[0] * size
    ratio = jnp.clip(xy * xy / jnp.where(scale > 0, scale, 1), 0, 1)  # 1 exactly where they are the same
    return jnp.where(scale > 0, ratio, ((size[0] == 0) & (size == 0)).astype(jnp.float32))


def ranks(x: jax.Array, tolerance: float = 1e-3) -> tuple[jax.Array, jax.Array]:
    """Numerical and stable rank of centred features f32[s, p], each f32[].

    The first counts singular values above `tolerance` times the largest (OUR CHOICE), the second is
    Σσ² / max σ² (Rangamani et al., ICML 2023). Both are 0 for features without variance.
    """
    products = _product(x, x.T) if x.shape[0] < x.shape[1] else _product(x.T, x)
    values = jnp.maximum(jnp.linalg.eigvalsh(products), 0)  # σ²
    largest = values[-1]
    some = largest > 0
    numerical = jnp.where(some, (values > tolerance**2 * largest).sum(), 0).astype(jnp.float32)
    return numerical, jnp.where(some, values.sum() / jnp.where(some, largest, 1), 0)


def centred(x: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(deviations from the mean f32[s, p], 0 where the mask bool[s] is False; the mean f32[p])."""
    keep = mask.astype(jnp.float32)[:, None]
    mean = (x * keep).sum(0) / jnp.maximum(keep.sum(), 1)
    return (x - mean[None]) * keep, mean


def _product(a, b):
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
