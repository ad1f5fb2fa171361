"""The usual `LocalRule.gradient`s, each put on top of another one.

Every function takes a gradient rule, `inner` (the plain one unless told otherwise), and gives another, as
`optax.chain` does with transformations. So they compose: a term of the loss that is added last is felt by all
that is inside.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_sim.core.algorithm import GradientRule, Step, plain_gradient
from fedjax_sim.core.model import Variables
from fedjax_sim.core.task import Apply, Batch, Loss, LossAndGrad, task_loss


def of_loss(loss: Callable[[Apply, Variables, Batch, Any], tuple[jax.Array, Variables]]) -> GradientRule:
    """The gradient of a loss of the method's own.

    Args:
      loss: (apply, variables, batch, extra) -> (f32[], variables with their state moved on).
    """

    def gradient(loss_and_grad: LossAndGrad, variables: Variables, batch: Batch, extra: Any, /) -> Step:
        def own(apply: Apply, variables: Variables, batch: Batch) -> tuple[jax.Array, Variables]:
            return loss(apply, variables, batch, extra)

        (value, moved), grads = loss_and_grad(variables, batch, own)
        return Step(value, moved, grads, extra)

    return gradient


def with_loss(
    loss: Callable[[Loss, Apply, Variables, Batch, Any], tuple[jax.Array, Variables]],
    inner: GradientRule = plain_gradient,
) -> GradientRule:
    """`inner` with each loss that it differentiates changed, by a further term say.

    Args:
      loss: (the loss inside, apply, variables, batch, extra) -> (f32[], variables).
      inner: the rule.
    """

    def gradient(loss_and_grad: LossAndGrad, variables: Variables, batch: Batch, extra: Any, /) -> Step:
        def changed(
            variables: Variables, batch: Batch, inside: Loss = task_loss, /
        ) -> tuple[tuple[jax.Array, Variables], Any]:
            def more(apply: Apply, variables: Variables, batch: Batch) -> tuple[jax.Array, Variables]:
                return loss(inside, apply, variables, batch, extra)

            return loss_and_grad(variables, batch, more)

        return inner(changed, variables, batch, extra)

    return gradient


def with_direction(
    change: Callable[[Any, Variables, Any], Any], inner: GradientRule = plain_gradient
) -> GradientRule:
    """`inner` with another direction.

    Args:
      change: (gradient, variables, extra) -> gradient.
      inner: the rule.
    """

    def gradient(loss_and_grad: LossAndGrad, variables: Variables, batch: Batch, extra: Any, /) -> Step:
        step = Step(*inner(loss_and_grad, variables, batch, extra))
        return step._replace(gradient=change(step.gradient, variables, extra))

    return gradient


def moving(which: Callable[[Variables, Batch], Any], inner: GradientRule = plain_gradient) -> GradientRule:
    """`inner` in whose steps only some leaves move.

    Args:
      which: (variables, batch) -> `Step.moves`.
      inner: the rule, which moves all.
    """

    def gradient(loss_and_grad: LossAndGrad, variables: Variables, batch: Batch, extra: Any, /) -> Step:
        step = Step(*inner(loss_and_grad, variables, batch, extra))
        return step._replace(moves=which(variables, batch))

    return gradient


def accumulating(
    add: Callable[[LossAndGrad, Batch, Any], Any], inner: GradientRule = plain_gradient
) -> GradientRule:
    """`inner` whose steps add something to `extra`.

    Args:
      add: (loss_and_grad, batch, extra) -> extra, in the same shapes.
      inner: the rule.
    """

    def gradient(loss_and_grad: LossAndGrad, variables: Variables, batch: Batch, extra: Any, /) -> Step:
        step = Step(*inner(loss_and_grad, variables, batch, extra))
        return step._replace(extra=add(loss_and_grad, batch, step.extra))

    return gradient


def of_moving(step: Step) -> Any:
    """A step's gradient, zero of the leaves that do not move."""
    if step.moves is None:
        return step.gradient
    return jax.tree.map(lambda moves, g: jnp.where(moves, g, 0), step.moves["params"], step.gradient)
