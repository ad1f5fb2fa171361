import collections
import csv
import dataclasses
import io
import json
import re
import shutil
import signal
import types
import warnings
from pathlib import Path

import jax
import numpy as np
import PIL
import pytest
import yaml
from PIL import Image

import fedjax_sim as fs
from fedjax_sim import runs
from fedjax_sim.cli import commands
from fedjax_sim.core import memo
from fedjax_sim.core.errors import UserError
from fedjax_sim.engine import programs
from fedjax_sim.records import Row, Table
from fedjax_sim.runs import own_code, progress
from fedjax_sim.runs.federation import Simulation
from fedjax_sim.studies import comparison, sweep
from fedjax_sim.studies.comparison import deviation, format_mean_std, mean

BASE = {
    "rounds": 2,
    "partition": {"kind": "dirichlet", "clients": 8, "alpha": 1.0},
    "model": {"options": {"hidden": [8]}},
    "local": {"epochs": None, "steps": 2, "batch_size": 16, "lr": 0.1},
    "cohort": {"size": 4},
    "execution": {"devices": 1},
    "evaluation": {"every": 1},
    "output": {"tensorboard": False, "figures": False, "checkpoint_every": 1},
}
METHODS = {"FedAvg": {"algorithm": "fedavg"}, "FedMR": {"algorithm": {"name": "fedmr", "first_stage": 1}}}


def asked(out, **changes):
    return {
        "base": BASE,
        "methods": METHODS,
        "seeds": [0, 1],
        "reference": "FedAvg",
        "out": str(out),
        **changes,
    }


def test_a_misspelt_field_of_a_method_is_told_with_the_method_and_the_way_out(tmp_path):
    with pytest.raises(UserError, match=r"\(of 'a'\) no such field\. Did you mean algorithm\?$"):
        sweep.from_mapping(asked(tmp_path, methods={"a": {"algorthm": "fedavg"}}, reference="a"))


def test_jobs_are_the_product_and_share_what_a_comparison_shares(tmp_path):
    made = sweep.from_mapping(asked(tmp_path, grid={"partition.alpha": [0.5, 1.0], "local.lr": [0.1]}))
    assert len(made.jobs) == 2 * 2 * 2
    by_place = {}
    for job in made.jobs:
        by_place.setdefault((job.column, job.seed), []).append(job.config)
    for (column, seed), (one, other) in by_place.items():
        assert (one.partition, one.cohort, one.seed, one.data) == (
            other.partition,
            other.cohort,
            other.seed,
            other.data,
        )
        assert one.seed == seed and one.algorithm != other.algorithm
        assert column == f"alpha {one.partition.alpha}, lr 0.1"
    assert len({job.config.output.dir for job in made.jobs}) == 8
    assert [job.seed for job in made.jobs] == [0] * 4 + [1] * 4


def test_columns_may_have_names_and_change_a_whole_section(tmp_path):
    grid = {"partition": {"skewed": {"kind": "dirichlet", "alpha": 0.1}, "IID": {"kind": "iid"}}}
    made = sweep.from_mapping(asked(tmp_path, grid=grid, seeds=[0]))
    found = {job.column: job.config.partition for job in made.jobs}
    assert list(found) == ["skewed", "IID"]
    assert (found["skewed"].kind, found["skewed"].alpha, found["IID"].kind) == ("dirichlet", 0.1, "iid")
    assert {part.clients for part in found.values()} == {made.jobs[0].config.partition.clients}
    assert {Path(str(job.config.output.dir)).parts[-2] for job in made.jobs} == {
        "partition=skewed",
        "partition=IID",
    }
    assert made.jobs[0].name == "FedAvg, skewed, seed 0"


