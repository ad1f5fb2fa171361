"""The figures of layer-wise inertia: of one run, of seeds, or of methods.

Each takes groups of runs that differ in their seed only (`Group`, which `fedjax_sim.reports.shared.groups`
makes of folders) and the metric that says how far a layer moves, and has its caption beside it.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from fedjax_sim.algorithms.lips import LIPS, densities
from fedjax_sim.probes.inertia.movement import METRICS
from fedjax_sim.records import goal_of, plots
from fedjax_sim.reports import shared
from fedjax_sim.reports.inertia.profile import Profile, profile
from fedjax_sim.reports.shared import Missing, captioned, spread

START = 4
"""First round that counts in means over rounds: movement in the very first says little of later ones."""

LABELS = {
    "inertia_step": "relative step ρ",
    "inertia_displacement": "relative displacement δ",
    "inertia_cosine": "cosine with the reference",
    "inertia_l1": "L1 distance from the reference",
    "inertia_l2": "L2 distance from the reference",
    "inertia_update": "norm of clients' updates",
    "inertia_cancellation": "‖mean update‖ / mean ‖update‖",
    "gradient_norm": "norm of clients' gradients",
    "gradient_diversity": "gradient diversity",
    "gradient_spread": "spread of clients' gradients",
}
EFFECTIVENESS = {
    "effectiveness_own": "clients' own test samples",
    "effectiveness_global": "global test set",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Group(shared.Group):
    """Runs that differ in their seed only, S of them, and what was recorded of their layers."""

    @functools.cached_property
    def layers(self) -> tuple[str, ...]:
        """Names of the measured layers in network order, which is that of the rows."""
        table = self.runs[0].metrics
        wanted = {name for metric in METRICS for name in (metric, f"undefined/{metric}")}
        pairs = zip(table.column("metric"), table.column("layer"), strict=True)
        return tuple(dict.fromkeys(layer for metric, layer in pairs if metric in wanted))

    def values(self, metric: str, layers: Sequence[str] = ("",)) -> tuple[np.ndarray, np.ndarray]:
        """(rounds i64[T], values f64[S, T, L]) of a metric; NaN where a seed has no value."""
        parts = [[run.metrics.series(metric, layer=layer) for layer in layers] for run in self.runs]
        numbers = [rounds for part in parts for rounds, _ in part]
        known = np.unique(np.concatenate([*numbers, np.empty(0, np.int64)])).astype(np.int64)
        out = np.full((len(parts), len(known), len(layers)), np.nan)
        for s, part in enumerate(parts):
            for depth, (rounds, values) in enumerate(part):
                out[s, np.searchsorted(known, rounds), depth] = values
        return known, out

    def has(self, metric: str) -> bool:
        """Whether any run recorded it."""
        return any(metric in run.metrics.names() for run in self.runs)

    def profiles(self, metric: str) -> list[Profile]:
        """The profile of each seed that has one, from round `START` on."""
        found = [profile(run.metrics, self.layers, metric, START) for run in self.runs]
        return [one for one in found if one is not None]

    def sparse(self) -> np.ndarray:
        """Rounds after which clients start from a sparse model, i64[n]."""
        rounds, after = self.values("lips_density_after")
        return rounds[spread(after)[0][:, 0] < 1]

    def effectiveness(self, metric: str) -> dict[str, np.ndarray]:
        """Of each seed, f64[S]: mean over the rounds from `START` on, `dense` and `sparse` ones apart."""
        rounds, values = self.values(metric)
        sparse, late = np.isin(rounds, self.sparse()), rounds >= START
        chosen = {"dense": late & ~sparse, "sparse": late & sparse}
        return {name: spread(values[:, mask, 0].T)[0] for name, mask in chosen.items()}

    def plan(self) -> tuple[np.ndarray, np.ndarray]:
        """LIPS' sparse starts: (rounds i64[n], planned densities f64[n]); none for other algorithms."""
        config = self.runs[0].config
        if not isinstance(config.algorithm, LIPS):
            return np.empty(0, np.int64), np.empty(0)
        planned = np.asarray(densities(config.algorithm, config.rounds))
        starts = 2 + config.algorithm.period * np.arange(len(planned))  # after round i, from 0: before i + 2
        inside = (starts <= config.rounds) & (planned < 1)
        return starts[inside], planned[inside]


# --- figures ------------------------------------------------------------------------------------------


