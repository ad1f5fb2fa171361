"""The compiled round: dispatch, train, merge, as one jitted function over stacked pytrees.

Slots are sharded over the mesh axis `clients`. Within a device, waves run one after another; a merge that
needs only the mean gets it accumulated wave by wave, so that K models never exist at once, and starts that
differ by slot are trained in place.

A measured round also returns the models of some clients, before the merge and after it. Observers look at
these in a program of their own (`fedjax_sim.engine.observing`), which depends on the model and on shapes but
not on the algorithm. A meter sees every round, and all clients one wave at a time.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from fedjax_sim.core import stacked
from fedjax_sim.core.algorithm import Algorithm, Cohort, Results, Starts
from fedjax_sim.core.model import Variables
from fedjax_sim.core.rng import CLIENTS, SERVER, key_for
from fedjax_sim.core.stacked import AXIS
from fedjax_sim.engine.clients import Lanes, Trainer, all_finite
from fedjax_sim.engine.debugging import shapes_of
from fedjax_sim.engine.device_data import CohortData, DeviceData
from fedjax_sim.engine.feed import RoundData
from fedjax_sim.engine.held import AS_IT_IS, Held
from fedjax_sim.engine.waves import Plan
from fedjax_sim.records import Row

_DISPATCH, _MERGE = 0, 1  # below the server's key of a round

DISPATCH, OF_CLIENTS, ORDER, WAVES, MERGE = "dispatch", "clients_state", "order", "waves", "merge"
SAMPLES = "samples"
"""Parts of a round, as profiles and a plan of memory name them; those of `engine.clients` lie in `WAVES`."""
ROUNDS = "rounds"
"""Likewise: the loop over several."""


@struct.dataclass
class ServerState:
    """All that a run carries from round to round.

    Stacks of N or K rows that the devices do not divide have further ones, see `engine.held`.

    Attributes:
      algorithm: the algorithm's own state.
      clients: what clients keep between rounds, [N, …] leaves; empty for stateless clients. Where it lies on
        the host, [K, …], that of the round's cohort.
      meters: name of each meter -> what it carries.
      initial: the model that clients' own state is made of, where that lies on the host; else None.
    """

    algorithm: Any
    clients: Any
    meters: Any = struct.field(default_factory=dict)
    initial: Any = None


@struct.dataclass
class RoundInputs:
    """What the host decides of a round: who, where, how fast.

    Attributes:
      cohort: clients of the K slots.
      plan: places and waves.
      lr: f32[], client learning rate.
      key: of the run; clients and server draw from it by round.
    """

    cohort: Cohort
    plan: Plan
    lr: jax.Array
    key: jax.Array


@struct.dataclass
class MergeView:
    """What observers see of a round: m clients, and the models of each before and after the merge.

    As a round returns it, stacks are cut over the devices, with further rows where these do not divide m
    (`counted` leaves them out).

    Attributes:
      cohort: the clients, ids and counts i32[m].
      start: [m, …], what each started from.
      before: [m, …], what each had trained, before the merge; its start where that was not finite.
      after: [m, …], what each holds once merged.
      lr: f32[], the round's learning rate.
      key: of the run.
    """

    cohort: Cohort
    start: Any
    before: Any
    after: Any
    lr: jax.Array
    key: jax.Array

    def counted(self) -> "MergeView":
        """With the rows of the m clients alone. Traced."""
        count = self.cohort.ids.shape[0]
        cut = lambda tree: jax.tree.map(lambda leaf: stacked.cut_to(leaf, count), tree)  # noqa: E731
        return dataclasses.replace(
            self, start=cut(self.start), before=cut(self.before), after=cut(self.after)
        )


class Meter(Protocol):
    """A diagnostic of every round and all its clients. All functions are traced.

    Attributes:
      gradients: whether it looks at gradients; else it is given None.
    """

    @property
    def gradients(self) -> bool:
        """See the class."""
        ...

    def init(self, deployed: Any) -> Any:
        """What it carries from round to round, before the first; `deployed`: the initial model."""
        ...

    def per_client(self, start: Any, trained: Any, gradient: Any) -> Any:
        """Of one client, whose last step had this gradient: a pytree of few numbers."""
        ...

    def summand(self, start: Any, trained: Any, gradient: Any) -> Any:
        """Of one client: what is wanted as a mean over clients, in float32; of the size of a model or so."""
        ...

    def finish(
        self, carried: Any, cohort: Cohort, old: Any, new: Any, each: Any, mean: Any
    ) -> tuple[Any, Any]:
        """(what it carries on, what it says of the round).

        Args:
          carried: from the round before.
          cohort: of the round.
          old: the deployed model before the round.
          new: the deployed model after it.
          each: of `per_client`, [K, …], zero where an update was left out.
          mean: of `summand` over the clients that were not left out; zero if there are none.
        """
        ...

    def rows(self, number: int, said: Any) -> list[Row]:
        """The records of round `number`, from 1, of what `finish` said of it. Not traced."""
        ...


FINE, INFINITE, NAN = 0, 1, 2
"""What is worst among the numbers of a leaf."""


@struct.dataclass
class Soundness:
    """What the server holds after a merge.

    Leaves with a row a client or slot are not looked at: their faults show when they are handed out.

    Attributes:
      state: i32[leaves], `FINE`, `INFINITE` or `NAN` of each leaf of the algorithm's state.
      deployed: i32[leaves], likewise of the deployed model; empty where that is made of stacks.
      names: of the leaves, first of the state, then of the model.
    """

    state: jax.Array
    deployed: jax.Array
    names: tuple[str, ...] = struct.field(pytree_node=False)


@struct.dataclass
class RoundOutputs:
    """What a round says of itself.

    Attributes:
      loss: f32[K], mean training loss of each client.
      included: bool[K], False where an update was not finite.
      handed: bool[K], False where it was not because what the server sent was not: an infinity or NaN in the
        model, or a NaN in what goes with it.
      server: what the merge left.
      metrics: the algorithm's own scalars.
      metered: name -> what a meter says of the round.
      view: the models of the watched clients; None in a round that is not measured.
    """

    loss: jax.Array
    included: jax.Array
    handed: jax.Array
    server: Soundness
    metrics: dict[str, jax.Array]
    metered: dict[str, Any]
    view: MergeView | None = None


def outputs_on(mesh: Mesh) -> RoundOutputs:
    """Shardings of a round's outputs, for `jax.jit`: whole on every device, but for the view, which is as the
    round leaves it.
    """
    same: Any = NamedSharding(mesh, P())
    return RoundOutputs(same, same, same, same, same, same)


@dataclasses.dataclass(frozen=True)
class Round:
    """The round as a function, specialised to an algorithm, a trainer and a mesh.

    Equal ones, whose algorithm is the same object, compute the same.

    Attributes:
      algorithm: the record.
      trainer: local training.
      mesh: devices.
      in_order: every round's plan leaves slot k at place k (equal clients, no empty places).
      meters: name -> diagnostic of every round.
      held: how the algorithm's state is held between rounds.
    """

    algorithm: Algorithm
    trainer: Trainer
    mesh: Mesh
    in_order: bool
    meters: Mapping[str, Meter] = dataclasses.field(default_factory=dict, hash=False)
    held: Held = AS_IT_IS

    def __call__(
        self,
        state: ServerState,
        inputs: RoundInputs,
        data: RoundData,
        watched: jax.Array | None = None,
    ) -> tuple[ServerState, RoundOutputs]:
        """One round, its products as fine as the model's. To be jitted with `state` donated.

        Args:
          state: of the server.
          inputs: what the host decides.
          data: the samples of its clients, in one of the placements of `fedjax_sim.engine.feed`.
          watched: i32[m], distinct slots whose models `RoundOutputs.view` shows; None: of nobody.
        """
        with self.trainer.model.precisely():
            return self._round(state, inputs, data, watched)

    def _round(
        self, state: ServerState, inputs: RoundInputs, data: RoundData, watched: jax.Array | None
    ) -> tuple[ServerState, RoundOutputs]:
        """See `__call__`."""
        cohort = inputs.cohort
        with jax.named_scope(SAMPLES):
            data = data.exchanged()
        look = self.trainer.watch.look
        state = dataclasses.replace(
            state,
            algorithm=self.held.cut(state.algorithm, cohort.ids),
            clients=self.held.clients_cut(state.clients, cohort.ids),
        )
        starts = self._dispatched(state.algorithm, cohort, inputs)
        look("dispatched model", starts.models)
        look("broadcast", starts.broadcast, infinite=True)
        with jax.named_scope(OF_CLIENTS):
            client_state = stacked.take_rows(state.clients, cohort.ids)
        results, handed, client_state, watched_models, readings = self._train(
            starts, client_state, inputs, data, watched
        )
        key = key_for(key_for(inputs.key, SERVER, cohort.round), _MERGE)
        self.trainer.watch.client(None)
        look("mean of the clients", results.mean)
        with jax.named_scope(MERGE):
            merged, metrics = self.algorithm.merge(state.algorithm, cohort, starts, results, key)
        look("merged state", merged, state.algorithm, infinite=True)
        metered, meters = {}, {}
        if self.meters:
            old, new = self.algorithm.deploy(state.algorithm), self.algorithm.deploy(merged)
            for name, (each, mean) in readings.items():
                meters[name], metered[name] = self.meters[name].finish(
                    state.meters[name], cohort, old, new, each, mean
                )
        server = self._soundness(merged)
        outputs = RoundOutputs(results.loss, results.included, handed, server, metrics, metered)
        ids, view = cohort.ids, None
        if watched is not None and not self.held.clients_on_host:  # where no row of theirs moves
            ids = stacked.once_there(ids, watched_models, outputs)
        with jax.named_scope(OF_CLIENTS):
            clients = stacked.put_rows(state.clients, ids, client_state)
        if watched is not None:
            done = (watched_models, stacked.only_rows(clients)), outputs
            after = self._merged_models(merged, clients, inputs, data, stacked.once_there(watched, *done))
            view = self._view((*watched_models, after), inputs, watched)
        clients = self.held.clients_filled(clients)
        state = ServerState(self.held.filled(merged), clients, meters, state.initial)
        return state, dataclasses.replace(outputs, view=view)

    def _merged_models(
        self,
        merged: Any,
        clients: Any,
        inputs: RoundInputs,
        data: DeviceData | CohortData,
        slots: jax.Array,
    ) -> Any:
        """What the clients in some slots i32[m] hold once merged. -> [m, …]."""
        cohort = inputs.cohort
        ids = _take(cohort.ids, slots)
        models = self.algorithm.client_models(merged, slots, ids)
        if self.trainer.rule.receive is None:
            return models
        upcoming = dataclasses.replace(cohort, round=cohort.round + 1)
        broadcast = self._dispatched(merged, upcoming, inputs).broadcast
        next_key = key_for(inputs.key, CLIENTS, upcoming.round)
        keys = self.trainer.keys(next_key, data.numbers_of(ids))
        client_state = stacked.take_rows(clients, stacked.once_there(ids, models))
        return self.trainer.send(self.trainer.receive(models, broadcast, client_state, keys))

    def _view(self, models: tuple[Any, Any, Any], inputs: RoundInputs, watched: jax.Array) -> MergeView:
        """What observers are shown; `models`: start, before and after, [m, …] each."""
        ids, counts = (_take(leaf, watched) for leaf in (inputs.cohort.ids, inputs.cohort.counts))
        if self.mesh.size > 1:
            ids, counts = stacked.whole((ids, counts))
            models = jax.tree.map(lambda leaf: stacked.filled_up(leaf, self.mesh.size), models)
            models = jax.lax.with_sharding_constraint(models, P(AXIS))
        them = Cohort(ids, counts, inputs.cohort.round)
        return MergeView(them, *models, inputs.lr, inputs.key)

    def personal(self, state: ServerState, ids: jax.Array) -> Any:
        """What clients would use themselves. i32[m] -> [m, …] models.

        Args:
          state: of the server; of what lies on the host it has the rows of `ids`.
          ids: i32[m].
        """
        algorithm, rule, own = self.algorithm, self.trainer.rule, self.held.cut(state.algorithm, ids)
        if algorithm.personal_models is not None:
            models = algorithm.personal_models(own, ids)
        else:
            models = stacked.broadcast(algorithm.deploy(own), len(ids))
        if rule.personal is None:
            return models
        clients = self.held.clients_cut(state.clients, ids)
        return stacked.per_slot(rule.personal)(stacked.take_rows(clients, ids)["rule"], models)

    @jax.named_scope(DISPATCH)
    def _dispatched(self, state: Any, cohort: Cohort, inputs: RoundInputs) -> Starts:
        """What this cohort starts from in its round."""
        key = key_for(key_for(inputs.key, SERVER, cohort.round), _DISPATCH)
        return self.algorithm.dispatch(state, cohort, key)

    def _train(
        self,
        starts: Starts,
        client_state: Any,
        inputs: RoundInputs,
        data: DeviceData | CohortData,
        watched: jax.Array | None,
    ) -> tuple[Results, jax.Array, Any, Any, dict[str, Any]]:
        """What came back, whether what was handed out was sound, what clients keep, (start, trained) of the
        watched slots, meters' (each, mean).
        """
        cohort, plan = inputs.cohort, inputs.plan
        own, same = P(AXIS), P()
        weigh = self.algorithm.weights
        weights = weigh(cohort) if weigh else jnp.zeros(cohort.ids.shape, jnp.float32)
        # Whole on every device. Left to XLA these few numbers would be cut and gathered again, and a program
        # from the compile cache may run such a gather and the ring of `take_rows` in different orders on
        # different CPU devices, which then wait for each other for ever.
        weights, cohort, plan = stacked.whole((weights, cohort, plan))
        place = lambda tree: self._move(tree, plan.slot_of_place)  # noqa: E731
        back = lambda tree: self._move(tree, plan.place_of_slot)  # noqa: E731

        occupied = plan.slot_of_place < cohort.ids.shape[0]
        lanes = Lanes(
            client_state=place(client_state),
            ids=_take(cohort.ids, plan.slot_of_place),
            counts=jnp.where(occupied, _take(cohort.counts, plan.slot_of_place), 0),
            weights=jnp.where(occupied, _take(weights, plan.slot_of_place), 0),
        )
        most, rank, row = 0, None, None
        if watched is not None:
            most, rank, row = self._watched_rows(plan, watched)
        run = stacked.on_devices(
            lambda *args: self._on_device(starts.shared, most, *args),
            mesh=self.mesh,
            in_specs=(same if starts.shared else own, same, own, own, same, same, data.spec, own),
            out_specs=(own, same, own, own, same),
        )
        models, mean, rest, watched_models, means = jax.named_scope(WAVES)(run)(
            starts.models if starts.shared else place(starts.models),
            starts.broadcast,
            lanes,
            plan.wave_steps,
            inputs.lr,
            key_for(inputs.key, CLIENTS, cohort.round),
            data,
            rank,
        )
        if row is not None:
            start, trained = self._in_watched_order(watched_models, row)
            watched_models = stacked.broadcast(starts.models, len(row)) if start is None else start, trained
        client_state, uploads, loss, faults, each = rest
        loss, faults = _take(loss, plan.place_of_slot), _take(faults, plan.place_of_slot)
        each = jax.tree.map(lambda leaf: _take(leaf, plan.place_of_slot), each)
        readings = {name: (each[name], means[name]) for name in self.meters}
        results = Results(back(models), mean, back(uploads), faults == _NONE, loss)
        return results, faults != _SERVERS, back(client_state), watched_models, readings

    def _watched_rows(self, plan: Plan, watched: jax.Array) -> tuple[int, jax.Array, jax.Array]:
        """Where devices keep the models of the watched slots i32[m], each those that it trains.

        Returns:
          (most, rows that each device has for them; i32[D * S], of each place its row on its device, `most`
          for those that nobody watches; i32[m], of each watched slot its row among all D * most).
        """
        places = _take(plan.place_of_slot, watched)
        each = plan.slot_of_place.shape[0] // self.mesh.size
        most, device = min(len(watched), each), places // each
        so_far = jnp.cumsum(jax.nn.one_hot(device, self.mesh.size, dtype=jnp.int32), 0)
        own = jnp.take_along_axis(so_far, device[:, None], 1)[:, 0] - 1
        rank = jnp.full(plan.slot_of_place.shape, most, jnp.int32).at[places].set(own)
        return most, *stacked.whole((rank, device * most + own))

    @jax.named_scope(ORDER)
    def _in_watched_order(self, models: PyTree, row: jax.Array) -> PyTree:
        """The watched slots' models, of the devices' rows for them. [D * most, …], i32[m] -> [m, …]."""
        leaves, structure = jax.tree.flatten(models)
        if self.mesh.size == 1:  # where they are in order
            return models
        # Not by the ring of `take_rows`: two exchanges where that has D, and none of them in a loop, which is
        # harder to put in order, see `stacked.once_there`.
        return structure.unflatten(stacked.permute_each(leaves, [row] * len(leaves)))

    def _on_device(
        self,
        shared: bool,
        watched: int,
        start: Variables,
        broadcast: PyTree,
        lanes: Lanes,
        wave_steps: jax.Array,
        lr: jax.Array,
        key: jax.Array,
        data: DeviceData | CohortData,
        rank: jax.Array | None,
    ) -> tuple[Variables | None, Variables | None, tuple[PyTree, ...], PyTree, PyTree]:
        """All waves of one device, one after another; inside `shard_map`.

        Args:
          shared: whether all clients start from one model.
          watched: `most`, how many clients of a device at most are shown to observers.
          start: that model, or [S, …], one a place.
          broadcast: extra of the algorithm.
          lanes: [S, …], the clients in this device's places; keys and first are filled in here.
          wave_steps: i32[W], optimiser steps of each wave.
          lr: f32[], the clients' learning rate.
          key: of the run and round.
          data: the training set.
          rank: i32[S], of each place among the device's watched, `most` for the others; None if nobody is.

        Returns:
          (trained [S, …] or None, mean over all devices or None, (client_state, uploads, loss, faults, what
          meters say of each client), all [S, …], (start, trained) of the watched [most, …], meters' means).
        """
        trainer, width = self.trainer, self.trainer.width
        wants_mean = self.algorithm.weights is not None
        # Of slots only the shape: reading one after the waves would keep all starts beside the trained.
        one = (
            start if shared else jax.eval_shape(lambda tree: jax.tree.map(lambda leaf: leaf[0], tree), start)
        )
        models = start if not shared else None
        if shared and self.algorithm.needs_models:
            places = lanes.ids.shape[0]
            models = jax.tree.map(lambda leaf: jnp.zeros((places, *leaf.shape), leaf.dtype), one)
        total = stacked.nothing(one) if wants_mean else None
        lanes = trainer.ready(lanes, key, data)
        # Of those watched: (start, trained), [most + 1, …]; the last row takes what nobody watches.
        rows = jax.tree.map(lambda leaf: jnp.zeros((watched + 1, *leaf.shape), leaf.dtype), one)
        same = shared and trainer.rule.receive is None
        watched_models = (None if same else rows, rows) if watched else None
        metered = self._nothing_read(one)

        def wave(carry: tuple[PyTree, ...], w: jax.Array) -> tuple[tuple[PyTree, ...], tuple[PyTree, ...]]:
            models, total, weight, watched_models, metered = carry
            cut = lambda tree: jax.tree.map(  # noqa: E731
                lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, w * width, width), tree
            )
            begin, own = stacked.broadcast(start, width) if shared else cut(models), cut(lanes)
            trainer.watch.client(own.ids)
            received = trainer.receive(begin, broadcast, own.client_state, own.keys)
            trainer.watch.look("parameters", received)
            trained, client_state, uploads, loss, finite, gradient = trainer.train_wave(
                received, broadcast, own, stacked.most_of_runs(wave_steps[w]), lr, data
            )
            received, trained = trainer.send(received), trainer.send(trained)
            metered, each = self._read(metered, received, trained, gradient, finite & (own.counts > 0))
            # A branch, and no selection where nothing is amiss: selection would fuse with the write below,
            # for which XLA then copies all slots, as it also reads them. Who is at fault is asked there too.
            trained, client_state, faults = jax.lax.cond(
                stacked.all_of_runs(finite.all()),
                lambda new, old: (*new, jnp.full(width, _NONE)),
                lambda new, old: (*stacked.where_slot(finite, new, old), _faults(finite, old[0], broadcast)),
                (trained, client_state),
                (begin, own.client_state),
            )
            uploads = jax.tree.map(lambda u: stacked.where_slot(finite, u, jnp.zeros_like(u)), uploads)
            if wants_mean:
                # A slot that has a model of its own keeps it; a shared start has nothing to add.
                share = jnp.where(finite, own.weights, 0) if shared else own.weights
                part = stacked.weighted_sum(trained, share)
                total, weight = stacked.add(total, part), weight + share.sum()
            if models is not None:
                models = jax.tree.map(
                    lambda all_, new: jax.lax.dynamic_update_slice_in_dim(all_, new, w * width, 0),
                    models,
                    trained,
                )
            if watched:
                assert rank is not None
                where = jax.lax.dynamic_slice_in_dim(rank, w * width, width)
                watched_models = (
                    None if same else _written(watched_models[0], where, received),
                    _written(watched_models[1], where, trained),
                )
            return (models, total, weight, watched_models, metered), (
                client_state,
                uploads,
                loss,
                faults,
                each,
            )

        numbers = jnp.arange(wave_steps.shape[0], dtype=jnp.int32)
        (models, total, weight, watched_models, metered), rest = jax.lax.scan(
            wave, (models, total, jnp.float32(0), watched_models, metered), numbers
        )
        rest = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), rest)
        mean = None
        if wants_mean:
            total, weight = stacked.over_devices(total, weight)
            mean = stacked.divided(total, weight, one)
            if shared:  # all left out: nothing has been learnt
                mean = jax.tree.map(lambda new, old: jnp.where(weight > 0, new, old), mean, start)
        watched_models = jax.tree.map(lambda leaf: leaf[:watched], watched_models)
        read, sums = stacked.summed(metered)
        means = jax.tree.map(lambda leaf: leaf / jnp.maximum(read, 1), sums)
        return models if self.algorithm.needs_models else None, mean, rest, watched_models, means

    def _soundness(self, state: Any) -> Soundness:
        """Of the algorithm's state after a merge."""
        stacks = jax.tree.leaves(self.algorithm.is_stacked(state))
        of_state = [leaf for leaf, stack in zip(_named(state), stacks, strict=True) if not stack]
        model = None if any(stacks) else self.algorithm.deploy(state)
        self.trainer.watch.look("deployed model", model)
        of_model = _named(model)
        names = [f"state{name}" for name, _ in of_state] + [f"deploy(state){name}" for name, _ in of_model]
        return Soundness(_kinds(of_state), _kinds(of_model), tuple(names))

    def _nothing_read(self, model: Variables) -> Any:
        """(clients read f32[], name -> sum of what a meter adds up), before the first wave."""
        gradient = {name: model["params"] if meter.gradients else None for name, meter in self.meters.items()}
        shapes = {
            name: shapes_of(meter.summand, model, model, gradient[name])
            for name, meter in self.meters.items()
        }
        return jnp.float32(0), jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), shapes)

    def _read(
        self, metered: PyTree, start: Variables, trained: Variables, gradient: PyTree, counted: jax.Array
    ) -> tuple[PyTree, PyTree]:
        """One wave's part of the meters' sums, and what they say of each client: leaves [L, …].

        Args:
          metered: the sums so far, as `_nothing_read` begins them.
          start: [L, …], what each client started from.
          trained: [L, …], what it trained.
          gradient: [L, …], of its last step.
          counted: bool[L], False where an update is left out.
        """
        read, sums = metered
        each, added = {}, {}
        for name, meter in self.meters.items():
            args = (start, trained, gradient if meter.gradients else None)
            each[name], summand = (
                stacked.per_slot(function)(*args) for function in (meter.per_client, meter.summand)
            )
            each[name], summand = (
                jax.tree.map(lambda leaf: stacked.where_slot(counted, leaf, jnp.zeros_like(leaf)), part)
                for part in (each[name], summand)
            )
            summand = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), summand)
            part = stacked.weighted_sum(summand, counted.astype(jnp.float32))
            added[name] = jax.tree.map(jnp.add, sums[name], part)
        return (read + counted.sum().astype(jnp.float32), added), each

    @jax.named_scope(ORDER)
    def _move(self, tree: PyTree, index: jax.Array) -> PyTree:
        """Slots to places or back; nothing to do where the two are the same."""
        leaves, structure = jax.tree.flatten(tree)
        if self.in_order or not leaves:
            return tree
        return structure.unflatten(stacked.permute_each(leaves, [index] * len(leaves)))


