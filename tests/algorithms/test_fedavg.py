"""FedAvg's record, and the settings in which it can do nothing. (Rounds: test_rounds.py.)"""

import jax
import numpy as np

from fedjax_sim import models
from fedjax_sim.algorithms import FedAvg
from fedjax_sim.core.algorithm import Cohort
from tests import oracles

CONTEXT = oracles.context(
    models.create("mlp", (2, 2, 1), 2, hidden=()),
    5,
    3,
    10,
)
COHORT = Cohort(np.arange(3), np.array([1, 2, 3]), np.int32(0))


def test_the_engine_need_not_hold_all_models():
    record = FedAvg().build(CONTEXT)
    assert not record.needs_models
    np.testing.assert_array_equal(record.weights(COHORT), [1, 2, 3])
    np.testing.assert_array_equal(FedAvg(weights="uniform").build(CONTEXT).weights(COHORT), [1, 1, 1])


def test_one_client_and_identical_clients_are_that_client():
    """One full batch each: the order of samples then cannot matter."""
    dataset, partition = oracles.world((8,))
    same = oracles.Partition(partition.train * 3)
    local = {"batch_size": 8, "epochs": 3, "rounds": 1}
    alone = oracles.simulate(given=(dataset, partition), **local)
    together = oracles.simulate(given=(dataset, same), wave=3, **local)
    start = jax.device_get(alone.variables)
    for simulation in (alone, together):
        oracles.run(simulation)
    oracles.assert_trees_close(together.variables, alone.variables, atol=1e-6)
    assert oracles.far_apart(start, alone.variables) > 1e-2
