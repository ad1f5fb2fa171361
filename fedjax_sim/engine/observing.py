"""Diagnostics of measured rounds, as the engine knows them: when, whom, and what records come of it."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import jax
import numpy as np

from fedjax_sim.engine.round import Observer, Watched
from fedjax_sim.records import Row


class Instrument(Protocol):
    """Observers that belong together, when and whom they observe, and the records that come of it.

    Attributes:
      observers: what is compiled into measured rounds, by name; their rows come in this order.
    """

    @property
    def observers(self) -> Mapping[str, Observer]:
        """See the class."""
        ...

    def due(self, number: int, rounds: int) -> bool:
        """Whether round `number`, from 1, of a run of `rounds` is measured."""
        ...

    def slots(self, cohort: np.ndarray) -> np.ndarray:
        """Whom to watch. i32[K] client ids -> i32[m] slots."""
        ...

    def given(self, ids: np.ndarray) -> dict[str, Any]:
        """What each observer wants at hand for the clients i32[m], by name."""
        ...

    def rows(self, number: int, ids: np.ndarray, given: Any, observed: dict[str, Any]) -> list[Row]:
        """The records of round `number`; `given`, `observed`: by the observers' names."""
        ...


def watch(due: Sequence[Instrument], cohort: np.ndarray) -> Watched | None:
    """What is asked of a round: all observers look at the clients that the first instrument chooses."""
    if not due:
        return None
    slots = due[0].slots(cohort)
    given = [instrument.given(cohort[slots]) for instrument in due]
    return Watched(cast(jax.Array, slots), {name: g for part in given for name, g in part.items()})
