"""Every mistake gives one line: the field, the value and the way out, before anything is compiled."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from fedjax_sim.cli import commands
from fedjax_sim.runs.federation import Simulation

pytestmark = pytest.mark.faults
EIGHT = ("run", "--partition.clients", "8")


@pytest.fixture
def complaint(capsys, monkeypatch):
    """What the command line says to a mistake; fails if it compiled, or said more than a line."""

    def compiled(self):
        raise AssertionError("it got as far as compiling")

    def run(*words):
        monkeypatch.setattr(Simulation, "_initial_state", compiled)
        status = commands.main(list(words))
        told = capsys.readouterr()
        assert status == 2, told.out
        assert told.err.startswith("error: ") and told.err.count("\n") == 1 and "Traceback" not in told.err
        return told.err

    return run


@pytest.mark.parametrize(
    ("words", "told"),
    [
        # names
        (["run", "--algorithm", "fedavgg"], ("algorithm.name = 'fedavgg'", "fedavg")),
        ([*EIGHT, "--model.name", "resnet21"], ("model.name = 'resnet21'", "resnet20")),
        (["run", "--data.source", "cifar11"], ("data.source = 'cifar11'", "cifar10")),
        (["run", "--partition.kind", "dirchlet"], ("partition.kind = 'dirchlet'", "dirichlet")),
        ([*EIGHT, "--local.optimizer", "adamm"], ("local.optimizer = 'adamm'", "adam")),
        (["run", "--local.schedule", "linear"], ("local.schedule = 'linear'", "cosine")),
        (["run", "--execution.conv", "fft"], ("execution.conv = 'fft'", "auto")),
        (["run", "--algorithm=fedmr", "--algorithm.granularity=row"], ("algorithm.granularity", "tensor")),
        (["run", "--locl.lr", "1"], ("--locl.lr", "--local.lr")),
        (["runn"], ("command = 'runn'", "run")),
        (["sweep", "nowhere.yaml"], ("nowhere.yaml", "no such file")),
        (["resume", "nowhere"], ("nowhere", "folder")),
        # numbers
        (["run", "--local.lr", "-0.1"], ("local.lr = -0.1", "above 0")),
        (["run", "--local.lr=nan"], ("local.lr", "positive")),
        (["run", "--local.momentum", "1.5"], ("local.momentum = 1.5", "[0.0, 1.0)")),
        (["run", "--local.batch-size", "0"], ("local.batch_size = 0", "at least 1")),
        (["run", "--rounds", "0"], ("rounds = 0", "at least 1")),
        (["run", "--seed", "-1"], ("seed = -1", "outside")),
        (["run", "--local.steps", "3"], ("local.epochs = 5", "null")),
        (["run", "--rounds", "many"], ("rounds = 'many'", "int")),
        # partitions
        (["run", "--partition.kind=iid", "--partition.clients=5000"], ("partition.clients = 5000", "1438")),
        (["run", "--partition.alpha", "0"], ("partition.alpha = 0", "positive")),
        (["run", "--partition.alpha", "0.01"], ("partition.alpha = 0.01", "fewer partition.clients")),
        (["run", "--partition.kind", "natural"], ("partition.kind = 'natural'", "writer")),
        (["run", "--partition.kind", "file"], ("partition.path", "Give")),
        ([*EIGHT, "--cohort.size", "9"], ("cohort.size = 9", "at most 8")),
        (["run", "--cohort.fraction", "0"], ("cohort.fraction = 0", "(0.0, 1.0]")),
        ([*EIGHT, "--evaluation.per-client"], ("evaluation.per_client", "local_test")),
        # machine
        ([*EIGHT, "--execution.devices", "99"], ("execution.devices = 99", "null")),
        (["run", "--output.dir", "/proc/nowhere"], ("output.dir = '/proc/nowhere'", "may write")),
    ],
)  # fmt: skip
def test_a_mistake_on_the_command_line(complaint, words, told):
    said = complaint(*words)
    assert all(part in said for part in told), said


def test_long_values_are_cut(complaint, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"roundz: {list(range(1000))}\n")
    said = complaint("run", str(path))
    assert said.startswith("error: roundz = [0, 1, 2, ") and len(said) < 300


def arrays(**changes):
    """What an npz file of 8 × 8 grey images holds."""
    images = np.zeros((40, 8, 8, 1), np.uint8)
    labels = np.arange(40) % 4
    whole = {
        "train_images": images,
        "train_labels": labels,
        "test_images": images[:8],
        "test_labels": labels[:8],
    }
    return {**whole, **changes}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"train_images": np.zeros((40, 8, 8, 1), np.float32) * np.nan}, ("train_images", "NaN")),
        ({"test_images": np.zeros((8, 9, 8, 1), np.uint8)}, ("test_images", "shape")),
        ({"train_images": np.zeros((40, 8), np.uint8)}, ("train_images", "shape")),
        ({"train_labels": np.zeros(39, np.int64)}, ("train_labels", "40")),
        ({"train_labels": np.full(40, -1)}, ("train_labels", "-1")),
        ({"train_labels": np.zeros(40, np.float32)}, ("train_labels", "integer")),
    ],
)
def test_data_that_does_not_fit_together(complaint, tmp_path, changes, told):
    path = tmp_path / "set.npz"
    np.savez(path, **arrays(**changes))
    said = complaint(
        "run", "--data.source", f"npz:{path}", "--partition.kind", "iid", "--partition.clients", "4"
    )
    assert all(part in said for part in told), said


@pytest.mark.parametrize("spoil", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"\x00" * len(b)])
def test_a_corrupt_npz(complaint, tmp_path, spoil):
    path = tmp_path / "set.npz"
    np.savez(path, **arrays())
    path.write_bytes(spoil(path.read_bytes()))
    assert "set.npz" in complaint("run", "--data.source", f"npz:{path}", "--partition.clients", "4")


def test_a_folder_below_a_file(complaint, tmp_path):
    (tmp_path / "file").touch()
    said = complaint("run", "--output.dir", str(tmp_path / "file" / "run"))
    assert "output.dir" in said and "may write" in said


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("version: 0\n", ("version = 0", "--print-config")),
        ("roundz: 3\n", ("roundz = 3", "rounds")),
        ("local: {lrr: 1}\n", ("local.lrr = 1", "lr")),
        ("local: 3\n", ("local", "mapping")),
        ("algorithm: {name: fedmr, first_stag: 1}\n", ("algorithm.first_stag", "first_stage")),
        ("methods: {A: {rounds: 3}}\nseeds: [0]\n", ("methods", "fedjax-sim sweep ", "run.yaml")),
        ("rounds: [1\n", ("cannot be read: line 2", "Correct the file")),
        ("- 1\n", ("mapping", "field: value")),
    ],
)
def test_a_file_with_a_mistake(complaint, tmp_path, text, told):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    said = complaint("run", str(path))
    assert all(part in said for part in told), said


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("seed: [1]\nout: a\n", ("sweep.seed", "`base`")),
        ("seeds: []\n", ("sweep.seeds", "[0, 1, 2]")),
        ("seeds: [1, 1]\n", ("sweep.seeds", "twice")),
        ("grid: {partition.alpha: 3}\n", ("sweep.grid", "list")),
        ("methods: {A: {}}\nreference: B\n", ("sweep.reference = 'B'", "A")),
        ("methods: {A: {algorithm: fedavgg}}\n", ("algorithm.name = 'fedavgg'", "'A'")),
        ("grid: {partition.alfa: [1]}\n", ("partition.alfa", "alpha")),
        ("goal: up\n", ("sweep.goal", "max or min")),
        ("methods: {a/b: {}, a b: {rounds: 3}}\n", ("same folder", "Rename")),
        # what would change nothing, or get lost
        ("grid: {seed: [1, 2]}\n", ("sweep.grid.seed", "`seeds`")),
        ("grid: {x: {a: {seed: 1}}}\n", ("no such field",)),
        ("methods: {A: {}, B: {seed: 3}}\n", ("sweep.methods.B", "`seeds`")),
        ("methods: {A: {output: {dir: there}}}\n", ("sweep.methods.A", "`out`")),
        ("grid: {output.dir: [a, b]}\n", ("sweep.grid.output.dir", "`out`")),
        ("methods: {A: {local.lr: 1, local: {lr: 2}}}\n", ("sweep.methods.A", "local.lr twice")),
        (
            "methods: {A: {local: {lr: 1}}}\ngrid: {local.lr: [1, 2]}\n",
            ("sweep.methods.A", "grid sets local.lr"),
        ),
        (
            "methods: {A: {algorithm: fedmr}}\ngrid: {algorithm: [moon]}\n",
            ("sweep.methods.A", "algorithm.name"),
        ),
        ("methods: {A: {model: mlp}}\ngrid: {model.name: [lenet]}\n", ("sweep.methods.A", "model.name")),
        ("grid: {partition: {a: {alpha: 1}}, partition.alpha: [2]}\n", ("sweep.grid", "partition.alpha too")),
        ("methods: {A: {}, A: {algorithm: fedmr}}\n", ("line 1", "'A' is there twice")),
        # the same run under two names
        (
            "methods: {A: {algorithm: fedavg}, B: {algorithm: {name: fedavg}}}\n",
            ("B, seed 0", "same run as A"),
        ),
        ("grid: {local.lr: {a: 0.5, b: 5e-1}}\n", ("b, seed 0", "same run")),
        # names that are no text
        ("methods: {1.0: {}}\n", ("sweep.methods = 1.0", "quotes")),
        ("methods: {null: {}}\n", ("sweep.methods = None", "quotes")),
        ("methods: {true: {}}\n", ("sweep.methods = True", "quotes")),
        ("grid: {1: [2]}\n", ("sweep.grid = 1", "quotes")),
        ("grid: {local.lr: {1: 0.1}}\n", ("sweep.grid.local.lr = 1", "quotes")),
        ("methods: {A: fedmr}\n", ("sweep.methods.A = 'fedmr'", "Write {algorithm: fedmr}.")),
        # a run's settings
        ("rounds: 3\nlocal: {lr: 0.1}\n", ("one run (it has rounds)", "fedjax-sim run ", "sweep.yaml")),
        ("rounds: 3\nmethods: {A: {}}\n", ("sweep.rounds = 3", "Put rounds under `base`.")),
    ],
)
def test_a_sweep_with_a_mistake(complaint, tmp_path, text, told):
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    said = complaint("sweep", str(path))
    assert all(part in said for part in told), said


def test_as_a_user_types_it(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "fedjax_sim.cli", "run", "--local.lr", "-1"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: local.lr = -1.0: must be a positive, finite number. Give a value above 0.\n"


@pytest.mark.parametrize("command", [["run"], ["plan"], ["run", "--output.dir", "here"]])
@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("no\nsuch backend")])
def test_hardware_that_is_not_there(complaint, monkeypatch, tmp_path, command, error):
    """JAX_PLATFORMS=cuda gives an AssertionError without a word, other names a RuntimeError."""

    def devices():
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("jax.devices", devices)
    said = complaint(*command)
    assert "JAX_PLATFORMS" in said and "JAX cannot start on it" in said and "unset JAX_PLATFORMS" in said
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize("command", [["run"], ["plan"], ["run", "--output.dir", "here"]])
def test_jit_switched_off(complaint, monkeypatch, tmp_path, command):
    monkeypatch.chdir(tmp_path)
    with jax.disable_jit():
        said = complaint(*command)
    assert "JAX_DISABLE_JIT = True" in said and "Unset it" in said and not (tmp_path / "here").exists()