def heat_map(found: Sequence[Group], metric: str = "inertia_step") -> Figure:
    """Inertia by layer and round.

    Raises:
      Missing: it was not recorded, or is nowhere positive.
    """
    shown = _having(found, [metric], "heat_map")
    tables = [(rounds, spread(values)[0]) for rounds, values in (g.values(metric, g.layers) for g in shown)]
    positive = np.concatenate([values[values > 0] for _, values in tables])
    if not len(positive):
        raise Missing("heat_map", metric, "no layer ever moved", "Train it.")
    most = max(len(group.layers) for group in shown)
    figure, axes = plots.new_figure(
        *plots.grid_shape(len(shown)), width=4.8, height=max(2.6, 0.17 * most + 1.2)
    )
    scale, image = LogNorm(positive.min(), max(positive.max(), positive.min() * 1.01)), None
    for axis, group, (rounds, values) in zip(axes.flat, shown, tables, strict=False):
        whole = np.full((len(group.layers), rounds[-1] - rounds[0] + 1), np.nan)
        whole[:, rounds - rounds[0]] = np.where(values > 0, values, np.nan).T
        sides = (rounds[0] - 0.5, rounds[-1] + 0.5, len(group.layers) - 0.5, -0.5)
        image = axis.imshow(
            np.ma.masked_invalid(whole),
            norm=scale,
            extent=sides,
            aspect="auto",
            interpolation="nearest",
        )
        axis.set_facecolor("0.8")
        size = 8 if len(group.layers) <= 12 else 6
        axis.set_yticks(np.arange(len(group.layers)), group.layers, fontsize=size)
        axis.set_xlabel("round")
        plots.ticks_at(axis, rounds)
        axis.set_title(group.name, fontsize=9)
    plots.blank(axes, len(shown))
    assert image is not None
    figure.colorbar(image, ax=axes, shrink=0.9, pad=0.02).set_label(LABELS[metric], fontsize=9)
    about = (
        f"{_MEANING[metric]}, by layer, from input (top) to output, and round; mean over seeds. Grey: zero, "
        "or not defined."
    )
    return captioned(figure, about, shown)


def lines(found: Sequence[Group], metric: str = "inertia_step") -> Figure:
    """The same as lines over rounds, a colour for each layer.

    Raises:
      Missing: it was not recorded.
    """
    shown = _having(found, [metric], "lines")
    figure, axes = plots.new_figure(*plots.grid_shape(len(shown)), width=4.8)
    for axis, group in zip(axes.flat, shown, strict=False):
        _by_depth(axis, group, metric)
        axis.set_yscale("log", nonpositive="mask")
        axis.set_title(group.name, fontsize=9)
        plots.depth_bar(figure, axis, group.layers)
    plots.blank(axes, len(shown))
    about = f"{_MEANING[metric]}, over rounds, a line for each layer; mean over seeds, no band."
    return captioned(figure, about, shown)


def by_layer(found: Sequence[Group], metric: str = "inertia_step") -> Figure:
    """The profile: how far each layer moves, over all rounds from `START` on.

    Raises:
      Missing: it was not recorded, or there is no profile of it.
    """
    _having(found, [metric], "by_layer")
    profiles = {group: group.profiles(metric) for group in found}
    shown = [group for group, made in profiles.items() if made]
    if not shown:
        why = f"it takes three layers that move in round {START} or later"
        raise Missing("by_layer", metric, why, "Train for more rounds.")
    kinds = list(dict.fromkeys(group.layers for group in shown))
    room = 0.055 * max(len(name) for names in kinds for name in names)
    width = max(4.6, 0.22 * max(map(len, kinds)) + 1)
    figure, axes = plots.new_figure(*plots.grid_shape(len(kinds)), width=width, height=3.2 + room)
    for axis, names in zip(axes.flat, kinds, strict=False):
        for place, group in enumerate(shown):
            if group.layers != names:
                continue
            mean, std = spread(np.log([one.values for one in profiles[group]]))
            values, least = np.exp(mean), 1 + int(np.argmin(mean[1:-1]))
            (colour, dash), x = plots.style(place), np.arange(len(names))
            axis.plot(x, values, "o", ls=dash, color=colour, ms=3.5, lw=1.4, label=group.name)
            axis.plot(x[[0, -1]], values[[0, -1]], "s", color=colour, ms=7)
            axis.plot(x[least], values[least], "o", mfc="none", mec=colour, ms=10)
            axis.fill_between(x, np.exp(mean - std), np.exp(mean + std), color=colour, alpha=0.15, lw=0)
        plots.dress(axis, LABELS[metric], "layer, from input to output")
        axis.set_yscale("log")
        axis.set_xticks(np.arange(len(names)), names, rotation=90, fontsize=8 if len(names) <= 20 else 6)
    plots.blank(axes, len(kinds))
    plots.legend(figure, axes)
    about = (
        f"{_MEANING[metric]}, by layer: geometric mean over the rounds from {START} on and over seeds; bands "
        "are one standard deviation of its logarithm over seeds. Squares: the ends; ring: the inner layer "
        "that moves least."
    )
    return captioned(figure, about, shown)


