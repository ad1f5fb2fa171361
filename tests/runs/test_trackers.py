"""Runs in trackers: what they hold afterwards, read back by their own clients; and that none ends a run."""

import dataclasses
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest

import fedjax_sim as fs
from fedjax_sim import config as config_lib
from fedjax_sim.config import trackers
from fedjax_sim.core.errors import UserError
from fedjax_sim.records import Row
from fedjax_sim.records.trackers import session as sessions
from fedjax_sim.runs import drive
from fedjax_sim.studies import sweep

SMALL = fs.RunConfig(
    rounds=6,
    partition=fs.PartitionConfig(kind="iid", clients=4),
    model=fs.ModelConfig("mlp", options={"hidden": [4]}),
    local=fs.LocalConfig(epochs=None, steps=2, lr=0.5),
    cohort=fs.CohortConfig(size=2),
    evaluation=fs.EvaluationConfig(every=2),
    execution=fs.ExecutionConfig(devices=1, rounds_per_call=1),
    output=fs.OutputConfig(progress=False, figures=False, tensorboard=False, checkpoint_every=3),
)


def placed(folder, **changes):
    return dataclasses.replace(SMALL, output=dataclasses.replace(SMALL.output, dir=str(folder)), **changes)


def tagged(run):
    """(tag, round) -> value, of what a tracker should have."""
    return {
        (tag, number): value
        for number, values in sessions.tagged(run.metrics).items()
        for tag, value in values.items()
    }


# --- a tracker in memory: what the callback does with any of them -------------------------------------------


class Noted:
    """A session that keeps what it is given, by the id of its run, as a tracker would."""

    runs: dict = {}  # noqa: RUF012
    openings: list = []  # noqa: RUF012

    def __init__(self, opening):
        self.kept = {"id": opening.kept.get("id") or f"run{len(Noted.runs)}"}
        empty = {"values": {}, "pictures": {}, "summary": {}, "closed": []}
        self.mine = Noted.runs.setdefault(self.kept["id"], empty)
        Noted.openings.append(opening)

    def log(self, number, values):
        self.mine["values"] |= {(tag, number): value for tag, value in values.items()}

    def picture(self, name, png):
        self.mine["pictures"][name] = png

    def summarise(self, values):
        self.mine["summary"] |= values

    def close(self, status):
        self.mine["closed"].append(status)


PNG = b"\x89PNG\r\n"


@pytest.fixture
def undrawn(monkeypatch):
    """Pictures are made up, which is faster."""
    names = "curves.png", "partition.png"
    monkeypatch.setattr(drive, "_draw", lambda *given: [(given[-1] / one).write_bytes(PNG) for one in names])


@pytest.fixture
def noted(monkeypatch):
    """`fs.Wandb` hands runs to `Noted`."""
    monkeypatch.setattr(Noted, "runs", {})
    monkeypatch.setattr(Noted, "openings", [])
    monkeypatch.setattr(fs.Wandb, "open", lambda self, opening: Noted(opening))
    monkeypatch.setattr(trackers, "installed", lambda name: "1")
    return Noted


def test_a_tracker_is_told_all_and_changes_nothing(noted, tmp_path):
    run = fs.run(placed(tmp_path / "first"), callbacks=[fs.Wandb(project="study", tags=("small",))])
    (opening,), (held,) = noted.openings, noted.runs.values()
    assert (opening.name, opening.group, opening.tags) == ("first", "", ("small",))
    assert "fedavg, mlp on digits, 4 clients" in opening.title
    assert opening.settings["local.lr"] == 0.5 and opening.settings["callbacks.0.project"] == "study"
    assert opening.provenance["versions"]["jax"] == jax.__version__ and "config" not in opening.provenance
    assert held["values"] == tagged(run) and {number for _, number in held["values"]} == {1, 2, 3, 4, 5, 6}
    assert set(held["pictures"]) == {"curves", "partition"}
    assert all(png.startswith(b"\x89PNG") for png in held["pictures"].values())
    rounds, values = run.metrics.series("accuracy")
    best = values.argmax()
    assert held["summary"] == {
        **{"status": "finished", "headline": "accuracy", "rounds": 6},
        **{"last/accuracy": values[-1], "best/accuracy": values[best], "best/round": rounds[best]},
    }
    assert held["closed"] == ["finished"]
    assert json.loads((run.folder / sessions.FILE).read_text()) == {"wandb:study": {"id": "run0"}}
    without = fs.run(placed(tmp_path / "without"))
    assert list(without.metrics) == list(run.metrics)
    jax.tree.map(np.testing.assert_array_equal, without.variables, run.variables)


