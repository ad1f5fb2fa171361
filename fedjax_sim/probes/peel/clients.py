"""Measured clients over the devices of a mesh."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from fedjax_sim.core import stacked
from fedjax_sim.core.stacked import AXIS


def each_client(
    mesh: Mesh,
    measure: Callable[[Any, Any], Any],
    models: Any,
    own: Any,
    shared: Any,
    *,
    width: int = 1,
) -> Any:
    """What is measured of m clients, every device taking its share of them.

    Args:
      mesh: the devices.
      measure: ((a client's models, what else is its own), what all share) -> any pytree of arrays. Where the
        devices do not divide m it is asked of models that are zero all over as well, and that is dropped.
      models: leaves [m, …], of which each device has its share.
      own: leaves [m, …], whole on every device.
      shared: likewise whole.
      width: clients side by side on a device.

    Returns:
      Leaves [m, …] of what was measured.
    """
    count = len(jax.tree.leaves(models)[0])

    def share(numbers, models, own, shared):
        def one(client):
            number, models = client
            return measure((models, jax.tree.map(lambda leaf: leaf[number], own)), shared)

        return jax.lax.map(one, (numbers, models), batch_size=None if width == 1 else width)

    specs = (P(AXIS), P(AXIS), P(), P())
    run = jax.shard_map(share, mesh=mesh, in_specs=specs, out_specs=P(AXIS), check_vma=False)
    filled = jax.tree.map(lambda leaf: stacked.filled_up(leaf, mesh.size), models)
    return jax.tree.map(lambda leaf: leaf[:count], run(shares(count, mesh.size), filled, own, shared))


def shares(count: int, parts: int) -> jax.Array:
    """Numbers of m clients, the last one repeated until they make parts of equal length: i32[m or more]."""
    return jnp.minimum(jnp.arange(count + -count % parts, dtype=jnp.int32), count - 1)
