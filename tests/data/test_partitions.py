import dataclasses
import tempfile
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedjax_sim.config import from_dict
from fedjax_sim.core.errors import UserError
from fedjax_sim.data import (
    Dataset,
    Partition,
    PartitionConfig,
    effective_classes,
    label_counts,
    load,
    load_partition,
    partition,
    plot,
    save,
    splits,
    summary,
)
from fedjax_sim.data.partition_reports import held_by_nobody
from fedjax_sim.data.partitions import for_server
from fedjax_sim.runs.federation import Simulation
from fedjax_sim.runs.provenance import describe_partition
from tests import oracles

# Of the small partitions here many leave samples; what is said of it has tests of its own.
pytestmark = pytest.mark.filterwarnings("ignore:partition.kind = .*held by nobody")

DIGITS = load("digits")
DOMAINS = load("digits-domains")


def make(labels, classes, test=None, **more):
    """A set of 1x1 images with these labels."""
    labels, test = np.asarray(labels), np.arange(5 * classes) % classes if test is None else np.asarray(test)
    images = np.zeros((len(labels), 1, 1, 1), np.uint8), np.zeros((len(test), 1, 1, 1), np.uint8)
    return Dataset("made", images[0], labels, images[1], test, classes, **more)


@st.composite
def sets(draw):
    classes = draw(st.integers(2, 8))
    labels = np.concatenate([np.full(draw(st.integers(8, 60)), c) for c in range(classes)])
    return make(np.random.default_rng(draw(st.integers(0, 99))).permutation(labels), classes)


def complete_and_disjoint(parts, n):
    return np.array_equal(np.sort(np.concatenate(parts)), np.arange(n))


FAST = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@FAST
@given(
    sets(),
    st.sampled_from(["iid", "dirichlet", "pathological", "shards", "quantity"]),
    st.integers(1, 6),
    st.sampled_from([0.3, 1.0, 100.0]),
    st.integers(0, 50),
)
def test_these_kinds_are_disjoint_complete_and_deterministic(dataset, kind, clients, alpha, seed):
    classes = dataset.num_classes
    config = PartitionConfig(kind, clients=clients, alpha=alpha, min_size=1, classes_per_client=classes)
    p = partition(dataset, config, seed)
    assert p.num_clients == clients
    assert complete_and_disjoint(p.train, len(dataset.train_labels))
    assert p.sizes().min() >= 1
    again = partition(dataset, config, seed)
    assert all(np.array_equal(a, b) for a, b in zip(p.train, again.train, strict=True))


@FAST
@given(sets(), st.integers(2, 6), st.floats(0.1, 10), st.integers(0, 50))
def test_dirichlet_respects_the_cap(dataset, clients, alpha, seed):
    config = PartitionConfig(clients=clients, alpha=alpha, min_size=1, max_tries=3000)
    counts = label_counts(partition(dataset, config, seed), dataset.train_labels, dataset.num_classes)
    cap = len(dataset.train_labels) / clients
    held = np.cumsum(counts, 1) - counts  # before class c
    # The last client also gets what flooring leaves over: one sample of a class at most.
    assert (counts[:-1][held[:-1] >= cap] == 0).all()
    assert (counts[-1][held[-1] >= cap] <= 1).all()


def test_dirichlet_hands_out_in_the_shares_that_were_drawn():
    labels = np.repeat(np.arange(3), 1000)
    rng = np.random.default_rng(7)
    parts, tries = splits.dirichlet(labels, 5, 0.5, 1, 100, rng)
    rng = np.random.default_rng(7)  # the same draws in a loop anyone can check
    for _ in range(tries):
        sizes, cuts = np.zeros(5), []
        for _ in range(3):
            shares = np.array(
                [p * (s < 3000 / 5) for p, s in zip(rng.dirichlet([0.5] * 5), sizes, strict=True)]
            )
            cut = (np.cumsum(shares / shares.sum()) * 1000).astype(int)[:-1]
            cuts.append(np.diff([0, *cut, 1000]))
            sizes += cuts[-1]
    got = np.array([np.bincount(labels[p], minlength=3) for p in parts])
    np.testing.assert_array_equal(got, np.array(cuts).T)


