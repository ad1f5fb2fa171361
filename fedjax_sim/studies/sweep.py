"""Sweeps: a grid of runs in one process, and the comparison of what they gave.

The file that describes one is explained in `fedjax_sim.config.sweep_files`. In the sweep's folder:

    table.md, table.csv, table.tex    mean ± deviation over seeds, best in bold, paired differences
    curves.png, curves.pdf            mean and deviation of the metric over rounds
    sweep.json                        everything that was run, versions, hardware, cost
    runs/METHOD/SETTING/seedN/        each run's own folder
    runs.parquet, runs.json           in place of records in those folders, if the sweep was packed
    compiled/                         on accelerators, compiled programs, shared by all starts

A sweep may be divided over several starts, on as many machines that share its folder or have one each, to be
put together afterwards: each start runs its part, and tells of all that is finished by then. Or one start has
a launcher divide it (`fedjax_sim.studies.launchers`): Slurm's tasks or Ray's then do what this process would.

Cost is `seconds` and `cpu_seconds`, as `fedjax_sim.records` defines them; the second hardly depends on what
else the machine was doing. A run of which only the records were kept (`fedjax_sim.runs` says which) counts as
finished, wherever the sweep's folder has been moved; so it does once they were packed
(`fedjax_sim.studies.packing`).
"""

import contextlib
import dataclasses
import json
import shlex
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from fedjax_sim import config as config_lib
from fedjax_sim import data, runs
from fedjax_sim.config import RunConfig
from fedjax_sim.config.sweep_files import Job, Sweep, as_sweep, from_mapping
from fedjax_sim.config.sweep_files import read_sweep as load
from fedjax_sim.core.errors import NotWritten, UserError
from fedjax_sim.engine import hosts, programs
from fedjax_sim.engine.programs import Count
from fedjax_sim.runs import opening, own_code, progress, provenance, same_data
from fedjax_sim.runs import together as side_by_side
from fedjax_sim.runs.folder import Folder, missing, remove_empty
from fedjax_sim.runs.kept_programs import kept
from fedjax_sim.studies import comparison, tables
from fedjax_sim.studies.comparison import Comparison
from fedjax_sim.studies.launchers import LOCAL, Batch, Ended, Launcher, Ray, Slurm, launcher_of
from fedjax_sim.studies.packing import Packing, pack, unpack
from fedjax_sim.studies.planning import SweepPlan, plan

__all__ = [
    "Job",
    "Launcher",
    "Outcome",
    "Packing",
    "Ray",
    "Slurm",
    "Sweep",
    "SweepPlan",
    "compile_cache",
    "from_mapping",
    "load",
    "pack",
    "plan",
    "run",
    "unpack",
]


AGAIN = "Make room, then start the sweep again: it goes on where it stopped."
"""What to do when nothing more can be written."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a sweep gave.

    Attributes:
      sweep: what was asked for.
      comparison: the table; None if not one run was finished.
      failures: job's name -> what went wrong.
      seconds: job's name -> wall-clock seconds of its rounds.
      cpu_seconds: job's name -> CPU seconds of its rounds; None where they were not recorded.
      left: names of the jobs that are not finished because other parts, or tasks, have them.
      programs: what this process compiled for it; None: tasks did.
    """

    sweep: Sweep
    comparison: Comparison | None
    failures: dict[str, str]
    seconds: dict[str, float]
    cpu_seconds: dict[str, float | None]
    left: tuple[str, ...] = ()
    programs: Count | None = None

    def __repr__(self):
        count, finished = len(self.sweep.jobs), len(self.seconds)
        told = [f"{finished} of {count} runs finished"]
        told += [f"{len(self.failures)} failed"] if self.failures else []
        return f"Outcome({', '.join(told)}, in {self.sweep.out}; report() gives the table)"

    def report(self) -> str:
        """For the terminal: the table, the failures, and how much is missing."""
        lines = [] if self.comparison is None else [self.comparison.markdown()]
        if self.failures:
            lines.append(f"{len(self.failures)} of {len(self.sweep.jobs)} runs failed:")
            lines += [f"  {name}: {why}" for name, why in self.failures.items()]
        if self.left:
            lines.append(
                f"{len(self.left)} of {len(self.sweep.jobs)} runs are not finished: other parts or tasks "
                "have them. Once they are, another start writes the whole table"
            )
        if self.programs is not None:
            lines.append(str(self.programs))
        lines.append(f"written to {self.sweep.out}")
        return "\n".join(lines)


