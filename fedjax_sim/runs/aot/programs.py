"""The programs of a run, compiled for a machine that need not be here, and what XLA says of each."""

import dataclasses
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from fedjax_sim.engine import clients, evaluation, placement
from fedjax_sim.engine.feed import AHEAD, STREAMED, RoundData
from fedjax_sim.engine.held import filled_shape
from fedjax_sim.engine.jaxpr_flops import flops
from fedjax_sim.engine.jaxpr_memory import bytes_of, share_bytes
from fedjax_sim.engine.observing import observer_request
from fedjax_sim.engine.programs import CachedJit
from fedjax_sim.engine.round import ROUNDS, RoundInputs, ServerState
from fedjax_sim.engine.scores import Scores
from fedjax_sim.engine.simulation import Simulation
from fedjax_sim.engine.together import Group
from fedjax_sim.runs import finetune
from fedjax_sim.runs.aot import hlo
from fedjax_sim.runs.aot.machines import Machine
from fedjax_sim.runs.parts import cut_rows

ROUND, MEASURED, OBSERVERS, EVALUATION = "round", "measured round", "observers", "evaluation"
OWN = "clients' models", "clients' evaluation"
TUNED, TUNING = "models to fine-tune", "fine-tuning"


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
      name: such as round or evaluation.
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


