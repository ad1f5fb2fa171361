"""Figures: learning curves of a run and of a sweep, the spread of clients' accuracies, and parts of others.

All are drawn with Matplotlib's Agg canvas directly, so that no window system and no pyplot state is touched.
"""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator

from fedjax_sim.records.table import Table

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
"""Okabe and Ito's palette, told apart by colour-blind readers too; black and grey last."""
_DASHES = ("-", "--", "-.", ":")
_LABELS = {
    "accuracy": "test accuracy",
    "loss": "test loss",
    "train_loss": "training loss",
    "slot_similarity": "cosine similarity of the slots",
    "client_accuracy_mean": "mean accuracy of clients",
}


def label_of(metric: str) -> str:
    """What to write at an axis."""
    return _LABELS.get(metric, metric.replace("_", " "))


class Picture(Figure):
    """A figure that notebooks show by themselves, whether or not pyplot was ever imported.

    Its caption, if it has one, is text below the image, and no part of it.
    """

    caption: str = ""

    def _repr_png_(self) -> bytes:
        drawn = io.BytesIO()
        self.savefig(drawn, format="png", dpi=110)
        return drawn.getvalue()

    def _repr_html_(self) -> str | None:
        if not self.caption:
            return None
        image = f'<img src="data:image/png;base64,{base64.b64encode(self._repr_png_()).decode()}">'
        text = f'<figcaption style="max-width: 60em">{html.escape(self.caption)}</figcaption>'
        return f"<figure>{image}{text}</figure>"


def new_figure(
    columns: int = 1, rows: int = 1, width: float = 4.0, height: float = 3.0
) -> tuple[Figure, Any]:
    """A figure and its axes.

    Args:
      columns: of axes.
      rows: of axes.
      width: of each, in inches.
      height: of each, in inches.

    Returns:
      (figure, axes[rows, columns]).
    """
    figure = Picture(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def save(figure: Figure, path: str | Path) -> None:
    """Writes a figure; the suffix says the format. Letters in a PDF stay letters, as journals want them."""
    with matplotlib.rc_context({"pdf.fonttype": 42}):
        figure.savefig(Path(path), dpi=160)


def run_curves(
    metrics: Table, title: str, names: Sequence[str] | None = None, headline: str = "accuracy"
) -> Figure:
    """A run's curves, one panel a metric.

    Args:
      metrics: of the run.
      title: what the data and their partition are.
      names: which metrics; None: the headline, losses, similarity and the clients' headline, where recorded.
      headline: the task's first metric.

    Raises:
      UserError: one of `names` was never recorded.
    """
    known = metrics.names()
    for name in names or ():
        metrics.last(name)  # or raises
    clients = f"client_{headline}"
    usual = (headline, "loss", "train_loss", "slot_similarity", f"{clients}_mean")
    chosen = [name for name in (names or usual) if name in known] or known[:1]
    figure, axes = new_figure(*grid_shape(len(chosen)))
    for axis, name in zip(axes.flat, chosen, strict=False):
        rounds, values = metrics.series(name)
        _line(axis, rounds, values, COLOURS[0], "-", label_of(name))
        if name == f"{clients}_mean":
            low, high = (metrics.series(f"{clients}_{p}")[1] for p in ("p10", "p90"))
            if len(low) == len(high) == len(rounds):
                axis.fill_between(
                    rounds, low, high, color=COLOURS[0], alpha=0.2, lw=0, label="10th to 90th percentile"
                )
                axis.legend(fontsize=8, frameon=False)
        dress(axis, label_of(name))
    for axis in axes.flat[len(chosen) :]:
        axis.set_visible(False)
    figure.suptitle(title, fontsize=9)
    return figure


def compared_curves(
    panels: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]], metric: str, title: str
) -> Figure:
    """Curves of several methods: a panel for each setting, mean over seeds with a band of one deviation.

    All panels have one vertical range, so that they can be compared.

    Args:
      panels: setting -> method -> (rounds i64[T], values f64[seeds, T]); NaN where a seed has no value.
      metric: for the axis.
      title: what the data are.
    """
    figure, axes = new_figure(*grid_shape(len(panels)))
    methods = list(dict.fromkeys(method for panel in panels.values() for method in panel))
    for axis, (setting, panel) in zip(axes.flat, panels.items(), strict=False):
        for method, (rounds, values) in panel.items():
            place = methods.index(method)
            colour, dash = style(place)
            counts = np.isfinite(values).sum(0)
            have = counts > 0
            mean = np.nanmean(values[:, have], 0)
            _line(axis, rounds[have], mean, colour, dash, method)
            if len(values) > 1:
                spread = np.zeros_like(mean)
                several = counts[have] > 1
                spread[several] = np.nanstd(values[:, have][:, several], 0, ddof=1)
                axis.fill_between(rounds[have], mean - spread, mean + spread, color=colour, alpha=0.2, lw=0)
        axis.set_title(setting, fontsize=9)
        dress(axis, label_of(metric))
    shown = axes.flat[: len(panels)]
    ranges = [axis.get_ylim() for axis in shown if np.isfinite(axis.dataLim.get_points()).all()]
    for axis in shown if ranges else ():
        axis.set_ylim(min(low for low, _ in ranges), max(high for _, high in ranges))
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    figure.suptitle(title, fontsize=9)
    if len(methods) > 4:
        legend(figure, axes, below=bool(title))
    elif len(panels):
        axes.flat[0].legend(fontsize=8, frameon=False)
    return figure


