"""Which version of a user's own modules a run's numbers come from, by what its provenance says.

`own` in provenance.json has a checksum of each own module as it was when the run began. `starts` lists the
later starts that had another version of one, or other versions of packages: the round after which such a
start went on (`round`), and what was another (`own`, `versions`). Older records have no `starts`.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedjax_sim.core import imports
from fedjax_sim.core.errors import UserError
from fedjax_sim.runs import provenance
from fedjax_sim.runs.folder import Folder

_MOST = 4
"""How many runs a sentence names."""


def told_by(folder: Path | None) -> Mapping[str, Any]:
    """A run's provenance; nothing of a run that is in memory, or that cannot be read."""
    if folder is None:
        return {}
    try:
        return Folder(folder).records.provenance()
    except UserError:
        return {}


def edited(about: Mapping[str, Any]) -> tuple[str, ...]:
    """The own modules of a run that are not, or not all the time were, what they are now."""
    names = {name: file for start in _starts(about) for name, file in start.get("own", {}).items()}
    now = imports.checksums(names, find=True)
    known = _versions(about)
    changed = {_module(name) for name, found in now.items() if known[_module(name)] != (found,)}
    return tuple(sorted(changed))


def cautions(known: Iterable[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """What a reader of several runs must know of the code that made them.

    Args:
      known: (name, provenance) of each run.

    Returns:
      A sentence for each own module of which the runs had several versions, and one for each run whose later
      starts had another version of something.
    """
    known = list(known)
    by_module: dict[str, dict[tuple[int | None, ...], list[str]]] = {}
    for name, about in known:
        for module, had in _versions(about).items():
            by_module.setdefault(module, {}).setdefault(had, []).append(name)
    out = []
    for module, versions in by_module.items():
        if len(versions) > 1:
            made = " ".join(f"Version {n}: {in_short(of)}." for n, of in enumerate(versions.values(), 1))
            out.append(
                f"The runs were made with {len(versions)} versions of the module {module}, so their "
                f"differences may come from it. {made}"
            )
    return out + [f"{name} {sentence}" for name, about in known for sentence in _later(about)]


def in_short(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = f", and {len(names) - _MOST} more" if len(names) > _MOST else ""
    return "; ".join(names[:_MOST]) + more


def write_start(folder: Folder, done: int) -> None:
    """Writes down that a run goes on after round `done`, if with other code than it had until then."""
    about = dict(folder.records.provenance())
    kept = [start for start in about.get("starts", ()) if start["round"] < done]
    # What the rounds that are kept were made with last.
    own, versions = dict(about.get("own", {})), dict(about.get("versions", {}))
    for start in kept:
        own |= start.get("own", {})
        versions |= start.get("versions", {})
    now = {"own": imports.checksums(own), "versions": provenance.describe_versions(provenance.PILLOW)}
    changed = {
        part: {name: found for name, found in now[part].items() if name in had and had[name] != found}
        for part, had in (("own", own), ("versions", versions))
    }
    changed = {part: values for part, values in changed.items() if values}
    starts = [*kept, *([{"round": done, **changed}] if changed else [])]
    if starts != list(about.get("starts", ())):
        about.pop("starts", None)
        folder.write_provenance(about | ({"starts": starts} if starts else {}))


def _starts(about: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [{"own": about.get("own", {})}, *about.get("starts", ())]


def _versions(about: Mapping[str, Any]) -> dict[str, tuple[int | None, ...]]:
    """Own module -> the checksums that it had, in their order."""
    had: dict[str, tuple[int | None, ...]] = {}
    for start in _starts(about):
        for name, checksum in start.get("own", {}).items():
            before = had.get(_module(name), ())
            had[_module(name)] = before if before[-1:] == (checksum,) else (*before, checksum)
    return had


def _later(about: Mapping[str, Any]) -> list[str]:
    had, out = dict(about.get("versions", {})), []
    for start in about.get("starts", ()):
        told = [f"another version of the module {m}" for m in sorted(set(map(_module, start.get("own", ()))))]
        for name, version in start.get("versions", {}).items():
            told.append(f"{name} {version} in place of {had.get(name)}")
        had |= start.get("versions", {})
        out.append(f"went on after round {start['round']} with {', '.join(told)}.")
    return out


def _module(name: str) -> str:
    return name.partition(":")[0]
