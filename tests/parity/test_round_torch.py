"""Whole FedMR rounds against a plain PyTorch loop: the same initial weights, the same order of samples.

PyTorch computes in float64, so that what differs is our float32 rounding alone. ResNet-20 gets a smooth
activation on both sides: among some hundred thousand ReLUs a batch a few inputs lie so near 0 that rounding
decides their sign, and each turn changes a gradient visibly (in PyTorch itself perturbing the weights by
1e-6 moves single gradients by 2e-2 under ReLU, by 1e-5 under softplus).
"""

import copy

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util

from fedjax_sim import models
from fedjax_sim.algorithms import FedMR
from tests import oracles

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity

from tests.parity import torch_nets as nets  # noqa: E402

TOLERANCE = 1e-4  # of a tensor's largest entry, for the deployed model
SLOT = {"lenet": 1e-4, "resnet20": 3e-4}  # for each of the K models, whose rounding no mean evens out
UPDATE_ERROR = 1e-4  # of the update's norm, over all parameters
SIZES = (16, 11, 8, 5)
SETTINGS = {"batch_size": 8, "lr": 0.01, "momentum": 0.5}


def train(net, images, labels, batches, lr, momentum):
    """One client's local training, as anyone would write it."""
    net = copy.deepcopy(net).double().train()
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=momentum)
    for chosen in batches:
        optimizer.zero_grad()
        inputs = nets.images((images[chosen].astype(np.float64) / 255 - 0.5) / 0.5)
        torch.nn.functional.cross_entropy(net(inputs), torch.from_numpy(labels[chosen]).long()).backward()
        optimizer.step()
    return net


def flat(tree):
    return traverse_util.flatten_dict(jax.device_get(tree))


def difference(ours, theirs):
    return float(np.abs(ours - theirs).max()) / max(float(np.abs(theirs).max()), 1e-6)


def norm(tree):
    return float(np.sqrt(sum((leaf.astype(np.float64) ** 2).sum() for leaf in tree.values())))


def permutation(stack, trained, path, tolerance):
    """Of which trained model each slot of our leaf is; every model once."""
    found = []
    for slot in stack:
        distances = [difference(slot, model) for model in trained]
        found.append(int(np.argmin(distances)))
        assert min(distances) < tolerance, (path, distances)
    # Tensors that no training changes (the norm that is never applied) are the same in all slots.
    if all(np.array_equal(trained[0], other) for other in trained):
        return list(range(len(stack)))
    assert sorted(found) == list(range(len(stack))), (path, found)
    return found


@pytest.mark.parametrize(
    ("name", "make", "devices", "wave", "rounds", "epochs"),
    [
        ("lenet", nets.LeNet, 2, 1, 2, 2),
        ("lenet", nets.LeNet, 1, 2, 2, 2),
        ("resnet20", nets.ResNet20, 2, 1, 2, 1),
        ("resnet20", nets.ResNet20, 1, 4, 2, 1),
    ],
)
def test_rounds_of_fedmr_equal_pytorch(name, make, devices, wave, rounds, epochs, monkeypatch):
    if name == "resnet20":
        monkeypatch.setattr(nn, "relu", lambda x: nn.softplus(3 * x) / 3)
        monkeypatch.setattr(torch, "relu", lambda x: torch.nn.functional.softplus(x, beta=3))
    dataset, partition = given = oracles.world(SIZES, (32, 32, 3), classes=10)
    ours = models.create(name, (32, 32, 3), 10)
    simulation = oracles.simulate(
        given=given,
        model=ours,
        algorithm=FedMR(),
        devices=devices,
        wave=wave,
        rounds=rounds,
        epochs=epochs,
        **SETTINGS,
    )
    start = make(10)
    nets.load(start, jax.device_get(simulation.variables))
    initial = flat(simulation.variables)
    slots = [start] * len(SIZES)
    local, seed = simulation.setup.config.local, simulation.setup.config.seed
    moved = 0
    for index in range(rounds):
        trained = []
        for net, client in zip(slots, simulation.inputs(index)[0].cohort.ids.tolist(), strict=True):
            own = partition.train[client]
            batches = list(oracles.client_batches(seed, index, client, len(own), local))
            trained.append(
                train(
                    net,
                    dataset.train_images[own],
                    dataset.train_labels[own],
                    batches,
                    local.lr,
                    local.momentum,
                )
            )
        oracles.run(simulation, 1)
        theirs = [flat(nets.variables_of(net)) for net in trained]

        deployed = flat(simulation.variables)
        assert deployed.keys() == theirs[0].keys()
        error, update = {}, {}
        for path, leaf in deployed.items():
            mean = np.mean([model[path] for model in theirs], axis=0, dtype=np.float64)
            assert difference(leaf, mean) < TOLERANCE, path
            if path[0] == "params":
                error[path], update[path] = leaf - mean, mean - initial[path]
        assert norm(error) < UPDATE_ERROR * norm(update)

        stacked = flat(simulation.state.algorithm.slots)
        recombined = [dict(model) for model in theirs]
        for path, stack in stacked.items():
            order = permutation(stack, [model[path] for model in theirs], path, SLOT[name])
            moved += order != list(range(len(order)))
            for slot, source in enumerate(order):
                recombined[slot][path] = theirs[source][path]
        slots = [copy.deepcopy(start) for _ in SIZES]
        for net, variables in zip(slots, recombined, strict=True):
            nets.load(net, traverse_util.unflatten_dict(variables))
    assert moved > 5
    assert oracles.far_apart(nets.variables_of(start)["params"], simulation.variables["params"]) > 1e-3
