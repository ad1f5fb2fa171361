"""Studies at a glance: a row for every group of seeds, whatever its model, and what goes with what.

A row is of one round of each group: its newest, or the first in which its clients' own models had reached a
given mean accuracy (`at_accuracy`). Methods that are compared at equal rounds differ in how far they have
trained, and a client that has learnt little has little to lose: a reviewer of the layer-peeled paper asked
for the second. All averages are over measurements, a client of a seed each, with 95% bootstrap intervals.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from fedjax_sim.core.errors import UserError
from fedjax_sim.core.fields import nearest
from fedjax_sim.records import plots
from fedjax_sim.reports.peel import analysis, cfd
from fedjax_sim.reports.peel.analysis import Measurements
from fedjax_sim.reports.peel.groups import Group
from fedjax_sim.reports.shared import AGAIN, comma_separated, markdown
from fedjax_sim.reports.shared import write as write_files
from fedjax_sim.runs.folder import Folder

STATES = ("start", "before", "after", "finetuned")


@dataclass(frozen=True)
class Outline:
    """One round of a group of seeds.

    Attributes:
      name: of the group.
      round: from 1.
      seeds: how many.
      accuracy: state -> mean accuracy on clients' own samples; NaN where it was not measured.
      others: `before`, `after` -> the same on the other clients' samples.
      drop: f64[3], accuracy before - after: mean, low, high.
      final: f64[3], Δ_L: change of log C at the classifier's input.
      verdict: of cumulative degradation; None where no client has log C at every layer.
      cause: of chimeras; None where there are none.
      changes: metric -> mean change at the classifier's layer, of `CHANGES`.
      measured: that round's measurements.
    """

    name: str
    round: int
    seeds: int
    accuracy: dict[str, float]
    others: dict[str, float]
    drop: np.ndarray
    final: np.ndarray
    verdict: cfd.Verdict | None
    cause: analysis.Cause | None
    changes: dict[str, float]
    measured: Measurements


@dataclass(frozen=True)
class Difference:
    """One outline less another, over clients that were measured in both under the same seed.

    Attributes:
      pairs: how many these are.
      drop, final: f64[3], of accuracy lost and of Δ_L: mean, low, high.
      slope: f64[3], of β, which is the slope of the difference of changes; the change is defined at every
        layer in both.
    """

    pairs: int
    drop: np.ndarray
    final: np.ndarray
    slope: np.ndarray


CHANGES: Mapping[str, str] = {
    "log_c": "log C",
    "sigma_within": "within-class share",
    "pabs": "alignment with the classifier (PABS)",
    "ridge": "ridge probe",
}
"""Metrics whose change at the classifier's input is set against the accuracy drop -> how they are called."""


def at_accuracy(measured: Measurements, accuracy: float) -> int | None:
    """The first measured round in which the mean accuracy before the merge was so high; None: never."""
    for number in measured.numbers():
        if np.nanmean(measured.at(number).scalar("peel_accuracy", "before")) >= accuracy:
            return number
    return None


def outline(group: Group, number: int | None = None) -> Outline:
    """What round `number` of a group says, the newest if None.

    Raises:
      UserError: it was not measured.
    """
    measured = group.measured.at(number)

    def mean(metric: str, state: str) -> float:
        values = measured.scalar(metric, state)
        return float(np.nanmean(values)) if np.isfinite(values).any() else np.nan

    last = measured.pair("log_c").change
    whole = last[np.isfinite(last).all(1)]
    changes = {}
    for metric in CHANGES:
        change = measured.pair(metric).change[:, -1]
        changes[metric] = float(np.nanmean(change)) if np.isfinite(change).any() else np.nan
    return Outline(
        name=group.name,
        round=measured.numbers()[-1],
        seeds=len(np.unique(measured.seeds)),
        accuracy={state: mean("peel_accuracy", state) for state in STATES},
        others={state: mean("peel_accuracy_others", state) for state in ("before", "after")},
        drop=cfd.estimate(_lost(measured)[:, None])[:, 0],
        final=cfd.estimate(last[:, -1:])[:, 0],
        verdict=cfd.verdict(whole) if len(whole) and whole.shape[1] > 1 else None,
        cause=analysis.cause(measured),
        changes=changes,
        measured=measured,
    )


def difference(one: Outline, reference: Outline) -> Difference:
    """`one` - `reference`, client by client; all NaN if they share none, or have layers of other numbers."""
    places = [
        {pair: n for n, pair in enumerate(zip(of.seeds.tolist(), of.clients.tolist(), strict=True))}
        for of in (one.measured, reference.measured)
    ]
    shared = [pair for pair in places[0] if pair in places[1]]
    ours, theirs = ([where[pair] for pair in shared] for where in places)
    nothing = np.full(3, np.nan)
    if not shared or len(one.measured.names) != len(reference.measured.names):
        return Difference(0, nothing, nothing, nothing)
    lost, change = (
        of(one.measured)[ours] - of(reference.measured)[theirs]
        for of in (_lost, lambda measured: measured.pair("log_c").change)
    )
    whole = change[np.isfinite(change).all(1)]
    found = cfd.verdict(whole) if len(whole) and whole.shape[1] > 1 else None
    return Difference(
        pairs=len(shared),
        drop=cfd.estimate(lost[:, None])[:, 0],
        final=cfd.estimate(change[:, -1:])[:, 0],
        slope=nothing if found is None else _slope(found),
    )


