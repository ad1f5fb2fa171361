"""Every notebook runs from top to bottom, as a newcomer would run it."""

import ast
import dataclasses
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
LENGTHS = {"quickstart": ("rounds=400,", "rounds=20,")}
SHORTER = {
    # Peeling compiles for long, FedMR as for FedAvg, and tests of its own measure controls and probes.
    "layer_peeled": {
        "rounds": 2,
        "algorithm": fs.FedAvg(),
        "partition": fs.PartitionConfig(kind="domain", clients=None, samples_per_client=60),
        "peel": fs.PeelConfig(every=1, samples=20, chimeras=True, others=True),
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
    written, short = LENGTHS[path.stem]
    execute(path, tmp_path, monkeypatch, lambda source: source.replace(written, short))
    assert "".join(code_of(path)).count(written) == 1


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
