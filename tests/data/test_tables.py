"""Tables: what is embedded, what is read from files, and what is refused."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedjax_sim import data
from fedjax_sim.core.errors import UserError
from fedjax_sim.data import PartitionConfig, TableDataset
from fedjax_sim.data.tables import TEST_SHARE, read_table

ROWS = 40


def columns(rng):
    return {
        "town": [f"t{i % 7}" for i in range(ROWS)],
        "size": rng.normal(size=ROWS).round(3),
        "kind": rng.choice(["flat", "house"], ROWS),
        "new": rng.integers(0, 2, ROWS).astype(bool),
        "price": rng.uniform(1, 9, ROWS).round(3),
    }


def written(folder, table, suffix=".csv"):
    path = folder / f"houses{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table(table), path)
    else:
        from pyarrow import csv

        csv.write_csv(pa.table(table), path)
    return path


@pytest.mark.parametrize(
    ("name", "rows", "features", "classes"),
    [("diabetes", 442, 10, 0), ("breast-cancer", 569, 30, 2), ("wine", 178, 13, 3)],
)
def test_embedded_tables_are_cut_once_and_whole(name, rows, features, classes):
    table, again = data.load(name), data.load(name)
    assert (table.num_classes, table.task.num_classes) == (classes, classes)
    assert table.train_x.shape == (table.train_size, features) and len(table.feature_names) == features
    assert table.train_size + table.test_size == rows
    assert abs(table.test_size / rows - TEST_SHARE) < 0.01
    np.testing.assert_array_equal(table.train_x, again.train_x)
    if classes:
        shares = [np.bincount(part) / len(part) for part in (table.train_y, table.test_y)]
        np.testing.assert_allclose(*shares, atol=0.02)


def test_features_and_targets_are_standardised_by_the_training_rows():
    table = data.load("diabetes")
    prepared = table.task.prepare(table.train)
    np.testing.assert_allclose(prepared["x"].mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(prepared["x"].std(0), 1, atol=1e-5)
    np.testing.assert_allclose([prepared["target"].mean(), prepared["target"].std()], [0, 1], atol=1e-5)
    flat = TableDataset("flat", np.ones((4, 2)), np.arange(4), np.ones((2, 2)), np.arange(2))
    np.testing.assert_array_equal(flat.task.prepare(flat.train)["x"], 0)


def test_some_of_the_rows_are_standardised_as_all_of_them():
    table = data.load("diabetes")
    some = table.training_on(np.argsort(table.train_y)[:40])
    assert some.train_size == 40 and some.task == table.task
    few = {key: leaf[:3] for key, leaf in some.train.items()}
    np.testing.assert_array_equal(some.task.prepare(few)["x"], table.task.prepare(few)["x"])


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_file_gives_features_targets_and_users(tmp_path, rng, suffix):
    table = columns(rng)
    made = data.load(f"table:{written(tmp_path, table, suffix)}#target=price,user=town,test=0.25")
    assert made.task.name == "regression"
    assert made.feature_names == ("size", "kind=flat", "kind=house", "new")
    x = np.concatenate([made.train_x, made.test_x])
    y = np.concatenate([made.train_y, made.test_y])
    users = np.concatenate([made.train_users, made.test_users])
    order = np.argsort(y)
    wanted = np.argsort(table["price"])
    np.testing.assert_allclose(y[order], table["price"][wanted], rtol=1e-6)
    np.testing.assert_allclose(x[order, 0], table["size"][wanted], rtol=1e-6)
    np.testing.assert_array_equal(x[order, 1] == 1, table["kind"][wanted] == "flat")
    np.testing.assert_array_equal(x[order, 3] == 1, table["new"][wanted])
    np.testing.assert_array_equal(users[order], [int(table["town"][i][1]) for i in wanted])
    assert set(made.test_users) == set(range(7))  # of every user its share


def test_text_or_task_makes_classes(tmp_path, rng):
    path = written(tmp_path, {**columns(rng), "grade": rng.integers(1, 4, ROWS)})
    kinds = read_table(path, target="kind")
    assert (kinds.num_classes, kinds.class_names, kinds.task.label) == (2, ("flat", "house"), "label")
    grades = read_table(path, target="grade", task="classification")
    assert grades.class_names == ("1", "2", "3") and set(grades.train_y) <= {0, 1, 2}
    assert read_table(path, target="grade").num_classes == 0


def test_a_column_may_say_what_is_for_testing(tmp_path, rng):
    said = ["test" if i % 5 == 0 else "train" for i in range(ROWS)]
    path = written(tmp_path, {**columns(rng), "part": said})
    made = read_table(path, target="price", test="part")
    assert made.test_size == 8 and not any(name.startswith("part") for name in made.feature_names)


def test_users_are_clients_of_a_natural_partition(tmp_path, rng):
    made = read_table(written(tmp_path, columns(rng)), target="price", user="town")
    cut = data.partition(made, PartitionConfig("natural", clients=None, min_size=1))
    assert cut.num_clients == 7
    for part in cut.train:
        assert len(set(made.train_users[part])) == 1
    assert "effective classes" not in data.summary(cut, made)
    data.plot(cut, made, tmp_path / "clients.png")
    assert (tmp_path / "clients.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("", "does not say what to tell.*target=price"),
        ("#target=prize", "no such column.*price"),
        ("#target=price,user=town2", "no such column.*town"),
        ("#target=price,user=price", "the same column"),
        ("#target=kind,task=regression", "regression predicts numbers"),
        ("#target=price,task=ranking", "no such task"),
        ("#target=price,test=2", "not between 0 and 1"),
        ("#target=price,test=part", "neither a share nor a column"),
        ("#target=price,test=kind", "must be train and test"),
        ("#target=price,size=3", "no such column"),
        ("#price", "not an option of table"),
    ],
)
def test_what_a_file_cannot_be_asked_for(tmp_path, rng, source, told):
    with pytest.raises(UserError, match=f"(?s){told}"):
        data.load(f"table:{written(tmp_path, columns(rng))}{source}")


def test_gaps_words_and_files_that_cannot_be_read(tmp_path, rng):
    gap = {**columns(rng), "size": [None, *range(ROWS - 1)]}
    with pytest.raises(UserError, match=r"1 of its rows.*number 1"):
        read_table(written(tmp_path, gap), target="price")
    names = {**columns(rng), "name": [f"n{i}" for i in range(ROWS)] * 1}
    many = {key: list(value) * 3 for key, value in names.items()}
    many["name"] = [f"n{i}" for i in range(3 * ROWS)]
    with pytest.raises(UserError, match="120 different values"):
        read_table(written(tmp_path, many), target="price")
    for place, told in ((tmp_path / "none.csv", "no such file"), (tmp_path / "a.xlsx", "neither .csv")):
        with pytest.raises(UserError, match=told):
            read_table(place, target="price")


@pytest.mark.parametrize(
    ("changes", "field", "told"),
    [
        ({"train_x": np.ones(4)}, "train_x", "rows, features"),
        ({"train_x": np.array([["a"] * 2] * 4)}, "train_x", "not numbers"),
        ({"train_x": np.array([[1, np.nan]] * 4)}, "train_x", r"at \[0, 1\]"),
        ({"train_y": np.ones(3)}, "train_y", r"shape \(4,\)"),
        ({"test_x": np.ones((2, 3))}, "test_x", "2 features"),
        ({"num_classes": 1}, "num_classes", "nothing to tell apart"),
        ({"num_classes": 2, "train_y": np.array([0, 1, 2, 0])}, "train_y", "beyond the 2"),
        ({"train_users": np.arange(4)}, "train_users", "only one"),
        ({"train_users": np.arange(3), "test_users": np.arange(2)}, "train_users", "not 4 whole numbers"),
        ({"feature_names": ("a",)}, "feature_names", "1 names for 2"),
    ],
)
def test_a_table_that_does_not_fit_together_is_refused(changes, field, told):
    plain = {
        "name": "t",
        "train_x": np.ones((4, 2)),
        "train_y": np.array([0, 1, 0, 1]),
        "test_x": np.ones((2, 2)),
        "test_y": np.array([0, 1]),
    }
    with pytest.raises(UserError, match=told) as caught:
        TableDataset(**(plain | changes))
    assert caught.value.field == f"data.{field}"


def test_a_table_has_no_preprocessing_and_no_size():
    with pytest.raises(UserError, match="preprocessing is of images"):
        data.load("diabetes", preprocessing=data.Preprocessing())
    with pytest.raises(UserError, match="one size only"):
        data.load("wine", size=8)
