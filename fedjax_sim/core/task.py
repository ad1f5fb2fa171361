"""What is learned: what a sample is, what a model is called with, and how its outputs are judged.

A task is a frozen record of pure functions, as an algorithm is. The engine knows no task: it gathers samples,
hands them to these functions, and averages what they say of each sample. So padding, waves, devices and
clients are merged without anyone knowing what the samples are.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from fedjax_sim.core.model import Model, Variables

Example = Mapping[str, Any]
"""Samples by the task's keys, such as `image` and `label`. Leaves lead with the samples: [n, …] or [B, …]."""


@struct.dataclass
class Batch:
    """One step's samples of one client. `batch["label"]` is `batch.example["label"]`.

    Attributes:
      example: the samples, prepared and augmented; leaves [B, …].
      mask: bool[B], False for padding; None if no batch of the run has any.
      rng: key of this step (dropout, a rule's own draws); None outside of training.
      epoch: i32[], the client's epoch in this round, from 0.
    """

    example: Example
    mask: jax.Array | None
    rng: jax.Array | None
    epoch: jax.Array | None = None

    def __getitem__(self, key: str) -> jax.Array:
        """The samples' part called `key`, [B, …]."""
        return self.example[key]

    @property
    def size(self) -> int:
        """B, padding included."""
        return jax.tree.leaves(self.example)[0].shape[0]


@dataclasses.dataclass(frozen=True)
class Metric:
    """A figure of a set of samples that is made of sums over them, and so can be merged.

    Attributes:
      name: in records.
      goal: `max` or `min`: what is better.
      of: (outputs f32[B, …], prepared samples) -> f32[B, s], the statistics of each sample.
      finish: f64[…, s], their means over a set -> f64[…], the figure. By default the first of them.
    """

    name: str
    goal: str
    of: Callable[[jax.Array, Example], jax.Array]
    finish: Callable[[np.ndarray], np.ndarray] = lambda means: means[..., 0]


@dataclasses.dataclass(frozen=True)
class Task:
    """What is learned. All functions but `finish` of its metrics are traced.

    Attributes:
      name: for records and messages.
      spec: key -> shape and dtype of one sample as it is stored.
      outputs: width of the model's outputs.
      prepare: samples as stored -> as the model's inputs and the loss want them; deterministic, of samples
        with one leading axis.
      augment: (key, prepared samples of one client) -> randomly changed ones, in training; None: it does not.
      inputs: prepared samples -> the positional arguments of the model.
      loss: (outputs, prepared samples) -> f32[B], of each sample.
      metrics: the first is the headline: what bars, tables and plots show.
      label: key of the samples' classes, i32[n] in 0 … outputs - 1; None where the samples have no classes.
    """

    name: str
    spec: Mapping[str, jax.ShapeDtypeStruct] = dataclasses.field(hash=False)
    outputs: int
    prepare: Callable[[Example], Example]
    inputs: Callable[[Example], tuple[jax.Array, ...]]
    loss: Callable[[jax.Array, Example], jax.Array]
    metrics: tuple[Metric, ...]
    augment: Callable[[jax.Array, Example], Example] | None = None
    label: str | None = None

    @property
    def headline(self) -> Metric:
        """The first metric."""
        return self.metrics[0]

    @property
    def num_classes(self) -> int:
        """C; 0 where the samples have no classes."""
        return self.outputs if self.label is not None else 0

    def abstract(self, size: int) -> Example:
        """Shapes and dtypes of `size` stored samples."""
        return {key: jax.ShapeDtypeStruct((size, *leaf.shape), leaf.dtype) for key, leaf in self.spec.items()}

    def abstract_inputs(self, size: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes and dtypes of what the model is called with for `size` samples."""
        return jax.eval_shape(lambda example: self.inputs(self.prepare(example)), self.abstract(size))


class Apply(Protocol):
    """The model in training mode, and the task that it is trained for."""

    def __call__(self, variables: Variables, batch: Batch) -> tuple[jax.Array, Variables]:
        """-> (outputs f32[B, …], variables with their state moved on)."""
        ...

    def represent(self, variables: Variables, batch: Batch) -> tuple[jax.Array, jax.Array, Variables]:
        """-> (outputs f32[B, …], representation f32[B, d], variables); see `Model.represent`."""
        ...

    def losses(self, outputs: jax.Array, batch: Batch) -> jax.Array:
        """The task's loss of each sample. -> f32[B]."""
        ...


@dataclasses.dataclass(frozen=True)
class Training:
    """A model and a task as an `Apply`; with `train` False in evaluation mode."""

    model: Model
    task: Task
    train: bool = True

    def __call__(self, variables: Variables, batch: Batch) -> tuple[jax.Array, Variables]:
        """See `Apply`."""
        inputs = self.task.inputs(batch.example)
        return self.model.apply(variables, *inputs, train=self.train, mask=batch.mask, rng=batch.rng)

    def represent(self, variables: Variables, batch: Batch) -> tuple[jax.Array, jax.Array, Variables]:
        """See `Apply`."""
        inputs = self.task.inputs(batch.example)
        return self.model.represent(variables, *inputs, train=self.train, mask=batch.mask, rng=batch.rng)

    def losses(self, outputs: jax.Array, batch: Batch) -> jax.Array:
        """See `Apply`."""
        return self.task.loss(outputs, batch.example)


def masked_mean(values: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Mean of f32[B] over the samples that are not padding."""
    if mask is None:
        return values.mean()
    return jnp.where(mask, values, 0).sum() / jnp.maximum(mask.sum(), 1).astype(values.dtype)


Loss = Callable[[Apply, Variables, Batch], tuple[jax.Array, Variables]]
"""(apply, variables, batch) -> (f32[], variables with their state moved on)."""


def task_loss(apply: Apply, variables: Variables, batch: Batch) -> tuple[jax.Array, Variables]:
    """Mean of the task's loss over a batch, and the variables with their state moved on."""
    outputs, variables = apply(variables, batch)
    return masked_mean(apply.losses(outputs, batch), batch.mask), variables


class LossAndGrad(Protocol):
    """A loss of a model on a batch, and its gradient."""

    def __call__(
        self, variables: Variables, batch: Batch, loss: Loss = task_loss, /
    ) -> tuple[tuple[jax.Array, Variables], Any]:
        """Value and gradient.

        Args:
          variables: the model.
          batch: the samples.
          loss: the task's, unless another is given.

        Returns:
          ((loss f32[], variables with their state moved on), gradient by `params`).
        """
        ...


def differentiated(apply: Apply) -> LossAndGrad:
    """The losses of a model, with their gradients by reverse differentiation."""

    def loss_and_grad(
        variables: Variables, batch: Batch, loss: Loss = task_loss, /
    ) -> tuple[tuple[jax.Array, Variables], Any]:
        def of(params: Any) -> tuple[jax.Array, Variables]:
            return loss(apply, {**variables, "params": params}, batch)

        return jax.value_and_grad(of, has_aux=True)(variables["params"])

    return loss_and_grad


def evaluate(
    model: Model, task: Task, variables: Variables, example: Example
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """A model on samples as they are stored, in evaluation mode.

    Args:
      model: the network.
      task: says what goes in, the loss and the metrics.
      variables: one model, no slot axis.
      example: samples as they are stored, leaves [B, …].

    Returns:
      (loss f32[B], metric -> statistics f32[B, s]), of each sample.
    """
    prepared = task.prepare(example)
    outputs, _ = model.apply(variables, *task.inputs(prepared))
    return task.loss(outputs, prepared), {m.name: m.of(outputs, prepared) for m in task.metrics}
