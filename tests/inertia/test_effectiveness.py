"""What a merge gains: models before and after it, evaluated by hand; who, when, and on which samples."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim.algorithms import LIPS, FedAvg, FedMR
from fedjax_sim.config import InertiaConfig, PeelConfig
from fedjax_sim.core import memo
from fedjax_sim.data import Partition, Preprocessing, normalise
from fedjax_sim.engine.observing import AllObservers
from fedjax_sim.engine.round import Round
from fedjax_sim.probes.inertia.effectiveness import NAME, STATES, Effectiveness
from fedjax_sim.runs.federation import Simulation
from tests import oracles
from tests.algorithms import personal
from tests.algorithms.test_lips import convolutional

SIZES = (12, 7, 31, 7, 31, 12)
TESTS = (9, 4, 6, 3, 8, 5)  # samples of their own
METRICS = ("merge_own_accuracy", "merge_own_loss", "merge_global_accuracy", "merge_global_loss")


def measured(simulation, peel=None, **settings):
    """The same run, with what is measured of it."""
    setup = simulation.setup
    config = dataclasses.replace(
        setup.config, inertia=InertiaConfig(**settings), peel=peel or PeelConfig(every=0)
    )
    return Simulation(oracles.configured(setup, config))


def holdout():
    """Clients test on a part of the training images that none of them trains on."""
    dataset, partition = oracles.world([n + t for n, t in zip(SIZES, TESTS, strict=True)])
    cut = [np.split(own, [n]) for own, n in zip(partition.train, SIZES, strict=True)]
    return dataset, Partition(tuple(c[0] for c in cut), tuple(c[1] for c in cut), "train")


def matching():
    """Clients test on a part of the test images."""
    dataset, partition = oracles.world(SIZES, tests=31)
    rng = np.random.default_rng(5)
    own = tuple(rng.choice(31, size, replace=False) for size in TESTS)
    return dataset, Partition(partition.train, own, "test")


def small(given, algorithm, **settings):
    settings = {"cohort": 4, "rounds": 3, "wave": 2, "momentum": 0.5, **settings}
    return oracles.simulate(given=given, model=personal.deep(), algorithm=algorithm, **settings)


def table(rows):
    """(round, metric, client, state) -> value."""
    found = {row[:2] + row[4:]: row.value for row in rows if row.metric.split("/")[-1] in METRICS}
    assert len(found) == sum(row.metric.split("/")[-1] in METRICS for row in rows)
    return found


def by_hand(params, dataset, images, labels, chosen):
    """(accuracy, loss) of one model, in NumPy."""
    logits, _ = oracles.mlp(params, oracles.normalised(images[chosen]))
    losses = oracles.cross_entropies(logits, labels[chosen])
    return (logits.argmax(1) == labels[chosen]).mean(), losses.mean()


def assert_figures(got, simulation, number, client, state, params, own, everything):
    """The four rows of one client and state. own, everything: indices of samples."""
    setup = simulation.setup
    dataset, of_test = setup.dataset, setup.partition.test_from == "test"
    tests = dataset.test_images, dataset.test_labels
    pools = {
        "own": (tests if of_test else (dataset.train_images, dataset.train_labels), own),
        "global": (tests, everything),
    }
    for name, (pool, chosen) in pools.items():
        accuracy, loss = by_hand(params, dataset, *pool, chosen)
        assert got[number, f"merge_{name}_accuracy", client, state] == pytest.approx(accuracy, abs=1e-6)
        assert got[number, f"merge_{name}_loss", client, state] == pytest.approx(loss, rel=1e-4)


def gains(got, number, name, clients):
    """Accuracy after minus before, of each client."""
    key = number, f"merge_{name}_accuracy"
    return [got[(*key, client, "after")] - got[(*key, client, "before")] for client in clients]


# --- against NumPy --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def averaged():
    """FedAvg on two devices, all samples of held-out tests, rounds 1, 2, 4, 5 measured.

    -> (run, first model, rows).
    """
    simulation = measured(small(holdout(), FedAvg(), rounds=5, devices=2), every=2, clients=3, samples=1000)
    start = oracles.doubled(simulation.variables["params"])
    return simulation, start, oracles.run(simulation)


def test_under_fedavg_before_is_trained_and_after_is_the_mean(averaged):
    simulation, mean, rows = averaged
    setup, got = simulation.setup, table(rows)
    everything, met = np.arange(len(setup.dataset.test_labels)), 0
    for index in range(5):
        ids, trained, _ = oracles.train_cohort([mean] * 4, simulation, index)
        mean = oracles.weighted_mean(trained, [SIZES[client] for client in ids])
        watched = {key[2] for key in got if key[0] == index + 1}
        assert watched <= set(ids)
        for client in watched:
            own = setup.partition.test[client]
            for state, params in zip(STATES, (trained[ids.index(client)], mean), strict=True):
                assert_figures(got, simulation, index + 1, client, state, params, own, everything)
                met += 1
        for name in ("own", "global") if watched else ():
            value = oracles.value_of(rows, f"effectiveness_{name}", index + 1)
            assert value == pytest.approx(np.mean(gains(got, index + 1, name, watched)), abs=1e-6)
    assert met == 4 * 3 * 2
    assert any(row.value for row in rows if row.metric == "effectiveness_own")


def test_the_first_the_last_and_every_so_many_rounds_are_measured(averaged):
    simulation, _, rows = averaged
    for metric in (*METRICS, "effectiveness_own", "effectiveness_global"):
        assert {row.round for row in rows if row.metric == metric} == {1, 2, 4, 5}, metric
    for number in (1, 2, 4, 5):
        for metric in METRICS:
            found = [(row.client, row.state) for row in rows if (row.round, row.metric) == (number, metric)]
            assert len(found) == len(set(found)) == 6 and {state for _, state in found} == set(STATES)
    assert oracles.rounds_compiled(simulation) == 2  # measured, and not


def test_measuring_changes_nothing(averaged):
    simulation, _, rows = averaged
    other = small(holdout(), FedAvg(), rounds=5, devices=2)
    plain = [row for row in rows if not row.metric.startswith(("merge_", "effectiveness_"))]
    assert oracles.run(other) == plain
    oracles.assert_trees_equal(simulation.variables, other.variables)


def test_under_fedmr_after_is_the_slot_and_samples_are_few_and_fixed():
    """At most five samples, of the test images."""
    dataset, partition = matching()
    simulation = measured(
        small((dataset, partition), FedMR(), cohort=6, rounds=2), every=1, clients=6, samples=5
    )
    setup = simulation.setup
    effectiveness = Effectiveness(setup.config, setup.model, dataset, partition, simulation.mesh, jnp.asarray)
    given = effectiveness.observer_inputs(np.arange(6))[NAME]
    everything = given["global"]
    assert len(set(everything.tolist())) == 5 and set(everything.tolist()) <= set(range(31))
    assert given["own"]["count"].tolist() == [min(size, 5) for size in TESTS]
    own = [row[:count] for row, count in zip(*(given["own"][key] for key in ("index", "count")), strict=True)]
    assert partition.test is not None
    for client, chosen in enumerate(own):
        assert len(set(chosen.tolist())) == len(chosen) and set(chosen) <= set(partition.test[client])
        alone = effectiveness.observer_inputs(np.asarray([client]))[NAME]["own"]
        np.testing.assert_array_equal(alone["index"][0, : alone["count"][0]], chosen)

    for index in range(2):
        stack = oracles.doubled(simulation.state.algorithm.slots["params"])
        starts = [personal.row(stack, k) for k in range(6)]
        ids, trained, _ = oracles.train_cohort(starts, simulation, index)
        rows = oracles.run(simulation, 1)
        got = table(rows)
        stack = oracles.doubled(simulation.state.algorithm.slots["params"])
        for slot, client in enumerate(ids):
            after = personal.row(stack, slot)
            for state, params in zip(STATES, (trained[slot], after), strict=True):
                assert_figures(got, simulation, index + 1, client, state, params, own[client], everything)
        for name in ("own", "global"):
            gain = gains(got, index + 1, name, ids)
            value = oracles.value_of(rows, f"effectiveness_{name}", index + 1)
            assert value == pytest.approx(np.mean(gain), abs=1e-6)
        assert len(set(gain)) > 1  # slots differ


# --- together with the probe ----------------------------------------------------------------------------


def test_with_the_probe_all_look_at_its_clients_and_else_at_ones_own():
    """Both measure rounds 1 and 3, effectiveness round 2 besides; clients have no tests of their own."""
    memo.forget()
    simulation = measured(
        oracles.simulate(SIZES, cohort=4, rounds=3, wave=2),
        peel=PeelConfig(every=3, clients=2, samples=40, class_samples=1),
        every=2,
        clients=3,
    )
    rows = oracles.run(simulation)

    def watched(number, start):
        return {row.client for row in rows if row.round == number and row.metric.startswith(start)} - {-1}

    probed, merged = ([watched(number, start) for number in (1, 2, 3)] for start in ("peel_loss", "merge_"))
    assert [len(clients) for clients in probed] == [2, 0, 2]
    assert merged == [probed[0], merged[1], probed[2]] and len(merged[1]) == 3
    for index, clients in enumerate(merged):
        assert clients <= set(simulation.inputs(index)[0].cohort.ids.tolist())
    assert oracles.rounds_compiled(simulation) == 2  # both, and one

    # Without samples of their own there are the global ones only, and nothing is called undefined.
    metrics = {row.metric for row in rows}
    assert {"merge_global_accuracy", "merge_global_loss", "effectiveness_global"} <= metrics
    assert not [metric for metric in metrics if "merge_own" in metric or "effectiveness_own" in metric]
    assert not [metric for metric in metrics if metric.startswith("undefined/merge")]
    after = {row.value for row in rows if row[:2] == (2, "merge_global_loss") and row.state == "after"}
    assert len(after) == 1  # one mean, one set


# --- under LIPS -----------------------------------------------------------------------------------------


def test_under_lips_after_is_the_sparse_model_that_the_next_round_starts_from():
    dataset, partition = oracles.world((14, 11, 9, 12), shape=(4, 4, 1))
    cut = [np.split(own, [len(own) - 4]) for own in partition.train]
    partition = Partition(tuple(c[0] for c in cut), tuple(c[1] for c in cut), "train")
    model = convolutional()
    algorithm = LIPS(inner=FedAvg(), density=0.25, period=2)
    simulation = measured(
        oracles.simulate(
            given=(dataset, partition), model=model, algorithm=algorithm, rounds=4, epochs=1, cohort=3
        ),
        every=1,
        clients=2,
    )
    setup, state = simulation.setup, simulation.state
    effectiveness = Effectiveness(setup.config, model, dataset, partition, simulation.mesh, jnp.asarray)
    program = jax.jit(Round(setup.algorithm, setup.trainer, simulation.mesh, in_order=False).__call__)
    observe = jax.jit(AllObservers(effectiveness.observers))
    loss_of = jax.jit(lambda variables, x: model.apply(variables, x)[0])

    def figures(variables, images, labels):
        logits = np.asarray(loss_of(variables, normalise(jnp.asarray(images), Preprocessing())), np.float64)
        return (logits.argmax(1) == labels).mean(), oracles.cross_entropies(logits, labels).mean()

    densities = []
    for index in range(2):
        inputs, _ = simulation.inputs(index)
        slots = effectiveness.slots(np.asarray(inputs.cohort.ids))
        ids = np.asarray(inputs.cohort.ids)[slots]
        given = effectiveness.observer_inputs(ids)
        with jax.set_mesh(simulation.mesh):
            state, outputs = program(state, inputs, simulation.data, jnp.asarray(slots))
            observed = observe(outputs.view, given, simulation.data)
        view, observed = jax.device_get((outputs.view, observed))
        density = float(outputs.metrics["lips_density_after"])
        densities.append(density)
        got = table(effectiveness.rows(index + 1, ids, given, observed))
        for place, client in enumerate(ids.tolist()):
            own = cut[client][1]
            stack = dict(zip(STATES, (view.before, view.after), strict=True))
            for name in STATES:
                one = personal.row(stack[name], place)
                accuracy, loss = figures(one, dataset.train_images[own], dataset.train_labels[own])
                assert got[index + 1, "merge_own_accuracy", client, name] == pytest.approx(accuracy)
                assert got[index + 1, "merge_own_loss", client, name] == pytest.approx(loss, rel=1e-4)
            after = personal.row(view.after, place)["params"]
            for layer in ("conv2", "conv3"):
                zeros = (after[layer]["kernel"] == 0).mean()
                assert zeros == pytest.approx(1 - density, abs=1e-3)
            assert (after["conv1"]["kernel"] != 0).all() and (after["fc"]["kernel"] != 0).all()
        dense = setup.algorithm.deploy(state.algorithm)
        _, loss = figures(dense, dataset.test_images, dataset.test_labels)
        told = [got[index + 1, "merge_global_loss", client, "after"] for client in ids.tolist()]
        if density < 1:
            assert all(abs(value - loss) > 1e-3 * loss for value in told)
        else:
            assert told == pytest.approx([loss] * 2, rel=1e-4)
    assert densities == pytest.approx([0.25, 1], abs=1e-3)
