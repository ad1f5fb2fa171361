"""FedAvg: the server's model is the mean of the clients'.

McMahan, Moore, Ramage, Hampson, Agüera y Arcas. Communication-Efficient Learning of Deep Networks from
Decentralized Data. AISTATS 2017. https://arxiv.org/abs/1602.05629

    x  <-  sum_k p_k w_k

p_k: client k's share of the cohort's training samples, or 1/K; w_k: its model, trained from x. Batch
statistics are averaged with the parameters. An optimiser on the server: `fedjax_sim.algorithms.fedopt`.
"""

import dataclasses
from typing import Any, ClassVar, Literal

from flax import struct

from fedjax_sim.algorithms import shared
from fedjax_sim.algorithms.card import Card
from fedjax_sim.core.algorithm import Algorithm, Context, Starts
from fedjax_sim.core.fields import check


@struct.dataclass
class FedAvgState:
    """Attributes: model: the global one, x."""

    model: Any


@dataclasses.dataclass(frozen=True)
class FedAvg:
    """Federated averaging.

    Attributes:
      weights: `samples` weighs a client by its number of samples (the paper), `uniform` equally.
    """

    card: ClassVar[Card] = Card("fedavg", defaults="McMahan et al.", holds="one client, identical clients")

    weights: Literal["samples", "uniform"] = "samples"

    def __post_init__(self):
        check(self, "algorithm.")

    def build(self, context: Context) -> Algorithm:
        """The record of pure functions."""
        del context
        return Algorithm(
            init=lambda key, variables: FedAvgState(variables),
            dispatch=lambda state, cohort, key: Starts(state.model),
            merge=lambda state, cohort, starts, results, key: (FedAvgState(results.mean), {}),
            deploy=lambda state: state.model,
            weights=shared.weighing(self.weights),
            needs_models=False,
            with_model=lambda state, model: state.replace(model=model),
        )
