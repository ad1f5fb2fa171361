"""The figures of a layer-peeled analysis: of one run, of seeds, or of methods.

    from fedjax_sim.reports.peel import pictures

    pictures.by_layer(run)

Every figure takes a `Run`, the folder of one, or a sequence of them. Runs that differ only in their seed are
pooled; others are compared. Each has its caption beside it. Means and bands are those of
`fedjax_sim.reports.peel.analysis.means`, so they are the numbers of layers.csv.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from fedjax_sim.probes.peel.chimera import PARTS, STITCHES
from fedjax_sim.records import plots
from fedjax_sim.reports.peel import analysis, cfd
from fedjax_sim.reports.peel.analysis import Measurements
from fedjax_sim.reports.peel.groups import Given, Group, groups
from fedjax_sim.reports.shared import Missing, captioned

LABELS = {
    "sigma_within": "within-class share of variance",
    "sigma_between": "between-class share of variance",
    "log_c": "log C (natural)",
    "pabs": "alignment with the next weights (PABS)",
    "pabs_corrected": "alignment above chance (PABS*)",
    "ridge": "accuracy of a ridge probe",
    "ncm": "accuracy of nearest class mean",
    "ridge_others": "ridge probe on other clients' samples",
}
_SAMPLES = {
    "peel_accuracy": "the client's own samples",
    "peel_accuracy_others": "the other clients' samples",
    "peel_accuracy_global": "the global test set",
}


# --- figures ------------------------------------------------------------------------------------------


def by_layer(given: Given, round_index: int | None = None) -> Figure:
    """Metrics by layer before and after the merge, and in every control, in one round (the newest if None).

    Raises:
      UserError: see `groups`; or nothing of it was recorded.
    """
    found = groups(given)
    here = [group.measured.at(round_index) for group in found]
    wanted = ("sigma_within", "sigma_between", "log_c", "pabs_corrected", "ridge", "ncm", "ridge_others")
    chosen = [name for name in wanted if any(_defined(part.values(name, "before")) for part in here)]
    if not chosen:
        raise _missing("by_layer", here, wanted)
    states = list(dict.fromkeys(state for part in here for name in chosen for state in part.states(name)))
    states = [state for state in states if state != "start"]  # `after` of the round before, mostly
    figure, axes = plots.new_figure(*plots.grid_shape(len(chosen)), **_size(here[0], 4.0))
    counts = []
    for axis, metric in zip(axes.flat, chosen, strict=False):
        for place, (group, part) in enumerate(zip(found, here, strict=True)):
            for state in states:
                key = "before" if state == "before" else "after"
                values, count = analysis.means(part, metric, "after" if state == "before" else state)
                values = values[key]
                counts += [count] * (state in part.states(metric))
                style = _state_style(state, states) if len(found) == 1 else _group_style(place, state, states)
                _curve(axis, part, metric, values, _label(found, group, state), **style)
        first = here[0].first(metric)
        if not first:  # a metric of kernels may be undefined at the image, whatever the client
            drawn = np.concatenate([part.values(metric, state) for part in here for state in states])
            first = int(np.isfinite(drawn).any(0).argmax())
        _layer_axis(axis, here[0], first, LABELS[metric])
    plots.blank(axes, len(chosen))
    plots.legend(figure, axes)
    controls = [state for state in states if state not in ("before", "after")]
    about = (
        "Features at the input of each weight layer: before, of the model that the client trained; after, of "
        f"what it holds once merged{''.join(f'; {state}, a control' for state in controls)}; on the same "
        f"samples. Lines are means over {counted(found, here)}{_behind(here, counts)}. {_bands(here)}"
    )
    if "log_c" in chosen:
        about += " C is within-class over between-class variance."
    return captioned(figure, about, found)


def relative_change(given: Given) -> Figure:
    """Relative change by the merge over the measured rounds, a line for each layer.

    Raises:
      UserError: see `groups`; or nothing of it was recorded.
    """
    found = groups(given)
    wanted = ("sigma_within", "sigma_between", "pabs", "ridge")
    chosen = [name for name in wanted if any(_defined(group.measured.pair(name).relative) for group in found)]
    if not chosen:
        raise _missing("relative_change", [group.measured for group in found], wanted)
    figure, axes = plots.new_figure(len(chosen), len(found), width=3.4, height=2.8)
    names, counts = found[0].measured.names, []
    for row, group in zip(axes, found, strict=True):
        for axis, metric in zip(row, chosen, strict=True):
            rounds, values, count = _over_rounds(group.measured, metric, "relative")
            counts.append(count)
            first = group.measured.first(metric)
            for depth, name in enumerate(names[first:], first):
                line = 100 * values[:, 0, depth - first]
                axis.plot(
                    rounds,
                    line,
                    marker=_mark(rounds),
                    ms=3,
                    lw=1.4,
                    color=plots.shade(depth, names),
                    label=name,
                )
            axis.axhline(0, color="0.6", lw=0.8, zorder=0)
            _dress(axis, "relative change by the merge (%)" if axis is row[0] else "")
            _title(axis, found, group, LABELS[metric])
    plots.depth_bar(figure, axes, names)
    about = (
        "Relative change of a metric by the merge, (after − before) / |before| of each client, averaged over "
        f"{counted(found)}{_behind(_rounds(found), counts)}: a line for each layer, whose input the metric "
        "is of (pabs: and its weights). No band is drawn; layers.csv has the intervals."
    )
    return captioned(figure, about, found)


def causes(given: Given, round_index: int | None = None) -> Figure:
    """Injected and inherited change of log C by layer, from chimeras of one round (the newest if None).

    Raises:
      UserError: see `groups`; or the runs have no chimeras.
    """
    found = groups(given)
    here = [group.measured.at(round_index) for group in found]
    if not any(_defined(part.values(f"chimera_{name}")) for part in here for name in PARTS):
        raise _missing("causes", here, [f"chimera_{name}" for name in PARTS], "--peel.chimeras")
    figure, axes = plots.new_figure(*plots.grid_shape(len(found)), **_size(here[0], 4.6))
    counts = []
    for axis, group, part in zip(axes.flat, found, here, strict=False):
        for place, name in enumerate(PARTS):
            values, count = analysis.means(part, f"chimera_{name}", "")
            values = values["change"]
            counts.append(count)
            dash = "--" if name == "total" else ":" if name == "interaction" else "-"
            colour = ("#000000", plots.COLOURS[1], plots.COLOURS[0], "#999999")[place]
            _curve(axis, part, f"chimera_{name}", values, name, color=colour, linestyle=dash)
        axis.axhline(0, color="0.6", lw=0.8, zorder=0)
        _layer_axis(axis, part, 1, "change of log C")
        _title(axis, found, group)
    plots.blank(axes, len(found))
    _same_limits(axes, len(found))
    plots.legend(figure, axes)
    about = (
        "What causes a layer's change of log C (natural logarithm of within-class over between-class "
        "variance of its input), against the client's own model: total, all layers before it aggregated; "
        "injected, only the one right before it; inherited, all but that one; interaction, total − injected "
        f"− inherited. Means over {counted(found, here)}{_behind(here, counts)}. {_bands(here)}"
    )
    return captioned(figure, about, found)


def accuracy_drop(given: Given) -> Figure:
    """Accuracy lost by the merge against the change of the penultimate feature's log C, in all rounds.

    Raises:
      UserError: see `groups`; or nothing of it was recorded.
    """
    found = groups(given)
    points = [drop_of(group.measured) for group in found]
    if not any(np.isfinite(change + drop).any() for change, drop, _, _ in points):
        raise _missing("accuracy_drop", [group.measured for group in found], ["log_c", "peel_accuracy"])
    figure, axes = plots.new_figure(*plots.grid_shape(len(found)), width=4.2, height=3.4)
    rounds = np.concatenate([number for *_, number in points])
    scale = Normalize(rounds.min(), max(rounds.max(), rounds.min() + 1))
    for axis, group, (change, drop, before, number) in zip(axes.flat, found, points, strict=False):
        axis.scatter(change, drop, c=number, cmap=plots.DEPTHS, norm=scale, s=18, lw=0.3, edgecolors="white")
        for line in (axis.axhline, axis.axvline):
            line(0, color="0.6", lw=0.8, zorder=0)
        _dress(axis, "accuracy before − after", "change of log C of the penultimate feature")
        told = _associated(cfd.association(change, drop, before))
        _title(axis, found, group, told)
    plots.blank(axes, len(found))
    _same_limits(axes, len(found), x=True)
    if len(np.unique(rounds)) > 1:
        bar = plots.bar(figure, ScalarMappable(scale, plots.DEPTHS), axes, "round")
        measured = np.unique(rounds).astype(int)
        bar.set_ticks(measured[:: -(-len(measured) // 6)])
        bar.minorticks_off()
    about = (
        "Accuracy that the merge costs a client on its own measured samples, against the change of log C "
        "(natural logarithm of within-class over between-class variance) of its penultimate feature, the "
        f"classifier's input, of each client in each round: {_points(found, points)}. r: Pearson's "
        "correlation; ρ: Spearman's; partial: Pearson's given the accuracy before the merge. A client's "
        "rounds are not independent, so no test is made."
    )
    return captioned(figure, about, found)


def heat_map(given: Given) -> Figure:
    """Change of log C by layer and measured round.

    Raises:
      UserError: see `groups`; or nothing of it was recorded.
    """
    found = groups(given)
    tables = [_over_rounds(group.measured, "log_c", "change") for group in found]
    if not any(_defined(values[:, 0]) for _, values, _ in tables):
        raise _missing("heat_map", [group.measured for group in found], ["log_c"])
    limit = max(np.nanmax(np.abs(values[:, 0]), initial=0) for _, values, _ in tables) or 1.0
    names = found[0].measured.names[1:]
    height = max(2.6, 0.17 * len(names) + 1.2)
    figure, axes = plots.new_figure(*plots.grid_shape(len(found)), width=4.6, height=height)
    image = None
    for axis, group, (rounds, values, _) in zip(axes.flat, found, tables, strict=False):
        image = axis.imshow(
            np.ma.masked_invalid(values[:, 0].T), cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto"
        )
        axis.set_facecolor("0.8")
        every = -(-len(rounds) // 10)
        axis.set_xticks(np.arange(len(rounds))[::every], [str(number) for number in rounds[::every]])
        axis.set_yticks(np.arange(len(names)), names, fontsize=8 if len(names) <= 12 else 6)
        axis.set_xlabel("measured round", fontsize=9)
        axis.set_ylabel("layer, from input (top)", fontsize=9)
        axis.tick_params(axis="x", labelsize=8)
        _title(axis, found, group)
    plots.blank(axes, len(found))
    assert image is not None
    plots.bar(figure, image, axes, "change of log C")
    about = (
        "Change of log C (natural logarithm of within-class over between-class variance) of each layer's "
        f"input by the merge, in every measured round; means over {counted(found)}"
        f"{_behind(_rounds(found), [count for *_, count in tables])}. Red: classes are less apart "
        "after the merge. Grey: not defined."
    )
    return captioned(figure, about, found)


def stitched(given: Given, round_index: int | None = None) -> Figure:
    """Accuracy of models of which only some layers are aggregated, in one round (the newest if None).

    Raises:
      UserError: see `groups`; or the runs have no chimeras.
    """
    found = groups(given)
    here = [group.measured.at(round_index) for group in found]
    if not any(_defined(part.values(f"stitched_{kind}")) for part in here for kind in STITCHES):
        raise _missing("stitched", here, [f"stitched_{kind}" for kind in STITCHES], "--peel.chimeras")
    figure, axes = plots.new_figure(*plots.grid_shape(len(found)), **_size(here[0], 4.6))
    told = {"prefix": "merged up to it", "single": "it alone merged", "suffix": "merged from it on"}
    marks, counts = {"prefix": "o", "single": "s", "suffix": "^"}, []
    for axis, group, part in zip(axes.flat, found, here, strict=False):
        own = np.nan
        for place, kind in enumerate(STITCHES):
            values, count = analysis.means(part, f"stitched_{kind}", "")
            counts.append(count)
            own = values["before"][0, 0]
            style = {"color": plots.COLOURS[place], "marker": marks[kind]}
            _curve(axis, part, f"stitched_{kind}", values["after"], told[kind], **style)
        axis.axhline(own, color="0.35", lw=1.2, ls="--", label="none merged")
        _layer_axis(axis, part, 0, "accuracy")
        _title(axis, found, group)
    plots.blank(axes, len(found))
    _same_limits(axes, len(found))
    plots.legend(figure, axes)
    about = (
        "Stitched accuracies: of the client's own model in which one layer, all up to it, or all from it on "
        "are replaced by the merged ones, on the client's own measured samples; dashed, the client's own "
        f"model. Means over {counted(found, here)}{_behind(here, counts)}. {_bands(here)}"
    )
    return captioned(figure, about, found)


def accuracy(given: Given) -> Figure:
    """Accuracy at the start of a measured round, before and after its merge, and fine-tuned: the sawtooth.

    Raises:
      UserError: see `groups`; or nothing of it was recorded.
    """
    found = groups(given)
    chosen = [
        name
        for name in _SAMPLES
        if any(
            _defined(group.measured.scalar(name, state)) for group in found for state in _states(group, name)
        )
    ]
    if not chosen:
        raise _missing("accuracy", [group.measured for group in found], list(_SAMPLES))
    beside = len(chosen) == 1
    figure, axes = plots.new_figure(*((len(found), 1) if beside else (len(chosen), len(found))), width=4.6)
    counts = []
    for row, group in zip(axes.T if beside else axes, found, strict=True):
        rounds = np.asarray(group.measured.numbers())
        for axis, metric in zip(row, chosen, strict=True):
            states = _states(group, metric)
            lines = {}
            for state in states:
                parts = [group.measured.at(n).scalar(metric, state)[:, None] for n in rounds.tolist()]
                lines[state] = np.stack([cfd.estimate(part)[:, 0] for part in parts])
                counts.append(np.asarray([np.isfinite(part).sum() for part in parts]))
            tooth = [(rounds - (state == "start"), lines[state][:, 0]) for state in lines if state in _STATES]
            tooth.append((rounds, np.full(len(rounds), np.nan)))
            x, y = np.stack(tooth, 2)
            axis.plot(x.ravel(), y.ravel(), color="0.75", lw=0.9, zorder=1)
            for state, values in lines.items():
                style = _state_style(state, states)
                x = rounds - (state == "start")
                axis.plot(x, values[:, 0], lw=0 if state == "start" else 1.2, ms=3.5, label=state, **style)
                axis.fill_between(x, values[:, 1], values[:, 2], color=style["color"], alpha=0.15, lw=0)
            _dress(axis, "accuracy" if axis is row[0] else "")
            plots.ticks_at(axis, rounds)
            _title(axis, found, group, f"on {_SAMPLES[metric]}")
    _same_limits(axes, axes.size)
    plots.legend(figure, axes)
    about = (
        "Accuracy of the measured clients: start, of the model that they were sent, drawn a round earlier; "
        "before, of what they trained; after, of what they hold once merged; further states as named. Grey "
        f"lines join the first three of a round. Means over {counted(found)}"
        f"{_behind(_rounds(found), counts)}. " + _bands([group.measured for group in found])
    )
    return captioned(figure, about, found)


PICTURES: dict[str, Callable[..., Figure]] = {
    "by_layer": by_layer,
    "relative_change": relative_change,
    "causes": causes,
    "accuracy_drop": accuracy_drop,
    "heat_map": heat_map,
    "stitched": stitched,
    "accuracy": accuracy,
}


# --- the figures' parts -------------------------------------------------------------------------------

_STATES = {"start": "#999999", "before": plots.COLOURS[0], "after": plots.COLOURS[1]}
_MARKS = {"start": "o", "before": "^", "after": "o"}


def _missing(
    name: str, parts: Sequence[Measurements], metrics: Sequence[str], flag: str = "--peel.every"
) -> Missing:
    if any(metric in metrics for part in parts for metric, _ in [*part.by_layer, *part.plain]):
        return Missing(name, ", ".join(metrics), "no client's samples define it", analysis.ENOUGH)
    return Missing(name, ", ".join(metrics), "it was not recorded", f"Run with {flag}.")


def _defined(values: np.ndarray) -> bool:
    return bool(np.isfinite(values).any())


def _states(group: Group, metric: str) -> list[str]:
    """Of which states a metric without a layer was recorded, in the order of a round."""
    known = [state for name, state in group.measured.plain if name == metric]
    order = {"start": 0, "before": 1, "after": 2}
    return sorted(known, key=lambda state: order.get(state, 3))


def _over_rounds(measured: Measurements, metric: str, part: str) -> tuple[list[int], np.ndarray, np.ndarray]:
    """(T rounds, f64[T, 3, L]: mean, low, high of a part of `analysis.means`, i64[T, L]: of how many)."""
    numbers = measured.numbers()
    found = [analysis.means(measured.at(n), metric) for n in numbers]
    return numbers, np.stack([values[part] for values, _ in found]), np.stack([each for _, each in found])


def _rounds(found: Sequence[Group]) -> list[Measurements]:
    """What was measured, a part for each group and round."""
    return [group.measured.at(number) for group in found for number in group.measured.numbers()]


def _behind(parts: Sequence[Measurements], counts: Sequence[np.ndarray]) -> str:
    """How few and how many measurements have a value at a point of a figure; "" where all have.

    Args:
      parts: of a group and a round each.
      counts: of each point that may be drawn, how many have a value there.
    """
    each = np.concatenate([np.ravel(one) for one in counts])
    low, high = int(each.min()), int(each.max())
    if low >= max(len(part) for part in parts):
        return ""
    return (
        f"; of these, {low} to {high} have a value at a point"
        if low < high
        else (f"; of these, {low} {'has' if low == 1 else 'have'} a value at a point")
    )


def drop_of(measured: Measurements) -> tuple[np.ndarray, ...]:
    """Of each measurement: change of the last log C, accuracy lost, accuracy before, round. f64[n] each."""
    before, after = (measured.scalar("peel_accuracy", state) for state in ("before", "after"))
    return measured.pair("log_c").change[:, -1], before - after, before, measured.rounds.astype(np.float64)


def counted(found: Sequence[Group], here: Sequence[Measurements] | None = None) -> str:
    """Of how many clients, seeds and rounds a mean is; `here`: what is left of one round."""
    told = []
    for group, part in zip(found, here or [group.measured for group in found], strict=True):
        numbers = part.numbers()
        each = len(part) / (len(group.runs) * len(numbers))
        clients = _plural(each, "client") if each == int(each) else f"{each:.1f} clients on average"
        rounds = "each round" if here is None else f"round {numbers[-1]}"
        told.append(f"{clients} × {_plural(len(group.runs), 'seed')} in {rounds}")
    return _by_group(told, found)


def _points(found: Sequence[Group], points: Sequence[Sequence[np.ndarray]]) -> str:
    counts = [np.isfinite(change + drop).sum() for change, drop, *_ in points]
    told = [
        f"{_plural(count, 'point')} from {_plural(len(group.runs), 'seed')} and "
        f"{_plural(len(group.measured.numbers()), 'round')}"
        for count, group in zip(counts, found, strict=True)
    ]
    return _by_group(told, found)


def _by_group(told: Sequence[str], found: Sequence[Group]) -> str:
    if len(set(told)) == 1:
        return told[0] + " of each group" * (len(found) > 1)
    return "; ".join(f"{one} ({group.name})" for one, group in zip(told, found, strict=True))


def _plural(count: float, word: str) -> str:
    return f"{count:g} {word}" + "s" * int(count != 1)


def _associated(one: cfd.Association) -> str:
    told = f"r = {rounded(one.pearson)}, ρ = {rounded(one.spearman)}, partial {rounded(one.partial)}"
    return f"{told}, n = {one.measurements}"


def rounded(value: float) -> str:
    """Three decimals, or a dash."""
    return f"{value:.3f}" if np.isfinite(value) else "–"


def _curve(axis: Axes, part: Measurements, metric: str, values: np.ndarray, label: str, **style: Any) -> None:
    """A mean by layer and its band. values: f64[3, L], from the metric's first layer on."""
    if not _defined(values[0]):
        return
    x = np.arange(len(part.names) - values.shape[1], len(part.names))
    axis.plot(x, values[0], **{"lw": 1.4, "marker": "o", "ms": 3.5, "label": label, **style})
    axis.fill_between(x, values[1], values[2], color=style["color"], alpha=0.15, lw=0)


