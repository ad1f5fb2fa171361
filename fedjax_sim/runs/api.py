"""Runs as a user sees them: `run(config)`, `resume(folder)`, `load(folder)`, and the `Run` that they give.

A run's folder:

    config.yaml       every setting
    provenance.json   versions, hardware, source revision, fingerprints of data and partition
    partition.json    who holds which samples
    journal.jsonl     the rows of each round, while it runs
    timing.csv        what each round cost
    tensorboard/      events
    trackers.json     the run's ids in trackers, if it has one (`fedjax_sim.config.trackers`)
    checkpoints/      of the newest rounds
    best/             the model that a callback kept as the best
    figures/          curves, clients, partition
    metrics.parquet   the rows, tidy; written last: a run whose last round is in it is finished. If a callback
                      stopped it in an earlier round, provenance.json says so (`stopped`)

Of a finished run config.yaml, provenance.json, metrics.parquet and timing.csv are enough: `load` and sweeps
need no more, in any place. They may lie in the pack of a study (`fedjax_sim.runs.packs`) instead of this
folder. Without checkpoints a run has no model; its partition is drawn again when asked for.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedjax_sim import config as config_lib
from fedjax_sim import data
from fedjax_sim.config import RunConfig
from fedjax_sim.core.model import Model
from fedjax_sim.data import Partition, Samples
from fedjax_sim.runs import opening
from fedjax_sim.runs.assemble import prepare
from fedjax_sim.runs.describe import (
    with_given,
)
from fedjax_sim.runs.drive import run_rounds
from fedjax_sim.runs.kept_programs import kept
from fedjax_sim.runs.loading import load_run
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
    opening.checked_setup(
        config, dataset, lambda dataset: with_start(prepare(config, dataset=dataset, partition=partition))
    )


def _started(config: RunConfig, dataset: Samples | None, **given: Any) -> Run:
    with kept(), opening.new(config, dataset, **given) as opened:
        return run_rounds(*opened)


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
    own: dict[str, Any] = {"model": model, "algorithm": algorithm}
    own |= {"observers": observers, "meters": meters, "callbacks": callbacks}
    with kept(), opening.again(folder, rounds=rounds, debug=debug, dataset=dataset, **own) as opened:
        if opened is not None:
            return run_rounds(*opened)
    return load_run(folder, dataset=dataset, model=model, algorithm=algorithm, meters=meters)
