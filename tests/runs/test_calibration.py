"""What is kept of a machine, and which runs take it. Times are made up; nothing is measured here."""

import contextlib
import dataclasses
import io
import json
import re

import jax
import numpy as np
import pytest

import fedjax_sim as fs
from fedjax_sim import config as config_lib
from fedjax_sim import runs
from fedjax_sim.cli import commands
from fedjax_sim.core.errors import UserError
from fedjax_sim.engine import hosts, placement, step_times
from fedjax_sim.engine.simulation import Simulation
from fedjax_sim.engine.step_times import Layout
from fedjax_sim.runs import calibration, describe, tuning
from fedjax_sim.runs.assemble import prepare
from fedjax_sim.runs.calibration import Case

CONFIG = fs.RunConfig(
    rounds=4,
    partition=fs.PartitionConfig(kind="iid", clients=10),
    model=fs.ModelConfig("mlp", options={"hidden": [8]}),
    local=fs.LocalConfig(epochs=None, steps=2, batch_size=16, lr=0.1, momentum=0.5),
    cohort=fs.CohortConfig(size=8),
    evaluation=fs.EvaluationConfig(every=2),
    execution=fs.ExecutionConfig(devices=2),
    output=fs.OutputConfig(checkpoint_every=1, tensorboard=False, figures=False, progress=False),
)
"""A share of four clients: the default is a wave of 4."""


def of(config=CONFIG, **execution):
    return dataclasses.replace(config, execution=dataclasses.replace(config.execution, **execution))


def into(folder, config=CONFIG):
    return dataclasses.replace(config, output=dataclasses.replace(config.output, dir=str(folder)))


def case_of(config=CONFIG):
    setup = prepare(config)
    return Case(setup.model, setup.task, setup.config, setup.counts, setup.mesh)


def entry_of(case, **ratios):
    """As if measured: `wave_2=0.5` is half of the default's time in every turn; others take 1.5 times it."""
    timings = []
    for layout in case.layouts:
        one = 1.0 if layout == case.layouts[0] else ratios.get(f"wave_{layout.wave}", 1.5)
        turns = list(one) if isinstance(one, list) else [one] * step_times.LEAST
        timings.append({"layout": dataclasses.asdict(layout), "seconds": 0.01 * turns[0], "ratios": turns})
    return {"key": case.key, "date": "2026-11-29", "timings": timings}


@pytest.fixture
def path(tmp_path, monkeypatch):
    """Where what is measured is kept."""
    path = tmp_path / "cache" / "calibration.json"
    monkeypatch.setenv("FEDJAX_SIM_CALIBRATION", str(path))
    return path


@pytest.fixture(autouse=True)
def never_measured(monkeypatch):
    def measured(*args):
        raise AssertionError("a test measures")

    monkeypatch.setattr(step_times, "step_of", measured)


# --- the file -----------------------------------------------------------------------------------------


