"""What a page says of a study: its runs and their table, put into the sections of a page."""

import dataclasses
import os
import shlex
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedjax_sim.config.sweep_files import Job, Sweep
from fedjax_sim.core.errors import UserError
from fedjax_sim.records import goal_of, plots
from fedjax_sim.reports.page import curves, entries, facts, holders, pictures, render
from fedjax_sim.reports.page.entries import Entry
from fedjax_sim.reports.page.render import Cell, Grid, GridRow, Page, RunLine, Step, Tile
from fedjax_sim.runs import same_data
from fedjax_sim.studies import comparison
from fedjax_sim.studies.comparison import Comparison
from fedjax_sim.studies.sources import Study


def html_of(study: Study, path: Path, refresh: int | None = None) -> str:
    """A study's page; see `page_of`."""
    return render.html(page_of(study, path, refresh))


def page_of(study: Study, path: Path, refresh: int | None = None) -> Page:
    """Everything that a page says.

    Args:
      study: what it is of.
      path: where it will lie, from which links are seen.
      refresh: seconds after which a browser is to read it again; None: it is not.
    """
    found = curves.gather(study.entries, study.headline)
    metric = next((name for name in found.metrics if _some(found, name)), "")
    chart, notes = curves.packed(found) if metric else (None, list[str]())
    first = next((entry for entry in study.entries if entry.run is not None), study.entries[0])
    compared = _compared(study, metric)
    partitions, about_partitions = holders.holdings(study.entries)
    several = len(study.entries) > 1
    state, words = _state(study)
    failed = [entry for entry in study.entries if entry.state.kind in ("failed", "damaged")]
    title = _title(study, compared)
    if chart is not None and _uneven(study.entries):
        how = "under way" if any(entry.state.kind == "running" for entry in study.entries) else "not finished"
        notes.append(
            f"Some runs are {how}: where seeds are at different rounds, a mean is over those that came so"
            " far."
        )
    return Page(
        kind=study.kind,
        title=title,
        about=_about(study, first, compared),
        state=state,
        words=words,
        written=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        metric=metric or study.headline,
        share=None if all(entry.over for entry in study.entries) else _share(study),
        refresh=refresh,
        tiles=tuple(_tiles(study, found, metric, compared)),
        failures=tuple(f"{entry.name}: {entry.state.words}" for entry in failed[:_MOST_FAILURES])
        + ((f"and {len(failed) - _MOST_FAILURES} more",) if len(failed) > _MOST_FAILURES else ()),
        cautions=(
            *_not_comparable(study, metric or study.headline),
            *_other_data(study),
            *facts.cautions(study.entries),
        ),
        chart=chart,
        chart_notes=tuple(notes),
        still=pictures.still_curves(found, metric, "") if metric else None,
        grids=() if compared is None else tuple(_grids(compared)),
        grid_notes=() if compared is None else tuple(_grid_notes(compared, study)),
        numbers=_cells(facts.numbers(found)) if len(found.rows) == len(found.columns) == 1 else (),
        runs=tuple(_run_line(entry, metric, path) for entry in study.entries) if several else (),
        runs_words=_runs_words(study),
        holdings=tuple(_cells(partitions, drop=("image",))),
        holding_images=tuple(
            dataclasses.replace(one.image, name=one.name if len(partitions) > 1 else "")
            for one in partitions
            if one.image is not None
        ),
        holding_notes=tuple(about_partitions),
        peel=pictures.layer_peeled(study.entries),
        inertia=pictures.layers_movement(study.entries),
        traffic=_cells(facts.traffic(study.entries)),
        costs=_cells(facts.costs(study.entries)),
        places=tuple(facts.places(study.entries)),
        settings=tuple(facts.settings(first.config)),
        settings_words="Every setting" if not several else f"Every setting of one of the runs: {first.name}",
        sweep_text="" if study.file is None else study.file.read_text(),
        repeat=tuple(_repeat(study, first)),
    )


