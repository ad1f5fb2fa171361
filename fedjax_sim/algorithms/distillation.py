"""Kullback-Leibler divergence from a teacher's predictions, as distilling methods use it."""

import jax
import jax.numpy as jnp

from fedjax_sim.core.task import masked_mean


def divergence(
    teacher: jax.Array, student: jax.Array, mask: jax.Array | None, temperature: float
) -> jax.Array:
    """Mean over samples of τ² KL(softmax(teacher/τ) ‖ softmax(student/τ)).

    Classes whose logit is -inf in both take no part. Only the student has a gradient.

    Args:
      teacher: f32[B, C], logits.
      student: f32[B, C], logits.
      mask: bool[B], False for padding; None counts all.
      temperature: τ.

    Returns:
      f32[].
    """
    log_p = jax.nn.log_softmax(jax.lax.stop_gradient(teacher) / temperature)
    log_q = jax.nn.log_softmax(student / temperature)
    there = jnp.isfinite(log_p)
    gap = jnp.where(there, log_p, 0) - jnp.where(there, log_q, 0)
    return temperature**2 * masked_mean((jnp.exp(log_p) * gap).sum(-1), mask)