def test_rounds_that_run_as_one_program_still_do_and_all_reach_it(noted, undrawn, tmp_path):
    execution = dataclasses.replace(SMALL.execution, rounds_per_call=3)
    config = placed(tmp_path / "run", execution=execution, evaluation=fs.EvaluationConfig(every=3))
    run = fs.run(config, callbacks=[fs.Wandb()])  # a warning would say that they run one by one
    assert noted.runs["run0"]["values"] == tagged(run)
    seconds = np.loadtxt(tmp_path / "run" / "timing.csv", delimiter=",", skiprows=1)[:, 1]
    assert seconds[1] == seconds[2]  # those of a call cost the same


def test_in_memory_a_run_is_a_fresh_one_with_a_title_for_a_name(noted):
    for _ in range(2):
        fs.run(dataclasses.replace(SMALL, rounds=2), callbacks=[fs.Wandb()])
    assert list(noted.runs) == ["run0", "run1"]
    assert noted.openings[0].name == noted.openings[0].title
    assert set(noted.runs["run0"]["pictures"]) == {"curves", "partition"}


def test_a_run_that_goes_on_continues_the_same_one(noted, undrawn, tmp_path, monkeypatch):
    steps = drive.Simulation.steps

    def cut(self, most=None):
        if self.round == 4:
            raise KeyboardInterrupt
        return steps(self, 1)

    monkeypatch.setattr(drive.Simulation, "steps", cut)
    with pytest.raises(KeyboardInterrupt):
        fs.run(placed(tmp_path / "run"), callbacks=[fs.Wandb()])
    assert noted.runs["run0"]["closed"] == ["interrupted"] and not noted.runs["run0"]["pictures"]
    noted.runs["run0"]["values"].clear()  # as if the tracker had lost them
    monkeypatch.setattr(drive.Simulation, "steps", steps)
    run = fs.resume(tmp_path / "run")
    assert list(noted.runs) == ["run0"] and noted.runs["run0"]["values"] == tagged(run)
    assert noted.runs["run0"]["closed"] == ["interrupted", "finished"]
    more = fs.resume(tmp_path / "run", rounds=8)
    assert list(noted.runs) == ["run0"] and noted.runs["run0"]["summary"]["rounds"] == 8
    assert noted.runs["run0"]["values"].items() >= tagged(more).items()


def test_a_stopped_and_a_failed_run_say_why(noted, undrawn, tmp_path):
    stopping = fs.EarlyStopping("train_loss", patience=1, min_delta=9.0)
    run = fs.run(placed(tmp_path / "run"), callbacks=[fs.Wandb(), stopping])
    held = noted.runs["run0"]
    assert held["closed"] == ["stopped"] and held["summary"]["stopped"] == str(run.stopped)
    assert held["values"] == tagged(run)  # the last evaluation too
    config = dataclasses.replace(SMALL, local=dataclasses.replace(SMALL.local, lr=1e30))
    with pytest.raises(UserError, match="finite"):
        fs.run(config, callbacks=[fs.Wandb()])
    held = noted.runs["run1"]
    assert held["closed"] == ["failed"] and "finite" in held["summary"]["error"]


def test_runs_side_by_side_have_each_their_own(noted, undrawn, tmp_path):
    shared = fs.Wandb()
    configs = [placed(tmp_path / f"run{seed}", seed=seed, rounds=4, callbacks=(shared,)) for seed in (0, 1)]
    found = fs.run_many(configs)
    assert [opening.name for opening in noted.openings] == ["run0", "run1"]
    for held, run in zip(noted.runs.values(), found, strict=True):
        assert held["values"] == tagged(run) and held["closed"] == ["finished"]


