"""FedRep: a private head and a shared representation, trained one after the other.

Collins, Hassani, Mokhtari, Shakkottai. Exploiting Shared Representations for Personalized Federated Learning.
ICML 2021. https://arxiv.org/abs/2102.07078

In a round client k starts from the shared representation φ and its own head h_k, and then

    trains h_k for `head_epochs`, φ frozen
    trains φ for the rest of `local.epochs`, h_k frozen
    φ  <-  sum_k p_k φ_k;  h_k stays with client k

Facts and choices. FOUND in the abstract: many local updates of the low-dimensional head for every update of
the representation; quoted of the paper elsewhere: ten epochs for the head, then one or five for the
representation, by data set. FOUND in a copy of the experiments' code: one optimiser for both phases, its
momentum carried over, and the head's epochs are `local_ep - local_rep_ep`. OUR CHOICE: 4 epochs for the head,
which with the default of 5 local epochs leaves the representation one; the head is the last weight layer;
frozen means that batch statistics stay as well, though a frozen batch normalisation still normalises by
the batch.
"""

import dataclasses
from typing import ClassVar, Literal

from fedjax_sim.algorithms import private
from fedjax_sim.algorithms.card import Card
from fedjax_sim.algorithms.fedavg import FedAvg
from fedjax_sim.core import gradients
from fedjax_sim.core.algorithm import Algorithm, Context, LocalRule
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.fields import at_least, check


@dataclasses.dataclass(frozen=True)
class FedRep:
    """A shared representation under private heads, each trained while the other is frozen.

    Attributes:
      head_epochs: of `local.epochs`, how many train the head; the others, which come after them, the body.
      blocks: how many of the last weight layers are the head h; 1 is the classifier alone.
      weights: p_k of the representation: by `samples`, or `uniform`.
    """

    card: ClassVar[Card] = private.card(
        "fedrep",
        defaults="ours",
        holds="private leaves change by training alone, and none while it is frozen",
    )

    head_epochs: int = 4
    blocks: int = 1
    weights: Literal["samples", "uniform"] = "samples"

    def __post_init__(self):
        check(self, "algorithm.")
        at_least("algorithm.head_epochs", self.head_epochs, 1)
        at_least("algorithm.blocks", self.blocks, 1)

    def build(self, context: Context) -> Algorithm:
        """The record of pure functions.

        Raises:
          UserError: the run counts steps or leaves no epoch to the body, or the model no block.
        """
        if context.local.epochs is None:
            raise UserError(
                "local.epochs",
                None,
                "fedrep divides a client's epochs between head and body, and this run counts steps",
                "Set local.epochs, and local.steps to null.",
            )
        if context.local.epochs <= self.head_epochs:
            raise UserError(
                "algorithm.head_epochs",
                self.head_epochs,
                f"of local.epochs = {context.local.epochs} none is left to the body",
                "Lower it, or raise local.epochs.",
            )
        head = private.head(context.model, self.blocks)

        def one_part(variables, batch):
            head_phase = batch.epoch < self.head_epochs
            return private.marked(variables, head, head_phase, ~head_phase)

        inner = FedAvg(self.weights).build(context)
        inner = dataclasses.replace(inner, local=LocalRule(gradient=gradients.moving(one_part)))
        return private.keep(inner, head, context.num_clients)
