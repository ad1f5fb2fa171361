"""Runs as a user sees them: `run(config)`, `resume(folder)`, `load(folder)`, and the `Run` that they give.

A run's folder:

    config.yaml       every setting
    provenance.json   versions, hardware, source revision, fingerprints of data and partition
    partition.json    who holds which samples
    journal.jsonl     the rows of each round, while it runs
    timing.csv        what each round cost
    tensorboard/      events
    checkpoints/      of the newest rounds
    figures/          curves, clients, partition
    metrics.parquet   the rows, tidy; written last: a run whose last round is in it is finished

Of a finished run config.yaml, provenance.json, metrics.parquet and timing.csv are enough: `load` and sweeps
need no more, in any place. Without checkpoints it has no model; its partition is drawn again when asked for.
"""

import contextlib
import dataclasses
import functools
import json
import os
import signal
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from fedjax_sim import (
    algorithms,
    cohorts,
    data,
    export,
    hosts,
    imports,
    initial,
    memory,
    models,
    plots,
    provenance,
    records,
)
from fedjax_sim import config as config_lib
from fedjax_sim.checkpoint import Checkpoints
from fedjax_sim.config import RunConfig
from fedjax_sim.data import Dataset, Partition
from fedjax_sim.errors import UserError
from fedjax_sim.folders import Folder
from fedjax_sim.models.base import Model
from fedjax_sim.progress import Bar, Clock, signals
from fedjax_sim.records import Journal, Lap, Table
from fedjax_sim.simulation import Setup, Simulation, prepare
from fedjax_sim.tensorboard import Events


class Interrupted(KeyboardInterrupt):
    """The user asked for an end (Ctrl-C): the round under way was finished and a checkpoint written.

    Attributes:
      run: what there is so far.
      advice: how to go on, where that is not to resume this run.
    """

    advice: str | None = None

    def __init__(self, run: "Run"):
        super().__init__()
        self.run = run

    def __reduce__(self):
        return type(self), (self.run,)

    def __str__(self):
        return f"interrupted after round {self.run.rounds}; {self.advice or _way_on(self.run.folder)}"


