"""Weights of a run elsewhere: without its data, in files of other programs, in another process."""

import concurrent.futures
import dataclasses
import multiprocessing
import pickle
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim import data, runs
from fedjax_sim.algorithms import CONFIGS
from fedjax_sim.cli import commands
from fedjax_sim.config import (
    CohortConfig,
    ExecutionConfig,
    LocalConfig,
    ModelConfig,
    OutputConfig,
    RunConfig,
)
from fedjax_sim.core.errors import UserError
from fedjax_sim.runs import export, loading
from fedjax_sim.runs.checkpoint import Checkpoints


def tiny(folder=None):
    return RunConfig(
        rounds=2,
        model=ModelConfig(options={"hidden": [8]}),
        local=LocalConfig(epochs=None, steps=1, batch_size=16, lr=0.1),
        cohort=CohortConfig(size=4),
        execution=ExecutionConfig(devices=1),
        output=OutputConfig(
            dir=None if folder is None else str(folder), tensorboard=False, figures=False, progress=False
        ),
    )


@dataclasses.dataclass(frozen=True)
class Half:
    """FedMR under a name that no file can hold; what it deploys is not its whole state."""

    def build(self, context):
        return CONFIGS["fedmr"]().build(context)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return runs.run(tiny(tmp_path_factory.mktemp("export") / "run"), algorithm=Half())


def same(one, other):
    return jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), one, other))


def broken(*args, **kwargs):
    raise AssertionError


def test_final_weights_are_read_without_data_model_and_algorithm(done, monkeypatch):
    for name in ("load", "partition"):
        monkeypatch.setattr(data, name, broken)
    monkeypatch.setattr(loading, "prepare", broken)
    found = runs.load(done.folder).variables
    assert same(found, done.variables) and isinstance(found["params"]["fc1"]["kernel"], np.ndarray)


def test_older_and_damaged_checkpoints_give_them_by_the_state(done, monkeypatch):
    monkeypatch.setattr(Checkpoints, "model", lambda self, number: None)
    with pytest.raises(UserError, match="algorithm"):
        _ = runs.load(done.folder).variables
    assert same(runs.load(done.folder, algorithm=Half()).variables, done.variables)
    monkeypatch.setattr(Checkpoints, "model", broken)
    assert same(runs.load(done.folder, algorithm=Half()).variables, done.variables)


TREES = {
    "dicts": {"params": {"a": np.ones((2, 3), np.float32), "b": {"c": np.float32(2)}}},
    "dtypes": {
        "params": {"half": jnp.arange(5, dtype=jnp.bfloat16), "none": np.zeros((0, 2), np.float16)},
        "state": {"count": np.int32(7), "on": np.array([True, False])},
    },
}


@pytest.mark.parametrize("name", TREES)
def test_the_model_beside_a_state_comes_back_bit_for_bit(tmp_path, name):
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(3, {"state": np.zeros(2, np.float32)}, TREES[name])
    checkpoints.close()
    assert same(checkpoints.model(3), jax.tree.map(np.asarray, TREES[name]))


@pytest.mark.parametrize("model", [None, [np.ones(2)], {"a": np.ones(2), "b": {}}, {1: np.ones(2)}])
def test_a_model_that_paths_do_not_tell_is_not_kept_by_itself(tmp_path, model):
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(3, {"state": np.zeros(2, np.float32)}, model)
    checkpoints.close()
    assert checkpoints.model(3) is None
    assert checkpoints.restore({"state": jax.ShapeDtypeStruct((2,), np.float32)}) is not None


