"""Second moments of pooled features, streamed: linear probes, ranks, and similarity of representations."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Comoments:
    """Of pairs (x, y), merged by the rule of `fedjax_sim.probes.peel.moments`.

    Attributes:
      count: f32[].
      x, y: f32[p], f32[q], means.
      xx, yy, xy: f32[p, p], f32[q, q], f32[p, q], sums of products of deviations from the means.
    """

    count: jax.Array
    x: jax.Array
    y: jax.Array
    xx: jax.Array
    yy: jax.Array
    xy: jax.Array


def empty(p: int, q: int) -> Comoments:
    """No samples yet."""
    zeros = lambda *shape: jnp.zeros(shape, jnp.float32)  # noqa: E731
    return Comoments(zeros(), zeros(p), zeros(q), zeros(p, p), zeros(q, q), zeros(p, q))


@partial(jax.jit, inline=True)
def of_batch(x: jax.Array, y: jax.Array, mask: jax.Array) -> Comoments:
    """Of one batch. f32[B, p], f32[B, q], bool[B]."""
    keep = mask.astype(jnp.float32)[:, None]
    count = keep.sum()
    x, y = x.astype(jnp.float32) * keep, y.astype(jnp.float32) * keep
    mean_x, mean_y = (v.sum(0) / jnp.maximum(count, 1) for v in (x, y))
    dx, dy = (x - mean_x[None]) * keep, (y - mean_y[None]) * keep
    return Comoments(count, mean_x, mean_y, _product(dx.T, dx), _product(dy.T, dy), _product(dx.T, dy))


def merge(a: Comoments, b: Comoments) -> Comoments:
    """Of two disjoint sets of samples together."""
    count = a.count + b.count
    share = b.count / jnp.maximum(count, 1)
    dx, dy, weight = b.x - a.x, b.y - a.y, a.count * share
    return Comoments(
        count,
        a.x + share * dx,
        a.y + share * dy,
        a.xx + b.xx + weight * jnp.outer(dx, dx),
        a.yy + b.yy + weight * jnp.outer(dy, dy),
        a.xy + b.xy + weight * jnp.outer(dx, dy),
    )


@struct.dataclass
class Ridge:
    """A linear classifier on standardised features.

    Attributes:
      mean, scale: f32[p], of the features.
      weights: f32[p, C].
      bias: f32[C].
    """

    mean: jax.Array
    scale: jax.Array
    weights: jax.Array
    bias: jax.Array


@partial(jax.jit, inline=True, static_argnames="penalty")
def ridge(c: Comoments, penalty: float = 1e-2) -> Ridge:
    """The one-vs-all ridge probe in closed form, from comoments of features and one-hot labels.

    OUR CHOICE (the paper's probe is NOT FOUND): features standardised, a bias column that is penalised like
    the rest, penalty · n on the diagonal. Centring makes the bias column orthogonal to the others, so its
    weight is ȳ / (1 + penalty). A constant feature has scale 1e-6 and weight 0.
    """
    n = jnp.maximum(c.count, 1)
    scale = jnp.sqrt(jnp.maximum(jnp.diagonal(c.xx) / n, 0)) + 1e-6
    gram = c.xx / (scale[:, None] * scale[None])
    gram = gram + penalty * n * jnp.eye(len(scale), dtype=gram.dtype)
    weights = jax.scipy.linalg.solve(gram, c.xy / scale[:, None], assume_a="pos")
    return Ridge(c.x, scale, weights, c.y / (1 + penalty))


def predict(probe: Ridge, x: jax.Array) -> jax.Array:
    """f32[B, p] -> the class of the largest output, i32[B]."""
    x = (x.astype(jnp.float32) - probe.mean[None]) / probe.scale[None]
    return jnp.argmax(_product(x, probe.weights) + probe.bias[None], 1).astype(jnp.int32)


def linear_cka(c: Comoments) -> jax.Array:
    """‖C_xy‖² / (‖C_xx‖ ‖C_yy‖), in [0, 1]; 1 where both are constant, 0 where one is. f32[].

    Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML 2019, in the form over
    features, which needs no matrix over samples.
    """
    xx, yy, xy = (jnp.sqrt((m * m).sum()) for m in (c.xx, c.yy, c.xy))
    scale = xx * yy
    ratio = jnp.clip(xy * xy / jnp.where(scale > 0, scale, 1), 0, 1)
    return jnp.where(scale > 0, ratio, ((xx == 0) & (yy == 0)).astype(jnp.float32))


def ranks(covariance: jax.Array, tolerance: float = 1e-3) -> tuple[jax.Array, jax.Array]:
    """Numerical and stable rank of centred features with this covariance (of any scale), each f32[].

    The first counts singular values above `tolerance` times the largest (OUR CHOICE), the second is
    Σσ² / max σ² (Rangamani et al., ICML 2023). Both are 0 for features without variance.
    """
    values = jnp.maximum(jnp.linalg.eigvalsh(covariance), 0)  # σ²
    largest = values[-1]
    some = largest > 0
    numerical = jnp.where(some, (values > tolerance**2 * largest).sum(), 0).astype(jnp.float32)
    return numerical, jnp.where(some, values.sum() / jnp.where(some, largest, 1), 0)


def _product(a, b):
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
