"""Gradient rules by hand, alone and on top of each other."""

import jax.numpy as jnp
import numpy as np

from fedjax_sim.core import gradients
from fedjax_sim.core.algorithm import Step, plain_gradient
from fedjax_sim.core.task import Batch, differentiated

W = {"params": {"a": jnp.float32([1.0, 2.0]), "b": jnp.float32([3.0])}}
BATCH = Batch({"x": jnp.zeros(1)}, None, None)


class Square:
    """An `Apply` whose outputs are the weights; its task's loss is half their square."""

    def __call__(self, variables, batch):
        del batch
        return jnp.concatenate([variables["params"]["a"], variables["params"]["b"]]), variables

    def represent(self, variables, batch):
        raise NotImplementedError

    def losses(self, outputs, batch):
        del batch
        return (outputs * outputs).sum()[None] / 2


LAG = differentiated(Square())


def flat(step: Step) -> np.ndarray:
    return np.concatenate([step.gradient["a"], step.gradient["b"]])


def linear(apply, variables, batch, extra):
    """Σ extra · w, as a loss of its own."""
    outputs, variables = apply(variables, batch)
    return (extra * outputs).sum(), variables


def more(loss, apply, variables, batch, extra):
    """A further term, 10 Σ w."""
    value, moved = loss(apply, variables, batch)
    return value + 10 * apply(variables, batch)[0].sum(), moved


def test_plain():
    step = plain_gradient(LAG, W, BATCH, "extra")
    assert step.loss == 7 and step.extra == "extra" and step.moves is None
    np.testing.assert_allclose(flat(step), [1, 2, 3])


def test_a_loss_of_its_own_a_term_and_a_direction_compose_in_either_order():
    own = gradients.of_loss(linear)
    step = own(LAG, W, BATCH, jnp.float32(2))
    assert step.loss == 12 and step.extra == 2
    np.testing.assert_allclose(flat(step), [2, 2, 2])
    doubled = lambda inner: gradients.with_direction(  # noqa: E731
        lambda g, variables, extra: {name: 2 * leaf for name, leaf in g.items()}, inner
    )
    # The method inside changes the direction, and the term comes from outside; and the other way round.
    for rule in (gradients.with_loss(more, doubled(own)), doubled(gradients.with_loss(more, own))):
        step = rule(LAG, W, BATCH, jnp.float32(2))
        assert step.loss == 12 + 60
        np.testing.assert_allclose(flat(step), [24, 24, 24])
    np.testing.assert_allclose(flat(gradients.with_loss(more)(LAG, W, BATCH, None)), [11, 12, 13])


def test_a_term_is_felt_by_all_gradients_that_a_method_takes():
    """As SCAFFOLD's option I takes a second one, of the loss at its start."""

    def add(loss_and_grad, batch, extra):
        return extra + loss_and_grad(W, batch)[0][0]

    step = gradients.with_loss(more, gradients.accumulating(add))(LAG, W, BATCH, jnp.float32(1))
    assert step.extra == 1 + 7 + 60


def test_leaves_that_do_not_move():
    which = lambda variables, batch: {"params": {"a": False, "b": jnp.asarray(True)}}  # noqa: E731
    step = gradients.moving(which, gradients.of_loss(linear))(LAG, W, BATCH, jnp.float32(2))
    np.testing.assert_allclose(flat(step), [2, 2, 2])
    np.testing.assert_array_equal(gradients.of_moving(step)["a"], [0, 0])
    np.testing.assert_array_equal(gradients.of_moving(step)["b"], [2])
    assert gradients.of_moving(plain_gradient(LAG, W, BATCH, None))["a"][1] == 2
