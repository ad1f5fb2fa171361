"""The two controls without any mixing: models that wander between clients, and models that stay at home.

FedIndep is FedMR's control (FOUND in the authors' code, `Training_FedIndep`): K models random-walk over
fresh cohorts, neither recombined nor averaged back; what is evaluated is their uniform mean.

Local is the classical lower bound on collaboration: every client keeps and trains a model of its own.
"""

import dataclasses
from typing import Any, ClassVar

from flax import struct

from fedjax_sim.algorithms import shared
from fedjax_sim.algorithms.card import Card
from fedjax_sim.core import stacked
from fedjax_sim.core.algorithm import Algorithm, Context, Starts


@struct.dataclass
class FedIndepState:
    """Attributes: slots: the K models, [K, …]. mean: their uniform mean."""

    slots: Any
    mean: Any


@dataclasses.dataclass(frozen=True)
class FedIndep:
    """K models that visit a fresh cohort each round and never meet."""

    card: ClassVar[Card] = Card(
        "fedindep", besides="K models on the server", defaults="none to set", holds="slots never mix"
    )

    def build(self, context: Context) -> Algorithm:
        """The record of pure functions."""

        def init(key, variables):
            del key
            return FedIndepState(stacked.broadcast(variables, context.cohort_size), variables)

        def dispatch(state, cohort, key):
            del cohort, key
            return Starts(state.slots, shared=False)

        def merge(state, cohort, starts, results, key):
            del state, cohort, starts, key
            return FedIndepState(results.models, results.mean), {}

        return Algorithm(
            init=init,
            dispatch=dispatch,
            merge=merge,
            deploy=lambda state: state.mean,
            weights=shared.uniform,
            stacked=("slots",),
            slot_models=lambda state, slots, ids: stacked.take_rows(state.slots, slots),
        )


@struct.dataclass
class LocalState:
    """Attributes: models: every client's own, [N, …]."""

    models: Any


@dataclasses.dataclass(frozen=True)
class Local:
    """No federation: each client trains its own model whenever it is drawn.

    The deployed model is the uniform mean of all N, which is evaluated for reference only; what counts is
    the accuracy per client (`evaluation.per_client`).
    """

    card: ClassVar[Card] = Card(
        "local", keeps="1 model", sends="0", defaults="none to set", holds="clients never mix"
    )

    returns_own_model: ClassVar[bool] = True
    """A client is sent the very model that it trained last."""

    def build(self, context: Context) -> Algorithm:
        """The record of pure functions."""

        def init(key, variables):
            del key
            return LocalState(stacked.broadcast(variables, context.num_clients))

        def dispatch(state, cohort, key):
            del key
            return Starts(stacked.take_rows(state.models, cohort.ids), shared=False)

        def merge(state, cohort, starts, results, key):
            del starts, key
            return LocalState(stacked.put_rows(state.models, cohort.ids, results.models)), {}

        return Algorithm(
            init=init,
            dispatch=dispatch,
            merge=merge,
            deploy=lambda state: stacked.mean(state.models),
            stacked=("models",),
            personal_models=lambda state, ids: stacked.take_rows(state.models, ids),
        )
