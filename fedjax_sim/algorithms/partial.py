"""Partial averaging: any part of the model is each client's own. For sweeps over depth.

    w_l    <-  sum_k p_k w_k,l      for every block l that is not private
    w_k,l      stays with client k  for the others

With the last block it is FedPer, with the first ones LG-FedAvg; with all blocks every client trains alone,
with none it is FedAvg. So which depth of averaging does harm is asked of one method with one setting. The
sweep is OUR CHOICE, as a control of "The Other Side of the Coin: Unveiling the Downsides of Model Aggregation
in Federated Learning from a Layer-peeled Perspective", https://arxiv.org/abs/2502.03231; that averaging
one layer seldom does the harm of averaging all is FOUND in the abstract of Adilova et al., Layer-wise Linear
Mode Connectivity, ICLR 2024, https://arxiv.org/abs/2307.06966 (no barriers by layer).
"""

import dataclasses
from typing import ClassVar, Literal

from fedjax_sim.algorithms import private
from fedjax_sim.algorithms.card import Card
from fedjax_sim.algorithms.fedavg import FedAvg
from fedjax_sim.core.algorithm import Algorithm, Context
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.fields import at_least, check

_CHOICES = ("first", "last", "only", "leaves")


@dataclasses.dataclass(frozen=True)
class PartialAveraging:
    """Averaging of a part of the model: exactly one of `first`, `last`, `only`, `leaves` names the other.

    Attributes:
      first: how many of the first blocks (weight layers, see `Model.blocks`) are private.
      last: how many of the last blocks are; the very last is the classifier.
      only: number of the one block that is, from 0.
      leaves: patterns of the paths of leaves that are (`[params/fc1/*]`, `["*/bias"]`).
      weights: p_k of the averaged leaves: by `samples`, or `uniform`.
    """

    card: ClassVar[Card] = private.card("partial", defaults="ours (a control)")

    first: int | None = None
    last: int | None = None
    only: int | None = None
    leaves: tuple[str, ...] = ()
    weights: Literal["samples", "uniform"] = "samples"

    def __post_init__(self):
        check(self, "algorithm.")
        for name in ("first", "last", "only"):
            if getattr(self, name) is not None:
                at_least(f"algorithm.{name}", getattr(self, name), 0)
        if len(self._given()) > 1:
            one, other = self._given()[:2]
            raise UserError(
                f"algorithm.{other}",
                getattr(self, other),
                f"algorithm.{one} = {getattr(self, one)!r} says already which leaves are private",
                "Set one of them, and the other to null.",
            )

    def build(self, context: Context) -> Algorithm:
        """The record of pure functions. Raises UserError if nothing is chosen, or what the model has not."""
        inner = FedAvg(self.weights).build(context)
        return private.keep(inner, self._leaves(context), context.num_clients)

    def _given(self) -> list[str]:
        return [name for name in _CHOICES if getattr(self, name) not in (None, ())]

    def _leaves(self, context: Context) -> frozenset[private.Path]:
        model = context.model
        if self.first is not None:
            return private.first(model, self.first, "algorithm.first")
        if self.last is not None:
            return private.last(model, self.last, "algorithm.last")
        if self.only is not None:
            return private.only(model, self.only, "algorithm.only")
        if self.leaves:
            return private.matching(model, self.leaves, "algorithm.leaves")
        raise UserError(
            "algorithm.first",
            None,
            "nothing says which leaves are private",
            f"Set one of {', '.join(_CHOICES)}.",
        )
