"""FedExP: the server goes further than the mean where clients disagree.

Jhunjhunwala, Wang, Joshi. FedExP: Speeding Up Federated Averaging via Extrapolation. ICLR 2023.
https://arxiv.org/abs/2301.09604

With Δ_i = w_i − x and Δ̄ their mean,

    x ← x + η_g Δ̄,   η_g = max(1, Σ_i ‖Δ_i‖² / (2 M (‖Δ̄‖² + ε))),   M = |cohort|

and the mean of the last two iterates is deployed, as iterates of η_g > 1 swing; after the first round, FOUND
in the code of FedExP and of FedMR, the one that there is. Means are uniform, norms over all parameters; batch
statistics are averaged.

FOUND in the code of FedMR, as `variant: fedmr`: means are weighted by samples, ε is 0.1 M, and η_g extends to
batch statistics, though the norms do not; beyond 1 it may make a variance negative. The authors' own code has
the same weights, and for ε M times 0.1 (EMNIST) or 0.001 (CIFAR), times 0.998² a round.
"""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import struct

from fedjax_sim.algorithms import shared
from fedjax_sim.algorithms.card import Card
from fedjax_sim.core import stacked
from fedjax_sim.core.algorithm import Algorithm, Context, LocalRule, Starts
from fedjax_sim.core.fields import check, positive


@struct.dataclass
class FedExPState:
    """Attributes: model: x. previous: the iterate before, x itself until there are two."""

    model: Any
    previous: Any


@dataclasses.dataclass(frozen=True)
class FedExP:
    """Federated averaging with extrapolation.

    Attributes:
      variant: `paper` or `fedmr`, see above.
      epsilon: ε; None: 1e-3 (OUR CHOICE), or 0.1 M in the variant `fedmr`.
      averages: deploy the mean of the last two iterates; else the last.
    """

    card: ClassVar[Card] = Card(
        "fedexp",
        sends="1 + 1 and a number",
        defaults="ours (ε); code of FedMR in its variant",
        holds="ε → ∞ is uniform FedAvg, one iterate deployed",
    )

    variant: Literal["paper", "fedmr"] = "paper"
    epsilon: float | None = None
    averages: bool = True

    def __post_init__(self):
        check(self, "algorithm.")
        if self.epsilon is not None:
            positive("algorithm.epsilon", self.epsilon, divides=True)

    def build(self, context: Context) -> Algorithm:
        """The record of pure functions."""
        paper = self.variant == "paper"
        weights = shared.uniform if paper else shared.by_samples
        epsilon = self.epsilon or (1e-3 if paper else 0.1 * context.cohort_size)

        def finish_round(start, trained, kept, extra, steps, lr, gradient):
            del extra, steps, lr, gradient
            return kept, squared(trained["params"], start["params"])

        def merge(state, cohort, starts, results, key):
            del starts, key
            x, mean = state.model, results.mean
            share = jnp.where(results.included, weights(cohort), 0)
            spread = (results.uploads * share).sum() / jnp.maximum(share.sum(), 1e-30)
            rate = jnp.maximum(1, spread / (2 * (squared(mean["params"], x["params"]) + epsilon)))

            def beyond(x, w):
                return x + rate.astype(w.dtype) * (w - x) if stacked.averages(w) else w

            new = jax.tree.map(beyond, x, mean)
            new = {**mean, "params": new["params"]} if paper else new
            previous = jax.tree.map(lambda old, new: jnp.where(cohort.round > 0, old, new), x, new)
            return FedExPState(new, previous), {"server_lr": rate}

        def deploy(state):
            if not self.averages:
                return state.model
            return jax.tree.map(
                lambda a, b: (a + b) / 2 if stacked.averages(a) else jnp.maximum(a, b),
                state.model,
                state.previous,
            )

        return Algorithm(
            init=lambda key, variables: FedExPState(variables, variables),
            dispatch=lambda state, cohort, key: Starts(state.model),
            merge=merge,
            deploy=deploy,
            local=LocalRule(finish_round=finish_round),
            weights=weights,
            needs_models=False,
            steps_beyond_mean=True,
            # What a client holds is the iterate that it will train, not the mean that is evaluated.
            slot_models=lambda state, slots, ids: stacked.broadcast(state.model, len(ids)),
        )


def squared(a: Any, b: Any) -> jax.Array:
    """‖a − b‖² over all leaves. -> f32[]."""
    parts = jax.tree.map(lambda a, b: ((a - b) * (a - b)).sum(), a, b)
    return jnp.stack(jax.tree.leaves(parts)).sum()
