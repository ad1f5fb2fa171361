"""pFedSD: a client's model of last time teaches the one in training.

Jin, Bai, Yao, Huang, Liu. Personalized Edge Intelligence via Federated Self-Knowledge Distillation. IEEE
TPDS 2023. https://doi.org/10.1109/TPDS.2022.3225185

    L = CE + λ τ² KL( softmax(v/τ) ‖ softmax(w/τ) )

v: logits of the model that the client had trained when it last took part, in evaluation mode (OUR CHOICE). A
client that has not taken part before trains without the term. FOUND so in the authors' code, where clients
use, and are judged by, what they last trained; the server there averages with equal weights. One that has
never taken part uses the global model (OUR CHOICE).

FOUND in the code that LIPS builds on: the same term, λ = 0.5, τ = 3. One further forward pass a step; one
model a client is kept.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from fedjax_sim.algorithms.addition import Addition, loss_and_outputs, with_addition
from fedjax_sim.algorithms.card import Card
from fedjax_sim.algorithms.distillation import divergence
from fedjax_sim.algorithms.fedavg import FedAvg
from fedjax_sim.algorithms.moon import Previous, remembered
from fedjax_sim.core.algorithm import Algorithm, AlgorithmConfig, Context
from fedjax_sim.core.fields import at_least, check, positive


@dataclasses.dataclass(frozen=True)
class PFedSD:
    """Self-knowledge distillation on the clients of another algorithm.

    Attributes:
      inner: the algorithm.
      weight: λ; 0 trains as `inner` does.
      temperature: τ, by which logits are divided.
    """

    card: ClassVar[Card] = Card(
        "pfedsd",
        keeps="1 model",
        passes="4/3",
        defaults="code LIPS builds on",
        holds="λ = 0 trains what it wraps",
    )

    inner: AlgorithmConfig = dataclasses.field(default_factory=FedAvg)
    weight: float = 0.5
    temperature: float = 3.0

    def __post_init__(self):
        check(self, "algorithm.")
        at_least("algorithm.weight", self.weight, 0)
        positive("algorithm.temperature", self.temperature, divides=True)

    def build(self, context: Context) -> Algorithm:
        """The record of pure functions."""
        context.needs_classes("pFedSD")

        def loss(inner, apply, variables, batch, previous):
            value, moved, logits, _ = loss_and_outputs(inner, apply, variables, batch)
            teacher, _ = context.model.apply(previous.model, *context.task.inputs(batch.example))
            term = divergence(teacher, logits, batch.mask, self.temperature)
            return value + jnp.where(previous.exists, self.weight * term, 0), moved

        def personal(previous, model):
            return jax.tree.map(lambda own, new: jnp.where(previous.exists, own, new), previous.model, model)

        addition = Addition(
            start_round=lambda start, previous: previous,
            loss=loss,
            finish_round=remembered,
            init_client=Previous.none,
            personal=personal,
        )
        return with_addition(self.inner, addition, context, "pFedSD")
