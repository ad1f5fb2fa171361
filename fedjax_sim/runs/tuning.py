"""`fedjax-sim tune-machine`: measures which layout is fastest here for a configuration, and keeps it.

Layouts of a started process are compared in it, see `fedjax_sim.runs.calibration`. How many devices JAX makes
of a CPU is fixed when it starts: other numbers of them, down to one that has all cores as threads, are tried
by a process each, and the result is only a recommendation.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import numpy as np

from fedjax_sim import config as config_lib
from fedjax_sim.config import RunConfig
from fedjax_sim.core.errors import UserError
from fedjax_sim.engine import placement, step_times
from fedjax_sim.engine.setup import Setup
from fedjax_sim.engine.step_times import Layout
from fedjax_sim.runs import calibration
from fedjax_sim.runs.assemble import prepare
from fedjax_sim.runs.calibration import CLEAR, SECONDS, Case

_TURN = 0.2
"""Seconds of a turn of a number of devices, roughly."""


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What was found. `print` it.

    Attributes:
      key: what it holds for.
      default: the layout without it.
      chosen: the layout of runs that begin from now on.
      milliseconds: layout -> a step of one client, on a device among all that work.
      ratios: layout -> its time over the default's, turn by turn, of a round's local training.
      left_out: layouts that were not measured: no time was left, or they would be too large or far slower.
      devices: number of CPU devices -> its time over that of the number that is here, turn by turn.
      file: where it is kept; None: nowhere.
    """

    key: Mapping[str, Any]
    default: Layout
    chosen: Layout
    milliseconds: Mapping[Layout, float]
    ratios: Mapping[Layout, tuple[float, ...]]
    left_out: tuple[Layout, ...]
    devices: Mapping[int, tuple[float, ...]]
    file: Path | None

    @property
    def best_devices(self) -> int:
        """The number of CPU devices to start JAX with: that of this process, unless one is clearly faster."""
        found, least = self.key["devices"], CLEAR
        for count, turns in self.devices.items():
            if np.median(turns) <= least and np.mean(np.asarray(turns) < 1) >= calibration.MOST_TURNS:
                found, least = count, float(np.median(turns))
        return found

    def __str__(self):
        of = self.key
        samples = ", ".join(f"{name} {shape}" for name, shape in of["samples"].items())
        return "\n".join(
            [
                f"{of['processor']}, {of['cores']} core(s), {of['devices']} device(s), jaxlib {of['jaxlib']}",
                f"{of['model']}, {samples}, batch {of['batch_size']}, {of['cohort_size']} clients a round",
                "",
                "wave  conv       ms a step of a client   of the default's time   turns",
                *map(self._line, self.ratios),
                *(f"{one.wave:4}  {one.conv:10} not measured" for one in self.left_out),
                "",
                f"The default stays: nothing else takes at most {CLEAR} of its time."
                if self.chosen == self.default
                else f"Such runs will have execution.wave = {self.chosen.wave}, conv = {self.chosen.conv}.",
                *(f"{n} CPU device(s): {_told(turns)} of the time" for n, turns in self.devices.items()),
                *self._advice(),
                f"kept in {self.file}" if self.file else "kept nowhere: FEDJAX_SIM_CALIBRATION is empty",
            ]
        )

    def _line(self, layout: Layout) -> str:
        turns = self.ratios[layout]
        mark = " <- chosen" if layout == self.chosen else " (default)" * (layout == self.default)
        times = f"{self.milliseconds[layout]:21.3f}   {_told(turns):21}   {len(turns):5}"
        return f"{layout.wave:4}  {layout.conv:10} {times}{mark}"

    def _advice(self) -> list[str]:
        now, best = self.key["devices"], self.best_devices
        if not self.devices:
            return []
        if best == now:
            return [f"{now} CPU device(s), as now, is a good number here."]
        return [f"Set JAX_NUM_CPU_DEVICES={best} before starting; a started process cannot change it."]

    def to_json(self) -> str:
        """All of it, as one object."""
        layouts = [
            {
                **dataclasses.asdict(layout),
                "milliseconds": self.milliseconds[layout],
                "of_the_default": float(np.median(turns)),
                "turns": list(turns),
            }
            for layout, turns in self.ratios.items()
        ]
        told = {
            "key": dict(self.key),
            "default": dataclasses.asdict(self.default),
            "chosen": dataclasses.asdict(self.chosen),
            "layouts": layouts,
            "left_out": [dataclasses.asdict(layout) for layout in self.left_out],
            "devices": {str(count): list(turns) for count, turns in self.devices.items()},
            "best_devices": self.best_devices,
            "file": None if self.file is None else str(self.file),
        }
        return json.dumps(told, indent=2)


