"""Several runs as one program: what one run does, for each of them, with the samples held once.

Runs of small models leave a device idle, and a CPU busy with starting rounds. Clients are slots of a stack
already; more runs are more slots. Each run keeps its cohorts, orders and draws, its learning rate and its
hyper-parameters: what differs between the runs goes in as arrays with a leading run axis, [S, …], and no
program is compiled for a value.

A device has whole runs, so devices exchange nothing. Of its runs some lie side by side, under `jax.vmap`, and
these blocks follow one another: of runs whose clients train one by one, since convolutions of several clients
are slower on a CPU, each block is one run.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fedjax_sim.config import LocalConfig
from fedjax_sim.core.algorithm import Algorithm
from fedjax_sim.core.rng import run_key
from fedjax_sim.core.stacked import AXIS, RUNS, SIDE
from fedjax_sim.engine import fusing, waves
from fedjax_sim.engine.device_data import DeviceData, sample_table
from fedjax_sim.engine.evaluation import Evaluation, Outcome
from fedjax_sim.engine.feed import COPIED
from fedjax_sim.engine.observing import ObserverRequest, observer_request
from fedjax_sim.engine.placement import has_deep_convolutions, mesh_of, platform_of, replicated
from fedjax_sim.engine.programs import CachedJit, cached_jit
from fedjax_sim.engine.round import Round, RoundInputs, RoundOutputs, Rounds, ServerState
from fedjax_sim.engine.setup import Setup
from fedjax_sim.engine.simulation import Simulation
from fedjax_sim.records import Row

Fetch = Callable[[], Iterator[list[Row]]]
"""Gives the rows of some rounds, one after another, as `Simulation.steps` does."""


class Family(Protocol):
    """Runs whose algorithms and local settings differ in some numbers alone. Equal ones make the same."""

    def __call__(self, values: Mapping[str, jax.Array]) -> tuple[Algorithm, LocalConfig]:
        """The record and the settings of the run that has these numbers, f32[] by name. Traced."""
        ...


@dataclasses.dataclass(frozen=True)
class _Shape:
    """What, besides the family, the program of several runs is specialised to.

    Attributes:
      trainer: all of the trainer but its rule and settings.
      in_order: see `Round`.
      held: likewise.
      meters: likewise.
    """

    trainer: tuple[Any, ...]
    in_order: bool
    held: Any
    meters: tuple[tuple[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class Runs:
    """Some rounds of several runs, as a function.

    Attributes:
      family: of the runs.
      round: of one of them.
      shape: what of it counts.
      mesh: D devices, axes `RUNS` and `AXIS`, of which the second is one device long.
      side: runs side by side.
    """

    family: Family
    round: Round = dataclasses.field(compare=False)
    shape: _Shape
    mesh: Mesh
    side: int

    def __call__(
        self,
        state: ServerState,
        values: Mapping[str, jax.Array],
        inputs: RoundInputs,
        tables: tuple[jax.Array, jax.Array, jax.Array | None],
        watched: jax.Array | None,
        train: Any,
        count: jax.Array,
    ) -> tuple[ServerState, RoundOutputs]:
        """The states after them, and what each round of each run says of itself. Traced.

        Args:
          state: leaves [S, …].
          values: what the family takes, f32[S] by name.
          inputs: of up to R rounds, leaves [S, R, …], but for `cohort.round`, i32[R], which all runs share,
            and the key, u32[S, 2], of which the run's is made.
          tables: (samples i32[S, T], offsets i32[S, N + 1], rng_ids i32[S, N] or None) as in `DeviceData`.
          watched: i32[S, m], slots whose models are shown, of one round; None: of nobody.
          train: the samples of all runs, see `DeviceData`.
          count: i32[], how many rounds are done; of one that is watched, 1.

        Returns:
          Leaves [S, …] and [S, R, …].
        """
        numbers = inputs.cohort.round
        inputs = dataclasses.replace(inputs, cohort=dataclasses.replace(inputs.cohort, round=None))
        own, same = P(RUNS), P()
        here = jax.shard_map(
            lambda runs, *shared: self._in_blocks(runs, shared),
            mesh=self.mesh,
            in_specs=(own, same, same, same),
            out_specs=own,
            check_vma=False,
        )
        return here((state, values, inputs, tables, watched), numbers, train, count)

    def _in_blocks(self, runs: Any, shared: Any) -> tuple[ServerState, RoundOutputs]:
        """Of a device's runs, block after block. runs: leaves [S / D, …]."""
        side = self.side
        blocks = jax.tree.leaves(runs)[0].shape[0] // side
        if blocks == 1:
            return self._block(runs, shared)

        def cut(tree: Any, number: jax.Array | int) -> Any:
            return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, number * side, side), tree)

        def put(tree: Any, part: Any, number: jax.Array) -> Any:
            return jax.tree.map(
                lambda leaf, new: jax.lax.dynamic_update_slice_in_dim(leaf, new, number * side, 0), tree, part
            )

        def one(number: jax.Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            states, outputs = carry
            after, said = self._block((cut(states, number), *cut(runs[1:], number)), shared)
            return put(states, after, number), put(outputs, said, number)

        shapes = jax.eval_shape(lambda: self._block((cut(runs[0], 0), *cut(runs[1:], 0)), shared)[1])
        room = jax.tree.map(lambda leaf: jnp.zeros((blocks * side, *leaf.shape[1:]), leaf.dtype), shapes)
        return jax.lax.fori_loop(0, blocks, one, (runs[0], room))

    def _block(self, runs: Any, shared: Any) -> tuple[ServerState, RoundOutputs]:
        """Of runs side by side, leaves [side, …]."""
        if self.side > 1:
            return jax.vmap(lambda run: self._run(run, shared), axis_name=SIDE)(runs)
        done = self._run(jax.tree.map(lambda leaf: leaf[0], runs), shared)
        return jax.tree.map(lambda leaf: leaf[None], done)

    def _run(self, run: Any, shared: Any) -> tuple[ServerState, RoundOutputs]:
        """Of one run: state […], outputs [R, …]."""
        state, values, inputs, (samples, offsets, rng_ids), watched = run
        numbers, train, count = shared
        inputs = dataclasses.replace(
            inputs,
            cohort=dataclasses.replace(inputs.cohort, round=numbers),
            key=jax.random.wrap_key_data(inputs.key, impl=jax.random.key_impl(run_key(0))),
        )
        data, one = DeviceData(train, samples, offsets, rng_ids), _with(self.round, *self.family(values))
        if watched is None:
            return Rounds(one, None)(state, inputs, count, data)
        first = jax.tree.map(lambda leaf: leaf[0], dataclasses.replace(inputs, key=None))
        state, outputs = one(state, dataclasses.replace(first, key=inputs.key), data, watched)
        return state, jax.tree.map(lambda leaf: leaf[None], outputs)


def _with(one: Round, algorithm: Algorithm, local: LocalConfig) -> Round:
    """A round with another algorithm and other local settings."""
    trainer = dataclasses.replace(one.trainer, rule=algorithm.local, local=local)
    return dataclasses.replace(one, algorithm=algorithm, trainer=trainer)


@dataclasses.dataclass(frozen=True)
class _Deployed:
    """The models that several runs deploy, as a function.

    Attributes:
      family: of the runs.
      mesh: as in `Runs`.
    """

    family: Family
    mesh: Mesh

    def __call__(self, states: Any, values: Mapping[str, jax.Array]) -> Any:
        """[S, …] states of the algorithm, f32[S] by name -> [S, …] models."""

        def here(states: Any, values: Mapping[str, jax.Array]) -> Any:
            return jax.vmap(lambda state, own: self.family(own)[0].deploy(state))(states, values)

        run = jax.shard_map(here, mesh=self.mesh, in_specs=P(RUNS), out_specs=P(RUNS), check_vma=False)
        return run(states, values)


@dataclasses.dataclass(frozen=True)
class _Evaluated:
    """Several models on one set of samples, as a function.

    Attributes:
      one: of one model.
      mesh: as in `Runs`; a device evaluates the models of its runs, one after another.
    """

    one: Evaluation
    mesh: Mesh

    def __call__(self, models: Any, example: Any, rows: jax.Array | None) -> Outcome:
        """[S, …] models, and the samples as `Evaluation` takes them -> leaves [S, …]."""

        def here(models: Any, example: Any, rows: jax.Array | None) -> Outcome:
            return jax.lax.map(lambda model: self.one(model, example, rows), models)

        specs = P(RUNS), P(), P()
        run = jax.shard_map(here, mesh=self.mesh, in_specs=specs, out_specs=P(RUNS), check_vma=False)
        return run(models, example, rows)


def make_mesh(devices: Sequence[Any]) -> Mesh:
    """The mesh of `Runs`."""
    return Mesh(np.asarray(devices).reshape(-1, 1), (RUNS, AXIS), axis_types=(AxisType.Auto,) * 2)


def obstacle(simulation: Simulation) -> str | None:
    """What has a run go by itself, if anything has."""
    kind, on_host = simulation.feed.kind, simulation.client_state is not None
    if simulation.setup.algorithm.cohort_chooser is not None and not simulation.setup.config.execution.debug:
        return None if kind == COPIED and not on_host else "samples or clients' state lie on the host"
    return fusing.wants_the_host(simulation.setup, kind, on_host=on_host)


def shape_of(simulation: Simulation) -> dict[str, Any]:
    """What runs of one family must have in common besides their settings, by name."""
    setup, shapes = simulation.setup, simulation.shapes
    of_state = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), shapes)
    table = sample_table(setup.partition, setup.dataset.train_size)[0].shape
    return {
        "clients of the partition": setup.num_clients,
        "clients of a round": setup.cohort_size,
        "clients side by side": setup.wave,
        "the data set": id(setup.dataset),
        "the network": setup.model,
        "samples that clients hold": table,
        "numbers of clients in random draws": setup.partition.rng_ids is None,
        "the state": (jax.tree.structure(of_state), tuple(jax.tree.leaves(of_state))),
    }


