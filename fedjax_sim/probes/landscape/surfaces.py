"""Loss and accuracy along lines and over planes: in random directions, and through several models."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from fedjax_sim.core.errors import UserError
from fedjax_sim.probes.landscape.directions import difference, stack
from fedjax_sim.probes.landscape.objective import Objective, Values


@dataclasses.dataclass(frozen=True, eq=False)
class Curve(Values):
    """Loss and accuracy along a line, f64[n] each.

    Attributes:
      at: f64[n], multiples of the direction.
    """

    at: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Surface(Values):
    """Loss and accuracy over a plane, f64[len(x), len(y)] each.

    Attributes:
      x: f64[m], multiples of the first direction.
      y: f64[n], of the second.
    """

    x: np.ndarray
    y: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Plane(Surface):
    """The plane through three models. x and y are distances (L2, over the parameters).

    Attributes:
      models: f64[3, 2], where the models are; the first at (0, 0), the second at (d, 0).
    """

    models: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Barrier:
    """What lies between two models.

    Attributes:
      curve: along the line, from 0 at the first to 1 at the second.
      height: the largest excess of the loss over the straight line between the losses of the ends; 0 if it is
        nowhere above. Of two minima this says whether one basin holds both; of models high on the walls it
        does not, see `prominence`.
      at: where on the line that is.
      middle: excess of the loss half way (of an even number of points, at the first of the two nearest).
      prominence: the largest rise of the loss above the lower ground on both of its sides; 0 if the line has
        one valley only, wherever its ends are.
      accuracy: the largest deficit of the accuracy below the straight line between those of the ends.
      distance: L2, between the parameters of the two.
    """

    curve: Curve
    height: float
    at: float
    middle: float
    prominence: float
    accuracy: float
    distance: float


def line(objective: Objective, variables: Any, direction: Any, at: np.ndarray) -> Curve:
    """The curve t -> variables + t · direction.

    Args:
      objective: what is evaluated.
      variables: one model.
      direction: a tree like it, from `filter_normalised` for example.
      at: f[n], values of t.
    """
    at = np.asarray(at, np.float64)
    found = objective.values(variables, stack(direction), at[:, None])
    return Curve(found.loss, found.accuracy, at)


def surface(
    objective: Objective, variables: Any, first: Any, second: Any, x: np.ndarray, y: np.ndarray
) -> Surface:
    """The surface (s, t) -> variables + s · first + t · second.

    Args:
      objective: what is evaluated.
      variables: one model.
      first: a direction, a tree like it.
      second: another.
      x: f[m], values of s.
      y: f[n], values of t.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    grid = np.stack(np.meshgrid(x, y, indexing="ij"), -1)
    found = objective.values(variables, stack(first, second), grid.reshape(-1, 2))
    shape = grid.shape[:2]
    return Surface(found.loss.reshape(shape), found.accuracy.reshape(shape), x, y)


def barrier(objective: Objective, first: Any, second: Any, points: int = 21) -> Barrier:
    """The loss barrier on the line between two models, batch statistics interpolated as well.

    sup over t in [0, 1] of L((1 − t) a + t b) − ((1 − t) L(a) + t L(b)), over evenly spaced t: Entezari et
    al., "The Role of Permutation Invariance in Linear Mode Connectivity of Neural Networks", ICLR 2022,
    https://arxiv.org/abs/2110.06296. 0 where the loss is convex.

    Args:
      objective: what is evaluated.
      first: a model, a.
      second: another of the same shapes, b.
      points: values of t, the ends included.

    Raises:
      UserError: fewer than three points.
    """
    if points < 3:
        raise UserError("points", points, "must be at least 3", "Two of them are the ends.")
    way = difference(second, first)
    curve = line(objective, first, way, np.linspace(0, 1, points))
    # A loss beyond float32 is a barrier, not a gap in the record.
    finite = np.isfinite(curve.loss)
    excess = np.where(finite, curve.loss - _chord(curve.loss, curve.at), np.inf)
    top = int(np.argmax(excess))
    return Barrier(
        curve,
        height=float(excess[top]),
        at=float(curve.at[top]),
        middle=float(excess[(points - 1) // 2]),
        prominence=_prominence(np.where(finite, curve.loss, np.inf)),
        accuracy=float((_chord(curve.accuracy, curve.at) - curve.accuracy).max()),
        distance=float(np.linalg.norm(_vector(way))),
    )


def plane(objective: Objective, models: Sequence[Any], points: int = 21, margin: float = 0.3) -> Plane:
    """The plane through three models: Garipov et al., "Loss Surfaces, Mode Connectivity, and Fast Ensembling
    of DNNs", NeurIPS 2018, https://arxiv.org/abs/1802.10026.

    u points from the first to the second, v is what of the way to the third is at right angles to u. Every
    point of the plane is an affine combination of the three, whose batch statistics are combined likewise.

    Args:
      objective: what is evaluated.
      models: three of the same shapes.
      points: on each side of the grid.
      margin: how far it reaches beyond the models, in parts of their extent.

    Raises:
      UserError: not three models, or they lie on one line.
    """
    if len(models) != 3:
        raise UserError("models", len(models), "a plane goes through three", "Give three models.")
    to_second, to_third = (difference(model, models[0]) for model in models[1:])
    a, b = _vector(to_second), _vector(to_third)
    across = np.linalg.norm(a)
    along = a @ b / across if across else 0.0
    height = np.linalg.norm(b - along * a / across) if across else 0.0
    if height <= 1e-6 * np.linalg.norm(b):
        raise UserError("models", 3, "they lie on one line, or coincide", "Give three different models.")
    places = np.asarray([[0.0, 0.0], [across, 0.0], [along, height]])
    low, high = places.min(0), places.max(0)
    low, high = low - margin * (high - low), high + margin * (high - low)
    x, y = (np.linspace(low[side], high[side], points) for side in (0, 1))
    grid = np.stack(np.meshgrid(x, y, indexing="ij"), -1).reshape(-1, 2)
    third = grid[:, 1] / height
    second = (grid[:, 0] - third * along) / across
    found = objective.values(models[0], stack(to_second, to_third), np.stack([second, third], 1))
    shape = (points, points)
    return Plane(found.loss.reshape(shape), found.accuracy.reshape(shape), x, y, places)


def _chord(values: np.ndarray, at: np.ndarray) -> np.ndarray:
    return (1 - at) * values[0] + at * values[-1]


def _prominence(loss: np.ndarray) -> float:
    """max_t L(t) − max(min_{s ≤ t} L(s), min_{s ≥ t} L(s)): a peak above the higher of its valleys."""
    valley = np.maximum(np.minimum.accumulate(loss), np.minimum.accumulate(loss[::-1])[::-1])
    rise = np.zeros_like(loss)
    np.subtract(loss, valley, out=rise, where=np.isfinite(valley))
    return float(rise.max())


def _vector(tree: Any) -> np.ndarray:
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree["params"])])
