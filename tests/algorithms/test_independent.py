"""The two controls, client by client against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sim.algorithms import FedIndep, Local
from tests import oracles

SIZES = (12, 7, 20, 3, 31)


def _slot(stack, k):
    return jax.tree.map(lambda leaf: np.asarray(leaf)[k], stack)


def test_fedindep_lets_each_model_wander():
    simulation = oracles.simulate(SIZES, algorithm=FedIndep(), cohort=3, rounds=2, momentum=0.5, devices=2)
    models = [oracles.doubled(simulation.variables["params"])] * 3
    oracles.run(simulation)
    for index in range(2):
        _, models, _ = oracles.train_cohort(models, simulation, index)
    slots = simulation.state.algorithm.slots
    for k in range(3):
        oracles.assert_trees_close(_slot(slots, k)["params"], models[k])
    oracles.assert_trees_close(simulation.variables["params"], oracles.weighted_mean(models, [1, 1, 1]))


def test_local_lets_each_client_keep_its_own():
    simulation = oracles.simulate(SIZES, algorithm=Local(), cohort=3, rounds=3, wave=2)
    start = oracles.doubled(simulation.variables["params"])
    own = {c: start for c in range(5)}
    oracles.run(simulation)
    for index in range(3):
        ids = simulation.inputs(index)[0].cohort.ids.tolist()
        _, trained, _ = oracles.train_cohort([own[c] for c in ids], simulation, index)
        own.update(zip(ids, trained, strict=True))
    assert own[0] is not own[1]
    stack = simulation.state.algorithm.models
    for c in range(5):
        oracles.assert_trees_close(_slot(stack, c)["params"], own[c])
    oracles.assert_trees_close(
        simulation.variables["params"], oracles.weighted_mean(list(own.values()), [1] * 5)
    )
    state, ids = simulation.state.algorithm, jnp.asarray([4, 0], jnp.int32)
    personal = simulation.setup.algorithm.personal_models(state, ids)
    oracles.assert_trees_close(_slot(personal, 0)["params"], own[4])
    oracles.assert_trees_close(_slot(personal, 1)["params"], own[0])
