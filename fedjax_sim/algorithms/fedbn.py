"""FedBN: batch normalisation stays at home, all other leaves are averaged.

Li, Jiang, Zhang, Kamp, Dou. FedBN: Federated Learning on Non-IID Features via Local Batch Normalization.
ICLR 2021. https://arxiv.org/abs/2102.07623

    w_l        <-  sum_k p_k w_k,l      for every layer l that is no batch normalisation
    γ, β, μ, σ²    of every batch normalisation are client k's own

Facts and choices. FOUND in the authors' code: every entry whose name has `bn` in it, scale, shift and running
statistics alike, is neither sent nor received; all clients take part in every round, with equal weights. OUR
CHOICE: weights go by samples, as FedAvg's do, unless `weights` says otherwise, and a client that is first
drawn in a later round brings its initial statistics.
"""

import dataclasses
from typing import ClassVar, Literal

from fedjax_sim.algorithms import private
from fedjax_sim.algorithms.card import Card
from fedjax_sim.algorithms.fedavg import FedAvg
from fedjax_sim.core.algorithm import Algorithm, Context
from fedjax_sim.core.fields import check


@dataclasses.dataclass(frozen=True)
class FedBN:
    """Averaging with private batch normalisation.

    Attributes:
      weights: p_k of the averaged leaves: by `samples`, or `uniform` (the authors' code).
    """

    card: ClassVar[Card] = private.card(
        "fedbn", defaults="the paper (samples)", holds="private leaves change by training alone"
    )

    weights: Literal["samples", "uniform"] = "samples"

    def __post_init__(self):
        check(self, "algorithm.")

    def build(self, context: Context) -> Algorithm:
        """The record of pure functions. Raises UserError if the model has no batch normalisation."""
        inner = FedAvg(self.weights).build(context)
        return private.keep(inner, private.normalisation(context.model), context.num_clients)
