"""Every optimiser of optax steps as optax has it at the round's rate, or is refused by name."""

import functools
import inspect
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_sim.config import LocalConfig
from fedjax_sim.core import optimizers
from fedjax_sim.core.errors import UserError
from fedjax_sim.engine.clients import is_scaled, make_optimizer


def rates(make):
    """The names of its arguments that are a learning rate."""
    if not (inspect.isfunction(make) or isinstance(make, functools.partial)):
        return set()
    return {"learning_rate", "max_learning_rate"} & set(inspect.signature(make).parameters)


NAMES = {
    name for name in dir(optax) if not name.startswith(("_", "scale_by_")) and rates(getattr(optax, name))
}
REFUSED = {"lbfgs", "polyak_sgd", "noisy_sgd"}
OLD = {"optimistic_adam"}  # optax warns of it
FURTHER = {"momentum": 0.9, "weight_decay": 0.1, "weight_decay_rate": 0.1, "nesterov": True, "optimism": 0.3}
RATES = (0.25, 0.25, 0.0625)


def variants(name):
    """The options that may stand in the way: none, and each that the optimiser has."""
    has = inspect.signature(getattr(optax, name)).parameters
    return [{}, *({option: value} for option, value in FURTHER.items() if option in has)]


def walked(local, ours):
    """Weights after each of three steps, the optimiser's memory kept, and the memory."""
    rng = np.random.default_rng(0)
    weights, memory, out = jnp.asarray(rng.normal(size=(3, 2)), jnp.float32), None, []
    for lr in map(jnp.float32, RATES):
        rate = (1.0 if is_scaled(local) else lr) if ours else lr
        optimizer = make_optimizer(local, rate)
        memory = optimizer.init(weights) if memory is None else memory
        update, memory = optimizer.update(jnp.asarray(rng.normal(size=(3, 2)), jnp.float32), memory, weights)
        weights = weights + (lr * update if ours and is_scaled(local) else update)
        out.append(np.asarray(weights))
    return np.stack(out), jax.tree.leaves(memory)


def test_the_table_names_optimisers_that_there_are():
    """Older versions of optax lack some."""
    assert len(optimizers.PROPORTIONAL & NAMES) > 15 and {"fromage", "rprop", *REFUSED} <= NAMES


def local_configs(scaled):
    """Of all names and options those that the round's rate scales, or the others."""
    made = [LocalConfig(optimizer=n, options=o) for n in sorted(NAMES - {"sgd"}) for o in variants(n)]
    return [pytest.param(m, id=f"{m.optimizer}-{m.options}") for m in made if is_scaled(m) == scaled]


@pytest.mark.parametrize("local", local_configs(True))
def test_what_is_scaled_is_proportional_to_its_rate(local):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        (scaled, memory), (made, wanted) = walked(local, True), walked(local, False)
    np.testing.assert_allclose(scaled, made, rtol=1e-6, atol=1e-7)
    for ours, theirs in zip(memory, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("local", local_configs(False))
def test_all_others_take_a_rate_that_is_traced_or_are_refused(local):
    def step(lr, weights):
        optimizer = make_optimizer(local, lr)
        return optimizer.update(weights, optimizer.init(weights), weights)[0]

    name, leaf = local.optimizer, jax.ShapeDtypeStruct((3, 2), jnp.float32)
    with warnings.catch_warnings(), jax.numpy_dtype_promotion("standard"):
        warnings.simplefilter("ignore" if name in OLD else "error", DeprecationWarning)
        if name in REFUSED:
            with pytest.raises(UserError, match=rf"{name}.*(value of the loss|noise).*Name another"):
                make_optimizer(local)
        else:
            made = jax.eval_shape(step, jax.ShapeDtypeStruct((), jnp.float32), leaf)
            assert (made.shape, made.dtype) == (leaf.shape, leaf.dtype)


def test_a_line_search_that_is_left_out_leaves_a_step_by_gradient():
    make_optimizer(LocalConfig(optimizer="lbfgs", options={"linesearch": None}))
