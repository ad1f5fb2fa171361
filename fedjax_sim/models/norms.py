"""Normalisation layers with one signature, `layer(x, train=..., mask=...)`.

Batch normalisation is the layer in which padding could be seen: a client's last batch is filled up to the
common size, and the filling must not enter the statistics. Hence the mask.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from fedjax_sim.core.errors import UserError


class BatchNorm(nn.Module):
    """Batch normalisation as PyTorch does it, over the rows that count.

    A batch is normalised with its biased variance; the running variance moves towards the unbiased one,
    n/(n−1) of it, where n counts the places of all rows that are not padding. Statistics are float32 in every
    compute dtype. With a single place the variance is 0 and nothing is divided by zero (PyTorch refuses such
    a batch); a batch of nothing but padding leaves the running statistics alone.

    Collections: `params` with `scale`, `bias`; `batch_stats` with `mean`, `var`; all f32[C].

    Attributes:
      momentum: weight of the new batch in the running statistics (PyTorch's convention, not Flax's).
      epsilon: added to the variance.
      scale: initial γ.
      dtype: of the output.
    """

    momentum: float = 0.1
    epsilon: float = 1e-5
    scale: float = 1.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False, mask: jax.Array | None = None) -> jax.Array:
        """f[B, ..., C] -> f[B, ..., C]. mask: bool[B], False for padding; used only if `train`."""
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.constant(self.scale), shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        x = _wide(x)
        if train:
            mean, var, count = masked_moments(x, mask)
            if not self.is_initializing() and self.is_mutable_collection("batch_stats"):
                rate = jnp.where(count > 0, jnp.float32(self.momentum), jnp.float32(0.0))
                unbiased = var * (count / jnp.maximum(count - 1.0, 1.0))
                running_mean.value += rate * (mean - running_mean.value)
                running_var.value += rate * (unbiased - running_var.value)
        else:
            mean, var = running_mean.value, running_var.value
        slope = jax.lax.rsqrt(var + self.epsilon) * scale
        y = (x - _everywhere(mean, x)) * _everywhere(slope, x) + _everywhere(bias, x)
        return y.astype(self.dtype)


def masked_moments(x: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mean, biased variance and number of places over all axes but the last.

    Two passes: the mean of squares minus the square of the mean would lose digits in float32.

    Args:
      x: f32[B, ..., C].
      mask: bool[B], rows that count; None counts all.

    Returns:
      (f32[C], f32[C], f32[]).
    """
    places = math.prod(x.shape[1:-1])
    rows = jnp.ones(len(x), bool) if mask is None else mask
    count = jnp.sum(rows, dtype=jnp.float32) * places
    divisor = jnp.maximum(count, 1.0)

    def mean(values):
        return jnp.sum(jnp.where(rows[:, None], _over_places(values), 0.0), 0) / divisor

    centre = mean(x)
    return centre, mean(jnp.square(x - _everywhere(centre, x))), count


# Sums over places and their counterpart, one value at every place, are products with ones. XLA's CPU backend
# turns a sum over more than 32 of something into windows, which it does not vectorise: inside a loop a batch
# normalisation and its gradient took two to six times as long that way.


def _over_places(x: jax.Array) -> jax.Array:
    """Sums over the places of each image. f[B, ..., C] -> f[B, C]."""
    x = x.reshape(len(x), -1, x.shape[-1])
    ones = jnp.ones(x.shape[:2], x.dtype)
    return jnp.einsum("bpc,bp->bc", x, ones, precision=jax.lax.Precision.HIGHEST)


def _at_places(each: jax.Array, x: jax.Array) -> jax.Array:
    """The same at all places of an image of `x`. f[B, C] -> f[B, ..., C]; the transpose of `_over_places`."""
    ones = jnp.ones((len(x), math.prod(x.shape[1:-1])), each.dtype)
    return jnp.einsum("bc,bp->bpc", each, ones, precision=jax.lax.Precision.HIGHEST).reshape(x.shape)


def _everywhere(vector: jax.Array, x: jax.Array) -> jax.Array:
    """The same at all places of all images of `x`. f[C] -> f[B, ..., C]."""
    ones = jnp.ones(len(x), vector.dtype)
    return _at_places(jnp.einsum("c,b->bc", vector, ones, precision=jax.lax.Precision.HIGHEST), x)


def _wide(x: jax.Array) -> jax.Array:
    # Float32 at least; float64 stays, for comparisons in which no ReLU may flip by rounding.
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


class GroupNorm(nn.Module):
    """Group normalisation: each image by itself, so that there is nothing to average and no padding to see.

    Attributes:
      groups: wished number of groups; the greatest common divisor with the number of channels is used
        (OUR CHOICE: 8).
      epsilon: added to the variance.
      scale: initial γ.
      dtype: of the output; statistics are float32.
    """

    groups: int = 8
    epsilon: float = 1e-5
    scale: float = 1.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False, mask: jax.Array | None = None) -> jax.Array:
        """f[B, ..., C] -> f[B, ..., C]. `train` and `mask` change nothing."""
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.constant(self.scale), (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
        groups = math.gcd(self.groups, channels)
        x = _wide(x)

        def mean(values):
            each = _over_places(values).reshape(len(x), groups, -1)
            means = each.sum(2, keepdims=True) * (groups / math.prod(x.shape[1:]))
            return jnp.broadcast_to(means, each.shape).reshape(len(x), channels)

        away = x - _at_places(mean(x), x)
        normal = away * _at_places(jax.lax.rsqrt(mean(jnp.square(away)) + self.epsilon), x)
        return (normal * _everywhere(scale, x) + _everywhere(bias, x)).astype(self.dtype)


class NoNorm(nn.Module):
    """Passes its input through; has no parameters.

    Attributes:
      scale: ignored, as there is no γ.
      dtype: of the output.
    """

    scale: float = 1.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False, mask: jax.Array | None = None) -> jax.Array:
        """f[B, ..., C] -> f[B, ..., C]."""
        return x.astype(self.dtype)


KINDS: dict[str, type] = {"batch": BatchNorm, "group": GroupNorm, "none": NoNorm}


def norm(kind: str) -> type:
    """The layer class for `batch`, `group` or `none`; made with `(scale=..., dtype=..., name=...)`.

    Raises:
      UserError: unknown kind.
    """
    if kind not in KINDS:
        raise UserError(
            "model.norm", kind, "there is no such normalisation", f"Choose one of {', '.join(KINDS)}."
        )
    return KINDS[kind]
