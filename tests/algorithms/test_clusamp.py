"""CluSamp: its distributions, its distances and rounds against NumPy, its draws."""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster import hierarchy
from scipy.spatial.distance import pdist

from fedjax_sim import models
from fedjax_sim.algorithms import CONFIGS, CluSamp, FedAvg
from fedjax_sim.algorithms.clusamp import distributions
from fedjax_sim.config import CohortConfig
from fedjax_sim.core.errors import UserError
from fedjax_sim.runs.checkpoint import Checkpoints
from tests import oracles
from tests.engine.test_round import poisoned

SIZES = (31, 7, 12, 3, 5)  # of four places the first client has 4 · 31/58, that is two for itself


def random_distances(rng, clients):
    points = rng.normal(size=(clients, 3)) * rng.integers(0, 2, (clients, 1))  # some still at zero
    return np.linalg.norm(points[:, None] - points[None], axis=2)


# --- distributions --------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    counts=st.lists(st.integers(1, 30) | st.sampled_from([100, 1000]), min_size=1, max_size=14),
    share=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_rows_are_distributions_and_clients_get_what_is_theirs(counts, share, seed):
    size = 1 + round(share * (len(counts) - 1))
    rng = np.random.default_rng(seed)
    chances = distributions(random_distances(rng, len(counts)), np.asarray(counts), size)
    p = np.asarray(counts) / np.sum(counts)
    assert chances.shape == (size, len(counts))
    assert (chances >= 0).all()
    np.testing.assert_allclose(chances.sum(1), 1, atol=1e-9)
    np.testing.assert_allclose(chances.sum(0), size * p, atol=1e-9)
    alone = (chances == 1).sum(0)
    assert (alone >= np.floor(size * p + 1e-12)).all()


def test_equal_groups_that_lie_apart_are_the_distributions(rng):
    """Three groups of equal weight, of clients of unlike sizes, numbered at random."""
    group = rng.permutation([0, 0, 0, 1, 1, 2, 2, 2, 2])
    counts = np.zeros(9, int)
    for number, sizes in enumerate(([5, 15, 10], [12, 18], [1, 9, 12, 8])):
        counts[group == number] = sizes
    points = 10.0 * np.eye(3)[group] + rng.normal(size=(9, 3))
    chances = distributions(np.linalg.norm(points[:, None] - points[None], axis=2), counts, 3)
    for row in chances:
        (number,) = set(group[row > 0])
        np.testing.assert_allclose(row, np.where(group == number, counts / 30, 0), atol=1e-12)
    assert len({tuple(row > 0) for row in chances}) == 3


def test_a_tree_is_cut_where_a_branch_weighs_too_much():
    """Clients 0 and 1 lie together, 2 and 3 as well; the pair 2, 3 is too heavy for one of two places."""
    points = np.array([0.0, 0.1, 5.0, 5.2, 9.0])
    distances = np.abs(points[:, None] - points[None])
    counts = np.array([20, 25, 30, 22, 3])  # m p: 0.4, 0.5, 0.6, 0.44, 0.06
    chances = distributions(distances, counts, 2)
    # Branches {0, 1}, {2} and {3}, {4}: the heaviest two stay, the others fill them up, heavy ones first.
    np.testing.assert_allclose(chances[0], [0.4, 0.5, 0, 0.1, 0], atol=1e-12)
    np.testing.assert_allclose(chances[1], [0, 0, 0.6, 0.34, 0.06], atol=1e-12)


def test_distances_need_be_symmetric_only_up_to_rounding(rng):
    points, counts = rng.normal(size=(8, 3)), rng.integers(1, 9, 8)
    distances = np.linalg.norm(points[:, None] - points[None], axis=2)
    noisy = distances * (1 + 1e-7 * rng.normal(size=(8, 8))) + 1e-3 * np.eye(8)
    np.testing.assert_array_equal(distributions(distances, counts, 3), distributions(noisy, counts, 3))


def test_updates_beyond_single_precision_do_not_end_the_run(rng):
    distances = random_distances(rng, 6).astype(np.float32)
    distances[1], distances[:, 1], distances[4], distances[:, 4] = np.inf, np.inf, np.nan, np.nan
    chances = distributions(distances, np.arange(1, 7), 3)
    np.testing.assert_allclose(chances.sum(0), 3 * np.arange(1, 7) / 21, atol=1e-9)