def trials(
    rounds: Sequence[int],
    values: Sequence[Sequence[float]],
    fields: Mapping[str, tuple[Sequence[Any], bool, bool]],
    metric: str,
    best: int,
    title: str,
) -> Figure:
    """Trials of a search: their values from rung to rung, and the newest against each field.

    Args:
      rounds: at which rungs end.
      values: of each trial, at the rungs that it came to.
      fields: name -> (what each trial had, whether these are numbers, whether on a logarithmic axis).
      metric: for the axis.
      best: number of the trial that stands out.
      title: above all.
    """
    figure, axes = new_figure(*grid_shape(1 + len(fields)))
    order = [*(number for number in range(len(values)) if number != best), best]  # the best on top
    first, *others = axes.flat
    for number in order:
        colour, width = (COLOURS[1], 1.8) if number == best else (COLOURS[7], 0.9)
        known = values[number]
        first.plot(rounds[: len(known)], known, "-o", color=colour, lw=width, markersize=3)
    dress(first, label_of(metric))
    shown = [number for number in order if values[number]]
    for axis, (name, (known, numbers, log)) in zip(others, fields.items(), strict=False):
        own = [known[number] if numbers else str(known[number]) for number in shown]
        rungs = [len(values[number]) for number in shown]
        colours = [
            COLOURS[1] if number == best else DEPTHS(1 - rung / len(rounds))
            for number, rung in zip(shown, rungs, strict=True)
        ]
        axis.scatter(
            own, [values[number][-1] for number in shown], c=colours, s=[12 * rung for rung in rungs]
        )
        if log:
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_formatter("")
        dress(axis, f"{label_of(metric)} when last seen", name)
    blank(axes, 1 + len(fields))
    figure.suptitle(f"{title}; larger marks came further", fontsize=9)
    return figure


def client_figures(metrics: Table, title: str, headline: str = "accuracy") -> Figure | None:
    """How good the model is at each client, in the last round that says so; None if none does.

    Args:
      metrics: of the run.
      title: what the data and their partition are.
      headline: the task's first metric.
    """
    name = f"client_{headline}"
    rounds = metrics.rounds_of(name)
    if not len(rounds):
        return None
    number = int(rounds.max())
    values = np.sort(metrics.by_client(name, number)[1])
    figure, axes = new_figure(2)
    left, right = axes.flat
    share = headline == "accuracy"
    left.hist(values, bins=np.linspace(0, 1, 21) if share else 20, color=COLOURS[0])
    left.set_xlabel(f"{headline} on the client's own test samples")
    left.set_ylabel("clients")
    right.plot(values, (np.arange(len(values)) + 1) / len(values), color=COLOURS[0], drawstyle="steps-post")
    right.set_xlabel(f"{headline} on the client's own test samples")
    right.set_ylabel("share of clients at or below")
    if share:
        right.set_xlim(0, 1)
    right.set_ylim(0, 1)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    figure.suptitle(f"{title}, round {number}", fontsize=9)
    return figure