def test_where_it_lies(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("FEDJAX_SIM_CALIBRATION")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert calibration.file() == tmp_path / ".cache" / "fedjax-sim" / "calibration.json"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert calibration.file() == tmp_path / "other" / "fedjax-sim" / "calibration.json"
    monkeypatch.setenv("FEDJAX_SIM_CALIBRATION", "~/mine.json")
    assert calibration.file() == tmp_path / "mine.json"
    monkeypatch.setenv("FEDJAX_SIM_CALIBRATION", "")
    assert calibration.file() is None
    case = case_of()
    assert calibration.keep(entry_of(case)) is None and calibration.find(case) is None


def test_what_is_kept_is_found_for_its_case_and_no_other(path):
    case = case_of()
    assert calibration.find(case) is None
    calibration.keep(entry_of(case, wave_2=0.5))
    assert calibration.find(case) == entry_of(case, wave_2=0.5)
    assert json.loads(path.read_text())["entries"][0]["key"]["cores"] == placement.cores()
    local, model = CONFIG.local, CONFIG.model
    for other in (
        dataclasses.replace(CONFIG, local=dataclasses.replace(local, batch_size=8)),
        dataclasses.replace(CONFIG, cohort=fs.CohortConfig(size=6)),
        dataclasses.replace(CONFIG, model=dataclasses.replace(model, options={"hidden": [9]})),
        dataclasses.replace(CONFIG, model=fs.ModelConfig("mlp", options={"hidden": [8]}, dtype="bfloat16")),
        of(devices=1),
        of(wave=2),
    ):
        assert calibration.find(case_of(other)) is None, other
    assert case.uneven and calibration.find(dataclasses.replace(case, counts=np.full(10, 160))) is None
    # What changes nothing of a step's time.
    for same in (
        dataclasses.replace(CONFIG, seed=3, rounds=9),
        dataclasses.replace(CONFIG, algorithm=fs.FedMR(first_stage=1)),
        into("somewhere"),
    ):
        assert calibration.find(case_of(same)) is not None, same


def test_a_key_has_processor_cores_and_versions_and_no_addresses(monkeypatch):
    key = case_of().key
    assert key.keys() >= {
        "processor",
        "cores",
        "jaxlib",
        "fedjax-sim",
        "samples",
        "batch_size",
        "cohort_size",
    }
    assert key == case_of().key  # of objects that were made anew
    monkeypatch.setattr(placement, "cores", lambda: 99)
    monkeypatch.setattr("fedjax_sim.runs.provenance.cores", lambda: 99)
    assert case_of().key["cores"] == 99


def test_a_measurement_takes_the_place_of_the_one_before_and_others_stay(path):
    case, other = case_of(), case_of(of(devices=1))
    calibration.keep(entry_of(other))
    calibration.keep(entry_of(case, wave_2=0.5))
    calibration.keep(entry_of(case, wave_1=0.5))
    assert calibration.find(case) == entry_of(case, wave_1=0.5)
    assert calibration.find(other) is not None
    assert len(json.loads(path.read_text())["entries"]) == 2
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    assert calibration.forget() == path and not path.exists() and calibration.forget() is None


def test_what_other_versions_measured_is_not_used_and_said(path):
    case = case_of()
    old = entry_of(case, wave_2=0.5)
    old["key"] = {**old["key"], "jaxlib": "0.1.0"}
    calibration.keep(old)
    with pytest.warns(UserWarning, match=r"is of jaxlib 0\.1\.0.*tune-machine"):
        assert calibration.find(case) is None
    calibration.keep(entry_of(case))  # takes its place
    assert len(json.loads(path.read_text())["entries"]) == 1


ENTRY = {"key": {}, "date": "2026-11-29", "timings": []}


def timing(**changes):
    one = {"layout": {"wave": 1, "conv": "auto"}, "seconds": 1.0, "ratios": [1.0], **changes}
    return {"version": 1, "entries": [{**ENTRY, "timings": [one]}]}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "\x00\xff",
        {"version": 2, "entries": []},
        {"version": 1},
        {"version": 1, "entries": [{"key": {}}]},
        {"version": 1, "entries": [{**ENTRY, "key": []}]},
        timing(ratios=[]),
        timing(ratios=["1"]),
        timing(seconds=float("nan")),
        timing(layout={"wave": 0, "conv": "auto"}),
        timing(layout={"wave": 1, "conv": "fast"}),
        timing(layout={"wave": 1}),
    ],
)
def test_a_file_that_cannot_be_read_is_ignored_and_said(path, content):
    case = case_of()
    path.parent.mkdir(parents=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.warns(UserWarning, match="cannot be read, and is not used"):
        assert calibration.find(case) is None
    with pytest.warns(UserWarning, match="cannot be read"):
        calibration.keep(entry_of(case))
    assert calibration.find(case) is not None


# --- the choice ---------------------------------------------------------------------------------------


def test_the_default_is_left_for_a_clear_margin_alone():
    case, default = case_of(), Layout(4, "patches")
    assert case.layouts[0] == default

    def chosen(**ratios):
        return calibration.judged(case, entry_of(case, **ratios))[0]

    assert chosen() == default
    assert chosen(wave_2=0.93) == default
    assert chosen(wave_2=0.91) == Layout(2, "patches")
    assert chosen(wave_2=0.8, wave_1=0.7) == Layout(1, "auto")
    assert chosen(wave_2=[0.5] * 5 + [1.1] * 1) == Layout(2, "patches")
    assert chosen(wave_2=[0.5] * 4 + [1.1] * 2) == default  # in a third of the turns it is slower
    assert chosen(wave_2=[0.5] * 3) == default  # it was seen too rarely


def test_lanes_that_wait_for_a_larger_client_count():
    """Of ten equal clients on two devices, a wave of 4 leaves three of eight places empty."""
    even = case_of(dataclasses.replace(CONFIG, cohort=fs.CohortConfig(size=10)))
    assert [even.work(wave) for wave in (1, 2, 4, 5)] == [10.0, 12.0, 16.0, 10.0]
    sizes = fs.PartitionConfig(kind="quantity", clients=10, sigma=1.5, min_size=5)
    epochs = fs.LocalConfig(epochs=1, batch_size=16)
    uneven = case_of(dataclasses.replace(CONFIG, partition=sizes, local=epochs))
    assert uneven.work(1) < uneven.work(2) < uneven.work(4)
    default = uneven.layouts[0]
    assert default.wave == 1  # as waiting costs more than starting more steps
    ratios = calibration.judged(uneven, entry_of(uneven, wave_2=0.5))[1]
    more = uneven.work(2) / uneven.work(default.wave)
    np.testing.assert_allclose(ratios[Layout(2, "patches")], 0.5 * more)


def test_a_measurement_of_another_default_is_not_taken():
    case, other = case_of(), case_of(dataclasses.replace(CONFIG, cohort=fs.CohortConfig(size=4)))
    assert calibration.judged(other, entry_of(case, wave_1=0.1)) == (other.layouts[0], {})


def test_it_is_measured_with_any_clock():
    now = [0.0]

    def make(layout):
        def run(steps):
            now[0] += steps * {1: 0.001, 2: 0.003, 4: 0.008}[layout.wave]

        return run

    case = case_of()
    entry = calibration.measured(case, 5.0, make, lambda: now[0])
    assert json.loads(json.dumps(entry)) == entry and entry["key"] == case.key
    assert calibration.judged(case, entry)[0] == Layout(1, "auto")


# --- runs ---------------------------------------------------------------------------------------------


def layout_of(folder):
    return json.loads((folder / "provenance.json").read_text())["layout"]


def test_a_run_takes_what_is_kept_and_records_it(path, tmp_path):
    plain = runs.run(into(tmp_path / "plain"))
    assert layout_of(tmp_path / "plain") == {
        **{"devices": 2, "wave": 4, "conv": "patches"},
        "calibration": None,
    }
    calibration.keep(entry_of(case_of(), wave_2=0.5))
    run = runs.run(into(tmp_path / "tuned"))
    assert run.config.execution.wave == 2
    found = layout_of(tmp_path / "tuned")
    assert found["wave"] == 2 and found["calibration"] == {
        **{"date": "2026-11-29", "of_its_time": 0.5, "default": {"wave": 4, "conv": "patches"}},
        "chosen": {"wave": 2, "conv": "patches"},
    }
    assert "wave: 2" in (tmp_path / "tuned" / "config.yaml").read_text()
    assert describe.differing(tmp_path / "tuned", into(tmp_path / "tuned")) == ()
    for one, other in zip(*(sorted(r.metrics, key=str) for r in (plain, run)), strict=True):
        assert one.value == pytest.approx(other.value, rel=1e-4), one


def test_a_default_that_was_found_best_is_left_open_and_recorded(path, tmp_path):
    calibration.keep(entry_of(case_of()))
    run = runs.run(into(tmp_path / "run"))
    assert run.config.execution.wave is None
    assert layout_of(tmp_path / "run")["calibration"]["chosen"] == {"wave": 4, "conv": "patches"}


def test_what_the_user_says_goes_before(path):
    calibration.keep(entry_of(case_of(), wave_2=0.5))

    def wave(config):
        return prepare(config, calibrated=True).wave

    assert wave(CONFIG) == 2 and prepare(CONFIG).wave == 4
    assert wave(of(wave=1)) == 1 and wave(of(wave=4)) == 4
    assert wave(of(calibration="ignore")) == 4
    assert prepare(of(debug=True), calibrated=True).config.execution == of(debug=True).execution
    assert fs.plan(CONFIG).parts != fs.plan(of(calibration="ignore")).parts
    with pytest.raises(UserError, match=r"execution\.calibration"):
        of(calibration="never")


def test_of_a_convolution_only_what_is_left_open_is_chosen(path):
    lenet = dataclasses.replace(CONFIG, model=fs.ModelConfig("mcmahan"))
    case = case_of(lenet)
    entry = entry_of(case)
    entry["timings"][case.layouts.index(Layout(1, "canonical"))]["ratios"] = [0.5] * step_times.LEAST
    calibration.keep(entry)
    setup = prepare(lenet, calibrated=True)
    assert (setup.wave, setup.model.conv, setup.config.execution.conv) == (1, "canonical", "canonical")
    assert prepare(of(lenet, conv="patches"), calibrated=True).model.conv == "patches"


class Crash(Exception):
    pass


@pytest.mark.parametrize("begun", ["by the default", "by a measurement"])
def test_a_run_that_is_resumed_keeps_its_layout_and_its_bits(path, tmp_path, monkeypatch, begun):
    case = case_of()
    if begun == "by a measurement":
        calibration.keep(entry_of(case, wave_2=0.5))
    whole = runs.run(into(tmp_path / "whole"))
    steps, waves = Simulation.steps, []

    def crash(self, most=None):
        if self.round == 2:
            raise Crash
        return steps(self, 1)

    def followed(self, most=None):
        waves.append(self.setup.wave)
        return steps(self, 1)

    monkeypatch.setattr(Simulation, "steps", crash)
    with pytest.raises(Crash):
        runs.run(into(tmp_path / "cut"))
    monkeypatch.setattr(Simulation, "steps", followed)
    calibration.keep(entry_of(case, wave_1=0.1))  # would be taken by a run that begins now
    told = layout_of(tmp_path / "cut")
    run = runs.resume(tmp_path / "cut")
    assert waves == [4, 4] if begun == "by the default" else [2, 2]
    assert layout_of(tmp_path / "cut") == told
    assert list(run.metrics) == list(whole.metrics)
    for one, other in zip(*(jax.tree.leaves(r.variables) for r in (run, whole)), strict=True):
        np.testing.assert_array_equal(one, other)
    assert runs.resume(tmp_path / "whole").config.execution.wave == (None if waves[0] == 4 else 2)


def test_nothing_is_measured_unless_a_run_asks(path, monkeypatch):
    made = []

    def measured(case):
        made.append(case)
        return entry_of(case, wave_1=0.5)

    monkeypatch.setattr(calibration, "measured", measured)
    assert prepare(CONFIG, calibrated=True).wave == 4 and not made
    asking = of(calibration="make")
    assert prepare(asking).wave == 4 and not made
    assert prepare(asking, calibrated=True).wave == 1 and len(made) == 1
    assert prepare(asking, calibrated=True).wave == 1 and len(made) == 1  # it is kept
    calibration.forget()
    case = case_of(asking)
    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr(hosts, "on_first", lambda action: action())
    assert calibration.applied(case) == (asking.execution, None) and len(made) == 1


def test_all_processes_take_what_the_first_has(path, monkeypatch):
    """Here is nothing, and in the first process something; and the other way round."""
    case = case_of()
    theirs = entry_of(case, wave_2=0.5)
    monkeypatch.setattr(hosts, "on_first", lambda action: theirs)
    assert calibration.applied(case)[0].wave == 2
    calibration.keep(entry_of(case, wave_1=0.5))
    monkeypatch.setattr(hosts, "on_first", lambda action: None)
    assert calibration.applied(case) == (CONFIG.execution, None)


def test_an_accelerators_table_stays_unless_a_run_asks(path, monkeypatch):
    case = case_of()
    calibration.keep(entry_of(case, wave_2=0.5))
    layouts = case.layouts  # those of the CPU that is here
    monkeypatch.setattr(placement, "platform_of", lambda mesh: "gpu")
    assert calibration.applied(case) == (CONFIG.execution, None)
    asking = dataclasses.replace(case, config=of(calibration="make"))
    asking.__dict__["layouts"] = layouts
    assert calibration.applied(asking)[0].wave == 2


# --- the command --------------------------------------------------------------------------------------


@pytest.fixture
def made_up(monkeypatch):
    """`tune-machine` with times that are made up, by layout and by number of devices."""

    def measured(case, seconds):
        entry = entry_of(case, wave_2=[0.6, 0.5, 0.5, 0.5, 0.5, 0.4])
        entry["timings"].pop()
        return entry

    monkeypatch.setattr(calibration, "measured", measured)
    monkeypatch.setattr(tuning, "_devices", lambda config, case: {1: (0.5,) * 6, 8: (1.5,) * 6})


FLAGS = [
    *("--partition.clients", "10", "--partition.kind", "iid", "--cohort.size", "8", "--rounds", "4"),
    *("--model.options", "{hidden: [8]}", "--local.epochs", "null", "--local.steps", "2"),
    *("--local.batch-size", "16", "--execution.devices", "2"),
]


def test_the_command_shows_what_was_found_and_keeps_it(path, made_up, capsys):
    assert commands.main(["tune-machine", *FLAGS]) == 0
    text = capsys.readouterr().out
    assert re.search(r"   4  patches +10\.000   1\.00 \(1\.00-1\.00\) +6 \(default\)", text)
    assert re.search(r"   2  patches +6\.000   0\.50 \(0\.40-0\.60\) +6 <- chosen", text)
    assert "1  auto       not measured" in text
    assert "execution.wave = 2, conv = patches" in text
    assert "1 CPU device(s): 0.50" in text and "Set JAX_NUM_CPU_DEVICES=1 before starting" in text
    assert f"kept in {path}" in text
    assert prepare(CONFIG, calibrated=True).wave == 2

    assert commands.main(["tune-machine", *FLAGS, "--json", "--no-devices", "--seconds", "1"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["chosen"] == {"wave": 2, "conv": "patches"} and told["devices"] == {}
    assert told["best_devices"] == 2 and told["file"] == str(path)

    assert commands.main(["tune-machine", "--forget"]) == 0
    assert str(path) in capsys.readouterr().out and not path.exists()
    assert commands.main(["tune-machine", "--forget"]) == 0
    assert "nothing is kept" in capsys.readouterr().out


@pytest.mark.parametrize("given", ["0", "soon", "-1"])
def test_a_time_that_is_none_is_a_mistake(path, made_up, capsys, given):
    assert commands.main(["tune-machine", *FLAGS, f"--seconds={given}"]) == 2
    assert "--seconds" in capsys.readouterr().err and not path.exists()


def test_several_processes_measure_nothing(path, made_up, monkeypatch):
    monkeypatch.setattr("jax.process_count", lambda: 2)
    with pytest.raises(UserError, match="tune-machine"):
        tuning.tune(CONFIG)


def test_other_numbers_of_devices_take_turns_with_this_one(monkeypatch, tmp_path):
    open_now, asked = [], []

    @contextlib.contextmanager
    def process(config, devices):
        assert config.is_file()
        open_now.append(devices)
        yield lambda: asked.append(devices) or 3.0 / devices
        open_now.remove(devices)

    monkeypatch.setattr(tuning, "_process", process)
    monkeypatch.setattr(tuning, "_timer", lambda case: lambda: asked.append(4) or 1.0)
    monkeypatch.setattr(placement, "cores", lambda: 12)
    monkeypatch.delenv("XLA_FLAGS")
    free = of(devices=None)
    case = case_of(free)
    found = tuning._devices(free, case)
    assert found == {1: (3.0,) * 6, 6: (0.5,) * 6, 12: (0.25,) * 6} and not open_now
    assert asked[:4] == asked[7:3:-1] and sorted(asked[:4]) == [1, 4, 6, 12]
    assert tuning._devices(CONFIG, case) == {}  # it says how many
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
    assert tuning._devices(free, case) == {}


def test_a_process_of_another_number_answers_each_line(monkeypatch, tmp_path, capsys):
    file = tmp_path / "config.yaml"
    file.write_text(config_lib.dump(CONFIG))
    monkeypatch.setattr(tuning, "_timer", lambda case: lambda: float(case.cohort_size))
    monkeypatch.setattr("sys.argv", ["-c", str(file)])
    monkeypatch.setattr("sys.stdin", io.StringIO("\n\n"))
    tuning.serve()
    assert capsys.readouterr().out == "8.0\n8.0\n"


def test_a_process_that_ends_without_an_answer_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.executable", "false")
    with (
        pytest.raises(UserError, match="ended without an answer"),
        tuning._process(tmp_path / "none.yaml", 3),
    ):
        pass