class Compiler:
    """Compiles the programs of a run on paper, one after another."""

    def __init__(self, simulation: Simulation, target: Machine, say: Callable[[str], None]):
        self.simulation, self.target, self.say = simulation, target, say
        self.state = simulation.abstract_state()
        self.ids, self.inputs, self.data = _of_round(simulation)
        self.held = {"state": self.state, "data": self.data}
        # Samples of the rounds to come lie there too, beside whatever runs.
        ahead = AHEAD if simulation.feed.kind == STREAMED else 0
        self.ahead = ahead * sum(share_bytes(leaf) for leaf in _leaves(self.data))

    def programs(self) -> list[Program]:
        """All of them."""
        simulation, setup = self.simulation, self.simulation.setup
        asked, same = setup.config.evaluation, placement.replicated(self.target.mesh)
        model = _on(setup.model.abstract, same)
        evaluator, own = None, []
        if asked.every and asked.per_client:  # before an evaluator cuts the samples that these read whole
            own = self._of_clients(simulation, model, self.state)
            self.held["clients' tests"] = [arguments[1:] for _, arguments in own[-1:]]
        if asked.every:
            batch = placement.forward_batch(asked, setup.model, setup.mesh)
            evaluator = evaluation.Evaluator(
                setup.model, setup.task, simulation.store, setup.dataset.test, batch
            )
            self.held["tests"] = evaluator.data
        request = observer_request(simulation.instruments, self.ids)
        if request is not None:
            self.held["observers"] = request.inputs
        arguments, loops = (self.state, self.inputs, self.data), _Loops.of(simulation, self.inputs, self.data)
        program, given = simulation.program, arguments
        if simulation.fused is not None:  # whose loop over rounds counts once
            several = simulation.call(simulation.inputs_of_several(range(1))[0])
            program, given = simulation.fused, (self.state, *several, self.data)
        found = [self._compiled(ROUND, program, given, loops)]
        if request is not None:
            watched = (*arguments, request.slots)
            found.append(self._compiled(MEASURED, simulation.program, watched, loops))
            with jax.set_mesh(self.target.mesh):
                view = jax.eval_shape(simulation.function, *watched)[1].view
            cut, models = placement.cut(self.target.mesh), (view.start, view.before, view.after)
            start, before, after = (_on(tree, cut) for tree in models)
            view = dataclasses.replace(_on(view, same), start=start, before=before, after=after)
            observe = view, request.inputs, self.data
            found.append(self._compiled(OBSERVERS, simulation.observe, observe, loops))
        if evaluator is not None:
            found.append(self._compiled(EVALUATION, evaluator.program, (model, *evaluator.data), loops))
        for name, (program, arguments) in zip(OWN[len(OWN) - len(own) :], own, strict=True):
            found.append(self._compiled(name, program, arguments, loops))
        return found + (self._fine_tuning(model) if asked.finetune else [])

    def several(self, group: Group) -> Program:
        """The rounds of several runs as one program; the machine's devices are those of the group."""
        program, arguments = group.on_paper()
        places = len(jax.tree.leaves(arguments[0])[0])
        loops = _Loops(_Loops.of(self.simulation, self.inputs, self.data).steps, frozenset({places}))
        self.held = {"data": arguments[-2]}  # all else is among the arguments
        return self._compiled(f"{ROUND} of {len(group.members)} runs", program, arguments, loops, group.mesh)

    def _of_clients(self, simulation: Simulation, model: Any, state: Any) -> list[tuple[CachedJit, Any]]:
        """The programs that evaluate what clients use, with their arguments."""
        scores = Scores(simulation.setup, simulation.store, simulation.function.personal, lambda ids: state)
        with jax.set_mesh(self.target.mesh):
            return scores.programs_of_clients(model, lambda count: _with_rows(simulation, state, count))

    def _fine_tuning(self, model: Any) -> list[Program]:
        """What runs after the last round, beside whose state it does."""
        simulation = self.simulation
        phase = finetune.phase(simulation.setup, simulation.store)
        program, ids = finetune.start(simulation.setup, simulation.function)
        loops = _Loops.of(simulation, self.inputs, self.data)
        given = _with_rows(simulation, self.state, len(ids)), ids
        kept = dataclasses.replace(phase.abstract_state(), algorithm=None)
        found = [self._compiled(TUNED, program, given, loops, beside=kept)]
        state = phase.abstract_state()
        _, inputs, data = _of_round(phase)
        loops = _Loops.of(phase, inputs, data)
        found.append(self._compiled(TUNING, phase.program, (state, inputs, data), loops, beside=state))
        own = self._of_clients(phase, model, state)
        for name, (program, arguments) in zip(OWN, own, strict=True):
            found.append(self._compiled(f"{name}, fine-tuned", program, arguments, loops, beside=state))
        return found

    def shared(self) -> int:
        """Bytes of samples that CPU devices hold once for all of them."""
        held = [tree for key, tree in self.held.items() if key != "state"]
        whole = {id(leaf): leaf for leaf in _leaves(held) if leaf.sharding.is_fully_replicated}
        return bytes_of(list(whole.values()))

    def _compiled(
        self,
        name: str,
        program: CachedJit,
        arguments: tuple,
        loops: "_Loops",
        mesh: Mesh | None = None,
        beside: Any = None,
    ) -> Program:
        """One program.

        Args:
          name: of it.
          program: not compiled yet.
          arguments: shapes, and what is on the host.
          loops: what the program does not say of its own.
          mesh: the devices; None: as the machine has them.
          beside: arrays that are held meanwhile, besides `held`.
        """
        self.say(f"compiling the {name} for {self.target.chips} × {self.target.kind} …")
        start = time.monotonic()
        with jax.set_mesh(mesh or self.target.mesh), hlo.with_lines():
            traced = jax.make_jaxpr(program.function)(*arguments)
            operations = flops(traced, loops.length, lambda array: loops.part(array, self.target.chips))
            lowered: Any = program.lower(*arguments)
            options = {"compiler_options": dict(self.target.options)} if self.target.options else {}
            try:
                compiled = lowered.compile(**options)
            except Exception as error:
                refused = _wanted(str(error))
                if refused is None:
                    raise
                seconds = time.monotonic() - start
                besides = self._besides({id(leaf) for leaf in _leaves(arguments)}, beside)
                return Program(name, besides=besides, refused=refused, seconds=seconds)
        seconds = time.monotonic() - start
        sizes: Any = compiled.memory_analysis()
        module = hlo.read(compiled.as_text())
        lengths = {f"/{clients.WAVE}/while": loops.steps, f"/{ROUNDS}/while": 1.0}
        return Program(
            name=name,
            arguments=int(sizes.argument_size_in_bytes),
            outputs=int(sizes.output_size_in_bytes),
            in_place=int(sizes.alias_size_in_bytes),
            temporaries=int(sizes.temp_size_in_bytes),
            besides=self._besides(_read(compiled, arguments), beside),
            collectives=_exchanges(module.collectives(lengths)),
            flops=operations,
            traffic=module.traffic(lengths),
            cycles=module.cycles(lengths),
            padding=module.padding(lengths),
            unknown_loops=module.unknown_loops(lengths),
            seconds=seconds,
        )

    def _besides(self, read: set[int], beside: Any) -> int:
        """Bytes that are held while a program runs and that it does not read. `read`: ids of what it does."""
        held = {id(leaf): leaf for leaf in _leaves((list(self.held.values()), beside))}
        return self.ahead + sum(share_bytes(leaf) for key, leaf in held.items() if key not in read)


