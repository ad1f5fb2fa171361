"""A page's pictures: drawn by the reports that own them, and held in the page itself."""

import base64
import contextlib
import dataclasses
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedjax_sim.core.errors import UserError
from fedjax_sim.records import plots
from fedjax_sim.reports.inertia import pictures as inertia_pictures
from fedjax_sim.reports.page.curves import Curves
from fedjax_sim.reports.page.entries import Entry
from fedjax_sim.reports.peel import analysis, overview
from fedjax_sim.reports.peel import groups as peel_groups
from fedjax_sim.reports.peel import pictures as peel_pictures
from fedjax_sim.reports.peel import report as peel_report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_PANELS = 12
"""Settings that the still picture of curves shows; the others are in the chart."""


@dataclasses.dataclass(frozen=True)
class Image:
    """A picture in the page.

    Attributes:
      name: what it is, for those who do not see it too.
      uri: `data:` and its bytes.
      caption: what it shows.
      width: in CSS pixels.
      height: likewise.
    """

    name: str
    uri: str
    caption: str
    width: int
    height: int


@dataclasses.dataclass(frozen=True)
class Gallery:
    """Pictures of one kind.

    Attributes:
      images: what was drawn.
      notes: what was not drawn, and why.
      about: lines of text that belong to them.
    """

    images: tuple[Image, ...] = ()
    notes: tuple[str, ...] = ()
    about: tuple[str, ...] = ()


def image_of(figure: "Figure", name: str, caption: str = "", dpi: int = 130) -> Image:
    """A figure as a PNG of 256 colours, which are enough for lines and for colour maps.

    Args:
      figure: Matplotlib's.
      name: what it is.
      caption: what it shows; "": its own.
      dpi: pixels an inch.
    """
    from PIL import Image as Pillow

    raw = io.BytesIO()
    with (
        warnings.catch_warnings()
    ):  # names may be longer than a figure has room for, and stand on the page too
        warnings.simplefilter("ignore", UserWarning)
        figure.savefig(raw, format="png", dpi=dpi)
    with Pillow.open(raw) as picture:
        return _held(picture.convert("RGB"), name, caption or _caption_of(figure), dpi / 96)


def _caption_of(figure: "Figure") -> str:
    """What a figure shows; of which runs the page says already."""
    return plots.caption_of(figure).partition(" Runs: ")[0]


def image_of_file(path: Path, name: str, caption: str) -> Image:
    """A PNG that lies on disk.

    Raises:
      UserError: it cannot be read.
    """
    from PIL import Image as Pillow

    try:
        with Pillow.open(path) as picture:
            return _held(picture.convert("RGB"), name, caption, 1.25)
    except OSError as error:
        raise UserError("figure", str(path), f"it cannot be read: {error}", "Remove that file.") from None


def _held(picture: Any, name: str, caption: str, density: float) -> Image:
    small = io.BytesIO()
    picture.quantize(256).save(small, format="png", optimize=True)
    uri = "data:image/png;base64," + base64.b64encode(small.getvalue()).decode()
    return Image(name, uri, caption, round(picture.width / density), round(picture.height / density))


def still_curves(found: Curves, metric: str, title: str) -> Image | None:
    """The headline's curves as they are printed, and shown where scripts are off; None without any."""
    panels: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    for (name, row, column), curve in found.curves.items():
        if name == metric and np.isfinite(curve.mean).any():
            panels.setdefault(column, {})[brief(row, found.rows)] = (
                curve.rounds,
                _band(curve.mean, curve.deviation),
            )
    if not panels:
        return None
    shown = dict(list(panels.items())[:MOST_PANELS])
    figure = plots.compared_curves(shown, metric, title)
    about = "mean over seeds, with a band of one standard deviation where there are several"
    left = f" The first {MOST_PANELS} of {len(panels)} settings." if len(panels) > len(shown) else ""
    return image_of(figure, f"curves of {metric}", f"{plots.label_of(metric)} over rounds: {about}.{left}")


def brief(name: str, names: Sequence[str], most: int = 36) -> str:
    """A name that a figure has room for; of a long one the beginning, and its place among `names`."""
    if len(name) <= most:
        return name
    return f"{name[: most - 6].rstrip(' ,')} … ({list(names).index(name) + 1})"


