"""A run's folder opened for its rounds, in memory or on disk: of a new run, or of one that was cut."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from fedjax_sim import config as config_lib
from fedjax_sim import data
from fedjax_sim.config import RunConfig, plugins
from fedjax_sim.core.errors import UserError
from fedjax_sim.data import Samples
from fedjax_sim.engine import hosts
from fedjax_sim.engine.device_data import DataStore
from fedjax_sim.engine.setup import Setup
from fedjax_sim.runs import callbacks, plan, provenance
from fedjax_sim.runs.assemble import prepare
from fedjax_sim.runs.describe import check_unchanged, describe, read_run, yaml_safe
from fedjax_sim.runs.drive import rounds_before
from fedjax_sim.runs.federation import Simulation
from fedjax_sim.runs.folder import Folder
from fedjax_sim.runs.loading import setup_of
from fedjax_sim.runs.start import with_start


class Opened(NamedTuple):
    """What `fedjax_sim.runs.drive` drives; see `Drive`."""

    simulation: Simulation
    folder: Folder | None
    began: int | None = None


@contextlib.contextmanager
def new(
    config: RunConfig,
    dataset: Samples | None,
    *,
    mesh: Mesh | None = None,
    store: DataStore | None = None,
    **given: Any,
) -> Iterator[Opened]:
    """A new run. Inside, its folder is this process's, and a full disk is one clear error.

    Args:
      config: what to run.
      dataset: see `fedjax_sim.runs.assemble.prepare`, as the next and all others.
      mesh: likewise.
      store: of runs that have samples on these devices already, and of whose memory this one's was planned;
        None: there are none.
      **given: likewise.

    Raises:
      UserError: it cannot work, or its folder holds something.
    """
    folder = None if config.output.dir is None else Folder(config.output.dir)
    with contextlib.ExitStack() as stack:
        hosts.check_backend()
        if folder is not None and jax.process_count() == 1:
            stack.enter_context(folder.refused_without_trace())
        yield stack.enter_context(_new(config, dataset, folder, mesh, store, given))


@contextlib.contextmanager
def _new(
    config: RunConfig,
    dataset: Samples | None,
    folder: Folder | None,
    mesh: Mesh | None,
    store: DataStore | None,
    given: Mapping[str, Any],
) -> Iterator[Opened]:
    """See `new`."""
    if folder is not None:
        hosts.on_first(folder.check_new)
        hosts.all_or_none(folder.check_seen)
    calibrated = mesh is None  # measured is a run that has the machine for itself

    def made(dataset: Samples | None) -> Setup:
        return with_start(prepare(config, dataset=dataset, mesh=mesh, calibrated=calibrated, **given))

    setup = checked_setup(config, dataset, made, planned=store is not None)
    if folder is None:
        yield Opened(Simulation(setup, store=store), None)
        return
    with hosts.locked_by_first(functools.partial(folder.claimed, to_run=True)):
        # Again: another start may have come and gone while this one prepared.
        hosts.on_first(folder.check_new)
        simulation = Simulation(setup, store=store)
        _ = simulation.state  # made first: a mistake that shows only here leaves no half-begun run behind
        if mesh is not None:  # others are opened before its first round
            simulation.release()
        with folder.writing():
            hosts.on_first(lambda: describe(folder, setup))
            yield Opened(simulation, folder)


@contextlib.contextmanager
def again(
    folder: str | Path,
    *,
    rounds: int | None = None,
    debug: bool | None = None,
    dataset: Samples | None = None,
    mesh: Mesh | None = None,
    store: DataStore | None = None,
    **own: Any,
) -> Iterator[Opened | None]:
    """A run that was cut, as `new`; None if it is finished.

    Args:
      folder: of the run.
      rounds: see `fedjax_sim.runs.resume`, as `debug`, `dataset` and all others.
      debug: likewise.
      dataset: likewise.
      mesh: see `new`.
      store: likewise.
      **own: likewise.

    Raises:
      UserError: it cannot go on.
    """
    own = dict.fromkeys(("model", "algorithm", *plugins.LISTS)) | own
    place, given = Folder(folder), {"dataset": dataset, **own}
    config, _ = _resumable(place, given, rounds)
    with contextlib.ExitStack() as stack:
        opened = None
        if not hosts.on_first(lambda: place.done(config.rounds)):
            stack.enter_context(hosts.locked_by_first(functools.partial(place.claimed, to_run=True)))
            # Read again: another process may have had the folder in the meantime.
            config, about = _resumable(place, given, rounds)
            if not hosts.on_first(lambda: place.done(config.rounds)):
                if debug is not None:
                    execution = dataclasses.replace(config.execution, debug=debug)
                    config = dataclasses.replace(config, execution=execution)
                provenance.check_jax_settings(about.get("jax", {}))
                provenance.check_dtype(config.model.dtype, about.get("devices", {}))
                began, kept = hosts.on_first(lambda: rounds_before(place, config, about))
                make = functools.partial(setup_of, place, config, about, mesh=mesh, **own)
                if kept:
                    make = functools.partial(make, began=began)
                setup = checked_setup(
                    config,
                    dataset,
                    lambda dataset: with_start(make(dataset=dataset), lazily=True),
                    planned=store is not None,
                )
                simulation = Simulation(setup, store=store)
                stack.enter_context(place.writing())
                opened = Opened(simulation, place, began)
        yield opened


def _resumable(
    place: Folder, given: Mapping[str, Any], rounds: int | None
) -> tuple[RunConfig, dict[str, Any]]:
    """What a run says of itself, with that many rounds. Raises UserError if it cannot be resumed so."""

    def read() -> tuple[RunConfig, dict[str, Any]]:
        config, about = read_run(place)
        asked = config if rounds is None else dataclasses.replace(config, rounds=rounds)
        check_unchanged(place, asked, about)
        began = about.get("config", {}).get("rounds", config.rounds)
        stopped = place.stopped
        if stopped is not None and not asked.rounds == config.rounds == began:
            why = f"the run was {stopped}, and would have been so with any number of rounds"
            fix = "Start another run from its model, in a folder of its own (initial.run)."
            raise UserError("rounds", asked.rounds, why, fix)
        if asked.rounds != config.rounds or asked.rounds < began:
            done = place.records.read(config.rounds)[1]
            if done >= asked.rounds:
                raise UserError("rounds", asked.rounds, f"the run has done {done}", "Ask for more.")
            if packed := place.packed:
                why = f"the run is finished, and its records are in {packed.pack.about}"
                fix = "Unpack its study first (fedjax-sim sweep FILE.yaml --unpack)."
                raise UserError("rounds", asked.rounds, why, fix)
        return asked, about

    config, about = hosts.all_or_none(read)
    for name, value in given.items():
        if name in config.given and value is None:
            raise UserError(
                name,
                config.given[name],
                f"the run in {place.path} was given this {name} from Python",
                f"Give it again: resume(…, {name}=…).",
            )
    return config, about


def checked_setup(
    config: RunConfig,
    dataset: Samples | None,
    make: Callable[[Samples | None], Setup],
    *,
    planned: bool = False,
) -> Setup:
    """What `make` gives; raises UserError unless all processes are about to run the same.

    Args:
      config: that this process was asked to run.
      dataset: that it was given; None: `config` names it.
      make: gives the setup with that data set.
      planned: whether its memory was looked at by who starts it, beside others.
    """
    hosts.check_backend()
    together = jax.process_count() > 1
    same_settings = "Start all processes with the same settings."
    if together:  # before anything is made of the data: what does not fit them would be named instead
        hosts.check_same(config_lib.flat(yaml_safe(config)), same_settings)
        dataset = samples = hosts.all_or_none(lambda: data.as_dataset(dataset) or config.data.load())
        fix = "Copy the first host's data to all, or put them where all can read them, and start all again."
        hosts.check_same(hosts.all_or_none(lambda: provenance.digests(samples)), fix)

    def made() -> Setup:
        callbacks.check_installed(config)
        setup = make(dataset)
        if not (planned or setup.config.execution.debug):  # which traces functions
            plan.check_memory(setup)
        return setup

    setup = hosts.all_or_none(made)
    if together:
        hosts.check_same(config_lib.flat(yaml_safe(setup.config)), same_settings)
        crc = provenance.describe_partition(setup.partition)
        told = f"{crc['clients']:,} clients, CRC-32 {crc['crc32']:08x}"
        hosts.check_same({"partition": told}, "Give all processes the same partition, and start all again.")
    return setup
