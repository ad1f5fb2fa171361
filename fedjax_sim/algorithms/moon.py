"""MOON: a client's representation is drawn to the global model's, and away from its own of last time.

Li, He, Song. Model-Contrastive Federated Learning. CVPR 2021. https://arxiv.org/abs/2103.16257

    L = CE − μ log( e^{s(z, z_glob)/τ} / (e^{s(z, z_glob)/τ} + e^{s(z, z_prev)/τ}) )

z: representation of a sample by the model in training, z_glob by the model that was received, z_prev by the
one that the client had trained when it last took part; s: cosine. Both others are in evaluation mode, and
have no gradient.

FOUND in the authors' code, in that of FedMR and in that which LIPS builds on: the term, τ = 0.5, one previous
model. μ = 5 is FOUND in the authors' example for CIFAR-10 and in what LIPS builds on, which takes 1 for
CIFAR-100; FedMR's code leaves μ open. z is the input of the classifier, as in FedMR's code; the authors take
the output of a projection head before it. A client that has not taken part before trains without the term, as
in what LIPS builds on; in the authors' code it does so in the first round only, and later has its untrained
network for z_prev.

Two further forward passes a step; one model a client is kept.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from fedjax_sim.algorithms import shared
from fedjax_sim.algorithms.addition import Addition, loss_and_outputs, with_addition
from fedjax_sim.algorithms.card import Card
from fedjax_sim.algorithms.fedavg import FedAvg
from fedjax_sim.core.algorithm import Algorithm, AlgorithmConfig, Context, Variables
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.fields import at_least, check, positive
from fedjax_sim.core.task import masked_mean


@struct.dataclass
class Previous:
    """Attributes: model: what the client last trained. exists: bool[], whether it has."""

    model: Variables
    exists: jax.Array

    @classmethod
    def none(cls, variables: Variables) -> "Previous":
        """Of a client that has not taken part yet; `variables` gives the shapes."""
        return cls(variables, jnp.asarray(False))


def remembered(start: Variables, trained: Variables, previous: Previous) -> Previous:
    """What the client keeps after a round."""
    del start, previous
    return Previous(trained, jnp.asarray(True))


@dataclasses.dataclass(frozen=True)
class MOON:
    """Model-contrastive learning on the clients of another algorithm.

    Attributes:
      inner: the algorithm.
      mu: μ, weight of the contrast; 0 is `inner`.
      temperature: τ, by which cosines are divided.
    """

    card: ClassVar[Card] = Card(
        "moon",
        keeps="1 model",
        passes="5/3",
        defaults="an example of Li et al.'s; code LIPS builds on",
        holds="μ = 0 is what it wraps",
    )

    inner: AlgorithmConfig = dataclasses.field(default_factory=FedAvg)
    mu: float = 5.0
    temperature: float = 0.5

    def __post_init__(self):
        check(self, "algorithm.")
        at_least("algorithm.mu", self.mu, 0)
        positive("algorithm.temperature", self.temperature, divides=True)

    def build(self, context: Context) -> Algorithm:
        """The record of pure functions.

        Raises:
          UserError: the model marks no representation; the algorithm inside sends clients their own
            model back (Local).
        """
        model = context.model
        model.check_classifier("MOON")
        alone = next(shared.nested_with(self, "returns_own_model"), None)
        if alone is not None:
            raise UserError(
                "algorithm.inner",
                shared.named(alone),
                "a client alone receives the very model that it trained last, and nothing is in contrast",
                "Choose another algorithm for MOON to go around.",
            )

        def loss(inner, apply, variables, batch, extra):
            x, previous = extra
            value, moved, _, z = loss_and_outputs(inner, apply, variables, batch, represents=True)
            inputs = context.task.inputs(batch.example)
            others = [model.represent(other, *inputs)[1] for other in (x, previous.model)]
            similarity = jnp.stack([cosine(z, other) for other in others], -1)
            contrast = -jax.nn.log_softmax(similarity / self.temperature)[:, 0]
            term = masked_mean(contrast, batch.mask)
            return value + jnp.where(previous.exists, self.mu * term, 0), moved

        addition = Addition(
            start_round=lambda start, kept: (start, kept),
            loss=loss,
            finish_round=remembered,
            init_client=Previous.none,
        )
        return with_addition(self.inner, addition, context, "MOON")


def cosine(a: Any, b: jax.Array) -> jax.Array:
    """Of rows, 0 where one of them is zero; `b` has no gradient. f32[B, d] twice -> f32[B]."""
    return (_unit(a) * _unit(jax.lax.stop_gradient(b))).sum(-1)


def _unit(z):
    square = (z * z).sum(-1, keepdims=True)
    return z / jnp.sqrt(jnp.where(square > 0, square, 1))
