"""What the results were measured on, and how quiet it was. Standard library only."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path


def describe() -> dict[str, object]:
    """CPU model, cores this process may use, memory in GiB, operating system."""
    return {
        "cpu": _cpu_model(),
        "cores": cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }


def cores() -> int:
    """Number of cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return platform.processor() or "unknown"


def load_warning(limit: float = 0.25) -> str | None:
    """A line of warning if the load average of the last minute is above `limit` of the cores."""
    load = os.getloadavg()[0]
    if load <= limit * cores():
        return None
    return f"the machine is not quiet: load average {load:.2f} on {cores()} cores; the figures will mislead"


def _busy_seconds() -> float | None:
    """CPU seconds that all processes of the machine have used; None where that is not told."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, _idle, _wait, irq, soft, *_ = (
        float(x) for x in stat.read_text().splitlines()[0].split()[1:]
    )
    return (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    """CPU seconds of this process and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


@dataclass
class Neighbours:
    """How much of the machine other processes used while a child of ours ran.

    Start it before the child, and call `share()` once the child has been waited for. A child whose own
    children outlive it (Ray's) makes the figure too high.
    """

    def __post_init__(self) -> None:
        self._wall, self._busy, self._own = time.perf_counter(), _busy_seconds(), _own_seconds()

    def share(self) -> float | None:
        """Between 0 (we were alone) and 1 (all cores were busy with others); None where unknown."""
        busy = _busy_seconds()
        if busy is None or self._busy is None:
            return None
        others = (busy - self._busy) - (_own_seconds() - self._own)
        return round(max(others, 0.0) / ((time.perf_counter() - self._wall) * cores()), 3)
