"""What the scripts that time our own rounds share: random images, runs that only train, and turns."""

import statistics
import time
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

import fedjax_sim as fs
from fedjax_sim.data import Dataset, Preprocessing

Case = TypeVar("Case", bound=Hashable)


def noise(count: int, shape: tuple[int, int, int] = (32, 32, 3)) -> Dataset:
    """Images and labels without a relation, ten classes; the first hundred are the test images."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, *shape), np.uint8)
    labels = rng.integers(0, 10, count).astype(np.int32)
    return Dataset("noise", images, labels, images[:100], labels[:100], 10, Preprocessing())


def equal(dataset: Dataset, clients: int, each: int) -> fs.Partition:
    """Clients with `each` images; where these run out, the same serve several."""
    starts = np.arange(clients) * each % (len(dataset.train_labels) - each + 1)
    return fs.Partition(tuple(np.arange(start, start + each) for start in starts))


def training(dataset: Dataset, partition: fs.Partition, **fields: Any) -> fs.Simulation:
    """A run without end and without evaluation, of all clients unless `cohort` says otherwise.

    Args:
      **fields: of `RunConfig`.
    """
    fields = {"cohort": fs.CohortConfig(fraction=1.0)} | fields
    config = fs.RunConfig(rounds=10**6, evaluation=fs.EvaluationConfig(every=0), **fields)
    return fs.Simulation(config, dataset=dataset, partition=partition)


def timed(run: fs.Simulation) -> float:
    """Seconds of one round, its records included."""
    begun = time.perf_counter()
    run.step()()
    jax.block_until_ready(run.state)
    return time.perf_counter() - begun


def in_turn(runs: Mapping[Case, fs.Simulation], repetitions: int) -> dict[Case, list[float]]:
    """Seconds of every run's rounds, one of each after the other; two of each beforehand are not counted."""
    for run in runs.values():
        timed(run)
        timed(run)
    seconds: dict[Case, list[float]] = {case: [] for case in runs}
    for _ in range(repetitions):
        for case, run in runs.items():
            seconds[case].append(timed(run))
    return seconds


class Ratio(NamedTuple):
    """Of two cases that took turns."""

    median: float
    lowest: float
    highest: float

    def __str__(self):
        return f"{self.median:.2f} ({self.lowest:.2f}–{self.highest:.2f})"


def ratio(seconds: Sequence[float], base: Sequence[float]) -> Ratio:
    """Of a case to another within each repetition."""
    ratios = [one / other for one, other in zip(seconds, base, strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))
