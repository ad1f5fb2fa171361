"""Searches by successive halving: who goes on, that runs are what they are alone, and what a cut leaves."""

import csv
import dataclasses
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import jax
import numpy as np
import optuna
import pytest
import yaml

import fedjax_sim as fs
from fedjax_sim import runs
from fedjax_sim.cli import commands
from fedjax_sim.config import read_config, spaces, to_dict
from fedjax_sim.config.search_files import Search, read_search
from fedjax_sim.core.errors import UserError
from fedjax_sim.engine.together import Group
from fedjax_sim.runs.drive import Drive
from fedjax_sim.runs.federation import Simulation
from fedjax_sim.studies import search as searches
from fedjax_sim.studies.found import ranked

BASE = fs.RunConfig(
    rounds=9,
    partition=fs.PartitionConfig(clients=4),
    model=fs.ModelConfig("mlp", options={"hidden": [8]}),
    # By the number of all rounds: a run that had other rounds at a rung would have other rates.
    local=fs.LocalConfig(epochs=None, steps=2, batch_size=16, schedule="cosine", decay=0.1),
    evaluation=fs.EvaluationConfig(every=1),
    execution=fs.ExecutionConfig(devices=1),
    output=fs.OutputConfig(progress=False, tensorboard=False, figures=False, checkpoint_every=2),
)
LR = {"local.lr": fs.log_uniform(1e-3, 3.0)}


def of(config=BASE, **changes):
    """A configuration with some fields of its sections changed: `local={"lr": 0.2}`."""
    for name, value in changes.items():
        if isinstance(value, dict):
            changes[name] = dataclasses.replace(getattr(config, name), **value)
    return dataclasses.replace(config, **changes)


def tune(config=BASE, space=LR, **given):
    return fs.tune(config, space, **({"runs": 9, "rungs": 3} | given))


def keyed(run):
    return {
        (row.round, row.metric, row.layer, row.client, row.state): row.value
        for row in run.metrics
        if row.metric != "padding_waste"
    }


def close(here, there):
    assert here.keys() == there.keys()
    np.testing.assert_allclose([here[key] for key in there], list(there.values()), rtol=1e-4, atol=1e-6)


