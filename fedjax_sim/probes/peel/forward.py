"""Models on samples, batch by batch: what the probe and the chimeras share."""

import dataclasses
import functools
import math
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
from jax.extend import core

from fedjax_sim.config import PeelConfig
from fedjax_sim.core.model import Model
from fedjax_sim.core.task import Task
from fedjax_sim.probes.peel import moments as class_moments
from fedjax_sim.probes.peel.layers import Layers


@dataclasses.dataclass(frozen=True)
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
        measure = jax.jit(measure, inline=True)  # traced once, though its shapes are asked for beforehand

        def alone(part, total, *batch):
            del part, total
            return measure(*batch), None

        index = chosen["index"][: self._size([chosen])]
        mask = jnp.ones(index.shape, bool)
        nothing = zeros_like(jax.eval_shape(lambda: measure(*self._batch(pool, index), mask)))
        total, _ = self.collected([(chosen, pool)], alone, merge, nothing)
        return jax.tree.map(lambda leaf: leaf[0], total)

    def collected(self, parts, measure, merge, nothing):
        """Measures several parts of samples batch by batch; merges some of it, and collects the rest.

        All pass one after another through one loop, whose body holds the network once.

        Args:
          parts: (chosen, pool) each, as for `over`; as many chosen in every part.
          measure: (number of the part i32[], what was merged so far, what the model is called with, labels,
            mask) -> (what is merged, what is collected).
          merge: as for `over`.
          nothing: zeros of the shapes of what is merged.

        Returns:
          What was merged, leaves [parts, …]; and what was collected, leaves [parts, batches, …], zero for
          batches without samples.
        """
        size = self._size([chosen for chosen, _ in parts])
        index = jnp.stack([chosen["index"].reshape(-1, size) for chosen, _ in parts])
        count = jnp.stack([chosen["count"] for chosen, _ in parts])
        pools, length = [pool for _, pool in parts], index.shape[1]
        ends = jnp.cumsum(-(-count // size))  # what is beyond the samples is not looked at

        def batch(number, total):
            part = (number >= ends[:-1]).sum().astype(jnp.int32)
            place = number - jnp.where(part > 0, ends[part - 1], 0)
            rows = index[part, place]
            if all(pool is pools[0] for pool in pools):
                given = self._batch(pools[0], rows)
            else:
                given = jax.lax.switch(part, [partial(self._batch, pool) for pool in pools], rows)
            mask = place * size + jnp.arange(size, dtype=jnp.int32) < count[part]
            return part, place, measure(part, total, *given, mask)

        traced = jax.jit(batch, inline=True)  # likewise once
        empty = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (len(parts), *leaf.shape)), nothing)
        shapes = jax.eval_shape(traced, jnp.int32(0), empty)[2][1]
        room = jax.tree.map(lambda leaf: jnp.zeros((len(parts) * length, *leaf.shape), leaf.dtype), shapes)

        def step(number, carry):
            total, room = carry
            part, place, (new, rows) = traced(number, total)
            put = partial(jax.lax.dynamic_update_index_in_dim, axis=0)
            new = merge(jax.tree.map(lambda leaf: leaf[part], total), new)
            total = jax.tree.map(lambda leaf, own: put(leaf, own, part), total, new)
            return total, jax.tree.map(lambda leaf, own: put(leaf, own, part * length + place), room, rows)

        total, room = jax.lax.fori_loop(0, ends[-1], step, (empty, room))
        return total, jax.tree.map(lambda leaf: leaf.reshape(len(parts), length, *leaf.shape[1:]), room)

    def _size(self, chosen):
        return min(self.batch_size, *(len(one["index"]) for one in chosen))

    def _batch(self, pool, rows):
        """What the model is called with, and labels, of rows i32[B] of a pool."""
        example = self.task.prepare({key: leaf[rows] for key, leaf in pool.items()})
        return *self.task.inputs(example), example[cast(str, self.task.label)]

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

    @functools.cached_property
    def layers(self):
        """Where each layer lies in the vector of all, flattened as `flat` does."""
        return Layers(tuple(math.prod(shape) for shape in self._shapes))

    def shapes(self):
        """Of one sample's feature at each point, as `flat` keeps it before flattening."""
        return list(self._shapes)

    @functools.cached_property
    def _shapes(self):
        whole = [shape[1:] for shape in self._traced[0]]
        return [shape[-1:] if self.config.pool or len(shape) == 2 else shape for shape in whole]

    @functools.cached_property
    def given(self):
        """How many peel points, from the first on, see what does not depend on the model, as images are.

        The last is never among them.
        """
        return [*self._traced[1][:-1], True].index(True)

    @functools.cached_property
    def _traced(self):
        """Shapes [1, …] of the features at each point, and whether they depend on the model's variables."""
        images = jax.ShapeDtypeStruct((1, *self.model.input_shape), jnp.float32)
        program, shapes = jax.make_jaxpr(self.model.features, return_shape=True)(self.model.abstract, images)
        leaves, structure = jax.tree.flatten(shapes[1])
        own = len(program.jaxpr.outvars) - len(leaves)
        depends = set(program.jaxpr.invars[: len(jax.tree.leaves(self.model.abstract))])
        for step in program.jaxpr.eqns:
            if any(isinstance(var, core.Var) and var in depends for var in step.invars):
                depends.update(step.outvars)
        found = [isinstance(var, core.Var) and var in depends for var in program.jaxpr.outvars[own:]]
        by_name = jax.tree.unflatten(structure, found)
        names = [point.name for point in self.model.peel_points]
        return [shapes[1][name].shape for name in names], [by_name[name] for name in names]


