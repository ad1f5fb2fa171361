"""The README's examples run as they stand."""

import re
from pathlib import Path

import pytest

TEXT = (Path(__file__).parents[1] / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.mark.parametrize("code", EXAMPLES, ids=[f"example{n}" for n in range(len(EXAMPLES))])
def test_example_runs(code):
    scope = {"__name__": "__main__"}
    exec(compile(code, "README.md", "exec"), scope)
    assert scope["run"].finished


def test_commands_exist(capsys):
    from fedjax_sim.cli import commands

    assert commands.main(["--help"]) == 0
    told = capsys.readouterr().out
    for command in set(re.findall(r"^fedjax-sim (\w+)", TEXT, flags=re.MULTILINE)):
        assert f"\n  {command} " in told


def test_flags_exist():
    """Of every `fedjax-sim run` and `plan`, whatever file it starts from."""
    from fedjax_sim.cli import flags

    lines = re.findall(r"^fedjax-sim (?:run|plan) ([^#>\n]*)", TEXT, flags=re.MULTILINE)
    lines = [line.split("--join ")[0] for line in lines]  # what follows is for the process, not for the run
    asked = [[word for word in line.split() if not word.endswith(".yaml")] for line in lines]
    assert any("--peel.chimeras" in words for words in asked)
    for words in asked:
        flags.parse(words, "run", "", {"print-config": ""})
