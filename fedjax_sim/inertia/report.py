"""What was recorded of layers' movement and of merges, written down: figures, a table and a report.

from fedjax_sim.inertia import report

report.draw("runs/a")                     # figures/inertia in the run's folder
report.draw(["runs/a", "runs/b"], "out")  # seeds pooled, others compared
report.draw("study.yaml")                 # a sweep's finished runs
"""

import csv
import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from fedjax_sim import plots, runs, sweep_files
from fedjax_sim.errors import UserError
from fedjax_sim.fields import nearest
from fedjax_sim.folders import Folder
from fedjax_sim.inertia import pictures
from fedjax_sim.inertia.movement import METRICS
from fedjax_sim.inertia.pictures import EFFECTIVENESS, START, Group, spread
from fedjax_sim.peel.groups import names_of, settings_of
from fedjax_sim.peel.overview import markdown
from fedjax_sim.peel.pictures import Missing, caption_of
from fedjax_sim.peel.report import writable
from fedjax_sim.runs import Run

Given = Run | str | Path | Sequence[Run | str | Path]
"""A run, the folder of one, the YAML file of a sweep (its finished runs); or several."""


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
      metric: what says how far a layer moves; any of `fedjax_sim.inertia.movement` but the cosine.
      tell: is given a line for each file, and for each figure that cannot be drawn.

    Returns:
      The files written.

    Raises:
      UserError: see `groups`; no such metric; nothing was recorded; or the folder cannot be written.
    """
    known = [name for name in METRICS if name != "inertia_cosine"]
    if metric not in known:
        why = "it is drawn beside every other" if metric in METRICS else "no such metric of layers"
        raise UserError("metric", metric, why, nearest(metric, known))
    found = groups(given)
    if not any(map(_measured, found)):
        fix = "Run them with --inertia.measure, and --inertia.every N for aggregation effectiveness."
        where = str(found[0].runs[0].folder or "in memory")
        raise UserError("folder", where, "nothing was recorded of layers' movement or of merges", fix)
    home = writable(Folder(_home(given, found) if out is None else out).path)
    written, shown, missing = [], {}, {}
    for name, make in pictures.PICTURES.items():
        paths = [home.path / f"{name}.{suffix}" for suffix in ("png", "pdf")]
        try:
            figure = make(found, metric)
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
    for name, content in (("inertia.csv", table(found)), ("report.md", text(found, metric, shown, missing))):
        home.write(name, content)
        written.append(home.path / name)
    for path in written:
        tell(f"wrote {path}")
    return written


def groups(given: Given) -> list[Group]:
    """Runs as groups of what differs in nothing but the seed; a sweep's by method and setting.

    Raises:
      UserError: a folder holds no run, a run is not finished, two runs are the same, or there are none.
    """
    things = [given] if isinstance(given, Run | str | Path) else list(given)
    named: dict[str, list[Run]] = {}
    loose: dict[tuple, list[Run]] = {}
    for thing in things:
        if isinstance(thing, str | Path) and Path(thing).suffix == ".yaml":
            for name, run in _of_sweep(thing):
                name = name if len(things) == 1 else f"{Path(thing).with_suffix('')}: {name}"
                named.setdefault(name, []).append(run)
            continue
        run = thing if isinstance(thing, Run) else runs.load(thing)
        if not run.finished:
            why = f"the run has {run.rounds} of its {run.config.rounds} rounds"
            raise UserError("folder", str(run.folder), why, f"Finish it: fedjax-sim resume {run.folder}.")
        loose.setdefault(tuple(settings_of(run).items()), []).append(run)
    names = names_of([dict(key) for key in loose])
    found = [
        Group(name, tuple(made)) for name, made in [*named.items(), *zip(names, loose.values(), strict=True)]
    ]
    if not found:
        raise UserError("folders", "", "there is no run to look at", "Give the output.dir of a run.")
    for group in found:
        seed, times = Counter(run.config.seed for run in group.runs).most_common(1)[0]
        if times > 1:
            why = f"{times} runs have these settings and the same seed, {seed}"
            raise UserError("folders", group.name, why, "Give each run once.")
    return found


def _of_sweep(path: str | Path) -> list[tuple[str, Run]]:
    """The finished runs of a sweep's file, by method and setting."""
    jobs = [(job, job.config.output.dir) for job in sweep_files.load(path).jobs]
    done = [(job, where) for job, where in jobs if where is not None and Folder(where).finished]
    if not done:
        fix = f"Run it first: fedjax-sim sweep {path}."
        raise UserError("folders", str(path), "none of its runs is finished", fix)
    return [
        (", ".join(part for part in (job.method, job.column) if part), runs.load(where))
        for job, where in done
    ]


def table(found: Sequence[Group]) -> str:
    """inertia.csv: a row for each group, seed, layer and metric, of the rounds from `START` on.

    Columns: group, seed, layer, metric, rounds (how many have a value), mean, geometric_mean (empty where a
    value is not positive).
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["group", "seed", "layer", "metric", "rounds", "mean", "geometric_mean"])
    for group in found:
        for metric in METRICS:
            rounds, values = group.values(metric, group.layers)
            for run, late in zip(group.runs, values[:, rounds >= START], strict=True):
                for layer, column in zip(group.layers, late.T, strict=True):
                    have = column[np.isfinite(column)]
                    if len(have):
                        middle = np.exp(np.log(have).mean()) if (have > 0).all() else ""
                        where = [group.name, run.config.seed, layer, metric]
                        writer.writerow([*where, len(have), have.mean(), middle])
    return out.getvalue()


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
    shown: Mapping[str, str] | None = None,
    missing: Mapping[str, str] | None = None,
) -> str:
    """report.md: what was looked at, a table, and the figures with their captions.

    Args:
      found: the groups.
      metric: of the profile.
      shown: figure -> caption.
      missing: figure -> why it was not drawn.
    """
    lines, rows = ["# Layer-wise inertia", ""], []
    for group in found:
        lines.append(f"- **{group.name}**: {group.title}")
        for run in group.runs:
            where = runs.portable(run.config).output.dir
            lines.append(f"  - seed {run.config.seed}: {f'`{where}`' if where else 'in memory'}")
        numbers, votes = outline(group, metric), Counter(one.least for one in group.profiles(metric))
        layer, count = votes.most_common(1)[0] if votes else ("–", 0)
        several = f" ({count} of {votes.total()} seeds)" if len(votes) > 1 else ""
        cells = [_told(numbers.get(key)) for key in _COLUMNS]
        rows.append([group.name, str(len(group.runs)), layer + several, *cells])
    lines += ["", "## In numbers", "", _ABOUT.format(metric=metric, start=START), ""]
    lines += markdown(["group", "seeds", "layer of least", *_COLUMNS.values()], rows)
    lines += ["## Figures", ""]
    for name, caption in (shown or {}).items():
        lines += [f"![{name}]({name}.png)", "", f"*{name}.* {caption}", ""]
    lines += [f"- {name} was not drawn: {why}" for name, why in (missing or {}).items()]
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


def _home(given: Given, found: Sequence[Group]) -> Path:
    if isinstance(given, str | Path) and Path(given).suffix == ".yaml":
        return sweep_files.load(given).out / "inertia"
    first = found[0].runs[0].folder
    if first is None:
        raise UserError("out", None, "the run is in memory and has no folder", "Say where: out=….")
    alone = len(found) == 1 and len(found[0].runs) == 1
    return first / "figures" / "inertia" if alone else first.parent / "inertia"
