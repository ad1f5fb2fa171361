import jax
import numpy as np
import pytest

from fedjax_sim.core.errors import UserError
from fedjax_sim.data import Partition, PartitionConfig, Population, load, partition
from fedjax_sim.data.population import pad

DIGITS = load("digits")


@pytest.mark.parametrize("local_test", ["none", "holdout", "matching"])
def test_rows_hold_each_clients_samples_then_zeros(local_test):
    p = partition(DIGITS, PartitionConfig("dirichlet", clients=15, min_size=5, local_test=local_test))
    population = Population.build(DIGITS, p)
    assert population.indices.dtype == population.counts.dtype == np.int32
    longest = p.sizes().max()
    assert len(population.indices) == 15 and longest <= population.indices.shape[1] <= 1.25 * longest
    for k in range(15):
        np.testing.assert_array_equal(population.indices[k, : population.counts[k]], p.train[k])
        assert not population.indices[k, population.counts[k] :].any()
    assert population.num_clients == 15


def test_it_is_a_pytree_and_counts_its_bytes():
    population = Population.build(DIGITS, partition(DIGITS, PartitionConfig("iid", clients=7)))
    leaves, _ = jax.tree.flatten(population)
    assert len(leaves) == 6
    assert population.nbytes == sum(a.nbytes for a in leaves)
    assert population.nbytes == 1438 * 64 + 1438 * 4 + 7 * 224 * 4 + 7 * 4 + 359 * 64 + 359 * 4


def test_clients_of_another_draw_mostly_find_the_same_width():
    widths = {n: pad([np.arange(n)])[0].shape[1] for n in range(1, 5000)}
    assert all(n <= width <= max(16, 1.25 * n) for n, width in widths.items())
    assert len({widths[n] for n in range(1024, 4097)}) <= 9  # four sizes an octave


def test_a_partition_of_another_set_is_refused():
    with pytest.raises(UserError, match="beyond the 1438 images"):
        Population.build(DIGITS, Partition((np.array([1438]),)))
    other = partition(load("digits-domains"), PartitionConfig("iid", clients=3))
    with pytest.raises(UserError, match="made for digits-domains"):
        Population.build(DIGITS, other)
