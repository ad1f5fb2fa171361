"""The whole population as arrays: samples once, and every client's samples as rows of indices."""

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import numpy as np

from fedjax_sim.core.task import Example
from fedjax_sim.data.partition_files import Partition, check
from fedjax_sim.data.samples import Samples

Array = Any
"""NumPy as built; jax.Array once the engine has put it on devices."""


@flax.struct.dataclass
class Population:
    """A pytree of arrays that the compiled round reads; no sample is held twice.

    Attributes:
      example: all training samples, leaves [n, …].
      indices: i32[N, n_max], row k holds client k's samples, then zeros.
      counts: i32[N], how many of a row are samples.
      test: the global test set, leaves [m, …].
      streams: i32[N], see `Partition.streams`, or None.
    """

    example: Example
    indices: Array
    counts: Array
    test: Example
    streams: Array = None

    @classmethod
    def build(cls, dataset: Samples, partition: Partition) -> "Population":
        """Pads every client's indices to the longest.

        Raises:
          UserError: a partition of another set.
        """
        check(partition, dataset)
        indices, counts = pad(partition.train)
        return cls(
            example=dataset.train,
            indices=indices,
            counts=counts,
            test=dataset.test,
            streams=partition.streams,
        )

    @property
    def num_clients(self) -> int:
        """N."""
        return self.indices.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays together."""
        return sum(int(leaf.nbytes) for leaf in jax.tree.leaves(self))


def pad(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """i64[n_k] for each client -> i32[N, n_max] filled up with 0, and i32[N] of the n_k.

    The width is rounded up to four sizes an octave, so that partitions of another seed, whose largest client
    is seldom the same, mostly find the same shape and the same compiled program.
    """
    counts = np.array([len(r) for r in rows], np.int32)
    table = np.zeros((len(rows), _rounded_up(int(counts.max()))), np.int32)
    for row, values in zip(table, rows, strict=True):
        row[: len(values)] = values
    return table, counts


def _rounded_up(size: int) -> int:
    """The next of … 16, 20, 24, 28, 32, 40 …; sizes up to 16 stay."""
    if size <= 16:
        return size
    quarter = 1 << (size - 1).bit_length() - 3
    return -(-size // quarter) * quarter
