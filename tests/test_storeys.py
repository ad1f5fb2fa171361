"""The plan of the house: no imports upwards, none in a circle, and every room says what it is for."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fedjax_sim"

STOREYS = (
    "core",
    "tasks",
    "data",
    "models",
    "algorithms",
    "records",
    "config",
    "engine",
    "probes",
    "runs",
    "reports",
    "studies",
    "cli",
)
"""From the ground up."""

NEVER = {"engine": ("algorithms",)}
"""Rooms below that a room does not know all the same: the engine runs records, whoever made them."""


def modules(package: Path) -> dict[str, Path]:
    """Dotted name -> file, of every module; a package's name stands for its `__init__`."""
    files = sorted(package.rglob("*.py"))
    named = {".".join(path.relative_to(package.parent).with_suffix("").parts): path for path in files}
    return {name.removesuffix(".__init__"): path for name, path in named.items()}


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the package that a file imports anywhere, in functions and for type checkers too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: a relative import"
            for name in node.names:
                full = f"{node.module}.{name.name}"
                found.add(full if full in known else node.module)
        elif isinstance(node, ast.Import):
            found.update(name.name for name in node.names)
    return found & set(known)


def arrows(package: Path) -> dict[str, set[str]]:
    """Module -> modules that it imports."""
    known = modules(package)
    return {name: imports(path, known) - {name} for name, path in known.items()}


def storey(module: str) -> int:
    """The height of a module; the package itself is the roof."""
    parts = module.split(".")
    return len(STOREYS) if len(parts) == 1 else STOREYS.index(parts[1])


def upwards(graph: dict[str, set[str]]) -> list[str]:
    """Imports that go up."""
    return [f"{a} -> {b}" for a, wanted in graph.items() for b in wanted if storey(b) > storey(a)]


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Modules that import one another, directly or by way of others."""

    def reached(start: str) -> set[str]:
        seen, todo = set(), [start]
        while todo:
            for module in graph[todo.pop()] - seen:
                seen.add(module)
                todo.append(module)
        return seen

    reach = {module: reached(module) for module in graph}
    rings = {frozenset(b for b in reach[a] if a in reach[b]) for a in graph if a in reach[a]}
    return [sorted(ring) for ring in rings]


def loaded(package: Path) -> set[str]:
    """What importing the package imports, of itself and of others; not what functions import later."""
    known = modules(package)
    seen, todo = set(), [package.name]
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        if "." in name:
            todo.append(name.rpartition(".")[0])
        if name in known:
            body = ast.parse(known[name].read_text()).body
            while body:
                node = body.pop()
                if isinstance(node, ast.If) and not ast.unparse(node.test).endswith("TYPE_CHECKING"):
                    body += node.body  # of the package's own `__init__`
                if isinstance(node, ast.ImportFrom) and node.module:
                    todo += [node.module, *(f"{node.module}.{each.name}" for each in node.names)]
                elif isinstance(node, ast.Import):
                    todo += [each.name for each in node.names]
    return seen


@pytest.fixture(scope="module")
def graph():
    return arrows(PACKAGE)


def test_the_package_has_its_rooms_and_no_other_entries():
    entries = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert entries - {"__init__.py", "py.typed"} <= set(STOREYS)
    assert len(entries - {"py.typed"}) <= 14


def test_nobody_imports_upwards(graph):
    assert not upwards(graph)


def test_no_imports_go_in_a_circle(graph):
    assert not circles(graph)


def test_some_rooms_do_not_know_others_below_them(graph):
    for room, unknown in NEVER.items():
        of_room = [(a, b) for a, wanted in graph.items() for b in wanted if a.split(".")[1:2] == [room]]
        assert not [pair for pair in of_room if pair[1].split(".")[1] in unknown]


def test_what_few_commands_need_is_not_loaded_at_every_start():
    """Matplotlib and SciPy's clusters were a third of the start of `fedjax-sim`."""
    found = loaded(PACKAGE)
    assert (
        "fedjax_sim.algorithms.clusamp" in found and "fedjax_sim.studies.tables" in found and "jax" in found
    )
    assert not found & {"matplotlib", "scipy.cluster", "scipy.spatial", "pandas", "tyro", "sklearn"}


def test_inside_a_room_nobody_goes_through_its_front_door(graph):
    """A room's `__init__` hands its words to others; its own files name the file that they mean."""
    inside = [(a, b) for a, wanted in graph.items() for b in wanted if a.startswith(f"{b}.") and b.count(".")]
    assert not inside


def test_every_room_says_what_it_is_for():
    for path in PACKAGE.rglob("__init__.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_these_checks_can_fail(tmp_path):
    house = tmp_path / "fedjax_sim"
    files = {
        "core/low.py": "def late():\n    from fedjax_sim.cli import high",
        "cli/high.py": "import fedjax_sim.core.low",
        "cli/__init__.py": "",
        "core/__init__.py": "",
        "__init__.py": "",
    }
    for name, text in files.items():
        (house / name).parent.mkdir(parents=True, exist_ok=True)
        (house / name).write_text(text)
    graph = arrows(house)
    assert upwards(graph) == ["fedjax_sim.core.low -> fedjax_sim.cli.high"]
    assert circles(graph) == [["fedjax_sim.cli.high", "fedjax_sim.core.low"]]