def test_dirichlet_sizes_are_like_those_that_fedmr_publishes():
    """Over its shipped partitions of CIFAR-10: median 358 and largest 2848 at 0.1; 509 and 735 at 1.0."""
    labels = np.repeat(np.arange(10), 5000)
    wide = np.array(
        [len(p) for p in splits.dirichlet(labels, 100, 0.1, 10, 1000, np.random.default_rng(0))[0]]
    )
    even = np.array(
        [len(p) for p in splits.dirichlet(labels, 100, 1.0, 10, 1000, np.random.default_rng(0))[0]]
    )
    assert 300 < np.median(wide) < 550 and 1400 < wide.max() < 3600 and wide.min() >= 10
    assert 480 < np.median(even) < 540 and 620 < even.max() < 900 and even.min() > 120


def test_dirichlet_gives_up_and_says_what_it_reached():
    with pytest.raises(UserError, match=r"in 5 draws.*never had 10 samples.*best draw reached \d.*max_tries"):
        partition(DIGITS, PartitionConfig(clients=100, alpha=0.05, max_tries=5))


def test_dirichlet_survives_an_alpha_that_underflows():
    with pytest.raises(UserError, match=r"partition\.alpha"):
        partition(DIGITS, PartitionConfig(clients=50, alpha=1e-5, max_tries=20))


@FAST
@given(sets(), st.integers(1, 12), st.integers(10, 90), st.floats(0.05, 10), st.integers(0, 50))
def test_dirichlet_classes_has_exact_sizes_and_matching_tests(dataset, clients, size, alpha, seed):
    config = PartitionConfig(
        "dirichlet-classes",
        clients=clients,
        alpha=alpha,
        samples_per_client=size,
        test_samples_per_client=2 * size,
        local_test="matching",
    )
    p = partition(dataset, config, seed)
    assert p.test is not None and p.test_from == "test"
    assert (p.sizes() == size).all() and all(len(t) == 2 * size for t in p.test)
    train = label_counts(p, dataset.train_labels, dataset.num_classes)
    test = np.stack([np.bincount(dataset.test_labels[t], minlength=dataset.num_classes) for t in p.test])
    # Both are roundings of one mix; the last class takes what the others' rounding leaves.
    whole = (train[:, -1] > 0) & (test[:, -1] > 0)  # else the last but one was cut to fit
    assert (abs(2 * train - test)[whole, :-1] <= 1).all()
    available = np.bincount(dataset.train_labels, minlength=dataset.num_classes)
    for part in p.train:  # repeats only where the class is too small
        values, times = np.unique(part, return_counts=True)
        asked = np.bincount(dataset.train_labels[part], minlength=dataset.num_classes)
        for c in set(dataset.train_labels[values[times > 1]].tolist()):
            assert asked[c] > available[c]


