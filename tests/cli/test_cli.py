import dataclasses
import os
import re
import sys

import pytest
import yaml

from fedjax_sim import algorithms, runs
from fedjax_sim import config as config_lib
from fedjax_sim.algorithms import LIPS, FedMR
from fedjax_sim.cli import commands, flags, listing, output
from fedjax_sim.config import RunConfig
from fedjax_sim.core.errors import UserError

TINY = [
    *("--partition.clients", "8", "--partition.kind", "iid", "--cohort.size", "4", "--rounds", "2"),
    *("--model.options", "{hidden: [8]}", "--local.epochs", "null", "--local.steps", "2"),
    *("--execution.devices", "1"),
    *("--output.no-progress", "--output.no-figures", "--output.no-tensorboard"),
]


def parsed(*words):
    return flags.parse(words, "run", "Runs.")[0]


@pytest.mark.smoke
def test_no_flags_is_the_default():
    assert parsed() == RunConfig()


def test_flags_reach_every_kind_of_field():
    made = parsed(
        *("--seed", "3", "--local.lr", "1e-2", "--local.momentum=0.5", "--partition.clients", "null"),
        *("--partition.kind", "natural", "--model.norm", "none", "--model.options", "{hidden: [64, 32]}"),
        *("--output.no-tensorboard", "--evaluation.per-client", "--output.dir", "1", "--cohort.size", "5"),
    )
    assert made.seed == 3 and made.local.lr == 0.01 and made.local.momentum == 0.5
    assert made.partition.clients is None and made.model.norm == "none"
    assert made.model.options == {"hidden": [64, 32]}
    assert made.output.tensorboard is False and made.evaluation.per_client is True
    assert made.output.dir == "1" and made.cohort.size == 5


def test_every_field_of_every_algorithm_has_a_flag():
    for name, cls in algorithms.CONFIGS.items():
        words = []
        for field in dataclasses.fields(cls):
            value = getattr(cls(), field.name)
            if isinstance(value, bool):
                words.append(f"--algorithm.{field.name.replace('_', '-')}")
            elif isinstance(value, int | float | str):
                words += [f"--algorithm.{field.name.replace('_', '-')}", str(value)]
        made = parsed("--algorithm", name, *words).algorithm
        assert type(made) is cls
        for field in dataclasses.fields(cls):
            if not isinstance(getattr(cls(), field.name), bool):
                assert getattr(made, field.name) == getattr(cls(), field.name)


def test_the_file_gives_defaults_and_flags_override(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "rounds: 7\nseed: 2\nalgorithm: {name: fedmr, first_stage: 3}\nlocal: {lr: 0.5, epochs: 2}\n"
    )
    made = parsed(str(path), "--seed", "9", "--algorithm.similarity-group", "7")
    assert (made.rounds, made.seed, made.local.lr, made.local.epochs) == (7, 9, 0.5, 2)
    assert made.algorithm == algorithms.CONFIGS["fedmr"](first_stage=3, similarity_group=7)
    assert parsed(str(path), "--algorithm", "fedmr").algorithm.first_stage == 3
    assert type(parsed(str(path), "--algorithm=fedavg").algorithm) is algorithms.CONFIGS["fedavg"]


def test_print_config_gives_yaml_that_reads_back(tmp_path, capsys):
    assert commands.main(["run", "--algorithm", "fedmr", *TINY, "--print-config"]) == 0
    text = capsys.readouterr().out
    unset = {"observers", "meters", "callbacks"}  # lists that are written where something is in them
    assert set(yaml.safe_load(text)) == {f.name for f in dataclasses.fields(RunConfig)} - unset
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert config_lib.read_config(path) == parsed("--algorithm", "fedmr", *TINY)


@pytest.mark.smoke
def test_help_lists_flags_with_what_they_mean(capsys):
    assert commands.main(["run", "--algorithm", "fedmr", "--help", "all"]) == 0
    text = capsys.readouterr().out
    for told in (
        "--algorithm.first-stage",
        "--partition.alpha",
        "--local.lr",
        "learning rate in round 0",
        "--print-config",
    ):
        assert told in text
    assert commands.main(["--help"]) == 0 and "sweep" in capsys.readouterr().out
    assert commands.main(["resume", "--help"]) == 0 and "FOLDER" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told", "untold"),
    [
        (["--help"], ["- partition: which client", "--seed", "--print-config"], ["--local.lr", "--given"]),
        (["-h", "local"], ["--local.lr", "--print-config"], ["- partition:", "--rounds", "--algorithm."]),
        (["--help", "algorithm", "--algorithm", "lips"], ["--algorithm.inner", "lips"], ["--local.lr"]),
        (["--algorithm", "fedmr", "--help"], ["--algorithm.first-stage"], ["--local.lr"]),
        (["--help", "all", "--local.lr", "0.7"], ["--local.lr", "--peel.every"], ["--given", "- partition:"]),
    ],
)
def test_help_is_of_one_section_or_of_all(words, told, untold, capsys):
    assert commands.main(["run", *words]) == 0
    text = capsys.readouterr().out
    assert all(part in text for part in told) and not any(part in text for part in untold)