def _layer_axis(axis: Axes, part: Measurements, first: int, label: str) -> None:
    _dress(axis, label, "layer, from input to output")
    names = part.names[first:]
    turn, size = 90 * _upright(part.names), 8 if len(names) <= 12 else 6
    axis.set_xticks(np.arange(first, len(part.names)), names, rotation=turn, fontsize=size)
    axis.set_xlim(first - 0.3, len(part.names) - 0.7)


def _state_style(state: str, states: Sequence[str]) -> dict[str, Any]:
    others = [name for name in states if name not in _STATES]
    if state in _STATES:
        return {"color": _STATES[state], "marker": _MARKS[state]}
    place = others.index(state)
    return {"color": plots.COLOURS[2 + place % 4], "marker": "sDvP"[place % 4]}


def _group_style(place: int, state: str, states: Sequence[str]) -> dict[str, Any]:
    others = [name for name in states if name not in _STATES]
    dash = {"before": "--", "after": "-"}.get(state) or ("-.", ":")[others.index(state) % 2]
    colour = plots.COLOURS[place % len(plots.COLOURS)]
    return {"color": colour, "linestyle": dash, "marker": _MARKS.get(state, "s")}


def _label(found: Sequence[Group], group: Group, state: str) -> str:
    return state if len(found) == 1 else f"{group.name}: {state}"


