"""Docstrings name every parameter of a function that has four or more, and give the shapes of arrays.

The rule, for public functions and for the public methods of public classes:

- With four parameters or more (`self` not counted) an `Args:` section has an entry for each. Those of
  `__init__` may stand in the class's docstring instead, below `Args:` or `Attributes:`.
- With a parameter annotated as an array, the docstring gives a shape: `f32[K, C]`, `[m, …]`, `i32[]`.
- "See `X`." at its beginning counts for both if X, or its method of the same name, has its own docstring.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedjax_sim.core

PACKAGE = Path(fedjax_sim.core.__file__).parents[1]
FILES = sorted(PACKAGE.rglob("*.py"))
SHAPED = "core", "engine", "models", "probes"
WITH_SHAPES = sorted(path for room in SHAPED for path in (PACKAGE / room).rglob("*.py"))
MANY = 4
ARRAY = re.compile(r"\b(?:jax\.Array|np\.ndarray)\b")
SHAPE = re.compile(r"\b(?:[fiu]\d*|bool|key)\[[^\]]*\]|\[[^\]]*…[^\]]*\]|\[\w+(?:, \w+)+\]")
SECTION = re.compile(r"^( *)(?:Args|Attributes):\n((?:\1 +.*\n|\n)*)", re.M)

Function = ast.FunctionDef | ast.AsyncFunctionDef


def public(source: str) -> Iterator[tuple[str, list[ast.arg], str]]:
    """(name, parameters, docstring) of each public function and method; `__init__` has its class's too."""
    for node in ast.parse(source).body:
        if node_is_public(node) and isinstance(node, Function) and not is_overload(node):
            yield node.name, parameters(node), ast.get_docstring(node) or ""
        if node_is_public(node) and isinstance(node, ast.ClassDef):
            for each in node.body:
                own = ast.get_docstring(each) or "" if isinstance(each, Function) else ""
                if isinstance(each, Function) and each.name == "__init__":
                    about = ast.get_docstring(node) or ""
                    yield f"{node.name}.__init__", parameters(each)[1:], f"{about}\n\n{own}"
                elif isinstance(each, Function) and node_is_public(each):
                    unbound = any(ast.unparse(mark) == "staticmethod" for mark in each.decorator_list)
                    yield f"{node.name}.{each.name}", parameters(each)[0 if unbound else 1 :], own


def is_overload(function: Function) -> bool:
    """One of several signatures, all of which the last one describes."""
    return any(ast.unparse(mark) == "overload" for mark in function.decorator_list)


def node_is_public(node: ast.stmt) -> bool:
    return not getattr(node, "name", "_").startswith("_")


def parameters(function: Function) -> list[ast.arg]:
    given = function.args
    every = [*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg]
    return [each for each in every if each is not None]


def described(docstring: str) -> set[str]:
    """The names that have an entry below `Args:` or `Attributes:`; `a, b: …` is one for both."""
    found = set()
    for indent, section in SECTION.findall(docstring + "\n"):
        for names in re.findall(rf"^{indent}  (\*{{0,2}}\w+(?:, \*{{0,2}}\w+)*):", section, re.M):
            found |= {name.lstrip("*") for name in names.split(", ")}
    return found


def own(source: str) -> set[str]:
    """The names of those whose docstring does not send the reader elsewhere."""
    return {name for name, _, docstring in public(source) if docstring and not docstring.startswith("See `")}


KNOWN = {name for path in FILES for name in own(path.read_text())}


def refers(name: str, docstring: str, known: set[str]) -> bool:
    """Whether the docstring of `name` sends the reader to one of those that are `known`."""
    found = re.match(r"See `(?:\w+\.)*(\w+)`", docstring)
    method = name.partition(".")[2]
    return bool(found) and (f"{found[1]}.{method}" if method else found[1]) in known


def nameless(source: str, known: set[str] = KNOWN) -> list[str]:
    """`function(parameter)` that the docstring of a function with many parameters leaves out."""
    return [
        f"{name}({each.arg})"
        for name, given, docstring in public(source)
        if len(given) >= MANY and not refers(name, docstring, known)
        for each in given
        if each.arg not in described(docstring)
    ]


def is_array(parameter: ast.arg) -> bool:
    """Whether it holds arrays; a function of arrays does not."""
    annotation = ast.unparse(parameter.annotation) if parameter.annotation else ""
    return bool(ARRAY.search(annotation)) and not annotation.startswith("Callable")


def shapeless(source: str, known: set[str] = KNOWN) -> list[str]:
    """The functions of arrays whose docstrings give no shape."""
    return [
        name
        for name, given, docstring in public(source)
        if any(is_array(each) for each in given)
        and not SHAPE.search(docstring)
        and not refers(name, docstring, known)
    ]


SOURCE = '''
def f(a: int, b, c, *, d):
    """Says something.

    Args:
      a, b: two.
      c: three; not
        d: four.
    """

def g(a, b, c, d):
    """See `some.f`."""

def k(a, b, c, d):
    """See `g`."""

class A:
    """Some.

    Attributes:
      a: one.
    """

    def __init__(self, a, b, c, d):
        """It has two.

        Args:
          b, *c: both.
        """

    def h(self, x: jax.Array, y: int) -> None:
        """Of x, a vector [of some length]."""

    def i(self, x: np.ndarray | None) -> None:
        """Of x, f32[n]."""

    def _j(self, x: jax.Array) -> None: ...

class B:
    def h(self, x: jax.Array) -> None:
        """See `g`."""

    def i(self, x: jax.Array) -> None:
        """See `A`."""
'''


def test_one_without_is_seen():
    known = own(SOURCE)
    assert nameless(SOURCE, known) == ["f(d)", "k(a)", "k(b)", "k(c)", "k(d)", "A.__init__(d)"]
    assert shapeless(SOURCE, known) == ["A.h", "B.h"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_many_parameters_are_described(path):
    assert not nameless(path.read_text())


@pytest.mark.parametrize("path", WITH_SHAPES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrays_have_shapes(path):
    assert not shapeless(path.read_text())
