"""Rows of N clients on the host: what they keep between rounds, where the devices do not hold all of it.

A row is what one client keeps, as bytes. Rows lie in chunks of equal size, in memory or in mapped files, and
those alone take room that were ever put: clients who have not taken part yet have none.

A row that some snapshot needs is not overwritten: its client's next one goes elsewhere, and the place is free
again once no snapshot needs it (copy on write, as databases have it). So a snapshot is two numbers a client,
where its row is and its checksum, and takes no copy of the rows: with the files as they were left by a killed
process, an earlier snapshot is still whole.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from fedjax_sim.engine.jaxpr_memory import leaf_bytes

CHUNK = 2**26
"""Bytes of a chunk, about."""

NOWHERE = -1
"""The place of a row that was never put."""

Chunks = Callable[[int, tuple[int, int]], np.ndarray]
"""(number of a chunk, (rows, bytes of a row)) -> u8[rows, bytes]; with its file's content, if it has one."""

Snapshot = Mapping[str, np.ndarray]
"""places: i32[N], where each client's row is, or `NOWHERE`. sums: u32[N], checksums. layout: i64[2], bytes of
a row and rows in a chunk."""


def in_memory(number: int, shape: tuple[int, int]) -> np.ndarray:
    """Chunks that are not kept."""
    del number
    return np.empty(shape, np.uint8)


class ClientRows:
    """Rows of N clients, each of the same leaves.

    Attributes:
      count: N.
      row_bytes: of one row.
    """

    def __init__(self, count: int, leaves: Sequence[jax.ShapeDtypeStruct], chunks: Chunks = in_memory):
        """No client has a row yet.

        Args:
          count: N.
          leaves: of one client, without an axis for clients.
          chunks: makes the room.
        """
        self.count, self._leaves, self._make = count, tuple(leaves), chunks
        self._ends = np.cumsum([0, *map(leaf_bytes, leaves)]).tolist()
        self.row_bytes = max(self._ends[-1], 1)
        self._per_chunk = min(max(1, CHUNK // self.row_bytes), count)
        self._chunks: list[np.ndarray] = []
        self._places = np.full(self.count, NOWHERE, np.int32)
        self._sums = np.zeros(self.count, np.uint32)
        self._unread = np.zeros(self.count, bool)  # since it was loaded; its checksum was not compared yet
        self._needed: dict[int, np.ndarray] = {}  # number of a snapshot -> places that it needs
        self._fixed = np.zeros(0, bool)  # by place: whether a snapshot needs it
        self._free = np.zeros(0, np.int32)  # those that nobody needs; the next is the last

    @property
    def places(self) -> int:
        """How many rows there is room for."""
        return len(self._chunks) * self._per_chunk

    def known(self, ids: np.ndarray) -> np.ndarray:
        """Which of these clients have a row. i32[m] -> bool[m]."""
        return self._places[ids] != NOWHERE

    def get(self, ids: np.ndarray) -> list[np.ndarray]:
        """Rows of some clients, leaves [m, …]; zeros for those who have none.

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
        """Replaces the rows of some clients. Of a client who is there twice the last one counts.

        Args:
          ids: i32[m].
          leaves: [m, …] each.

        Raises:
          OSError: there is no room; no row has changed.
        """
        parts = [np.ascontiguousarray(leaf).reshape(len(ids), -1).view(np.uint8) for leaf in leaves]
        packed = np.concatenate(parts, axis=1)
        last = {client: row for row, client in enumerate(ids.tolist())}
        clients = np.fromiter(last, np.int64, len(last))
        old = self._places[clients]
        moves = old == NOWHERE
        moves[~moves] = self._fixed[old[~moves]]
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

    def snapshot(self, number: int, keep: int) -> Snapshot:
        """All rows as they are now; written to their files, and not overwritten as long as it is kept.

        Args:
          number: its name; a later one has a larger number.
          keep: how many of the newest are kept, with this one.

        Raises:
          OSError: they cannot be written.
        """
        for chunk in self._chunks:
            if isinstance(chunk, np.memmap):
                chunk.flush()
        self._needed[number] = self._places.copy()
        for older in sorted(self._needed)[:-keep]:
            del self._needed[older]
        self._settle()
        layout = np.asarray([self.row_bytes, self._per_chunk], np.int64)
        return {"places": self._places.copy(), "sums": self._sums.copy(), "layout": layout}

    def load(self, number: int, snapshots: Mapping[int, Snapshot]) -> None:
        """Goes back to a snapshot. Rows that the one before does not have are compared with their checksums,
        the others when they are first read.

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
            self._chunks, self._per_chunk = [], per_chunk
        highest = max(int(one["places"].max(initial=NOWHERE)) for one in snapshots.values())
        while self.places <= highest:
            self._chunks.append(self._make(len(self._chunks), (per_chunk, self.row_bytes)))
        self._places, self._sums = wanted["places"].copy(), wanted["sums"].copy()
        self._unread = self._places != NOWHERE
        self._needed = {name: one["places"] for name, one in snapshots.items()}
        self._settle()
        before = max((name for name in snapshots if name < number), default=None)
        new = self._unread if before is None else self._places != snapshots[before]["places"]
        for client in np.flatnonzero(new & self._unread).tolist():
            self._check(client, self._row(int(self._places[client])))

    def _check(self, client: int, row: np.ndarray) -> None:
        if zlib.crc32(np.ascontiguousarray(row).data) != self._sums[client]:
            raise ValueError(f"the state of client {client} does not have the checksum that was written")
        self._unread[client] = False

    def _row(self, place: int) -> np.ndarray:
        chunk, row = divmod(place, self._per_chunk)
        return self._chunks[chunk][row]

    def _more(self) -> None:
        first = self.places
        self._chunks.append(self._make(len(self._chunks), (self._per_chunk, self.row_bytes)))
        self._fixed = np.concatenate([self._fixed, np.zeros(self._per_chunk, bool)])
        # Taken from the end: neighbours lie in the order in which they came.
        new = np.arange(first, self.places, dtype=np.int32)
        self._free = np.concatenate([new[::-1], self._free])

    def _settle(self) -> None:
        """Finds anew which places snapshots need, and which nobody does."""
        self._fixed = np.zeros(self.places, bool)
        for needed in self._needed.values():
            self._fixed[needed[needed != NOWHERE]] = True
        taken = self._fixed.copy()
        taken[self._places[self._places != NOWHERE]] = True
        self._free = np.flatnonzero(~taken)[::-1].astype(np.int32)
