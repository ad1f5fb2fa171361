"""A run in memory: a `Setup` made real, and advanced round by round."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sim.core import memo, stacked
from fedjax_sim.core.algorithm import Algorithm, Cohort, nothing_sent
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.model import Model
from fedjax_sim.core.rng import INIT, key_for, run_key
from fedjax_sim.engine import client_state, cohorts, fusing, placement, waves
from fedjax_sim.engine.client_state import ClientState
from fedjax_sim.engine.clients import Trainer
from fedjax_sim.engine.debugging import shapes_of
from fedjax_sim.engine.device_data import DataStore, DeviceData
from fedjax_sim.engine.evaluation import Outcome
from fedjax_sim.engine.feed import Feed, RoundData
from fedjax_sim.engine.held import AS_IT_IS, Held, filled_shape, how
from fedjax_sim.engine.jaxpr_memory import share_bytes
from fedjax_sim.engine.observing import AllObservers, Instrument, ObserverRequest, observer_request
from fedjax_sim.engine.programs import cached_jit
from fedjax_sim.engine.round import (
    FINE,
    NAN,
    Meter,
    Round,
    RoundInputs,
    RoundOutputs,
    Rounds,
    ServerState,
    Soundness,
    outputs_on,
)
from fedjax_sim.engine.scores import Scores, client_rows
from fedjax_sim.engine.setup import DiagnosticContext, Setup
from fedjax_sim.records import Row


class NonFiniteUpdate(UserError):
    """A client's update held an infinity or NaN, and the run was told to stop at that."""


_ALL = " As it was all of the round's: the server's learning rate ({}) may be too high as well."


_UPLOAD = " It may be an upload of local.finish_round, not the model: execution.debug names leaf and line."


class NonFiniteServer(UserError):
    """What the server made of finite updates, or handed out, held an infinity or NaN."""


@dataclasses.dataclass(frozen=True)
class _Drawn:
    """A fresh model, of the key that the state is made from: one program for all algorithms."""

    model: Model

    def __call__(self, key: jax.Array) -> Any:
        return self.model.init(key_for(key, 0))


@dataclasses.dataclass(frozen=True)
class _Start:
    """The state before the first round, as a function.

    Attributes:
      model: the network.
      algorithm: the record.
      trainer: local training.
      meters: name -> diagnostic of every round.
      held: how the algorithm's state is held, and what clients keep.
      rows: K, where clients' state lies on the host and a round's rows alone are here; else None.
    """

    model: Model
    algorithm: Algorithm
    trainer: Trainer
    meters: Mapping[str, Meter] = dataclasses.field(hash=False)
    held: Held = AS_IT_IS
    rows: int | None = None

    def __call__(self, key: jax.Array, labels: jax.Array, variables: Any = None) -> ServerState:
        """The state.

        Args:
          key: of what is drawn for it.
          labels: i32[N, C], training samples of each class that each client has; i32[K, C] of the clients
            whose rows are here.
          variables: the model that clients start from; None: a fresh one.
        """
        # A copy, as in `restore`: passed through, they might be overwritten by the next round.
        variables = _Drawn(self.model)(key) if variables is None else jax.tree.map(jnp.copy, variables)
        clients = stacked.per_slot(self.trainer.init_client, (None, 0))(variables, labels)
        state = self.algorithm.init(key_for(key, 1), variables)
        initial = None
        if self.rows is not None:
            state = client_state.first_rows(self.algorithm, state, self.rows)
            initial = jax.tree.map(jnp.copy, variables)
        deployed = self.algorithm.deploy(state)
        meters = {name: meter.init(deployed) for name, meter in self.meters.items()}
        clients = jax.tree.map(lambda leaf: stacked.filled_up(leaf, self.held.devices), clients)
        # A copy, so that no two leaves of the state share a buffer that a round will overwrite.
        return ServerState(self.held.filled(state), clients, jax.tree.map(jnp.copy, meters), initial)


_LARGE = 2**20
"""Bytes of a state on a device; see `Simulation.release`."""


