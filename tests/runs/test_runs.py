import dataclasses
import json
import os
import shutil
import signal
import time

import jax
import numpy as np
import pytest
import yaml

from fedjax_sim import config as config_lib
from fedjax_sim import data, models, records, runs
from fedjax_sim.algorithms import CONFIGS, FedAvg
from fedjax_sim.config import (
    CohortConfig,
    EvaluationConfig,
    ExecutionConfig,
    InertiaConfig,
    LocalConfig,
    ModelConfig,
    OutputConfig,
    RunConfig,
    plugins,
    sweep_files,
)
from fedjax_sim.core.errors import UserError
from fedjax_sim.reports import shared
from fedjax_sim.runs import drive
from fedjax_sim.runs.checkpoint import Checkpoints
from fedjax_sim.runs.federation import Simulation
from fedjax_sim.runs.folder import Folder


def tiny(folder=None, **changes):
    base = RunConfig(
        rounds=5,
        partition=data.PartitionConfig(kind="dirichlet", clients=8, alpha=1.0, local_test="holdout"),
        model=ModelConfig(options={"hidden": [8]}),
        local=LocalConfig(epochs=None, steps=2, batch_size=16, lr=0.1),
        cohort=CohortConfig(size=4),
        evaluation=EvaluationConfig(every=2, per_client=True),
        execution=ExecutionConfig(devices=1),
        output=OutputConfig(
            dir=None if folder is None else str(folder),
            checkpoint_every=2,
            tensorboard=False,
            figures=False,
            progress=False,
        ),
    )
    return dataclasses.replace(base, **changes)


def stop_at(monkeypatch, number, what):
    """Makes the step after `number` rounds do `what` first."""
    steps = Simulation.steps

    def changed(self, most=None):
        if self.round == number:
            what()
        return steps(self, 1)

    monkeypatch.setattr(Simulation, "steps", changed)
    return steps


class Crash(Exception):
    pass


def crash():
    raise Crash


RECORDS = ("config.yaml", "provenance.json", "metrics.parquet", "timing.csv")


def records_of(folder, home):
    """A copy of a run's folder as it is kept in a repository."""
    home.mkdir()
    for name in RECORDS:
        shutil.copy(folder / name, home / name)
    return home


def same(one, other):
    return jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), one, other))


def test_in_memory_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = runs.run(tiny())
    assert done.finished and done.folder is None and list(tmp_path.iterdir()) == []
    rounds, values = done.metrics.series("accuracy")
    assert rounds.tolist() == [2, 4, 5] and ((values >= 0) & (values <= 1)).all()
    picture = done.plot("accuracy")
    assert picture.axes[0].get_xlabel() == "round" and picture._repr_png_().startswith(b"\x89PNG")
    assert "accuracy" in repr(done)


def test_a_folder_holds_all_and_says_the_same(tmp_path):
    config = tiny(tmp_path / "run")
    config = dataclasses.replace(
        config, output=dataclasses.replace(config.output, tensorboard=True, figures=True, progress=True)
    )
    done = runs.run(config)
    folder = done.folder
    for name in (
        *(
            "config.yaml",
            "provenance.json",
            "partition.json",
            "metrics.parquet",
            "journal.jsonl",
            "timing.csv",
        ),
        *("figures/curves.png", "figures/partition.png", "figures/clients.png"),
    ):
        assert (folder / name).stat().st_size > 0, name
    assert list((folder / "tensorboard").iterdir())
    assert runs.portable(config_lib.read_config(folder / "config.yaml")) == runs.portable(config)
    named = {f.name for f in dataclasses.fields(config)}
    assert set(yaml.safe_load((folder / "config.yaml").read_text())) == named - set(plugins.LISTS)
    memory = runs.run(dataclasses.replace(config, output=tiny().output))
    assert (
        list(records.read_parquet(folder / "metrics.parquet")) == list(memory.metrics) == list(done.metrics)
    )
    assert same(done.variables, memory.variables)
    opened = runs.load(folder)
    assert opened.finished and list(opened.metrics) == list(done.metrics)
    assert same(opened.variables, done.variables)
    assert (opened.seconds, opened.cpu_seconds) == (done.seconds, done.cpu_seconds)
    assert opened.title == done.title and opened.recipe == done.recipe
    assert sorted(int(p.name) for p in (folder / "checkpoints").iterdir()) == [4, 5]


