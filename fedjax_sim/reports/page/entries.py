"""What a page is of: runs, each with its place in the table and with how far it has come."""

import dataclasses
import os
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fedjax_sim import records
from fedjax_sim.config import RunConfig
from fedjax_sim.core.errors import UserError
from fedjax_sim.runs import Run, portable
from fedjax_sim.runs.folder import Folder, locked

Kind = Literal["finished", "stopped", "running", "cut", "failed", "damaged", "waiting"]

OVER: tuple[Kind, ...] = ("finished", "stopped", "failed", "damaged")
"""States that do not change by themselves."""

_QUIET = 120.0
"""Seconds without a record after which a run is taken for one at rest, unless its rounds are longer."""
_RECENT = 20
"""Newest rounds whose mean time is the pace, or a fifth of all where that is more."""


@dataclasses.dataclass(frozen=True)
class State:
    """How far a run has come.

    Attributes:
      kind: `running` and `cut` runs are not finished: the second has no process here, and no new record.
      round: rounds that are done.
      rounds: that it is to have.
      words: the same for a reader, with the reason where there is one.
      seconds_left: of a running one, by the pace of its newest rounds; None where it cannot be told.
    """

    kind: Kind
    round: int
    rounds: int
    words: str
    seconds_left: float | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Entry:
    """One run of a page.

    Attributes:
      row: its method, or what sets it apart from the others.
      column: its setting; "" if there is one setting only.
      config: what it is.
      state: how far it has come.
      run: its records; None if it has not begun, or cannot be read.
      setting: of the column, as dotted field -> value.
    """

    row: str
    column: str
    config: RunConfig
    state: State
    run: Run | None = None
    setting: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """Row, column and seed."""
        return ", ".join(part for part in (self.row, self.column, f"seed {self.config.seed}") if part)

    @property
    def folder(self) -> Path | None:
        """Where it is."""
        return None if self.config.output.dir is None else Folder(self.config.output.dir).path

    @property
    def over(self) -> bool:
        """Whether its state will not change by itself."""
        return self.state.kind in OVER

    @property
    def seen(self) -> bool:
        """Whether it has at least one round."""
        return self.run is not None and self.run.rounds > 0


def state_of(run: Run, failure: str = "") -> State:
    """How far a run has come; `failure`: what its sweep says went wrong."""
    done, rounds = run.rounds, run.config.rounds
    if run.finished:
        if run.stopped is not None:
            return State("stopped", done, rounds, str(run.stopped))
        return State("finished", done, rounds, f"finished, {_counted(rounds)}")
    where = f"round {done} of {rounds}"
    running, age = (False, None) if run.folder is None else liveness(run.folder)
    failure = failure or ("" if run.folder is None else Folder(run.folder).failure)
    if not running and failure:
        return State("failed", done, rounds, f"failed at {where}: {failure}")
    laps = [] if run.folder is None else Folder(run.folder).records.laps()
    recent = [lap.seconds for lap in laps[1:]][-max(_RECENT, len(laps) // 5) :]
    pace = float(np.mean(recent)) if recent else None
    gone = run.folder is not None and Folder(run.folder).ended_here
    if not running and not gone and age is not None:
        running = age < max(_QUIET, 10 * (pace or 0.0))
    if running:
        left = None if pace is None else pace * (rounds - done)
        told = f", about {duration(left)} left" if left else ""
        return State("running", done, rounds, f"under way, {where}{told}", left)
    if gone:
        way = shlex.join(["fedjax-sim", "resume", str(portable(run.config).output.dir)])
        return State("cut", done, rounds, f"not running: {where}; go on with: {way}")
    told = "" if age is None else f"; its newest record is {duration(age)} old"
    return State("cut", done, rounds, f"not finished: {where}, and no process works on it here{told}")


def waiting(config: RunConfig, failure: str = "") -> State:
    """The state of a run that has no folder yet."""
    if failure:
        return State("failed", 0, config.rounds, f"failed: {failure}")
    return State("waiting", 0, config.rounds, "not begun")


def damaged(config: RunConfig, error: UserError) -> State:
    """The state of a run that cannot be read."""
    return State("damaged", 0, config.rounds, f"cannot be read: {' '.join(str(error).split())}")


def liveness(folder: Path) -> tuple[bool, float | None]:
    """(whether a process of this machine works on a run, seconds since its newest record; None: no record).

    The lock is looked up and not tried: who tries it would keep out a process that starts at that moment.
    Systems without `/proc/locks`, and runs on other machines, are told by the age of their records alone.
    """
    age = None
    for name in (records.JOURNAL, records.TIMING, "config.yaml"):
        try:
            since = max(time.time() - (folder / name).stat().st_mtime, 0.0)
        except OSError:
            continue
        age = since if age is None else min(age, since)
    return locked(folder / ".lock"), age


def signature(folders: Sequence[Path]) -> tuple[object, ...]:
    """What changes when a record of one of these folders does, when a process begins or ends there, and when
    there was no new record for so long that a run is no longer taken for one under way.
    """  # fmt: skip
    names = (records.JOURNAL, records.METRICS, "config.yaml", "provenance.json", "sweep.json", "runs.json")
    return tuple(
        (*(_version(folder / name) for name in names), locked(folder / ".lock"), _quiet(folder))
        for folder in folders
    )


def _quiet(folder: Path) -> bool:
    age = liveness(folder)[1]
    return age is not None and age > _QUIET


def _version(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def duration(seconds: float) -> str:
    """`0.25 s`, `12 s`, `3 min 20 s`, `2 h 05 min`, `3 d 4 h`."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    return f"{hours // 24} d {hours % 24} h"


def _counted(rounds: int) -> str:
    return "1 round" if rounds == 1 else f"{rounds:,} rounds"
