"""What is seen of a run on standard error: a bar on a terminal, seldom a line in a log file."""

import dataclasses
import io
import sys
import types

import pytest

from fedjax_sim.config import OutputConfig, RunConfig
from fedjax_sim.records import Row, Table
from fedjax_sim.runs import progress


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


class Full(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


@pytest.fixture
def clock(monkeypatch):
    """Seconds that have passed, in a list of one."""
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def drive(monkeypatch, clock, stream, rounds=200, seconds=1.0, start=0, **output):
    """A run of so many rounds, whose rounds take so long."""
    monkeypatch.setattr("sys.stderr", stream)
    config = RunConfig(rounds=rounds, output=dataclasses.replace(OutputConfig(), **output))
    bar = progress.Bar(config, start, 10, Table())
    for number in range(start + 1, rounds + 1):
        clock[0] += seconds
        bar.advance([Row(number, "accuracy", number / 1000)], seconds)
    bar.close()
    return stream.getvalue() if stream is not None else ""


def test_a_log_file_has_the_first_round_the_last_and_one_in_thirty_seconds(monkeypatch, clock):
    lines = drive(monkeypatch, clock, io.StringIO()).splitlines()
    numbers = [1, *range(31, 200, 30), 200]
    assert [line.split(" of ")[0] for line in lines] == [f"fedavg: round {number}" for number in numbers]
    assert lines[0] == "fedavg: round 1 of 200, accuracy 0.0010"
    assert lines[1] == "fedavg: round 31 of 200, clients/s 10, accuracy 0.0310, 02:49 left"
    assert lines[-1] == "fedavg: round 200 of 200, clients/s 10, accuracy 0.2000"


def test_a_slow_round_has_a_line_each_and_a_resumed_run_counts_on(monkeypatch, clock):
    lines = drive(monkeypatch, clock, io.StringIO(), rounds=9, start=5, seconds=100.0).splitlines()
    assert [line.split()[2] for line in lines] == ["6", "7", "8", "9"]
    assert "clients/s" not in lines[0] and lines[2].endswith("01:40 left")


def test_a_run_of_a_sweep_says_which_and_leaves_its_end_to_the_sweep(monkeypatch, clock):
    with progress.part_of("[3/18] FedMR, seed 0"):
        lines = drive(monkeypatch, clock, io.StringIO(), rounds=65).splitlines()
        assert drive(monkeypatch, clock, io.StringIO(), rounds=5) == ""
    assert [line.split(" of ")[0] for line in lines] == [
        f"[3/18] FedMR, seed 0: round {number}" for number in (30, 60)
    ]
    assert drive(monkeypatch, clock, io.StringIO(), rounds=1).startswith("fedavg: round 1 of 1")


def test_a_terminal_has_a_bar(monkeypatch, clock):
    drawn = drive(monkeypatch, clock, Screen(), rounds=3)
    assert "\r" in drawn and "fedavg" in drawn and "3/3" in drawn
    with progress.part_of("[3/18] FedMR"):
        assert "[3/18] FedMR" in drive(monkeypatch, clock, Screen(), rounds=3)


def test_a_notebook_has_a_bar_and_a_process_that_only_imported_its_kernel_has_none(monkeypatch, clock):
    class Shell:
        kernel = None

    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: Shell))
    monkeypatch.setattr("sys.stderr", io.StringIO())
    assert not progress._drawable()
    monkeypatch.setattr(Shell, "kernel", object())
    assert progress._drawable()


def test_nothing_is_said_where_nothing_was_wanted_or_can_be(monkeypatch, clock):
    assert drive(monkeypatch, clock, io.StringIO(), progress=False) == ""
    assert drive(monkeypatch, clock, Screen(), progress=False) == ""
    assert drive(monkeypatch, clock, None) == ""
    closed = io.StringIO()
    closed.close()
    for stream in (Full(), closed):
        monkeypatch.setattr("sys.stderr", stream)
        bar = progress.Bar(RunConfig(rounds=1), 0, 10, Table())
        bar.advance([], 1.0)
        bar.close()