@dataclasses.dataclass
class _Found:
    """What became of the runs of a sweep, by the names of its jobs; see `Outcome`."""

    done: dict[str, runs.Run] = dataclasses.field(default_factory=dict)
    failures: dict[str, str] = dataclasses.field(default_factory=dict)
    left: list[str] = dataclasses.field(default_factory=list)


def run(
    sweep: Sweep | str | Path,
    tell: Callable[[str], None] = lambda line: None,
    *,
    part: tuple[int, int] = (1, 1),
    launcher: str | Launcher = LOCAL,
    together: bool = False,
) -> Outcome:
    """Runs what is not finished, and writes tables, curves and `sweep.json`.

    A run that fails is noted and the others go on.

    Args:
      sweep: what to run, or the path of its file.
      tell: is given a line after each run.
      part: (i, n): only the i-th job, the (n+i)-th, … are run; others count once they are finished.
      launcher: where runs are started: "local", in this process; "slurm" or "ray", or a `Slurm` or `Ray` that
        says what each task asks for.
      together: runs that differ in numbers alone go side by side, as one program; see
        `fedjax_sim.runs.together`. Only in this process.

    Raises:
      UserError: there is no such part or launcher; the folder cannot be written, or holds runs of other
        settings; a run cannot work as it is configured, which is found before the first one starts (with a
        launcher it is one of the failures).
      NotWritten: the disk is full, or fails; a later start continues.
      Interrupted, Terminated: on SIGINT and SIGTERM; likewise.
    """
    sweep = as_sweep(sweep)
    this, parts = part
    if not 1 <= this <= parts:
        raise UserError(
            "part", f"{this}/{parts}", "there is no such part", "Write 1/4 for the first of four parts."
        )
    place, elsewhere = Folder(sweep.out), launcher_of(launcher)
    as_it_was = _as_it_is(place)
    began, programs_before = time.perf_counter(), programs.count()

    def look() -> None:
        _check_settings(sweep)
        _warn_edited(sweep)

    hosts.on_first(look) if elsewhere is None else look()
    if elsewhere is None:
        hosts.on_first(lambda: _check_writable(place))
        if together and jax.process_count() > 1:
            tell("runs go one by one: several processes share each")
            together = False
        with as_it_was():
            found = (_run_together if together else _run_here)(sweep, tell, part)
    else:
        if together:
            why = "a launcher's tasks do their runs one after another"
            raise UserError("together", together, why, "Leave out one of them.")
        _check_alone(launcher, part)
        _check_writable(place)
        found = _run_elsewhere(sweep, tell, elsewhere)
    done = found.done
    finished = [(job, done[job.name]) for job in sweep.jobs if job.name in done]
    with as_it_was():
        compared = comparison.compare(sweep, finished) if finished else None
    wall = {name: result.seconds for name, result in done.items()}
    cpu = {name: result.cpu_seconds for name, result in done.items()}
    compiled = programs.count().since(programs_before) if elsewhere is None else None
    outcome = Outcome(sweep, compared, found.failures, wall, cpu, tuple(found.left), compiled)
    with place.writing("sweep.out", "start the sweep again: what is finished is not run again"):
        hosts.on_first(lambda: _write(place, outcome, time.perf_counter() - began))
    return outcome


def _run_here(sweep: Sweep, tell: Callable[[str], None], part: tuple[int, int]) -> _Found:
    """One run after another, in this process."""
    found, shared = _Found(), Shared()
    with compile_cache(sweep.out / "compiled"):
        _check(sweep, shared)
        _warn_other_data(sweep, shared)
        for number, job in enumerate(sweep.jobs, 1):
            head = f"[{number}/{len(sweep.jobs)}] {job.name}"
            try:
                with progress.part_of(head):
                    how, result = _one(job, shared, mine=number % part[1] == part[0] % part[1])
            except (runs.Interrupted, runs.Terminated) as stop:
                stop.advice = f"it was {head}; start the sweep again to go on"
                raise
            except hosts.OtherProcessLost:  # nor can others be run without it
                raise
            except NotWritten as error:  # nor can the others be, nor the table
                raise NotWritten(f"{job.name}: {error.field}", error.value, error.why, AGAIN) from error
            except Exception as error:
                if jax.process_count() > 1 and not isinstance(error, UserError):
                    raise  # perhaps this process alone failed, and the others wait for it
                found.failures[job.name] = _in_one_line(error)
                tell(f"{head}: FAILED: {found.failures[job.name]}")
                continue
            if result is None:
                found.left.append(job.name)
                tell(f"{head}: {how}")
                continue
            found.done[job.name] = result
            tell(f"{head}: {how}{_told(sweep, result)}")
    return found


