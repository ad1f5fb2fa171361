"""The lists of a configuration that anybody's own code can stand in: observers, meters and callbacks."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from fedjax_sim.config.callbacks import CALLBACKS
from fedjax_sim.config.trackers import TRACKERS
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.plugins import Names, written

LISTS: dict[str, Names] = {
    "observers": Names("observer", "build(context)", {}),
    "meters": Names("meter", "build(context)", {}),
    "callbacks": Names("callback", "on_round(number, rows, run)", {**CALLBACKS, **TRACKERS}),
}
"""Field of `RunConfig` -> the names of what stands in it."""

_SECTIONS = {"peel": "peel: {every: 10}", "inertia": "inertia: {measure: true, every: 10}"}


def check_entries(kind: str, entries: Sequence[Any]) -> None:
    """Raises UserError for an entry of a list that is not of its kind."""
    for place, entry in enumerate(entries):
        LISTS[kind].check(entry, f"{kind}.{place}")


def named(kind: str, name: Any, field: str) -> type:
    """The class of that name. Raises UserError if there is none."""
    if kind != "callbacks" and name in _SECTIONS:
        raise UserError(
            field, name, "this diagnostic has a section of its own", f"Write {_SECTIONS[name]} beside {kind}."
        )
    return LISTS[kind].named(name, field)


def name_of(config: Any) -> str | None:
    """The name under which a file can hold an entry of any of the lists; None if it has none."""
    return next((name for name in (names.name_of(config) for names in LISTS.values()) if name), None)


def namable(entries: Sequence[Any]) -> bool:
    """Whether a file can hold a whole list."""
    return all(name_of(entry) is not None for entry in entries)


def label(entries: Sequence[Any]) -> str:
    """A list in words, with all settings."""
    return ", ".join(map(written, entries)) or "none"


def labels(kind: str, entries: Sequence[Any]) -> list[str]:
    """A name for each entry of a list, all of them different."""
    out: list[str] = []
    for entry in entries:
        name = LISTS[kind].name_of(entry) or type(entry).__name__
        count = sum(one.partition(" ")[0] == name for one in out)
        out.append(f"{name} ({count + 1})" if count else name)
    return out


def entries_of(kind: str, value: Any, read: Any) -> tuple[Any, ...]:
    """The objects that a list of names, or of mappings with `name`, describes.

    Args:
      kind: of the list.
      value: as YAML has it.
      read: (fields, class, path) -> the object.

    Raises:
      UserError: an unknown name, an unknown field or a wrong value.
    """
    if not isinstance(value, list | tuple):
        raise UserError(kind, value, "a list is wanted", f"Write [{value}]." if value else "Write [].")
    out = []
    for place, entry in enumerate(value):
        path = f"{kind}.{place}"
        fields = {"name": entry} if isinstance(entry, str) else entry
        if not isinstance(fields, Mapping) or "name" not in fields:
            fix = f"Write - {{name: {next(iter(LISTS[kind].builtin), 'module:Class')}}}."
            raise UserError(path, entry, "a name or a mapping with `name` is wanted", fix)
        cls = named(kind, fields["name"], f"{path}.name")
        out.append(read({key: v for key, v in fields.items() if key != "name"}, cls, f"{path}."))
    return tuple(out)


def plain(entries: Sequence[Any], to_dict: Any) -> list[Any]:
    """What `entries_of` reads; what has no name is left out."""
    return [
        to_dict(entry) for entry in entries if dataclasses.is_dataclass(entry) and name_of(entry) is not None
    ]
