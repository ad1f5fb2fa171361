"""What tyro is given, and what it prints: forms whose values are text as it was typed, and wrapped help."""

import contextlib
import inspect
import os
import re
import shutil
import sys
import textwrap
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fedjax_sim.core.errors import UserError

WIDEST = 100
"""Columns that help takes of a wider terminal."""

_ABOUT = "what-the-command-is-about"


class Typed(str):
    """A value as the user typed it."""


def as_yaml(text: str, path: str, fix: str) -> Any:
    """What a typed word is in YAML.

    Args:
      text: the word.
      path: the flag or field, for the message.
      fix: the way out, likewise.

    Raises:
      UserError: it is not valid YAML, or names a key twice.
    """
    from fedjax_sim.core.documents import parse_yaml

    try:
        return parse_yaml(text)
    except ValueError as error:
        raise UserError(path, text, f"it cannot be read: {error}", fix) from None


def field_texts(cls: type) -> dict[str, str]:
    """What the docstring's `Attributes:` says of each field."""
    doc = inspect.getdoc(cls) or ""
    part = re.search(r"Attributes:\n(.*?)(?:\n\S|\Z)", doc, re.DOTALL)
    texts: dict[str, str] = {}
    current: list[str] = []
    for line in (part[1] if part else "").splitlines():
        head = re.match(r"  (\w[\w, ]*): (.*)", line)
        if head:
            current = re.split(r",\s*", head[1])
            texts |= dict.fromkeys(current, head[2])
        else:
            texts |= {name: f"{texts[name]} {line.strip()}" for name in current}
    return texts


def as_typed(metavar: str, shown: Callable[[Any], str]) -> Any:
    """The rule of tyro for a value that is kept as text.

    Args:
      metavar: of the value, in help.
      shown: a default, in help.
    """
    import tyro

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: Typed(words[0]),
        is_instance=lambda value: True,
        str_from_instance=lambda value: [shown(value)],
    )


def filled(form: type, program: str, about: str, words: Sequence[str], needed: str = "") -> Any:
    """A form that tyro has filled; with `--help` it prints its help and raises SystemExit.

    Args:
      form: a dataclass.
      program: how the usage line begins.
      about: what the help says above the flags.
      words: the command line.
      needed: metavar of words that may not be left out; tyro takes any number of words for none, too.
    """
    import tyro

    asked = {"-h", "--help"} & set(words)
    with _wrapped(about, needed) if asked else contextlib.nullcontext():
        return tyro.cli(form, prog=program, description=_ABOUT, args=list(words))


@contextlib.contextmanager
def _wrapped(about: str, needed: str) -> Iterator[None]:
    """Help that is printed meanwhile is as wide as the terminal or 80, and `about` keeps its paragraphs."""
    given, before = os.environ.get("COLUMNS"), sys.stdout
    if given is None:
        columns = shutil.get_terminal_size().columns if before.isatty() else 80
        os.environ["COLUMNS"] = str(min(columns, WIDEST))
    sys.stdout = typing.cast(typing.TextIO, _Replacing(before, paragraphs(about), needed))
    try:
        yield
    finally:
        sys.stdout = before
        if given is None:
            os.environ.pop("COLUMNS", None)


class _Replacing:
    """A stream on which the mark in tyro's help becomes the text that it stands for."""

    def __init__(self, stream: typing.TextIO, text: str, needed: str):
        self._stream, self._text, self._needed = stream, text, needed

    def write(self, text: str) -> int:
        """See TextIO."""
        if self._needed:
            text = text.replace(f"[{self._needed}]  ", f"{self._needed}    ")
            text = text.replace(f"[{self._needed}]", self._needed)
        return self._stream.write(text.replace(_ABOUT, self._text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def paragraphs(text: str) -> str:
    """A docstring's text, wrapped for the terminal; lines that begin with a dash are a list."""
    width = min(shutil.get_terminal_size().columns, WIDEST)
    wrapped = []
    for part in text.split("\n\n"):
        lines = re.split(r"\n(?=- )", part)
        wrapped.append("\n".join(_folded(" ".join(line.split()), width) for line in lines))
    return "\n\n".join(wrapped)


def _folded(line: str, width: int) -> str:
    indent = "  " if line.startswith("- ") else ""
    return textwrap.fill(line, width, subsequent_indent=indent, break_on_hyphens=False)
