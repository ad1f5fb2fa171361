"""FedProx: a pull back to where the round began.

Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith. Federated Optimization in Heterogeneous Networks. MLSys 2020.
https://arxiv.org/abs/1812.06127

A client minimises F_k(w) + μ/2 ‖w − x‖², x the model that it starts from. The proximal term enters as its
gradient, μ (w − x), and the training loss in the records is F_k alone, comparable with other methods'. Of
the paper's inexact solvers only a fixed number of epochs or steps is here.

FOUND in the code of FedMR: the same, μ = 0.01. FOUND in the code of LIPS, as `distance: norm`: the term is
μ Σ_l ‖w_l − x_l‖, a sum over tensors of norms that are not squared, so that its gradient has length μ in each
tensor however near w is; at w_l = x_l it is zero. Where a tensor has no gradient of its own, as a bias before
batch normalisation, the direction of that is a matter of rounding.
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from fedjax_sim.algorithms import shared
from fedjax_sim.algorithms.addition import Addition, with_addition
from fedjax_sim.algorithms.card import Card
from fedjax_sim.algorithms.fedavg import FedAvg
from fedjax_sim.core.algorithm import Algorithm, AlgorithmConfig, Context
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.fields import at_least, check


@dataclasses.dataclass(frozen=True)
class FedProx:
    """FedProx on top of another algorithm.

    Attributes:
      inner: the algorithm.
      mu: μ; 0 is `inner`.
      distance: `squared` (the paper) or `norm`, see above.
    """

    card: ClassVar[Card] = Card("fedprox", defaults="both papers' code", holds="μ = 0 is what it wraps")

    inner: AlgorithmConfig = dataclasses.field(default_factory=FedAvg)
    mu: float = 0.01
    distance: Literal["squared", "norm"] = "squared"

    def __post_init__(self):
        check(self, "algorithm.")
        at_least("algorithm.mu", self.mu, 0)

    def build(self, context: Context) -> Algorithm:
        """The record of pure functions.

        Raises:
          UserError: around a method that counts gradients (FedNova), or as `with_addition`.
        """
        counting = next(shared.nested_with(self, "counts_gradients"), None)
        if counting is not None and self.mu:
            raise UserError(
                "algorithm.inner",
                shared.named(counting),
                "it counts how much gradient a client's steps hold, and knows nothing of FedProx's pull",
                "Choose another algorithm for FedProx to go around.",
            )

        def direction(gradient, variables, batch, x):
            value, g = gradient(variables, batch)
            pull = jax.tree.map(self._pull, variables["params"], x)
            return value, jax.tree.map(lambda g, p: g + self.mu * p, g, pull)

        addition = Addition(start_round=lambda start, kept: start["params"], direction=direction)
        return with_addition(self.inner, addition, context, "FedProx")

    def _pull(self, w, x):
        """Gradient of a tensor's term, over μ."""
        away = w - x
        if self.distance == "squared":
            return away
        square = (away * away).sum()
        # The root of 1 where there is no direction, so that no infinity is ever multiplied by zero.
        return away / jnp.sqrt(jnp.where(square > 0, square, 1))
