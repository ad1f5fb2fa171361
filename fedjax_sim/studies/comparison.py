"""The comparison of finished runs: mean ± deviation over seeds, paired differences, three formats.

Only like is set against like. A method that trained on another partition than the reference is marked, and
neither ranked nor paired; so is one whose data setting gave other data than it gave the reference. Means over
different seeds are not ranked: every seed of the table must be there.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fedjax_sim.core.errors import UserError
from fedjax_sim.reports.shared import comma_separated
from fedjax_sim.runs import own_code, same_data


@dataclasses.dataclass(frozen=True)
class Cell:
    """One method under one setting.

    Attributes:
      values: seed -> the metric.
      seconds: mean wall-clock seconds of the seeds' whole runs.
      cpu_seconds: mean CPU seconds of them; None unless all recorded it.
      differences: value minus the reference's with the same seed; empty without a reference, for the
        reference itself, while a seed of either is missing, and where they are not `like`.
      whole: every seed of the table is there.
      like: under each seed the clients hold the same samples as those of the reference, or of the first
        method without one.
      same_data: no run had other data than the reference had from the same data setting
        (`fedjax_sim.runs.same_data`); where one had, `like` is false too.
    """

    values: dict[int, float]
    seconds: float
    cpu_seconds: float | None
    differences: tuple[float, ...] = ()
    whole: bool = True
    like: bool = True
    same_data: bool = True


@dataclasses.dataclass(frozen=True)
class Grid:
    """One table.

    Attributes:
      caption: what is in it.
      cells: (method, column) -> Cell; missing where no seed was finished.
      averaged: how many values a run's number is the mean of: of the run with fewest, and with most.
    """

    caption: str
    cells: dict[tuple[str, str], Cell]
    averaged: tuple[int, int] = (1, 1)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Tables and curves of a sweep.

    Attributes:
      title: one line about data and model.
      metric, goal, reference: as in the sweep.
      methods: rows.
      columns: settings.
      grids: the table of the last values, then those of the rounds of interest.
      curves: column -> method -> (rounds i64[T], values f64[seeds, T]), NaN where a seed has no value.
      cautions: sentences on runs that were made with different versions of the same own module, or of
        the same data.
      missing: whether runs are not finished.
      without: those that are finished and have not recorded the metric: methods, or single runs of one.
    """

    title: str
    metric: str
    goal: str
    reference: str | None
    methods: tuple[str, ...]
    columns: tuple[str, ...]
    grids: tuple[Grid, ...]
    curves: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]
    cautions: tuple[str, ...] = ()
    missing: bool = False
    without: tuple[str, ...] = ()

    def best(self, grid: Grid, column: str) -> set[str]:
        """Methods of the best mean in a column to the printed digits; none while a run is missing."""
        cells = {method: grid.cells.get((method, column)) for method in self.methods}
        if not all(cell is not None and cell.whole for cell in cells.values()):
            return set()
        means = {m: mean(list(cell.values.values())) for m, cell in cells.items() if cell and cell.like}
        pick: Callable[..., float] = max if self.goal == "max" else min
        top = f"{pick(means.values()):.4f}"
        return {method for method, value in means.items() if f"{value:.4f}" == top}

    def markdown(self) -> str:
        """All tables; the best of a column in bold, paired differences below."""
        blocks = [f"{self.title}\n"]
        for grid in self.grids:
            blocks.append(self._block(grid, _markdown, lambda text: f"**{text}**", "±", "†"))
        if any(len(cell.values) > 1 for grid in self.grids for cell in grid.cells.values()):
            blocks.append("± is the standard deviation over seeds; their number is in brackets.\n")
        return "\n".join(blocks + [f"{note}\n" for note in (*self.notes("†"), *self.cautions)])

    def latex(self) -> str:
        """All tables, for the booktabs package."""
        blocks = [f"% {self.title}; needs \\usepackage{{booktabs}}"]
        for grid in self.grids:
            blocks.append(
                self._block(grid, _latex, lambda text: f"\\textbf{{{text}}}", "$\\pm$", "$\\dagger$")
            )
        return "\n".join(blocks + [f"% {note}\n" for note in (*self.notes("dagger"), *self.cautions)])

    def notes(self, mark: str) -> list[str]:
        """What a reader of the tables must know: what `mark` means, and that runs are missing."""
        against = self.methods[0] if self.reference is None else self.reference
        told = []
        every = [cell for grid in self.grids for cell in grid.cells.values()]
        if not all(cell.same_data for cell in every):
            told.append(f"{mark} Some of its runs had other data: neither ranked nor paired.")
        if not all(cell.like for cell in every if cell.same_data):
            told.append(
                f"{mark} Trained on another partition than {against} under the same seed, as a setting of "
                "its own changes who holds which samples: neither ranked nor paired. Put that setting into "
                "base, so that all methods share it."
            )
        if self.missing:
            told.append(
                "Runs are missing. Until all are there, nothing is ranked, and only methods with every seed "
                "are paired."
            )
        if self.without:
            have = "has" if len(self.without) == 1 else "have"
            told.append(
                f"{own_code.in_short(list(self.without))} {have} not recorded {self.metric}. A column where "
                "it is missing is not ranked, and only methods that have it under every seed are paired."
            )
        return told

    def _block(
        self, grid: Grid, layout: Callable, bold: Callable[[str], str], plus_minus: str, mark: str
    ) -> str:
        heads = [column or self.metric for column in self.columns]
        rows = []
        for method in self.methods:
            row = [method]
            for column in self.columns:
                cell = grid.cells.get((method, column))
                text = "–" if cell is None else format_mean_std(list(cell.values.values()), plus_minus)
                text += f" {mark}" if cell is not None and not cell.like else ""
                row.append(bold(text) if method in self.best(grid, column) else text)
            rows.append(row)
        out = layout(grid.caption, ["method", *heads], rows, bold)
        if self.reference is not None and len(self.methods) > 1:
            rows = []
            for method in self.methods:
                if method == self.reference:
                    continue
                row = [method]
                for column in self.columns:
                    cell = grid.cells.get((method, column))
                    differences = [] if cell is None else list(cell.differences)
                    row.append(format_mean_std(differences, plus_minus, signed=True) if differences else "–")
                rows.append(row)
            caption = (
                f"{grid.caption}: paired differences to {self.reference} (same seed, same partition and, "
                "unless a method chooses its own, same cohorts)"
            )
            out += "\n" + layout(caption, ["method", *heads], rows, bold)
        return out

    def records(self) -> list[dict[str, Any]]:
        """Every cell of every table as plain values.

        `seconds` and `cpu_seconds` are the cost of whole runs (`Cell`), in the tables of earlier rounds too.
        """
        out = []
        for grid in self.grids:
            for (method, column), cell in grid.cells.items():
                values, differences = list(cell.values.values()), list(cell.differences)
                out.append(
                    {
                        "table": grid.caption,
                        "method": method,
                        "setting": column,
                        "metric": self.metric,
                        "seeds": len(values),
                        "mean": mean(values),
                        "std": deviation(values),
                        "best": method in self.best(grid, column),
                        "difference_to": self.reference if differences else None,
                        "pairs": len(differences),
                        "difference_mean": mean(differences) if differences else None,
                        "difference_std": deviation(differences) if differences else None,
                        "seconds": cell.seconds,
                        "cpu_seconds": cell.cpu_seconds,
                        "all_seeds": cell.whole,
                        "same_partition": cell.like,
                        "same_data": cell.same_data,
                        "values": ";".join(f"{seed}:{value!r}" for seed, value in cell.values.items()),
                    }
                )
        return out

    def csv(self) -> str:
        """`records` as CSV."""
        rows = self.records()
        return comma_separated(list(rows[0]), [list(row.values()) for row in rows])


