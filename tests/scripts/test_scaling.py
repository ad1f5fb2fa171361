"""The scripts that time our own rounds: what of them needs no clock, and that they run."""

import functools
import math
import sys
from pathlib import Path

import numpy as np
import pytest

import fedjax_sim as fs

FOLDER = Path(__file__).parents[2] / "scripts" / "benchmark"


def test_clients_that_train_alone_waste_little(script, capsys):
    script("scaling").padding()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 0.")]
    table = [line.strip("| ").split(" | ") for line in lines]
    assert len(table) == 8
    for alpha, _, wave, devices, waste in table:
        assert float(waste) >= 1, (alpha, wave, devices)
        assert wave != "1" or float(waste) <= 1.10, (alpha, wave, devices)


def test_ratios_are_of_what_ran_in_one_repetition(script):
    ratio = script("rounds").ratio([2.0, 3.0, 8.0], [1.0, 2.0, 2.0])
    assert ratio == (2.0, 1.5, 4.0)
    assert str(ratio) == "2.00 (1.50–4.00)"


def test_equal_clients_share_images_only_where_these_run_out(script):
    rounds = script("rounds")
    dataset = rounds.noise(40, (2, 2, 1))
    apart = rounds.equal(dataset, 4, 10)
    assert sorted(np.concatenate(apart.train).tolist()) == list(range(40))
    many = rounds.equal(dataset, 9, 10)
    assert [len(part) for part in many.train] == [10] * 9
    assert max(part.max() for part in many.train) < 40


def test_a_step_that_would_take_too_long_is_left_out(script, capsys):
    clock = script("setup").Clock(1e-9)
    for clients in (100, 1000):
        clock.start(clients)
        assert clock("a step", lambda: 5) == (5 if clients == 100 else None)
    clock.print()
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "| seconds | N = 100 |" and lines[3].startswith("| a step | ")


@pytest.mark.filterwarnings("ignore:partition.kind = .*held by nobody")
@pytest.mark.parametrize("part", ["partitions", "planning", "recording"])
def test_steps_of_setting_up_are_printed(script, monkeypatch, capsys, part):
    monkeypatch.setattr(sys, "argv", ["setup.py", "--parts", part, "--clients", "100"])
    script("setup").main()
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(table) > 5 and all(float(line.split("|")[2]) >= 0 for line in table[1:])


@pytest.mark.slow
def test_overheads_are_printed(script, monkeypatch, capsys):
    asked = "overhead.py --clients 4 --model mlp --layers inner --measures probe --repetitions 1"
    monkeypatch.setattr(sys, "argv", asked.split())
    overhead, rounds = script("overhead"), script("rounds")
    monkeypatch.setattr(overhead, "noise", lambda count: rounds.noise(count, (4, 4, 1)))
    monkeypatch.setattr(fs, "ModelConfig", functools.partial(fs.ModelConfig, options={"hidden": [4, 4]}))
    overhead.main()
    out = capsys.readouterr().out
    for row in ("FedAvg", "movement measured", "LIPS, gradients kept and a sparse start", "probe"):
        (line,) = [line for line in out.splitlines() if line.startswith(f"| {row} |")]
        assert math.isfinite(float(line.split("|")[2]))
