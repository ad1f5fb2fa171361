"""Rows of N clients on the host: what they keep between rounds, where the devices do not hold all of it.

A row is what one client keeps, as bytes. Rows lie in chunks of equal size, in memory or in mapped files, and
those alone take room that were ever put: clients who have not taken part yet have none.

A row that some snapshot needs is not overwritten: its client's next one goes elsewhere, and the place is free
again once no snapshot needs it (copy on write, as databases have it). So a snapshot is two numbers a client,
where its row is and its checksum, and takes no copy of the rows: with the files as they were left by a killed
process, an earlier snapshot is still whole.

Of P processes each keeps the rows of every P-th client, in chunks of its own, and a snapshot is that of all:
another number of processes can go on from it, where all see the chunks.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from fedjax_sim.engine import hosts
from fedjax_sim.engine.jaxpr_memory import leaf_bytes

CHUNK = 2**26
"""Bytes of a chunk, about."""

NOWHERE = -1
"""The place of a row that was never put."""

_ELSEWHERE = -2
"""That of one which another process keeps, until it says where in a snapshot."""

Chunks = Callable[[int, tuple[int, int], bool], np.ndarray]
"""(number of a chunk, (rows, bytes of a row), whether this process writes it) -> u8[rows, bytes]; with its
file's content, if it has one."""

Snapshot = Mapping[str, np.ndarray]
"""places: i32[N], where each client's row is, or `NOWHERE`. sums: u32[N], checksums. layout: i64[2], bytes of
a row and rows in a chunk."""


def in_memory(number: int, shape: tuple[int, int], own: bool) -> np.ndarray:
    """Chunks that are not kept."""
    del number, own
    return np.empty(shape, np.uint8)