def test_counts_of_mixes_round_as_lips_does():
    mixes = np.array([[0.25, 0.25, 0.5], [0.15, 0.8, 0.05], [0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    np.testing.assert_array_equal(
        splits.counts_of_mixes(mixes, 10), [[3, 3, 4], [2, 8, 0], [5, 5, 0], [10, 0, 0]]
    )
    np.testing.assert_array_equal(splits.counts_of_mixes(np.full((1, 4), 0.25), 2), [[1, 1, 0, 0]])


@FAST
@given(sets(), st.integers(1, 10), st.integers(1, 8), st.integers(0, 50))
def test_pathological_gives_exactly_so_many_classes(dataset, clients, per_client, seed):
    per_client = min(per_client, dataset.num_classes)
    config = PartitionConfig("pathological", clients=clients, classes_per_client=per_client, min_size=1)
    try:
        p = partition(dataset, config, seed)
    except UserError as e:
        too_many = clients * per_client > len(dataset.train_labels)
        assert ("each need more than" if too_many else "samples for") in str(e)  # or a class is too small
        return
    held = label_counts(p, dataset.train_labels, dataset.num_classes) > 0
    assert (held.sum(1) == per_client).all()
    assert np.ptp(held.sum(0)) <= 1
    assert len(np.unique(np.concatenate(p.train))) == p.sizes().sum()
    if clients * per_client >= dataset.num_classes:
        assert complete_and_disjoint(p.train, len(dataset.train_labels))


def test_shards_have_at_most_twice_the_classes():
    p = partition(DIGITS, PartitionConfig("shards", clients=20))
    counts = label_counts(p, DIGITS.train_labels, 10)
    assert complete_and_disjoint(p.train, 1438)
    assert ((counts > 0).sum(1) <= 4).all() and (counts > 0).sum(1).mean() < 3


@pytest.mark.parametrize("clients", [5, 7, None])
def test_domain_clients_hold_one_domain(clients):
    p = partition(DOMAINS, PartitionConfig("domain", clients=clients, local_test="matching"))
    assert p.num_clients == (clients or 5) and p.test is not None
    assert complete_and_disjoint(p.train, len(DOMAINS.train_labels))
    for train, test, domain in zip(p.train, p.test, p.recipe["domains"], strict=True):
        assert set(DOMAINS.train_domains[train]) == set(DOMAINS.test_domains[test]) == {domain}
    assert sorted(set(p.recipe["domains"])) == [0, 1, 2, 3, 4]


WRITERS = np.repeat(np.arange(12), np.arange(3, 15))
WRITTEN = make(np.arange(len(WRITERS)) % 3, 3, train_writers=WRITERS, test_writers=np.arange(15) % 12)


def test_natural_clients_are_writers_with_their_own_tests():
    p = partition(WRITTEN, PartitionConfig("natural", clients=None, min_size=5, local_test="matching"))
    assert (
        p.test is not None
        and p.recipe["writers"] == list(range(2, 12))
        and p.recipe["writers_too_small"] == 2
    )
    for train, test, writer in zip(p.train, p.test, p.recipe["writers"], strict=True):
        np.testing.assert_array_equal(train, np.flatnonzero(np.equal(WRITERS, writer)))
        assert set(WRITTEN.test_writers[test]) == {writer}


def test_natural_can_take_some_of_the_writers():
    p = partition(WRITTEN, PartitionConfig("natural", clients=4, min_size=0))
    assert len(set(p.recipe["writers"])) == 4
    with pytest.raises(UserError, match="of 12 writers 10 have 5"):
        partition(WRITTEN, PartitionConfig("natural", clients=11, min_size=5))


def test_quantity_sizes_spread_with_sigma_above_the_floor():
    even = partition(DIGITS, PartitionConfig("quantity", clients=20, sigma=0)).sizes()
    wide = partition(DIGITS, PartitionConfig("quantity", clients=20, sigma=2.0)).sizes()
    assert np.ptp(even) <= 1 and even.sum() == wide.sum() == 1438
    assert wide.min() >= 10 and wide.max() > 200


@FAST
@given(st.integers(1, 9), st.integers(0, 500), st.integers(0, 99))
def test_largest_remainder_adds_up(parts, total, seed):
    shares = np.random.default_rng(seed).dirichlet(np.ones(parts), 3)
    counts = splits.largest_remainder(shares, total)
    assert (counts.sum(1) == total).all() and (abs(counts - shares * total) < 1 + 1e-6).all()


@FAST
@given(
    st.sampled_from(["iid", "dirichlet", "dirichlet-classes", "pathological"]),
    st.floats(0.01, 0.99),
    st.integers(0, 9),
)
def test_holdout_takes_its_share_and_never_leaks(kind, share, seed):
    config = PartitionConfig(kind, clients=20, min_size=5)
    whole = partition(DIGITS, config, seed)
    p = partition(DIGITS, dataclasses.replace(config, local_test="holdout", holdout=share), seed)
    assert p.test is not None and p.test_from == "train"
    for before, train, test in zip(whole.train, p.train, p.test, strict=True):
        assert not set(train) & set(test) and len(train) and len(test)
        np.testing.assert_array_equal(np.unique(np.concatenate([train, test])), np.unique(before))
        if kind != "dirichlet-classes":  # whose clients share samples: see below
            assert abs(len(test) - share * len(np.unique(before))) <= 1


@FAST
@given(
    st.sampled_from(["dirichlet-classes", "identical", "file"]),
    st.integers(2, 30),
    st.integers(20, 200),
    st.floats(0.1, 0.9),
    st.integers(0, 9),
)
def test_clients_that_share_samples_train_on_none_that_another_holds_out(kind, clients, size, share, seed):
    """With the holdout of before, 259 of 400 were other clients' training samples (20 clients of 100)."""
    drawn = "dirichlet-classes" if kind == "file" else kind
    whole = partition(DIGITS, PartitionConfig(drawn, clients=clients, samples_per_client=size), seed)
    again = PartitionConfig(
        drawn, clients=clients, samples_per_client=size, local_test="holdout", holdout=share
    )
    with tempfile.TemporaryDirectory() as folder:
        if kind == "file":
            save(whole, f"{folder}/p.json")
            again = PartitionConfig(
                "file", clients=None, path=f"{folder}/p.json", local_test="holdout", holdout=share
            )
        p = partition(DIGITS, again, seed)
        save(p, f"{folder}/held.json")  # repeats inside a client survive, also where the recipe is of a file
        loaded = load_partition(f"{folder}/held.json", DIGITS)
    assert all(np.array_equal(a, b) for a, b in zip(p.train, loaded.train, strict=True))
    assert p.test is not None and not np.isin(np.concatenate(p.test), np.concatenate(p.train)).any()
    for before, train, test in zip(whole.train, p.train, p.test, strict=True):
        np.testing.assert_array_equal(np.sort(before[~np.isin(before, test)]), train)
        np.testing.assert_array_equal(np.union1d(train, test), np.unique(before))
    shares = [len(t) / len(np.unique(w)) for t, w in zip(p.test, whole.train, strict=True)]
    # Clients that come late find most of their samples decided: as near to the share as can be.
    assert abs(np.mean(shares) - share) < 0.05


def test_hold_out_decides_each_sample_once_and_says_where_nothing_is_left():
    rng = np.random.default_rng(0)
    parts = [np.array([0, 0, 1, 2, 3]), np.array([0, 1, 2, 3]), np.array([3, 4, 5, 6])]
    train, test = splits.hold_out(parts, 0.25, rng)
    np.testing.assert_array_equal(test[0], test[1])  # the second client's samples were all decided
    assert [len(t) for t in test] == [1, 1, 1] and len(train[0]) in (3, 4)
    pairs = [np.array([0, 1]), np.array([2, 3]), np.array([0, 2]), np.array([1, 3]), np.array([0, 3])]
    told = set()
    for seed in range(20):
        try:
            train, test = splits.hold_out(pairs, 0.5, np.random.default_rng(seed))
            assert not np.isin(np.concatenate(test), np.concatenate(train)).any()
        except UserError as e:
            told |= {word for word in ("train on all 2", "hold out all 2") if word in str(e)}
    assert told == {"train on all 2", "hold out all 2"}


def test_matching_tests_follow_the_label_mix_of_the_client():
    config = PartitionConfig(
        "dirichlet", clients=10, alpha=0.3, local_test="matching", test_samples_per_client=50
    )
    p = partition(DIGITS, config)
    assert p.test is not None
    counts = label_counts(p, DIGITS.train_labels, 10)
    for shares, test in zip(counts / counts.sum(1, keepdims=True), p.test, strict=True):
        got = np.bincount(DIGITS.test_labels[test], minlength=10)
        assert got.sum() == 50 and (abs(got - 50 * shares) < 1).all()


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            PartitionConfig("pathological", clients=2),
            "no client trains on classes 1, 2, 4, 6, 7 ….*more partition",
        ),
        (PartitionConfig("dirichlet-classes", clients=2, alpha=0.01), "no client trains on classes"),
        (
            PartitionConfig("iid", clients=1, samples_per_client=10),
            "1,428 of 1,438.*no client trains on",
        ),
    ],
)
def test_classes_that_nobody_trains_on_are_told(config, says):
    with pytest.warns(UserWarning, match=says):
        p = partition(DIGITS, config)
    left = 1438 - len(p.held())
    lost = set(range(10)) - set(DIGITS.train_labels[np.concatenate(p.train)])
    text = summary(p, DIGITS)
    assert f"; {left:,} by nobody, all of class" in text and lost
    assert held_by_nobody(p, DIGITS) == (left, [str(c) for c in sorted(lost)])


