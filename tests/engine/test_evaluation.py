"""Accuracy and loss against NumPy, on sizes that do not divide."""

import jax
import numpy as np
import pytest

from fedjax_sim import models
from fedjax_sim.algorithms import FedAvg, Local
from fedjax_sim.config import EvaluationConfig
from fedjax_sim.core.task import Metric
from fedjax_sim.data import Partition
from fedjax_sim.data.ragged import Ragged
from fedjax_sim.engine import placement
from fedjax_sim.engine.device_data import DataStore
from fedjax_sim.engine.evaluation import ClientEvaluator, Evaluator, by_group, by_list, figure
from fedjax_sim.tasks.classification import ACCURACY
from tests import oracles

MODEL = models.create("mlp", (3, 3, 1), 3, hidden=(5,))


def numpy_outcome(variables, images, labels):
    logits, _ = oracles.mlp(oracles.doubled(variables["params"]), oracles.normalised(images))
    return oracles.cross_entropies(logits, labels), logits.argmax(1)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    ("count", "devices", "batch"), [(23, 4, 5), (23, 1, 500), (3, 4, 2), (24, 2, 4), (1, 2, 1)]
)
def test_every_sample_once_whatever_the_padding(count, devices, batch, whole, monkeypatch):
    """Where the samples are whole on every device, and where each device has its own."""
    monkeypatch.setattr(DataStore, "shares_host", whole)
    dataset, _ = oracles.world((5,), tests=count)
    variables = MODEL.init(jax.random.key(0))
    store = DataStore(placement.make_mesh(devices))
    evaluator = Evaluator(MODEL, dataset.task, store, dataset.test, batch)
    assert store.has(dataset.test) == whole
    losses, statistics = evaluator(variables)
    wanted, classes = numpy_outcome(variables, dataset.test_images, dataset.test_labels)
    np.testing.assert_allclose(losses, wanted, rtol=1e-5, atol=1e-6)
    right = np.float32(classes == dataset.test_labels)
    np.testing.assert_array_equal(statistics["accuracy"], right[:, None])


@pytest.mark.parametrize(("devices", "batch"), [(2, 3), (4, 100)])
def test_a_stack_of_models_each_on_its_own_samples(devices, batch, rng):
    dataset, _ = oracles.world((40,))
    each = [MODEL.init(jax.random.key(c)) for c in range(4)]
    stack = jax.tree.map(lambda *leaves: np.stack(leaves), *each)
    indices = rng.integers(0, 40, (4, 7)).astype(np.int32)
    mesh = placement.make_mesh(devices)
    evaluator = ClientEvaluator(MODEL, dataset.task, mesh, batch)
    losses, statistics = evaluator(stack, indices, DataStore(mesh).whole(dataset.train))
    for c, chosen in enumerate(indices):
        wanted, classes = numpy_outcome(each[c], dataset.train_images[chosen], dataset.train_labels[chosen])
        np.testing.assert_allclose(losses[c], wanted, rtol=1e-5, atol=1e-6)
        right = np.float32(classes == dataset.train_labels[chosen])
        np.testing.assert_array_equal(statistics["accuracy"][c], right[:, None])


def test_a_figure_of_groups_is_made_of_their_sums_and_nan_where_there_are_none():
    hits, owners = np.float32([1, 0, 1, 1])[:, None], np.array([0, 0, 2, 2])
    np.testing.assert_array_equal(by_group(ACCURACY, hits, owners, 4), [0.5, np.nan, 1.0, np.nan])
    spread = Metric("spread", "min", lambda outputs, example: outputs, lambda m: m[..., 1] - m[..., 0] ** 2)
    values = np.float32([1, 3, 5, 5])
    statistics = np.stack([values, values**2], 1)
    np.testing.assert_array_equal(by_group(spread, statistics, owners, 4), [1, np.nan, 0, np.nan])
    assert figure(spread, statistics) == np.var(values.astype(np.float64))


def _with_tests(test_from, sizes=(12, 7, 20, 3, 31)):
    """A partition whose clients have 1 to 4 test samples of their own, some of them shared."""
    dataset, partition = oracles.world(sizes)
    draw = np.random.default_rng(5)
    bound = len(dataset.train_labels if test_from == "train" else dataset.test_labels)
    tests = tuple(draw.choice(bound, n, replace=False) for n in (4, 1, 3, 2, 4))
    train = partition.train
    if test_from == "train":  # what is held out trains nobody
        train = tuple(own[~np.isin(own, np.concatenate(tests))] for own in train)
    return dataset, Partition(train, tests, test_from)


