"""A run's folder: its paths, its checks, and the lock that keeps a second process out."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedjax_sim.core import paths
from fedjax_sim.core.errors import NotWritten, UserError
from fedjax_sim.runs import packs
from fedjax_sim.runs.packs import Files, Packed, Records


@dataclasses.dataclass(frozen=True)
class Stopped:
    """Why a run ended before the last of its rounds.

    Attributes:
      round: its last one, from 1.
      by: the callback that stopped it.
      reason: in its words.
    """

    round: int
    by: str
    reason: str

    def __str__(self):
        return f"stopped after round {self.round} by {self.by}" + (f": {self.reason}" if self.reason else "")


def missing(path: Path) -> list[Path]:
    """Of a folder and those that it lies in, which are not there, the innermost first."""
    return [folder for folder in (path, *path.parents) if not folder.exists()]


def remove_empty(folders: Sequence[Path]) -> None:
    """Removes folders in this order, up to the first that holds something."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def locked(path: Path) -> bool:
    """Whether a process that this one can see holds a file's lock; False where the system does not tell."""
    try:
        inode, locks = path.stat().st_ino, Path("/proc/locks").read_text().splitlines()
    except OSError:
        return False
    return any(
        part.rpartition(":")[2] == str(inode) for line in locks for part in line.split() if ":" in part
    )


def _system() -> str:
    """This boot of this machine, and the processes that can be seen here; "" where the system does not tell.

    Where two processes have the same, each finds the other's lock in /proc/locks.
    """
    try:
        Path("/proc/locks").read_text()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


