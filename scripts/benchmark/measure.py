"""The part of a runner that is not the framework: arguments, clock, memory, and the one JSON line it prints.

Standard library and NumPy only; runs in each peer's own environment.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import sys
import time
from pathlib import Path

from common import ALL, Workload

_BORN = time.perf_counter()
MARK = "BENCHMARK "
"""Starts the line that holds the result; frameworks print lines of their own."""


def arguments(description: str | None, argv: list[str] | None = None) -> tuple[argparse.Namespace, Workload]:
    """The options that all runners share, and the workload they name.

    `--threads` is the width of an operation and `--devices` the number of parallel workers (devices of a
    JAX client, processes or actors elsewhere); a runner takes those that it has a use for.
    """
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--workload", required=True, choices=list(ALL))
    parser.add_argument("--rounds", type=int, default=None, help="timed rounds (default: the workload's)")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before the timed ones, at least 1")
    parser.add_argument("--threads", type=int, default=1, help="threads in one operation")
    parser.add_argument("--devices", type=int, default=1, help="workers side by side")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--device", choices=("cpu", "gpu"), default="cpu", help="gpu: the first that is there"
    )
    parser.add_argument(
        "--precision", choices=("float32", "tf32"), default="float32", help="of products and convolutions"
    )
    args = parser.parse_args(argv)
    workload = ALL[args.workload]
    args.rounds = workload.rounds if args.rounds is None else args.rounds
    for name in ("rounds", "warmup", "threads", "devices"):
        if getattr(args, name) < 1:
            parser.error(f"argument --{name}: {getattr(args, name)} is less than 1; give 1 or more")
    if args.device == "cpu":  # read when a framework first looks for a device, which is later
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}
    return args, workload


class Clock:
    """Wall-clock of each round: `start()` just before the first, `tick()` when a round's result is there."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.setup_seconds = 0.0
        self.setup_rss_mb = 0.0
        self._last = 0.0

    def start(self) -> None:
        """Ends the set-up (imports, data, model) and starts the first round."""
        self.setup_rss_mb = peak_rss_mb()
        self._last = time.perf_counter()
        self.setup_seconds = self._last - _BORN

    def tick(self) -> None:
        """Ends a round and starts the next."""
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now


def peak_rss_mb(root: int | None = None) -> float:
    """Peak resident memory in MiB: of this process, or of process `root` with all that live below it.

    A sum over processes counts the pages they share more than once. Needs /proc for a tree of processes;
    elsewhere it gives this process alone.
    """
    if root is None or not Path("/proc/self/status").exists():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**20 if sys.platform == "darwin" else 2**10)
    parents: dict[int, int] = {}
    peaks: dict[int, int] = {}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        except OSError:  # ended between the listing and the reading
            continue
        process = int(status.parent.name)
        parents[process] = int(fields["PPid"])
        peaks[process] = int(fields.get("VmHWM", "0 kB").split()[0])
    family = {root}
    while grown := {child for child, parent in parents.items() if parent in family} - family:
        family |= grown
    return sum(peaks.get(process, 0) for process in family) / 2**10


def versions(*packages: str) -> dict[str, str]:
    """The installed version of each package, with that of Python."""
    return {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in packages}}


def report(
    args: argparse.Namespace,
    workload: Workload,
    clock: Clock,
    *,
    loss_of_start: float,
    loss_at_end: float,
    parameters: int,
    packages: tuple[str, ...],
    process_tree: int | None = None,
    **details: object,
) -> None:
    """Prints the runner's JSON line.

    Args:
      args: the runner's arguments.
      workload: what it ran.
      clock: one entry for each round, warm-up rounds first.
      loss_of_start: held-out cross-entropy of the initial weights; equal over frameworks.
      loss_at_end: that of the model after the last round.
      parameters: the model's parameter count as the framework counts it.
      packages: whose versions to record.
      process_tree: where a framework works in several processes, the id of the one above them all.
      **details: what else should be known about this run.

    Raises:
      RuntimeError: the model has another size, a round is missing, or training did not lower the loss.
    """
    if parameters != workload.parameters:
        raise RuntimeError(
            f"the model has {parameters} parameters, {workload.name} has {workload.parameters}"
        )
    if len(clock.seconds) != args.warmup + args.rounds:
        raise RuntimeError(f"{len(clock.seconds)} rounds were clocked, not {args.warmup + args.rounds}")
    if not loss_at_end < loss_of_start:
        raise RuntimeError(f"held-out loss went from {loss_of_start} to {loss_at_end}: nothing was learnt")
    line = {
        "workload": workload.name,
        "seconds": [round(s, 6) for s in clock.seconds[args.warmup :]],
        "warmup_seconds": [round(s, 6) for s in clock.seconds[: args.warmup]],
        "setup_seconds": round(clock.setup_seconds, 3),
        "setup_rss_mb": round(clock.setup_rss_mb, 1),
        "peak_rss_mb": round(peak_rss_mb(process_tree), 1),
        "loss_of_start": round(float(loss_of_start), 5),
        "loss_at_end": round(float(loss_at_end), 5),
        "parameters": parameters,
        "threads": args.threads,
        "devices": args.devices,
        "cores": os.cpu_count(),
        "versions": versions(*packages),
        **details,
    }
    print(MARK + json.dumps(line), flush=True)


def parse(stdout: str) -> dict:
    """The JSON line among what a runner printed.

    Raises:
      ValueError: there is none.
    """
    for line in reversed(stdout.splitlines()):
        if line.startswith(MARK):
            return json.loads(line.removeprefix(MARK))
    raise ValueError("the runner printed no result")
