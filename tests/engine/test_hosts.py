"""Two, three and four real processes over the loopback against one with as many devices."""

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
    # What clients keep lies on the devices here.
    alone = fs.run(dataclasses.replace(CASES[name], execution=fs.ExecutionConfig()))
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
    differing, shared = ["seed", "cohort.size", "data.source"], ["output.dir", "execution.devices"]
    # What the second alone cannot do the first hears of, while it looks for a model to start from.
    assert first == [*differing, "process", *shared, "initial.pretrain"]
    assert second == [*differing, "alone", *shared, "initial.pretrain"]


def test_other_data_than_the_first_are_refused_in_all_of_them_and_nothing_is_written(folder, told):
    first, second = ([line for line in lines if line.startswith("differs")] for lines in told)
    assert first == second
    fields = ["data.train.image", "data.train.image", "data.test.label", "data.train.image", "partition"]
    said = zip(["images", "shape", "tests", "mapped", "partition"], fields, strict=True)
    wanted = [*said, ("resumed", "data.train.image")]
    assert len(first) == len(wanted)
    for line, (name, field) in zip(first, wanted, strict=True):
        assert re.match(rf"differs: {name}: {re.escape(field)} = .*so in process 1; the first has '", line)
        assert "start all again" in line
    assert "uint8[20, 8, 8, 1]" in first[1]
    assert [path.name for path in (folder / "differing").iterdir()] == [".lock"]
    assert "the same: True" in told[0]


