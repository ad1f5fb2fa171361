"""Everything that a probe recorded, written down: figures, tables and a report, of one run or of a study.

from fedjax_sim.peel import report

report.draw("runs/a")                     # figures/peel in the run's folder
report.draw(["runs/a", "runs/b"], "out")  # seeds pooled, others compared
report.draw("study.yaml")                 # a sweep's finished runs, whatever their models
"""

import csv
import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from fedjax_sim import plots, runs, sweep_files
from fedjax_sim.errors import UserError
from fedjax_sim.folders import Folder
from fedjax_sim.peel import analysis, cfd, overview, pictures
from fedjax_sim.peel.groups import Given, Group, families, groups
from fedjax_sim.peel.pictures import Missing, caption_of, counted, drop_of, rounded

MOST = 6
"""Groups that one figure can tell apart; beyond, each has figures of its own."""


def draw(
    given: Given,
    out: str | Path | None = None,
    *,
    round_index: int | None = None,
    accuracy: float | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> list[Path]:
    """Draws what was recorded (PNG and PDF), and writes layers.csv and report.md; of several groups, also
    the overview. Groups of different models, or more than `MOST`, have folders of their own.

    Args:
      given: a `Run`, a run's folder, a sweep's file, or a sequence of them.
      out: a folder; None: figures/peel in the folder of a single run, peel in a single sweep's, else peel
        beside the first run's.
      round_index: of the figures, verdicts and overview; None: the newest.
      accuracy: of the overview, see `overview.write`.
      tell: is given a line for each file, and for each figure that cannot be drawn.

    Returns:
      The files written.

    Raises:
      UserError: see `groups`; that round was not measured; or the folder cannot be written.
    """
    found = families(given)
    every = [group for family in found for group in family]
    for group in every:
        group.measured.at(round_index)
    home = Folder(_home(given, every) if out is None else out).path
    written = []
    if len(every) > 1:
        written += overview.write(
            every, writable(home), round_index=round_index, accuracy=accuracy, tell=tell
        )
    parts = [
        part for family in found for part in ([family] if len(family) <= MOST else [[g] for g in family])
    ]
    for part in parts:
        folder = home if len(parts) == 1 else home / _slug(part)
        written += _draw_one(part, writable(folder), round_index, tell)
    return written


def _draw_one(
    found: list[Group], home: Folder, round_index: int | None, tell: Callable[[str], None]
) -> list[Path]:
    """Of groups of one model that share their figures."""
    written, shown, missing = [], {}, {}
    for name, make in pictures.PICTURES.items():
        paths = [home.path / f"{name}.{suffix}" for suffix in ("png", "pdf")]
        of_one_round = make in (pictures.by_layer, pictures.causes, pictures.stitched)
        more = {"round_index": round_index} if of_one_round else {}
        try:
            figure = make(found, **more)
        except Missing as error:
            missing[name] = " ".join(str(error).split())
            for path in paths:  # of an earlier draw into the same folder
                path.unlink(missing_ok=True)
            tell(f"{name}: not drawn: {missing[name]}")
            continue
        shown[name] = caption_of(figure)
        for path in paths:
            plots.save(figure, path)
            written.append(path)
            tell(f"wrote {path}")
    for name, content in (
        ("layers.csv", table(found)),
        ("report.md", text(found, round_index, shown, missing)),
    ):
        home.write(name, content)
        written.append(home.path / name)
        tell(f"wrote {home.path / name}")
    return written


def table(given: Given) -> str:
    """layers.csv: `analysis.summary` of every group, which is the first column."""
    rows = [
        {"group": group.name, **row} for group in groups(given) for row in analysis.summary(group.measured)
    ]
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def text(
    given: Given,
    round_index: int | None = None,
    shown: Mapping[str, str] | None = None,
    missing: Mapping[str, str] | None = None,
) -> str:
    """report.md: what was looked at, the verdicts in numbers and words, and the figures with their captions.

    Args:
      given: as `draw`'s.
      round_index: of the verdicts; None: the newest.
      shown: figure -> caption.
      missing: figure -> why it was not drawn.
    """
    found = groups(given)
    lines = ["# Layer-peeled analysis", ""]
    for group in found:
        numbers = group.measured.numbers()
        told = ", ".join(map(str, numbers if len(numbers) <= 12 else [*numbers[:5], "…", *numbers[-3:]]))
        lines.append(
            f"- **{group.name}**: {group.title}; {len(numbers)} measured rounds ({told}); {counted([group])}."
        )
        for run in group.runs:
            where = runs.portable(run.config).output.dir
            lines.append(f"  - seed {run.config.seed}: {f'`{where}`' if where else 'in memory'}")
    lines += ["", "## Does degradation accumulate with depth?", "", _CFD, ""]
    rows, words = [], []
    for group in found:
        number = group.measured.at(round_index).numbers()[-1]
        tables = [run.metrics for run in group.runs]
        for state in group.measured.states("log_c")[1:]:
            name = group.name if state == "after" else f"{group.name}, {state}"
            try:
                one = analysis.degradation(*tables, round_index=number, after=state)
            except UserError as error:
                words.append(f"- {name}: no verdict: {' '.join(str(error).split())}")
                continue
            interval = f"[{rounded(one.low)}, {rounded(one.high)}]"
            cells = (
                name,
                number,
                f"{rounded(one.slope)} {interval}",
                rounded(one.rank),
                rounded(one.final),
            )
            rows.append(
                [
                    *map(str, cells),
                    rounded(one.area),
                    str(one.measurements),
                    "yes" if one.present else "no",
                ]
            )
            words.append(f"- {name}: {one.words()}")
        why = analysis.cause(group.measured.at(number))
        if why is not None:
            words.append(f"- {group.name}, by chimeras: {why.words()}")
    heads = ["group", "round", "slope β", "Spearman ρ", "final Δ_L", "area", "measurements", "CFD"]
    lines += [*overview.markdown(heads, rows), *words, "", "## Accuracy lost and features lost", ""]
    rows, points = [], [drop_of(group.measured)[:3] for group in found]
    everything = [("all", np.concatenate(points, 1))] * (len(found) > 1)
    for name, parts in [*zip([group.name for group in found], points, strict=True), *everything]:
        one = cfd.association(*parts)
        numbers = [rounded(value) for value in (one.pearson, one.spearman, one.partial)]
        rows.append([name, *numbers, str(one.measurements)])
    heads = ["group", "Pearson r", "Spearman ρ", "partial r given accuracy before", "measurements"]
    lines += ["Accuracy lost by the merge against the change of log C of the penultimate feature:", ""]
    lines += overview.markdown(heads, rows)
    lines += ["## Figures", ""]
    for name, caption in (shown or {}).items():
        lines += [f"![{name}]({name}.png)", "", f"*{name}.* {caption}", ""]
    lines += [f"- {name} was not drawn: {why}" for name, why in (missing or {}).items()]
    return "\n".join(lines).rstrip() + "\n"


_CFD = (
    "Δ_l is the change of log C by the merge (natural logarithm of within-class over between-class variance "
    "of the input of layer l), averaged over measurements, a client of a seed each. β is its least-squares "
    "slope over relative depth l/L with a 95% bootstrap interval over measurements, ρ its rank correlation "
    "with depth, Δ_L its value at the classifier's input, the area its mean over layers. CFD is present if "
    "Δ_L > 0 and the interval of β lies above 0. Clients of one run share its merges: with few seeds the "
    "interval says little of other seeds, and of fewer than ten measurements it is too narrow."
)


# --- where ----------------------------------------------------------------------------------------------


def writable(path: Path) -> Folder:
    """A folder that can be written to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / ".writable").touch()
        (path / ".writable").unlink()
    except OSError as error:
        why = f"it cannot be written: {error.strerror or error}"
        raise UserError("out", str(path), why, "Choose another folder (--out).") from None
    return Folder(path)


def _home(given: Given, found: Sequence[Group]) -> Path:
    if isinstance(given, str | Path) and Path(given).suffix == ".yaml":
        return sweep_files.load(given).out / "peel"
    first = found[0].runs[0].folder
    if first is None:
        raise UserError("out", None, "the run is in memory and has no folder", "Say where: out=….")
    alone = len(found) == 1 and len(found[0].runs) == 1
    return first / "figures" / "peel" if alone else first.parent / "peel"


def _slug(part: Sequence[Group]) -> str:
    """A folder's name for some groups: the first's, and how many more there are."""
    names = [group.name for group in part]
    name = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
    return re.sub(r"[^A-Za-z0-9.=%-]+", "_", name).strip("_")