@pytest.mark.parametrize("together", [False, True])
def test_a_sweep_is_a_group_and_its_jobs_are_named(noted, undrawn, tmp_path, together):
    base = config_lib.to_dict(dataclasses.replace(SMALL, rounds=2, callbacks=(fs.Wandb(),)))
    del base["output"]["dir"]
    wanted = {"base": base, "grid": {"local.lr": [0.1, 0.2]}, "out": str(tmp_path / "rates")}
    sweep.run(sweep.from_mapping(wanted), together=together)
    assert [(one.group, one.name) for one in noted.openings] == [
        ("rates", "fedavg, local.lr=0.1, seed0"),
        ("rates", "fedavg, local.lr=0.2, seed0"),
    ]


@pytest.mark.parametrize("where", ["open", "log", "picture", "close"])
def test_a_tracker_that_fails_is_told_once_and_the_run_goes_on(noted, undrawn, monkeypatch, where):
    def fail(*given):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(*((fs.Wandb, "open") if where == "open" else (Noted, where)), fail)
    with pytest.warns(UserWarning, match=r"wandb fails, .*goes on without it: ConnectionError: no") as told:
        run = fs.run(SMALL, callbacks=[fs.Wandb()])
    assert run.finished and len(told) == 1


@pytest.mark.parametrize("callback", [fs.Wandb(), fs.MLflow(), fs.Aim()])
def test_a_missing_package_is_said_before_anything_is_made(callback, tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "installed", lambda name: "")
    told = rf"the package {callback.packages[0]} is not installed.*'fedjax-sim\[{callback.kind}\]'"
    config = placed(tmp_path / "run", callbacks=(callback,))
    for start in (fs.run, lambda config: fs.run_many([config])):
        with pytest.raises(UserError, match=told):
            start(config)
    assert not (tmp_path / "run" / "config.yaml").exists()
    assert fs.plan(config) is not None  # which calls no tracker


def test_settings_are_named_in_files_and_hold_no_password():
    mapping = {"callbacks": ["wandb", {"name": "mlflow", "experiment": "e"}, {"name": "aim", "repo": "x"}]}
    config = config_lib.from_dict(mapping)
    assert config.callbacks == (fs.Wandb(), fs.MLflow("e"), fs.Aim(repo="x"))
    assert config_lib.from_dict(config_lib.to_dict(config)) == config
    with pytest.raises(UserError, match=r"mlflow\.uri = 'https://…@host': it holds a password"):
        fs.MLflow(uri="https://me:secret@host")
    with pytest.raises(UserError, match=r"callbacks\.wandb\.mode = 'of'"):
        fs.Wandb(mode="of")  # pyright: ignore[reportArgumentType]


def test_a_damaged_file_of_ids_costs_the_connection_and_no_more(tmp_path):
    assert sessions.recall(None, "a") == sessions.recall(tmp_path, "a") == {}
    sessions.keep(tmp_path, "a", {"id": "1"})
    sessions.keep(tmp_path, "b", {"id": "2"})
    assert sessions.recall(tmp_path, "a") == {"id": "1"}
    (tmp_path / sessions.FILE).write_text("{")
    assert sessions.recall(tmp_path, "a") == {}
    sessions.keep(tmp_path, "a", {"id": "3"})
    assert sessions.recall(tmp_path, "a") == {"id": "3"}
    sessions.keep(None, "a", {"id": "4"})


# --- Weights & Biases --------------------------------------------------------------------------------------


def test_what_the_server_has_is_not_handed_over_again(monkeypatch):
    """Online the server says which step comes next."""
    wandb = pytest.importorskip("wandb")
    logged, asked = [], []
    run = types.SimpleNamespace(id="x", offline=False, starting_step=4, summary={})
    run.log = lambda values, step: logged.append((step, values))
    run.finish = lambda exit_code: logged.append(exit_code)
    monkeypatch.setattr(wandb, "init", lambda **given: asked.append(given) or run)
    from fedjax_sim.records.trackers.wandb import WandbSession

    opening = sessions.Opening("n", "", "t", (), {}, {}, {"id": "x"})
    session = WandbSession(opening, "p", None, None)
    for number in (2, 3, 4, 5):
        session.log(number, {"a": 0.5})
    session.close("interrupted")
    assert logged == [(4, {"a": 0.5}), (5, {"a": 0.5}), 1]
    assert (asked[0]["id"], asked[0]["resume"], asked[0]["reinit"]) == ("x", "allow", "create_new")


