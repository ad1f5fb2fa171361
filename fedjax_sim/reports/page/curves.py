"""A page's curves: every scalar metric as mean and deviation over seeds, in little room.

Numbers are base64 of little-endian float32, rounds of int32; a value that is not finite is a NaN. Where
there is more than a page can hold, every k-th recorded round is kept, and the page says so.
"""

import base64
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from fedjax_sim.records import Table, goal_of, plots
from fedjax_sim.reports.page.entries import Entry

BUDGET = 150_000
"""Numbers that all curves of a page may have together, about 5.3 bytes each."""
_LENGTHS = (2000, 1000, 500, 250, 120, 60)
"""Points that a curve may have, the most that fits; below the last one metrics are left out."""
_ASIDE = ("nonfinite/", "undefined/")

Series = tuple[np.ndarray, np.ndarray]
"""(rounds i32[T], values f64[T])."""


@dataclasses.dataclass(frozen=True)
class Curve:
    """A metric of a group of seeds.

    Attributes:
      rounds: i32[T].
      mean: f64[T], over the seeds that have the round; NaN where it is not finite.
      deviation: f64[T], NaN below two seeds; None if there is one seed only.
      seeds: how many there are.
    """

    rounds: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray | None
    seeds: int


@dataclasses.dataclass(frozen=True)
class Curves:
    """All curves of a page.

    Attributes:
      metrics: names, the headline first.
      rows: of the table, which are the lines.
      columns: settings, which are chosen.
      curves: (metric, row, column) -> Curve.
    """

    metrics: tuple[str, ...]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    curves: dict[tuple[str, str, str], Curve]


def scalar_series(table: Table) -> dict[str, Series]:
    """Every metric of the whole run (no layer, no client), by `metric` or `metric (state)`.

    Rounds whose value was not finite are there with a NaN.
    """
    columns = table.to_arrow()
    codes, known = {}, {}
    for name in ("metric", "layer", "state"):
        coded = columns[name].combine_chunks()
        codes[name] = coded.indices.to_numpy(zero_copy_only=False)
        known[name] = coded.dictionary.to_pylist()
    plain = [place for place, layer in enumerate(known["layer"]) if not layer]
    whole = (columns["client"].to_numpy() == -1) & np.isin(codes["layer"], plain)
    rounds, values = columns["round"].to_numpy()[whole], columns["value"].to_numpy()[whole]
    keys = codes["metric"][whole].astype(np.int64) * max(len(known["state"]), 1) + codes["state"][whole]
    found: dict[str, Series] = {}
    for key in dict.fromkeys(keys.tolist()):
        metric, state = (known[name][place] for name, place in _split(key, known))
        chosen, lost = keys == key, metric.startswith("nonfinite/")
        metric = metric.removeprefix("nonfinite/")
        if metric.startswith(_ASIDE):
            continue
        own = values[chosen] if not lost else np.full(int(chosen.sum()), np.nan)
        name = f"{metric} ({state})" if state else metric
        before = found.get(name, (np.empty(0, np.int32), np.empty(0)))
        found[name] = _in_order(
            *(np.concatenate(pair) for pair in zip(before, (rounds[chosen], own), strict=True))
        )
    return found


def _split(key: int, known: dict[str, list[str]]) -> Iterable[tuple[str, int]]:
    metric, state = divmod(key, max(len(known["state"]), 1))
    return ("metric", metric), ("state", state)


def _in_order(rounds: np.ndarray, values: np.ndarray) -> Series:
    """By rounds; of one that is there twice the newest value."""
    last, place = np.unique(rounds[::-1], return_index=True)
    return last.astype(np.int32), values[::-1][place]


def gather(entries: Sequence[Entry], headline: str) -> Curves:
    """The curves of all runs that have a round.

    Args:
      entries: the runs.
      headline: the metric that comes first, if it was recorded.
    """
    groups: dict[tuple[str, str], list[dict[str, Series]]] = {}
    for entry in entries:
        if entry.run is not None and entry.seen:
            groups.setdefault((entry.row, entry.column), []).append(scalar_series(entry.run.metrics))
    names = dict.fromkeys(name for seeds in groups.values() for one in seeds for name in one)
    first = [headline, "loss", "train_loss", f"client_{headline}_mean"]
    order = [*(name for name in first if name in names), *(name for name in names if name not in first)]
    curves = {}
    for (row, column), seeds in groups.items():
        for name in order:
            own = [one[name] for one in seeds if name in one]
            if own:
                curves[name, row, column] = _over_seeds(own)
    rows, columns = (tuple(dict.fromkeys(key[place] for key in groups)) for place in (0, 1))
    return Curves(tuple(order), rows, columns, curves)