def test_sigterm_to_one_ends_both_after_the_same_round_and_one_process_continues(folder, told, tmp_path):
    ended, other = (next(line for line in lines if line.startswith("terminated")) for lines in told)
    assert ended == other
    rounds = int(ended.split()[-1])
    assert 3 <= rounds < 1000
    place = folder / "cut"
    assert fs.load(place).rounds == rounds
    short = dataclasses.replace(CUT, rounds=rounds + 2)
    # One device has fewer rows than the four, which filled up the clients' to twelve.
    text = config_lib.dump(inside(dataclasses.replace(short, execution=fs.ExecutionConfig(devices=1)), place))
    (place / "config.yaml").write_text(text)
    continued, never = fs.resume(place), fs.run(short)
    assert continued.finished
    assert [row[:2] for row in continued.metrics] == [row[:2] for row in never.metrics]
    for ours, theirs in zip(leaves(continued), leaves(never), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def several(count: int, words: list[str]) -> list[subprocess.Popen]:
    """`fedjax-sim …` in so many processes of one device each, which join one another."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    joined = ["--join", address, "--processes", str(count), "--process"]
    return [
        subprocess.Popen(
            [sys.executable, "-m", "fedjax_sim.cli", *words, *joined, str(number)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "JAX_NUM_CPU_DEVICES": "1"},
        )
        for number in range(count)
    ]


def ended(processes: list[subprocess.Popen]) -> list[str]:
    """What each of them said until its end."""
    try:
        return [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


def begun(home: Path, count: int, rounds: int, **execution) -> list[subprocess.Popen]:
    """As many processes of a long run in `home / "run"`, which has done so many rounds."""
    output = dataclasses.replace(CUT.output, dir=str(home / "run"), checkpoint_every=5)
    config = dataclasses.replace(CUT, output=output, execution=fs.ExecutionConfig(**execution))
    (home / "run.yaml").write_text(config_lib.dump(config))
    processes = several(count, ["run", str(home / "run.yaml")])
    journal, until = home / "run" / "journal.jsonl", time.monotonic() + 200
    while not journal.is_file() or journal.read_bytes().count(b"\n") < rounds:
        if time.monotonic() > until or any(process.poll() is not None for process in processes):
            for process in processes:
                process.kill()
            raise AssertionError("\n".join(ended(processes)))
        time.sleep(0.05)
    return processes


def check_as_never_cut(place: Path, rounds: int) -> None:
    """Raises AssertionError unless a finished run has the records of one that was never cut."""
    found, never = fs.load(place), fs.run(dataclasses.replace(CUT, rounds=rounds))
    assert found.finished
    pairs = list(zip(found.metrics, never.metrics, strict=True))
    assert all(a._replace(value=0) == b._replace(value=0) for a, b in pairs)
    # Which places are empty goes by the number of devices.
    pairs = [pair for pair in pairs if pair[0].metric != "padding_waste"]
    np.testing.assert_allclose([a.value for a, _ in pairs], [b.value for _, b in pairs], rtol=1e-3, atol=1e-4)
    for ours, theirs in zip(leaves(found), leaves(never), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize(
    ("count", "later", "client_state"), [(3, 2, "device"), (4, 3, "host"), (2, 4, "device"), (2, 3, "host")]
)
def test_sigterm_to_one_of_several_ends_all_and_another_number_of_them_continues(
    count, later, client_state, tmp_path
):
    processes = begun(tmp_path, count, 8, client_state=client_state)
    processes[-1].send_signal(signal.SIGTERM)
    said = ended(processes)
    assert [process.returncode for process in processes] == [143] * count, "\n".join(said)
    (rounds,) = {int(re.findall(r"^terminated after round (\d+);", text, re.M)[0]) for text in said}
    assert (tmp_path / "run" / "checkpoints" / str(rounds)).is_dir()
    more = several(later, ["resume", str(tmp_path / "run"), "--rounds", str(rounds + 3)])
    said = ended(more)
    assert [process.returncode for process in more] == [0] * later, "\n".join(said)
    check_as_never_cut(tmp_path / "run", rounds + 3)


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize(
    ("count", "later", "execution"),
    [
        (4, 2, {}),
        (4, 2, {"data": "streamed"}),
        (4, 2, {"data": "cut"}),
        (4, 2, {"client_state": "host"}),
        (2, 1, {}),
        (2, 1, {"data": "streamed", "client_state": "host"}),
    ],
)
def test_one_that_is_killed_ends_the_others_with_one_error_and_fewer_go_on(count, later, execution, tmp_path):
    processes = begun(tmp_path, count, 12, **execution)
    killed, began = processes[count // 2], time.monotonic()
    killed.kill()
    said = ended(processes)
    codes = [-signal.SIGKILL if process is killed else 1 for process in processes]
    assert [process.returncode for process in processes] == codes, "\n".join(said)
    assert time.monotonic() - began < 60  # JAX alone would wait until heartbeats were missed
    for process, text in zip(processes, said, strict=True):
        if process is not killed:
            assert len(re.findall("^error: process = .* has ended without a word", text, re.M)) == 1, text
            assert "Traceback" not in text and "Check failure" not in text, text
            assert f"fedjax-sim resume {tmp_path / 'run'}. The run goes on after round " in text
    (kept, *_) = sorted(map(int, os.listdir(tmp_path / "run" / "checkpoints")), reverse=True)
    assert kept >= 10
    # The journal may be ahead of the checkpoint: its last rounds are done again.
    rounds = (tmp_path / "run" / "journal.jsonl").read_bytes().count(b"\n") + 2
    more = several(later, ["resume", str(tmp_path / "run"), "--rounds", str(rounds)])
    said = ended(more)
    assert [process.returncode for process in more] == [0] * later, "\n".join(said)
    check_as_never_cut(tmp_path / "run", rounds)


def test_what_jax_says_of_a_lost_process_is_one_error_and_other_errors_stay_as_they_are(monkeypatch):
    monkeypatch.setattr("jax.process_count", lambda: 4)
    registered = []
    monkeypatch.setattr(hosts.atexit, "register", registered.append)
    gone = RuntimeError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer [127.0.0.1]:1")
    lost = hosts.as_loss(gone, "Start again.")
    assert isinstance(lost, hosts.OtherProcessLost) and "closed by peer" in str(lost)
    assert registered == [hosts._leave]
    other = RuntimeError("RESOURCE_EXHAUSTED: out of memory")
    assert hosts.as_loss(other, "Start again.") is other
    own = fs.UserError("callbacks", "gloo", "connection reset by peer", "")
    assert hosts.as_loss(own, "Start again.") is own
    monkeypatch.setattr("jax.process_count", lambda: 1)
    assert hosts.as_loss(gone, "Start again.") is gone


def test_a_process_that_is_lost_while_a_checkpoint_is_written_is_that_error_too(monkeypatch, tmp_path):
    def save(*_):
        raise ValueError("Gloo AllGather failed: Connection reset by peer")  # as JAX raises it there

    lost = hosts.OtherProcessLost("process", 0, "another has ended", "Start again.")
    monkeypatch.setattr(hosts, "as_loss", lambda error, fix: lost)
    monkeypatch.setattr("fedjax_sim.runs.checkpoint.Checkpoints.save", save)
    with pytest.raises(hosts.OtherProcessLost):
        fs.run(inside(CASES["personal"], tmp_path / "run"))


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


def test_where_no_cluster_is_found_the_message_begins_with_that(monkeypatch):
    def refuse():
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(hosts.jax.distributed, "initialize", refuse)
    with pytest.raises(hosts.UserError, match="'auto': no TPU pod, Slurm or Open MPI was found here"):
        hosts.join("auto")


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
    monkeypatch.setattr(commands, "perform", lambda name, words: ran.append(words) or 0)
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
    hosts.check_same({"seed": 1}, "Start again.")


def leaves(run: fs.Run) -> list[np.ndarray]:
    import jax

    return jax.tree.leaves(run.variables)
