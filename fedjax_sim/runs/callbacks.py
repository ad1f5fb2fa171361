"""Calls a run's callbacks (`fedjax_sim.config.callbacks`), and remembers what they ask for."""

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax

from fedjax_sim import config as config_lib
from fedjax_sim.config import RunConfig, plugins
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.imports import told_of
from fedjax_sim.engine import hosts
from fedjax_sim.engine.setup import Setup
from fedjax_sim.records import Row, Table
from fedjax_sim.runs import provenance
from fedjax_sim.runs.describe import portable, yaml_safe
from fedjax_sim.runs.folder import Folder, Stopped
from fedjax_sim.runs.result import resume_hint, title_of


def check_installed(config: RunConfig) -> None:
    """Raises UserError if a callback needs a package that is not there; where callbacks are called."""
    if hosts.first():
        for callback in config.callbacks:
            if check := getattr(callback, "check_installed", None):
                check()


@dataclasses.dataclass
class Wishes:
    """What callbacks asked for after a round.

    Attributes:
      stopped: that the run ends here; None: that it goes on.
      checkpoint: that one is written.
      keep: that the model is kept as the best.
    """

    stopped: Stopped | None = None
    checkpoint: bool = False
    keep: bool = False


class UnderWay:
    """A run under way (`fedjax_sim.config.callbacks.UnderWay`).

    Attributes:
      config: its configuration.
      folder: where it is; None if nothing is written.
      metrics: the rows of all rounds so far.
      headline: the metric that the task shows first.
      goal: which is better of it.
      stopped: why it ended early; None: it did not.
    """

    def __init__(
        self,
        setup: Setup,
        folder: Folder | None,
        metrics: Table,
        variables: Callable[[], Any],
        figures: Callable[[], dict[str, bytes]],
    ):
        """Of a run that is about to begin.

        Args:
          setup: of the run.
          folder: its; None if nothing is written.
          metrics: the rows of all rounds so far; grows with the run.
          variables: gives the deployed model as it now is, on the devices.
          figures: draws the run.
        """
        self.config, self.metrics, self.figures = setup.config, metrics, figures
        self.folder = None if folder is None else folder.path
        self.headline, self.goal = setup.task.headline.name, setup.task.headline.goal
        self.stopped: Stopped | None = None
        self._setup, self._place_of_run = setup, folder
        self._variables, self._made = variables, None
        self._number, self._place = 0, 0
        self._by, self._may_act = "", True
        self._wishes = Wishes()
        self._memories: dict[int, dict[str, Any]] = {}

    @property
    def memory(self) -> dict[str, Any]:
        """Of the callback that is called."""
        return self._memories.setdefault(self._place, {})

    @functools.cached_property
    def title(self) -> str:
        """Method, data and partition in a line."""
        return title_of(self.config, provenance.describe_partition(self._setup.partition))

    def settings(self) -> dict[str, Any]:
        """The configuration by dotted field."""
        return config_lib.flat(portable(yaml_safe(self.config)))

    def provenance(self) -> dict[str, Any]:
        """As provenance.json has it, without the configuration."""
        if self._place_of_run is None:
            return provenance.describe(self._setup.dataset, self._setup.partition)
        about = self._place_of_run.records.provenance()
        return {name: value for name, value in about.items() if name != "config"}

    def model(self) -> Any:
        """The deployed model, nested dicts of NumPy arrays."""
        if self._number:
            self._in_a_round("model")
        return jax.device_get(self._variables() if self._made is None else self._made)

    def stop(self, reason: str = "") -> None:
        """Ends the run after this round; of several that ask for it the first is named."""
        self._in_a_round("stop")
        self._wishes.stopped = self._wishes.stopped or Stopped(self._number, self._by, str(reason))

    def checkpoint(self) -> None:
        """Has a checkpoint written after this round."""
        self._in_a_round("checkpoint")
        self._wishes.checkpoint = True

    def keep(self) -> None:
        """Keeps this round's model as the best."""
        self._in_a_round("keep")
        self._wishes.keep = True

    def _in_a_round(self, what: str) -> None:
        if not self._number:
            raise UserError(f"run.{what}", self._by, "no round is to be looked at", "Call it in on_round.")
        if not self._may_act:
            why = f"round {self._number} was not evaluated, and it has every_round = False"
            fix = "Call it after evaluated rounds alone, or leave every_round out."
            raise UserError(f"run.{what}", self._by, why, fix)


