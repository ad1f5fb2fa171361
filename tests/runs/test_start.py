"""What the first round starts from: the model of another run, and central training on samples of nobody's."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from fedjax_sim import data, models, runs
from fedjax_sim.algorithms import FedAvg, FedMR, Local
from fedjax_sim.cli import flags
from fedjax_sim.config import (
    CohortConfig,
    EvaluationConfig,
    ExecutionConfig,
    InertiaConfig,
    InitialConfig,
    LocalConfig,
    ModelConfig,
    OutputConfig,
    PeelConfig,
    RunConfig,
)
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.rng import INIT, key_for, run_key
from fedjax_sim.data import PartitionConfig
from fedjax_sim.runs import finetune
from fedjax_sim.runs import plan as planning
from fedjax_sim.runs.assemble import prepare
from fedjax_sim.runs.federation import Simulation
from fedjax_sim.runs.folder import Folder
from fedjax_sim.runs.start import STREAM, central, with_start
from tests import oracles
from tests.runs.test_runs import RECORDS, Crash, crash, records_of, same, stop_at

PRETRAINED = InitialConfig(pretrain=3, holdout=0.25)


def tiny(folder=None, **changes):
    base = RunConfig(
        rounds=3,
        partition=PartitionConfig(kind="iid", clients=4, samples_per_client=30),
        model=ModelConfig(options={"hidden": [6]}),
        local=LocalConfig(epochs=None, steps=2, batch_size=16, lr=0.1),
        cohort=CohortConfig(size=2),
        evaluation=EvaluationConfig(every=0),
        execution=ExecutionConfig(devices=1, wave=1),
        output=OutputConfig(
            dir=None if folder is None else str(folder),
            checkpoint_every=2,
            tensorboard=False,
            figures=False,
            progress=False,
        ),
    )
    return dataclasses.replace(base, **changes)


def fresh(model, seed):
    return model.init(key_for(key_for(run_key(seed), INIT), 0))


def refused(config, **given):
    with pytest.raises(UserError) as caught:
        with_start(prepare(config, **given))
    return caught.value


# --- pretrained -----------------------------------------------------------------------------------------


def test_pretraining_is_sgd_on_what_is_put_aside():
    """By hand, in float64: three epochs at the rate of round 0, one momentum buffer, an order of its own."""
    dataset, _ = oracles.world((60,))
    config = tiny(
        seed=7,
        initial=PRETRAINED,
        partition=PartitionConfig("iid", clients=3, min_size=5),
        local=LocalConfig(
            steps=2, epochs=None, batch_size=4, lr=0.1, momentum=0.9, weight_decay=0.01, schedule="cosine"
        ),
    )
    model = models.create("mlp", dataset.train_images.shape[1:], dataset.num_classes, hidden=(4,))
    simulation = Simulation(config, dataset=dataset, model=model)
    mine = simulation.setup.partition.server
    assert mine is not None and len(mine) == 15
    assert not set(mine) & set(np.concatenate(simulation.setup.partition.train))
    local = dataclasses.replace(config.local, epochs=3, steps=None)
    start = oracles.doubled(fresh(model, 7))["params"]
    x, labels = oracles.normalised(dataset.train_images[mine]), dataset.train_labels[mine]
    batches = list(oracles.client_batches(7, 0, STREAM, 15, local))
    wanted, _, _ = oracles.local_sgd(start, x, labels, batches, local, 0.1)
    oracles.assert_trees_close(simulation.variables["params"], wanted)
    assert oracles.far_apart(wanted, start) > 0.05
    others = list(oracles.client_batches(7, 0, 0, 15, local))
    assert not np.array_equal(np.concatenate(batches), np.concatenate(others))


def test_a_run_inside_a_run_only_trains():
    """What the outer run measures is neither compiled into pretraining nor into fine-tuning."""
    config = tiny(
        seed=3,
        initial=PRETRAINED,
        partition=PartitionConfig(kind="iid", clients=4, samples_per_client=30, local_test="holdout"),
        evaluation=EvaluationConfig(every=1, batch_size=7, per_client=True, per_class=True, finetune=2),
        peel=PeelConfig(every=1),
        inertia=InertiaConfig(measure=True, every=1),
        given={"dataset": "own"},
    )
    dataset, partition = oracles.world((8,) * 4)
    for made, taken in ((central(config), {}), (finetune.apart(config), {"algorithm": Local()})):
        setup = prepare(made, dataset=dataset, partition=partition, **taken)
        assert not setup.meters and not setup.trainer.gradients
        assert setup.observers == []
        for name in ("initial", "peel", "inertia", "output", "given"):
            assert getattr(made, name) == getattr(RunConfig(), name)
        assert made.evaluation == EvaluationConfig(every=0, batch_size=7)
        for name in ("seed", "data", "partition", "model"):
            assert getattr(made, name) == getattr(config, name)


def test_all_algorithms_and_partitions_start_from_the_same():
    base = tiny(initial=PRETRAINED)
    alike = [
        Simulation(dataclasses.replace(base, **change)).variables
        for change in (
            {},
            {"algorithm": FedMR(first_stage=1)},
            {"algorithm": Local(), "cohort": CohortConfig(size=4)},
            {"partition": PartitionConfig("dirichlet", clients=9), "execution": ExecutionConfig(devices=2)},
        )
    ]
    for one in alike[1:3]:
        oracles.assert_trees_equal(one, alike[0])
    oracles.assert_trees_close(alike[3], alike[0], atol=1e-6)
    for change in ({"seed": 1}, {"initial": InitialConfig()}):
        assert oracles.far_apart(Simulation(dataclasses.replace(base, **change)).variables, alike[0]) > 0.01


def test_a_pretrained_run_is_resumed_bit_for_bit(tmp_path, monkeypatch):
    """Cut before the first checkpoint the model is trained again; cut after it, never."""
    config = tiny(initial=PRETRAINED)
    whole = runs.run(config)
    for cut in (1, 2):
        folder = tmp_path / str(cut)
        with monkeypatch.context() as patch:
            stop_at(patch, cut, crash)
            with pytest.raises(Crash):
                runs.run(tiny(folder, initial=PRETRAINED))
        with monkeypatch.context() as patch:
            if cut == 2:
                patch.setattr("fedjax_sim.runs.start.pretrained", crash)
            done = runs.resume(folder)
            assert same(runs.load(folder).variables, done.variables)
        assert list(done.metrics) == list(whole.metrics) and same(done.variables, whole.variables)
        assert done.config.initial == PRETRAINED
        np.testing.assert_array_equal(done.partition.server, whole.partition.server)


def test_clients_that_hold_everything_leave_nothing_to_pretrain_on():
    digits = data.load("digits")
    all_of_it = data.partition(digits, PartitionConfig("iid", clients=4))
    error = refused(tiny(initial=PRETRAINED), partition=all_of_it)
    assert error.field == "initial.holdout" and "all but 0" in str(error)
    setup = prepare(tiny(initial=PRETRAINED), partition=data.partition(digits, tiny().partition))
    mine = setup.partition.server
    assert mine is not None and len(mine) == round(0.25 * 1438)


def test_pretraining_that_leaves_float32_is_said_and_nothing_begins(tmp_path):
    local = LocalConfig(steps=1, epochs=None, lr=3e38, weight_decay=1e3, non_finite="skip")
    with pytest.raises(UserError, match="not finite") as caught:
        runs.run(tiny(tmp_path / "run", initial=PRETRAINED, local=local))
    assert caught.value.field == "initial.pretrain"
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_flags_and_a_plan():
    config, _ = flags.parse(["--initial.pretrain", "5", "--initial.holdout", "0.1"], "run", "")
    assert config.initial == InitialConfig(pretrain=5, holdout=0.1)
    assert planning.plan(tiny(initial=PRETRAINED)).peak > 0


# --- from another run -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A finished FedMR run of another seed."""
    folder = tmp_path_factory.mktemp("other") / "run"
    return runs.run(tiny(folder, seed=3, algorithm=FedMR(first_stage=1)))