def side_by_side(features):
    """Features of L layers, pooled and filled up with zeros to the widest: f32[B, …, C] each -> f32[B, L, p].

    A feature that is 0 for every sample changes nothing of what `fedjax_sim.probes.peel.linear_probes` says.
    """
    means = [pooled(z) for z in features]
    widest = max(z.shape[1] for z in means)
    return jnp.stack([jnp.pad(z, ((0, 0), (0, widest - z.shape[1]))) for z in means], 1)


def pooled(z):
    """f32[B, …, C] -> f32[B, C], the mean over places or tokens."""
    if z.ndim == 4 and z.shape[-1] < _NARROW:
        rows = z.reshape(*z.shape[:2], -1)
        z = jnp.einsum("h,bhx->bx", jnp.full(z.shape[1], 1 / z.shape[1]), rows, precision="highest").reshape(
            len(z), *z.shape[2:]
        )
    return z.mean(tuple(range(1, z.ndim - 1))) if z.ndim > 2 else z


_NARROW = 16
"""Channels below which a CPU takes the mean over places in half the time if a product sums the rows first."""


def loop(one, first, length, most):
    """As `jax.lax.scan` over the numbers 0 … length - 1, of which there are not always as many.

    Args:
      one: (carry, number i32[]) -> (carry, what is collected).
      first: the carry.
      length: i32[].
      most: a static bound on it.

    Returns:
      What was collected, leaves [most, …], 0 beyond the length.
    """
    traced = jax.jit(one, inline=True)
    shapes = jax.eval_shape(traced, first, jnp.int32(0))[1]
    room = jax.tree.map(lambda leaf: jnp.zeros((most, *leaf.shape), leaf.dtype), shapes)

    def step(number, carry):
        state, found = traced(carry[0], number)
        put = partial(jax.lax.dynamic_update_index_in_dim, index=number, axis=0)
        return state, jax.tree.map(put, carry[1], found)

    return jax.lax.fori_loop(0, length, step, (first, room))[1]


def zeros_like(shapes):
    """Zeros of the shapes and dtypes in a pytree of arrays, abstract or not."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
