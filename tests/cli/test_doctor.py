"""The doctor tells what is wrong with a machine, also where JAX is refused or does not start."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedjax_sim.cli import checks, commands
from fedjax_sim.core import versions

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def of_release(monkeypatch):
    """Has a package another release; "" for none."""
    real = versions.installed

    def set_to(**releases):
        named = {name.replace("_", "-"): release for name, release in releases.items()}
        monkeypatch.setattr(versions, "installed", lambda name: named.get(name, real(name)))

    return set_to


@pytest.fixture
def started(monkeypatch):
    """What JAX says, instead of starting it."""
    told = {"platform": "cpu", "kinds": ["cpu"] * 4, "memory": [None] * 4, "data": ("/nowhere", [])}
    monkeypatch.setattr(checks, "probe", lambda: told)
    monkeypatch.setattr(checks, "_gpus", lambda: [])
    monkeypatch.setattr(checks, "_tpus", lambda: [])
    for name in checks.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return told


def state_of(name):
    (found,) = [check for check in checks.all_of_them() if check.name == name]
    return found


def test_a_sound_machine_has_no_problem(started, capsys):
    assert commands.main(["doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] and {"python", "jaxlib", "devices", "programs"} <= {
        one["name"] for one in told["checks"]
    }
    assert commands.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "4 x cpu" in text and text.strip().splitlines()[-1].startswith("0 problems") and "\033" not in text


@pytest.mark.parametrize("package", ["jax", "jaxlib"])
def test_a_refused_release_is_told_with_the_remedy_and_jax_is_left_alone(
    package, of_release, started, capsys
):
    def never():
        raise AssertionError("JAX was started")

    of_release(**{package: "0.10.2"})
    checks.probe = never  # of `started`, which puts it back
    assert commands.main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert f"problem {package}: 0.10.2 is refused: it computes wrong numbers" in text
    assert "!=0.10.2" in text and "JAX was not started" in text


@pytest.mark.parametrize(
    ("releases", "name", "told"),
    [
        ({"flax": ""}, "flax", "not installed"),
        ({"flax": "0.1.0"}, "flax", "fedjax-sim needs >=0.12"),
        ({"jaxlib": "0.9.0"}, "jaxlib", "needs"),
        ({"jax_cuda12_plugin": "0.9.0"}, "jax-cuda12-plugin", "and jaxlib is"),
    ],
)
def test_a_release_that_does_not_fit_is_a_problem(releases, name, told, of_release, started):
    of_release(**releases)
    found = state_of(name)
    assert found.state == "problem" and told in found.found and "pip install" in found.fix


def test_an_old_python():
    assert checks.python((3, 9)).state == "problem"
    assert checks.python((3, 14)).state == "ok" and checks.python((3, 99)).state == "note"


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("RuntimeError: The TPU is already in use by process with pid 7", "Another process has the TPU"),
        ("INTERNAL: CUDA driver version is insufficient for CUDA runtime version", "driver does not fit"),
        ("RuntimeError: Unable to initialize backend 'rocket'", "JAX_PLATFORMS"),
        ("ValueError: something else", "import jax"),
    ],
)
def test_a_jax_that_does_not_start_is_told(said, told, started):
    started.clear()
    started["error"] = f"Traceback\n{said}"
    found = state_of("devices")
    assert found.state == "problem" and said in found.found and told in found.fix
    assert state_of("data").state == "note"


@pytest.mark.parametrize(
    ("name", "value", "said", "found"),
    [
        ("JAX_PLATFORMS", "cuda", "    assert False\nAssertionError", "JAX does not start: cuda is not here"),
        (
            "XLA_FLAGS",
            "--bogus",
            "F1130 01:30:35.755386   10068 parse_flags_from_env.cc:234] Unknown flag in XLA_FLAGS: --bogus",
            "JAX does not start: XLA does not know --bogus",
        ),
    ],
)
def test_the_variable_with_which_jax_does_not_start_is_named(name, value, said, found, started, monkeypatch):
    monkeypatch.setenv(name, value)
    started.clear()
    started["error"] = f"Traceback\n{said}"
    assert state_of("devices").found == found and state_of("devices").fix.startswith(f"{name} ")
    assert state_of(name).state == "note" and "does not start with it" in state_of(name).found


def test_a_jax_that_hangs_is_told():
    found = checks.probe(wait=0.01)
    assert found["late"]
    assert next(checks.devices(found)).state == "problem"


def test_an_accelerator_that_jax_does_not_use(started, monkeypatch):
    monkeypatch.setattr(checks, "_gpus", lambda: ["NVIDIA T4, 470.82.01, 15360 MiB"])
    monkeypatch.setattr(checks.shutil, "which", lambda name: f"/usr/bin/{name}")
    found = [check for check in checks.all_of_them() if check.name == "gpu"]
    assert [check.state for check in found] == ["problem"] * 2
    assert "too old" in found[0].found and "jax[cuda12]" in found[1].fix
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert len([check for check in checks.all_of_them() if check.name == "gpu"]) == 1


def test_who_holds_a_device_is_found(tmp_path):
    (tmp_path / "accel0").touch()
    with (tmp_path / "accel0").open():
        assert checks.holders([str(tmp_path / "accel0")]) == [os.getpid()]
    assert checks.holders([]) == []


def test_a_cache_that_cannot_be_written(started, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    for variable, name in (("FEDJAX_SIM_PROGRAMS", "programs"), ("FEDJAX_SIM_CALIBRATION", "calibration")):
        monkeypatch.setenv(variable, str(tmp_path / "file" / "below" / "it"))
        found = state_of(name)
        assert found.state == "problem" and "Not a directory" in found.found and variable in found.fix
        monkeypatch.setenv(variable, "")
        assert state_of(name).state == "note"
        monkeypatch.setenv(variable, str(tmp_path / "new" / name))
        assert state_of(name).state == "ok"
    (tmp_path / "broken.json").write_text("{")
    monkeypatch.setenv("FEDJAX_SIM_CALIBRATION", str(tmp_path / "broken.json"))
    assert state_of("calibration").state == "problem" and "--forget" in state_of("calibration").fix
    assert not (tmp_path / "new").exists()


def test_the_folder_of_the_data(started, monkeypatch, tmp_path):
    from fedjax_sim.data import sources

    monkeypatch.setenv("FEDJAX_SIM_DATA", str(tmp_path / "none"))
    started["data"] = str(tmp_path / "none"), []
    assert state_of("data").state == "problem" and ".md" not in state_of("data").fix
    for name in ("cifar10.npz", "mnist.npz"):
        (tmp_path / name).touch()
    assert {"cifar10", "cifar10-lips"} <= set(sources.present(tmp_path))
    assert "cifar100" not in sources.present(tmp_path)
    started["data"] = str(tmp_path), sources.present(tmp_path)
    assert state_of("data").state == "ok" and "cifar10" in state_of("data").found


def test_pytest_is_listed_where_it_is_missing(started, monkeypatch):
    monkeypatch.setattr(checks.versions, "installed", lambda name: "")
    (absent,) = [check for check in checks.extras() if check.name == "not installed"]
    assert "pytest (the tests that fedjax-sim new writes)" in absent.found


def test_variables_that_cost_are_notes(started, monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_JIT", "1")
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "999")
    monkeypatch.setenv("XLA_FLAGS", "/nowhere/flags")
    assert state_of("JAX_DISABLE_JIT").state == "note" and "unset" in state_of("JAX_DISABLE_JIT").fix
    assert state_of("cores").state == "note"
    assert "problem" in [check.state for check in checks.all_of_them() if check.name == "XLA_FLAGS"]


def test_little_room_and_a_clock_that_is_behind(monkeypatch):
    monkeypatch.setattr(checks, "DISK", 2**60)
    monkeypatch.setattr(checks, "MEMORY", 2**60)
    assert checks.disk().state == "problem" and checks.memory().state == "note"
    monkeypatch.setattr(checks.time, "time", lambda: 0.0)
    monkeypatch.chdir(ROOT)
    assert [check.name for check in checks.revision()] in (["clock"], [])


BAD = """
import importlib.metadata, runpy, sys
real = importlib.metadata.version
importlib.metadata.version = lambda name: "0.10.2" if name == "jaxlib" else real(name)
sys.argv = ["fedjax-sim", *sys.argv[1:]]
from fedjax_sim.cli import main
sys.exit(main())
"""


@pytest.mark.parametrize(("word", "status"), [("doctor", 1), ("--help", 0), ("--version", 0)])
def test_the_command_survives_a_jaxlib_that_the_package_refuses(word, status, tmp_path):
    """As the installed script starts: the package itself would not import."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", BAD, word]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=100)
    assert done.returncode == status, done.stderr
    if word == "doctor":
        assert "problem jaxlib: 0.10.2 is refused" in done.stdout
    refused = subprocess.run(
        [sys.executable, "-c", BAD, "list"], capture_output=True, text=True, env=environment
    )
    assert refused.returncode == 1 and "does not run on jaxlib 0.10.2" in refused.stderr
