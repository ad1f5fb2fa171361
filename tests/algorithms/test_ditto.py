"""Ditto: both models by hand, the algorithm inside untouched, and what a client itself uses."""

from typing import Any

import jax
import numpy as np
import pytest

from fedjax_sim import models
from fedjax_sim.algorithms import (
    LIPS,
    Ditto,
    FedAvg,
    FedMR,
    FedProx,
    FedRep,
    FedRoD,
    Local,
    Scaffold,
)
from fedjax_sim.config import EvaluationConfig, InertiaConfig, PeelConfig
from fedjax_sim.core.errors import UserError
from tests import oracles
from tests.algorithms import by_hand, personal
from tests.algorithms.families import WIDE_OR_SINGLE

CONTEXT = oracles.context(personal.deep(), num_clients=5, cohort_size=2, rounds=3, epochs=2)


def simulate(algorithm, **keywords):
    settings = {"model": personal.deep(), "cohort": 3, **keywords}
    return oracles.simulate(personal.SIZES, algorithm=algorithm, **settings)


def own_models(simulation):
    """v of all clients, [N, …]."""
    return jax.device_get(simulation.state.clients["rule"]["v"])


def rounds(simulation, strength, count):
    """NumPy rounds over FedAvg. -> (global parameters, client -> v)."""
    setup = simulation.setup
    local = setup.config.local
    x = oracles.doubled(simulation.variables["params"])
    own: dict[int, Any] = dict.fromkeys(range(setup.num_clients), x)
    for index in range(count):
        trained, sizes = [], []
        for client in by_hand.cohort(simulation, index):
            w, v = x, own[client]
            memory = memory_v = oracles.map_trees(np.zeros_like, x)
            for images, labels in by_hand.batches(simulation, index, client):
                _, g = oracles.mlp_gradient(w, images, labels)
                _, g_v = oracles.mlp_gradient(v, images, labels)
                g_v = by_hand.plus(g_v, by_hand.minus(v, x), strength)
                memory, memory_v = (
                    by_hand.plus(g, memory, local.momentum),
                    by_hand.plus(g_v, memory_v, local.momentum),
                )
                w, v = by_hand.plus(w, memory, -local.lr), by_hand.plus(v, memory_v, -local.lr)
            own[client] = v
            trained.append(w)
            sizes.append(len(setup.partition.train[client]))
        x = oracles.weighted_mean(trained, sizes)
    return x, own


@pytest.mark.parametrize("layout", WIDE_OR_SINGLE)
def test_both_models_are_numpys(layout):
    simulation = simulate(Ditto(strength=0.8), momentum=0.9, lr=0.05, **layout)
    start = oracles.doubled(simulation.variables["params"])
    x, own = rounds(simulation, 0.8, 2)
    lax = rounds(simulation, 0.0, 2)[1]
    oracles.run(simulation)
    oracles.assert_trees_close(simulation.variables["params"], x)
    seen = {client for index in range(2) for client in by_hand.cohort(simulation, index)}
    held = own_models(simulation)
    for client in range(5):
        oracles.assert_trees_close(personal.row(held, client)["params"], own[client])
        if client in seen:
            assert oracles.far_apart(own[client], x) > 1e-2
            assert oracles.far_apart(own[client], lax[client]) > 1e-3
        else:
            oracles.assert_trees_equal(oracles.doubled(personal.row(held, client)["params"]), start)
    assert 0 < len(seen) < 5


@pytest.mark.slow  # to rounding by default: test_diagnostics_see_the_models_of_the_algorithm_inside
@pytest.mark.parametrize(
    "inner",
    [
        Scaffold(option="I"),
        FedRep(head_epochs=1),
        LIPS(inner=FedMR(), period=2, density=0.5, layers="inner"),
    ],
    ids=lambda inner: type(inner).__name__,
)
@pytest.mark.usefixtures("optimised")
def test_the_algorithm_inside_is_untouched(inner):
    """Bit for bit, with what it keeps on clients, and batch statistics."""
    model = personal.normed()
    alone, wrapped = (
        simulate(algorithm, model=model, momentum=0.5, wave=3, rounds=3)
        for algorithm in (inner, Ditto(inner=inner, strength=0.3))
    )
    rows = [oracles.run(simulation) for simulation in (alone, wrapped)]
    oracles.assert_trees_equal(wrapped.variables, alone.variables)
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.device_get((wrapped.state.algorithm, wrapped.state.clients["rule"]["inner"])),
        jax.device_get((alone.state.algorithm, alone.state.clients["rule"])),
    )
    assert rows[0] == rows[1]
    assert oracles.far_apart(personal.row(own_models(wrapped), 0), alone.variables) > 1e-2


