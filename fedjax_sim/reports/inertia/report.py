"""What was recorded of layers' movement and of merges, written down: figures, a table and a report.

from fedjax_sim.reports.inertia import report

report.draw("runs/a")                     # figures/inertia in the run's folder
report.draw(["runs/a", "runs/b"], "out")  # seeds pooled, others compared
report.draw("study.yaml")                 # a sweep's finished runs
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from fedjax_sim.core.errors import UserError
from fedjax_sim.core.fields import nearest
from fedjax_sim.probes.inertia.movement import METRICS
from fedjax_sim.reports import shared
from fedjax_sim.reports.inertia.pictures import EFFECTIVENESS, PICTURES, START, Group
from fedjax_sim.reports.shared import Figures, Given, drawing, markdown, spread


def draw(
    given: Given,
    out: str | Path | None = None,
    *,
    metric: str = "inertia_step",
    tell: Callable[[str], None] = lambda line: None,
) -> list[Path]:
    """Draws what was recorded (PNG and PDF), and writes inertia.csv and report.md.

    Args:
      given: a `Run`, a run's folder, a sweep's file, or a sequence of them.
      out: a folder; None: figures/inertia in the folder of a single run, inertia in a single sweep's, else
        inertia beside the first run's.
      metric: what says how far a layer moves; any of `fedjax_sim.probes.inertia.movement` but the cosine.
      tell: is given a line for each file, and for each figure that cannot be drawn.

    Returns:
      The files written.

    Raises:
      UserError: see `fedjax_sim.reports.shared.groups`; no such metric; nothing was recorded; or the folder
        cannot be written, or another process draws into it.
    """
    known = [name for name in METRICS if name != "inertia_cosine"]
    if metric not in known:
        why = "it is drawn beside every other" if metric in METRICS else "no such metric of layers"
        raise UserError("metric", metric, why, nearest(metric, known))
    found = groups(given)
    if not any(map(_measured, found)):
        fix = "Run them with --inertia.measure, and --inertia.every N for aggregation effectiveness."
        where = shared.where(found[0].runs[0])
        raise UserError("folder", where, "nothing was recorded of layers' movement or of merges", fix)
    figures = {name: partial(make, found, metric) for name, make in PICTURES.items()}
    with drawing(shared.home_of(given, found, "inertia", "figures/inertia") if out is None else out) as home:
        drawn = shared.draw(home, figures, tell)
        contents = {"inertia.csv": table(found), "report.md": text(found, metric, drawn)}
        return drawn.paths + shared.write(home, contents, tell)


def groups(given: Given) -> list[Group]:
    """Runs as groups of what differs in nothing but the seed, see `fedjax_sim.reports.shared.groups`."""
    return shared.groups(given, Group)


def table(found: Sequence[Group]) -> str:
    """inertia.csv: a row for each group, seed, layer and metric, of the rounds from `START` on.

    Columns: group, seed, layer, metric, rounds (how many have a value), mean, geometric_mean (empty where a
    value is not positive).
    """
    rows: list[list[object]] = []
    for group in found:
        for metric in METRICS:
            rounds, values = group.values(metric, group.layers)
            for run, late in zip(group.runs, values[:, rounds >= START], strict=True):
                for layer, column in zip(group.layers, late.T, strict=True):
                    have = column[np.isfinite(column)]
                    if len(have):
                        middle = np.exp(np.log(have).mean()) if (have > 0).all() else ""
                        place = [group.name, run.config.seed, layer, metric]
                        rows.append([*place, len(have), have.mean(), middle])
    heads = ["group", "seed", "layer", "metric", "rounds", "mean", "geometric_mean"]
    return shared.comma_separated(heads, rows)


def outline(group: Group, metric: str = "inertia_step") -> dict[str, np.ndarray]:
    """A group in a few numbers, f64[seeds] each; none of what was not recorded.

    `inertia` is `Profile.inertia`; `ends` and `least` are the mean cancellation of the first and the last
    layer, and of the inner layer that moves least in that seed; effectiveness is by `Group.effectiveness`.
    All of the rounds from `START` on.
    """
    profiles = group.profiles(metric)
    out = {"inertia": np.asarray([one.inertia for one in profiles])}
    rounds, values = group.values("inertia_cancellation", group.layers)
    if len(profiles) == len(group.runs) and (rounds >= START).any():
        means = spread(np.moveaxis(values[:, rounds >= START], 1, 0))[0]
        out["ends"] = means[:, [0, -1]].mean(1)
        least = [group.layers.index(one.least) for one in profiles]
        out["least"] = means[np.arange(len(least)), least]
    for name in EFFECTIVENESS:
        out |= {f"{name}_{kind}": part for kind, part in group.effectiveness(name).items()}
    return out


def text(
    found: Sequence[Group],
    metric: str = "inertia_step",
    figures: Figures | None = None,
) -> str:
    """report.md: what was looked at, a table, and the figures with their captions.

    Args:
      found: the groups.
      metric: of the profile.
      figures: what was drawn.
    """
    lines, rows = ["# Layer-wise inertia", ""], []
    for group in found:
        lines += group.listed()
        numbers, votes = outline(group, metric), Counter(one.least for one in group.profiles(metric))
        layer, count = votes.most_common(1)[0] if votes else ("–", 0)
        several = f" ({count} of {votes.total()} seeds)" if len(votes) > 1 else ""
        cells = [_told(numbers.get(key)) for key in _COLUMNS]
        rows.append([group.name, str(len(group.runs)), layer + several, *cells])
    lines += ["", "## In numbers", "", _ABOUT.format(metric=metric, start=START), ""]
    lines += markdown(["group", "seeds", "layer of least", *_COLUMNS.values()], rows)
    lines += (figures or Figures()).section()
    return "\n".join(lines).rstrip() + "\n"


_COLUMNS = {
    "inertia": "inertia",
    "ends": "cancellation, ends",
    "least": "cancellation, least",
    "effectiveness_own_dense": "effectiveness own, dense",
    "effectiveness_own_sparse": "own, sparse",
    "effectiveness_global_dense": "global, dense",
    "effectiveness_global_sparse": "global, sparse",
}
_ABOUT = (
    "All of the rounds from {start} on; mean ± standard deviation over seeds. Movement is `{metric}`; the "
    "layer of least is that inner layer (neither first nor last) whose geometric mean over rounds is "
    "smallest, and inertia is 1 − that mean over the geometric mean of the ends: 0 where the layer moves "
    "as the ends do, near 1 where it hardly moves. Cancellation is ‖mean update‖ / mean ‖update‖: 1 where "
    "clients move alike, 0 where their moves cancel. Effectiveness is accuracy after the merge minus "
    "before; sparse rounds are those after which clients start from a sparse model, which is what is then "
    "tested. A dash: not recorded, or no such round."
)


def _told(values: np.ndarray | None) -> str:
    values = np.empty(0) if values is None else values[np.isfinite(values)]
    if not len(values):
        return "–"
    mean, std = spread(values)
    return f"{mean:.3f}" + (f" ± {std:.3f}" if len(values) > 1 else "")


def _measured(group: Group) -> bool:
    names = {name for run in group.runs for name in run.metrics.names()}
    return bool(group.layers) or any(name.startswith(("effectiveness_", "lips_")) for name in names)
