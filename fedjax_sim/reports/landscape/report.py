"""How flat the minima of finished runs are, written down: figures, tables and a report.

from fedjax_sim.probes.landscape import report

report.draw("runs/a")                     # landscape in the run's folder
report.draw(["runs/a", "runs/b"], "out")  # seeds pooled, others compared
report.draw("study.yaml")                 # a sweep's finished runs
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from fedjax_sim.reports import shared
from fedjax_sim.reports.landscape.measurement import Measured, Settings, check_measurable, measure
from fedjax_sim.reports.landscape.pictures import PICTURES, Results
from fedjax_sim.reports.shared import Figures, Given, Group, drawing, markdown, spread
from fedjax_sim.runs import restored
from fedjax_sim.runs.folder import Folder


def draw(
    given: Given,
    out: str | Path | None = None,
    settings: Settings | None = None,
    *,
    tell: Callable[[str], None] = lambda line: None,
) -> list[Path]:
    """Measures runs, draws what was found (PNG and PDF), and writes flatness.csv, curves.csv and report.md.

    Runs that differ only in their seed are pooled; of the others each is a group.

    Args:
      given: a run's folder, a sweep's file, or a sequence of them.
      out: a folder; None: landscape in the folder of a single run, in a single sweep's, else beside the first
        run's.
      settings: what to measure; None: the defaults.
      tell: is given a line for each run, each file, and each figure that cannot be drawn.

    Returns:
      The files written.

    Raises:
      UserError: a folder holds no run, or one without its last checkpoint; a run is not finished; another
        process draws into the folder; or see `measure`.
    """
    settings = settings or Settings()
    found = shared.groups(given)
    for group in found:
        for run in group.runs:
            check_measurable(run)
    home = shared.home_of(given, found, "landscape", "landscape") if out is None else out
    with drawing(home) as folder:  # from here on, as measuring takes long
        return _draw(found, settings, folder, tell)


def _draw(
    found: Sequence[Group], settings: Settings, home: Folder, tell: Callable[[str], None]
) -> list[Path]:
    """Measures all runs and writes what came of it. -> the files written."""
    results: list[list[Measured]] = []
    for group in found:
        results.append([])
        for place, run in enumerate(group.runs):
            tell(f"measuring {group.name}, seed {run.config.seed}")
            results[-1].append(measure(restored(str(run.folder)), settings, planes=place == 0))
    figures = {name: partial(make, found, results, settings) for name, make in PICTURES.items()}
    drawn = shared.draw(home, figures, tell)
    contents = {
        "flatness.csv": table(found, results),
        "curves.csv": curves(found, results),
        "report.md": text(found, results, settings, drawn),
    }
    written = drawn.paths + shared.write(home, contents, tell)
    for warning in warnings(found):
        tell(f"warning: {warning}")
    return written


def numbers(measured: Measured) -> dict[str, float]:
    """A run's landscape in single numbers, by the names that flatness.csv has for them."""
    one, ball = measured.spectrum, measured.sharpness
    out = {}
    for name in measured.loss:
        out[f"{name}_loss"] = measured.loss[name]
        if np.isfinite(measured.accuracy[name]):  # else the samples have no classes
            out[f"{name}_accuracy"] = measured.accuracy[name]
    for place, (value, residual) in enumerate(zip(one.eigenvalues, one.residuals, strict=True), 1):
        out[f"eigenvalue_{place}"], out[f"eigenvalue_{place}_residual"] = float(value), float(residual)
    out |= {"eigenvalue_least": one.least, "trace": one.trace, "trace_error": one.trace_error}
    out |= {"sharpness_worst": ball.worst, "sharpness_average": ball.average}
    out |= {"sharpness_average_error": ball.average_error, "norm": measured.norm}
    if measured.between:
        out["distance_mean"] = measured.pairs("train", "distance").mean()
        for name in measured.loss:
            heights = measured.pairs(name, "height")
            out |= {f"barrier_{name}_mean": heights.mean(), f"barrier_{name}_max": heights.max()}
            out[f"prominence_{name}_max"] = measured.pairs(name, "prominence").max()
            out[f"middle_{name}_mean"] = measured.pairs(name, "middle").mean()
    return {name: float(value) for name, value in out.items()}


def table(found: Sequence[Group], results: Results) -> str:
    """flatness.csv: a row for each run and number, see `numbers`.

    Columns: group, seed, rounds, name, value.
    """
    rows = [
        [group.name, run.config.seed, run.rounds, name, value]
        for group, parts in zip(found, results, strict=True)
        for run, measured in zip(group.runs, parts, strict=True)
        for name, value in numbers(measured).items()
    ]
    return shared.comma_separated(["group", "seed", "rounds", "name", "value"], rows)


def curves(found: Sequence[Group], results: Results) -> str:
    """curves.csv: a row for each point that was evaluated.

    Columns: group, seed, curve (random_line, random_surface, models_line, models_plane), models (the pair of
    a models_line), samples (train, test), x, y (empty on lines), loss, accuracy.
    """
    rows = []
    for group, parts in zip(found, results, strict=True):
        for run, measured in zip(group.runs, parts, strict=True):
            rows += [[group.name, run.config.seed, *row] for row in _points(measured)]
    heads = ["group", "seed", "curve", "models", "samples", "x", "y", "loss", "accuracy"]
    return shared.comma_separated(heads, rows)