def halved(curves, rounds, factor, goal):
    """Successive halving in so many words: curves f64[n, rounds] -> the trials that come to each rung."""
    left, came = list(range(len(curves))), []
    for number, end in enumerate(rounds):
        came.append(list(left))
        left.sort(key=lambda trial: curves[trial][end - 1] * (-1 if goal == "max" else 1))  # stable
        left = sorted(left[: len(curves) // factor ** (number + 1)])
    return came


def summary(found):
    return [dataclasses.replace(trial, folders=()) for trial in found.trials]


@pytest.fixture
def trained(monkeypatch):
    """How many rounds of runs were done from now on, one entry for each time that some were."""
    counts, take = [], Drive.take

    def counted(self, first, under_way, lap=None):
        counts.append(self.simulation.round - first + 1)
        take(self, first, under_way, lap)

    monkeypatch.setattr(Drive, "take", counted)
    return counts


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A search that was never cut."""
    return tune(out=tmp_path_factory.mktemp("whole") / "search")


@pytest.fixture(scope="module")
def alone(whole):
    """Each trial's run by itself, from its first round to its last."""
    return [fs.run(whole.search.trial(trial.parameters)) for trial in whole.trials]


@pytest.mark.parametrize(("metric", "goal"), [(None, "max"), ("loss", "min")])
def test_those_go_on_that_are_best_by_runs_alone(metric, goal, alone, tmp_path, trained):
    found = tune(metric=metric, out=tmp_path / "search")
    assert found.rounds == (1, 3, 9) and found.goal == goal
    assert sum(trained) == 9 * 1 + 3 * (3 - 1) + 1 * (9 - 3)
    configs = [found.search.trial(trial.parameters) for trial in found.trials]
    assert len({config.local.lr for config in configs}) == 9
    assert configs == [run.config for run in alone]
    curves = np.array([run.metrics.series(found.metric)[1] for run in alone])
    came = halved(curves, found.rounds, 3, goal)
    assert [len(trials) for trials in came] == [9, 3, 1]
    for number, trials in enumerate(came):
        assert [trial.number for trial in found.trials if len(trial.values) > number] == trials
    assert found.best_trial.number == came[-1][0] and found.best == configs[came[-1][0]]
    assert found.best_value == pytest.approx(curves[came[-1][0], -1], rel=1e-5)
    for trial, run in zip(found.trials, alone, strict=True):
        end = found.rounds[len(trial.values) - 1]
        here, there = keyed(runs.load(trial.folders[0])), keyed(run)
        wanted = {key: value for key, value in there.items() if key[0] <= end}
        close(here, wanted)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        found.run.variables,
        alone[found.best_trial.number].variables,
    )


def test_folders_say_why_runs_were_stopped(whole):
    assert [len(trial.values) for trial in whole.trials].count(1) == 6
    for trial in whole.trials:
        run = runs.load(trial.folders[0])
        assert run.finished and run.rounds == whole.rounds[len(trial.values) - 1]
        if trial.state == "complete":
            assert run.stopped is None
        else:
            assert trial.state == "stopped" and run.stopped is not None
            assert (run.stopped.by, run.stopped.reason) == ("fs.tune", trial.why)
            assert f"and {3 if len(trial.values) == 1 else 1} go on" in trial.why


def test_the_study_knows_the_trials(whole):
    stored = optuna.load_study(study_name="search", storage=f"sqlite:///{whole.search.out / 'study.db'}")
    for study in (whole.study, stored):
        assert study.best_trial.number == whole.best_trial.number and study.best_value == whole.best_value
        for one, trial in zip(study.trials, whole.trials, strict=True):
            assert one.params == trial.parameters
            known = dict(zip(whole.rounds, trial.values, strict=False))
            assert one.intermediate_values == known
            assert one.state.name == ("COMPLETE" if trial.state == "complete" else "PRUNED")
    stored._storage._backend.engine.dispose()


def test_tables_and_pictures(whole):
    out = whole.search.out
    assert {"table.md", "table.csv", "best.yaml", "search.json", "study.db"} <= {
        path.name for path in out.iterdir()
    }
    assert read_config(out / "best.yaml") == whole.best
    assert json.loads(json.dumps(whole.to_dict()))["best"]["trial"] == whole.best_trial.number
    frame = whole.to_pandas()
    assert len(frame) == 9 and frame["accuracy@9"].notna().sum() == 1
    assert frame["accuracy@1"].tolist() == [trial.values[0] for trial in whole.trials]
    lines = whole.markdown().splitlines()
    assert (
        lines[0] == "| trial | local.lr | accuracy at 1 | accuracy at 3 | accuracy at 9 |"
        and len(lines) == 11
    )
    assert lines[2].startswith(f"| {whole.best_trial.number} |") and f"{whole.best_value:.4f} |" in lines[2]
    first, second = whole.plot().axes
    assert len(first.get_lines()) == 9 and second.get_xscale() == "log"
    assert whole.report().endswith(f"written to {out}, the other 6 trials in table.md")
    assert "of 9 trials" in repr(whole)
    four = dataclasses.replace(whole, trials=tuple(ranked(whole.trials, whole.goal)[:4]))
    assert four.report().endswith(f"written to {out}, one more trial in table.md")
    rows = list(csv.DictReader((out / "table.csv").read_text().splitlines()))
    assert [out / row["folder"] for row in rows] == [trial.folders[0] for trial in whole.trials]
    assert not any(Path(row["folder"]).is_absolute() for row in rows)


def test_a_best_trial_that_is_not_alone_is_told_as_such(whole):
    assert "as has" not in whole.report()
    best = whole.best_trial
    alike = tuple(
        dataclasses.replace(one, state="complete", values=best.values) if one.number in (2, 7) else one
        for one in whole.trials
    )
    equal = sorted({2, 7, best.number})[1:]
    told = f"as has trial {equal[0]};" if len(equal) == 1 else f"as has trials {equal[0]}, {equal[1]};"
    assert told in dataclasses.replace(whole, trials=alike).report()


def test_groups_are_compared_together():
    """Runs of other methods are other programs, one after another, and one comparison."""
    told = []
    space = {
        "algorithm": fs.choice({"plain": "fedavg", "near": {"name": "fedprox", "mu": 0.1}}),
        "local.lr": fs.choice([0.001, 0.1, 1.0]),
    }
    found = tune(space=space, runs=6, rungs=2, factor=2, tell=told.append)
    assert found.rounds == (5, 9) and "6 runs in 2 groups, which differ in: algorithm" in told[0]
    assert {trial.parameters["algorithm"] for trial in found.trials} == {"plain", "near"}
    rung = [trial.values[0] for trial in found.trials]
    went = {trial.number for trial in found.trials if len(trial.values) == 2}
    assert went == set(np.argsort(-np.array(rung), kind="stable")[:3])
    assert sum(line.startswith("rung") for line in told) == 2
    # Without a folder nothing is kept, and what is returned is whole.
    assert found.run.folder is None and found.run.finished and found.run.variables["params"]
    assert found.trials[0].folders == () and len(found.run.partition.train) == 4


def test_a_value_is_the_mean_over_seeds(tmp_path):
    found = tune(of(rounds=2), runs=2, rungs=2, factor=2, seeds=2, out=tmp_path / "search")
    for trial in found.trials:
        for number, end in enumerate(found.rounds[: len(trial.values)]):
            each = [runs.load(folder).metrics.series("accuracy")[1][end - 1] for folder in trial.folders]
            assert len(each) == 2 and trial.values[number] == pytest.approx(np.mean(each))
    assert [runs.load(folder).config.seed for folder in found.trials[0].folders] == [0, 1]


def test_rungs_end_in_evaluated_rounds():
    def rounds(**given):
        config = of(rounds=given.pop("all", 100), evaluation={"every": given.pop("every")})
        return Search(config, LR, **given).rounds

    assert rounds(every=1) == (12, 34, 100)
    assert rounds(every=10) == (20, 40, 100)
    assert rounds(every=7, all=81) == (14, 28, 81)
    assert rounds(every=1, all=81, runs=81, rungs=5) == (1, 3, 9, 27, 81)
    assert rounds(every=1, rungs=1) == (100,)
    assert Search(of(), LR, runs=64, rungs=3, factor=4).kept == (64, 16, 4)
    assert Search(of(), LR, runs=26, rungs=3).kept == (26, 8, 2)


# --- a search that was cut ------------------------------------------------------------------------------


def test_a_search_that_fails_goes_on(whole, tmp_path, monkeypatch, trained):
    """A callback fails in the second rung; the others come to its end, and the search goes on."""
    stop = whole.best_trial.parameters["local.lr"]

    def broken(self, number, rows, run):
        if number == 2 and run.config.local.lr == stop:
            raise RuntimeError("out of luck")

    config = of(callbacks=(fs.KeepBest(),))
    with monkeypatch.context() as patch:
        patch.setattr(fs.KeepBest, "on_round", broken)
        with pytest.raises(UserError, match="out of luck"):
            tune(config, out=tmp_path / "search")
    assert sum(trained) == 9 + 3 * 2 - 1  # and the broken one's second round was not written down
    trained.clear()
    found = tune(config, out=tmp_path / "search")
    assert sum(trained) <= 3 + 6 and summary(found) == summary(whole)
    close(keyed(found.run), keyed(whole.run))  # its second rung was done alone, not side by side
    trained.clear()
    assert summary(tune(config, out=tmp_path / "search")) == summary(whole) and not trained


@pytest.mark.parametrize("call", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_search_that_is_asked_to_end_goes_on(call, whole, tmp_path, monkeypatch):
    """In the last call of a rung as well, after which its runs are cut anyway."""
    steps, calls = Group.steps, []

    def counted(self, active, most=None):
        calls.append(active)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return steps(self, active, most)

    with monkeypatch.context() as patch:
        patch.setattr(Group, "steps", counted)
        with pytest.raises(runs.Terminated, match="start the search again"):
            tune(out=tmp_path / "search")
    assert len(calls) == call
    found = tune(out=tmp_path / "search")
    assert summary(found) == summary(whole) and keyed(found.run) == keyed(whole.run)


@pytest.mark.slow
@pytest.mark.faults
def test_a_search_that_is_killed_goes_on(tmp_path):
    file = tmp_path / "tune.yaml"
    config = of(rounds=270, evaluation={"every": 10}, output={"checkpoint_every": 20})
    space = {"local.lr": {"log_uniform": [0.001, 3.0]}}
    file.write_text(yaml.safe_dump({"base": to_dict(config), "space": space, "runs": 9}))
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": str(jax.device_count()), "JAX_PLATFORMS": "cpu"}

    def started(out):
        line = [sys.executable, "-m", "fedjax_sim.cli", "tune", str(file), "--out", str(tmp_path / out)]
        return subprocess.Popen(line, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def came(out):
        """How many rounds its runs have recorded."""
        journals = (tmp_path / out / "runs").glob("*/journal.jsonl")
        return sum(path.read_bytes().count(b"\n") for path in journals)

    for out, ends in {"whole": (), "cut": (60, 400, 500, 600)}.items():
        for end in ends:
            process = started(out)
            while came(out) < end and process.poll() is None:
                time.sleep(0.01)
            process.kill()
            process.communicate()
        process = started(out)
        assert process.communicate()[1] is not None and process.returncode == 0
    tables = [(tmp_path / out / "table.csv").read_text() for out in ("whole", "cut")]
    assert tables[0] == tables[1] and "complete" in tables[0]


# --- trials that diverge --------------------------------------------------------------------------------


def test_a_trial_that_diverges_never_wins(tmp_path, trained):
    space = {"local.lr": fs.choice([0.1, 1e30, 0.01, 1e31])}
    config = of(local={"momentum": 0.0})
    told = []
    found = tune(config, space, runs=4, rungs=2, factor=2, out=tmp_path / "search", tell=told.append)
    failed = {trial.parameters["local.lr"] for trial in found.trials if trial.state == "failed"}
    assert failed == {1e30, 1e31} and "2 diverged" in told[-2]
    for trial in found.trials:
        assert trial.state != "failed" or ("update of client(s)" in trial.why and trial.values == ())
    assert [one.state.name for one in found.study.trials].count("FAIL") == 2
    assert found.best.local.lr in (0.1, 0.01) and "diverged" in found.markdown()
    trained.clear()
    again = tune(config, space, runs=4, rungs=2, factor=2, out=tmp_path / "search")
    assert summary(again) == summary(found) and not trained


def test_all_diverge(tmp_path):
    space = {"local.lr": fs.log_uniform(1e30, 1e31)}
    with pytest.raises(
        UserError, match=r"no trial is left: all 4 that came here diverged; trial 0 \(local.lr"
    ):
        tune(space=space, runs=4, rungs=2, factor=2, out=tmp_path / "search")


def test_a_metric_that_is_not_finite_never_wins(monkeypatch):
    """Of a network that trains on and has no loss any more."""
    evaluated = Simulation.evaluate

    def without(self, *args, **keywords):
        rows = evaluated(self, *args, **keywords)
        if self.setup.config.local.lr != 0.2:
            return rows
        return lambda: [row._replace(value=math.nan) if row.metric == "accuracy" else row for row in rows()]

    monkeypatch.setattr(Simulation, "evaluate", without)
    space = {"local.lr": fs.choice([0.1, 0.2])}
    with pytest.warns(UserWarning, match="accuracy is nan"):
        found = tune(of(rounds=2), space, runs=2, rungs=1)
    (bad,) = [trial for trial in found.trials if trial.state == "failed"]
    assert bad.parameters["local.lr"] == 0.2 and bad.why == "its accuracy is not finite in round 2"
    assert found.best.local.lr == 0.1


# --- what is proposed -----------------------------------------------------------------------------------


def test_trials_are_spread_and_their_own():
    space = {"local.lr": fs.log_uniform(1e-4, 1.0), "local.steps": fs.integers(1, 4)}
    asked = Search(BASE, space, runs=16, rungs=2, factor=2)
    found = searches._proposed(asked, None)
    assert found == searches._proposed(asked, None) and len(found) == 16
    other = searches._proposed(dataclasses.replace(asked, config=of(seed=1)), None)
    assert found != other
    logs = np.log10([one["local.lr"] for one in found])
    assert set(np.floor(logs)) == {-4, -3, -2, -1} and {one["local.steps"] for one in found} == {1, 2, 3, 4}
    for sampler in ("random", "tpe"):
        assert len(searches._proposed(dataclasses.replace(asked, sampler=sampler), None)) == 16
    given = searches._proposed(asked, optuna.samplers.RandomSampler(seed=3))
    assert given == searches._proposed(asked, optuna.samplers.RandomSampler(seed=3)) != found
    grid = {"local.lr": fs.choice([0.1, 0.2]), "local.steps": fs.choice([1, 2])}
    every = searches._proposed(Search(BASE, grid, runs=4, rungs=2, factor=2), None)
    assert len({tuple(one.values()) for one in every}) == 4
    with pytest.raises(UserError, match="the space has no more than 4 settings"):
        searches._proposed(Search(BASE, grid, runs=5, rungs=2, factor=2), None)
    with pytest.raises(UserError, match="none of Optuna's samplers"):
        searches._proposed(asked, np.random.default_rng(0))


def test_spaces():
    assert fs.uniform(0, 1).distribution() == optuna.distributions.FloatDistribution(0.0, 1.0)
    assert fs.log_uniform(1e-3, 1).distribution() == optuna.distributions.FloatDistribution(
        1e-3, 1.0, log=True
    )
    assert fs.integers(1, 5).distribution() == optuna.distributions.IntDistribution(1, 5)
    named = fs.choice({"a": [1], "b": [2]})
    assert named.distribution() == optuna.distributions.CategoricalDistribution(["a", "b"])
    assert named.value("b") == [2] and fs.choice([True, 1]).value(1) == 1
    layers = fs.choice([{"hidden": [8]}, {"hidden": [4, 4]}])
    assert layers.value(layers.examples()[1]) == {"hidden": [4, 4]}
    for space in (fs.uniform(0, 1), fs.log_uniform(1, 2), fs.integers(1, 8, log=True), named, layers):
        assert spaces.from_dict("x", yaml.safe_load(yaml.safe_dump(space.to_dict()))) == space


# --- what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"space": {"local.lrr": fs.uniform(0.1, 1)}}, r"space.local.lrr = .*no such field. Did you mean lr"),
        ({"space": {"lr": fs.uniform(0.1, 1)}}, "Did you mean local.lr"),
        ({"space": {"local.batch_size": fs.uniform(1, 32)}}, r"whole number .* Write integers\(1, 32\)"),
        ({"space": {"local.steps": fs.integers(0, 3)}}, r"space.local.steps = 'integers\(0, 3\)'"),
        ({"space": {"local.lr": fs.choice([0.1, "fast"])}}, "local.lr = 'fast': a number"),
        ({"space": {"local.lr": [0.1, 0.2]}}, r"Write \{choice: \[0.1, 0.2\]\}"),
        ({"space": {"local.lr": {"log_unifrom": [0.1, 0.2]}}}, "Did you mean log_uniform"),
        ({"space": {"local.lr": {"uniform": [0.1]}}}, "two numbers are wanted"),
        ({"space": {"seed": fs.integers(0, 3)}}, "a search takes its seeds from `seeds`"),
        ({"space": {"rounds": fs.integers(3, 9)}}, "after as many rounds"),
        ({"space": {"output.dir": fs.choice(["a", "b"])}}, "no result goes by it"),
        ({"space": {}}, "it has no field"),
        ({"runs": 8}, "at least 9. Ask for as many, or for rungs = 2"),
        ({"rungs": 0}, "rungs = 0: it must be at least 1"),
        ({"factor": 1}, "factor = 1: it must be at least 2"),
        ({"runs": 2.5}, "runs = 2.5: a whole number"),
        ({"goal": "up"}, "Choose max or min"),
        ({"sampler": "qmx"}, "Did you mean qmc"),
        ({"config": of(evaluation={"every": 5})}, "which would be 5, 5, 9"),
        ({"config": of(evaluation={"every": 0})}, "compared by what is evaluated"),
        ({"metric": "acuracy", "runs": 3, "rungs": 1}, "Did you mean accuracy"),
    ],
)
def test_what_is_refused(given, why):
    with pytest.raises(UserError, match=why):
        tune(**given)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: fs.uniform(1, 1), "below the second"),
        (lambda: fs.log_uniform(0, 1), "no logarithm"),
        (lambda: fs.uniform(0, math.inf), "a finite number"),
        (lambda: fs.integers(0.5, 2), "a whole number"),  # type: ignore[arg-type]
        (lambda: fs.choice([1]), "nothing to choose"),
        (lambda: fs.choice([1, 1]), "there twice"),
        (lambda: fs.choice("ab"), "a list is wanted"),
    ],
)
def test_spaces_that_are_refused(make, why):
    with pytest.raises(UserError, match=why):
        make()