def compare(sweep: Any, finished: Sequence[tuple[Any, Any]]) -> Comparison:
    """Tables and curves of (Job, Run) pairs. The seeds of the table are those of all jobs.

    Raises:
      UserError: no run has recorded the metric.
    """
    methods = tuple(dict.fromkeys(job.method for job in sweep.jobs))
    columns = tuple(dict.fromkeys(job.column for job in sweep.jobs))
    series = {(job.method, job.column, job.seed): run.metrics.series(sweep.metric) for job, run in finished}
    if not any(len(values) for _, values in series.values()):
        known = ", ".join(finished[0][1].metrics.names())
        raise UserError("sweep.metric", sweep.metric, "no run has recorded it", f"They have {known}.")
    costs = {(job.method, job.column, job.seed): (run.seconds, run.cpu_seconds) for job, run in finished}
    seeds = {job.seed for job in sweep.jobs}
    against = methods[0] if sweep.reference is None else sweep.reference
    recipes = {(job.method, job.column, job.seed): run.recipe for job, run in finished}
    abouts = [(job, run.config, own_code.told_by(run.folder)) for job, run in finished]
    # The reference's data are the standard.
    ordered = sorted(abouts, key=lambda known: known[0].method != against)
    of_data = [(job.name, config, about) for job, config, about in ordered]
    strange = {
        name for versions in same_data.others(of_data).values() for one in versions[1:] for name in one
    }
    other_data = {(job.method, job.column) for job, _ in finished if job.name in strange}

    def like(method: str, column: str, own: Iterable[int]) -> bool:
        pairs = ([recipes.get((m, column, seed), {}) for m in (method, against)] for seed in own)
        return all(_same_partition(*pair) for pair in pairs)

    grids = []
    for upto in (None, *sweep.rounds_of_interest):
        values: dict[tuple[str, str], dict[int, float]] = {}
        counts: set[int] = set()
        for (method, column, seed), (rounds, numbers) in series.items():
            kept = numbers if upto is None else numbers[rounds <= upto]
            if len(kept):
                newest = kept[-sweep.last_k :]
                values.setdefault((method, column), {})[seed] = float(np.mean(newest))
                counts.add(len(newest))
        cells = {}
        for key, own in values.items():
            cost = _cost([costs[*key, seed] for seed in own])
            same = key not in other_data
            whole, alike = own.keys() == seeds, same and like(*key, own)
            cell = Cell(own, *cost, whole=whole, like=alike, same_data=same)
            if cell.like and cell.whole and (sweep.reference, key[1]) not in other_data:
                cell = dataclasses.replace(cell, differences=_paired(own, values, key, sweep.reference))
            cells[key] = cell
        averaged = (min(counts), max(counts)) if counts else (sweep.last_k, sweep.last_k)
        caption = f"{sweep.metric}, {_of_last(averaged, sweep.last_k)}"
        grids.append(Grid(caption + (f" up to round {upto}" if upto else ""), cells, averaged))
    curves = {
        column: {
            method: _stacked([s for (m, c, _), s in series.items() if (m, c) == (method, column)])
            for method in methods
            if any((m, c) == (method, column) for m, c, _ in series)
        }
        for column in columns
    }
    _, first = finished[0]
    recipe = first.recipe
    name = recipe.get("dataset", first.config.data.source)
    title = f"{first.config.model.name} on {name}, {recipe['clients']:,} clients"
    if not any(key.split(".")[0] == "partition" for job in sweep.jobs for key, _ in job.setting):
        kind = str(recipe.get("kind", ""))
        title += f", {kind}({recipe['alpha']})" if kind.startswith("dirichlet") else f", {kind}"
    told = same_data.cautions(of_data)
    told += own_code.cautions((job.name, about) for job, _, about in abouts)
    of = (sweep.metric, sweep.goal, sweep.reference, methods, columns, tuple(grids), curves)
    missing = len(finished) < len(sweep.jobs)
    return Comparison(title, *of, tuple(told), missing, tuple(_without(sweep.metric, methods, finished)))