def _written(rows: PyTree, where: jax.Array, models: PyTree) -> PyTree:
    """Each model into its row. [m, …], i32[L], [L, …] -> [m, …]."""

    def write(lane: jax.Array, rows: PyTree) -> PyTree:
        return jax.tree.map(
            lambda row, new: jax.lax.dynamic_update_index_in_dim(row, new[lane], where[lane], 0), rows, models
        )

    return jax.lax.fori_loop(0, len(where), write, rows)


_NONE, _CLIENTS, _SERVERS = (np.int32(fault) for fault in range(3))  # whose fault an update is


def _faults(finite: jax.Array, sent: PyTree, broadcast: PyTree) -> jax.Array:
    """Whose fault it is that updates are not finite. bool[L], [L, …], no lane axis -> i32[L]."""
    sound = jnp.stack([jnp.bool_(True), *(_worst(leaf) != NAN for leaf in jax.tree.leaves(broadcast))]).all()
    return jnp.where(finite, _NONE, jnp.where(all_finite(sent) & sound, _CLIENTS, _SERVERS))


def _worst(leaf: jax.Array) -> jax.Array:
    """`FINE`, `INFINITE` or `NAN`, i32[]; what cannot be either is fine."""
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return jnp.int32(FINE)
    return jnp.where(
        jnp.isfinite(leaf).all(), jnp.int32(FINE), jnp.where(jnp.isnan(leaf).any(), NAN, jnp.int32(INFINITE))
    )


