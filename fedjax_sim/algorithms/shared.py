"""What several algorithms share: weights, means of the included, what is nested."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_sim.core import stacked
from fedjax_sim.core.algorithm import Algorithm, AlgorithmConfig, Cohort, Context, Results
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.model import Variables


def build_inner(config: AlgorithmConfig, context: Context) -> Algorithm:
    """The record of an `inner` algorithm; in its errors `algorithm.` becomes `algorithm.inner.`."""
    try:
        return config.build(context)
    except UserError as error:
        if error.field.split(".")[0] != "algorithm":
            raise
        field = "algorithm.inner" + error.field.removeprefix("algorithm")
        raise UserError(field, error.value, error.why, error.fix) from None


def nested(config: Any) -> Iterator[Any]:
    """The configurations inside an algorithm's, at any depth, outermost first; its own is not among them."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, AlgorithmConfig) and dataclasses.is_dataclass(value):
            yield value
            yield from nested(value)


def nested_with(config: Any, trait: str) -> Iterator[Any]:
    """Those of `nested` that have a trait: a class attribute that is true, such as `counts_gradients`.

    So methods ask one another for what matters to them, and not for names.
    """
    return (one for one in nested(config) if getattr(one, trait, False))


def named(config: Any) -> str:
    """A configuration's name, or else its class's, for messages."""
    card = getattr(config, "card", None)
    return card.name if card else type(config).__name__


def weighing(weights: str) -> Callable[[Cohort], jax.Array]:
    """`Algorithm.weights` by name: `samples` or `uniform`."""
    return {"samples": by_samples, "uniform": uniform}[weights]


def by_samples(cohort: Cohort) -> jax.Array:
    """Weights proportional to each client's number of samples. -> f32[K]."""
    return cohort.counts.astype(jnp.float32)


def uniform(cohort: Cohort) -> jax.Array:
    """Equal weights. -> f32[K]."""
    return jnp.ones(cohort.ids.shape, jnp.float32)


def mean_of_included(results: Results, weights: jax.Array, otherwise: Variables) -> Variables:
    """`Results.mean` without the clients that were left out, for slots that start from models of their own.

    The engine's counts those too, each with its start.

    Args:
      results: with `models` [K, …] and `mean`.
      weights: f32[K], unnormalised.
      otherwise: the mean if all were left out, or had no weight.
    """
    # Left to itself XLA cuts such vectors, and gathers them wherever they are read.
    included, weights = stacked.whole((results.included, weights))

    def again():
        share = jnp.where(included, weights, 0)
        mean = stacked.mean(results.models, share / jnp.maximum(share.sum(), 1e-30))
        return jax.tree.map(lambda new, old: jnp.where(share.sum() > 0, new, old), mean, otherwise)

    return jax.lax.cond(included.all() & (weights.sum() > 0), lambda: results.mean, again)
