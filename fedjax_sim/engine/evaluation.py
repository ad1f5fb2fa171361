"""Evaluation: models on samples that they are not trained on.

The forward passes are compiled, batched and sharded over devices; they give the loss and the statistics of
the task's metrics for every sample, and all figures are made of these on the host.
"""

import dataclasses
import functools
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from fedjax_sim.core.model import Model, Variables
from fedjax_sim.core.stacked import AXIS, on_devices
from fedjax_sim.core.task import Example, Metric, Task, evaluate
from fedjax_sim.data.ragged import Ragged
from fedjax_sim.engine.device_data import DataStore
from fedjax_sim.engine.placement import cut, put, readable
from fedjax_sim.engine.programs import CachedJit, cached_jit

Outcome = tuple[jax.Array, dict[str, jax.Array]]
"""(loss f32[n], metric -> statistics f32[n, s]), of each sample."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One model on one set of samples, as a function.

    Attributes:
      model: the network.
      task: how it is judged; nothing is augmented here.
      mesh: the devices; each takes its share of the samples.
      count: how many samples there are, without what fills up the last batch.
    """

    model: Model
    task: Task
    mesh: Mesh
    count: int

    def __call__(self, variables: Variables, example: Example, rows: jax.Array | None) -> Outcome:
        """What is compiled. `Evaluator.data` holds the last two arguments.

        Args:
          variables: one model.
          example: the samples, [n, …] whole on each device, or [batches, B, …] cut into batches.
          rows: i32[batches, B], into samples that are whole; None if they are cut.

        Returns:
          (loss f32[rows], metric -> statistics f32[rows, s]).
        """

        def share(variables: Variables, example: Example, rows: jax.Array | None) -> Outcome:
            def batch(_: None, part: Any) -> tuple[None, Outcome]:
                chosen = part if rows is None else {key: leaf[part] for key, leaf in example.items()}
                return None, evaluate(self.model, self.task, variables, chosen)

            return jax.lax.scan(batch, None, example if rows is None else rows)[1]

        run = on_devices(
            share,
            mesh=self.mesh,
            in_specs=(P(), P(AXIS) if rows is None else P(), P(AXIS)),
            out_specs=P(AXIS),
        )
        outcome = run(variables, example, rows)
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[: self.count], outcome)


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluator:
    """Evaluates models on one fixed set of samples; each device takes its share of them.

    Samples that are whole on every device anyway, and on CPU devices, which share one buffer, are read there.
    Otherwise each device gets its own.

    Attributes:
      model: the network.
      task: how it is judged; nothing is augmented here.
      store: has the samples on the devices.
      example: the samples as they are stored, leaves [n, …].
      batch_size: samples in one forward pass.
      rows: i64[rows], which of the samples; None: all of them.
      data: what it reads on the devices: (samples, their rows i32[batches, B] or, where they are cut, None).
      function: what is compiled.
      program: the compiled function.
    """

    model: Model
    task: Task
    store: DataStore
    example: Mapping[str, np.ndarray]
    batch_size: int
    rows: np.ndarray | None = None
    data: tuple[Example, jax.Array | None] = dataclasses.field(init=False, repr=False)
    function: Evaluation = dataclasses.field(init=False, repr=False)
    program: CachedJit = dataclasses.field(init=False, repr=False)

    def __post_init__(self):
        mesh, example, rows = self.store.mesh, self.example, self.rows
        count = len(next(iter(example.values()))) if rows is None else len(rows)
        batch = max(1, min(self.batch_size, -(-count // mesh.size)))
        batches = -(-count // (mesh.size * batch))

        def cut(array: np.ndarray) -> jax.Array:
            rest = np.zeros((mesh.size * batches * batch - count, *array.shape[1:]), array.dtype)
            shape = (mesh.size * batches, batch, *array.shape[1:])
            return self.store.cut(np.concatenate([array, rest]).reshape(shape))

        if rows is not None or self.store.shares_host or self.store.has(example):
            rows = np.arange(count) if rows is None else rows
            data = self.store.whole(example), cut(rows.astype(np.int32))
        else:
            data = {key: cut(leaf) for key, leaf in example.items()}, None
        function = Evaluation(self.model, self.task, mesh, count)
        object.__setattr__(self, "data", data)
        object.__setattr__(self, "function", function)
        object.__setattr__(self, "program", cached_jit(function, mesh, **readable(mesh)))

    def __call__(self, variables: Variables) -> Outcome:
        """One model on all samples, on the device."""
        return self.program(variables, *self.data)


@dataclasses.dataclass(frozen=True)
class ClientEvaluator:
    """Evaluates a stack of models, each on the samples of its own client.

    Attributes:
      model: the network.
      task: the loss and the metrics.
      mesh: the devices.
      batch_size: samples in one forward pass.
    """

    model: Model
    task: Task
    mesh: Mesh
    batch_size: int

    def __call__(self, variables: Variables, indices: np.ndarray, example: Example) -> Outcome:
        """Model i on the samples indices[i].

        Args:
          variables: [m, …], m a multiple of the number of devices.
          indices: i32[m, t], into the pool; padding is the caller's to ignore.
          example: the pool of samples on all devices, leaves [n, …].

        Returns:
          (loss f32[m, t], metric -> statistics f32[m, t, s]).
        """
        own = cut(self.mesh)
        return self.program(jax.device_put(variables, own), put(indices, own), dict(example))

    @functools.cached_property
    def program(self) -> CachedJit:
        """The compiled function."""
        return cached_jit(self._compiled, self.mesh, **readable(self.mesh))

    def _compiled(self, variables: Variables, indices: jax.Array, example: Example) -> Outcome:
        settings = self.model, self.task, self.mesh, self.batch_size
        return of_clients(*settings, variables, indices, example)


def of_clients(
    model: Model,
    task: Task,
    mesh: Mesh,
    batch_size: int,
    variables: Variables,
    indices: jax.Array,
    example: Example,
) -> Outcome:
    """What `ClientEvaluator` computes, as a function to be traced.

    Args:
      model: the network.
      task: the loss and the metrics.
      mesh: the devices; they divide m.
      batch_size: samples in one forward pass; more than t are not taken.
      variables: [m, …], a model for each client.
      indices: i32[m, t], into the pool; padding is the caller's to ignore.
      example: the pool, whole on each device, leaves [n, …].

    Returns:
      (loss f32[m, t], metric -> statistics f32[m, t, s]).
    """
    width = indices.shape[1]
    batch = max(1, min(batch_size, width))
    padded = -(-width // batch) * batch
    indices = jnp.pad(indices, ((0, 0), (0, padded - width)))

    def client(args: tuple[Variables, jax.Array], example: Example) -> Outcome:
        own, index = args

        def one(chosen: jax.Array) -> Outcome:
            return evaluate(model, task, own, {key: leaf[chosen] for key, leaf in example.items()})

        return jax.lax.map(one, index.reshape(-1, batch))

    run = on_devices(
        lambda v, i, example: jax.lax.map(lambda args: client(args, example), (v, i)),
        mesh=mesh,
        in_specs=(P(AXIS), P(AXIS), P()),
        out_specs=P(AXIS),
    )
    found = run(variables, indices, example)
    return jax.tree.map(lambda leaf: leaf.reshape(-1, padded, *leaf.shape[3:])[:, :width], found)


def figure(metric: Metric, statistics: np.ndarray) -> float:
    """A metric of a set. statistics: f32[n, s], of each sample."""
    return float(metric.finish(statistics.astype(np.float64).mean(0)))


def by_group(metric: Metric, statistics: np.ndarray, owners: np.ndarray, groups: int) -> np.ndarray:
    """A metric of each group of samples, f64[groups]; NaN for a group without samples.

    Args:
      metric: what is asked.
      statistics: f32[n, s], of each sample.
      owners: i64[n], the group of each.
      groups: how many.
    """
    columns = statistics.astype(np.float64).T
    sums = np.stack([np.bincount(owners, weights=column, minlength=groups) for column in columns], -1)
    sizes = np.bincount(owners, minlength=groups)
    with np.errstate(invalid="ignore", divide="ignore"):
        return metric.finish(sums / sizes[:, None])


def by_list(metric: Metric, statistics: np.ndarray, lists: Ragged) -> np.ndarray:
    """`figure` of each list of samples, f64[N]; NaN for a list without samples.

    Args:
      metric: what is asked.
      statistics: f32[T, s], of the samples of all lists, list after list.
      lists: N lists of T samples.
    """
    # Sums of whole numbers, such as right answers, are exact in whatever order they are added.
    if np.array_equal(statistics, np.rint(statistics)) and np.abs(statistics).sum(dtype=np.float64) < 2**53:
        return by_group(metric, statistics, lists.owners, len(lists))
    cut = (statistics[start:stop] for start, stop in pairwise(lists.offsets.tolist()))
    return np.asarray([figure(metric, own) if len(own) else np.nan for own in cut])
