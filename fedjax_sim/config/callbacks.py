"""Callbacks: what acts on a run between its rounds. Two are here, and the trackers in
`fedjax_sim.config.trackers`; anybody's own is named `module:Class`.

A callback is a frozen dataclass of settings with a method `on_round(number, rows, run)`. It is called once
a round, in the order of `RunConfig.callbacks`, when the round's rows are known and before the next round
starts. What it decides therefore holds exactly: a run that is stopped ends after that very round, and the
model that it asks for is the one that the rows speak of. So while a run has callbacks, no round is computed
ahead. One that acts on evaluated rounds alone says so with `every_round = False`: rounds up to the next
evaluation then run as one program (`execution.rounds_per_call`), and it is told of all of them after it. Of
others than the evaluated it can only read the rows.

A run that is stopped evaluates its last model, and fine-tunes clients if it was to (`evaluation.finetune`),
as any run does after its last round; callbacks are called once more, with the rows of that. Diagnostics of
measured rounds that were not due then are left out.

A run that was cut goes on from its newest checkpoint, and the rounds after that are run, and told, again. A
callback that decides by `run.metrics` alone, as both of these do, decides then as it would have uncut. One
that remembers something of its own has to rebuild it in `on_start(run)`, from `run.metrics`. It keeps it in
`run.memory`: a callback is one object for all runs that are given it.

In a run of several processes callbacks are called in the first of them.
"""

import dataclasses
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from fedjax_sim.core.fields import at_least, check
from fedjax_sim.records import Row, Table, goal_of


class UnderWay(Protocol):
    """A run under way, as callbacks see it.

    Attributes:
      config: its configuration, a `RunConfig`.
      folder: where it is; None if nothing is written.
      metrics: the rows of all rounds so far, this one's included.
      memory: what this callback remembers of this run; empty at each start of the run.
      title: method, data and partition in a line.
      headline: the metric that the task shows first.
      goal: `max` or `min`: which is better of the headline.
      stopped: why the run has ended before its last round; None: it has not. Known in `on_end`.
    """

    @property
    def config(self) -> Any:
        """See the class."""
        ...

    @property
    def folder(self) -> Path | None:
        """See the class."""
        ...

    @property
    def metrics(self) -> Table:
        """See the class."""
        ...

    @property
    def memory(self) -> dict[str, Any]:
        """See the class."""
        ...

    @property
    def title(self) -> str:
        """See the class."""
        ...

    @property
    def headline(self) -> str:
        """See the class."""
        ...

    @property
    def goal(self) -> str:
        """See the class."""
        ...

    @property
    def stopped(self) -> Any:
        """See the class."""
        ...

    def settings(self) -> dict[str, Any]:
        """The configuration by dotted field (`local.lr`), values as YAML has them."""
        ...

    def provenance(self) -> dict[str, Any]:
        """Versions, machine and checksums, as provenance.json has them."""
        ...

    def figures(self) -> dict[str, bytes]:
        """The pictures of the run as it now is, PNG by name: `curves`, `partition`, and `clients` if their
        accuracies are measured.
        """  # fmt: skip
        ...

    def model(self) -> Any:
        """The deployed model after this round: nested dicts of NumPy arrays."""
        ...

    def stop(self, reason: str = "") -> None:
        """Ends the run after this round. It is then finished, and `Run.stopped` says why."""
        ...

    def checkpoint(self) -> None:
        """Has a checkpoint of this round written, whatever `output.checkpoint_every` says."""
        ...

    def keep(self) -> None:
        """Keeps this round's deployed model as the run's best (`Run.best_variables`), in the place of an
        earlier one. It lies in `best/`, which `output.keep` does not thin out.
        """  # fmt: skip
        ...


