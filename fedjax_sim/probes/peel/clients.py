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
    mesh: Mesh, measure: Callable[[Any, Any], Any], own: Any, shared: Any, *, width: int = 1
) -> Any:
    """What is measured of m clients, every device taking its share of them.

    Args:
      mesh: the devices.
      measure: (what is a client's own, what all share) -> any pytree of arrays. Where the devices do not
        divide m it is asked of clients that are zero all over as well, and what it says of them is dropped.
      own: leaves [m, …]; a device reads its share.
      shared: whole on every device.
      width: clients side by side on a device.

    Returns:
      Leaves [m, …] of what was measured.
    """
    count = len(jax.tree.leaves(own)[0])

    def filled(leaf: jax.Array) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = filled(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        return stacked.filled_up(leaf, mesh.size)

    def share(own: Any, shared: Any) -> Any:
        return jax.lax.map(lambda each: measure(each, shared), own, batch_size=None if width == 1 else width)

    run = jax.shard_map(share, mesh=mesh, in_specs=(P(AXIS), P()), out_specs=P(AXIS), check_vma=False)
    return jax.tree.map(lambda leaf: leaf[:count], run(jax.tree.map(filled, own), shared))


def shares(count: int, parts: int) -> jax.Array:
    """Numbers of m clients, the last one repeated until they make parts of equal length: i32[m or more]."""
    return jnp.minimum(jnp.arange(count + -count % parts, dtype=jnp.int32), count - 1)