def test_help_of_a_section_that_is_none(capsys):
    assert commands.main(["run", "--help", "cohrt"]) == 2
    assert (
        capsys.readouterr().err == "error: --help = 'cohrt': there is no such section. Did you mean cohort?\n"
    )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--local.lrr", "1"], "--local.lr"),
        (["--algorithm", "fedmr", "--algorithm.first-stag", "1"], "--algorithm.first-stage"),
        (["--algorithm.first-stage", "1"], "--algorithm.first-stage"),
        (["--algorithm", "fedmrr"], "fedmr"),
        (["--local.lr", "fast"], "local.lr"),
        (["--rounds", "1.5"], "rounds"),
        (["--local.lr"], "value"),
        (["--lr", "0.1"], "Did you mean --local.lr?"),
        (["--momentun=0.9"], "Did you mean --local.momentum?"),
        (["--model", "lenet"], "Did you mean --model.name?"),
        (["--data=digits"], "Did you mean --data.source or --execution.data?"),
        (["--partition", "iid"], "Did you mean --partition.kind?"),
        (["--batch_size", "3"], "--local.batch-size"),
        (["--local.learning_rate", "1"], "Did you mean --local.lr?"),
        (["--clients", "8"], "Did you mean --partition.clients or "),
        (["--algorithm", "fedprox", "--algorithm.rho", "1"], "The algorithm that is chosen has distance, "),
        (["--algorithm", "fedmr", "--algorithm.first-stag", "1"], "Did you mean --algorithm.first-stage?"),
        (["--helpp"], "Did you mean --help?"),
        (["--zzz"], "See --help"),
        (["lonely.yaml"], "no such file"),
        (["--seed", "1", "stray"], "stray"),
        (["--seed", "1:30"], "seed = '1:30'"),
        (["--seed", "yes"], "seed = 'yes'"),
        (["--rounds", "1e3"], "Write 1000"),
        (["--model.options", "{hidden: [3], hidden: [4]}"], "the key 'hidden' is there twice"),
        (["--model.options", "{hidden: [3"], "model.options = '{hidden: [3': it cannot be read"),
        (["--local.optimizer", "adam", "--local.options", "{b1:0.9}"], "Write b1: 0.9"),
    ],
)
def test_a_wrong_flag_names_itself_and_the_way_out(words, told):
    with pytest.raises(UserError, match=re.escape(told)):
        parsed(*words)


@pytest.mark.parametrize(
    ("typed", "seed"), [("010", 10), ("0x10", 16), ("0o10", 8), ("1_000", 1000), ("08", 8)]
)
def test_whole_numbers_in_other_spellings(typed, seed):
    assert parsed("--seed", typed).seed == seed


@pytest.mark.smoke
def test_list_names_everything(capsys):
    assert commands.main(["list"]) == 0
    text = capsys.readouterr().out
    for told in (
        *algorithms.CONFIGS,
        "first-stage 0",
        "resnet20",
        "cifar10",
        "digits",
        "dirichlet-classes",
        "idx:PATH",
    ):
        assert told in text
    from fedjax_sim import data

    assert set(listing.PARTITIONS) == set(data.KINDS)


def test_a_run_that_keeps_nothing_says_so_before_it_starts(monkeypatch, capsys, tmp_path):
    begun, steps = [], runs.federation.Simulation.steps

    def followed(self, most=None):
        begun.append(capsys.readouterr().out)
        return steps(self, most)

    monkeypatch.setattr(runs.federation.Simulation, "steps", followed)
    assert commands.main(["run", *TINY]) == 0
    assert "nothing of this run is kept. Set --output.dir" in begun[0]
    assert not any("nothing of this run" in told for told in begun[1:])
    begun.clear()
    capsys.readouterr()
    assert commands.main(["run", *TINY, "--output.dir", str(tmp_path / "there")]) == 0
    assert begun[0] == ""


@pytest.mark.smoke
def test_run_then_resume_then_refuse(tmp_path, capsys):
    folder = str(tmp_path / "run")
    assert commands.main(["run", *TINY, "--output.dir", folder]) == 0
    assert folder in capsys.readouterr().out
    assert runs.load(folder).finished
    assert commands.main(["resume", folder]) == 0
    assert commands.main(["resume", folder, "--rounds", "many"]) == 2
    assert "--rounds" in capsys.readouterr().err
    more = runs.load(folder).rounds + 1
    assert commands.main(["resume", folder, f"--rounds={more}"]) == 0
    assert runs.load(folder).finished and runs.load(folder).rounds == more
    capsys.readouterr()
    assert commands.main(["run", *TINY, "--output.dir", folder]) == 2
    assert capsys.readouterr().err.startswith("error: output.dir")