def test_draws_are_independent_and_unbiased(rng):
    context = oracles.context(
        models.create("mlp", (3, 3, 1), 3),
        num_clients=5,
        cohort_size=4,
        rounds=1,
    )
    choose = CluSamp().build(context).cohort_chooser.choose
    distances, counts = random_distances(rng, 5), np.asarray(SIZES)
    drawn = np.stack([choose(distances, counts, 4, rng) for _ in range(3000)])
    assert drawn.shape == (3000, 4) and drawn.dtype == np.int32
    chances = distributions(distances, counts, 4)
    times = (drawn[:, :, None] == np.arange(5)).sum(1)
    spread = np.sqrt((chances * (1 - chances)).sum(0) / 3000)
    assert (np.abs(times.mean(0) - 4 * counts / counts.sum()) < 4.5 * spread + 1e-12).all()
    assert (times[:, 0] >= 2).all() and times[:, 0].max() == 3
    for k in range(4):
        seen = np.bincount(drawn[:, k], minlength=5) / 3000
        np.testing.assert_allclose(seen, chances[k], atol=0.05)


# --- rounds ---------------------------------------------------------------------------------------------


def flat(tree):
    """A model's numbers as one vector."""
    return np.concatenate([leaf.ravel() for leaf in oracles.leaves(tree)])


def between(kind, a, b):
    if kind == "l1":
        return np.abs(a - b).sum()
    if kind == "l2":
        return np.linalg.norm(a - b)
    scale = np.linalg.norm(a) * np.linalg.norm(b)
    return np.arccos(np.clip(a @ b / scale, -1, 1)) if scale else 0.0


@pytest.mark.parametrize(
    ("algorithm", "layout"),
    [
        (CluSamp(), {"devices": 2, "wave": 2}),
        (CluSamp(distance="l2", weights="samples"), {"wave": 4}),
        (CluSamp(distance="arccos"), {}),
    ],
    ids=["l1", "l2-samples", "arccos"],
)
def test_rounds_and_distances_equal_numpy(algorithm, layout):
    """The first client holds two slots at least: it does the same in each, and counts as often."""
    simulation = oracles.simulate(SIZES, algorithm=algorithm, cohort=4, rounds=3, **layout)
    x = oracles.doubled(simulation.variables["params"])
    updates = [np.zeros_like(flat(x)) for _ in SIZES]
    for index in range(3):
        ids, trained, _ = oracles.train_cohort([x] * 4, simulation, index)
        assert ids.count(0) >= 2
        for client, model in zip(ids, trained, strict=True):
            updates[client] = flat(model) - flat(x)
        sizes = [1] * 4 if algorithm.weights == "uniform" else oracles.sizes_of(simulation)[ids]
        x = oracles.weighted_mean(trained, sizes)
        oracles.run(simulation, 1)
        oracles.assert_trees_close(simulation.variables["params"], x)
    state = oracles.state_of(simulation).algorithm
    np.testing.assert_allclose(state.updates, updates, rtol=1e-4, atol=1e-5)
    wanted = [[between(algorithm.distance, a, b) for b in updates] for a in updates]
    off = ~np.eye(5, dtype=bool)  # a client's angle with itself is zero but for rounding, and not looked at
    np.testing.assert_allclose(state.distances[off], np.asarray(wanted)[off], rtol=1e-4, atol=1e-4)
    assert (np.asarray(wanted) > 0.1).any()


def test_a_client_in_two_slots_trains_alike():
    simulation = oracles.simulate(SIZES, algorithm=CluSamp(), cohort=4, rounds=1, wave=4, donate=False)
    inputs, _ = simulation.inputs(0)
    with jax.set_mesh(simulation.mesh):
        _, outputs = simulation.program(simulation.state, inputs, simulation.data, None)
    ids, losses = inputs.cohort.ids.tolist(), np.asarray(outputs.loss)
    twice = [loss for client, loss in zip(ids, losses, strict=True) if client == 0]
    assert len(twice) >= 2 and len(set(twice)) == 1
    assert len(set(losses.tolist())) == len(set(ids))


def test_a_resumed_run_draws_the_same_cohorts(tmp_path):
    """From a checkpoint on disk, after two rounds of five, in another Simulation."""
    keywords = {"algorithm": CluSamp(), "cohort": 2, "rounds": 5}
    sizes = (12, 7, 20, 3, 31, 9, 14, 5)
    whole = oracles.simulate(sizes, **keywords)
    store = Checkpoints(tmp_path / "checkpoints")
    drawn = []
    for index in range(5):
        if index == 2:
            store.save(2, whole.state)
            store.wait()
        drawn.append(whole.inputs(index)[0].cohort.ids.tolist())
        oracles.run(whole, 1)
    resumed = oracles.simulate(sizes, **keywords)
    found = store.restore(resumed.abstract_state())
    store.close()
    assert found is not None
    resumed.restore(*found)
    for index in range(2, 5):
        assert resumed.inputs(index)[0].cohort.ids.tolist() == drawn[index]
        oracles.run(resumed, 1)
    oracles.assert_trees_equal(resumed.variables, whole.variables)
    # What was learnt by then matters: without it the last cohorts would have been others.
    fresh = oracles.simulate(sizes, **keywords)
    assert [fresh.inputs(index)[0].cohort.ids.tolist() for index in range(2, 5)] != drawn[2:]


