"""What is made once in a process, of values that compare equal: models, algorithms, traced programs.

A sweep's runs differ in little, and tracing a round takes as long as some rounds. But equal values mean the
same only as long as the code behind them stays: a notebook's cell that is run again changes what a class or
a function does. So only values are looked up that consist of plain data and of code that was shipped, this
package's and JAX's; of all others a new thing is made each time. When a module of this package is loaded
anew, as IPython's autoreload does, everything is forgotten. JAX's settings are part of what is compared.
"""

import dataclasses
import sys
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import jax

_Made = TypeVar("_Made")

SHIPPED = {__name__.partition(".")[0], "builtins", "flax", "jax", "jaxlib", "numpy", "optax"}
"""Packages whose code stays as it is while a process runs; one's own may be added."""

MAX_KEPT = 256
"""How many things are kept, the last ones that were asked for.

A method and shape has five or so, the programs of its round among them, and a sweep comes back to each with
every seed: room for ten methods on four partitions. A round's programs take about 10 MiB.
"""

_KEPT: OrderedDict[Hashable, Any] = OrderedDict()
_LOADED: dict[str, Any] = {}  # name of a module of this package -> its specification when last seen
_MODULES = 0  # how many there were then


def once(kind: str, key: Hashable, make: Callable[[], _Made]) -> _Made:
    """What `make` gives, or gave for an equal key.

    Args:
      kind: of thing.
      key: all that it is made of, compared by value.
      make: makes it. It is called each time if the key has no hash, or holds code that was not shipped.
    """
    if not shipped(key):
        return make()
    whole = kind, key, _settings()
    try:
        hash(whole)
    except TypeError:
        return make()
    _forget_what_was_loaded_anew()
    if whole not in _KEPT:
        _KEPT[whole] = make()
        if len(_KEPT) > MAX_KEPT:
            _KEPT.popitem(last=False)
    _KEPT.move_to_end(whole)
    return _KEPT[whole]


def forget() -> None:
    """Everything is made anew from now on: for who replaces a function of this package."""
    _KEPT.clear()


def shipped(value: Any) -> bool:
    """Whether a value consists of plain data and of code of the packages in `SHIPPED`.

    Args:
      value: plain data, a function, a class or a dataclass, or tuples, lists and mappings of these.
    """
    if isinstance(value, Mapping):
        return all(map(shipped, value.values()))
    if isinstance(value, tuple | list):
        return all(map(shipped, value))
    record = dataclasses.is_dataclass(value)
    if record or callable(value):
        module = getattr(value, "__module__", None) or type(value).__module__
        if module.partition(".")[0] not in SHIPPED:
            return False
    if record and not isinstance(value, type):
        return all(shipped(getattr(value, field.name, None)) for field in dataclasses.fields(value))
    return True


def _settings() -> Hashable:
    """JAX's, as they are here and now, with those of `with` statements."""
    return tuple((name, getattr(jax.config, name, None)) for name in jax.config.values)


def _forget_what_was_loaded_anew() -> None:
    global _MODULES
    # Thousands of modules are there, and this is asked often: names are looked through when there are others.
    if len(sys.modules) != _MODULES:
        package, _MODULES = __name__.partition(".")[0], len(sys.modules)
        for name in list(sys.modules):
            if name.startswith(package) and name.partition(".")[0] == package:
                _LOADED.setdefault(name, None)
    anew = False
    for name, before in _LOADED.items():
        now = getattr(sys.modules.get(name), "__spec__", None)
        if now is not None and now is not before:
            anew |= before is not None
            _LOADED[name] = now
    if anew:
        forget()
