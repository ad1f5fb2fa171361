"""FedDyn: a regulariser that moves, so that clients' optima become the server's.

Acar, Zhao, Matas Navarro, Mattina, Whatmough, Saligrama. Federated Learning Based on Dynamic Regularization.
ICLR 2021. https://arxiv.org/abs/2111.04263

    client    min_w  F_k(w) − ⟨∇L_k, w⟩ + α/2 ‖w − x‖²,   then  ∇L_k ← ∇L_k − α (w_k − x)
    server    h ← h − α/N Σ_S (w_k − x),   x ← mean_S(w_k) − h / α

x: the model sent, S: the cohort of N clients, ∇L_k and h: zero at the start. The server keeps h/α. Both terms
of the client enter as their gradients, and the training loss in the records is F_k alone. The minimum is as
near as the run's local steps come to it. Means are uniform; batch statistics are averaged. There is no α at
which this is FedAvg: as α goes to 0 clients train as FedAvg's do, but the server still goes on by −h/α, the
sum over all rounds of 1/N Σ_S (w_k − x). A client that was left out keeps its ∇L_k and is in no sum; in a
round without any other the model stays.

FOUND in the authors' code: α = 0.01 for CIFAR-10; a client's own α is that over N n_k / n, n_k its samples
and n all, where here it is the same for all, as in the paper; and mean_S(w_k) is tested, where here x is.
Neither FedMR's code nor LIPS's has FedDyn.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from flax import struct

from fedjax_sim.algorithms import shared
from fedjax_sim.algorithms.card import Card
from fedjax_sim.core import gradients
from fedjax_sim.core.algorithm import Algorithm, Context, LocalRule, Starts
from fedjax_sim.core.fields import check, positive


@struct.dataclass
class FedDynState:
    """Attributes: model: x, with its batch statistics. shift: h/α, like the parameters."""

    model: Any
    shift: Any


@dataclasses.dataclass(frozen=True)
class FedDyn:
    """Dynamic regularisation.

    Attributes:
      alpha: α, weight of the regulariser.
    """

    card: ClassVar[Card] = Card(
        "feddyn",
        keeps="1 gradient",
        defaults="code of FedDyn, CIFAR-10",
        holds="h is the mean of all clients' gradients",
    )

    alpha: float = 0.01

    def __post_init__(self):
        check(self, "algorithm.")
        positive("algorithm.alpha", self.alpha)

    def build(self, context: Context) -> Algorithm:
        """The record of pure functions."""
        alpha = self.alpha

        def start_round(start, kept, broadcast):
            del broadcast
            return {"x": start["params"], "gradient": kept}

        def direction(g, variables, extra):
            return jax.tree.map(
                lambda g, own, w, x: g - own + alpha * (w - x),
                g,
                extra["gradient"],
                variables["params"],
                extra["x"],
            )

        def finish_round(start, trained, kept, extra, steps, lr, gradient):
            del extra, steps, lr, gradient
            new = jax.tree.map(
                lambda own, w, x: own - alpha * (w - x), kept, trained["params"], start["params"]
            )
            return new, jax.tree.map(jnp.subtract, trained["params"], start["params"])

        def merge(state, cohort, starts, results, key):
            del cohort, starts, key
            x, mean = state.model["params"], results.mean["params"]
            # Uploads of those left out are zero.
            shift = jax.tree.map(
                lambda h, moved: h - moved.sum(0) / context.num_clients, state.shift, results.uploads
            )
            anyone = results.included.any()
            new = jax.tree.map(lambda w, h, x: jnp.where(anyone, w - h, x), mean, shift, x)
            return FedDynState({**results.mean, "params": new}, shift), {}

        return Algorithm(
            init=lambda key, variables: FedDynState(variables, optax.tree.zeros_like(variables["params"])),
            dispatch=lambda state, cohort, key: Starts(state.model),
            merge=merge,
            deploy=lambda state: state.model,
            local=LocalRule(
                start_round=start_round,
                gradient=gradients.with_direction(direction),
                finish_round=finish_round,
                init_client=lambda variables, labels: optax.tree.zeros_like(variables["params"]),
            ),
            weights=shared.uniform,
            needs_models=False,
        )
