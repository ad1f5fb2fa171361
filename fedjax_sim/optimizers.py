"""Which of optax's optimisers a client or the server can step with, and which mind their learning rate."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedjax_sim.errors import UserError

PROPORTIONAL = frozenset(
    (
        "adabelief", "adadelta", "adafactor", "adagrad", "adam", "adamax", "adamaxw", "adamw", "adan",
        "amsgrad", "lamb", "lion", "nadam", "nadamw", "novograd", "optimistic_adam_v2",
        "optimistic_gradient_descent", "radam", "rmsprop", "sgd", "sign_sgd", "signum", "sm3", "yogi",
    )
)  # fmt: skip
"""Those whose updates are the learning rate times what they are at 1, and whose state does not depend on it.
Not among them: fromage, rprop, optimistic_adam; lars, whose momentum holds updates and not gradients."""

_UNLESS = {"adafactor": ("momentum", "weight_decay_rate"), "rmsprop": ("momentum",)}


def proportional(name: str, options: Mapping[str, Any]) -> bool:
    """Whether one made at rate 1, its updates scaled, is the one made at any rate."""
    spoilt = any(options.get(option) is not None for option in _UNLESS.get(name, ()))
    return name in PROPORTIONAL and not spoilt


_VALUE = "it chooses its step by the value of the loss, and a step hands it a gradient and the weights alone"

_UNUSABLE = {
    "polyak_sgd": _VALUE,
    "noisy_sgd": "its noise has a seed of its own, and would be the same in every client, round and run",
}


def check_named(name: str, field: str) -> None:
    """Raises UserError, about `field`, if no optimiser of this name can be used here, however it is made."""
    if name in _UNUSABLE:
        raise UserError(field, name, _UNUSABLE[name], _OTHERS)


def check_steps(optimizer: optax.GradientTransformation, name: str, field: str) -> None:
    """Raises UserError, about `field`, unless a gradient and the weights are all that a step wants.

    Traces one abstractly; nothing is computed or compiled.
    """

    def step(gradient, weights):
        return optimizer.update(gradient, optimizer.init(weights), weights)

    leaf = jax.ShapeDtypeStruct((2, 2), jnp.float32)
    try:
        with jax.numpy_dtype_promotion("standard"):
            jax.eval_shape(step, leaf, leaf)
    except Exception as error:
        why = _VALUE if "'value'" in str(error) else f"a step of it wants more than a gradient: {error}"
        raise UserError(field, name, why, _OTHERS) from None


_OTHERS = "Name another (sgd, adam, adamw, lion …)."
