"""Packs a finished study: the records of its runs move out of their folders into two files, and back.

Records are config.yaml, provenance.json, metrics.parquet and timing.csv; `fedjax_sim.runs.packs` describes
the two files. All else in a run's folder (checkpoints, figures, files of one's own) stays there.

Records leave a folder after the pack on the disk has been read back and holds the same. A process that is
killed meanwhile leaves each run in its folder, in the pack, or alike in both; the same command goes on.
"""

import collections
import contextlib
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from fedjax_sim import records, runs
from fedjax_sim.config.sweep_files import Job, Sweep, as_sweep
from fedjax_sim.core import paths
from fedjax_sim.core.documents import dump_yaml
from fedjax_sim.core.errors import UserError
from fedjax_sim.runs import packs
from fedjax_sim.runs.folder import Folder
from fedjax_sim.runs.packs import CONFIG, PROVENANCE, RUNS, Files, Pack, Packed

AGAIN = "give the same command again"
"""What to do once files can be written."""

_LEAVING = CONFIG + ".packed"
"""What config.yaml is called while the records are removed: the pack was found to hold all of them."""
_UNFINISHED = "not finished"


@dataclasses.dataclass(frozen=True)
class Packing:
    """What was packed, or unpacked.

    Attributes:
      pack: the two files.
      runs: the runs whose records were moved, by their names in the pack.
      before: how many had been packed before.
      left: job's name -> why it was not packed.
      others: name of a file or folder -> in how many of the packed runs' folders it still is.
    """

    pack: Pack
    runs: tuple[str, ...]
    before: int = 0
    left: Mapping[str, str] = dataclasses.field(default_factory=dict)
    others: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def report(self) -> str:
        """For the terminal."""
        files = (self.pack.about, self.pack.table)
        if not files[0].is_file():
            return f"the records of {len(self.runs)} runs are in their folders again, below {self.pack.runs}"
        size = sum(path.stat().st_size for path in files) / 1e6
        lines = [
            f"packed {len(self.runs)} runs, and {self.before} had been packed before",
            f"their records are in {files[0]} and {files[1].name} ({size:.1f} MB)",
        ]
        lines += [f"  {name} is not packed: {why}" for name, why in self.left.items() if why != _UNFINISHED]
        if unfinished := list(self.left.values()).count(_UNFINISHED):
            lines.append(f"{unfinished} runs are not finished, and are not packed")
        if self.others:
            told = ", ".join(f"{name} ({count})" for name, count in self.others.items())
            lines.append(f"left where it was, in the runs' folders: {told}")
        return "\n".join(lines)


def pack(sweep: Sweep | str | Path) -> Packing:
    """Moves the records of a sweep's finished runs into its pack. Nothing is run. `sweep` may be its file.

    Runs that are in the pack already stay in it, those of other sweeps with the same folder too.

    Raises:
      UserError: nothing was run; another process is packing; a run's records cannot be packed without loss,
        or are in its folder and in the pack and differ. No record has been removed then.
      NotWritten: the disk is full, or fails.
    """
    sweep = as_sweep(sweep)
    home, target = _home(sweep)
    with home.drawn_into("packing it"), home.writing("sweep.out", AGAIN):
        names = target.names()
        sources: dict[str, packs.Records] = {name: Packed(target, name) for name in names}
        moving: dict[str, Folder] = {}
        left: dict[str, str] = {}
        for job in sweep.jobs:
            folder = Folder(str(job.config.output.dir))
            name = folder.path.relative_to(target.runs).as_posix()
            if not folder.config.is_file():
                if name not in names:
                    left[job.name] = _UNFINISHED
            elif why := _why_not(folder, job):
                left[job.name] = why
            else:
                moving[name] = folder
                if name in names:
                    _check_alike(folder, sources[name])
                else:
                    sources[name] = Files(folder.path)
        if not sources:
            told = [f"{job}: {why}" for job, why in left.items() if why != _UNFINISHED]
            why = f"none of its runs can be packed: {told[0]}" if told else "none of its runs is finished"
            raise UserError("sweep.out", str(home.path), why, "Start the sweep without --pack first.")
        if len(sources) > len(names):
            target.write(sources)
        folders = {name: Folder(target.runs / name) for name in sources}
        for name, folder in folders.items():
            _remove(folder, Packed(target, name))
        here = [path for folder in folders.values() if folder.path.is_dir() for path in folder.path.iterdir()]
        others = collections.Counter(path.name for path in here if path.name != ".lock")
    before = len(names) - len(moving.keys() & set(names))
    return Packing(target, tuple(moving), before, left, dict(sorted(others.items())))


