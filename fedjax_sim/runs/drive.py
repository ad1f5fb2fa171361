"""Drives a simulation through its rounds, and writes down what comes of them."""

import contextlib
import dataclasses
import functools
import json
import shlex
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fedjax_sim import config as config_lib
from fedjax_sim import data, records
from fedjax_sim.config import RunConfig
from fedjax_sim.core.errors import NotWritten, UserError
from fedjax_sim.engine import cohorts, hosts
from fedjax_sim.engine.setup import Setup
from fedjax_sim.engine.simulation import NonFiniteServer, NonFiniteUpdate
from fedjax_sim.records import Journal, Lap, Table
from fedjax_sim.records.tensorboard import Events
from fedjax_sim.runs import own_code, provenance, row_files
from fedjax_sim.runs.callbacks import Callbacks, UnderWay
from fedjax_sim.runs.checkpoint import Checkpoints
from fedjax_sim.runs.federation import Simulation
from fedjax_sim.runs.folder import Folder, Stopped
from fedjax_sim.runs.loading import best_of
from fedjax_sim.runs.progress import Bar, Clock, print_notes, signals
from fedjax_sim.runs.result import Interrupted, Run, Terminated, known

Fetch = Callable[[], Iterator[list[records.Row]]]
"""Gives the rows of some rounds that are under way, one round after another; see `Simulation.steps`."""


Lapping = Callable[[int], tuple[float, float]]
"""Gives (seconds, CPU seconds) of each of so many rounds that were just fetched; see `Clock.lap`."""


def bar_of(setup: Setup, done: int, table: Table) -> Bar:
    """What shows the progress of a run of which so many rounds are done, with these rows."""
    return Bar(setup.config, done, setup.cohort_size, table, setup.task.headline.name)


def run_rounds(simulation: Simulation, folder: Folder | None, began: int | None = None) -> Run:
    """Brings a run to its end, from wherever its folder says that it is; `began`: see `_prolong`.

    Raises:
      NonFiniteUpdate, NonFiniteServer: with how to find where it began.
      OtherProcessLost: another process of the run ended.
      Interrupted, Terminated: on SIGINT and SIGTERM, after a checkpoint.
    """
    drive = Drive(simulation, folder, began)
    with drive:
        drive.begin()
        print_notes()
        with signals() as asked:
            stopping = hosts.StopVote(lambda: bool(asked))
            while drive.open and not stopping():
                first = simulation.round + 1
                drive.take(first, simulation.steps(drive.most))
            drive.catch_up()
            drive.settle()
        result = drive.end()
    if not result.finished:
        raise Interrupted(result) if signal.SIGINT in asked[:1] else Terminated(result)
    return result


_PASSING = NotWritten, hosts.OtherProcessFailed
"""Errors that are no fault of the run's own, and need not come again."""