def _run_together(sweep: Sweep, tell: Callable[[str], None], part: tuple[int, int]) -> _Found:
    """Runs side by side, in this process, of those that are not finished."""
    found, shared = _Found(), Shared()
    heads = {job.name: f"[{n}/{len(sweep.jobs)}] {job.name}" for n, job in enumerate(sweep.jobs, 1)}
    todo: list[Job] = []
    begun: set[str] = set()

    def end(job: Job, how: str, outcome: runs.Run | Exception) -> None:
        if isinstance(outcome, Exception):
            found.failures[job.name] = _in_one_line(outcome)
            tell(f"{heads[job.name]}: FAILED: {found.failures[job.name]}")
        else:
            found.done[job.name] = outcome
            tell(f"{heads[job.name]}: {how}{_told(sweep, outcome)}")

    with compile_cache(sweep.out / "compiled"):
        _check(sweep, shared)
        _warn_other_data(sweep, shared)
        for number, job in enumerate(sweep.jobs, 1):
            folder = Folder(str(job.config.output.dir))
            try:
                _check_same_settings(job, folder)
            except UserError as error:
                end(job, "", error)
                continue
            if folder.started and folder.finished:
                end(job, "finished before", runs.load(folder.path))
            elif number % part[1] == part[0] % part[1]:
                todo.append(job)
                begun |= {job.name} if folder.started else set()
            else:
                found.left.append(job.name)
                tell(f"{heads[job.name]}: another part's")

        def open_one(number: int, mesh: Any, store: Any) -> Any:
            config = todo[number].config
            folder = Folder(str(config.output.dir))
            here: Any = {"dataset": shared.dataset(config), "mesh": mesh, "store": store}
            if folder.started:
                return opening.again(folder.path, **here)
            return opening.new(config, partition=shared.partition(config), **here)

        try:
            side_by_side.run_groups(
                [job.config for job in todo],
                open_one,
                tell,
                lambda n, outcome: end(todo[n], "resumed" if todo[n].name in begun else "run", outcome),
            )
        except (runs.Interrupted, runs.Terminated) as stop:
            stop.advice = "start the sweep again to go on"
            raise
        except NotWritten as error:
            raise NotWritten(error.field, error.value, error.why, AGAIN) from error
    return found


def _run_elsewhere(sweep: Sweep, tell: Callable[[str], None], launcher: Launcher) -> _Found:
    """Has a launcher run what is not finished. JAX does not start here before the tasks have ended.

    It would take an accelerator's memory, which tasks on the same machine need.
    """
    found = _Found()
    heads = {job.name: f"[{n}/{len(sweep.jobs)}] {job.name}" for n, job in enumerate(sweep.jobs, 1)}
    waiting = {job.name: job for job in sweep.jobs}

    def end(name: str, how: str, why: str | None = None) -> None:
        job = waiting.pop(name)
        place = Folder(str(job.config.output.dir))
        if why is None and place.finished:
            found.done[name] = runs.load(place.path)
            tell(f"{heads[name]}: {how}{_told(sweep, found.done[name])}")
        else:
            found.failures[name] = why or "it is not finished, and its task does not say why"
            tell(f"{heads[name]}: FAILED: {found.failures[name]}")

    for job in sweep.jobs:
        place = Folder(str(job.config.output.dir))
        if place.finished and not runs.differing(place.path, job.config):
            end(job.name, "finished before")
    names = list(waiting)
    batches = [names[start : start + launcher.runs] for start in range(0, len(names), launcher.runs)]
    plain = [[_plain(waiting[name], sweep.out) for name in batch] for batch in batches]
    results = launcher.launch(run_batch, plain, sweep.out, tell) if batches else iter(())
    for number, ended in results:
        for name in batches[number]:
            if isinstance(ended, str):  # the task was lost, perhaps after some of its runs
                finished = Folder(str(waiting[name].config.output.dir)).finished
                end(name, "run", None if finished else ended)
            else:
                end(name, *ended.get(name, ("run", "its task did not come to it")))
    found.left = list(waiting)
    return found


