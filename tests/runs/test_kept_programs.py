"""Compiled programs between processes: where they are kept, and what a second process compiles."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import fedjax_sim as fs
from fedjax_sim.config import from_dict
from fedjax_sim.engine import programs
from fedjax_sim.runs import kept_programs, provenance


@pytest.fixture
def no_other_cache():
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_where_programs_are_kept(monkeypatch):
    monkeypatch.delenv("FEDJAX_SIM_PROGRAMS")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert kept_programs.folder() == Path("~/.cache/fedjax-sim/programs").expanduser()
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert kept_programs.folder() == Path("/somewhere/fedjax-sim/programs")
    monkeypatch.setenv("FEDJAX_SIM_PROGRAMS", "~/mine")
    assert kept_programs.folder() == Path("~/mine").expanduser()
    monkeypatch.setenv("FEDJAX_SIM_PROGRAMS", "")
    assert kept_programs.folder() is None


def test_programs_are_kept_by_machine_unless_jax_keeps_them(monkeypatch, tmp_path, no_other_cache):
    monkeypatch.setenv("FEDJAX_SIM_PROGRAMS", str(tmp_path))
    with kept_programs.kept():
        assert programs._FILES.folder == tmp_path / provenance.machine()
    assert programs._FILES is None
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "jax"))
    with kept_programs.kept():
        assert programs._FILES is None


SMALL = {
    "rounds": 3,
    "partition": {"kind": "iid", "clients": 4},
    "model": {"name": "mlp", "options": {"hidden": [8]}},
    "cohort": {"size": 4},
    "algorithm": {"name": "fedmr", "first_stage": 1},
    "output": {"progress": False},
}


@pytest.mark.parametrize("how", ["run", "resume", "run_many"])
def test_runs_keep_their_programs(monkeypatch, tmp_path, no_other_cache, how):
    seen = []
    monkeypatch.setenv("FEDJAX_SIM_PROGRAMS", str(tmp_path / "programs"))
    prepared = fs.Simulation.steps
    monkeypatch.setattr(fs.Simulation, "steps", lambda *a: seen.append(programs._FILES) or prepared(*a))
    config = from_dict({**SMALL, "output": {"progress": False, "dir": str(tmp_path / "run")}})
    if how == "run_many":
        fs.run_many([config])
    else:
        fs.run(config)
    if how == "resume":
        seen.clear()
        fs.resume(tmp_path / "run", rounds=5)
    assert seen and None not in seen


SCRIPT = """
import json, sys
import jax
jax.config.update("jax_num_cpu_devices", int(sys.argv[1]))
compiled = []
whole = jax.stages.Lowered.compile
jax.stages.Lowered.compile = lambda self, *a, **k: compiled.append(1) or whole(self, *a, **k)
import fedjax_sim as fs
from fedjax_sim.config import from_dict
from fedjax_sim.engine import programs
run = fs.run(from_dict(json.loads(sys.argv[2])))
print(json.dumps([len(compiled), programs.count().from_disk, run.metrics.series("accuracy")[1].tolist()]))
"""


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_second_process_compiles_no_program(tmp_path, devices):
    """And has the same bits."""
    told = []
    env = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    env |= {"FEDJAX_SIM_PROGRAMS": str(tmp_path)}
    for _ in range(2):
        command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(devices), json.dumps(SMALL)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        told.append(json.loads(done.stdout.splitlines()[-1]))
    (compiled, read, values), (again, then_read, same) = told
    assert compiled > 3 and not read
    assert (again, then_read) == (0, compiled)
    assert same == values
