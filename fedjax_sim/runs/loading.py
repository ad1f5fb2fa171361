"""Opens runs that lie on disk: their records, their model, and the simulation that they were."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from fedjax_sim import records
from fedjax_sim.config import RunConfig
from fedjax_sim.core import imports
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.model import Model
from fedjax_sim.data import Samples
from fedjax_sim.engine.setup import Setup
from fedjax_sim.engine.simulation import Simulation
from fedjax_sim.runs import row_files
from fedjax_sim.runs.assemble import prepare
from fedjax_sim.runs.checkpoint import Checkpoints
from fedjax_sim.runs.describe import (
    dataset_of,
    differences,
    partition_of,
    read_run,
    recipe_of,
    with_given,
    yaml_safe,
)
from fedjax_sim.runs.folder import Folder
from fedjax_sim.runs.result import Run


def load_run(
    folder: str | Path,
    *,
    dataset: Samples | None = None,
    model: Model | None = None,
    algorithm: Any = None,
    meters: Sequence[Any] | None = None,
) -> Run:
    """Opens a run's folder to look at it.

    Nothing is trained; `variables` and `best_variables` are read when asked for. What Python gave is mostly
    not needed; where it is, the error says so.

    Args:
      folder: of the run.
      dataset: what `run` was given, as the next three.
      model: likewise.
      algorithm: likewise.
      meters: likewise.

    Raises:
      UserError: no run is there, or its configuration is of another version.
    """
    place = Folder(folder)
    config, about = read_run(place)
    stopped = place.stopped
    table, rounds = place.records.read(place.end(config.rounds))

    # Not closures: a Run can be pickled, and one that was loaded reads these wherever it is by then.
    partition = functools.partial(partition_of, place, config, about, dataset)
    variables = functools.partial(_deployed, place, dataset, model, algorithm, meters)
    seconds, cpu = records.total(place.records.laps(), rounds)
    recipe = recipe_of(place, config, about, partition)
    if stopped is not None and rounds < stopped.round:
        stopped = None  # it was cut before that was in place, and will come to it again
    kept = (*best_of(place), about.get("headline", "accuracy"))  # which runs of before all had
    return Run(config, place.path, table, recipe, seconds, cpu, rounds, partition, variables, stopped, *kept)


def best_of(place: Folder) -> tuple[int | None, Callable[[], Any] | None]:
    """(round, what reads it) of the model that a run has kept as its best; (None, None) if it has not."""
    kept = Checkpoints(place.best)
    numbers = kept.rounds()
    return (numbers[-1], functools.partial(kept.model, numbers[-1])) if numbers else (None, None)


def _deployed(
    place: Folder, dataset: Samples | None, model: Model | None, algorithm: Any, meters: Any
) -> Any:
    """The deployed model of the newest checkpoint: as it lies there by itself, else of the state."""
    config, _ = read_run(place)
    checkpoints = Checkpoints(place.checkpoints)
    numbers = checkpoints.rounds()
    if numbers and (numbers[-1] == place.end(config.rounds) or not place.finished):
        try:
            found = checkpoints.model(numbers[-1])
        except Exception:  # damaged, of which `restored` will say more
            found = None
        if found is not None:
            return found
    given = {"dataset": dataset, "model": model, "algorithm": algorithm, "meters": meters}
    return jax.device_get(restored(place.path, **given).variables)


def restored(
    folder: str | Path,
    *,
    dataset: Samples | None = None,
    model: Model | None = None,
    algorithm: Any = None,
    meters: Sequence[Any] | None = None,
) -> Simulation:
    """A run as a simulation at its newest sound checkpoint, to look into. Nothing in its folder is touched.

    It has neither the run's own observers nor its callbacks; meters carry numbers from round to round, which
    are part of its state.

    Args:
      folder: of the run.
      dataset: what `run` was given, as the next three.
      model: likewise.
      algorithm: likewise.
      meters: likewise.

    Raises:
      UserError: as `resume`; no checkpoint is sound; or the run is finished and its last one is not.
    """
    place = Folder(folder)
    config, about = read_run(place)
    given = {name: told for name, told in config.given.items() if name not in ("observers", "callbacks")}
    config = dataclasses.replace(config, observers=(), callbacks=(), given=given)
    checkpoints = Checkpoints(place.checkpoints)
    if checkpoints.rounds():
        simulation = Simulation(setup_of(place, config, about, dataset, model, algorithm, meters=meters))
        also = row_files.of_run(simulation, checkpoints, place, look=True)
        found = checkpoints.restore(simulation.abstract_state(), simulation.shapes, mend=False, also=also)
        if found is not None and (found[1] == place.end(config.rounds) or not place.finished):
            simulation.restore(*found)
            return simulation
    fix = place.run_again if place.finished else "Resume the run."
    which = " of its last round" if place.finished else ""
    raise UserError("folder", str(folder), f"it has no sound checkpoint{which}", fix)


def setup_of(
    folder: Folder,
    config: RunConfig,
    about: dict[str, Any],
    dataset: Any,
    model: Any,
    algorithm: Any,
    began: int | None = None,
    mesh: Mesh | None = None,
    **lists: Any,
) -> Setup:
    """The setup of a run on disk.

    Args:
      folder: of the run.
      config: as `read_run` gives it.
      about: likewise.
      dataset: what the run was given, as the next two.
      model: likewise.
      algorithm: likewise.
      began: see `fedjax_sim.runs.assemble.prepare`, as `mesh`.
      mesh: likewise.
      **lists: what the run was given as observers, meters and callbacks.

    Raises:
      UserError: what is given is not what the run had, or the data are not the same.
    """
    said = with_given(config, model=model, algorithm=algorithm, **lists)
    changed = differences(config, yaml_safe(said))
    if changed:
        why = f"what is given now is not what its run had: {'; '.join(changed[:3])}"
        raise UserError("folder", str(folder.path), why, "Give the same again.")
    dataset = dataset_of(config, about, dataset)
    partition = partition_of(folder, config, about, dataset)
    setup = prepare(
        _where_it_was(folder, config),
        dataset=dataset,
        partition=partition,
        model=model,
        algorithm=algorithm,
        began=began,
        mesh=mesh,
        **lists,
    )
    own = about.get("own", {})
    for name, checksum in imports.checksums(own).items():
        if checksum != own[name]:
            told = f"the module of {name} is not what it was when the run in {folder.path} began"
            warnings.warn(f"{told}; what comes now may be another run's", stacklevel=2)
    return setup


def _where_it_was(folder: Folder, config: RunConfig) -> RunConfig:
    """The configuration, with clients' state where the run has it if it says `auto`."""
    checkpoints = Checkpoints(folder.checkpoints)
    if config.execution.client_state != "auto" or not checkpoints.rounds():
        return config
    place = "host" if folder.clients.is_dir() else "device"
    execution = dataclasses.replace(config.execution, client_state=place)
    return dataclasses.replace(config, execution=execution)
