"""Callbacks in real runs: where a run ends, what it keeps, and that a cut changes none of it."""

import dataclasses
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

import fedjax_sim as fs
from fedjax_sim import config as config_lib
from fedjax_sim import runs
from fedjax_sim.cli import commands
from fedjax_sim.config import sweep_files
from fedjax_sim.core.errors import UserError
from fedjax_sim.runs import drive
from fedjax_sim.runs.folder import Folder
from fedjax_sim.studies import packing, sweep

SMALL = fs.RunConfig(
    rounds=12,
    partition=fs.PartitionConfig(kind="iid", clients=4),
    model=fs.ModelConfig("mlp", options={"hidden": [4]}),
    local=fs.LocalConfig(epochs=None, steps=2, lr=0.5),
    cohort=fs.CohortConfig(size=2),
    evaluation=fs.EvaluationConfig(every=2),
    execution=fs.ExecutionConfig(devices=1, rounds_per_call=1),
    output=fs.OutputConfig(progress=False, figures=False, tensorboard=False, checkpoint_every=3, keep=1),
)


def placed(folder, **changes):
    return dataclasses.replace(SMALL, output=dataclasses.replace(SMALL.output, dir=str(folder)), **changes)


@dataclasses.dataclass(frozen=True)
class StopAt:
    """Stops after a round."""

    round: int

    def on_round(self, number, rows, run):
        """See `Callback`."""
        if number == self.round:
            run.stop("far enough")


@dataclasses.dataclass(frozen=True)
class Once:
    """Does something once, in a round: a kill, perhaps."""

    round: int
    done: list = dataclasses.field(default_factory=list, repr=False, compare=False)

    def on_round(self, number, rows, run):
        """See `Callback`."""
        if number == self.round and not self.done:
            self.done.append(number)
            raise Killed


class Killed(BaseException):
    """As good as SIGKILL for the run: nothing is written any more."""


def same(one, other):
    leaves = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(a, b) for a, b in leaves)


def test_a_run_ends_after_the_very_round_and_is_finished(tmp_path):
    run = fs.run(placed(tmp_path / "run", rounds=12), callbacks=[StopAt(5)])
    assert run.finished and run.rounds == 5 and run.metrics.column("round").max() == 5
    assert (run.stopped.round, run.stopped.by, run.stopped.reason) == (5, "StopAt", "far enough")
    assert "stopped after round 5 by StopAt: far enough" in repr(run)
    whole = fs.run(dataclasses.replace(SMALL, rounds=5))
    assert same(run.variables, whole.variables)
    assert list(run.metrics) == list(whole.metrics)  # its last model is evaluated, though 5 is odd
    loaded = fs.load(run.folder)
    assert loaded.finished and loaded.stopped == run.stopped and same(loaded.variables, run.variables)
    assert list(loaded.metrics) == list(run.metrics)
    assert runs.restored(run.folder).round == 5
    again = fs.resume(run.folder, callbacks=[StopAt(5)])
    assert again.rounds == 5
    with pytest.raises(UserError, match=r"rounds = 20: the run was stopped after round 5.*initial\.run"):
        fs.resume(run.folder, rounds=20, callbacks=[StopAt(5)])


def test_to_stop_in_the_last_round_changes_nothing():
    run = fs.run(dataclasses.replace(SMALL, rounds=2), callbacks=[StopAt(2)])
    assert run.finished and run.stopped is None


@pytest.mark.slow
def test_clients_are_fine_tuned_after_the_round_that_was_the_last():
    config = dataclasses.replace(
        SMALL,
        partition=dataclasses.replace(SMALL.partition, local_test="holdout"),
        evaluation=fs.EvaluationConfig(every=1, per_client=True, finetune=1),
    )
    stopped = fs.run(config, callbacks=[StopAt(2)])
    whole = fs.run(dataclasses.replace(config, rounds=2))
    assert list(stopped.metrics) == list(whole.metrics)
    assert stopped.metrics.series("finetuned_mean")[0].tolist() == [2]


