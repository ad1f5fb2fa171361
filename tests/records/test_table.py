import dataclasses
import importlib.util
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedjax_sim import records
from fedjax_sim.core.errors import UserError
from fedjax_sim.data import PartitionConfig, load, partition, save
from fedjax_sim.records import Journal, Lap, Row, Table
from fedjax_sim.records.tensorboard import Events, tag_of
from fedjax_sim.runs import provenance

ROWS = [
    Row(1, "accuracy", 0.1),
    Row(1, "trace", 2.0, layer="conv1", state="before"),
    Row(1, "trace", 3.0, layer="conv1", state="after"),
    Row(2, "accuracy", 0.2),
    Row(2, "client_accuracy", 0.5, client=7),
    Row(2, "client_accuracy", 0.25, client=3),
]

any_row = st.builds(
    Row,
    st.integers(1, 10_000),
    st.text("abc_/", min_size=1, max_size=5),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text("xyz", max_size=3),
    st.integers(-1, 5000),
    st.sampled_from(["", "before", "after"]),
)


@given(st.lists(any_row, max_size=30))
def test_table_holds_rows_as_they_are(rows):
    table = Table(rows)
    assert len(table) == len(rows)
    assert list(table) == rows
    for name in Row._fields:
        assert table.column(name).tolist() == [getattr(row, name) for row in rows]


def test_rows_that_come_in_parts_get_the_codes_of_one_after_another():
    rows = [Row(1, m, 1.0, layer, c, "") for c, (m, layer) in enumerate(zip("abcab", "xyxzy", strict=True))]
    one, parts = Table(), Table(iter(rows[:2]))
    for row in rows:
        one.extend([row])
    parts.extend(rows[2:])
    assert list(one) == list(parts) == rows and one.names() == parts.names() == ["a", "b", "c"]
    assert one.to_arrow().equals(parts.to_arrow())
    assert parts.rounds_of("b").tolist() == [1, 1] and not len(parts.rounds_of("d"))


def test_series_picks_one_number_over_time():
    table = Table(ROWS)
    rounds, values = table.series("accuracy")
    assert rounds.tolist() == [1, 2] and values.tolist() == [0.1, 0.2]
    assert table.series("trace", layer="conv1", state="after")[1].tolist() == [3.0]
    assert len(table.series("trace")[0]) == 0
    assert len(table.series("nothing")[0]) == 0
    assert table.last("accuracy") == 0.2
    clients, values = table.by_client("client_accuracy", 2)
    assert clients.tolist() == [7, 3] and values.tolist() == [0.5, 0.25]


def test_a_table_as_a_data_frame_has_its_rows(monkeypatch):
    frame = Table(ROWS).to_pandas()
    assert [Row(*values) for values in frame[list(Row._fields)].itertuples(index=False)] == ROWS
    assert frame[frame.metric == "accuracy"].value.tolist() == [0.1, 0.2]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"to_pandas.*pip install pandas\), or take to_arrow"):
        Table(ROWS).to_pandas()


def test_what_is_not_there_is_named():
    with pytest.raises(UserError, match="such column"):
        Table(ROWS).column("epoch")
    with pytest.raises(UserError, match="accuracy"):
        Table(ROWS).last("acuracy")
    with pytest.raises(UserError, match=r"not of the round as a whole\. Say where, such as client=7\."):
        Table(ROWS).last("client_accuracy")
    with pytest.raises(UserError, match=r"not there\. Say where, such as layer='conv1', state='before'\."):
        Table(ROWS).last("trace", layer="conv1")
    with pytest.raises(UserError, match=r"not there\. Give no layer, client, state\."):
        Table(ROWS).last("accuracy", client=7)


def test_parquet_keeps_every_bit(tmp_path, rng):
    rows = [
        Row(i, "x", float(value), "l" * (i % 3), i - 1, "s") for i, value in enumerate(rng.normal(size=100))
    ]
    rows.append(Row(100, "x", 5e-324))
    records.write_parquet(Table(rows), tmp_path / "m.parquet")
    assert list(records.read_parquet(tmp_path / "m.parquet")) == rows
    assert [path.name for path in tmp_path.iterdir()] == ["m.parquet"]


@pytest.mark.parametrize(("value", "code"), [(math.nan, 0.0), (math.inf, 1.0), (-math.inf, -1.0)])
def test_values_that_are_not_finite_get_a_name_and_a_code(value, code):
    with pytest.warns(UserWarning, match="nonfinite/loss"):
        kept = records.encode_nonfinite([Row(3, "loss", value), Row(3, "accuracy", 0.5)])
    assert kept == [Row(3, "nonfinite/loss", code), Row(3, "accuracy", 0.5)]


def add(journal, first, last):
    for number in range(first, last + 1):
        rows = [Row(number, "accuracy", number / 7)]
        journal.table.extend(rows)
        journal.write(rows, Lap(number, 0.5, 0.25, 10))


