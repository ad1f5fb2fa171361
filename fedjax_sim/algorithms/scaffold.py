"""SCAFFOLD: control variates against client drift.

Karimireddy, Kale, Mohri, Reddi, Stich, Suresh. SCAFFOLD: Stochastic Controlled Averaging for Federated
Learning. ICML 2020. https://arxiv.org/abs/1910.06378

x: the server's model, y_i: client i's, c and c_i: their control variates, S: the cohort of N clients.

    step      y_i ← y_i − η_l (g_i(y_i) + c − c_i)
    option I  c_i⁺ = g_i(x), the gradient of all its samples at x
    option II c_i⁺ = c_i − c + (x − y_i) / (steps · η_l)    (see below for momentum)
    server    x ← x + η_g · mean_S(y_i − x),   c ← c + |S|/N · mean_S(c_i⁺ − c_i)

Means are uniform, as in the paper. Batch statistics have no control variate, and are averaged. Option I takes
a second gradient, at x, of each batch of the first epoch (clients side by side compute one in all steps, and
drop the others'); its mean is over the samples of these batches.

The paper steps by plain SGD. With momentum ρ a displacement holds up to 1/(1 − ρ) times the gradient of as
many steps, and c_i of option II would be as much too large: what c − c_i is to cancel comes back
1 − 1/(1 − ρ) fold in each round, without end for ρ > 1/2. OUR CHOICE is therefore to divide by η_l ‖a‖₁,
where ‖a‖₁ is how often all gradients enter the displacement (`fednova.total`; the number of steps for plain
SGD); `divisor: steps` is the formula above. FOUND in the code of FedMR: steps, though with momentum 0.5,
weight decay 1e-5, and g + c − c_i clipped at norm 10, which is `local.clip_norm` here. The displacement of
another optimiser is no sum of gradients, and option II refuses it. What weight decay adds counts as gradient;
a momentum that is kept between rounds (`local.keep_optimizer`) brings in gradients of earlier ones, which
‖a‖₁ does not count.

A client that was left out keeps its control variate, and changes nothing. In option II so does one that
cannot move, as its displacement says nothing of its gradients: at a rate that is 0 in float32, as of the last
round of a cosine to 0, and, at rates below 2⁻²⁴, of every parameter that lost all its steps to rounding (OUR
CHOICE; the formula would divide by 0, or take no displacement for no gradient).
"""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import optax
from flax import struct

from fedjax_sim.algorithms import fednova, shared
from fedjax_sim.algorithms.card import Card
from fedjax_sim.core import gradients
from fedjax_sim.core.algorithm import Algorithm, Context, LocalRule, Starts
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.fields import SMALLEST, check, positive

_LOST = 2.0**-24
"""The rate below which a step by a gradient of 1 is lost to a weight of 1, in float32."""


@struct.dataclass
class ScaffoldState:
    """Attributes: model: x, with its batch statistics. control: c, like the parameters."""

    model: Any
    control: Any


@dataclasses.dataclass(frozen=True)
class Scaffold:
    """Stochastic controlled averaging.

    Attributes:
      option: how a client renews its control variate, I or II.
      server_lr: η_g, the server's learning rate.
      divisor: of the displacement in option II: the gradients that it holds (`gradients`), or `steps`.
    """

    card: ClassVar[Card] = Card(
        "scaffold",
        keeps="1 control variate",
        sends="2 + 2",
        passes="1; option I 1 + 1/E",
        defaults="Karimireddy et al.; ours (divisor)",
        holds="the first round is uniform FedAvg; Σ c_i = N c; momentum does not drive the variates apart",
    )

    option: Literal["I", "II"] = "II"
    server_lr: float = 1.0
    divisor: Literal["gradients", "steps"] = "gradients"

    def __post_init__(self):
        check(self, "algorithm.")
        positive("algorithm.server_lr", self.server_lr)

    def build(self, context: Context) -> Algorithm:
        """The record of pure functions. Raises UserError for option II with an optimiser other than SGD."""
        if self.option == "II" and context.local.optimizer != "sgd":
            raise UserError(
                "local.optimizer",
                context.local.optimizer,
                "SCAFFOLD's option II takes what a client moved for a sum of gradients, as only SGD's is",
                "Set local.optimizer to sgd, or algorithm.option to I.",
            )

        def merge(state, cohort, starts, results, key):
            del cohort, starts, key
            x = state.model["params"]
            if self.server_lr == 1:
                new = results.mean["params"]
            else:
                new = jax.tree.map(lambda x, y: x + self.server_lr * (y - x), x, results.mean["params"])
            # Uploads of those left out are zero.
            control = jax.tree.map(
                lambda c, change: c + change.sum(0) / context.num_clients, state.control, results.uploads
            )
            return ScaffoldState({**results.mean, "params": new}, control), {}

        return Algorithm(
            init=lambda key, variables: ScaffoldState(variables, optax.tree.zeros_like(variables["params"])),
            dispatch=lambda state, cohort, key: Starts(state.model, state.control),
            merge=merge,
            deploy=lambda state: state.model,
            local=self._on_client(context),
            weights=shared.uniform,
            needs_models=False,
            with_model=lambda state, model: state.replace(model=model),
            steps_beyond_mean=self.server_lr != 1,
        )

    def _on_client(self, context: Context) -> LocalRule:
        momentum = context.local.momentum if self.divisor == "gradients" else 0.0

        def start_round(start, c_i, c):
            extra = {"c": c, "c_i": c_i}
            if self.option == "I":
                extra |= {"x": start, "sum": optax.tree.zeros_like(start["params"]), "seen": jnp.float32(0)}
            return extra

        def corrected(g, variables, extra):
            del variables
            return jax.tree.map(lambda g, c, c_i: g + c - c_i, g, extra["c"], extra["c_i"])

        def at_start(loss_and_grad, batch, extra):
            def added():
                size = jnp.float32(batch.size) if batch.mask is None else batch.mask.sum()
                size = size.astype(jnp.float32)
                _, g = loss_and_grad(extra["x"], batch)
                total = jax.tree.map(lambda s, g: s + size * g, extra["sum"], g)
                return total, extra["seen"] + size

            first = batch.epoch == 0
            total, seen = jax.lax.cond(first, added, lambda: (extra["sum"], extra["seen"]))
            return extra | {"sum": total, "seen": seen}

        def finish_round(start, trained, c_i, extra, steps, lr, gradient):
            del gradient
            if self.option == "I":
                new = jax.tree.map(lambda s: s / jnp.maximum(extra["seen"], 1), extra["sum"])
            else:
                scale = 1 / (fednova.total(steps, momentum, context.local.nesterov) * lr)

                def renewed(c_i, c, x, y):
                    known = (lr >= SMALLEST) & ((x != y) | (lr >= _LOST))
                    return jnp.where(known, c_i - c + (x - y) * scale, c_i)

                new = jax.tree.map(renewed, c_i, extra["c"], start["params"], trained["params"])
            return new, jax.tree.map(jnp.subtract, new, c_i)

        gradient = gradients.with_direction(corrected)
        return LocalRule(
            start_round=start_round,
            gradient=gradients.accumulating(at_start, gradient) if self.option == "I" else gradient,
            finish_round=finish_round,
            init_client=lambda variables, labels: optax.tree.zeros_like(variables["params"]),
        )
