"""What the first round starts from, if not from fresh weights: another run's model, or a pretrained one.

A pretrained model has been trained centrally on samples that no client holds (`Partition.server`). They are
put aside before the partition is drawn, so that partitions keep what they promise of sizes and classes, and
clients of every kind have them in common. OUR CHOICE: they are drawn from the partition's seed, every class
in its share. Central training is a federated run with one client, and is done by one: the run's local
settings at the learning rate of round 0, one optimiser for all epochs. The fresh model is the one that the
run would have started from, so that seed, data, model and local settings tell the pretrained one; the
algorithm and the number of clients do not matter.
"""

import dataclasses
from contextlib import nullcontext
from functools import partial
from typing import Any

import jax
import numpy as np

from fedjax_sim.algorithms import FedAvg
from fedjax_sim.config import CohortConfig, RunConfig, nested
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.model import Model
from fedjax_sim.data import Partition, Samples
from fedjax_sim.engine import hosts
from fedjax_sim.engine.setup import Setup
from fedjax_sim.engine.simulation import NonFiniteServer, NonFiniteUpdate, Simulation
from fedjax_sim.runs.assemble import prepare
from fedjax_sim.runs.checkpoint import Checkpoints
from fedjax_sim.runs.folder import Folder
from fedjax_sim.runs.loading import load_run

STREAM = 2**31 - 1
"""Of the one who pretrains: an id that no client has."""


def with_start(setup: Setup, *, lazily: bool = False) -> Setup:
    """The setup with the model that its first round starts from (`Setup.initial`).

    Args:
      setup: of a run.
      lazily: look for another run's model only when it is asked for, which a run never does that goes on
        from a checkpoint.

    Raises:
      UserError: as `of_run`; if `lazily`, when the model is asked for, as pretraining does that ends with
        one that is not finite.
    """
    config = setup.config
    if config.initial.pretrain:
        return dataclasses.replace(setup, initial=partial(pretrained, setup))
    if config.initial.run is None:
        return setup
    found = partial(of_run, config.initial.run, setup.model, setup.dataset)
    if not lazily:
        found = partial(_known, found())
    return dataclasses.replace(setup, initial=found)


def _known(model: Any) -> Any:
    return model


# --- from another run ---------------------------------------------------------------------------------


def of_run(folder: str, model: Model, dataset: Samples) -> Any:
    """The deployed model of the run in `folder` at the newest checkpoint that holds it sound. NumPy leaves.

    Args:
      folder: of the run, relative to the working directory.
      model: that is to start from it; stands for that run's own if that was given in Python.
      dataset: of this run; likewise.

    Raises:
      UserError: no run is there, it has no checkpoint or is under way, or its model is another.
    """
    place = Folder(folder)
    if not place.started:
        why = "it holds no run (no config.yaml)" if place.path.is_dir() else "there is no such folder"
        raise _wrong(folder, why, "Give the output.dir of a run, relative to the working directory.")
    if not Checkpoints(place.checkpoints).rounds():
        if place.finished:
            why, fix = "only the records of that run were kept", place.run_again
        else:
            why, fix = "that run has not come to its first checkpoint", "Resume it."
        raise _wrong(folder, f"it has no checkpoint: {why}", fix)
    try:
        other = load_run(folder)
        if "algorithm" in other.config.given:
            raise UserError("algorithm", None, "it was given in Python, and is not known here", "")
        own = {"model": model, "dataset": dataset}
        other = load_run(folder, **{name: own[name] for name in own if name in other.config.given})
        # Of a run that another process drives, the newest model would be a matter of luck.
        finished = hosts.on_first(lambda: place.finished)
        with nullcontext() if finished else hosts.locked_by_first(place.claimed):
            found = other.variables
    except hosts.OtherProcessFailed:
        raise
    except UserError as error:
        raise _wrong(folder, f"its model cannot be had ({error})", "Give another run.") from None
    name = other.config.given.get("model", other.config.model.name)
    _check_same(folder, found, name, model)
    return found


def _check_same(folder: str, found: Any, name: str, model: Model) -> None:
    wanted = model.abstract
    have, want = (
        {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (found, wanted))
    )
    differing = [leaf for leaf in {**want, **have} if want.get(leaf) != have.get(leaf)]
    if differing:
        leaf = differing[0]
        why = (
            f"its model is another ({name}; this run's is {model.name}): the leaf {leaf} is "
            f"{have.get(leaf, 'missing')} there, and {want.get(leaf, 'missing')} here"
        )
    elif name != model.name:
        why = f"its model is {name}, and this run's is {model.name}"
    else:
        return
    raise _wrong(folder, why, "Give a run of the same model, or make this run's model that one.")


def _wrong(folder: str, why: str, fix: str) -> UserError:
    return UserError("initial.run", folder, why, fix)


# --- pretrained ---------------------------------------------------------------------------------------


def pretrained(setup: Setup) -> Any:
    """The fresh model after `initial.pretrain` epochs on the samples that are put aside. NumPy leaves.

    Raises:
      UserError: it is not finite.
    """
    config, mine = setup.config, setup.partition.server
    assert mine is not None
    epochs = config.initial.pretrain
    if jax.process_count() > 1:
        why, fix = "it needs one process alone", "Pretrain in one, and give its run as initial.run."
        raise UserError("initial.pretrain", epochs, why, fix)
    dataset = setup.dataset.training_on(mine)
    alone = Partition((np.arange(len(mine)),), rng_ids=np.asarray([STREAM]))
    simulation = Simulation(prepare(central(config), dataset=dataset, partition=alone, model=setup.model))
    try:
        for _ in simulation.advance():
            pass
    except (NonFiniteUpdate, NonFiniteServer):
        why = "the model is not finite after it"
        raise UserError("initial.pretrain", epochs, why, "Lower local.lr, or set local.clip_norm.") from None
    return jax.device_get(simulation.variables)


def central(config: RunConfig) -> RunConfig:
    """The run that pretrains: one client, which has the run's local settings and all epochs in one round."""
    local = dataclasses.replace(
        config.local,
        epochs=config.initial.pretrain,
        steps=None,
        keep_optimizer=False,
        non_finite="stop",
    )
    return nested(
        config,
        rounds=1,
        algorithm=FedAvg(weights="uniform"),
        local=local,
        cohort=CohortConfig(size=1),
        execution=dataclasses.replace(config.execution, devices=1, wave=1),
    )
