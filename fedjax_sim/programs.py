"""Compiled programs, one for each shape of their arguments, shared by the runs of one process.

JAX's own cache on disk will not do for a program of several CPU devices that exchange data: jaxlib 0.10 runs
one that it has read from there without the order among independent exchanges that a freshly compiled one
keeps, so that two devices may wait in two different ones, for ever. Such programs are compiled outside of
that cache, and found again in memory by their text.
"""

import contextlib
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh


class Program:
    """A function under `jax.jit`, for arguments on the devices of a mesh; called as the function is."""

    def __init__(self, function: Callable[..., Any], mesh: Mesh, **options: Any):
        """`options`: of `jax.jit`."""
        self._jitted: Any = jax.jit(function, **options)
        self._plain = mesh.size == 1 or mesh.devices.flat[0].platform != "cpu"
        self._compiled: dict[Any, Any] = {}

    def __call__(self, *args: Any) -> Any:
        """The function's value."""
        if self._plain:
            return self._jitted(*args)
        leaves, structure = jax.tree.flatten(args)
        shape = structure, tuple((np.shape(leaf), leaf.dtype) for leaf in leaves)
        if shape not in self._compiled:
            self._compiled[shape] = _compile(self._jitted.lower(*args), shape)
        return self._compiled[shape](*args)

    def lower(self, *args: Any) -> jax.stages.Lowered:
        """As `jax.jit(…).lower`."""
        return self._jitted.lower(*args)

    def variants(self) -> int:
        """For how many shapes of arguments it has been called."""
        return self._jitted._cache_size() if self._plain else len(self._compiled)


_RECENT: OrderedDict[Any, jax.stages.Compiled] = OrderedDict()
_MOST = 16
_ON_DISK = "jax_enable_compilation_cache"


def _compile(lowered: jax.stages.Lowered, shape: Any) -> jax.stages.Compiled:
    """Compiled now, or in one of the last programs of this process that had the same text.

    `shape`: of all arguments, as the text has only those that it uses.
    """
    text = hashlib.sha256(lowered.as_text().encode()).hexdigest()
    name = text, shape, lowered.out_tree
    if name not in _RECENT:
        with _without_disk():
            _RECENT[name] = lowered.compile()
        if len(_RECENT) > _MOST:
            _RECENT.popitem(last=False)
    _RECENT.move_to_end(name)
    return _RECENT[name]


@contextlib.contextmanager
def _without_disk() -> Iterator[None]:
    before = getattr(jax.config, _ON_DISK)
    jax.config.update(_ON_DISK, False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update(_ON_DISK, before)
        compilation_cache.reset_cache()
