"""FedRoD: both heads by hand, classes that a client lacks, and which model is used for what."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from fedjax_sim import models
from fedjax_sim.algorithms import CONFIGS, Ditto, FedAvg, FedProx, FedRoD
from fedjax_sim.config import EvaluationConfig, InertiaConfig, PeelConfig
from fedjax_sim.core.errors import UserError
from tests import oracles
from tests.algorithms import by_hand, personal

SIZES = (12, 7, 20, 3, 31)


def simulate(**keywords):
    """Five clients of few of the 4 classes each; the deepest head reads 4 numbers."""
    settings = {"given": by_hand.skewed(SIZES), "algorithm": FedRoD(), "cohort": 3, **keywords}
    model = models.create("mlp", (3, 3, 1), 4, hidden=(5, 4))
    return oracles.simulate(model=model, **settings)


def heads(simulation):
    """P of all clients, [N, …]."""
    return oracles.doubled(simulation.state.clients["rule"].head)


def row(tree, k):
    return oracles.map_trees(lambda leaf: leaf[k], tree)


def with_head(params, head):
    """The parameters with `head` added to the classifier."""
    return {**params, "fc3": by_hand.plus(params["fc3"], head)}


def rounds(simulation, count):
    """NumPy rounds. -> (generic parameters, client -> P, mean generic losses of the last cohort)."""
    setup = simulation.setup
    local, labels = setup.config.local, setup.dataset.train_labels
    x = oracles.doubled(simulation.variables["params"])
    own = dict.fromkeys(range(setup.num_clients), oracles.map_trees(np.zeros_like, x["fc3"]))
    for index in range(count):
        trained, sizes, losses = [], [], []
        for client in by_hand.cohort(simulation, index):
            held = np.bincount(labels[setup.partition.train[client]], minlength=4)
            prior = np.where(held > 0, np.log(np.maximum(held, 1)), -1e9)
            w, head = x, own[client]
            memory, memory_head = (oracles.map_trees(np.zeros_like, tree) for tree in (w, head))
            total = 0.0
            for images, y in by_hand.batches(simulation, index, client):
                loss, g = oracles.mlp_gradient(w, images, y, offset=prior)
                generic, _ = oracles.mlp(w, images)
                _, g_personal = oracles.mlp_gradient({**w, "fc3": head}, images, y, offset=generic)
                g_head = g_personal.pop("fc3")
                if setup.config.algorithm.personal_loss == "both":
                    g = {**g, **by_hand.plus({name: g[name] for name in g_personal}, g_personal)}
                memory = by_hand.plus(g, memory, local.momentum)
                memory_head = by_hand.plus(g_head, memory_head, local.momentum)
                w = by_hand.plus(w, memory, -local.lr)
                head = by_hand.plus(head, memory_head, -local.lr)
                total += loss * len(y)
            own[client] = head
            trained.append(w)
            sizes.append(int(held.sum()))
            losses.append(total / sizes[-1] / local.epochs)
        x = oracles.weighted_mean(trained, sizes)
    return x, own, np.average(losses, weights=sizes)


@pytest.mark.parametrize(
    ("trained", "layout"),
    [
        pytest.param("head", {}, marks=pytest.mark.slow),
        ("head", {"devices": 2, "wave": 2}),
        pytest.param("both", {}, marks=pytest.mark.slow),
    ],
    ids=["single", "wide", "body too"],
)
def test_rounds_are_numpys_and_each_model_is_evaluated(trained, layout):
    simulation = simulate(
        algorithm=FedRoD(personal_loss=trained),
        momentum=0.9,
        epochs=4,
        evaluation=EvaluationConfig(every=1, per_client=True),
        **layout,
    )
    counts = simulation.setup.label_counts
    assert (counts == 0).any(1).all()  # every client lacks some class
    x, own, loss = rounds(simulation, 2)
    rows = oracles.run(simulation)
    generic = oracles.doubled(simulation.variables["params"])
    oracles.assert_trees_close(generic, x)
    got = heads(simulation)
    seen = {client for index in range(2) for client in by_hand.cohort(simulation, index)}
    assert 0 < len(seen) < 5
    for client in range(5):
        oracles.assert_trees_close(row(got, client), own[client])
        assert any(leaf.any() for leaf in oracles.leaves(own[client])) == (client in seen)
    np.testing.assert_allclose(oracles.value_of(rows, "train_loss", 2), loss, rtol=1e-5)

    # The deployed model is the generic one; clients use the sum of both heads, and without P the generic.
    images, labels = simulation.setup.dataset.test_images, simulation.setup.dataset.test_labels
    guesses = oracles.mlp(x, oracles.normalised(images))[0].argmax(1)
    np.testing.assert_allclose(oracles.value_of(rows, "accuracy", 2), np.mean(guesses == labels))
    personal_models = [with_head(x, own[client]) for client in range(5)]
    expected = by_hand.accuracies(simulation, personal_models)
    told = [row.value for row in rows if row.metric == "client_accuracy" and row.round == 2]
    np.testing.assert_allclose(told, expected)
    assert not np.allclose(expected, by_hand.accuracies(simulation, [x] * 5))
    personalise: Any = simulation.setup.algorithm.local.personal
    for client in range(5):
        kept = personal.row(simulation.state.clients["rule"], client)
        used = personalise(kept, jax.device_get(simulation.variables))["params"]
        oracles.assert_trees_close(used, personal_models[client])


def test_the_generic_loss_ignores_classes_that_a_client_lacks():
    """Their columns of W stay where they were; P learns that they are not there."""
    simulation = simulate(given=by_hand.skewed((16, 14)), cohort=1, rounds=1)
    (client,) = by_hand.cohort(simulation, 0)
    lacking = simulation.setup.label_counts[client] == 0
    assert 1 < (~lacking).sum() < 4
    before = oracles.doubled(simulation.variables["params"])["fc3"]
    oracles.run(simulation)
    after = oracles.doubled(simulation.variables["params"])["fc3"]
    moved = np.abs(after["kernel"] - before["kernel"]).max(0)
    assert (moved[lacking] < 1e-6).all() and (moved[~lacking] > 1e-3).all()
    assert row(heads(simulation), client)["bias"][lacking].max() < 0


def test_diagnostics_see_the_generic_model():
    given = by_hand.skewed((24, 31, 27), tests=20)
    simulation = by_hand.with_settings(
        simulate(given=given),
        peel=PeelConfig(every=1, class_samples=2),
        inertia=InertiaConfig(measure=True, every=1),
    )
    before = oracles.doubled(simulation.variables["params"])
    rows = oracles.run(simulation, 1)
    after = oracles.doubled(simulation.variables["params"])
    for layer in ("fc1", "fc2", "fc3"):
        a, b = before[layer]["kernel"], after[layer]["kernel"]
        (step,) = [row.value for row in rows if (row.metric, row.layer) == ("inertia_step", layer)]
        np.testing.assert_allclose(step, np.linalg.norm(b - a) / np.linalg.norm(a), rtol=1e-4)
        (gradient,) = [row.value for row in rows if (row.metric, row.layer) == ("gradient_norm", layer)]
        assert 0 < gradient < 10
    assert {row.state for row in rows} >= {"before", "after"}
    assert all(np.isfinite(row.value) for row in rows)


def test_a_client_that_is_left_out_keeps_its_head():
    simulation = simulate(cohort=5, epochs=1, non_finite="skip", weight_decay=1e3, lr=1e-4)
    oracles.run(simulation, 1)
    before = jax.device_get((simulation.state.algorithm, simulation.state.clients))
    assert any(leaf.any() for leaf in oracles.leaves(heads(simulation)))
    state, included = by_hand.overflowing(simulation)
    assert not included.any()
    jax.tree.map(np.testing.assert_array_equal, jax.device_get((state.algorithm, state.clients)), before)


def test_mistakes_are_named():
    blind = oracles.context(
        dataclasses.replace(personal.deep(), peel_points=()),
        5,
        2,
        3,
    )
    for algorithm, field, told, context in (
        (FedRoD(), "model", "does not mark it", blind),
        (FedProx(inner=FedRoD()), "algorithm.inner", "train more", None),
        (Ditto(inner=FedRoD()), "algorithm.inner", "beside the model", None),
    ):
        context = context or oracles.context(personal.deep(), 5, 2, 3)
        with pytest.raises(UserError, match=told) as caught:
            algorithm.build(context)
        assert caught.value.field == field
    with pytest.raises(UserError, match="samples, uniform") as caught:
        CONFIGS["fedrod"](weights="even")
    assert caught.value.field == "algorithm.weights"
    with pytest.raises(UserError, match="head, both") as caught:
        CONFIGS["fedrod"](personal_loss="body")
    assert caught.value.field == "algorithm.personal_loss"


@pytest.mark.slow
def test_with_equal_classes_the_generic_model_is_fedavg_s():
    """log n is then the same for all classes, and the softmax does not see it."""
    dataset, _ = oracles.world((18, 18))
    dataset = dataclasses.replace(dataset, train_labels=np.repeat(np.arange(3, dtype=np.int32), 12))
    given = dataset, oracles.Partition((np.arange(0, 36, 2), np.arange(1, 36, 2)))
    finals = []
    for algorithm in (FedRoD(), FedAvg()):
        simulation = oracles.simulate(given=given, algorithm=algorithm, momentum=0.5)
        oracles.run(simulation)
        finals.append(jax.device_get(simulation.variables))
    oracles.assert_trees_close(*finals, atol=1e-6)