def test_samples_that_no_setting_leaves_are_told(tmp_path):
    with pytest.warns(UserWarning, match=r"7 of 102 training.*by nobody: 2 writers.*min_size = 5"):
        partition(WRITTEN, PartitionConfig("natural", clients=None, min_size=5))
    save(Partition(tuple(np.arange(1400).reshape(4, 350))), tmp_path / "p.json")
    config = PartitionConfig("file", clients=4, path=str(tmp_path / "p.json"))
    with pytest.warns(UserWarning, match=r"38 of 1,438 training samples are held by nobody in .*p\.json"):
        p = partition(DIGITS, config)
    assert "1,400 of 1,438; 0 by more than one client; 38 by nobody\n" in summary(p, DIGITS)
    tested = partition(DIGITS, PartitionConfig("iid", clients=10, local_test="holdout", holdout=0.25), 0)
    count = sum(map(len, tested.test))
    assert f"; {count} held out for clients' tests; 0 by nobody\n" in summary(tested, DIGITS)
    # Where all is held, by clients or the server, or a setting says how much, nothing is said.
    partition(WRITTEN, PartitionConfig("natural", clients=4, min_size=5))
    fixed = partition(DIGITS, PartitionConfig("iid", clients=10, samples_per_client=30, local_test="holdout"))
    assert "; 1,138 by nobody\n" in summary(fixed, DIGITS)
    save(fixed, tmp_path / "p.json")
    partition(DIGITS, dataclasses.replace(config, clients=10))
    aside = partition(DIGITS, PartitionConfig("iid", clients=10), 0, 0.1)
    assert "; 0 by nobody\n" in summary(aside, DIGITS)


