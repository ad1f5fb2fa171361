"""The features of all layers of a model, side by side in one long vector.

What is computed of every layer is computed of this vector. Layer by layer it would be as many operations as
there are layers, of as many shapes, and XLA's CPU compiler takes some 10 ms for each.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 32
"""Every layer fills whole blocks of so many numbers, with zeros at its end."""


@dataclasses.dataclass(frozen=True)
class Layers:
    """Where the features of L layers lie in a vector of D numbers.

    Attributes:
      widths: how many numbers each layer has of its own, d_1 … d_L.
    """

    widths: tuple[int, ...]

    @property
    def size(self) -> int:
        """D."""
        return BLOCK * sum(self._blocks)

    @property
    def _blocks(self) -> list[int]:
        return [-(-width // BLOCK) for width in self.widths]

    def join(self, features: Sequence[jax.Array]) -> jax.Array:
        """f32[…, d_l] of every layer -> f32[…, D]."""
        spare = [BLOCK * n - width for n, width in zip(self._blocks, self.widths, strict=True)]
        none = [(0, 0)] * (features[0].ndim - 1)
        return jnp.concatenate(
            [
                jnp.pad(z.astype(jnp.float32), [*none, (0, more)])
                for z, more in zip(features, spare, strict=True)
            ],
            -1,
        )

    def split(self, vector: jax.Array) -> list[jax.Array]:
        """f32[…, D] -> f32[…, d_l] of every layer."""
        starts = BLOCK * np.cumsum([0, *self._blocks])
        return [vector[..., a : a + width] for a, width in zip(starts[:-1], self.widths, strict=True)]

    def sums(self, vector: jax.Array) -> jax.Array:
        """Within each layer. f32[…, D] -> f32[…, L]."""
        blocks = vector.reshape(*vector.shape[:-1], -1, BLOCK).sum(-1)
        of_layer = np.repeat(np.arange(len(self.widths)), self._blocks)
        # A choice and not a product with 0 and 1: what is infinite in one layer leaves the others alone.
        own = of_layer[:, None] == np.arange(len(self.widths))
        return jnp.where(own, blocks[..., None], 0).sum(-2)
