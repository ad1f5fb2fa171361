"""Every command is a dataclass with examples that can be typed, and help that reads at 80 columns."""

import dataclasses
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fedjax_sim.cli import commands, flags, forms, looking, options, overview, sweeping
from fedjax_sim.core.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
NAMES = list(overview.COMMANDS)


def test_the_overview_fits_on_one_screen(capsys):
    assert commands.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 26 and max(map(len, lines)) <= 80
    for name in NAMES:
        assert any(line.startswith(f"  {name} ") for line in lines)
    assert commands.main([]) == 2


@pytest.mark.parametrize("name", NAMES)
def test_help_is_no_wider_than_a_page_and_ends_with_examples(name, monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert commands.main([name, "--help"]) == 0
    text = capsys.readouterr().out
    told, examples = text.split("\nexamples:\n")
    usage, *lines = told.splitlines()
    assert usage.startswith(f"usage: fedjax-sim {name} ")
    assert max(map(len, lines)) <= 80
    command = commands.command_of(name)
    for option in options.options_of(command):
        assert option.text and option.flag in told
    for line, _ in command.examples:
        assert line in examples


@pytest.mark.parametrize("name", NAMES)
def test_examples_are_read_as_they_stand(name):
    """But for files and folders, which are not there."""
    examples = commands.command_of(name).examples
    assert examples
    for line, meant in examples:
        assert meant
        words = shlex.split(re.sub(r"^source <\((.*)\)$", r"\1", line))
        words = words[: next((i for i, word in enumerate(words) if word in ("|", ">")), None)]
        assert words.pop(0) == "fedjax-sim"
        asked = words.pop(0)
        command = commands.command_of(asked)
        if overview.COMMANDS[asked].configured:
            words = [word for word in words if not word.endswith(".yaml")]
        made = options.parse(command, words, asked)
        assert dataclasses.is_dataclass(made) and type(made) is command


@dataclasses.dataclass(frozen=True)
class Made:
    """Something.

    More of it.

    Attributes:
      given: some words
      many: a number
      part: a share
      go: whether
      rest: of others
    """

    examples = ()
    given: tuple[str, ...] = options.words("FILE …", least=1)
    many: int = options.value("N", 3)
    part: float | None = options.value("SHARE", flag="--one.part")
    go: bool = options.switch()
    rest: dict = options.rest("--of.")  # noqa: RUF009
    line: tuple[str, ...] = options.line()


@pytest.mark.parametrize(
    ("line", "made"),
    [
        ("a", Made(("a",))),
        ("a b --many 5 c", Made(("a", "b", "c"), 5)),
        ("--many=1_000 a --go", Made(("a",), 1000, None, True)),
        ("a --many -2", Made(("a",), -2)),
        (
            "a --one.part .5 --of.some-thing x --of.other=y",
            Made(("a",), 3, 0.5, False, {"some_thing": "x", "other": "y"}),
        ),
        ("a --many 1 --many 2", Made(("a",), 2)),
    ],
)
def test_a_line_becomes_a_command(line, made):
    assert options.parse(Made, line.split(), "made") == dataclasses.replace(made, line=tuple(line.split()))


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("", "made = '': it takes a FILE"),
        ("a --mani 3", "--mani = '3': made has no such flag. Did you mean --many?"),
        ("a --zzz", "made has no such flag. See --help; there are --many, --one.part, --go."),
        ("a --many", "--many = None: its value is missing. Write fedjax-sim made FILE …"),
        ("a --many --go", "--many = None: its value is missing"),
        ("a --many x", "--many = 'x': a whole number"),
        ("a --one.part y", "--one.part = 'y'"),
        ("a --go=1", "--go = '1': this flag takes no value"),
        ("a --of.x", "--of.x = None: its value is missing"),
    ],
)
def test_a_mistake_names_the_flag_and_the_way_out(line, told):
    with pytest.raises(UserError, match=re.escape(told)):
        options.parse(Made, line.split(), "made")


def test_the_settings_of_a_landscape_are_those_of_its_measurement():
    from fedjax_sim.reports.landscape.measurement import Settings

    made = looking.Landscape()
    assert {one.name: getattr(made, one.name) for one in dataclasses.fields(Settings)} == vars(Settings())


def test_the_launchers_fields_are_in_the_help():
    from fedjax_sim.studies import launchers

    told = options.about(sweeping.Sweep)
    for kind in launchers.LAUNCHERS.values():
        for field in dataclasses.fields(kind):
            assert field.name.replace("_", "-") in told


def test_paragraphs_are_wrapped_and_lists_stay_lists(monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    text = forms.paragraphs("One\ntwo three four five six seven eight.\n\n- a: b\n- c: d")
    assert text == "One two three four five six\nseven eight.\n\n- a: b\n- c: d"


@pytest.mark.parametrize(
    ("words", "light"),
    [
        ([], True),
        (["--help"], True),
        (["--version"], True),
        (["doctor", "--json"], True),
        (["new", "method", "x"], True),
        (["sweep", "--help"], True),
        (["nonsense"], True),
        (["run", "--help"], False),
        (["sweep", "a.yaml"], False),
        (["list"], False),
        (["--join", "auto", "run"], False),
        (["completion", "bash"], False),
    ],
)
def test_what_needs_no_jax_does_not_load_it(words, light):
    assert overview.light(words) is light


def test_a_program_that_is_not_the_command_line_loads_all(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/some.py", "--help"])
    assert not overview.light()
    monkeypatch.setattr(sys, "argv", ["/usr/bin/fedjax-sim", "--help"])
    assert overview.light()
    monkeypatch.setattr(sys, "argv", ["-m", "--help"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "pytest", "--help"])
    assert not overview.light()
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "fedjax_sim.cli", "--help"])
    assert overview.light()


HEAVY = """
import sys
sys.argv = ["fedjax-sim", *sys.argv[1:]]
from fedjax_sim.cli import main
status = main()
print(sorted({"jax", "numpy", "flax", "tyro", "matplotlib"} & set(sys.modules)), file=sys.stderr)
sys.exit(status)
"""


@pytest.mark.parametrize(
    ("words", "loaded"),
    [(["--help"], "[]"), (["--version"], "[]"), (["sweep", "--help"], "['tyro']"), (["swep"], "[]")],
)
def test_help_starts_without_jax(words, loaded):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", HEAVY, *words], capture_output=True, text=True, env=environment
    )
    assert done.stderr.splitlines()[-1] == loaded


def test_numbers_of_a_configuration_s_help_stay_with_it(capsys):
    """`plan` shows its own switches as flags beside those of a configuration."""
    assert commands.main(["plan", "--help", "all"]) == 0
    text = capsys.readouterr().out
    for told in ("--on MACHINE", "--exact", "--together S", "--json", "--local.lr FLOAT"):
        assert told in text
    config, chosen = flags.parse(["--exact", "--seed", "3"], "plan", "", {"exact": "", "on=MACHINE": ""})
    assert config.seed == 3 and chosen == {"exact": ""}