_MOST_FAILURES = 20
_LONGEST_TITLE = 80
"""Characters; a longer title says only how many runs there are, and the table names them."""


def _some(found: curves.Curves, metric: str) -> bool:
    return any(key[0] == metric and np.isfinite(curve.mean).any() for key, curve in found.curves.items())


def _cells(rows: Sequence[Any], drop: tuple[str, ...] = ()) -> tuple[tuple[str, ...], ...]:
    names = [field.name for field in dataclasses.fields(rows[0]) if field.name not in drop] if rows else []
    return tuple(tuple(getattr(row, name) for name in names) for row in rows)


def _uneven(known: Sequence[Entry]) -> bool:
    """Whether seeds of one row and setting are at different rounds, and some of these are not finished."""
    rounds: dict[tuple[str, str], set[int]] = {}
    for entry in known:
        if entry.seen:
            rounds.setdefault((entry.row, entry.column), set()).add(entry.state.round)
    unfinished = any(entry.seen and entry.state.kind not in ("finished", "stopped") for entry in known)
    return unfinished and any(len(numbers) > 1 for numbers in rounds.values())


def _title(study: Study, compared: Comparison | None) -> str:
    rows = list(dict.fromkeys(entry.row for entry in study.entries))
    if study.kind == "Run":
        return _run_title(study.entries[0])
    shown = ", ".join(rows[:4]) + (f" and {len(rows) - 4} more" if len(rows) > 4 else "")
    if study.name:
        title = f"{study.name}: {shown}"
    else:
        title = shown if compared is None else f"{shown}: {compared.title}"
    if len(title) <= _LONGEST_TITLE:
        return title
    return f"{study.name}: {len(study.entries)} runs" if study.name else f"{len(study.entries)} runs"


def _run_title(entry: Entry) -> str:
    """Method and model on data, of one run."""
    return f"{entry.row}, {_model(entry)} on {_source(entry)}"


def _model(entry: Entry) -> str:
    return str(entry.config.given.get("model", entry.config.model.name))


def _source(entry: Entry) -> str:
    source = entry.config.data.source
    return source if entry.run is None else str(entry.run.recipe.get("dataset", source))


def _model_and_data(known: Sequence[Entry]) -> str:
    """What all runs have in common of these, as far as it is known before they begin."""
    begun = [entry for entry in known if entry.run is not None]
    models, sources = {_model(entry) for entry in known}, {_source(entry) for entry in begun or known}
    if len({str(entry.config.data) for entry in known}) > 1:
        sources = set()
    told = [one.pop() for one in (models, sources) if len(one) == 1]
    return " on ".join(told)


def _about(study: Study, first: Entry, compared: Comparison | None) -> str:
    config = first.config
    seeds = sorted({entry.config.seed for entry in study.entries})
    several = len(study.entries) > 1
    parts = []
    if study.kind == "Run" or compared is None:
        recipe = {} if first.run is None else first.run.recipe
        clients, kind = (
            recipe.get("clients", config.partition.clients),
            recipe.get("kind", config.partition.kind),
        )
        alpha = recipe.get("alpha", config.partition.alpha)
        if study.kind != "Run" and (told := _model_and_data(study.entries)):
            parts.append(told)
        parts.append(f"{clients:,} clients" if clients else "clients as the data name them")
        parts.append(f"{kind} (α = {alpha})" if str(kind).startswith("dirichlet") else str(kind))
    else:
        parts.append(compared.title)
    cohort = config.cohort
    parts.append(f"{cohort.size} a round" if cohort.size else f"{100 * cohort.fraction:g} % of them a round")
    parts.append(f"{config.rounds:,} rounds")
    parts.append(
        f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds[:8]))}{' …' if len(seeds) > 8 else ''}"
    )
    if several:
        parts.append(f"{len(study.entries)} runs")
    local = next(value for name, value in facts.described(config) if name == "Local training")
    return ", ".join([*parts, local])