def style(place: int) -> tuple[str, str]:
    """(colour, dash) of the line in this place, told apart from 31 others."""
    return COLOURS[place % len(COLOURS)], _DASHES[place // len(COLOURS) % len(_DASHES)]


def grid_shape(panels: int) -> tuple[int, int]:
    """(columns, rows) for so many panels."""
    columns = 2 if panels == 4 else max(1, min(panels, 3))
    return columns, max(1, -(-panels // columns))


def _line(axis: Axes, rounds: np.ndarray, values: np.ndarray, colour: str, dash: str, label: str) -> None:
    # A handful of points would vanish without marks; a thousand would be a caterpillar with them.
    mark = "o" if len(rounds) <= 12 else None
    axis.plot(rounds, values, dash, color=colour, label=label, lw=1.4, marker=mark, markersize=3)


def dress(axis: Axes, label: str, along: str = "round") -> None:
    """Labels, grid and spines, of an axis with all its lines; `along` is the horizontal axis.

    Rounds are whole numbers, and have their ticks where something was measured, if that is in few of them.
    """
    axis.set_xlabel(along)
    axis.set_ylabel(label)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if along == "round":
        lines = [line for line in axis.get_lines() if line.get_transform() == axis.transData]
        points = [np.asarray(line.get_xdata(), np.float64) for line in lines]
        ticks_at(axis, np.concatenate(points) if points else np.empty(0))


def ticks_at(axis: Axes, rounds: np.ndarray) -> None:
    """Ticks at the rounds that were measured; at round numbers where these are many, or crowded. f64[n]."""
    rounds = np.unique(rounds)
    crowded = len(rounds) > 12 or (len(rounds) > 1 and np.diff(rounds).min() < np.ptp(rounds) / 15)
    known = len(rounds) > 0 and not crowded
    axis.xaxis.set_major_locator(FixedLocator(rounds.tolist()) if known else MaxNLocator(integer=True))


# --- what the figures of reports share ----------------------------------------------------------------

DEPTHS = LinearSegmentedColormap.from_list("depth", colormaps["viridis"](np.linspace(0, 0.9, 64)))
"""From the first layer to the last, or from the first round."""


def shade(depth: int, names: Sequence[str]) -> Any:
    """The colour of one of the layers `names`."""
    return DEPTHS(depth / max(len(names) - 1, 1))


def bar(figure: Figure, mappable: Any, axes: Any, label: str) -> Any:
    """Draws a bar that says what colours mean, beside `axes`.

    Args:
      figure: gets the bar.
      mappable: what has the colours and their scale.
      axes: one, or an array of those that it is for.
      label: what its numbers are.

    Returns:
      Matplotlib's colorbar.
    """
    made = figure.colorbar(mappable, ax=axes, shrink=0.9, pad=0.02)
    made.set_label(label, fontsize=9)
    made.ax.tick_params(labelsize=8)
    return made


def depth_bar(figure: Figure, axes: Any, names: Sequence[str]) -> None:
    """What the colours of layers mean; some of the names where there are many."""
    scale = BoundaryNorm(np.arange(len(names) + 1) - 0.5, len(names))
    steps = ListedColormap([shade(depth, names) for depth in range(len(names))])
    made = bar(figure, ScalarMappable(scale, steps), axes, "layer")
    shown = range(0, len(names), -(-len(names) // 12))
    made.set_ticks(list(shown), labels=[names[place] for place in shown])
    made.ax.tick_params(length=0)
    made.ax.minorticks_off()


def blank(axes: np.ndarray, used: int) -> None:
    """Hides the panels beyond the first `used`."""
    for axis in axes.flat[used:]:
        axis.set_visible(False)


def legend(figure: Figure, axes: np.ndarray, *, below: bool = False) -> None:
    """One legend for all panels, above or below them, in room of its own."""
    lines: dict[str, Any] = {}
    for axis in axes.flat:
        lines |= {str(line.get_label()): line for line in axis.get_lines() if line.get_label()[0] != "_"}
    if not lines:
        return
    wide = max(1, int(14 * figure.get_figwidth() / (max(map(len, lines)) + 6)))
    rows = -(-len(lines) // wide)
    columns = -(-len(lines) // rows)
    loc = "outside lower center" if below else "outside upper center"
    figure.legend(lines.values(), lines, loc=loc, ncols=columns, fontsize=8, frameon=False, handlelength=3)
    figure.set_figheight(figure.get_figheight() + 0.12 + 0.18 * rows)


def captioned(figure: Figure, text: str) -> Figure:
    """The same figure with a caption, on one line: notebooks and reports set it beside the image."""
    assert isinstance(figure, Picture)
    figure.caption = " ".join(text.split())
    return figure


def caption_of(figure: Figure) -> str:
    """What `captioned` gave it; "" for nothing."""
    return getattr(figure, "caption", "")
