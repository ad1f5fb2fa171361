"""What all reports of finished runs share: which runs, where to write, figures with captions, tables."""

import contextlib
import csv
import dataclasses
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

import numpy as np

from fedjax_sim import algorithms, runs
from fedjax_sim import config as config_lib
from fedjax_sim.config import sweep_files
from fedjax_sim.core import paths
from fedjax_sim.core.errors import UserError
from fedjax_sim.runs import Run
from fedjax_sim.runs.folder import Folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# --- which runs ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Runs that differ in their seed only, S of them.

    Attributes:
      name: what sets the group apart from the others; the method, if it is alone.
      runs: one of each seed.
    """

    name: str
    runs: tuple[Run, ...]

    @property
    def title(self) -> str:
        """One line: method, data, partition, seeds."""
        seeds = ", ".join(str(run.config.seed) for run in self.runs)
        return f"{self.runs[0].title.rsplit(', seed', 1)[0]}, seed{'s' * (len(self.runs) > 1)} {seeds}"

    def listed(self, about: str = "", each: Sequence[str] = ()) -> list[str]:
        """Lines of a report: the group, `about` it, its runs and where they are, and a word on `each`."""
        lines = [f"- **{self.name}**: {self.title}{about}"]
        for run, word in zip(self.runs, each or [""] * len(self.runs), strict=True):
            where = runs.portable(run.config).output.dir
            lines.append(f"  - seed {run.config.seed}: {f'`{where}`' if where else 'in memory'}{word}")
        return lines


One = Run | str | Path | Group
Given = One | Sequence[One]
"""A run, the folder of one, the YAML file of a sweep (its finished runs), a group; or several."""
G = TypeVar("G", bound=Group)


@overload
def groups(given: Given) -> list[Group]: ...
@overload
def groups(given: Given, make: Callable[[str, tuple[Run, ...]], G]) -> list[G]: ...
def groups(given: Given, make: Callable[[str, tuple[Run, ...]], Any] = Group) -> list[Any]:
    """Runs as groups of what differs in nothing but the seed; a sweep's by method and setting, and one of
    several by its file's name too.

    Args:
      given: what to look at.
      make: the kind of group, of a name and runs. Groups in `given` are of this kind already.

    Raises:
      UserError: a folder holds no run, a run is not finished, two runs are the same, or there are none.
    """
    things = [given] if isinstance(given, Run | str | Path | Group) else list(given)
    stems = [Path(thing).stem for thing in things if isinstance(thing, str | Path)]
    named: dict[str, list[Run]] = {}
    loose: dict[tuple, list[Run]] = {}
    for thing in things:
        if isinstance(thing, str | Path) and Path(thing).suffix == ".yaml":
            for name, run in _of_sweep(thing):
                if len(things) > 1:
                    stem = Path(thing).stem
                    name = f"{stem if stems.count(stem) == 1 else Path(thing).with_suffix('')}: {name}"
                named.setdefault(name, []).append(run)
        elif not isinstance(thing, Group):
            run = thing if isinstance(thing, Run) else runs.load(thing)
            if not run.finished:
                why = f"the run has {run.rounds} of its {run.config.rounds} rounds"
                raise UserError("folder", where(run), why, f"Finish it: fedjax-sim resume {where(run)}.")
            loose.setdefault(tuple(settings_of(run).items()), []).append(run)
    names = names_of([dict(key) for key in loose])
    found: list[Any] = [thing for thing in things if isinstance(thing, Group)]
    for name, several in [*named.items(), *zip(names, loose.values(), strict=True)]:
        seeds = [run.config.seed for run in several]
        for seed, run in zip(seeds, several, strict=True):
            if seeds.count(seed) > 1:
                why = f"another of these runs has the same settings and the same seed, {seed}"
                raise UserError("folder", where(run), why, "Give each run once.")
        found.append(make(name, tuple(several)))
    if not found:
        raise UserError("folders", "", "there is no run to look at", "Give the output.dir of a run.")
    return found


def _of_sweep(path: str | Path) -> list[tuple[str, Run]]:
    """The finished runs of a sweep's file, by method and setting, named as in its table."""
    jobs = [(job, job.config.output.dir) for job in sweep_files.read_sweep(path).jobs]
    done = [(job, folder) for job, folder in jobs if folder is not None and Folder(folder).finished]
    if not done:
        fix = f"Run it first: fedjax-sim sweep {path}."
        raise UserError("folders", str(path), "none of its runs is finished", fix)
    return [
        (", ".join(part for part in (job.method, job.column) if part), runs.load(folder))
        for job, folder in done
    ]


def where(run: Run) -> str:
    """Its folder, for a message."""
    return str(run.folder or "in memory")


def settings_of(run: Run) -> dict[str, str]:
    """What makes a run what it is, its seed aside, by dotted field."""
    name = run.config.given.get("algorithm", algorithms.label(run.config.algorithm))
    aside = ("seed", "execution.", "output.", "algorithm.name", "given.algorithm", "data.data_dir")
    told = {
        key: str(value) for key, value in config_lib.flat(run.config).items() if not key.startswith(aside)
    }
    return {"algorithm": name, **told}