def table(outlines: Sequence[Outline], reference: Outline | None = None) -> list[dict[str, object]]:
    """A row a group, for overview.csv: numbers unrounded, None where undefined; with differences to
    `reference` if one is given.
    """
    rows = []
    for one in outlines:
        row: dict[str, object] = {"group": one.name, "round": one.round, "seeds": one.seeds}
        row["measurements"] = len(one.measured)
        row |= {f"accuracy_{state}": value for state, value in one.accuracy.items()}
        row |= {f"accuracy_others_{state}": value for state, value in one.others.items()}
        for name, values in (("drop", one.drop), ("delta_last", one.final)):
            row |= dict(zip((name, f"{name}_low", f"{name}_high"), values.tolist(), strict=True))
        found = one.verdict
        for name in ("slope", "low", "high", "rank", "area"):
            row["beta" + f"_{name}" * (name != "slope")] = np.nan if found is None else getattr(found, name)
        row["cfd"] = None if found is None or cfd.word_of(found) == "undecided" else found.present
        row["injected_last"] = np.nan if one.cause is None else float(one.cause.injected[0])
        row["inherited_last"] = np.nan if one.cause is None else one.cause.inherited.final
        row |= {f"change_{metric}_last": value for metric, value in one.changes.items()}
        if reference is not None:
            apart = difference(one, reference)
            row |= {"reference": reference.name, "pairs": apart.pairs}
            for name, values in (("drop", apart.drop), ("delta_last", apart.final), ("beta", apart.slope)):
                ends = (f"{name}_difference{end}" for end in ("", "_low", "_high"))
                row |= dict(zip(ends, values.tolist(), strict=True))
        rows.append({key: None if value != value else value for key, value in row.items()})
    return rows


def correlations(outlines: Sequence[Outline]) -> list[tuple[str, cfd.Association, cfd.Association]]:
    """Accuracy drop against the change of each of `CHANGES` at the classifier's input, given accuracy before.

    Returns:
      (what changed, over groups' means, over all measurements) of each metric.
    """
    found = []
    for metric, called in CHANGES.items():
        drops = np.asarray([one.drop[0] for one in outlines])
        before = np.asarray([one.accuracy["before"] for one in outlines])
        change = np.asarray([one.changes[metric] for one in outlines])
        each = [
            np.stack(
                [
                    one.measured.pair(metric).change[:, -1],
                    _lost(one.measured),
                    one.measured.scalar("peel_accuracy", "before"),
                ]
            )
            for one in outlines
        ]
        found.append(
            (called, cfd.association(change, drops, before), cfd.association(*np.concatenate(each, 1)))
        )
    return found


def picture(outlines: Sequence[Outline]) -> Figure:
    """Accuracy drop, Δ_L and slope of every group, with their intervals."""
    height = 1.2 + 0.28 * len(outlines)
    figure, axes = plots.new_figure(3, 1, 3.6, height)
    places = np.arange(len(outlines))[::-1]
    slopes = [_slope(v) if (v := one.verdict) is not None else np.full(3, np.nan) for one in outlines]
    panels = (
        ("accuracy lost by the merge", np.stack([one.drop for one in outlines])),
        ("change of log C at the classifier's input", np.stack([one.final for one in outlines])),
        ("slope of the change over depth (CFD)", np.asarray(slopes)),
    )
    for axis, (label, values) in zip(axes.flat, panels, strict=True):
        low, high = (np.abs(values[:, 0] - values[:, side]) for side in (1, 2))
        axis.errorbar(values[:, 0], places, xerr=np.stack([low, high]), fmt="o", ms=4, lw=1.2, capsize=2)
        axis.axvline(0, color="0.6", lw=0.8, zorder=0)
        axis.set_xlabel(label, fontsize=9)
        axis.set_yticks(
            places, [one.name for one in outlines] if axis is axes.flat[0] else [""] * len(places)
        )
        axis.tick_params(labelsize=8)
    return figure