@pytest.fixture
def copied(other, tmp_path):
    return shutil.copytree(other.folder, tmp_path / "other")


def starting(folder, home=None, **changes):
    return tiny(home, initial=InitialConfig(run=str(folder)), **changes)


def test_the_first_round_starts_from_the_deployed_model_of_the_run(other, monkeypatch):
    for algorithm in (FedAvg(), FedMR(first_stage=1)):
        simulation = Simulation(starting(other.folder, algorithm=algorithm))
        oracles.assert_trees_equal(simulation.variables, other.variables)
        oracles.run(simulation, 1)
        oracles.assert_trees_equal(Simulation(simulation.setup).variables, other.variables)
    assert oracles.far_apart(other.variables, fresh(simulation.setup.model, 3)) > 0.01
    monkeypatch.chdir(other.folder.parent)
    oracles.assert_trees_equal(Simulation(starting(other.folder.name)).variables, other.variables)


def test_an_unfinished_run_gives_its_newest_sound_checkpoint(tmp_path, monkeypatch):
    config = tiny(tmp_path / "cut")
    config = dataclasses.replace(config, output=dataclasses.replace(config.output, checkpoint_every=1))
    with monkeypatch.context() as patch:
        stop_at(patch, 2, crash)
        with pytest.raises(Crash):
            runs.run(config)
    wanted = Simulation(tiny())
    for number in (1, 2):
        oracles.run(wanted, 1)
        if number == 1:
            first = jax.device_get(wanted.variables)
    oracles.assert_trees_equal(Simulation(starting(tmp_path / "cut")).variables, wanted.variables)
    for path in (tmp_path / "cut" / "checkpoints" / "2").rglob("*"):
        if path.is_file() and path.relative_to(tmp_path / "cut" / "checkpoints" / "2").parts[0] != "about":
            path.write_bytes(b"")
    with pytest.warns(UserWarning, match="round 2 is damaged"):
        simulation = Simulation(starting(tmp_path / "cut"))
    oracles.assert_trees_equal(simulation.variables, first)