def names_of(settings: list[dict[str, str]]) -> list[str]:
    """The method, and in which fields it differs from groups of the same method, or from all."""
    keys = dict.fromkeys(key for one in settings for key in one)
    names = []
    for one in settings:
        told = [one["algorithm"]]
        for key in keys:
            # A method's own fields tell it only from itself.
            rivals = [
                other
                for other in settings
                if not key.startswith("algorithm") or other["algorithm"] == one["algorithm"]
            ]
            if key != "algorithm" and len({other.get(key) for other in rivals}) > 1:
                told.append(f"{key.removeprefix('algorithm.')} {one.get(key, 'default')}")
        names.append(", ".join(told))
    return names


AGAIN = "give the same command again"
"""What to do once a report can be written."""


# --- where to write -----------------------------------------------------------------------------------


def home_of(given: Given, found: Sequence[Group], name: str, alone: str) -> Path:
    """Where a report goes by default.

    It is `name` in a sweep's folder or beside the first of several runs, `alone` in the folder of a single
    one.

    Args:
      given: what the report is of.
      found: the groups of it; the first has a run.
      name: of the folder for a sweep or for several runs.
      alone: of the folder for a single run.

    Raises:
      UserError: the first run is in memory.
    """
    if isinstance(given, str | Path) and Path(given).suffix == ".yaml":
        return sweep_files.read_sweep(given).out / name
    first = found[0].runs[0].folder
    if first is None:
        raise UserError("out", None, "the run is in memory and has no folder", "Say where: out=….")
    single = len(found) == 1 and len(found[0].runs) == 1
    return first / alone if single else first.parent / name


@contextlib.contextmanager
def drawing(path: str | Path) -> Iterator[Folder]:
    """A folder to draw into, held for this process: of two at once, files of both would be left.

    Raises:
      UserError: it cannot be written, or another process draws into it.
    """
    home = writable(path)
    with home.drawn_into():
        yield home


def writable(path: str | Path) -> Folder:
    """A folder that can be written to.

    Raises:
      UserError: it cannot.
    """
    path = paths.local(path, "out").absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / ".writable").touch()
        (path / ".writable").unlink()
    except OSError as error:
        why = f"it cannot be written: {error.strerror or error}"
        raise UserError("out", str(path), why, "Choose another folder (--out).") from None
    return Folder(path)


def write(home: Folder, contents: Mapping[str, str], tell: Callable[[str], None]) -> list[Path]:
    """Writes files by name."""
    for name, content in contents.items():
        with home.writing("out", AGAIN):
            home.write(name, content)
        tell(f"wrote {home.path / name}")
    return [home.path / name for name in contents]


# --- figures ------------------------------------------------------------------------------------------


class Missing(UserError):
    """What a figure would show was not recorded, or is not defined."""


@dataclasses.dataclass(frozen=True)
class Figures:
    """What came of drawing.

    Attributes:
      paths: the files written.
      shown: figure -> caption.
      missing: figure -> why it was not drawn.
    """

    paths: list[Path] = dataclasses.field(default_factory=list)
    shown: dict[str, str] = dataclasses.field(default_factory=dict)
    missing: dict[str, str] = dataclasses.field(default_factory=dict)

    def section(self) -> list[str]:
        """Lines of a report: the figures with their captions."""
        lines = ["## Figures", ""]
        for name, caption in self.shown.items():
            lines += [f"![{name}]({name}.png)", "", f"*{name}.* {caption}", ""]
        return lines + [f"- {name} was not drawn: {why}" for name, why in self.missing.items()]


def draw(home: Folder, figures: Mapping[str, Callable[[], "Figure"]], tell: Callable[[str], None]) -> Figures:
    """Draws figures by name, as PNG and PDF; of one that raises `Missing`, older files are removed."""
    from fedjax_sim.records import plots  # Matplotlib loads when something is drawn

    out = Figures()
    for name, make in figures.items():
        paths = [home.path / f"{name}.{suffix}" for suffix in ("png", "pdf")]
        try:
            figure = make()
        except Missing as error:
            out.missing[name] = " ".join(f"{error.value}: {error.why}. {error.fix}".split())
            for path in paths:
                path.unlink(missing_ok=True)
            tell(f"{name}: not drawn: {out.missing[name]}")
            continue
        out.shown[name] = plots.caption_of(figure)
        for path in paths:
            with home.writing("out", AGAIN):
                plots.save(figure, path)
            out.paths.append(path)
            tell(f"wrote {path}")
    return out


def captioned(figure: "Figure", about: str, found: Sequence[Group]) -> "Figure":
    """Gives a figure its caption: what it shows, and of which runs."""
    from fedjax_sim.records import plots

    titles = "; ".join(dict.fromkeys(group.title for group in found))
    return plots.captioned(figure, f"{about} Runs: {titles}.")


# --- tables -------------------------------------------------------------------------------------------


def spread(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """f64[S, …] -> mean and standard deviation over the first axis, f64[…], of what is not NaN.

    The mean of nothing is NaN, the deviation of fewer than two 0.
    """
    known = np.isfinite(values)
    count = known.sum(0)
    mean = np.full(count.shape, np.nan)
    np.divide(np.where(known, values, 0).sum(0), count, out=mean, where=count > 0)
    squares = (np.where(known, values - mean[None], 0) ** 2).sum(0)
    return mean, np.sqrt(squares / np.maximum(count - 1, 1))


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, and an empty one; none without rows."""
    if not rows:
        return []
    lines = [heads, ["---"] * len(heads), *rows]
    return [*("| " + " | ".join(line) + " |" for line in lines), ""]


def comma_separated(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table as CSV; None is an empty cell."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([heads, *rows])
    return out.getvalue()
