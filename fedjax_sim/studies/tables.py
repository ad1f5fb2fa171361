"""The table of finished runs, whatever started them: what a sweep writes of its own, for runs that are given.

import fedjax_sim as fs

print(fs.compare(["runs/first", "runs/second"], reference="fedavg").markdown())
"""

import dataclasses
from pathlib import Path

from fedjax_sim.config.sweep_files import Job, Sweep, read_sweep
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.fields import nearest
from fedjax_sim.records import goal_of
from fedjax_sim.reports import shared
from fedjax_sim.reports.shared import Given, Group
from fedjax_sim.runs import Run
from fedjax_sim.runs.folder import Folder
from fedjax_sim.studies import comparison
from fedjax_sim.studies.comparison import Comparison


def compare(
    given: Given,
    *,
    metric: str = "accuracy",
    reference: str | None = None,
    last_k: int = 1,
    rounds_of_interest: tuple[int, ...] = (),
    goal: str | None = None,
) -> Comparison:
    """Finished runs as a sweep's table: a row for each group of runs that differ in nothing but the seed.

    Args:
      given: runs, their folders, sweeps' files, or a mixture of them.
      metric: of the table, any that was recorded once a round.
      reference: the row to which the others are compared, seed by seed. None: that of the sweep's file, where
        a single one is given and one of the rows is it; else none.
      last_k: newest values of the metric that are averaged.
      rounds_of_interest: further tables, each of the mean of the `last_k` newest values up to that round.
      goal: `max` or `min`; None goes by the metric's name.

    Raises:
      UserError: see `fedjax_sim.reports.shared.groups`; no such metric or row; a number that is none.
    """
    groups = shared.groups(given)
    names = [group.name for group in groups]
    if reference is None:
        reference = _of_file(given, names)
    if reference is not None and reference not in names:
        raise UserError("reference", reference, "no row is called so", nearest(reference, names))
    for field, value in [("last_k", last_k), *(("rounds_of_interest", one) for one in rounds_of_interest)]:
        if type(value) is not int or value < 1:
            raise UserError(field, value, "it must be a whole number from 1", "Give one, such as 1.")
    if goal not in (None, "max", "min"):
        raise UserError("goal", goal, "not one of the choices", "Choose max or min.")
    finished = [
        (Job(group.name, (), "", run.config.seed, run.config), run)
        for group in groups
        for run in sorted(group.runs, key=lambda run: run.config.seed)
    ]
    jobs = tuple(job for job, _ in finished)
    goal, home = goal or goal_of(metric), groups[0].runs[0].folder or Path()
    asked = Sweep(jobs, reference, metric, goal, last_k, tuple(rounds_of_interest), home)
    try:
        table = comparison.compare(asked, finished)
    except UserError as error:
        raise UserError(error.field.removeprefix("sweep."), error.value, error.why, error.fix) from None
    return dataclasses.replace(table, title=title_of(groups))


def _of_file(given: Given, names: list[str]) -> str | None:
    """The reference of a sweep's file; None where something else is given, or no row is it."""
    things = list(given) if isinstance(given, list | tuple) else [given]
    if len(things) != 1 or not isinstance(things[0], str | Path) or Path(things[0]).suffix != ".yaml":
        return None
    reference = read_sweep(things[0]).reference
    return reference if reference in names else None


def title_of(groups: list[Group]) -> str:
    """One line of what all runs have in common: the model, the data, the clients, the partition."""

    def alike(told: list[str]) -> str:
        return told[0] if len(set(told)) == 1 else ""

    runs = [run for group in groups for run in group.runs]
    model = alike([run.config.given.get("model", run.config.model.name) for run in runs])
    data = alike([str(run.recipe.get("dataset", run.config.data.source)) for run in runs])
    clients = alike([f"{run.recipe['clients']:,} clients" for run in runs])
    parts = [
        " on ".join(part for part in (model, data) if part),
        clients,
        alike([_kind(run) for run in runs]),
    ]
    return ", ".join(part for part in parts if part) or "Runs that differ in model, data and clients"


def _kind(run: Run) -> str:
    kind = str(run.recipe.get("kind", "given partition"))
    return f"{kind}({run.recipe.get('alpha')})" if kind.startswith("dirichlet") else kind


def write(place: Folder, table: Comparison) -> list[Path]:
    """Writes table.md, table.csv, table.tex and the curves as PNG and PDF. -> the files."""
    from fedjax_sim.records import plots  # Matplotlib loads when something is drawn

    contents = {"table.md": table.markdown(), "table.csv": table.csv(), "table.tex": table.latex()}
    for name, content in contents.items():
        place.write(name, content)
    figure = plots.compared_curves(table.curves, table.metric, table.title)
    drawn = [place.path / f"curves.{suffix}" for suffix in ("png", "pdf")]
    for path in drawn:
        plots.save(figure, path)
    return [place.path / name for name in contents] + drawn