class Callback(Protocol):
    """What acts on a run between its rounds. It may also have `on_start(run)`, `on_end(run)` and
    `on_exit(error, run)`, and `every_round`, False if it acts on evaluated rounds alone.

    `on_start` is called before the first round of each start of the run, a resume included; `run.metrics`
    holds the rounds that are done. `on_end` is called after the last round, of a run that was stopped too,
    but not where it was interrupted. `on_exit` is called last of all, however this start of the run ended:
    `error` is what ended it, None if nothing did (it may have been interrupted then). In none of them may a
    run be stopped, nor a model be kept.

    `on_round` is called once a round. After a stop it is called once more for the last round if an evaluation
    follows, because that round had none, or clients are fine-tuned: with the rows of these alone.

    One that needs a package that may not be there has `check_installed()`, which is called before anything is
    compiled, and raises UserError.
    """

    def on_round(self, number: int, rows: Sequence[Row], run: UnderWay) -> None:
        """Looks at a round.

        Args:
          number: of the round, from 1.
          rows: the records of this round.
          run: the run.
        """
        ...


@dataclasses.dataclass(frozen=True)
class EarlyStopping:
    """Ends a run when a metric has not improved for a while.

    Attributes:
      metric: what to look at; one number a round, such as `accuracy`, `loss` or `client_accuracy_mean`.
      patience: measurements in a row without improvement after which the run ends.
      goal: whether the metric should grow (`max`) or shrink (`min`); `auto` goes by its name.
      min_delta: a change counts as an improvement if it is larger than this.
    """

    metric: str = "accuracy"
    patience: int = 10
    goal: Literal["auto", "max", "min"] = "auto"
    min_delta: float = 0.0

    def __post_init__(self):
        check(self, "callbacks.early_stopping.")
        at_least("callbacks.early_stopping.patience", self.patience, 1)
        at_least("callbacks.early_stopping.min_delta", self.min_delta, 0.0)

    @property
    def every_round(self) -> bool:
        """Whether other rounds than the evaluated may have the metric."""
        return not _of_evaluation(self.metric)

    def on_round(self, number: int, rows: Sequence[Row], run: UnderWay) -> None:
        """Stops the run if the newest measurement is one too many."""
        values = _signed(self, number, rows, run)
        best, since = -math.inf, 0
        for value in values:
            best, since = (value, 0) if value > best + self.min_delta else (best, since + 1)
        if len(values) and since >= self.patience:
            run.stop(f"{self.metric} has not improved in {since} measurements")


@dataclasses.dataclass(frozen=True)
class KeepBest:
    """Keeps the deployed model of the round in which a metric was best (`Run.best_variables`).

    Of equal values the first counts.

    Attributes:
      metric: what to look at; one number a round.
      goal: whether the metric should grow (`max`) or shrink (`min`); `auto` goes by its name.
    """

    metric: str = "accuracy"
    goal: Literal["auto", "max", "min"] = "auto"

    def __post_init__(self):
        check(self, "callbacks.keep_best.")

    @property
    def every_round(self) -> bool:
        """Whether other rounds than the evaluated may have the metric."""
        return not _of_evaluation(self.metric)

    def on_round(self, number: int, rows: Sequence[Row], run: UnderWay) -> None:
        """Keeps the model if no measurement before was as good."""
        values = _signed(self, number, rows, run)
        if len(values) and values[-1] > max(values[:-1], default=-math.inf):
            run.keep()


def _of_evaluation(metric: str) -> bool:
    return metric in ("accuracy", "loss") or metric.startswith("client_")


def _signed(
    callback: EarlyStopping | KeepBest, number: int, rows: Sequence[Row], run: UnderWay
) -> np.ndarray:
    """The metric so far, f64[T], larger being better; empty where this round has not measured it."""
    name = callback.metric
    if not any((row.metric, row.layer, row.client, row.state) == (name, "", -1, "") for row in rows):
        if number == max(run.config.evaluation.every, 1) and not len(run.metrics.series(name)[1]):
            known = ", ".join(run.metrics.names())
            told = f"{type(callback).__name__} waits for {name!r}, which no round has recorded so far"
            warnings.warn(f"{told}; there are {known}", stacklevel=2)
        return np.zeros(0)
    goal = goal_of(name) if callback.goal == "auto" else callback.goal
    values = run.metrics.series(name)[1]
    return -values if goal == "min" else values


CALLBACKS: dict[str, type] = {"early_stopping": EarlyStopping, "keep_best": KeepBest}
"""Name -> settings."""