def written(folder, count):
    journal = Journal(folder, 0)
    add(journal, 1, count)
    journal.tabulate()
    journal.close()


def test_journal_cut_to_a_round_then_continued_is_as_if_never_cut(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    written(tmp_path / "a", 6)
    written(tmp_path / "b", 5)
    journal = Journal(tmp_path / "b", 3)
    assert journal.last == 3 and len(journal.table) == 3
    assert records.total(journal.laps, 3) == (1.5, 0.75)
    add(journal, 4, 6)
    journal.tabulate()
    journal.close()
    assert records.total(journal.laps, 6) == (3.0, 1.5)
    for name in (records.JOURNAL, records.METRICS, records.TIMING):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("lost", [1, 5, 30])
def test_a_torn_line_does_not_count(tmp_path, lost):
    written(tmp_path, 4)
    path = tmp_path / records.JOURNAL
    path.write_bytes(path.read_bytes()[:-lost])
    assert [number for number, _, _ in records.read_journal(path)] == [1, 2, 3]
    journal = Journal(tmp_path, None)
    add(journal, 4, 4)
    journal.close()
    assert [rows[0].value for _, rows, _ in records.read_journal(path)] == [1 / 7, 2 / 7, 3 / 7, 4 / 7]


def test_a_journal_with_a_gap_ends_before_it(tmp_path):
    written(tmp_path, 4)
    path = tmp_path / records.JOURNAL
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:1], *lines[2:]]))
    assert [number for number, _, _ in records.read_journal(path)] == [1]


def test_timing_is_kept_apart_from_the_metrics(tmp_path):
    written(tmp_path, 3)
    assert records.read_timing(tmp_path) == [Lap(number, 0.5, 0.25, 10) for number in (1, 2, 3)]
    assert "seconds" not in records.read_parquet(tmp_path / records.METRICS).names()


def test_timing_without_cpu_seconds_is_read_continued_and_has_no_sum_of_them(tmp_path):
    written(tmp_path, 2)
    path = tmp_path / records.TIMING
    path.write_text("round,seconds,clients\n1,0.500000,10\n2,0.500000,10\n3,0.5")
    assert records.total(records.read_timing(tmp_path), 2) == (1.0, None)
    journal = Journal(tmp_path, None)
    add(journal, 3, 3)
    journal.close()
    lines = path.read_text().splitlines()
    assert lines == [
        "round,seconds,cpu_seconds,clients",
        "1,0.500000,,10",
        "2,0.500000,,10",
        "3,0.500000,0.250000,10",
    ]
    laps = records.read_timing(tmp_path)
    assert records.total(laps, 3) == (1.5, None) and records.total(laps[2:], 1) == (0.5, 0.25)
    assert records.total([], 3)[1] is None


def test_the_table_counts_at_its_end_and_before_it_what_knows_more(tmp_path):
    written(tmp_path, 4)
    journal = Journal(tmp_path, None)
    add(journal, 5, 5)
    journal.close()
    assert records.reached(tmp_path) == 4
    for rounds, last in ((4, 4), (9, 5)):
        table, found = records.read(tmp_path, rounds)
        assert found == last and table.column("round").tolist() == list(range(1, last + 1))
    (tmp_path / records.JOURNAL).unlink()
    assert records.read(tmp_path, 9)[1] == 4
    (tmp_path / records.METRICS).unlink()
    assert records.reached(tmp_path) == 0 and records.read(tmp_path, 9)[1] == 0


def test_a_damaged_table_is_made_up_for_by_the_journal_or_said(tmp_path):
    written(tmp_path, 4)
    (tmp_path / records.METRICS).write_text("version https://git-lfs.github.com/spec/v1\n")
    assert records.reached(tmp_path) == 0 and records.read(tmp_path, 4)[1] == 4
    (tmp_path / records.JOURNAL).unlink()
    with pytest.raises(UserError, match=r"metrics\.parquet cannot be read"):
        records.read(tmp_path, 4)


def test_tags_name_layer_and_state_and_leave_single_clients_out():
    assert tag_of(ROWS[0]) == "accuracy"
    assert tag_of(ROWS[1]) == "trace/conv1/before"
    assert tag_of(ROWS[4]) is None


def test_events_hold_the_scalars(tmp_path):
    events = Events(tmp_path)
    events.write(ROWS)
    events.close()
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    assert b"trace/conv1/after" in content and b"client_accuracy" not in content


def test_provenance_says_versions_hardware_and_data():
    digits = load("digits")
    about = provenance.describe(digits, partition(digits, PartitionConfig(clients=5)))
    assert json.loads(json.dumps(about)) == about
    assert {"python", "fedjax-sim", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"} <= set(
        about["versions"]
    )
    assert about["jax"] == provenance.jax_settings()
    assert about["devices"]["count"] >= 1 and about["cpu"]["cores"] >= 1 and about["cpu"]["memory_bytes"] > 0
    told = {name: about["partition"][name] for name in ("kind", "alpha", "dataset", "clients")}
    assert told == {"kind": "dirichlet", "alpha": 0.5, "dataset": "digits", "clients": 5}