def test_without_strength_clients_train_alone():
    """Their own statistics included; the global model has others."""
    keywords = {"model": personal.normed(), "cohort": 4, "rounds": 3, "momentum": 0.5}
    ditto, alone = (simulate(algorithm, **keywords) for algorithm in (Ditto(strength=0.0), Local()))
    for simulation in (ditto, alone):
        oracles.run(simulation)
    oracles.assert_trees_close(own_models(ditto), jax.device_get(alone.state.algorithm.models), atol=1e-6)
    statistics = personal.row(own_models(ditto), 0)["batch_stats"]
    assert oracles.far_apart(statistics, ditto.variables["batch_stats"]) > 1e-3


def test_a_client_is_evaluated_with_its_own_model():
    given = by_hand.skewed((9, 14, 11, 6, 20))
    simulation = oracles.simulate(
        given=given,
        algorithm=Ditto(strength=0.1),
        cohort=3,
        evaluation=EvaluationConfig(every=1, per_client=True),
        epochs=8,
    )
    rows = oracles.run(simulation)
    held = own_models(simulation)
    own = [oracles.doubled(personal.row(held, client)["params"]) for client in range(5)]
    expected = by_hand.accuracies(simulation, own)
    got = [row.value for row in rows if row.metric == "client_accuracy" and row.round == 2]
    np.testing.assert_allclose(got, expected)
    shared = by_hand.accuracies(simulation, [oracles.doubled(simulation.variables["params"])] * 5)
    assert not np.allclose(shared, expected)


def test_diagnostics_see_the_models_of_the_algorithm_inside():
    """Every row of peeling and inertia is that of a run without Ditto."""
    given = by_hand.skewed((24, 31, 27), tests=20)
    both = []
    for algorithm in (FedAvg(), Ditto()):
        plain = oracles.simulate(
            given=given, algorithm=algorithm, model=models.create("mlp", (3, 3, 1), 4, hidden=(5,))
        )
        both.append(
            by_hand.with_settings(
                plain,
                peel=PeelConfig(every=1, class_samples=2),
                inertia=InertiaConfig(measure=True, every=1),
            )
        )
    rows = [oracles.run(simulation) for simulation in both]
    assert {"inertia_step", "gradient_norm"} < {row.metric for row in rows[0]}
    assert any(row.metric.startswith("peel") for row in rows[0]), {row.metric for row in rows[0]}
    assert len(rows[0]) == len(rows[1])
    for a, b in zip(*rows, strict=True):
        assert a._replace(value=0.0) == b._replace(value=0.0)
        np.testing.assert_allclose(a.value, b.value, rtol=1e-5, atol=1e-6)


def test_a_client_that_is_left_out_keeps_its_own_model():
    simulation = oracles.simulate(
        (5, 8), algorithm=Ditto(), epochs=1, non_finite="skip", weight_decay=1e3, lr=1e-4
    )
    oracles.run(simulation, 1)
    before = jax.device_get((simulation.state.algorithm, simulation.state.clients))
    state, included = by_hand.overflowing(simulation)
    assert not included.any()
    jax.tree.map(np.testing.assert_array_equal, jax.device_get((state.algorithm, state.clients)), before)


def test_what_does_not_compose_is_told():
    for inner in (Ditto(), FedRoD()):
        with pytest.raises(UserError, match="beside the model") as caught:
            Ditto(inner=inner).build(CONTEXT)
        assert caught.value.field == "algorithm.inner"
    with pytest.raises(UserError, match="Put FedProx inside"):
        FedProx(inner=Ditto()).build(CONTEXT)
    Ditto(inner=FedProx()).build(CONTEXT)


@pytest.mark.parametrize("strength", [-0.1, float("inf"), float("nan"), "much"])
def test_a_bad_strength_is_named(strength):
    with pytest.raises(UserError) as caught:
        Ditto(strength=strength)
    assert caught.value.field == "algorithm.strength"