def _told(turns: tuple[float, ...]) -> str:
    """Median and range."""
    if len(turns) == 1:
        return f"{turns[0]:.2f}"
    return f"{np.median(turns):.2f} ({min(turns):.2f}-{max(turns):.2f})"


def tune(config: RunConfig, *, seconds: float = SECONDS, devices: bool = True) -> Tuning:
    """Measures what is fastest here for runs like `config`, and keeps it for those that begin later.

    Args:
      config: what is to be run; `execution.wave` and `execution.conv` are kept where it says them.
      seconds: how long comparing layouts takes, roughly.
      devices: other numbers of CPU devices are tried too, unless the configuration or XLA_FLAGS say one; they
        take about as long again, most of it to start.

    Raises:
      UserError: a setting that cannot work, or several processes.
    """
    if jax.process_count() > 1:
        why = "one process alone measures"
        raise UserError("tune-machine", jax.process_count(), why, "Start it without --join.")
    execution = dataclasses.replace(config.execution, debug=False)
    config = dataclasses.replace(config, execution=execution)
    setup = prepare(config)
    case = _case(setup)
    entry = calibration.measured(case, seconds)
    chosen, ratios = calibration.judged(case, entry)
    milliseconds = {Layout(**timing["layout"]): 1e3 * timing["seconds"] for timing in entry["timings"]}
    return Tuning(
        key=case.key,
        default=case.layouts[0],
        chosen=chosen,
        milliseconds=milliseconds,
        ratios=ratios,
        left_out=tuple(layout for layout in case.layouts if layout not in milliseconds),
        devices=_devices(config, case) if devices else {},
        file=calibration.keep(entry),
    )


def _case(setup: Setup) -> Case:
    return Case(setup.model, setup.task, setup.config, setup.counts, setup.mesh)


# --- the number of devices ----------------------------------------------------------------------------


def _devices(config: RunConfig, case: Case) -> dict[int, tuple[float, ...]]:
    """`Tuning.devices`: the default layout on other numbers of devices of this CPU, in turn with this one."""
    here = case.mesh.size
    others = sorted({1, max(placement.cores() // 2, 1), placement.cores()} - {here})
    fixed = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if placement.platform_of(case.mesh) != "cpu" or config.execution.devices is not None or fixed:
        return {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        (folder / "config.yaml").write_text(config_lib.dump(config))
        mine = _timer(case)
        theirs = {n: stack.enter_context(_process(folder / "config.yaml", n)) for n in others}
        turns: list[dict[int, float]] = []
        for turn in range(step_times.LEAST):
            order = [here, *others][:: 1 if turn % 2 else -1]
            turns.append({n: mine() if n == here else theirs[n]() for n in order})
    return {n: tuple(turn[n] / turn[here] for turn in turns) for n in others}


def _timer(case: Case) -> Callable[[], float]:
    """Gives the seconds of a round's local training in the default layout, of fewer steps that are timed."""
    layout = case.layouts[0]
    run = step_times.step_of(case.model, case.task, case.config.local, case.mesh, uneven=case.uneven)(layout)
    assert run is not None

    def seconds(steps: int) -> float:
        start = time.perf_counter()
        run(steps)
        return time.perf_counter() - start

    run(1)
    steps = 1
    while seconds(steps) < _TURN / 2:
        steps *= 2
    work = case.work(layout.wave) / layout.wave
    return lambda: seconds(steps) / steps * work


@contextlib.contextmanager
def _process(config: Path, devices: int) -> Iterator[Callable[[], float]]:
    """As `_timer`, in a process of its own that has so many CPU devices."""
    command = [sys.executable, "-c", "from fedjax_sim.runs import tuning; tuning.serve()", str(config)]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
    child = subprocess.Popen(
        command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdin is not None
    assert child.stdout is not None
    asks, answers = child.stdin, child.stdout

    def seconds() -> float:
        with contextlib.suppress(OSError):  # it has ended: nor does it answer
            asks.write("\n")
            asks.flush()
        line = answers.readline()
        if not line:
            why = f"a process with {devices} CPU device(s) ended without an answer"
            raise UserError("tune-machine", devices, why, "See what it says, or leave it out: --no-devices.")
        return float(line)

    try:
        seconds()  # once it has started and compiled
        yield seconds
    finally:
        with contextlib.suppress(OSError):
            asks.close()
        child.wait(timeout=60)
        answers.close()


def serve() -> None:
    """What such a process does: a turn for each line that it is given."""
    timer = _timer(_case(prepare(config_lib.read_config(sys.argv[1]))))
    for _ in sys.stdin:
        print(timer(), flush=True)
