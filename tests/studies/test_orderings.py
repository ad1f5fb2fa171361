"""Survival of orderings, against enumeration of all draws in plain Python, and cases known beforehand."""

import itertools
import math
import statistics

import numpy as np
import pytest
from scipy import stats

from fedjax_sim.core.errors import UserError
from fedjax_sim.studies import orderings

DRAWS = 20_000


def close(found: float, wanted: float, over: int = DRAWS) -> bool:
    """A share over so many draws, to four standard errors."""
    return abs(found - wanted) < 4 * math.sqrt(max(wanted * (1 - wanted), 1e-4) / over)


def enumerated(scores, draws):
    """Best, whole and pairs over all draws; a draw has a tuple of seeds for each method."""
    methods = range(len(scores))
    truth = [statistics.fmean(row) for row in scores]
    best = whole = 0
    pairs = np.zeros((len(scores), len(scores)))
    for draw in draws:
        means = [statistics.fmean(scores[m][s] for s in draw[m]) for m in methods]
        best += max(methods, key=means.__getitem__) == max(methods, key=truth.__getitem__)
        whole += sorted(methods, key=means.__getitem__) == sorted(methods, key=truth.__getitem__)
        for a, b in itertools.permutations(methods, 2):
            pairs[a, b] += (means[a] > means[b]) == (truth[a] > truth[b])
    return best / len(draws), whole / len(draws), pairs / len(draws)


@pytest.fixture
def scores(rng):
    """Four methods under six seeds, a common effect of the seed among them."""
    return np.array([0.0, 0.2, 0.5, 1.5])[:, None] + rng.standard_normal((4, 6)) + rng.standard_normal(6)


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_survival_is_that_of_all_draws(scores, k, paired):
    if not paired and k == 3:
        scores = scores[1:]  # 20³ draws instead of 20⁴
    sets = list(itertools.combinations(range(6), k))
    draws = (
        [(s,) * len(scores) for s in sets] if paired else list(itertools.product(sets, repeat=len(scores)))
    )
    best, whole, pairs = enumerated(scores, draws)
    found = orderings.survival(scores, k, paired=paired, draws=DRAWS)
    assert close(found.best, best) and close(found.whole, whole)
    off = ~np.eye(len(scores), dtype=bool)
    for one, other in zip(found.pairs[off], pairs[off], strict=True):
        assert close(one, other)
    assert found.pair == pytest.approx(found.pairs[off].mean())
    assert found.tau == pytest.approx(2 * found.pair - 1)
    assert np.isnan(np.diagonal(found.pairs)).all()


def test_halves_are_disjoint_and_all_of_them_are_drawn(scores):
    scores = scores[:3]
    best = whole = ways = 0
    for half in itertools.combinations(range(6), 3):
        truth = scores[:, [s for s in range(6) if s not in half]].mean(1)
        for drawn in itertools.combinations(half, 2):
            means = scores[:, drawn].mean(1)
            best += means.argmax() == truth.argmax()
            whole += (np.argsort(means) == np.argsort(truth)).all()
            ways += 1
    found = orderings.survival(scores, 2, halves=True, draws=DRAWS)
    assert close(found.best, best / ways) and close(found.whole, whole / ways)


