"""One letter, one axis: shapes in docstrings of `core/` and `engine/` use the glossary's letters alone."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedjax_sim.core

PACKAGE = Path(fedjax_sim.core.__file__).parents[1]
FILES = sorted(path for room in ("core", "engine") for path in (PACKAGE / room).glob("*.py"))
LETTERS = dict(re.findall(r"^    (\w)   (\S.*)$", fedjax_sim.core.__doc__ or "", re.M))
SHAPE = re.compile(r"\b(?:[fiu]\d*|bool|key)\[([^\]]*)\]|\[([^\]]*…[^\]]*)\]")


def docstrings(source: str) -> Iterator[str]:
    """All strings that stand alone: docstrings, and those below a constant."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            yield str(node.value.value)


def unknown(text: str) -> set[str]:
    """The letters in `text`'s shapes that the glossary does not have; a word stands for itself."""
    shapes = [typed or tree for typed, tree in SHAPE.findall(text)]
    words = {word for shape in shapes for word in re.findall(r"[A-Za-z]+", shape)}
    return {word for word in words if len(word) == 1} - set(LETTERS)


def test_the_glossary_has_the_axes_and_a_stranger_is_seen():
    assert {"K", "N", "L", "m", "B", "n", "C", "D"} <= set(LETTERS)
    assert unknown("f32[K, C] and i32[N + 1], [K, …], bool[length], f64[…]") == set()
    assert unknown("i32[Q, B] or [Z, …]") == {"Q", "Z"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_shapes_use_its_letters(path):
    strangers = {letter for text in docstrings(path.read_text()) for letter in unknown(text)}
    assert not strangers, f"{path}: see the glossary in fedjax_sim/core/__init__.py"