def _band(mean: np.ndarray, deviation: np.ndarray | None) -> np.ndarray:
    """f64[S, T]: stand-ins for seeds that have this mean and this deviation."""
    if deviation is None:
        return mean[None]
    half = np.where(np.isfinite(deviation), deviation, np.nan) / np.sqrt(2)
    return np.stack([np.where(np.isfinite(half), mean - half, mean), mean + half])


# --- diagnostics ----------------------------------------------------------------------------------------


def _grouped(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.seen:
            name = ", ".join(part for part in (entry.row, entry.column) if part)
            groups.setdefault(name, []).append(entry)
    return {brief(name, list(groups), 48): own for name, own in groups.items()}


def layer_peeled(entries: Sequence[Entry]) -> Gallery | None:
    """Figures of the layer-peeled probe; None where nothing was probed.

    Groups of one model share figures, if they are few enough to be told apart in one. Of more than one group
    there is the overview too, and of too many the overview alone.
    """
    found: list[peel_groups.Group] = []
    for name, own in _grouped(entries).items():
        pairs = []
        for entry in own:
            if entry.run is not None:
                with contextlib.suppress(UserError):  # it was not probed, or not yet
                    pairs.append((entry.run, analysis.measurements(entry.run.metrics, entry.config.seed)))
        if pairs:
            measured = analysis.pooled([one for _, one in pairs])
            found.append(peel_groups.Group(name, tuple(run for run, _ in pairs), measured))
    if not found:
        return None
    figures: dict[str, Callable[[], Figure]] = {}
    notes = []
    if len(found) > 1:
        figures["overview"] = partial(_overview, found)
    for family in peel_groups.families(found):
        if len(family) > peel_report.MOST:
            notes.append(
                f"{len(family)} groups are too many for shared figures: the overview stands for them. "
                "`fedjax-sim peel` draws those of each."
            )
            continue
        head = f"{family[0].name}: " if len(found) > len(family) else ""
        for name, make in peel_pictures.PICTURES.items():
            figures[head + name.replace("_", " ")] = partial(make, family)
    return _drawn(figures, notes, _verdicts(found))


def _overview(found: Sequence[peel_groups.Group]) -> "Figure":
    about = (
        "In each group's newest measured round: what the merge takes and what it changes at the classifier's "
        "input, means over clients and seeds with 95% bootstrap intervals, and the slope of that over depth."
    )
    return plots.captioned(overview.picture([overview.outline(group) for group in found]), about)


def _verdicts(found: Sequence[peel_groups.Group]) -> list[str]:
    """In words, whether degradation accumulates with depth, of each group."""
    told = []
    for group in found:
        number = group.measured.numbers()[-1]
        try:
            one = analysis.degradation(
                *(run.metrics for run in group.runs), round_index=number, after="after"
            )
        except UserError as error:
            told.append(f"{group.name}, round {number}: no verdict: {error.why}. {error.fix}")
        else:
            told.append(f"{group.name}, round {number}: {one.words()}")
    return told


def layers_movement(entries: Sequence[Entry]) -> Gallery | None:
    """Figures of layer-wise inertia and of what merges gain; None where nothing was measured."""
    found = [
        inertia_pictures.Group(name, tuple(entry.run for entry in own if entry.run is not None))
        for name, own in _grouped(entries).items()
    ]
    found = [group for group in found if _moved(group)]
    if not found:
        return None
    if len(found) > peel_report.MOST:
        left = len(found) - peel_report.MOST
        note = f"The first {peel_report.MOST} groups; {left} more are drawn by `fedjax-sim inertia`."
        found, notes = found[: peel_report.MOST], [note]
    else:
        notes = []
    figures = {
        name.replace("_", " "): partial(make, found, "inertia_step")
        for name, make in inertia_pictures.PICTURES.items()
        if name != "accuracy"  # which is the page's chart
    }
    return _drawn(figures, notes, [])


def _moved(group: inertia_pictures.Group) -> bool:
    names = {name for run in group.runs for name in run.metrics.names()}
    return bool(group.layers) or any(name.startswith(("effectiveness_", "lips_")) for name in names)


def _drawn(figures: Mapping[str, Callable[[], "Figure"]], notes: list[str], about: list[str]) -> Gallery:
    images = []
    for name, make in figures.items():
        try:
            images.append(image_of(make(), name, dpi=110))
        except UserError as error:  # what it would show was not recorded
            notes.append(f"{name} was not drawn: {error.why}. {error.fix}")
    return Gallery(tuple(images), tuple(notes), tuple(about))
