"""Which runs belong together: seeds of one configuration, configurations of one model, a whole sweep."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedjax_sim import algorithms, runs, sweep_files
from fedjax_sim import config as config_lib
from fedjax_sim.errors import UserError
from fedjax_sim.folders import Folder
from fedjax_sim.peel import analysis
from fedjax_sim.peel.analysis import Measurements
from fedjax_sim.runs import Run


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Runs that differ in their seed only.

    Attributes:
      name: what sets the group apart from the others; the method, if it is alone.
      runs: one of each seed.
      measured: what was measured in all of them.
    """

    name: str
    runs: tuple[Run, ...]
    measured: Measurements

    @property
    def title(self) -> str:
        """One line: method, data, partition, seeds."""
        seeds = ", ".join(str(run.config.seed) for run in self.runs)
        about = self.runs[0].title.rsplit(", seed", 1)[0]
        return f"{about}, seed{'s' * (len(self.runs) > 1)} {seeds}"


One = Run | str | Path | Group
Given = One | Sequence[One]
"""A run, the folder of one, the YAML file of a sweep (its finished runs), a group; or several."""


def groups(given: Given) -> list[Group]:
    """Runs, or folders of runs, as groups of one model.

    Raises:
      UserError: a folder holds no run, a run is not finished or was not probed, two runs are the same, or
        their models have different layers.
    """
    found = [group for family in families(given) for group in family]
    analysis.pooled([group.measured for group in found])  # of one model, or refused
    return found


def families(given: Given) -> list[list[Group]]:
    """The same of any models: the groups of each model, told apart by the names of its layers.

    Raises:
      UserError: as `groups`, different layers excepted.
    """
    things = [given] if isinstance(given, Run | str | Path | Group) else list(given)
    if not things:
        raise UserError("folders", "", "there is no run to look at", "Give the output.dir of a run.")
    found = [thing for thing in things if isinstance(thing, Group)]
    files = [thing for thing in things if isinstance(thing, str | Path) and Path(thing).suffix == ".yaml"]
    for file in files:
        found += of_sweep(file)
    loose = [thing for thing in things if not isinstance(thing, Group) and thing not in files]
    found += _by_settings(loose)  # type: ignore[arg-type]
    out: dict[tuple[str, ...], list[Group]] = {}
    for group in found:
        out.setdefault(group.measured.names, []).append(group)
    return list(out.values())


def of_sweep(path: str | Path) -> list[Group]:
    """The finished runs of a sweep file, a group for each method and setting, named as in its table.

    Raises:
      UserError: the file is wrong, or no run of it is finished.
    """
    asked = sweep_files.load(path)
    found: dict[str, list[Run]] = {}
    for job in asked.jobs:
        folder = job.config.output.dir
        if folder is not None and Folder(folder).finished:
            name = ", ".join(part for part in (job.method, job.column) if part)
            found.setdefault(name, []).append(runs.load(folder))
    if not found:
        why = "none of its runs is finished"
        raise UserError("folders", str(path), why, f"Run it first: fedjax-sim sweep {path}.")
    return [_group(name, made) for name, made in found.items()]


def _by_settings(things: Sequence[Run | str | Path]) -> list[Group]:
    """Groups of what differs in nothing but the seed, named by what sets them apart."""
    found: dict[tuple, list[Run]] = {}
    for thing in things:
        run = thing if isinstance(thing, Run) else runs.load(thing)
        if not run.finished:
            why = f"the run has {run.rounds} of its {run.config.rounds} rounds"
            where = _where(run)
            raise UserError("folder", where, why, f"Finish it: fedjax-sim resume {where}.")
        found.setdefault(tuple(settings_of(run).items()), []).append(run)
    names = names_of([dict(key) for key in found])
    return [_group(name, made) for name, made in zip(names, found.values(), strict=True)]


def _group(name: str, made: Sequence[Run]) -> Group:
    measured: dict[int, Measurements] = {}
    for run in made:
        seed = run.config.seed
        if seed in measured:
            why = f"another of these runs has the same settings and the same seed, {seed}"
            raise UserError("folder", _where(run), why, "Give each run once.")
        try:
            measured[seed] = analysis.measurements(run.metrics, seed)
        except UserError:
            why, fix = "the run has no records of the layer-peeled probe", "Run it with --peel.every."
            raise UserError("folder", _where(run), why, fix) from None
    return Group(name, tuple(made), analysis.pooled(list(measured.values())))


def _where(run: Run) -> str:
    return str(run.folder or "in memory")


def settings_of(run: Run) -> dict[str, str]:
    """What makes a run what it is, its seed aside, by dotted field."""
    config = config_lib.to_dict(run.config)
    name = algorithms.name_of(run.config.algorithm) or type(run.config.algorithm).__name__
    flat = {"algorithm": name}

    def walk(mapping: dict[str, Any], path: str) -> None:
        for key, value in mapping.items():
            if isinstance(value, dict) and value:
                walk(value, f"{path}{key}.")
            else:
                flat[f"{path}{key}"] = str(value)

    walk({key: value for key, value in config.items() if key not in ("seed", "execution", "output")}, "")
    return {key: value for key, value in flat.items() if key not in ("algorithm.name", "data.data_dir")}


def names_of(settings: list[dict[str, str]]) -> list[str]:
    """The method, and in which fields it differs from groups of the same method, or from all."""
    keys = dict.fromkeys(key for one in settings for key in one)
    names = []
    for one in settings:
        told = [one["algorithm"]]
        for key in keys:
            # A method's own fields tell it only from itself.
            rivals = [
                other
                for other in settings
                if not key.startswith("algorithm") or other["algorithm"] == one["algorithm"]
            ]
            if key != "algorithm" and len({other.get(key) for other in rivals}) > 1:
                told.append(f"{key.removeprefix('algorithm.')} {one.get(key, 'default')}")
        names.append(", ".join(told))
    return names