class Folder:
    """The folder of one run.

    Attributes:
      path: absolute.

    Raises:
      UserError: the path is an address, see `fedjax_sim.core.paths`.
    """

    def __init__(self, path: str | Path):
        self.path = paths.local(path, "folder").absolute()

    @property
    def config(self) -> Path:
        """Every setting; not there if the run's records are packed."""
        return self.path / packs.CONFIG

    @property
    def partition(self) -> Path:
        """Who holds which samples."""
        return self.path / "partition.json"

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints lie."""
        return self.path / "checkpoints"

    @property
    def clients(self) -> Path:
        """Where clients' own state lies, if it does so on the host; checkpoints say which of it is whose."""
        return self.path / "clients"

    @property
    def best(self) -> Path:
        """Where the model lies that was kept as the best, a checkpoint without a state."""
        return self.path / "best"

    @property
    def records(self) -> Records:
        """What the run recorded, in this folder or in the pack of its study (`fedjax_sim.runs.packs`)."""
        return self.packed or Files(self.path)

    @property
    def packed(self) -> Packed | None:
        """The run's records in a pack; None if they lie in this folder, or nowhere."""
        return None if self.config.is_file() else packs.find(self.path)

    @property
    def started(self) -> bool:
        """Whether a run has begun here."""
        return self.config.is_file() or self.packed is not None

    @property
    def finished(self) -> bool:
        """Whether the run that is here is `done`."""
        return self.started and self.done(self.records.config().rounds)

    @property
    def run_again(self) -> str:
        """What a user does to have the model of a run of which only the records were kept."""
        if self.packed is None:
            return "Run its config.yaml again in another folder."
        return "Its records are packed: run that run of its study again, in another folder."

    def done(self, rounds: int) -> bool:
        """Whether the table, which is written last, reaches the end of a run of so many rounds."""
        return self.records.reached() >= self.end(rounds)

    def end(self, rounds: int) -> int:
        """The last round of a run of so many: that in which it was stopped, if it was."""
        stopped = self.stopped
        return rounds if stopped is None else stopped.round

    @property
    def stopped(self) -> Stopped | None:
        """Why the run ended early, by its provenance; None if it did not."""
        try:
            told = self.records.provenance().get("stopped")
        except UserError:  # of which whoever reads it for itself will say more
            return None
        return None if told is None else Stopped(**told)

    @property
    def failure(self) -> str:
        """What ended the last start of an unfinished run, such as a divergence; "" if nothing is known."""
        try:
            return str(self.records.provenance().get("failure", ""))
        except UserError:  # see `stopped`
            return ""

    def write_failure(self, told: str) -> None:
        """Writes down what ended the run; "": it goes on."""
        about = self.records.provenance()
        if about.get("failure", "") != told:
            about.pop("failure", None)
            self.write_provenance(about | ({"failure": told} if told else {}))

    def write_stopped(self, stopped: Stopped | None) -> None:
        """Writes down that the run has ended early, or that it has not."""
        about = self.records.provenance()
        about.pop("stopped", None)
        if stopped is not None:
            about["stopped"] = dataclasses.asdict(stopped)
        self.write_provenance(about)

    def write_provenance(self, about: Mapping[str, Any]) -> None:
        """Writes provenance.json."""
        self.write("provenance.json", json.dumps(about, indent=2) + "\n")

    def check_new(self) -> None:
        """Makes the folder, for a new run.

        Raises:
          UserError: it holds something, or cannot be written.
        """
        if self.started:
            state = "finished" if self.finished else "unfinished"
            if packed := self.packed:
                fix = f"Choose another output.dir. The run's records are in {packed.pack.about}."
            elif self.finished:
                fix = "Choose another output.dir, or remove the folder."
            else:
                fix = f"Continue it (fedjax-sim resume {self.path}), or choose another output.dir."
            raise UserError("output.dir", str(self.path), f"it already holds a run ({state})", fix)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # A run that died before its config.yaml leaves only these.
            ours = {".lock", "partition.json", "provenance.json"}
            names = sorted(entry.name for entry in self.path.iterdir())
            held = [name for name in names if name not in ours and not name.endswith(".part")]
            probe = self.path / ".lock"
            probe.touch()
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NotWritten.of("output.dir", str(self.path), error, "start it again") from None
            raise UserError(
                "output.dir",
                str(self.path),
                f"it cannot be written: {error.strerror or error}",
                "Choose a folder that you may write to.",
            ) from None
        if held:
            raise UserError(
                "output.dir",
                str(self.path),
                f"the folder is not empty (it has {held[0]}) and holds no run",
                "Choose a new folder.",
            )

    @contextlib.contextmanager
    def refused_without_trace(self) -> Iterator[None]:
        """A new run starts inside: where it does not come to begin, the folders that it made go again."""
        made = missing(self.path)
        try:
            yield
        except BaseException:
            if made and self.path.is_dir() and not self.started:
                with contextlib.suppress(OSError, UserError), self.claimed():
                    if all(entry.name == ".lock" for entry in self.path.iterdir()):
                        (self.path / ".lock").unlink()
                remove_empty(made)
            raise

    def check_seen(self) -> None:
        """Raises UserError unless the folder is there: on another host it may not be."""
        if not self.path.is_dir():
            why = "this host does not see the folder that the first one made"
            fix = "Choose a folder on a file system that all hosts share."
            raise UserError("output.dir", str(self.path), why, fix)

    def check_run(self) -> None:
        """Raises UserError unless a run is here."""
        if not self.started:
            why = "there is no such folder" if not self.path.is_dir() else "it holds no run (no config.yaml)"
            raise UserError("folder", str(self.path), why, "Give the output.dir of a run.")

    @contextlib.contextmanager
    def claimed(self, *, to_run: bool = False) -> Iterator[None]:
        """Holds the folder for this process; the system lets go of it however the process ends.

        Args:
          to_run: the run goes on here: `.lock` says in which system, for who looks later (`ended_here`).

        Raises:
          UserError: another process has it.
        """
        try:
            file = (self.path / ".lock").open("a")  # another's line stays until the lock is ours
        except OSError as error:
            raise UserError(
                "folder", str(self.path), f"it cannot be written: {error.strerror}", "Make it writable."
            ) from None
        with file:
            held = self._lock(file.fileno(), "another process is running here")
            if to_run:
                with contextlib.suppress(OSError):
                    file.truncate(0)
                    file.write(_system() if held else "")
                    file.flush()
            yield

    @property
    def ended_here(self) -> bool:
        """Whether the process that ran here last did so in this system, and has ended, as far as is known."""
        try:
            told = (self.path / ".lock").read_text()
        except OSError:
            return False
        return bool(told) and told == _system() and not locked(self.path / ".lock")

    @contextlib.contextmanager
    def drawn_into(self, doing: str = "drawing into it") -> Iterator[None]:
        """Holds a folder of figures and tables for this process, without a file of its own in there.

        Raises:
          UserError: another process draws into it; `doing` says in the message what that process does.
        """
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            self._lock(descriptor, f"another process is {doing}")
            yield
        finally:
            os.close(descriptor)

    def _lock(self, descriptor: int, why: str) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            raise UserError("folder", str(self.path), why, "Wait for it, or end it.") from None
        except OSError:
            return False  # a file system without locks: nothing to hold

    def write(self, name: str, text: str) -> None:
        """Writes a file in one go, whoever else does."""
        with paths.whole(self.path / name, f".{os.getpid()}") as unfinished:
            unfinished.write_text(text)

    @contextlib.contextmanager
    def writing(self, field: str = "output.dir", then: str = "") -> Iterator[None]:
        """Files of the folder are written inside.

        Args:
          field: to name in the message.
          then: what to do once they can be written again; by default continue the run, or start it again.

        Raises:
          NotWritten: they cannot be.
        """
        try:
            yield
        except OSError as error:
            way = then or (
                f"continue with: fedjax-sim resume {self.path}" if self.started else "start it again"
            )
            raise NotWritten.of(field, str(self.path), error, way) from error
