"""The command for a machine with an accelerator, small and on CPUs."""

import csv
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "scripts" / "benchmark"


@pytest.fixture
def accelerator(script, monkeypatch):
    """The module, with an MLP for LeNet, whose compilation is most of what its cases take."""
    module = script("accelerator")
    monkeypatch.setattr(jax, "clear_caches", lambda: None)  # other tests' programs
    monkeypatch.setattr(module, "SHAPES", {"mlp": (8, 1, 10)})
    return module


def test_a_static_trip_count_changes_no_number(accelerator):
    case = dict(model="mlp", wave=0, conv="xla", precision="float32", buffers="default", data="digits")
    rows = [
        accelerator.attempt("grid", {**case, "trips": trips}, True, time.time() + 60)
        for trips in ("dynamic", "static")
    ]
    assert all("why" not in row and row["round_s"] > 0 for row in rows), rows
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], abs=2e-5)


def test_seeds_run_one_after_another(accelerator):
    row = accelerator.attempt("seeds", {"model": "mlp", "seeds": 2, "data": "digits"}, True, time.time() + 60)
    assert row["done"] == 2 and row["why"] == "" and "does not exist yet" in row["how"]


def test_a_run_goes_on_in_the_next_call(accelerator, tmp_path):
    case = {"model": "mlp", "partition": "iid", "algorithm": "fedmr", "seed": 0, "stage": 2}
    late = accelerator.measure_full(case, True, time.time(), tmp_path)
    assert late["why"] == "the minutes were over"
    first = accelerator.measure_full(case, True, time.time() + 60, tmp_path)
    again = accelerator.measure_full(case | {"stage": 4}, True, time.time() + 60, tmp_path)
    assert (first["rounds"], again["rounds"]) == (2, 4) and again["why"] == ""
    none = accelerator.measure_full(case | {"algorithm": "unheard-of"}, True, time.time() + 60, tmp_path)
    assert none == {"why": "unheard-of is not in this project"}


def test_a_case_that_fails_is_a_row(accelerator):
    case = dict(model="mlp", wave=0, conv="none", precision="float32", trips="dynamic", buffers="default")
    row = accelerator.attempt("grid", {**case, "data": "digits"}, True, time.time() + 60)
    assert list(row) == ["why"] and "execution.conv" in row["why"]


def test_cases_have_the_columns_that_name_them_and_do_not_repeat(script):
    accelerator = script("accelerator")
    for part in accelerator.PARTS.values():
        for dry in (True, False):
            named = [tuple(case[key] for key in part.keys) for case in part.cases(dry)]
            assert named and len(set(named)) == len(named)


def test_rows_of_an_earlier_call_count(script, tmp_path):
    rows = script("rows")
    earlier = rows.Table(tmp_path / "earlier.csv", ("case",))
    earlier.keep({"case": 1, "seconds": 2.0})
    table = rows.Table(tmp_path / "new" / "table.csv", ("case",), earlier=tmp_path / "earlier.csv")
    assert not table.wants({"case": 1}) and table.wants({"case": 2})
    table.keep({"case": 2, "why": "refused"})
    table.keep({"case": 2, "seconds": 1.0})
    with table.path.open(newline="") as file:
        told = list(csv.DictReader(file))
    assert [(row["case"], row["seconds"]) for row in told] == [("1", "2.0"), ("2", "1.0")]


def test_environments_are_made_for_the_peers_that_were_asked_for(script, monkeypatch, capsys):
    accelerator, made = script("accelerator"), []

    def ensure(peer, directory):
        made.append(peer)
        if peer == "pfl":
            raise accelerator.envs.EnvironmentFailed("no such wheel")

    monkeypatch.setattr(accelerator.envs, "ensure", ensure)
    monkeypatch.setattr(accelerator, "conduct", lambda part, args: made.append(part))
    words = ["peers", "--install", "--only", "peer=ours", "peer=vmap", "peer=pfl"]
    monkeypatch.setattr(sys, "argv", ["accelerator.py", *words])
    accelerator.main()
    assert made == ["torch", "pfl", "peers"] and "no such wheel" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        accelerator.parse(["grid", "--install"])


@pytest.mark.slow
def test_all_parts_run_dry(tmp_path):
    command = [str(FOLDER / "accelerator.sh")]
    given = {"PYTHON": sys.executable, "XLA_FLAGS": ""}
    for part in ("grid", "peers", "seeds", "full"):
        asked = [*command, part, "--dry", "--out", str(tmp_path), "--runs", str(tmp_path / "runs")]
        done = subprocess.run(asked, env=os.environ | given, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr
        with (tmp_path / f"accelerator-{part}.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert rows and all(row["card"] == "cpu" and row["jax"] == jax.__version__ for row in rows)
        missing = ("is not installed", "is not in this project")
        assert not [row for row in rows if row.get("why") and not row["why"].endswith(missing)]
        checks = [row for row in rows if "check" in row.get("workload", "") and not row.get("why")]
        losses = [float(row["loss_at_end"]) for row in checks]
        assert part != "peers" or losses == pytest.approx([losses[0]] * len(losses), abs=1e-3)
