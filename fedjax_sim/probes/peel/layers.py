"""The features of all layers of a model, side by side in one long vector.

What is computed of every layer is computed of this vector. Layer by layer it would be as many operations as
there are layers, of as many shapes, and XLA's CPU compiler takes some 10 ms for each.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

PIECE = 32
"""A layer fills so many numbers or a multiple of them, with zeros at its end; layers follow one another."""


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
        return PIECE * sum(self._pieces)

    @property
    def _pieces(self) -> list[int]:
        return [-(-width // PIECE) for width in self.widths]

    @property
    def _starts(self) -> list[int]:
        return [PIECE * int(end) for end in np.cumsum([0, *self._pieces])[:-1]]

    def cut(self, place: int) -> tuple["Layers", "Layers"]:
        """The layers before a place, and those from it on."""
        return Layers(self.widths[:place]), Layers(self.widths[place:])

    def join(self, features: Sequence[jax.Array]) -> jax.Array:
        """f32[…, d_l] of every layer -> f32[…, D].

        Written layer by layer into one array: into a concatenation XLA's CPU backend puts the sums that are
        taken of it, and then asks for every number which layer it comes from.
        """
        lead = features[0].shape[:-1] if features else ()
        out = jnp.zeros((*lead, self.size), jnp.float32)
        for z, start in zip(features, self._starts, strict=True):
            out = jax.lax.dynamic_update_slice(out, z.astype(jnp.float32), (0,) * len(lead) + (start,))
        return out

    def split(self, vector: jax.Array) -> list[jax.Array]:
        """f32[…, D] -> f32[…, d_l] of every layer."""
        return [vector[..., a : a + width] for a, width in zip(self._starts, self.widths, strict=True)]

    def sums(self, vector: jax.Array) -> jax.Array:
        """Within each layer. f32[…, D] -> f32[…, L]."""
        pieces = vector.reshape(*vector.shape[:-1], sum(self._pieces), PIECE).sum(-1)
        of_layer = np.repeat(np.arange(len(self.widths)), self._pieces)
        # A choice and not a product with 0 and 1: what is infinite in one layer leaves the others alone.
        own = of_layer == np.arange(len(self.widths))[:, None]
        return jnp.where(own, pieces[..., None, :], 0).sum(-1)