STOPPING = fs.EarlyStopping("train_loss", patience=2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that stops early and keeps its best, never cut."""
    config = placed(tmp_path_factory.mktemp("whole") / "run", rounds=40, callbacks=(STOPPING, fs.KeepBest()))
    run = fs.run(config)
    assert run.finished and 6 < run.rounds < 40 and run.best_round
    return run


@pytest.mark.parametrize("when", [1, 4, -1, 0])
def test_a_cut_changes_neither_where_it_ends_nor_what_it_keeps(whole, tmp_path, when):
    """`when`: the round of the cut, counted from the last if it is not positive."""
    killer = Once(when if when > 0 else whole.rounds + when)
    callbacks = [*whole.config.callbacks, killer]
    with pytest.raises(Killed):
        fs.run(placed(tmp_path / "run", rounds=40), callbacks=callbacks)
    assert not fs.load(tmp_path / "run").finished
    run = fs.resume(tmp_path / "run", callbacks=callbacks)
    assert run.stopped == whole.stopped and run.best_round == whole.best_round
    assert list(run.metrics) == list(whole.metrics)
    assert same(run.variables, whole.variables) and same(run.best_variables, whole.best_variables)


def test_a_cut_between_the_decision_and_the_last_table(whole, tmp_path, monkeypatch):
    config = dataclasses.replace(whole.config, output=placed(tmp_path / "run").output)
    with monkeypatch.context() as patch:
        patch.setattr(drive, "_figures", lambda run, setup: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            fs.run(config)
    loaded = fs.load(tmp_path / "run")
    assert not Folder(tmp_path / "run").finished
    assert list(loaded.metrics) == list(whole.metrics)
    run = fs.resume(tmp_path / "run")
    assert run.finished and run.stopped == whole.stopped and list(run.metrics) == list(whole.metrics)


def test_a_decision_from_after_the_newest_checkpoint_is_taken_again(whole, tmp_path):
    config = dataclasses.replace(whole.config, output=placed(tmp_path / "run").output)
    run = fs.run(config)
    newest = max((run.folder / "checkpoints").iterdir(), key=lambda path: int(path.name.split(".")[0]))
    for part in newest.rglob("*"):
        if part.is_file():
            part.write_bytes(b"")
    (run.folder / "metrics.parquet").unlink()
    with pytest.warns(UserWarning, match="damaged|no checkpoint is left"):
        again = fs.resume(run.folder)
    assert again.stopped == whole.stopped and list(again.metrics) == list(whole.metrics)
    assert same(again.variables, whole.variables)


def test_the_best_model_is_that_of_its_round_and_stays(whole, tmp_path):
    rounds, values = whole.metrics.series("accuracy")
    assert whole.best_round == rounds[np.argmax(values)]
    assert same(whole.best_variables, fs.run(dataclasses.replace(SMALL, rounds=whole.best_round)).variables)
    loaded = fs.load(whole.folder)
    assert loaded.best_round == whole.best_round and same(loaded.best_variables, whole.best_variables)
    commands.main(["export", str(whole.folder), str(tmp_path / "best.npz"), "--best"])
    with np.load(tmp_path / "best.npz") as file:
        np.testing.assert_array_equal(
            file["params/fc1/kernel"], whole.best_variables["params"]["fc1"]["kernel"]
        )


def test_in_memory_the_best_model_is_kept_too_and_without_one_it_is_said(whole):
    memory = fs.run(dataclasses.replace(whole.config, output=SMALL.output))
    assert memory.best_round == whole.best_round and same(memory.best_variables, whole.best_variables)
    run = fs.run(dataclasses.replace(SMALL, rounds=1))
    assert run.best_round is None
    with pytest.raises(UserError, match=r"fs\.KeepBest"):
        _ = run.best_variables


@dataclasses.dataclass(frozen=True)
class Looking:
    """Remembers what it sees."""

    seen: list = dataclasses.field(default_factory=list, repr=False, compare=False)

    def on_start(self, run):
        """See `Callback`."""
        self.seen.append(("start", len(run.metrics)))

    def on_round(self, number, rows, run):
        """See `Callback`."""
        assert {row.round for row in rows} == {number} and run.metrics.column("round").max() == number
        self.seen.append((number, run.model()))
        if number == 2:
            run.checkpoint()

    def on_end(self, run):
        """See `Callback`."""
        self.seen.append(("end", run.model()))


def test_it_sees_the_model_of_the_round_and_has_checkpoints_written(tmp_path):
    looking = Looking()
    output = dataclasses.replace(placed(tmp_path / "run").output, checkpoint_every=0, keep=9)
    run = fs.run(dataclasses.replace(SMALL, rounds=3, output=output), callbacks=[looking])
    assert [what for what, _ in looking.seen] == ["start", 1, 2, 3, "end"]
    for number in (1, 2, 3):
        whole = fs.run(dataclasses.replace(SMALL, rounds=number))
        assert same(looking.seen[number][1], whole.variables)
    assert same(looking.seen[-1][1], run.variables)
    assert sorted(path.name for path in (run.folder / "checkpoints").iterdir()) == ["2", "3"]


MODULE = """
import dataclasses

@dataclasses.dataclass(frozen=True)
class Fussy:
    limit: int = 2

    def on_round(self, number, rows, run):
        if number >= self.limit:
            raise ValueError("not like this")
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of one's own in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fussy_callbacks.py").write_text(MODULE)
    yield "fussy_callbacks:Fussy"
    sys.modules.pop("fussy_callbacks", None)


def test_an_error_names_callback_round_and_line_and_the_run_goes_on(module, tmp_path):
    mapping = config_lib.to_dict(placed(tmp_path / "run", rounds=5))
    mapping["callbacks"] = [{"name": module, "limit": 4}]
    file = tmp_path / "my.yaml"
    file.write_text(config_lib.dump(config_lib.from_dict(mapping)))
    told = r"callbacks\.0\.on_round = '.*Fussy': it fails in round 4: ValueError: not like this "
    with pytest.raises(UserError, match=told + r"\(fussy_callbacks\.py, line 10\).*fedjax-sim resume"):
        fs.run(file)
    assert config_lib.read_config(tmp_path / "run" / "config.yaml").callbacks[0].limit == 4
    monkey = sys.modules["fussy_callbacks"].Fussy
    monkey.on_round = lambda self, number, rows, run: None
    run = fs.resume(tmp_path / "run")
    assert run.finished and list(run.metrics) == list(fs.run(dataclasses.replace(SMALL, rounds=5)).metrics)


def test_what_python_gave_has_to_be_given_again(tmp_path):
    with pytest.raises(Killed):
        fs.run(placed(tmp_path / "run", rounds=4), callbacks=[StopAt(3), Once(2)])
    assert "StopAt(round=3)" in fs.load(tmp_path / "run").config.given["callbacks"]
    with pytest.raises(UserError, match=r"callbacks = .*from Python.*resume\(…, callbacks=…\)"):
        fs.resume(tmp_path / "run")
    with pytest.raises(UserError, match=r"what is given now is not what its run had"):
        fs.resume(tmp_path / "run", callbacks=[StopAt(2)])
    assert fs.resume(tmp_path / "run", callbacks=[StopAt(3), Once(2, [2])]).rounds == 3
    with pytest.raises(UserError, match="a list is wanted"):
        fs.run(SMALL, callbacks=StopAt(3))


def test_a_sweep_takes_a_stopped_run_as_finished_and_packs_it(tmp_path):
    base = config_lib.to_dict(dataclasses.replace(SMALL, rounds=40))
    short = {"callbacks": [{"name": "early_stopping", "metric": "train_loss", "patience": 2}]}
    wanted = {"base": base, "methods": {"short": short}, "out": str(tmp_path / "study")}
    del base["output"]["dir"]
    asked = sweep_files.from_mapping(wanted)
    outcome = sweep.run(asked)
    assert not outcome.failures and outcome.comparison is not None
    told = []
    sweep.run(asked, told.append)
    assert "finished before" in told[0]
    folder = Path(str(asked.jobs[0].config.output.dir))
    before = fs.load(folder)
    packing.pack(asked)
    after = fs.load(folder)
    assert after.finished and after.stopped == before.stopped and list(after.metrics) == list(before.metrics)


def test_flags_take_callbacks(capsys):
    words = ["--callbacks", "[{name: early_stopping, patience: 7}, keep_best]", "--print-config"]
    assert commands.main(["run", *words]) == 0
    made = config_lib.from_dict(yaml.safe_load(capsys.readouterr().out))
    assert made.callbacks == (fs.EarlyStopping(patience=7), fs.KeepBest())


# --- rounds that run as one program -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class AtEvaluations(StopAt):
    """The same, of a round that was evaluated."""

    every_round = False


def _fused(call=4):
    return dataclasses.replace(SMALL.execution, rounds_per_call=call)


def test_one_that_may_act_after_each_round_is_named_and_rounds_run_one_by_one(tmp_path):
    config = placed(tmp_path / "run", execution=_fused(), evaluation=fs.EvaluationConfig(every=5))
    with pytest.warns(UserWarning, match=r"one by one, as StopAt may act after each; every_round = False"):
        run = fs.run(config, callbacks=[StopAt(3)])
    assert run.rounds == 3 and run.stopped.round == 3


def test_one_that_acts_on_evaluated_rounds_leaves_the_others_together(tmp_path):
    evaluation = fs.EvaluationConfig(every=4)
    together = fs.run(
        placed(tmp_path / "run", execution=_fused(), evaluation=evaluation), callbacks=[AtEvaluations(8)]
    )
    alone = fs.run(placed(tmp_path / "alone", evaluation=evaluation), callbacks=[StopAt(8)])
    assert together.rounds == 8 and list(together.metrics) == list(alone.metrics)
    jax.tree.map(np.testing.assert_array_equal, together.variables, alone.variables)
    seconds = np.loadtxt(tmp_path / "run" / "timing.csv", delimiter=",", skiprows=1)[:, 1]
    assert len(seconds) == 8 and seconds[1] == seconds[2]  # those of a call cost the same
    with pytest.raises(
        UserError,
        match=r"run.stop = .*AtEvaluations.*round 5 was not evaluated, and it has every_round = False",
    ):
        fs.run(
            placed(tmp_path / "wrong", execution=_fused(), evaluation=evaluation),
            callbacks=[AtEvaluations(5)],
        )


@dataclasses.dataclass(frozen=True)
class Sums:
    """Adds up the model after evaluated rounds, and tries it after another."""

    also: int = 0
    found: list = dataclasses.field(default_factory=list, repr=False, compare=False)
    every_round = False

    def on_round(self, number, rows, run):
        """See `Callback`."""
        if number == self.also or any(row.metric == "accuracy" for row in rows):
            self.found.append(sum(np.abs(leaf).sum() for leaf in jax.tree.leaves(run.model())))


def test_the_model_is_that_of_the_round_or_refused(tmp_path):
    evaluation, found = fs.EvaluationConfig(every=4), []
    for call in (1, 5):
        config = placed(tmp_path / f"run{call}", execution=_fused(call), evaluation=evaluation)
        fs.run(config, callbacks=[seen := Sums()])
        found.append(seen.found)
        with pytest.raises(UserError, match=r"run.model = .*Sums.*round 6 was not evaluated"):
            fs.run(
                placed(tmp_path / f"wrong{call}", execution=_fused(call), evaluation=evaluation),
                callbacks=[Sums(6)],
            )
    assert found[0] == found[1] and len(found[0]) == 3


def test_the_shipped_ones_say_whether_they_act_on_other_rounds():
    assert not fs.EarlyStopping().every_round and not fs.KeepBest("client_accuracy_mean").every_round
    assert fs.EarlyStopping("train_loss").every_round and fs.KeepBest("inertia").every_round


def test_what_a_callback_takes_to_start_is_no_time_of_the_first_round(monkeypatch):
    """As of trackers, which ask a server."""
    seen = []

    @dataclasses.dataclass(frozen=True)
    class Slow:
        def on_start(self, run):
            seen.append("start")

        def on_round(self, number, rows, run):
            """Nothing."""

    class Told(drive.Clock):
        def __init__(self):
            seen.append("clock")
            super().__init__()

    monkeypatch.setattr(drive, "Clock", Told)
    fs.run(SMALL, callbacks=[Slow()])
    assert seen[-2:] == ["start", "clock"]
