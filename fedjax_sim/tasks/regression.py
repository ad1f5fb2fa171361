"""Regression on tables: a number for each row, squared error, MSE and R²."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sim.core.task import Example, Metric, Task
from fedjax_sim.tasks.vectors import Standardise, inputs


def squared_error(outputs: jax.Array, example: Example) -> jax.Array:
    """Of each sample, in units of the target's variance. f32[B, 1] and `target` f32[B] -> f32[B]."""
    error = outputs[:, 0] - example["target"]
    return error * error


@dataclasses.dataclass(frozen=True)
class _InUnits:
    """The squared error in the target's own units."""

    scale: float

    def __call__(self, outputs: jax.Array, example: Example) -> jax.Array:
        return jnp.float32(self.scale**2) * squared_error(outputs, example)[:, None]


def _with_targets(outputs: jax.Array, example: Example) -> jax.Array:
    """(squared error, target, target squared) of each sample."""
    target = example["target"]
    return jnp.stack([squared_error(outputs, example), target, target * target], 1)


def _r2(means: np.ndarray) -> np.ndarray:
    """1 - MSE / variance of the targets; NaN where all targets are one.

    The squares are float32, of which a variance below a millionth of their mean is rounding.
    """
    variance = means[..., 2] - means[..., 1] ** 2
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(variance > 1e-6 * means[..., 2], 1 - means[..., 0] / variance, np.nan)


R2 = Metric("r2", "max", _with_targets, _r2)


def regression(
    mean: Sequence[float], scale: Sequence[float], target: tuple[float, float] = (0.0, 1.0)
) -> Task:
    """The task of a table. Its samples are `x` f32[d] and `target` f32[].

    The model's output is the target standardised, and so is the loss; MSE is in the target's own units.

    Args:
      mean: of each of the d features, by which they are standardised.
      scale: of each, positive.
      target: (mean, scale) of the target.
    """
    spec = {
        "x": jax.ShapeDtypeStruct((len(mean),), jnp.float32),
        "target": jax.ShapeDtypeStruct((), jnp.float32),
    }
    return Task(
        name="regression",
        spec=spec,
        outputs=1,
        prepare=Standardise(tuple(map(float, mean)), tuple(map(float, scale)), target),
        inputs=inputs,
        loss=squared_error,
        metrics=(Metric("mse", "min", _InUnits(float(target[1]))), R2),
    )
