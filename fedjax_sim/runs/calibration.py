"""Which layout is fastest on this machine: measured once, kept in a file, and taken by runs that begin later.

The width of a wave and the implementation of the convolution change speed, and results by rounding only.
Their defaults (`fedjax_sim.engine.placement.speed_defaults`) were measured on other machines. `measured`
times the alternatives here; what came of it is kept for this processor, these versions and such shapes.

A run that begins takes what is kept for it, the first of several processes for all. Where that is not the
default, its configuration says so from then on, in its folder too. A run that goes on asks nothing: it has
the layout of its configuration, whatever is kept by then, and so the bits of one that was never cut.

The default is left only for what was faster by a clear margin: by a median of the turns of at most `CLEAR` of
its time, and faster in `MOST_TURNS` of them. Convolutions that round more coarsely are not tried.
"""

import dataclasses
import datetime
import functools
import json
import math
import os
import re
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from fedjax_sim.config import ExecutionConfig, RunConfig
from fedjax_sim.core import paths
from fedjax_sim.core.conv_impl import CONV_IMPLS
from fedjax_sim.core.model import Model
from fedjax_sim.core.task import Task
from fedjax_sim.core.versions import installed
from fedjax_sim.engine import cohorts, hosts, placement, step_times, waves
from fedjax_sim.engine.step_times import Layout, Timing
from fedjax_sim.runs import provenance
from fedjax_sim.runs.parts import available

CLEAR, MOST_TURNS = 0.92, 0.75
"""See above."""

SECONDS = 30.0
"""That measuring takes, roughly."""

_VERSION = 1
_VERSIONS = ("jaxlib", "fedjax-sim")


@dataclasses.dataclass(frozen=True)
class Case:
    """What a layout is chosen for.

    Attributes:
      model: the network.
      task: what is learned.
      config: of the run.
      counts: i64[N], training samples of each client.
      mesh: the devices.
    """

    model: Model
    task: Task
    config: RunConfig
    counts: np.ndarray
    mesh: Mesh

    @property
    def cohort_size(self) -> int:
        """K."""
        return self.config.cohort.count(len(self.counts))

    @functools.cached_property
    def layouts(self) -> tuple[Layout, ...]:
        """The default, then the others."""
        work = waves.Work.of(self.counts, self.config.local, self.model.num_params())
        return step_times.layouts(self.config.execution, self.model, self.cohort_size, self.mesh, work)

    @functools.cached_property
    def uneven(self) -> bool:
        """Whether clients differ in steps, or have a last batch that is not full."""
        steps = waves.steps_of(self.counts, self.config.local)
        return len(np.unique(steps)) > 1 or bool(np.any(self.counts % self.config.local.batch_size))

    @functools.cached_property
    def key(self) -> dict[str, Any]:
        """What a measurement holds for: this machine, these versions, and what its time goes by."""
        cpu, execution, local = provenance.hardware()["cpu"], self.config.execution, self.config.local
        shapes = jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), self.model.abstract)
        module = re.sub(r" at 0x[0-9a-f]+", "", repr(self.model.module))
        structure = f"{module} {shapes} {self.model.products} {local.optimizer}"
        return {
            "processor": cpu["model"],
            "cores": cpu["cores"],
            "device": self.mesh.devices.flat[0].device_kind,
            "devices": len(self.mesh.local_devices),
            **{name: installed(name) for name in _VERSIONS},
            "model": f"{self.model.name} {zlib.crc32(structure.encode()):08x}",
            "samples": {name: f"{s.dtype}{list(s.shape)}" for name, s in self.task.spec.items()},
            "batch_size": local.batch_size,
            "cohort_size": self.cohort_size,
            "uneven": self.uneven,
            "wave": execution.wave,
            "conv": execution.conv,
        }

    def work(self, wave: int) -> float:
        """Steps times lanes, empty ones too, of the device that has most of them; a mean over some rounds."""
        config = self.config
        steps = waves.steps_of(self.counts, config.local)
        draw = cohorts.sampler(config.cohort, self.counts, config.rounds, config.seed)
        plans = [waves.make_plan(steps[draw(r)], self.mesh.size, wave) for r in range(min(config.rounds, 5))]
        of_devices = [plan.wave_steps.reshape(self.mesh.size, -1).sum(1).max() for plan in plans]
        return float(np.mean(of_devices)) * wave


# --- what is kept -------------------------------------------------------------------------------------


def file() -> Path | None:
    """Where measurements are kept: in the user's cache folder, or at `FEDJAX_SIM_CALIBRATION`; None: nowhere.

    Nowhere is what an empty `FEDJAX_SIM_CALIBRATION` says.
    """
    return paths.kept("FEDJAX_SIM_CALIBRATION", "calibration.json")


def find(case: Case) -> dict[str, Any] | None:
    """What is kept for a case; None if nothing is.

    Warns of a file that cannot be read, and of a measurement that other versions made.
    """
    path = file()
    entries = [] if path is None else _read(path)
    for entry in entries:
        if entry["key"] == case.key:
            return entry
    lasting = {name: value for name, value in case.key.items() if name not in _VERSIONS}
    for entry in entries:
        if lasting.items() <= entry["key"].items():
            of = ", ".join(f"{name} {entry['key'].get(name)}" for name in _VERSIONS)
            told = f"what was measured on this machine ({path}) is of {of}, and is not used"
            warnings.warn(f"{told}. Measure again: fedjax-sim tune-machine", stacklevel=2)
            break
    return None


