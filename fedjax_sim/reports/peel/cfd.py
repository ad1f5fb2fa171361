"""Cumulative feature degradation, made quantitative: from records of features before and after aggregation.

The paper introduces CFD as relative changes that grow with depth (FOUND in a review of it; no number, no
test). OUR CHOICE throughout: per layer the headroom-free change Δ_l = log C_l(after) - log C_l(before), with
C_l = Tr Σ_W / Tr Σ_B; its least-squares slope over relative depth u_l = l/L with a bootstrap interval over
clients × seeds; its rank correlation with depth, its last value and its mean. CFD is present where the last
value is positive and the interval of the slope excludes zero from below.
"""

from dataclasses import dataclass

import numpy as np

from fedjax_sim.core.errors import UserError


def relative_change(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """(after - before) / |before|, elementwise; 0 where both are 0, NaN where only `before` is."""
    before, after = np.asarray(before, np.float64), np.asarray(after, np.float64)
    change = after - before
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = change / np.abs(before)
    return np.where(change == 0, 0.0, np.where(before == 0, np.nan, ratio))


@dataclass(frozen=True)
class Verdict:
    """How degradation runs through depth.

    Attributes:
      change: f64[L], Δ_l averaged over measurements.
      slope: β, of Δ_l on u_l = l/L.
      low, high: bounds of its bootstrap interval; NaN of a single measurement.
      rank: Spearman's correlation of Δ_l with depth; 0 where Δ is constant.
      final: Δ_L.
      area: mean of Δ_l.
      measurements: rows that were averaged.
    """

    change: np.ndarray
    slope: float
    low: float
    high: float
    rank: float
    final: float
    area: float
    measurements: int

    @property
    def present(self) -> bool:
        """Δ_L > 0, and the interval of the slope lies above 0."""
        return bool(self.final > 0 and self.low > 0)

    def words(self) -> str:
        """The judgement and its reason, a sentence."""
        slope = f"slope {self.slope:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"
        if self.measurements < 2:
            return f"Undecided: a single measurement (slope {self.slope:+.3f}) has no interval."
        if self.present:
            return f"CFD is present: the last change is {self.final:+.3f}, and the {slope} lies above zero."
        if self.final <= 0:
            return f"No CFD: the last change, {self.final:+.3f}, is not positive ({slope})."
        where = "lies below zero" if self.high < 0 else "does not exclude zero"
        return f"No CFD: the last change is {self.final:+.3f}, but the {slope} {where}."


def word_of(found: Verdict) -> str:
    """The judgement for a table: yes, no, or undecided of a single measurement."""
    return "undecided" if found.measurements < 2 else "yes" if found.present else "no"


LEVEL, RESAMPLES = 0.95, 2000
"""Of bootstrap intervals, unless asked otherwise."""


def verdict(
    changes: np.ndarray, *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> Verdict:
    """Judges the changes of several clients and seeds.

    Args:
      changes: f64[M, L], Δ_l of each measurement (a client of a seed), layers from the input to the
        classifier; the input image, which no aggregation changes, is not among them.
      level: of the interval.
      resamples: of the bootstrap.
      seed: of the bootstrap.

    Raises:
      UserError: fewer than two layers or no measurement, or a value that is not finite.
    """
    changes = np.asarray(changes, np.float64)
    if changes.ndim != 2 or changes.shape[0] < 1 or changes.shape[1] < 2:
        why = "a slope over depth needs one measurement and two layers at least"
        raise UserError("changes", changes.shape, why, "Measure a model with more peel points.")
    if not np.isfinite(changes).all():
        raise UserError("changes", "not finite", "a mean of it would mean nothing", "Drop such measurements.")
    mean = changes.mean(0)
    low = high = np.nan
    if len(changes) > 1:
        slopes = slope(_draws(len(changes), resamples, seed) @ changes / len(changes))
        low, high = np.quantile(slopes, [(1 - level) / 2, (1 + level) / 2])
    return Verdict(
        change=mean,
        slope=float(slope(mean)),
        low=float(low),
        high=float(high),
        rank=spearman(mean, np.arange(len(mean))),
        final=float(mean[-1]),
        area=float(mean.mean()),
        measurements=len(changes),
    )


def estimate(values: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Means over measurements with their 95% bootstrap intervals, NaN values left out.

    Args:
      values: f64[M, L].
      resamples: of the bootstrap, which draws whole measurements.
      seed: of the bootstrap.

    Returns:
      (mean, low, high), f64[3, L]; NaN where nothing is defined, bounds also where only one value is.
    """
    values = np.asarray(values, np.float64)
    known = np.isfinite(values)
    filled, count = np.where(known, values, 0.0), known.sum(0)
    out = np.full((3, values.shape[1]), np.nan)
    some, several = count > 0, count > 1
    out[0, some] = filled.sum(0)[some] / count[some]
    if several.any():
        draws = _draws(len(values), resamples, seed)
        with np.errstate(invalid="ignore"):
            means = draws @ filled[:, several] / (draws @ known[:, several].astype(np.float64))
        # A draw may miss all of a layer's few values.
        out[1:, several] = np.nanquantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return out


def _draws(count: int, resamples: int, seed: int) -> np.ndarray:
    """How often each of `count` measurements is drawn. f64[resamples, count]."""
    share = np.full(count, 1 / count)
    return np.random.default_rng(seed).multinomial(count, share, resamples).astype(np.float64)


def slope(changes: np.ndarray) -> np.ndarray:
    """Least-squares slope over relative depth l/L, 0 if it is rounding only. f64[…, L] -> f64[…]."""
    depth = np.arange(1, changes.shape[-1] + 1) / changes.shape[-1]
    away = depth - depth.mean()
    found = changes @ away / (away @ away)
    return np.where(np.abs(found) <= 1e-12 * np.abs(changes).max(-1), 0.0, found)


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation, ties sharing their mean rank; 0 where either is constant."""
    from scipy.stats import rankdata  # slow to load: only where ranks are asked for

    return pearson(rankdata(a), rankdata(b))


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation; 0 where either is constant."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    a, b = a - a.mean(), b - b.mean()
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def partial_correlation(a: np.ndarray, b: np.ndarray, given: np.ndarray) -> float:
    """Correlation of what a linear fit on `given` leaves of `a` and `b`; 0 where it leaves one constant."""
    columns = np.column_stack([np.ones(len(a)), given])
    rest = [v - columns @ np.linalg.lstsq(columns, v, rcond=None)[0] for v in (a, b)]
    small = [np.linalg.norm(r) <= 1e-12 * np.linalg.norm(v) for r, v in zip(rest, (a, b), strict=True)]
    return 0.0 if any(small) else pearson(*rest)


@dataclass(frozen=True)
class Association:
    """How two quantities go together over measurements; no test, as one client's rounds are not independent.

    Attributes:
      pearson, spearman: correlations; NaN of fewer than `FEWEST` measurements.
      partial: Pearson's given a third quantity; NaN likewise.
      measurements: in which all three are defined.
    """

    pearson: float
    spearman: float
    partial: float
    measurements: int


FEWEST = 5
"""Measurements below which no correlation is given: any three points lie near a line. OUR CHOICE."""


def association(a: np.ndarray, b: np.ndarray, given: np.ndarray) -> Association:
    """Correlations of `a` and `b`, and what is left of them given a third. f64[n] each."""
    a, b, given = np.stack([a, b, given])[:, np.isfinite(a) & np.isfinite(b) & np.isfinite(given)]
    if len(a) < FEWEST:
        return Association(np.nan, np.nan, np.nan, len(a))
    return Association(pearson(a, b), spearman(a, b), partial_correlation(a, b, given), len(a))
