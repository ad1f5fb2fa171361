"""Lists of different lengths in one array: what each of many clients holds."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import overload

import numpy as np


class Ragged(Sequence[np.ndarray]):
    """N lists of whole numbers, one after another in one array. It reads like a tuple of N arrays.

    A million clients are two arrays, and no million objects; what goes through all of them is written with
    `flat` and `offsets`.

    Attributes:
      flat: i64[T], the numbers of all lists.
      offsets: i64[N + 1]; list k is flat[offsets[k] : offsets[k + 1]].
    """

    __slots__ = ("flat", "offsets")

    def __init__(self, flat: np.ndarray, offsets: np.ndarray):
        """`flat`: i64[T]. `offsets`: i64[N + 1], ascending from 0 to T."""
        self.flat, self.offsets = flat, offsets

    @classmethod
    def of(cls, lists: Sequence[np.ndarray]) -> "Ragged":
        """The lists i[n_k], copied into one array; what is `Ragged` already stays as it is."""
        if isinstance(lists, Ragged):
            return lists
        sizes = np.fromiter(map(len, lists), np.int64, len(lists))
        flat = (
            np.concatenate(lists, dtype=np.int64, casting="unsafe") if len(lists) else np.empty(0, np.int64)
        )
        return cls.cut(flat, sizes)

    @classmethod
    def cut(cls, flat: np.ndarray, sizes: np.ndarray) -> "Ragged":
        """`flat` i64[T], cut into N lists of `sizes` i64[N], which add up to T."""
        return cls(flat, np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]))

    @classmethod
    def gathered(cls, owners: np.ndarray, values: np.ndarray, count: int) -> "Ragged":
        """The list of each owner, ascending.

        Args:
          owners: i64[T] in 0 … count - 1, whose each value is.
          values: i64[T], at least 0.
          count: N.
        """
        sizes = np.bincount(owners, minlength=count)
        return cls.cut(_sorted(owners, values, np.repeat(np.arange(count), sizes)), sizes)

    @property
    def sizes(self) -> np.ndarray:
        """i64[N], how long each list is."""
        return np.diff(self.offsets)

    @property
    def owners(self) -> np.ndarray:
        """i64[T], the list that each number of `flat` is in."""
        return np.repeat(np.arange(len(self)), self.sizes)

    def list_at(self, place: int) -> int:
        """The list that the number at this place of `flat` is in."""
        return int(np.searchsorted(self.offsets, place, side="right")) - 1

    def within(self, flat: np.ndarray) -> "Ragged":
        """Lists of the same lengths with other numbers, i64[T]."""
        return Ragged(flat, self.offsets)

    def kept(self, mask: np.ndarray) -> "Ragged":
        """The lists without the numbers where `mask`, bool[T], is false."""
        counted = np.concatenate([[0], np.cumsum(mask, dtype=np.int64)])
        return Ragged(self.flat[mask], counted[self.offsets])

    def ascending(self) -> "Ragged":
        """Each list sorted; its numbers are at least 0."""
        owners = self.owners
        return self.within(_sorted(owners, self.flat, owners))

    def distinct(self) -> "Ragged":
        """Each list sorted, and each of its numbers, which are at least 0, once."""
        made = self.ascending()
        first = np.ones(len(made.flat), bool)
        first[1:] = made.flat[1:] != made.flat[:-1]
        starts = self.offsets[:-1]
        first[starts[starts < len(first)]] = True
        return made.kept(first)

    def tolist(self) -> list[list[int]]:
        """As lists of Python's numbers."""
        numbers = self.flat.tolist()
        return [numbers[start:stop] for start, stop in pairwise(self.offsets.tolist())]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...

    @overload
    def __getitem__(self, index: slice) -> "Ragged": ...

    def __getitem__(self, index: int | slice) -> "np.ndarray | Ragged":
        if isinstance(index, slice):
            chosen = np.arange(len(self))[index]
            sizes = self.sizes[chosen]
            return Ragged.cut(self.flat[runs(self.offsets[chosen], sizes)], sizes)
        place = range(len(self))[index]
        return self.flat[self.offsets[place] : self.offsets[place + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self.flat[start:stop] for start, stop in pairwise(self.offsets.tolist()))

    def __mul__(self, times: int) -> "Ragged":
        """The same lists so often, one after another, as of a tuple."""
        return Ragged.cut(np.tile(self.flat, times), np.tile(self.sizes, times))

    __rmul__ = __mul__

    def __repr__(self):
        return f"Ragged({len(self):,} lists of {len(self.flat):,} numbers in all)"


def once(values: np.ndarray) -> np.ndarray:
    """i64[n] -> i64[·]: each number once, ascending. (`np.unique` hashes: 2 s for 10 million.)"""
    ordered = np.sort(values)
    return ordered[np.concatenate([[True], ordered[1:] != ordered[:-1]])] if len(ordered) else ordered


def without(count: int, taken: np.ndarray) -> np.ndarray:
    """0 … count - 1 but for those `taken`, i64[n]; ascending."""
    left = np.ones(count, bool)
    left[taken] = False
    return np.flatnonzero(left)


def runs(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """starts[0], starts[0] + 1, …, so many as sizes[0] says, then those from starts[1]. i64[N] -> i64[T]."""
    before = np.cumsum(sizes, dtype=np.int64) - sizes
    return np.repeat(starts - before, sizes) + np.arange(int(sizes.sum()))


def _sorted(owners: np.ndarray, values: np.ndarray, after: np.ndarray) -> np.ndarray:
    """`values` sorted by owner, then by themselves; `after`: the owners, sorted. All i64[T]."""
    if not len(values):
        return values.astype(np.int64)
    bound = int(values.max()) + 1
    if (int(after[-1]) + 1) * bound >= 2**63:
        return values[np.lexsort((values, owners))].astype(np.int64)
    keys = owners * np.int64(bound) + values
    keys.sort()
    keys -= after * np.int64(bound)
    return keys
