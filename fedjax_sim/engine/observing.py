"""Diagnostics of measured rounds, as the engine knows them: when, whom, and what records come of it."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

import jax
import numpy as np

from fedjax_sim.engine.device_data import DeviceData
from fedjax_sim.engine.round import Observer, Watched, Witness
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
        """Whom to watch, if it is the first that is due. i32[K] client ids -> i32[m] slots."""
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


@dataclasses.dataclass(frozen=True, eq=False)
class Measurement:
    """An instrument made of two functions: what is measured inside the round, and the records of it.

    Attributes:
      measure: (witness, data) -> any pytree of arrays; traced, see `fedjax_sim.engine.round.Observer`.
      records: (round from 1, client ids i32[m], what was measured, NumPy leaves) -> rows.
      every: rounds between measurements; the first round and the last are measured too.
      clients: how many of a round's clients are watched, the first so many of its slots; None: all of them.
    """

    measure: Callable[[Witness, DeviceData], Any]
    records: Callable[[int, np.ndarray, Any], Sequence[Row]]
    every: int = 1
    clients: int | None = None

    @functools.cached_property
    def observers(self) -> Mapping[str, Observer]:
        """See `Instrument`."""
        return {"measurement": cast(Observer, self)}

    def observe(self, witness: Witness, given: Any, data: DeviceData) -> Any:
        """See `fedjax_sim.engine.round.Observer`."""
        del given
        return self.measure(witness, data)

    def due(self, number: int, rounds: int) -> bool:
        """See `Instrument`."""
        return number in (1, rounds) or number % self.every == 0

    def slots(self, cohort: np.ndarray) -> np.ndarray:
        """See `Instrument`."""
        return np.arange(min(len(cohort), self.clients or len(cohort)), dtype=np.int32)

    def given(self, ids: np.ndarray) -> dict[str, Any]:
        """See `Instrument`."""
        del ids
        return {"measurement": {}}

    def rows(self, number: int, ids: np.ndarray, given: Any, observed: dict[str, Any]) -> list[Row]:
        """See `Instrument`."""
        del given
        return list(self.records(number, ids, observed["measurement"]))