def unpack(sweep: Sweep | str | Path) -> Packing:
    """Moves the records in a sweep's pack back into the runs' folders, and removes the pack.

    `sweep` may be its file.

    Raises:
      UserError: there is no pack; or a run's records are in its folder too, and differ.
      NotWritten: the disk is full, or fails; the pack is still there.
    """
    home, source = _home(as_sweep(sweep))
    with home.drawn_into("unpacking it"), home.writing("sweep.out", AGAIN):
        names = source.names()
        if not names:
            raise UserError("sweep.out", str(home.path), "it has no packed runs", "Leave --unpack out.")
        for name in names:
            folder, packed = Folder(source.runs / name), Packed(source, name)
            if not folder.config.is_file():
                folder.path.mkdir(parents=True, exist_ok=True)
                with folder.claimed():
                    _write(folder.path, packed)
            _check_alike(folder, packed)
        source.about.unlink()  # without it there is no pack
        source.table.unlink()
    return Packing(source, tuple(names))


def _home(sweep: Sweep) -> tuple[Folder, Pack]:
    home = Folder(sweep.out)
    if not home.path.is_dir():
        raise UserError("sweep.out", str(home.path), "there is no such folder", "Run the sweep first.")
    return home, Pack(home.path / RUNS)


def _why_not(folder: Folder, job: Job) -> str:
    """Why the run in a folder is not packed; "" if it is."""
    try:
        if not folder.finished:
            return _UNFINISHED
        with folder.claimed():
            pass
        if differing := runs.differing(folder.path, job.config):
            return f"its folder holds a run of other settings: {'; '.join(differing[:3])}"
    except UserError as error:
        return error.why
    return ""


def _check_alike(folder: Folder, packed: packs.Records) -> None:
    """Raises UserError unless a folder holds the records that are packed."""
    if lost := packs.differing(Files(folder.path), packed):
        why = f"this run is in its folder and in the pack of its study, and they differ in their {lost}"
        raise UserError("run", str(folder.path), why, "Move the folder out of the study.")


def _remove(folder: Folder, packed: Packed) -> None:
    """Removes a folder's records if the pack has them, and the folder if nothing else is in it."""
    leaving = folder.path / _LEAVING
    if folder.config.is_file() or leaving.is_file():
        with folder.claimed():
            if folder.config.is_file():
                _check_alike(folder, packed)
                # From here on the pack counts. A process killed now leaves this name, and the next goes on.
                folder.config.rename(leaving)
            for name in (records.METRICS, records.TIMING, PROVENANCE, _LEAVING):
                (folder.path / name).unlink(missing_ok=True)
    if folder.path.is_dir() and not [path for path in folder.path.iterdir() if path.name != ".lock"]:
        (folder.path / ".lock").unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # the first parent that holds something else ends it
            for path in (folder.path, *folder.path.parents):
                path.rmdir()
                if path == packed.pack.runs:
                    break


def _write(path: Path, packed: Packed) -> None:
    """Writes a run's records into its folder; config.yaml comes last: with it the run is there."""
    table, _ = packed.read(packed.config().rounds)
    records.write_parquet(table, path / records.METRICS)
    for name, text in (
        (records.TIMING, records.timing(packed.laps())),
        (PROVENANCE, json.dumps(packed.provenance(), indent=2) + "\n"),
        (CONFIG, dump_yaml(packed.settings())),
    ):
        with paths.whole(path / name) as unfinished, unfinished.open("w") as file:
            file.write(text)
            paths.to_disk(file)
    (path / _LEAVING).unlink(missing_ok=True)
    packs.sync(path)