def _plain(job: Job, out: Path) -> dict[str, Any]:
    """A run for a task: what can be read without the user's own modules."""
    return {"name": job.name, "out": str(out), "config": config_lib.to_dict(job.config)}


def run_batch(batch: Batch) -> Ended:
    """What a launcher's task does: one run after another. -> run's name: (what was done, why it failed).

    Args:
      batch: `name`, `out` (the sweep's folder) and `config` of each run.

    Raises:
      Interrupted, Terminated: on SIGINT and SIGTERM, after a checkpoint.
    """
    ended: Ended = {}
    shared = Shared()
    with compile_cache(Path(batch[0]["out"]) / "compiled"):
        for wanted in batch:
            name = wanted["name"]
            try:
                config = config_lib.from_dict(wanted["config"])
                with progress.part_of(name):
                    how, _ = _one(Job("", (), "", config.seed, config), shared, mine=True)
                ended[name] = how, None
            except Exception as error:
                ended[name] = "run", _in_one_line(error)
            print(f"{name}: {': FAILED: '.join(filter(None, ended[name]))}", flush=True)
    return ended


def _in_one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _told(sweep: Sweep, result: runs.Run) -> str:
    values = result.metrics.series(sweep.metric)[1]
    told = f", {sweep.metric} {values[-1]:.4f}" if len(values) else ""
    return f"{told}, {result.seconds:.1f} s"


def _check_alone(launcher: Any, part: tuple[int, int]) -> None:
    """Raises UserError where a launcher is asked for together with another way to divide the sweep."""
    if part != (1, 1):
        why = "a launcher starts all parts"
        raise UserError("part", f"{part[0]}/{part[1]}", why, "Leave out one of them.")
    if jax.distributed.is_initialized():
        why = "a launcher starts processes itself, and this is one of several"
        raise UserError("launcher", launcher, why, "Leave --join out.")


def _as_it_is(place: Folder) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Inside what this gives, a sweep that is refused leaves its folder as it is now.

    A folder is left alone in which something else has come to lie.
    """
    made, file = missing(place.path), place.path / "sweep.json"
    before = file.read_text() if file.is_file() else None

    def put_back() -> None:
        if before is not None:
            place.write(file.name, before)
        elif {entry.name for entry in place.path.iterdir()} == {file.name}:
            file.unlink()
            remove_empty(made)

    @contextlib.contextmanager
    def kept() -> Iterator[None]:
        try:
            yield
        except UserError:
            if jax.process_count() == 1:
                with contextlib.suppress(OSError):
                    put_back()
            raise

    return kept


def _check_writable(place: Folder) -> None:
    """Raises UserError if a sweep's folder cannot be written."""
    try:
        place.path.mkdir(parents=True, exist_ok=True)
        place.write("sweep.json", "{}\n")
    except OSError as error:
        raise UserError(
            "sweep.out", str(place.path), f"it cannot be written: {error.strerror}", "Choose another."
        ) from None


def _warn_edited(sweep: Sweep) -> None:
    """Warns of own modules that were edited since runs were finished, which are not run again."""
    made: dict[str, list[str]] = {}
    for job in sweep.jobs:
        place = Folder(str(job.config.output.dir))
        about = own_code.told_by(place.path) if place.started else {}
        if "own" in about and place.finished:
            for module in own_code.edited(about):
                made.setdefault(module, []).append(job.name)
    for module, names in made.items():
        which = "1 finished run" if len(names) == 1 else f"{len(names)} finished runs"
        warnings.warn(
            f"the module {module} is not what it was for {which}: {own_code.in_short(names)}. They are not "
            "run again. To have all runs of one version, choose another out, or remove the folders of these "
            "runs",
            stacklevel=3,
        )


