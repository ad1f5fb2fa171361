"""The reference is complete: every field, command, method, metric, file and key has an entry with a text."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import commands_page
import configuration_page
import generated
import jax
import methods_page
import numpy as np
import pytest

import fedjax_sim as fs
from fedjax_sim import config as config_lib
from fedjax_sim.algorithms import CONFIGS
from fedjax_sim.config import search_files, sweep_files
from fedjax_sim.config.callbacks import CALLBACKS
from fedjax_sim.engine.simulation import Simulation
from fedjax_sim.runs.assemble import prepare

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs" / "reference"


def entries(page: str, section: str = "") -> dict[str, list[str]]:
    """First cell of each row of a page's tables (each name in it) -> the other cells."""
    text = (REFERENCE / page).read_text()
    if section:
        text = re.split(rf"^## {section}$", text, flags=re.MULTILINE)[1]
        text = re.split(r"^## ", text, flags=re.MULTILINE)[0]
    found = {}
    for line in text.splitlines():
        first, *rest = (
            [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("| "))] if "|" in line else [""]
        )
        found |= {name: rest for name in re.findall(r"`([^`]+)`", first)}
    return found


# --- configuration ------------------------------------------------------------------------------------


def fields() -> Iterator[tuple[type, str, str]]:
    """(Class, field, its dotted name) of all that a configuration may say."""
    sections = configuration_page.sections()
    for name in [field.name for field in dataclasses.fields(fs.RunConfig)]:
        if name not in sections:
            yield fs.RunConfig, name, name
    for section, cls in sections.items():
        for field in dataclasses.fields(cls):
            yield cls, field.name, f"{section}.{field.name}"
    for name, cls in CALLBACKS.items():
        for field in dataclasses.fields(cls):
            yield cls, field.name, f"callbacks.{name}.{field.name}"
    for name, cls in CONFIGS.items():
        for field in dataclasses.fields(cls):
            yield cls, field.name, f"algorithm.{name}.{field.name}"


@pytest.mark.parametrize(("cls", "name", "dotted"), list(fields()))
def test_every_field_has_a_text(cls, name, dotted):
    assert len(generated.attributes(cls).get(name, "")) > 5, (
        f"the docstring of {cls.__name__} does not explain {name}"
    )


def test_the_configuration_page_has_every_field():
    page = configuration_page.page()
    for _, name, dotted in fields():
        if not dotted.startswith(("algorithm.", "callbacks.")):
            assert f"### `{dotted}` {{ #{dotted} " in page
        elif dotted.startswith("callbacks."):
            assert f'id="{dotted}">`{name}`' in page


def test_every_execution_setting_is_of_speed_alone():
    for field in dataclasses.fields(fs.ExecutionConfig):
        assert configuration_page.changes(f"execution.{field.name}") == configuration_page.SPEED
    assert configuration_page.changes("local.lr") == configuration_page.RESULTS


def test_what_a_field_takes_is_in_words():
    hints = {"a": int | None, "b": bool, "c": tuple[str, ...], "d": dict[str, int]}
    said = {name: generated.kind(hint) for name, hint in hints.items()}
    assert said == {
        "a": "whole number or `null`",
        "b": "`true` or `false`",
        "c": "list of text",
        "d": "mapping",
    }
    assert "value" not in {
        generated.kind(hint)
        for cls in configuration_page.sections().values()
        for hint in cls.__annotations__.values()
    }


def test_the_default_that_is_told_is_that_of_a_run():
    part = configuration_page.page().split("### `partition.clients`")[1].split("###")[0]
    assert f"**Default** `{fs.RunConfig().partition.clients}`" in part


# --- commands -----------------------------------------------------------------------------------------


def test_every_command_has_its_help():
    page, found = commands_page.page(), commands_page.commands()
    assert {"run", "resume", "sweep", "tune", "plan", "compare", "list"} <= set(found)
    for name, text in found.items():
        assert f"## {name} {{ #{name} }}" in page
        assert len(text) > 50
        assert "\x1b" not in text
    assert "--print-config" in found["run"] and "- partition: " in found["run"]


# --- methods ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(CONFIGS))
def test_the_example_of_a_method_can_run(name):
    """Up to its compilation; clients' own models are measured where there are any; records are known."""
    config = config_lib.from_dict(methods_page.example(name))
    simulation = Simulation(prepare(config))
    assert (
        simulation.setup.personalised == (name in methods_page.PERSONALISED) == config.evaluation.per_client
    )
    inputs, state = simulation.inputs(0)[0], simulation.abstract_state()
    with jax.set_mesh(simulation.mesh):
        outputs = jax.eval_shape(simulation.function, state, inputs, simulation.data_of(0, inputs))[1]
    known = entries("metrics.md", "Methods")
    assert not [metric for metric in outputs.metrics if not documented(metric, known)]


def test_the_page_of_methods_has_each_with_its_settings():
    page = methods_page.page()
    for name, cls in CONFIGS.items():
        assert f"## {cls.__name__} {{ #{name} " in page
        for field in dataclasses.fields(cls):
            assert f'id="{name}.{field.name}"' in page


# --- metrics ------------------------------------------------------------------------------------------

NUMBERED = re.compile(r"<\w+>")


def documented(metric: str, known: dict[str, list[str]]) -> bool:
    """Whether the page has an entry with a meaning."""
    patterns = [NUMBERED.sub("[0-9]+", re.sub(r"([.^$*+?(){}|\\])", r"\\\1", name)) for name in known]
    metric = re.sub(r"^(undefined|nonfinite)/", "", metric)
    return any(re.fullmatch(pattern, metric) for pattern in patterns)