def test_a_value_that_is_twice_in_a_list_is_one_column(tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text(
        "methods: {no: {algorithm: fedavg}, '1': {algorithm: fedmr}}\n"
        "grid: {local.lr: [0.01, 1e-2, 1.0e-2], rounds: [3, 3, 4], local.clip_norm: [1, 1.0]}\n"
        "reference: no\n"
    )
    made = sweep.load(file)
    assert [(job.method, job.config.rounds) for job in made.jobs] == [
        ("no", 3),
        ("1", 3),
        ("no", 4),
        ("1", 4),
    ]
    assert [job.column for job in made.jobs[::2]] == [
        "lr 0.01, rounds 3, clip_norm 1",
        "lr 0.01, rounds 4, clip_norm 1",
    ]
    texts = sweep.from_mapping(asked(tmp_path, grid={"local.lr": [0.01, "1e-2", "0.010"]}))
    assert {job.column for job in texts.jobs} == {"lr 0.01"}


def test_a_bare_name_stands_for_a_section(tmp_path):
    made = sweep.from_mapping(
        {
            "base": {"data": "digits-domains", "partition": "domain"},
            "methods": {"A": {"model.norm": "group"}},
            "grid": {"model": ["resnet8", "cnn8"], "partition": {"even": "iid", "own": {"kind": "domain"}}},
        }
    )
    assert [(job.column, job.config.model.name, job.config.partition.kind) for job in made.jobs] == [
        ("model resnet8, even", "resnet8", "iid"),
        ("model resnet8, own", "resnet8", "domain"),
        ("model cnn8, even", "cnn8", "iid"),
        ("model cnn8, own", "cnn8", "domain"),
    ]
    assert {(job.config.data.source, job.config.model.norm) for job in made.jobs} == {
        ("digits-domains", "group")
    }


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_cut_sweep_is_continued_by_starting_it_again(tmp_path, monkeypatch, capsys, number, status):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(asked(tmp_path / "out")))
    kind = runs.Interrupted if number == signal.SIGINT else runs.Terminated

    def cut(*args):
        raise kind(types.SimpleNamespace(rounds=1, folder=tmp_path / "run"))

    monkeypatch.setattr(runs, "run_prepared", cut)
    assert commands.main(["sweep", str(path), "--part", "1/2"]) == status
    told = capsys.readouterr().err
    assert (
        f"after round 1; continue with: fedjax-sim sweep {path} --part 1/2" in told and "resume" not in told
    )
    with pytest.raises(kind, match=r"after round 1; .*FedAvg, seed 0.*start the sweep again"):
        sweep.run(sweep.load(path))


def test_a_sweep_that_is_interrupted_between_runs(tmp_path, monkeypatch, capsys):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(asked(tmp_path / "out")))

    def cut(*args, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "run", cut)
    assert commands.main(["sweep", str(path)]) == 130
    assert f"interrupted; continue with: fedjax-sim sweep {path}" in capsys.readouterr().err


def test_changes_may_be_nested_or_dotted_and_the_algorithm_s_fields_follow_its_name(tmp_path):
    methods = {
        "a": {"local": {"lr": 0.5}, "cohort.size": 2},
        "b": {"algorithm": "fedmr", "algorithm.first_stage": 7},
    }
    one, other = sweep.from_mapping(asked(tmp_path, methods=methods, seeds=[3], reference=None)).jobs
    assert one.config.local.lr == 0.5 and one.config.cohort.size == 2 and one.config.local.steps == 2
    assert other.config.algorithm.first_stage == 7 and other.config.local.lr == 0.1
    grid = {"algorithm.first_stage": [1, 2]}
    made = sweep.from_mapping(
        asked(tmp_path, methods={"m": {"algorithm": "fedmr"}}, grid=grid, seeds=[0], reference="m")
    )
    assert [job.config.algorithm.first_stage for job in made.jobs] == [1, 2]


def test_base_may_be_a_file_beside(tmp_path):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
    (tmp_path / "study.yaml").write_text("base: base.yaml\n")
    made = sweep.load(tmp_path / "study.yaml")
    assert made.jobs[0].config.rounds == 2 and made.out.parts[-2:] == ("runs", "study")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep") / "out"
    return sweep.run(sweep.from_mapping(asked(out, rounds_of_interest=[1])))