def _warn_other_data(sweep: Sweep, shared: "Shared") -> None:
    """Warns of finished runs that had other data than those which were loaded for the runs to come."""
    finished: dict[str, list[tuple[str, Any]]] = {}
    for job in sweep.jobs:
        place = Folder(str(job.config.output.dir))
        if shared.has(job.config) and hosts.on_first(lambda place=place: place.started and place.finished):
            known = hosts.on_first(lambda place=place: own_code.told_by(place.path))
            finished.setdefault(repr(job.config.data), []).append((job.name, known))
    configs = {repr(job.config.data): job.config for job in sweep.jobs}
    for key, known in finished.items() if hosts.first() else ():
        source = configs[key].data.source
        names = same_data.changed(shared.dataset(configs[key]), known)
        if names:
            which = "1 finished run had" if len(names) == 1 else f"{len(names)} finished runs had"
            warnings.warn(
                f"{which} other data than {source} gives now: {own_code.in_short(names)}. They are not "
                "run again, and the table neither ranks nor pairs runs of both. To have all runs on the "
                "same data, put the data back as they were, or remove the folders of these runs, and start "
                "again",
                stacklevel=4,
            )


class Shared:
    """Data sets and partitions that several runs of a study have in common."""

    def __init__(self, given: data.Samples | None = None):
        """`given` takes the place of all data sets."""
        self._given = given
        self._datasets: dict[Any, data.Samples] = {}
        self._partitions: dict[Any, data.Partition] = {}

    def has(self, config: RunConfig) -> bool:
        """Whether what a run trains on has been loaded."""
        return repr(config.data) in self._datasets

    def dataset(self, config: RunConfig) -> data.Samples:
        """What a run trains on."""
        if self._given is not None:
            return self._given
        key = repr(config.data)
        if key not in self._datasets:
            self._datasets[key] = config.data.load()
        return self._datasets[key]

    def partition(self, config: RunConfig) -> data.Partition:
        """Who holds which samples of it."""
        key = (repr(config.data), config.partition, config.seed, config.initial)
        if key not in self._partitions:
            self._partitions[key] = data.partition(
                self.dataset(config), config.partition, config.seed, config.initial.put_aside
            )
        return self._partitions[key]


def _check_metric(sweep: Sweep, dataset: data.Samples) -> None:
    """Raises UserError where the table is to show accuracy, as by default, and the task has none."""
    names = [metric.name for metric in dataset.task.metrics]
    if sweep.metric == "accuracy" and "accuracy" not in names:
        why = f"the task {dataset.task.name} of {dataset.name} has none"
        raise UserError("sweep.metric", sweep.metric, why, f"Write metric: {names[0]}, say.")


def _check(sweep: Sweep, shared: Shared) -> None:
    """Raises UserError for the first run that has not begun and cannot."""
    for job in sweep.jobs:
        if hosts.on_first(lambda job=job: Folder(str(job.config.output.dir)).started):
            continue
        try:
            dataset = shared.dataset(job.config)
            _check_metric(sweep, dataset)
            runs.validate(job.config, dataset, shared.partition(job.config))
        except UserError as error:
            raise UserError(f"{job.name}: {error.field}", error.value, error.why, error.fix) from None


def _one(job: Job, shared: Shared, *, mine: bool) -> tuple[str, runs.Run | None]:
    """Runs, resumes or loads. -> (what was done, the run; None if it is another part's and not finished)."""
    folder = Folder(str(job.config.output.dir))
    started = hosts.on_first(lambda: folder.started)
    if started:
        _check_same_settings(job, folder)
        if hosts.on_first(lambda: folder.finished):
            return "finished before", runs.load(folder.path)
    if not mine:
        return "another part's", None
    if started:
        return "resumed", runs.resume(folder.path)
    # Not as `dataset=`: the run can load it again by itself, and resume must not ask for it.
    return "run", runs.run_prepared(job.config, shared.dataset(job.config), shared.partition(job.config))


def _check_settings(sweep: Sweep) -> None:
    """Raises UserError where folders of the sweep hold runs of other settings. Nothing has been written."""
    found: list[tuple[Job, Folder, tuple[str, ...]]] = []
    for job in sweep.jobs:
        folder = Folder(str(job.config.output.dir))
        with contextlib.suppress(UserError):  # it cannot be read: one of the failures
            if folder.started and (differing := runs.differing(folder.path, job.config)):
                found.append((job, folder, differing))
    if not found:
        return
    job, folder, differing = found[0]
    if len(found) == 1:
        which = f"it holds a run of other settings: {job.name}: "
    else:
        which = f"it holds {len(found)} runs of other settings, the first of them {job.name}: "
    raise UserError("sweep.out", str(sweep.out), which + _in_short(differing), _way_out(found))


