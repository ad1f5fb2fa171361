"""How often an ordering of methods by few seeds is the ordering by many.

Scores are f64[M, S]: M methods under the same S seeds, higher is better; for a loss, give its negative. The
ordering that counts is that of the means over all S seeds. k of them are drawn again and again, as if a
paper had run these alone:

- *paired*: every method under the same k seeds, or each under k of its own;
- *halves*: the k seeds come out of one half of all, drawn anew each time, and the other half says what is
  right. Else all seeds do, the drawn ones among them, which agree with themselves: that is too favourable.
  A half is a noisier judge than all: that is too unfavourable. The truth is between the two.

Methods that end up level, to 1e-10, are ordered by lot.

from fedjax_sim.studies import orderings

gaps = orderings.gaps(scores)
three = orderings.survival(scores, 3, apart=gaps.apart)
"""

import dataclasses
import math

import numpy as np
from scipy import special

from fedjax_sim.core.errors import UserError

RULES = ("deviations", "t-test")
"""When a paper would say that A beats B: by more than the sum of their standard deviations; or by a two-sided
t-test at 5 %, of differences where seeds are paired, else Welch's."""
_BLOCK = 2000  # draws at a time
_DIGITS = 10


@dataclasses.dataclass(frozen=True)
class Gaps:
    """What all seeds say of every pair of methods.

    Attributes:
      mean: f64[M, M], the mean of row minus column.
      low, high: f64[M, M], its bootstrap interval: seeds drawn with replacement, the same for both methods.
      apart: bool[M, M], whether the interval leaves out 0.
    """

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    apart: np.ndarray


@dataclasses.dataclass(frozen=True)
class Claims:
    """What comes of "A beats B" as k seeds have it.

    Attributes:
      made: share of pairs and draws with such a claim.
      reversed: share of the claims whose order is not that of the truth; NaN without claims.
      refuted: share of the claims for which this is so and the pair is `apart`: no tie, but wrong.
    """

    made: float
    reversed: float
    refuted: float


@dataclasses.dataclass(frozen=True)
class Survival:
    """How often what k seeds say is the truth.

    Attributes:
      seeds: k.
      best: share of draws in which the best method is the best.
      whole: share of draws in which all methods are in the right order.
      pair: share of draws in which two methods are in the right order, mean over all pairs.
      pair_apart: the same over the pairs that are `apart`; NaN if there are none.
      tau: Kendall's rank correlation with the right order, mean over draws; 2 · `pair` − 1.
      pairs: f64[M, M], `pair` of each; NaN on the diagonal.
      claims: by rule, see `RULES`; {} for k = 1.
    """

    seeds: int
    best: float
    whole: float
    pair: float
    pair_apart: float
    tau: float
    pairs: np.ndarray
    claims: dict[str, Claims]


def order(scores: np.ndarray) -> np.ndarray:
    """The methods by their means over all seeds, the best first. f64[M, S] -> i64[M]"""
    return np.argsort(-_checked(scores).mean(1), kind="stable")


def gaps(scores: np.ndarray, *, level: float = 0.95, draws: int = 10_000, seed: int = 0) -> Gaps:
    """Differences of the means of every pair, and how sure they are.

    Args:
      scores: f64[M, S].
      level: of the intervals, each by itself: of 36 pairs of level methods about two would be `apart`.
      draws: of the bootstrap.
      seed: of these draws.
    """
    scores = _checked(scores)
    rng = np.random.default_rng(seed)
    total = scores.shape[1]
    weights = rng.multinomial(total, np.full(total, 1 / total), size=draws) / total
    # Of differences, so that methods that are equal under every seed are exactly level.
    differences = scores[:, None] - scores[None]
    drawn = np.einsum("ijs,ds->ijd", differences, weights, optimize=True)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=2)
    return Gaps(differences.mean(2), low, high, (low > 0) | (high < 0))