def wandb_records(path):
    """The records of a run's file: protobufs in LevelDB's log format, after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # what is left of a block is padding
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def wandb_run(folder):
    """(id, name, group, (tag, step) -> value, summary, configuration, pictures) of a run's folder."""
    (path,) = folder.glob("*.wandb")
    values, summary, settings, about, pictures = {}, {}, {}, None, 0
    for record in wandb_records(path):
        if record.HasField("run"):
            about = record.run
            settings |= {one.key: json.loads(one.value_json) for one in record.run.config.update}
        for item in record.history.item if record.HasField("history") else ():
            key = item.key or "/".join(item.nested_key)
            value = json.loads(item.value_json)
            pictures += value == "image-file"
            if not key.startswith(("_", "figures/")):
                assert (key, record.history.step.num) not in values
                values[key, record.history.step.num] = value
        for item in record.summary.update if record.HasField("summary") else ():
            summary[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    assert about is not None
    return about.run_id, about.display_name, about.run_group, values, summary, settings, pictures


SCRIPT = """
import sys
import fedjax_sim as fs

fs.run(sys.argv[1]) if sys.argv[1].endswith(".yaml") else fs.resume(sys.argv[1])
"""


def process(folder, *words):
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": "1", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    if jax.config.jax_compilation_cache_dir:
        env["JAX_COMPILATION_CACHE_DIR"] = jax.config.jax_compilation_cache_dir
        env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    command = [sys.executable, "-c", SCRIPT, *map(str, words)]
    return subprocess.Popen(command, env=env, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


ROOT = Path(__file__).parents[2]


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """Both trackers write below a folder, and say nothing."""
    wandb = pytest.importorskip("wandb")
    pytest.importorskip("mlflow")
    wandb.teardown()  # it reads its variables once in a process
    changes = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}
    changes |= {"MLFLOW_ALLOW_FILE_STORE": "true"}  # MLflow calls it maintenance, and refuses it otherwise
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    yield tmp_path
    wandb.teardown()  # it reads its variables once in a process


def mlflow_run(client, number):
    return {
        (key, one.step): one.value
        for key in client.get_run(number).data.metrics
        for one in client.get_metric_history(number, key)
        if not key.startswith(("best/", "last/")) and key != "rounds"
    }


@pytest.mark.faults
@pytest.mark.filterwarnings("ignore:checkpoint of round .* is half-written")
def test_a_killed_run_goes_on_in_the_same_runs_of_its_trackers(offline, tmp_path):
    """Both at once, in a process that SIGKILL ends after a checkpoint, and here after that."""
    from mlflow.tracking import MlflowClient

    folder, store = tmp_path / "run", f"file:{tmp_path / 'mlruns'}"
    config = placed(folder, rounds=120, evaluation=fs.EvaluationConfig(every=6))
    config = dataclasses.replace(
        config, callbacks=(fs.Wandb(project="p", group="g"), fs.MLflow("e", uri=store, tags=("small",)))
    )
    (tmp_path / "my.yaml").write_text(config_lib.dump(config))
    child = process(tmp_path, tmp_path / "my.yaml")
    end = time.monotonic() + 120
    while child.poll() is None and time.monotonic() < end:
        journal = folder / "journal.jsonl"
        if journal.is_file() and journal.read_bytes().count(b"\n") > 15:
            child.kill()
            break
        time.sleep(0.005)
    told = child.communicate()[1].decode()
    assert child.returncode == -signal.SIGKILL, told
    ids = json.loads((folder / sessions.FILE).read_text())
    client = MlflowClient(tracking_uri=store)
    number = ids["mlflow:e"]["id"]
    before = mlflow_run(client, number)
    assert before and client.get_run(number).info.status == "RUNNING"

    run = fs.resume(folder)
    assert json.loads((folder / sessions.FILE).read_text()) == ids
    wanted = tagged(run)
    assert len(client.search_runs([client.get_experiment_by_name("e").experiment_id])) == 1
    assert mlflow_run(client, number) == pytest.approx(wanted)
    for key in {tag for tag, _ in wanted}:  # each step once
        steps = [one.step for one in client.get_metric_history(number, key)]
        assert len(steps) == len(set(steps))
    kept = client.get_run(number)
    assert kept.info.status == "FINISHED" and kept.data.tags["status"] == "finished"
    assert kept.data.params["local.lr"] == "0.5" and kept.data.tags["small"] == "true"
    assert {one.path for one in client.list_artifacts(number, "figures")} == {
        "figures/curves.png",
        "figures/partition.png",
    }
    best = run.metrics.series("accuracy")[1].max()
    assert kept.data.metrics["best/accuracy"] == best

    folders = sorted(tmp_path.glob("wandb/offline-run-*"))
    assert len(folders) == 2 and all(one.name.endswith(ids["wandb:p"]["id"]) for one in folders)
    name, title, group, values, summary, settings, pictures = wandb_run(folders[-1])
    assert (name, title, group) == (ids["wandb:p"]["id"], "run", "g")
    assert values == pytest.approx(wanted)  # the newest folder has the whole run
    assert summary["best/accuracy"] == best and summary["status"] == "finished" and pictures == 2
    assert settings["local.lr"] == 0.5 and settings["provenance.versions.jax"] == jax.__version__


def test_real_trackers_hold_several_runs_of_a_process_at_once(offline, tmp_path):
    import wandb
    from mlflow.tracking import MlflowClient

    store = f"file:{tmp_path / 'mlruns'}"
    both = (fs.Wandb(project="p"), fs.MLflow("e", uri=store))
    configs = [placed(tmp_path / f"run{seed}", seed=seed, rounds=2, callbacks=both) for seed in (0, 1)]
    found = fs.run_many(configs)
    assert wandb.run is None  # the user's own
    client = MlflowClient(tracking_uri=store)
    for run in found:
        ids = json.loads((run.folder / sessions.FILE).read_text())
        (folder,) = tmp_path.glob(f"wandb/offline-run-*-{ids['wandb:p']['id']}")
        assert wandb_run(folder)[3] == pytest.approx(tagged(run))
        assert mlflow_run(client, ids["mlflow:e"]["id"]) == pytest.approx(tagged(run))


def test_mlflow_takes_any_name(offline, tmp_path):
    from fedjax_sim.records.trackers.mlflow import MLflowSession

    opening = sessions.Opening("n", "", "t", (), {"model.options": {"a": 1}, "q?": None}, {}, {})
    session = MLflowSession(opening, "e", f"file:{tmp_path / 'mlruns'}")
    session.log(1, sessions.tagged([Row(1, "a{1}", 0.5, "Größe (x)", state="after")])[1])
    assert session.kept["id"]


# --- Aim ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # its own, of what it imports; and it leaves files open
def test_aim_holds_a_run_that_goes_on_once(tmp_path):
    aim = pytest.importorskip("aim")
    repo = str(tmp_path)
    first = fs.run(placed(tmp_path / "run", rounds=4), callbacks=[fs.Aim("e", repo, tags=("small",))])
    run = fs.resume(first.folder, rounds=6)
    ids = json.loads((run.folder / sessions.FILE).read_text())
    aim.Repo.from_path(repo)._recreate_index()  # as `aim storage reindex` does
    held = aim.Run(ids["aim:e"]["id"], repo=repo, read_only=True)
    assert held.name == "run" and held["config", "local.lr"] == 0.5
    assert held["summary", "status"] == "finished"
    counts = {metric.name: len(metric.values.sparse_list()[1]) for metric in held.metrics()}
    wanted = {tag: len({n for name, n in tagged(run) if name == tag}) for tag, _ in tagged(run)}
    assert counts == wanted
    assert re.fullmatch(r"\w+", ids["aim:e"]["id"])