def test_a_sweep_writes_one_table_in_three_formats_and_curves(done):
    out = done.sweep.out
    assert not done.failures and len(done.seconds) == 4
    for name in ("table.md", "table.csv", "table.tex", "curves.png", "curves.pdf", "sweep.json"):
        assert (out / name).stat().st_size > 0
    accuracy = {
        (job.method, job.seed): runs.load(job.config.output.dir).metrics.last("accuracy")
        for job in done.sweep.jobs
    }
    values = [accuracy["FedMR", seed] for seed in (0, 1)]
    text = (out / "table.md").read_text()
    assert f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f} (2)" in text
    differences = [accuracy["FedMR", seed] - accuracy["FedAvg", seed] for seed in (0, 1)]
    assert f"{np.mean(differences):+.4f} ± {np.std(differences, ddof=1):.4f} (2)" in text
    assert "accuracy, last value up to round 1" in text and text.count("**") >= 4
    rows = list(csv.DictReader(io.StringIO((out / "table.csv").read_text())))
    assert {row["method"] for row in rows} == {"FedAvg", "FedMR"} and len(rows) == 4
    tex = (out / "table.tex").read_text()
    assert tex.count(r"\begin{tabular}") == tex.count(r"\end{tabular}") == 4 and r"\textbf" in tex
    about = json.loads((out / "sweep.json").read_text())
    assert all(job["seconds"] > 0 and job["config"]["rounds"] == 2 for job in about["jobs"])
    assert about["versions"]["jax"] == jax.__version__
    own = runs.load(done.sweep.jobs[0].config.output.dir).folder
    assert "pillow" not in own_code.told_by(own)["versions"]  # the digits are no picture files
    for unit in ("seconds", "cpu_seconds"):
        spent = [job[unit] for job in about["jobs"]]
        assert min(spent) > 0 and about[f"{unit}_of_rounds"] == pytest.approx(sum(spent))
        assert {job.name: getattr(done, unit)[job.name] for job in done.sweep.jobs} == getattr(done, unit)
        for row in rows:
            of_method = [job[unit] for job in about["jobs"] if job["method"] == row["method"]]
            assert float(row[unit]) == pytest.approx(mean(of_method), abs=1e-3)


def test_side_by_side_a_sweep_says_the_same(done, tmp_path):
    asked_for, lines = sweep.from_mapping(asked(tmp_path / "out")), []
    found = sweep.run(asked_for, tell=lines.append, together=True)
    assert not found.failures and not found.left and set(found.seconds) == set(done.seconds)
    assert lines[0].startswith("4 runs in 2 groups, which differ in: algorithm")
    for job in asked_for.jobs:
        place = Path(str(job.config.output.dir))
        one, other = (
            runs.load(at).metrics for at in (place, done.sweep.out / place.relative_to(tmp_path / "out"))
        )
        np.testing.assert_allclose(one.series("loss")[1], other.series("loss")[1], rtol=1e-4)
    again = []
    sweep.run(asked_for, tell=again.append, together=True)
    assert all("finished before" in line for line in again) and len(again) == 4
    with pytest.raises(UserError, match="one after another"):
        sweep.run(asked_for, launcher="ray", together=True)


def test_a_second_start_runs_nothing_and_says_the_same(done, monkeypatch):
    def never(self, most=None):
        raise AssertionError("a finished run was run again")

    monkeypatch.setattr(Simulation, "steps", never)
    told = []
    again = sweep.run(done.sweep, told.append)
    assert not again.failures and all("finished before" in line for line in told)
    assert again.comparison.markdown() == done.comparison.markdown()


def test_a_clone_with_the_records_alone_is_finished_and_gives_the_same_table(tmp_path, monkeypatch):
    (tmp_path / "first").mkdir()
    monkeypatch.chdir(tmp_path / "first")
    # As in an experiment: = in the folders' names. `out` is absolute here, and relative in the clone.
    wanted = asked(tmp_path / "first" / "out", grid={"partition.alpha": [0.5]})
    done = sweep.run(sweep.from_mapping(wanted))
    assert not done.failures
    tables = {name: (done.sweep.out / name).read_bytes() for name in ("table.md", "table.csv", "table.tex")}
    for job in done.sweep.jobs:
        folder = runs.load(job.config.output.dir).folder
        for path in folder.iterdir():
            if path.name not in ("config.yaml", "provenance.json", "metrics.parquet", "timing.csv"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name in tables:
        (done.sweep.out / name).unlink()
    here = str(tmp_path)
    texts = [*done.sweep.out.rglob("*.yaml"), *done.sweep.out.rglob("*.json")]
    assert len(texts) == 9 and not [path for path in texts if here in path.read_text()]
    (tmp_path / "first").rename(tmp_path / "clone")
    monkeypatch.chdir(tmp_path / "clone")

    def never(*arguments, **more):
        raise AssertionError("a finished run was run again, or its data were loaded")

    monkeypatch.setattr(Simulation, "steps", never)
    monkeypatch.setattr("fedjax_sim.data.load", never)
    told = []
    again = sweep.run(sweep.from_mapping({**wanted, "out": "out"}), told.append)
    assert not again.failures and len(told) == 4 and all("finished before" in line for line in told)
    for name, content in tables.items():
        assert (tmp_path / "clone" / "out" / name).read_bytes() == content


def test_a_sweep_is_taken_by_its_file_and_its_outcome_is_short_to_print(done, tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(asked(done.sweep.out, rounds_of_interest=[1])))
    outcome = sweep.run(str(path))
    assert outcome.sweep == sweep.run(path).sweep == done.sweep
    assert repr(outcome) == (f"Outcome(4 of 4 runs finished, in {done.sweep.out}; report() gives the table)")
    failed = dataclasses.replace(outcome, failures={"FedMR, seed 1": "it diverged"})
    assert "4 of 4 runs finished, 1 failed, in" in repr(failed)
    assert sweep.plan(path).runs == 4


def test_the_table_of_a_sweep_s_file_has_the_file_s_reference(done, tmp_path, capsys):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(asked(done.sweep.out)))
    assert fs.compare(path).reference == "FedAvg" and fs.compare([str(path)]).reference == "FedAvg"
    assert fs.compare(path, reference="FedMR").reference == "FedMR"
    assert commands.main(["compare", str(path)]) == 0
    assert "paired differences to FedAvg" in capsys.readouterr().out
    assert fs.compare([done.sweep.jobs[0].config.output.dir]).reference is None


