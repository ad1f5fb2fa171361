"""Searches of settings: successive halving over runs side by side, with Optuna's samplers and its study.

    found = fs.tune(config, {"local.lr": fs.log_uniform(1e-3, 1.0)}, runs=27, rungs=3, out="runs/search")

All trials are proposed before the first of them runs, and come side by side to the end of the first rung: a
round that is evaluated. The best of them, one in `factor`, go on to the end of the second, and so on; what
goes on after the last comparison does all `config.rounds`. Every trial has `config.rounds` from the start, so
that schedules, cohorts and methods go by them: a trial that goes on is the run that it would have been alone.
This is synchronous successive halving (K. Jamieson and A. Talwalkar, Non-stochastic Best Arm Identification
and Hyperparameter Optimization, AISTATS 2016; https://arxiv.org/abs/1502.07943), the inner loop of Hyperband
(L. Li et al., JMLR 18(185), 2018; https://arxiv.org/abs/1603.06560): rung i has ⌊n / factor^i⌋ of n trials.

OUR CHOICE: trials are spread by a scrambled Sobol sequence. A sampler that learns from what is known by then
(TPE) has nothing to learn from when all are proposed at once; it would draw at random, with gaps.

In the search's folder:

    search.json     what is searched, and the parameters of all trials: written before the first of them runs
    study.db        the same as an Optuna study, with values, for its dashboard and its analyses
    runs/trialN/    each run's own folder (trialN/seedS where a trial has several)
    compiled/       compiled programs
    table.md, table.csv, search.png, best.yaml

A search that was cut is started again by the same call. Proposals are read from search.json, values from the
runs' folders, so that it comes to what it would have come to uncut.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from fedjax_sim import config as config_lib
from fedjax_sim import data, runs
from fedjax_sim.config import RunConfig, check_given
from fedjax_sim.config.search_files import Search
from fedjax_sim.config.search_files import read_search as load
from fedjax_sim.config.spaces import Space
from fedjax_sim.core.errors import NotWritten, UserError
from fedjax_sim.core.fields import nearest
from fedjax_sim.data import Samples
from fedjax_sim.engine.simulation import NonFiniteServer, NonFiniteUpdate
from fedjax_sim.records import goal_of
from fedjax_sim.reports.shared import comma_separated
from fedjax_sim.runs import opening, progress
from fedjax_sim.runs.describe import with_given
from fedjax_sim.runs.folder import Folder, Stopped
from fedjax_sim.runs.result import known
from fedjax_sim.runs.together import run_groups
from fedjax_sim.studies import sweep
from fedjax_sim.studies.found import Found, Trial, ranked, said

__all__ = ["Found", "Search", "Trial", "load", "run", "tune"]

Tell = Callable[[str], None]

_AGAIN = "start the search again: it goes on where it stopped"


def tune(
    config: RunConfig | str | Path,
    space: Mapping[str, Space],
    *,
    runs: int = 27,
    rungs: int = 3,
    factor: int = 3,
    metric: str | None = None,
    goal: str | None = None,
    sampler: Any = None,
    seeds: int = 1,
    out: str | Path | None = None,
    dataset: Samples | None = None,
    tell: Tell = lambda line: None,
) -> Found:
    """Searches settings by successive halving, over runs that go side by side where they can.

    Args:
      config: what all trials have in common, or the path of its YAML file.
      space: where to look, by dotted field: `fs.uniform`, `fs.log_uniform`, `fs.integers`, `fs.choice`.
      runs: trials, n; at least `factor ** (rungs - 1)`.
      rungs: how often trials are compared, the last time after all rounds.
      factor: ⌊n / factor⌋ trials go on from the first rung, and so on; the last but i ends after a part
        1 / factor^i of the rounds, rounded up to an evaluated one.
      metric: what they are compared by; None: the task's headline.
      goal: `max` or `min`; None: the task's for its own metrics, by the name for others.
      sampler: what proposes them: one of Optuna's (`optuna.samplers.TPESampler(seed=0)`), or `qmc`, `random`
        or `tpe`, of the configuration's seed. None: `qmc`. It is asked for all before the first one runs.
      seeds: runs of each trial, of the configuration's seed and those after it. Its value is their mean.
      out: folder of the search. One that was cut goes on. None: nothing is kept but what is returned.
      dataset: takes the place of what the configurations name.
      tell: is given a line for each rung, and of what goes side by side.

    Raises:
      UserError: a setting that cannot work, before anything is compiled; Optuna is not installed; `out` holds
        another search; or all trials diverge.
      NotWritten: the disk is full, or fails; a later start continues.
      Interrupted, Terminated: on SIGINT and SIGTERM, after a checkpoint of each; likewise.
    """
    base = config_lib.as_config(config)
    name = sampler if isinstance(sampler, str) else "qmc"
    asked = Search(
        base, space, runs, rungs, factor, metric, goal, name, seeds, None if out is None else Path(out)
    )
    return run(asked, tell, dataset=dataset, sampler=None if isinstance(sampler, str) else sampler)


def run(
    search: Search, tell: Tell = lambda line: None, *, dataset: Samples | None = None, sampler: Any = None
) -> Found:
    """Runs what is not done of a search; see `tune`.

    Args:
      search: what is searched.
      tell: see `tune`.
      dataset: likewise.
      sampler: one of Optuna's; takes the place of the one that `search` names.

    Raises:
      UserError, NotWritten, Interrupted, Terminated: see `tune`.
    """
    if importlib.util.find_spec("optuna") is None:
        fix = "Install it: pip install optuna, or in the clone pip install '.[tune]'."
        raise UserError("tune", "optuna", "this package is not installed", fix)
    if jax.process_count() > 1:
        why = "several processes share each run, and trials go side by side in one"
        raise UserError("tune", jax.process_count(), why, "Start it in one process.")
    config = with_given(search.config, data.as_dataset(dataset))
    check_given(config, dataset=dataset)
    for name, told in config.given.items():
        if name != "dataset":
            why = "trials go on from their folders, which cannot hold it"
            raise UserError(name, told, why, "Name it in a module of your own (module:Class).")
    search = dataclasses.replace(search, config=config)
    if search.out is not None:
        return _Halving(search, Folder(search.out), tell, dataset, sampler).run()
    with tempfile.TemporaryDirectory() as folder:
        found = _Halving(search, Folder(folder), tell, dataset, sampler).run()
        # What a loaded run would read when it is asked for.
        kept = {"_model": functools.partial(known, found.run.variables)}
        kept["_partition"] = functools.partial(known, found.run.partition)
        return dataclasses.replace(found, run=dataclasses.replace(found.run, folder=None, **kept))


@dataclasses.dataclass
class _Trial:
    """A trial under way.

    Attributes:
      number: from 0.
      parameters: by dotted field.
      configs: of its runs.
      values: at the rungs that it came to.
      failure: why it can go no further; "" if it can.
      stopped: why it goes no further, though it could.
    """

    number: int
    parameters: Mapping[str, Any]
    configs: list[RunConfig]
    values: list[float] = dataclasses.field(default_factory=list)
    failure: str = ""
    stopped: str = ""

    @property
    def folders(self) -> list[Folder]:
        return [Folder(str(config.output.dir)) for config in self.configs]

    @property
    def state(self) -> str:
        return "failed" if self.failure else "stopped" if self.stopped else "complete"

    def done(self, kept: bool) -> Trial:
        """As a result."""
        folders = tuple(folder.path for folder in self.folders) if kept else ()
        why = self.failure or self.stopped
        return Trial(self.number, self.parameters, tuple(self.values), self.state, why, folders)

    def __str__(self):
        told = ", ".join(f"{field} {said(value)}" for field, value in self.parameters.items())
        return f"trial {self.number} ({told})"


class _Halving:
    """A search under way."""

    def __init__(self, search: Search, place: Folder, tell: Tell, dataset: Samples | None, sampler: Any):
        self._search, self._place, self._tell, self._sampler = search, place, tell, sampler
        self._shared = sweep.Shared(data.as_dataset(dataset))

    def run(self) -> Found:
        """Brings it to its end."""
        search, place = self._search, self._place
        task = self._shared.dataset(search.config).task
        goals = {metric.name: metric.goal for metric in task.metrics}
        self._metric = search.metric or task.headline.name
        self._goal = search.goal or goals.get(self._metric) or goal_of(self._metric)
        self._make_folder()
        with place.claimed(), place.writing("out", _AGAIN), sweep.compile_cache(place.path / "compiled"):
            self._trials = self._begun()
            self._check()
            study = self._study = _Study(search, place.path, self._trials, self._goal)
            try:
                for number in range(search.rungs):
                    self._rung(number)
            finally:
                study.close()
            found = self._found()
            if search.out is not None:
                self._write(found)
            return found

    def _make_folder(self) -> None:
        path = self._place.path
        try:
            path.mkdir(parents=True, exist_ok=True)
            (path / ".lock").touch()
        except OSError as error:
            why = f"it cannot be written: {error.strerror}"
            raise UserError("out", str(path), why, "Choose another folder.") from None

    def _begun(self) -> list[_Trial]:
        """The trials: those of the folder, or new ones, which are written there."""
        search, file = self._search, self._place.path / "search.json"
        about = _described(search, self._metric, self._goal, self._sampler)
        if file.is_file():
            told = json.loads(file.read_text())
            if changed := _changes(told["search"], about):
                why = f"it holds another search: {'; '.join(changed[:3])}"
                raise UserError("out", str(self._place.path), why, "Choose another folder, or remove it.")
            proposed = told["trials"]
        else:
            if others := sorted(path.name for path in self._place.path.iterdir() if path.name != ".lock"):
                why = f"the folder is not empty (it has {others[0]}) and holds no search"
                raise UserError("out", str(self._place.path), why, "Choose a new folder.")
            proposed = _proposed(search, self._sampler)
            self._configs(proposed)  # which may refuse one
            self._place.write(
                "search.json", json.dumps({"search": about, "trials": proposed}, indent=2) + "\n"
            )
        configs = self._configs(proposed)
        return [_Trial(n, *of) for n, of in enumerate(zip(proposed, configs, strict=True))]

    def _configs(self, proposed: list[dict[str, Any]]) -> list[list[RunConfig]]:
        """Of each trial, those of its runs."""
        search, made = self._search, []
        for number, parameters in enumerate(proposed):
            config, several = search.trial(parameters), search.seeds > 1
            made.append([])
            for seed in range(config.seed, config.seed + search.seeds):
                where = self._place.path / "runs" / f"trial{number}" / (f"seed{seed}" if several else "")
                output = dataclasses.replace(config.output, dir=str(where), figures=False)
                made[-1].append(dataclasses.replace(config, seed=seed, output=output))
        return made

    def _check(self) -> None:
        """Raises UserError for the first run that has not begun and cannot, or whose folder has another."""
        for trial in self._trials:
            for config, folder in zip(trial.configs, trial.folders, strict=True):
                try:
                    if not folder.started:
                        runs.validate(config, self._shared.dataset(config), self._shared.partition(config))
                    elif changed := runs.differing(folder.path, config):
                        why = f"its folder holds a run of other settings: {'; '.join(changed[:3])}"
                        raise UserError("out", str(folder.path), why, "Remove it.")
                except UserError as error:
                    raise UserError(f"{trial}: {error.field}", error.value, error.why, error.fix) from None

    # --- a rung -------------------------------------------------------------------------------------------

    def _rung(self, number: int) -> None:
        """Brings all that are left to the end of a rung, and says which of them go on."""
        search = self._search
        end, last = search.rounds[number], number == search.rungs - 1
        here = [trial for trial in self._trials if trial.state == "complete"]
        self._reach(here, end, f"rung {number + 1}")
        for trial in here:
            self._value(trial, end)
        sound = [trial for trial in here if not trial.failure]
        order = [one.number for one in ranked([trial.done(False) for trial in sound], self._goal)]
        most = len(order) if last else search.kept[number + 1]
        for place, which in enumerate(order[most:], most + 1):
            told = f"place {place} of {len(order)} by {self._metric}, and {most} go on"
            self._trials[which].stopped = told
        for trial in here:
            if trial.state != "complete":
                self._end(trial, end)
        self._study.write(here, end, last)
        told = "1 trial" if len(here) == 1 else f"{len(here)} trials"
        head = f"rung {number + 1} of {search.rungs}: {told} to round {end}"
        failed = f", {len(here) - len(order)} diverged" if len(order) < len(here) else ""
        if not order:
            failures = [trial for trial in here if trial.failure]
            first = f"{failures[0]}: {failures[0].failure}"
            why = f"no trial is left: all {len(here)} that came here diverged; {first}"
            raise UserError("space", f"rung {number + 1}", why, "Look elsewhere: at lower rates, say.")
        best = self._trials[order[0]]
        goes_on = "" if last else f"; {min(most, len(order))} go on"
        self._tell(f"{head}{failed}, best {self._metric} {best.values[-1]:.4f} of {best}{goes_on}")

    def _reach(self, trials: list[_Trial], end: int, head: str) -> None:
        """Runs those that have not come to a round, until then."""
        known = self._study.failures()
        todo = []
        for trial in trials:
            behind = [
                config
                for config, folder in zip(trial.configs, trial.folders, strict=True)
                if not _reached(folder, end)
            ]
            if behind and trial.number in known:
                trial.failure = known[trial.number]
            else:
                todo += [(trial, config) for config in behind]
        wrong: list[Exception] = []

        def ended(number: int, outcome: runs.Run | Exception) -> None:
            if isinstance(outcome, NonFiniteUpdate | NonFiniteServer):
                trial = todo[number][0]
                trial.failure = trial.failure or " ".join(str(outcome).split())
            elif isinstance(outcome, Exception):
                wrong.append(outcome)

        def open_one(number: int, mesh: Any, store: Any) -> Any:
            config = todo[number][1]
            folder = Folder(str(config.output.dir))
            here: Any = {"dataset": self._shared.dataset(config), "mesh": mesh, "store": store}
            if folder.started:
                return opening.again(folder.path, **here)
            return opening.new(config, partition=self._shared.partition(config), **here)

        try:
            with progress.part_of(head):
                run_groups([config for _, config in todo], open_one, self._tell, ended, end)
        except (runs.Interrupted, runs.Terminated) as stop:
            stop.advice = _AGAIN
            raise
        except NotWritten as error:
            raise NotWritten(error.field, error.value, error.why, f"Make room, then {_AGAIN}.") from error
        if wrong:
            raise wrong[0]

    def _value(self, trial: _Trial, end: int) -> None:
        """Reads what a trial's runs recorded at the end of a rung."""
        if trial.failure:
            return
        values = []
        for folder in trial.folders:
            stopped = folder.stopped
            at = end if stopped is None else min(end, stopped.round)
            # Not `runs.load`, which reads YAML: slow for hundreds of runs.
            table, _ = folder.records.read(self._search.config.rounds)
            rounds, series = table.series(self._metric)
            if len(own := series[rounds == at]):
                values.append(float(own[-1]))
            elif at in table.series(f"nonfinite/{self._metric}")[0]:
                trial.failure = f"its {self._metric} is not finite in round {at}"
                return
            else:
                names = table.names()
                why = f"round {at} of {trial} has not recorded it"
                raise UserError("metric", self._metric, why, nearest(self._metric, names))
        trial.values.append(math.fsum(values) / len(values))

    def _end(self, trial: _Trial, end: int) -> None:
        """Writes into the folders of a trial why it ends here: its runs are finished then."""
        for folder in trial.folders:
            if end < self._search.config.rounds and _reached(folder, end) and folder.stopped is None:
                folder.write_stopped(Stopped(end, "fs.tune", trial.stopped or trial.failure))

    # --- what comes of it ---------------------------------------------------------------------------------

    def _found(self) -> Found:
        search = self._search
        trials = tuple(trial.done(search.out is not None) for trial in self._trials)
        best = ranked([trial for trial in trials if trial.state == "complete"], self._goal)[0]
        folder = self._trials[best.number].folders[0]
        config = folder.records.config()
        dataset = self._shared.dataset(config) if "dataset" in config.given else None
        result = runs.load(folder.path, dataset=dataset)
        return Found(search, trials, self._metric, self._goal, result, self._study.read())

    def _write(self, found: Found) -> None:
        place, rows = self._place, found.records()
        for row, trial in zip(rows, found.trials, strict=True):  # the table may be moved with its folder
            row["folder"] = ", ".join(str(folder.relative_to(place.path)) for folder in trial.folders)
        place.write("table.md", found.markdown() + "\n")
        place.write("table.csv", comma_separated(list(rows[0]), [list(row.values()) for row in rows]))
        place.write("best.yaml", config_lib.dump(found.best))
        if found.search.config.output.figures:
            from fedjax_sim.records import plots  # Matplotlib loads when something is drawn

            plots.save(found.plot(), place.path / "search.png")


