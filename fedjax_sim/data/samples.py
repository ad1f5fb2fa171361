"""What the rest of the package asks of a set of samples, whatever they are."""

import abc
import zlib
from typing import Any

import numpy as np

from fedjax_sim.core.task import Example, Task


class Samples(abc.ABC):
    """A train and a test set, and the task that they are for.

    Attributes:
      name: for records.
      class_names: one for each class; () where the samples have no classes.
      train_domains, test_domains: i32[n] ids of the domain that a sample belongs to, or None.
      train_writers, test_writers: i32[n] ids of the person that a sample comes from, or None.
    """

    name: str
    class_names: tuple[str, ...] = ()
    train_domains: np.ndarray | None = None
    test_domains: np.ndarray | None = None
    train_writers: np.ndarray | None = None
    test_writers: np.ndarray | None = None

    @property
    @abc.abstractmethod
    def task(self) -> Task:
        """What is learned from them."""

    @property
    @abc.abstractmethod
    def train(self) -> Example:
        """The training samples as `task.spec` has them, NumPy leaves [n, …]."""

    @property
    @abc.abstractmethod
    def test(self) -> Example:
        """The test samples, likewise."""

    @property
    @abc.abstractmethod
    def arrays(self) -> dict[str, np.ndarray]:
        """All samples, by the names under which records know them."""

    @abc.abstractmethod
    def training_on(self, index: np.ndarray) -> Any:
        """The set with the training samples i64[n'] alone, and without domains and writers."""

    @property
    def train_size(self) -> int:
        """n, training samples."""
        return len(next(iter(self.train.values())))

    @property
    def test_size(self) -> int:
        """m, test samples."""
        return len(next(iter(self.test.values())))

    @property
    def answers_crc32(self) -> int:
        """Checksum of what is to be told of the training samples, by which partitions know the set."""
        if self.train_classes is not None:
            return zlib.crc32(self.train_classes.astype("<i4").tobytes())
        *_, last = self.train.values()
        return zlib.crc32(np.ascontiguousarray(last).tobytes())

    @property
    def train_classes(self) -> np.ndarray | None:
        """i32[n], or None where the samples have no classes."""
        return None if self.task.label is None else self.train[self.task.label]

    @property
    def test_classes(self) -> np.ndarray | None:
        """i32[m], likewise."""
        return None if self.task.label is None else self.test[self.task.label]