def test_methods_see_the_same_partition(done):
    parts = {}
    for job in done.sweep.jobs:
        parts.setdefault(job.seed, []).append(runs.load(job.config.output.dir).partition)
    for one, other in parts.values():
        assert all(np.array_equal(a, b) for a, b in zip(one.train, other.train, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(parts[0][0].train, parts[1][0].train, strict=False))


def test_one_failure_does_not_stop_the_others_and_a_cut_run_is_resumed(tmp_path, monkeypatch, capsys):
    methods = {"good": {}, "bad": {"local.lr": 1e30}, "cut": {"execution.donate": False}}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(asked(tmp_path / "out", methods=methods, seeds=[0], reference="good")))
    steps = Simulation.steps

    def cut(self, most=None):
        if self.round == 1 and "/cut/" in str(self.setup.config.output.dir):
            raise RuntimeError("the lights went out")
        return steps(self, 1)

    with monkeypatch.context() as patch:
        patch.setattr(Simulation, "steps", cut)
        assert commands.main(["sweep", str(path)]) == 1
    told = capsys.readouterr().out
    assert "2 of 3 runs failed" in told and "not finite" in told and "the lights went out" in told
    assert commands.main(["sweep", str(path)]) == 1
    told = capsys.readouterr().out
    assert "cut, seed 0: resumed" in told and "good, seed 0: finished before" in told and "1 of 3" in told
    good, cut_run = (
        runs.load(tmp_path / "out" / "runs" / name / "base" / "seed0") for name in ("good", "cut")
    )
    assert list(good.metrics) == list(cut_run.metrics)


def test_a_method_that_cannot_work_is_named_before_any_run_starts(tmp_path, capsys):
    methods = {"good": {}, "bad": {"algorithm": {"name": "fednova"}, "local.optimizer": "adam"}}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(asked(tmp_path / "out", methods=methods, seeds=[0], reference="good")))
    assert commands.main(["sweep", str(path)]) == 2
    told = capsys.readouterr()
    assert told.err.startswith("error: bad, seed 0: local.optimizer = 'adam'") and "SGD" in told.err
    assert "Traceback" not in told.err
    assert not (tmp_path / "out" / "runs").exists()


def test_parts_together_are_the_sweep(done, tmp_path, capsys):
    """Each runs its own, in one folder for all; the last to end has the whole table."""
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(asked(tmp_path / "out", rounds_of_interest=[1])))
    assert commands.main(["sweep", str(path), "--part", "1/3"]) == 0
    told = capsys.readouterr().out
    assert told.count(": run,") == 2 and told.count("another part's") == 2
    assert "2 of 4 runs are not finished" in told
    assert not (tmp_path / "out" / "runs" / "FedMR" / "base" / "seed0").exists()
    about = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [job["seconds"] is not None for job in about["jobs"]] == [True, False, False, True]
    for part in ("2/3", "3/3"):
        assert commands.main(["sweep", str(path), f"--part={part}"]) == 0
    told = capsys.readouterr().out
    assert told.count(": run,") == 2 and "1 of 4 runs" in told
    for job, other in zip(sweep.load(path).jobs, done.sweep.jobs, strict=True):
        one, two = (runs.load(which.config.output.dir).metrics for which in (job, other))
        assert list(one) == list(two)
    tables = [out.joinpath("table.md").read_text() for out in (tmp_path / "out", done.sweep.out)]
    assert tables[0] == tables[1]
    assert commands.main(["sweep", str(path)]) == 0
    assert capsys.readouterr().out.count("finished before") == 4


