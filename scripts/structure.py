"""What the package is built of, as a table in Markdown: modules, imports, functions.

    python scripts/structure.py [FOLDER]        a package's folder; by default this repository's

Of another revision: git worktree add /tmp/old REVISION, then FOLDER is /tmp/old/fedjax_sim.

A room is a folder of the package, or a module that lies in none. Imports are those anywhere in a file, also
in functions. An import of a room that stands later in `STOREYS` is upward; a revision without these rooms has
none to count. The cyclomatic number is one more than the branches of a function, without those of functions
that stand inside it.
"""

import ast
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
STOREYS = (
    "core", "tasks", "data", "models", "algorithms", "records", "config", "engine", "probes", "runs",
    "reports", "studies", "cli",
)  # fmt: skip
"""From the ground up, as in tests/test_storeys.py."""
HIGH = 15
"""Cyclomatic numbers above it are counted."""

Function = ast.FunctionDef | ast.AsyncFunctionDef
BRANCHES = (
    ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.Assert, ast.match_case,
)  # fmt: skip


def main() -> None:
    """Prints the table."""
    package = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "fedjax_sim"
    files = {_module(path, package): path for path in sorted(package.rglob("*.py"))}
    trees = {name: ast.parse(path.read_text()) for name, path in files.items()}
    lines = {name: len(path.read_text().splitlines()) for name, path in files.items()}
    functions = [
        (name, node) for name, tree in trees.items() for node in ast.walk(tree) if isinstance(node, Function)
    ]
    arrows = {(_room(name), _room(other)) for name in trees for other in _imports(trees[name], set(trees))}
    arrows = {(one, other) for one, other in arrows if one != other}
    upward = sorted(f"{one} → {other}" for one, other in arrows if _height(other) > _height(one))
    storeys = {_room(name) for name in trees} >= set(STOREYS)
    complex_ = sorted(((_cyclomatic(node), f"{name}.{node.name}") for name, node in functions), reverse=True)
    longest = sorted(((_length(node), f"{name}.{node.name}") for name, node in functions), reverse=True)
    largest = max(lines, key=lambda name: lines[name])
    entries = [path for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
    table = [
        ("entries of the package's folder", len(entries)),
        ("modules", len(files)),
        ("lines", sum(lines.values())),
        ("median module, lines", int(statistics.median(lines.values()))),
        ("largest module, lines", f"{lines[largest]} ({largest})"),
        ("rooms", len({_room(name) for name in trees})),
        ("imports between rooms", len(arrows)),
        ("of these upward", f"{len(upward)}{': ' * bool(upward)}{', '.join(upward)}" if storeys else "–"),
        ("functions", len(functions)),
        ("median function, lines", int(statistics.median(length for length, _ in longest))),
        ("functions over 50 lines", sum(length > 50 for length, _ in longest)),
        (f"cyclomatic numbers over {HIGH}", sum(number > HIGH for number, _ in complex_)),
        ("the ten largest of them", ", ".join(f"{name} {number}" for number, name in complex_[:10])),
        ("the ten longest functions", ", ".join(f"{name} {length}" for length, name in longest[:10])),
    ]
    print("| | |\n|---|---|")
    for label, value in table:
        print(f"| {label} | {value} |")


def _module(path: Path, package: Path) -> str:
    """`engine.round`; "" for the package itself."""
    return ".".join(path.relative_to(package).with_suffix("").parts).removesuffix("__init__").rstrip(".")


def _room(module: str) -> str:
    return module.partition(".")[0] or "fedjax_sim"


def _height(room: str) -> float:
    """The storey of a room; nothing counts as upward for one that is on none, nor as its target."""
    return STOREYS.index(room) if room in STOREYS else float("nan")


def _imports(tree: ast.Module, known: set[str]) -> set[str]:
    """Modules of the package that a file imports."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "fedjax_sim":
            base = node.module.removeprefix("fedjax_sim").lstrip(".")
            for alias in node.names:
                full = f"{base}.{alias.name}".lstrip(".")
                found.add(full if full in known else base)
    return found & known - {""}


def _own(node: ast.AST) -> list[ast.AST]:
    """All nodes of a function, without those of functions inside it."""
    nodes: list[ast.AST] = []
    waiting = list(ast.iter_child_nodes(node))
    while waiting:
        each = waiting.pop()
        if not isinstance(each, Function | ast.Lambda | ast.ClassDef):
            nodes.append(each)
            waiting.extend(ast.iter_child_nodes(each))
    return nodes


def _cyclomatic(node: Function) -> int:
    number = 1
    for each in _own(node):
        if isinstance(each, BRANCHES):
            number += 1
        elif isinstance(each, ast.BoolOp):
            number += len(each.values) - 1
        elif isinstance(each, ast.comprehension):
            number += 1 + len(each.ifs)
    return number


def _length(node: Function) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


if __name__ == "__main__":
    main()
