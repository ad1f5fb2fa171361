"""FedCAC: masks, overlaps and thresholds against NumPy, who shares with whom, and who keeps what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim.algorithms import FedAvg, FedCAC, Local
from fedjax_sim.core.errors import UserError
from tests import oracles
from tests.algorithms import by_hand, personal

SIZES = (12, 7, 20, 9, 31, 16)


def simulate(algorithm, **keywords):
    settings = {"model": personal.deep(), "cohort": 4, **keywords}
    return oracles.simulate(settings.pop("sizes", SIZES), algorithm=algorithm, **settings)


def models_of(simulation):
    """What clients hold, [N, …]."""
    return jax.device_get(simulation.state.algorithm.models)


def critical(start, trained, share):
    """1 for the ⌊share · n⌋ entries largest in |Δw · w|, of equal ones the first."""
    score = np.abs((trained - start) * trained).ravel()
    mask = np.zeros(score.size)
    mask[np.argsort(-score, kind="stable")[: int(share * score.size)]] = 1
    return mask.reshape(start.shape)


def collaborators(masks, number, until):
    """Client i -> those that it takes from, itself among them."""
    flat = [np.concatenate([leaf.ravel() for leaf in oracles.leaves(mask)]) for mask in masks]
    count = len(flat)
    overlap = np.array([[1 - np.abs(a - b).sum() / (2 * a.sum()) for b in flat] for a in flat])
    pairs = overlap[~np.eye(count, dtype=bool)]
    threshold = pairs.mean() + number / until * (pairs.max() - pairs.mean())
    if number > until:
        return {i: [i] for i in range(count)}
    # The margin is far below the step between two overlaps: NumPy's own rounding.
    return {
        i: [j for j in range(count) if j == i or overlap[i, j] >= threshold - 1e-12] for i in range(count)
    }


def rounds(simulation, config, count):
    """NumPy rounds. -> (mean, client -> parameters, mean number of collaborators of each round)."""
    mean = oracles.doubled(simulation.variables["params"])
    own = dict.fromkeys(range(simulation.setup.num_clients), mean)
    told = []
    for index in range(count):
        ids = by_hand.cohort(simulation, index)
        starts = [own[client] for client in ids]
        _, trained, _ = oracles.train_cohort(starts, simulation, index)
        mean = oracles.weighted_mean(trained, oracles.sizes_of(simulation)[ids])
        masks = [
            oracles.map_trees(lambda a, b: critical(a, b, config.critical), start, model)
            for start, model in zip(starts, trained, strict=True)
        ]
        groups = collaborators(masks, index + 1, config.until)
        for i, client in enumerate(ids):
            together = oracles.weighted_mean([trained[j] for j in groups[i]], [1] * len(groups[i]))
            own[client] = oracles.map_trees(lambda m, a, b: m * a + (1 - m) * b, masks[i], together, mean)
        told.append(np.mean([len(group) - 1 for group in groups.values()]))
    return mean, own, told


@pytest.mark.parametrize(
    ("config", "layout"),
    [
        pytest.param(FedCAC(until=3), {"momentum": 0.5}, marks=pytest.mark.slow),
        (FedCAC(critical=0.3, until=3), {"devices": 2, "wave": 2}),
    ],
    ids=["single", "wide"],
)
def test_rounds_are_numpys(config, layout):
    """Four in six clients, of whom some share, and in the fourth round nobody."""
    simulation = simulate(config, rounds=4, **layout)
    start = oracles.doubled(simulation.variables["params"])
    mean, own, told = rounds(simulation, config, 4)
    rows = oracles.run(simulation)
    oracles.assert_trees_close(simulation.variables["params"], mean)
    drawn = {client for index in range(4) for client in by_hand.cohort(simulation, index)}
    held = models_of(simulation)
    for client in range(6):
        oracles.assert_trees_close(personal.row(held, client)["params"], own[client])
        if client not in drawn:
            oracles.assert_trees_equal(oracles.doubled(personal.row(held, client)["params"]), start)
    got = [oracles.value_of(rows, "collaborators", number) for number in (1, 2, 3, 4)]
    np.testing.assert_allclose(got, told)
    assert got[3] == 0 and all(0 < number < 3 for number in got[:3])


def test_exactly_so_many_entries_are_critical():
    algorithm = FedCAC(critical=0.3)
    rng = np.random.default_rng(0)
    for shape in ((3,), (7, 5), (3, 3, 2, 4)):
        start, trained = rng.normal(size=(2, 4, *shape)).astype(np.float32)
        trained[0] = start[0]  # nothing has moved: the first are as good as others
        mask = np.asarray(algorithm._critical(start, trained))
        for k in range(4):
            assert mask[k].sum() == int(0.3 * mask[k].size)
            np.testing.assert_array_equal(mask[k], critical(start[k], trained[k], 0.3))


def test_who_takes_from_whom():
    """Three alike, one unlike them and one left out, by hand; however alike, after the last round nobody."""
    algorithm = FedCAC(critical=0.5, until=10)
    masks = {
        "a": np.array([[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 1, 1], [1, 1, 0, 0]], bool),
        "b": np.array([[1, 0], [1, 0], [1, 0], [0, 1], [1, 0]], bool),
    }
    included = np.array([True, True, True, True, False])

    def taken(number, masks=masks, included=included):
        return (
            np.asarray(algorithm._collaborators(masks, jnp.asarray(included), jnp.int32(number)))
            .astype(int)
            .tolist()
        )

    # Overlaps of 3 critical entries: 01 3/3, 02 and 12 2/3, 03 and 13 0, 23 1/3; their mean is 4/9.
    alike = [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]
    two = [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]
    assert taken(1) == alike and taken(4) == alike  # 4/9 + 0.4 · 5/9 = 2/3
    assert taken(5) == two and taken(10) == two
    assert taken(11) == np.eye(5, dtype=int).tolist()
    # All alike: the threshold is what they have in common, until the end.
    same = {name: mask[:1].repeat(3, 0) for name, mask in masks.items()}
    everyone = np.ones(3, bool)
    assert taken(7, same, everyone) == [[1] * 3] * 3
    assert taken(11, same, everyone) == np.eye(3, dtype=int).tolist()
    assert taken(1, same, np.zeros(3, bool)) == np.eye(3, dtype=int).tolist()


@pytest.mark.slow
def test_with_nothing_critical_it_is_fedavg():
    cac, avg = (simulate(algorithm, rounds=3, cohort=6) for algorithm in (FedCAC(critical=0.0), FedAvg()))
    for simulation in (cac, avg):
        oracles.run(simulation)
    oracles.assert_trees_close(cac.variables, avg.variables, atol=1e-6)
    for client in range(6):
        oracles.assert_trees_equal(personal.row(models_of(cac), client), jax.device_get(cac.variables))


def test_batch_statistics_stay_with_their_client():
    """They are those of the same round of training alone; the deployed model has their mean."""
    cac, alone = (simulate(algorithm, model=personal.normed(), rounds=1) for algorithm in (FedCAC(), Local()))
    for simulation in (cac, alone):
        oracles.run(simulation)
    held, trained = models_of(cac)["batch_stats"], models_of(alone)["batch_stats"]
    oracles.assert_trees_equal(held, trained)
    ids = by_hand.cohort(cac, 0)
    sizes = oracles.sizes_of(cac)[ids]
    mean = oracles.map_trees(
        lambda leaf: np.average(leaf[ids], axis=0, weights=sizes), oracles.doubled(trained)
    )
    oracles.assert_trees_close(cac.variables["batch_stats"], mean)


def test_a_client_that_is_left_out_keeps_its_model_and_lends_nothing():
    """One of three starts from a model that overflows: the round of the others is theirs alone."""
    sizes, config = (12, 7, 20), FedCAC(until=50)
    simulation = simulate(config, sizes=sizes, cohort=3, rounds=2, non_finite="skip")
    state = jax.device_get(simulation.state)
    models = state.algorithm.models
    models["params"]["fc3"]["kernel"] = models["params"]["fc3"]["kernel"].copy()
    models["params"]["fc3"]["kernel"][1] = 3e38
    simulation.restore(state, 0)
    before = personal.row(models_of(simulation), 1)
    rows = oracles.run(simulation, 1)
    assert [row.client for row in rows if row.metric == "left_out"] == [1]
    oracles.assert_trees_equal(personal.row(models_of(simulation), 1), before)

    start = oracles.doubled(state.algorithm.mean["params"])
    ids = by_hand.cohort(simulation, 0)
    _, trained, _ = oracles.train_cohort([start] * 3, simulation, 0)
    kept = [slot for slot, client in enumerate(ids) if client != 1]
    trained = [trained[slot] for slot in kept]
    mean = oracles.weighted_mean(trained, [sizes[ids[slot]] for slot in kept])
    oracles.assert_trees_close(simulation.variables["params"], mean)
    half = oracles.weighted_mean(trained, [1, 1])  # of two, the one is most alike the other
    for slot, model in zip(kept, trained, strict=True):
        mask = oracles.map_trees(lambda a, b: critical(a, b, 0.5), start, model)
        expected = oracles.map_trees(lambda m, a, b: m * a + (1 - m) * b, mask, half, mean)
        held = personal.row(models_of(simulation), ids[slot])["params"]
        oracles.assert_trees_close(held, expected)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"critical": 1.1}, "critical"),
        ({"critical": -0.1}, "critical"),
        ({"critical": float("nan")}, "critical"),
        ({"until": 0}, "until"),
        ({"until": 2.5}, "until"),
        ({"weights": "even"}, "weights"),
    ],
)
def test_mistakes_are_named(settings, field):
    with pytest.raises(UserError) as caught:
        FedCAC(**settings)
    assert caught.value.field == f"algorithm.{field}"