def test_a_run_that_has_begun_needs_the_other_only_before_its_first_checkpoint(copied, tmp_path, monkeypatch):
    whole = runs.run(starting(copied))
    for cut in (1, 2):
        with monkeypatch.context() as patch:
            stop_at(patch, cut, crash)
            with pytest.raises(Crash):
                runs.run(starting(copied, tmp_path / str(cut)))
    again = runs.resume(tmp_path / "1")
    shutil.rmtree(copied)
    for done in (again, runs.resume(tmp_path / "2")):
        assert list(done.metrics) == list(whole.metrics) and same(done.variables, whole.variables)
        assert same(runs.load(done.folder).variables, whole.variables)
        assert done.config.initial.run == str(copied)


def test_a_model_that_was_given_in_python_is_given_again(tmp_path):
    model = models.create("mlp", (8, 8, 1), 10, hidden=(5,))
    done = runs.run(tiny(tmp_path / "given", rounds=1), model=model)
    simulation = Simulation(starting(done.folder), model=model)
    oracles.assert_trees_equal(simulation.variables, done.variables)
    error = refused(starting(done.folder))
    assert error.field == "initial.run" and "its model is another (mlp" in str(error)


def test_there_must_be_a_run_with_a_checkpoint(other, copied, tmp_path):
    assert "no such folder" in str(refused(starting(tmp_path / "nowhere")))
    assert "no config.yaml" in str(refused(starting(tmp_path)))
    kept = records_of(copied, tmp_path / "records")
    assert sorted(path.name for path in kept.iterdir()) == sorted(RECORDS)
    error = refused(starting(kept))
    assert error.field == "initial.run" and "only the records" in str(error)
    (kept / "metrics.parquet").unlink()
    assert "first checkpoint" in str(refused(starting(kept)))


def test_another_model_is_named_with_its_first_differing_leaf(other):
    error = refused(starting(other.folder, model=ModelConfig(options={"hidden": [7]})))
    assert error.field == "initial.run"
    assert "['params']['fc1']['bias'] is float32[6] there, and float32[7] here" in str(error)
    deeper = refused(starting(other.folder, model=ModelConfig(options={"hidden": [6, 6]})))
    assert "there" in str(deeper)
    lenet = refused(starting(other.folder, model=ModelConfig("mcmahan")))
    assert "(mlp; this run's is mcmahan)" in str(lenet)
    twin = dataclasses.replace(models.create("mlp", (8, 8, 1), 10, hidden=(6,)), name="twin")
    assert "this run's is twin" in str(refused(starting(other.folder), model=twin))


def test_a_run_that_another_process_writes_is_left_alone(other, copied):
    (copied / "metrics.parquet").unlink()
    with Folder(copied).claimed():
        assert "another process" in str(refused(starting(copied)))
    oracles.assert_trees_equal(Simulation(starting(copied)).variables, other.variables)


def test_an_algorithm_that_was_given_in_python_cannot_be_had(copied):
    about = (copied / "config.yaml").read_text()
    (copied / "config.yaml").write_text(about.replace("given: {}", "given: {algorithm: Mine()}"))
    assert "given in Python" in str(refused(starting(copied)))
