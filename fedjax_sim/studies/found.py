"""What a search of settings found: `Found`, its trials, their table and their picture."""

import dataclasses
import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedjax_sim.config import RunConfig
from fedjax_sim.config.search_files import Search
from fedjax_sim.config.spaces import Interval
from fedjax_sim.core.errors import UserError
from fedjax_sim.reports.shared import markdown
from fedjax_sim.runs import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Trial:
    """One setting that was tried.

    Attributes:
      number: from 0, as in the study.
      parameters: what was tried, by dotted field; a choice by its name.
      values: of the metric at the end of each rung that it came to, mean over seeds.
      state: `complete`: all rounds are done; `stopped`: others were better at a rung; `failed`: it diverged.
      why: of the last two, in words.
      folders: of its runs, a seed each; empty where nothing was kept.
    """

    number: int
    parameters: Mapping[str, Any]
    values: tuple[float, ...]
    state: str
    why: str = ""
    folders: tuple[Path, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
    """What a search found.

    Attributes:
      search: what was asked for.
      trials: by their numbers.
      metric: what they are compared by.
      goal: `max` or `min`.
      run: the best trial's run, of the first seed.
      study: the same as an Optuna study.
    """

    search: Search
    trials: tuple[Trial, ...]
    metric: str
    goal: str
    run: Run
    study: Any = dataclasses.field(repr=False)

    @functools.cached_property
    def best_trial(self) -> Trial:
        """The best of those whose rounds are all done; of equal ones the first."""
        return ranked([trial for trial in self.trials if trial.state == "complete"], self.goal)[0]

    @property
    def best_value(self) -> float:
        """The metric of the best trial after all rounds, mean over seeds."""
        return self.best_trial.values[-1]

    @property
    def best(self) -> RunConfig:
        """The configuration of the best trial, with the output of the one that the search began with."""
        return self.search.trial(self.best_trial.parameters)

    @property
    def rounds(self) -> tuple[int, ...]:
        """The round at which each rung ends."""
        return self.search.rounds

    def to_dict(self) -> dict[str, Any]:
        """As numbers and text, for JSON."""
        return {
            "metric": self.metric,
            "goal": self.goal,
            "rounds": list(self.rounds),
            "best": {"trial": self.best_trial.number, "value": self.best_value},
            "trials": [
                {
                    "number": trial.number,
                    "parameters": dict(trial.parameters),
                    "values": list(trial.values),
                    "state": trial.state,
                    "why": trial.why,
                    "folders": [str(folder) for folder in trial.folders],
                }
                for trial in self.trials
            ],
        }

    def records(self) -> list[dict[str, Any]]:
        """A row for each trial: number, state, parameters, rungs, and the value at each (None: none)."""
        rows = []
        for trial in self.trials:
            values = [*trial.values, *[None] * (len(self.rounds) - len(trial.values))]
            named = {f"{self.metric}@{end}": value for end, value in zip(self.rounds, values, strict=True)}
            row = {"trial": trial.number, "state": trial.state, **trial.parameters}
            rows.append(
                row | {"rungs": len(trial.values)} | named | {"folder": ", ".join(map(str, trial.folders))}
            )
        return rows

    def to_pandas(self) -> Any:
        """`records` as a pandas DataFrame.

        Raises:
          UserError: pandas is not installed; nothing else of fedjax_sim needs it.
        """
        if importlib.util.find_spec("pandas") is None:
            fix = "Install it (pip install pandas), or take records()."
            raise UserError("to_pandas", "pandas", "this package is not installed", fix)
        import pandas

        return pandas.DataFrame(self.records())

    def markdown(self, most: int | None = None) -> str:
        """The table, the best first; `most`: of the first so many."""
        rows = []
        for trial in ranked(self.trials, self.goal)[:most]:
            values = [f"{value:.4f}" for value in trial.values] + ["–"] * (
                len(self.rounds) - len(trial.values)
            )
            if trial.state == "failed":
                values[len(trial.values)] = "diverged"
            rows.append([str(trial.number), *map(said, trial.parameters.values()), *values])
        heads = ["trial", *self.search.space, *(f"{self.metric} at {end}" for end in self.rounds)]
        return "\n".join(markdown(heads, rows))

    def report(self) -> str:
        """For the terminal: the best trials, and where all of them are."""
        shown = max(self.search.kept[-1], 3)
        told = ", ".join(f"{field} {said(value)}" for field, value in self.best_trial.parameters.items())
        best = f"best: {told}: {self.metric} {self.best_value:.4f}"
        equal = [
            f"{trial.number}"
            for trial in self.trials
            if trial.state == "complete" and trial.values[-1] == self.best_value and trial != self.best_trial
        ]
        if equal:
            word = "trial" if len(equal) == 1 else "trials"
            best += f", as has {word} {', '.join(equal)}; of equal ones the first is taken"
        lines = [self.markdown(shown), best]
        if self.search.out is not None:
            left = len(self.trials) - shown
            words = "one more trial" if left == 1 else f"the other {left} trials"
            lines.append(f"written to {self.search.out}" + f", {words} in table.md" * (left > 0))
        return "\n".join(lines)

    def plot(self) -> "Figure":
        """The trials from rung to rung, and their values against each field, a Matplotlib figure."""
        from fedjax_sim.records import plots  # Matplotlib loads when something is drawn

        fields = {}
        for field, space in self.search.space.items():
            known = [trial.parameters[field] for trial in self.trials]
            fields[field] = (known, isinstance(space, Interval), isinstance(space, Interval) and space.log)
        values = [trial.values for trial in self.trials]
        title = f"{len(values)} trials, the best in colour"
        return plots.trials(self.rounds, values, fields, self.metric, self.best_trial.number, title)

    def __repr__(self):
        told = ", ".join(f"{field} {said(value)}" for field, value in self.best_trial.parameters.items())
        return f"Found({self.metric} {self.best_value:.4f} by {told}, of {len(self.trials)} trials)"


def ranked(trials: Any, goal: str) -> list[Trial]:
    """The best first: by how many rungs they came to, by the value at the last of these, by number."""

    def key(trial: Trial) -> tuple[float, ...]:
        value = trial.values[-1] if trial.values else 0.0
        return -len(trial.values), -value if goal == "max" else value, trial.number

    return sorted(trials, key=key)


def said(value: Any) -> str:
    """A parameter in a line or a table."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
