"""Every notebook runs from top to bottom, as a newcomer would run it."""

import ast
import dataclasses
import tomllib
import types
from pathlib import Path

import jax
import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient

import fedjax_sim as fs
from fedjax_sim.runs import assemble

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
# Minutes each; `test_every_cell_works_on_a_short_run` runs their cells on short runs.
LONG = {"layer_peeled", "lips"}
# What another notebook writes for the length of its runs, and what a short test has in its place.
LENGTHS = {
    "quickstart": {"rounds=400,": "rounds=20,"},
    "thousand_clients": {"rounds=100,": "rounds=2,", "clients=1000,": "clients=20,", "size=100)": "size=4)"},
}
SHORTER = {
    # Peeling compiles for long, FedMR as for FedAvg, and tests of its own measure controls and probes.
    "layer_peeled": {
        "rounds": 2,
        "algorithm": fs.FedAvg(),
        "partition": fs.PartitionConfig(kind="domain", clients=None, samples_per_client=60),
        "peel": fs.PeelConfig(every=1, samples=20, class_samples=1, chimeras=True, others=True),
    },
    "lips": {"rounds": 6, "inertia": fs.InertiaConfig(measure=True, every=1, clients=2)},
}


def code_of(path):
    notebook = nbformat.read(path, as_version=4)
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.parametrize(
    "path", [path for path in NOTEBOOKS if path.stem not in LONG], ids=lambda path: path.stem
)
def test_notebook_runs(path, tmp_path, monkeypatch):
    """In a kernel, from its first cell to its last, with fewer rounds."""

    def shorter(source):
        for written, short in LENGTHS[path.stem].items():
            source = source.replace(written, short)
        return source

    execute(path, tmp_path, monkeypatch, shorter)
    assert all("".join(code_of(path)).count(written) == 1 for written in LENGTHS[path.stem])


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_at_full_length(path, tmp_path, monkeypatch):
    execute(path, tmp_path, monkeypatch)


def execute(path, tmp_path, monkeypatch, change=lambda source: source):
    """Runs a notebook in a kernel, its cells changed; it draws something."""
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel draws inline
    # On one device, whose programs are kept on disk between the runs of this test.
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    if jax.config.jax_compilation_cache_dir:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.source = change(cell.source)
    client = NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    executed = client.execute()
    figures = [
        output
        for cell in executed.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert figures, "a notebook shows something"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_cleared(path):
    cells = nbformat.read(path, as_version=4).cells
    assert not any(cell.get("outputs") for cell in cells), "clear the outputs before committing"


@pytest.mark.parametrize("name", sorted(LONG))
def test_every_cell_works_on_a_short_run(name, tmp_path, monkeypatch):
    """Every configuration can be run, every name is there, every figure is drawn; only the runs are short.

    Small networks take the place of the real ones; one run is made for each method that `SHORTER` keeps.
    """
    monkeypatch.chdir(tmp_path)
    really, made, asked, figures = fs.run, {}, [], 0

    def run(config):
        assemble.prepare(config)
        asked.append(config)
        short = shortened(config, SHORTER[name])
        method = type(short.algorithm)
        if method not in made:
            made[method] = really(short)
        return dataclasses.replace(
            made[method], config=dataclasses.replace(short, algorithm=config.algorithm)
        )

    monkeypatch.setattr(fs, "run", run)
    space = {}
    for source in code_of(path_of(name)):
        value = last_value(TransformerManager().transform_cell(source), space)
        if hasattr(value, "_repr_png_"):
            figures += 1
            assert value._repr_png_().startswith(b"\x89PNG")
    assert len(asked) >= 3
    assert figures >= 5


def shortened(config, changes):
    """The same run with little of everything."""
    small = {
        "model": dataclasses.replace(config.model, options={"hidden": [6, 6]}),
        "local": dataclasses.replace(config.local, epochs=1),
        "evaluation": dataclasses.replace(config.evaluation, every=2),
        "execution": fs.ExecutionConfig(devices=1, wave=1),
    }
    return dataclasses.replace(config, **small, **changes)


def last_value(source, space):
    """Runs a cell; the value of its last expression, if it ends in one that is shown."""
    body = ast.parse(source).body
    last = body.pop() if isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), "<cell>", "exec"), space)
    return last and eval(compile(ast.Expression(last.value), "<cell>", "eval"), space)


def path_of(name):
    return next(path for path in NOTEBOOKS if path.stem == name)


# --- in Colab ---------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[2]
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_badge_opens_the_notebook_in_colab(path):
    top = nbformat.read(path, as_version=4).cells[0].source
    place = REPOSITORY.removeprefix("https://github.com/")
    address = f"https://colab.research.google.com/github/{place}/blob/main/notebooks/{path.name}"
    picture = "https://colab.research.google.com/assets/colab-badge.svg"
    assert top.startswith(f"[![Open In Colab]({picture})]({address})\n")


def test_all_notebooks_begin_with_the_same_cell():
    assert len({code_of(path)[0] for path in NOTEBOOKS}) == 1


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_last_cell_draws(path):
    last = code_of(path)[-1]
    assert "plt.subplots" in last or "pictures." in last


class Shell:
    """IPython, as far as the first cell asks it; installing changes what is installed."""

    def __init__(self, installed, changes):
        self.installed, self.changes, self.asked = installed, changes, []

    def run_line_magic(self, name, line):
        self.asked.append((name, line))
        self.installed.update(self.changes)


def first_cell(installed, changes, device=False):
    """Runs it where fedjax_sim is not installed. -> what it asks for."""
    shell = Shell(installed, changes)
    space = {
        "get_ipython": lambda: shell,
        "listed": lambda: [types.SimpleNamespace(name=n, version=v) for n, v in installed.items()],
        "device": lambda path: device,
    }
    cell = code_of(NOTEBOOKS[0])[0]
    for real, ours in {
        'importlib.util.find_spec("fedjax_sim")': "None",
        "importlib.metadata.distributions()": "listed()",
        "os.path.exists(": "device(",
    }.items():
        assert real in cell
        cell = cell.replace(real, ours)
    exec(TransformerManager().transform_cell(cell), space)
    assert shell.asked == [("pip", 'install -q "{wanted}"')]
    return space["wanted"]


@pytest.mark.parametrize(
    ("also", "device", "extra"),
    [({}, False, ""), ({}, True, "[cuda]"), ({"libtpu": "0.0.21.1"}, False, "[tpu]")],
)
def test_the_first_cell_asks_for_what_the_runtime_has(also, device, extra):
    installed = {"jax": jax.__version__, "flax": "0.11.2", **also}
    wanted = first_cell(installed, {}, device)
    assert wanted == f"fedjax-sim{extra} @ git+{REPOSITORY}"


def test_the_first_cell_says_when_the_session_has_to_be_restarted():
    """JAX is loaded in this process, as it may be in a session that was in use."""
    with pytest.raises(SystemExit, match=r"Restart the session .*: jax was loaded before"):
        first_cell({"jax": "0.7.2", "requests": "2"}, {"jax": "0.10.1", "requests": "3"})
