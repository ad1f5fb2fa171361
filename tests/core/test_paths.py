"""Addresses where a path is wanted: refused by name, before anything is made."""

from pathlib import Path

import pytest

from fedjax_sim import config as config_lib
from fedjax_sim import data, runs
from fedjax_sim.cli.commands import main
from fedjax_sim.config import sweep_files
from fedjax_sim.core import paths
from fedjax_sim.core.errors import UserError
from fedjax_sim.engine import cohorts
from fedjax_sim.reports import shared
from fedjax_sim.runs.folder import Folder

BUCKET = "gs://bucket/some/where"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    """An empty working directory."""
    place = tmp_path / "home"
    place.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.delenv("FEDJAX_SIM_DATA", raising=False)
    return place


@pytest.mark.parametrize(
    "words",
    [
        *(["run", f"--{field}", BUCKET] for field in ("output.dir", "initial.run", "data.data-dir")),
        ["run", "--cohort.sampling", "schedule", "--cohort.schedule", BUCKET],
        ["run", "--partition.kind", "file", "--partition.path", BUCKET],
        *(["run", "--data.source", source + BUCKET] for source in ("npz:", "folder:", "")),
        ["plan", "--output.dir", BUCKET],
        *([command, BUCKET] for command in ("resume", "peel", "inertia", "landscape")),
        *([command, f"{BUCKET}.yaml"] for command in ("run", "sweep", "peel", "inertia", "landscape")),
    ],
)
def test_the_command_line_refuses_a_bucket_with_the_way_out(words, home, capsys):
    assert main(words) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1
    assert BUCKET in told and "Mount the bucket" in told
    if words[0] in ("run", "plan") and len(words) > 2:
        assert told.startswith(f"error: {words[-2].removeprefix('--').replace('-', '_')} = ")
    assert list(home.iterdir()) == []


def test_a_sweep_refuses_a_bucket_anywhere(home):
    for mapping, field in (
        ({"out": BUCKET}, "sweep.out"),
        ({"base": BUCKET}, "sweep.base"),
        ({"base": {"initial": {"run": BUCKET}}}, "initial.run"),
        ({"grid": {"data.source": [f"npz:{BUCKET}"]}}, "data.source"),
    ):
        with pytest.raises(UserError, match=r"Mount the bucket") as caught:
            sweep_files.from_mapping(mapping)
        assert caught.value.field == field
    assert list(home.iterdir()) == []


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda: runs.resume(BUCKET), "folder"),
        (lambda: runs.load(Path(BUCKET)), "folder"),
        (lambda: shared.writable(BUCKET), "out"),
        (lambda: config_lib.read_config(BUCKET), "config"),
        (lambda: data.load(f"folder:{BUCKET}"), "data.source"),
        (lambda: data.load("cifar10", data_dir=BUCKET), "data.data_dir"),
        (lambda: data.load_partition(BUCKET), "partition.path"),
        (lambda: cohorts.Schedule.load(BUCKET), "cohort.schedule"),
        (lambda: cohorts.Schedule(1, ((0,),)).save(BUCKET), "path"),
    ],
)
def test_python_refuses_a_bucket(call, field, home):
    with pytest.raises(UserError, match="Mount the bucket") as caught:
        call()
    assert caught.value.field == field
    assert list(home.iterdir()) == []


def test_the_variable_of_the_data_is_named(monkeypatch):
    monkeypatch.setenv("FEDJAX_SIM_DATA", "s3://data")
    with pytest.raises(UserError, match="FEDJAX_SIM_DATA = 's3://data'"):
        data.load("cifar10")


@pytest.mark.parametrize(
    "path", ["a/b", "/a/b", "C:/a", "run:3/seed0", "a b://c", "1://x", "./gs:/x", "gs:x", ""]
)
def test_paths_are_paths(path):
    assert paths.local(path) == Path(path)


def test_other_addresses_say_what_they_are():
    assert paths.local("~/x") == Path.home() / "x"
    with pytest.raises(UserError, match=r"Write /data/x\."):
        paths.local("file:///data/x")
    with pytest.raises(UserError, match=r"an address \(https:\)"):
        paths.local("https://host/x")
    with pytest.raises(UserError, match="bucket"):
        Folder(Path("S3://host/x"))