def test_nothing_is_compiled_for_a_run_that_cannot_work(monkeypatch):
    monkeypatch.setattr(searches, "run_groups", None)
    with pytest.raises(UserError, match=r"trial 0 \(.*cohort"):
        tune(space={"cohort.size": fs.integers(5, 40)}, runs=3, rungs=1)


def test_a_folder_of_something_else(whole, tmp_path):
    with pytest.raises(UserError, match="another search: factor was 3 and is 2"):
        tune(factor=2, out=whole.search.out)
    with pytest.raises(UserError, match=r"another search: config.local.momentum was .* and is 0.5"):
        tune(of(local={"momentum": 0.5}), out=whole.search.out)
    with pytest.raises(UserError, match=r"another search: space\.local\.lr\.log_uniform was"):
        tune(space={"local.lr": fs.log_uniform(1e-3, 2.0)}, out=whole.search.out)
    (tmp_path / "notes").write_text("")
    with pytest.raises(UserError, match="holds no search"):
        tune(out=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="it cannot be written"):
        tune(out=tmp_path / "file" / "search")


def test_what_no_folder_can_hold_is_refused():
    @dataclasses.dataclass(frozen=True)
    class Own:
        def on_round(self, number, rows, run):
            pass

    with pytest.raises(UserError, match="trials go on from their folders, which cannot hold it"):
        tune(of(callbacks=(Own(),)))


