"""Clients' own state in files of a run's folder, mapped into memory: chunks for `engine.client_rows`.

A chunk's room is taken on the disk before it is used: a full disk is an error then, and not a signal that
ends the process when a row is written.
"""

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fedjax_sim.engine import hosts
from fedjax_sim.engine.client_rows import Chunks
from fedjax_sim.engine.simulation import Simulation
from fedjax_sim.runs.checkpoint import Checkpoints
from fedjax_sim.runs.folder import Folder


def begin(simulation: Simulation, folder: Folder) -> None:
    """Has a simulation that starts with its first round keep clients' state there, if it lies on the host."""
    if simulation.client_state is not None:
        hosts.on_first(lambda: shutil.rmtree(folder.clients, ignore_errors=True))
        simulation.client_state.use_chunks(mapped(folder.clients))


def of_run(
    simulation: Simulation, checkpoints: Checkpoints, folder: Folder, *, look: bool = False
) -> Callable[[int], None]:
    """Has a simulation that goes on keep clients' state in its run's folder, if it lies on the host.

    Args:
      simulation: at its start.
      checkpoints: of the run.
      folder: of the run.
      look: its files are left as they are.

    Returns:
      Reads that state as it was after a round, for `Checkpoints.restore`.
    """
    held = simulation.client_state
    if held is None:
        return lambda number: None
    held.use_chunks((mapped_to_look if look else mapped)(folder.clients))

    def load(number: int) -> None:
        # The others stay as they are: one of them may be wanted if this one is damaged.
        snapshots = {number: checkpoints.clients(number)}
        for other in checkpoints.rounds():
            with contextlib.suppress(Exception):
                snapshots.setdefault(other, checkpoints.clients(other))
        held.load(number, {name: one for name, one in snapshots.items() if one is not None})

    return load


def mapped(folder: Path) -> Chunks:
    """Chunks that lie in a folder, made with the first one.

    Each raises OSError where it cannot be made, or is another process's and not there, and ValueError where
    it is there with another size.
    """

    def chunk(number: int, shape: tuple[int, int], own: bool) -> np.ndarray:
        path, size = _path(folder, number), shape[0] * shape[1]
        if own and not path.exists():
            folder.mkdir(exist_ok=True)
            _take(path, size)
        _check(path, size)
        return np.memmap(path, np.uint8, "r+" if own else "r", shape=shape)

    return chunk


def mapped_to_look(folder: Path) -> Chunks:
    """The same, of files that are left as they are whatever is written."""

    def chunk(number: int, shape: tuple[int, int], own: bool) -> np.ndarray:
        path = _path(folder, number)
        if own and not path.exists():
            return np.zeros(shape, np.uint8)  # for rows that are new
        _check(path, shape[0] * shape[1])
        return np.memmap(path, np.uint8, "c", shape=shape)

    return chunk


def _path(folder: Path, number: int) -> Path:
    return folder / f"rows-{number:05d}"


def _check(path: Path, size: int) -> None:
    there = path.stat().st_size
    if there != size:
        raise ValueError(f"{path.name} has {there:,} bytes instead of {size:,}")


def _take(path: Path, size: int) -> None:
    unfinished = path.with_name(f"{path.name}.unfinished")
    with open(unfinished, "wb") as file:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                for start in range(0, size, 2**20):
                    file.write(bytes(min(2**20, size - start)))
        except OSError:
            unfinished.unlink(missing_ok=True)
            raise
    unfinished.rename(path)
