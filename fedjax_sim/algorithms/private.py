"""Private leaves: some of a model's leaves never leave their client. What personalised methods share.

`keep` takes any algorithm and gives the same one, except that the leaves it names are each client's own: they
live in a stack over all N clients, join what the inner algorithm sends before training, and are taken from
the trained models afterwards. The inner algorithm sees whole models and need not know; of the private leaves
of what it keeps, nothing reaches a client. With no private leaves it is the inner algorithm, with all of them
every client trains alone.

The deployed model holds, in place of private leaves, whatever the inner algorithm made of them (their mean,
for averaging). It is a reference; what counts of a personalised method is `personal`.
"""

import dataclasses
from collections.abc import Collection
from typing import Any, cast

import jax
from flax import struct, traverse_util

from fedjax_sim import stacked
from fedjax_sim.algorithms.base import Algorithm, Starts
from fedjax_sim.errors import UserError
from fedjax_sim.models.base import Model

Path = tuple[str, ...]
"""Of a leaf in a model's variables, collection first: ("params", "conv1", "kernel")."""


@struct.dataclass
class PrivateState:
    """Attributes: inner: the wrapped algorithm's state. private: path -> leaf [N, …], all clients' own."""

    inner: Any
    private: Any


def keep(inner: Algorithm, leaves: Collection[Path], num_clients: int) -> Algorithm:
    """`inner` with `leaves` private to each of `num_clients` clients.

    A client whose update was not finite keeps the private leaves that it had.
    """
    leaves = frozenset(leaves)

    def init(key, variables):
        mine = {path: leaf for path, leaf in _flat(variables).items() if path in leaves}
        return PrivateState(inner.init(key, variables), stacked.broadcast(_named(mine), num_clients))

    def joined(models, state, ids):
        own = stacked.take_rows(state.private, ids)
        return traverse_util.unflatten_dict({**_flat(models), **_paths(own)})

    def dispatch(state, cohort, key):
        starts = inner.dispatch(state.inner, cohort, key)
        models = starts.models
        if starts.shared:
            models = stacked.broadcast(models, len(cohort.ids))
        return Starts(joined(models, state, cohort.ids), starts.broadcast, shared=False)

    def merge(state, cohort, starts, results, key):
        flat = _flat(results.models)
        trained = _named({path: flat[path] for path in leaves})
        private = stacked.put_rows(state.private, cohort.ids, trained)
        new, metrics = inner.merge(state.inner, cohort, starts, results, key)
        return PrivateState(new, private), metrics

    def personal(state, ids):
        if inner.personal is not None:
            return joined(inner.personal(state.inner, ids), state, ids)
        return joined(stacked.broadcast(inner.deploy(state.inner), len(ids)), state, ids)

    def slot(state, slots, ids):
        return joined(inner.held(state.inner, slots, ids), state, ids)

    return dataclasses.replace(
        inner,
        init=init,
        dispatch=dispatch,
        merge=merge,
        deploy=lambda state: inner.deploy(state.inner),
        needs_models=True,
        stacked=(*inner.stacked, "private"),
        personal=personal,
        slot=slot,
    )


def in_blocks(model: Model, numbers: Collection[int]) -> frozenset[Path]:
    """The leaves of some of a model's blocks (`Model.blocks`), batch statistics included."""
    return frozenset(path for path, block in model.blocks().items() if block in numbers)


def normalisation(model: Model) -> frozenset[Path]:
    """The leaves of all batch normalisation: scale, shift and running statistics.

    Raises:
      UserError: the model has none.
    """
    order = model.layer_order()
    modules = {path[1:-1] for path in order if path[0] == "batch_stats"}
    if not modules:
        raise UserError(
            "algorithm",
            "fedbn",
            f"{model.name} has no batch normalisation that could stay private",
            "Set model.norm to batch, or choose a model with it (fedjax-sim list).",
        )
    return frozenset(path for path in order if path[1:-1] in modules)


def _flat(variables: Any) -> dict[Path, jax.Array]:
    return cast(dict[Path, jax.Array], traverse_util.flatten_dict(variables))


def _named(leaves: dict[Path, jax.Array]) -> dict[str, jax.Array]:
    """Under names that a checkpoint can write."""
    return {"/".join(path): leaf for path, leaf in sorted(leaves.items())}


def _paths(leaves: dict[str, jax.Array]) -> dict[Path, jax.Array]:
    return {tuple(name.split("/")): leaf for name, leaf in leaves.items()}
