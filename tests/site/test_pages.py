"""Every code block of the site's pages works: each page is followed from its top, in a fresh folder.

- ``` ```python ``` is executed, in one scope for the whole page.
- A block with `title="FILE"` is written to that file.
- ``` ```bash ```: each command is run; `fedjax-sim …` in this process, `python FILE` likewise.
- ``` ```yaml ``` without a title has fields of a run's or a sweep's configuration.
- ``` ```console ``` and ``` ```text ``` are for other machines and for what is printed: not executed.
"""

import contextlib
import dataclasses
import io
import re
import runpy
import shlex
import sys
from pathlib import Path
from unittest import mock

import jax
import pytest
import yaml

from fedjax_sim import RunConfig
from fedjax_sim.config import search_files, sweep_files

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
FENCE = re.compile(r"^( *)```(\w+)([^\n]*)\n(.*?)^\1```", flags=re.MULTILINE | re.DOTALL)
LANGUAGES = {"python", "bash", "yaml", "console", "text", "bibtex", "json", "toml"}
SLOW = {"gallery.md", "tutorials/paper-figure.md"}
"""Pages whose examples take longer than the default run should."""


def blocks(page):
    """(language, title or "", code) of a page's blocks, in order."""
    for indent, language, rest, code in FENCE.findall(page.read_text()):
        title = re.search(r'title="([^"]+)"', rest)
        lines = [line.removeprefix(indent) for line in code.splitlines()]
        yield language, title[1] if title else "", "\n".join(lines) + "\n"


def pages():
    """Those with something to execute."""
    for page in sorted(DOCS.rglob("*.md")):
        name = str(page.relative_to(DOCS))
        if any(language in ("python", "bash") for language, _, _ in blocks(page)):
            yield pytest.param(page, id=name, marks=[pytest.mark.slow] if name in SLOW else [])


def commands_of(code):
    """A block's commands, without comments and with continued lines joined."""
    lines = code.replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [line for line in words if line]


def command(words):
    """Runs one command line."""
    from fedjax_sim import cli

    target = None
    if ">" in words:
        at = words.index(">")
        words, target = words[:at], words[at + 1]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        if words[0] == "fedjax-sim":
            assert cli.main(words[1:]) == 0, words
        elif words[0] == "python" and words[1].endswith(".py"):
            with mock.patch.object(sys, "argv", words[1:]):
                runpy.run_path(words[1], run_name="__main__")
        else:
            raise AssertionError(f"not to be executed here; is it a console block? {words}")
    if target is not None:
        Path(target).write_text(out.getvalue())


@pytest.mark.parametrize("page", list(pages()))
def test_page_works(page, tmp_path, monkeypatch):
    """On a machine with one device, for which less is compiled."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    known, scope = set(sys.modules), {"__name__": "__main__"}
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    try:
        with mock.patch.object(jax, "devices", return_value=jax.devices()[:1]):
            for language, title, code in blocks(page):
                if title:
                    (tmp_path / title).parent.mkdir(parents=True, exist_ok=True)
                    (tmp_path / title).write_text(code)
                elif language == "python":
                    exec(compile(code, str(page), "exec"), scope)
                elif language == "bash":
                    for words in commands_of(code):
                        command(words)
    finally:
        for name in set(sys.modules) - known:
            if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
                del sys.modules[name]


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: str(page.relative_to(DOCS)))
def test_blocks_are_of_known_kinds(page):
    configuration = {field.name for field in dataclasses.fields(RunConfig)}
    studies = {*sweep_files._FIELDS, *search_files._FIELDS}
    for language, title, code in blocks(page):
        assert language in LANGUAGES, language
        if language == "yaml":
            fields = set(yaml.safe_load(code))
            assert title or fields <= configuration or fields <= studies, fields