class Drive:
    """A run on its way: its simulation, its folder, and what acts between its rounds.

    As a context it closes what it has opened, and an error that leaves it says how the run goes on.

    Attributes:
      simulation: of the run.
      stopped: why a callback ended it; None: none did.
    """

    def __init__(
        self,
        simulation: Simulation,
        folder: Folder | None,
        began: int | None = None,
        bar: Callable[[int, Table], Any] | None = None,
        until: int | None = None,
    ):
        """Puts the run where its folder says that it is.

        Args:
          simulation: of the run.
          folder: its; None: everything stays in memory.
          began: see `_prolong`.
          bar: makes what shows progress, of the rounds that are done and their rows; see `Bar`, which does it
            by default.
          until: the round after which it is cut, to go on in another start; None: it comes to its end.
        """
        self.simulation, self._folder = simulation, folder
        config = self._config = simulation.setup.config
        self._until = config.rounds if until is None else min(until, config.rounds)
        self._checkpoints = self._journal = self._events = self._best = None
        self.stopped: Stopped | None = None
        self._table, self._laps = Table(), []
        self._kept: tuple[int | None, Callable[[], Any] | None] = (None, None)
        if folder is not None:
            self._checkpoints = Checkpoints(folder.checkpoints, config.output.keep)
            self._best, self._kept = (
                Checkpoints(folder.best, keep=1),
                hosts.on_first(lambda: best_of(folder)),
            )
            start = _restored(simulation, self._checkpoints, folder)
            if began is not None:
                _prolong(folder, simulation, began)
            hosts.on_first(lambda: own_code.write_start(folder, start))
            hosts.on_first(lambda: folder.write_failure(""))
            self.stopped = hosts.on_first(lambda: _still_stopped(folder, start))
            if hosts.first():
                last = config.rounds if self.stopped is None else self.stopped.round
                self._journal = Journal(folder.path, start, last)
                self._table, self._laps = self._journal.table, self._journal.laps
                if config.output.tensorboard:
                    self._events = Events(folder.path / "tensorboard", start)
                    self._events.settings(config_lib.flat(config))
            self._table, self._laps = hosts.on_first(lambda: (self._table, self._laps))
        self._clock = Clock()
        self._saved = simulation.round
        self._histograms = folder is not None and config.output.tensorboard and config.output.histograms
        self._run = UnderWay(
            simulation.setup, folder, self._table, lambda: simulation.variables, self._pictures
        )
        self._drawn: Path | None = None
        self._callbacks = Callbacks(config, self._run)
        if self._callbacks.every_round and simulation.fused is not None:
            self._callbacks.tell_one_by_one()
        setup = simulation.setup
        made = bar or functools.partial(bar_of, setup)
        self._bar = made(simulation.round, self._table)
        self._waiting: list[tuple[range, Fetch, Lapping]] = []

    def begin(self) -> None:
        """Tells callbacks that the run starts; what they take for that is no time of the first round."""
        self._callbacks.on_start()
        self._clock = Clock()

    @property
    def open(self) -> bool:
        """Whether there is another round to start."""
        return self.simulation.round < self._until and self.stopped is None

    @property
    def over(self) -> bool:
        """Whether all rounds of the run are done, or a callback has ended it."""
        return self.simulation.round >= self._config.rounds or self.stopped is not None

    @property
    def most(self) -> int:
        """How many rounds may be started at once."""
        every, left = self._config.output.checkpoint_every, self._until - self.simulation.round
        if self._callbacks.every_round:
            return 1
        return min(left, every - self.simulation.round % every) if every > 0 else left

    def take(self, first: int, under_way: Fetch, lap: Lapping | None = None) -> None:
        """Takes over the rounds that were just started, and writes down those before.

        Args:
          first: their first, from 1; the last is the simulation's.
          under_way: gives their rows.
          lap: tells their cost; None: all that passes between them.
        """
        simulation, every = self.simulation, self._config.output.checkpoint_every
        # Those before are written down while these are under way.
        for part in self._waiting:
            self._write_all(*part)
        self._waiting = [(range(first, simulation.round + 1), under_way, lap or self._clock.lap)]
        due = every > 0 and simulation.round % every == 0
        looked_at = bool(self._callbacks) or self._histograms
        if due or self._callbacks.every_round or (looked_at and simulation.due()):
            # Callbacks decide before the next round starts, and the model is still that of this one.
            due |= self._write_all(*self._waiting.pop())
        if due:
            self._save()

    def catch_up(self) -> None:
        """Writes down what is under way, and starts a checkpoint of it; see `settle`."""
        while self._waiting:
            self._write_all(*self._waiting.pop())
        self._save()

    def settle(self) -> None:
        """Waits until the checkpoint is on disk."""
        if self._checkpoints is not None:
            self._checkpoints.wait()

    def end(self) -> Run:
        """What the run gave, after `settle`; a finished one is whole in its folder then."""
        result = self._outcome()
        if result.finished:
            self._run.stopped = self.stopped
            if self._journal is not None:
                self._drawn = _figures(result, self.simulation.setup)
            if self._events is not None:
                self._events.end(self._pictures() if self._drawn else {}, result.rounds)
            self._callbacks.on_end()
        if self._journal is not None and result.finished:
            self._journal.tabulate()
        hosts.on_first(lambda: None)  # nobody looks into the folder before all is in it
        return result

    def _pictures(self) -> dict[str, bytes]:
        """The run drawn, PNG by name; without a word to the other processes."""
        with contextlib.ExitStack() as stack:
            home = self._drawn
            if home is None:
                home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                _draw(self._table, self._run.title, self.simulation.setup, home)
            return {path.stem: path.read_bytes() for path in sorted(home.glob("*.png"))}

    def __enter__(self) -> "Drive":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            self._callbacks.on_exit(error)
        finally:
            for thing in (self._bar, self._events, self._journal, self._best, self._checkpoints):
                # After an error closing may fail as well: the first error is the one to tell.
                with contextlib.nullcontext() if error is None else contextlib.suppress(Exception):
                    if thing is not None:
                        thing.close()
        if isinstance(error, UserError) and not isinstance(error, _PASSING):
            self._write_failure(error)
        if isinstance(error, NonFiniteUpdate | NonFiniteServer):
            fix = f"{error.fix} {_look(self._folder, self._saved)}"
            raise type(error)(error.field, error.value, error.why, fix) from None
        if isinstance(
            error, RuntimeError | ValueError
        ):  # JAX's of a round are of the first kind, others of both
            lost = hosts.as_loss(error, _again(self._folder, self._saved))
            if lost is not error:
                raise lost from error

    def _write_failure(self, error: UserError) -> None:
        """Writes down what has ended the run, for who looks at its folder; it can be resumed all the same."""
        if self._folder is not None and self._folder.started and hosts.first():
            with contextlib.suppress(OSError, UserError):  # the error itself is the one to tell
                self._folder.write_failure(" ".join(str(error).split()))

    def _outcome(self) -> Run:
        setup, simulation = self.simulation.setup, self.simulation
        partition = functools.partial(known, setup.partition)
        model = functools.partial(known, jax.device_get(simulation.variables))
        path = None if self._folder is None else self._folder.path
        recipe = provenance.describe_partition(setup.partition)
        done = simulation.round
        seconds, cpu = records.total(self._laps, done)
        of = (path, self._table, recipe, seconds, cpu, done, partition, model)
        return Run(self._config, *of, self.stopped, *self._kept, setup.task.headline.name)

    def _write_all(self, numbers: range, fetch: Fetch, lap: Lapping) -> bool:
        """Writes some rounds down. -> whether a callback wants a checkpoint, which is of the last of them."""
        cost, wish = None, False
        for number, rows in zip(numbers, fetch(), strict=True):
            cost = cost or lap(len(numbers))
            wish |= self._write(number, rows, *cost)
        if self._journal is not None:
            self._journal.flush()
        return wish

    def _write(self, number: int, rows: list[records.Row], seconds: float, cpu: float) -> bool:
        """Writes a round down, and has callbacks see it. -> whether one of them wants a checkpoint."""
        simulation = self.simulation
        rows, evaluated = records.encode_nonfinite(rows), simulation.evaluates(number)
        self._table.extend(rows)
        wishes = self._callbacks.on_round(number, rows, evaluated=evaluated)
        if wishes.stopped is not None and number < self._config.rounds:
            self.stopped = wishes.stopped
            last = records.encode_nonfinite(_last_rows(simulation, rows))
            self._table.extend(last)
            rows = rows + last
            evaluated |= bool(last)
            wishes.keep |= bool(last) and self._callbacks.on_round(number, last, evaluated=True).keep
        lap = Lap(number, seconds, cpu, simulation.setup.cohort_size)
        if self._journal is None:
            self._laps.append(lap)
        else:
            self._journal.write(rows, lap, simulation.ending)
        weights = simulation.variables if self._histograms and evaluated else {}  # all processes take part
        if self._events is not None:
            self._events.write(rows)
            self._events.histograms(jax.device_get(weights), number)
        self._bar.advance(rows, lap.seconds)
        if wishes.keep:
            self._kept = _keep(self._best, number, simulation.variables)
        return wishes.checkpoint

    def _save(self) -> None:
        simulation, folder = self.simulation, self._folder
        if folder is None or self._checkpoints is None or self._best is None:
            return
        # Rows first: a checkpoint must never be ahead of the journal, nor of what callbacks have decided.
        if self._journal is not None:
            self._journal.sync()
        if self._events is not None:
            self._events.flush()
        self._best.wait()
        if self.stopped is not None and hosts.first():
            folder.write_stopped(self.stopped)
        if self._saved < simulation.round:
            held, clients = simulation.client_state, None
            if held is not None:  # one more than are kept: the oldest goes once the new one is whole
                clients = held.snapshot(simulation.round, self._config.output.keep + 1)
            self._checkpoints.save(
                simulation.round, simulation.state, simulation.variables, simulation.shapes, clients
            )
            self._saved = simulation.round
            if simulation.keeper is not None and simulation.release():  # one copy for all that it keeps
                self._checkpoints.wait()
        # The whole table comes last.
        if self._journal is not None and self.stopped is None and simulation.round < self._config.rounds:
            self._journal.tabulate()


