"""Two real processes over the loopback against one with as many devices."""

import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import fedjax_sim as fs
from fedjax_sim import config as config_lib
from fedjax_sim.cli import commands
from fedjax_sim.cli.commands import main
from fedjax_sim.engine import hosts
from fedjax_sim.runs.folder import Folder
from tests.engine.hosts_worker import CASES, CUT, inside

WORKER = Path(__file__).with_name("hosts_worker.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What the two left behind."""
    home = tmp_path_factory.mktemp("hosts")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    two = {**os.environ, "JAX_NUM_CPU_DEVICES": "2"}
    both = [
        subprocess.Popen(
            [sys.executable, str(WORKER), address, str(number), str(home)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=two,
        )
        for number in range(2)
    ]
    try:
        said = [process.communicate(timeout=400)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], "\n".join(said)
    return home


@pytest.fixture(scope="module")
def told(folder) -> tuple[list[str], list[str]]:
    """What each of the two saw, line by line, without times."""
    mine, others = ((folder / f"told{number}").read_text().splitlines() for number in range(2))
    timeless = [[re.sub(r"[\d.]+ s$", "", line) for line in lines] for lines in (mine, others)]
    return timeless[0], timeless[1]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_give_the_records_and_the_model_of_one(name, folder, told):
    both = fs.load(folder / name)
    alone = fs.run(CASES[name])
    assert both.finished
    assert f"{both.metrics.last('accuracy')!r}" in next(line for line in told[1] if line.startswith(name))
    pairs = list(zip(both.metrics, alone.metrics, strict=True))
    assert all(a._replace(value=0) == b._replace(value=0) for a, b in pairs)
    # Sums over devices are in another order; ranks and angles amplify that.
    np.testing.assert_allclose([a.value for a, _ in pairs], [b.value for _, b in pairs], rtol=1e-3, atol=1e-4)
    for ours, theirs in zip(leaves(both), leaves(alone), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_what_differs_or_cannot_be_is_refused_in_all_of_them(told):
    first, second = ([line[9:] for line in lines if line.startswith("refused")] for lines in told)
    shared = ["output.dir", "execution.devices", "initial.pretrain"]
    assert first == ["process", "process", "process", *shared]
    # What it alone knows, the first only hears of; the third while that one looks for a model to start from.
    assert second == ["seed", "cohort.size", "data.source", *shared]


def test_sigterm_to_one_ends_both_after_the_same_round_and_one_process_continues(folder, told, tmp_path):
    ended, other = (next(line for line in lines if line.startswith("terminated")) for lines in told)
    assert ended == other
    rounds = int(ended.split()[-1])
    assert 3 <= rounds < 1000
    place = folder / "cut"
    assert fs.load(place).rounds == rounds
    short = dataclasses.replace(CUT, rounds=rounds + 2)
    text = config_lib.dump(inside(short, place))
    (place / "config.yaml").write_text(text)
    continued, never = fs.resume(place), fs.run(short)
    assert continued.finished
    assert [row[:2] for row in continued.metrics] == [row[:2] for row in never.metrics]
    for ours, theirs in zip(leaves(continued), leaves(never), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_sweep_notes_failures_and_skips_what_is_done(folder, told):
    lines, others = ([line for line in some if line.startswith(("[", "failed", "no sweep"))] for some in told)
    assert lines == others
    assert lines.pop(0) == "no sweep: Odd, seed 0: cohort.size"
    assert not (folder / "refused" / "runs").exists()
    assert [("finished before" in line, "FAILED" in line) for line in lines if line.startswith("[")] == [
        (False, False),
        (False, True),
        (True, False),
        (False, True),
    ]
    assert lines[-1] == "failed: ['Odd, seed 0']"
    assert (folder / "sweep" / "table.md").is_file()


@pytest.mark.parametrize(
    ("words", "field"),
    [
        (["--join"], "--join"),
        (["--join", "nowhere", "run"], "--join"),
        (["--join", "127.0.0.1:x", "run"], "--join"),
        (["--join", "127.0.0.1:80000000", "--processes", "2", "--process", "0", "run"], "--join"),
        (["--join", "127.0.0.1:9", "run"], "--processes"),
        (["--join", "127.0.0.1:9", "--processes", "two", "run"], "--processes"),
        (["--join", "127.0.0.1:9", "--processes", "2", "run"], "--process"),
        (["--join", "127.0.0.1:9", "--processes=2", "--process=2", "run"], "--process"),
        (["--join", "auto", "--processes=2", "run"], "--join"),
        (["--processes=2", "run"], "--join"),
        (["--join", "auto", "plan"], "command"),
        (["run", "--join"], "--join"),
        (["run", "--join", "--processes", "2"], "--join"),
        (["run", "--rounds", "2", "--join", "nowhere"], "--join"),
        (["sweep", "--join", "127.0.0.1:9", "a.yaml", "--processes=2"], "--process"),
        (["resume", "folder", "--join=127.0.0.1:9", "--processes", "two"], "--processes"),
        (["--join", "nowhere", "run", "--join", "auto"], "--join"),
        (["list", "--join", "auto"], "command"),
    ],
)
def test_a_wrong_way_to_join_is_said_before_anything_starts(words, field, capsys):
    assert main(words) == 2
    assert f"error: {field} = " in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [
        "--join h:1 --processes 2 --process 1 run a.yaml --seed 3",
        "run a.yaml --seed 3 --join h:1 --processes 2 --process 1",
        "run --join=h:1 a.yaml --processes=2 --seed --process=1 3",
    ],
)
def test_joining_is_asked_for_before_or_after_the_command(line, monkeypatch):
    joined, ran = [], []
    monkeypatch.setattr(hosts, "join", lambda address, **counts: joined.append((address, counts)))
    monkeypatch.setattr(commands, "_run", lambda words: ran.append(words) or 0)
    assert main(line.split()) == 0
    assert joined == [("h:1", {"processes": 2, "process": 1})]
    assert ran == [["a.yaml", "--seed", "3"]]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("127.0.0.1:1", 2, 0), "process 0 of 2 waits for the others: the first is at 127.0.0.1:1\n"),
        (("auto",), "this process waits for the others: the cluster is asked where the first is\n"),
    ],
)
def test_one_that_waits_says_so_and_where(words, told, monkeypatch, capsys):
    said = []

    def initialize(*where):
        for _ in range(1000):
            said.append(capsys.readouterr().err)
            if said[-1]:
                return
            time.sleep(0.01)

    monkeypatch.setattr(hosts, "PATIENCE", 0.0)
    monkeypatch.setattr(hosts, "_check_free", lambda host, port: None)
    monkeypatch.setattr("jax.distributed.initialize", initialize)
    hosts.join(*words)
    assert "".join(said) == told


