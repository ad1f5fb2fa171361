"""What a page is of: the runs of a folder, of a file, or of Python, and how far they are."""

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedjax_sim import algorithms, runs
from fedjax_sim import config as config_lib
from fedjax_sim.config import sweep_files
from fedjax_sim.config.sweep_files import Job, Sweep
from fedjax_sim.core import paths
from fedjax_sim.core.errors import UserError
from fedjax_sim.records import goal_of
from fedjax_sim.reports import shared
from fedjax_sim.reports.page import entries
from fedjax_sim.reports.page.entries import Entry
from fedjax_sim.runs import Run, packs
from fedjax_sim.runs.folder import Folder

_DEEP = 6
"""How many folders down runs are looked for."""

One = Run | str | Path
Given = One | Sequence[One]
"""A run, the folder of one or of a sweep, the YAML file of a sweep or of a run; or several."""


@dataclasses.dataclass(frozen=True, eq=False)
class Study:
    """What a page is of.

    Attributes:
      kind: `Run`, `Sweep` or `Runs`.
      entries: its runs.
      home: the folder that it has; None if it is in memory.
      name: of a sweep; "" for what has none.
      sweep: what the table is by; None: by the headline of the task.
      file: the sweep's file; None without one.
      whole: whether all runs are known, and not only those that have begun.
    """

    kind: str
    entries: tuple[Entry, ...]
    home: Path | None
    name: str = ""
    sweep: Sweep | None = None
    file: Path | None = None
    whole: bool = True

    @property
    def folders(self) -> list[Path]:
        """Those in which something may change."""
        own = [entry.folder for entry in self.entries if entry.folder is not None]
        return [*own, *([] if self.home is None else [self.home])]

    @property
    def over(self) -> bool:
        """Whether nothing will change by itself, as far as that is known."""
        return self.whole and all(entry.over for entry in self.entries)

    @property
    def headline(self) -> str:
        """The metric that is shown first."""
        if self.sweep is not None:
            return self.sweep.metric
        known = [entry.run.headline for entry in self.entries if entry.run is not None]
        return known[0] if known else "accuracy"


def find(given: Given, known: dict[Path, Run] | None = None) -> Study:
    """Reads what is to be told of.

    Args:
      given: see `Given`.
      known: finished runs that were read before, which is added to.

    Raises:
      UserError: see `report`.
    """
    known = {} if known is None else known
    things = [given] if isinstance(given, Run | str | Path) else list(given)
    if not things:
        raise UserError(
            "report", "", "there is no run to tell of", "Give the folder of a run, or a sweep's file."
        )
    if len(things) == 1:
        return _one(things[0], known)
    found = [study for thing in things for study in [_one(thing, known)]]
    if all(study.kind == "Run" for study in found):
        return _loose([entry for study in found for entry in study.entries], found[0].home)
    several = [
        dataclasses.replace(entry, row=f"{study.name}: {entry.row}" if study.name else entry.row)
        for study in found
        for entry in study.entries
    ]
    return Study("Runs", tuple(several), _beside(found[0].home), whole=all(study.whole for study in found))


def _beside(home: Path | None) -> Path | None:
    return None if home is None else home.parent


def _one(thing: One, known: dict[Path, Run]) -> Study:
    if isinstance(thing, Run):
        return _single(thing)
    path = paths.local(thing, "report").absolute()
    if path.is_file():
        return _of_file(path, known)
    if not path.exists() and Folder(path).packed is None:
        raise UserError("report", str(path), "there is no such file or folder", "Check the path.")
    if Folder(path).started:
        run = _read(path, known)
        assert run is not None
        return _single(run)
    return _of_folder(path, known)


def _single(run: Run) -> Study:
    name = run.config.given.get("algorithm", algorithms.label(run.config.algorithm))
    return Study("Run", (Entry(name, "", run.config, entries.state_of(run), run),), run.folder)


def _of_file(path: Path, known: dict[Path, Run]) -> Study:
    """A sweep's file; or a run's, of which the folder is meant."""
    mapping = config_lib.read_yaml(path)
    if not any(key in mapping for key in ("base", "methods", "grid", "seeds")):
        folder = config_lib.read_config(path).output.dir
        if folder is None:
            why = "this is the configuration of one run, and it names no folder (output.dir)"
            raise UserError("report", str(path), why, "Give the folder of the run.")
        return _one(folder, known)
    sweep = sweep_files.read_sweep(path)
    failures = _failures(sweep.out)
    found = tuple(_of_job(job, failures.get(job.config.output.dir or "", ""), known) for job in sweep.jobs)
    return Study("Sweep", found, sweep.out, path.stem, sweep, path)


