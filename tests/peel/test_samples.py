"""Whom and what a probe measures: of the same shape for every seed, and nothing beyond what clients have."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sim import models
from fedjax_sim.config import PeelConfig
from fedjax_sim.data import Partition, PartitionConfig, load, partition
from fedjax_sim.probes.peel.forward import Forward
from fedjax_sim.probes.peel.samples import Samples
from tests import oracles

DIGITS = load("digits")


def test_seeds_of_a_sweep_hand_over_the_same_shapes():
    """So that the probe, which takes long to compile, is compiled once."""
    shapes, largest = set(), set()
    for seed in range(4):
        own = partition(DIGITS, PartitionConfig("dirichlet", clients=20, alpha=0.5, min_size=5), seed)
        handed = Samples(PeelConfig(every=1), DIGITS, own, seed, 50).of_clients(np.array([3, 8]))
        shapes.add(str(jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), handed)))
        largest.add(int(own.sizes().max()))
    assert len(largest) > 1 and len(shapes) == 1


def test_too_few_classes_of_clients_are_warned_about_before_the_run():
    labels = np.asarray(DIGITS.train_labels)
    of_class = [np.flatnonzero(labels == one)[:20] for one in range(6)]
    two = [np.concatenate([of_class[2 * i], of_class[2 * i + 1]]) for i in range(3)]

    def told(parts, **given):
        samples = Samples(PeelConfig(every=1, **given), DIGITS, Partition(tuple(parts)), 0, 50)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            samples.warn_of_single_classes()
        for one in found:
            others = "all of them" if "none have" in str(one.message) else "the others"
            assert f"is undefined for {others}. Lower" in str(one.message)
        return [str(one.message).split(" two classes")[0] for one in found]

    assert told(two) == []
    assert told(of_class) == ["peel: of 6 clients none have"]
    assert told([*of_class[:2], two[2]]) == ["peel: of 3 clients 1 has"]
    assert told([*of_class[:2], *two[1:]]) == []
    assert told(two, class_samples=15) == ["peel: of 3 clients none have"]
    assert told(of_class, clients=4) == ["peel: of 4 clients none have"]


def test_batches_beyond_a_clients_samples_are_not_looked_at():
    """The count says how many are its own."""
    model = models.create("mlp", (8, 8, 1), 10, hidden=(4,))
    forward = Forward(model, oracles.task_of(model), PeelConfig(every=1), 5)
    pool = {key: jnp.asarray(leaf) for key, leaf in DIGITS.train.items()}
    index = np.arange(20, dtype=np.int32)

    def measure(images, labels, mask):
        return {"batches": jnp.float32(1), "labels": jnp.where(mask, labels, 0).sum()}

    def of(count):
        chosen = {"index": jnp.asarray(index), "count": jnp.int32(count)}
        return forward.over(chosen, pool, measure, lambda a, b: jax.tree.map(jnp.add, a, b))

    labels = np.asarray(DIGITS.train_labels)
    for count, batches in ((0, 0), (1, 1), (5, 1), (6, 2), (20, 4)):
        found = of(count)
        assert int(found["batches"]) == batches
        assert int(found["labels"]) == labels[:count].sum()