def test_a_data_set_from_python(tmp_path):
    dataset = BASE.data.load()
    found = tune(of(rounds=1), runs=2, rungs=1, dataset=dataset, out=tmp_path / "search")
    assert found.run.config.given == {"dataset": dataset.name} and found.run.variables["params"]
    again = tune(of(rounds=1), runs=2, rungs=1, dataset=dataset, out=tmp_path / "search")
    assert summary(again) == summary(found)


def test_without_optuna(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"optuna.*not installed.*\[tune\]"):
        tune()


def test_several_processes(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="several processes share each run"):
        tune()


# --- the command line -----------------------------------------------------------------------------------


def test_a_file(whole, tmp_path, capsys):
    file = tmp_path / "rates.yaml"
    base = to_dict(BASE)
    asked = {"base": base, "space": {"local.lr": {"log_uniform": [0.001, "3e0"]}}, "runs": 9}
    file.write_text(yaml.safe_dump(asked))
    assert read_search(file).out.parts[-2:] == ("runs", "rates")
    assert commands.main(["tune", str(file), "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert "rung 3 of 3" in told and f"accuracy {whole.best_value:.4f}" in told
    table = (tmp_path / "out" / "table.csv").read_text()
    assert table == (whole.search.out / "table.csv").read_text()
    file.write_text("methods: {A: {}}\nseeds: [0]\n")
    assert commands.main(["tune", str(file)]) == 2
    told = capsys.readouterr().err
    assert "this is the file of a sweep (it has methods)" in told and f"fedjax-sim sweep {file}" in told
    file.write_text("space: {local.lr: {choice: [0.1, 0.2]}}\n")
    assert commands.main(["sweep", str(file)]) == 2
    told = capsys.readouterr().err
    assert "this is the file of a search (it has space)" in told and f"fedjax-sim tune {file}" in told
    file.write_text(yaml.safe_dump(asked | {"rounds": 3}))
    assert commands.main(["tune", str(file)]) == 2
    assert "Put rounds under `base`" in capsys.readouterr().err
    file.write_text(yaml.safe_dump({"base": base}))
    assert commands.main(["tune", str(file)]) == 2
    assert commands.main(["tune"]) == 2
    assert commands.main(["tune", "--help"]) == 0


def test_no_warnings_reach_the_user(recwarn):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        tune(of(rounds=1), runs=2, rungs=1)
    assert not [one for one in recwarn if "optuna" in str(one.filename)]
