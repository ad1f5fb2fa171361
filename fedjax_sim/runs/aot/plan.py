"""What a configuration takes on a machine that is not here: its programs compiled for it, none of them run.

The programs are those of a run (`Simulation`), on shapes: the round, the round that is measured, its
observers, and the evaluation of the deployed model. Sizes are XLA's; times are not to be had. Cycles are the
estimate of XLA's cost model for TPUs, without the exchanges between chips.
"""

import dataclasses
import json
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fedjax_sim.config import RunConfig
from fedjax_sim.engine import clients, evaluation, placement
from fedjax_sim.engine.feed import AHEAD, STREAMED
from fedjax_sim.engine.jaxpr_flops import flops
from fedjax_sim.engine.jaxpr_memory import bytes_of, leaf_bytes
from fedjax_sim.engine.observing import observer_request
from fedjax_sim.engine.simulation import Simulation
from fedjax_sim.runs.aot import hlo
from fedjax_sim.runs.aot.machines import Machine, machine
from fedjax_sim.runs.assemble import prepare
from fedjax_sim.runs.parts import (
    OF_WAVE,
    ON_HOST,
    Part,
    available,
    cut_rows,
    human,
    on_paper,
    parts_of,
    wave_parts,
)
from fedjax_sim.runs.start import with_start

