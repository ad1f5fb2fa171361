"""Clients' own state in files of the run's folder: cut, resumed, damaged, looked at, and on a full disk."""

import dataclasses
import errno
import os
import shutil

import jax
import numpy as np
import pytest

import fedjax_sim as fs
from fedjax_sim.runs.checkpoint import Checkpoints
from fedjax_sim.runs.loading import restored

ROUNDS = 8


def _config(folder, **changes):
    return dataclasses.replace(
        fs.RunConfig(
            rounds=ROUNDS,
            data=fs.DataConfig("digits"),
            partition=fs.PartitionConfig(kind="dirichlet", clients=9, alpha=1.0, local_test="holdout"),
            model=fs.ModelConfig("mlp", options={"hidden": [8]}),
            local=fs.LocalConfig(epochs=None, steps=2, batch_size=16, lr=0.05),
            cohort=fs.CohortConfig(size=3),
            algorithm=fs.algorithms.Ditto(),
            execution=fs.ExecutionConfig(devices=1, client_state="host"),
            evaluation=fs.EvaluationConfig(every=4, per_client=True, finetune=1),
            output=fs.OutputConfig(
                dir=str(folder), checkpoint_every=3, tensorboard=False, figures=False, progress=False
            ),
        ),
        **changes,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return fs.run(_config(tmp_path_factory.mktemp("whole") / "run"))


@pytest.fixture
def cut(tmp_path, whole):
    """As a kill leaves it after round 8, with the checkpoints of rounds 6 and 8."""
    folder = tmp_path / "run"
    shutil.copytree(whole.folder, folder)
    (folder / "metrics.parquet").unlink()
    assert Checkpoints(folder / "checkpoints").rounds() == [6, 8]
    return folder


def _check(run, whole):
    jax.tree.map(np.testing.assert_array_equal, run.variables, whole.variables)
    assert run.metrics.names() == whole.metrics.names()
    for name in whole.metrics.names():
        for one, other in zip(run.metrics.series(name), whole.metrics.series(name), strict=True):
            np.testing.assert_array_equal(one, other)


def test_the_run_is_that_with_the_state_on_the_devices(tmp_path, whole):
    here = fs.ExecutionConfig(devices=1, client_state="device")
    _check(fs.run(_config(tmp_path / "run", execution=here)), whole)
    assert not (tmp_path / "run" / "clients").exists()


def test_a_checkpoint_holds_two_numbers_a_client_and_the_files_the_rows(whole):
    kept = Checkpoints(whole.folder / "checkpoints").clients(8)
    assert kept["places"].shape == kept["sums"].shape == (9,)
    rows = whole.folder / "clients" / "rows-00000"
    assert rows.stat().st_size == np.prod(kept["layout"])


@pytest.mark.parametrize("lost", [[8], [6, 8], []])
def test_a_run_that_was_cut_goes_on_from_the_checkpoint_that_is_left(cut, whole, lost):
    for number in lost:
        shutil.rmtree(cut / "checkpoints" / str(number))
    _check(fs.resume(cut), whole)


def test_a_damaged_row_has_the_checkpoint_passed_over(cut, whole):
    checkpoints = Checkpoints(cut / "checkpoints")
    before, last = (checkpoints.clients(number) for number in (6, 8))
    moved = int(np.flatnonzero(before["places"] != last["places"])[0])
    row_bytes, rows = last["layout"].tolist()
    chunk, row = divmod(int(last["places"][moved]), rows)
    path = cut / "clients" / f"rows-{chunk:05d}"
    content = bytearray(path.read_bytes())
    content[row * row_bytes] ^= 1
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=f"round 8 is damaged.*client {moved} does not have the checksum"):
        _check(fs.resume(cut), whole)


def test_with_the_files_lost_it_starts_over(cut, whole):
    shutil.rmtree(cut / "clients")
    with pytest.warns(UserWarning) as told:
        _check(fs.resume(cut), whole)
    said = [str(one.message) for one in told]
    assert len(said) == 3 and all("damaged" in one and "rows-00000" in one for one in said[:2])
    assert "begins again at its first round" in said[2]


def test_a_setting_of_auto_stays_where_the_run_began(cut, whole, monkeypatch):
    text = (cut / "config.yaml").read_text()
    assert "client_state: host" in text
    shutil.rmtree(cut / "checkpoints" / "8")
    for name in ("config.yaml", "provenance.json"):
        told = (cut / name).read_text()
        told = told.replace("client_state: host", "client_state: auto")
        (cut / name).write_text(told.replace('"client_state": "host"', '"client_state": "auto"'))
    _check(fs.resume(cut), whole)


def test_who_looks_into_a_run_changes_none_of_its_files(whole):
    files = sorted((whole.folder / "clients").iterdir())
    before = [path.read_bytes() for path in files]
    simulation = restored(whole.folder)
    figures = simulation.client_figures()()
    names, wanted = whole.metrics.series("client_accuracy_mean")
    assert np.isclose(figures.mean(), wanted[-1]) and names[-1] == ROUNDS
    simulation.setup = dataclasses.replace(
        simulation.setup, config=dataclasses.replace(simulation.setup.config, rounds=ROUNDS + 1)
    )
    simulation.step()()
    assert [path.read_bytes() for path in files] == before


def test_a_full_disk_is_one_error_and_nothing_is_lost(tmp_path, whole, monkeypatch):
    monkeypatch.setattr("fedjax_sim.engine.client_rows.CHUNK", 2**13)  # two rows
    real, room = os.posix_fallocate, [2]

    def fallocate(*args):
        room[0] -= 1
        if room[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    folder = tmp_path / "run"
    with pytest.raises(fs.UserError, match=r"output.dir.*No space left.*fedjax-sim resume"):
        fs.run(_config(folder))
    assert not list((folder / "clients").glob("*.unfinished"))
    room[0] = 100
    _check(fs.resume(folder), whole)