def _state(study: Study) -> tuple[entries.Kind, str]:
    """Of all runs together: the state that matters most to a reader, and all of them in words."""
    states = [entry.state for entry in study.entries]
    if len(states) == 1:
        return states[0].kind, states[0].words
    count = Counter(state.kind for state in states)
    done = count["finished"] + count["stopped"]
    names = {
        "running": "under way",
        "cut": "not finished and at rest",
        "waiting": "to come",
        "failed": "failed",
        "damaged": "damaged",
    }
    told = [f"{done} of {len(states)} runs finished" if done < len(states) else f"all {done} runs finished"]
    told += [f"{count[kind]} {name}" for kind, name in names.items() if count[kind]]
    if not study.whole:
        told.append("of those that have begun: give the sweep's file to see those to come")
    left = [state.seconds_left for state in states if state.kind == "running" and state.seconds_left]
    if left and not count["waiting"] and not count["cut"]:
        told.append(f"about {entries.duration(max(left))} left")
    kinds: tuple[entries.Kind, ...] = ("running", "failed", "damaged", "cut", "waiting")
    most: list[entries.Kind] = [kind for kind in kinds if count[kind]]
    return most[0] if most else "finished", ", ".join(told)


def _share(study: Study) -> float:
    states = [entry.state for entry in study.entries]
    whole = [state.round / state.rounds if state.kind not in entries.OVER else 1.0 for state in states]
    return sum(whole) / len(whole)


def _tiles(study: Study, found: curves.Curves, metric: str, compared: Comparison | None) -> list[Tile]:
    tiles = []
    first = study.entries[0]
    if compared is not None and len(compared.methods) * len(compared.columns) > 1:
        grid = compared.grids[0]
        for column in compared.columns[:3]:
            if len(_data_sets(study, column)) > 1:
                continue
            for method in sorted(compared.best(grid, column))[:1]:
                cell = grid.cells[method, column]
                value = comparison.format_mean_std(list(cell.values.values()))
                words = _ranked_by(compared)
                tiles.append(Tile(f"{words}{', ' + column if column else ''}: {method}", value))
    elif metric:
        curve = next(curve for key, curve in found.curves.items() if key[0] == metric)
        last = int(np.flatnonzero(np.isfinite(curve.mean))[-1])
        tiles.append(
            Tile(f"{plots.label_of(metric)}, round {curve.rounds[last]:,}", facts.short(curve.mean[last]))
        )
    if study.kind == "Run":
        tiles.append(Tile("rounds", f"{first.state.round:,} of {first.state.rounds:,}"))
        if first.run is not None and first.run.best_round is not None:
            tiles.append(Tile("best model kept", f"round {first.run.best_round:,}"))
        clients = None if first.run is None else first.run.recipe.get("clients")
        if clients:
            tiles.append(Tile("clients", f"{clients:,}"))
    else:
        states = [entry.state for entry in study.entries]
        done = sum(state.kind in ("finished", "stopped") for state in states)
        tiles.append(Tile("runs finished", f"{done:,} of {len(states):,}"))
    wall = [entry.run.seconds for entry in study.entries if entry.run is not None]
    if wall:
        tiles.append(Tile("wall time of all rounds", entries.duration(sum(wall))))
    return tiles


def _ranked_by(compared: Comparison) -> str:
    """`highest last accuracy`: the number of which a tile shows the first."""
    first = "highest" if compared.goal == "max" else "lowest"
    fewest, most = compared.grids[0].averaged
    count = str(most) if fewest == most else f"{fewest} to {most}"
    return f"{first} last {compared.metric}" + (f" (mean of {count} values)" if most > 1 else "")


def _data_sets(study: Study, column: str) -> list[str]:
    """Names of the data sets that the runs of a column are on."""
    told = [
        str(entry.run.recipe.get("dataset", entry.config.data.source))
        for entry in study.entries
        if entry.column == column and entry.run is not None
    ]
    return list(dict.fromkeys(told))


