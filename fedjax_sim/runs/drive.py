"""Drives a simulation through its rounds, and writes down what comes of them."""

import contextlib
import dataclasses
import functools
import json
import shlex
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from fedjax_sim import config as config_lib
from fedjax_sim import data, records
from fedjax_sim.config import RunConfig
from fedjax_sim.core.errors import UserError
from fedjax_sim.engine import cohorts, hosts
from fedjax_sim.engine.setup import Setup
from fedjax_sim.engine.simulation import NonFiniteServer, NonFiniteUpdate
from fedjax_sim.records import Journal, Lap, Table
from fedjax_sim.records.tensorboard import Events
from fedjax_sim.runs import provenance, row_files
from fedjax_sim.runs.callbacks import Callbacks, UnderWay
from fedjax_sim.runs.checkpoint import Checkpoints
from fedjax_sim.runs.federation import Simulation
from fedjax_sim.runs.folder import Folder, Stopped
from fedjax_sim.runs.loading import best_of
from fedjax_sim.runs.progress import Bar, Clock, signals
from fedjax_sim.runs.result import Interrupted, Run, Terminated, known


def run_rounds(simulation: Simulation, folder: Folder | None, began: int | None = None) -> Run:
    """Brings a run to its end, from wherever its folder says that it is; `began`: see `_prolong`."""
    setup = simulation.setup
    config = setup.config
    checkpoints = journal = events = best = stopped = None
    table, laps = Table(), []
    kept: tuple[int | None, Callable[[], Any] | None] = (None, None)
    if folder is not None:
        checkpoints = Checkpoints(folder.checkpoints, config.output.keep)
        best, kept = Checkpoints(folder.best, keep=1), hosts.on_first(lambda: best_of(folder))
        start = _restored(simulation, checkpoints, folder)
        if began is not None:
            _prolong(folder, simulation, began)
        stopped = hosts.on_first(lambda: _still_stopped(folder, start))
        if hosts.first():
            journal = Journal(folder.path, start, config.rounds if stopped is None else stopped.round)
            table, laps = journal.table, journal.laps
            if config.output.tensorboard:
                events = Events(folder.path / "tensorboard", start)
        table, laps = hosts.on_first(lambda: (table, laps))
    clock = Clock()
    saved = simulation.round
    run = UnderWay(config, None if folder is None else folder.path, table, lambda: simulation.variables)
    callbacks = Callbacks(config, run)

    def outcome() -> Run:
        partition = functools.partial(known, setup.partition)
        model = functools.partial(known, jax.device_get(simulation.variables))
        path = None if folder is None else folder.path
        recipe = provenance.describe_partition(setup.partition)
        done = simulation.round
        seconds, cpu = records.total(laps, done)
        of = (path, table, recipe, seconds, cpu, done, partition, model)
        return Run(config, *of, stopped, *kept, setup.task.headline.name)

    def write_all(numbers: range, fetch: Callable[[], Iterator[list[records.Row]]]) -> bool:
        """Writes some rounds down. -> whether a callback wants a checkpoint, which is of the last of them."""
        cost, wish = None, False
        for number, rows in zip(numbers, fetch(), strict=True):
            cost = cost or clock.lap(len(numbers))
            wish |= write(number, rows, *cost)
        return wish

    def write(number: int, rows: list[records.Row], seconds: float, cpu: float) -> bool:
        """Writes a round down, and has callbacks see it. -> whether one of them wants a checkpoint."""
        nonlocal stopped, kept
        rows = records.encode_nonfinite(rows)
        table.extend(rows)
        wishes = callbacks.on_round(number, rows, evaluated=simulation.evaluates(number))
        if wishes.stopped is not None and number < config.rounds:
            stopped = wishes.stopped
            last = records.encode_nonfinite(_last_rows(simulation, rows))
            table.extend(last)
            rows = rows + last
            wishes.keep |= bool(last) and callbacks.on_round(number, last, evaluated=True).keep
        lap = Lap(number, seconds, cpu, setup.cohort_size)
        if journal is None:
            laps.append(lap)
        else:
            journal.write(rows, lap, simulation.ending)
        if events is not None:
            events.write(rows)
        bar.advance(rows, lap.seconds)
        if wishes.keep:
            kept = _keep(best, number, simulation.variables)
        return wishes.checkpoint

    def save() -> None:
        nonlocal saved
        if folder is None or checkpoints is None or best is None:
            return
        # Rows first: a checkpoint must never be ahead of the journal, nor of what callbacks have decided.
        if journal is not None:
            journal.sync()
        if events is not None:
            events.flush()
        best.wait()
        if stopped is not None and hosts.first():
            folder.write_stopped(stopped)
        if saved < simulation.round:
            held, clients = simulation.client_state, None
            if held is not None:  # one more than are kept: the oldest goes once the new one is whole
                clients = held.snapshot(simulation.round, config.output.keep + 1)
            of = (simulation.state, simulation.variables, simulation.shapes, clients)
            checkpoints.save(simulation.round, *of)
            saved = simulation.round
        # The whole table comes last.
        if journal is not None and stopped is None and simulation.round < config.rounds:
            journal.tabulate()

    if callbacks.every_round and simulation.fused is not None:
        callbacks.tell_one_by_one()
    bar = Bar(config, simulation.round, setup.cohort_size, table, setup.task.headline.name)
    waiting: list[tuple[range, Callable[[], Iterator[list[records.Row]]]]] = []
    ended = False
    try:
        callbacks.on_start()
        with signals() as asked:
            stopping = hosts.StopVote(lambda: bool(asked))
            while simulation.round < config.rounds and stopped is None and not stopping():
                first, every = simulation.round + 1, config.output.checkpoint_every
                left = every - simulation.round % every if every > 0 else None
                under_way = simulation.steps(1 if callbacks.every_round else left)
                # Those before are written down while these are under way.
                for part in waiting:
                    write_all(*part)
                waiting = [(range(first, simulation.round + 1), under_way)]
                due = every > 0 and simulation.round % every == 0
                if due or callbacks.every_round or (callbacks and simulation.due()):
                    # Callbacks decide before the next round starts.
                    due |= write_all(*waiting.pop())
                if due:
                    save()
            while waiting:
                write_all(*waiting.pop())
            save()
            if checkpoints is not None:
                checkpoints.wait()
        result = outcome()
        if result.finished:
            callbacks.on_end()
        if journal is not None and result.finished:
            _figures(result, setup)
            journal.tabulate()
        hosts.on_first(lambda: None)  # nobody looks into the folder before all is in it
        ended = True
    except (NonFiniteUpdate, NonFiniteServer) as error:
        raise type(error)(
            error.field, error.value, error.why, f"{error.fix} {_look(folder, saved)}"
        ) from None
    except (RuntimeError, ValueError) as error:  # JAX's of a round are of the first kind, others of both
        lost = hosts.as_loss(error, _again(folder, saved))
        if lost is error:
            raise
        raise lost from error
    finally:
        for thing in (bar, events, journal, best, checkpoints):
            # After an error closing may fail as well: the first error is the one to tell.
            with contextlib.nullcontext() if ended else contextlib.suppress(Exception):
                if thing is not None:
                    thing.close()
    if not result.finished:
        raise Interrupted(result) if signal.SIGINT in asked[:1] else Terminated(result)
    return result


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
    found = checkpoints.restore(
        simulation.abstract_state(), simulation.shapes, at_most=hosts.on_first(reached), also=also
    )
    if found is None:
        if there:
            told = "no checkpoint is left to go on from: the run begins again at its first round"
            warnings.warn(told, stacklevel=2)
        row_files.begin(simulation, folder)
    else:
        simulation.restore(*found)
    return simulation.round


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


def _figures(run: Run, setup: Setup) -> None:
    if run.folder is None or not run.config.output.figures:
        return
    from fedjax_sim.records import plots  # Matplotlib loads when something is drawn

    home = run.folder / "figures"
    home.mkdir(exist_ok=True)
    plots.save(run.plot(), home / "curves.png")
    clients = plots.client_figures(run.metrics, run.title, run.headline)
    if clients is not None:
        plots.save(clients, home / "clients.png")
    data.plot(setup.partition, setup.dataset, home / "partition.png")
