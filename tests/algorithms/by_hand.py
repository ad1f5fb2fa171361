"""What NumPy rounds of methods with client losses of their own share."""

import dataclasses

import jax
import numpy as np

from fedjax_sim.data import Partition
from fedjax_sim.runs.federation import Simulation
from tests import oracles


def batches(simulation, index, client):
    """A client's steps in round `index`, from 0: (images f64[b, d], labels i32[b]) each."""
    setup = simulation.setup
    own = setup.partition.train[client]
    x, y = oracles.normalised(setup.dataset.train_images[own]), setup.dataset.train_labels[own]
    for chosen in oracles.client_batches(setup.config.seed, index, client, len(own), setup.config.local):
        yield x[chosen], y[chosen]


def cohort(simulation, index):
    """Client ids of round `index`, from 0."""
    return simulation.inputs(index)[0].cohort.ids.tolist()


def plus(tree, other, scale=1.0):
    """tree + scale · other."""
    return oracles.map_trees(lambda a, b: a + scale * b, tree, other)


def minus(tree, other):
    """tree − other."""
    return oracles.map_trees(np.subtract, tree, other)


def skewed(sizes, tests=4, classes=4, seed=0):
    """A world whose clients have few classes each, and test samples of their own. -> (Dataset, Partition)."""
    dataset, _ = oracles.world(sizes, classes=classes, tests=40, seed=seed)
    order = np.argsort(dataset.train_labels, kind="stable")
    own = np.random.default_rng(seed).integers(0, 40, (len(sizes), tests))
    parts = tuple(np.split(order, np.cumsum(sizes)[:-1]))
    return dataset, Partition(parts, test=tuple(own), test_from="test")


def accuracies(simulation, models):
    """Of each client's NumPy model on its own test samples. -> f64[N]."""
    dataset, own = simulation.setup.dataset, simulation.setup.partition.test
    images = oracles.normalised(dataset.test_images)
    return [
        np.mean(oracles.mlp(model, images[chosen])[0].argmax(1) == dataset.test_labels[chosen])
        for model, chosen in zip(models, own, strict=True)
    ]


def with_settings(simulation, **settings):
    """The same world under a configuration with other sections."""
    setup = simulation.setup
    config = dataclasses.replace(setup.config, **settings)
    return Simulation(config, dataset=setup.dataset, partition=setup.partition, model=setup.model)


def overflowing(simulation):
    """The state after a round in which every update overflows, and who was included."""
    inputs, _ = simulation.inputs(simulation.round)
    with jax.set_mesh(simulation.mesh):
        state, outputs = simulation.program(
            simulation.state, inputs.replace(lr=np.float32(3e38)), simulation.data, None
        )
    return state, np.asarray(outputs.included)