def _not_comparable(study: Study, metric: str) -> list[str]:
    """A sentence where rows of one column are on different data sets."""
    for column in dict.fromkeys(entry.column for entry in study.entries):
        names = _data_sets(study, column)
        if len(names) > 1:
            return [
                f"The runs are on different data sets ({', '.join(names)}): their values of {metric} are not "
                "comparable."
            ]
    return []


def _other_data(study: Study) -> list[str]:
    """A sentence where one data setting gave runs different data; the reference's version is the first."""
    first = study.entries[0].row if study.sweep is None else study.sweep.reference or study.entries[0].row
    ordered = sorted(study.entries, key=lambda entry: (entry.row != first, not entry.over))
    return same_data.cautions((entry.name, entry.config, facts.provenance_of(entry)) for entry in ordered)


# --- the table ------------------------------------------------------------------------------------------


def _compared(study: Study, metric: str) -> Comparison | None:
    """The table of the finished runs; None where there is one run, or none is finished."""
    done = [entry for entry in study.entries if entry.state.kind in ("finished", "stopped")]
    if len(study.entries) < 2 or not done or not metric:
        return None
    jobs = {
        id(entry): Job(entry.row, entry.setting, entry.column, entry.config.seed, entry.config)
        for entry in study.entries
    }
    rows = list(dict.fromkeys(entry.row for entry in study.entries))
    if study.sweep is None:
        sweep = Sweep(tuple(jobs.values()), rows[0], metric, goal_of(metric), 1, (), study.home or Path())
    else:
        # Of a sweep without a reference the first method is one, so that differences are there.
        changes = {"jobs": tuple(jobs.values()), "reference": study.sweep.reference or rows[0]}
        sweep = dataclasses.replace(study.sweep, **changes)
    finished = [(jobs[id(entry)], entry.run) for entry in done if entry.run is not None]
    try:
        return comparison.compare(sweep, finished)
    except UserError:  # none of them has recorded the metric
        return None


def _grids(compared: Comparison) -> list[Grid]:
    grids = []
    for grid in compared.grids:
        rows = []
        for method in compared.methods:
            cells = []
            for column in compared.columns:
                cell = grid.cells.get((method, column))
                if cell is None:
                    cells.append(Cell("–"))
                    continue
                value = comparison.format_mean_std(list(cell.values.values()))
                best = method in compared.best(grid, column) and len(compared.methods) > 1
                difference, side = _difference(cell.differences, compared.goal)
                cells.append(Cell(value + ("" if cell.like else " †"), best, difference, side))
            rows.append(GridRow(method, tuple(cells)))
        heads = ("", *(column or compared.metric for column in compared.columns))
        grids.append(Grid(f"{grid.caption[0].upper()}{grid.caption[1:]}", heads, tuple(rows)))
    return grids


def _difference(differences: Sequence[float], goal: str) -> tuple[str, str]:
    if not differences:
        return "", ""
    middle = comparison.mean(differences)
    found = comparison.interval(differences)
    if found is None:
        return f"{middle:+.4f}", ""
    low, high = found
    clear = low > 0 or high < 0
    better = (middle > 0) == (goal == "max")
    return f"{middle:+.4f} [{low:+.4f}, {high:+.4f}]", ("better" if better else "worse") if clear else ""


def _grid_notes(compared: Comparison, study: Study) -> list[str]:
    notes = ["Mean ± standard deviation over seeds (number of seeds). Bold: the best mean of a column."]
    if any(cell.differences for grid in compared.grids for cell in grid.cells.values()):
        chosen = "" if study.sweep is not None and study.sweep.reference else ", the first row"
        notes.append(
            f"Below a value: its difference to {compared.reference}{chosen}, mean over seeds of the same "
            "partition, with the 95 % interval of Student's t. It takes the differences for normal, says "
            "little of few seeds, and is not corrected for the number of rows. One seed has no interval. In "
            "colour: the interval leaves 0 out."
        )
    return notes + compared.notes("†")


