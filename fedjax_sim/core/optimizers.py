"""Which of optax's optimisers a client or the server can step with, and which mind their learning rate."""

import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedjax_sim.core.errors import UserError
from fedjax_sim.core.fields import coerce, nearest

PROPORTIONAL = frozenset(
    (
        "adabelief", "adadelta", "adafactor", "adagrad", "adam", "adamax", "adamaxw", "adamw", "adan",
        "amsgrad", "lamb", "lion", "nadam", "nadamw", "novograd", "optimistic_adam_v2",
        "optimistic_gradient_descent", "radam", "rmsprop", "sgd", "sign_sgd", "signum", "sm3", "yogi",
    )
)  # fmt: skip
"""Those whose updates are the learning rate times what they are at 1, and whose state does not depend on it.
Not among them: fromage, rprop, optimistic_adam; lars, whose momentum holds updates and not gradients."""

_OF_THEIR_OWN = frozenset(("fromage", "lars", "lbfgs", "rprop"))
"""Others that messages offer."""

_UNLESS = {"adafactor": ("momentum", "weight_decay_rate"), "rmsprop": ("momentum",)}


def proportional(name: str, options: Mapping[str, Any]) -> bool:
    """Whether one made at rate 1, its updates scaled, is the one made at any rate."""
    spoilt = any(options.get(option) is not None for option in _UNLESS.get(name, ()))
    return name in PROPORTIONAL and not spoilt


def is_on(number: float | jax.Array) -> bool:
    """Whether a setting that 0 turns off is on; one that is an argument of a program, f32[], is never 0."""
    return isinstance(number, jax.Array) or bool(number)


_VALUE = "it chooses its step by the value of the loss, and a step hands it a gradient and the weights alone"

_UNUSABLE = {
    "polyak_sgd": _VALUE,
    "noisy_sgd": "its noise has a seed of its own, and would be the same in every client, round and run",
}


def make(
    name: str, lr: float | jax.Array, options: Mapping[str, Any], section: str
) -> optax.GradientTransformation:
    """The optimiser of optax that has this name, at rate `lr`.

    Args:
      name: as in `optax.NAME`.
      lr: f32[] or a number, its learning rate.
      options: its further arguments.
      section: dotted name of the settings `optimizer`, `lr` and `options`, for messages.

    Raises:
      UserError: optax has no such optimiser, it takes no such option or not this value, or it wants more than
        a gradient.
    """
    field = f"{section}.optimizer"
    check_named(name, field)
    factory: Any = getattr(optax, name, None)
    takes = inspect.signature(factory).parameters if callable(factory) else {}
    if "learning_rate" not in takes:
        known = sorted(one for one in PROPORTIONAL | _OF_THEIR_OWN if hasattr(optax, one))
        raise UserError(field, name, "optax has no such optimiser", nearest(name, known))
    for option, value in options.items():
        _check_option(section, name, takes, option, value)
    try:
        made = factory(learning_rate=lr, **options)
        if not isinstance(made, optax.GradientTransformation):
            raise TypeError("it does not return an optimiser")
    except Exception as error:
        raise UserError(
            f"{section}.options",
            dict(options),
            f"optax.{name} refuses these: {error}",
            f"See optax.{name} for its arguments.",
        ) from None
    check_steps(made, name, field)
    return made


def _check_option(
    section: str, name: str, takes: Mapping[str, inspect.Parameter], option: Any, value: Any
) -> None:
    """Raises UserError unless `value` is of the kind of the argument `option` of optax's `name`.

    Arrays and functions of the step, which Python may give for a number, are left to optax.
    """
    field, known = f"{section}.options.{option}", [one for one in takes if one != "learning_rate"]
    if option == "learning_rate":
        raise UserError(field, value, f"the rate is {section}.lr", f"Set {section}.lr.")
    if option not in known:
        raise UserError(field, value, f"optax.{name} takes no such option", nearest(str(option), known))
    default, nullable = takes[option].default, "None" in str(takes[option].annotation)
    if isinstance(default, bool):
        coerce(value, bool, field)
    elif isinstance(default, int | float):
        refused = isinstance(value, bool | str | list | tuple | Mapping) or (value is None and not nullable)
        if refused:
            coerce(value, float, field)
    elif default is None and isinstance(value, str) and "dtype" not in option:
        coerce(value, float, field)


def check_named(name: str, field: str) -> None:
    """Raises UserError, about `field`, if no optimiser of this name can be used here, however it is made."""
    if name in _UNUSABLE:
        raise UserError(field, name, _UNUSABLE[name], _OTHERS)


def check_steps(optimizer: optax.GradientTransformation, name: str, field: str) -> None:
    """Raises UserError, about `field`, unless a gradient and the weights are all that a step wants.

    Traces one abstractly; nothing is computed or compiled.
    """

    def step(gradient: jax.Array, weights: jax.Array) -> tuple[Any, Any]:
        return optimizer.update(gradient, optimizer.init(weights), weights)

    leaf = jax.ShapeDtypeStruct((2, 2), jnp.float32)
    try:
        with jax.numpy_dtype_promotion("standard"):
            jax.eval_shape(step, leaf, leaf)
    except Exception as error:
        why = _VALUE if "'value'" in str(error) else f"a step of it wants more than a gradient: {error}"
        raise UserError(field, name, why, _OTHERS) from None


_OTHERS = "Name another (sgd, adam, adamw, lion …)."
