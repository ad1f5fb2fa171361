"""The whole population as arrays: images once, and every client's samples as rows of indices."""

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import numpy as np

from fedjax_sim.data.dataset import Dataset
from fedjax_sim.data.partition_files import Partition, check

Array = Any
"""NumPy as built; jax.Array once the engine has put it on devices."""


@flax.struct.dataclass
class Population:
    """A pytree of arrays that the compiled round reads; no image is held twice.

    Attributes:
      images: u8[n, H, W, C], all training images.
      labels: i32[n].
      indices: i32[N, n_max], row k holds client k's samples, then zeros.
      counts: i32[N], how many of a row are samples.
      test_images: u8[m, H, W, C], the global test set.
      test_labels: i32[m].
      test_indices: i32[N, t_max] in the same way, or None without local tests.
      test_counts: i32[N] or None.
      streams: i32[N], see `Partition.streams`, or None.
      test_of_train: whether `test_indices` points into `images` (holdout) and not `test_images`.
        Static.
    """

    images: Array
    labels: Array
    indices: Array
    counts: Array
    test_images: Array
    test_labels: Array
    test_indices: Array = None
    test_counts: Array = None
    streams: Array = None
    test_of_train: bool = flax.struct.field(pytree_node=False, default=False)

    @classmethod
    def build(cls, dataset: Dataset, partition: Partition) -> "Population":
        """Pads every client's indices to the longest.

        Raises:
          UserError: a partition of another set.
        """
        check(partition, dataset)
        indices, counts = pad(partition.train)
        tests, test_counts = (None, None) if partition.test is None else pad(partition.test)
        return cls(
            images=dataset.train_images,
            labels=dataset.train_labels,
            indices=indices,
            counts=counts,
            test_images=dataset.test_images,
            test_labels=dataset.test_labels,
            test_indices=tests,
            test_counts=test_counts,
            streams=partition.streams,
            test_of_train=partition.test is not None and partition.test_from == "train",
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