def reference(found: Sequence[Group], metric: str = "inertia_step") -> Figure:
    """Displacement and cosine from the reference round over rounds, a colour for each layer.

    Raises:
      Missing: it was not recorded.
    """
    del metric
    wanted = ("inertia_displacement", "inertia_cosine")
    shown = _having(found, wanted, "reference", "Run with --inertia.measure, beyond --inertia.reference.")
    figure, axes = plots.new_figure(2, len(shown), width=4.4, height=2.9)
    for row, group in zip(axes, shown, strict=True):
        for axis, name in zip(row, wanted, strict=True):
            _by_depth(axis, group, name)
            axis.set_title(group.name, fontsize=9)
        plots.depth_bar(figure, row[1], group.layers)
    numbers = sorted({group.runs[0].config.inertia.reference for group in shown})
    about = (
        "How far the deployed model is from that after the reference round "
        f"({', '.join(map(str, numbers))}), a line for each layer: ‖w − w_s‖ / ‖w_s‖, and the cosine of w "
        "and w_s; mean over seeds, no band."
    )
    return captioned(figure, about, shown)


def effectiveness(found: Sequence[Group], metric: str = "inertia_step") -> Figure:
    """Mean of the headline metric after a merge minus before, over rounds; before sparse starts it is marked.

    Raises:
      Missing: it was not recorded.
    """
    del metric
    shown = _having(found, list(EFFECTIVENESS), "effectiveness", "Run with --inertia.every.")
    kinds = {name: label for name, label in EFFECTIVENESS.items() if any(g.has(name) for g in shown)}
    headline, change = _change(shown)
    figure = _curves(shown, kinds, f"{headline} {change} the merge")
    told = []
    for axis, (name, label) in zip(figure.axes, kinds.items(), strict=False):
        axis.axhline(0, color="0.6", lw=0.8, zorder=0)
        for place, group in enumerate(group for group in shown if group.has(name)):
            rounds, values = group.values(name)
            sparse = np.isin(rounds, group.sparse())
            colour = axis.get_lines()[place].get_color()
            axis.plot(
                rounds[sparse], spread(values)[0][sparse, 0], "v", mfc="white", mec=colour, ms=6, zorder=4
            )
            means = {kind: spread(part)[0] for kind, part in group.effectiveness(name).items()}
            parts = [f"{kind} {mean:+.3f}" for kind, mean in means.items() if np.isfinite(mean)]
            told.append(f"{group.name}, {label}: {', '.join(parts) or 'none'}")
    about = (
        f"Aggregation effectiveness: mean over clients of {headline} {_IN_WORDS[change]}; mean and "
        "standard deviation over seeds. Triangles: after the merge clients hold a sparse model. Means over "
        f"the rounds from {START} on, dense and sparse ones apart: {'; '.join(told)}."
    )
    return captioned(figure, about, shown)


def density(found: Sequence[Group], metric: str = "inertia_step") -> Figure:
    """LIPS' density at each sparse start: planned, recorded, and the share that is not zero.

    Raises:
      Missing: there is no LIPS with a sparse start, or its records are missing.
    """
    del metric
    shown = [group for group in found if len(group.plan()[0]) and group.has("lips_density")]
    if not shown:
        raise Missing("density", "lips_density", "no run starts a round sparse", "Run with --algorithm lips.")
    figure, axes = plots.new_figure(*plots.grid_shape(len(shown)), width=4.4)
    told = []
    for axis, group in zip(axes.flat, shown, strict=False):
        starts, planned = group.plan()
        axis.plot(starts, planned, "-", color="0.6", lw=1.2, label="planned", marker="x", ms=5)
        parts = []
        for name, label, style in (
            ("lips_density", "recorded", {"marker": "o", "mfc": "none", "ms": 7, "color": plots.COLOURS[0]}),
            ("lips_nonzero", "not zero", {"marker": ".", "ms": 5, "color": plots.COLOURS[1]}),
        ):
            rounds, values = group.values(name)
            mean = spread(values)[0][:, 0]
            wanted = np.ones(len(rounds))
            wanted[np.isin(rounds, starts)] = planned[np.isin(starts, rounds)]
            at = np.isin(rounds, starts)
            axis.plot(rounds[at], mean[at], lw=0, label=label, **style)
            if len(rounds):
                parts.append(f"{label} {np.nanmax(np.abs(mean - wanted)):.1e}")
        told.append(f"{group.name}: {', '.join(parts)}")
        plots.dress(axis, "density of eligible tensors")
        axis.legend(fontsize=8, frameon=False)
        axis.set_title(group.name, fontsize=9)
    plots.blank(axes, len(shown))
    about = (
        "Density with which clients start the sparse rounds: planned by the schedule; recorded, with whole "
        "entries; and the share of entries that were not zero, mean over clients (with noise or initial "
        "values in place of zeros it is not the density). Largest difference from the plan over all rounds, "
        f"dense ones included: {'; '.join(told)}."
    )
    return captioned(figure, about, shown)


