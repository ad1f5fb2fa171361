"""Cumulative feature degradation, made quantitative: from records of features before and after aggregation.

The paper introduces CFD as relative changes that grow with depth (FOUND in a review of it; no number, no
test). OUR CHOICE throughout: per layer the headroom-free change Δ_l = log C_l(after) - log C_l(before), with
C_l = Tr Σ_W / Tr Σ_B; its least-squares slope over relative depth u_l = l/L with a bootstrap interval over
clients × seeds; its rank correlation with depth, its last value and its mean. CFD is present where the last
value is positive and the interval of the slope excludes zero from below.
"""

from dataclasses import dataclass

import numpy as np

from fedjax_sim.errors import UserError


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
      low, high: bounds of its bootstrap interval.
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


def verdict(changes: np.ndarray, *, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Verdict:
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
    rows = np.random.default_rng(seed).integers(0, len(changes), (resamples, len(changes)))
    slopes = slope(changes[rows].mean(1))
    tail = (1 - level) / 2
    low, high = np.quantile(slopes, [tail, 1 - tail])
    mean = changes.mean(0)
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


def slope(changes: np.ndarray) -> np.ndarray:
    """Least-squares slope over relative depth l/L. f64[…, L] -> f64[…]."""
    depth = np.arange(1, changes.shape[-1] + 1) / changes.shape[-1]
    away = depth - depth.mean()
    return changes @ away / (away @ away)


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation, ties sharing their mean rank; 0 where either is constant."""
    return pearson(_ranks(np.asarray(a, np.float64)), _ranks(np.asarray(b, np.float64)))


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation; 0 where either is constant."""
    a, b = np.asarray(a, np.float64) - np.mean(a), np.asarray(b, np.float64) - np.mean(b)
    scale = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale > 0 else 0.0


def partial_correlation(a: np.ndarray, b: np.ndarray, given: np.ndarray) -> float:
    """Correlation of what a linear fit on `given` leaves of `a` and `b`; 0 where it leaves one constant."""
    columns = np.column_stack([np.ones(len(a)), given])
    rest = [v - columns @ np.linalg.lstsq(columns, v, rcond=None)[0] for v in (a, b)]
    small = [np.linalg.norm(r) <= 1e-12 * np.linalg.norm(v) for r, v in zip(rest, (a, b), strict=True)]
    return 0.0 if any(small) else pearson(*rest)


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - counts + last - 1) / 2)[place]