def test_claims_are_those_of_scipy(scores):
    """By both rules, of all draws of three seeds of five."""
    scores = scores[:, :5]
    truth = scores.mean(1)
    sets = list(itertools.combinations(range(5), 3))
    methods = list(itertools.permutations(range(4), 2))
    for paired in (True, False):
        made = dict.fromkeys(orderings.RULES, 0)
        wrong = dict.fromkeys(orderings.RULES, 0)
        ways = 0
        for a, b in methods:
            for one, other in itertools.product(sets, repeat=2):
                if paired and one != other:
                    continue
                ways += 1
                x, y = scores[a, one], scores[b, other]
                if x.mean() <= y.mean():
                    continue
                test = stats.ttest_rel(x, y) if paired else stats.ttest_ind(x, y, equal_var=False)
                said = {
                    "deviations": x.mean() - y.mean() > x.std(ddof=1) + y.std(ddof=1),
                    "t-test": test.pvalue < 0.05,
                }
                for rule, claimed in said.items():
                    made[rule] += claimed
                    wrong[rule] += claimed and truth[a] < truth[b]
        found = orderings.survival(scores, 3, paired=paired, draws=DRAWS)
        for rule in orderings.RULES:
            assert made[rule] > 0
            assert close(found.claims[rule].made, 2 * made[rule] / ways)
            assert close(found.claims[rule].reversed, wrong[rule] / made[rule], DRAWS // 4)
    assert not orderings.survival(scores, 1, draws=10).claims


def test_a_wrong_claim_about_a_pair_that_is_not_apart_is_reversed_and_not_refuted():
    """Three seeds in six say that B is ahead, and mean it; it is A by a hair over all."""
    scores = np.array([[0.0, 0.01, 0.02, 9.0, 9.01, 9.02], [1.0, 1.02, 1.01, 7.9, 7.91, 7.89]])
    for apart, refuted in ((np.ones((2, 2), bool), True), (np.zeros((2, 2), bool), False)):
        found = orderings.survival(scores, 3, apart=apart, draws=4000).claims["t-test"]
        assert 0 < found.reversed < 1
        assert found.refuted == (found.reversed if refuted else 0)
    assert np.isnan(orderings.survival(scores, 3, apart=np.zeros((2, 2), bool), draws=10).pair_apart)


def test_all_seeds_and_methods_far_apart_survive_and_level_ones_are_a_coin():
    rng = np.random.default_rng(3)
    noise = rng.standard_normal((5, 32))
    assert orderings.survival(noise, 32, draws=50).whole == 1
    far = orderings.survival(noise + 100 * np.arange(5)[:, None], 1, paired=False, draws=500)
    assert far.best == far.whole == far.pair == far.tau == far.pair_apart == 1
    level = orderings.survival(np.ones((2, 4)), 2, draws=DRAWS)
    assert close(level.best, 0.5) and close(level.pair, 0.5)
    assert level.claims["t-test"].made == 0 and np.isnan(level.claims["t-test"].reversed)
    shifted = orderings.survival(noise[:2] * 0 + np.array([[0.0], [1.0]]) + noise[2], 3, draws=50)
    assert shifted.claims["t-test"].made == 1, "under every seed the same difference"


def test_more_seeds_survive_more_often_and_pairing_helps_where_seeds_have_much_in_common():
    rng = np.random.default_rng(4)
    scores = 0.3 * np.arange(4)[:, None] + 0.4 * rng.standard_normal((4, 64)) + 2 * rng.standard_normal(64)
    found = {k: orderings.survival(scores, k, draws=4000) for k in (1, 3, 10, 32)}
    assert found[1].whole < found[3].whole < found[10].whole < found[32].whole
    assert orderings.survival(scores, 3, paired=False, draws=4000).pair < found[3].pair - 0.1


def test_drawn_seeds_agree_with_a_truth_of_which_they_are_a_part_and_halves_do_not():
    """Methods that differ by nothing but noise, many times."""
    rng = np.random.default_rng(6)
    shares = [
        [orderings.survival(noise, 6, halves=halves, draws=100).pair for halves in (False, True)]
        for noise in rng.standard_normal((60, 4, 12))
    ]
    within, apart = np.mean(shares, 0)
    assert within > 0.7 and abs(apart - 0.5) < 0.06


def test_draws_are_those_of_their_seed(scores):
    one, again, other = (orderings.survival(scores, 2, draws=300, seed=seed) for seed in (5, 5, 6))
    assert (one.best, one.whole) == (again.best, again.whole) and (one.pairs[0] != other.pairs[0]).any()


def test_gaps_have_the_interval_of_the_mean_difference():
    rng = np.random.default_rng(5)
    common = 3 * rng.standard_normal(400)
    scores = np.array([0.0, 0.0, 1.0])[:, None] + common + rng.standard_normal((3, 400))
    scores = np.concatenate([scores, scores[:1]])
    found = orderings.gaps(scores)
    for a, b in itertools.permutations(range(3), 2):
        own = scores[a] - scores[b]
        half = 1.96 * own.std(ddof=1) / 20
        assert found.mean[a, b] == pytest.approx(own.mean())
        assert found.low[a, b] == pytest.approx(own.mean() - half, abs=0.01)
        assert found.high[a, b] == pytest.approx(own.mean() + half, abs=0.01)
    assert (
        found.apart[2, 0] and found.apart[1, 2] and not found.apart[0, 3] and not found.apart.diagonal().any()
    )
    np.testing.assert_allclose(found.low, -found.high.T, atol=1e-12)
    assert orderings.order(scores)[0] == 2


@pytest.mark.parametrize(
    ("scores", "k", "more"),
    [
        (np.ones((1, 4)), 1, {}),
        (np.ones(4), 1, {}),
        (np.full((2, 4), np.nan), 1, {}),
        (np.ones((2, 4)), 0, {}),
        (np.ones((2, 4)), 5, {}),
        (np.ones((2, 4)), 3, {"halves": True}),
        (np.ones((2, 4)), 1, {"draws": 0}),
    ],
)
def test_what_cannot_be_is_refused(scores, k, more):
    with pytest.raises(UserError):
        orderings.survival(scores, k, **more)
