"""Algorithms: one short file each, and a table with one line for each (`table.py`)."""

import dataclasses
from typing import Any

from fedjax_sim.algorithms.shared import nested
from fedjax_sim.algorithms.table import *  # noqa: F403
from fedjax_sim.algorithms.table import CONFIGS
from fedjax_sim.algorithms.table import __all__ as _methods
from fedjax_sim.core.algorithm import (
    Algorithm,
    AlgorithmConfig,
    Cohort,
    Context,
    LocalRule,
    Results,
    Starts,
    Step,
)
from fedjax_sim.core.plugins import Names, written
from fedjax_sim.core.task import Batch

_NAMES = Names("algorithm", "build(context)", CONFIGS)


def named(name: Any, field: str = "algorithm.name") -> type:
    """The hyper-parameters called `name`.

    Args:
      name: one of `CONFIGS`, or `module:Class` for a dataclass of one's own with a `build(context)`, in a
        module that Python finds, in the working directory among other places.
      field: for messages.

    Raises:
      UserError: there is none.
    """
    return _NAMES.named(name, field)


def name_of(config: Any) -> str | None:
    """The name by which `named` finds an algorithm's configuration; None if it has none."""
    return _NAMES.name_of(config)


def builtin(config: Any) -> bool:
    """Whether it is one of this package, and so is all that is inside it."""
    known = set(CONFIGS.values())
    return type(config) in known and all(type(one) in known for one in nested(config))


def namable(config: Any) -> bool:
    """Whether a file can hold it: it has a name, and so has all that is inside it."""
    return name_of(config) is not None and all(name_of(one) is not None for one in nested(config))


def label(config: Any) -> str:
    """An algorithm in a word, with what is inside it unless that is FedAvg: `fedmr`, `fedprox(fedmr)`.

    One's own that has no name is written as Python does, with its settings, and without addresses in memory.
    """
    name = name_of(config)
    if name is None:
        return written(config)
    fields = (getattr(config, field.name) for field in dataclasses.fields(config))
    inside = [label(one) for one in fields if isinstance(one, AlgorithmConfig)]
    inside = [one for one in inside if one != "fedavg"]
    return f"{name}({', '.join(inside)})" if inside else name


__all__ = [  # pyright: ignore[reportUnsupportedDunderAll]
    "CONFIGS",
    "Algorithm",
    "Batch",
    "Cohort",
    "Context",
    "LocalRule",
    "Results",
    "Starts",
    "Step",
    "name_of",
    "named",
    *_methods,
]
