"""FedNTD: clients keep what the global model says of the classes that are not the true one.

Lee, Jeong, Shin, Bae, Yun. Preservation of the Global Knowledge by Not-True Distillation in Federated
Learning. NeurIPS 2022. https://arxiv.org/abs/2106.03097

    L = CE + β τ² KL( p̃(x) ‖ p̃(w) )

p̃: softmax at temperature τ over all classes but the sample's own; x: the model that was received. Both
defaults, τ = 1 and β = 1, and the factor τ² are FOUND in the authors' code, the defaults in the FedMR
authors' further code as well. The teacher predicts with its running batch statistics (OUR CHOICE). One
further forward pass a step.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from fedjax_sim.algorithms.addition import Addition, loss_and_outputs, with_addition
from fedjax_sim.algorithms.card import Card
from fedjax_sim.algorithms.distillation import divergence
from fedjax_sim.algorithms.fedavg import FedAvg
from fedjax_sim.core.algorithm import Algorithm, AlgorithmConfig, Context
from fedjax_sim.core.fields import at_least, check, positive


@dataclasses.dataclass(frozen=True)
class FedNTD:
    """Not-true distillation on the clients of another algorithm.

    Attributes:
      inner: the algorithm.
      beta: β, weight of the distillation; 0 is `inner`.
      temperature: τ, by which logits are divided.
    """

    card: ClassVar[Card] = Card(
        "fedntd", passes="4/3", defaults="code of FedNTD", holds="β = 0 is what it wraps"
    )

    inner: AlgorithmConfig = dataclasses.field(default_factory=FedAvg)
    beta: float = 1.0
    temperature: float = 1.0

    def __post_init__(self):
        check(self, "algorithm.")
        at_least("algorithm.beta", self.beta, 0)
        positive("algorithm.temperature", self.temperature, divides=True)

    def build(self, context: Context) -> Algorithm:
        """The record of pure functions."""
        context.needs_classes("FedNTD")

        def loss(inner, apply, variables, batch, x):
            value, moved, logits, _ = loss_and_outputs(inner, apply, variables, batch)
            teacher, _ = context.model.apply(x, *context.task.inputs(batch.example))
            true = jax.nn.one_hot(batch["label"], teacher.shape[-1], dtype=bool)
            without = lambda logits: jnp.where(true, -jnp.inf, logits)  # noqa: E731
            kept = divergence(without(teacher), without(logits), batch.mask, self.temperature)
            return value + self.beta * kept, moved

        return with_addition(
            self.inner, Addition(start_round=lambda start, kept: start, loss=loss), context, "FedNTD"
        )
