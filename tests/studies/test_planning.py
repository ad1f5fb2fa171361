"""What a sweep will need in memory: the plan of each method in each setting."""

import json

import pytest

import fedjax_sim as fs
from fedjax_sim.cli import commands
from fedjax_sim.core.errors import UserError

SMALL = {
    "base": {
        "rounds": 2,
        "partition": {"clients": 6},
        "execution": {"devices": 1},
        "local": {"epochs": 1},
    },
    "methods": {"FedAvg": {"algorithm": "fedavg"}, "Scaffold": {"algorithm": "scaffold"}},
    "seeds": [3, 4],
}


def written(tmp_path, **changes):
    path = tmp_path / "study.yaml"
    path.write_text(json.dumps(SMALL | changes))
    return path


def test_each_method_in_each_setting_has_the_plan_of_its_run(tmp_path):
    path = written(tmp_path, grid={"model": ["mlp", "mcmahan"]})
    sweep = fs.sweep.load(path)
    found = fs.sweep.plan(sweep)
    assert [(job.method, job.column, job.seed) for job, _ in found.plans] == [
        (method, column, 3)
        for column in dict.fromkeys(job.column for job in sweep.jobs)
        for method in SMALL["methods"]
    ]
    for job, plan in found.plans:
        assert plan.peak == fs.plan(job.config).peak
    assert found.largest[0].method == "Scaffold" and "mcmahan" in found.largest[0].column
    assert found.fits and found.runs == 8


def test_on_the_command_line(tmp_path, capsys):
    path = written(tmp_path)
    assert commands.main(["plan", str(path)]) == 0
    told = capsys.readouterr().out
    assert told.startswith("4 runs, one after another.") and "| method | peak | fits |" in told
    assert "most is asked for by Scaffold, seed 3:" in told and "training samples" in told
    for words, wrong in ((["--seed", "5"], "--seed"), (["--exact"], "--exact"), (["--on", "cpu-2"], "--on")):
        assert commands.main(["plan", str(path), *words]) == 2
        assert f"command line = '{wrong}'" in capsys.readouterr().err
    assert commands.main(["run", str(path)]) == 2


def test_what_does_not_fit_ends_with_1(tmp_path, capsys, monkeypatch):
    from fedjax_sim.runs import plan

    monkeypatch.setattr(plan, "available", lambda platform: 2**20)
    assert commands.main(["plan", str(written(tmp_path))]) == 1
    told = capsys.readouterr().out
    assert "| FedAvg | " in told and "| NO |" in told and "does NOT fit" in told


def test_a_configuration_that_cannot_work_is_told_with_its_run(tmp_path):
    changes = {"grid": {"partition.clients": [6, 100_000]}}
    with pytest.raises(UserError, match=r"partition.*\(in FedAvg, .*100000.*, seed 3\)"):
        fs.sweep.plan(fs.sweep.load(written(tmp_path, **changes)))