def report(outlines: Sequence[Outline], about: str, reference: Outline | None = None) -> str:
    """overview.md: the rows, differences to `reference` if one is given, and correlations across rows."""
    heads = ["group", "round", "start", "before", "after", "fine-tuned", "lost", "others: before → after",
             "Δ_L", "β", "CFD", "injected / inherited at the last layer"]  # fmt: skip
    rows = []
    for one in outlines:
        told = [_plain(one.accuracy[state]) for state in STATES]
        others = " → ".join(_plain(one.others[state]) for state in ("before", "after"))
        found, why = one.verdict, one.cause
        slope = "–" if found is None else _interval(_slope(found))
        parts = "–" if why is None else f"{why.injected[0]:+.2f} / {why.inherited.final:+.2f}"
        yes = "–" if found is None else cfd.word_of(found)
        rows.append(
            [
                one.name,
                str(one.round),
                *told,
                _interval(one.drop),
                others,
                _interval(one.final),
                slope,
                yes,
                parts,
            ]
        )
    lines = ["# Overview", "", about, "", *markdown(heads, rows)]
    if reference is not None:
        lines += ["", f"Differences to {reference.name}, client by client of the same seed:", ""]
        rows = [
            [one.name, str(apart.pairs), *map(_interval, (apart.drop, apart.final, apart.slope))]
            for one in outlines
            if one is not reference
            for apart in [difference(one, reference)]
        ]
        lines += markdown(["group", "pairs", "lost", "Δ_L", "β"], rows)
    if len(outlines) > 2:
        heads = [
            "change at the classifier's input",
            *("groups: n", "r", "ρ", "partial r"),
            *("measurements: n", "r", "ρ", "partial r"),
        ]
        cells = [
            [called, *(text for one in both for text in _associated(one))]
            for called, *both in correlations(outlines)
        ]
        lines += [
            "",
            "Accuracy lost by the merge against changes of features; partial r is given the accuracy before. "
            f"A correlation of fewer than {cfd.FEWEST} is not shown:",
            "",
        ]
        lines += markdown(heads, cells)
    return "\n".join(lines).rstrip() + "\n"


_ABOUT = (
    "Accuracies are means on clients' own samples: of what they started the round from, had before the "
    "merge and held after it, and after fine-tuning the classifier. Lost is before − after, Δ_L the change "
    "of log C at the classifier's input, β its slope over depth. Brackets are 95% bootstrap intervals over "
    "measurements, a client of a seed each: they say nothing of other partitions, and little of other seeds "
    "where few ran."
)


def write(
    found: Sequence[Group],
    home: Folder,
    *,
    round_index: int | None = None,
    accuracy: float | None = None,
    reference: str | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> list[Path]:
    """Writes overview.md, overview.csv and overview.png of groups of any models.

    Args:
      found: the groups.
      home: a folder.
      round_index: of every group; None: its newest.
      accuracy: instead, each group's first measured round whose mean accuracy before the merge was so high;
        who never had it is left out.
      reference: name of the group that the others are compared with client by client; seeds and clients of
        the same number must be the same clients, which is for the caller to know. None: of none.
      tell: is given a line for each file, and for each group that is left out.

    Raises:
      UserError: that round was not measured, no group ever was so accurate, or `reference` is none of them.
    """
    about, name, outlines = _ABOUT, "overview", []
    if accuracy is not None:
        name += f"_at_{accuracy:g}"
        about = f"Each in the first measured round with accuracy {accuracy:g} before the merge. {_ABOUT}"
    for group in found:
        number = round_index if accuracy is None else at_accuracy(group.measured, accuracy)
        if accuracy is not None and number is None:
            tell(f"{group.name}: left out: never an accuracy of {accuracy:g} before a merge")
            continue
        outlines.append(outline(group, number))
    if not outlines:
        raise UserError("accuracy", accuracy, "no group of runs ever had it before a merge", "Lower it.")
    named = {one.name: one for one in outlines}
    if reference is not None and reference not in named:
        raise UserError("reference", reference, "no group has this name", nearest(reference, list(named)))
    against = None if reference is None else named[reference]
    rows = table(outlines, against)
    with home.writing("out", AGAIN):
        plots.save(picture(outlines), home.path / f"{name}.png")
    tell(f"wrote {home.path / name}.png")
    contents = {
        f"{name}.csv": comma_separated(list(rows[0]), [list(row.values()) for row in rows]),
        f"{name}.md": report(outlines, about, against),
    }
    return [home.path / f"{name}.png", *write_files(home, contents, tell)]


def _lost(measured: Measurements) -> np.ndarray:
    """Accuracy before the merge less that after it, f64[n]."""
    return measured.scalar("peel_accuracy", "before") - measured.scalar("peel_accuracy", "after")


def _slope(verdict: cfd.Verdict) -> np.ndarray:
    return np.asarray([verdict.slope, verdict.low, verdict.high])


def _associated(one: cfd.Association) -> list[str]:
    return [str(one.measurements), *map(_plain, (one.pearson, one.spearman, one.partial))]


def _plain(value: float) -> str:
    return "–" if value != value else f"{value:.3f}"


def _interval(values: np.ndarray) -> str:
    mean, low, high = values
    return "–" if mean != mean else f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"
