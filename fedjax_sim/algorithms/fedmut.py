"""FedMut: the server mutates the mean along its last step, one way for each slot.

Hu, Cao, Li, Xia, Zhang, Zhang, Chen. FedMut: Generalized Federated Learning via Stochastic Mutation. AAAI
2024. https://doi.org/10.1609/aaai.v38i11.29146

x: mean of the trained models of the round before, uniform, Δ: its difference from the mean before that. In
round t, from 0, slot j starts, tensor by tensor, at

    x + α s_j Δ

where s is a shuffle of ⌊K/2⌋ pairs (1, −1 + β_t), drawn for each tensor anew, and

    β_t = β₀ max(0, 1 − (t − 1)/T_b)

Of an odd number of slots the last starts at x. From round T_b + 1 on the starts add up to K x. In the first
round Δ is zero.

FOUND in the code of FedMut: β_t as above, where mutation ends round t − 1; α = 4, β₀ = 0.3 (0.5 for
ResNet-18), T_b = 50; in that of FedMR α = 5, T_b = 100, though FedMut's paper says that α = 5 diverges. Both
mutate batch statistics as well. Here they are averaged, and start unmutated (OUR CHOICE: a variance that is
moved four steps back may be negative). Of a client that was left out the mutated start is in no mean either.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from flax import struct

from fedjax_sim.algorithms import shared
from fedjax_sim.algorithms.card import Card
from fedjax_sim.core import stacked
from fedjax_sim.core.algorithm import Algorithm, Context, Starts
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.fields import at_least, check, within


@struct.dataclass
class FedMutState:
    """Attributes: model: x. step: Δ, like the parameters."""

    model: Any
    step: Any


@dataclasses.dataclass(frozen=True)
class FedMut:
    """Stochastic mutation.

    Attributes:
      alpha: α; 0 is FedAvg with uniform weights.
      beta: β₀, how far the second slot of a pair is off the opposite of the first, at the start.
      until: T_b; from the round after it, counted from 0, mutations cancel.
    """

    card: ClassVar[Card] = Card(
        "fedmut",
        besides="K models on the server",
        defaults="code of FedMut",
        holds="α = 0 is uniform FedAvg; after round T_b starts average to x",
    )

    alpha: float = 4.0
    beta: float = 0.3
    until: int = 50

    def __post_init__(self):
        check(self, "algorithm.")
        at_least("algorithm.alpha", self.alpha, 0)
        within("algorithm.beta", self.beta, 0.0, 1.0)
        at_least("algorithm.until", self.until, 1)

    def build(self, context: Context) -> Algorithm:
        """The record of pure functions. Raises UserError for a cohort of one, which has no pair."""
        slots = context.cohort_size
        if slots == 1 and self.alpha:
            raise UserError(
                "cohort.size",
                slots,
                "FedMut mutates slots in pairs, and of one there is none",
                "Take at least 2 clients a round.",
            )

        def signs(number, key):
            """α s for each tensor. -> f32[tensors, K]."""
            beta = self.beta * jnp.clip(1 - (number - 1).astype(jnp.float32) / self.until, 0, 1)
            pairs = slots // 2
            row = jnp.concatenate([jnp.ones(pairs), jnp.full(pairs, beta - 1)]).astype(jnp.float32)
            shuffled = jax.vmap(lambda key: jax.random.permutation(key, row))(key)
            return self.alpha * jnp.pad(shuffled, ((0, 0), (0, slots % 2)))

        def dispatch(state, cohort, key):
            leaves, tree = jax.tree.flatten(state.model["params"])
            steps = jax.tree.leaves(state.step)
            drawn = signs(cohort.round, jax.random.split(key, len(leaves)))
            mutated = [
                x[None] + s.reshape(slots, *(1,) * x.ndim) * step[None]
                for x, step, s in zip(leaves, steps, drawn, strict=True)
            ]
            rest = {name: part for name, part in state.model.items() if name != "params"}
            starts = {**stacked.broadcast(rest, slots), "params": jax.tree.unflatten(tree, mutated)}
            return Starts(starts, shared=False)

        def merge(state, cohort, starts, results, key):
            del starts, key
            new = shared.mean_of_included(results, shared.uniform(cohort), state.model)
            step = jax.tree.map(jnp.subtract, new["params"], state.model["params"])
            return FedMutState(new, step), {}

        return Algorithm(
            init=lambda key, variables: FedMutState(variables, optax.tree.zeros_like(variables["params"])),
            dispatch=dispatch,
            merge=merge,
            deploy=lambda state: state.model,
            weights=shared.uniform,
            steps_beyond_mean=True,
        )
