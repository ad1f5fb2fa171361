"""What the tests of personalised methods share: NumPy rounds with private leaves, and small models."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from fedjax_sim import models
from fedjax_sim.models import norms, peel
from tests import oracles

SIZES = (12, 7, 20, 3, 31)


def deep():
    """fc1 (5), fc2 (4), fc3: three blocks on 3×3 images of 3 classes."""
    return models.create("mlp", (3, 3, 1), 3, hidden=(5, 4))


class Normed(nn.Module):
    """fc1 – batch norm – ReLU – fc2 – batch norm – ReLU – fc3."""

    num_classes: int = 3

    @nn.compact
    def __call__(self, x, *, train=False, mask=None):
        x = x.reshape(x.shape[0], -1)
        for depth in (1, 2):
            peel(self, f"fc{depth}", x)
            x = nn.Dense(5, name=f"fc{depth}")(x)
            x = nn.relu(norms.BatchNorm(name=f"bn{depth}")(x, train=train, mask=mask))
        peel(self, "fc3", x)
        return nn.Dense(self.num_classes, name="fc3")(x)


def normed(shape=(3, 3, 1), classes: int = 3):
    """The same as a `Model`."""
    return models.from_flax(Normed(classes), shape, classes, name="normed")


@dataclasses.dataclass(frozen=True)
class By:
    """An algorithm's configuration out of a function that makes the record."""

    build: Callable[..., Any]


def flat(tree) -> dict[tuple[str, ...], Any]:
    """Nested dicts as path -> leaf."""
    return traverse_util.flatten_dict(jax.device_get(tree))


def row(stack, k):
    """One model of a stack."""
    return jax.tree.map(lambda leaf: np.asarray(leaf)[k], stack)


def rows_of(algorithm, state, ids):
    """What clients hold, one model each."""
    stack = algorithm.personal_models(state, jnp.asarray(ids, jnp.int32))
    return [row(stack, k) for k in range(len(ids))]


def mixed(shared, own, private):
    """The nested dict `shared` with the leaves `private` (paths) of `own`."""
    out = {
        path: own[path] if path in private else leaf
        for path, leaf in traverse_util.flatten_dict(shared).items()
    }
    return traverse_util.unflatten_dict(out)


def rounds(simulation, private, count, weights="samples", train=oracles.train_cohort):
    """NumPy rounds with private leaves. -> (mean of the last cohort, client -> path -> private leaf).

    Args:
      simulation: says who takes part; not yet run.
      private: paths of leaves below `params`.
      count: rounds.
      weights: of the mean.
      train: as `oracles.train_cohort`.
    """
    shared = oracles.doubled(simulation.variables["params"])
    start = {path: leaf for path, leaf in traverse_util.flatten_dict(shared).items() if path in private}
    own = dict.fromkeys(range(simulation.setup.num_clients), start)
    for index in range(count):
        ids = simulation.inputs(index)[0].cohort.ids.tolist()
        ids, trained, _ = train([mixed(shared, own[c], private) for c in ids], simulation, index)
        sizes = [len(simulation.setup.partition.train[c]) if weights == "samples" else 1 for c in ids]
        shared = oracles.weighted_mean(trained, sizes)
        for client, model in zip(ids, trained, strict=True):
            leaves = traverse_util.flatten_dict(model)
            own[client] = {path: leaves[path] for path in private}
    return shared, own


def assert_rounds(simulation, private, count, **keywords):
    """Runs `count` rounds: the deployed model and what every client holds are NumPy's."""
    start = flat(simulation.variables["params"])
    shared, own = rounds(simulation, private, count, **keywords)
    drawn = {c for index in range(count) for c in simulation.inputs(index)[0].cohort.ids.tolist()}
    oracles.run(simulation, count)
    oracles.assert_trees_close(simulation.variables["params"], shared)
    everyone = range(simulation.setup.num_clients)
    held = rows_of(simulation.setup.algorithm, simulation.state.algorithm, list(everyone))
    for client in everyone:
        oracles.assert_trees_close(held[client]["params"], mixed(shared, own[client], private))
        for path in private:
            same = np.array_equal(flat(held[client]["params"])[path], start[path])
            assert same == (client not in drawn), (client, path)
    assert drawn != set(everyone)