def demanding(algorithm):
    """With everything that a checkpoint has to bring back: client optimisers too; on all devices."""
    local = dataclasses.replace(tiny().local, momentum=0.9, keep_optimizer=True)
    return {"algorithm": CONFIGS[algorithm](), "local": local, "execution": ExecutionConfig()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """algorithm -> its run, never cut."""
    return {
        name: runs.run(tiny(tmp_path_factory.mktemp(name) / "whole", **demanding(name)))
        for name in ("fedavg", "fedmr")
    }


@pytest.mark.parametrize(("algorithm", "number"), [("fedmr", 0), ("fedavg", 1), ("fedmr", 3), ("fedavg", 4)])
def test_cut_and_resumed_is_bit_for_bit_uncut(tmp_path, monkeypatch, whole, algorithm, number):
    with monkeypatch.context() as patch:
        stop_at(patch, number, crash)
        with pytest.raises(Crash):
            runs.run(tiny(tmp_path / "cut", **demanding(algorithm)))
    assert not runs.load(tmp_path / "cut").finished
    done, uncut = runs.resume(tmp_path / "cut"), whole[algorithm]
    assert done.finished and list(done.metrics) == list(uncut.metrics)
    assert same(done.variables, uncut.variables)
    assert (done.folder / "metrics.parquet").read_bytes() == (uncut.folder / "metrics.parquet").read_bytes()


def broken(self, *arguments):
    raise Crash


@pytest.mark.parametrize(
    "where",
    [
        (Checkpoints, "save"),
        pytest.param((Checkpoints, "wait"), marks=pytest.mark.slow),
        (drive, "_figures"),
        (records.Journal, "tabulate"),
    ],
)
def test_cut_at_the_end_it_is_not_finished_until_all_is_in_place(tmp_path, monkeypatch, whole, where):
    config = tiny(tmp_path / "cut", **demanding("fedmr"))
    config = dataclasses.replace(config, output=dataclasses.replace(config.output, checkpoint_every=0))
    with monkeypatch.context() as patch:
        patch.setattr(*where, broken)
        with pytest.raises(Crash):
            runs.run(config)
    assert not Folder(tmp_path / "cut").finished and runs.load(tmp_path / "cut").rounds == 5
    done, uncut = runs.resume(tmp_path / "cut"), whole["fedmr"]
    assert Folder(tmp_path / "cut").finished
    assert same(runs.load(done.folder).variables, uncut.variables)
    assert (done.folder / "metrics.parquet").read_bytes() == (uncut.folder / "metrics.parquet").read_bytes()


def test_four_files_are_a_finished_run(tmp_path, monkeypatch):
    done = runs.run(tiny(tmp_path / "run"))
    kept = records_of(done.folder, tmp_path / "kept")
    with monkeypatch.context() as patch:
        patch.setattr(data, "load", broken)
        patch.setattr(Simulation, "steps", broken)
        for opened in (runs.load(kept), runs.resume(kept)):
            assert opened.finished and list(opened.metrics) == list(done.metrics)
            assert (opened.title, opened.seconds) == (done.title, done.seconds)
        with pytest.raises(UserError, match="again in another folder"):
            _ = opened.variables
    assert sorted(path.name for path in kept.iterdir()) == sorted(RECORDS)
    assert same(tuple(opened.partition.train), tuple(done.partition.train))
    with pytest.raises(UserError, match="finished"):
        runs.run(tiny(kept))


def test_records_of_an_older_version_are_a_finished_run_too(tmp_path):
    done = runs.run(tiny(tmp_path / "run"))
    kept = records_of(done.folder, tmp_path / "kept")
    about = json.loads((kept / "provenance.json").read_text())
    del about["partition"]
    (kept / "provenance.json").write_text(json.dumps(about))
    lines = [line.split(",") for line in (kept / "timing.csv").read_text().splitlines()]
    (kept / "timing.csv").write_text("".join(f"{a},{b},{d}\n" for a, b, _, d in lines))
    opened = runs.load(kept)
    assert opened.finished and opened.title == done.title
    assert opened.seconds == done.seconds and opened.cpu_seconds is None


def test_a_given_partition_is_not_made_up_when_its_file_is_lost(tmp_path):
    digits = data.load("digits")
    partition = data.partition(digits, data.PartitionConfig(kind="iid", clients=6, local_test="holdout"), 3)
    done = runs.run(tiny(tmp_path / "run", rounds=1), partition=partition)
    kept = runs.load(records_of(done.folder, tmp_path / "kept"))
    assert "6 clients, iid" in kept.title and kept.title == done.title
    with pytest.raises(UserError, match=r"partition\.json is missing"):
        _ = kept.partition


def rounds_in(folder):
    """(of config.yaml, of the record)."""
    about = json.loads((folder / "provenance.json").read_text())
    return config_lib.read_config(folder / "config.yaml").rounds, about["config"]["rounds"]


@pytest.mark.parametrize("everything", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_with_more_rounds_is_that_of_so_many_from_the_start(tmp_path, everything):
    # The last round is measured by all, so after 3; a run of 5 is evaluated after 2, 4 and 5.
    config = tiny(tmp_path / "run", rounds=3, evaluation=EvaluationConfig(every=2))
    last = {"accuracy", "loss"}
    if everything:
        tuned = EvaluationConfig(every=2, per_client=True, finetune=1)
        config = dataclasses.replace(config, evaluation=tuned, inertia=InertiaConfig(every=7, clients=2))
        last |= {"client_accuracy", "finetuned", "finetuned_mean", "merge_own_loss", "effectiveness_global"}
    first = runs.run(config)
    output = dataclasses.replace(config.output, dir=str(tmp_path / "whole"))
    whole = runs.run(dataclasses.replace(config, rounds=5, output=output))
    done = runs.resume(tmp_path / "run", rounds=5)
    assert done.finished and rounds_in(done.folder) == (5, 5)
    assert list(done.metrics) == list(whole.metrics) and same(done.variables, whole.variables)
    opened = runs.load(done.folder)
    assert list(opened.metrics) == list(whole.metrics) and opened.config.rounds == 5
    assert {r.metric for r in at(first, 3)} - {r.metric for r in at(opened, 3)} >= last
    # As asked, and from what was asked before; by hand too.
    before = contents(done.folder)
    assert list(runs.resume(done.folder, rounds=5).metrics) == list(whole.metrics)
    with pytest.raises(UserError, match=r"^rounds = 4: the run has done 5"):
        runs.resume(done.folder, rounds=4)
    assert contents(done.folder) == before
    path = done.folder / "config.yaml"
    path.write_text(path.read_text().replace("\nrounds: 5\n", "\nrounds: 6\n"))
    assert runs.resume(done.folder).rounds == 6 and rounds_in(done.folder) == (6, 6)


def at(run, number):
    return [row for row in run.metrics if row.round == number]


@pytest.mark.parametrize("cut", [False, True])
def test_a_run_whose_rates_go_by_the_number_of_rounds_gets_no_more(tmp_path, monkeypatch, cut):
    local = dataclasses.replace(tiny().local, schedule="cosine", decay=0.0)
    config = tiny(tmp_path / "run", rounds=4 if cut else 2, local=local)
    if cut:
        with monkeypatch.context() as patch:
            stop_at(patch, 3, crash)
            with pytest.raises(Crash):
                runs.run(config)
    else:
        runs.run(config)
    before = contents(tmp_path / "run")
    told = rf"rounds = 8: the run began with {config.rounds}.*the 2 that are done.*cosine.*initial\.run"
    with pytest.raises(UserError, match=told):
        runs.resume(tmp_path / "run", rounds=8)
    assert contents(tmp_path / "run") == before
    path = tmp_path / "run" / "config.yaml"
    path.write_text(path.read_text().replace(f"\nrounds: {config.rounds}\n", "\nrounds: 8\n"))
    with pytest.raises(UserError, match=told):
        runs.resume(tmp_path / "run")


def test_more_rounds_than_a_run_has_records_of_need_its_checkpoint_and_journal(tmp_path):
    done = runs.run(tiny(tmp_path / "run", rounds=1))
    kept = records_of(done.folder, tmp_path / "kept")
    before = contents(kept)
    with pytest.raises(UserError, match=r"rounds = 3: .*only its records.*another folder"):
        runs.resume(kept, rounds=3)
    assert {path: text for path, text in contents(kept).items() if path.name != ".lock"} == before
    (done.folder / records.JOURNAL).unlink()
    with pytest.raises(UserError, match=r"rounds = 3: .*only its records"):
        runs.resume(done.folder, rounds=3)


def test_cut_before_its_first_checkpoint_a_run_begins_again_with_another_number(tmp_path, monkeypatch):
    local = dataclasses.replace(tiny().local, schedule="cosine", decay=0.0)
    with monkeypatch.context() as patch:
        stop_at(patch, 1, crash)
        with pytest.raises(Crash):
            runs.run(tiny(tmp_path / "run", rounds=2, local=local))
    done = runs.resume(tmp_path / "run", rounds=3)
    assert done.metrics.series("lr")[1] == pytest.approx([0.1, 0.05, 0.0]) and rounds_in(done.folder) == (
        3,
        3,
    )


def test_the_folder_is_written_without_what_is_above_it(tmp_path, monkeypatch):
    (tmp_path / "study").mkdir()
    monkeypatch.chdir(tmp_path / "study")
    monkeypatch.setenv("HOME", str(tmp_path))
    given = {
        str(tmp_path / "study" / "runs" / "a"): "runs/a",
        "runs/a": "runs/a",
        "~/study/runs/a": "runs/a",
        "~/b": "~/b",
        str(tmp_path / "b"): "~/b",
        "/elsewhere/c": "/elsewhere/c",
    }
    assert [runs.portable(tiny(path)).output.dir for path in given] == list(given.values())
    assert runs.portable(tiny()).output.dir is None
    runs.run(tiny(tmp_path / "study" / "runs" / "a", rounds=1))
    assert config_lib.read_config("runs/a/config.yaml").output.dir == "runs/a"


def test_cpu_seconds_leave_out_waiting_and_add_up_over_starts(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 3, crash)
        with pytest.raises(Crash):
            runs.run(tiny(tmp_path / "run"))
    before = records.read_timing(tmp_path / "run")
    stop_at(monkeypatch, 4, lambda: time.sleep(0.5))
    done = runs.resume(tmp_path / "run")
    laps = records.read_timing(tmp_path / "run")
    assert [lap.round for lap in laps] == [1, 2, 3, 4, 5] and laps[:2] == before[:2]
    waited = max(laps[3:], key=lambda lap: lap.seconds)
    assert waited.seconds >= 0.5 and 0 < waited.cpu_seconds < 0.4
    assert done.seconds == pytest.approx(sum(lap.seconds for lap in laps))
    assert done.cpu_seconds == pytest.approx(sum(lap.cpu_seconds for lap in laps))


def test_resuming_a_finished_run_only_loads_it(tmp_path, monkeypatch):
    done = runs.run(tiny(tmp_path / "run"))
    stop_at(monkeypatch, 0, crash)
    again = runs.resume(tmp_path / "run")
    assert list(again.metrics) == list(done.metrics)


def test_without_checkpoints_it_starts_over_and_ends_the_same(tmp_path, monkeypatch):
    whole = runs.run(tiny())
    output = dataclasses.replace(tiny(tmp_path / "run").output, checkpoint_every=0)
    with monkeypatch.context() as patch:
        stop_at(patch, 3, crash)
        with pytest.raises(Crash):
            runs.run(tiny(output=output))
    done = runs.resume(tmp_path / "run")
    assert list(done.metrics) == list(whole.metrics) and same(done.variables, whole.variables)


@pytest.mark.parametrize(
    ("number", "raised", "status"),
    [(signal.SIGTERM, runs.Terminated, 143), (signal.SIGINT, runs.Interrupted, None)],
)
def test_a_signal_finishes_the_round_and_leaves_a_checkpoint(tmp_path, monkeypatch, number, raised, status):
    whole = runs.run(tiny())
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        stop_at(patch, 2, lambda: os.kill(os.getpid(), number))
        with pytest.raises(raised) as stopped:
            runs.run(tiny(tmp_path / "run"))
    assert signal.getsignal(number) is before
    assert stopped.value.run.rounds == 3 and not stopped.value.run.finished
    assert "resume" in str(stopped.value)
    if status is not None:
        assert stopped.value.code == status
    assert (tmp_path / "run" / "checkpoints" / "3").is_dir()
    done = runs.resume(tmp_path / "run")
    assert list(done.metrics) == list(whole.metrics) and same(done.variables, whole.variables)


def test_a_folder_with_a_run_is_not_overwritten(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 1, crash)
        with pytest.raises(Crash):
            runs.run(tiny(tmp_path / "run"))
    with pytest.raises(UserError, match=r"unfinished.*resume"):
        runs.run(tiny(tmp_path / "run"))
    runs.resume(tmp_path / "run")
    with pytest.raises(UserError, match=r"another output\.dir"):
        runs.run(tiny(tmp_path / "run"))


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"thesis\.tex"):
        runs.run(tiny(tmp_path))


def test_a_mistake_leaves_no_half_begun_run(tmp_path):
    with pytest.raises(UserError, match="adamm"):
        runs.run(tiny(tmp_path / "run", local=LocalConfig(optimizer="adamm")))
    assert not Folder(tmp_path / "run").started
    assert runs.run(tiny(tmp_path / "run", rounds=1)).finished


def test_one_folder_one_process(tmp_path):
    runs.run(tiny(tmp_path / "run", rounds=1))
    (tmp_path / "run" / "metrics.parquet").unlink()
    with Folder(tmp_path / "run").claimed(), pytest.raises(UserError, match="another process"):
        runs.resume(tmp_path / "run")


def test_no_run_there(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="folder"):
            runs.resume(path)


def other_digits():
    digits = data.load("digits")
    return dataclasses.replace(digits, train_images=255 - digits.train_images)


def test_resume_wants_the_same_data(tmp_path, monkeypatch):
    stopped = stop_at(monkeypatch, 2, crash)
    with pytest.raises(Crash):
        runs.run(tiny(tmp_path / "run"), dataset=other_digits())
    monkeypatch.setattr(Simulation, "steps", stopped)
    with pytest.raises(UserError, match="dataset"):
        runs.resume(tmp_path / "run")
    with pytest.raises(UserError, match="train_images"):
        runs.resume(tmp_path / "run", dataset=data.load("digits"))
    done = runs.resume(tmp_path / "run", dataset=other_digits())
    assert list(done.metrics) == list(runs.run(tiny(), dataset=other_digits()).metrics)


def test_supplied_model_algorithm_and_partition_take_effect(tmp_path):
    config = tiny(tmp_path / "run", rounds=2)
    digits = data.load("digits")
    partition = data.partition(digits, data.PartitionConfig(kind="iid", clients=6, local_test="holdout"), 3)
    model = models.create("mlp", (8, 8, 1), 10, hidden=(4,))
    done = runs.run(config, partition=partition, model=model, algorithm=CONFIGS["fedmr"](first_stage=1))
    assert done.partition.num_clients == 6
    assert config_lib.read_config(done.folder / "config.yaml").algorithm == CONFIGS["fedmr"](first_stage=1)
    assert "slot_similarity" in done.metrics.names()
    with pytest.raises(UserError, match="model"):
        runs.resume(done.folder)
    assert same(runs.load(done.folder, model=model).variables, done.variables)


@dataclasses.dataclass(frozen=True)
class Half:
    """FedAvg under a name that no file can hold."""

    share: float = 0.5

    def build(self, context):
        return CONFIGS["fedavg"]().build(context)


@pytest.mark.parametrize("how", ["keyword", "config", "inside"])
def test_what_python_gave_is_named_in_the_record(tmp_path, how):
    config = tiny(tmp_path / "run", rounds=1)
    given = CONFIGS["fedprox"](inner=Half(0.25)) if how == "inside" else Half(0.25)
    if how == "config":
        done = runs.run(dataclasses.replace(config, algorithm=given))
    else:
        done = runs.run(config, algorithm=given)
    told = "fedprox(Half(share=0.25))" if how == "inside" else "Half(share=0.25)"
    assert done.title.startswith(f"{told}, mlp on digits")
    assert runs.load(done.folder).title == done.title
    written = config_lib.read_config(done.folder / "config.yaml")
    assert written.given == {"algorithm": told}
    with pytest.raises(UserError, match="algorithm"):
        runs.resume(done.folder)
    with pytest.raises(UserError, match=r"given\.algorithm is .*not"):
        runs.restored(done.folder, algorithm=Half(0.75))
    assert runs.resume(done.folder, algorithm=given).finished
    other = runs.run(tiny(tmp_path / "other", rounds=1), algorithm=Half(0.75))
    assert len(shared.groups([done, other])) == 2


def test_what_python_gave_is_asked_for_again(tmp_path):
    digits = data.load("digits")
    given = {
        "dataset": digits,
        "partition": data.partition(
            digits, data.PartitionConfig(kind="iid", clients=6, local_test="holdout"), 3
        ),
        "model": models.create("mlp", (8, 8, 1), 10, hidden=(4,)),
        "algorithm": Half(0.25),
    }
    done = runs.run(tiny(tmp_path / "run", rounds=1), **given)
    again = config_lib.read_config(done.folder / "config.yaml")
    again = dataclasses.replace(again, output=OutputConfig(dir=str(tmp_path / "again")))
    for name in given:
        with pytest.raises(UserError, match=rf"given\.{name} = .*run\(config, {name}=…\)"):
            runs.run(again, **{**given, name: None})
    assert not (tmp_path / "again" / "config.yaml").exists()
    with pytest.raises(UserError, match=r"given\.dataset"):
        sweep_files.from_mapping({"base": config_lib.to_dict(again)})
    assert list(runs.run(again, **given).metrics) == list(done.metrics)
    # Another algorithm in its place, which has a name: nothing is left to ask for.
    named = runs.run(dataclasses.replace(again, output=OutputConfig()), **{**given, "algorithm": FedAvg()})
    assert set(named.config.given) == {"dataset", "partition", "model"}


def test_a_record_of_before_configurations_said_what_was_given(tmp_path):
    model = models.create("mlp", (8, 8, 1), 10, hidden=(4,))
    done = runs.run(tiny(tmp_path / "run", rounds=1), model=model)
    config, about = done.folder / "config.yaml", done.folder / "provenance.json"
    config.write_text(config.read_text().split("given:")[0])
    record = json.loads(about.read_text())
    del record["config"]["given"]
    about.write_text(json.dumps({"supplied": ["model"], "names": {}, **record}))
    with pytest.raises(UserError, match="given this model from Python"):
        runs.resume(done.folder)
    assert runs.resume(done.folder, model=model).finished
    assert same(runs.load(done.folder, model=model).variables, done.variables)


def test_a_configuration_that_was_edited_is_not_resumed(tmp_path):
    done = runs.run(tiny(tmp_path / "run", rounds=1))
    path = done.folder / "config.yaml"
    before = path.read_text()
    for old, new, told in (
        ("seed: 0\n", "seed: 4\n", "seed is 0, not 4"),
        ("  lr: ", "  lr: 1", "local.lr is"),
    ):
        assert old in before
        path.write_text(before.replace(old, new, 1))
        with pytest.raises(UserError, match=f"edited since the run began: {told}"):
            runs.resume(done.folder)
    moved = before.replace("data_dir: null", "data_dir: /elsewhere", 1)
    path.write_text(moved.replace("keep: ", "keep: 1", 1))  # what changes no number
    assert runs.resume(done.folder).finished


def test_a_plot_of_what_was_not_recorded_is_refused(tmp_path):
    done = runs.run(tiny(None, rounds=1))
    with pytest.raises(UserError, match="nonsense"):
        done.plot("accuracy", "nonsense")


def test_a_config_of_another_version_is_refused(tmp_path):
    runs.run(tiny(tmp_path / "run", rounds=1))
    path = tmp_path / "run" / "config.yaml"
    path.write_text(path.read_text().replace("version: 2", "version: 0"))
    with pytest.raises(UserError, match="version"):
        runs.resume(tmp_path / "run")


def test_an_update_that_is_not_finite_stops_with_what_there_is(tmp_path):
    local = dataclasses.replace(tiny().local, lr=1e30)
    with pytest.raises(UserError, match="not finite"):
        runs.run(tiny(tmp_path / "run", local=local))
    opened = runs.load(tmp_path / "run")
    assert not opened.finished and np.isfinite(opened.metrics.column("value")).all()


def test_the_settings_a_run_differs_in_are_those_that_change_its_numbers(tmp_path):
    config = tiny(tmp_path / "run", rounds=1)
    runs.run(config)
    moved = dataclasses.replace(
        config,
        output=OutputConfig(),
        execution=dataclasses.replace(config.execution, wave=1),
        evaluation=dataclasses.replace(config.evaluation, batch_size=7),
    )
    assert runs.differing(tmp_path / "run", moved) == ()
    assert runs.differing(tmp_path / "run", dataclasses.replace(moved, seed=1)) == ("seed is 0, not 1",)
    first, *others = runs.differing(
        tmp_path / "run", dataclasses.replace(moved, algorithm=CONFIGS["fedprox"]())
    )
    assert first == "algorithm.name is fedavg, not fedprox"
    assert "algorithm.mu is unset, not 0.01" in others


def in_the_meantime(monkeypatch, home, name, what):
    """Makes `home.name` do `what` first, once: another process was quicker."""
    original = getattr(home, name)

    def late(*args, **kwargs):
        monkeypatch.setattr(home, name, original)
        what()
        return original(*args, **kwargs)

    monkeypatch.setattr(home, name, late)


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_start_that_was_overtaken_while_it_loaded_overwrites_nothing(tmp_path, monkeypatch):
    before = {}

    def other():
        done = runs.run(tiny(tmp_path / "run", rounds=1, local=dataclasses.replace(tiny().local, lr=0.2)))
        before.update(contents(done.folder))

    in_the_meantime(monkeypatch, data, "load", other)
    with pytest.raises(UserError, match=r"already holds a run \(finished\)"):
        runs.run(tiny(tmp_path / "run", rounds=1))
    assert contents(tmp_path / "run") == before and before


def test_a_run_that_another_process_has_finished_meanwhile_is_only_loaded(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 1, crash)
        with pytest.raises(Crash):
            runs.run(tiny(tmp_path / "run", rounds=2))
    before = {}

    def other():
        runs.resume(tmp_path / "run")
        before.update(contents(tmp_path / "run"))
        monkeypatch.setattr(Simulation, "steps", broken)
        monkeypatch.setattr(records.Journal, "tabulate", broken)

    in_the_meantime(monkeypatch, Folder, "claimed", other)
    assert runs.resume(tmp_path / "run").finished
    assert contents(tmp_path / "run") == before