def _points(measured: Measured) -> Iterator[list[object]]:
    lines = [("random_line", "", name, curve) for name, curve in measured.lines.items()]
    for i, j, both in measured.between:
        lines += [("models_line", f"{i + 1}-{j + 1}", name, barrier.curve) for name, barrier in both.items()]
    for kind, models, name, curve in lines:
        for x, loss, accuracy in zip(curve.at, curve.loss, curve.accuracy, strict=True):
            yield [kind, models, name, x, "", loss, accuracy]
    for kind, surfaces in (("random_surface", measured.surfaces), ("models_plane", measured.planes)):
        for name, surface in surfaces.items():
            for (i, j), loss in np.ndenumerate(surface.loss):
                yield [kind, "", name, surface.x[i], surface.y[j], loss, surface.accuracy[i, j]]


def warnings(found: Sequence[Group]) -> list[str]:
    """What makes a comparison of these runs unfair."""
    out = []
    for what, values in {
        "rounds": [run.rounds for group in found for run in group.runs],
        "models": [run.config.model for group in found for run in group.runs],
        "data": [run.recipe.get("dataset") for group in found for run in group.runs],
    }.items():
        if any(value != values[0] for value in values):
            told = f" ({', '.join(sorted(map(str, set(values))))})" if what == "rounds" else ""
            out.append(f"the runs have different {what}{told}: flatness is comparable at equal ones only")
    return out


def text(
    found: Sequence[Group],
    results: Results,
    settings: Settings,
    figures: Figures | None = None,
) -> str:
    """report.md: what was looked at, a table, and the figures with their captions.

    Args:
      found: the groups.
      results: of each run.
      settings: with which it was measured.
      figures: what was drawn.
    """
    lines, rows = ["# Loss landscapes", ""], []
    for group, parts in zip(found, results, strict=True):
        clients = [", ".join(map(str, measured.clients)) for measured in parts]
        whose = [f"; models of clients {told}" if told else "" for told in clients]
        lines += group.listed(f"; {group.runs[0].rounds} rounds", whose)
        found_numbers = [numbers(measured) for measured in parts]
        cells = [_told(found_numbers, name) for name in _COLUMNS]
        rows.append([group.name, str(len(parts)), *cells])
    for warning in warnings(found):
        lines += ["", f"**Warning**: {warning}."]
    every = [one for parts in results for one in parts]
    done = {
        "train": _counted([one.samples["train"] for one in every]),
        "test": _counted([one.samples["test"] for one in every]),
        "compared": _counted([len(one.clients) for one in every]),
    }
    about = _ABOUT.format(**vars(settings), **done, unit=_UNITS[settings.scale])
    lines += ["", "## In numbers", "", about, ""]
    lines += markdown(["group", "seeds", *_COLUMNS.values()], rows)
    lines += (figures or Figures()).section()
    return "\n".join(lines).rstrip() + "\n"


_COLUMNS = {
    "train_loss": "train loss",
    "test_loss": "test loss",
    "test_accuracy": "test accuracy",
    "norm": "norm of the parameters",
    "eigenvalue_1": "top eigenvalue",
    "trace": "trace",
    "sharpness_worst": "worst-case sharpness",
    "sharpness_average": "average sharpness",
    "barrier_train_max": "barrier, train",
    "barrier_test_max": "barrier, test",
    "prominence_train_max": "prominence, train",
    "prominence_test_max": "prominence, test",
    "middle_train_mean": "half way, train",
    "distance_mean": "distance",
}
_ERRORS = {"trace": "trace_error", "sharpness_average": "sharpness_average_error"}
_UNITS = {
    "absolute": "of the parameters' L2 distance",
    "relative": "of the L2 norm of all parameters",
    "filter": "root of the sum over filters of (‖δ_f‖ / ‖w_f‖)²",
}
_ABOUT = (
    "Of the deployed model in evaluation mode (batch norm with its running statistics), losses on {train} "
    "random samples that clients train on, and {test} test samples, the same for all seeds; curvature and "
    "sharpness are of the training loss. Top eigenvalue and trace of its Hessian by the parameters: "
    "{lanczos} Lanczos steps, {probes} Hutchinson probes. Both shrink where weights grow and the network "
    "computes the same; the norm is that of all parameters. Sharpness: rise of the loss within ρ = {rho:g} "
    "({unit}), the worst that gradient ascent found, and the mean of random steps of that length. Barrier: "
    "the largest among pairs of {compared} clients' models, trained for one more round and not merged; the "
    "excess of the loss on the line between two over the straight line between their losses. Prominence: the "
    "largest rise on such a line above the lower ground on both of its sides; 0: the line has one valley. A "
    "barrier of 0 says as much only of models that are at minima themselves. Half way: the excess in the "
    "middle, below the mean of the two ends, mean over pairs. Distance: L2 between the parameters of two "
    "such models, mean over pairs, which the three before are to be seen beside. Several seeds: mean ± "
    "standard deviation. In brackets: the estimator's standard error (root mean square over seeds), which "
    "the deviation need not hold, as all runs share the random vectors."
)


def _counted(counts: Sequence[int]) -> str:
    """`3`, or `2 to 3` where the runs differ."""
    return str(min(counts)) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"


def _told(found: Sequence[Mapping[str, float]], name: str) -> str:
    values = np.asarray([one.get(name, np.nan) for one in found])
    infinite = np.count_nonzero(np.isinf(values))
    if infinite:
        return f"∞ in {infinite} of {len(values)}"
    if np.isnan(values).all():
        return "–"
    mean, deviation = spread(values)
    told = f"{mean:.4g}" + (f" ± {deviation:.2g}" if len(values) > 1 else "")
    if name in _ERRORS:
        told += f" (± {np.sqrt(np.mean([one[_ERRORS[name]] ** 2 for one in found])):.2g})"
    return told
