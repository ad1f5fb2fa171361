"""Everything that a probe recorded, written down: figures, tables and a report, of one run or of a study.

from fedjax_sim.reports.peel import report

report.draw("runs/a")                     # figures/peel in the run's folder
report.draw(["runs/a", "runs/b"], "out")  # seeds pooled, others compared
report.draw("study.yaml")                 # a sweep's finished runs, whatever their models
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from fedjax_sim.core import paths
from fedjax_sim.core.errors import UserError
from fedjax_sim.reports import shared
from fedjax_sim.reports.peel import analysis, cfd, overview, pictures
from fedjax_sim.reports.peel.groups import Given, Group, families, groups
from fedjax_sim.reports.peel.pictures import counted, drop_of, rounded
from fedjax_sim.reports.shared import Figures, drawing, markdown, writable
from fedjax_sim.runs.folder import Folder

MOST = 6
"""Groups that one figure can tell apart; beyond, each has figures of its own."""


def draw(
    given: Given,
    out: str | Path | None = None,
    *,
    round_index: int | None = None,
    accuracy: float | None = None,
    reference: str | None = None,
    figures: bool = True,
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
      reference: of the overview, likewise.
      figures: False: the overview alone.
      tell: is given a line for each file, and for each figure that cannot be drawn.

    Returns:
      The files written.

    Raises:
      UserError: see `groups`; that round was not measured; an overview was asked of one group; or the folder
        cannot be written, or another process draws into it.
    """
    found = families(given)
    every = [group for family in found for group in family]
    wanted = {"only": None if figures else "overview", "reference": reference, "accuracy": accuracy}
    for field, value in wanted.items():
        if len(every) == 1 and value is not None:
            raise UserError(
                field, value, "there is one group of runs, which has no overview", "Give several."
            )
    for group in every:
        group.measured.at(round_index)
    usual = "peel", "figures/peel"
    home = shared.home_of(given, every, *usual) if out is None else paths.local(out, "out")
    parts = [
        part for family in found for part in ([family] if len(family) <= MOST else [[g] for g in family])
    ]
    written = []
    with drawing(home) as folder:
        if len(every) > 1:
            written += overview.write(
                every, folder, round_index=round_index, accuracy=accuracy, reference=reference, tell=tell
            )
        for part in parts if figures else ():
            own = folder if len(parts) == 1 else writable(home / _slug(part))
            written += _draw_one(part, own, round_index, tell)
    return written


def _draw_one(
    found: list[Group], home: Folder, round_index: int | None, tell: Callable[[str], None]
) -> list[Path]:
    """Of groups of one model that share their figures."""
    of_one_round = (pictures.by_layer, pictures.causes, pictures.stitched)
    figures = {
        name: partial(make, found, **({"round_index": round_index} if make in of_one_round else {}))
        for name, make in pictures.PICTURES.items()
    }
    drawn = shared.draw(home, figures, tell)
    contents = {"layers.csv": table(found), "report.md": text(found, round_index, drawn)}
    return drawn.paths + shared.write(home, contents, tell)


def table(given: Given) -> str:
    """layers.csv: `analysis.summary` of every group, which is the first column."""
    rows = [
        {"group": group.name, **row} for group in groups(given) for row in analysis.summary(group.measured)
    ]
    return shared.comma_separated(list(rows[0]), [list(row.values()) for row in rows])


def text(
    given: Given,
    round_index: int | None = None,
    figures: Figures | None = None,
) -> str:
    """report.md: what was looked at, the verdicts in numbers and words, and the figures with their captions.

    Args:
      given: as `draw`'s.
      round_index: of the verdicts; None: the newest.
      figures: what was drawn.
    """
    found = groups(given)
    lines = ["# Layer-peeled analysis", ""]
    for group in found:
        numbers = group.measured.numbers()
        told = ", ".join(map(str, numbers if len(numbers) <= 12 else [*numbers[:5], "…", *numbers[-3:]]))
        lines += group.listed(f"; {len(numbers)} measured rounds ({told}); {counted([group])}.")
        lines += _measured(group, group.measured.at(round_index).numbers()[-1])
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
                    cfd.word_of(one),
                ]
            )
            words.append(f"- {name}: {one.words()}")
        why = analysis.cause(group.measured.at(number))
        if why is not None:
            words.append(f"- {group.name}, by chimeras: {why.words()}")
    heads = ["group", "round", "slope β", "Spearman ρ", "final Δ_L", "area", "measurements", "CFD"]
    lines += [*markdown(heads, rows), *words, "", "## Accuracy lost and features lost", ""]
    rows, points = [], [drop_of(group.measured)[:3] for group in found]
    everything = [("all", np.concatenate(points, 1))] * (len(found) > 1)
    for name, parts in [*zip([group.name for group in found], points, strict=True), *everything]:
        one = cfd.association(*parts)
        numbers = [rounded(value) for value in (one.pearson, one.spearman, one.partial)]
        rows.append([name, *numbers, str(one.measurements)])
    heads = ["group", "Pearson r", "Spearman ρ", "partial r given accuracy before", "measurements"]
    lines += ["Accuracy lost by the merge against the change of log C of the penultimate feature:", ""]
    lines += markdown(heads, rows)
    lines += (figures or Figures()).section()
    return "\n".join(lines).rstrip() + "\n"


FEW = 5
"""Measured samples of a class below which a report warns of what rests on them. OUR CHOICE."""


def _measured(group: Group, number: int) -> list[str]:
    """Lines on how many samples and classes of a client were measured in a round."""
    here = group.measured.at(number)
    names = {
        "peel_samples": "measured samples a client",
        "peel_classes": "classes of these",
        "peel_class_samples": "samples of its smallest class",
    }
    told = [
        f"{called}: median {np.nanmedian(values):g}, least {np.nanmin(values):g}"
        for name, called in names.items()
        if np.isfinite(values := here.scalar(name)).any()
    ]
    if not told:
        return []
    lines = [f"  - round {number}: {'; '.join(told)}"]
    judged = np.isfinite(here.pair("log_c").change).all(1)
    smallest = here.scalar("peel_class_samples")[judged]
    if few := int((smallest < FEW).sum()):
        lines.append(
            f"  - **Caution**: in {few} of the {len(smallest)} measurements behind the verdict the smallest "
            f"class has fewer than {FEW} samples (least {np.nanmin(smallest):g}). Its variance is uncertain, "
            "and log C with it. Raise peel.samples or peel.class_samples, or take clients with more samples."
        )
    return lines


_CFD = (
    "Δ_l is the change of log C by the merge (natural logarithm of within-class over between-class variance "
    "of the input of layer l), averaged over measurements, a client of a seed each. β is its least-squares "
    "slope over relative depth l/L with a 95% bootstrap interval over measurements, ρ its rank correlation "
    "with depth, Δ_L its value at the classifier's input, the area its mean over layers. CFD is present if "
    "Δ_L > 0 and the interval of β lies above 0; a single measurement leaves it undecided. Clients of one "
    "run share its merges: with few seeds the interval says little of other seeds, and of fewer than ten "
    "measurements it is too narrow."
)


def _slug(part: Sequence[Group]) -> str:
    """A folder's name for some groups: the first's, and how many more there are."""
    names = [group.name for group in part]
    name = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
    return re.sub(r"[^A-Za-z0-9.=%-]+", "_", name).strip("_")
