"""A page as HTML: what it says, by section, and the one file that is made of it."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

from fedjax_sim.core.versions import installed
from fedjax_sim.reports.page.entries import Kind
from fedjax_sim.reports.page.facts import Line, Setting
from fedjax_sim.reports.page.pictures import Gallery, Image

HOME = Path(__file__).parent / "template"
"""The template, its style and its script, and uPlot as its authors publish it."""
UPLOT = "1.6.32"
"""Version of the files uPlot.iife.min.js and uPlot.min.css."""


@dataclasses.dataclass(frozen=True)
class Tile:
    """A number at the top of a page."""

    name: str
    value: str


@dataclasses.dataclass(frozen=True)
class Cell:
    """A cell of a table of methods and settings, as text.

    Attributes:
      value: mean ± deviation.
      best: whether it is the best of its column.
      difference: to the reference, with its interval; "" for none.
      side: `better` or `worse` if the interval leaves 0 out, else "".
    """

    value: str
    best: bool = False
    difference: str = ""
    side: str = ""


@dataclasses.dataclass(frozen=True)
class GridRow:
    """A row of such a table."""

    name: str
    cells: tuple[Cell, ...]


@dataclasses.dataclass(frozen=True)
class Grid:
    """Such a table."""

    caption: str
    heads: tuple[str, ...]
    rows: tuple[GridRow, ...]


@dataclasses.dataclass(frozen=True)
class RunLine:
    """A run in the list of a page's runs, as text.

    Attributes:
      name: row, column and seed.
      link: its folder, as seen from the page; "" for none.
      state: see `Kind`.
      round: how far it is.
      value: of the headline metric.
      wall: time of its rounds.
    """

    name: str
    link: str
    state: Kind
    round: str
    value: str
    wall: str


@dataclasses.dataclass(frozen=True)
class Step:
    """What to do to repeat it: words, and a command or code if there is one."""

    words: str
    code: str = ""


@dataclasses.dataclass(frozen=True)
class Page:
    """Everything that a page says. What is empty has no section.

    Attributes:
      kind: what it is of: `Run`, `Sweep`, `Runs`.
      title: what ran.
      about: on what.
      state: of all together.
      words: the same for a reader.
      share: of all rounds, which are done; None shows no bar.
      metric: the headline's name.
      written: when, in words.
      refresh: seconds after which the page is read again; None: it is not.
      tiles: numbers at the top.
      failures: of runs, in a line each.
      cautions: what else a reader must know.
      chart: what the script draws, plain JSON.
      chart_notes: what was left out of it.
      still: the picture for print, and for readers without scripts.
      grids: tables of methods and settings.
      grid_notes: about them.
      numbers: rows of all metrics, where there is one group only.
      runs: the runs, if there are several.
      runs_words: above them.
      holdings: rows of partitions.
      holding_images: their pictures.
      holding_notes: about them.
      peel: layer-peeled analysis.
      inertia: how far layers move.
      traffic: rows of bytes.
      costs: rows of time.
      places: where it ran.
      settings: the configuration.
      settings_words: whose it is.
      sweep_text: the file of the sweep.
      repeat: how to do it again.
    """

    kind: str
    title: str
    about: str
    state: Kind
    words: str
    written: str
    metric: str = ""
    share: float | None = None
    refresh: int | None = None
    tiles: tuple[Tile, ...] = ()
    failures: tuple[str, ...] = ()
    cautions: tuple[str, ...] = ()
    chart: dict[str, Any] | None = None
    chart_notes: tuple[str, ...] = ()
    still: Image | None = None
    grids: tuple[Grid, ...] = ()
    grid_notes: tuple[str, ...] = ()
    numbers: tuple[tuple[str, ...], ...] = ()
    runs: tuple[RunLine, ...] = ()
    runs_words: str = ""
    holdings: tuple[tuple[str, ...], ...] = ()
    holding_images: tuple[Image, ...] = ()
    holding_notes: tuple[str, ...] = ()
    peel: Gallery | None = None
    inertia: Gallery | None = None
    traffic: tuple[tuple[str, ...], ...] = ()
    costs: tuple[tuple[str, ...], ...] = ()
    places: tuple[Line, ...] = ()
    settings: tuple[Setting, ...] = ()
    settings_words: str = ""
    sweep_text: str = ""
    repeat: tuple[Step, ...] = ()

    @property
    def sections(self) -> list[tuple[str, str]]:
        """(id, name) of those that the page has, in order."""
        there = {
            ("warnings", "Warnings"): self.failures or self.cautions,
            ("curves", "Curves"): self.chart,
            ("table", "Table"): self.grids,
            ("numbers", "Numbers"): self.numbers,
            ("runs", "Runs"): self.runs,
            ("partition", "Partition"): self.holdings,
            ("layers", "Layers"): self.peel,
            ("inertia", "Inertia"): self.inertia,
            ("bytes", "Bytes"): self.traffic,
            ("time", "Time"): self.costs,
            ("configuration", "Configuration"): self.settings or self.sweep_text,
            ("repeat", "Repeat"): self.repeat,
        }
        return [name for name, held in there.items() if held]


def html(page: Page) -> str:
    """The page as one file that fetches nothing: style, script, pictures and numbers are inside."""
    return _template().render(page=page, version=installed("fedjax-sim"), uplot=UPLOT)


@functools.cache
def _template() -> Any:
    import jinja2  # it loads when a page is made
    from markupsafe import Markup

    loader = jinja2.FileSystemLoader(HOME)
    made = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    own = {name: Markup((HOME / name).read_text()) for name in _OWN}
    style = own["uPlot.min.css"] + Markup("\n") + own["page.css"]
    script = {"css": style, "library": own["uPlot.iife.min.js"], "script": own["page.js"]}
    made.globals.update(script)
    return made.get_template("page.html")


_OWN = ("uPlot.min.css", "page.css", "uPlot.iife.min.js", "page.js")
