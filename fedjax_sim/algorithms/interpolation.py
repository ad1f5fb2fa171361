"""Layer-wise interpolation: after a merge every client keeps a share of its own model, by depth.

    w̄      =   sum_k p_k w_k
    client k holds, and starts from next,   w̄_l + λ_l (w_k,l − w̄_l)    in block l = 0 … L−1

    rising    λ_l = 2 m l / (L−1)           the deeper, the more of its own
    falling   λ_l = 2 m (L−1−l) / (L−1)
    flat      λ_l = m

All three have the mean m over blocks, so that they differ in depth alone. λ = 0 is FedAvg; λ = 1 with all
clients in every round is training alone.

OUR CHOICE throughout: an intervention that asks what "The Other Side of the Coin: Unveiling the Downsides of
Model Aggregation in Federated Learning from a Layer-peeled Perspective", https://arxiv.org/abs/2502.03231,
would advise, whether deep or shallow layers should be spared; no method of that paper. A client that has sat
out some rounds starts from the newest w̄ with the deviation λ_l (w_k,l − w̄_l) of the round in which it was
last drawn. Batch statistics are averaged and nothing else: with a deviation, a variance could be negative.
"""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import optax
from flax import struct, traverse_util

from fedjax_sim.algorithms import shared
from fedjax_sim.algorithms.card import Card
from fedjax_sim.core import stacked
from fedjax_sim.core.algorithm import Algorithm, Context, Starts
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.fields import check, within
from fedjax_sim.core.model import Model


@struct.dataclass
class InterpolationState:
    """Attributes: model: w̄. deviation: λ (w_k − w̄) of all clients' parameters, [N, …]; 0 before the first."""

    model: Any
    deviation: Any


@dataclasses.dataclass(frozen=True)
class LayerInterpolation:
    """Averaging from which every client takes back a share of its own, by depth.

    Attributes:
      mean: m, of λ_l over the blocks (weight layers, see `Model.blocks`): in [0, 1] for `flat`, else in
        [0, 0.5].
      profile: how λ_l goes with depth: `rising`, `falling` or `flat`.
      weights: p_k of w̄: by `samples`, or `uniform`.
    """

    card: ClassVar[Card] = Card(
        "interpolation",
        keeps="1 model",
        defaults="ours (a control)",
        holds="λ = 0 is FedAvg; λ = 1 and all clients is Local",
    )

    mean: float = 0.25
    profile: Literal["rising", "falling", "flat"] = "rising"
    weights: Literal["samples", "uniform"] = "samples"

    def __post_init__(self):
        check(self, "algorithm.")
        within("algorithm.mean", self.mean, 0.0, 1.0 if self.profile == "flat" else 0.5)

    def shares(self, model: Model) -> list[float]:
        """λ_l of every block l. Raises UserError if the model has too few blocks for the profile."""
        count = len(model.peel_points)
        if count < 1 + (self.profile != "flat"):
            raise UserError(
                "algorithm.profile",
                self.profile,
                f"{model.name} has {count} blocks, over which nothing rises or falls",
                "Take a deeper model, or mark the inputs of its weight layers with fedjax_sim.models.peel.",
            )
        if self.profile == "flat":
            return [self.mean] * count
        rising = [2 * self.mean * block / (count - 1) for block in range(count)]
        return rising if self.profile == "rising" else rising[::-1]

    def build(self, context: Context) -> Algorithm:
        """The record of pure functions. Raises UserError as `shares`."""
        by_block, blocks = self.shares(context.model), context.model.blocks()
        share = traverse_util.unflatten_dict(
            {path[1:]: by_block[block] for path, block in blocks.items() if path[0] == "params"}
        )
        weigh = shared.weighing(self.weights)

        def init(key, variables):
            del key
            none = optax.tree.zeros_like(variables["params"])
            return InterpolationState(variables, stacked.broadcast(none, context.num_clients))

        def held(state, ids):
            own = stacked.take_rows(state.deviation, ids)
            models = stacked.broadcast(state.model, len(ids))
            return {**models, "params": jax.tree.map(jnp.add, models["params"], own)}

        def dispatch(state, cohort, key):
            del key
            return Starts(held(state, cohort.ids), shared=False)

        def merge(state, cohort, starts, results, key):
            del starts, key
            mean = shared.mean_of_included(results, weigh(cohort), state.model)
            new = jax.tree.map(
                lambda s, w, centre: s * (w - centre[None]), share, results.models["params"], mean["params"]
            )
            old = stacked.take_rows(state.deviation, cohort.ids)
            rows = stacked.where_slot(results.included, new, old)
            return InterpolationState(mean, stacked.put_rows(state.deviation, cohort.ids, rows)), {}

        return Algorithm(
            init=init,
            dispatch=dispatch,
            merge=merge,
            deploy=lambda state: state.model,
            weights=weigh,
            stacked=("deviation",),
            by_client=("deviation",),
            personal_models=held,
        )
