"""Clients' own state on the host: the rows of a round's cohort are sent to the devices, and fetched after it.

What N clients keep between rounds (control variates, models of their own, private layers) takes N rows of the
size of a model or so. On the devices these are cut; beyond what devices hold, or a host's memory, they lie in
`ClientRows`, and a round sees K of them. Results are the same bits.

On accelerators both ways go through page-locked memory (`pinned_host`), so that the way back starts as soon
as the round has ended. One thread of its own writes rows back and reads those of the next round while the
devices compute. It waits for the round under way only where the next one has some of the same clients.

Of several processes each keeps the rows of some clients and fills a share of the slots, which are seldom
theirs: so a row goes to its keeper's own devices, and a program of its own takes it on to its slot, and back.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from fedjax_sim.core import stacked
from fedjax_sim.core.algorithm import Algorithm
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.rng import INIT, key_for
from fedjax_sim.engine import placement
from fedjax_sim.engine.client_rows import Chunks, ClientRows, Snapshot
from fedjax_sim.engine.clients import Trainer
from fedjax_sim.engine.held import filled_shape
from fedjax_sim.engine.jaxpr_memory import bytes_of
from fedjax_sim.engine.programs import cached_jit
from fedjax_sim.engine.round import ServerState

DEVICE, HOST = "device", "host"
PINNED = "pinned_host"
"""JAX's name of page-locked memory."""

_LARGE = 2**31
"""Bytes a device from which clients' state lies on the host unless asked for; of all CPU devices of a process
together."""


class DamagedRow(UserError):
    """A client's row is no longer what was written."""


def where(wanted: str, algorithm: Algorithm, shapes: ServerState, num_clients: int, mesh: Mesh) -> str:
    """Where clients' state lies: as the user wants it, or by its size.

    Args:
      wanted: auto, device or host.
      algorithm: the record.
      shapes: of the state, with whatever number of rows.
      num_clients: N.
      mesh: the D devices.

    Raises:
      UserError: it is to lie on the host, and cannot.
    """
    leaves = _Split.of(algorithm, shapes).leaves(shapes)
    size = num_clients * bytes_of([_one(leaf) for leaf in leaves])
    devices = jax.process_count() if placement.platform_of(mesh) == "cpu" else mesh.size
    keys = any(map(_is_key, leaves))
    if wanted == HOST and keys:
        raise UserError(
            "execution.client_state",
            HOST,
            "it holds random keys (jax.random.key), which stay on the devices",
            "Leave execution.client_state out, or set it to device.",
        )
    if not leaves or keys or wanted == DEVICE:
        return DEVICE
    return HOST if wanted == HOST or size > _LARGE * devices else DEVICE


@dataclasses.dataclass(frozen=True)
class _Fresh:
    """Rows of clients who have taken no part yet, beside those of the others, as a function.

    Attributes:
      algorithm: the record.
      trainer: local training.
    """

    algorithm: Algorithm
    trainer: Trainer

    def __call__(
        self, rows: list[Any], fresh: jax.Array, labels: jax.Array, variables: Any, key: jax.Array
    ) -> list[Any]:
        """The rows.

        Args:
          rows: [m, …] each, as `_Split.leaves` has them; of fresh clients any.
          fresh: bool[m].
          labels: i32[m, C], training samples of each class that each client has.
          variables: the initial model.
          key: of the run.
        """
        state = self.algorithm.init(key_for(key_for(key, INIT), 1), variables)
        clients = stacked.per_slot(self.trainer.init_client, (None, 0))(variables, labels)
        first = ServerState(first_rows(self.algorithm, state, len(fresh)), clients)
        made = _Split.of(self.algorithm, first).leaves(first)
        return [stacked.where_slot(fresh, new, old) for new, old in zip(made, rows, strict=True)]


def first_rows(algorithm: Algorithm, state: Any, rows: int) -> Any:
    """An algorithm's first state, with so many rows of what clients keep, which begin alike."""
    there = algorithm.is_by_client(state)
    return jax.tree.map(
        lambda leaf, cut: jnp.broadcast_to(leaf[:1], (rows, *leaf.shape[1:])) if cut else leaf, state, there
    )