def _kinds(named: list[tuple[str, jax.Array]]) -> jax.Array:
    """Of (path, leaf) the worst of each leaf, i32[leaves]."""
    return jnp.stack([jnp.int32(FINE), *(_worst(leaf) for _, leaf in named)])[1:]


def _named(tree: PyTree) -> list[tuple[str, Any]]:
    """(path, leaf), as in `jax.tree.leaves`."""
    pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in pairs]


def _take(leaf: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take(leaf, index, axis=0, mode="clip")


@dataclasses.dataclass(frozen=True)
class Rounds:
    """Several rounds as one program, one after another: what one round does, so many times, to the bit.

    Attributes:
      round: one of them.
      shardings: of the state; they follow from the round. None: a device has all of it.
    """

    round: Round
    shardings: ServerState | None = dataclasses.field(compare=False)

    def __call__(
        self, state: ServerState, inputs: RoundInputs, count: jax.Array, data: RoundData
    ) -> tuple[ServerState, RoundOutputs]:
        """The state after them, and what each says of itself. Traced.

        Args:
          state: before the first.
          inputs: of up to R rounds, leaves [R, …], but for the key, which is that of the run.
          count: i32[], how many of them are done.
          data: the samples of all clients.

        Returns:
          The outputs of the rounds, leaves [R, …]; of those that are not done zeros.
        """

        def of(number: jax.Array) -> RoundInputs:
            one = dataclasses.replace(inputs, key=None)
            return dataclasses.replace(jax.tree.map(lambda leaf: leaf[number], one), key=inputs.key)

        def one(number: jax.Array, carry: tuple[ServerState, RoundOutputs]) -> Any:
            before, all_outputs = carry
            after, outputs = self.round(before, of(number), data, None)
            if self.shardings is not None:
                after = jax.lax.with_sharding_constraint(after, self.shardings)
            kept = jax.tree.map(
                lambda rows, new: jax.lax.dynamic_update_index_in_dim(rows, new, number, 0),
                all_outputs,
                outputs,
            )
            return after, kept

        limit = inputs.lr.shape[0]
        shapes = jax.eval_shape(lambda: self.round(state, of(jnp.int32(0)), data, None)[1])
        empty = jax.tree.map(lambda leaf: jnp.zeros((limit, *leaf.shape), leaf.dtype), shapes)
        with jax.named_scope(ROUNDS):
            return jax.lax.fori_loop(0, count, one, (state, empty))
