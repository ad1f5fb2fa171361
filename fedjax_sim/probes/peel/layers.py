"""The features of all layers of a model, side by side in one long vector.

What is computed of every layer is computed of this vector. Layer by layer it would be as many operations as
there are layers, of as many shapes, and XLA's CPU compiler takes some 10 ms for each.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

ROWS = 32
"""A layer's features fill so many rows, with zeros at their end; the rows of all layers lie side by side."""


@dataclasses.dataclass(frozen=True)
class Layers:
    """Where the features of L layers lie in a vector of D numbers.

    The vector is a matrix of `ROWS` rows, of which every layer has some columns: sums within layers go down
    the rows first, which processors do for many columns at once.

    Attributes:
      widths: how many numbers each layer has of its own, d_1 … d_L.
    """

    widths: tuple[int, ...]

    @property
    def size(self) -> int:
        """D."""
        return ROWS * sum(self._columns)

    @property
    def _columns(self) -> list[int]:
        return [-(-width // ROWS) for width in self.widths]

    def join(self, features: Sequence[jax.Array]) -> jax.Array:
        """f32[…, d_l] of every layer -> f32[…, D]."""

        def rows(z, columns):
            spare = [(0, 0)] * (z.ndim - 1) + [(0, ROWS * columns - z.shape[-1])]
            return jnp.pad(z.astype(jnp.float32), spare).reshape(*z.shape[:-1], ROWS, columns)

        parts = [rows(z, columns) for z, columns in zip(features, self._columns, strict=True)]
        return jax.lax.collapse(jnp.concatenate(parts, -1), parts[0].ndim - 2)

    def split(self, vector: jax.Array) -> list[jax.Array]:
        """f32[…, D] -> f32[…, d_l] of every layer."""
        rows = vector.reshape(*vector.shape[:-1], ROWS, -1)
        ends = np.cumsum(self._columns)
        parts = zip(ends - self._columns, ends, self.widths, strict=True)
        return [jax.lax.collapse(rows[..., a:b], vector.ndim - 1)[..., :width] for a, b, width in parts]

    def sums(self, vector: jax.Array) -> jax.Array:
        """Within each layer. f32[…, D] -> f32[…, L]."""
        columns = vector.reshape(*vector.shape[:-1], ROWS, -1).sum(-2)
        of_layer = np.repeat(np.arange(len(self.widths)), self._columns)
        # A choice and not a product with 0 and 1: what is infinite in one layer leaves the others alone.
        own = of_layer == np.arange(len(self.widths))[:, None]
        return jnp.where(own, columns[..., None, :], 0).sum(-1)