# --- runs, and how to repeat them -----------------------------------------------------------------------


def _run_line(entry: Entry, metric: str, path: Path) -> RunLine:
    folder, value, wall, link = entry.folder, "–", "–", ""
    if entry.run is not None:
        known = entry.run.metrics.series(metric)[1]
        value = facts.short(float(known[-1])) if len(known) else "–"
        wall = entries.duration(entry.run.seconds)
        if folder is not None and folder.is_dir():
            link = Path(os.path.relpath(folder, path.parent)).as_posix() + "/"
    return RunLine(
        entry.name, link, entry.state.kind, f"{entry.state.round:,}/{entry.state.rounds:,}", value, wall
    )


def _runs_words(study: Study) -> str:
    states = Counter(entry.state.kind for entry in study.entries)
    return ", ".join(f"{count} {kind}" for kind, count in states.items()) + "."


_NUMBERS_BY = ("fedjax-sim", "jax", "jaxlib", "flax", "optax", "numpy", "pillow")
"""Packages whose versions a reader installs to repeat a study."""


def _repeat(study: Study, first: Entry) -> list[Step]:
    steps, given = [], first.config.given
    about = facts.provenance_of(first)
    git = (about.get("git") or {}).get("package") or {}
    versions: dict[str, str] = {}
    for told in (about, *map(facts.provenance_of, study.entries)):  # pictures may be those of another run
        versions = {name: one for name, one in told.get("versions", {}).items() if one} | versions
    wanted = " ".join(f"{name}=={versions[name]}" for name in _NUMBERS_BY if name in versions)
    if wanted:
        at = f", fedjax_sim at commit {git['commit'][:12]}" if "commit" in git else ""
        python = f"Python {versions['python']}" if "python" in versions else "Python"
        steps.append(Step(f"The environment: {python}{at}, and these versions.", f"pip install {wanted}"))
    if study.file is not None:
        where = shlex.quote(_seen(study.file))
        steps.append(
            Step(
                "Save the file of the study, which stands above, and start it. What is finished is not run "
                "again; what was cut goes on.",
                f"fedjax-sim sweep {where}",
            )
        )
    elif study.kind == "Run" and given:
        listed = ", ".join(f"{name} ({told})" for name, told in given.items())
        names = ", ".join(f"{name}=…" for name in given)
        steps.append(
            Step(
                f"The run had from Python what no file can hold: {listed}. Save the configuration above as "
                "my.yaml, and give the same again.",
                f'import fedjax_sim as fs\n\nrun = fs.run("my.yaml", {names})',
            )
        )
    elif study.kind == "Run":
        steps.append(
            Step(
                "Save the configuration above as my.yaml, and run it in a new folder.",
                "fedjax-sim run my.yaml --output.dir runs/again",
            )
        )
    else:
        steps.append(
            Step("Each run's folder has its configuration (config.yaml), and each is run again by itself.")
        )
    if study.kind == "Run" and first.state.kind == "cut" and first.folder is not None:
        command = f"fedjax-sim resume {shlex.quote(_seen(first.folder))}"
        steps.append(
            Step(
                "It is not finished. This goes on with it, to the numbers that it would have had uncut.",
                command,
            )
        )
    steps.append(
        Step(
            "On the same machine, versions and layout the numbers are the same to the last bit; on others "
            "they are the same up to float rounding."
        )
    )
    return steps


def _seen(path: Path) -> str:
    """A path as seen from the working directory or from home, if it is below."""
    for base, start in ((Path.cwd(), ""), (Path.home(), "~")):
        if path.is_relative_to(base):
            return str(Path(start) / path.relative_to(base))
    return str(path)
