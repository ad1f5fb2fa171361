"""Where a search looks for a setting: what `fs.tune` and the file of a search say of each field.

space = {"local.lr": fs.log_uniform(1e-3, 1.0), "local.epochs": fs.integers(1, 5)}

space:                            # the same in a file
  local.lr: {log_uniform: [0.001, 1]}
  local.epochs: {integers: [1, 5]}
  algorithm: {choice: [fedavg, fedmr]}
"""

import contextlib
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fedjax_sim.core.documents import dump_yaml
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.fields import nearest


@dataclasses.dataclass(frozen=True)
class Interval:
    """The numbers from `low` to `high`, both included.

    Attributes:
      low: the smallest.
      high: the largest.
      log: whether their logarithms are spread evenly, not they themselves.
      whole: whether they are whole numbers.
    """

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def __post_init__(self):
        for name in ("low", "high"):
            value = getattr(self, name)
            if isinstance(value, str):  # as some YAML readers give 1e-3
                with contextlib.suppress(ValueError):
                    value = int(value) if self.whole else float(value)
            kinds = (int,) if self.whole else (int, float)
            if not isinstance(value, kinds) or isinstance(value, bool) or not math.isfinite(value):
                wanted = "a whole number" if self.whole else "a finite number"
                raise UserError(self.kind, value, f"its {name} end must be {wanted}", "Give one.")
            object.__setattr__(self, name, value if self.whole else float(value))
        if not self.low < self.high:
            why = "the first number must be below the second"
            raise UserError(self.kind, [self.low, self.high], why, "Give the smaller one first.")
        if self.log and self.low <= 0:
            raise UserError(self.kind, self.low, "it has no logarithm", "Begin above 0.")

    @property
    def kind(self) -> str:
        """What makes one like this."""
        return "integers" if self.whole else "log_uniform" if self.log else "uniform"

    def to_dict(self) -> dict[str, Any]:
        """As in a file."""
        return {self.kind: [self.low, self.high] + ([True] if self.whole and self.log else [])}

    def distribution(self) -> Any:
        """The same in Optuna's words."""
        from optuna import distributions  # of an extra

        of: Any = distributions.IntDistribution if self.whole else distributions.FloatDistribution
        return of(self.low, self.high, log=self.log)

    def examples(self) -> list[Any]:
        """Parameters that say whether a field takes what is in here."""
        return [self.low, self.high]

    def value(self, parameter: Any) -> Any:
        """What the field is set to for one of Optuna's parameters."""
        return parameter

    def __str__(self):
        return f"{self.kind}({self.low:g}, {self.high:g}{', log=True' if self.whole and self.log else ''})"


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of several values, of any kind that the field takes.

    Attributes:
      options: (what it is called in tables and in the study, the value) of each.
    """

    options: tuple[tuple[Any, Any], ...]

    @property
    def kind(self) -> str:
        """What makes one like this."""
        return "choice"

    def to_dict(self) -> dict[str, Any]:
        """As in a file."""
        values = [value for _, value in self.options]
        listed = all(name == _name(value) for name, value in self.options)
        return {"choice": values if listed else dict(self.options)}

    def distribution(self) -> Any:
        """The same in Optuna's words."""
        from optuna import distributions  # of an extra

        return distributions.CategoricalDistribution([name for name, _ in self.options])

    def examples(self) -> list[Any]:
        """See `Interval`."""
        return [name for name, _ in self.options]

    def value(self, parameter: Any) -> Any:
        """See `Interval`."""
        return next(
            value for name, value in self.options if type(name) is type(parameter) and name == parameter
        )

    def __str__(self):
        return f"choice({', '.join(str(name) for name, _ in self.options)})"


Space = Interval | Choice


def uniform(low: float, high: float) -> Interval:
    """A number between two, each as likely: `fs.uniform(0.0, 0.9)`."""
    return Interval(low, high)


def log_uniform(low: float, high: float) -> Interval:
    """A number between two, each order of magnitude as likely: `fs.log_uniform(1e-3, 1.0)`."""
    return Interval(low, high, log=True)


def integers(low: int, high: int, log: bool = False) -> Interval:
    """A whole number between two, both included: `fs.integers(1, 5)`; with `log` as `log_uniform`."""
    return Interval(low, high, log=log, whole=True)


def choice(options: Sequence[Any] | Mapping[str, Any]) -> Choice:
    """One of several values: `fs.choice([16, 32])`, or by names `fs.choice({"mild": 0.5, "strong": 0.1})`.

    A whole section, such as `{"name": "fedprox", "mu": 0.1}` of `algorithm`, is a value too.
    """
    if not isinstance(options, Mapping) and (isinstance(options, str) or not isinstance(options, Sequence)):
        raise UserError(
            "choice", options, "a list is wanted, or a mapping of names", "Write choice([16, 32])."
        )
    if isinstance(options, Mapping):
        made = [(str(name), value) for name, value in options.items()]
    else:
        made = [(_name(value), value) for value in options]
    if len(made) < 2:
        raise UserError("choice", options, "there is nothing to choose", "Give two values, or set the field.")
    names = [(type(name), name) for name, _ in made]
    for name in names:
        if names.count(name) > 1:
            raise UserError("choice", name[1], "it is there twice", "Name each once.")
    return Choice(tuple(made))


def _name(value: Any) -> Any:
    """What a value is called: itself, or a list or a mapping on one line."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    text = dump_yaml({"_": value}) if isinstance(value, list | tuple | Mapping) else repr(value)
    return " ".join(text.removeprefix("_:").split())


MAKERS = {"uniform": uniform, "log_uniform": log_uniform, "integers": integers, "choice": choice}
"""What is written in a file -> what makes it."""


def from_dict(field: str, given: Any) -> Space:
    """The space of a field as a file says it, `{log_uniform: [0.001, 1]}`; one that is made already stays.

    Raises:
      UserError: it is none; names the field.
    """
    if isinstance(given, Interval | Choice):
        return given
    where, example = f"space.{field}", "Write {log_uniform: [0.001, 1]}, or {choice: [16, 32]}."
    if isinstance(given, list | tuple):
        told = ", ".join(map(str, given))
        raise UserError(
            where, given, "this may be a range, or a list of values", f"Write {{choice: [{told}]}}."
        )
    if not isinstance(given, Mapping) or len(given) != 1:
        raise UserError(where, given, f"one of {', '.join(MAKERS)} is wanted", example)
    (kind, ends), *_ = given.items()
    if kind not in MAKERS:
        raise UserError(where, given, f"there is no {kind}", nearest(str(kind), MAKERS))
    try:
        if kind == "choice":
            return choice(ends)
        if not isinstance(ends, list | tuple) or not 2 <= len(ends) <= (3 if kind == "integers" else 2):
            raise UserError(kind, ends, "two numbers are wanted", f"Write {{{kind}: [1, 10]}}.")
        return MAKERS[kind](*ends)
    except UserError as error:
        raise UserError(f"{where}.{error.field}", error.value, error.why, error.fix) from None
