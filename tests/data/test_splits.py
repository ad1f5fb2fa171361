"""Recipes for many clients at once against the loops over clients that they took the place of."""

import itertools
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_sim.core.errors import UserError
from fedjax_sim.data import Partition, label_counts, partitions, splits
from fedjax_sim.data.partition_reports import Columns
from fedjax_sim.data.ragged import Ragged, once, runs, without
from fedjax_sim.runs import provenance
from tests.data import former_splits as former

SOME = settings(max_examples=60, deadline=None)
SEEDS = st.integers(0, 10_000)
LABELS = st.tuples(st.integers(1, 400), st.integers(1, 12), SEEDS).map(
    lambda drawn: np.random.default_rng(drawn[2]).integers(0, drawn[1], drawn[0]).astype(np.int32)
)


def check(new, old, *args, seed=0):
    """Both give the same, array by array, and leave their generators at the same place."""
    one, two = np.random.default_rng(seed), np.random.default_rng(seed)
    made, wanted = new(*args, one), old(*args, two)
    pairs = (
        zip(made, wanted, strict=True)
        if isinstance(made, tuple) and not isinstance(made, Ragged)
        else [(made, wanted)]
    )
    for mine, theirs in pairs:
        assert len(mine) == len(theirs)
        for a, b in zip(mine, theirs, strict=True):
            np.testing.assert_array_equal(a, b)
            assert np.asarray(a).dtype == np.int64
    assert one.bit_generator.state == two.bit_generator.state


# --- the recipes ----------------------------------------------------------------------------------------


@SOME
@given(st.integers(1, 300), st.integers(1, 40), SEEDS)
def test_iid(count, clients, seed):
    check(splits.iid, former.iid, count, clients, seed=seed)