def _over_seeds(series: Sequence[Series]) -> Curve:
    rounds = np.unique(np.concatenate([own for own, _ in series])).astype(np.int32)
    if len(series) == 1:
        return Curve(rounds, series[0][1], None, 1)
    table = np.full((len(series), len(rounds)), np.nan)
    for line, (own, values) in zip(table, series, strict=True):
        line[np.searchsorted(rounds, own)] = np.where(np.isfinite(values), values, np.nan)
    count = np.isfinite(table).sum(0)
    mean = np.full(len(rounds), np.nan)
    np.divide(np.nansum(table, 0), count, out=mean, where=count > 0)
    squares, deviation = np.nansum((table - mean) ** 2, 0), np.full(len(rounds), np.nan)
    np.sqrt(np.divide(squares, count - 1, out=deviation, where=count > 1), out=deviation, where=count > 1)
    return Curve(rounds, mean, deviation, len(series))


def packed(found: Curves, budget: int = BUDGET) -> tuple[dict[str, Any], list[str]]:
    """(what the page's script reads, what a reader has to know of how it was made).

    Args:
      found: the curves.
      budget: how many numbers they may have together.
    """
    sizes = [(len(curve.rounds), 1 + (curve.deviation is not None)) for curve in found.curves.values()]

    def total(most: int) -> int:
        return sum(min(length, most) * parts for length, parts in sizes)

    most = next((most for most in _LENGTHS if total(most) <= budget), _LENGTHS[-1])
    metrics, notes, used = list(found.metrics), [], 0
    if total(most) > budget:
        metrics = []
        for name in found.metrics:
            own = [curve for key, curve in found.curves.items() if key[0] == name]
            used += sum(min(len(c.rounds), most) * (1 + (c.deviation is not None)) for c in own)
            if metrics and used > budget:
                break
            metrics.append(name)
        left = len(found.metrics) - len(metrics)
        names = ", ".join(found.metrics[len(metrics) :][:8]) + (" …" if left > 8 else "")
        notes.append(
            f"{left} of {len(found.metrics)} metrics are left out, to keep the page small: {names}. "
            "The records have them."
        )
    rounds: dict[bytes, int] = {}
    told, step = [], 1
    for (name, row, column), curve in found.curves.items():
        if name not in metrics:
            continue
        kept, own = _thinned(len(curve.rounds), most)
        step = max(step, own)
        place = rounds.setdefault(curve.rounds[kept].astype("<i4").tobytes(), len(rounds))
        told.append(
            {
                "m": metrics.index(name),
                "r": found.rows.index(row),
                "c": found.columns.index(column),
                "x": place,
                "y": _base64(curve.mean[kept]),
                "s": None if curve.deviation is None else _base64(curve.deviation[kept]),
                "n": curve.seeds,
            }
        )
    if step > 1:
        notes.append(
            f"Long curves are thinned: of up to {step} recorded rounds one is drawn, as it was recorded, and "
            "the newest always. A spike between them is not seen here."
        )
    about = {
        "metrics": [{"name": name, "label": plots.label_of(name), "goal": goal_of(name)} for name in metrics],
        "rows": [{"name": row, "style": place % len(plots.COLOURS)} for place, row in enumerate(found.rows)],
        "columns": list(found.columns),
        "rounds": [base64.b64encode(part).decode() for part in rounds],
        "curves": told,
    }
    return about, notes


def _thinned(length: int, most: int) -> tuple[np.ndarray, int]:
    """(places that are kept, i64[n]; one of how many)."""
    step = -(-length // most)
    kept = np.arange(length - 1, -1, -step)[::-1]  # from the newest backwards
    return kept, step


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(values.astype("<f4").tobytes()).decode()
