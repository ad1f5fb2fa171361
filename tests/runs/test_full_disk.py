"""What cannot be written, on a full disk above all: one message with the way on, and nothing is damaged."""

import contextlib
import dataclasses
import errno
import os
import resource

import pytest

from fedjax_sim import runs
from fedjax_sim.cli import commands
from fedjax_sim.core import paths
from fedjax_sim.core.errors import NotWritten, UserError
from fedjax_sim.records import Row
from fedjax_sim.records.tensorboard import Events
from fedjax_sim.runs.federation import Simulation
from fedjax_sim.studies import sweep
from tests.runs.test_runs import tiny


def full(*given, **named):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextlib.contextmanager
def no_file_above(size):
    """The system refuses to write more than so many bytes into a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_checkpoint_that_cannot_be_written_is_one_message_and_resume_loses_nothing(
    tmp_path, monkeypatch, capfd
):
    config = tiny(tmp_path / "run", model=dataclasses.replace(tiny().model, options={"hidden": [2000]}))
    steps = Simulation.steps
    with contextlib.ExitStack() as limits:

        def limited(self, most=None):
            if self.round == 3:  # compiled, and the first checkpoint is there
                limits.enter_context(no_file_above(30_000))
            return steps(self, 1)

        monkeypatch.setattr(Simulation, "steps", limited)
        with pytest.raises(NotWritten) as caught:
            runs.run(config)
    assert str(caught.value) == (
        f"output.dir = '{tmp_path / 'run'}': it cannot be written: File too large. "
        f"Make room, then continue with: fedjax-sim resume {tmp_path / 'run'}."
    )
    told = capfd.readouterr()
    assert "Traceback" not in told.err + told.out and "ERROR" not in told.err + told.out
    monkeypatch.undo()
    with (
        pytest.warns(UserWarning, match="half-written")
        if (list((tmp_path / "run" / "checkpoints").glob("*tmp*")))
        else contextlib.nullcontext()
    ):
        resumed = runs.resume(tmp_path / "run")
    never = runs.run(dataclasses.replace(config, output=tiny().output))
    assert resumed.finished and list(resumed.metrics) == list(never.metrics)


@pytest.mark.parametrize(
    "target",
    [
        "fedjax_sim.runs.describe.data.save",
        "fedjax_sim.runs.folder.Folder.write",
        "fedjax_sim.records.Journal.write",
        "fedjax_sim.records.table.pq.write_table",
        "fedjax_sim.runs.drive.Events.write",
        "fedjax_sim.records.plots.save",
    ],
)
def test_whatever_of_a_run_cannot_be_written_is_the_same_message(target, tmp_path, monkeypatch):
    config = tiny(tmp_path / "run", rounds=1)
    output = dataclasses.replace(config.output, tensorboard="Events" in target, figures="plots" in target)
    monkeypatch.setattr(target, full)
    if "Journal" in target:
        monkeypatch.setattr("fedjax_sim.runs.checkpoint.Checkpoints.close", full)  # not the first error
    with pytest.raises(NotWritten, match=r"No space left on device\. Make room, then ") as caught:
        runs.run(dataclasses.replace(config, output=output))
    begun = (tmp_path / "run" / "config.yaml").is_file()
    assert ("fedjax-sim resume" if begun else "start it again") in str(caught.value)
    assert begun == (not target.endswith((".save", "Folder.write")) or "plots" in target)
    assert not list((tmp_path / "run").rglob("*.part"))


def test_other_errors_of_a_run_keep_their_own_name(tmp_path, monkeypatch):
    def wrong(*given):
        raise ValueError("of mine")

    monkeypatch.setattr("fedjax_sim.records.Journal.write", wrong)
    with pytest.raises(ValueError, match="of mine") as caught:
        runs.run(tiny(tmp_path / "run", rounds=1))
    assert not isinstance(caught.value, UserError)


def test_events_give_the_error_to_whoever_writes_and_wait_for_nobody(tmp_path):
    events = Events(tmp_path / "events", 3)
    with no_file_above(100):
        with pytest.raises(OSError, match="File too large"):
            for number in range(1000):
                events.write([Row(number, "accuracy", 0.5)])
            events.flush()
        with pytest.raises(OSError, match="File too large"):
            events.close()
    events.close()


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "a.json"
    with paths.whole(path) as name:
        name.write_text("old")
    with pytest.raises(OSError, match="No space"), paths.whole(path, ".7") as name:
        name.write_text("ne")
        full()
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def asked(out):
    return sweep.from_mapping({"base": {"rounds": 1}, "seeds": [0, 1, 2], "out": str(out)})


def test_a_sweep_stops_at_the_first_run_that_cannot_be_written(tmp_path, monkeypatch):
    begun = []

    def start(config, dataset, partition):
        begun.append(config.seed)
        raise NotWritten("output.dir", "x", "it cannot be written: No space left on device", "Resume.")

    monkeypatch.setattr(runs, "run_prepared", start)
    monkeypatch.setattr(sweep, "_check", lambda *given: None)
    with pytest.raises(NotWritten, match=r"^fedavg, seed 0: output\.dir .*start the sweep again"):
        sweep.run(asked(tmp_path / "out"))
    assert begun == [0]


def test_a_sweep_s_tables_that_cannot_be_written_are_one_message(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "_check", lambda *given: None)
    monkeypatch.setattr(sweep, "_one", lambda *given, **named: ("another part's", None))
    monkeypatch.setattr(sweep, "_write", full)
    with pytest.raises(NotWritten, match=r"^sweep\.out .*No space .*what is finished is not run again"):
        sweep.run(asked(tmp_path / "out"))


def test_a_full_disk_has_a_status_of_its_own(monkeypatch, capsys):
    def fails(name, words):
        raise NotWritten.of("output.dir", "x", OSError(errno.EIO, os.strerror(errno.EIO)), "start it again")

    monkeypatch.setattr(commands, "perform", fails)
    assert commands.main(["run"]) == 1
    assert capsys.readouterr().err == (
        "error: output.dir = 'x': it cannot be written: Input/output error. Fix that, then start it again.\n"
    )


def test_standard_output_on_a_full_disk_is_one_line_and_the_work_is_done(monkeypatch, capsys):
    done = []

    def work(name, words):
        for number in range(2):
            print("x" * 9000, flush=True)
            done.append(number)
        return 0

    monkeypatch.setattr(commands, "perform", work)
    with open("/dev/full", "w") as stream:
        monkeypatch.setattr("sys.stdout", stream)
        assert commands.main(["run"]) == 1
    assert done == [0, 1]
    told = capsys.readouterr().err
    assert told == "error: standard output cannot be written: No space left on device\n"


def test_a_pipe_that_nobody_reads_and_a_closed_output_end_nothing(monkeypatch, capsys):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream:
        monkeypatch.setattr("sys.stdout", stream)
        assert commands.main(["list"]) == 0
    monkeypatch.setattr("sys.stdout", stream)  # closed by now
    assert commands.main(["list"]) == 1
    assert capsys.readouterr().err.startswith("error: standard output cannot be written")
    monkeypatch.undo()
    with open("/dev/full", "w", buffering=1) as stream:
        monkeypatch.setattr("sys.stderr", stream)
        assert commands.main(["no-such-command"]) == 2
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
