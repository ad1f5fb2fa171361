"""Stacks as the devices hold them: filled up with rows that nobody has, where the devices do not divide them.

JAX cuts an array over devices only where they divide it. Inside a compiled program XLA cuts any: 1,000 rows
over 16 devices are 63 each, with 8 that do not count on the last. So between rounds a stack is held with
these 8 as well; a round and whatever else is asked of the state sees the 1,000, and nothing moves for that.

Of stacks over all clients that lie on the host (`fedjax_sim.engine.client_state`) the devices hold the rows
of one cohort. A round sees each as `stacked.RowsOf`, which stands for the stack.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax

from fedjax_sim.core import stacked


@dataclasses.dataclass(frozen=True)
class Held:
    """How an algorithm's state is held.

    Attributes:
      rows: of each leaf of the state how many rows count; None of a leaf that is held as it is. Empty: all
        are.
      devices: D.
      on_host: which leaves of the algorithm's state lie on the host; empty: none.
      clients_on_host: whether what clients keep lies there.
    """

    rows: tuple[int | None, ...] = ()
    devices: int = 1
    on_host: tuple[bool, ...] = ()
    clients_on_host: bool = False

    def filled(self, state: Any) -> Any:
        """The algorithm's state as it is held. Traced."""
        if not self.rows and not self.on_host:
            return state
        leaves, structure = jax.tree.flatten(stacked.only_rows(state))
        pairs = zip(leaves, self.rows or (None,) * len(leaves), strict=True)
        return structure.unflatten(
            [leaf if rows is None else stacked.filled_up(leaf, self.devices) for leaf, rows in pairs]
        )

    def cut(self, state: Any, ids: jax.Array | None = None) -> Any:
        """The algorithm's state of the one that is held. Traced.

        Args:
          state: as it is held.
          ids: i32[m], whose rows it has of stacks on the host; None: these are not looked at.
        """
        if not self.rows and not self.on_host:
            return state
        leaves, structure = jax.tree.flatten(state)
        rows = self.rows or (None,) * len(leaves)
        there = (False,) * len(leaves) if ids is None else self.on_host or (False,) * len(leaves)

        def one(leaf: jax.Array, rows: int | None, there: bool) -> Any:
            if there:
                return _of_clients(leaf, cast(jax.Array, ids))
            return leaf if rows is None else stacked.cut_to(leaf, rows)

        return structure.unflatten(map(one, leaves, rows, there))

    def clients_filled(self, clients: Any) -> Any:
        """What clients keep, as it is held. Traced."""
        if not self.clients_on_host:
            return clients
        return jax.tree.map(lambda leaf: stacked.filled_up(leaf, self.devices), stacked.only_rows(clients))

    def clients_cut(self, clients: Any, ids: jax.Array) -> Any:
        """What clients keep, of what is held. Traced.

        Args:
          clients: as it is held.
          ids: i32[m], whose rows it has, if it lies on the host.
        """
        if not self.clients_on_host:
            return clients
        return jax.tree.map(lambda leaf: _of_clients(leaf, ids), clients)

    def of(self, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """A function of the algorithm's state, as one of the state that is held."""
        return _OfHeld(function, self) if self.rows else function


AS_IT_IS = Held()


@dataclasses.dataclass(frozen=True)
class _OfHeld:
    """See `Held.of`."""

    function: Callable[[Any], Any]
    held: Held

    def __call__(self, state: Any) -> Any:
        return self.function(self.held.cut(state))


def _of_clients(leaf: jax.Array, ids: jax.Array) -> stacked.RowsOf:
    return stacked.RowsOf(ids, stacked.cut_to(leaf, ids.shape[0]))


def filled_shape(shape: tuple[int, ...], devices: int) -> tuple[int, ...]:
    """The shape (m, …) that a stack of the shape (n, …) is held in."""
    return -(-shape[0] // devices) * devices, *shape[1:]


def how(
    shapes: Any, stacks: Any, devices: int, on_host: Any = None, *, clients_on_host: bool = False
) -> Held:
    """How a state is held.

    Args:
      shapes: of its leaves.
      stacks: which of them are stacks, a tree of bool like it.
      devices: D.
      on_host: which of them lie on the host, likewise; None: none.
      clients_on_host: see `Held`.
    """
    pairs = zip(jax.tree.leaves(shapes), jax.tree.leaves(stacks), strict=True)
    rows = tuple(leaf.shape[0] if stack and leaf.shape[0] % devices else None for leaf, stack in pairs)
    there = tuple(jax.tree.leaves(on_host))
    return Held(rows if any(rows) else (), devices, there if any(there) else (), clients_on_host)
