"""Which clients a probe measures, and on which of their samples. On the host, from the seed alone."""

import dataclasses
import warnings
from typing import Any, cast

import numpy as np

from fedjax_sim import data
from fedjax_sim.config import PeelConfig
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.rng import PEEL
from fedjax_sim.data import Partition


def best_ranked(seed: int, num_clients: int, cohort: np.ndarray, count: int) -> np.ndarray:
    """Slots of a cohort to measure, best rank first.

    Every client of the population has a rank, drawn once, so that under full participation the same ones are
    measured in every round.

    Args:
      seed: of the run.
      num_clients: N.
      cohort: i32[K], client ids.
      count: how many to measure at most.

    Returns:
      i32[m], m = min(count, K).
    """
    ranks = np.random.default_rng([seed, PEEL]).permutation(num_clients)
    return np.argsort(ranks[cohort])[:count].astype(np.int32)


@dataclasses.dataclass(frozen=True, eq=False)
class Samples:
    """Chooses clients and samples.

    Every client of the population has a rank, drawn once; of a round's cohort those of best rank are
    measured, so that under full participation they are the same in every round.

    Where clients have test samples of their own, these are measured and probes are fitted to the training
    samples; else one half of the training samples is measured and probes are fitted to the other. At most
    half of `config.samples` each, always the same for a client, and of the measured only those of classes
    with `config.class_samples` or more: a variance within a class needs several.

    Attributes:
      config: what to measure.
      dataset: the images.
      partition: who holds which.
      seed: of the run.
      batch_size: samples in one forward pass.
    """

    config: PeelConfig
    dataset: data.Samples
    partition: Partition
    seed: int
    batch_size: int

    @property
    def _own_tests(self) -> bool:
        if self.config.split == "test" and self.partition.test is None:
            raise UserError(
                "peel.split",
                "test",
                "the partition gives clients no test samples of their own",
                "Set partition.local_test to holdout or matching, or peel.split to train.",
            )
        return self.partition.test is not None and self.config.split != "train"

    @property
    def of_test(self) -> bool:
        """Whether what is measured lies in the global test images, and not in the training images."""
        return self._own_tests and self.partition.test_from == "test"

    def slots(self, cohort: np.ndarray) -> np.ndarray:
        """The slots to measure, best rank first. i32[K] client ids -> i32[m], m = min(config.clients, K)."""
        return best_ranked(self.seed, self.partition.num_clients, cohort, self.config.clients)

    def of_clients(self, ids: np.ndarray) -> dict[str, Any]:
        """For `fit` (of training images) and `measured`: index i32[m, s], padded, and count i32[m]."""
        chosen = [self.of_client(int(client)) for client in ids]
        out = {}
        for place, name in enumerate(("fit", "measured")):
            parts = [pair[place] for pair in chosen]
            index = np.zeros((len(ids), self._length()), np.int32)
            for row, part in zip(index, parts, strict=True):
                row[: len(part)] = part
            out[name] = {"index": index, "count": np.asarray([len(part) for part in parts], np.int32)}
        return out

    def of_client(self, client: int) -> tuple[np.ndarray, np.ndarray]:
        """(samples that probes are fitted to, samples that are measured) of one client."""
        draw, most = np.random.default_rng([self.seed, PEEL, client]), self.config.samples // 2
        own = draw.permutation(self.partition.train[client])
        if self._own_tests:
            assert self.partition.test is not None
            fit, measured = own[:most], draw.permutation(self.partition.test[client])
        else:
            half = len(own) // 2
            fit, measured = own[half:][:most], own[:half]
        labels = self._labels[measured]
        enough = np.bincount(labels, minlength=1)[labels] >= self.config.class_samples
        return fit, measured[enough][:most]

    def class_sizes(self, measured: np.ndarray) -> np.ndarray:
        """How many samples each class has that is among those measured of a client. -> i64[classes]

        Args:
          measured: which, as `of_client` gives them.
        """
        return np.unique(self._labels[measured], return_counts=True)[1]

    @property
    def _labels(self) -> np.ndarray:
        held = self.dataset.test if self.of_test else self.dataset.train
        return held[cast(str, self.dataset.task.label)]

    def warn_of_single_classes(self) -> None:
        """Warns where clients have fewer than two measured classes; looks at 64 of them, best rank first."""
        looked = self.slots(np.arange(self.partition.num_clients))[:64]
        classes = [len(self.class_sizes(self.of_client(int(client))[1])) for client in looked]
        enough = sum(count > 1 for count in classes)
        if 2 * enough < len(looked):
            have, least = f"{enough or 'none'} {'has' if enough == 1 else 'have'}", self.config.class_samples
            others = "the others" if enough else "all of them"
            warnings.warn(
                f"peel: of {len(looked)} clients {have} two classes with peel.class_samples = {least} "
                "measured samples each. What compares classes (CDNV, discrimination …) is undefined for "
                f"{others}. Lower peel.class_samples, or take fewer or less unequal clients.",
                stacklevel=2,
            )

    def _length(self) -> int:
        """Of every client's list: the most that any may have, whole batches of it.

        Not what clients have, which differs from seed to seed: the probe would be compiled for each.
        """
        most = self.config.samples // 2
        batch = min(self.batch_size, most)
        return -(-most // batch) * batch