def _of_job(job: Job, failure: str, known: dict[Path, Run]) -> Entry:
    folder = Folder(str(job.config.output.dir))
    run, config = None, job.config
    try:
        run = _read(folder.path, known) if folder.started else None
    except UserError as error:
        state = entries.damaged(config, error)
    else:
        state = entries.waiting(config, failure) if run is None else entries.state_of(run, failure)
    return Entry(job.method, job.column, config if run is None else run.config, state, run, job.setting)


def _read(folder: Path, known: dict[Path, Run]) -> Run | None:
    if folder in known:
        return known[folder]
    run = runs.load(folder)
    if run.finished:
        known[folder] = run
    return run


def _failures(home: Path) -> dict[str, str]:
    """Folder -> why its run failed, as the newest start of a sweep wrote it down."""
    jobs = _told(home).get("jobs", ())
    return {
        str(home / job["folder"]): job["failure"] for job in jobs if job.get("failure") and "folder" in job
    }


def _told(home: Path) -> dict[str, Any]:
    try:
        told = json.loads((home / "sweep.json").read_text())
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


def _of_folder(home: Path, known: dict[Path, Run]) -> Study:
    """A sweep's folder: by what its newest start wrote down, or else by the runs that have begun there."""
    told = _told(home)
    if told.get("jobs"):
        jobs = [_job_of(home, about) for about in told["jobs"]]
        metric = str(told.get("metric", "accuracy"))
        goal = told.get("goal", goal_of(metric))
        sweep = Sweep(tuple(jobs), told.get("reference"), metric, goal, told.get("last_k", 1), (), home)
        failures = _failures(home)
        found = tuple(_of_job(job, failures.get(job.config.output.dir or "", ""), known) for job in jobs)
        return Study("Sweep", found, home, home.name, sweep)
    folders = _begun(home)
    if not folders:
        why = "neither a run nor a sweep is in this folder"
        raise UserError(
            "report", str(home), why, "Give the output.dir of a run, or a sweep's file or folder."
        )
    found = []
    for folder in folders:
        run = _read(folder, known)
        assert run is not None
        found.append(Entry("", "", run.config, entries.state_of(run), run))
    return dataclasses.replace(_loose(found, home), home=home, name=home.name, whole=False)


def _job_of(home: Path, about: dict[str, Any]) -> Job:
    config = config_lib.from_dict(about["config"])
    folder = str(home / about["folder"])
    config = dataclasses.replace(config, output=dataclasses.replace(config.output, dir=folder))
    setting = tuple(about.get("setting", {}).items())
    column = ", ".join(f"{key.split('.')[-1]} {value}" for key, value in setting)
    return Job(about["method"], setting, column, about["seed"], config)


def _begun(home: Path) -> list[Path]:
    """Folders of runs below a folder, those of a pack too."""
    found = [home / packs.RUNS / name for name in packs.Pack(home / packs.RUNS).names()]
    todo = [(home, 0)]
    while todo:
        folder, depth = todo.pop()
        for path in sorted(folder.iterdir()) if depth < _DEEP else ():
            if not path.is_dir() or path.name in ("checkpoints", "figures", "tensorboard", "compiled"):
                continue
            if (path / packs.CONFIG).is_file():
                found.append(path)
            else:
                todo.append((path, depth + 1))
    return sorted(dict.fromkeys(found))


def _loose(found: Sequence[Entry], home: Path | None) -> Study:
    """Runs that no sweep's file holds together: a row for each group that differs in its seed alone."""
    told = [shared.settings_of(entry.run) if entry.run is not None else {} for entry in found]
    kinds = list({tuple(one.items()): one for one in told})
    names = dict(zip(kinds, shared.names_of([dict(kind) for kind in kinds]), strict=True))
    placed = [
        dataclasses.replace(entry, row=names[tuple(one.items())])
        for entry, one in zip(found, told, strict=True)
    ]
    taken = Counter((entry.row, entry.config.seed) for entry in placed)
    for entry in placed:
        if taken[entry.row, entry.config.seed] > 1:
            why = f"another of these runs has the same settings and the same seed, {entry.config.seed}"
            raise UserError("report", str(entry.folder or "in memory"), why, "Give each run once.")
    return Study("Runs", tuple(placed), _beside(home))
