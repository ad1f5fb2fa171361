"""Diagnostics of measured rounds, as the engine knows them: when, whom, and what records come of it.

A measured round returns the models of the clients that are looked at (`fedjax_sim.engine.round.MergeView`).
All observers of that round are one further program, which starts when the round ends. It knows nothing of
the algorithm: runs of one process that differ in that alone share it, and no observer can change a round.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

import jax
import numpy as np
from flax import struct

from fedjax_sim.engine.device_data import DeviceData
from fedjax_sim.engine.round import MergeView
from fedjax_sim.records import Row


class Observer(Protocol):
    """What is computed of the models of a measured round."""

    def observe(self, view: MergeView, inputs: Any, data: DeviceData) -> Any:
        """What is measured, any pytree of arrays. Traced.

        Args:
          view: the models of m clients, before the merge and after it.
          inputs: what `Instrument.observer_inputs` gave for this observer.
          data: the training set.
        """
        ...


@struct.dataclass
class ObserverRequest:
    """What observers ask of a round that they measure.

    Attributes:
      slots: i32[m], whom they want to see; distinct.
      inputs: name of each observer -> whatever else it wants at hand.
    """

    slots: jax.Array
    inputs: dict[str, Any]


class Instrument(Protocol):
    """Observers that belong together, when and whom they observe, and the records that come of it.

    Attributes:
      observers: what is computed of measured rounds, by name; their rows come in this order.
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

    def observer_inputs(self, ids: np.ndarray) -> dict[str, Any]:
        """What each observer wants at hand for the clients i32[m], by name."""
        ...

    def rows(self, number: int, ids: np.ndarray, inputs: Any, observed: dict[str, Any]) -> list[Row]:
        """The records of a round.

        Args:
          number: of the round, from 1.
          ids: i32[m], the clients that were looked at.
          inputs: what `observer_inputs` gave, by the observers' names.
          observed: what the observers returned, by their names; NumPy leaves.
        """
        ...


def observer_request(due: Sequence[Instrument], cohort: np.ndarray) -> ObserverRequest | None:
    """What is asked of a round: all observers look at the clients that the first instrument chooses.

    Args:
      due: the instruments that measure the round.
      cohort: i32[K], client ids.
    """
    if not due:
        return None
    slots = due[0].slots(cohort)
    parts = [instrument.observer_inputs(cohort[slots]) for instrument in due]
    return ObserverRequest(
        cast(jax.Array, slots), {name: own for part in parts for name, own in part.items()}
    )


@dataclasses.dataclass(frozen=True)
class AllObservers:
    """The program of a measured round's observers.

    Attributes:
      observers: by name.
    """

    observers: Mapping[str, Observer] = dataclasses.field(hash=False)

    def __call__(self, view: MergeView, inputs: Mapping[str, Any], data: DeviceData) -> dict[str, Any]:
        """What the observers that `inputs` names say, by name. Traced.

        Args:
          view: as a round returns it.
          inputs: name of each observer to ask -> what `Instrument.observer_inputs` gave for it.
          data: the training set.
        """
        view = view.counted()
        return {name: self.observers[name].observe(view, own, data) for name, own in inputs.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class Measurement:
    """An instrument made of two functions: what is measured of a round, and the records of it.

    Attributes:
      measure: (view, data) -> any pytree of arrays; traced, see `Observer`.
      records: (round from 1, client ids i32[m], what was measured, NumPy leaves) -> rows.
      every: rounds between measurements; the first round and the last are measured too.
      clients: how many of a round's clients are watched, the first so many of its slots; None: all of them.
    """

    measure: Callable[[MergeView, DeviceData], Any]
    records: Callable[[int, np.ndarray, Any], Sequence[Row]]
    every: int = 1
    clients: int | None = None

    @functools.cached_property
    def observers(self) -> Mapping[str, Observer]:
        """See `Instrument`."""
        return {"measurement": cast(Observer, self)}

    def observe(self, view: MergeView, inputs: Any, data: DeviceData) -> Any:
        """See `Observer`."""
        del inputs
        return self.measure(view, data)

    def due(self, number: int, rounds: int) -> bool:
        """See `Instrument`."""
        return number in (1, rounds) or number % self.every == 0

    def slots(self, cohort: np.ndarray) -> np.ndarray:
        """See `Instrument`."""
        return np.arange(min(len(cohort), self.clients or len(cohort)), dtype=np.int32)

    def observer_inputs(self, ids: np.ndarray) -> dict[str, Any]:
        """See `Instrument`."""
        del ids
        return {"measurement": {}}

    def rows(self, number: int, ids: np.ndarray, inputs: Any, observed: dict[str, Any]) -> list[Row]:
        """See `Instrument`."""
        del inputs
        return list(self.records(number, ids, observed["measurement"]))