@SOME
@given(LABELS, st.integers(1, 30), st.sampled_from([0.3, 1.0, 10.0]), SEEDS)
def test_dirichlet_hands_out_the_same_samples(labels, clients, alpha, seed):
    one = np.random.default_rng(seed)
    try:
        parts, tries = splits.dirichlet(labels, clients, alpha, 1, 30, one)
    except UserError:
        return
    two = np.random.default_rng(seed)
    counts = np.bincount(labels)
    for _ in range(tries):
        cuts = splits._draw_cuts(counts[counts > 0].tolist(), clients, alpha, len(labels) / clients, two)
    for mine, theirs in zip(parts, former.handed_out(labels, cuts, two), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert one.bit_generator.state == two.bit_generator.state


@SOME
@given(LABELS, st.integers(1, 25), st.integers(1, 60), st.sampled_from([0.1, 1.0]), SEEDS)
def test_draw_counts(labels, clients, size, alpha, seed):
    classes = int(labels.max()) + 1
    counts = splits.counts_of_mixes(
        splits.class_mixes(alpha, clients, classes, np.random.default_rng(seed)), size
    )
    counts[:, np.bincount(labels, minlength=classes) == 0] = 0
    if not counts.sum(1).all():
        return
    check(lambda *args: splits.draw_counts(*args, "labels"), former.draw_counts, labels, counts, seed=seed)


@SOME
@given(LABELS, st.integers(1, 40), st.integers(1, 14), SEEDS)
def test_pathological(labels, clients, each, seed):
    one = np.random.default_rng(seed)
    try:
        splits.pathological(labels, clients, each, one)
    except UserError:
        return
    check(splits.pathological, former.pathological, labels, clients, each, seed=seed)


def test_pathological_in_several_batches_of_laps(monkeypatch):
    labels = np.repeat(np.arange(7), 400)
    for at_once in (1, 100, 999):
        monkeypatch.setattr(splits, "_AT_ONCE", at_once)
        check(splits.pathological, former.pathological, labels, 101, 3)


@SOME
@given(LABELS, st.integers(1, 30), st.integers(1, 4), SEEDS)
def test_shards(labels, clients, each, seed):
    check(splits.shards, former.shards, labels, clients, each, seed=seed)


@SOME
@given(LABELS, st.integers(0, 20), st.sampled_from([0, -3, 10**9]), SEEDS)
def test_by_group(groups, more, shift, seed):
    clients = len(np.unique(groups)) + more
    check(splits.by_group, former.by_group, groups.astype(np.int64) + shift, clients, seed=seed)


@SOME
@given(LABELS, st.booleans(), st.integers(0, 3), SEEDS)
def test_by_writer(writers, all_of_them, least, seed):
    there = int((np.unique(writers, return_counts=True)[1] >= least).sum())
    clients = None if all_of_them else max(1, there // 2)
    if there:
        check(splits.by_writer, former.by_writer, writers, clients, least, seed=seed)


@SOME
@given(st.integers(1, 30), st.integers(0, 300), st.floats(0, 3), SEEDS)
def test_quantity(clients, more, sigma, seed):
    made = splits.quantity(clients + more, clients, sigma, 1, np.random.default_rng(seed))
    rng = np.random.default_rng(seed)
    rng.standard_normal(clients)
    for mine, theirs in zip(made, former.quantity(made.sizes, rng), strict=True):
        np.testing.assert_array_equal(mine, theirs)


@SOME
@given(
    st.lists(st.lists(st.integers(0, 60), min_size=1, max_size=12), min_size=1, max_size=12),
    st.booleans(),
    st.floats(0.05, 0.95),
    SEEDS,
)
def test_hold_out(lists, apart, share, seed):
    """Of clients that share samples, and of such as share none."""
    parts = [np.asarray(part, np.int64) + 100 * k * apart for k, part in enumerate(lists)]
    try:
        former.hold_out(parts, share, np.random.default_rng(seed))
    except ValueError as wrong:
        with pytest.raises(UserError, match=f"client {wrong.args[0]}( |\\.)"):
            splits.hold_out(parts, share, np.random.default_rng(seed))
        return
    check(splits.hold_out, former.hold_out, parts, share, seed=seed)


@SOME
@given(LABELS, st.booleans(), SEEDS)
def test_tests_of_groups(ids, all_of_them, seed):
    groups = np.random.default_rng(seed).permutation(np.unique(ids))
    size = None if all_of_them else int(np.bincount(ids)[groups].min())
    check(partitions._matching_groups, former.matching_groups, ids, groups, size, seed=seed)


# --- draws ----------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 50)), min_size=1, max_size=40),
    st.sampled_from([1, 30, 2**21]),
    SEEDS,
)
def test_choices_are_numpys_and_leave_its_generator_where_it_would_be(pairs, at_once, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splits, "_AT_ONCE", at_once)
        compare_choices(np.array(pairs), seed)


@pytest.mark.parametrize("seed", range(3))
def test_choices_of_large_populations(seed):
    """Beyond 10,000, of which NumPy shuffles all if more than a fiftieth is chosen."""
    pairs = [(9_999, 300), (10_000, 201), (10_001, 200), (10_001, 201), (60_000, 5), (20_000, 20_000)]
    pairs += [(10_500, 11_000), (3, 2), (1, 1), (1, 4), (2**31, 3), (2**33, 40)]
    compare_choices(np.array(pairs), seed)


def compare_choices(pairs, seed):
    one, two = np.random.default_rng(seed), np.random.default_rng(seed)
    one.integers(5, dtype=np.int32), two.integers(5, dtype=np.int32)  # half a word is left over
    made = Ragged.cut(splits.choices(pairs[:, 0], pairs[:, 1], one), pairs[:, 1])
    for mine, (population, size) in zip(made, pairs.tolist(), strict=True):
        theirs = two.choice(population, size, replace=size > population)
        np.testing.assert_array_equal(np.sort(mine), np.sort(theirs))
    assert one.bit_generator.state == two.bit_generator.state


# --- lists of different lengths -------------------------------------------------------------------------

LISTS = st.lists(st.lists(st.integers(0, 30), max_size=6), min_size=1, max_size=8)


@SOME
@given(LISTS, st.integers(0, 3), st.slices(8))
def test_ragged_lists_read_like_a_tuple_of_arrays(lists, times, part):
    arrays = tuple(np.asarray(each, np.int64) for each in lists)
    ragged = Ragged.of(arrays)
    assert ragged.tolist() == lists and len(ragged) == len(lists)
    assert ragged[part].tolist() == lists[part] and (times * ragged).tolist() == times * lists
    assert ragged[-1].tolist() == lists[-1] and [each.tolist() for each in ragged] == lists
    assert ragged.sizes.tolist() == [len(each) for each in lists]
    assert ragged.ascending().tolist() == [sorted(each) for each in lists]
    assert ragged.distinct().tolist() == [sorted(set(each)) for each in lists]
    even = ragged.flat % 2 == 0
    assert ragged.kept(even).tolist() == [[i for i in each if i % 2 == 0] for each in lists]
    assert [ragged.list_at(place) for place in range(len(ragged.flat))] == ragged.owners.tolist()
    order = np.random.default_rng(0).permutation(len(ragged.flat))
    again = Ragged.gathered(ragged.owners[order], ragged.flat[order], len(lists))
    assert again.tolist() == ragged.ascending().tolist()
    with pytest.raises(IndexError):
        ragged[len(lists)]


def test_ragged_lists_of_huge_numbers_are_sorted_as_well():
    ragged = Ragged.of([np.array([2**62, 5]), np.array([2**62 - 1, 2**62, 0])])
    assert ragged.ascending().tolist() == [[5, 2**62], [0, 2**62 - 1, 2**62]]


def test_helpers_of_indices():
    np.testing.assert_array_equal(runs(np.array([5, 0, 9]), np.array([2, 0, 3])), [5, 6, 9, 10, 11])
    np.testing.assert_array_equal(once(np.array([3, 1, 3, 0])), [0, 1, 3])
    np.testing.assert_array_equal(without(6, np.array([4, 0])), [1, 2, 3, 5])


# --- what is told of a partition ------------------------------------------------------------------------


@SOME
@given(st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=9), min_size=1, max_size=9), SEEDS)
def test_counts_and_checksums(lists, seed):
    labels = np.random.default_rng(seed).integers(0, 4, 31).astype(np.int32)
    given_lists = Partition(tuple(np.asarray(each) for each in lists), rng_ids=np.arange(len(lists)))
    wanted = former.label_counts(given_lists.train, labels, 4)
    np.testing.assert_array_equal(label_counts(given_lists, labels, 4), wanted)
    crc = 0
    for part in given_lists.train:
        crc = zlib.crc32(f"{len(part)}:".encode() + part.astype("<i8").tobytes(), crc)
    told = provenance.describe_partition(given_lists)
    assert told["crc32_train"] == crc
    ids = np.arange(len(lists)).astype("<i8").tobytes()
    assert told["crc32"] == zlib.crc32(f"{len(lists)}:".encode() + ids, crc)


