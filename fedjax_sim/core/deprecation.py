"""Old names that go on working for a while; every use says the new name and when the old one ends.

A field of a configuration that was renamed, in Python, in YAML and as a flag:

    @deprecation.renamed_fields(batchsize=Renamed("batch_size", since="0.2", until="0.4"))
    @dataclasses.dataclass(frozen=True)
    class LocalConfig: …

A name that a module held:

    __getattr__ = deprecation.moved_names(__name__, {"old": Renamed("fedjax_sim.data:new", "0.2", "0.4")})

The warning is a FutureWarning: Python shows it to everybody, a DeprecationWarning only to code of `__main__`.
"""

import dataclasses
import functools
import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from fedjax_sim.core.errors import UserError

_Class = TypeVar("_Class", bound=type)
_FIELDS = "__renamed_fields__"


@dataclasses.dataclass(frozen=True)
class Renamed:
    """What has become of a name.

    Attributes:
      to: the new name of a field; `module:name` of what a module held.
      since: the release that brought the new name.
      until: the first release that does without the old one, at least one minor release later.
    """

    to: str
    since: str
    until: str

    def __post_init__(self):
        if _minor(self.until) <= _minor(self.since):
            raise ValueError(
                f"{self.to}: an old name stays for one minor release: {self.since}, {self.until}"
            )


def _minor(release: str) -> tuple[int, int]:
    """(0, 2) of `0.2` and `0.2.1`."""
    major, minor = release.split(".")[:2]
    return int(major), int(minor)


def warn(old: str, new: str, renamed: Renamed, stacklevel: int = 2) -> None:
    """Says that a name is deprecated.

    Args:
      old: the name that was used, as its user wrote it.
      new: what to write.
      renamed: since when, and until when.
      stacklevel: 1 is the caller of this function.
    """
    said = f"{old} is called {new} since fedjax_sim {renamed.since}. The old name ends with {renamed.until}."
    warnings.warn(f"{said} Write {new}.", FutureWarning, stacklevel=stacklevel + 1)


# --- fields of a configuration --------------------------------------------------------------------------


def renamed_fields(**fields: Renamed) -> Callable[[_Class], _Class]:
    """A decorator above `@dataclass`: it takes and shows some fields by their old names too.

    Args:
      **fields: old name -> the field that it is now.
    """

    def decorated(cls: _Class) -> _Class:
        known = {field.name for field in dataclasses.fields(cls)}
        for old, renamed in fields.items():
            if old in known or renamed.to not in known:
                raise ValueError(f"{cls.__name__}: {old} or {renamed.to} is not what it should be")
            setattr(cls, old, _reader(cls.__name__, old, renamed))
        initialise = cls.__init__

        @functools.wraps(initialise)
        def __init__(self: Any, *args: Any, **given: Any) -> None:
            initialise(self, *args, **current(cls, given, f"{cls.__name__}."))

        setattr(cls, _FIELDS, {**of_class(cls), **fields})
        cls.__init__ = __init__  # pyright: ignore[reportAttributeAccessIssue]
        return cls

    return decorated


def of_class(cls: type) -> Mapping[str, Renamed]:
    """Old name -> what it is now, of a configuration's fields."""
    return getattr(cls, _FIELDS, {})


def current(cls: type, given: Mapping[str, Any], path: str = "", stacklevel: int = 2) -> dict[str, Any]:
    """Values by field, with the fields' new names in the place of old ones, which are warned of.

    Args:
      cls: the configuration's class.
      given: field -> value.
      path: what stands before a field's name in messages, with its dot.
      stacklevel: 1 is the caller of this function.

    Raises:
      UserError: a field is given by both names.
    """
    renamed, out = of_class(cls), {}
    for key, value in given.items():
        if key in renamed:
            old, new = f"{path}{key}", f"{path}{renamed[key].to}"
            if renamed[key].to in given:
                raise UserError(old, value, f"{new} is set too, and is the same field", f"Write {new} alone.")
            warn(old, new, renamed[key], stacklevel + 1)
            key = renamed[key].to
        out[key] = value
    return out


def _reader(cls: str, old: str, renamed: Renamed) -> property:
    def read(self: Any) -> Any:
        warn(f"{cls}.{old}", f"{cls}.{renamed.to}", renamed)
        return getattr(self, renamed.to)

    return property(read, doc=f"`{renamed.to}`, until {renamed.until}.")


# --- names in modules -----------------------------------------------------------------------------------


def moved_names(module: str, names: Mapping[str, Renamed]) -> Callable[[str], Any]:
    """A module's `__getattr__`, which finds what has gone elsewhere.

    Args:
      module: the module's `__name__`.
      names: old name -> `module:name`, where it is now.
    """

    def __getattr__(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        place, _, new = names[name].to.partition(":")
        warn(f"{module}.{name}", f"{place}.{new}", names[name])
        return getattr(importlib.import_module(place), new)

    return __getattr__
