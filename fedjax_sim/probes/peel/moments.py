"""Class moments of features, streamed: within- and between-class variance and what follows from them.

Everything here comes from three numbers or vectors a class: how many samples, their mean, and the sum of
their squared distances to that mean. Batches are merged by the pairwise rule of Chan, Golub and LeVeque
("Algorithms for Computing the Sample Variance", The American Statistician 1983), in which nothing large is
subtracted from anything large: float32 suffices, and memory is one mean a class, whatever the samples.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from fedjax_sim.probes.peel.layers import Layers


@struct.dataclass
class Moments:
    """Of the features of L layers, by class.

    Attributes:
      count: f32[C], samples.
      mean: f32[C, D], of all layers' features side by side; zero for a class without samples.
      scatter: f32[C, L], sum over the class's samples of ‖z - mean‖².
      layers: where each layer lies in the D numbers.
    """

    count: jax.Array
    mean: jax.Array
    scatter: jax.Array
    layers: Layers = struct.field(pytree_node=False)

    @property
    def present(self) -> jax.Array:
        """Whether a class has samples, bool[C]."""
        return self.count > 0

    def means(self) -> list[jax.Array]:
        """f32[C, d_l] of every layer."""
        return self.layers.split(self.mean)


def empty(num_classes: int, widths: Sequence[int]) -> Moments:
    """No samples yet, of layers with so many features."""
    layers = Layers(tuple(widths))
    zeros = lambda *shape: jnp.zeros(shape, jnp.float32)  # noqa: E731
    return Moments(
        zeros(num_classes), zeros(num_classes, layers.size), zeros(num_classes, len(widths)), layers
    )


@partial(jax.jit, inline=True, static_argnames="num_classes")
def of_batch(features: Sequence[jax.Array], labels: jax.Array, mask: jax.Array, num_classes: int) -> Moments:
    """Moments of one batch.

    Args:
      features: f32[B, d_l] of every layer.
      labels: i32[B].
      mask: bool[B], False for padding.
      num_classes: C.
    """
    layers = Layers(tuple(z.shape[1] for z in features))
    z, member = layers.join(features), _members(labels, mask, num_classes)
    count = member.sum(0)
    mean = _product(member.T, z) / jnp.maximum(count, 1)[:, None]
    away = z - _product(member, mean)
    return Moments(count, mean, _product(member.T, layers.sums(away * away)), layers)


@partial(jax.jit, inline=True, static_argnames="num_classes")
def means_of_batch(
    features: Sequence[jax.Array], labels: jax.Array, mask: jax.Array, num_classes: int
) -> Moments:
    """As `of_batch`, with a scatter of 0: where it is the means that are wanted, it costs half.

    Args:
      features: f32[B, d_l] of every layer.
      labels: i32[B].
      mask: bool[B], False for padding.
      num_classes: C.
    """
    layers = Layers(tuple(z.shape[1] for z in features))
    member = _members(labels, mask, num_classes)
    count = member.sum(0)
    share = (member / jnp.maximum(count, 1)[None]).T
    mean = layers.join([_product(share, z) for z in features])
    return Moments(count, mean, jnp.zeros((num_classes, len(features))), layers)


def side_by_side(a: Moments, b: Moments) -> Moments:
    """Of the layers of both, mean f32[…, C, D_a + D_b], for the same samples; `a` may have no layers."""
    layers = Layers((*a.layers.widths, *b.layers.widths))
    mean = layers.join([*a.means(), *b.means()])
    return Moments(b.count, mean, jnp.concatenate([a.scatter, b.scatter], -1), layers)


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of two disjoint sets of samples together."""
    count = a.count + b.count
    share = b.count / jnp.maximum(count, 1)
    step = b.mean - a.mean
    mean = a.mean + share[:, None] * step
    moved = (a.count * share)[:, None] * a.layers.sums(step * step)
    return Moments(count, mean, a.scatter + b.scatter + moved, a.layers)


