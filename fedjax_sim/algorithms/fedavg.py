"""FedAvg, with any optax optimiser on the server.

McMahan, Moore, Ramage, Hampson, Agüera y Arcas. Communication-Efficient Learning of Deep Networks from
Decentralized Data. AISTATS 2017. https://arxiv.org/abs/1602.05629

Server optimisers: Reddi et al. Adaptive Federated Optimization. ICLR 2021.
https://arxiv.org/abs/2003.00295 (FedAdam, FedYogi, FedAdagrad; FedAvgM is `sgd` with momentum). The
pseudo-gradient is x − mean_k w_k; batch statistics are averaged and do not pass through the optimiser.
optax's Adam and Yogi correct the bias of their moments, which Reddi et al. do not.
"""

import dataclasses
from typing import Any, Literal

import jax
import optax
from flax import struct

from fedjax_sim.algorithms import base
from fedjax_sim.errors import UserError
from fedjax_sim.fields import check, positive


@struct.dataclass
class FedAvgState:
    """Attributes: model: the global one, x. optimizer: the server optimiser's state."""

    model: Any
    optimizer: Any


@dataclasses.dataclass(frozen=True)
class FedAvg:
    """Federated averaging.

    Attributes:
      weights: `samples` weighs a client by its number of samples (the paper), `uniform` equally.
      server_optimizer: `none` takes the mean as it is; else the name of an optax optimiser.
      server_lr: its learning rate.
      server_options: its further arguments (`{momentum: 0.9}`, `{eps: 1e-3}`).
    """

    weights: Literal["samples", "uniform"] = "samples"
    server_optimizer: str = "none"
    server_lr: float = 1.0
    server_options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        check(self, "algorithm.")
        positive("algorithm.server_lr", self.server_lr)
        if self.server_optimizer == "none":
            for name, default in (("server_lr", 1.0), ("server_options", {})):
                if getattr(self, name) != default:
                    raise UserError(
                        f"algorithm.{name}",
                        getattr(self, name),
                        "there is no server optimiser to take it",
                        "Name one in algorithm.server_optimizer (sgd, adam, yogi …).",
                    )

    def build(self, context: base.Context) -> base.Algorithm:
        """The record of pure functions."""
        del context
        optimizer = self._optimizer()

        def init(key, variables):
            del key
            return FedAvgState(variables, optimizer.init(variables["params"]) if optimizer else ())

        def dispatch(state, cohort, key):
            del cohort, key
            return base.Starts(state.model)

        def merge(state, cohort, starts, results, key):
            del cohort, starts, key
            if optimizer is None:
                return FedAvgState(results.mean, ()), {}
            x = state.model["params"]
            gradient = jax.tree.map(lambda old, new: old - new, x, results.mean["params"])
            updates, memory = optimizer.update(gradient, state.optimizer, x)
            return FedAvgState({**results.mean, "params": optax.apply_updates(x, updates)}, memory), {}

        return base.Algorithm(
            init=init,
            dispatch=dispatch,
            merge=merge,
            deploy=lambda state: state.model,
            weights=base.by_samples if self.weights == "samples" else base.uniform,
            needs_models=False,
        )

    def _optimizer(self) -> optax.GradientTransformation | None:
        if self.server_optimizer == "none":
            return None
        make = getattr(optax, self.server_optimizer, None)
        try:
            made = make(self.server_lr, **self.server_options)  # type: ignore[misc]
        except Exception as error:
            raise UserError(
                "algorithm.server_optimizer",
                self.server_optimizer,
                f"optax cannot make it with lr {self.server_lr} and {self.server_options}: {error}",
                "Name one of optax's optimisers (sgd, adam, yogi, adagrad …) and its own arguments.",
            ) from None
        if not isinstance(made, optax.GradientTransformation):
            raise UserError(
                "algorithm.server_optimizer",
                self.server_optimizer,
                "is no optimiser of optax",
                "Name one (sgd, adam, yogi, adagrad …).",
            )
        return made