def can_take(simulation: Simulation, family: Family, names: Sequence[str]) -> bool:
    """Whether the round can be traced with these numbers as arguments, and gives the same types."""
    inputs, state = simulation.inputs(simulation.round)[0], simulation.abstract_state()

    def traced(values: Mapping[str, jax.Array], state: ServerState, inputs: RoundInputs) -> Any:
        algorithm, local = family(values)
        after, _ = _with(simulation.function, algorithm, local)(state, inputs, simulation.data)
        return after, algorithm.deploy(after.algorithm)

    def types(tree: Any) -> list[Any]:
        return [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]

    try:
        with jax.set_mesh(simulation.mesh):
            number = jax.ShapeDtypeStruct((), jnp.float32)
            after, _ = jax.eval_shape(traced, dict.fromkeys(names, number), state, inputs)
    except Exception:  # whatever a method does with a number that is not known yet
        return False
    return types(after) == types(state)


class Group:
    """Simulations whose rounds are one program. All are on the first of the group's devices.

    A run that is not among those that are asked for leaves its place to a copy of another one, whose rows
    nobody reads. When half of the places are such, the others move together, into a program of as many.

    Attributes:
      members: the simulations.
      mesh: the devices.
    """

    def __init__(
        self,
        members: Sequence[Simulation],
        family: Family,
        values: Sequence[Mapping[str, float]],
        devices: Sequence[Any],
        side: int | None = None,
    ):
        """Makes nothing on the devices yet but the samples.

        Args:
          members: S simulations, each on the first device alone, of equal shapes.
          family: of their algorithms.
          values: of each, what the family takes.
          devices: D.
          side: runs side by side on a device at most; None: by the model and the kind of device.
        """
        self.members, self._family, self._values = list(members), family, list(values)
        first = self.members[0]
        self.mesh = make_mesh(devices[: len(self.members)])
        each = -(-len(self.members) // self.mesh.size)
        setups = [member.setup for member in self.members]
        self._most_side, self._wave = _layout(setups, self.mesh, each) if side is None else (side, None)
        self._round, self._shape = _round_of(self.members, self._wave)
        self._train = first.store.on(self.mesh).whole(first.setup.dataset.train)
        self._tables = [
            (*sample_table(one.setup.partition, one.setup.dataset.train_size), one.setup.partition.rng_ids)
            for one in self.members
        ]
        self._keys = np.stack(
            [np.asarray(jax.random.key_data(run_key(m.setup.config.seed))) for m in members]
        )
        self._limit = min(member.rounds_per_call for member in self.members)
        wanted = first.setup.config.execution.rounds_per_call
        if wanted == "auto":
            self._limit = min(self._limit, fusing.room(first.setup.cohort_size * len(self.members)))
        self._pace = fusing.Pace(wanted, self._limit)
        self._seats: list[int] = []  # the member whose rounds each place does
        self._places: dict[int, int] = {}  # of each member that is there, where its state is
        self._tables_here: Any = None
        self._programs: dict[int, CachedJit] = {}  # by the runs side by side
        self._states: ServerState | None = None  # [places, …]
        self._deployed = cached_jit(
            _Deployed(family, self.mesh), self.mesh, out_shardings=NamedSharding(self.mesh, P(RUNS))
        )
        self._held: _Moment | None = None

    def steps(self, active: Sequence[int], most: int | None = None) -> list[Fetch]:
        """Starts the next round or rounds of some members, as `Simulation.steps` does of one.

        Args:
          active: their numbers; all have done as many rounds.
          most: how many rounds at most; None: however many.

        Returns:
          What gives the rows of each.
        """
        members = [self.members[number] for number in active]
        requests = self._requests(members)
        if requests is None:  # they look at cohorts of different sizes: each by itself
            return [member.steps(1) for member in members]
        watched = any(requests)
        first, count = members[0].round + 1, 1
        if not watched:
            count = self._pace.rounds(min(member.until_due(most) for member in members))
        self._seat(active)
        upcoming = range(members[0].round, members[0].round + count)
        each = [member.inputs_of_several(upcoming, self._wave) for member in members]
        slots = {number: one.slots for number, one in zip(active, requests, strict=True) if one is not None}
        of_member = {number: inputs for number, (inputs, _) in zip(active, each, strict=True)}
        inputs = self._inputs(of_member, 1 if watched else self._limit)
        with jax.set_mesh(self.mesh):
            states, outputs = self._program()(
                self._states,
                self._values_of(self._seats),
                inputs,
                self._tables_here,
                np.stack([slots[number] for number in self._seats]) if watched else None,
                self._train,
                np.int32(count),
            )
        self._states = states
        held = self._held = _Moment(self, lambda: states)
        fetched = functools.cache(
            lambda: self._pace.timed(count, lambda: jax.device_get(dataclasses.replace(outputs, view=None)))
        )
        views = functools.cache(lambda: _by_device(outputs.view))
        fetches = []
        for number, member, rounds, request in zip(active, members, each, requests, strict=True):
            member.kept_by(_Seat(held, self._places[number], member), count)
            observed = {}
            if request is not None:
                view = jax.tree.map(lambda leaf: leaf[0], _row(views(), self._places[number]))
                with jax.set_mesh(member.mesh):
                    view = jax.device_put(view, replicated(member.mesh))
                    observed = member.observe(view, request.inputs, member.data)
            evaluated = member.evaluate() if member.due() else None
            fetches.append(
                functools.partial(
                    _rows, fetched, self._places[number], member, first, *rounds, request, observed, evaluated
                )
            )
        return fetches

    def on_paper(self) -> tuple[CachedJit, tuple[Any, ...]]:
        """The program of all members' next rounds, and shapes of what it takes; of members on paper."""
        self._seats = self._as_places(range(len(self.members)))
        own = NamedSharding(self.mesh, P(RUNS))

        def stacked(leaf: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((len(self._seats), *leaf.shape), leaf.dtype, sharding=own)

        state = jax.tree.map(stacked, self.members[0].abstract_state())
        tables = tuple(
            None if part is None else stacked(np.asarray(part, np.int32)) for part in self._tables[0]
        )
        of_member = {
            number: member.inputs_of_several(range(member.round, member.round + 1), self._wave)[0]
            for number, member in enumerate(self.members)
        }
        inputs, values = self._inputs(of_member, self._limit), self._values_of(self._seats)
        return self._program(), (state, values, inputs, tables, None, self._train, np.int32(1))

    def _as_places(self, active: Sequence[int]) -> list[int]:
        """These members, and copies of the first until the devices divide them."""
        devices = self.mesh.size
        return [*active, *[active[0]] * (-len(active) % devices)]

    def _inputs(self, of_member: Mapping[int, RoundInputs], limit: int) -> RoundInputs:
        """What all places are given, [places, limit, …], of leaves [R, …] of each member that has one."""
        inputs = _stacked([of_member[number] for number in self._seats], limit)
        return dataclasses.replace(inputs, key=self._keys[self._seats])

    @property
    def side(self) -> int:
        """Runs side by side on a device, as places are taken now."""
        each = len(self._seats) // self.mesh.size
        return max(number for number in range(1, self._most_side + 1) if each % number == 0)

    def _program(self) -> CachedJit:
        """The compiled rounds of as many runs as there are places."""
        side = self.side
        if side not in self._programs:
            function = Runs(self._family, self._round, self._shape, self.mesh, side)
            donate = self.members[0].setup.config.execution.donate
            self._programs[side] = cached_jit(
                function,
                self.mesh,
                donate_argnums=(0,) if donate else (),
                out_shardings=NamedSharding(self.mesh, P(RUNS)),
            )
        return self._programs[side]

    def _requests(self, members: Sequence[Simulation]) -> list[ObserverRequest | None] | None:
        """What is asked of each one's next round; None if these do not go together."""
        due = [member.measuring(member.round + 1) for member in members]
        if not any(due):
            return [None for _ in members]
        found = [
            observer_request(own, np.asarray(member.inputs(member.round)[0].cohort.ids))
            for own, member in zip(due, members, strict=True)
        ]
        sizes = {None if one is None else len(np.asarray(one.slots)) for one in found}
        return found if len(sizes) == 1 else None

    def _seat(self, active: Sequence[int]) -> None:
        """Puts the states of these members into the stack, if they are not there."""
        mine = [self.members[number] for number in active]
        there = all(isinstance(one.keeper, _Seat) and one.keeper.held is self._held for one in mine)
        seats = self._as_places(active)
        if there and self._states is not None and 2 * len(seats) > len(self._seats):
            if set(active) != set(self._places):
                self._leave(set(self._places) - set(active))
                self._seats = [number if number in active else active[0] for number in self._seats]
                self._place_tables()
            return
        # Members take their states out first, so that the old stack is gone before the new one is made.
        self._leave(list(self._places))
        self._states = self._held = None
        stack = _Stack(self.mesh, len(seats))
        self._seats, self._held = seats, _Moment(self, stack.whole)
        for first, number in enumerate(active):
            member = self.members[number]
            stack.put(member.state, [place for place, other in enumerate(seats) if other == number])
            self._places[number] = first
            member.kept_by(_Seat(self._held, first, member), 0)
        self._states = stack.whole()
        self._place_tables()

    def _leave(self, numbers: Collection[int]) -> None:
        """Has members keep their own states from now on."""
        for number in numbers:
            del self._places[number]
            member = self.members[number]
            if isinstance(member.keeper, _Seat):
                member.state = member.state

    def _place_tables(self) -> None:
        mine, own = [self._tables[number] for number in self._seats], NamedSharding(self.mesh, P(RUNS))

        def stack(part: int) -> Any:
            if mine[0][part] is None:
                return None
            return jax.device_put(np.stack([np.asarray(table[part], np.int32) for table in mine]), own)

        self._tables_here = stack(0), stack(1), stack(2)

    def _values_of(self, seats: Sequence[int]) -> dict[str, np.ndarray]:
        """f32[places] by name."""
        return {
            name: np.asarray([self._values[number][name] for number in seats], np.float32)
            for name in self._values[0]
        }

    # --- for those who look at a member ---------------------------------------------------------------

    def deployed(self, states: ServerState) -> Any:
        """The models of all places, [places, …]."""
        with jax.set_mesh(self.mesh):
            return self._deployed(states.algorithm, self._values_of(self._seats))

    def evaluated(self, models: Any) -> Outcome:
        """What the evaluation of these models [places, …] on the test set says, leaves [places, n, …]."""
        program, data = self._evaluation
        with jax.set_mesh(self.mesh):
            return program(models, *data)

    @functools.cached_property
    def _evaluation(self) -> tuple[CachedJit, Any]:
        alone = self.members[0].scores.evaluator("test")
        where = NamedSharding(self.mesh, P(RUNS))
        program = cached_jit(_Evaluated(alone.function, self.mesh), self.mesh, out_shardings=where)
        return program, jax.device_put(alone.data, NamedSharding(self.mesh, P()))


class _Moment:
    """What all places of a group hold between two calls; it ends with the next one."""

    def __init__(self, group: Group, states: Callable[[], ServerState]):
        self._parts = functools.cache(lambda: _by_device(states()))
        self._models = functools.cache(lambda: group.deployed(states()))
        self._model_parts = functools.cache(lambda: _by_device(self._models()))
        self._evaluated = functools.cache(lambda: group.evaluated(self._models()))
        self._outcome = functools.cache(lambda: jax.device_get(self._evaluated()))

    def state(self, place: int) -> ServerState:
        """Of one place."""
        return _row(self._parts(), place)

    def model(self, place: int) -> Any:
        """That it deploys."""
        return _row(self._model_parts(), place)

    def outcome(self, place: int) -> Callable[[], Outcome]:
        """Starts the evaluation of all places' models, if it has not begun. Gives what it says of one."""
        self._evaluated()
        return lambda: jax.tree.map(lambda leaf: leaf[place], self._outcome())


@dataclasses.dataclass(frozen=True)
class _Seat:
    """Has the state of a member, see `Keeper`.

    Attributes:
      held: what all places hold.
      place: the member's.
      member: it.
    """

    held: _Moment
    place: int
    member: Simulation

    def state(self) -> ServerState:
        """See `Keeper`."""
        return jax.device_put(self.held.state(self.place), self.member.shardings)

    def variables(self) -> Any:
        """See `Keeper`."""
        return jax.device_put(self.held.model(self.place), replicated(self.member.mesh))

    def outcome(self) -> Callable[[], Outcome]:
        """See `Keeper`."""
        return self.held.outcome(self.place)


def _by_device(tree: Any) -> list[Any]:
    """What each device has of leaves [places, …] that are cut over them."""

    def parts(leaf: jax.Array) -> list[jax.Array]:
        shards = sorted(leaf.addressable_shards, key=lambda shard: shard.index[0].start or 0)
        return [shard.data for shard in shards]

    leaves, structure = jax.tree.flatten(tree)
    return [structure.unflatten(own) for own in zip(*map(parts, leaves), strict=True)]


@jax.jit
def _taken(tree: Any, number: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[number], tree)


def _row(parts: Sequence[Any], place: int) -> Any:
    """One place of what the devices have, on its device."""
    each = len(jax.tree.leaves(parts[0])[0])
    own = parts[place // each]
    with jax.set_mesh(mesh_of(list(jax.tree.leaves(own)[0].devices()))):
        return _taken(own, place % each)


def _rows(
    fetched: Callable[[], RoundOutputs],
    place: int,
    member: Simulation,
    first: int,
    inputs: RoundInputs,
    waste: np.ndarray,
    request: ObserverRequest | None,
    observed: Mapping[str, Any],
    evaluated: Callable[[], list[Row]] | None,
) -> Iterator[list[Row]]:
    """The rows of a member's rounds, one after another.

    Args:
      fetched: gives what all rounds of all places said, leaves [places, R, …].
      place: the member's.
      member: it.
      first: number of the first round, from 1.
      inputs: what the host decided, leaves [R, …].
      waste: f64[R], of the plans.
      request: what was asked of observers, of the one round that there is; None: nothing.
      observed: what these said.
      evaluated: gives the rows of the evaluation after the last round; None: there is none.
    """
    outputs = jax.tree.map(lambda leaf: leaf[place], fetched())
    if request is None:
        yield from member.rows_of_several(first, inputs, outputs, waste, evaluated)
        return
    own = jax.tree.map(lambda leaf: leaf[0], outputs)
    of_round = fusing.inputs_of_round(inputs, 0)
    made = member.rows_of(first, of_round, own, dict(observed), float(waste[0]), request)
    yield made + evaluated() if evaluated is not None else made


def _stacked(runs: Sequence[RoundInputs], limit: int) -> RoundInputs:
    """Inputs of some rounds of each run, leaves [R, …], as one, [S, limit, …]; see `Runs`."""
    each = [fusing.with_room(one, limit) for one in runs]
    numbers = each[0].cohort.round
    each = [
        dataclasses.replace(one, key=None, cohort=dataclasses.replace(one.cohort, round=None)) for one in each
    ]
    all_ = jax.tree.map(lambda *leaves: np.stack(leaves), *each)
    return dataclasses.replace(all_, cohort=dataclasses.replace(all_.cohort, round=numbers))


class _Stack:
    """States of several runs as one, filled run by run: besides it there is one of them at a time."""

    def __init__(self, mesh: Mesh, places: int):
        self._mesh, self._each = mesh, places // mesh.size
        self._parts: list[Any] = [None] * mesh.size

    def put(self, state: ServerState, places: Sequence[int]) -> None:
        """Copies a run's state, leaves […], to some places."""
        for place in places:
            number, own = divmod(place, self._each)
            alone = mesh_of([self._mesh.devices.flat[number]])
            with jax.set_mesh(alone):
                here = jax.device_put(state, replicated(alone))
                part = self._parts[number]
                self._parts[number] = _spread(here, self._each) if part is None else _put(part, here, own)

    def whole(self) -> ServerState:
        """All of them, leaves [places, …]."""
        where = NamedSharding(self._mesh, P(RUNS))

        def one(*parts: jax.Array) -> jax.Array:
            shape = (self._each * len(parts), *parts[0].shape[1:])
            return jax.make_array_from_single_device_arrays(shape, where, parts)

        return jax.tree.map(one, *self._parts)


@functools.partial(jax.jit, static_argnums=1)
def _spread(state: Any, places: int) -> Any:
    """A state in each of so many places, leaves [places, …]."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (places, *leaf.shape)), state)


@functools.partial(jax.jit, donate_argnums=0)
def _put(part: Any, state: Any, place: int) -> Any:
    return jax.tree.map(lambda leaf, new: leaf.at[place].set(new), part, state)


_LANES = 10
"""Clients side by side on a TPU chip, of all its runs, where networks have convolutions.

Compiled for 16 v5e chips, 64 runs of LeNet with 10 clients a round take 93.9 million cycles and 772 MiB a
chip where the four runs of a chip lie side by side, and 58.2 million and 211 MiB where they follow one
another.
"""


def _layout(setups: Sequence[Setup], mesh: Mesh, each: int) -> tuple[int, int | None]:
    """(runs side by side at most, clients of each side by side; None: as many as alone).

    Args:
      setups: of the runs.
      mesh: the devices.
      each: runs of a device.
    """
    setup, platform = setups[0], platform_of(mesh)
    if platform == "tpu" and setup.model.convolves:
        alone = has_deep_convolutions(setup.model)
        return (1 if alone else min(each, max(1, _LANES // setup.wave))), None
    if platform != "cpu":
        return each, None
    if setup.model.convolves:  # convolutions of several clients are slower there
        return 1, None
    if setup.config.execution.wave is not None or not any(one.trainer.ragged for one in setups):
        return each, None
    local, params = setup.config.local, setup.model.num_params()
    works = [waves.Work.of(one.counts, local, params) for one in setups[:each]]
    steps = [work.cohorts(setup.cohort_size) for work in works]

    def seconds(layout: tuple[int, int]) -> float:
        side, wave = layout
        return waves.rounds_seconds(steps, 1, wave, works[0].flops, side)

    sides = [side for side in waves.widths(each) if each % side == 0]
    return min(itertools.product(sides, waves.widths(min(10, setup.cohort_size))), key=seconds)


def _round_of(members: Sequence[Simulation], wave: int | None) -> tuple[Round, _Shape]:
    """The round of all members, of so many clients each side by side, and what of it counts."""
    first = members[0].function
    trainers = [member.function.trainer for member in members]
    trainer = dataclasses.replace(
        first.trainer,
        # A client's order does not depend on the length that it is computed at.
        order_lengths=max((one.order_lengths for one in trainers), key=lambda lengths: lengths[-1]),
        ragged=any(one.ragged for one in trainers) or len({one.order_lengths for one in trainers}) > 1,
        partial=any(one.partial for one in trainers),
        gradients=any(one.gradients for one in trainers),
        width=wave or first.trainer.width,
    )
    in_order = wave is None and all(member.function.in_order for member in members)
    of_trainer = tuple(
        getattr(trainer, field.name)
        for field in dataclasses.fields(trainer)
        if field.name not in ("rule", "local", "optimizer")
    )
    shape = _Shape(of_trainer, in_order, first.held, tuple(sorted(first.meters.items())))
    return dataclasses.replace(first, trainer=trainer, in_order=in_order), shape