class Traces(NamedTuple):
    """Traces of the class-covariance matrices, each f32[L]. within + between = total.

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
    return jax.tree.map(lambda leaf: leaf[int(balanced)], both_traces(m))


def both_traces(m: Moments) -> Traces:
    """Of both weights of `traces`, by samples and balanced: f32[2, L] each."""
    weight = jnp.stack([m.count, m.present.astype(jnp.float32)])
    weight = weight / jnp.maximum(weight.sum(1), 1)[:, None]
    away = m.mean[None] - _product(weight, m.mean)[:, None]
    within = _product(weight, _variances(m))
    between = _product(weight[:, None], m.layers.sums(away * away))[:, 0]
    return Traces(within, between, within + between)


def distances(m: Moments) -> tuple[jax.Array, jax.Array]:
    """Squared distances and cosines between class means, both f32[L, C, C]; 0 with an absent class."""
    present = m.present.astype(jnp.float32)
    pairs = present[:, None] * present[None]
    weight = present / jnp.maximum(present.sum(), 1)
    centred = (m.mean - _product(weight[None], m.mean)) * present[:, None]
    both = m.layers.split(jnp.concatenate([centred, m.mean]))
    products, classes = jnp.stack([_product(means, means.T) for means in both]), len(m.count)
    gram, raw = products[:, :classes, :classes], products[:, classes:, classes:]
    square = _diagonals(gram)
    apart = jnp.maximum(square[:, :, None] + square[:, None] - 2 * gram, 0) * pairs[None]
    norm = jnp.sqrt(jnp.maximum(_diagonals(raw), 0))
    scale = norm[:, :, None] * norm[:, None]
    cosine = jnp.where(scale > 0, raw / jnp.where(scale > 0, scale, 1), 0)
    return apart, cosine * pairs[None]


def cdnv(m: Moments) -> jax.Array:
    """Class-distance normalised variance: mean over pairs of (v_c + v_c') / 2‖μ_c - μ_c'‖². f32[L].

    Galanti, György and Hutter, "On the Role of Neural Collapse in Transfer Learning", ICLR 2022. Infinite
    where two present classes have the same mean; NaN with fewer than two classes.
    """
    each, (apart, _), pairs = _variances(m).T, distances(m), _pairs(m)
    ratio = (each[:, :, None] + each[:, None]) / (2 * jnp.where(pairs, apart, 1))
    return jnp.where(pairs, ratio, 0).sum((1, 2)) / pairs.astype(jnp.float32).sum()


def discrimination(m: Moments) -> jax.Array:
    """D_l = 1 - the largest cosine between the means of two present classes; NaN with fewer than two. f32[L].

    Wang et al., "Understanding Deep Representation Learning via Layerwise Feature Compression and
    Discrimination", arXiv 2311.02960.
    """
    (_, cosine), pairs = distances(m), _pairs(m)
    largest = jnp.where(pairs, cosine, -jnp.inf).max((1, 2), initial=-jnp.inf)
    return jnp.where(pairs.any(), 1 - largest, jnp.nan)


def nearest_mean(m: Moments, features: Sequence[jax.Array]) -> jax.Array:
    """The present class whose mean is nearest. f32[B, d_l] of every layer -> i32[B, L]."""
    reference = m.mean.sum(0) / jnp.maximum(m.present.astype(jnp.float32).sum(), 1)
    means = m.mean - reference[None]
    products = [_product(z, own.T) for z, own in zip(features, m.layers.split(means), strict=True)]
    middle = m.layers.sums((reference[None] + means / 2) * means)
    score = jnp.stack(products, 1) - middle.T[None]
    return jnp.argmax(jnp.where(m.present[None, None], score, -jnp.inf), 2).astype(jnp.int32)


def _members(labels, mask, num_classes):
    """Whether a sample is of a class, f32[B, C]; padding is of none."""
    member = (labels[:, None] == jnp.arange(num_classes, dtype=labels.dtype)[None]) & mask[:, None]
    return member.astype(jnp.float32)


def _variances(m):
    """Of each class about its mean, f32[C, L]."""
    return m.scatter / jnp.maximum(m.count, 1)[:, None]


def _pairs(m):
    """Pairs of two present classes, bool[1, C, C]."""
    return (m.present[:, None] & m.present[None] & ~jnp.eye(len(m.count), dtype=bool))[None]


def _diagonals(matrices):
    return jnp.diagonal(matrices, axis1=1, axis2=2)


def _product(a, b):
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
