"""What is seen of a run on standard error: a bar on a terminal, seldom a line in a log file."""

import contextlib
import dataclasses
import fcntl
import io
import os
import pty
import struct
import subprocess
import sys
import termios
import types
from pathlib import Path

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
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("CI", raising=False)
    config = RunConfig(rounds=rounds, output=dataclasses.replace(OutputConfig(), **output))
    bar = progress.Bar(config, start, 10, Table())
    for number in range(start + 1, rounds + 1):
        clock[0] += seconds
        compiling = 0.5 if number == start + 1 else 0.0
        bar.advance([Row(number, "accuracy", number / 1000)], seconds + compiling)
    bar.close()
    return stream.getvalue() if stream is not None else ""


def test_a_log_file_has_the_first_round_the_last_and_one_in_thirty_seconds(monkeypatch, clock):
    lines = drive(monkeypatch, clock, io.StringIO()).splitlines()
    numbers = [1, *range(31, 200, 30), 200]
    assert [line.split(" of ")[0] for line in lines] == [f"fedavg: round {number}" for number in numbers]
    assert lines[0] == "fedavg: round 1 of 200, accuracy 0.0010"
    assert lines[1] == "fedavg: round 31 of 200, clients/s 10, accuracy 0.0310, 02:49 left"
    assert lines[-1] == "fedavg: round 200 of 200, clients/s 10, accuracy 0.2000"


def test_clients_a_second_are_those_of_all_rounds_after_the_first_call(monkeypatch, clock):
    monkeypatch.setattr("sys.stderr", stream := io.StringIO())
    bar = progress.Bar(RunConfig(rounds=12), 0, 10, Table())
    for seconds in (9.0, 9.0, *[2.0, 0.0] * 5):  # two rounds of the first call; then a wait has two rounds
        clock[0] += 40.0
        bar.advance([], seconds)
    lines = stream.getvalue().splitlines()
    assert "clients/s" not in lines[1] and lines[-1] == "fedavg: round 12 of 12, clients/s 10"


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


@pytest.mark.parametrize(("name", "given"), [("TERM", "dumb"), ("CI", "true")])
def test_a_terminal_that_cannot_draw_and_one_of_continuous_integration_have_lines(name, given, monkeypatch):
    monkeypatch.setattr("sys.stderr", Screen())
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert progress._way() == "bar"
    monkeypatch.setenv(name, given)
    assert progress._way() == "lines"


@pytest.mark.parametrize("columns", [40, 70])
def test_a_bar_is_as_wide_as_the_user_says(columns, monkeypatch, clock):
    monkeypatch.setenv("COLUMNS", str(columns))
    drawn = drive(monkeypatch, clock, Screen(), rounds=3)
    assert max(map(len, drawn.replace("\n", "\r").split("\r"))) <= columns


class Cell:
    """What stands in a notebook: the lines, and how often one was replaced."""

    def __init__(self):
        self.lines, self.count = [], 0

    def display(self, data, raw, display_id):
        assert raw and display_id
        self.lines.append(data["text/plain"])
        return Line(self, len(self.lines) - 1)


class Line:
    def __init__(self, cell, number):
        self.cell, self.number = cell, number

    def update(self, data, raw):
        assert raw
        self.cell.lines[self.number] = data["text/plain"]
        self.cell.count += 1


@pytest.fixture
def notebook(monkeypatch):
    """A notebook whose first cell runs, without IPython."""
    cell, shell = Cell(), types.SimpleNamespace(kernel=object(), execution_count=1)
    python = types.ModuleType("IPython")
    python.get_ipython = lambda: shell
    inside = types.ModuleType("IPython.display")
    inside.display = cell.display
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setitem(sys.modules, "IPython", python)
    monkeypatch.setitem(sys.modules, "IPython.display", inside)
    monkeypatch.setattr(progress, "_CELLS", {})
    return cell, shell


def test_a_notebook_has_one_line_that_is_replaced_now_and_then(notebook, monkeypatch, clock):
    cell, _ = notebook
    assert drive(monkeypatch, clock, io.StringIO(), rounds=400, seconds=0.01) == ""
    assert len(cell.lines) == 1 and cell.count <= 4 / progress.BLINK + 2
    assert "fedavg" in cell.lines[0] and "400/400" in cell.lines[0] and "accuracy=0.4000" in cell.lines[0]


def test_the_runs_of_a_sweep_share_a_line_of_the_notebook(notebook, monkeypatch, clock):
    cell, shell = notebook
    for number in range(5):
        with progress.part_of(f"[{number}/5] FedMR"):
            drive(monkeypatch, clock, io.StringIO(), rounds=3)
    assert len(cell.lines) == 1 and "[4/5] FedMR" in cell.lines[0]
    shell.execution_count = 2
    with progress.part_of("[1/2] FedAvg"):
        drive(monkeypatch, clock, io.StringIO(), rounds=3)
    assert len(cell.lines) == 2


def test_a_process_that_only_imported_a_notebook_s_kernel_is_none(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    shell = types.SimpleNamespace(kernel=None)
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setattr("sys.stderr", io.StringIO())
    assert progress._way() == "lines"


SCRIPT = """
import sys, time
from fedjax_sim.cli import output
from fedjax_sim.config import RunConfig
from fedjax_sim.records import Row, Table
from fedjax_sim.runs import progress
bar = progress.Bar(RunConfig(rounds=20), 0, 10, Table())
for number in range(1, 21):
    time.sleep(0.02)
    bar.advance([Row(number, "accuracy", number / 100)], 0.02)
    if number == 10:
        output.complain("warning: something")
bar.close()
"""


def environment(**changes):
    kept = {name: value for name, value in os.environ.items() if name not in ("CI", "COLUMNS", "NO_COLOR")}
    return {**kept, "PYTHONPATH": str(Path(progress.__file__).parents[2]), "TERM": "xterm", **changes}


def test_a_pipe_has_whole_lines_and_no_carriage_return():
    words = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and "\r" not in done.stderr and "\033" not in done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 3 and lines[1] == "warning: something"
    assert lines[0].startswith("fedavg: round 1 of 20") and lines[2].startswith("fedavg: round 20 of 20")


def test_a_real_terminal_has_a_bar_as_wide_as_it_and_warnings_have_lines_of_their_own():
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    words = [sys.executable, "-c", SCRIPT]
    process = subprocess.Popen(words, env=environment(NO_COLOR="1"), stderr=theirs, stdin=theirs)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while part := os.read(ours, 4096):
            shown += part
    assert process.wait(timeout=100) == 0
    os.close(ours)
    text = shown.decode()
    assert "20/20" in text and "\r" in text and "[3" not in text  # no colours
    pieces = [piece for line in text.split("\n") for piece in line.split("\r")]
    assert max(map(len, pieces)) <= 60
    assert "warning: something" in [piece.strip() for piece in pieces]


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
