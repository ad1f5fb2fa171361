"""Class moments of features, streamed: within- and between-class variance and what follows from them.

Everything here comes from three numbers or vectors a class: how many samples, their mean, and the sum of
their squared distances to that mean. Batches are merged by the pairwise rule of Chan, Golub and LeVeque
("Algorithms for Computing the Sample Variance", The American Statistician 1983), in which nothing large is
subtracted from anything large: float32 suffices, and memory is one mean a class, whatever the samples.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Moments:
    """Of one layer's features, by class.

    Attributes:
      count: f32[C], samples.
      mean: f32[C, d]; zero for a class without samples.
      scatter: f32[C], sum over the class's samples of ‖z - mean‖².
    """

    count: jax.Array
    mean: jax.Array
    scatter: jax.Array


def empty(num_classes: int, dim: int) -> Moments:
    """No samples yet."""
    zeros = jnp.zeros((num_classes,), jnp.float32)
    return Moments(zeros, jnp.zeros((num_classes, dim), jnp.float32), zeros)


@partial(jax.jit, inline=True, static_argnames="num_classes")
def of_batch(z: jax.Array, labels: jax.Array, mask: jax.Array, num_classes: int) -> Moments:
    """Moments of one batch.

    Args:
      z: f32[B, d].
      labels: i32[B].
      mask: bool[B], False for padding.
      num_classes: C.
    """
    member = (labels[:, None] == jnp.arange(num_classes, dtype=labels.dtype)[None]) & mask[:, None]
    member = member.astype(jnp.float32)
    count = member.sum(0)
    mean = _product(member.T, z.astype(jnp.float32)) / jnp.maximum(count, 1)[:, None]
    away = z.astype(jnp.float32) - mean[jnp.where(mask, labels, 0)]
    return Moments(count, mean, member.T @ (away * away).sum(1))


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of two disjoint sets of samples together."""
    count = a.count + b.count
    share = b.count / jnp.maximum(count, 1)
    step = b.mean - a.mean
    mean = a.mean + share[:, None] * step
    return Moments(count, mean, a.scatter + b.scatter + a.count * share * (step * step).sum(1))


class Traces(NamedTuple):
    """Traces of the class-covariance matrices, each f32[]. within + between = total.

    Attributes:
      within: (1/n) Σ_c Σ_{i∈c} ‖z_i - μ_c‖².
      between: Σ_c (n_c/n) ‖μ_c - μ_G‖².
      total: (1/n) Σ_i ‖z_i - μ_G‖².
    """

    within: jax.Array
    between: jax.Array
    total: jax.Array


def traces(m: Moments, *, balanced: bool = False) -> Traces:
    """Weighted by samples (the identity above, OUR CHOICE); or every present class alike, μ_G included."""
    present = (m.count > 0).astype(jnp.float32)
    weight = present if balanced else m.count
    weight = weight / jnp.maximum(weight.sum(), 1)
    each = m.scatter / jnp.maximum(m.count, 1)
    away = m.mean - _product(weight[None], m.mean)
    within, between = weight @ each, weight @ (away * away).sum(1)
    return Traces(within, between, within + between)


def distances(m: Moments) -> tuple[jax.Array, jax.Array]:
    """Squared distances and cosines between class means, both f32[C, C]; 0 with an absent class."""
    present = (m.count > 0).astype(jnp.float32)
    pairs = present[:, None] * present[None]
    weight = present / jnp.maximum(present.sum(), 1)
    centred = (m.mean - _product(weight[None], m.mean)) * present[:, None]
    gram = _product(centred, centred.T)
    square = jnp.diagonal(gram)
    apart = jnp.maximum(square[:, None] + square[None] - 2 * gram, 0) * pairs
    raw = _product(m.mean, m.mean.T)
    norm = jnp.sqrt(jnp.maximum(jnp.diagonal(raw), 0))
    scale = norm[:, None] * norm[None]
    cosine = jnp.where(scale > 0, raw / jnp.where(scale > 0, scale, 1), 0)
    return apart, cosine * pairs


def cdnv(m: Moments) -> jax.Array:
    """Class-distance normalised variance: mean over pairs of (v_c + v_c') / 2‖μ_c - μ_c'‖². f32[].

    Galanti, György and Hutter, "On the Role of Neural Collapse in Transfer Learning", ICLR 2022. Infinite
    where two present classes have the same mean; 0 with fewer than two classes.
    """
    present = m.count > 0
    each = m.scatter / jnp.maximum(m.count, 1)
    apart, _ = distances(m)
    pairs = present[:, None] & present[None] & ~jnp.eye(len(present), dtype=bool)
    ratio = (each[:, None] + each[None]) / (2 * jnp.where(pairs, apart, 1))
    return jnp.where(pairs, ratio, 0).sum() / jnp.maximum(pairs.astype(jnp.float32).sum(), 1)


def discrimination(m: Moments) -> jax.Array:
    """D_l = 1 - the largest cosine between the means of two present classes; 0 with fewer than two. f32[].

    Wang et al., "Understanding Deep Representation Learning via Layerwise Feature Compression and
    Discrimination", arXiv 2311.02960.
    """
    present = m.count > 0
    pairs = present[:, None] & present[None] & ~jnp.eye(len(present), dtype=bool)
    _, cosine = distances(m)
    return jnp.where(pairs.any(), 1 - jnp.where(pairs, cosine, -jnp.inf).max(initial=-jnp.inf), 0)


def nearest_mean(m: Moments, z: jax.Array) -> jax.Array:
    """The present class whose mean is nearest. f32[B, d] -> i32[B]."""
    present = m.count > 0
    reference = m.mean.sum(0, keepdims=True) / jnp.maximum(present.astype(jnp.float32).sum(), 1)
    means, z = m.mean - reference, z.astype(jnp.float32) - reference
    score = _product(z, means.T) - (means * means).sum(1)[None] / 2
    return jnp.argmax(jnp.where(present[None], score, -jnp.inf), 1).astype(jnp.int32)


def _product(a, b):
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
