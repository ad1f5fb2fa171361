"""What makers of pages share: docstrings as Markdown, types in words."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[2]
MARKS = "FOUND", "INFERRED", "OUR CHOICE", "NOT FOUND"
"""Where a formula comes from; CONTRIBUTING.md says what each means."""


def of_file(name: str) -> str:
    """A file of the repository, as it is."""
    return (ROOT / name).read_text(encoding="utf-8")


# --- docstrings as Markdown ---------------------------------------------------------------------------


def attributes(cls: type) -> dict[str, str]:
    """Field -> what the docstring's `Attributes:` says of it, on one line."""
    doc = inspect.getdoc(cls) or ""
    part = re.search(r"^Attributes:\n(.*?)(?=^\S|\Z)", doc, flags=re.DOTALL | re.MULTILINE)
    texts: dict[str, str] = {}
    current: list[str] = []
    for line in (part[1] if part else "").splitlines():
        head = re.match(r"  (\w+(?:, \w+)*): ?(.*)", line)
        if head:
            current = head[1].split(", ")
            texts |= dict.fromkeys(current, head[2])
        else:
            texts |= {name: f"{texts[name]} {line.strip()}".strip() for name in current}
    return texts


def about(cls: type) -> str:
    """What stands in a class's docstring before its sections, as Markdown."""
    doc = inspect.getdoc(cls) or ""
    return markdown(re.split(r"^(?:Attributes|Raises|Args):", doc, maxsplit=1, flags=re.MULTILINE)[0])


def markdown(doc: str) -> str:
    """A docstring as Markdown: indented formulas as code, the marks of `MARKS` set apart."""
    parts = re.split(r"\n\s*\n", doc.strip())
    out: list[str] = []
    for part in parts:
        code = part.startswith("    ")
        if code and out and out[-1].startswith("```"):
            out[-1] = out[-1].removesuffix("\n```") + "\n\n" + _dedented(part) + "\n```"
        elif code:
            out.append(f"```text\n{_dedented(part)}\n```")
        else:
            out.append(_mixed(part))
    return "\n\n".join(out)


def _mixed(part: str) -> str:
    """A paragraph in whose middle indented lines may stand."""
    lines, out = part.splitlines(), ""
    for indented, group in _grouped(lines):
        text = "\n".join(group)
        out += f"\n\n```text\n{_dedented(text)}\n```\n\n" if indented else marked(escaped(text))
    return out.strip()


def _grouped(lines: list[str]) -> list[tuple[bool, list[str]]]:
    groups: list[tuple[bool, list[str]]] = []
    for line in lines:
        indented = line.startswith("    ")
        if not groups or groups[-1][0] != indented:
            groups.append((indented, []))
        groups[-1][1].append(line)
    return groups


def _dedented(text: str) -> str:
    return inspect.cleandoc("\n" + text)


def escaped(text: str) -> str:
    """Prose whose stars, brackets and the like are themselves; code in backquotes and addresses are left."""
    parts = re.split(r"(`[^`]*`|https?://[^\s),;]+)", text)
    for place, part in enumerate(parts):
        if part.startswith("http"):
            address = part.rstrip(".")
            parts[place] = f"<{address}>{part[len(address) :]}"
        elif not part.startswith("`"):
            parts[place] = re.sub(r"([*\[\]])", r"\\\1", part).replace("<", "&lt;")
    return "".join(parts)


def marked(text: str) -> str:
    """The same with the marks of `MARKS` set apart."""
    return re.sub(r"\b(NOT FOUND|FOUND|INFERRED|OUR CHOICE)\b", r'<span class="mark">\1</span>', text)


def sentence(text: str) -> str:
    """With a capital, unless it begins with a symbol, and a full stop."""
    text = text.strip()
    if re.match("[a-z]{2}", text):
        text = text[0].upper() + text[1:]
    return text if not text or text.endswith((".", ":", "?")) else text + "."


def cell(text: str) -> str:
    """A text as the cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def table(heads: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *[[cell(one) for one in row] for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# --- settings -----------------------------------------------------------------------------------------


def kind(hint: Any, choices: tuple[str, ...] = ()) -> str:
    """A type in the words of who writes YAML.

    Args:
      hint: the annotation.
      choices: what a text may be, where the annotation does not say.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if choices:
        return _either([f"`{choice}`" for choice in choices])
    if origin in (types.UnionType, typing.Union):
        return _either([kind(arg) for arg in sorted(args, key=lambda arg: arg is type(None))])
    if origin is Literal:
        return _either([f"`{choice}`" for choice in args])
    if origin in (tuple, list):
        return f"list of {kind(args[0])}" if args and args[0] is not Any else "list"
    if origin in (dict, Mapping) or hint is dict:
        return "mapping"
    if dataclasses.is_dataclass(hint):
        return "section"
    names = {int: "whole number", float: "number", bool: "`true` or `false`", str: "text"}
    names |= {type(None): "`null`", Any: "anything"}
    return names.get(hint, "a method" if getattr(hint, "__name__", "") == "AlgorithmConfig" else "value")


def _either(words: list[str]) -> str:
    flat = [one for word in words for one in word.split(" or ")] if len(words) > 1 else words
    return flat[0] if len(flat) == 1 else ", ".join(flat[:-1]) + " or " + flat[-1]


def shown(value: Any) -> str:
    """A default as YAML has it."""
    from fedjax_sim import algorithms

    if algorithms.name_of(value) is not None:
        return f"`{algorithms.name_of(value)}`"
    if dataclasses.is_dataclass(value):
        return ""
    plain = list(value) if isinstance(value, tuple) else value
    return f"`{plain if isinstance(plain, str) else json.dumps(plain)}`"