def test_a_client_that_is_left_out_keeps_its_update():
    """Client 2, alone in at least one slot, never has one; its distances are those of a zero."""
    simulation = poisoned(CluSamp(), non_finite="skip", cohort=4, rounds=2, wave=2)
    x = oracles.doubled(simulation.variables["params"])
    updates = [np.zeros_like(flat(x)) for _ in range(4)]
    for index in range(2):
        ids, trained, _ = oracles.train_cohort([x] * 4, simulation, index)
        kept = [(client, model) for client, model in zip(ids, trained, strict=True) if client != 2]
        assert 0 < len(kept) < 4
        for client, model in kept:
            updates[client] = flat(model) - flat(x)
        x = oracles.weighted_mean([model for _, model in kept], [1] * len(kept))
        oracles.run(simulation, 1)
    oracles.assert_trees_close(simulation.variables["params"], x)
    state = jax.device_get(simulation.state.algorithm)
    assert not state.updates[2].any()
    np.testing.assert_allclose(state.updates, updates, rtol=1e-4, atol=1e-5)
    for a, b in itertools.product(range(4), repeat=2):
        wanted = np.abs(updates[a] - updates[b]).sum()
        np.testing.assert_allclose(state.distances[a, b], wanted, rtol=1e-4, atol=1e-5)
    # A round that nobody survives: all keep what they had.
    inputs, _ = simulation.inputs(2)
    with jax.set_mesh(simulation.mesh):
        after, outputs = simulation.program(
            simulation.state, inputs.replace(lr=np.float32(np.inf)), simulation.data, None
        )
    assert not np.asarray(outputs.included).any()
    assert any(state.updates[client].any() for client in inputs.cohort.ids)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(after.algorithm), state)


# --- mistakes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", ["by_size", "cyclic"])
def test_another_way_of_sampling_is_refused(sampling):
    with pytest.raises(UserError, match="chooses its clients itself") as caught:
        oracles.simulate(SIZES, algorithm=CluSamp(), cohort=CohortConfig(size=2, sampling=sampling))
    assert caught.value.field == "cohort.sampling"


@pytest.mark.parametrize(
    ("settings", "field"),
    [({"distance": "cosine"}, "algorithm.distance"), ({"weights": "even"}, "algorithm.weights")],
)
def test_mistakes_are_named(settings, field):
    with pytest.raises(UserError) as caught:
        CONFIGS["clusamp"](**settings)
    assert caught.value.field == field


def test_with_everyone_taking_part_equal_clients_are_fedavg():
    finals = []
    for algorithm in (CluSamp(), FedAvg()):
        simulation = oracles.simulate((9,) * 4, algorithm=algorithm, rounds=2, momentum=0.5)
        oracles.run(simulation)
        finals.append(jax.device_get(simulation.variables))
    oracles.assert_trees_close(*finals, atol=1e-6)


@pytest.mark.parametrize("points", ["distances", "rows"])
def test_clusters_that_fill_a_place_to_the_last_bit_leave_no_negative_chance(points):
    """Equal clients, whose tenths do not add up to 1 exactly."""
    filled = 0
    for seed in range(40):
        spots = np.random.default_rng(seed).normal(size=(50, 3))
        distances = np.linalg.norm(spots[:, None] - spots[None], axis=2)
        chances = distributions(distances, np.full(50, 500), 5, points)
        assert (chances >= 0).all()
        np.testing.assert_allclose(chances.sum(0), 0.1)
        filled += ((chances > 0).sum(1) == 10).any()
    assert filled


def test_rows_of_the_matrix_may_be_taken_for_points(rng):
    """As both published codes do."""
    clients, counts = 9, np.full(9, 4)
    distances = random_distances(rng, clients)
    chances = distributions(distances, counts, 3, "rows")
    ours = sorted(tuple(np.flatnonzero(row)) for row in chances)
    cut = hierarchy.fcluster(hierarchy.ward(pdist(distances)), 3, "maxclust")
    groups = [tuple(np.flatnonzero(cut == number)) for number in set(cut)]
    whole = [group for group in groups if len(group) <= 3]
    assert whole and all(any(set(group) <= set(row) for row in ours) for group in whole)
    np.testing.assert_allclose(chances.sum(0), 3 / clients)
