"""Samples that are rows of a table: features standardised by the training set's mean and deviation.

OUR CHOICE: the mean and the deviation are of the whole training set, which in a real federation nobody has
without asking the clients for sums.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sim.core.task import Example


@dataclasses.dataclass(frozen=True)
class Standardise:
    """`Task.prepare`: (x - mean) / scale of `x` f32[n, d]; where `target` is scaled, of `target` f32[n] too.

    Attributes:
      mean: of each feature, d numbers.
      scale: likewise, positive.
      target: (mean, scale) of the target, or None.
    """

    mean: tuple[float, ...]
    scale: tuple[float, ...]
    target: tuple[float, float] | None = None

    def __call__(self, example: Example) -> Example:
        """Prepared samples."""
        mean, scale = jnp.asarray(self.mean, jnp.float32), jnp.asarray(self.scale, jnp.float32)
        made = {**example, "x": (example["x"] - mean[None]) / scale[None]}
        if self.target is not None:
            centre, width = (jnp.float32(number) for number in self.target)
            made["target"] = (example["target"] - centre) / width
        return made


def moments(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mean, deviation) of f32[n, …] over n, f64[…]; 1 for a deviation of 0."""
    wide = values.astype(np.float64)
    deviation = wide.std(0)
    return wide.mean(0), np.where(deviation > 0, deviation, 1.0)


def inputs(example: Example) -> tuple[jax.Array, ...]:
    """What a model is called with."""
    return (example["x"],)