def test_a_label_that_is_not_counted_is_told():
    with pytest.raises(UserError, match="there are 3 classes"):
        label_counts(Partition(([0, 1],)), np.array([0, 3]), 3)


def test_a_picture_of_many_clients_has_columns_of_means():
    rng = np.random.default_rng(0)
    sizes, shares = rng.integers(1, 50, 1234), rng.dirichlet(np.ones(3), 1234)
    few = Columns.of(sizes[:1000], shares[:1000])
    assert few.each == 1 and np.array_equal(few.shares, shares[:1000])
    drawn = Columns.of(sizes, shares)
    assert drawn.shares.shape == (500, 3)
    starts = [column * 1234 // 500 for column in range(501)]
    for column, (start, stop) in enumerate(itertools.pairwise(starts)):
        np.testing.assert_allclose(drawn.shares[column], shares[start:stop].mean(0))
        own = sizes[start:stop]
        assert drawn.sizes[column] == pytest.approx(own.mean())
        assert (drawn.smallest[column], drawn.largest[column]) == (own.min(), own.max())


# --- what a partition refuses ---------------------------------------------------------------------------


def test_the_first_client_at_fault_is_named():
    for lists, says in (
        (([1], [], [-1]), "client 1.*empty"),
        (([1], [-2], []), "client 1 has a negative index"),
        (([1], [1.5]), "client 1"),
        (([1], [[1]]), "client 1"),
    ):
        with pytest.raises(UserError, match=says):
            Partition(lists)
    with pytest.raises(UserError, match=r"client 1 tests on.*client 2 trains on it.*2 of 4") as caught:
        Partition(([1], [2], [7, 5]), ([3], [4, 5], [7]), "train")
    assert caught.value.value == 5


def test_memory_goes_with_the_samples_and_not_with_clients_times_clients():
    """20,000 clients of five: N × N bits would be 50 MB, one array object for each of them 4 MB."""
    labels = np.arange(100_000) % 10
    tracemalloc.start()
    rng = np.random.default_rng(0)
    parts = splits.pathological(labels, 20_000, 2, rng)
    train, test = splits.hold_out(parts, 0.2, rng)
    made = Partition(train, test, "train")
    label_counts(made, labels, 10)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 30e6