@dataclasses.dataclass(frozen=True)
class _Loops:
    """Of a run's programs, what their text does not say.

    Attributes:
      steps: of the loop over a client's steps, how many a wave has.
      rows: of how many rows arrays are that are cut over the devices.
    """

    steps: float
    rows: frozenset[int]

    @classmethod
    def of(cls, simulation: Simulation, inputs: RoundInputs, data: RoundData) -> "_Loops":
        """Of a run, with what one of its rounds is given."""
        steps = np.asarray(inputs.plan.wave_steps, np.int64).reshape(simulation.setup.devices, -1)
        return cls(float(steps.sum(1).max() / steps.shape[1]), frozenset(cut_rows(simulation, inputs, data)))

    def length(self, body: Any) -> float | None:
        """How often a loop's body runs; None where its text says it."""
        scopes = (str(eqn.source_info.name_stack).split("/") for eqn in body.eqns)
        return self.steps if any(clients.STEP in names for names in scopes) else None

    def part(self, array: Any, devices: int) -> float:
        """Of an array outside of `shard_map`: what a device has of it."""
        is_cut = bool(getattr(array, "shape", ())) and array.shape[0] in self.rows
        return 1 / devices if is_cut else 1.0


def _of_round(simulation: Simulation) -> tuple[np.ndarray, RoundInputs, RoundData]:
    """(Clients, inputs, samples) of the first round."""
    ids = simulation.setup.draw(0)
    inputs = simulation.inputs_of(0, ids)[0]
    return ids, inputs, simulation.data_of(0, inputs)


def _with_rows(simulation: Simulation, state: ServerState, count: int) -> ServerState:
    """As `Simulation.state_for`, on shapes: with so many clients' rows, where these lie on the host."""
    if simulation.client_state is None:
        return state

    def one(leaf: Any, there: bool = True) -> Any:
        shape = (filled_shape((count,), simulation.mesh.size)[0], *leaf.shape[1:])
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=leaf.sharding) if there else leaf

    there = simulation.setup.algorithm.is_by_client(state.algorithm)
    algorithm = jax.tree.map(one, state.algorithm, there)
    return dataclasses.replace(state, algorithm=algorithm, clients=jax.tree.map(one, state.clients))


def _read(compiled: jax.stages.Compiled, arguments: Any) -> set[int]:
    """Ids of arrays among the arguments that are the program's too: JAX leaves out what it does not use."""
    none = lambda leaf: leaf is None  # noqa: E731
    given = jax.tree.leaves(arguments, is_leaf=none)
    places = jax.tree.leaves(compiled.input_shardings[0][1:], is_leaf=none)  # behind what is packed
    return {id(leaf) for leaf, place in zip(given, places, strict=True) if place is not None}


def _leaves(tree: Any) -> list[Any]:
    return [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.ShapeDtypeStruct)]


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