def _mark(rounds: Sequence[int]) -> str | None:
    return "o" if len(rounds) <= 12 else None


def _size(part: Measurements, width: float) -> dict[str, float]:
    """Of a panel over layers: room for their names, which stand upright where they are long."""
    height = 3.1 + _upright(part.names) * 0.055 * max(map(len, part.names))
    return {"width": max(width, 0.16 * len(part.names) + 1.0), "height": height}


def _upright(names: Sequence[str]) -> bool:
    return sum(map(len, names)) > 40


def _same_limits(axes: np.ndarray, used: int, *, x: bool = False) -> None:
    """The same range on the vertical axes of all panels, and on the horizontal ones if asked."""
    for get, put in [("get_ylim", "set_ylim")] + [("get_xlim", "set_xlim")] * x:
        bounds = np.asarray([getattr(axis, get)() for axis in axes.flat[:used]])
        for axis in axes.flat[:used]:
            getattr(axis, put)(bounds[:, 0].min(), bounds[:, 1].max())


def _dress(axis: Axes, label: str, along: str = "round") -> None:
    plots.dress(axis, label, along)
    for one in (axis.xaxis, axis.yaxis):
        one.label.set_fontsize(9)
        one.set_tick_params(labelsize=8)


def _title(axis: Axes, found: Sequence[Group], group: Group, about: str = "") -> None:
    told = [group.name] * (len(found) > 1) + [about] * bool(about)
    axis.set_title("\n".join(told), fontsize=9)


def _bands(parts: Sequence[Measurements]) -> str:
    several = any(len(part) > len(part.numbers()) for part in parts)
    band = "Bands are 95% bootstrap intervals of the mean over clients and seeds"
    return f"{band if several else 'No band: one measurement'}; undefined values are left out."
