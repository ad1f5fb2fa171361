"""What the documents say can be done as it stands: examples, commands, flags, files and links.

Pages of the site are followed by tests/site, which also checks their links: here are the documents beside
it, and what holds for the text of all of them.
"""

import dataclasses
import re
from pathlib import Path
from unittest import mock

import jax
import pytest

from fedjax_sim import RunConfig

ROOT = Path(__file__).parents[1]
BESIDE = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES = [*BESIDE, *sorted((ROOT / "docs").rglob("*.md"))]
LINKED = [
    *BESIDE,
    *sorted((ROOT / "experiments").glob("*/README.md")),
    *sorted(ROOT.glob("scripts/*/README.md")),
]
TEXT = "\n".join(page.read_text() for page in PAGES).replace("\\\n", " ")


def blocks(language):
    """The code of every fenced block in a language, of documents beside the site."""
    found = []
    for page in BESIDE:
        for code in re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL):
            found.append(pytest.param(code, id=f"{page.stem}{len(found)}"))
    return found


@pytest.mark.parametrize("code", blocks("python"))
def test_example_runs(code):
    """On a machine with one device, for which less is compiled."""
    scope = {"__name__": "__main__"}
    with mock.patch.object(jax, "devices", return_value=jax.devices()[:1]):
        exec(compile(code, "example", "exec"), scope)
    assert scope["run"].finished


def test_commands_exist(capsys):
    from fedjax_sim import cli

    assert cli.main(["--help"]) == 0
    told = capsys.readouterr().out
    commands = set(re.findall(r"^fedjax-sim ([\w-]+)", TEXT, flags=re.MULTILINE))
    assert {"run", "resume", "sweep", "peel", "inertia", "landscape", "compare"} <= commands
    for command in commands:
        assert f"\n  {command} " in told


def test_flags_of_commands_exist():
    """Of every `fedjax-sim run` and `plan`, whatever file it starts from."""
    from fedjax_sim.cli import flags

    lines = re.findall(r"^fedjax-sim (?:run|plan) ([^#>\n]*)", TEXT, flags=re.MULTILINE)
    lines = [line.split("--join ")[0] for line in lines]  # what follows is for the process, not for the run
    # A page's own class is imported where the page is followed, by tests/site.
    lines = [line for line in lines if not re.search(r"\b\w+:[A-Z]", line)]
    asked = [[word for word in line.split() if not word.endswith(".yaml")] for line in lines]
    assert any("--peel.chimeras" in words for words in asked)
    switches = dict.fromkeys(("print-config", "exact", "json", "on=MACHINE", "together=S"), "")
    for words in asked:
        flags.parse(words, "run", "", switches)


def test_flags_in_sentences_exist():
    """Those of a section, `--partition.local-test`; an algorithm's and a launcher's own go by their names."""
    named = set(re.findall(r"--(?!algorithm|launcher)([a-z]+\.[a-z_-]+)", TEXT))
    assert {"peel.every", "initial.pretrain", "evaluation.per-client"} <= named
    sections = {field.name: type(getattr(RunConfig(), field.name)) for field in dataclasses.fields(RunConfig)}
    for section, field in (name.split(".") for name in named):
        fields = {one.name for one in dataclasses.fields(sections[section])}
        assert field.replace("-", "_") in fields, f"--{section}.{field}"


def test_files_that_are_named_exist():
    """In backquotes, from the root: `fedjax_sim/core/top_k.py`, `scripts/test.sh`."""
    named = set(re.findall(r"`((?:fedjax_sim|scripts|experiments|notebooks|tests|docs)/[\w./-]*)`", TEXT))
    assert len(named) > 5
    for name in named:
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        if path.startswith(("https://", "http://", "mailto:")):
            continue
        place = (page.parent / path) if path else page
        assert place.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", place.read_text(), flags=re.MULTILINE)
            assert anchor in {_slug(heading) for heading in headings}, target


def _slug(heading):
    """A heading's anchor, as repositories' pages make it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
