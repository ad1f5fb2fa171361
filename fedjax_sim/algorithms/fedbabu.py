"""FedBABU: only the body is trained and averaged; the head stays at its random initial weights.

Oh, Kim, Yun. FedBABU: Toward Enhanced Representation for Federated Image Classification. ICLR 2022.
https://arxiv.org/abs/2106.06042 (body aggregation and body update)

    body  <-  sum_k p_k body_k
    head      is the same for all clients, and never moves

Facts and choices. FOUND in the abstract: the head is randomly initialised, never updated during training, and
fine-tuned for personalisation during evaluation. That last step is no part of this record: what it would
give is measured by `peel.finetune`, epochs of training the classifier alone after a merge. OUR CHOICE: the
initial weights are the model's own; what is deployed, and what each client uses here, is the model before
fine-tuning.
"""

import dataclasses
from typing import ClassVar, Literal

from fedjax_sim.algorithms import private
from fedjax_sim.algorithms.card import Card
from fedjax_sim.algorithms.fedavg import FedAvg
from fedjax_sim.core import gradients
from fedjax_sim.core.algorithm import Algorithm, Context, LocalRule
from fedjax_sim.core.fields import at_least, check


@dataclasses.dataclass(frozen=True)
class FedBABU:
    """Averaging of a body under a head that never moves.

    Attributes:
      blocks: how many of the last weight layers are the head; 1 is the classifier alone.
      weights: p_k of the body: by `samples`, or `uniform`.
    """

    card: ClassVar[Card] = Card(
        "fedbabu", sends="the body, 1 + 1 without the head", defaults="ours", holds="the head never moves"
    )

    blocks: int = 1
    weights: Literal["samples", "uniform"] = "samples"

    def __post_init__(self):
        check(self, "algorithm.")
        at_least("algorithm.blocks", self.blocks, 1)

    def build(self, context: Context) -> Algorithm:
        """The record of pure functions. Raises UserError if the model leaves no block to the body."""
        head = private.head(context.model, self.blocks)
        inner = FedAvg(self.weights).build(context)

        def body(variables, batch):
            del batch
            return private.marked(variables, head, False, True)

        def merge(state, cohort, starts, results, key):
            # The mean of equal numbers may differ from them in the last bit.
            mean = private.grafted(results.mean, inner.deploy(state), head)
            return inner.merge(state, cohort, starts, results.replace(mean=mean), key)

        return dataclasses.replace(inner, local=LocalRule(gradient=gradients.moving(body)), merge=merge)