def _without(metric: str, methods: Sequence[str], finished: Sequence[tuple[Any, Any]]) -> list[str]:
    """Whose finished runs have not recorded a metric: the method if none of its has, else each of them."""
    out = []
    for method in methods:
        lacks = {
            job.name: not len(run.metrics.series(metric)[1]) for job, run in finished if job.method == method
        }
        if lacks and all(lacks.values()):
            out.append(method)
        else:
            out += [name for name, lacking in lacks.items() if lacking]
    return out


def mean(values: Sequence[float]) -> float:
    """The mean."""
    return math.fsum(values) / len(values)


def deviation(values: Sequence[float]) -> float | None:
    """The sample standard deviation (n - 1); None of a single value."""
    if len(values) < 2:
        return None
    middle = mean(values)
    return math.sqrt(math.fsum((v - middle) ** 2 for v in values) / (len(values) - 1))


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """The confidence interval of the mean by Student's t, low and high; None of a single value.

    Args:
      values: independent draws, taken for normal: with few of them that decides how wide it is.
      level: how often such an interval holds the mean.
    """
    wide = deviation(values)
    if wide is None:
        return None
    from scipy import stats  # it loads when an interval is wanted

    half = float(stats.t.ppf(0.5 + level / 2, len(values) - 1)) * wide / math.sqrt(len(values))
    return mean(values) - half, mean(values) + half


