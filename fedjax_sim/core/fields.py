"""Checks that settings share: right type, right range, and what the user may have meant instead."""

import contextlib
import dataclasses
import difflib
import math
import numbers
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Self

from fedjax_sim.core.errors import UserError

SMALLEST = 2.0**-126
"""The least positive number that float32 arithmetic is sure to keep apart from 0."""


class Named:
    """A base of dataclasses whose makers are told of a field that there is not, before anything else."""

    def __new__(cls, *values: Any, **given: Any) -> Self:
        """Raises UserError for a field that there is not; all else is left to the dataclass."""
        names = [field.name for field in dataclasses.fields(cls)]  # pyright: ignore[reportArgumentType]
        for name, value in given.items():
            if name not in names:
                raise UserError(f"{cls.__name__}.{name}", value, "no such field", cls._meant(name, names))
        return super().__new__(cls)

    @classmethod
    def _meant(cls, name: str, names: list[str]) -> str:
        """What was meant by a field that there is not."""
        return nearest(name, names)


def check(config: Any, path: str = "") -> None:
    """Checks every field of a frozen dataclass against its annotation, in its `__post_init__`.

    A value of another type that means the same (an int for a float, a NumPy number, a list for a tuple) is
    replaced by what is annotated.

    Args:
      config: the dataclass.
      path: its dotted name with a trailing dot, for messages; "" for the root.

    Raises:
      UserError: names the first field whose value is not what is annotated.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        made = coerce(value, hints[field.name], path + field.name)
        if made is not value:
            object.__setattr__(config, field.name, made)


def coerce(value: Any, hint: Any, path: str, *, text: bool = False) -> Any:
    """`value` as a `hint`, where the two mean the same (2 for 2.0, a list for a tuple).

    Args:
      value: what was given.
      hint: a type annotation.
      path: dotted name, for messages.
      text: whether a number may come as text, as some YAML readers give `1e-2` or `1_000`; and true and false
        as yes, no, on and off, as YAML 1.1 has them.

    Raises:
      UserError: the two do not mean the same.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        rest = [arg for arg in args if arg is not type(None)]
        for arg in rest:
            try:
                return coerce(value, arg, path, text=text)
            except UserError as error:
                if arg is not rest[-1]:
                    continue
                if int in rest and typing.get_origin(arg) is Literal:
                    fix = f"Choose a whole number, or {', '.join(map(str, typing.get_args(arg)))}."
                    raise UserError(
                        path, value, "neither a whole number nor one of the choices", fix
                    ) from None
                if arg not in (int, float) or type(None) not in args:
                    raise
                fix = f"{error.fix.removesuffix('.')}, or null."
                raise UserError(path, value, error.why, fix) from None
    if origin is Literal:
        if isinstance(value, str) and value in args:
            return value
        raise UserError(path, value, "not one of the choices", f"Choose {', '.join(map(str, args))}.")
    if origin is tuple and isinstance(value, list | tuple):
        inner = args[0] if len(args) == 2 and args[1] is Ellipsis else None
        return tuple(coerce(item, inner or args[i], path, text=text) for i, item in enumerate(value))
    if origin in (dict, Mapping) or hint is dict:
        if isinstance(value, Mapping):
            for key in value:
                if text and isinstance(key, str) and ":" in key and value[key] is None:
                    name, _, rest = key.partition(":")
                    raise UserError(
                        path, dict(value), f"there is no space after {name}:", f"Write {name}: {rest}."
                    )
            return dict(value)
    elif hint is bool or hint is str:
        if isinstance(value, hint):
            return value
        if hint is bool and text and isinstance(value, str) and value.lower() in _SWITCHES:
            return _SWITCHES[value.lower()]
    elif hint is int:
        if isinstance(value, numbers.Integral) and not isinstance(value, bool):
            return int(value)
        if text and isinstance(value, str):
            with contextlib.suppress(ValueError):
                return int(value)
    elif hint is float and not isinstance(value, bool):
        if isinstance(value, numbers.Real):
            return float(value)
        if text and isinstance(value, str):
            with contextlib.suppress(ValueError):
                return float(value)
    elif origin is tuple:
        raise UserError(path, value, "a list is wanted", f"Write [{value}].")
    elif isinstance(value, type):
        raise UserError(path, value.__name__, "this is a class, not one of it", f"Write {value.__name__}().")
    elif isinstance(value, typing.cast(type, hint)):
        return value
    kind = getattr(hint, "__name__", str(hint))
    wanted, fix = _WANTED.get(origin or hint, (f"a {kind}", f"Give a {kind}."))
    if hint is str and value is not None:
        fix = "Put it in quotes."
    if hint is int and isinstance(value, float) and value.is_integer():
        fix = f"Write {value:.0f}."
    given = _WANTED.get(type(value), (f"a {type(value).__name__}",))[0]
    raise UserError(path, value, f"{wanted} is wanted, and this is {given}", fix)


