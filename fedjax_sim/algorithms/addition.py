"""What a method adds on the client, on top of any algorithm: a term of the loss, another gradient, a memory.

Such a method (FedProx, MOON, FedSAM, …) leaves dispatch and merge to the algorithm inside, its `inner`:
FedAvg unless it is told otherwise, FedMR as well, or another addition.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_sim.algorithms.shared import build_inner
from fedjax_sim.core.algorithm import Algorithm, AlgorithmConfig, Context, Variables
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.task import Apply, Batch, LossAndGrad

Loss = Callable[[Apply, Variables, Batch], tuple[jax.Array, Variables]]
"""(apply, variables, batch) -> (scalar, variables with their state moved on)."""


@dataclasses.dataclass(frozen=True)
class Addition:
    """What is added; see `LocalRule`. None leaves what is there.

    Attributes:
      start_round: (start, kept) -> extra.
      loss: (the loss inside, apply, variables, batch, extra) -> (scalar, variables).
      direction: (the gradient inside, variables, batch, extra) -> ((loss, variables), gradient). The gradient
        inside is zero where the algorithm inside holds a leaf fixed.
      finish_round: (start, trained, kept) -> kept.
      init_client: variables -> kept, of the addition alone.
      personal: (kept, model) -> what a client uses itself.
    """

    start_round: Callable[[Variables, Any], Any] = lambda start, kept: None
    loss: Callable[[Loss, Apply, Variables, Batch, Any], tuple[jax.Array, Variables]] | None = None
    direction: Callable[[LossAndGrad, Variables, Batch, Any], Any] | None = None
    finish_round: Callable[[Variables, Variables, Any], Any] = lambda start, trained, kept: kept
    init_client: Callable[[Variables], Any] = lambda variables: None
    personal: Callable[[Any, Variables], Variables] | None = None


class RecordingApply:
    """An `Apply` that remembers its first pass: (logits, representation if wanted)."""

    def __init__(self, apply: Apply, represents: bool):
        self.apply, self.represents = apply, represents
        self.first: Any = None

    def __call__(self, variables, batch):
        """See `Apply`."""
        if self.represents:
            logits, _, moved = self.represent(variables, batch)
            return logits, moved
        logits, moved = self.apply(variables, batch)
        self.first = self.first or (logits, None)
        return logits, moved

    def represent(self, variables, batch):
        """See `Apply`."""
        logits, z, moved = self.apply.represent(variables, batch)
        self.first = self.first or (logits, z)
        return logits, z, moved

    def losses(self, outputs, batch):
        """See `Apply`."""
        return self.apply.losses(outputs, batch)


def loss_and_outputs(
    inner: Loss, apply: Apply, variables: Variables, batch: Batch, *, represents: bool = False
) -> tuple[jax.Array, Variables, jax.Array, jax.Array | None]:
    """The loss inside, and what the model said of the batch, in one pass.

    Returns:
      (loss, variables, logits f32[B, C], representation f32[B, d] if `represents`).
    """
    watched = RecordingApply(apply, represents)
    value, moved = inner(watched, variables, batch)
    return value, moved, *watched.first


def with_addition(inner: AlgorithmConfig, addition: Addition, context: Context, name: str) -> Algorithm:
    """The algorithm `inner` with an addition on its clients.

    Args:
      inner: configuration of the algorithm.
      addition: what comes on top.
      context: of the run.
      name: of the method, for messages.

    Raises:
      UserError: `inner` has its clients train a second model, or more than the model that was sent.
    """
    algorithm = build_inner(inner, context)
    rule = algorithm.local
    if rule.send is not None:
        raise UserError(
            "algorithm.inner",
            type(inner).__name__,
            f"its clients train more than the model they were sent, and {name} would act on that too",
            f"Put {name} inside of it, if it takes an inner algorithm; else choose another.",
        )

    def init_client(variables, labels):
        inside = rule.init_client(variables, labels) if rule.init_client else None
        return {"inner": inside, "own": addition.init_client(variables)}

    def start_round(start, kept, broadcast):
        return {
            "inner": rule.start_round(start, kept["inner"], broadcast),
            "own": addition.start_round(start, kept["own"]),
        }

    def inner_loss(extra):
        return lambda apply, variables, batch: rule.loss(apply, variables, batch, extra["inner"])

    def loss(apply, variables, batch, extra):
        if addition.loss is None:
            return inner_loss(extra)(apply, variables, batch)
        return addition.loss(inner_loss(extra), apply, variables, batch, extra["own"])

    def direction(loss_and_grad, variables, batch, extra):
        def inside(variables, batch):
            value, gradient = rule.direction(loss_and_grad, variables, batch, extra["inner"])
            if rule.trains is not None:
                moves = rule.trains(variables, batch)["params"]
                gradient = jax.tree.map(lambda moves, g: jnp.where(moves, g, 0), moves, gradient)
            return value, gradient

        if addition.direction is None:
            return inside(variables, batch)
        return addition.direction(inside, variables, batch, extra["own"])

    def gather(loss_and_grad, batch, extra):
        assert rule.gather is not None
        return extra | {"inner": rule.gather(loss_and_grad, batch, extra["inner"])}

    def finish_round(start, trained, kept, extra, steps, lr, gradient):
        inside, upload = rule.finish_round(start, trained, kept["inner"], extra["inner"], steps, lr, gradient)
        return {"inner": inside, "own": addition.finish_round(start, trained, kept["own"])}, upload

    def receive(model, kept, broadcast, key):
        assert rule.receive is not None
        return rule.receive(model, kept["inner"], broadcast, key)

    def personal(kept, model):
        if rule.personal is not None:
            model = rule.personal(kept["inner"], model)
        return model if addition.personal is None else addition.personal(kept["own"], model)

    return dataclasses.replace(
        algorithm,
        local=dataclasses.replace(
            rule,
            init_client=init_client,
            start_round=start_round,
            loss=loss,
            direction=direction,
            gather=rule.gather and gather,
            finish_round=finish_round,
            receive=rule.receive and receive,
            personal=personal if rule.personal or addition.personal else None,
        ),
    )