def _reached(folder: Folder, end: int) -> bool:
    """Whether a run has come to a round, or has ended before: its table, written last, says so."""
    return folder.started and (folder.records.reached() >= end or folder.finished)


def _described(search: Search, metric: str, goal: str, sampler: Any) -> dict[str, Any]:
    """What makes two searches the same."""
    # Where it lies, and how it is laid out, has no influence on what is found.
    unset = RunConfig()
    config = dataclasses.replace(search.config, output=unset.output, execution=unset.execution)
    about = {
        "config": config_lib.to_dict(config),
        "space": {field: space.to_dict() for field, space in search.space.items()},
        "sampler": search.sampler if sampler is None else type(sampler).__name__,
        "metric": metric,
        "goal": goal,
    }
    about |= {name: getattr(search, name) for name in ("runs", "rungs", "factor", "seeds")}
    return json.loads(json.dumps(about))


def _changes(before: Mapping[str, Any], now: Mapping[str, Any], path: str = "") -> list[str]:
    """What two descriptions differ in, in words."""
    found = []
    for name in {**before, **now}:
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += _changes(old, new, f"{path}{name}.")
        elif old != new:
            found.append(f"{path}{name} was {old!r} and is {new!r}")
    return found


# --- Optuna -----------------------------------------------------------------------------------------------


