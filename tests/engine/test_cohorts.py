"""Who takes part: every way of sampling, and schedules as files."""

import itertools

import numpy as np
import pytest

from fedjax_sim.config import CohortConfig
from fedjax_sim.core.errors import UserError
from fedjax_sim.engine.cohorts import Schedule, sampler
from tests import oracles

COUNTS = np.array([5, 40, 10, 1, 20, 24])


def draws(counts=COUNTS, rounds=40, seed=0, **cohort):
    draw = sampler(CohortConfig(**cohort), np.asarray(counts), rounds, seed)
    return [draw(r) for r in range(rounds)]


def test_a_cohort_is_a_function_of_seed_and_round_without_repeats():
    cohorts = draws(np.ones(50), seed=3, size=10)
    for ids in cohorts:
        assert ids.dtype == np.int32
        assert ids.shape == (10,)
        assert len(set(ids.tolist())) == 10
        assert ids.min() >= 0 and ids.max() < 50
    np.testing.assert_array_equal(cohorts, draws(np.ones(50), seed=3, size=10))
    assert len({ids.tobytes() for ids in cohorts}) == 40
    assert not np.array_equal(draws(np.ones(50), seed=4, size=10)[0], cohorts[0])
    assert sorted(draws(size=6)[0]) == list(range(6))


def test_clients_are_drawn_equally_often():
    drawn = np.bincount(np.concatenate(draws(np.ones(20), rounds=800, size=5)), minlength=20)
    assert ((drawn - 200) ** 2 / 200).sum() < 43.8  # chi-square, 19 degrees of freedom, 0.999 quantile


def test_by_size_draws_one_after_another_with_chances_proportional_to_samples():
    cohorts = draws(rounds=4000, size=2, sampling="by_size")
    assert all(len(set(ids.tolist())) == 2 for ids in cohorts)
    share = COUNTS / COUNTS.sum()
    pairs = {frozenset(p): 0.0 for p in itertools.combinations(range(6), 2)}
    for a, b in itertools.permutations(range(6), 2):
        pairs[frozenset((a, b))] += share[a] * share[b] / (1 - share[a])
    seen = [frozenset(ids.tolist()) for ids in cohorts]
    expected = 4000 * np.array(list(pairs.values()))
    found = np.array([seen.count(pair) for pair in pairs])
    assert ((found - expected) ** 2 / expected).sum() < 36.2  # chi-square, 14, 0.999 quantile


def test_cyclic_walks_through_all_clients():
    cohorts = draws(np.ones(10), rounds=10, size=3, sampling="cyclic")
    walked = np.concatenate(cohorts)
    for lap in range(3):
        assert sorted(walked[lap * 10 : lap * 10 + 10]) == list(range(10))
    np.testing.assert_array_equal(walked[:10], walked[10:20])
    assert not np.array_equal(walked[:10], np.arange(10))
    assert not np.array_equal(
        walked[:10], np.concatenate(draws(np.ones(10), seed=1, size=3, sampling="cyclic"))[:10]
    )


def test_a_schedule_is_what_was_saved(tmp_path):
    draw = sampler(CohortConfig(size=2), COUNTS, 5, 0)
    schedule = Schedule.drawn(draw, 5, len(COUNTS))
    schedule.save(tmp_path / "s.json")
    assert Schedule.load(tmp_path / "s.json") == schedule
    again = draws(rounds=5, size=2, sampling="schedule", schedule=str(tmp_path / "s.json"))
    np.testing.assert_array_equal(again, [draw(r) for r in range(5)])
    config = CohortConfig(size=2, sampling="schedule", schedule=str(tmp_path / "s.json"))
    simulation = oracles.simulate((12, 7, 20, 3, 31, 6), cohort=config, rounds=5)
    assert simulation.inputs(3)[0].cohort.ids.tolist() == draw(3).tolist()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "cannot be read as JSON"),
        ('{"clients": 6, "cohorts": [[0, 1]], "cohorts": [[2, 3]]}', "the key 'cohorts' twice"),
        ("[]", "not a schedule"),
        ('{"clients": 6}', "not a schedule"),
        ('{"clients": 6, "cohorts": [[0, "1"]]}', "not a schedule"),
        ('{"clients": 0, "cohorts": [[0, 1]]}', "number of clients"),
        ('{"clients": 6, "cohorts": []}', "no cohort"),
        ('{"clients": 6, "cohorts": [[0, 1], [2]]}', "cohort 1 has 1"),
        ('{"clients": 6, "cohorts": [[0, 1], [2, 2]]}', "twice"),
        ('{"clients": 6, "cohorts": [[0, 6]]}', "client 6 of 6"),
        ('{"clients": 7, "cohorts": [[0, 1]]}', "the run has 6"),
        ('{"clients": 6, "cohorts": [[0, 1, 2]]}', "the run has 2"),
        ('{"clients": 6, "cohorts": [[0, 1]]}', "the run has 5"),
    ],
)
def test_bad_schedules(tmp_path, text, why):
    path = tmp_path / "s.json"
    path.write_text(text)
    with pytest.raises(UserError, match=why) as caught:
        draws(rounds=5, size=2, sampling="schedule", schedule=str(path))
    assert caught.value.field == "cohort.schedule"


def test_other_bad_input(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        draws(size=2, sampling="schedule", schedule=str(tmp_path / "none.json"))
    with pytest.raises(UserError, match="sampling is uniform"):
        CohortConfig(schedule="s.json")
    with pytest.raises(UserError, match="sampling is schedule"):
        CohortConfig(sampling="schedule")
    with pytest.raises(UserError, match="only 2 clients have samples"):
        draws(np.array([0, 4, 0, 2]), size=3, sampling="by_size")