def test_samples_per_client_limits_the_other_kinds():
    p = partition(DIGITS, PartitionConfig("iid", clients=10, samples_per_client=30))
    assert (p.sizes() == 30).all() and len(np.unique(np.concatenate(p.train))) == 300
    with pytest.raises(UserError, match=r"samples_per_client.*10 of 10 clients have too few"):
        partition(DIGITS, PartitionConfig("iid", clients=10, samples_per_client=200))


# --- what is put aside for the server -------------------------------------------------------------------


@FAST
@given(
    sets(),
    st.sampled_from(
        ["iid", "dirichlet", "dirichlet-classes", "pathological", "shards", "quantity", "identical"]
    ),
    st.sampled_from(["none", "holdout", "matching"]),
    st.floats(0.05, 0.5),
    st.integers(0, 50),
)
def test_what_is_put_aside_is_nobodys_and_has_the_classes_in_their_shares(dataset, kind, tests, share, seed):
    config = PartitionConfig(kind, clients=2, min_size=2, classes_per_client=2, local_test=tests)
    p = partition(dataset, config, seed, share)
    assert p.server is not None
    labels = dataset.train_labels
    assert len(p.server) == len(np.unique(p.server)) == max(1, round(share * len(labels)))
    held = [*p.train, *((p.test or ()) if p.test_from == "train" else ())]
    assert not set(np.concatenate(held)) & set(p.server)
    if kind in ("iid", "dirichlet", "quantity", "identical") and tests != "matching":
        assert len(np.unique(np.concatenate(held))) + len(p.server) == len(labels)
    wanted = np.bincount(labels) / len(labels) * len(p.server)
    assert (abs(np.bincount(labels[p.server], minlength=dataset.num_classes) - wanted) < 1).all()
    again = partition(dataset, dataclasses.replace(config, kind="iid"), seed, share)
    np.testing.assert_array_equal(p.server, again.server)  # whatever the clients are
    assert p.recipe["put_aside"] == share


def test_clients_are_cut_from_what_is_left_as_from_a_set_of_its_own():
    for dataset, config in (
        (DOMAINS, PartitionConfig("domain", clients=None, local_test="matching")),
        (WRITTEN, PartitionConfig("natural", clients=None, min_size=4, local_test="matching")),
    ):
        p = partition(dataset, config, 3, 0.2)
        rest = np.setdiff1d(np.arange(len(dataset.train_labels)), p.server)
        ids = dataset.train_domains if config.kind == "domain" else dataset.train_writers
        names = p.recipe["domains" if config.kind == "domain" else "writers"]
        assert p.test is not None and len(names) == p.num_clients > 1
        kept = [i for i in np.unique(ids) if (ids[rest] == i).sum() >= config.min_size]
        assert names == kept
        for train, name in zip(p.train, names, strict=True):
            np.testing.assert_array_equal(train, rest[ids[rest] == name])
        assert p.sizes().min() >= config.min_size
    with pytest.raises(UserError, match="need 1400 samples, there are 1294"):
        partition(DIGITS, PartitionConfig("iid", clients=140), 0, 0.1)