_SWITCHES = {"yes": True, "on": True, "no": False, "off": False}
_WANTED: dict[Any, tuple[str, str]] = {
    bool: ("true or false (bool)", "Write true or false."),
    int: ("a whole number (int)", "Write a whole number, such as 10."),
    float: ("a number (float)", "Write a number, such as 0.1."),
    str: ("text (str)", "Write some text."),
    dict: ("a mapping (dict)", "Write {key: value}."),
    Mapping: ("a mapping (dict)", "Write {key: value}."),
    list: ("a list", "Write [value]."),
    type(None): ("null (None)", "Leave it out."),
}
"""Type -> in words, and how to write one."""


SYNONYMS = {
    "learning_rate": "lr",
    "num_clients": "clients",
    "n_clients": "clients",
    "num_rounds": "rounds",
    "n_rounds": "rounds",
    "local_epochs": "epochs",
    "dataset": "data",
    "method": "algorithm",
    "strategy": "algorithm",
}
"""What others call a field -> what it is called here, in small letters."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence that offers what the user may have meant."""
    spelled = {one.lower(): one for one in known}
    here = SYNONYMS.get(name.lower().replace("-", "_"))
    if here in spelled:
        return f"Did you mean {spelled[here]}?"
    close = difflib.get_close_matches(name.lower(), spelled, n=3, cutoff=0.6)
    if close:
        return f"Did you mean {' or '.join(spelled[one] for one in close)}?"
    return f"Known: {', '.join(spelled.values())}."


def at_least(field: str, value: float, least: float, fix: str = "Raise it.") -> None:
    """Raises UserError unless `value` is finite and at least `least`.

    Args:
      field: dotted name, for the message.
      value: what was given.
      least: that it may be.
      fix: the way out, likewise.
    """
    if not (isinstance(value, int | float) and value >= least and math.isfinite(value)):
        raise UserError(field, value, f"must be at least {least}", fix)


def positive(field: str, value: float, *, divides: bool = False) -> None:
    """Raises UserError unless `value` is finite and above 0; with `divides`, above 0 in float32 too."""
    if not (value > 0 and math.isfinite(value)):
        raise UserError(field, value, "must be a positive, finite number", "Give a value above 0.")
    if divides and value < SMALLEST:
        why = "the arithmetic is in float32, takes so small a number for 0, and would divide by it"
        raise UserError(field, value, why, f"Give at least {SMALLEST:.2g}.")


def within(
    field: str, value: float, low: float, high: float, *, open_left: bool = False, open_right: bool = False
) -> None:
    """Checks that `value` lies between `low` and `high`.

    Args:
      field: dotted name of the setting.
      value: what it is.
      low: the lower end.
      high: the upper end.
      open_left: `low` itself lies outside.
      open_right: `high` itself lies outside.

    Raises:
      UserError: it lies outside.
    """
    inside = (value > low if open_left else value >= low) and (value < high if open_right else value <= high)
    if not inside:
        span = f"{'(' if open_left else '['}{low}, {high}{')' if open_right else ']'}"
        raise UserError(field, value, f"lies outside {span}", "Choose a value inside.")
