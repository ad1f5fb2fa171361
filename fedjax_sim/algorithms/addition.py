"""What a method adds on the client, on top of any algorithm: a term of the loss, another gradient, a memory.

Such a method (FedProx, MOON, FedSAM, …) leaves dispatch and merge to the algorithm inside, its `inner`:
FedAvg unless it is told otherwise, FedMR as well, or another addition.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from fedjax_sim.algorithms.shared import build_inner
from fedjax_sim.algorithms.wrap import Layer, wrap
from fedjax_sim.core.algorithm import Algorithm, AlgorithmConfig, Context, GradientRule, Step, Variables
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.gradients import of_moving, with_loss
from fedjax_sim.core.task import Apply, Batch, Loss


@dataclasses.dataclass(frozen=True)
class Addition:
    """What is added; see `LocalRule`. None leaves what is there.

    Attributes:
      start_round: (start, own) -> extra.
      loss: (the loss inside, apply, variables, batch, extra) -> (f32[], variables).
      direction: (the gradient inside, variables, batch, extra) -> ((loss, variables), gradient). The gradient
        inside, (variables, batch) -> ((loss, variables), gradient), is zero of leaves that the algorithm
        inside does not move. What that one accumulates, it does at the first call.
      finish_round: (start, trained, own) -> own.
      init_client: variables -> own, the client's state of the addition alone.
      personal: (own, model) -> what a client uses itself.
    """

    start_round: Callable[[Variables, Any], Any] = lambda start, own: None
    loss: Callable[[Loss, Apply, Variables, Batch, Any], tuple[jax.Array, Variables]] | None = None
    direction: Callable[[Callable[..., Any], Variables, Batch, Any], Any] | None = None
    finish_round: Callable[[Variables, Variables, Any], Any] = lambda start, trained, own: own
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

    Args:
      inner: the loss.
      apply: the model in training mode.
      variables: one model, no slot axis.
      batch: B samples.
      represents: the representation is wanted too.

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
    if algorithm.local.send is not None:
        raise UserError(
            "algorithm.inner",
            type(inner).__name__,
            f"its clients train more than the model they were sent, and {name} would act on that too",
            f"Put {name} inside of it, if it takes an inner algorithm; else choose another.",
        )
    personal = addition.personal

    def init_client(inside, variables, labels):
        return {"inner": inside(variables, labels), "own": addition.init_client(variables)}

    def start_round(inside, start, client_state, broadcast):
        own = addition.start_round(start, client_state["own"])
        return {"inner": inside(start, client_state, broadcast), "own": own}

    def finish_round(inside, start, trained, client_state, *rest):
        new, upload = inside(start, trained, client_state, *rest)
        return new | {"own": addition.finish_round(start, trained, client_state["own"])}, upload

    return wrap(
        algorithm,
        Layer(
            pairs=("client", "extra"),
            init_client=init_client,
            start_round=start_round,
            gradient=partial(_gradient, addition),
            finish_round=finish_round,
            personal=personal and (lambda inside, kept, model: personal(kept["own"], inside(kept, model))),
        ),
    )


def _gradient(addition: Addition, inside: GradientRule, loss_and_grad, variables, batch, extra) -> Step:
    """The gradient inside, of losses with what is added to them, in the addition's direction."""
    rule, steps = inside, []
    if addition.loss is not None:
        add = addition.loss

        def loss_with_term(loss, apply, variables, batch, extra):
            return add(loss, apply, variables, batch, extra["own"])

        rule = with_loss(loss_with_term, inside)

    def inner(variables, batch):
        step = Step(*rule(loss_and_grad, variables, batch, extra))
        steps.append(step)
        return (step.loss, step.variables), of_moving(step)

    if addition.direction is None:
        (loss, moved), gradient = inner(variables, batch)
    else:
        (loss, moved), gradient = addition.direction(inner, variables, batch, extra["own"])
    return Step(loss, moved, gradient, steps[0].extra, steps[0].moves)
