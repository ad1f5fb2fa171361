"""Normalisation layers with one signature, `layer(x, train=..., mask=...)`.

Batch normalisation is the layer in which padding could be seen: a client's last batch is filled up to the
common size, and the filling must not enter the statistics. Hence the mask.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from fedjax_sim.errors import UserError


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
        y = (x - _channels(mean, x)) * _channels(slope, x) + _channels(bias, x)
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
    axes = tuple(range(x.ndim - 1))
    if mask is None:
        count = jnp.float32(math.prod(x.shape[:-1]))
        mean = jnp.mean(x, axes)
        return mean, jnp.mean(jnp.square(x - _channels(mean, x)), axes), count
    rows = mask.reshape((-1,) + (1,) * (x.ndim - 1))
    count = jnp.sum(mask, dtype=jnp.float32) * math.prod(x.shape[1:-1])
    divisor = jnp.maximum(count, 1.0)
    mean = jnp.sum(jnp.where(rows, x, 0.0), axes) / divisor
    squares = jnp.where(rows, jnp.square(x - _channels(mean, x)), 0.0)
    return mean, jnp.sum(squares, axes) / divisor, count


def _wide(x: jax.Array) -> jax.Array:
    # Float32 at least; float64 stays, for comparisons in which no ReLU may flip by rounding.
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def _channels(vector: jax.Array, x: jax.Array) -> jax.Array:
    """f[C] -> f[1, ..., 1, C], to meet `x` without an implicit broadcast."""
    return vector.reshape((1,) * (x.ndim - 1) + (-1,))


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
        grouped = _wide(x).reshape(x.shape[0], -1, groups, channels // groups)
        mean = jnp.mean(grouped, (1, 3), keepdims=True)
        var = jnp.mean(jnp.square(grouped - mean), (1, 3), keepdims=True)
        normal = (grouped - mean) * jax.lax.rsqrt(var + self.epsilon)
        normal = normal.reshape(x.shape)
        return (normal * _channels(scale, x) + _channels(bias, x)).astype(self.dtype)


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