def keep(entry: dict[str, Any]) -> Path | None:
    """Puts a measurement in the place of what is kept for its case. -> the file; None if nothing is kept.

    Measurements of other versions of that case are dropped.
    """
    path = file()
    if path is None:
        return None

    def lasting(entry: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in entry["key"].items() if name not in _VERSIONS}

    others = [other for other in _read(path) if lasting(other) != lasting(entry)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with paths.whole(path, f".{os.getpid()}") as unfinished:
        unfinished.write_text(json.dumps({"version": _VERSION, "entries": [*others, entry]}, indent=1) + "\n")
    return path


def forget() -> Path | None:
    """Removes the file. -> it; None if there is none."""
    path = file()
    if path is None or not path.is_file():
        return None
    path.unlink()
    return path


def _read(path: Path) -> list[dict[str, Any]]:
    """The measurements in a file; none if it is not there, or is not such a file, which is told."""
    try:
        content = json.loads(path.read_text())
        if content["version"] == _VERSION and all(map(_is_sound, content["entries"])):
            return content["entries"]
        why = f"it is no file of version {_VERSION} of them"
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"{type(error).__name__}: {error}"
    told = f"what was measured on this machine ({path}) cannot be read, and is not used ({why})"
    warnings.warn(f"{told}. Remove it: fedjax-sim tune-machine --forget", stacklevel=2)
    return []


def _is_sound(entry: Any) -> bool:
    timings = [Timing(Layout(**t["layout"]), t["seconds"], tuple(t["ratios"])) for t in entry["timings"]]
    return (
        isinstance(entry["key"], dict)
        and isinstance(entry["date"], str)
        and all(isinstance(t.layout.wave, int) and t.layout.wave > 0 for t in timings)
        and all(t.layout.conv in ("auto", *CONV_IMPLS) for t in timings)
        and all(len(t.ratios) > 0 and math.isfinite(sum((*t.ratios, t.seconds))) for t in timings)
    )


# --- measured and chosen ------------------------------------------------------------------------------


def measured(
    case: Case,
    seconds: float = SECONDS,
    make: Callable[[Layout], Callable[[int], Any] | None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Times a case's layouts here and now: an entry for `keep`, JSON as it stands.

    Args:
      case: of one process.
      seconds: how long it takes, roughly.
      make: see `fedjax_sim.engine.step_times.timings`; None: the real steps.
      clock: likewise.
    """
    if make is None:
        room = available(placement.platform_of(case.mesh))
        if room is not None:  # half of it: what a round holds besides is not known here
            room //= 2 * (case.mesh.size if placement.platform_of(case.mesh) == "cpu" else 1)
        local = case.config.local
        make = step_times.step_of(case.model, case.task, local, case.mesh, uneven=case.uneven, room=room)
    found = step_times.timings(case.layouts, make, seconds, clock)
    date = datetime.date.today().isoformat()
    timings = [{**dataclasses.asdict(timing), "ratios": list(timing.ratios)} for timing in found]
    return {"key": case.key, "date": date, "timings": timings}


def judged(case: Case, entry: Mapping[str, Any]) -> tuple[Layout, dict[Layout, tuple[float, ...]]]:
    """The layout to take, and each one's time over the default's, turn by turn, of a round's local training.

    A wave lasts as long as its largest client: what that costs is counted by the run's own clients.
    """
    timings = [Timing(Layout(**t["layout"]), t["seconds"], tuple(t["ratios"])) for t in entry["timings"]]
    default = best = case.layouts[0]
    if not timings or timings[0].layout != default:  # of a mesh on which another is the default
        return default, {}
    ratios, least = {}, 1.0
    for timing in timings:
        layout = timing.layout
        if layout.wave > -(-case.cohort_size // case.mesh.size):
            continue
        more = case.work(layout.wave) / case.work(default.wave)
        ratios[layout] = turns = tuple(ratio * more for ratio in timing.ratios)
        median = float(np.median(turns))
        clear = len(turns) >= step_times.LEAST and np.mean(np.asarray(turns) < 1) >= MOST_TURNS
        if clear and median <= CLEAR and median < least:
            best, least = layout, median
    return best, ratios


def applied(case: Case) -> tuple[ExecutionConfig, dict[str, Any] | None]:
    """What a run that begins is told of its layout, and a record of where that comes from.

    Args:
      case: the run. All its processes call this, and have what the first finds.

    Returns:
      (the configuration, with `wave` and `conv` where a measurement may choose them and does not choose the
      default; the record, None where there is no measurement).
    """
    execution = case.config.execution
    if execution.calibration == "ignore" or len(case.layouts) == 1:
        return execution, None
    if execution.calibration == "use" and placement.platform_of(case.mesh) != "cpu":
        return execution, None
    entry = hosts.on_first(lambda: find(case))
    if entry is None and execution.calibration == "make" and jax.process_count() == 1:
        if case.config.output.progress:
            told = f"measuring which layout is fastest on this machine, once: about {SECONDS:.0f} s"
            print(told, file=sys.stderr, flush=True)
        entry = measured(case)
        keep(entry)
    if entry is None:
        return execution, None
    layout, ratios = judged(case, entry)
    record = {
        **{"date": entry["date"], "default": dataclasses.asdict(case.layouts[0])},
        "chosen": dataclasses.asdict(layout),
        "of_its_time": round(float(np.median(ratios.get(layout, (1.0,)))), 3),
    }
    return with_layout(case, layout), record


def with_layout(case: Case, layout: Layout) -> ExecutionConfig:
    """The configuration that says a layout; as it was, if that is the default."""
    execution = case.config.execution
    if layout == case.layouts[0]:
        return execution
    conv = layout.conv if case.model.convolves else execution.conv
    return dataclasses.replace(execution, wave=layout.wave, conv=conv)