@pytest.mark.parametrize("part", ["0/2", "3/2", "half", "1/0", "-1/2"])
def test_parts_that_are_none(part, tmp_path, capsys):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(asked(tmp_path / "out")))
    assert commands.main(["sweep", str(path), f"--part={part}"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and "part" in told
    assert not (tmp_path / "out").exists()


def kept(out):
    """Every file below a folder that a sweep writes for itself."""
    return {path: path.read_bytes() for path in out.iterdir() if path.is_file()}


def test_runs_of_other_settings_are_told_once_before_anything_is_written(done, tmp_path, capsys):
    path, before = tmp_path / "study.yaml", kept(done.sweep.out)

    def refused(**changes):
        path.write_text(yaml.safe_dump(asked(done.sweep.out, base={**BASE, **changes})))
        assert commands.main(["sweep", str(path)]) == 2
        told = capsys.readouterr()
        assert kept(done.sweep.out) == before and told.out == ""
        assert told.err.startswith("error: sweep.out = ") and told.err.count("runs of other settings") == 1
        assert "it holds 4 runs of other settings, the first of them FedAvg, seed 0: " in told.err
        return told.err

    fewer = refused(rounds=1)
    assert "rounds is 2, not 1. Put rounds back to 2; rounds_of_interest: [1] gives" in fewer
    assert "Put the settings back, or remove" in refused(rounds=1, cohort={"size": 3})
    assert "fedjax-sim resume" in refused(rounds=3) and "--rounds 3" in refused(rounds=3)
    assert runs.load(done.sweep.jobs[0].config.output.dir).rounds == 2


def test_a_finished_sweep_is_extended_as_its_error_says(tmp_path, capsys):
    spec = asked(tmp_path / "out", seeds=[0])
    assert not sweep.run(sweep.from_mapping(spec)).failures
    more = sweep.from_mapping({**spec, "base": {**BASE, "rounds": 3}})
    for job in more.jobs:
        with pytest.raises(UserError, match="To extend") as caught:
            sweep.run(more)
        line = re.search(r"fedjax-sim (resume \S+ --rounds 3)\.", caught.value.fix)
        assert line and commands.main(line[1].split()) == 0 and str(job.config.output.dir) in line[1]
    outcome = sweep.run(more)
    assert not outcome.failures and outcome.comparison is not None
    assert outcome.comparison.curves[""]["FedMR"][0].tolist() == [1, 2, 3]


def test_a_metric_that_nobody_recorded(done):
    before = kept(done.sweep.out)
    with pytest.raises(UserError, match="no run has recorded it"):
        sweep.run(sweep.from_mapping(asked(done.sweep.out, metric="bleu")))
    assert kept(done.sweep.out) == before


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"metric": "client_accuracy_mean"}, "evaluation.per_client"),
        ({"metric": "finetuned_p10"}, "evaluation.finetune"),
        ({"rounds_of_interest": [1, 100]}, "no run has more than 2 rounds"),
    ],
)
def test_what_no_run_can_record_is_found_at_once(tmp_path, changes, told):
    with pytest.raises(UserError, match=told):
        sweep.from_mapping(asked(tmp_path, **changes))


# --- the table's arithmetic ---------------------------------------------------------------------------


class Fake:
    """A run with a given course of accuracy."""

    def __init__(self, values, config, recipe=()):
        self.metrics = Table(Row(i + 1, "accuracy", float(v)) for i, v in enumerate(values))
        self.config, self.recipe, self.folder = config, {"clients": 8, **dict(recipe)}, None
        self.seconds, self.cpu_seconds = 3.0, None if config.seed else 2.0


def compared(tmp_path, table, recipes=None, **changes):
    made = sweep.from_mapping(asked(tmp_path, **changes))
    jobs = [job for job in made.jobs if (job.method, job.seed) in table]
    recipes = recipes or {}
    fakes = [Fake(table[job.method, job.seed], job.config, recipes.get(job.method, {})) for job in jobs]
    return comparison.compare(made, list(zip(jobs, fakes, strict=True)))


