"""Private leaves: some of a model's leaves never leave their client. What personalised methods share.

`keep` takes any algorithm and gives the same one, except that some leaves are each client's own. They live in
a stack over all N clients. Before training they replace those leaves of the model that the inner algorithm
sends, and after it they are taken from the trained models. The inner algorithm sees whole models and does not
know. With no private leaves it is the inner algorithm; with all of them every client trains alone.

In the deployed model, the private leaves are what the inner algorithm made of them (their mean, for
averaging). That model is a reference: a personalised method is judged by `Algorithm.personal_models`.
"""

import difflib
import fnmatch
from collections.abc import Collection
from typing import Any, cast

import jax
from flax import struct, traverse_util

from fedjax_sim.algorithms.card import Card
from fedjax_sim.algorithms.shared import mean_of_included
from fedjax_sim.algorithms.wrap import Layer, wrap
from fedjax_sim.core import stacked
from fedjax_sim.core.algorithm import Algorithm, Starts
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.model import Model

Path = tuple[str, ...]
"""Of a leaf in a model's variables, collection first: ("params", "conv1", "kernel")."""


@struct.dataclass
class PrivateState:
    """Attributes: inner: the wrapped algorithm's state. private: path -> leaf [N, …], all clients' own."""

    inner: Any
    private: Any


def card(name: str, **others: str) -> Card:
    """Of a method with private leaves; others: what else it says than the rest of them."""
    common = {
        "keeps": "its private leaves",
        "sends": "the shared leaves, 1 + 1 without the private",
        "holds": "no private leaf is FedAvg; private leaves change by training alone",
    }
    return Card(name, **common | others)


def keep(inner: Algorithm, leaves: Collection[Path], num_clients: int) -> Algorithm:
    """`inner` with `leaves` private to each of `num_clients` clients.

    A client whose update was not finite keeps the private leaves that it had, and has no part in the mean if
    the inner algorithm sends all the same model.
    """
    leaves = frozenset(leaves)
    if not leaves:
        return inner

    def init(inside, key, variables):
        mine = {path: leaf for path, leaf in _flat(variables).items() if path in leaves}
        return PrivateState(inside(key, variables), stacked.broadcast(_named(mine), num_clients))

    def joined(models, state, ids):
        own = stacked.take_rows(state.private, ids)
        return traverse_util.unflatten_dict({**_flat(models), **_paths(own)})

    def dispatch(inside, state, cohort, key):
        starts = inside(state, cohort, key)
        models = starts.models
        if starts.shared:
            models = stacked.broadcast(models, len(cohort.ids))
        return Starts(joined(models, state, cohort.ids), starts.broadcast, shared=False)

    def merge(inside, state, cohort, starts, results, key):
        flat = _flat(results.models)
        trained = _named({path: flat[path] for path in leaves})
        private = stacked.put_rows(state.private, cohort.ids, trained)
        if inner.weights is not None and jax.eval_shape(inner.dispatch, state.inner, cohort, key).shared:
            mean = mean_of_included(results, inner.weights(cohort), inner.deploy(state.inner))
            results = results.replace(mean=mean)
        new, metrics = inside(state, cohort, starts, results, key)
        return new.replace(private=private), metrics

    return wrap(
        inner,
        Layer(
            pairs=("state",),
            init=init,
            dispatch=dispatch,
            merge=merge,
            personal_models=lambda inside, state, ids: joined(inside(state, ids), state, ids),
            slot_models=lambda inside, state, slots, ids: joined(inside(state, slots, ids), state, ids),
            stacked=("private",),
            by_client=("private",),
            needs_models=True,
        ),
    )


# --- which leaves ---------------------------------------------------------------------------------------


def in_blocks(model: Model, numbers: Collection[int]) -> frozenset[Path]:
    """The leaves of some of a model's blocks (`Model.blocks`), batch statistics included."""
    return frozenset(path for path, block in model.blocks().items() if block in numbers)


