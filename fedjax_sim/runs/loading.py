"""Opens runs that lie on disk: their records, their model, and the simulation that they were."""

import functools
import warnings
from pathlib import Path
from typing import Any

import jax

from fedjax_sim import records
from fedjax_sim.config import RunConfig
from fedjax_sim.core import imports
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.model import Model
from fedjax_sim.data import Dataset
from fedjax_sim.engine.setup import Setup
from fedjax_sim.engine.simulation import Simulation
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


def load(
    folder: str | Path, *, dataset: Dataset | None = None, model: Model | None = None, algorithm: Any = None
) -> Run:
    """Opens a run's folder to look at it. Nothing is trained; `variables` are read when asked for.

    Raises:
      UserError: no run is there, or its configuration is of another version.
    """
    place = Folder(folder)
    config, about = read_run(place)
    table, rounds = place.records.read(config.rounds)

    # Not closures: a Run can be pickled, and one that was loaded reads these wherever it is by then.
    partition = functools.partial(partition_of, place, config, about, dataset)
    variables = functools.partial(_deployed, place, dataset, model, algorithm)
    seconds, cpu = records.total(place.records.laps(), rounds)
    recipe = recipe_of(place, config, about, partition)
    return Run(config, place.path, table, recipe, seconds, cpu, rounds, partition, variables)


def _deployed(place: Folder, dataset: Dataset | None, model: Model | None, algorithm: Any) -> Any:
    """The deployed model of the newest checkpoint: as it lies there by itself, else of the state."""
    config, _ = read_run(place)
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
    config, about = read_run(place)
    checkpoints = Checkpoints(place.checkpoints)
    if checkpoints.rounds():
        simulation = Simulation(setup_of(place, config, about, dataset, model, algorithm))
        found = checkpoints.restore(simulation.abstract_state(), mend=False)
        if found is not None and (found[1] == config.rounds or not place.finished):
            simulation.restore(*found)
            return simulation
    fix = "Run its config.yaml again in another folder." if place.finished else "Resume the run."
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
) -> Setup:
    """The setup of a run on disk.

    Args:
      folder: of the run.
      config: as `read_run` gives it.
      about: likewise.
      dataset: what the run was given, as the next two.
      model: likewise.
      algorithm: likewise.
      began: see `fedjax_sim.runs.assemble.prepare`.

    Raises:
      UserError: what is given is not what the run had, or the data are not the same.
    """
    said = with_given(config, model=model, algorithm=algorithm)
    changed = differences(config, yaml_safe(said))
    if changed:
        why = f"what is given now is not what its run had: {'; '.join(changed[:3])}"
        raise UserError("folder", str(folder.path), why, "Give the same again.")
    dataset = dataset_of(config, about, dataset)
    partition = partition_of(folder, config, about, dataset)
    setup = prepare(
        config, dataset=dataset, partition=partition, model=model, algorithm=algorithm, began=began
    )
    own = about.get("own", {})
    for name, checksum in imports.checksums(own).items():
        if checksum != own[name]:
            told = f"the module of {name} is not what it was when the run in {folder.path} began"
            warnings.warn(f"{told}; what comes now may be another run's", stacklevel=2)
    return setup