def test_last_k_rounds_of_interest_and_pairs(tmp_path):
    table = {
        ("FedAvg", 0): [0.1, 0.2, 0.6],
        ("FedAvg", 1): [0.1, 0.4, 0.5],
        ("FedMR", 0): [0.3, 0.4, 0.8],
        ("FedMR", 1): [0.0, 0.1, 0.4],
    }
    got = compared(tmp_path, table, last_k=2, rounds_of_interest=[2])
    last, second = got.grids
    assert last.cells["FedAvg", ""].values == pytest.approx({0: 0.4, 1: 0.45})
    assert second.cells["FedMR", ""].values == pytest.approx({0: 0.35, 1: 0.05})
    assert last.cells["FedMR", ""].differences == pytest.approx((0.2, -0.2))
    assert last.cells["FedAvg", ""].differences == ()
    assert {(row["seconds"], row["cpu_seconds"]) for row in got.records()} == {(3.0, None)}
    rounds, values = got.curves[""]["FedMR"]
    assert rounds.tolist() == [1, 2, 3] and values.shape == (2, 3)


def test_a_caption_says_how_many_values_there_were_where_they_are_fewer(tmp_path):
    table = {("FedAvg", 0): [0.1, 0.2, 0.6], ("FedMR", 0): [0.3, 0.4, 0.8]}
    captions = [grid.caption for grid in compared(tmp_path, table, seeds=[0], last_k=3).grids]
    assert captions == ["accuracy, mean of the last 3 values"]
    got = compared(tmp_path, table, seeds=[0], last_k=5, rounds_of_interest=[1])
    assert [grid.caption for grid in got.grids] == [
        "accuracy, mean of the last 3 values (fewer than the 5 of last_k)",
        "accuracy, last value (fewer than the 5 of last_k) up to round 1",
    ]
    got = compared(tmp_path, {**table, ("FedMR", 0): [0.8]}, seeds=[0], last_k=2)
    assert got.grids[0].caption == "accuracy, mean of the last 1 to 2 values (fewer than the 2 of last_k)"
    assert got.grids[0].averaged == (1, 2)


def test_nothing_is_ranked_or_paired_before_all_seeds_are_there(tmp_path):
    """As after `--part 1/2`, where one method's first seed stood against the other's second."""
    table = {("FedAvg", 0): [0.5], ("FedMR", 0): [0.7], ("FedMR", 1): [0.1]}
    got = compared(tmp_path, table)
    assert got.grids[0].cells["FedMR", ""].differences == () and got.best(got.grids[0], "") == set()
    assert "**" not in got.markdown() and "textbf" not in got.latex() and "Runs are missing" in got.markdown()
    whole = compared(tmp_path, {**table, ("FedAvg", 1): [0.2]})
    assert whole.grids[0].cells["FedMR", ""].differences == pytest.approx((0.2, -0.1))
    assert "**0.4000" in whole.markdown() and "missing" not in whole.markdown()
    none = compared(tmp_path, {("FedMR", 0): [0.7]})
    assert "| FedAvg | – |" in none.markdown() and "--" in none.latex() and "missing" in none.markdown()


def test_methods_that_have_not_recorded_the_metric_are_named(tmp_path):
    table = {(method, seed): [0.5] for method in METHODS for seed in (0, 1)}
    lacking = {**table, ("FedAvg", 0): [], ("FedAvg", 1): []}
    text = compared(tmp_path, lacking).markdown()
    assert "FedAvg has not recorded accuracy. " in text and "Runs are missing" not in text
    text = compared(tmp_path, {**table, ("FedAvg", 1): []}).latex()
    assert "FedAvg, seed 1 has not recorded accuracy" in text and "textbf" not in text
    cut = {key: values for key, values in lacking.items() if key != ("FedMR", 1)}
    text = compared(tmp_path, cut).markdown()
    assert "FedAvg has not recorded" in text and "Runs are missing" in text
    assert "recorded" not in compared(tmp_path, table).markdown()


def test_a_row_of_another_partition_is_marked_and_neither_best_nor_paired(tmp_path):
    table = {
        (method, seed): [value] for method, value in (("FedAvg", 0.5), ("FedMR", 0.7)) for seed in (0, 1)
    }

    def told(one, other):
        got = compared(tmp_path, table, {"FedAvg": one, "FedMR": other})
        return got, got.grids[0].cells["FedMR", ""].differences != ()

    other, paired = told({"crc32": 1, "crc32_train": 1}, {"crc32": 2, "crc32_train": 2})
    assert not paired and other.best(other.grids[0], "") == {"FedAvg"}
    assert (
        "| FedMR | 0.7000 ± 0.0000 (2) † |" in other.markdown() and "† Trained on another" in other.markdown()
    )
    assert "$\\dagger$" in other.latex() and "| FedMR | – |" in other.markdown()
    assert [row["same_partition"] for row in other.records()] == [True, False]
    # Test samples of their own that one method alone has change nobody's training; old records cannot tell.
    for pair in (({"crc32": 1, "crc32_train": 1}, {"crc32": 2, "crc32_train": 1}), ({}, {"crc32": 2})):
        same, paired = told(*pair)
        assert paired and "†" not in same.markdown() and same.best(same.grids[0], "") == {"FedMR"}
    assert not told({"crc32": 1}, {"crc32": 2, "crc32_train": 1})[1]