class Terminated(SystemExit):
    """The process was asked to end (SIGTERM): the same; uncaught, it exits with status 143.

    Attributes:
      run: what there is so far.
      advice: how to go on, where that is not to resume this run.
    """

    advice: str | None = None

    def __init__(self, run: "Run"):
        super().__init__(128 + signal.SIGTERM)
        self.run = run

    def __reduce__(self):
        return type(self), (self.run,)

    def __str__(self):
        return f"terminated after round {self.run.rounds}; {self.advice or _way_on(self.run.folder)}"


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A run, finished or not. It can be pickled, and so come from a process pool.

    Attributes:
      config: what it is.
      folder: where it is; None if nothing was written.
      metrics: its rows.
      recipe: its partition in short: `clients`, and as far as they are known `kind`, `alpha`, `dataset` and a
        checksum.
      seconds: wall-clock time of all its rounds, compilation included, over all its starts.
      cpu_seconds: CPU time of the process in them, all threads; None if not all rounds recorded it.
      rounds: how many are done.
    """

    config: RunConfig
    folder: Path | None
    metrics: Table
    recipe: Mapping[str, Any]
    seconds: float
    cpu_seconds: float | None
    rounds: int
    _partition: Callable[[], Partition] = dataclasses.field(repr=False)
    _model: Callable[[], Any] = dataclasses.field(repr=False)

    @property
    def finished(self) -> bool:
        """Whether all rounds are done."""
        return self.rounds >= self.config.rounds

    @functools.cached_property
    def partition(self) -> Partition:
        """Who holds which samples; of a loaded run without partition.json it is drawn again from the data."""
        return self._partition()

    @functools.cached_property
    def variables(self) -> Any:
        """The deployed model, NumPy leaves; of a loaded run it is read from the newest checkpoint.

        The data set need not be there, nor what Python gave; for checkpoints of 0.1.0 both have to be.
        """
        return self._model()

    @property
    def title(self) -> str:
        """One line: method, data, partition."""
        return title_of(self.config, self.recipe)

    def plot(self, *names: str) -> Figure:
        """Learning curves, a Matplotlib figure; `names` chooses metrics."""
        return plots.run_curves(self.metrics, self.title, names or None)

    def export(self, path: str | Path) -> Path:
        """Writes the deployed model's weights into one file, see `fedjax_sim.export`. -> its path.

        Args:
          path: ends in `.npz`, or in `.safetensors`, for which that package has to be installed.

        Raises:
          UserError: it ends otherwise, cannot be written, or the run has no model.
        """
        export.check(path)
        return export.write(self.variables, path)

    def __repr__(self):
        state = "finished" if self.finished else f"{self.rounds} of {self.config.rounds} rounds"
        known = self.metrics.series("accuracy")[1]
        accuracy = f", accuracy {known[-1]:.4f}" if len(known) else ""
        return f"Run({self.title}: {state}{accuracy}, {self.seconds:.1f} s)"


def run(
    config: RunConfig | str | Path,
    *,
    dataset: Dataset | None = None,
    partition: Partition | Sequence[np.ndarray] | Mapping[int, np.ndarray] | None = None,
    model: Any = None,
    algorithm: Any = None,
) -> Run:
    """Runs a configuration to its end.

    Args:
      config: what to run, or the path of its YAML file; with `output.dir` None nothing is written.
      dataset: takes the place of what `config` names, as do the next three. `resume` will want the same
        ones again, but for the partition, which is kept in the folder.
      partition: likewise; or each client's indices into the training images, i64[n_k], in a list or by
        number.
      model: likewise; or what `fedjax_sim.models.adapted` makes one of, such as a Flax linen module.
      algorithm: likewise.

    Raises:
      UserError: a setting that cannot work, before anything is compiled; or an update that is not finite.
      Interrupted, Terminated: on SIGINT and SIGTERM, after a checkpoint.
    """
    config, dataset, partition = (
        config_lib.as_config(config),
        data.as_dataset(dataset),
        data.as_partition(partition),
    )
    config = _saying(config, dataset, partition, model, algorithm)
    return _started(config, dataset=dataset, partition=partition, model=model)


def start(config: RunConfig, dataset: Dataset, partition: Partition) -> Run:
    """`run` with data that `config` describes but that are in memory already; `resume` will load them."""
    return _started(config, dataset=dataset, partition=partition)


def check(config: RunConfig, dataset: Dataset, partition: Partition) -> None:
    """Raises UserError for a run that `start` would refuse, whatever its folder holds."""
    _alike(lambda: prepare(config, dataset=dataset, partition=partition))


def _started(config: RunConfig, **given: Any) -> Run:
    folder = None if config.output.dir is None else Folder(config.output.dir)
    if folder is not None:
        hosts.agreed(folder.check_new)
        hosts.together(folder.check_seen)
    setup = _alike(lambda: prepare(config, **given))
    if folder is None:
        return _drive(Simulation(setup), None)
    with hosts.held(folder.claimed):
        hosts.agreed(folder.check_new)  # again: another start may have come and gone while this one prepared
        # Made first: a mistake that shows only here leaves no half-begun run behind.
        simulation = Simulation(setup)
        with folder.writing():
            hosts.agreed(lambda: _describe(folder, setup))
            return _drive(simulation, folder)


def resume(
    folder: str | Path,
    *,
    rounds: int | None = None,
    dataset: Dataset | None = None,
    model: Model | None = None,
    algorithm: Any = None,
) -> Run:
    """Continues a run that was cut, to the same metrics and the same model, bit for bit.

    A finished run is only loaded, unless more rounds are asked of it: then it goes on, its config.yaml says
    so, and its numbers are those of a run that had as many from the start. Where they would not be, because
    the rounds that are done went by the number of all (a cosine, LIPS's density), it is refused.

    Args:
      folder: of the run.
      rounds: how many it is to have in all; None: those of its config.yaml.
      dataset: what `run` was given, as the next two.
      model: likewise.
      algorithm: likewise.

    Raises:
      UserError: no run is there, its configuration is of another version or not the one that it was started
        with, or the data are not the same; or it cannot get that number of rounds.
    """
    place = Folder(folder)
    given = {"dataset": dataset, "model": model, "algorithm": algorithm}
    config, _ = _resumable(place, given, rounds)
    if not hosts.agreed(lambda: records.reached(place.path) >= config.rounds):
        with hosts.held(place.claimed):
            # Read again: another process may have had the folder in the meantime.
            config, about = _resumable(place, given, rounds)
            if not hosts.agreed(lambda: records.reached(place.path) >= config.rounds):
                provenance.check_jax_settings(about.get("jax", {}))
                began, kept = hosts.agreed(lambda: _before(place, config, about))
                setup = _alike(lambda: _setup(place, config, about, **given, began=began if kept else None))
                simulation = Simulation(setup)
                with place.writing():
                    return _drive(simulation, place, began)
    return load(folder, **given)


def _resumable(
    place: Folder, given: Mapping[str, Any], rounds: int | None
) -> tuple[RunConfig, dict[str, Any]]:
    """What a run says of itself, with that many rounds. Raises UserError if it cannot be resumed so."""

    def read() -> tuple[RunConfig, dict[str, Any]]:
        config, about = _read(place)
        asked = config if rounds is None else dataclasses.replace(config, rounds=rounds)
        _check_unchanged(place, asked, about)
        began = about.get("config", {}).get("rounds", config.rounds)
        if asked.rounds != config.rounds or asked.rounds < began:
            done = records.read(place.path, config.rounds)[1]
            if done >= asked.rounds:
                raise UserError("rounds", asked.rounds, f"the run has done {done}", "Ask for more.")
        return asked, about

    config, about = hosts.together(read)
    for name, value in given.items():
        if name in config.given and value is None:
            raise UserError(
                name,
                config.given[name],
                f"the run in {place.path} was given this {name} from Python",
                f"Give it again: resume(…, {name}=…).",
            )
    return config, about


def load(
    folder: str | Path, *, dataset: Dataset | None = None, model: Model | None = None, algorithm: Any = None
) -> Run:
    """Opens a run's folder to look at it. Nothing is trained; `variables` are read when asked for.

    Raises:
      UserError: no run is there, or its configuration is of another version.
    """
    place = Folder(folder)
    config, about = _read(place)
    table, rounds = records.read(place.path, config.rounds)

    # Not closures: a Run can be pickled, and one that was loaded reads these wherever it is by then.
    partition = functools.partial(_partition, place, config, about, dataset)
    variables = functools.partial(_deployed, place, dataset, model, algorithm)
    seconds, cpu = records.total(records.read_timing(place.path), rounds)
    recipe = _recipe(place, config, about, partition)
    return Run(config, place.path, table, recipe, seconds, cpu, rounds, partition, variables)


def _known(thing: Any) -> Any:
    return thing


def _deployed(place: Folder, dataset: Dataset | None, model: Model | None, algorithm: Any) -> Any:
    """The deployed model of the newest checkpoint: as it lies there by itself, else of the state."""
    config, _ = _read(place)
    checkpoints = Checkpoints(place.checkpoints)
    numbers = checkpoints.rounds()
    if numbers and (numbers[-1] == config.rounds or not place.finished):
        try:
            found = checkpoints.model(numbers[-1])
        except Exception:  # damaged, of which `restored` will say more
            found = None
        if found is not None:
            return found
    given = {"dataset": dataset, "model": model, "algorithm": algorithm}
    return jax.device_get(restored(place.path, **given).variables)


def restored(
    folder: str | Path, *, dataset: Dataset | None = None, model: Model | None = None, algorithm: Any = None
) -> Simulation:
    """A run as a simulation at its newest sound checkpoint, to look into. Nothing in its folder is touched.

    Raises:
      UserError: as `resume`; no checkpoint is sound; or the run is finished and its last one is not.
    """
    place = Folder(folder)
    config, about = _read(place)
    checkpoints = Checkpoints(place.checkpoints)
    if checkpoints.rounds():
        simulation = Simulation(_setup(place, config, about, dataset, model, algorithm))
        found = checkpoints.restore(simulation.abstract_state(), mend=False)
        if found is not None and (found[1] == config.rounds or not place.finished):
            simulation.restore(*found)
            return simulation
    fix = "Run its config.yaml again in another folder." if place.finished else "Resume the run."
    which = " of its last round" if place.finished else ""
    raise UserError("folder", str(folder), f"it has no sound checkpoint{which}", fix)


def title_of(config: RunConfig, recipe: Mapping[str, Any]) -> str:
    """One line about a run: method, data, partition (`Run.recipe`)."""
    kind = str(recipe.get("kind", "given partition"))
    if kind.startswith("dirichlet"):
        kind += f"({recipe.get('alpha')})"
    told = {"algorithm": algorithms.label(config.algorithm), "model": config.model.name, **config.given}
    return (
        f"{told['algorithm']}, {told['model']} on {recipe.get('dataset', config.data.source)}, "
        f"{recipe['clients']:,} clients, {kind}, seed {config.seed}"
    )


# --- the loop -----------------------------------------------------------------------------------------


def _drive(simulation: Simulation, folder: Folder | None, began: int | None = None) -> Run:
    """Brings a run to its end, from wherever its folder says that it is; `began`: see `_prolong`."""
    setup = simulation.setup
    config = setup.config
    checkpoints = journal = events = None
    table, laps = Table(), []
    if folder is not None:
        checkpoints = Checkpoints(folder.checkpoints, config.output.keep)
        start = _restored(simulation, checkpoints, folder)
        if began is not None:
            _prolong(folder, simulation, began)
        if hosts.first():
            journal = Journal(folder.path, start, config.rounds)
            table, laps = journal.table, journal.laps
            if config.output.tensorboard:
                events = Events(folder.path / "tensorboard", start)
        table, laps = hosts.agreed(lambda: (table, laps))
    clock = Clock()
    saved = simulation.round

    def outcome() -> Run:
        things = setup.partition, jax.device_get(simulation.variables)
        known = (functools.partial(_known, thing) for thing in things)
        path = None if folder is None else folder.path
        recipe = provenance.describe_partition(setup.partition)
        done = simulation.round
        seconds, cpu = records.total(laps, done)
        return Run(config, path, table, recipe, seconds, cpu, done, *known)

    def write(number: int, rows: list[records.Row]) -> None:
        lap = Lap(number, *clock.lap(), setup.cohort_size)
        if journal is None:
            rows = records.finite(rows)
            table.extend(rows)
            laps.append(lap)
        else:
            rows = journal.append(rows, lap, simulation.ending)
        if events is not None:
            events.write(rows)
        bar.advance(rows, lap.seconds)

    def save() -> None:
        nonlocal saved
        if checkpoints is None:
            return
        # Rows first: a checkpoint must never be ahead of the journal.
        if journal is not None:
            journal.sync()
        if events is not None:
            events.flush()
        if saved < simulation.round:
            checkpoints.save(simulation.round, simulation.state, simulation.variables)
            saved = simulation.round
        if journal is not None and simulation.round < config.rounds:  # the whole table comes last
            journal.tabulate()

    bar = Bar(config, simulation.round, setup.cohort_size, table)
    waiting: list[Callable[[], list[records.Row]]] = []
    ended = False
    try:
        with signals() as asked:
            stopping = hosts.Votes(lambda: bool(asked))
            while simulation.round < config.rounds and not stopping():
                under_way = simulation.step()
                # The round before is written down while this one is under way.
                for part in waiting:
                    write(simulation.round - 1, part())
                waiting = [under_way]
                every = config.output.checkpoint_every
                if every and simulation.round % every == 0:
                    write(simulation.round, waiting.pop()())
                    save()
            while waiting:
                write(simulation.round, waiting.pop()())
            save()
            if checkpoints is not None:
                checkpoints.wait()
        result = outcome()
        if journal is not None and result.finished:
            _figures(result, setup)
            journal.tabulate()
        hosts.agreed(lambda: None)  # nobody looks into the folder before all is in it
        ended = True
    finally:
        for thing in (bar, events, journal, checkpoints):
            # After an error closing may fail as well: the first error is the one to tell.
            with contextlib.nullcontext() if ended else contextlib.suppress(Exception):
                if thing is not None:
                    thing.close()
    if not result.finished:
        raise Interrupted(result) if signal.SIGINT in asked[:1] else Terminated(result)
    return result


def _restored(simulation: Simulation, checkpoints: Checkpoints, folder: Folder) -> int:
    """Puts the newest sound checkpoint that the journal reaches into the simulation. -> its round."""

    def reached() -> int:
        last = 0
        for last, _, _ in records.read_journal(folder.path / records.JOURNAL):  # noqa: B007
            pass
        return last

    found = checkpoints.restore(simulation.abstract_state(), at_most=hosts.agreed(reached))
    if found is not None:
        simulation.restore(*found)
    return simulation.round


def _before(folder: Folder, config: RunConfig, about: Mapping[str, Any]) -> tuple[int | None, bool]:
    """(how many rounds a run was to have until now, None if it is the same number; whether some are kept).

    Raises:
      UserError: it was finished, and what more rounds start from was not kept.
    """
    began = about.get("config", {}).get("rounds", config_lib.load(folder.config).rounds)
    kept = bool(Checkpoints(folder.checkpoints).rounds())
    if records.reached(folder.path) >= began and not (kept and (folder.path / records.JOURNAL).is_file()):
        why = "the run was finished, and only its records were kept"
        fix = "Run its config.yaml with as many in another folder."
        raise UserError("rounds", config.rounds, why, fix)
    return None if began == config.rounds else began, kept


def _prolong(folder: Folder, simulation: Simulation, began: int) -> None:
    """Writes down that a run has another number of rounds than the `began` that it began with.

    Raises:
      UserError: a run of that number would not have come to where this one is.
    """
    setup, done = simulation.setup, range(simulation.round)
    config = setup.config

    def differs(of: Callable[[int], Callable[[int], Any]]) -> bool:
        return any(not np.array_equal(of(began)(r), of(config.rounds)(r)) for r in done)

    def drawn(rounds: int) -> Callable[[int], Any]:
        return cohorts.sampler(config.cohort, setup.population.counts, rounds, config.seed)

    what = None
    if differs(lambda rounds: lambda r: config.local.lr_at(r, rounds)):
        what = f"learning rates of its {config.local.schedule} schedule"
    elif differs(drawn):
        what = "cohorts"
    if what is not None:
        raise UserError(
            "rounds",
            config.rounds,
            f"the run began with {began}, and of so many the {len(done)} that are done would have had other "
            f"{what}",
            f"Leave it at {began}, or start another run from this one's model, in a folder of its own "
            "(initial.run).",
        )
    if done:
        simulation.trace()  # an algorithm that goes by the number of rounds raises

    def write() -> None:
        now = dataclasses.replace(config_lib.load(folder.config), rounds=config.rounds)
        folder.write("config.yaml", config_lib.dump(now))
        about = json.loads((folder.path / "provenance.json").read_text())
        if "config" in about:  # last: until then the run is asked again whether it may
            about["config"]["rounds"] = config.rounds
            folder.write("provenance.json", json.dumps(about, indent=2) + "\n")

    hosts.agreed(write)


def _alike(make: Callable[[], Setup]) -> Setup:
    """The setup; raises UserError unless all processes are about to run the same."""

    def made() -> Setup:
        setup = make()
        memory.check(setup)
        return setup

    setup = hosts.together(made)
    if jax.process_count() > 1:
        told = {"data": provenance.fingerprint(setup.dataset)}
        told["partition"] = provenance.describe_partition(setup.partition)
        hosts.check_same({**config_lib.flat(_writable(setup.config)), **told})
    return setup


# --- the folder ---------------------------------------------------------------------------------------


def portable(config: RunConfig) -> RunConfig:
    """`config` for a record: its folder as seen from the working directory or from home, if it is below."""
    if config.output.dir is None:
        return config
    path = Folder(config.output.dir).path
    for base, start in ((Path.cwd(), "."), (Path(os.path.expanduser("~")), "~")):
        if path.is_relative_to(base):
            where = str(Path(start, path.relative_to(base)))
            return dataclasses.replace(config, output=dataclasses.replace(config.output, dir=where))
    return config


def _describe(folder: Folder, setup: Setup) -> None:
    """Writes what can be known before the first round. config.yaml comes last: with it the run exists."""
    config = portable(_writable(setup.config))
    about = provenance.describe(setup.dataset, setup.partition)
    about["config"] = config_lib.to_dict(config)
    own = imports.checksums(config_lib.flat(config).values())
    if own:
        about["own"] = own
    data.save(setup.partition, folder.partition)
    folder.write("provenance.json", json.dumps(about, indent=2) + "\n")
    folder.write("config.yaml", config_lib.dump(config))


def _saying(
    config: RunConfig,
    dataset: Dataset | None = None,
    partition: Partition | None = None,
    model: Model | None = None,
    algorithm: Any = None,
) -> RunConfig:
    """`config` with the algorithm, saying in `given` what of all this a file cannot hold."""
    said = dict(config.given)
    if algorithm is not None:
        config = dataclasses.replace(config, algorithm=algorithm)
        said.pop("algorithm", None)
    if dataset is not None:
        said["dataset"] = dataset.name
    if partition is not None:
        said["partition"] = f"{partition.num_clients:,} clients"
    if model is not None:
        said["model"] = models.name_of(model)
    if not algorithms.namable(config.algorithm):
        said["algorithm"] = algorithms.label(config.algorithm)
    return dataclasses.replace(config, given=said)


def _writable(config: RunConfig) -> RunConfig:
    """The configuration as YAML can hold it: the default stands for an algorithm without a name."""
    if not algorithms.namable(config.algorithm):
        return dataclasses.replace(config, algorithm=RunConfig().algorithm)
    return config


def _check_unchanged(folder: Folder, config: RunConfig, about: Mapping[str, Any]) -> None:
    """Raises UserError if config.yaml says what the run was not started with. Older records cannot tell.

    Another number of rounds may be asked for (see `_prolong`), and the data may have been moved: they are
    known by their checksums.
    """
    if "config" not in about:
        return
    began = config_lib.from_dict(about["config"])
    given = began.given or config.given  # for `_read`'s older records
    began = dataclasses.replace(began, rounds=config.rounds, data=config.data, given=given)
    changed = _differences(began, config)
    if changed:
        raise UserError(
            "config.yaml",
            str(folder.config),
            f"it was edited since the run began: {'; '.join(changed[:3])}",
            "Put it back, or start a run of its own in another folder (initial.run takes over a model).",
        )


def _read(folder: Folder) -> tuple[RunConfig, dict[str, Any]]:
    folder.check_run()
    config = config_lib.load(folder.config)
    # The folder may have been moved or renamed since.
    output = dataclasses.replace(config.output, dir=str(folder.path))
    try:
        about = json.loads((folder.path / "provenance.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            "folder", str(folder.path), f"provenance.json cannot be read: {error}", "Start the run anew."
        ) from None
    told = {"model": config.model.name, **about.get("names", {})}  # by records of before `given`
    given = config.given or {name: told.get(name, name) for name in about.get("supplied", ())}
    return dataclasses.replace(config, output=output, given=given), about


def _setup(
    folder: Folder,
    config: RunConfig,
    about: dict[str, Any],
    dataset: Any,
    model: Any,
    algorithm: Any,
    began: int | None = None,
) -> Setup:
    said = _saying(config, model=model, algorithm=algorithm)
    changed = _differences(config, _writable(said))
    if changed:
        why = f"what is given now is not what its run had: {'; '.join(changed[:3])}"
        raise UserError("folder", str(folder.path), why, "Give the same again.")
    dataset = _dataset(config, about, dataset)
    partition = _partition(folder, config, about, dataset)
    setup = prepare(
        config, dataset=dataset, partition=partition, model=model, algorithm=algorithm, began=began
    )
    own = about.get("own", {})
    for name, checksum in imports.checksums(own).items():
        if checksum != own[name]:
            told = f"the module of {name} is not what it was when the run in {folder.path} began"
            warnings.warn(f"{told}; what comes now may be another run's", stacklevel=2)
    return setup


def _dataset(config: RunConfig, about: dict[str, Any], given: Dataset | None) -> Dataset:
    dataset = data.as_dataset(given) or config.data.load()
    provenance.check_fingerprint(dataset, about["data"])
    return dataset


def _partition(
    folder: Folder, config: RunConfig, about: dict[str, Any], dataset: Dataset | None
) -> Partition:
    """The run's partition: from its file, or drawn again where that was not kept."""
    if folder.partition.is_file():
        return data.load_partition(folder.partition, dataset)
    drawn = initial.partition(config, _dataset(config, about, dataset))
    recorded = about.get("partition", {}).get("crc32")
    if recorded not in (None, provenance.describe_partition(drawn)["crc32"]):
        raise UserError(
            "partition",
            str(folder.path),
            "partition.json is missing, and the configuration gives another partition than the run had",
            "Restore that file.",
        )
    return drawn


def _recipe(
    folder: Folder, config: RunConfig, about: dict[str, Any], partition: Callable[[], Partition]
) -> Mapping[str, Any]:
    """`Run.recipe`, from the record; those of older versions do not have it."""
    if "partition" in about:
        return about["partition"]
    wanted = config.partition
    if wanted.clients is None or folder.partition.is_file():
        return provenance.describe_partition(partition())
    named = {"kind": wanted.kind, "alpha": wanted.alpha, "dataset": about["data"]["name"]}
    return {**named, "clients": wanted.clients}


def _figures(run: Run, setup: Setup) -> None:
    if run.folder is None or not run.config.output.figures:
        return
    home = run.folder / "figures"
    home.mkdir(exist_ok=True)
    plots.save(run.plot(), home / "curves.png")
    clients = plots.client_accuracies(run.metrics, run.title)
    if clients is not None:
        plots.save(clients, home / "clients.png")
    data.plot(setup.partition, setup.dataset, home / "partition.png")


def _way_on(folder: Path | None) -> str:
    if folder is None:
        return "output.dir is not set, so no file of it was written"
    return f"continue with: fedjax-sim resume {folder}"


def differing(folder: str | Path, config: RunConfig) -> tuple[str, ...]:
    """The settings in which a folder's run is another than `config`'s: "local.lr is 0.1, not 0.2".

    Those of layout and output, and what only costs time or memory, are left aside.
    """
    found, _ = _read(Folder(folder))
    return _differences(found, config)


def _differences(found: RunConfig, wanted: RunConfig) -> tuple[str, ...]:
    has, asked = config_lib.flat(found), config_lib.flat(wanted)
    aside = ("execution.", "output.", "evaluation.batch_size")
    names = (name for name in has | asked if not name.startswith(aside))
    return tuple(
        f"{name} is {has.get(name, 'unset')}, not {asked.get(name, 'unset')}"
        for name in names
        if (name in has, has.get(name)) != (name in asked, asked.get(name))
    )
