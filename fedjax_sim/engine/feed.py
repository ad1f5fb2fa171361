"""Where a round's samples come from: three placements of the training set, with equal results.

- `copied`: the set lies whole on every device, once and for all.
- `cut`: each device has its share of the set; in each round the samples of its clients come to it, along the
  ring of devices (`stacked.take_rows`).
- `streamed`: the set stays on the host, also as a memory-mapped file larger than memory. The samples of the
  next rounds' clients are gathered and sent while a round runs. Each process reads those of its own devices
  and no others.

In the last two a device holds, of a round, the samples of the clients that it trains, one client after
another, filled up to a common length. That is rounded up to four sizes an octave and never shrinks, so that
rounds of other clients mostly find the same compiled program.
"""

import dataclasses
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np
from flax import struct
from jax.sharding import Mesh

from fedjax_sim.core import stacked
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.task import Example
from fedjax_sim.data import Partition, Samples
from fedjax_sim.data.ragged import Ragged, runs
from fedjax_sim.engine.device_data import CohortData, DataStore, DeviceData, rounded_up
from fedjax_sim.engine.placement import platform_of
from fedjax_sim.engine.waves import Plan

COPIED, CUT, STREAMED = "copied", "cut", "streamed"
AHEAD = 2
"""Rounds whose samples are prepared while others run; each keeps its samples on the devices."""

_LARGE = 2**31
"""Bytes of a training set from which an accelerator does not hold all of it unless asked to."""


@struct.dataclass
class CutData:
    """The training set cut over the devices, and which of it a round's clients hold. The round reads this.

    Attributes:
      train: leaves [m, …], m the samples filled up to a multiple of D; each device has its share.
      wanted: i32[D * T], rows of `train`, device after device; of what fills up any.
      first: i32[D * S], as in `CohortData`.
      rng_ids: i32[D * S], likewise.
    """

    train: Example
    wanted: jax.Array
    first: jax.Array
    rng_ids: jax.Array | None = None

    def exchanged(self) -> CohortData:
        """The samples of the round's clients, on the devices that train these. Traced."""
        return CohortData(stacked.take_rows(self.train, self.wanted), self.first, self.rng_ids)


RoundData = DeviceData | CohortData | CutData


def placement_of(wanted: str, dataset: Samples, mesh: Mesh, reads_whole: Mapping[str, bool]) -> str:
    """The placement that is taken: as the user wants it, or by the set's size.

    A memory-mapped set is streamed. An accelerator holds a set of up to 2 GiB whole, and a share of a larger
    one as long as that share is no larger. CPU devices share the host's memory, and nothing is copied. Where
    something reads all samples on every device they are there.

    Args:
      wanted: auto, or one of the three.
      dataset: the samples.
      mesh: the D devices.
      reads_whole: setting -> whether it is on, of those that read all samples.

    Raises:
      UserError: a placement is wanted that does not go with one of these.
    """
    reader = next((name for name, reads in reads_whole.items() if reads), None)
    if wanted not in ("auto", COPIED) and reader is not None:
        raise UserError(
            "execution.data",
            wanted,
            f"{reader} reads training samples of any client on every device",
            "Leave execution.data out or set it to copied, or leave that out.",
        )
    if wanted != "auto" or reader is not None:
        return COPIED if wanted == "auto" else wanted
    leaves = list(dataset.train.values())
    if any(isinstance(leaf, np.memmap) for leaf in leaves):
        return STREAMED
    size = sum(leaf.nbytes for leaf in leaves)
    if platform_of(mesh) == "cpu" or size <= _LARGE:
        return COPIED
    return CUT if size <= _LARGE * mesh.size else STREAMED


@dataclasses.dataclass(frozen=True)
class _Places:
    """Whose samples lie where in a round.

    Attributes:
      rows: of each device, the rows of the set that it needs, i64[t_d].
      first: i32[D * S], where those of each place's client begin among its device's.
      ids: i32[D * S], each place's client; of an empty place any.
    """

    rows: tuple[np.ndarray, ...]
    first: np.ndarray
    ids: np.ndarray


def places_of(ids: np.ndarray, plan: Plan, held: Ragged, devices: int) -> _Places:
    """Lays a round's samples out over the devices.

    Args:
      ids: i32[K], the cohort.
      plan: of the round.
      held: rows of the set that each of N clients holds.
      devices: D.
    """
    slots = np.asarray(plan.slot_of_place)
    occupied = slots < len(ids)
    clients = np.asarray(ids)[np.where(occupied, slots, 0)]
    sizes = np.where(occupied, held.sizes[clients], 0).reshape(devices, -1)
    first = np.cumsum(sizes, axis=1) - sizes
    starts = held.offsets[clients].reshape(devices, -1)
    rows = tuple(
        held.flat[runs(start, size)].astype(np.int64) for start, size in zip(starts, sizes, strict=True)
    )
    return _Places(rows, first.reshape(-1).astype(np.int32), clients.astype(np.int32))