def _look(folder: Folder | None, saved: int) -> str:
    """How to find where numbers ceased to be finite, of a run whose newest checkpoint is of round `saved`."""
    if folder is None:
        return "To see where it began, run it with execution.debug = True."
    command = shlex.join(["fedjax-sim", "resume", str(folder.path), "--execution.debug"])
    start = f"from the checkpoint of round {saved}" if saved else "from the first round"
    return f"To see where it began, run it again {start}: {command}."


def _again(folder: Folder | None, saved: int) -> str:
    """What a start after a loss of processes does, of a run whose newest checkpoint is of round `saved`."""
    if folder is None:
        return "Start all processes again. Without output.dir nothing of this run was kept."
    command = shlex.join(["fedjax-sim", "resume", str(folder.path)])
    start = f"goes on after round {saved}" if saved else "begins at its first round, as it has no checkpoint"
    return f"Start all processes again with: {command}. The run {start}."


def _restored(simulation: Simulation, checkpoints: Checkpoints, folder: Folder) -> int:
    """Puts the newest sound checkpoint that the journal reaches into the simulation. -> its round."""

    def reached() -> int:
        last = 0
        for last, _, _ in records.read_journal(folder.path / records.JOURNAL):  # noqa: B007
            pass
        return last

    also, there = row_files.of_run(simulation, checkpoints, folder), hosts.on_first(checkpoints.rounds)
    shapes = simulation.abstract_state(), simulation.shapes
    found = checkpoints.restore(*shapes, at_most=hosts.on_first(reached), also=also)
    if found is None:
        if there:
            told = "no checkpoint is left to go on from: the run begins again at its first round"
            warnings.warn(told, stacklevel=2)
        row_files.begin(simulation, folder)
    else:
        state, number = found
        simulation.restore(state, number, functools.partial(_read_again, checkpoints, shapes, number))
    return simulation.round