def test_a_damaged_model_is_not_given(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(3, {"state": np.zeros(2, np.float32)}, TREES["dicts"])
    checkpoints.close()
    about = checkpoints._about(3)
    about["model"][0]["crc32"] += 1
    monkeypatch.setattr(Checkpoints, "_about", lambda self, number: about)
    with pytest.raises(ValueError, match="checksum"):
        checkpoints.model(3)


# --- files ----------------------------------------------------------------------------------------------


def test_npz_holds_every_leaf_by_its_path(done, tmp_path, capsys):
    where = done.export(tmp_path / "new" / "model.npz")
    assert commands.main(["export", str(done.folder), str(tmp_path / "cli.npz")]) == 0
    assert "cli.npz" in capsys.readouterr().out
    for path in (where, tmp_path / "cli.npz"):
        with np.load(path) as read:
            assert sorted(read) == [
                f"params/{layer}/{leaf}" for layer in ("fc1", "fc2") for leaf in ("bias", "kernel")
            ]
            for name in read:
                _, layer, leaf = name.split("/")
                wanted = done.variables["params"][layer][leaf]
                assert read[name].dtype == wanted.dtype and np.array_equal(read[name], wanted)
    assert [path.name for path in where.parent.iterdir()] == ["model.npz"]


def test_npz_keeps_shapes_dtypes_and_bits(tmp_path):
    with np.load(export.write(TREES["dtypes"], tmp_path / "a.npz")) as read:
        assert read["state/count"].dtype == np.int32 and read["state/count"].shape == ()
        assert read["params/none"].shape == (0, 2) and read["params/none"].dtype == np.float16
        half = read["params/half"].view(jnp.bfloat16)
        assert np.array_equal(half.astype(np.float32), np.arange(5, dtype=np.float32))
    assert set(export.named([np.ones(1), {"a": np.ones(1)}])) == {"0", "1/a"}


def test_safetensors_holds_the_same(tmp_path):
    read = pytest.importorskip("safetensors.numpy").load_file
    export.write(TREES["dicts"], tmp_path / "a.safetensors")
    assert same(read(tmp_path / "a.safetensors"), export.named(TREES["dicts"]))
    path = export.write(TREES["dtypes"], tmp_path / "b.safetensors")
    header = path.read_bytes()[8:].split(b"}}", 1)[0].decode()
    assert '"params/half":{"dtype":"BF16"' in header.replace(" ", "")


def test_what_cannot_be_exported_is_said_at_once(done, tmp_path, monkeypatch, capsys):
    for path, told in (
        (tmp_path / "model.pt", r"\.npz or \.safetensors"),
        (tmp_path / "model", "names no format"),
    ):
        with pytest.raises(UserError, match=told):
            done.export(path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(UserError, match=r"pip install safetensors"):
        done.export(tmp_path / "model.safetensors")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        done.export(tmp_path / "file" / "model.npz")
    assert commands.main(["export", str(done.folder)]) == 2 and "FOLDER and a FILE" in capsys.readouterr().err
    assert commands.main(["export", "nowhere", str(tmp_path / "a.npz")]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# --- another process ------------------------------------------------------------------------------------


def test_a_run_can_be_pickled(done):
    # In memory and loaded, before and after its parts were asked for.
    loaded = runs.load(done.folder)
    for run in (done, loaded, dataclasses.replace(done, folder=None)):
        for _ in range(2):
            again = pickle.loads(pickle.dumps(run))
            assert (again.config, again.folder, again.title) == (run.config, run.folder, run.title)
            assert list(again.metrics) == list(run.metrics) and (again.rounds, again.finished) == (2, True)
            assert same(again.variables, done.variables)
            assert same(tuple(again.partition.train), tuple(done.partition.train))
            assert same(run.variables, again.variables) and same(
                tuple(run.partition.train), tuple(again.partition.train)
            )


@pytest.mark.parametrize("kind", [runs.Interrupted, runs.Terminated])
def test_so_can_the_end_of_one_that_was_stopped(done, kind):
    again = pickle.loads(pickle.dumps(kind(done)))
    assert type(again) is kind and str(again) == str(kind(done))
    assert again.run.title == done.title and getattr(again, "code", None) == getattr(kind(done), "code", None)


def _of_seed(seed):
    return runs.run(dataclasses.replace(tiny(), seed=seed, rounds=1))


@pytest.mark.slow
def test_runs_come_through_a_process_pool():
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        (found,) = pool.map(_of_seed, [3])
    assert found.config.seed == 3 and found.finished and "fc1" in found.variables["params"]
