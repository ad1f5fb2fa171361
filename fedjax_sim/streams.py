"""Where randomness comes from: every draw of a run folds the run's key with numbers that name the draw.

Nothing depends on the order of execution, so neither waves, devices nor a resumed run change a draw.
"""

import jax

INIT, SERVER, CLIENTS, COHORTS, PEEL, INERTIA = range(6)
"""First number below the run's key: initial model; server by round; clients by round and id; who is drawn;
whom and what diagnostics measure: the layer-peeled probe, and effectiveness."""


def root(seed: int) -> jax.Array:
    """The run's key. Always Threefry, whose draws for one client do not depend on who is drawn beside it."""
    return jax.random.key(seed, impl="threefry2x32")


def stream(key: jax.Array, *numbers: int | jax.Array) -> jax.Array:
    """The key that is named by `numbers` below `key`."""
    for number in numbers:
        key = jax.random.fold_in(key, number)
    return key
