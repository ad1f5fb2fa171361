"""What a configuration takes on a machine that is not here: its programs compiled for it, none of them run.

The programs are those of a run (`Simulation`), on shapes: the round, the round that is measured, its
observers, the evaluations of the deployed model and of what clients use themselves, and fine-tuning. Sizes
are XLA's; times are not to be had. Cycles are the estimate of XLA's cost model for TPUs, without the
exchanges between chips.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax

from fedjax_sim.config import LocalConfig, RunConfig
from fedjax_sim.core.algorithm import Algorithm
from fedjax_sim.core.errors import UserError
from fedjax_sim.engine import placement
from fedjax_sim.engine.simulation import Simulation
from fedjax_sim.engine.together import Group, obstacle
from fedjax_sim.runs.aot.machines import Machine, machine
from fedjax_sim.runs.aot.programs import MEASURED, ROUND, TUNING, Compiler, Program
from fedjax_sim.runs.assemble import prepare
from fedjax_sim.runs.parts import (
    OF_WAVE,
    ON_HOST,
    TABLES,
    Part,
    available,
    data_parts,
    human,
    on_paper,
    parts_of,
    shown,
    wave_parts,
)
from fedjax_sim.runs.start import with_start

_MIB = 2**20


@dataclasses.dataclass(frozen=True)
class MachinePlan:
    """What a configuration takes on a machine. `print` it; `to_dict` is for programs.

    Attributes:
      machine: what it was compiled for.
      parts: what the algorithm needs by definition, and estimates of what is alive in between, as in
        `fedjax_sim.runs.plan.MemoryPlan`.
      programs: what was compiled.
      available: bytes of one device; of a CPU of the machine, as its devices share one memory.
      shared: bytes that a CPU's devices hold once for all of them; else 0.
      waves: what a wave needs, also where most is alive in another part of a round, which `parts` then show.
      runs: so many go side by side; None: one, over all devices.
      wave: clients side by side on a device.
      conv: the convolution's implementation.
      versions: of jax and jaxlib.
    """

    machine: Machine
    parts: tuple[Part, ...]
    programs: tuple[Program, ...]
    available: int | None
    wave: int
    conv: str
    versions: Mapping[str, str]
    shared: int = 0
    waves: tuple[Part, ...] = ()
    runs: int | None = None

    @property
    def is_whole(self) -> bool:
        """Whether devices share one memory, and sizes are those of all of them."""
        return self.machine.memory is None

    def size(self, part: Part) -> int:
        """Bytes of a part: on one device, or of a CPU on all."""
        return part.total if self.is_whole else part.device

    @property
    def needed(self) -> int:
        """Bytes by definition: a device's share of the state, its data, its wave's activations."""
        held = sum(self.size(part) for part in self.parts if part.when == "always")
        return held + sum(map(self.size, self.waves))

    @property
    def total(self) -> int:
        """Bytes in the program that takes most: of one device, or of a CPU of all."""
        most = max(program.total for program in self.programs)
        if not self.is_whole:
            return most
        host = sum(part.total for part in self.parts if part.name == ON_HOST)
        return (most - self.shared) * self.machine.chips + self.shared + host

    @property
    def fits(self) -> bool | None:
        """Whether it fits; None where the memory is not known."""
        if any(program.refused is not None for program in self.programs):
            return False
        return None if self.available is None else self.total <= self.available

    def advice(self) -> list[str]:
        """What to change if it does not fit, the cheapest first; empty if it does."""
        if self.fits is not False:
            return []
        lines = []
        waves = sum(map(self.size, self.waves))
        over = self.total - (self.available or 0)
        most = max(self.programs, key=lambda program: program.total)
        if self.wave > 1 and over < waves and most.name in (ROUND, MEASURED, TUNING):
            wave = max(1, int(self.wave * (1 - over / waves)))
            if wave < self.wave:
                lines.append(
                    f"execution.wave = {wave} instead of {self.wave}: results stay the same (estimate)"
                )
        ranked = sorted(self.parts, key=lambda part: -self.size(part))
        lines += [f"{part.name} ({human(self.size(part))}): {part.remedy}" for part in ranked if part.remedy]
        return list(dict.fromkeys(lines))[:4]

    def to_dict(self) -> dict[str, Any]:
        """As numbers and text, for JSON. Bytes and operations are of one device; a CPU's memory is of all."""
        first = self.programs[0]
        return {
            "machine": {"name": self.machine.name, "kind": self.machine.kind, "clock": self.machine.clock},
            "chips": self.machine.chips,
            "runs": self.runs,
            "fits": self.fits,
            "memory": {
                "needed": self.needed,
                "total": self.total,
                "available": self.available,
                "parts": [{"name": p.name, "bytes": self.size(p), "when": p.when} for p in self.parts],
            },
            "collectives": [
                {"program": program.name, **dataclasses.asdict(one)}
                for program in self.programs
                for one in program.collectives
            ],
            "flops": first.flops,
            "bytes": first.traffic,
            "padding": first.padding,
            "cycles": first.cycles,
            "compile_seconds": sum(program.seconds for program in self.programs),
            "programs": [_without_collectives(program) for program in self.programs],
            "wave": self.wave,
            "conv": self.conv,
            "advice": self.advice(),
            "versions": dict(self.versions),
        }

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=1)

    def __str__(self):
        return "\n".join([*self._memory_lines(), "", *self._program_lines(), *self._exchange_lines()])

    def _memory_lines(self) -> list[str]:
        chip = "all devices" if self.is_whole else "one chip"
        several = "" if self.runs is None else f"{self.runs} runs side by side; "
        lines = [
            f"{self.machine.name}: {self.machine.chips} × {self.machine.kind}; {several}"
            f"waves of {self.wave}, convolutions: {self.conv}. Compiled, not run.",
            "",
        ]
        rows = shown(self.parts, self.size)
        width = max(len(part.name) for part in rows)
        lines.append(f"{'memory by part':{width}}  {chip:>11}  when")
        lines += [f"{part.name:{width}}  {human(self.size(part)):>11}  {part.when}" for part in rows]
        lines += [
            "",
            f"needed by definition (state, data, a wave's activations), {chip}: {human(self.needed)}",
        ]
        lines.append(f"needed as compiled, {chip}: {human(self.total)}")
        if self.available is None:
            lines.append("available: not known")
        elif self.fits:
            lines.append(f"available, {chip}: {human(self.available)}: it fits")
        else:
            over = human(self.total - self.available)
            lines.append(f"available, {chip}: {human(self.available)}: it does NOT fit, by {over}")
        if self.advice():
            lines += ["what to change, the cheapest first:", *(f"  - {line}" for line in self.advice())]
        return lines

    def _program_lines(self) -> list[str]:
        head = ("program", "arguments", "new results", "temporaries", "total", "Gflop", "traffic", "tiles")
        rows: list[tuple[str, ...]] = [(*head, "cycles", "compiled in")]
        for one in self.programs:
            if one.refused is not None:
                text = f"XLA refuses: {human(one.refused)}"
                rows.append(
                    (one.name, text, "", "", human(one.total), "", "", "", "", f"{one.seconds:.0f} s")
                )
                continue
            rows.append(
                (
                    one.name,
                    human(one.arguments),
                    human(one.outputs - one.in_place),
                    human(one.temporaries),
                    human(one.total),
                    f"{one.flops / 1e9:.3g}",
                    human(one.traffic),
                    f"{one.padding:.0%}",
                    "–" if one.cycles is None else f"{one.cycles / 1e6:.3g} M",
                    f"{one.seconds:.0f} s",
                )
            )
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join(
                text.ljust(width) if not place else text.rjust(width)
                for place, (text, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        lines.append("tiles: the share of results' bytes that only fills up tiles.")
        first, clock = self.programs[0], self.machine.clock
        if first.cycles and clock:
            lines.append(
                f"a round: {first.cycles / 1e6:.3g} million cycles, {first.cycles / clock * 1e3:.3g} ms at "
                f"{clock / 1e9:.3g} GHz. An ESTIMATE of XLA's cost model, without exchanges; nothing was run."
            )
        for one in self.programs:
            if one.unknown_loops:
                lines.append(f"{one.name}: {one.unknown_loops} loop(s) of unknown length count once.")
        return lines

    def _exchange_lines(self) -> list[str]:
        large = [
            (program.name, one)
            for program in self.programs
            for one in program.collectives
            if one.bytes >= _MIB
        ]
        if not large:
            return ["", "exchanges between devices: none of 1 MiB or more"]
        lines = ["", "exchanges between devices of 1 MiB or more, bytes on one device:"]
        for name, one in large:
            times = "" if one.times == 1 else f" × {one.times:g}"
            lines.append(f"  {name}: {one.op} {human(one.bytes)}{times}, asked for by {one.where}")
        return lines


def _without_collectives(program: Program) -> dict[str, Any]:
    """As numbers, with its total."""
    fields = {**dataclasses.asdict(program), "total": program.total}
    return {name: value for name, value in fields.items() if name != "collectives"}


def plan_on(
    config: RunConfig,
    on: str | Machine,
    *,
    together: int | None = None,
    say: Callable[[str], None] | None = None,
    **replacements: Any,
) -> MachinePlan:
    """Compiles a configuration's programs for a machine. Loads the data, runs nothing.

    Args:
      config: what is to be run; it takes all of the machine's devices, whatever `execution.devices` says.
      on: the machine, see `fedjax_sim.runs.aot.machines.machine`.
      together: compiles the rounds of so many runs like this one side by side, as
        `fedjax_sim.runs.together.run_many` has them, and nothing else; None: of one run.
      say: is told what is being compiled.
      **replacements: as for `prepare`.

    Raises:
      UserError: no such machine, its compiler is not installed, or a configuration that cannot work.
    """
    target = machine(on) if isinstance(on, str) else on
    execution = dataclasses.replace(config.execution, debug=False, devices=None)
    config = dataclasses.replace(config, execution=execution)
    devices = list(target.mesh.devices.flat)
    mesh = target.mesh if together is None else placement.mesh_of(devices[:1])
    setup = with_start(prepare(config, mesh=mesh, **replacements))
    simulation = on_paper(setup)
    platform = placement.platform_of(target.mesh)
    parts = parts_of(simulation)
    compiler = Compiler(simulation, target, say or (lambda text: None))
    if together is None:
        programs = tuple(compiler.programs())
    else:
        group = _group(simulation, together, devices)
        programs = (compiler.several(group),)
        once = {part.name for part in data_parts(simulation, platform)} - {TABLES}
        # Of a device's runs, all are held, and so many are in a round at once. Nothing else is compiled.
        held, side = -(-together // len(devices)), group.side
        times = {"always": (held, together), "round": (side, side * group.mesh.size)}
        parts = [
            part if part.name in once else _times(part, *times[part.when])
            for part in parts
            if part.when in times
        ]
    there = available(platform) if target.memory is None else target.memory
    conv = setup.model.conv if setup.model.convolves else "none"
    versions = {name: sys.modules[name].__version__ for name in ("jax", "jaxlib")}
    shared = compiler.shared() if platform == "cpu" else 0
    waves = [part for part in parts if part.name in OF_WAVE] or wave_parts(simulation)
    return MachinePlan(
        target, tuple(parts), programs, there, setup.wave, conv, versions, shared, tuple(waves), together
    )


def _group(simulation: Simulation, runs: int, devices: list[Any]) -> Group:
    """So many runs that differ in their seeds alone."""
    if runs < 2:
        raise UserError("together", runs, "it says how many runs go side by side", "Give 2 or more.")
    if reason := obstacle(simulation):
        raise UserError("together", runs, f"runs go one by one: {reason}", "Plan for one run.")
    family = _Same(simulation.setup.algorithm, simulation.setup.config.local)
    return Group([simulation] * runs, family, [{}] * runs, devices)


@dataclasses.dataclass(frozen=True)
class _Same:
    """Runs that differ in no number, see `fedjax_sim.engine.together.Family`.

    Attributes:
      algorithm: of all.
      local: likewise.
    """

    algorithm: Algorithm
    local: LocalConfig

    def __call__(self, values: Mapping[str, jax.Array]) -> tuple[Algorithm, LocalConfig]:
        """See `Family`."""
        del values
        return self.algorithm, self.local


def _times(part: Part, each: int, runs: int) -> Part:
    """A part of one run, of `runs` of them, of which a device has `each`."""
    return dataclasses.replace(part, device=part.device * each, total=part.total * runs)
