"""How much memory a traced program holds at once: an estimate without compiling it."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core


def bytes_of(tree: Any) -> int:
    """Bytes of all leaves, abstract or not."""
    return sum(leaf_bytes(leaf) for leaf in jax.tree.leaves(tree))


def peak_bytes(program: core.ClosedJaxpr) -> int:
    """Largest sum of values alive at once while a traced program runs; its inputs do not count.

    Programs inside (a loop's body, a branch, a called function) count with their own peak.
    """
    return _peak(program.jaxpr)


def _peak(jaxpr: core.Jaxpr) -> int:
    last = {
        var: place for place, eqn in enumerate(jaxpr.eqns) for var in eqn.invars if isinstance(var, core.Var)
    }
    last |= {var: len(jaxpr.eqns) for var in jaxpr.outvars if isinstance(var, core.Var)}
    outside = {*jaxpr.invars, *jaxpr.constvars}
    alive = peak = 0
    for place, eqn in enumerate(jaxpr.eqns):
        alive += sum(leaf_bytes(var.aval) for var in eqn.outvars)
        inner = max(
            (_peak(inside) for value in eqn.params.values() for inside in _programs(value)), default=0
        )
        peak = max(peak, alive + inner)
        done = {var for var in eqn.invars if isinstance(var, core.Var) and last[var] == place} - outside
        done |= {var for var in eqn.outvars if var not in last}
        alive -= sum(leaf_bytes(var.aval) for var in done)
    return peak


def _programs(value: Any) -> Sequence[core.Jaxpr]:
    if isinstance(value, core.ClosedJaxpr):
        return [value.jaxpr]
    if isinstance(value, core.Jaxpr):
        return [value]
    if isinstance(value, tuple | list):
        return [inside for item in value for inside in _programs(item)]
    return []


def leaf_bytes(leaf: Any) -> int:
    """Bytes of one array, abstract or not."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return 8 * int(np.prod(leaf.shape, dtype=np.int64))
    return int(np.prod(leaf.shape, dtype=np.int64)) * leaf.dtype.itemsize