def test_a_given_partition_keeps_its_clients_and_must_leave_enough(tmp_path):
    given = Partition(tuple(np.arange(1200).reshape(4, 300)))
    made = for_server(given, DIGITS, 0.1, 5)
    assert made.server is not None and len(made.server) == 144 and made.server.min() >= 1200
    assert all(np.array_equal(a, b) for a, b in zip(made.train, given.train, strict=True))
    assert for_server(made, DIGITS, 0.05, 6) is made and for_server(given, DIGITS, 0.0, 5) is given
    with pytest.raises(UserError, match=r"initial\.holdout = 0\.2.*all but 238 to clients.*these 288"):
        for_server(given, DIGITS, 0.2, 5)
    save(given, tmp_path / "p.json")
    file = PartitionConfig("file", clients=4, path=str(tmp_path / "p.json"), seed=5)
    np.testing.assert_array_equal(partition(DIGITS, file, 9, 0.1).server, made.server)
    held = partition(DIGITS, dataclasses.replace(file, local_test="holdout"), 9, 0.1)
    np.testing.assert_array_equal(held.server, made.server)
    with pytest.raises(UserError, match="clients hold 2 of the samples"):
        Partition(([3, 4], [5]), server=np.array([4, 5, 6]))
    with pytest.raises(UserError, match="leaves none of the 3"):
        partition(make([0, 1, 1], 2), PartitionConfig("iid", clients=1), 0, 0.9)


# --- identical clients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("local_test", ["none", "holdout", "matching"])
@pytest.mark.parametrize("size", [None, 50])
def test_identical_clients_hold_the_same_and_share_a_stream(local_test, size):
    config = PartitionConfig("identical", clients=7, samples_per_client=size, local_test=local_test)
    p = partition(DIGITS, config, 3)
    assert p.num_clients == 7 and p.rng_ids is not None and p.rng_ids.tolist() == [0] * 7
    for parts in (p.train, p.test or ()):
        assert all(np.array_equal(part, parts[0]) for part in parts)
    whole = len(p.train[0]) + (len(p.test[0]) if p.test and p.test_from == "train" else 0)
    assert whole == (size or 1438) and len(np.unique(p.train[0])) == len(p.train[0])
    if local_test == "matching":
        assert p.test is not None and len(p.test[0]) == 359 // 7
    if size:
        assert not np.array_equal(p.train[0], partition(DIGITS, config, 4).train[0])


def test_rng_ids_and_what_is_put_aside_survive_a_file_and_count_in_the_checksum(tmp_path):
    p = partition(DIGITS, PartitionConfig("identical", clients=3, samples_per_client=20), 0, 0.1)
    save(p, tmp_path / "p.json")
    again = load_partition(tmp_path / "p.json", DIGITS)
    np.testing.assert_array_equal(again.rng_ids, p.rng_ids)
    np.testing.assert_array_equal(again.server, p.server)
    assert describe_partition(again) == describe_partition(p)
    for change in ({"server": None}, {"rng_ids": None}, {"rng_ids": np.array([0, 0, 1])}):
        other = dataclasses.replace(p, **change)
        assert describe_partition(other)["crc32"] != describe_partition(p)["crc32"]
    text = summary(p, DIGITS)
    assert "144 samples, for the server" in text and "1 keys for all clients" in text
    for bad, says in (([0, 0], "each of the 3"), ([0, 0, -1], "outside 0"), ([0.0, 0, 0], "not one integer")):
        with pytest.raises(UserError, match=says):
            dataclasses.replace(p, rng_ids=np.array(bad))
    text = (tmp_path / "p.json").read_text()
    (tmp_path / "p.json").write_text(text.replace('"streams":[0,0,0]', '"streams":[0,0.0,0]'))
    with pytest.raises(UserError, match="`streams` is not a list of integers"):
        load_partition(tmp_path / "p.json")


def identical(clients, **more):
    plain = {
        "rounds": 2,
        "model": {"name": "mlp", "options": {"hidden": [12]}},
        "partition": {"kind": "identical", "clients": clients, "samples_per_client": 90},
        "cohort": {"size": clients},
        "algorithm": {"name": "fedavg", "weights": "uniform"},
        "local": {"epochs": 2, "batch_size": 32, "lr": 0.1},
        "evaluation": {"every": 0},
        "execution": {"devices": 1, "wave": 1},
    }
    return Simulation(from_dict(plain | more))


