"""Runs as a user sees them: `run(config)`, `resume(folder)`, `load(folder)`, and the `Run` that they give.

A run's folder:

    config.yaml       every setting
    provenance.json   versions, hardware, source revision, fingerprints of data and partition
    partition.json    who holds which samples
    journal.jsonl     the rows of each round, while it runs
    timing.csv        what each round cost
    tensorboard/      events
    checkpoints/      of the newest rounds
    best/             the model that a callback kept as the best
    figures/          curves, clients, partition
    metrics.parquet   the rows, tidy; written last: a run whose last round is in it is finished. If a callback
                      stopped it in an earlier round, provenance.json says so (`stopped`)

Of a finished run config.yaml, provenance.json, metrics.parquet and timing.csv are enough: `load` and sweeps
need no more, in any place. They may lie in the pack of a study (`fedjax_sim.runs.packs`) instead of this
folder. Without checkpoints a run has no model; its partition is drawn again when asked for.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fedjax_sim import config as config_lib
from fedjax_sim import data
from fedjax_sim.config import RunConfig
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.model import Model
from fedjax_sim.data import Partition, Samples
from fedjax_sim.engine import hosts
from fedjax_sim.engine.setup import Setup
from fedjax_sim.runs import plan, provenance
from fedjax_sim.runs.assemble import prepare
from fedjax_sim.runs.describe import (
    check_unchanged,
    describe,
    read_run,
    with_given,
    yaml_safe,
)
from fedjax_sim.runs.drive import rounds_before, run_rounds
from fedjax_sim.runs.federation import Simulation
from fedjax_sim.runs.folder import Folder
from fedjax_sim.runs.loading import load_run, setup_of
from fedjax_sim.runs.result import Run
from fedjax_sim.runs.start import with_start


def run(
    config: RunConfig | str | Path,
    *,
    dataset: Samples | None = None,
    partition: Partition | Sequence[np.ndarray] | Mapping[int, np.ndarray] | None = None,
    model: Any = None,
    algorithm: Any = None,
    observers: Sequence[Any] | None = None,
    meters: Sequence[Any] | None = None,
    callbacks: Sequence[Any] | None = None,
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
      observers: diagnostics that look into measured rounds (`fedjax_sim.engine.setup.ObserverConfig`), in the
        place of the configuration's list, as the next two; beside what `peel` and `inertia` ask for.
      meters: diagnostics that look at every round (`fedjax_sim.engine.setup.MeterConfig`).
      callbacks: what acts between rounds (`fedjax_sim.config.callbacks`).

    Raises:
      UserError: a setting that cannot work, before anything is compiled; or an update that is not finite.
      Interrupted, Terminated: on SIGINT and SIGTERM, after a checkpoint.
    """
    config, dataset, partition = (
        config_lib.as_config(config),
        data.as_dataset(dataset),
        data.as_partition(partition),
    )
    lists = {"observers": observers, "meters": meters, "callbacks": callbacks}
    config = with_given(config, dataset, partition, model, algorithm, **lists)
    return _started(config, dataset=dataset, partition=partition, model=model)


def run_prepared(config: RunConfig, dataset: Samples, partition: Partition) -> Run:
    """`run` with data that `config` describes but that are in memory already; `resume` will load them."""
    return _started(config, dataset=dataset, partition=partition)


def validate(config: RunConfig, dataset: Samples, partition: Partition) -> None:
    """Raises UserError for a run that `run_prepared` would refuse, whatever its folder holds."""
    _checked_setup(
        config, dataset, lambda dataset: with_start(prepare(config, dataset=dataset, partition=partition))
    )