ROUND, MEASURED, OBSERVERS, EVALUATION = "round", "measured round", "observers", "evaluation"
_MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Exchange:
    """A kind of exchange between devices.

    Attributes:
      op: such as all-to-all.
      bytes: of its result on one device.
      times: how often a run of the program makes it.
      where: the line that asks for it, and the line of `core/stacked.py` that makes it, if there is one.
    """

    op: str
    bytes: int
    times: float
    where: str


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled program. Bytes and operations are those of one device.

    Attributes:
      name: round, measured round, observers or evaluation.
      arguments: bytes of what it reads, in whole tiles.
      outputs: bytes of what it returns.
      in_place: of these, bytes that lie where an argument lay.
      temporaries: bytes in between.
      besides: bytes that the run holds meanwhile and that are none of its arguments.
      collectives: exchanges, the largest first.
      flops: floating-point operations.
      traffic: bytes read from main memory and written to it.
      cycles: XLA's estimate, without exchanges; None where it has none.
      padding: share of its results' bytes that only fills up tiles.
      unknown_loops: loops that count once, as their length is decided in the program.
      seconds: that it took to trace and compile it.
      refused: bytes that XLA would have needed where it refused, for lack of memory; the other figures are 0.
    """

    name: str
    arguments: int = 0
    outputs: int = 0
    in_place: int = 0
    temporaries: int = 0
    besides: int = 0
    collectives: tuple[Exchange, ...] = ()
    flops: float = 0.0
    traffic: float = 0.0
    cycles: float | None = None
    padding: float = 0.0
    unknown_loops: int = 0
    seconds: float = 0.0
    refused: int | None = None

    @property
    def total(self) -> int:
        """Bytes of one device while it runs."""
        if self.refused is not None:
            return self.refused + self.besides
        return self.arguments + self.outputs - self.in_place + self.temporaries + self.besides


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
        if self.wave > 1 and over < waves:
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
        lines = [
            f"{self.machine.name}: {self.machine.chips} × {self.machine.kind}; waves of {self.wave}, "
            f"convolutions: {self.conv}. Compiled, not run.",
            "",
        ]
        shown = [part for part in self.parts if self.size(part)]
        width = max(len(part.name) for part in shown)
        lines.append(f"{'memory by part':{width}}  {chip:>11}  when")
        lines += [f"{part.name:{width}}  {human(self.size(part)):>11}  {part.when}" for part in shown]
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
    say: Callable[[str], None] | None = None,
    **replacements: Any,
) -> MachinePlan:
    """Compiles a configuration's programs for a machine. Loads the data, runs nothing.

    Args:
      config: what is to be run; it takes all of the machine's devices, whatever `execution.devices` says.
      on: the machine, see `fedjax_sim.runs.aot.machines.machine`.
      say: is told what is being compiled.
      **replacements: as for `prepare`.

    Raises:
      UserError: no such machine, its compiler is not installed, or a configuration that cannot work.
    """
    target = machine(on) if isinstance(on, str) else on
    execution = dataclasses.replace(config.execution, debug=False, devices=None)
    config = dataclasses.replace(config, execution=execution)
    setup = with_start(prepare(config, mesh=target.mesh, **replacements))
    simulation = on_paper(setup)
    platform = placement.platform_of(target.mesh)
    parts = parts_of(simulation)
    compiler = _Compiler(simulation, target, say or (lambda text: None))
    programs = tuple(compiler.programs())
    there = available(platform) if target.memory is None else target.memory
    conv = setup.model.conv if setup.model.convolves else "none"
    versions = {name: sys.modules[name].__version__ for name in ("jax", "jaxlib")}
    shared = compiler.shared() if platform == "cpu" else 0
    waves = [part for part in parts if part.name in OF_WAVE] or wave_parts(simulation)
    return MachinePlan(
        target, tuple(parts), programs, there, setup.wave, conv, versions, shared, tuple(waves)
    )


class _Compiler:
    """Compiles the programs of a run on paper, one after another."""

    def __init__(self, simulation: Simulation, target: Machine, say: Callable[[str], None]):
        self.simulation, self.target, self.say = simulation, target, say
        setup = simulation.setup
        self.ids = setup.draw(0)
        self.inputs = simulation.inputs_of(0, self.ids)[0]
        self.state = simulation.abstract_state()
        steps = np.asarray(self.inputs.plan.wave_steps, np.int64).reshape(setup.devices, -1)
        self.steps = float(steps.sum(1).max() / steps.shape[1])
        self.data = simulation.data_of(0, self.inputs)
        self.rows = cut_rows(simulation, self.inputs, self.data)
        self.held = {"state": self.state, "data": self.data}
        # Samples of the rounds to come lie there too, beside whatever runs.
        ahead = AHEAD if simulation.feed.kind == STREAMED else 0
        self.ahead = ahead * sum(_share(leaf) for leaf in _leaves(self.data))

    def programs(self) -> list[Program]:
        """All of them."""
        simulation, setup = self.simulation, self.simulation.setup
        evaluator = None
        if setup.config.evaluation.every:
            batch = placement.forward_batch(setup.config.evaluation, setup.model, setup.mesh)
            evaluator = evaluation.Evaluator(
                setup.model, setup.task, simulation.store, setup.dataset.test, batch
            )
            self.held["tests"] = evaluator.data
        request = observer_request(simulation.instruments, self.ids)
        if request is not None:
            self.held["observers"] = request.inputs
        arguments = (self.state, self.inputs, self.data)
        found = [self._compiled(ROUND, simulation.program, simulation.function, arguments, ("state", "data"))]
        if request is not None:
            watched = (*arguments, request.slots)
            found.append(
                self._compiled(MEASURED, simulation.program, simulation.function, watched, ("state", "data"))
            )
            same = placement.replicated(self.target.mesh)
            with jax.set_mesh(self.target.mesh):
                view = jax.eval_shape(simulation.function, *watched)[1].view
            view = _on(view, same)
            observe = (view, request.inputs, self.data)
            function = simulation.observe.function
            found.append(
                self._compiled(OBSERVERS, simulation.observe, function, observe, ("data", "observers"))
            )
        if evaluator is not None:
            model = _on(setup.model.abstract, placement.replicated(self.target.mesh))
            function = evaluator.function
            program = evaluator.program
            found.append(self._compiled(EVALUATION, program, function, (model, *evaluator.data), ("tests",)))
        return found

    def shared(self) -> int:
        """Bytes of samples that CPU devices hold once for all of them."""
        held = [tree for key, tree in self.held.items() if key != "state"]
        whole = {id(leaf): leaf for leaf in _leaves(held) if leaf.sharding.is_fully_replicated}
        return bytes_of(list(whole.values()))

    def _compiled(
        self, name: str, program: Any, function: Any, arguments: tuple, reads: tuple[str, ...]
    ) -> Program:
        """One program. `reads`: which of what is held are among its arguments."""
        self.say(f"compiling the {name} for {self.target.chips} × {self.target.kind} …")
        read = {id(leaf) for key in reads if key in self.held for leaf in _leaves(self.held[key])}
        others = {id(leaf): leaf for key in self.held for leaf in _leaves(self.held[key])}
        besides = self.ahead + sum(_share(leaf) for key, leaf in others.items() if key not in read)
        start = time.monotonic()
        with jax.set_mesh(self.target.mesh), hlo.with_lines():
            operations = flops(jax.make_jaxpr(function)(*arguments), self._length, self._part)
            lowered = program.lower(*arguments)
            options = {"compiler_options": dict(self.target.options)} if self.target.options else {}
            try:
                compiled = lowered.compile(**options)
            except Exception as error:
                refused = _wanted(str(error))
                if refused is None:
                    raise
                seconds = time.monotonic() - start
                return Program(name, besides=besides, refused=refused, seconds=seconds)
        seconds = time.monotonic() - start
        sizes: Any = compiled.memory_analysis()
        module = hlo.read(compiled.as_text())
        lengths = {f"/{clients.WAVE}/while": self.steps}
        return Program(
            name=name,
            arguments=int(sizes.argument_size_in_bytes),
            outputs=int(sizes.output_size_in_bytes),
            in_place=int(sizes.alias_size_in_bytes),
            temporaries=int(sizes.temp_size_in_bytes),
            besides=besides,
            collectives=_exchanges(module.collectives(lengths)),
            flops=operations,
            traffic=module.traffic(lengths),
            cycles=module.cycles(lengths),
            padding=module.padding(lengths),
            unknown_loops=module.unknown_loops(lengths),
            seconds=seconds,
        )

    def _length(self, body: Any) -> float | None:
        """Of the loop over a client's steps, how many the wave has."""
        scopes = (str(eqn.source_info.name_stack).split("/") for eqn in body.eqns)
        return self.steps if any(clients.STEP in names for names in scopes) else None

    def _part(self, array: Any) -> float:
        """Of an array outside of `shard_map`: what a device has of it."""
        is_cut = bool(getattr(array, "shape", ())) and array.shape[0] in self.rows
        return 1 / self.target.chips if is_cut else 1.0