def test_two_identical_clients_see_the_merge_change_nothing():
    simulation = identical(2, peel={"every": 1, "samples": 90, "class_samples": 2})
    rows = oracles.run(simulation)
    value = {(r.round, r.client, r.layer, r.state, r.metric): r.value for r in rows}
    before = {key: v for key, v in value.items() if key[3] == "before"}
    named = {key[4] for key in before}
    assert {"trace_within", "trace_between", "log_c", "cdnv", "pabs", "ridge", "peel_accuracy"} <= named
    for (number, client, layer, _, metric), held in before.items():
        assert value[number, client, layer, "after", metric] == held, (number, client, layer, metric)
    spread = [v for key, v in value.items() if key[4] == "spread"]
    assert spread and not any(spread)
    start = [v for key, v in value.items() if key[3:] == ("start", "peel_loss")]
    assert start[0] != value[1, 0, "", "before", "peel_loss"]  # there was something to learn


def test_identical_clients_are_one_client():
    one, three = identical(1), identical(3, execution={"devices": 2, "wave": 2})
    fresh = one.variables
    for simulation in (one, three):
        oracles.run(simulation)
    oracles.assert_trees_close(three.variables, one.variables, rtol=0, atol=2e-6)
    assert oracles.far_apart(one.variables, fresh) > 0.01
    apart = dataclasses.replace(three.setup.partition, rng_ids=None)  # the same samples in other orders
    other = Simulation(three.setup.config, partition=apart)
    oracles.run(other)
    assert oracles.far_apart(other.variables, one.variables) > 1e-4


def test_seeds_matter_and_the_one_in_the_config_wins():
    one, two = (partition(DIGITS, PartitionConfig("iid", clients=3), s) for s in (1, 2))
    fixed = partition(DIGITS, PartitionConfig("iid", clients=3, seed=1), 2)
    assert not np.array_equal(one.train[0], two.train[0])
    assert np.array_equal(one.train[0], fixed.train[0]) and fixed.recipe["seed"] == 1


def test_the_recipe_says_how_it_came_about():
    recipe = partition(DIGITS, PartitionConfig(clients=12, alpha=0.4), 5).recipe
    assert recipe["kind"] == "dirichlet" and recipe["alpha"] == 0.4 and recipe["seed"] == 5
    assert recipe["tries"] >= 1 and recipe["dataset"] == "digits" and recipe["num_train"] == 1438
    assert {"fedjax_sim", "numpy"} <= set(recipe)


def test_integer_draws_are_the_same_on_every_platform():
    p = partition(DIGITS, PartitionConfig("iid", clients=10), 0)
    assert zlib.crc32(np.concatenate(p.train).astype("<i8").tobytes()) == 225203627


def test_summary_and_effective_classes():
    p = partition(DIGITS, PartitionConfig("pathological", clients=10, local_test="holdout"))
    text = summary(p, DIGITS)
    assert "10 clients of digits, pathological, classes_per_client 2" in text
    assert "of 1,438; 0 by more than one client" in text and "out of the train images" in text
    np.testing.assert_allclose(effective_classes(np.array([[5, 5, 0], [9, 0, 0], [1, 1, 1]])), [2, 1, 3])


@pytest.mark.parametrize(("clients", "suffix"), [(12, "png"), (1000, "svg")])
def test_plot_writes_a_picture(clients, suffix, tmp_path):
    p = partition(DIGITS, PartitionConfig("iid", clients=clients, min_size=1))
    plot(p, DIGITS, tmp_path / f"picture.{suffix}")
    assert (tmp_path / f"picture.{suffix}").stat().st_size > 5000


