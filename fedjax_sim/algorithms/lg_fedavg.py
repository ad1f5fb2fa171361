"""LG-FedAvg: the first layers are each client's own, the model above them is averaged.

Liang, Liu, Ziyin, Allen, Auerbach, Brent, Salakhutdinov, Morency. Think Locally, Act Globally: Federated
Learning with Local and Global Representations. 2020. https://arxiv.org/abs/2001.01523

    client k trains its local part ℓ_k and the global part g as one model, g(ℓ_k(x))
    g    <-  sum_k p_k g_k
    ℓ_k      stays with client k

Facts and choices. FOUND in the abstract: compact local representations and a global model that operates on
them. FOUND in the authors' code: all clients start from a model that FedAvg has trained for hundreds of
rounds (here: `initial.run`); the mean is uniform; `num_layers_keep` counts the averaged layers, 2 of 5 for
CIFAR-10. Its list of that network's layers is so ordered that these two are the convolutions and the dense
layers are private, the reverse of the text; ours follows the text. OUR CHOICE: one private layer by default,
a layer being a weight layer with the normalisation that follows it (`Model.blocks`).
"""

import dataclasses
from typing import ClassVar, Literal

from fedjax_sim.algorithms import private
from fedjax_sim.algorithms.card import Card
from fedjax_sim.algorithms.fedavg import FedAvg
from fedjax_sim.core.algorithm import Algorithm, Context
from fedjax_sim.core.fields import at_least, check


@dataclasses.dataclass(frozen=True)
class LGFedAvg:
    """Local representations under a global model.

    Attributes:
      blocks: how many of the first weight layers are local; 0 is FedAvg.
      weights: p_k of the global part: by `samples`, or `uniform` (the authors' code).
    """

    card: ClassVar[Card] = private.card("lg_fedavg", defaults="ours")

    blocks: int = 1
    weights: Literal["samples", "uniform"] = "samples"

    def __post_init__(self):
        check(self, "algorithm.")
        at_least("algorithm.blocks", self.blocks, 0)

    def build(self, context: Context) -> Algorithm:
        """The record of pure functions. Raises UserError if the model has fewer blocks."""
        inner = FedAvg(self.weights).build(context)
        return private.keep(inner, private.first(context.model, self.blocks), context.num_clients)