def _way_out(found: list[tuple[Job, Folder, tuple[str, ...]]]) -> str:
    """What to do about runs of other settings."""
    job, folder, _ = found[0]
    only_rounds = all(len(one) == 1 and one[0].startswith("rounds is ") for *_, one in found)
    unpacked = "" if folder.packed is None else "unpack the study (--unpack), "
    whose = "its folder" if len(found) == 1 else "the folders of these runs"
    other = f"{unpacked}remove {whose}, or choose another out."
    if only_rounds:
        had = runs.load(folder.path).config.rounds
        if job.config.rounds < had:
            earlier = f"rounds_of_interest: [{job.config.rounds}] gives the table up to that round"
            return f"Put rounds back to {had}; {earlier}. Or {other}"
        where = runs.portable(job.config).output.dir
        each = "it" if len(found) == 1 else "each of them"
        again = f"fedjax-sim resume {shlex.quote(str(where))} --rounds {job.config.rounds}"
        if unpacked:
            again = f"unpack the study (--unpack), then {again}"
        return f"To extend {each}: {again}. Then start the sweep again. Or {other}"
    return f"Put the settings back, or {other}"


def _in_short(differing: tuple[str, ...]) -> str:
    more = f"; and {len(differing) - 3} more" if len(differing) > 3 else ""
    return "; ".join(differing[:3]) + more


def _check_same_settings(job: Job, folder: Folder) -> None:
    """Raises UserError where the folder holds a run of other settings: since the sweep began, another's."""
    if not folder.started or not (differing := runs.differing(folder.path, job.config)):
        return
    packed = folder.packed
    way = "Remove it" if packed is None else "Unpack the study (--unpack) and remove the run's folder"
    raise UserError(
        "sweep.out",
        str(folder.path if packed is None else packed.pack.about),
        f"it holds a run of other settings: {_in_short(differing)}",
        f"{way}, or choose another out.",
    )


_CACHE = "jax_compilation_cache_dir"


@contextlib.contextmanager
def compile_cache(folder: Path) -> Iterator[None]:
    """Keeps compiled programs meanwhile, unless the user has JAX keep them somewhere already.

    Args:
      folder: JAX's own cache on accelerators; programs of CPUs are kept for all sweeps and runs
        (`fedjax_sim.runs.kept_programs`).
    """
    if getattr(jax.config, _CACHE):
        yield
        return
    hosts.check_backend()
    if jax.default_backend() == "cpu":
        with kept():
            yield
        return
    from jax.experimental.compilation_cache import compilation_cache

    settings = {
        _CACHE: str(folder / provenance.machine()),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def _write(place: Folder, outcome: Outcome, seconds: float) -> None:
    sweep, table = outcome.sweep, outcome.comparison
    cpu = [seconds for seconds in outcome.cpu_seconds.values() if seconds is not None]
    if table is not None:
        tables.write(place, table)
    about = {
        "jobs": [
            {
                "method": job.method,
                "setting": dict(job.setting),
                "seed": job.seed,
                "folder": str(Path(str(job.config.output.dir)).relative_to(sweep.out)),
                "seconds": outcome.seconds.get(job.name),
                "cpu_seconds": outcome.cpu_seconds.get(job.name),
                "failure": outcome.failures.get(job.name),
                "config": config_lib.to_dict(runs.portable(job.config)),
            }
            for job in sweep.jobs
        ],
        "metric": sweep.metric,
        "goal": sweep.goal,
        "last_k": sweep.last_k,
        "reference": sweep.reference,
        "table": None if table is None else table.records(),
        "seconds_of_rounds": sum(outcome.seconds.values()),
        "cpu_seconds_of_rounds": sum(cpu) if len(cpu) == len(outcome.cpu_seconds) else None,
        "seconds_of_this_start": seconds,
        "programs_of_this_start": outcome.programs and dataclasses.asdict(outcome.programs),
        "versions": provenance.describe_versions(),
        "hardware": provenance.hardware(),
    }
    place.write("sweep.json", json.dumps(about, indent=2) + "\n")
