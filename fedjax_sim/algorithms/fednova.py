"""FedNova: averaging that does not favour clients which take more steps.

Wang, Liu, Liang, Joshi, Poor. Tackling the Objective Inconsistency Problem in Heterogeneous Federated
Optimization. NeurIPS 2020. https://arxiv.org/abs/2007.07481

Client i's displacement is −η Σ_s a_{i,s} g_{i,s} over its τ_i steps. With ‖a_i‖₁ = Σ_s a_{i,s} and p_i its
share of the weights in the cohort,

    x ← x − τ_eff Σ_i p_i (x − w_i) / ‖a_i‖₁,   τ_eff = Σ_i p_i ‖a_i‖₁

For SGD ‖a_i‖₁ = τ_i; with momentum ρ it is m_i = Σ_{s=1}^{τ_i} (1 − ρ^s)/(1 − ρ), with Nesterov's τ_i +
ρ m_i. Clients with equal steps make it FedAvg. An L2 term counts as part of the gradient. A momentum that is
kept between rounds (`local.keep_optimizer`) brings in gradients of earlier rounds, which ‖a_i‖₁ does not
count. Batch statistics are averaged with weights p_i / ‖a_i‖₁ (OUR CHOICE; the formula is of parameters).
"""

import dataclasses
import math
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from fedjax_sim.algorithms import shared
from fedjax_sim.algorithms.card import Card
from fedjax_sim.core.algorithm import Algorithm, Context, Starts
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.fields import check


@dataclasses.dataclass(frozen=True)
class FedNova:
    """Normalised averaging.

    Attributes:
      weights: `samples` weighs a client by its number of samples (the paper), `uniform` equally.
    """

    card: ClassVar[Card] = Card("fednova", defaults="Wang et al.", holds="equal steps are FedAvg")

    counts_gradients: ClassVar[bool] = True
    """The server takes a client's steps for steps by the gradient of its loss, and counts them."""

    weights: Literal["samples", "uniform"] = "samples"

    def __post_init__(self):
        check(self, "algorithm.")

    def build(self, context: Context) -> Algorithm:
        """The record of pure functions.

        Raises:
          UserError: the clients' optimiser is not SGD, and there is no ‖a_i‖₁ for it.
        """
        if context.local.optimizer != "sgd":
            raise UserError(
                "local.optimizer",
                context.local.optimizer,
                "FedNova knows how much a step of SGD counts, and no other's",
                "Set local.optimizer to sgd, or choose another algorithm.",
            )
        share = shared.weighing(self.weights)

        def normalised(cohort):
            return share(cohort) / total(cohort.steps, context.local.momentum, context.local.nesterov)

        def merge(state, cohort, starts, results, key):
            del starts, key
            a = total(cohort.steps, context.local.momentum, context.local.nesterov)
            p = jnp.where(results.included, share(cohort), 0)
            p = p / jnp.maximum(p.sum(), 1e-30)
            # results.mean is the mean with weights p_i/‖a_i‖₁; these add up to the second factor.
            scale = (p * a).sum() * (p / a).sum()
            new = jax.tree.map(lambda x, w: x + scale * (w - x), state["params"], results.mean["params"])
            return {**results.mean, "params": new}, {"effective_steps": (p * a).sum()}

        return Algorithm(
            init=lambda key, variables: variables,
            dispatch=lambda state, cohort, key: Starts(state),
            merge=merge,
            deploy=lambda state: state,
            weights=normalised,
            needs_models=False,
            with_model=lambda state, model: model,
            steps_beyond_mean=True,
        )


def total(steps: Any, momentum: float, nesterov: bool = False) -> jax.Array:
    """‖a‖₁ of τ steps of SGD, 1 for none. i32[K] -> f32[K]."""
    tau = jnp.maximum(steps, 1).astype(jnp.float32)
    if not momentum:
        return tau
    # Σ_{s=1}^τ ρ^{s-1}; 1 − ρ^τ itself would cancel where ρ is near 1.
    powers = -jnp.expm1(tau * math.log(momentum)) / (1 - momentum)
    heavy = (tau - momentum * powers) / (1 - momentum)
    return tau + momentum * heavy if nesterov else heavy
