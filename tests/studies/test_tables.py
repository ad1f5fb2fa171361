"""The table of finished runs that no sweep started together."""

import csv
import dataclasses

import pytest

import fedjax_sim as fs
from fedjax_sim.cli import commands
from fedjax_sim.core.errors import UserError
from fedjax_sim.records import Row, Table
from fedjax_sim.reports import shared
from fedjax_sim.runs import Run
from fedjax_sim.studies import tables


def finished(seed, values, folder=None, crc=None, **changes):
    """A run of so many rounds with these accuracies, which nobody trained."""
    changes = {"model": fs.ModelConfig("mlp"), **changes}
    config = fs.RunConfig(seed=seed, rounds=len(values), **changes)
    rows = [Row(number, "accuracy", value) for number, value in enumerate(values, 1)]
    rows += [Row(number, "loss", 1 - value) for number, value in enumerate(values, 1)]
    recipe = {"kind": "iid", "dataset": "digits", "clients": 20, "crc32": seed if crc is None else crc}
    return Run(config, folder, Table(rows), recipe, 2.0, 1.0, len(values), lambda: None, lambda: None)  # type: ignore[arg-type]


def two_rates():
    slow = [finished(seed, [0.1, 0.2 + seed / 10]) for seed in (1, 0)]
    fast = [finished(seed, [0.3, 0.4 + seed / 5], local=fs.LocalConfig(lr=0.5)) for seed in (0, 1)]
    return [*slow, *fast]


def test_runs_that_differ_in_nothing_but_the_seed_are_a_row():
    table = fs.compare(two_rates(), reference="fedavg, local.lr 0.01")
    assert table.methods == ("fedavg, local.lr 0.01", "fedavg, local.lr 0.5")
    cell = table.grids[0].cells["fedavg, local.lr 0.01", ""]
    assert list(cell.values.items()) == [(0, 0.2), (1, pytest.approx(0.3))]
    cell = table.grids[0].cells["fedavg, local.lr 0.5", ""]
    assert cell.differences == (pytest.approx(0.2), pytest.approx(0.3))
    assert table.title == "mlp on digits, 20 clients, iid"
    assert "| fedavg, local.lr 0.5 | **0.5000 ± 0.1414 (2)** |" in table.markdown()
    assert table.markdown().count("\n± is the standard deviation over seeds; their number is in") == 1


def test_the_mean_of_the_newest_values_earlier_rounds_and_the_better_side():
    table = fs.compare(two_rates(), metric="loss", last_k=2, rounds_of_interest=(1,))
    assert table.goal == "min"
    assert [grid.caption for grid in table.grids] == [
        "loss, mean of the last 2 values",
        "loss, last value (fewer than the 2 of last_k) up to round 1",
    ]
    assert table.grids[1].cells["fedavg, local.lr 0.5", ""].values == {0: 0.7, 1: 0.7}
    assert table.best(table.grids[0], "") == {"fedavg, local.lr 0.5"}
    assert fs.compare(two_rates(), metric="loss", goal="max").goal == "max"


def test_the_title_is_what_all_have_in_common():
    one = finished(0, [0.1])
    other = finished(0, [0.1], model=fs.ModelConfig("lenet"))
    assert fs.compare([one, other]).title == "digits, 20 clients, iid"
    strange = dataclasses.replace(other, recipe={"dataset": "cifar10", "clients": 3, "kind": "shards"})
    assert fs.compare([one, strange]).title.startswith("Runs that differ")


@pytest.mark.parametrize(
    ("wrong", "field", "told"),
    [
        ({"reference": "fedagv"}, "reference", "Did you mean fedavg"),
        ({"metric": "acuracy"}, "metric", "no run has recorded it. They have accuracy, loss"),
        ({"last_k": 0}, "last_k", "a whole number from 1"),
        ({"rounds_of_interest": (0,)}, "rounds_of_interest", "a whole number from 1"),
        ({"goal": "best"}, "goal", "max or min"),
    ],
)
def test_mistakes_are_named(wrong, field, told):
    with pytest.raises(UserError, match=told) as caught:
        tables.compare([finished(0, [0.1])], **wrong)
    assert caught.value.field == field


def test_the_command_prints_it_and_writes_it(tmp_path, monkeypatch, capsys):
    known = {f"run{number}": run for number, run in enumerate(two_rates())}
    monkeypatch.setattr(shared.runs, "load", known.__getitem__)
    words = ["compare", *known, "--out", str(tmp_path / "out"), "--reference", "fedavg, local.lr 0.01"]
    assert commands.main([*words, "--last-k", "2", "--rounds=1"]) == 0
    told = capsys.readouterr().out
    assert "| fedavg, local.lr 0.5 | +0.2250 ± 0.0354 (2) |" in told
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"table.md", "table.csv", "table.tex", "curves.png", "curves.pdf"}
    rows = list(csv.DictReader((tmp_path / "out" / "table.csv").read_text().splitlines()))
    assert [row["seeds"] for row in rows] == ["2"] * 4
    assert commands.main(["compare", "run0", "--last-k", "no"]) == 2
    assert "--last-k" in capsys.readouterr().err
    assert commands.main(["compare", "--help"]) == 0
