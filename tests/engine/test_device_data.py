"""Who holds what as one flat table, orders of any client in one program, and arrays placed once."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedjax_sim import models
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.rng import run_key
from fedjax_sim.data import Partition, PartitionConfig, load, partition
from fedjax_sim.engine import placement
from fedjax_sim.engine.clients import Lanes, _orders, argsort, shuffled
from fedjax_sim.engine.device_data import DataStore, Rows, abstract, order_lengths, sample_table
from tests import oracles

DIGITS = load("digits")


@pytest.mark.parametrize("local_test", ["none", "holdout", "matching"])
def test_the_table_holds_each_clients_samples_one_after_another(local_test):
    own = partition(DIGITS, PartitionConfig("dirichlet", clients=15, min_size=5, local_test=local_test))
    samples, offsets = sample_table(own, DIGITS.train_size)
    assert samples.dtype == offsets.dtype == np.int32 and offsets.shape == (16,)
    for k in range(15):
        np.testing.assert_array_equal(samples[offsets[k] : offsets[k + 1]], own.train[k])
    assert not samples[offsets[-1] :].any()


def test_its_size_does_not_depend_on_the_draw_nor_on_the_largest_client():
    """100,000 clients of which one holds half of everything take what 100,000 equal ones take."""
    sizes = np.ones(100_000, int)
    sizes[7] = 50_000
    uneven = Partition(tuple(np.split(np.arange(sizes.sum()), np.cumsum(sizes)[:-1])))
    samples, offsets = sample_table(uneven, 160_000)
    assert samples.nbytes == 4 * 160_000 and offsets.nbytes == 4 * 100_001


def test_samples_that_several_clients_hold_are_rounded_up():
    twice = Partition((np.arange(1438), np.arange(1438)))
    samples, offsets = sample_table(twice, 1438)
    assert len(samples) == 3072 and offsets.tolist() == [0, 1438, 2876]


def test_more_samples_than_can_be_counted_are_refused():
    """Of clients that hold nearly everything each: views of one array, so that the test holds little."""
    everything = np.broadcast_to(np.int64(0), (2**30,))
    partition: Any = SimpleNamespace(train=(everything,) * 2, sizes=lambda: np.array([2**30, 2**30]))
    with pytest.raises(UserError, match="2147483648"):
        sample_table(partition, 1)


def test_seeds_of_a_dirichlet_sweep_find_the_same_shapes():
    for alpha, clients in ((0.1, 20), (0.5, 20), (1.0, 50)):
        own = [
            partition(DIGITS, PartitionConfig("dirichlet", clients=clients, alpha=alpha, min_size=1), seed)
            for seed in range(6)
        ]
        assert len({int(p.sizes().max()) for p in own}) > 1
        shapes = {(len(sample_table(p, DIGITS.train_size)[0]), order_lengths(p.sizes())) for p in own}
        assert len(shapes) == 1


def test_seeds_and_skews_of_a_dirichlet_sweep_find_the_same_lengths():
    """Of 100 clients the largest may hold more than four times the mean, or less."""
    sizes = [
        partition(DIGITS, PartitionConfig("dirichlet", clients=100, alpha=alpha, min_size=1), seed).sizes()
        for alpha in (0.1, 0.3)
        for seed in range(6)
    ]
    assert min(s.max() for s in sizes) < 64 < max(s.max() for s in sizes)
    assert {order_lengths(s) for s in sizes} == {(32, 64, 512)}


def test_nearly_equal_clients_are_ordered_at_little_more_than_their_size():
    for kind, clients, length in (("iid", 140, 11), ("shards", 50, 32)):
        own = [partition(DIGITS, PartitionConfig(kind, clients=clients), seed).sizes() for seed in range(6)]
        assert {order_lengths(sizes) for sizes in own} == {(length,)}
    assert order_lengths(np.array([16, 16, 17])) == (20,)
    assert order_lengths(np.array([16, 16, 22])) == order_lengths(np.array([10, 18, 18])) == (32, 64)


def test_a_long_last_length_is_taken_only_where_it_is_needed():
    """Every client beside another has as much room as the last length."""
    sizes = np.full(1000, 5000)
    sizes[0] = 20_000
    assert order_lengths(sizes)[-1] == 32_768
    sizes[0] = 40_000
    assert order_lengths(sizes)[-1] == 65_536


def test_clients_of_one_size_are_ordered_at_just_that():
    assert order_lengths(np.full(9, 18)) == (18,)
    assert order_lengths(np.array([0, 0])) == (1,)


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=30))
def test_the_last_length_holds_every_client_and_no_more_than_all(counts):
    sizes = np.array(counts)
    lengths = order_lengths(sizes)
    assert list(lengths) == sorted(set(lengths)) and lengths[-1] >= sizes.max()
    assert lengths[-1] < 2 * max(sizes.sum(), 1)
    assert len(lengths) <= 8


@pytest.mark.parametrize("largest", [0, 1, 32, 33, 64, 128, 500])
def test_orders_are_the_same_at_whatever_length_they_are_computed(largest):
    counts = np.array([largest, largest // 2, min(largest, 1)], np.int32)
    keys = jax.random.split(run_key(3), 3)
    nothing = jnp.zeros(3, jnp.float32)
    lanes = Lanes(
        client_state=None, ids=jnp.arange(3), counts=jnp.asarray(counts), weights=nothing, keys=keys
    )
    epochs = jnp.array([0, 1, 2], jnp.int32)
    orders = np.asarray(_orders(lanes, epochs, (32, 64, 128, 512)))
    assert orders.shape == (3, 512)
    for lane, count in enumerate(counts):
        for length in (count, 512):
            wanted = shuffled(keys[lane], epochs[lane], jnp.int32(count), max(length, 1))[:count]
            np.testing.assert_array_equal(orders[lane, :count], wanted)


@pytest.mark.parametrize("length", [1, 2, 13, 32, 64, 65])
def test_numbers_are_put_in_order_as_a_stable_sort_does_it(length):
    rng = np.random.default_rng(length)
    for below in (2, 5, 2**32):  # many that are equal, and hardly any
        drawn = rng.integers(0, below, length, dtype=np.uint32)
        drawn[: length // 4] = 0xFFFFFFFF
        order = argsort(jnp.asarray(drawn))
        assert order.dtype == np.int32
        np.testing.assert_array_equal(order, np.argsort(drawn, kind="stable"))


def test_an_array_is_placed_once_and_a_plan_places_none():
    put = []
    mesh = placement.make_mesh(2)

    def place(array, sharding):
        put.append(array)
        return placement.put(array, sharding)

    own = partition(DIGITS, PartitionConfig("iid", clients=7))
    store, plan = DataStore(mesh, place), DataStore(mesh, abstract)
    data, planned = store.of_round(DIGITS, own), plan.of_round(DIGITS, own)
    assert len(put) == 4 and data.rng_ids is None
    assert store.whole(DIGITS.train)["image"] is data.train["image"] and len(put) == 4
    assert not store.has(DIGITS.test)
    store.whole(DIGITS.test)
    assert store.has(DIGITS.test) and len(put) == 6
    like = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), data)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), planned) == like
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(planned))


@pytest.mark.parametrize("shape", [(5,), (5, 4), (5, 4, 3), (5, 2, 3, 2)])
def test_samples_are_taken_by_their_numbers_whatever_their_axes(shape, rng):
    """Those of several are flat on the device: a program that takes some copies none of the others."""
    array, index = rng.integers(0, 256, shape).astype(np.uint8), np.array([[4, 0], [2, 2]], np.int32)
    placed = DataStore(placement.make_mesh(2)).put(array)
    assert placed.shape == shape and len(placed) == 5
    assert isinstance(placed, Rows) == (len(shape) > 2)
    assert all(leaf.ndim <= 2 for leaf in jax.tree.leaves(placed))
    np.testing.assert_array_equal(placed[1], array[1])
    np.testing.assert_array_equal(jax.jit(lambda rows, index: rows[index])(placed, index), array[index])


def test_seeds_of_a_sweep_share_one_program():
    """The text that is compiled is the same, though their largest clients differ."""
    model = models.create("mlp", (8, 8, 1), 10, hidden=(4,))
    texts, largest = set(), set()
    for seed in range(3):
        own = partition(DIGITS, PartitionConfig("dirichlet", clients=20, alpha=0.5, min_size=1), seed)
        simulation = oracles.simulate(given=(DIGITS, own), model=model, cohort=5, devices=2, seed=seed)
        inputs, _ = simulation.inputs(0)
        with jax.set_mesh(simulation.mesh):
            lowered = simulation.program.lower(simulation.abstract_state(), inputs, simulation.data)
        texts.add(lowered.as_text())
        largest.add(simulation.setup.counts.max())
    assert len(largest) > 1 and len(texts) == 1


def test_a_store_near_another_takes_what_lies_there():
    devices = jax.devices()
    first = DataStore(placement.mesh_of(devices[:1]))
    images, labels = np.arange(4 * 3 * 3, dtype=np.float32).reshape(4, 3, 3), np.arange(4, dtype=np.int32)
    alone = {"image": first.put(images).flat, "label": first.put(labels)}
    store = DataStore(placement.mesh_of(devices), near=first)
    both = {"image": store.put(images), "label": store.put(labels)}
    assert both["image"].one == (3, 3)
    both["image"] = both["image"].flat
    for name, array in both.items():
        assert array.sharding.is_equivalent_to(placement.replicated(store.mesh), array.ndim)
        np.testing.assert_array_equal(array, np.asarray(alone[name]))
        places = [shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards]
        assert set(places) == {alone[name].unsafe_buffer_pointer()}  # a CPU's devices share one
    assert store.put(images).flat is both["image"]
    other = np.ones(3, np.float32)
    np.testing.assert_array_equal(store.put(other), other)