class Callbacks:
    """The callbacks of one run."""

    def __init__(self, config: RunConfig, run: UnderWay):
        """`run`: what they are given."""
        self._entries, self._run = config.callbacks, run

    def __bool__(self) -> bool:
        return bool(self._entries)

    @property
    def every_round(self) -> bool:
        """Whether one of them may act on rounds that were not evaluated."""
        return bool(self._each_round())

    def _each_round(self) -> list[str]:
        every = [callback for callback in self._entries if getattr(callback, "every_round", True)]
        return [_name(callback) for callback in every]

    def tell_one_by_one(self) -> None:
        """Warns that rounds which could run as one program run one by one."""
        names = self._each_round()
        told = f"rounds run one by one, as {', '.join(names)} may act after each"
        fix = "every_round = False says that it acts on evaluated rounds alone"
        if hosts.first():
            warnings.warn(f"{told}; {fix}, execution.rounds_per_call = 1 that this is meant", stacklevel=3)

    def on_start(self) -> None:
        """Tells those who want to know that the run starts, in the first process.

        Raises:
          UserError: one fails; likewise of the others.
        """
        self._all("on_start", 0)

    def on_round(self, number: int, rows: Sequence[Row], *, evaluated: bool) -> Wishes:
        """Tells all of a round, in the first process, and all processes what they ask for.

        Args:
          number: of the round, from 1.
          rows: its records.
          evaluated: whether it was.

        Raises:
          UserError: one fails, or acts on a round that it said it would not.
        """
        return self._all("on_round", number, number, rows, evaluated=evaluated)

    def on_end(self) -> None:
        """Tells those who want to know that the run has ended."""
        self._all("on_end", 0)

    def on_exit(self, error: BaseException | None) -> None:
        """Tells those who want to know that this start of the run is over; the others may be gone by now.

        Args:
          error: that ended it; None: nothing did.

        Raises:
          UserError: one fails, and there was no error before.
        """
        if self._entries and hosts.first():
            for place, callback in enumerate(self._entries):
                with contextlib.nullcontext() if error is None else contextlib.suppress(Exception):
                    self._call_one(place, callback, "on_exit", 0, error, evaluated=True)

    def _all(self, name: str, number: int, *args: Any, evaluated: bool = True) -> Wishes:
        if not self._entries:
            return Wishes()
        if jax.process_count() > 1:  # here, where all take part: only the first will ask for it
            self._run._made = self._run._variables()
        return hosts.on_first(lambda: self._call(name, number, *args, evaluated=evaluated))

    def _call(self, name: str, number: int, *args: Any, evaluated: bool) -> Wishes:
        self._run._wishes = Wishes()
        for place, callback in enumerate(self._entries):
            self._call_one(place, callback, name, number, *args, evaluated=evaluated)
        return self._run._wishes

    def _call_one(
        self, place: int, callback: Any, name: str, number: int, *args: Any, evaluated: bool
    ) -> None:
        run = self._run
        run._by, run._place, run._number = _name(callback), place, number
        run._may_act = evaluated or getattr(callback, "every_round", True)
        function = getattr(callback, name, None)
        if function is None:
            return
        try:
            function(*args, run)
        except UserError:
            raise
        except Exception as error:
            when = f" in round {number}" if number else ""
            fix = (
                f"Correct that line; then {resume_hint(run.folder)}." if run.folder else "Correct that line."
            )
            why = f"it fails{when}: {told_of(error)}"
            raise UserError(f"callbacks.{place}.{name}", run._by, why, fix) from error
        run._number = 0


def _name(callback: Any) -> str:
    return plugins.LISTS["callbacks"].name_of(callback) or type(callback).__name__
