"""Clients' own state on the host (`execution.client_state`): what rounds, checkpoints and memory cost.

    python scripts/benchmark/client_state.py both --clients 1000     # beside that on the devices, in turns
    python scripts/benchmark/client_state.py many --clients 100000   # on the host alone

Prints a Markdown table. LeNet (cnn8 with batch normalisation for fedbn), random images of 32×32×3, five for
each client, one step of five images, 100 clients a round. `many` runs each method in a process and a folder
of its own: after half of the rounds it is stopped by SIGTERM, and resumed. Memory is the process's own at the
most, without pages of files. The files have rows of those clients alone who took part in a round.
"""

import argparse
import contextlib
import dataclasses
import itertools
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rounds import equal, in_turn, noise, training

import fedjax_sim as fs
from fedjax_sim.engine.client_rows import ClientRows
from fedjax_sim.engine.client_state import ClientState
from fedjax_sim.runs.result import Terminated

EACH = 5
"""Images of a client."""

LENET = fs.ModelConfig("lenet")
METHODS: dict[str, tuple[Any, fs.ModelConfig]] = {
    "scaffold": (fs.algorithms.Scaffold(), LENET),
    "ditto": (fs.algorithms.Ditto(), LENET),
    "lips": (fs.algorithms.LIPS(), LENET),
    "fedper": (fs.algorithms.FedPer(), LENET),
    "fedbn": (fs.algorithms.FedBN(), fs.ModelConfig("cnn8", norm="batch")),
}


def fields(name: str, where: str) -> dict[str, Any]:
    """Of a run's configuration."""
    algorithm, model = METHODS[name]
    return {
        "algorithm": algorithm,
        "model": model,
        "local": fs.LocalConfig(epochs=None, steps=1, batch_size=EACH, lr=0.05),
        "cohort": fs.CohortConfig(size=100),
        "execution": fs.ExecutionConfig(client_state=where),  # pyright: ignore[reportArgumentType]
    }


def both(names: Sequence[str], clients: int, rounds: int) -> None:
    """Prints rounds with the state on the host beside those with it on the devices."""
    dataset = noise(50_000)
    partition = equal(dataset, clients, EACH)
    print("| method | on devices, ms | on the host, ms | ratio |\n|---|---:|---:|---:|")
    for name in names:
        runs = {where: training(dataset, partition, **fields(name, where)) for where in ("device", "host")}
        taken = in_turn(runs, rounds)
        device, host = (1000 * statistics.median(taken[where]) for where in ("device", "host"))
        print(f"| {name} | {device:.0f} | {host:.0f} | {host / device:.2f} |", flush=True)


NOTED: list[tuple[float, float]] = []
"""Of each round (when it ended, GiB of memory)."""


@dataclasses.dataclass(frozen=True)
class Watching:
    """A callback that notes rounds, and stops the run by SIGTERM after one.

    Attributes:
      until: that round.
    """

    until: int

    def on_round(self, number: int, rows: Any, run: Any) -> None:
        """See the class."""
        del rows, run
        told = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
        NOTED.append((time.perf_counter(), int(told["RssAnon"].split()[0]) / 2**20))
        if number == self.until:
            os.kill(os.getpid(), signal.SIGTERM)


def one(name: str, clients: int, rounds: int, folder: Path) -> None:
    """Prints the row of one method."""
    saving: list[float] = []
    snapshot, sizes = ClientState.snapshot, []

    def timed(self: ClientState, number: int, keep: int) -> Any:
        begun = time.perf_counter()
        made = snapshot(self, number, keep)
        saving.append(time.perf_counter() - begun)
        rows: ClientRows = self.rows
        sizes[:] = [rows.row_bytes / 2**10, rows.row_bytes * clients / 2**30]
        return made

    ClientState.snapshot = timed
    dataset = noise(50_000)
    partition, watching = equal(dataset, clients, EACH), Watching(rounds // 2)
    config = fs.RunConfig(
        rounds=rounds,
        evaluation=fs.EvaluationConfig(every=0),
        output=fs.OutputConfig(
            str(folder), checkpoint_every=0, tensorboard=False, figures=False, progress=False
        ),
        **fields(name, "host"),
    )
    with contextlib.suppress(Terminated):
        fs.run(config, dataset=dataset, partition=partition, callbacks=[watching])
    fs.resume(folder, dataset=dataset, callbacks=[watching])
    on_disk = sum(path.stat().st_blocks * 512 for path in (folder / "clients").iterdir()) / 2**30
    ends, memory = zip(*NOTED, strict=True)
    taken = 1000 * statistics.median(later - end for end, later in itertools.pairwise(ends))
    print(
        f"| {name} | {sizes[0]:.0f} | {sizes[1]:.1f} | {taken:.0f} | {max(saving):.1f} | {max(memory):.1f} | "
        f"{on_disk:.1f} |",
        flush=True,
    )


def many(names: Sequence[str], clients: int, rounds: int) -> None:
    """Prints a row for each method, which has a process of its own."""
    print(
        "| method | a client's state, KiB | of all, GiB | a round, ms | a checkpoint, s | memory, GiB | "
        "files, GiB |\n|---|---:|---:|---:|---:|---:|---:|",
        flush=True,
    )
    for name in names:
        home = Path(tempfile.mkdtemp())
        words = [sys.executable, __file__, "one", "--methods", name, "--folder", str(home / "run")]
        try:
            subprocess.run([*words, "--clients", str(clients), "--rounds", str(rounds)], check=True)
        finally:
            shutil.rmtree(home)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["both", "many", "one"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--clients", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--folder", type=Path, help="for `one`")
    told = parser.parse_args()
    if told.part == "both":
        both(told.methods, told.clients, told.rounds)
    elif told.part == "many":
        many(told.methods, told.clients, told.rounds)
    else:
        one(told.methods[0], told.clients, told.rounds, told.folder)


if __name__ == "__main__":
    main()
