"""Fine-tuning after the last round: every client trains on what it holds, and nobody merges.

FOUND in the code of LIPS: after the last round each client trains all parameters of the model that it
received for as many epochs as in a round, and the accuracy on clients' own test samples is logged after each.
Here it starts from what a client would use (`Algorithm.personal`, else the deployed model) and trains by the
run's local settings, at the last round's learning rate; the optimiser starts fresh, and a method's own loss
terms play no part.

Rows of the last round: `finetuned_mean`, `finetuned_p10`, `finetuned_p90` and, by client, `finetuned`, after
all epochs; `finetuned_mean_1`, `finetuned_mean_2` … after each.

While it lasts there is a model and an optimiser's state for each of all N clients.
"""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from fedjax_sim.algorithms.independent import Local, LocalState
from fedjax_sim.config import CohortConfig, RunConfig, nested
from fedjax_sim.engine import placement
from fedjax_sim.engine.device_data import DataStore
from fedjax_sim.engine.held import filled_shape
from fedjax_sim.engine.programs import CachedJit, cached_jit
from fedjax_sim.engine.round import Round, ServerState
from fedjax_sim.engine.scores import client_rows
from fedjax_sim.engine.setup import Setup
from fedjax_sim.engine.simulation import Simulation
from fedjax_sim.records import Row
from fedjax_sim.runs.assemble import prepare


def rows(
    setup: Setup,
    store: DataStore,
    function: Round,
    state_for: Callable[[np.ndarray], ServerState],
    number: int,
) -> list[Row]:
    """Fine-tunes all clients and says what came of it.

    Args:
      setup: of the run.
      store: has its samples on the devices.
      function: its round.
      state_for: client ids i32[m] -> the state after the last one, with what these clients keep.
      number: the last round, from 1.

    Raises:
      NonFiniteUpdate: a client's model is no longer finite.
    """
    config, alone = setup.config, phase(setup, store, number)
    # All clients' fresh models make room for those that they start from.
    alone.state = dataclasses.replace(alone.state, algorithm=None)
    personal, ids = start(setup, function)
    with jax.set_mesh(function.mesh):
        models = personal(state_for(ids), ids)
    alone.state = dataclasses.replace(alone.state, algorithm=LocalState(models))
    alone.round = number
    out, accuracies = [], np.zeros(0)
    for epoch in range(1, config.evaluation.finetune + 1):
        alone.step()()
        accuracies = alone.client_figures()()
        out.append(Row(number, f"finetuned_mean_{epoch}", float(np.nanmean(accuracies))))
    return [*client_rows(number, accuracies, "finetuned"), *out]


def phase(setup: Setup, store: DataStore, number: int | None = None) -> Simulation:
    """The run of the phase, before its start; arguments as of `rows` and `apart`.

    As many clients train side by side as in a round: with all of a device's, a round of all N would need more
    than any before it.
    """
    given = {"dataset": setup.dataset, "partition": setup.partition, "model": setup.model}
    config = apart(setup.config, number)
    config = dataclasses.replace(config, execution=dataclasses.replace(config.execution, wave=setup.wave))
    return Simulation(prepare(config, mesh=setup.mesh, **given, algorithm=Local()), store)


def start(setup: Setup, function: Round) -> tuple[CachedJit, np.ndarray]:
    """(The program that makes what clients begin with, its clients i32[m]), see `Round.personal`."""
    (held,) = filled_shape((setup.num_clients,), function.mesh.size)
    ids = np.arange(held, dtype=np.int32) % setup.num_clients
    return cached_jit(function.personal, function.mesh, out_shardings=placement.cut(function.mesh)), ids


def apart(config: RunConfig, number: int | None = None) -> RunConfig:
    """The run of the phase: one epoch a round, all clients, nothing measured, nothing written.

    Args:
      config: of the run.
      number: its last round, from 1; None: of `config.rounds`.
    """
    number = config.rounds if number is None else number
    local = dataclasses.replace(
        config.local,
        epochs=1,
        steps=None,
        lr=config.local.last_lr(number, config.rounds),
        schedule="constant",
        decay=1.0,
        keep_optimizer=True,
    )
    return nested(
        config,
        rounds=number + config.evaluation.finetune,
        algorithm=Local(),
        local=local,
        execution=dataclasses.replace(config.execution, client_state="device"),
        cohort=CohortConfig(fraction=1.0),
    )
