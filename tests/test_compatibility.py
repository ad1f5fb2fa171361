"""Runs and configurations that earlier revisions wrote: they are read, and go on to what those revisions got.

`fixtures/record.py` says how the fixtures were made. Processors differ in how they round, and so do compilers
with other flags. Therefore no bits are compared here: metrics agree within 1e-4 of their size (an accuracy
within two of the 359 test images), weights within 1e-4 of theirs. A field of the state that is lost, or read
into another place, is far outside of that.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from flax import traverse_util

import fedjax_sim as fs
from fedjax_sim import config

FIXTURES = Path(__file__).parent / "fixtures"
REVISION = FIXTURES / "b254fa7"

# Orbax reads leaves side by side; when one fails, the others' answers find its event loop closed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """`copied("scaffold")`: a copy of that run's folder."""
    monkeypatch.syspath_prepend(FIXTURES)  # small_net
    return lambda name: shutil.copytree(REVISION / name / "run", tmp_path / "run")


def by_place(rows):
    """What a row is of -> its value."""
    return {(number, metric, *where): value for number, metric, value, *where in rows}


def check_rows(table, name):
    found, wanted = by_place(table), by_place(json.loads((REVISION / name / "rows.json").read_text()))
    assert found.keys() == wanted.keys()
    for place, value in wanted.items():
        images = 2.01 / 359 if place[1] == "accuracy" else 0.0
        assert found[place] == pytest.approx(value, rel=1e-4, abs=max(images, 1e-7)), place


def check_model(variables, name):
    with np.load(REVISION / name / "model.npz") as wanted:
        found = {"/".join(path): leaf for path, leaf in traverse_util.flatten_dict(variables).items()}
        assert found.keys() == set(wanted.files)
        for path, leaf in found.items():
            assert leaf.dtype == wanted[path].dtype
            np.testing.assert_allclose(leaf, wanted[path], rtol=1e-4, atol=1e-5, err_msg=path)


@pytest.mark.parametrize(("name", "cut"), [("fedavg", 2), ("scaffold", 2), ("lips_fedmr", 3)])
def test_an_unfinished_run_goes_on_to_what_its_own_revision_got(copied, name, cut):
    folder = copied(name)
    early = fs.load(folder)
    assert (early.rounds, early.config.rounds, early.finished) == (cut, 4, False)
    kept = traverse_util.flatten_dict(early.variables, sep="/")
    with np.load(REVISION / name / "model.npz") as wanted:
        assert {path: leaf.shape for path, leaf in kept.items()} == {p: wanted[p].shape for p in wanted.files}
    assert early.partition.num_clients == 6

    run = fs.resume(folder)
    assert run.finished
    check_rows(run.metrics, name)
    check_model(run.variables, name)
    check_rows(fs.load(folder).metrics, name)


def test_a_finished_run_is_opened_and_analysed(copied):
    folder = copied("peel")
    run = fs.load(folder)
    assert run.finished and run.rounds == 2
    check_rows(run.metrics, "peel")
    check_model(run.variables, "peel")
    assert fs.resume(folder).metrics.names() == run.metrics.names()  # nothing left to do


def test_a_configuration_of_version_2_keeps_every_field():
    """New fields are at their defaults."""
    path = FIXTURES / "config_v2.yaml"
    wanted = yaml.safe_load(path.read_text())
    wanted["execution"] |= {"debug": False, "data": "auto", "client_state": "auto"}
    wanted["execution"] |= {"rounds_per_call": "auto", "calibration": "use"}
    wanted["model"] |= {"products": "auto"}
    wanted["output"] |= {"histograms": False}
    assert config.to_dict(config.read_config(path)) == wanted


def test_a_configuration_of_version_1_means_what_it_meant():
    """A server's optimiser was FedAvg's, and is an algorithm around it. New fields are at their defaults."""
    path = FIXTURES / "config_v1.yaml"
    wanted = yaml.safe_load(path.read_text())
    assert wanted["version"] == 1
    wanted["version"] = config.VERSION
    wanted["data"]["options"] = wanted["given"] = {}
    wanted["execution"] |= {"debug": False, "data": "auto", "client_state": "auto"}
    wanted["execution"] |= {"rounds_per_call": "auto", "calibration": "use"}
    wanted["model"] |= {"products": "auto"}
    wanted["output"] |= {"histograms": False}
    wanted["algorithm"]["inner"] = {
        **{"name": "fedopt", "optimizer": "adam", "lr": 0.1, "options": {}},
        "inner": {"name": "fedavg", "weights": "uniform"},
    }
    assert config.to_dict(config.read_config(path)) == wanted