def first(model: Model, count: int, field: str = "algorithm.blocks") -> frozenset[Path]:
    """The leaves of a model's first `count` blocks. Raises UserError if there are not so many."""
    return _checked(model, range(count), field, count)


def last(model: Model, count: int, field: str = "algorithm.blocks") -> frozenset[Path]:
    """Those of its last `count` blocks, of which the very last is the classifier. Raises as `first`."""
    total = len(model.peel_points)
    return _checked(model, range(total - count, total), field, count)


def only(model: Model, number: int, field: str = "algorithm.only") -> frozenset[Path]:
    """Those of block `number`, from 0. Raises UserError if there is no such block."""
    return _checked(model, range(number, number + 1), field, number)


def head(model: Model, count: int) -> frozenset[Path]:
    """The last `count` blocks of a model that is a head on a body. Raises UserError if either is empty."""
    leaves, total = last(model, count), len(model.peel_points)
    if not 0 < count < total:
        raise UserError(
            "algorithm.blocks",
            count,
            f"head and body share the {total} blocks of {model.name}, and one of them is empty",
            "Leave at least one block to each.",
        )
    return leaves


def matching(model: Model, patterns: Collection[str], field: str = "algorithm.leaves") -> frozenset[Path]:
    """The leaves whose path, such as `params/fc1/kernel`, matches a pattern (`params/fc1/*`, `*/bias`).

    Raises:
      UserError: a pattern matches none.
    """
    names = {"/".join(path): path for path in model.layer_order()}
    found: set[Path] = set()
    for pattern in patterns:
        hits = [path for name, path in names.items() if fnmatch.fnmatchcase(name, pattern)]
        if not hits:
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
            raise UserError(
                field, pattern, f"no leaf of {model.name} is called so", f"Near are {', '.join(near)}."
            )
        found.update(hits)
    return frozenset(found)


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
            "Take a model with it: resnet20, vgg11_bn, or cnn8 with model.norm batch.",
        )
    return frozenset(path for path in order if path[1:-1] in modules)


def marked(variables: Any, leaves: Collection[Path], inside: Any, outside: Any) -> Any:
    """A tree like `variables`: `inside` at the places of `leaves`, `outside` elsewhere.

    Args:
      variables: the tree whose paths it has.
      leaves: some of these paths.
      inside: what to put at their places.
      outside: what to put elsewhere.
    """
    return traverse_util.unflatten_dict(
        {path: inside if path in leaves else outside for path in _flat(variables)}
    )


def grafted(models: Any, others: Any, leaves: Collection[Path]) -> Any:
    """`models` with the `leaves` of `others`."""
    return traverse_util.unflatten_dict(
        {**_flat(models), **{path: leaf for path, leaf in _flat(others).items() if path in leaves}}
    )


def _checked(model: Model, numbers: range, field: str, given: int) -> frozenset[Path]:
    """The leaves of these blocks, if the model has them. field, given: what the user set."""
    points = model.peel_points
    if numbers and not points:
        raise UserError(
            field,
            given,
            f"{model.name} declares no peel points, which bound its blocks",
            "Mark the input of each weight layer with fedjax_sim.models.peel.",
        )
    if numbers and not 0 <= numbers[0] <= numbers[-1] < len(points):
        names = ", ".join(f"{number} {point.name}" for number, point in enumerate(points))
        raise UserError(field, given, f"{model.name} has {len(points)} blocks", f"They are, from 0: {names}.")
    return in_blocks(model, numbers)


def _flat(variables: Any) -> dict[Path, jax.Array]:
    return cast(dict[Path, jax.Array], traverse_util.flatten_dict(variables))


def _named(leaves: dict[Path, jax.Array]) -> dict[str, jax.Array]:
    """Under names that a checkpoint can write."""
    return {"/".join(path): leaf for path, leaf in sorted(leaves.items())}


def _paths(leaves: dict[str, jax.Array]) -> dict[Path, jax.Array]:
    return {tuple(name.split("/")): leaf for name, leaf in leaves.items()}
