"""Stacks as the devices hold them: filled up with rows that nobody has, where the devices do not divide them.

JAX cuts an array over devices only where they divide it. Inside a compiled program XLA cuts any: 1,000 rows
over 16 devices are 63 each, with 8 that do not count on the last. So between rounds a stack is held with
these 8 as well; a round and whatever else is asked of the state sees the 1,000, and nothing moves for that.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from fedjax_sim.core import stacked


@dataclasses.dataclass(frozen=True)
class Held:
    """How an algorithm's state is held.

    Attributes:
      rows: of each leaf of the state how many rows count; None of a leaf that is held as it is. Empty: all
        are.
      devices: D.
    """

    rows: tuple[int | None, ...] = ()
    devices: int = 1

    def filled(self, state: Any) -> Any:
        """The algorithm's state as it is held. Traced."""
        return self._each(state, lambda leaf, rows: stacked.filled_up(leaf, self.devices))

    def cut(self, state: Any) -> Any:
        """The algorithm's state of the one that is held. Traced."""
        return self._each(state, stacked.cut_to)

    def of(self, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """A function of the algorithm's state, as one of the state that is held."""
        return _OfHeld(function, self) if self.rows else function

    def _each(self, state: Any, change: Callable[[jax.Array, int], jax.Array]) -> Any:
        if not self.rows:
            return state
        leaves, structure = jax.tree.flatten(state)
        pairs = zip(leaves, self.rows, strict=True)
        return structure.unflatten([leaf if rows is None else change(leaf, rows) for leaf, rows in pairs])


AS_IT_IS = Held()


@dataclasses.dataclass(frozen=True)
class _OfHeld:
    """See `Held.of`."""

    function: Callable[[Any], Any]
    held: Held

    def __call__(self, state: Any) -> Any:
        return self.function(self.held.cut(state))


def filled_shape(shape: tuple[int, ...], devices: int) -> tuple[int, ...]:
    """The shape (m, …) that a stack of the shape (n, …) is held in."""
    return -(-shape[0] // devices) * devices, *shape[1:]


def how(shapes: Any, stacks: Any, devices: int) -> Held:
    """How a state is held.

    Args:
      shapes: of its leaves.
      stacks: which of them are stacks, a tree of bool like it.
      devices: D.
    """
    pairs = zip(jax.tree.leaves(shapes), jax.tree.leaves(stacks), strict=True)
    rows = tuple(leaf.shape[0] if stack and leaf.shape[0] % devices else None for leaf, stack in pairs)
    return Held(rows if any(rows) else (), devices)
