"""The page `reference/commands.md`: every command's help, as the command line prints it.

Nothing of the command line's inside is used: a command is a word that `fedjax-sim --help` begins a line with
and that has a help of its own.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from unittest import mock

WIDTH = 100
_INTRO = """# Commands

What the command line says of itself. Every command takes `--help`, and ends with 0 if all went well, 2
after a mistake of the user's, 130 and 143 when SIGINT and SIGTERM cut it short, else 1. Fields of a run
are flags of `run`, `plan` and `tune-machine`: the [configuration](configuration.md) says what each
means.
"""


def said(*words: str) -> str | None:
    """What the command line prints on standard output; None if it ends with anything but 0."""
    from fedjax_sim import cli

    out, code = io.StringIO(), 0
    plain = {"COLUMNS": str(WIDTH), "NO_COLOR": "1", "TERM": "dumb"}
    quiet = contextlib.redirect_stderr(io.StringIO())
    with mock.patch.dict(os.environ, plain), contextlib.redirect_stdout(out), quiet:
        try:
            code = cli.main(list(words))
        except SystemExit as end:
            code = end.code
    return _plain(out.getvalue()) if not code else None


def commands() -> dict[str, str]:
    """Name -> help of each command, in the order of `fedjax-sim --help`."""
    found: dict[str, str] = {}
    for name in dict.fromkeys(
        re.findall(r"^[\s│|]*([a-z][a-z-]+)(?=\s)", said("--help") or "", re.MULTILINE)
    ):
        text = said(name, "--help")
        if text is not None and re.search(rf"usage: fedjax-sim {name}\b", text):
            found[name] = text
    return found


def page() -> str:
    """The page's Markdown."""
    out = [_INTRO, "## fedjax-sim { #fedjax-sim }", "", _block(said("--help") or ""), ""]
    for name, text in commands().items():
        out += [f"## {name} {{ #{name} }}", "", _block(text), ""]
    return "\n".join(out)


def _block(text: str) -> str:
    return f"```text\n{text.strip()}\n```"


def _plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("```", "'''")