class ClientRows:
    """Rows of N clients, each of the same leaves; of P processes the p-th keeps those of clients p, p + P, ….

    Attributes:
      count: N.
      row_bytes: of one row.
    """

    def __init__(
        self,
        count: int,
        leaves: Sequence[jax.ShapeDtypeStruct],
        chunks: Chunks = in_memory,
        part: tuple[int, int] = (0, 1),
    ):
        """No client has a row yet.

        Args:
          count: N.
          leaves: of one client, without an axis for clients.
          chunks: makes the room.
          part: (p, P), which of how many processes this is.
        """
        self.count, self._leaves, self._make, self._part = count, tuple(leaves), chunks, part
        self._ends = np.cumsum([0, *map(leaf_bytes, leaves)]).tolist()
        self.row_bytes = max(self._ends[-1], 1)
        self._per_chunk = min(max(1, CHUNK // self.row_bytes), count)
        self._chunks: dict[int, np.ndarray] = {}
        self._own = 0  # chunks that this process writes: p, p + P, …
        self._places = np.full(self.count, NOWHERE, np.int32)
        self._sums = np.zeros(self.count, np.uint32)
        self._unread = np.zeros(self.count, bool)  # since it was loaded; its checksum was not compared yet
        self._needed: dict[int, np.ndarray] = {}  # number of a snapshot -> places that it needs
        self._fixed = np.zeros(0, bool)  # by place: whether a snapshot needs it
        self._free = np.zeros(0, np.int32)  # those of its own that nobody needs; the next is the last

    @property
    def places(self) -> int:
        """How many rows there is room for in this process's chunks."""
        return self._own * self._per_chunk

    def keeper(self, ids: np.ndarray) -> np.ndarray:
        """Which process keeps the rows of these clients. i32[m] -> i32[m]."""
        return ids % self._part[1]

    def known(self, ids: np.ndarray) -> np.ndarray:
        """Which of these clients have a row, whoever keeps it. i32[m] -> bool[m]."""
        return self._places[ids] != NOWHERE

    def get(self, ids: np.ndarray) -> list[np.ndarray]:
        """Rows of some clients whom this process keeps, leaves [m, …]; zeros for those who have none.

        Raises:
          ValueError: a row is not what was put.
        """
        packed = np.zeros((len(ids), self.row_bytes), np.uint8)
        for row, client in zip(packed, ids.tolist(), strict=True):
            place = int(self._places[client])
            if place == NOWHERE:
                continue
            row[:] = self._row(place)
            if self._unread[client]:
                self._check(client, row)
        return [
            np.ascontiguousarray(packed[:, start:end]).view(leaf.dtype).reshape(len(ids), *leaf.shape)
            for leaf, start, end in zip(self._leaves, self._ends[:-1], self._ends[1:], strict=True)
        ]

    def put(self, ids: np.ndarray, leaves: Sequence[np.ndarray]) -> None:
        """Replaces the rows of some clients whom this process keeps. The last one of a client counts.

        Args:
          ids: i32[m].
          leaves: [m, …] each.

        Raises:
          OSError: there is no room; no row has changed.
        """
        if not len(ids):
            return
        parts = [np.ascontiguousarray(leaf).reshape(len(ids), -1).view(np.uint8) for leaf in leaves]
        packed = np.concatenate(parts, axis=1)
        last = {client: row for row, client in enumerate(ids.tolist())}
        clients = np.fromiter(last, np.int64, len(last))
        old = self._places[clients]
        moves = old == NOWHERE
        moves[~moves] = self._fixed[old[~moves]]  # in a chunk of another process each is
        while len(self._free) < moves.sum():
            self._more()
        left = len(self._free) - int(moves.sum())
        self._places[clients[moves]] = self._free[left:][::-1]
        self._free = self._free[:left]
        for client in clients.tolist():
            row = packed[last[client]]
            self._row(int(self._places[client]))[:] = row
            self._sums[client] = zlib.crc32(row)
        self._unread[clients] = False

    def put_elsewhere(self, ids: np.ndarray) -> None:
        """Notes that other processes have put the rows of these clients. i32[m]."""
        self._places[ids] = _ELSEWHERE

    def snapshot(self, number: int, keep: int) -> Snapshot:
        """All rows as they are now; written to their files, and not overwritten as long as it is kept.

        All processes call it together.

        Args:
          number: its name; a later one has a larger number.
          keep: how many of the newest are kept, with this one.

        Raises:
          OSError: they cannot be written.
        """

        def flush() -> None:
            for chunk in self._chunks.values():
                if isinstance(chunk, np.memmap):
                    chunk.flush()

        hosts.all_or_none(flush)
        self._places, self._sums = self._of_all(self._places), self._of_all(self._sums)
        self._needed[number] = self._places.copy()
        for older in sorted(self._needed)[:-keep]:
            del self._needed[older]
        self._settle()
        layout = np.asarray([self.row_bytes, self._per_chunk], np.int64)
        return {"places": self._places.copy(), "sums": self._sums.copy(), "layout": layout}

    def load(self, number: int, snapshots: Mapping[int, Snapshot]) -> None:
        """Goes back to a snapshot. Rows that the one before does not have are compared with their checksums,
        the others when they are first read; each by the process that keeps them now.

        Args:
          number: its name.
          snapshots: it, and all others that must stay as they are.

        Raises:
          ValueError: it is of other rows, or rows are not there or not what they were.
          OSError: they cannot be read.
        """
        wanted = snapshots[number]
        width, per_chunk = (int(part) for part in wanted["layout"])
        if len(wanted["places"]) != self.count or width != self.row_bytes:
            told = f"{len(wanted['places'])} clients' state of {width} bytes each"
            raise ValueError(f"it holds {told}, and the run has {self.count} of {self.row_bytes}")
        if per_chunk != self._per_chunk:
            self._chunks, self._own, self._per_chunk = {}, 0, per_chunk
        highest = max(int(one["places"].max(initial=NOWHERE)) for one in snapshots.values())
        used = {
            place // per_chunk for one in snapshots.values() for place in np.unique(one["places"]).tolist()
        }
        while self._next * per_chunk <= highest:
            if self._next in used:  # then it is there, and not to be made
                self._make(self._next, (per_chunk, self.row_bytes), False)
            self._open()
        self._places, self._sums = wanted["places"].copy(), wanted["sums"].copy()
        mine = self.keeper(np.arange(self.count)) == self._part[0]
        self._unread = mine & (self._places != NOWHERE)
        self._needed = {name: one["places"] for name, one in snapshots.items()}
        self._settle()
        before = max((name for name in snapshots if name < number), default=None)
        new = self._unread if before is None else self._places != snapshots[before]["places"]
        for client in np.flatnonzero(new & self._unread).tolist():
            self._check(client, self._row(int(self._places[client])))

    def _of_all(self, numbers: np.ndarray) -> np.ndarray:
        """Each client's number as its keeper has it. [N] -> [N]."""
        process, processes = self._part
        own = np.zeros(-(-self.count // processes), numbers.dtype)
        own[: len(numbers[process::processes])] = numbers[process::processes]
        return hosts.gathered(own).T.reshape(-1)[: self.count].copy()

    def _check(self, client: int, row: np.ndarray) -> None:
        if zlib.crc32(np.ascontiguousarray(row).data) != self._sums[client]:
            raise ValueError(f"the state of client {client} does not have the checksum that was written")
        self._unread[client] = False

    def _row(self, place: int) -> np.ndarray:
        number, row = divmod(place, self._per_chunk)
        if number not in self._chunks:  # another process wrote it, of a run that had another number of them
            self._chunks[number] = self._make(number, (self._per_chunk, self.row_bytes), False)
        return self._chunks[number][row]

    @property
    def _next(self) -> int:
        """The number of the next chunk of its own."""
        process, processes = self._part
        return process + self._own * processes

    def _open(self) -> int:
        """Makes or finds the next chunk of its own. -> its first place."""
        number = self._next
        self._chunks[number] = self._make(number, (self._per_chunk, self.row_bytes), True)
        self._own += 1
        return number * self._per_chunk

    def _more(self) -> None:
        first = self._open()
        new = np.arange(first, first + self._per_chunk, dtype=np.int32)
        self._fixed = np.pad(self._fixed, (0, max(0, int(new[-1]) + 1 - len(self._fixed))))
        # Taken from the end: neighbours lie in the order in which they came.
        self._free = np.concatenate([new[::-1], self._free])

    def _settle(self) -> None:
        """Finds anew which places snapshots need, and which nobody does."""
        numbers = [number for number in range(self._part[0], self._next, self._part[1])]
        own = np.concatenate(
            [np.arange(n * self._per_chunk, (n + 1) * self._per_chunk, dtype=np.int32) for n in numbers]
            or [np.zeros(0, np.int32)]
        )
        used = [*self._needed.values(), self._places]
        end = 1 + max(int(own.max(initial=-1)), *(int(one.max(initial=-1)) for one in used))
        self._fixed = np.zeros(end, bool)
        for needed in self._needed.values():
            self._fixed[needed[needed >= 0]] = True
        taken = self._fixed.copy()
        taken[self._places[self._places >= 0]] = True
        self._free = own[~taken[own]][::-1]
