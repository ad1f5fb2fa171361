"""Every parameter and every result in `core/` and `engine/` says what it is."""

import ast
from pathlib import Path

import pytest

import fedjax_sim.core

PACKAGE = Path(fedjax_sim.core.__file__).parents[1]
FILES = sorted(path for room in ("core", "engine") for path in (PACKAGE / room).glob("*.py"))


def bare(source: str) -> list[str]:
    """`function(parameter)` and `function ->` of all functions, inner ones too, that have no annotation."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        given = node.args
        parameters = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
        found += [
            f"{node.name}({each.arg})"
            for each in parameters
            if each and each.annotation is None and each.arg not in ("self", "cls")
        ]
        if node.returns is None and node.name not in ("__init__", "__post_init__"):
            found.append(f"{node.name} ->")
    return found


def test_one_without_is_seen():
    source = "def f(a: int, *b, c=1):\n    def g(self) -> None: ...\n    async def h() : ..."
    assert bare(source) == ["f(c)", "f(b)", "f ->", "h ->"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_all_are_annotated(path):
    assert not bare(path.read_text())
