"""Which layers move least, and how much less than the ends: a run's inertia in a few numbers. OUR CHOICE."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from fedjax_sim.records import Row


class Profile(NamedTuple):
    """Of one metric over a run's rounds.

    Attributes:
      layers: L names in network order.
      values: f64[L], geometric mean over the rounds.
      ends: geometric mean of the first and the last layer's.
      least: the inner layer (neither first nor last) of least value.
      inertia: 1 - its value / `ends`: 0 where it moves as the ends do, near 1 where it hardly moves, below 0
        where all inner layers move more.
    """

    layers: tuple[str, ...]
    values: np.ndarray
    ends: float
    least: str
    inertia: float


def profile(
    rows: Iterable[Row],
    layers: Sequence[str] | None = None,
    metric: str = "inertia_step",
    start: int = 4,
    stop: int | None = None,
) -> Profile | None:
    """The profile of a run.

    Args:
      rows: of its records.
      layers: names in network order; None: those that the rows have of the metric, as they come.
      metric: `inertia_step`, or any other of `fedjax_sim.probes.inertia.movement` that is positive.
      start: first round that counts; movement in the very first rounds says little of later ones.
      stop: last one; None: the run's last.

    Returns:
      None if there are fewer than three layers, or no positive value of one of them.
    """
    rows = list(rows)
    if layers is None:
        layers = list(dict.fromkeys(row.layer for row in rows if row.metric == metric))
    values: dict[str, list[float]] = {layer: [] for layer in layers}
    for row in rows:
        inside = row.round >= start and (stop is None or row.round <= stop)
        if row.metric == metric and inside and row.layer in values and row.value > 0:
            values[row.layer].append(row.value)
    if len(layers) < 3 or not all(values.values()):
        return None
    means = np.asarray([np.exp(np.mean(np.log(values[layer]))) for layer in layers])
    ends = float(np.sqrt(means[0] * means[-1]))
    inner = int(np.argmin(means[1:-1])) + 1
    return Profile(tuple(layers), means, ends, layers[inner], float(1 - means[inner] / ends))
