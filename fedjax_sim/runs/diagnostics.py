"""The diagnostics of a run: the package's own and anybody else's, all built in the same way.

What somebody else wrote is guarded: an error in it is a UserError that names the diagnostic, its function,
the round and the line, and what it returns is looked at before the engine takes it.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sim.core.algorithm import Cohort
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.imports import told_of
from fedjax_sim.core.plugins import written
from fedjax_sim.core.task import Task
from fedjax_sim.engine.device_data import DataStore, abstract
from fedjax_sim.engine.observing import Instrument, Observer
from fedjax_sim.engine.round import MergeView, Meter
from fedjax_sim.engine.setup import DiagnosticContext, ObserverConfig, Setup
from fedjax_sim.probes import table
from fedjax_sim.records import Row
from fedjax_sim.runs.names import recorded_by_run


def of(setup: Setup) -> dict[str, Any]:
    """The fields `observers` and `meters` of a setup, by its configuration.

    Raises:
      UserError: a meter cannot be built.
    """
    config, mesh = setup.config, setup.mesh
    observers: list[ObserverConfig] = table.observers(config)
    observers += [_Observer(entry, f"observers.{i}", setup.task) for i, entry in enumerate(config.observers)]
    meters = {**table.meters(config)}
    meters |= {
        f"meters.{i}": _Meter(entry, f"meters.{i}", setup.task) for i, entry in enumerate(config.meters)
    }
    context = DiagnosticContext(setup, mesh, DataStore(mesh).put)
    return {"observers": observers, "meters": {name: m.build(context) for name, m in meters.items()}}


def check_diagnostics(setup: Setup) -> None:
    """Follows what somebody else wrote through a round, on shapes; nothing is computed.

    Raises:
      UserError: a function fails, or does not return what the engine wants of it.
    """
    config, mesh = setup.config, setup.mesh
    if not (config.observers or config.meters):
        return
    of: Any = jax.ShapeDtypeStruct

    def stack(count: int, tree: Any) -> Any:
        return jax.tree.map(lambda leaf: of((count, *leaf.shape), leaf.dtype), tree)

    def cohort(count: int) -> Cohort:
        each, one = stack(count, of((), jnp.int32)), of((), jnp.int32)
        return Cohort(each, each, one, each)

    store, ids = DataStore(mesh, abstract), setup.draw(0)
    data = store.of_round(setup.dataset, setup.partition)
    key = jax.eval_shape(lambda: jax.random.key(0))
    model = setup.model.abstract
    context = DiagnosticContext(setup, mesh, store.put)
    with jax.set_mesh(mesh):
        for observer in setup.observers:
            if isinstance(observer, _Observer):
                instrument = observer.build(context)
                slots = instrument.slots(ids)
                models, inputs = stack(len(slots), model), instrument.observer_inputs(ids[slots])
                them = dataclasses.replace(cohort(len(slots)), steps=None)
                view = MergeView(them, models, models, models, of((), jnp.float32), key)
                for name, one in instrument.observers.items():
                    jax.eval_shape(one.observe, view, inputs[name], data)
        for meter in setup.meters.values():
            if isinstance(meter, _Metering):
                gradient = model["params"] if meter.gradients else None
                carried = jax.eval_shape(meter.init, model)
                each, mean = (
                    jax.eval_shape(f, model, model, gradient) for f in (meter.per_client, meter.summand)
                )
                mean = jax.tree.map(lambda leaf: of(leaf.shape, jnp.float32), mean)
                count = setup.cohort_size
                jax.eval_shape(meter.finish, carried, cohort(count), model, model, stack(count, each), mean)


# --- what somebody else wrote -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Guard:
    """Calls functions of a diagnostic.

    Attributes:
      own: its settings.
      field: where it stands in the configuration.
    """

    own: Any
    field: str

    def call(self, name: str, function: Callable[..., Any], *args: Any, number: int | None = None) -> Any:
        """What the function gives. Raises UserError if it fails."""
        try:
            return function(*args)
        except UserError:
            raise
        except Exception as error:
            where = "" if number is None else f" in round {number}"
            raise self.wrong(name, f"it fails{where}: {told_of(error)}", "Correct that line.") from error

    def has(self, made: Any, *names: str) -> None:
        """Raises UserError unless `build` has made something of that protocol."""
        missing = [name for name in names if not hasattr(made, name)]
        if missing:
            why = f"it returned a {type(made).__name__}, which has no {missing[0]}"
            fix = f"It needs {', '.join(names)}; an observer's are those of fs.Measurement(measure, records)."
            raise self.wrong("build", why, fix)

    def rows(self, task: Task, number: int, function: Callable[..., Any], *args: Any) -> list[Row]:
        """The rows that a function gives, as the journal can hold them. Raises UserError otherwise."""
        made = self.call("rows", function, number, *args, number=number)
        try:
            rows = [_row(row) for row in made]
        except (TypeError, ValueError) as error:
            why = f"it did not return rows in round {number}: {error}"
            raise self.wrong("rows", why, "Return a list of fs.Row(round, metric, value).") from None
        for row in rows:
            plain = not (row.layer or row.state)
            if plain and recorded_by_run(row.metric, task, of_client=row.client >= 0):
                why = f"it names a metric {row.metric!r}, which the run records itself"
                raise self.wrong("rows", why, "Choose another name.")
        return rows

    def wrong(self, name: str, why: str, fix: str) -> UserError:
        return UserError(f"{self.field}.{name}", written(self.own), why, fix)


@dataclasses.dataclass(frozen=True)
class _Observer:
    """Settings of an observer, guarded. Its own observers get names that no other has."""

    own: Any
    field: str
    task: Task

    def build(self, context: DiagnosticContext) -> Instrument:
        guard = _Guard(self.own, self.field)
        made = guard.call("build", self.own.build, context)
        guard.has(made, "observers", "due", "slots", "observer_inputs", "rows")
        return _Instrument(guard, made, self.task)


class _Instrument:
    """An instrument, guarded."""

    def __init__(self, guard: _Guard, own: Instrument, task: Task):
        self._guard, self._own, self._task = guard, own, task
        self._names = {f"{guard.field}.{name}": name for name in own.observers}
        self.observers: Mapping[str, Observer] = {
            full: _Observing(guard, own.observers[name]) for full, name in self._names.items()
        }

    def due(self, number: int, rounds: int) -> bool:
        return bool(self._guard.call("due", self._own.due, number, rounds, number=number))

    def slots(self, cohort: np.ndarray) -> np.ndarray:
        slots = np.asarray(self._guard.call("slots", self._own.slots, cohort))
        distinct = slots.ndim == 1 and len(set(slots.tolist())) == len(slots) > 0
        if not (
            distinct and np.issubdtype(slots.dtype, np.integer) and slots.max() < len(cohort) > -slots.min()
        ):
            fix = f"Return some of 0 to {len(cohort) - 1}, each once."
            raise self._guard.wrong("slots", f"it returned {slots.tolist()}, of {len(cohort)} slots", fix)
        return slots.astype(np.int32)

    def observer_inputs(self, ids: np.ndarray) -> dict[str, Any]:
        found = self._guard.call("observer_inputs", self._own.observer_inputs, ids)
        return {full: found.get(name) for full, name in self._names.items()}

    def rows(self, number: int, ids: np.ndarray, inputs: Any, observed: dict[str, Any]) -> list[Row]:
        mine = [{name: of[full] for full, name in self._names.items()} for of in (inputs, observed)]
        return self._guard.rows(self._task, number, self._own.rows, ids, *mine)


@dataclasses.dataclass(frozen=True)
class _Observing:
    """An observer, guarded."""

    guard: _Guard
    own: Observer

    def observe(self, view: Any, inputs: Any, data: Any) -> Any:
        return self.guard.call("observe", self.own.observe, view, inputs, data)


@dataclasses.dataclass(frozen=True)
class _Meter:
    """Settings of a meter, guarded."""

    own: Any
    field: str
    task: Task

    def build(self, context: DiagnosticContext) -> Meter:
        guard = _Guard(self.own, self.field)
        made = guard.call("build", self.own.build, context)
        guard.has(made, "gradients", "init", "per_client", "summand", "finish", "rows")
        return _Metering(guard, made, bool(made.gradients), self.task)


@dataclasses.dataclass(frozen=True, eq=False)
class _Metering:
    """A meter, guarded."""

    guard: _Guard
    own: Meter
    gradients: bool
    task: Task = dataclasses.field(repr=False)

    def init(self, deployed: Any) -> Any:
        return self.guard.call("init", self.own.init, deployed)

    def per_client(self, start: Any, trained: Any, gradient: Any) -> Any:
        return self.guard.call("per_client", self.own.per_client, start, trained, gradient)

    def summand(self, start: Any, trained: Any, gradient: Any) -> Any:
        return self.guard.call("summand", self.own.summand, start, trained, gradient)

    def finish(self, carried: Any, cohort: Any, old: Any, new: Any, each: Any, mean: Any) -> tuple[Any, Any]:
        made = self.guard.call("finish", self.own.finish, carried, cohort, old, new, each, mean)
        if not (isinstance(made, tuple) and len(made) == 2):
            raise self.guard.wrong("finish", "it did not return two things", "Return (carried, said).")
        before, after = (jax.tree.map(_shape, tree) for tree in (carried, made[0]))
        if before != after:
            why = f"it carries on {after}, where init or the round before gave {before}"
            raise self.guard.wrong("finish", why, "Keep shapes, dtypes and containers.")
        return made

    def rows(self, number: int, said: Any) -> list[Row]:
        return self.guard.rows(self.task, number, self.own.rows, said)


def _row(given: Any) -> Row:
    """A row as the journal can hold it.

    Raises:
      TypeError, ValueError: it is none; says what is wrong.
    """
    try:
        given = tuple(given)
    except TypeError:
        raise TypeError(f"one of them is of type {type(given).__name__}") from None
    if not 3 <= len(given) <= len(Row._fields):
        raise ValueError(f"one of them has {len(given)} parts: {', '.join(map(_told, given))}")
    row = Row(*given)
    numbers = {}
    for name, kind in (("round", int), ("value", float), ("client", int)):
        value = getattr(row, name)
        try:
            numbers[name] = kind(value)
        except (TypeError, ValueError):
            why = f"of metric {row.metric!r} {name} is {_told(value)}, one number is wanted"
            raise TypeError(why) from None
    return row._replace(**numbers)


def _told(value: Any) -> str:
    """A value in a word or two."""
    if np.ndim(value):
        return f"an array {list(np.shape(value))}"
    return repr(value) if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"


def _shape(leaf: Any) -> str:
    return f"{getattr(leaf, 'dtype', type(leaf).__name__)}{list(np.shape(leaf))}"