def _read_again(checkpoints: Checkpoints, shapes: tuple[Any, Any], number: int) -> Any:
    """The state of a round that was read already."""
    found = checkpoints.restore(*shapes, at_most=number, mend=False)
    if found is None or found[1] != number:
        why = f"the checkpoint of round {number} was there, and now cannot be read"
        raise UserError("output.dir", checkpoints.folder, why, "Resume the run.")
    return found[0]


def _still_stopped(folder: Folder, done: int) -> Stopped | None:
    """Why a run of which so many rounds are kept has ended; None if it has not, or will come to it again."""
    stopped = folder.stopped
    if stopped is not None and done < stopped.round:
        folder.write_stopped(None)
        return None
    return stopped


def _last_rows(simulation: Simulation, rows: list[records.Row]) -> list[records.Row]:
    """What any run records after its last round, of one that a callback ends here; without what is known."""
    asked = simulation.setup.config.evaluation
    if not asked.every or (simulation.due() and not asked.finetune):
        return []
    known = {row.metric for row in rows}
    return [row for row in simulation.evaluate(last=True)() if row.metric not in known]


def _keep(
    best: Checkpoints | None, number: int, variables: Any
) -> tuple[int | None, Callable[[], Any] | None]:
    """Keeps a model as the best of a run. -> (its round, what gives it)."""
    if best is None:
        return number, functools.partial(known, jax.device_get(variables))
    # A run that goes on from before a cut comes to the same rounds again: a newer one is there already.
    newest = max(hosts.on_first(best.rounds), default=0)
    if newest < number:
        best.save(number, {"round": np.int32(number)}, variables)
    return max(newest, number), functools.partial(best.model, max(newest, number))


def rounds_before(folder: Folder, config: RunConfig, about: Mapping[str, Any]) -> tuple[int | None, bool]:
    """(how many rounds a run was to have until now, None if it is the same number; whether some are kept).

    Raises:
      UserError: it was finished, and what more rounds start from was not kept.
    """
    began = about.get("config", {}).get("rounds", config_lib.read_config(folder.config).rounds)
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
        return cohorts.sampler(config.cohort, setup.counts, rounds, config.seed)

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
        now = dataclasses.replace(config_lib.read_config(folder.config), rounds=config.rounds)
        folder.write("config.yaml", config_lib.dump(now))
        about = json.loads((folder.path / "provenance.json").read_text())
        if "config" in about:  # last: until then the run is asked again whether it may
            about["config"]["rounds"] = config.rounds
            folder.write("provenance.json", json.dumps(about, indent=2) + "\n")

    hosts.on_first(write)


def _figures(run: Run, setup: Setup) -> Path | None:
    """Draws a run into its folder, if it is to be drawn. -> where."""
    if run.folder is None or not run.config.output.figures:
        return None
    home = run.folder / "figures"
    home.mkdir(exist_ok=True)
    _draw(run.metrics, run.title, setup, home)
    return home


def _draw(table: Table, title: str, setup: Setup, home: Path) -> None:
    """Draws a run with these rows into a folder."""
    from fedjax_sim.records import plots  # Matplotlib loads when something is drawn

    headline = setup.task.headline.name
    plots.save(plots.run_curves(table, title, None, headline), home / "curves.png")
    clients = plots.client_figures(table, title, headline)
    if clients is not None:
        plots.save(clients, home / "clients.png")
    data.plot(setup.partition, setup.dataset, home / "partition.png")