def survival(
    scores: np.ndarray,
    k: int,
    *,
    paired: bool = True,
    halves: bool = False,
    apart: np.ndarray | None = None,
    draws: int = 20_000,
    seed: int = 0,
) -> Survival:
    """How often what k seeds say is what all say.

    Args:
      scores: f64[M, S].
      k: seeds of a draw, without replacement.
      paired: the same for all methods.
      halves: drawn out of a half, with the other half as the truth.
      apart: bool[M, M], pairs of which the truth is known; None: all.
      draws: how many.
      seed: of the draws.

    Raises:
      UserError: scores that are no finite matrix of two methods or more, or fewer seeds than k.
    """
    scores = _checked(scores)
    methods, total = scores.shape
    there = total // 2 if halves else total
    if not 1 <= k <= there:
        raise UserError("k", k, f"there are {there} seeds to draw from", f"Give 1 to {there}.")
    if draws < 1:
        raise UserError("draws", draws, "not a whole number from 1", "20000 is the default.")
    off = ~np.eye(methods, dtype=bool)
    apart = off if apart is None else np.asarray(apart, bool) & off
    rng = np.random.default_rng(seed)
    best = whole = 0
    same = np.zeros((methods, methods))
    claimed = {rule: [0, 0, 0] for rule in RULES if k > 1}
    for start in range(0, draws, _BLOCK):
        count = min(_BLOCK, draws - start)
        orders = np.tile(np.arange(total), (count, 1 if paired else methods, 1))
        orders = rng.permuted(orders, axis=2)
        row = np.arange(methods)[:, None]
        drawn = scores[row, orders[:, :, :k]]  # [draws, M, k]
        truth = scores[row, orders[:, :, there:]] if halves else np.tile(scores, (count, 1, 1))
        said, right = (_without_ties(values.mean(2), rng) for values in (drawn, truth))
        above = right[:, :, None] > right[:, None, :]
        agree = (said[:, :, None] > said[:, None, :]) == above
        best += np.sum(said.argmax(1) == right.argmax(1))
        whole += np.sum(agree.all((1, 2)))
        same += agree.sum(0)
        for rule, counts in claimed.items():
            claim = _claims(drawn, rule, paired)
            wrong = claim & ~above
            for place, which in enumerate((claim, wrong, wrong & apart)):
                counts[place] += int(which.sum())
    pairs = np.where(off, same / draws, np.nan)
    pair = float(pairs[off].mean())
    ways = draws * methods * (methods - 1) / 2
    return Survival(
        seeds=k,
        best=float(best / draws),
        whole=float(whole / draws),
        pair=pair,
        pair_apart=float(pairs[apart].mean()) if apart.any() else math.nan,
        tau=2 * pair - 1,
        pairs=pairs,
        claims={rule: _shares(counts, ways) for rule, counts in claimed.items()},
    )


def _shares(counts: list[int], ways: float) -> Claims:
    made, wrong, sure = counts
    return Claims(made / ways, wrong / made, sure / made) if made else Claims(0.0, math.nan, math.nan)


def _claims(drawn: np.ndarray, rule: str, paired: bool) -> np.ndarray:
    """Whether row is said to beat column. f64[draws, M, k] -> bool[draws, M, M]"""
    k = drawn.shape[2]
    gap = drawn.mean(2)[:, :, None] - drawn.mean(2)[:, None, :]
    centred = drawn - drawn.mean(2, keepdims=True)
    spread = np.einsum("dik,djk->dij", centred, centred) / (k - 1)
    own = np.diagonal(spread, axis1=1, axis2=2)
    one, other = own[:, :, None], own[:, None, :]
    clear = gap > 10.0**-_DIGITS
    if rule == "deviations":
        return clear & (gap > np.sqrt(one) + np.sqrt(other))
    if paired:
        square, freedom = np.maximum(one + other - 2 * spread, 0) / k, np.full_like(gap, k - 1)
    else:
        square = (one + other) / k
        level = (one**2 + other**2) / (k**2 * (k - 1))
        freedom = np.divide(square**2, level, out=np.full_like(gap, k - 1), where=level > 0)
    return clear & (gap > special.stdtrit(freedom, 0.975) * np.sqrt(square))


def _without_ties(means: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Means that differ, those that are level by lot. f64[draws, M], likewise."""
    return np.round(means, _DIGITS) + 0.1 * 10.0**-_DIGITS * rng.random(means.shape)


def _checked(scores: np.ndarray) -> np.ndarray:
    scores = np.asarray(scores, np.float64)
    if scores.ndim != 2 or len(scores) < 2 or scores.shape[1] < 1 or not np.isfinite(scores).all():
        why = "a finite number is wanted for each of several methods and each seed"
        raise UserError("scores", scores.shape, why, "Give a matrix, a row for each method.")
    return scores