def _sampler_of(search: Search) -> Any:
    import optuna  # of an extra
    from optuna import samplers

    seed = search.config.seed
    if search.sampler == "qmc":
        with warnings.catch_warnings(category=optuna.exceptions.ExperimentalWarning, action="ignore"):
            return samplers.QMCSampler(seed=seed, scramble=True, warn_independent_sampling=False)
    return {"random": samplers.RandomSampler, "tpe": samplers.TPESampler}[search.sampler](seed=seed)


def _proposed(search: Search, sampler: Any) -> list[dict[str, Any]]:
    """The parameters of all trials, no two alike.

    Raises:
      UserError: there are not as many.
    """
    import optuna  # of an extra

    sampler = _sampler_of(search) if sampler is None else sampler
    if not isinstance(sampler, optuna.samplers.BaseSampler):
        fix = "Give one, such as optuna.samplers.RandomSampler(seed=0), or its name: qmc, random, tpe."
        raise UserError("sampler", sampler, "it is none of Optuna's samplers", fix)
    distributions = {field: space.distribution() for field, space in search.space.items()}
    found: dict[str, dict[str, Any]] = {}
    with _quiet():
        study = optuna.create_study(sampler=sampler)
        for _ in range(100 + 20 * search.runs):
            asked = study.ask(distributions).params
            found.setdefault(repr(asked), {field: asked[field] for field in search.space})
            if len(found) == search.runs:
                return list(found.values())
    why = f"the space has no more than {len(found)} settings, as far as the sampler comes"
    raise UserError("runs", search.runs, why, "Ask for fewer, or look further.")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Optuna logs no line of each study and trial meanwhile."""
    from optuna import logging  # of an extra

    before = logging.get_verbosity()
    logging.set_verbosity(logging.WARNING)
    try:
        yield
    finally:
        logging.set_verbosity(before)


class _Study:
    """The search as an Optuna study in its folder. Values come from runs' folders; this is a copy to look at.

    Only failures are read from it: what a run that has diverged left does not say so.
    """

    def __init__(self, search: Search, folder: Path, trials: list[_Trial], goal: str):
        """Opens it, or makes it and puts all trials into it."""
        import optuna  # of an extra

        self._storage: Any = None
        if search.out is not None:
            self._storage = optuna.storages.RDBStorage(f"sqlite:///{folder / 'study.db'}")
        direction = "maximize" if goal == "max" else "minimize"
        with _quiet():
            self._study = optuna.create_study(
                storage=self._storage, study_name="search", direction=direction, load_if_exists=True
            )
        distributions = {field: space.distribution() for field, space in search.space.items()}
        for trial in trials[len(self._study.get_trials(deepcopy=False)) :]:
            state = optuna.trial.TrialState.RUNNING
            made = optuna.trial.create_trial(
                state=state, params=dict(trial.parameters), distributions=distributions
            )
            self._study.add_trial(made)

    def failures(self) -> dict[int, str]:
        """Number -> why, of the trials that have diverged."""
        every = self._study.get_trials(deepcopy=False)
        return {one.number: one.user_attrs["why"] for one in every if one.state.name == "FAIL"}

    def write(self, trials: list[_Trial], end: int, last: bool) -> None:
        """Writes down what became of trials at the end of a rung, as far as it is not there."""
        from optuna.trial import Trial, TrialState  # of an extra

        frozen = self._study.get_trials(deepcopy=False)
        with _quiet():
            for trial in trials:
                one = frozen[trial.number]
                if one.state.is_finished():
                    continue
                writer = Trial(self._study, one._trial_id)
                if not trial.failure and end not in one.intermediate_values:
                    writer.report(trial.values[-1], end)
                why = trial.failure or trial.stopped
                if why:
                    writer.set_user_attr("why", why)
                if trial.failure:
                    self._study.tell(trial.number, state=TrialState.FAIL)
                elif trial.stopped:
                    self._study.tell(trial.number, state=TrialState.PRUNED)
                elif last:
                    self._study.tell(trial.number, trial.values[-1])

    def read(self) -> Any:
        """A copy in memory, for whoever looks at the result."""
        import optuna  # of an extra

        with _quiet():
            copy = optuna.create_study(study_name=self._study.study_name, direction=self._study.direction)
        copy.add_trials(self._study.get_trials())
        return copy

    def close(self) -> None:
        """Lets go of the file."""
        if self._storage is not None:
            self._storage.remove_session()
            self._storage.engine.dispose()