SMALL = dict(
    rounds=2,
    partition=fs.PartitionConfig("iid", clients=4, samples_per_client=40, local_test="holdout"),
    model=fs.ModelConfig("mlp", options={"hidden": (8,)}),
    local=fs.LocalConfig(epochs=1),
    cohort=fs.CohortConfig(size=2),
)


def everything():
    """Configurations that together record all that there is."""
    peel = fs.PeelConfig(
        every=1, clients=2, samples=20, class_samples=1, angles=True, chimeras=True, controls=("perturbed",),
        finetune=1, others=True, ranks=True,
    )  # fmt: skip
    evaluation = fs.EvaluationConfig(every=1, per_class=True, per_client=True, finetune=1)
    inertia = fs.InertiaConfig(measure=True, reference=1, every=1, clients=2, samples=20)
    yield fs.RunConfig(**SMALL, algorithm=fs.FedMR(), peel=peel, evaluation=evaluation, inertia=inertia)
    table = {**SMALL, "data": fs.DataConfig("diabetes")}
    yield fs.RunConfig(**table, evaluation=fs.EvaluationConfig(every=1, per_client=True), inertia=inertia)


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """For which less is compiled."""
    with mock.patch.object(jax, "devices", return_value=jax.devices()[:1]):
        yield


@pytest.mark.parametrize("config", list(everything()), ids=["classification", "regression"])
def test_every_metric_is_documented(config):
    known = {name: cells for name, cells in entries("metrics.md").items() if cells and cells[0]}
    metrics = fs.run(config).metrics.names()
    assert len(metrics) > 15
    assert not [name for name in metrics if not documented(name, known)]


def test_a_metric_without_an_entry_is_seen():
    known = entries("metrics.md")
    assert documented("accuracy_class_12", known)
    assert documented("undefined/pabs_corrected", known)
    assert not documented("accuracy_class_x", known)
    assert not documented("surprise", known)


def test_numbers_of_a_landscape_are_documented():
    from fedjax_sim.reports.landscape.report import numbers

    two = np.asarray([2.0, 1.0])
    measured = SimpleNamespace(
        loss={"train": 1.0, "test": 1.0},
        accuracy={"train": 1.0, "test": 1.0},
        spectrum=SimpleNamespace(eigenvalues=two, residuals=two, least=0.0, trace=1.0, trace_error=1.0),
        sharpness=SimpleNamespace(worst=1.0, average=1.0, average_error=1.0),
        norm=1.0,
        between=[1],
        pairs=lambda name, what: two,
    )
    known = entries("metrics.md", "Landscape")
    assert not [name for name in numbers(measured) if not documented(name, known)]


def test_columns_of_time_are_documented():
    from fedjax_sim.records import Lap

    assert set(Lap._fields) == set(entries("metrics.md", "Time")) - {"timing.csv"}


# --- folders ------------------------------------------------------------------------------------------


OTHERS = {
    "curves.png",
    "partition.png",
    "clients.png",
    "layers.csv",
    "inertia.csv",
    "flatness.csv",
    "curves.csv",
    "report.md",
}
"""What lies in folders of a run's folder."""


def names_in(folder: Path) -> set[str]:
    """What lies in a folder, files as `name`, folders as `name/`."""
    return {path.name + ("/" if path.is_dir() else "") for path in folder.iterdir()}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The folder of a sweep of one run that writes all that a run can."""
    home = tmp_path_factory.mktemp("study")
    base = fs.RunConfig(
        **{**SMALL, "rounds": 2},
        algorithm=fs.Scaffold(),
        evaluation=fs.EvaluationConfig(every=1, per_client=True),
        execution=fs.ExecutionConfig(client_state="host"),
        callbacks=(fs.KeepBest(),),
    )
    mapping = {"base": config_lib.to_dict(base), "out": str(home)}
    mapping["base"].pop("output")
    fs.sweep.run(fs.sweep.from_mapping(mapping), tell=lambda line: None)
    return home


def test_files_of_a_run_are_documented(study):
    (folder,) = (path.parent for path in study.rglob("config.yaml"))
    known = entries("folder.md", "A run")
    there = names_in(folder)
    assert not there - set(known)
    later = {"figures/peel/", "figures/inertia/", "landscape/"}  # of commands that read runs
    assert not {name for name in known if name.endswith("/") or "." in name[1:]} - later - there - OTHERS


def test_files_of_a_sweep_are_documented(study):
    assert not names_in(study) - set(entries("folder.md", "A sweep"))


# --- files of studies ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "keys"), [("Sweep", sweep_files._FIELDS), ("Search", search_files._FIELDS)]
)
def test_keys_of_a_file_are_documented(section, keys):
    known = entries("sweep-file.md", section)
    assert set(known) == set(keys)
    assert all(len(cells) == 3 and all(cells) for cells in known.values())


@pytest.mark.parametrize(
    ("name", "read"), [("study.yaml", sweep_files.read_sweep), ("search.yaml", search_files.read_search)]
)
def test_the_example_of_a_file_is_one(name, read, tmp_path):
    """The page does not run it: tests/studies has such sweeps and searches."""
    text = (REFERENCE / "sweep-file.md").read_text()
    path = tmp_path / name
    path.write_text(re.findall(rf'```yaml title="{name}"\n(.*?)```', text, flags=re.DOTALL)[0])
    assert read(path)