@pytest.mark.parametrize("test_from", ["test", "train"])
@pytest.mark.parametrize("algorithm", [FedAvg(), Local()], ids=["shared", "personal"])
def test_rows_of_an_evaluation_equal_numpy(test_from, algorithm):
    given = dataset, partition = _with_tests(test_from)
    config = EvaluationConfig(every=1, batch_size=4, per_class=True, per_client=True)
    simulation = oracles.simulate(
        given=given, algorithm=algorithm, model=MODEL, rounds=1, devices=2, evaluation=config, cohort=4
    )
    rows = [row for row in oracles.run(simulation) if row.metric.startswith(("accuracy", "loss", "client"))]
    deployed = jax.device_get(simulation.variables)
    losses, predicted = numpy_outcome(deployed, dataset.test_images, dataset.test_labels)
    correct = predicted == dataset.test_labels
    assert oracles.value_of(rows, "loss", 1) == pytest.approx(losses.mean(), rel=1e-5)
    assert oracles.value_of(rows, "accuracy", 1) == pytest.approx(correct.mean())
    for c in range(3):
        wanted = correct[dataset.test_labels == c].mean()
        assert oracles.value_of(rows, f"accuracy_class_{c}", 1) == pytest.approx(wanted)

    images = dataset.train_images if test_from == "train" else dataset.test_images
    labels = dataset.train_labels if test_from == "train" else dataset.test_labels
    accuracies = {}
    for client, own in enumerate(partition.test):
        model = deployed
        if isinstance(algorithm, Local):
            model = jax.tree.map(
                lambda leaf, c=client: np.asarray(leaf)[c], simulation.state.algorithm.models
            )
        accuracies[client] = (numpy_outcome(model, images[own], labels[own])[1] == labels[own]).mean()
    assert {row.client: row.value for row in rows if row.metric == "client_accuracy"} == pytest.approx(
        accuracies
    )
    values = list(accuracies.values())
    for name, wanted in (
        ("mean", np.mean(values)),
        ("p10", np.percentile(values, 10)),
        ("p90", np.percentile(values, 90)),
    ):
        assert oracles.value_of(rows, f"client_accuracy_{name}", 1) == pytest.approx(wanted)
    assert all(row.round == 1 for row in rows)


def test_more_clients_than_one_chunk_of_personal_models():
    """67 personal models on two devices: one chunk of 64 and a rest that wraps around."""
    dataset, partition = oracles.world((2,) * 67, tests=67)
    partition = Partition(partition.train, tuple(np.array([c]) for c in range(67)), "test")
    config = EvaluationConfig(every=0, per_client=True)
    simulation = oracles.simulate(
        given=(dataset, partition), algorithm=Local(), model=MODEL, cohort=2, devices=2, evaluation=config
    )
    # Personal models that differ, without training any: client c's last bias always answers class c % 3.
    models_ = jax.device_get(simulation.state.algorithm.models)
    models_["params"]["fc2"]["bias"] = 1e3 * np.eye(3, dtype=np.float32)[np.arange(67) % 3]
    simulation.state = simulation.state.replace(algorithm=simulation.state.algorithm.replace(models=models_))
    rows = simulation.evaluate()()
    got = {row.client: row.value for row in rows if row.metric == "client_accuracy"}
    assert got == {c: float(dataset.test_labels[c] == c % 3) for c in range(67)}


@pytest.mark.parametrize("whole", [True, False])
def test_figures_of_lists_are_those_of_each_list_to_the_last_bit(whole):
    rng = np.random.default_rng(0)
    lists = Ragged.cut(np.arange(600), np.append(rng.multinomial(600, np.ones(40) / 40), 0))
    statistics = rng.random((600, 2)).astype(np.float32)
    if whole:
        statistics = np.rint(statistics)
    metric = Metric("m", "max", lambda outputs, _: outputs, lambda means: means[..., 0] / (1 + means[..., 1]))
    found = by_list(metric, statistics, lists)
    each = [figure(metric, statistics[part]) if len(part) else np.nan for part in lists]
    np.testing.assert_array_equal(found, each)