def format_mean_std(values: Sequence[float], plus_minus: str = "±", signed: bool = False) -> str:
    """`0.8123 ± 0.0045 (3)`: mean, deviation, number of seeds; a single value has only itself."""
    middle = f"{mean(values):+.4f}" if signed else f"{mean(values):.4f}"
    wide = deviation(values)
    return middle if wide is None else f"{middle} {plus_minus} {wide:.4f} ({len(values)})"


def _of_last(averaged: tuple[int, int], wanted: int) -> str:
    """What a number of the table is; with what was `wanted`, where some run had fewer values."""
    fewest, most = averaged
    of = f" to {most}" if most > fewest else ""
    told = "last value" if most == 1 else f"mean of the last {fewest}{of} values"
    return told if fewest == wanted else f"{told} (fewer than the {wanted} of last_k)"


def _cost(runs: Sequence[tuple[float, float | None]]) -> tuple[float, float | None]:
    """Means, to the millisecond, of (seconds, CPU seconds)."""
    cpu = [seconds for _, seconds in runs if seconds is not None]
    whole = round(mean([seconds for seconds, _ in runs]), 3)
    return whole, round(mean(cpu), 3) if len(cpu) == len(runs) else None


def _same_partition(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two runs trained on the same samples of the same clients, as far as `Run.recipe` tells."""
    for name in ("crc32_train", "crc32"):  # the first is not in older records
        if name in one and name in other:
            return one[name] == other[name]
    return True


def _paired(
    own: dict[int, float], values: dict, key: tuple[str, str], reference: str | None
) -> tuple[float, ...]:
    if reference is None or key[0] == reference:
        return ()
    other = values.get((reference, key[1]), {})
    return tuple(value - other[seed] for seed, value in own.items()) if own.keys() == other.keys() else ()


def _stacked(series: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Seeds' series on the rounds that any of them has."""
    rounds = np.unique(np.concatenate([own for own, _ in series]))
    table = np.full((len(series), len(rounds)), np.nan)
    for row, (own, values) in zip(table, series, strict=True):
        row[np.searchsorted(rounds, own)] = values
    return rounds, table


def _markdown(caption: str, heads: list[str], rows: list[list[str]], bold: Callable) -> str:
    del bold
    lines = [f"{caption}\n", "| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _latex(caption: str, heads: list[str], rows: list[list[str]], bold: Callable) -> str:
    del bold
    lines = [f"% {caption}", f"\\begin{{tabular}}{{l{'c' * (len(heads) - 1)}}}", "\\toprule"]
    lines.append(" & ".join(_escaped(head) for head in heads) + " \\\\")
    lines.append("\\midrule")
    lines += [
        " & ".join([_escaped(row[0]), *(cell.replace("–", "--") for cell in row[1:])]) + " \\\\"
        for row in rows
    ]
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


def _escaped(text: str) -> str:
    for sign in "&%$#_{}":
        text = text.replace(sign, "\\" + sign)
    return text.replace("–", "--")
