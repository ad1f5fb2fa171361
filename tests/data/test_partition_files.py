import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_sim.core.errors import UserError
from fedjax_sim.data import Partition, PartitionConfig, load, load_partition, partition, save

DIGITS = load("digits")


def same(a, b):
    return (a is None and b is None) or all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(["iid", "dirichlet", "dirichlet-classes", "pathological", "shards", "quantity"]),
    st.sampled_from(["none", "holdout", "matching"]),
    st.integers(0, 1000),
)
def test_json_round_trip(tmp_path_factory, kind, local_test, seed):
    p = partition(DIGITS, PartitionConfig(kind, clients=12, min_size=5, local_test=local_test), seed)
    path = tmp_path_factory.mktemp("partition") / "p.json"
    save(p, path)
    again = load_partition(path, DIGITS)
    assert same(p.train, again.train) and same(p.test, again.test)
    assert p.test_from == again.test_from and p.recipe == again.recipe


@pytest.mark.filterwarnings("ignore:partition.kind = .*held by nobody")
def test_repeats_drawn_with_replacement_survive_the_round_trip(tmp_path):
    config = PartitionConfig("dirichlet-classes", clients=3, alpha=0.05, samples_per_client=400)
    p = partition(DIGITS, config)
    assert any(len(np.unique(t)) < len(t) for t in p.train)
    save(p, tmp_path / "p.json")
    assert same(p.train, load_partition(tmp_path / "p.json").train)


def fedmr(tmp_path, **change):
    content = {"dataset": "cifar10", "num_users": 3, "iid": 0, "noniid_case": 5, "data_beta": 0.1}
    content |= {
        "train_data": {"0": [5, 1, 2], "10": [9], "2": [3, 4]}
        | {str(k): [20 + k] for k in (1, *range(3, 10))}
    }
    path = tmp_path / "cifar10_100_noniidCase5_beta0.1.json"
    path.write_text(json.dumps(content | change))
    return path


def test_the_published_files_of_fedmr_load_in_the_order_of_their_numbers(tmp_path):
    p = load_partition(fedmr(tmp_path), DIGITS)
    assert p.num_clients == 11
    assert p.train[0].tolist() == [5, 1, 2] and p.train[2].tolist() == [3, 4] and p.train[10].tolist() == [9]
    assert p.recipe["format"] == "FedMR" and p.recipe["stated"]["data_beta"] == 0.1


def test_kind_file_uses_it_and_can_add_local_tests(tmp_path):
    save(partition(DIGITS, PartitionConfig("iid", clients=6)), tmp_path / "p.json")
    path = str(tmp_path / "p.json")
    p = partition(DIGITS, PartitionConfig("file", clients=6, path=path))
    assert p.num_clients == 6 and p.recipe["kind"] == "iid"
    held = partition(DIGITS, PartitionConfig("file", clients=None, path=path, local_test="holdout"))
    assert held.test is not None and held.recipe["from"]["kind"] == "iid"
    with pytest.raises(UserError, match=r"partition.clients = 20.*has 6 clients"):
        partition(DIGITS, PartitionConfig("file", path=path))


def test_another_set_is_refused(tmp_path):
    save(partition(load("digits-domains"), PartitionConfig("iid", clients=6)), tmp_path / "p.json")
    with pytest.raises(UserError, match="made for digits-domains"):
        load_partition(tmp_path / "p.json", DIGITS)
    with pytest.raises(UserError, match="beyond the 1438 images"):
        load_partition(fedmr(tmp_path, train_data={"0": [1], "1": [1438]}), DIGITS)


OWN = {
    "format": "fedjax_sim.partition",
    "version": 1,
    "recipe": {},
    "test_from": "test",
    "train": [[0, 1]],
    "test": None,
}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "neither of the two"),
        ("{}", "neither of the two"),
        (OWN | {"version": 2}, "version 2"),
        (OWN | {"recipe": []}, "recipe"),
        (OWN | {"train": []}, "not a list of clients"),
        (OWN | {"train": None}, "not a list of clients"),
        (OWN | {"train": [[1], []]}, "client 1 of `train` is empty"),
        (OWN | {"train": [[1, 1]]}, "index 1 more than once"),
        (OWN | {"train": [[1.0]]}, "not a list of integers"),
        (OWN | {"train": [[True]]}, "not a list of integers"),
        (OWN | {"train": [[-1]]}, "negative"),
        (OWN | {"train": [[10**30]]}, "too large"),
        (OWN | {"test": [[1], [2]]}, "2 test sets for 1 clients"),
        (OWN | {"test_from": "both"}, "neither 'train' nor 'test'"),
        (
            OWN | {"test": [[2, 1]], "test_from": "train"},
            "client 0 tests on this.*client 0 .* 1 of 2 held",
        ),
        (
            OWN | {"train": [[0, 1], [2, 3]], "test": [[4], [0, 1]], "test_from": "train"},
            r"partition\.test = 0: client 1 tests on this training image, and client 0 trains on it.* 2 of 3",
        ),
        ('{"train_data": {"0": [1], "1": [2], "0": [3]}}', "the key '0' twice"),
        (json.dumps(OWN)[:-1] + ', "train": [[2]]}', "the key 'train' twice"),
        ({"train_data": [[1]]}, "does not map"),
        ({"train_data": {"a": [1]}}, "does not map"),
        ({"train_data": {"1": [1]}}, "without gaps"),
        ({"train_data": {"0": []}}, "empty"),
        ({"train_data": {"0": [4, 4]}}, "more than once"),
    ],
)
def test_damaged_files_say_what_is_wrong(content, says, tmp_path):
    path = tmp_path / "p.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=says):
        load_partition(path, DIGITS)


def test_a_missing_file_and_bytes_that_are_no_text(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_partition(tmp_path / "none.json")
    (tmp_path / "p.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        load_partition(tmp_path / "p.json")


def test_a_partition_built_by_hand_is_checked():
    with pytest.raises(UserError, match="no clients"):
        Partition(())
    with pytest.raises(UserError, match="empty"):
        Partition((np.array([1]), np.array([], int)))
    with pytest.raises(UserError, match="not a list of integers"):
        Partition((np.array([1.5]),))
    assert Partition(([3, 4], [5])).sizes().tolist() == [2, 1]
