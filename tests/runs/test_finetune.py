"""Fine-tuning after the last round against NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedjax_sim as fs
from fedjax_sim import records
from fedjax_sim.algorithms import CONFIGS, FedPer
from fedjax_sim.config import EvaluationConfig, ExecutionConfig, LocalConfig
from fedjax_sim.runs import plan as planning
from fedjax_sim.runs.federation import Simulation
from tests import oracles
from tests.algorithms import by_hand

SIZES = (12, 7, 20, 3)
LOCAL = LocalConfig(epochs=2, batch_size=5, lr=0.2, momentum=0.5, schedule="exponential", decay=0.5)
EVALUATION = EvaluationConfig(every=1, per_client=True, finetune=2)


def made(algorithm, **evaluation):
    """A simulation after its two rounds, and the rows of each."""
    dataset, partition = by_hand.skewed(SIZES, tests=40)
    config = fs.RunConfig(
        rounds=2,
        algorithm=algorithm,
        local=LOCAL,
        cohort=fs.CohortConfig(size=3),
        evaluation=dataclasses.replace(EVALUATION, **evaluation),
        execution=ExecutionConfig(devices=2),
    )
    model = fs.models.create("mlp", dataset.train_images.shape[1:], dataset.num_classes, hidden=(4,))
    simulation = Simulation(config, dataset=dataset, partition=partition, model=model)
    return simulation, list(simulation.advance())


def tuned(simulation, start, client, epochs):
    """NumPy: momentum SGD over the epochs that follow the last round, one after another."""
    setup = simulation.setup
    own = setup.partition.train[client]
    x, y = oracles.normalised(setup.dataset.train_images[own]), setup.dataset.train_labels[own]
    w, buffer = start, oracles.map_trees(np.zeros_like, start)
    for epoch in range(epochs):
        one = dataclasses.replace(LOCAL, epochs=1)
        for chosen in oracles.client_batches(setup.config.seed, 2 + epoch, client, len(own), one):
            gradient = oracles.mlp_gradient(w, x[chosen], y[chosen])[1]
            buffer = by_hand.plus(gradient, buffer, 0.5)
            w = by_hand.plus(w, buffer, -0.1)  # 0.2, halved after the first of two rounds
    return w


def test_each_client_trains_on_from_the_deployed_model():
    simulation, rows = made(CONFIGS["fedavg"]())
    deployed = oracles.doubled(simulation.variables)["params"]
    last = records.Table(rows[-1])
    for epochs in (1, 2):
        models = [tuned(simulation, deployed, client, epochs) for client in range(len(SIZES))]
        mean = np.mean(by_hand.accuracies(simulation, models))
        np.testing.assert_allclose(last.last(f"finetuned_mean_{epochs}"), mean, atol=1e-6)
    clients, found = last.by_client("finetuned", 2)
    assert clients.tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(found, by_hand.accuracies(simulation, models), atol=1e-6)
    np.testing.assert_allclose(last.last("finetuned_mean"), mean, atol=1e-6)
    np.testing.assert_allclose(last.last("finetuned_p10"), np.percentile(found, 10), atol=1e-6)


def test_a_client_with_a_model_of_its_own_starts_from_that():
    simulation, rows = made(FedPer())
    deployed, last = oracles.doubled(simulation.variables)["params"], records.Table(rows[-1])
    held = oracles.doubled(simulation.function.personal(simulation.state, jnp.arange(4)))["params"]
    starts = [oracles.map_trees(lambda leaf, c=client: leaf[c], held) for client in range(4)]
    assert oracles.far_apart(starts[0]["fc2"], deployed["fc2"]) > 1e-3
    models = [tuned(simulation, start, client, 2) for client, start in enumerate(starts)]
    wanted = by_hand.accuracies(simulation, models)
    np.testing.assert_allclose(last.by_client("finetuned", 2)[1], wanted, atol=1e-6)


def test_it_comes_once_and_changes_nothing_else():
    (first, with_it), (second, without) = made(CONFIGS["fedmr"]()), made(CONFIGS["fedmr"](), finetune=0)
    assert not any(row.metric.startswith("finetuned") for row in with_it[0])
    assert [row for rows in with_it for row in rows if not row.metric.startswith("finetuned")] == [
        row for rows in without for row in rows
    ]
    oracles.assert_trees_equal(first.variables, second.variables)


def test_the_memory_of_all_clients_is_in_the_plan():
    simulation, _ = made(CONFIGS["fedavg"]())
    part = next(part for part in planning.plan(simulation.setup).parts if "fine-tune" in part.name)
    one = 4 * sum(leaf.size for leaf in jax.tree.leaves(simulation.variables))
    assert part.total == len(SIZES) * 2 * one


def test_it_wants_test_samples_of_clients():
    with pytest.raises(fs.UserError, match=r"evaluation\.finetune = 2: .*per_client"):
        EvaluationConfig(finetune=2)