class Feed:
    """Gives each round the data that it reads.

    Attributes:
      kind: copied, cut or streamed.
      whole: the data of every round, where they are copied; else None.
    """

    def __init__(self, kind: str, dataset: Samples, partition: Partition, store: DataStore):
        """Places what stays on the devices.

        Args:
          kind: copied, cut or streamed.
          dataset: the samples.
          partition: who holds which.
          store: the devices.
        """
        self.kind, self._store, self._dataset = kind, store, dataset
        self.whole = store.of_round(dataset, partition) if kind == COPIED else None
        self._held, self._rng_ids = Ragged.of(partition.train), partition.rng_ids
        self._length, self._lock = 1, threading.Lock()
        self._train: Example | None = store.cut_whole(dataset.train) if kind == CUT else None
        self._worker: ThreadPoolExecutor | None = None
        self._ahead: dict[int, Future[RoundData]] = {}

    def of(self, number: int, ids: np.ndarray, plan: Plan) -> RoundData:
        """What a round reads.

        Args:
          number: of the round, from 0.
          ids: i32[K], its cohort.
          plan: of the round.

        Raises:
          UserError: a memory-mapped file has changed its size.
        """
        if self.whole is not None:
            return self.whole
        waiting = self._ahead.pop(number, None)
        return self._made(ids, plan) if waiting is None else waiting.result()

    def prepare(self, upcoming: range, inputs: Callable[[int], tuple[np.ndarray, Plan]]) -> None:
        """Begins to prepare rounds to come, beside whatever else happens; at most `AHEAD` of them.

        Args:
          upcoming: their numbers, from 0; none: the last round has begun, and nothing is prepared any more.
          inputs: (ids i32[K], plan) of a round.
        """
        if self.kind != STREAMED:
            return
        if not upcoming:
            return self.close()
        for number in list(self._ahead):
            if number not in upcoming:
                self._ahead.pop(number).cancel()
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="samples")
        for number in upcoming[:AHEAD]:
            if number not in self._ahead:
                self._ahead[number] = self._worker.submit(lambda number=number: self._made(*inputs(number)))

    def close(self) -> None:
        """Stops preparing."""
        if self._worker is not None:
            self._worker.shutdown(wait=False, cancel_futures=True)
        self._worker = None
        self._ahead.clear()

    def _made(self, ids: np.ndarray, plan: Plan) -> RoundData:
        devices = self._store.mesh.size
        places = places_of(ids, plan, self._held, devices)
        with self._lock:
            longest = max(len(rows) for rows in places.rows)
            self._length = max(self._length, rounded_up(longest))
            length = self._length
        cut = self._store.cut
        first = cut(places.first)
        rng_ids = (
            None if self._rng_ids is None else cut(np.asarray(self._rng_ids)[places.ids].astype(np.int32))
        )
        if self.kind == CUT:
            wanted = np.zeros((devices, length), np.int32)
            for row, rows in zip(wanted, places.rows, strict=True):
                row[: len(rows)] = rows
            assert self._train is not None
            return CutData(self._train, self._store.same(wanted.reshape(-1)), first, rng_ids)
        train = {
            key: self._store.by_device(leaf, places.rows, length, _read(key, leaf))
            for key, leaf in self._dataset.train.items()
        }
        return CohortData(train, first, rng_ids)


def _read(key: str, leaf: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Reads rows i64[t] of samples, memory-mapped ones too."""

    def rows(index: np.ndarray) -> np.ndarray:
        if isinstance(leaf, np.memmap) and leaf.filename is not None:
            _check_size(key, leaf)
        # In the order of the file; neighbours are read together.
        order = np.argsort(index, kind="stable")
        found = np.empty((len(index), *leaf.shape[1:]), leaf.dtype)
        found[order] = leaf[index[order]]
        return found

    return rows


def _check_size(key: str, leaf: np.memmap) -> None:
    """Raises UserError where the file is shorter than the array that is mapped."""
    needed = leaf.offset + leaf.nbytes
    try:
        there = os.path.getsize(leaf.filename)  # pyright: ignore[reportArgumentType] a path, as it is mapped
    except OSError as error:
        raise UserError(
            f"data.train.{key}", str(leaf.filename), f"it cannot be read: {error.strerror}", "Put it back."
        ) from error
    if there < needed:
        raise UserError(
            f"data.train.{key}",
            str(leaf.filename),
            f"it has {there:,} bytes, and had {needed:,} when the run started",
            "Put the whole file back, and resume the run.",
        )