@pytest.mark.parametrize(
    ("field", "kwargs"),
    [
        ("kind", {"kind": "dirichlett"}),
        ("local_test", {"local_test": "some"}),
        ("clients", {"clients": 0}),
        ("clients", {"clients": -3}),
        ("clients", {"clients": 2.5}),
        ("clients", {"clients": True}),
        ("clients", {"clients": None}),
        ("clients", {"kind": "identical", "clients": None}),
        ("alpha", {"alpha": 0}),
        ("alpha", {"alpha": -0.5}),
        ("alpha", {"alpha": float("nan")}),
        ("alpha", {"alpha": float("inf")}),
        ("alpha", {"alpha": "0.5"}),
        ("min_size", {"min_size": -1}),
        ("max_tries", {"max_tries": 0}),
        ("classes_per_client", {"classes_per_client": 0}),
        ("samples_per_client", {"samples_per_client": -5}),
        ("samples_per_client", {"samples_per_client": 5, "min_size": 10}),
        ("samples_per_client", {"kind": "quantity", "samples_per_client": 50}),
        ("test_samples_per_client", {"test_samples_per_client": 0}),
        ("holdout", {"holdout": 1.0}),
        ("holdout", {"holdout": float("nan")}),
        ("sigma", {"sigma": -1}),
        ("seed", {"seed": -1}),
        ("path", {"kind": "file"}),
    ],
)
def test_settings_that_cannot_be_name_their_field(field, kwargs):
    with pytest.raises(UserError) as caught:
        PartitionConfig(**kwargs)
    assert caught.value.field == f"partition.{field}"


@pytest.mark.parametrize(
    ("field", "kwargs", "says"),
    [
        ("clients", {"kind": "iid", "clients": 5000}, "more than the 1438"),
        ("min_size", {"clients": 100, "min_size": 20}, "need 2000 samples"),
        ("min_size", {"kind": "pathological", "clients": 71, "min_size": 20}, "have too few"),
        ("min_size", {"kind": "dirichlet-classes", "clients": 500}, "have too few"),
        (
            "classes_per_client",
            {"kind": "pathological", "clients": 5, "classes_per_client": 11},
            "10 classes",
        ),
        (
            "classes_per_client",
            {"kind": "shards", "clients": 100, "classes_per_client": 20},
            "more than 1438",
        ),
        ("kind", {"kind": "natural"}, "no writer ids"),
        ("kind", {"kind": "domain"}, "no domain ids"),
    ],
)
def test_what_this_set_cannot_give_names_its_field(field, kwargs, says):
    with pytest.raises(UserError, match=says) as caught:
        partition(DIGITS, PartitionConfig(**kwargs))
    assert caught.value.field == f"partition.{field}"


def test_the_way_out_of_too_many_clients_is_one():
    for given_too, most in (({}, 143), ({"min_size": 0}, 1438), ({"min_size": 7}, 205)):
        with pytest.raises(UserError, match=f"Use {most} or fewer") as caught:
            partition(DIGITS, PartitionConfig("iid", clients=5000, **given_too))
        assert ("min_size" in str(caught.value)) == (most != 1438)
        assert partition(DIGITS, PartitionConfig("iid", clients=most, **given_too)).num_clients == most
    many = PartitionConfig("dirichlet-classes", clients=1500, samples_per_client=10)
    assert partition(DIGITS, many).sizes().tolist() == [10] * 1500  # each drawn by itself
    labels = make(np.arange(40) % 2, 2, train_domains=np.arange(40) % 2, test_domains=np.zeros(10, int))
    with pytest.raises(UserError, match=r"0 samples.*too few\. Use fewer clients\.$"):
        config = PartitionConfig("domain", clients=40, min_size=0)
        partition(dataclasses.replace(labels, train_domains=np.arange(40) // 39), config)


def test_other_impossible_wishes():
    with pytest.raises(UserError, match="fewer than the 5 domains"):
        partition(DOMAINS, PartitionConfig("domain", clients=3))
    with pytest.raises(UserError, match=r"client \d+ has 1 sample,"):
        partition(DIGITS, PartitionConfig("iid", clients=1438, min_size=0, local_test="holdout"))
    lacking = make(np.arange(40) % 4, 4, test=np.arange(9) % 3)
    with pytest.raises(UserError, match=r"data.test_labels = 3: this class has no samples"):
        partition(lacking, PartitionConfig("iid", clients=2, local_test="matching"))
    config = PartitionConfig(
        "natural", clients=None, min_size=0, local_test="matching", test_samples_per_client=9
    )
    with pytest.raises(UserError, match="test samples"):
        partition(WRITTEN, config)
    with pytest.raises(UserError, match=r"partition\.seed"):
        partition(DIGITS, PartitionConfig("iid"), -1)
