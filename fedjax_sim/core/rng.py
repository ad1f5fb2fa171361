"""Where randomness comes from: every draw of a run folds the run's key with numbers that name the draw.

Nothing depends on the order of execution, so neither waves, devices nor a resumed run change a draw. Nor do
JAX's global settings: the generator, its seeds' offset and the form of its counters are fixed here.
"""

# ruff: noqa: F722 - shapes in annotations, such as "K ...", are no expressions of Python

import contextlib
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int, Key

INIT, SERVER, CLIENTS, COHORTS, PEEL, INERTIA = range(6)
"""First number below the run's key: initial model; server by round; clients by round and id; who is drawn;
whom and what diagnostics measure: the layer-peeled probe, and effectiveness."""


def run_key(seed: int) -> Key[Array, ""]:
    """The run's key. Always Threefry, whose draws for one client do not depend on who is drawn beside it.

    Made by hand of a seed from 0 to 2**32 - 1: `jax.random.key` adds `jax_random_seed_offset` to it.
    """
    words: Any = np.asarray([0, seed], np.uint32)
    return jax.random.wrap_key_data(words, impl="threefry2x32")


def settled() -> contextlib.AbstractContextManager[None]:
    """Draws compiled or made inside do not depend on how many there are of them beside.

    That is JAX's default, `jax_threefry_partitionable`, and off where some library or user has turned it off.
    It counts when a program is compiled: a traced function cannot set it for itself.
    """
    if jax.config.jax_threefry_partitionable:  # pyright: ignore[reportAttributeAccessIssue] dynamic attribute
        return contextlib.nullcontext()
    return jax.threefry_partitionable(True)


def key_for(key: Key[Array, ""], *numbers: int | np.integer | Int[Array, ""]) -> Key[Array, ""]:
    """The key that is named by `numbers` below `key`."""
    for number in numbers:
        key = jax.random.fold_in(key, number)
    return key