def test_a_method_with_a_setting_of_its_own_for_the_partition_is_marked(tmp_path):
    """Real runs: holdout takes training samples away."""
    methods = {"FedAvg": {"algorithm": "fedavg"}, "Local": {"algorithm": "local"}}
    methods["Local"]["partition"] = {"local_test": "holdout"}
    got = sweep.run(sweep.from_mapping(asked(tmp_path, methods=methods, seeds=[0]))).comparison
    assert got is not None
    assert "†" in got.markdown() and got.best(got.grids[0], "") == {"FedAvg"}


def pictures(home, shade):
    """Two classes of ten small pictures, as a folder."""
    for label in (0, 1):
        (home / str(label)).mkdir(parents=True, exist_ok=True)
        for number in range(10):
            pixels = np.full((8, 8, 3), shade + 100 * label + number, np.uint8)
            Image.fromarray(pixels).save(home / str(label) / f"{number}.png")
    return f"folder:{home}"


@pytest.mark.parametrize("together", [False, True])
def test_runs_of_other_data_of_the_same_name_are_told_and_not_ranked(together, tmp_path):
    base = {**BASE, "data": pictures(tmp_path / "photos", 0)}
    base |= {"partition": {"kind": "iid", "clients": 2, "min_size": 2}, "cohort": {"size": 2}, "rounds": 1}
    only = {"FedAvg": METHODS["FedAvg"]}
    spec = asked(tmp_path / "out", base=base, methods=only)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = sweep.run(sweep.from_mapping(spec), together=together)
        assert first.comparison is not None and first.comparison.cautions == ()
        pictures(tmp_path / "photos", 0)  # written anew, the same
        more = {**spec, "seeds": [0, 1, 2]}
        assert "other data" not in sweep.run(sweep.from_mapping(more), together=together).report()
    about = own_code.told_by(Path(str(first.sweep.jobs[0].config.output.dir)))
    assert about["versions"]["pillow"] == PIL.__version__
    pictures(tmp_path / "photos", 50)
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({**more, "methods": METHODS}))
    with pytest.warns(
        UserWarning, match="3 finished runs had other data than folder:.*photos gives now"
    ) as told:
        outcome = sweep.run(sweep.load(path), together=together)
    assert len(told) == 1 and "FedAvg, seed 0; FedAvg, seed 1; FedAvg, seed 2" in str(told[0].message)
    assert not outcome.failures

    def check(table):
        (caution,) = table.cautions
        assert (
            "Version 1: FedAvg, seed 0; FedAvg, seed 1; FedAvg, seed 2. Version 2: FedMR, seed 0;" in caution
        )
        assert "start again" in caution and caution in table.markdown() and caution in table.latex()
        assert "† Some of its runs had other data" in table.markdown()
        assert "another partition" not in table.markdown()
        assert [row["same_data"] for row in table.records()] == [True, False]
        assert table.grids[0].cells["FedMR", ""].differences == ()
        assert "FedMR" not in table.best(table.grids[0], "")

    check(outcome.comparison)
    check(fs.compare(path, reference="FedAvg"))
    page = fs.report(path, out=tmp_path / "page.html").read_text()
    assert "changed between runs" in page and "had other data" in page
    if not together:
        sweep.pack(sweep.load(path))
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing is to be run, so no data are loaded
            check(sweep.run(sweep.load(path)).comparison)
        # The reference's data are version 1, and so it is on the page.
        back = {**more, "methods": dict(reversed(METHODS.items())), "reference": "FedMR", "seeds": [0, 1]}
        assert "Version 1: FedMR, seed 0" in sweep.run(sweep.from_mapping(back)).report()


