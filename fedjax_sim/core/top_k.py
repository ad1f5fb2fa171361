"""The k largest of many numbers, exactly, without sorting them.

A sort of a layer's scores for every client takes seconds, a threshold as `lax.top_k` finds it hardly less.
Here the k-th largest is found bit by bit: whether its next bit is set is a matter of counting how many
numbers reach the candidate, 32 passes of comparing and adding over numbers that stay in a cache.
"""

# ruff: noqa: F722 - shapes in annotations, such as "K ...", are no expressions of Python

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32, UInt32


def top_k_mask(scores: Float32[Array, " P"], count: Int32[Array, ""]) -> Bool[Array, " P"]:
    """Which are the `count` largest: exactly so many; of equal ones those that come first. NaN is the least.

    Args:
      scores: f32[P].
      count: i32[], from 0 to P.

    Returns:
      bool[P].
    """
    keys = _ordered(scores)
    threshold = _built(32, lambda candidate: _sum(keys >= candidate) >= count)
    above, level = keys > threshold, keys == threshold
    missing = count - _sum(above)
    enough = _sum(level) <= missing  # all of those at the threshold, or none left to choose
    places = jax.lax.iota(jnp.uint32, len(scores))
    bits = len(scores).bit_length()
    end = _built(bits, lambda candidate: _sum(level & (places < candidate)) <= missing, skip=enough)
    return above | (level & (enough | (places < end)))


def _built(
    bits: int, accepts: Callable[[jax.Array], jax.Array], skip: Bool[Array, ""] | bool = False
) -> UInt32[Array, ""]:
    """The greatest u32[] below 2^bits that `accepts`, which holds up to some number; 0 if `skip`."""

    def step(number: jax.Array, found: jax.Array) -> jax.Array:
        candidate = found | (jnp.uint32(1) << jnp.asarray(bits - 1 - number, jnp.uint32))
        return jnp.where(accepts(candidate), candidate, found)

    return jax.lax.fori_loop(0, jnp.where(skip, 0, bits), step, jnp.uint32(0))


def _ordered(scores: Float32[Array, " P"]) -> UInt32[Array, " P"]:
    """Unsigned integers in the order of the numbers; zeros of both signs are one. f32[P] -> u32[P]."""
    # By bits alone: compared as numbers, denormal ones would count as zero.
    bits = jax.lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.uint32)
    sign, size = jnp.uint32(1 << 31), bits & jnp.uint32((1 << 31) - 1)
    keys = jnp.where(size == 0, sign, jnp.where(bits >= sign, ~bits, bits | sign))
    return jnp.where(size > jnp.uint32(0x7F800000), jnp.uint32(0), keys)


def _sum(flags: Bool[Array, " P"]) -> Int32[Array, ""]:
    return flags.sum(dtype=jnp.int32)
