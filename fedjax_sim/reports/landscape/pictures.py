"""The figures of a landscape: curves of several runs in one panel, surfaces side by side on one scale.

Each takes the groups of runs, what was measured of every run, and the settings, and has its caption beside
it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedjax_sim.probes.landscape.surfaces import Curve, Plane, Surface
from fedjax_sim.records import plots
from fedjax_sim.reports.landscape.measurement import Measured, Settings
from fedjax_sim.reports.shared import Group, Missing, captioned, spread

SAMPLES = {"train": "training samples", "test": "test samples"}
_DASH = {"train": "-", "test": "--"}
Results = Sequence[Sequence[Measured]]
"""What was measured of each run, [groups][seeds]."""


def random_line(found: Sequence[Group], results: Results, settings: Settings) -> Figure:
    """Loss, and of classes accuracy, along a random direction, all groups in one panel."""
    classes = all(np.isfinite(one.lines["test"].accuracy).any() for part in results for one in part)
    parts = ("loss", "accuracy") if classes else ("loss",)
    figure, axes = plots.new_figure(len(parts), 1, 4.6, 3.4)
    for axis, part in zip(axes.flat, parts, strict=True):
        for place, (group, measured) in enumerate(zip(found, results, strict=True)):
            for name, dash in _DASH.items():
                curves = [one.lines[name] for one in measured]
                _band(axis, curves, part, plots.COLOURS[place % 8], dash, _label(found, group, name))
        plots.dress(axis, part, "step along the direction")
        axis.xaxis.set_major_locator(MaxNLocator(5))  # more labels would touch
    _by_decades(axes.flat[0])
    axes.flat[-1].legend(fontsize=7, frameon=False)
    about = (
        f"{' and '.join(parts).capitalize()} on {settings.samples} random training and test samples (or all, "
        "if there are fewer) along one Gaussian direction, every filter of which has the norm of the model's "
        "own; biases, parameters of normalisation and batch statistics stay. 0 is the deployed model. The "
        f"same direction for all runs (seed {settings.seed}); mean and standard deviation over seeds."
    )
    return captioned(figure, about, found)


def random_surface(found: Sequence[Group], results: Results, settings: Settings) -> Figure:
    """Loss over two random directions, a row for each group.

    Raises:
      Missing: planes were not asked for.
    """
    parts = [measured[0].surfaces for measured in results]
    del settings
    figure = _contours(found, parts, "random_surface")
    about = (
        "Loss over the plane of two filter-normalised random directions (see random_line), centred at the "
        "deployed model, on one logarithmic scale; the same directions for all runs. First seed of each "
        "group."
    )
    return captioned(figure, about, found)


def models_line(found: Sequence[Group], results: Results, settings: Settings) -> Figure:
    """Loss along the lines between clients' models, a panel for each group.

    Raises:
      Missing: no two models were compared.
    """
    shown = [pair for pair in zip(found, results, strict=True) if pair[1][0].between]
    if not shown:
        fix = "Raise models, or take runs with larger cohorts."
        raise Missing("models_line", settings.models, "no two models were compared", fix)
    figure, axes = plots.new_figure(*plots.grid_shape(len(shown)), 4.4, 3.2)
    for axis, (group, measured) in zip(axes.flat, shown, strict=False):
        for i, j, both in measured[0].between:
            colour = plots.COLOURS[(i + j - 1) % len(plots.COLOURS)]
            for name, barrier in both.items():
                label = f"{i + 1} to {j + 1}" if name == "train" else None
                curve = barrier.curve
                axis.plot(curve.at, curve.loss, _DASH[name], color=colour, lw=1.3, label=label)
        plots.dress(axis, "loss", "from one model to the other")
        axis.set_title(group.name, fontsize=9)
        axis.legend(fontsize=7, frameon=False, title="models", title_fontsize=7)
        _by_decades(axis)
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    about = (
        "Loss along the straight line between the models of clients of one cohort, batch statistics "
        f"interpolated as well; solid, training samples; dashed, test samples. {_ORIGIN} First seed of each "
        "group."
    )
    return captioned(figure, about, [group for group, _ in shown])


def models_plane(found: Sequence[Group], results: Results, settings: Settings) -> Figure:
    """Loss over the plane through three clients' models, a row for each group.

    Raises:
      Missing: planes were not asked for, or there are no three models.
    """
    del settings
    figure = _contours(found, [measured[0].planes for measured in results], "models_plane")
    about = (
        "Loss over the plane through the models of three clients of one cohort (dots 1 to 3; + is their "
        f"mean), batch statistics combined likewise, on one logarithmic scale. {_ORIGIN} Axes are distances. "
        "First seed of each group."
    )
    return captioned(figure, about, found)


PICTURES: dict[str, Callable[[Sequence[Group], Results, Settings], Figure]] = {
    "random_line": random_line,
    "random_surface": random_surface,
    "models_line": models_line,
    "models_plane": models_plane,
}

# --- the figures' parts -------------------------------------------------------------------------------

_ORIGIN = "The models were trained for one more round from the run's final state, and not merged."


def _label(found: Sequence[Group], group: Group, name: str) -> str:
    return name if len(found) == 1 else f"{group.name}: {name}"


def _band(axis: Axes, curves: Sequence[Curve], part: str, colour: str, dash: str, label: str) -> None:
    mean, deviation = spread(np.stack([getattr(curve, part) for curve in curves]))
    axis.plot(curves[0].at, mean, dash, color=colour, lw=1.4, label=label)
    if len(curves) > 1:
        axis.fill_between(curves[0].at, mean - deviation, mean + deviation, color=colour, alpha=0.2, lw=0)


def _by_decades(axis: Axes) -> None:
    """A logarithmic loss, where it spans more than a decade."""
    values = np.concatenate([np.asarray(line.get_ydata(), np.float64) for line in axis.get_lines()])
    values = values[np.isfinite(values) & (values > 0)]
    if len(values) and values.max() > 10 * values.min():
        axis.set_yscale("log", nonpositive="mask")


def _contours(found: Sequence[Group], parts: Sequence[dict[str, Any]], name: str) -> Figure:
    """Filled contours of the loss, a row for each group that has surfaces, a column for train and test."""
    rows = [(group, part) for group, part in zip(found, parts, strict=True) if part]
    if not rows:
        why = "nothing two-dimensional was asked for, or no three different models were there"
        fix = "Raise grid; for models_plane, models and the cohort to 3 or more."
        raise Missing(name, "surfaces", why, fix)
    losses = np.concatenate([surface.loss.ravel() for _, part in rows for surface in part.values()])
    losses = losses[np.isfinite(losses) & (losses > 0)]
    low, high = (losses.min(), losses.max()) if len(losses) else (1.0, 10.0)
    levels = np.geomspace(max(low, high * 1e-5), max(high, low * 1.01), 18)
    scale = LogNorm(levels[0], levels[-1])
    figure, axes = plots.new_figure(len(SAMPLES), len(rows), 4.2, 3.5)
    for row, (group, part) in zip(axes, rows, strict=True):
        for axis, (which, surface) in zip(row, part.items(), strict=True):
            _contour(axis, surface, levels, scale)
            axis.set_title(f"{group.name}: {SAMPLES[which]}", fontsize=9)
    bar = figure.colorbar(ScalarMappable(scale, "viridis"), ax=axes, shrink=0.9, pad=0.02)
    bar.set_label("loss", fontsize=9)
    return figure


def _contour(axis: Axes, surface: Surface, levels: np.ndarray, scale: LogNorm) -> None:
    values = np.clip(np.where(np.isfinite(surface.loss), surface.loss, levels[-1]), levels[0], levels[-1])
    axis.contourf(surface.x, surface.y, values.T, levels=levels, norm=scale, cmap="viridis")
    axis.contour(surface.x, surface.y, values.T, levels=levels, colors="white", linewidths=0.3)
    axis.tick_params(labelsize=8)
    if isinstance(surface, Plane):
        axis.plot(*surface.models.T, "o", color="white", mec="black", ms=6)
        for number, place in enumerate(surface.models, 1):
            axis.annotate(str(number), place, xytext=(5, 5), textcoords="offset points", color="white")
        axis.plot(*surface.models.mean(0), "+", color="white", ms=9)
        axis.set_aspect("equal")
    else:
        axis.plot(0, 0, "+", color="white", ms=9)
