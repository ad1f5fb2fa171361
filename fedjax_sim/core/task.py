"""What a batch is, and how a model is called and judged on one."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from flax import struct

from fedjax_sim.core.model import Model, Variables


@struct.dataclass
class Batch:
    """One step's samples of one client.

    Attributes:
      images: f32[B, H, W, C], normalised and augmented.
      labels: i32[B].
      mask: bool[B], False for padding; None if no batch of the run has any.
      rng: key of this step (dropout, a rule's own draws); None if the run needs none.
      epoch: i32[], the client's epoch in this round, from 0.
    """

    images: jax.Array
    labels: jax.Array
    mask: jax.Array | None
    rng: jax.Array | None
    epoch: jax.Array | None = None


class Apply(Protocol):
    """The model in training mode."""

    def __call__(self, variables: Variables, batch: Batch) -> tuple[jax.Array, Variables]:
        """-> (logits f32[B, C], variables with their state moved on)."""
        ...

    def represent(self, variables: Variables, batch: Batch) -> tuple[jax.Array, jax.Array, Variables]:
        """-> (logits f32[B, C], representation f32[B, d], variables); see `Model.represent`."""
        ...


@dataclasses.dataclass(frozen=True)
class Training:
    """A model as an `Apply`."""

    model: Model

    def __call__(self, variables, batch):
        """See `Apply`."""
        return self.model.apply(variables, batch.images, train=True, mask=batch.mask, rng=batch.rng)

    def represent(self, variables, batch):
        """See `Apply`."""
        return self.model.represent(variables, batch.images, train=True, mask=batch.mask, rng=batch.rng)


LossAndGrad = Callable[[Variables, Batch], tuple[tuple[jax.Array, Variables], Any]]
"""(variables, batch) -> ((loss, variables with their state moved on), gradient by `params`)."""


def masked_mean(values: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Mean of f32[B] over the samples that are not padding."""
    if mask is None:
        return values.mean()
    return jnp.where(mask, values, 0).sum() / jnp.maximum(mask.sum(), 1).astype(values.dtype)


def cross_entropy(
    apply: Callable[[Variables, Batch], tuple[jax.Array, Variables]],
    variables: Variables,
    batch: Batch,
    extra: Any,
) -> tuple[jax.Array, Variables]:
    """Mean cross-entropy of a batch, and the variables with their state moved on."""
    del extra
    logits, variables = apply(variables, batch)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    return masked_mean(losses, batch.mask), variables