@dataclasses.dataclass(frozen=True)
class _Seats:
    """Where the rows of some clients lie, on the devices of the processes that keep them.

    Attributes:
      each: rows that a device has room for.
      own: i32[m], clients whose rows this process keeps, in the order in which they lie on its devices.
      others: those of the other processes.
      row: i32[K or more], where each slot's row is, of those of all devices; None: slots are in this order
        already.
      slot: i32[m], of each of these rows the slot that has what it will be; of spare rows any.
    """

    each: int
    own: np.ndarray
    others: np.ndarray
    row: np.ndarray | None = None
    slot: np.ndarray | None = None

    @classmethod
    def of(cls, ids: np.ndarray, slots: int, rows: ClientRows, mesh: Mesh) -> "_Seats":
        """Of the clients `ids`, i32[m], who fill the first of so many slots. A client may be there twice."""
        keepers = [device.process_index for device in mesh.devices.flat]
        if len(set(keepers)) == 1:
            return cls(slots // mesh.size, ids, ids[:0])
        clients, last = np.unique(ids[::-1], return_index=True)
        last = len(ids) - 1 - last
        keeper = rows.keeper(clients)
        of = {process: np.flatnonzero(np.equal(keepers, process)) for process in set(keepers)}
        counts = {process: int(np.sum(keeper == process)) for process in of}
        # In steps, so that few different programs come of it.
        step = max(1, slots // (4 * mesh.size))
        fullest = max(-(-count // len(of[process])) for process, count in counts.items())
        each = -(-fullest // step) * step
        places = np.zeros(len(clients), np.int32)
        for process, devices in of.items():
            room = (devices[:, None] * each + np.arange(each)).ravel()
            places[keeper == process] = room[: counts[process]]
        slot = np.zeros(mesh.size * each, np.int32)
        slot[places] = last
        row = np.zeros(slots, np.int32)
        row[: len(ids)] = places[np.searchsorted(clients, ids)]
        mine = keeper == jax.process_index()
        return cls(each, clients[mine], clients[~mine], row, slot)


def _taken(rows: list[jax.Array], index: jax.Array) -> list[jax.Array]:
    return stacked.take_rows(rows, index)


class ClientState:
    """Clients' rows on the host, and their way to the devices and back.

    Attributes:
      rows: of all clients; of several processes, of those whom this one keeps.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        trainer: Trainer,
        mesh: Mesh,
        labels: np.ndarray,
        key: jax.Array,
        shapes: ServerState,
    ):
        """No client has a row yet.

        Args:
          algorithm: the record.
          trainer: local training.
          mesh: the D devices.
          labels: i32[N, C], training samples of each class that each client has.
          key: of the run.
          shapes: of the state, with K rows of what clients keep.
        """
        self._mesh, self._labels, self._key = mesh, labels, key
        self._split = _Split.of(algorithm, shapes)
        self._leaves = [_one(leaf) for leaf in self._split.leaves(shapes)]
        cut = placement.cut(mesh)
        self._fresh = cached_jit(_Fresh(algorithm, trainer), mesh, out_shardings=[cut] * len(self._leaves))
        self._moved = cached_jit(_taken, mesh, out_shardings=[cut] * len(self._leaves))
        self.rows = ClientRows(len(labels), self._leaves, part=_part())
        self._worker: ThreadPoolExecutor | None = None
        self._writes: list[Future[None]] = []
        self._read: tuple[np.ndarray, Future[Any]] | None = None

    @functools.cached_property
    def _staging(self) -> NamedSharding:
        return staging(self._mesh)

    def use_chunks(self, chunks: Chunks) -> None:
        """Keeps rows in these chunks; before the first round."""
        self.rows = ClientRows(self.rows.count, self._leaves, chunks, _part())

    def placed(self, state: ServerState, ids: np.ndarray) -> ServerState:
        """A state that has these clients' rows. i32[m]."""
        seats = self._seats(ids)
        if self._read is not None and np.array_equal(self._read[0], ids):
            reading, self._read = self._read[1], None
        else:
            reading = self._submit(self._get, ids, seats)
        rows, fresh = self._result(reading)
        cut = placement.cut(self._mesh)
        there = [placement.put_own(leaf, seats.each, self._staging) for leaf in rows]
        if self._staging != cut:
            there = jax.device_put(there, cut)
        if seats.row is not None:
            with jax.set_mesh(self._mesh):
                there = self._moved(there, seats.row)
        if fresh.any():
            with jax.set_mesh(self._mesh):
                labels = self._filled(self._labels[ids])
                there = self._fresh(there, self._filled(fresh), labels, state.initial, self._key)
        return self._split.joined(state, there)

    def after(self, state: ServerState, ids: np.ndarray, upcoming: np.ndarray | None) -> None:
        """Begins to fetch what a round has left, and to read what the next one needs.

        Args:
          state: after the round.
          ids: i32[K], its clients.
          upcoming: i32[K], those of the next; None: nobody knows yet, or there is none.
        """
        for done in [write for write in self._writes if write.done()]:
            self._result(done)
            self._writes.remove(done)
        seats, fetched = self._seats(ids), self._split.leaves(state)
        if seats.slot is not None:
            with jax.set_mesh(self._mesh):
                fetched = self._moved(fetched, seats.slot)
        if self._staging != placement.cut(self._mesh):
            fetched = jax.device_put(fetched, self._staging)
        apart = upcoming is not None and not np.isin(upcoming, ids).any()
        if upcoming is not None and apart:
            self._read = upcoming, self._submit(self._get, upcoming, self._seats(upcoming))
        self._writes.append(self._submit(self._put, seats, fetched))
        if upcoming is not None and not apart:
            self._read = upcoming, self._submit(self._get, upcoming, self._seats(upcoming))

    def _seats(self, ids: np.ndarray) -> _Seats:
        (slots,) = filled_shape((len(ids),), self._mesh.size)
        return _Seats.of(ids, slots, self.rows, self._mesh)

    def _filled(self, rows: np.ndarray) -> np.ndarray:
        """With what the devices have beside them. [m, …] -> [m or more, …]."""
        (slots,) = filled_shape((len(rows),), self._mesh.size)
        spare = np.zeros((slots - len(rows), *rows.shape[1:]), rows.dtype)
        return np.concatenate([rows, spare]) if len(spare) else rows

    def snapshot(self, number: int, keep: int) -> Snapshot:
        """See `ClientRows.snapshot`; waits for all rounds before `number`."""
        self._wait()
        return self.rows.snapshot(number, keep)

    def load(self, number: int, snapshots: Mapping[int, Snapshot]) -> None:
        """See `ClientRows.load`."""
        self._read = None
        self._wait()
        self.rows.load(number, snapshots)

    def _wait(self) -> None:
        writes, self._writes = self._writes, []
        for write in writes:
            self._result(write)

    def _submit(self, function: Any, *args: Any) -> Future[Any]:
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="client-state")
        return self._worker.submit(function, *args)

    def _result(self, future: Future[Any]) -> Any:
        try:
            return future.result()
        except ValueError as error:
            fix = "Start the run again, or put its folder back as it was."
            raise DamagedRow("execution.client_state", HOST, str(error), fix) from error

    def _get(self, ids: np.ndarray, seats: _Seats) -> tuple[list[np.ndarray], np.ndarray]:
        return self.rows.get(seats.own), ~self.rows.known(ids)

    def _put(self, seats: _Seats, leaves: Sequence[jax.Array]) -> None:
        self.rows.put(seats.own, [placement.own(leaf)[: len(seats.own)] for leaf in leaves])
        self.rows.put_elsewhere(seats.others)


@dataclasses.dataclass(frozen=True)
class _Split:
    """Which leaves of a state are clients' rows: its algorithm's `by_client`, and what clients keep.

    Attributes:
      there: of each leaf of the algorithm's state, whether it is.
    """

    there: tuple[bool, ...]

    @classmethod
    def of(cls, algorithm: Algorithm, state: ServerState) -> "_Split":
        """Of an algorithm's states, of which one is given, or its shapes."""
        return cls(tuple(jax.tree.leaves(algorithm.is_by_client(state.algorithm))))

    def leaves(self, state: ServerState) -> list[Any]:
        """The rows of a state: first of the algorithm's, then what clients keep."""
        pairs = zip(jax.tree.leaves(state.algorithm), self.there, strict=True)
        return [leaf for leaf, there in pairs if there] + jax.tree.leaves(state.clients)

    def joined(self, state: ServerState, rows: Sequence[Any]) -> ServerState:
        """The state with other rows."""
        given = iter(rows)
        leaves, structure = jax.tree.flatten(state.algorithm)
        pairs = zip(leaves, self.there, strict=True)
        algorithm = structure.unflatten([next(given) if there else leaf for leaf, there in pairs])
        return dataclasses.replace(
            state, algorithm=algorithm, clients=jax.tree.structure(state.clients).unflatten(list(given))
        )


def staging(mesh: Mesh) -> NamedSharding:
    """Where rows lie on their way: in page-locked memory, or, beside CPU devices, with these."""
    cut = placement.cut(mesh)
    if placement.platform_of(mesh) == "cpu":
        return cut
    kinds = [{memory.kind for memory in device.addressable_memories()} for device in mesh.local_devices]
    return cut.with_memory_kind(PINNED) if all(PINNED in there for there in kinds) else cut


def _part() -> tuple[int, int]:
    return jax.process_index(), jax.process_count()


def _one(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
