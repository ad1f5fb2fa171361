"""The verdict on cumulative degradation: known slopes, intervals, and refusals."""

import numpy as np
import pytest

from fedjax_sim.core.errors import UserError
from fedjax_sim.reports.peel import cfd


def test_a_known_slope_is_found_with_its_interval():
    draw = np.random.default_rng(0)
    depth = np.arange(1, 6) / 5
    changes = 0.1 + 0.8 * depth + 0.05 * draw.normal(size=(40, 5))
    found = cfd.verdict(changes)
    assert found.low < 0.8 < found.high and found.slope == pytest.approx(0.8, abs=0.05)
    assert found.rank == 1 and found.present and found.measurements == 40
    assert found.final == pytest.approx(changes[:, -1].mean())
    assert found.area == pytest.approx(changes.mean())


def test_an_interval_covers_the_truth_about_as_often_as_it_says():
    draw, depth = np.random.default_rng(1), np.arange(1, 5) / 4
    hits = 0
    for trial in range(100):
        found = cfd.verdict(0.5 * depth + draw.normal(size=(30, 4)), resamples=400, seed=trial)
        hits += found.low <= 0.5 <= found.high
    assert hits >= 86


def test_noise_without_a_trend_and_a_falling_one_are_no_degradation():
    draw = np.random.default_rng(2)
    assert not cfd.verdict(draw.normal(size=(30, 5)) - 0.5).present
    falling = cfd.verdict(np.tile(-np.arange(1.0, 5.0), (10, 1)))
    assert falling.rank == -1 and falling.high < 0 and not falling.present
    same = cfd.verdict(np.zeros((10, 4)))
    assert (same.slope, same.rank, same.final, same.low, same.high) == (0, 0, 0, 0, 0) and not same.present


@pytest.mark.parametrize(
    "changes", [np.zeros((0, 4)), np.zeros((3, 1)), np.zeros(4), np.full((2, 3), np.nan)]
)
def test_what_has_no_slope_is_refused(changes):
    with pytest.raises(UserError, match="changes"):
        cfd.verdict(changes)


def test_relative_change_keeps_its_sign_and_its_zeros():
    got = cfd.relative_change(np.array([2.0, -2.0, 0.0, 0.0]), np.array([3.0, -1.0, 0.0, 1.0]))
    np.testing.assert_array_equal(got, [0.5, 0.5, 0.0, np.nan])


def test_correlations():
    draw = np.random.default_rng(3)
    a = draw.normal(size=200)
    b, c = a + 0.1 * draw.normal(size=200), draw.normal(size=200)
    assert cfd.spearman(a, np.exp(a)) == 1 and cfd.spearman(np.ones(5), np.arange(5)) == 0
    assert cfd.pearson(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert cfd.spearman([1, 2, 2, 3], [1, 2, 2, 3]) == 1
    # Both follow `a`, and nothing is left once it is known.
    x, y = a + 0.3 * draw.normal(size=200), a + 0.3 * c
    assert cfd.pearson(x, y) > 0.8 and abs(cfd.partial_correlation(x, y, a)) < 0.2
    assert cfd.partial_correlation(a, c, a) == 0
