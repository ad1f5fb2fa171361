"""FedPer: the last layers are each client's own, the base below them is averaged.

Arivazhagan, Aggarwal, Singh, Choudhary. Federated Learning with Personalization Layers. 2019.
https://arxiv.org/abs/1912.00818

    client k trains (W_B, W_Pk) as one model
    W_B   <-  sum_k p_k W_B,k      the base layers
    W_Pk      stays with client k  the personalization layers

Facts and choices. FOUND in the abstract: base and personalization layers, the base trained by FedAvg. There
is no code of the authors'. OUR CHOICE: a layer is a weight layer with the normalisation that follows it
(`Model.blocks`), whatever the architecture, and batch statistics go with it; all clients' personalization
layers start from the same random weights.
"""

import dataclasses
from typing import ClassVar, Literal

from fedjax_sim.algorithms import private
from fedjax_sim.algorithms.card import Card
from fedjax_sim.algorithms.fedavg import FedAvg
from fedjax_sim.core.algorithm import Algorithm, Context
from fedjax_sim.core.fields import at_least, check


@dataclasses.dataclass(frozen=True)
class FedPer:
    """Personal last layers on a shared base.

    Attributes:
      blocks: how many of the last weight layers are personal; 1 is the classifier alone, 0 is FedAvg.
      weights: p_k of the base: by `samples`, or `uniform`.
    """

    card: ClassVar[Card] = private.card("fedper", defaults="ours: the classifier")

    blocks: int = 1
    weights: Literal["samples", "uniform"] = "samples"

    def __post_init__(self):
        check(self, "algorithm.")
        at_least("algorithm.blocks", self.blocks, 0)

    def build(self, context: Context) -> Algorithm:
        """The record of pure functions. Raises UserError if the model has fewer blocks."""
        inner = FedAvg(self.weights).build(context)
        return private.keep(inner, private.last(context.model, self.blocks), context.num_clients)