def accuracy(found: Sequence[Group], metric: str = "inertia_step") -> Figure:
    """The headline metric over rounds, accuracy for classes; a line for each group.

    Raises:
      Missing: it was not recorded.
    """
    del metric
    headline = _headline(found)
    labels = {
        headline: "deployed model, global test set",
        f"client_{headline}_mean": "clients' own test samples",
    }
    shown = _having(found, list(labels), "accuracy", "Run with --evaluation.every.")
    kinds = {name: label for name, label in labels.items() if any(g.has(name) for g in shown)}
    figure = _curves(shown, kinds, headline)
    return captioned(
        figure, f"{headline.capitalize()} over rounds; mean and standard deviation over seeds.", shown
    )


_IN_WORDS = {
    "after − before": "after the merge minus before",
    "before − after": "before the merge minus after",
}


def _headline(found: Sequence[Group]) -> str:
    """The metric that the groups' task shows first."""
    return found[0].runs[0].headline


def _change(found: Sequence[Group]) -> tuple[str, str]:
    """(headline metric, which difference of it is a gain)."""
    headline = _headline(found)
    return headline, "after − before" if goal_of(headline) == "max" else "before − after"


PICTURES: dict[str, Callable[[Sequence[Group], str], Figure]] = {
    "heat_map": heat_map,
    "lines": lines,
    "by_layer": by_layer,
    "reference": reference,
    "effectiveness": effectiveness,
    "density": density,
    "accuracy": accuracy,
}


# --- the figures' parts -------------------------------------------------------------------------------

_MEANING = {
    "inertia_step": "Step of the deployed model in a round, ‖w − w'‖ / ‖w'‖",
    "inertia_displacement": "Displacement of the deployed model from the reference round, ‖w − w_s‖ / ‖w_s‖",
    "inertia_l1": "L1 distance of the deployed model from the reference round",
    "inertia_l2": "L2 distance of the deployed model from the reference round",
    "inertia_update": "Mean norm of clients' updates",
    "inertia_cancellation": "Norm of the mean update over mean norm of clients' updates (1: they move alike)",
    "gradient_norm": "Mean norm of clients' last gradients",
    "gradient_diversity": "Mean squared norm of clients' last gradients over their mean's (1: they agree)",
    "gradient_spread": "Root mean square distance of clients' last gradients from their mean",
}


def _having(
    found: Sequence[Group], metrics: Sequence[str], name: str, fix: str = "Run with --inertia.measure."
) -> list[Group]:
    """The groups that recorded any of the metrics; raises Missing if none did."""
    shown = [group for group in found if any(group.has(metric) for metric in metrics)]
    if not shown:
        raise Missing(name, ", ".join(metrics), "it was not recorded", fix)
    return shown


def _curves(shown: Sequence[Group], kinds: dict[str, str], label: str) -> Figure:
    """A panel for each metric, a line for each group that recorded it."""
    panels: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    for name, title in kinds.items():
        parts = {group.name: group.values(name) for group in shown if group.has(name)}
        panels[title] = {key: (rounds, values[..., 0]) for key, (rounds, values) in parts.items()}
    return plots.compared_curves(panels, label, "")


def _by_depth(axis: Axes, group: Group, metric: str) -> None:
    rounds, values = group.values(metric, group.layers)
    mark = "o" if len(rounds) <= 12 else None
    for depth, (name, line) in enumerate(zip(group.layers, spread(values)[0].T, strict=True)):
        axis.plot(rounds, line, color=plots.shade(depth, group.layers), lw=1.2, marker=mark, ms=3, label=name)
    plots.dress(axis, LABELS[metric])
