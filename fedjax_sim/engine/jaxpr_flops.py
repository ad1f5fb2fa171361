"""How many floating-point operations a traced program takes: sums, products, quotients and convolutions."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.extend import core

from fedjax_sim.engine.jaxpr_memory import programs_inside


def flops(
    program: core.ClosedJaxpr, length: Callable[[core.Jaxpr], float | None], share: Callable[[Any], float]
) -> float:
    """Of one device. A multiplication and an addition are two. Other functions, such as exp, are left out.

    Args:
      program: traced.
      length: of a loop's body, how often it runs, where that is decided in the program; None: once.
      share: of an operand outside of `jax.shard_map`, the part of it that a device has.
    """
    return _of(program.jaxpr, length, share)


def _of(jaxpr: Any, length: Callable[[core.Jaxpr], float | None], share: Callable[[Any], float]) -> float:
    total = 0.0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name in _COUNTED:
            part = min((share(var.aval) for var in eqn.invars), default=1.0)
            total += part * _COUNTED[name](eqn)
            continue
        own = (lambda _: 1.0) if name == "shard_map" else share
        if name == "while":
            body = eqn.params["body_jaxpr"].jaxpr
            total += (length(body) or 1.0) * _of(body, length, own)
            continue
        inside = [_of(one, length, own) for value in eqn.params.values() for one in programs_inside(value)]
        if name == "cond":
            total += max(inside, default=0.0)
        else:
            total += (eqn.params["length"] if name == "scan" else 1) * sum(inside)
    return total


def _product(eqn: Any) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    factors = [eqn.invars[0].aval.shape[axis] for axis in contracted]
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(factors)


def _convolution(eqn: Any) -> float:
    kernel, spec = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"].rhs_spec
    factors = [kernel[axis] for axis in spec[1:]]  # of one output: its input channels and the window
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(factors)


def _numbers(eqn: Any, of: str = "outvars") -> float:
    """One for each number of a result, or of an operand."""
    array = getattr(eqn, of)[0].aval
    return float(math.prod(array.shape)) if jnp.issubdtype(array.dtype, jnp.inexact) else 0.0


_COUNTED: dict[str, Callable[[Any], float]] = {
    **dict.fromkeys(("add", "add_any", "sub", "mul", "div"), _numbers),
    "reduce_sum": functools.partial(_numbers, of="invars"),
    "dot_general": _product,
    "conv_general_dilated": _convolution,
}