def test_one_that_need_not_wait_says_nothing(monkeypatch, capsys):
    monkeypatch.setattr(hosts, "PATIENCE", 1e3)
    monkeypatch.setattr("jax.distributed.initialize", lambda *where: None)
    with socket.create_server(("127.0.0.1", 0)) as server:
        hosts.join(f"127.0.0.1:{server.getsockname()[1]}", 2, 1)
    assert capsys.readouterr().err == ""


def test_a_first_process_that_never_comes_is_an_error_and_no_crash(monkeypatch):
    monkeypatch.setattr(hosts, "START", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    with pytest.raises(fs.UserError, match=r"no process listens there after .* Start the first process"):
        hosts.join(address, 2, 1)


def test_a_folder_that_this_host_does_not_see_is_said(tmp_path):
    with pytest.raises(fs.UserError, match=r"output\.dir = .*all hosts share"):
        Folder(tmp_path / "elsewhere").check_seen()


def test_a_port_in_use_is_an_error_and_no_crash():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(fs.UserError, match="cannot listen"):
            hosts.join(address, 2, 0)


def test_alone_everything_is_done_here_at_once():
    asked = []
    votes = hosts.StopVote(lambda: bool(asked))
    assert not votes()
    asked.append(signal.SIGTERM)
    assert votes()
    assert hosts.first()
    assert hosts.on_first(lambda: 3) == hosts.all_or_none(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        hosts.on_first(lambda: 1 // 0)
    hosts.check_same({"seed": 1})


def leaves(run: fs.Run) -> list[np.ndarray]:
    import jax

    return jax.tree.leaves(run.variables)
