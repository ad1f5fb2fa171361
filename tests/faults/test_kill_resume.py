"""A run that is killed at any moment, and resumed until it is done, is bit for bit the run that never was."""

import dataclasses
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from fedjax_sim import config as config_lib
from fedjax_sim import data, records, runs
from fedjax_sim.algorithms import CONFIGS
from fedjax_sim.config import (
    CohortConfig,
    DataConfig,
    EvaluationConfig,
    ExecutionConfig,
    LocalConfig,
    ModelConfig,
    OutputConfig,
    RunConfig,
)
from fedjax_sim.records import table

pytestmark = [
    pytest.mark.faults,
    # Orbax reads leaves side by side; when one fails, the others' answers find its event loop closed.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
ROUNDS = 300
LOCAL = LocalConfig(epochs=None, steps=2, batch_size=16, lr=0.05, momentum=0.9, keep_optimizer=True)


def make(folder, devices=None, **changes):
    return RunConfig(
        rounds=changes.pop("rounds", ROUNDS),
        partition=changes.pop("partition", data.PartitionConfig(kind="dirichlet", clients=8, alpha=1.0)),
        model=changes.pop("model", ModelConfig(options={"hidden": [8]})),
        algorithm=changes.pop("algorithm", CONFIGS["fedmr"]()),
        local=changes.pop("local", LOCAL),
        cohort=CohortConfig(size=4),
        evaluation=changes.pop("evaluation", EvaluationConfig(every=10)),
        execution=ExecutionConfig(devices=devices),
        output=OutputConfig(
            dir=str(folder), checkpoint_every=25, tensorboard=False, figures=False, progress=False, **changes
        ),
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that was never cut, on one device, whose programs the other processes find on disk.

    Runs on several are killed by the slow tests below, and cut short in `tests/runs/test_runs.py`.
    """
    return runs.run(make(tmp_path_factory.mktemp("whole") / "run", devices=1))


def command(*words):
    """The command line in a process of its own, on as many devices as here."""
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": str(jax.device_count()), "JAX_PLATFORMS": "cpu"}
    if jax.config.jax_compilation_cache_dir:
        env["JAX_COMPILATION_CACHE_DIR"] = jax.config.jax_compilation_cache_dir
        env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
        env["TF_CPP_MIN_LOG_LEVEL"] = "3"
    line = [sys.executable, "-m", "fedjax_sim.cli", *words]
    return subprocess.Popen(line, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def lines(folder):
    path = Path(folder) / records.JOURNAL
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(process, folder, more):
    """Until the journal has grown by `more` rounds, or the process has ended."""
    path = Path(folder) / records.JOURNAL
    target, end, size = lines(folder) + more, time.monotonic() + 120, -1
    while process.poll() is None:
        assert time.monotonic() < end, "no progress"
        before, size = size, path.stat().st_size if path.exists() else 0
        if size != before and lines(folder) >= target:
            return
        time.sleep(0.002)


def kill_after(process, folder, more, chance):
    """SIGKILL once the journal has grown by `more` rounds, and a moment longer. -> whether it was in time."""
    wait_for(process, folder, more)
    time.sleep(chance.uniform(0, 0.02))
    process.kill()
    process.communicate()
    return process.returncode == -signal.SIGKILL


def check_same(folder, whole):
    """Metrics and final parameters, bit for bit."""
    found = runs.load(folder)
    assert found.finished
    one, other = (records.read_parquet(Path(f) / table.METRICS) for f in (folder, whole.folder))
    assert list(one) == list(other) == list(whole.metrics)
    for a, b in zip(jax.tree.leaves(found.variables), jax.tree.leaves(whole.variables), strict=True):
        assert a.dtype == b.dtype and np.array_equal(a, b)


def killed(folder, whole, kills, seed, **layout):
    """The process that goes on, at last, with a run like `whole` that was killed so many times.

    Its samples, and what clients keep, may lie elsewhere: fields of `execution`.
    """
    chance = random.Random(seed)
    path = folder.with_suffix(".yaml")
    output = dataclasses.replace(whole.config.output, dir=str(folder))
    execution = dataclasses.replace(whole.config.execution, **layout)
    path.write_text(config_lib.dump(dataclasses.replace(whole.config, output=output, execution=execution)))
    done = 0
    process = command("run", str(path))
    while done < kills:
        if kill_after(process, folder, chance.randint(1, whole.config.rounds // (2 * kills)), chance):
            done += 1
        elif runs.load(folder).finished:
            pytest.fail(f"it finished before it had been killed {kills} times")
        process = command("resume", str(folder))
    return process


def killed_until_done(tmp_path, whole, kills, seed):
    folder = tmp_path / "run"
    process = killed(folder, whole, kills, seed)
    _, told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    check_same(folder, whole)


def killed_and_stopped(folder, whole, kills, **layout):
    """SIGTERM after the kills leaves a checkpoint and status 143; what goes on from it is `whole`."""
    process = killed(folder, whole, kills, seed=1, **layout)
    before = lines(folder)
    wait_for(process, folder, 20)
    process.terminate()
    _, told = process.communicate(timeout=120)
    assert process.returncode == 143, told
    assert "fedjax-sim resume" in told and "Traceback" not in told
    stopped = runs.load(folder)
    assert before < stopped.rounds < ROUNDS
    assert (folder / "checkpoints" / str(stopped.rounds)).is_dir()
    assert runs.resume(folder).finished
    check_same(folder, whole)


def test_killed_and_stopped_by_sigterm_which_leaves_a_checkpoint_and_status_143(tmp_path, whole):
    killed_and_stopped(tmp_path / "run", whole, 1)


@pytest.mark.parametrize(
    ("layout", "devices"),
    [({"data": "streamed", "client_state": "host"}, 1), ({"data": "cut", "client_state": "host"}, 4)],
)
@pytest.mark.slow
def test_killed_and_stopped_with_samples_and_state_in_files_it_is_the_run_that_had_both_on_devices(
    tmp_path, layout, devices
):
    digits = data.load("digits")
    (tmp_path / "mapped").mkdir()
    for name, values in digits.arrays.items():
        np.save(tmp_path / "mapped" / f"{name}.npy", values)
    config = make(tmp_path / "whole", devices=devices)
    copied = dataclasses.replace(
        config,
        data=DataConfig(f"npy:{tmp_path / 'mapped'}"),
        execution=dataclasses.replace(config.execution, data="copied"),
    )
    killed_and_stopped(tmp_path / "run", runs.run(copied), 1, **layout)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3])
def test_killed_twenty_times(tmp_path, seed):
    long = runs.run(make(tmp_path / "whole", rounds=3000))
    killed_until_done(tmp_path, long, 20, seed)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_method_killed_once(tmp_path, name):
    """What each keeps, for clients and on the server; and clients that train on at the end."""
    settings = {
        "lips": {"inner": CONFIGS["fedmr"](), "period": 3, "layers": "inner"},
        "partial": {"first": 1},
        "fedrep": {"head_epochs": 1},
    }.get(name, {})
    local = dataclasses.replace(LOCAL, keep_optimizer=False)
    if name == "fedrep":  # divides epochs between head and body
        local = dataclasses.replace(local, epochs=2, steps=None)
    model, rounds = ModelConfig(options={"hidden": [8, 8]}), 300
    if name == "fedbn":
        model, rounds = ModelConfig("cnn8", norm="batch"), 60
    long = runs.run(
        make(
            tmp_path / "whole",
            rounds=rounds,
            partition=data.PartitionConfig(kind="dirichlet", clients=8, alpha=1.0, local_test="holdout"),
            model=model,
            algorithm=CONFIGS[name](**settings),
            local=local,
            evaluation=EvaluationConfig(every=10, per_client=True, finetune=2),
        )
    )
    killed_until_done(tmp_path, long, 1, seed=4)


def cut_short(tmp_path, whole):
    """A folder as a kill leaves it: of the finished run, without its table, which comes last."""
    folder = tmp_path / "run"
    shutil.copytree(whole.folder, folder)
    (folder / table.METRICS).unlink()
    return folder


def newest(folder):
    return max((folder / "checkpoints").iterdir(), key=lambda path: int(path.name))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "half-written", "no state", "journal torn"])
def test_damage_is_passed_over_and_the_end_is_the_same(tmp_path, whole, damage):
    folder = cut_short(tmp_path, whole)
    victim = newest(folder)
    told = "damaged"
    if damage == "half-written":
        victim.rename(victim.with_name(f"{victim.name}.orbax-checkpoint-tmp-0"))
        told = "half-written"
    elif damage == "no state":
        shutil.rmtree(victim / "state")
    elif damage == "journal torn":
        path = folder / records.JOURNAL
        path.write_bytes(path.read_bytes()[:-40])
        told = "journal ends"
    else:
        for path in (path for path in (victim / "state").rglob("*") if path.is_file()):
            content = bytearray(path.read_bytes())
            if damage == "truncated":
                content = content[: len(content) // 2]
            else:
                content[len(content) // 2 :: 7] = bytes(b ^ 0xFF for b in content[len(content) // 2 :: 7])
            path.write_bytes(bytes(content))
    with pytest.warns(UserWarning, match=told):
        assert runs.resume(folder).finished
    check_same(folder, whole)


def test_with_all_checkpoints_lost_it_starts_over(tmp_path, whole):
    folder = cut_short(tmp_path, whole)
    shutil.rmtree(folder / "checkpoints")
    assert runs.resume(folder).finished
    check_same(folder, whole)
