"""The study of seeds: what it takes from runs, and what it makes of it."""

import csv
import io
import json
import re
import shutil

import numpy as np
import pytest

from experiments.seeds import survival
from fedjax_sim.config import sweep_files
from fedjax_sim.core.errors import UserError
from fedjax_sim.studies import orderings, sweep

SEEDS = 12


def test_both_sweeps_are_nine_methods_under_64_seeds():
    read = {name: sweep_files.read_sweep(survival.HERE / f"{name}.yaml") for name in survival.STUDIES}
    for name, one in read.items():
        assert len(one.jobs) == 9 * 64 and len({job.method for job in one.jobs}) == 9
        assert one.out.parts[-4:] == ("experiments", "seeds", "results", name)
    algorithms = [
        {job.method: job.config.algorithm for job in one.jobs if not job.seed} for one in read.values()
    ]
    assert algorithms[0] == algorithms[1]


def small_sweep(out, **rates):
    """Two seeds of a method for each learning rate."""
    return sweep_files.from_mapping(
        {
            "base": {
                "rounds": 3,
                "partition": {"clients": 4},
                "model": {"name": "mlp", "options": {"hidden": [4]}},
                "local": {"epochs": 1},
                "evaluation": {"every": 1},
                "output": {"checkpoint_every": 0, "tensorboard": False, "figures": False, "progress": False},
            },
            "methods": {method: {"local.lr": rate} for method, rate in rates.items()},
            "seeds": [3, 4],
            "last_k": 2,
            "out": str(out),
        }
    )


def test_accuracies_are_those_of_the_runs_in_folders_and_packed(tmp_path):
    small = small_sweep(tmp_path / "out", slow=0.01, fast=0.1)
    assert survival.collect(small) is None
    table = sweep.run(small).comparison
    found = survival.collect(small)
    assert found is not None and table is not None
    rows, made = found
    methods, scores = survival.scores_of(rows, small.last_k)
    assert methods == ["slow", "fast"]
    for row, method in zip(scores["end"], methods, strict=True):
        assert row == pytest.approx(list(table.grids[0].cells[method, ""].values.values()), rel=1e-12)
    assert scores["best round"][0, 0] == max(v for k, v in rows[0].items() if k.startswith("round "))
    assert made["runs"] == 4 and made["versions"]["jax"] and made["seconds"] > 0
    sweep.pack(small)
    assert survival.collect(small) == found
    (tmp_path / "out/runs.json").unlink()
    (tmp_path / "out/runs.parquet").unlink()
    assert survival.collect(small) is None


def test_a_method_of_which_a_run_diverged_is_left_out_and_told(tmp_path):
    small = small_sweep(tmp_path / "out", sound=0.01, wild=1e38)
    sweep.run(small)
    found = survival.collect(small)
    assert found is not None
    with io.StringIO(survival.comma_separated(found[0])) as file:
        rows = list(csv.DictReader(file))
    assert (
        sorted((row["method"], row["diverged"]) for row in rows) == [("sound", "")] * 2 + [("wild", "1")] * 2
    )
    methods, scores = survival.scores_of(rows, small.last_k)
    assert methods == ["sound"] and scores["end"].shape == (1, 2)
    assert "**wild is left out**: 2 of its 2 runs diverged" in survival.told_of_diverged(rows)
    assert "in round 1, 1)" in survival.told_of_diverged(rows)
    assert found[1]["runs"] == 2
    sweep.pack(small)
    shutil.rmtree(tmp_path / "out/runs")  # as run.sh does
    assert survival.collect(small) == found
    (tmp_path / "out/sweep.json").unlink()
    with pytest.raises(UserError, match="2 of 4 runs are not finished"):
        survival.collect(small)


def accuracies(path):
    """Three methods, of which the first is clearly best and the others are level, in multiples of 1/359."""
    rng = np.random.default_rng(0)
    curves = np.array([0.9, 0.8, 0.8])[:, None, None] + 0.02 * rng.standard_normal((3, SEEDS, 8))
    rows = [
        {"method": method, "seed": seed}
        | {f"round {10 * r}": round(359 * v) / 359 for r, v in enumerate(own, 1)}
        for method, curve in zip(("A", "B", "C"), curves, strict=True)
        for seed, own in enumerate(curve)
    ]
    path.parent.mkdir(parents=True)
    path.write_text(survival.comma_separated(rows))


def test_the_report_is_made_of_the_accuracies_alone_and_says_what_was_computed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(survival, "collect", lambda sweep: None)
    place = tmp_path / "digits"
    with pytest.raises(UserError, match="no runs"):
        survival.main(["digits", "--out", str(tmp_path)])
    place.rmdir()
    accuracies(place / "accuracy.csv")
    made = {"runs": 36, "seconds": 600.0, "cpu_seconds": 1200.0}
    (place / "provenance.json").write_text(json.dumps(made))
    survival.main(["digits", "--out", str(tmp_path), "--draws", "400"])
    assert str(place) in capsys.readouterr().out
    names = {path.name for path in place.iterdir()}
    tables = {f"{table}{kind}.csv" for table in ("survival", "pairs") for kind in ("", "_best_round")}
    assert names == tables | {"accuracy.csv", "provenance.json", "report.md", "survival.png"}
    text = (place / "report.md").read_text()
    assert "36 runs, 10 minutes of rounds (20 CPU minutes" in text
    assert "Of 3 pairs 12 seeds do not tell apart 1: " in text
    with (place / "accuracy.csv").open(newline="") as file:
        methods, scores = survival.scores_of(list(csv.DictReader(file)), 5)
    order = orderings.order(scores["end"])
    assert [methods[0], scores["end"].shape] == [methods[order[0]], (3, SEEDS)]
    ranked = scores["end"][order]
    wanted = orderings.survival(ranked, 3, apart=orderings.gaps(ranked).apart, draws=400)
    with (place / "survival.csv").open(newline="") as file:
        rows = {(row["drawn"], int(row["seeds"])): row for row in csv.DictReader(file)}
    assert float(rows["paired", 3]["whole"]) == pytest.approx(wanted.whole, rel=1e-5)
    assert float(rows["paired", 3]["t-test: made"]) == pytest.approx(wanted.claims["t-test"].made, rel=1e-5)
    assert ("paired", 10) in rows and ("paired, other half", 10) not in rows and ("paired", 20) not in rows
    first = next(
        line for line in text.splitlines() if line.startswith("- 3 seeds, the same for all methods:")
    )
    assert f"whole order in {100 * wanted.whole:.1f} %" in first
    # The row of the matrix says who is ahead, whichever of the two is better.
    matrix = text.split("row ahead of column, 3 seeds, paired")[1].split("\n\n")[0].splitlines()
    shares = [[float(x) for x in re.findall(r"([\d.]+) %", line)] for line in matrix[2:]]
    assert shares[0] == [100, 100] and shares[1][0] == shares[2][0] == 0
    assert shares[1][1] + shares[2][1] == pytest.approx(100)
    assert matrix[2].count("*") == 0 and matrix[3].count("*") == matrix[4].count("*") == 1


def test_a_study_that_is_not_finished_is_refused(tmp_path, monkeypatch):
    done = iter([True, False])

    class Place:
        def __init__(self, path):
            self.started, self.finished = True, next(done)

    monkeypatch.setattr(survival, "Folder", Place)
    mapping = {"base": {"rounds": 1}, "seeds": [0, 1], "out": str(tmp_path)}
    with pytest.raises(UserError, match="1 of 2 runs are not finished"):
        survival.collect(sweep_files.from_mapping(mapping))