def _leaves(tree: Any) -> list[Any]:
    return [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.ShapeDtypeStruct)]


def _share(leaf: jax.ShapeDtypeStruct) -> int:
    """Bytes of an array on one device."""
    shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding is not None else leaf.shape
    return leaf_bytes(jax.ShapeDtypeStruct(shape, leaf.dtype))


def _on(tree: Any, sharding: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _wanted(message: str) -> int | None:
    """Bytes that a program would have needed, of XLA's message that memory does not suffice; else None."""
    found = re.search(r"Used ([\d.]+)([KMGT]?)i?B? of [\d.]+[KMGT]?i?B? hbm", message)
    return int(float(found[1]) * _UNITS[found[2]]) if found else None


def _exchanges(found: list[hlo.Collective]) -> tuple[Exchange, ...]:
    """Equal ones as one, the largest first."""
    times: dict[tuple[str, int, str], float] = {}
    for one in found:
        key = one.op, one.bytes, _where(one.stack)
        times[key] = times.get(key, 0.0) + one.times
    return tuple(Exchange(op, size, count, where) for (op, size, where), count in times.items())


_PACKAGE = Path(__file__).parents[2]


def _where(stack: tuple[hlo.Frame, ...]) -> str:
    """The innermost line outside of `core/stacked.py`, and the line there through which it asks."""
    shared = f"{_PACKAGE.name}/core/stacked.py"
    places = [(_short(frame.file), frame) for frame in stack]
    own = next((pair for pair in places if pair[0] != shared), None)
    if own is None:
        return "XLA itself" if not places else f"{places[0][0]}:{places[0][1].line}"
    text = f"{own[0]}:{own[1].line} ({own[1].function.rpartition('.')[2]})"
    if places[0][0] == shared:
        text += f", through core/stacked.py:{places[0][1].line}"
    return text


def _short(file: str) -> str:
    path = Path(file)
    return str(path.relative_to(_PACKAGE.parent)) if path.is_relative_to(_PACKAGE.parent) else file
