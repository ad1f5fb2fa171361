"""Models on samples, batch by batch: what the probe and the chimeras share."""

import dataclasses
import functools
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp

from fedjax_sim.config import PeelConfig
from fedjax_sim.core.model import Model
from fedjax_sim.core.task import Task
from fedjax_sim.probes.peel import moments as class_moments


@dataclasses.dataclass(frozen=True, eq=False)
class Forward:
    """A model's features over a client's samples, in evaluation mode.

    Attributes:
      model: the network.
      task: what the samples are; they have classes.
      config: what to measure.
      batch_size: samples in one forward pass.
    """

    model: Model
    task: Task
    config: PeelConfig
    batch_size: int

    @property
    def num_classes(self) -> int:
        """C."""
        return self.task.num_classes

    def over(self, chosen, pool, measure, merge):
        """Measures batch by batch and merges.

        Args:
          chosen: index i32[s], whole batches of it; count i32[].
          pool: samples that the index counts in.
          measure: (what the model is called with, labels, mask) -> what a batch says.
          merge: (two of these) -> of both; zeros must be nothing to it.
        """
        return self.collected(chosen, pool, lambda *batch: (measure(*batch), None), merge)[0]

    def collected(self, chosen, pool, measure, merge):
        """Measures batch by batch; merges one part of what is measured, and collects the other.

        Args:
          chosen: as for `over`.
          pool: as for `over`.
          measure: (what the model is called with, labels, mask) -> (what is merged, what is collected).
          merge: as for `over`.

        Returns:
          What was merged; and what was collected, leaves [batches, …], zero for batches without samples.
        """
        index = chosen["index"].reshape(-1, min(self.batch_size, len(chosen["index"])))
        size = index.shape[1]

        def batch(number):
            rows = index[number]
            example = self.task.prepare({key: leaf[rows] for key, leaf in pool.items()})
            mask = number * size + jnp.arange(size, dtype=jnp.int32) < chosen["count"]
            return measure(*self.task.inputs(example), example[cast(str, self.task.label)], mask)

        if len(index) == 1:
            total, rows = batch(0)
            return total, jax.tree.map(lambda leaf: leaf[None], rows)
        # Traced once, though its shapes are asked for before the loop is made; the loop counts in weak types.
        traced = jax.jit(batch, inline=True)
        total, rows = jax.eval_shape(traced, 0)
        room = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((len(index), *leaf.shape), leaf.dtype), rows)

        def step(number, carry):
            (total, room), (new, rows) = carry, traced(number)
            put = partial(jax.lax.dynamic_update_index_in_dim, index=number, axis=0)
            return merge(total, new), jax.tree.map(put, room, rows)

        batches = -(-chosen["count"] // size)  # what is beyond the samples is not looked at
        return jax.lax.fori_loop(0, batches, step, zeros_like((total, room)))

    def labels(self, chosen, pool):
        """Of all chosen samples, as `over` comes by them: i32[s], and bool[s], False for padding."""
        index = chosen["index"]
        return pool[self.task.label][index], jnp.arange(len(index), dtype=jnp.int32) < chosen["count"]

    @functools.cached_property
    def features(self):
        """The function (variables, images) -> (logits f32[B, C], feature f32[B, …] at each peel point).

        It is traced once for each shape of its arguments, and its operations are then copied to where it is
        called: a deep network takes seconds to trace.
        """
        return jax.jit(self._features, inline=True)

    def _features(self, variables, images):
        logits, features = self.model.features(variables, images)
        return logits, [features[point.name].astype(jnp.float32) for point in self.model.peel_points]

    def flat(self, z):
        """A feature as variances take it: f32[B, …] -> f32[B, d]."""
        return pooled(z) if self.config.pool or z.ndim == 3 else z.reshape(len(z), -1)

    def moments(self, features, labels, mask):
        """Class moments of a batch's features, of any layers."""
        return class_moments.of_batch([self.flat(z) for z in features], labels, mask, self.num_classes)

    def shapes(self):
        """Of one sample's feature at each point, as `flat` keeps it before flattening."""
        return list(self._shapes)

    @functools.cached_property
    def _shapes(self):
        images = jax.ShapeDtypeStruct((1, *self.model.input_shape), jnp.float32)
        _, features = jax.eval_shape(self.model.features, self.model.abstract, images)
        whole = [features[point.name].shape[1:] for point in self.model.peel_points]
        return [shape[-1:] if self.config.pool or len(shape) == 2 else shape for shape in whole]


def side_by_side(features):
    """Features of L layers, pooled and filled up with zeros to the widest: f32[B, …, C] each -> f32[B, L, p].

    A feature that is 0 for every sample changes nothing of what `fedjax_sim.probes.peel.linear_probes` says.
    """
    means = [pooled(z) for z in features]
    widest = max(z.shape[1] for z in means)
    return jnp.stack([jnp.pad(z, ((0, 0), (0, widest - z.shape[1]))) for z in means], 1)


def pooled(z):
    """f32[B, …, C] -> f32[B, C], the mean over places or tokens."""
    return z.mean(tuple(range(1, z.ndim - 1))) if z.ndim > 2 else z


def zeros_like(shapes):
    """Zeros of the shapes and dtypes in a pytree of arrays, abstract or not."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