def test_a_reference_of_both_data_is_neither_ranked_nor_paired(tmp_path, monkeypatch):
    table = {
        (method, seed): [value] for method, value in (("FedAvg", 0.5), ("FedMR", 0.7)) for seed in (0, 1)
    }
    crc = iter([7, 7, 8, 7])  # by seed, then by method
    monkeypatch.setattr(
        own_code, "told_by", lambda folder: {"data": {"name": "x", "x": {"crc32": next(crc)}}}
    )
    got = compared(tmp_path, table)
    cells = got.grids[0].cells
    assert not cells["FedAvg", ""].like and cells["FedMR", ""].like
    assert cells["FedMR", ""].differences == () and got.best(got.grids[0], "") == {"FedMR"}
    # Older records have fewer checksums, or none.
    told = iter([{"x": 7}, {"x": 7, "y": 2}, {}, {"y": 2}])
    monkeypatch.setattr(own_code, "told_by", lambda folder: {"data": next(told)})
    got = compared(tmp_path, table)
    assert got.cautions == () and got.grids[0].cells["FedMR", ""].differences != ()


def test_the_best_is_bold_by_goal_and_ties_share_it(tmp_path):
    table = {("FedAvg", 0): [0.5], ("FedMR", 0): [0.7]}
    assert "**0.7000**" in compared(tmp_path, table, seeds=[0]).markdown()
    assert "**0.5000**" in compared(tmp_path, table, seeds=[0], goal="min").markdown()
    tied = compared(tmp_path, {("FedAvg", 0): [0.70001], ("FedMR", 0): [0.70002]}, seeds=[0])
    assert tied.best(tied.grids[0], "") == {"FedAvg", "FedMR"}


def test_deviation_is_the_sample_s(rng):
    values = rng.normal(size=7).tolist()
    assert mean(values) == pytest.approx(np.mean(values))
    assert deviation(values) == pytest.approx(np.std(values, ddof=1))
    assert deviation([1.0]) is None and format_mean_std([0.25]) == "0.2500"
    assert format_mean_std([0.25, 0.75]) == "0.5000 ± 0.3536 (2)"
    assert (
        format_mean_std([-0.25, 0.25], signed=True).startswith("+0.0000")
        and comparison._escaped("a_b&c%") == r"a\_b\&c\%"
    )


def test_inside_a_run_a_sweep_says_which_of_how_many_and_how_far_it_is(tmp_path, monkeypatch, capsys):
    def start(config, dataset, partition):
        bar = progress.Bar(config, 0, 4, Table())
        bar.advance([Row(1, "accuracy", 0.5)], 1.0)
        bar.close()
        raise UserError("rounds", 1, "enough", "")

    monkeypatch.setattr(progress, "EVERY", 0.0)
    monkeypatch.setattr(runs, "run_prepared", start)
    monkeypatch.setattr(sweep, "_check", lambda *given: None)
    sweep.run(sweep.from_mapping(asked(tmp_path / "told", seeds=[0])))
    assert capsys.readouterr().err.splitlines() == [
        "[1/2] FedAvg, seed 0: round 1 of 2, accuracy 0.5000",
        "[2/2] FedMR, seed 0: round 1 of 2, accuracy 0.5000",
    ]
    quiet = {**BASE, "output": {**BASE["output"], "progress": False}}
    sweep.run(sweep.from_mapping(asked(tmp_path / "quiet", base=quiet, seeds=[0])))
    assert capsys.readouterr().err == ""


# --- what is compiled --------------------------------------------------------------------------------------


def test_one_by_one_a_method_is_compiled_once_for_all_partitions_and_seeds(tmp_path, monkeypatch):
    """Whose largest clients differ; and the sweep tells the count."""
    compiled, whole = [], jax.stages.Lowered.compile

    def counted(self, *args, **keywords):
        compiled.append(re.match(r"module @(\w+)", self.as_text())[1])
        return whole(self, *args, **keywords)

    monkeypatch.setattr(jax.stages.Lowered, "compile", counted)
    monkeypatch.setattr(programs, "_RECENT", type(programs._RECENT)())
    memo.forget()
    methods = {**METHODS, "SCAFFOLD": {"algorithm": "scaffold"}}
    made = sweep.from_mapping(asked(tmp_path, methods=methods, grid={"partition.alpha": [0.5, 5.0]}))
    outcome = sweep.run(made)
    assert len(made.jobs) == 12 and not outcome.failures
    found = collections.Counter(compiled)
    assert found["jit_Round"] == 3, found
    assert found["jit__Drawn"] == found["jit_Evaluation"] == 1
    assert found["jit__Start"] <= 3
    assert outcome.programs.compiled + outcome.programs.from_disk >= len(compiled)
    assert str(outcome.programs) in outcome.report()
    told = json.loads((tmp_path / "sweep.json").read_text())["programs_of_this_start"]
    assert told["compiled"] == outcome.programs.compiled