def _started(config: RunConfig, dataset: Samples | None, **given: Any) -> Run:
    folder = None if config.output.dir is None else Folder(config.output.dir)
    if folder is not None:
        hosts.on_first(folder.check_new)
        hosts.all_or_none(folder.check_seen)
    setup = _checked_setup(
        config,
        dataset,
        lambda dataset: with_start(prepare(config, dataset=dataset, calibrated=True, **given)),
    )
    if folder is None:
        return run_rounds(Simulation(setup), None)
    with hosts.locked_by_first(folder.claimed):
        # Again: another start may have come and gone while this one prepared.
        hosts.on_first(folder.check_new)
        simulation = Simulation(setup)
        _ = simulation.state  # made first: a mistake that shows only here leaves no half-begun run behind
        with folder.writing():
            hosts.on_first(lambda: describe(folder, setup))
            return run_rounds(simulation, folder)


def resume(
    folder: str | Path,
    *,
    rounds: int | None = None,
    debug: bool | None = None,
    dataset: Samples | None = None,
    model: Model | None = None,
    algorithm: Any = None,
    observers: Sequence[Any] | None = None,
    meters: Sequence[Any] | None = None,
    callbacks: Sequence[Any] | None = None,
) -> Run:
    """Continues a run that was cut, to the same metrics and the same model, bit for bit.

    A finished run is only loaded, unless more rounds are asked of it: then it goes on, its config.yaml says
    so, and its numbers are those of a run that had as many from the start. Where they would not be, because
    the rounds that are done went by the number of all (a cosine, LIPS's density), it is refused; likewise
    where a callback has stopped it.

    Args:
      folder: of the run.
      rounds: how many it is to have in all; None: those of its config.yaml.
      debug: takes the place of `execution.debug` for the rounds that are still to be done; None leaves it.
      dataset: what `run` was given, as the next five.
      model: likewise.
      algorithm: likewise.
      observers: likewise.
      meters: likewise.
      callbacks: likewise.

    Raises:
      UserError: no run is there, its configuration is of another version or not the one that it was started
        with, or the data are not the same; or it cannot get that number of rounds.
    """
    place = Folder(folder)
    lists = {"observers": observers, "meters": meters, "callbacks": callbacks}
    own = {"model": model, "algorithm": algorithm, **lists}
    given = {"dataset": dataset, **own}
    config, _ = _resumable(place, given, rounds)
    if not hosts.on_first(lambda: place.done(config.rounds)):
        with hosts.locked_by_first(place.claimed):
            # Read again: another process may have had the folder in the meantime.
            config, about = _resumable(place, given, rounds)
            if not hosts.on_first(lambda: place.done(config.rounds)):
                if debug is not None:
                    execution = dataclasses.replace(config.execution, debug=debug)
                    config = dataclasses.replace(config, execution=execution)
                provenance.check_jax_settings(about.get("jax", {}))
                provenance.check_dtype(config.model.dtype, about.get("devices", {}))
                began, kept = hosts.on_first(lambda: rounds_before(place, config, about))
                make = functools.partial(setup_of, place, config, about, **own)
                if kept:
                    make = functools.partial(make, began=began)
                setup = _checked_setup(
                    config, dataset, lambda dataset: with_start(make(dataset=dataset), lazily=True)
                )
                simulation = Simulation(setup)
                with place.writing():
                    return run_rounds(simulation, place, began)
    return load_run(folder, dataset=dataset, model=model, algorithm=algorithm, meters=meters)


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


def _checked_setup(
    config: RunConfig, dataset: Samples | None, make: Callable[[Samples | None], Setup]
) -> Setup:
    """What `make` gives; raises UserError unless all processes are about to run the same.

    Args:
      config: that this process was asked to run.
      dataset: that it was given; None: `config` names it.
      make: gives the setup with that data set.
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
        setup = make(dataset)
        if not setup.config.execution.debug:  # which traces functions
            plan.check_memory(setup)
        return setup

    setup = hosts.all_or_none(made)
    if together:
        hosts.check_same(config_lib.flat(yaml_safe(setup.config)), same_settings)
        crc = provenance.describe_partition(setup.partition)
        told = f"{crc['clients']:,} clients, CRC-32 {crc['crc32']:08x}"
        hosts.check_same({"partition": told}, "Give all processes the same partition, and start all again.")
    return setup
