"""A dense layer whose gradients cost few passes over memory when the batch is small.

For a batch of some ten samples a large layer is bound by memory, not by arithmetic. Three things then make
McMahan's CNN at batch 10 a quarter faster on a CPU:

- As a matrix product the weight gradient is written out and read again by the optimiser. Written as a sum of
  outer products it fuses with the optimiser's update, which then makes it entry by entry as it goes.
- XLA updates the weights where they lie only if it knows that nobody reads the old ones any more. The input
  gradient does, so it has to come first.
- For the input gradient the product's kernel lays the whole of the weights out anew, beyond the cache. Block
  by block it stays within.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from fedjax_sim.core.conv_impl import current_conv_impl

_FEW = 16
"""Samples up to which the sum of outer products is the faster; beyond, the arithmetic weighs more."""

_LARGE = 2**18
"""Weights from which the two passes that the order and the blocks save weigh more than what these cost."""

_BLOCK = 2**16
"""Weights of a block, which with its copy leaves a core's cache room for the rest."""


def dot_general(lhs: jax.Array, rhs: jax.Array, dimension_numbers: Any, precision: Any = None, **more: Any):
    """Takes the place of `lax.dot_general` in `flax.linen.Dense`.

    What has not two axes, or many samples, or an explicit precision, goes to XLA as it is.

    Args:
      lhs: f32[B, d], the input.
      rhs: f32[d, width], the kernel.
      dimension_numbers: read only where XLA does it; as flax has them, the last axis of `lhs` by the first of
        `rhs`.
      precision: None, or XLA does it.
      **more: further arguments of `lax.dot_general`, for XLA.

    Returns:
      f32[B, width].
    """
    if lhs.ndim == 2 and len(lhs) <= _FEW and precision is None and current_conv_impl() != "xla":
        return _few(current_conv_impl() == "auto" and rhs.size >= _LARGE, lhs, rhs)
    return jax.lax.dot_general(lhs, rhs, dimension_numbers, precision=precision, **more)


class Dense(nn.Dense):
    """`flax.linen.Dense` with that gradient."""

    dot_general: Any = dot_general


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _few(large: bool, x, kernel):
    return x @ kernel


def _forward(large, x, kernel):
    # A first layer's input has no gradient; None, as it must be known while tracing.
    wanted = () if x.perturbed else None
    return x.value @ kernel.value, (x.value, kernel.value, wanted)


def _backward(large, saved, dy):
    x, kernel, wanted = saved
    if wanted is None:
        return jnp.zeros_like(x), _outer(x, dy)
    if not large:
        return dy @ kernel.T, _outer(x, dy)
    dx = _by_blocks(dy, kernel)
    # In numbers nothing, to XLA an order: of the blocks, and of the rest behind them. (An
    # `optimization_barrier` is gone before XLA looks at who reads what.)
    return dx, _outer(x, dy + 0 * (dx[0, 0] + dx[0, -1]))


_few.defvjp(_forward, _backward, symbolic_zeros=True)


def _outer(x, dy):
    """As x.T @ dy, sample by sample; summed in float32, as a product's kernel does."""
    wide, deltas = x.astype(jnp.float32), dy.astype(jnp.float32)
    total = wide[0][:, None] * deltas[0][None]
    for sample in range(1, len(x)):
        total = total + wide[sample][:, None] * deltas[sample][None]
    return total.astype(x.dtype)


def _by_blocks(dy, kernel):
    """As dy @ kernel.T, a block of the kernel's rows at a time."""
    inputs, features = kernel.shape
    rows = max(_BLOCK // features, 1)

    def block(number):
        return dy @ jax.lax.dynamic_slice_in_dim(kernel, number * rows, rows).T

    blocks = jax.lax.map(block, jnp.arange(inputs // rows)).transpose(1, 0, 2).reshape(len(dy), -1)
    rest = kernel[blocks.shape[1] :]
    return jnp.concatenate([blocks, dy @ rest.T], 1) if len(rest) else blocks
