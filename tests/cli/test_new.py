"""Skeletons work as they are written: their tests pass, and the command line takes them by name."""

import contextlib
import importlib.util
import io
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fedjax_sim.cli import commands, new

ROOT = Path(__file__).resolve().parents[2]
KINDS = sorted(new.NEXT)


@pytest.fixture(scope="module")
def skeletons(tmp_path_factory):
    """Folder with one of each kind, and what was said of each."""
    folder, told = tmp_path_factory.mktemp("own"), {}
    for kind in KINDS:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            assert commands.main(["new", kind, f"own_{kind}", "--dir", str(folder)]) == 0
        told[kind] = out.getvalue()
    return folder, told


def test_the_tests_of_all_skeletons_pass(skeletons):
    """In a process of their own, as a user starts them."""
    folder, _ = skeletons
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--import-mode=importlib",
        folder,
    ]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", "JAX_NUM_CPU_DEVICES": "1"}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and "11 passed" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_said_to_come_next_can_be_done(kind, skeletons, monkeypatch):
    folder, told = skeletons
    steps = [shlex.split(line) for line in told[kind].splitlines() if line.startswith("  ")]
    place = folder / ("own_study" if kind == "study" else "")
    assert steps[0] == ["cd", str(place)]
    assert steps[1] == ["python", "-m", "pytest", f"test_own_{kind}.py"]
    assert (place / steps[1][-1]).is_file()
    if kind == "study":
        assert os.access(place / steps[2][0], os.X_OK)
        return
    monkeypatch.chdir(place)
    few = ["--rounds", "2", "--output.no-progress", "--output.dir", f"run_{kind}", "--execution.devices", "1"]
    assert commands.main([*steps[2][1:], *few]) == 0
    assert f"own_{kind}:" in (place / f"run_{kind}" / "config.yaml").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_a_skeleton_is_formatted_and_has_no_findings(kind, tmp_path):
    for file, text in new.rendered(kind, "my_own").items():
        (tmp_path / file).write_text(text)
    ruff = [sys.executable, "-m", "ruff"]
    for words in (
        ["check", "--select", "E,F,I,B,UP", "--line-length", "110"],
        ["format", "--check", "--line-length", "110"],
    ):
        # From there, as a user would: in the clone's root the package counts as the project's own.
        done = subprocess.run([*ruff, *words, "--isolated"], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["method"], "it takes a KIND and a NAME"),
        (["methods", "own"], "Did you mean method?"),
        (["method", "class"], "no Python name in lower case. Write my_class."),
        (["method", "3d"], "Write my_3d."),
        (["method", "MyMethod"], "Write my_method."),
        (["task", "my-task"], "Write my_task."),
        (["task", "../own"], "Write own."),
        (["method", "json"], "a module of that name is installed"),
        (["method", "fedavg"], "an algorithm of that name is built in. Choose another, such as my_fedavg"),
        (["task", "digits_domains"], "a data set of that name is built in"),
        (["method", "sys"], "a module of that name is installed"),
        (["method", "own", "--dri", "x"], "Did you mean --dir?"),
        (["method", "own", "--dir", "s3://bucket/x"], "Mount the bucket"),
    ],
)
def test_a_mistake_is_one_error_and_writes_nothing(words, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert commands.main(["new", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and told in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_overwritten(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    place = tmp_path / ("own" if kind == "study" else "")
    place.mkdir(exist_ok=True)
    (place / "test_own.py").write_text("mine")
    assert commands.main(["new", kind, "own"]) == 2
    assert "this file is there already" in capsys.readouterr().err
    assert [path.name for path in place.iterdir()] == ["test_own.py"]
    assert (place / "test_own.py").read_text() == "mine"


def test_pytest_is_told_where_it_is_missing(tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pytest" else find(name))
    assert commands.main(["new", "method", "own_rule", "--dir", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert told.index("\n  pip install pytest\n") < told.index("python -m pytest test_own_rule.py")


def test_a_folder_that_cannot_be_written_is_one_error(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert commands.main(["new", "task", "own", "--dir", str(tmp_path / "file" / "x")]) == 1
    assert "--dir = " in capsys.readouterr().err