def test_peel_passes_on_what_was_asked(monkeypatch, capsys):
    asked = []

    def draw(given, out, *, round_index, accuracy, reference, figures, tell):
        asked.append((given, out, round_index, accuracy, reference, figures))
        tell("wrote it")

    monkeypatch.setattr("fedjax_sim.reports.peel.report.draw", draw)
    assert commands.main(["peel", "a", "b", "--out", "c", "--round=5"]) == 0
    assert commands.main(["peel", "a.yaml", "--at-accuracy", "0.5"]) == 0
    assert commands.main(["peel", "a", "b", "--only", "overview", "--reference", "A"]) == 0
    one, two = ["a", "b"], "a.yaml"
    assert asked == [
        (one, "c", 5, None, None, True),
        (two, None, None, 0.5, None, True),
        (one, None, None, None, "A", False),
    ]
    assert capsys.readouterr().out == "wrote it\n" * 3
    assert commands.main(["peel", "--help"]) == 0 and "--out DIR" in capsys.readouterr().out
    for words, told in (
        (["a", "--outt", "b"], "--outt"),
        (["a", "--out"], "--out"),
        (["a", "--round", "last"], "--round"),
        (["a", "--at-accuracy", "high"], "--at-accuracy"),
        (["a", "--only", "tables"], "--only"),
    ):
        assert commands.main(["peel", *words]) == 2 and told in capsys.readouterr().err
    assert len(asked) == 3


def test_peel_of_nothing_says_so(tmp_path, capsys):
    assert commands.main(["run", *TINY, "--output.dir", str(tmp_path / "plain")]) == 0
    capsys.readouterr()
    for words, told in (
        ([], "no run to look at"),
        ([str(tmp_path / "plain")], "--peel.every"),
        ([str(tmp_path)], "holds no run"),
    ):
        assert commands.main(["peel", *words]) == 2
        assert told in capsys.readouterr().err


def test_plan_prints_parts_and_a_verdict(capsys):
    assert commands.main(["plan", "--algorithm", "fedmr", *TINY]) == 0
    text = capsys.readouterr().out
    assert "server: slots (4 models)" in text and "it fits" in text


def test_a_memory_that_is_too_small_is_said_with_status_1(capsys, monkeypatch):
    monkeypatch.setattr("fedjax_sim.runs.plan.available", lambda platform: 1000)
    assert commands.main(["plan", *TINY]) == 1
    assert "does NOT fit" in capsys.readouterr().out


def test_status_of_signals(monkeypatch, capsys):
    def stop(error):
        def command(name, words):
            raise error

        return command

    monkeypatch.setattr(commands, "perform", stop(KeyboardInterrupt()))
    assert commands.main(["list"]) == 130
    monkeypatch.setattr(commands, "perform", stop(SystemExit(143)))
    assert commands.main(["list"]) == 143


def test_the_algorithm_inside_another_has_flags_too():
    words = (
        "--algorithm lips --algorithm.inner fedmr --algorithm.inner.granularity module --algorithm.period=3"
    )
    config, _ = flags.parse(words.split(), "run", "")
    assert config.algorithm == LIPS(inner=FedMR(granularity="module"), period=3)
    with pytest.raises(UserError, match=r"algorithm\.inner.*no such field"):
        flags.parse(["--algorithm", "fedavg", "--algorithm.inner", "fedmr"], "run", "")
    with pytest.raises(UserError, match="no such algorithm"):
        flags.parse(["--algorithm", "lips", "--algorithm.inner", "fedmx"], "run", "")
    with pytest.raises(UserError, match=r"algorithm\.inner\.partition = 2\.0: lies outside"):
        flags.parse(
            ["--algorithm", "lips", "--algorithm.inner", "fedmr", "--algorithm.inner.partition", "2"],
            "run",
            "",
        )


def test_a_switch_with_a_value_is_told_how_it_is_written(capsys):
    for words in (["--algorithm.similarity", "false"], ["--algorithm.similarity=false"]):
        assert commands.main(["run", "--algorithm", "fedmr", *words]) == 2
        assert "Write --algorithm.similarity or --algorithm.no-similarity." in capsys.readouterr().err


def test_the_list_spells_settings_as_flags_take_them(capsys):
    assert commands.main(["list"]) == 0
    told = capsys.readouterr().out
    assert "similarity true" in told and "leaves []" in told and "None" not in told and "none" not in told
    assert parsed("--algorithm", "partial", "--algorithm.first", "null", "--algorithm.last", "1")


def test_the_filter_of_the_compiler_s_noise_leaves_our_own_words_and_the_terminal_alone(capfd, monkeypatch):
    noise = "cpu_aot_loader: feature +prefer-no-gather"
    monkeypatch.setattr("sys.__stderr__", sys.stderr)
    before = sys.stderr
    with output.without_loader_noise():
        os.write(2, f"{noise} of C++\nheard\n".encode())
        print(f"{noise} of Python", file=sys.stderr, end="\r")
        assert os.fstat(sys.stderr.fileno()) != os.fstat(2)
    assert sys.stderr is before
    told = capfd.readouterr().err
    assert "of Python\r" in told and "heard\n" in told and "of C++" not in told