def test_provenance_says_how_jaxs_settings_stand_and_a_run_goes_on_under_the_same():
    found = provenance.jax_settings()
    assert found["jax_threefry_partitionable"] is True and found["jax_enable_x64"] is False
    provenance.check_jax_settings({})  # of a record of before
    with jax.threefry_partitionable(False), jax.default_prng_impl("rbg"):  # the engine's draws stay the same
        assert provenance.jax_settings() != found
        provenance.check_jax_settings(found)
    for setting in (jax.enable_x64(True), jax.default_matmul_precision("highest")):
        with setting, pytest.raises(UserError, match=r"the run began with .* jax\.config\.update"):
            provenance.check_jax_settings(found)


def test_a_dtype_that_the_device_chooses_goes_on_on_such_a_device_alone():
    here, there = {"platform": "cpu"}, {"platform": "tpu"}
    provenance.check_dtype("auto", here)
    provenance.check_dtype("auto", {})  # of a record of before
    provenance.check_dtype("float32", there)
    with pytest.raises(UserError, match=r"model\.dtype = 'auto': the run began on tpu.*on cpu"):
        provenance.check_dtype("auto", there)


def test_other_partitions_have_other_checksums():
    digits = load("digits")
    one, other, same = (
        provenance.describe_partition(partition(digits, PartitionConfig(clients=5), seed))["crc32"]
        for seed in (0, 1, 0)
    )
    assert one == same != other


def test_provenance_has_no_path(tmp_path, monkeypatch):
    digits = load("digits")
    parts = ("train_images", "train_labels", "test_images", "test_labels")
    np.savez(tmp_path / "own.npz", **{part: getattr(digits, part) for part in parts})
    own = load(f"npz:{tmp_path / 'own.npz'}")
    made = partition(own, PartitionConfig(clients=5))
    save(made, tmp_path / "made.json")
    config = PartitionConfig("file", None, path=str(tmp_path / "made.json"), local_test="holdout")
    monkeypatch.chdir(tmp_path)
    about = provenance.describe(own, partition(own, config))
    assert about["data"]["name"] == "own"

    def texts(value):
        if isinstance(value, dict):
            return [text for inner in value.values() for text in texts(inner)]
        return [value] if isinstance(value, str) else []

    assert not [text for text in texts(about) if "/" in text or str(Path.home()) in text]


def test_other_data_is_recognised():
    digits = load("digits")
    recorded = provenance.fingerprint(digits)
    provenance.check_fingerprint(digits, recorded)
    images = digits.train_images.copy()
    images[3, 2, 2, 0] ^= 1
    with pytest.raises(UserError, match="train_images"):
        provenance.check_fingerprint(dataclasses.replace(digits, train_images=images), recorded)
    labels = np.roll(digits.train_labels, 1)
    with pytest.raises(UserError, match="train_labels"):
        provenance.check_fingerprint(dataclasses.replace(digits, train_labels=labels), recorded)


def test_hosts_compare_all_that_is_in_memory_and_rows_of_a_large_mapped_file(tmp_path, monkeypatch):
    digits = load("digits")
    told = provenance.digests(digits)
    assert set(told) == {
        "data.num_classes",
        *(f"data.{part}.{leaf}" for part in ("train", "test") for leaf in ("image", "label")),
    }
    np.save(tmp_path / "images.npy", digits.train_images)

    def mapped(*changed):
        images = np.load(tmp_path / "images.npy", mmap_mode="c")
        images[list(changed), 2, 2, 0] ^= 1
        return provenance.digests(dataclasses.replace(digits, train_images=images))

    def differing(*changed):
        return {name for name, value in mapped(*changed).items() if value != mapped()[name]}

    assert mapped() == told  # a small one is read as a whole
    assert differing(700) == {"data.train.image"}
    monkeypatch.setattr(provenance, "READ_WHOLE", 1000)
    assert "of 256 rows" in mapped()["data.train.image"]
    last = len(digits.train_images) - 1
    assert differing(0) == differing(last) == {"data.train.image"}
    assert differing(1) == set()  # the rows that are read are 5 or 6 apart
    in_memory = dataclasses.replace(digits, test_labels=np.roll(digits.test_labels, 1))
    assert provenance.digests(in_memory)["data.test.label"] != told["data.test.label"]
    groups = dict.fromkeys(("train_writers", "test_writers"))
    groups = {name: np.zeros(len(getattr(digits, f"{name[:-8]}_labels")), np.int32) for name in groups}
    assert set(provenance.digests(dataclasses.replace(digits, **groups))) - set(told) == {
        "data.train_writers",
        "data.test_writers",
    }