class Keeper(Protocol):
    """Who has a simulation's state while its rounds are part of a larger program."""

    def state(self) -> ServerState:
        """A copy of the state, on the simulation's own devices."""
        ...

    def variables(self) -> Any:
        """The deployed model, likewise."""
        ...

    def outcome(self) -> Callable[[], Outcome]:
        """Gives what the evaluation of that model on the test set says of each sample."""
        ...


class Simulation:
    """A federated run: `for rows in simulation.advance(): …`, or `simulation.run()`.

    Attributes:
      setup: what is being run.
      round: the next round, from 0; also the number of rounds done.
      state: the server's state, on the devices and as they hold it. The initial one is made when it is first
        asked for: of a run that goes on, a checkpoint mostly takes its place.
      state_bytes: that it takes on a device.
      keeper: who has that state at the moment; None: the simulation itself.
      shapes: of that state, with the rows alone that count.
      shardings: of it.
      mesh: the devices.
      function: the round, as it is traced.
      instruments: diagnostics of measured rounds.
      observers: theirs, by name.
      program: the compiled round, `(state, inputs(r)[0], data, watched slots or None) -> (state, outputs)`.
      fused: several rounds as one compiled program, `fedjax_sim.engine.round.Rounds`; None: they run one by
        one.
      rounds_per_call: R, how many it has room for.
      observe: the compiled observers, `(outputs.view, their inputs by name, data) -> by name`.
      store: holds the samples on the devices.
      scores: what evaluations say.
      client_state: what clients keep, where it lies on the host; else None.
      feed: gives each round the samples that it reads.
      ending: metrics that the last round has only because it is the last.
    """

    def __init__(self, setup: Setup, store: DataStore | None = None):
        """`store`: of a run on the same devices, whose arrays are taken where they are the same."""
        self.setup = setup
        self.mesh = setup.mesh
        self.round = 0
        self.ending: set[str] = set()
        self.store = DataStore(self.mesh) if store is None else store
        self.keeper: Keeper | None = None
        self._state: ServerState | None = None
        self._again: Callable[[], ServerState] | None = self._initial_state  # makes `_state` once more
        self._key = self.store.key(run_key(setup.config.seed))
        self._steps, self._trainer = setup.steps, setup.trainer
        even = setup.cohort_size % (setup.devices * setup.wave) == 0
        in_order = even and waves.in_order(setup.steps, setup.devices, setup.wave)
        context = DiagnosticContext(setup, self.mesh, self.store.put)
        self.instruments = [observer.build(context) for observer in setup.observers]
        self.observers = {
            name: observer
            for instrument in self.instruments
            for name, observer in instrument.observers.items()
        }
        self.feed = Feed(setup.placement, setup.dataset, setup.partition, self.store)
        start = _Start(setup.model, setup.algorithm, self._trainer, setup.meters)
        self.shapes = self._shapes_of(start)
        wanted = setup.config.execution.client_state
        where = client_state.where(wanted, setup.algorithm, self.shapes, setup.num_clients, self.mesh)
        on_host = where == client_state.HOST
        if on_host:
            start = dataclasses.replace(start, rows=setup.cohort_size)
            self.shapes = self._shapes_of(start)
        self._stacks = setup.algorithm.is_stacked(self.shapes.algorithm)
        there = setup.algorithm.is_by_client(self.shapes.algorithm) if on_host else None
        held = how(self.shapes.algorithm, self._stacks, self.mesh.size, there, clients_on_host=on_host)
        self._start = dataclasses.replace(start, held=held)
        self.client_state = (
            ClientState(
                setup.algorithm,
                self._trainer,
                self.mesh,
                setup.label_counts,
                self._key,
                self.shapes,
            )
            if on_host
            else None
        )
        self.function = Round(setup.algorithm, self._trainer, self.mesh, in_order, setup.meters, held)
        self.shardings = self._state_shardings()
        options: dict[str, Any] = {
            "donate_argnums": (0,) if setup.config.execution.donate else (),
            "out_shardings": (self.shardings, outputs_on(self.mesh)),
        }
        self.program = cached_jit(self.function, self.mesh, **options)
        reason = fusing.wants_the_host(setup, self.feed.kind, on_host=on_host)
        self.state_bytes = sum(map(share_bytes, jax.tree.leaves(self.abstract_state())))
        cut = not all(where.is_fully_replicated for where in jax.tree.leaves(self.shardings))
        limit = fusing.limit(setup, reason, self.state_bytes, cut=cut)
        several = any(self._followed(number) for number in range(1, min(setup.config.rounds, 1000)))
        self.rounds_per_call = limit if several else 1
        self._pace = fusing.Pace(setup.config.execution.rounds_per_call, self.rounds_per_call)
        self.fused = (
            cached_jit(Rounds(self.function, self.shardings), self.mesh, **options)
            if self.rounds_per_call > 1
            else None
        )
        self.observe = cached_jit(
            AllObservers(self.observers),
            self.mesh,
            many_kernels=True,
            out_shardings=placement.replicated(self.mesh),
        )
        self.scores = Scores(setup, self.store, self.function.personal, self.state_for)
        chooser = setup.algorithm.cohort_chooser
        self._measure = chooser and cached_jit(
            held.of(chooser.measure), self.mesh, **placement.readable(self.mesh)
        )
        self._deploy = cached_jit(
            held.of(setup.algorithm.deploy), self.mesh, out_shardings=placement.replicated(self.mesh)
        )

    # --- state --------------------------------------------------------------------------------------

    @functools.cached_property
    def data(self) -> DeviceData:
        """The training set, whole on every device, whatever rounds read."""
        return self.feed.whole or self.store.of_round(self.setup.dataset, self.setup.partition)

    def data_of(self, round_index: int, inputs: RoundInputs) -> RoundData:
        """What a round reads of the training set, of what `inputs` gave for it."""
        return self.feed.of(round_index, np.asarray(inputs.cohort.ids), inputs.plan)

    @property
    def state(self) -> ServerState:
        """See the class."""
        if self._state is None:
            again = self._again if self.keeper is None else self.keeper.state
            assert again is not None
            self._state = again()
        return self._state

    @state.setter
    def state(self, state: ServerState) -> None:
        self._state, self.keeper, self._again = state, None, None

    def kept_by(self, keeper: Keeper, rounds: int) -> None:
        """So many rounds more were done elsewhere, where the state is from now on."""
        self._state, self.keeper, self._again = None, keeper, None
        self.round += rounds

    def release(self) -> bool:
        """Lets go of a large state that can be had again: from its keeper, a checkpoint, or the seed.

        Returns:
          Whether it is gone. Small ones stay, since to have one again costs more than to hold it.
        """
        gone = self.state_bytes >= _LARGE and (self.keeper is not None or self._again is not None)
        if gone:
            self._state = None
        return gone

    def _state_shardings(self) -> ServerState:
        same, cut = placement.replicated(self.mesh), placement.cut(self.mesh)
        inner = jax.tree.map(lambda stack: cut if stack else same, self._stacks)
        return ServerState(
            inner,
            jax.tree.map(lambda leaf: cut, self.shapes.clients),
            jax.tree.map(lambda leaf: same, self.shapes.meters),
            jax.tree.map(lambda leaf: same, self.shapes.initial),
        )

    def _shapes_of(self, start: _Start) -> ServerState:
        labels = self.setup.label_counts[: start.rows]
        with self.setup.watch.during(0):
            return memo.once(
                "shapes of a state", (start, labels.shape), lambda: shapes_of(start, run_key(0), labels)
            )

    def _initial_state(self) -> ServerState:
        key, given = key_for(self._key, INIT), self.setup.initial
        variables = None if given is None else given()
        with jax.set_mesh(self.mesh), self.setup.watch.during(0):
            if variables is None:
                # By itself: all methods share the program; and with what fills up the stacks XLA would draw
                # their copies by other instructions than the model's, which would differ in the last bit.
                same = placement.replicated(self.mesh)
                variables = cached_jit(_Drawn(self.setup.model), self.mesh, out_shardings=same)(key)
            made = cached_jit(self._start, self.mesh, out_shardings=self.shardings)
            return made(key, self.setup.label_counts[: self._start.rows], variables)

    def abstract_state(self) -> ServerState:
        """Shapes, dtypes and shardings of the state as it is held, as a checkpoint's restore wants them."""
        return jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(
                leaf.shape if where.is_fully_replicated else filled_shape(leaf.shape, self.mesh.size),
                leaf.dtype,
                sharding=where,
            ),
            self.shapes,
            self.shardings,
        )

    def state_for(self, ids: np.ndarray) -> ServerState:
        """The state as it now is; of clients' state on the host it has the rows of `ids`, i32[m]."""
        return self.state if self.client_state is None else self.client_state.placed(self.state, ids)

    def restore(
        self, state: ServerState, round_index: int, again: Callable[[], ServerState] | None = None
    ) -> None:
        """Continues from a copy of `state` after `round_index` rounds.

        Clients' state on the host is not part of it: see `ClientState.load`.

        Args:
          state: as it is held, or with the rows alone that count.
          round_index: rounds that it has seen.
          again: gives it once more, see `release`; None: nobody does.
        """
        self.state = self._as_held(state)
        self._again = None if again is None else lambda: self._as_held(again())
        self.round = round_index

    def _as_held(self, state: ServerState) -> ServerState:
        """A copy on the devices of a state as it is held, or of the rows alone that count."""

        def filled(leaf: Any, wanted: jax.ShapeDtypeStruct) -> Any:
            if leaf.shape == wanted.shape:
                return leaf
            numpy = np if isinstance(leaf, np.ndarray) else jnp
            spare = numpy.broadcast_to(leaf[:1], (wanted.shape[0] - leaf.shape[0], *leaf.shape[1:]))
            return numpy.concatenate([leaf, spare])

        held = jax.tree.map(filled, state, self.abstract_state())
        # A copy, because device_put may alias what it is given, and the next round overwrites its state.
        return jax.tree.map(jnp.copy, jax.device_put(held, self.shardings))

    # --- rounds -------------------------------------------------------------------------------------

    def inputs(self, round_index: int) -> tuple[RoundInputs, float]:
        """What the host decides of a round, and the plan's padding waste.

        Of an algorithm that chooses its clients itself, only of the next round.

        Args:
          round_index: from 0.
        """
        return self.inputs_of(round_index, self._cohort(round_index))

    def inputs_of(self, round_index: int, ids: np.ndarray) -> tuple[RoundInputs, float]:
        """As `inputs`, with the cohort given: i32[K], client ids."""
        inputs, waste = self._inputs(range(round_index, round_index + 1), ids[None], None)
        return fusing.inputs_of_round(inputs, 0), float(waste[0])

    def inputs_of_several(self, rounds: range, wave: int | None = None) -> tuple[RoundInputs, np.ndarray]:
        """As `inputs`, of R rounds: (leaves [R, …], but for the key, which they share; f64[R]).

        Args:
          rounds: from 0.
          wave: clients of this run side by side where those of others train beside them; None: as alone.
        """
        return self._inputs(rounds, np.stack([self._cohort(number) for number in rounds]), wave)

    def _inputs(self, rounds: range, ids: np.ndarray, wave: int | None) -> tuple[RoundInputs, np.ndarray]:
        """As `inputs_of_several`, with the cohorts given, i32[R, K]."""
        setup = self.setup
        counts, steps = setup.counts[ids], self._steps[ids]
        width = wave or setup.wave
        plans = waves.make_plans(steps, setup.devices, width, beside=wave is not None)
        waste = waves.padding_waste(counts, plans, setup.config.local, width)
        lr = [setup.config.local.lr_at(number, setup.config.rounds) for number in rounds]
        # Host values still; the compiled round, whose view the types give, takes them as device arrays.
        cohort = Cohort(
            cast(jax.Array, ids),
            cast(jax.Array, counts.astype(np.int32)),
            cast(jax.Array, np.asarray(rounds, np.int32)),
            cast(jax.Array, steps.astype(np.int32)),
        )
        return RoundInputs(
            cohort=cohort, plan=plans, lr=cast(jax.Array, np.asarray(lr, np.float32)), key=self._key
        ), waste

    def _cohort(self, round_index: int) -> np.ndarray:
        """Who takes part in a round, i32[K]."""
        return self.setup.draw(round_index) if self._measure is None else self._selected(round_index)

    def _places(self, round_index: int) -> tuple[np.ndarray, waves.Plan]:
        """The cohort of a round, and where its slots train."""
        ids = self.setup.draw(round_index)
        return ids, waves.make_plan(self._steps[ids], self.setup.devices, self.setup.wave)

    def _upcoming(self) -> np.ndarray | None:
        """While round `self.round` is under way, the cohort of the next, if there is one and it is known."""
        number = self.round + 1
        return None if self._measure or number >= self.setup.config.rounds else self.setup.draw(number)

    def _selected(self, round_index: int) -> np.ndarray:
        """The cohort that the algorithm chooses."""
        chooser = self.setup.algorithm.cohort_chooser
        assert chooser is not None
        assert self._measure is not None
        with jax.set_mesh(self.mesh):
            measured = jax.device_get(self._measure(self.state.algorithm))
        drawn = cohorts.generator(self.setup.config.seed, round_index)
        counts, wanted = self.setup.counts, self.setup.cohort_size
        chosen = np.asarray(chooser.choose(measured, counts, wanted, drawn))
        integers = np.issubdtype(chosen.dtype, np.integer)
        if chosen.shape != (wanted,) or not integers or chosen.min() < 0 or chosen.max() >= len(counts):
            raise UserError(
                "algorithm.cohort_chooser.choose",
                chosen[:8].tolist() if chosen.ndim else chosen.tolist(),
                f"in round {round_index + 1} it did not choose {wanted} of clients 0 to {len(counts) - 1}",
                f"Return i32[{wanted}], their numbers.",
            )
        return chosen

    def trace(self) -> None:
        """Traces the next round, and what the algorithm deploys, without compiling either."""
        inputs, state = self.inputs(self.round)[0], self.abstract_state()
        with jax.set_mesh(self.mesh):
            jax.eval_shape(self.function, state, inputs, self.data_of(self.round, inputs))
            jax.eval_shape(self.setup.algorithm.deploy, state.algorithm)
            if self.setup.personalised:
                jax.eval_shape(self.function.personal, state, inputs.cohort.ids)

    def step(self) -> Callable[[], list[Row]]:
        """Starts the next round, and its evaluation if one is due, without waiting for them.

        Call the result for the round's rows. It raises NonFiniteUpdate if a client's update was not finite
        and `local.non_finite` is stop; the state has moved on by then, without that update. It raises
        NonFiniteServer if what the algorithm's own functions made is not finite, whatever that setting.
        """
        with jax.set_mesh(self.mesh), self.setup.watch.during(self.round + 1):
            inputs, waste = self.inputs(self.round)
            ids = np.asarray(inputs.cohort.ids)
            request = observer_request(self.measuring(self.round + 1), ids)
            observed = {}
            watched = None if request is None else request.slots
            data = self.data_of(self.round, inputs)
            if self._measure is None:
                self.feed.prepare(range(self.round + 1, self.setup.config.rounds), self._places)
            self.state, outputs = self.program(self.state_for(ids), inputs, data, watched)
            if self.client_state is not None:
                self.client_state.after(self.state, ids, self._upcoming())
            if request is not None:
                observed = self.observe(outputs.view, request.inputs, self.data)
        outputs = dataclasses.replace(outputs, view=None)  # its models are dropped once they are observed
        self.round += 1
        parts: list[Callable[[], list[Row]]] = [
            partial(self.rows_of, self.round, inputs, outputs, observed, waste, request)
        ]
        if self.due():
            parts.append(self.evaluate())
        return partial(_joined, parts)

    def steps(self, most: int | None = None) -> Callable[[], Iterator[list[Row]]]:
        """Starts the next round, or several as one program, and the evaluation that is due after the last.

        They end where an evaluation or a measurement is due, or the run ends. How many they are goes by
        `execution.rounds_per_call`, and has no influence on results.

        Args:
          most: how many at most; None: however many.

        Returns:
          Gives the rows of each round, one after another, and raises what `step` raises in the round that it
          speaks of.
        """
        count = self._pace.rounds(self.until_due(most))
        if count == 1 and (self.fused is None or self.measuring(self.round + 1)):
            one = self.step()
            return lambda: iter([self._pace.timed(1, one)])
        assert self.fused is not None
        first = self.round + 1
        with jax.set_mesh(self.mesh), self.setup.watch.during(first):
            inputs, waste = self.inputs_of_several(range(self.round, self.round + count))
            self.state, outputs = self.fused(self.state, *self.call(inputs), self.data)
        self.round += count
        evaluated = self.evaluate() if self.due() else None

        def rows() -> Iterator[list[Row]]:
            fetched = self._pace.timed(count, partial(jax.device_get, outputs))
            return self.rows_of_several(first, inputs, fetched, waste, evaluated)

        return rows

    def call(self, inputs: RoundInputs) -> tuple[RoundInputs, np.ndarray]:
        """What `fused` takes of some rounds, between state and data: their inputs, and how many they are."""
        return fusing.with_room(inputs, self.rounds_per_call), np.asarray(len(inputs.lr), np.int32)

    def until_due(self, most: int | None) -> int:
        """How many rounds may be started before the host has to look, `most` or fewer, at least 1."""
        if self.measuring(self.round + 1):
            return 1
        end = min(self.round + self.rounds_per_call, self.setup.config.rounds)
        if most is not None:
            end = min(end, self.round + most)
        number = self.round + 1
        while number < end and self._followed(number):
            number += 1
        return number - self.round

    def _followed(self, number: int) -> bool:
        """Whether round `number` can be one of several: nobody looks before the next, nor at either."""
        return not (self.evaluates(number) or self.measuring(number) or self.measuring(number + 1))

    def rows_of_several(
        self,
        first: int,
        inputs: RoundInputs,
        outputs: RoundOutputs,
        waste: np.ndarray,
        evaluated: Callable[[], list[Row]] | None,
    ) -> Iterator[list[Row]]:
        """The records of R rounds that nobody measured, one round after another.

        Args:
          first: number of the first, from 1.
          inputs: what the host decided, leaves [R, …].
          outputs: what the rounds said, NumPy arrays [R or more, …], without `view`.
          waste: f64[R], of the plans.
          evaluated: gives the rows of the evaluation after the last; None: there is none.

        Raises:
          NonFiniteUpdate, NonFiniteServer: see `step`, in the round that it speaks of.
        """
        outputs = jax.tree.map(lambda leaf: leaf[: len(waste)], outputs)
        unsound = not (outputs.included.all() and outputs.handed.all() and _sound(outputs.server))
        leaves, structure = jax.tree.flatten((inputs.cohort, inputs.lr, outputs))
        for row, of_plan in enumerate(waste.tolist()):
            cohort, lr, own = structure.unflatten([leaf[row] for leaf in leaves])
            if unsound:
                self._check(first + row, cohort, own)
            made = self._told(first + row, cohort, lr, own, of_plan)
            yield made + evaluated() if evaluated is not None and row == len(waste) - 1 else made

    def rows_of(
        self,
        number: int,
        inputs: RoundInputs,
        outputs: RoundOutputs,
        observed: dict[str, Any],
        waste: float,
        request: ObserverRequest | None,
    ) -> list[Row]:
        """The records of a round, evaluations apart.

        Args:
          number: of the round, from 1.
          inputs: what the host decided.
          outputs: what the round said of itself, without `view`.
          observed: what observers said, by their names.
          waste: of the plan, see `fedjax_sim.engine.waves.padding_waste`.
          request: what was asked of observers; None: nothing.

        Raises:
          NonFiniteUpdate, NonFiniteServer: see `step`.
        """
        there = isinstance(outputs.loss, np.ndarray)
        fetched: RoundOutputs = outputs if there else jax.device_get(outputs)
        self._check(number, inputs.cohort, fetched)
        rows = self._told(number, inputs.cohort, inputs.lr, fetched, waste)
        if request is not None:
            ids = np.asarray(inputs.cohort.ids)
            them, observed = ids[np.asarray(request.slots)], jax.device_get(observed)
            for instrument in self.measuring(number):
                made = instrument.rows(number, them, request.inputs, observed)
                if not instrument.due(number, number + 1):
                    self.ending.update(row.metric for row in made)
                rows += made
        return rows

    def _told(
        self, number: int, cohort: Cohort, lr: jax.Array, fetched: RoundOutputs, waste: float
    ) -> list[Row]:
        """What a round said of itself, as `rows_of`; without what observers said."""
        ids, included = np.asarray(cohort.ids), np.asarray(fetched.included)
        weights = np.where(included, np.asarray(cohort.counts), 0).astype(np.float64)
        rows = [Row(number, "padding_waste", waste), Row(number, "lr", float(lr))]
        if (total := weights.sum()) > 0:
            loss = np.where(included, fetched.loss, 0).astype(np.float64)
            rows.append(Row(number, "train_loss", float(loss @ weights / total)))
        rows += [Row(number, "left_out", 1.0, client=client) for client in _those(ids, ~included)]
        rows += [Row(number, name, float(value)) for name, value in fetched.metrics.items()]
        for name, meter in self.setup.meters.items():
            rows += meter.rows(number, fetched.metered[name])
        return rows

    def _check(self, number: int, cohort: Cohort, fetched: RoundOutputs) -> None:
        """Raises NonFiniteUpdate or NonFiniteServer, see `step`."""
        ids, included = np.asarray(cohort.ids), np.asarray(fetched.included)
        bad = _those(ids, ~included)
        stops = bad and self.setup.config.local.non_finite == "stop"
        if not stops or not fetched.handed.all():
            self._check_server(number, ids, fetched)
        if stops:
            uploads = self.setup.algorithm.local.finish_round is not nothing_sent
            raise NonFiniteUpdate(
                "local.non_finite",
                "stop",
                f"in round {number} the update of client(s) {bad} was not finite",
                "Lower local.lr, set local.clip_norm, or leave such clients out with "
                "local.non_finite = skip."
                + (_UPLOAD if uploads else "")
                + ("" if included.any() else self._servers_rate()),
            )

    def _servers_rate(self) -> str:
        """What to add where all updates were not finite: the server's learning rate, of who has one."""
        name = _rate(self.setup.config.algorithm, "algorithm")
        return "" if name is None else _ALL.format(name)

    def _check_server(self, number: int, ids: np.ndarray, fetched: RoundOutputs) -> None:
        """Raises NonFiniteServer for a fault of round `number` that is none of its clients'."""
        server, misled = fetched.server, _those(ids, ~np.asarray(fetched.handed))
        of_state, of_model = np.asarray(server.state), np.asarray(server.deployed)
        if misled:
            found = self._not_finite()
            before = f", of what merge made in round {number - 1} or before" if number > 1 else ""
            why = f"in round {number} what its dispatch sent to client(s) {misled} was not finite{before}"
        elif not _sound(server):
            kinds = np.concatenate([of_state, of_model])
            found = [name for name, kind in zip(server.names, kinds, strict=True) if kind != FINE]
            maker = "merge" if of_state.any() else "deploy"
            why = f"in round {number} its {maker} made numbers that are not finite, of finite updates"
        else:
            return
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            why += f": {', '.join(found[:3])}{more}"
        raise NonFiniteServer(
            "algorithm",
            self.setup.algorithm_name,
            why,
            "Lower the server's learning rate if it has one (algorithm.lr, algorithm.server_lr) or local.lr; "
            "in an algorithm of your own look for a division by 0, or a root of what is below it.",
        )

    def _not_finite(self) -> list[str]:
        """Leaves of the algorithm's state as it now is that are not, as far as this process has them."""
        return [
            f"state{jax.tree_util.keystr(path)}"
            for path, leaf in jax.tree_util.tree_flatten_with_path(self.state.algorithm)[0]
            if jnp.issubdtype(leaf.dtype, jnp.inexact)
            and leaf.is_fully_addressable
            and not np.isfinite(np.asarray(leaf, np.complex64)).all()
        ]

    def measuring(self, number: int) -> list[Instrument]:
        """The instruments that measure round `number`, from 1."""
        rounds = self.setup.config.rounds
        return [instrument for instrument in self.instruments if instrument.due(number, rounds)]

    def due(self) -> bool:
        """Whether the model as it now is should be evaluated."""
        return self.evaluates(self.round)

    def evaluates(self, number: int) -> bool:
        """Whether an evaluation follows round `number`, from 1."""
        every = self.setup.config.evaluation.every
        return every > 0 and (number % every == 0 or number == self.setup.config.rounds)

    def advance(self, rounds: int | None = None) -> Iterator[list[Row]]:
        """Runs `rounds` rounds (None: to the end), and yields each one's rows, evaluation included.

        The next round or rounds are always under way while the rows of those before are handed out.
        """
        last = self.setup.config.rounds if rounds is None else self.round + rounds
        waiting: list[Callable[[], Iterator[list[Row]]]] = []
        while self.round < last:
            under_way = self.steps(last - self.round)
            for part in waiting:
                yield from part()
            waiting = [under_way]
        for part in waiting:
            yield from part()

    # --- evaluation ---------------------------------------------------------------------------------

    @property
    def variables(self) -> Any:
        """The deployed model."""
        if self.keeper is not None:
            return self.keeper.variables()
        with jax.set_mesh(self.mesh), self.setup.watch.during(self.round):
            return self._deploy(self.state.algorithm)

    def evaluate(self, *, last: bool = False) -> Callable[[], list[Row]]:
        """Starts an evaluation of the model as it now is; call the result for its rows.

        Args:
          last: whether the run ends here, before the last of its rounds.
        """
        del last  # for those who do more after the last round
        number, config = self.round, self.setup.config.evaluation
        with self.setup.watch.during(number):
            keeper = self.keeper
            outcome = self.scores.outcome(self.variables) if keeper is None else keeper.outcome()
            own = self.scores.of_clients(self.variables) if config.per_client else None

        def rows() -> list[Row]:
            out = self.scores.rows(number, outcome())
            if own is not None:
                out += client_rows(number, own(), f"client_{self.setup.task.headline.name}")
            if config.every and number % config.every:
                self.ending.update(row.metric for row in out)
            return out

        return rows

    def client_figures(self) -> Callable[[], np.ndarray]:
        """Starts evaluating what clients would use on their own test samples; call the result for f64[N].

        The figure is the task's headline metric, accuracy for classes.
        """
        with self.setup.watch.during(self.round):
            return self.scores.of_clients(self.variables)


def _those(ids: np.ndarray, flags: np.ndarray) -> list[int]:
    """The clients i32[K] of which a flag bool[K] is set, each once."""
    return np.unique(ids[flags]).tolist() if flags.any() else []


def _rate(config: Any, name: str) -> str | None:
    """The field of a server's learning rate in an algorithm's settings, or in those inside; None: none."""
    if not dataclasses.is_dataclass(config):
        return None
    fields = [field.name for field in dataclasses.fields(config)]
    inside = (_rate(getattr(config, field), f"{name}.{field}") for field in fields)
    return next((f"{name}.{field}" for field in ("lr", "server_lr") if field in fields), None) or next(
        filter(None, inside), None
    )


def _sound(server: Soundness) -> bool:
    """Whether what merges left can be gone on from."""
    return not ((np.asarray(server.state) == NAN).any() or (np.asarray(server.deployed) != FINE).any())


def _joined(parts: list[Callable[[], list[Row]]]) -> list[Row]:
    return [row for part in parts for row in part()]
