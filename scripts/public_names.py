"""The public names of the package with their parameters, as tests/fixtures/public_names.txt keeps them.

    scripts/public_names.py            prints them
    scripts/public_names.py --write    into that file, after a change that is meant and stands in CHANGELOG.md

A name that goes, or a parameter that is renamed, moves or loses its default, breaks what others wrote: it
needs a deprecation first (docs/about/releases.md). Annotations are left out, as each Python has its own way.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

KEPT = Path(__file__).resolve().parents[1] / "tests/fixtures/public_names.txt"

PUBLIC: dict[str, tuple[str, ...]] = {
    "fedjax_sim": (),
    "fedjax_sim.algorithms": (),
    "fedjax_sim.data": (),
    "fedjax_sim.models": (),
    "fedjax_sim.tasks": (),
    "fedjax_sim.tasks.classification": (
        *("classification", "classification_of_tables", "correct", "cross_entropy"),
    ),
    "fedjax_sim.tasks.regression": ("regression", "squared_error"),
    "fedjax_sim.config": ("dump", "from_dict", "read_config", "to_dict"),
    "fedjax_sim.config.callbacks": ("Callback", "UnderWay"),
    "fedjax_sim.config.sweep_files": ("Job", "Sweep"),
    "fedjax_sim.records": (
        *("Lap", "Row", "Table", "goal_of", "read_journal", "read_parquet", "write_parquet"),
    ),
    "fedjax_sim.runs": ("Interrupted", "Terminated"),
    "fedjax_sim.studies.comparison": ("Comparison",),
    "fedjax_sim.studies.search": (),
    "fedjax_sim.studies.sweep": (),
    "fedjax_sim.probes.landscape": (),
    "fedjax_sim.reports.inertia": (),
    "fedjax_sim.reports.inertia.report": ("draw",),
    "fedjax_sim.reports.landscape.report": ("draw",),
    "fedjax_sim.reports.peel": (),
    "fedjax_sim.reports.peel.report": ("draw",),
    "fedjax_sim.core.algorithm": (
        *(
            "Algorithm",
            "Cohort",
            "CohortChooser",
            "Deploy",
            "Dispatch",
            "FinishRound",
            "GradientRule",
            "Init",
        ),
        *(
            "InitClient",
            "LocalRule",
            "Merge",
            "PersonalModel",
            "PersonalModels",
            "Receive",
            "Results",
            "Send",
        ),
        *("SlotModels", "StartRound", "Step", "WantsLastGradient", "Weights", "WithModel"),
    ),
    "fedjax_sim.core.gradients": (
        *("accumulating", "moving", "of_loss", "of_moving", "with_direction", "with_loss"),
    ),
    "fedjax_sim.core.stacked": (
        *("averages", "broadcast", "dispersion", "mean", "overwrite", "per_slot", "permute", "permute_each"),
        *("put_rows", "rows_of", "squared_norms", "take_rows", "weighted_sum", "where_slot"),
    ),
    "fedjax_sim.core.task": (
        *("Apply", "Batch", "LossAndGrad", "Metric", "Task", "Training", "differentiated", "evaluate"),
        *("masked_mean", "task_loss"),
    ),
    "fedjax_sim.algorithms.wrap": ("Layer", "wrap"),
    "fedjax_sim.engine.debugging": ("NotFinite",),
    "fedjax_sim.engine.device_data": ("DeviceData",),
    "fedjax_sim.engine.observing": ("Instrument", "Measurement", "Observer", "ObserverRequest"),
    "fedjax_sim.engine.round": ("MergeView", "Meter"),
    "fedjax_sim.engine.setup": ("MeterConfig", "ObserverConfig", "Setup"),
    "fedjax_sim.cli": ("main",),
}
"""Module -> its public names; (): those of its `__all__`."""

MEMBERS = {"Simulation": {"advance", "evaluate", "release", "restore", "state", "step", "steps", "variables"}}
"""Class -> its public members, where these are not all whose names have no underscore before them."""


def lines() -> Iterator[str]:
    """One a name, and one a public member of each class; sorted within a module."""
    shown: set[int] = set()
    for module, names in PUBLIC.items():
        found = importlib.import_module(module)
        for name in sorted(names or found.__all__):
            value, place = getattr(found, name), f"{module}.{name}"
            if isinstance(value, types.ModuleType):
                yield f"{place}: module {value.__name__}"
            elif id(value) in shown or not callable(value):
                yield place
            else:
                shown.add(id(value))
                yield f"{place}{_parameters(value)}"
                if inspect.isclass(value):
                    yield from (f"{place}.{member}" for member in _members(value))


def _members(cls: type) -> Iterator[str]:
    """Public methods with their parameters, and properties; of the package's own classes."""
    fields = {field.name for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()
    fields |= set(getattr(cls, "_fields", ()))  # of a named tuple
    own = [base for base in cls.__mro__ if base.__module__.startswith("fedjax_sim")]
    for name in sorted({name for base in own for name in vars(base)} - fields):
        if name.startswith("_") or name == "replace":  # flax gives its dataclasses a `replace`
            continue
        if name in MEMBERS.get(cls.__name__, {name}):
            value = inspect.getattr_static(cls, name)
            value = value.__func__ if isinstance(value, classmethod | staticmethod) else value
            yield f"{name}{_parameters(value)}" if inspect.isfunction(value) else name


def _parameters(value: Any) -> str:
    """`(config, *, data=None)`; nothing where Python cannot say."""
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return ""
    made = [
        each.replace(
            annotation=inspect.Parameter.empty,
            default=each.default if each.default is each.empty else _Shown(each.default),
        )
        for each in signature.parameters.values()
        if not each.name.startswith("_")
    ]
    return str(signature.replace(parameters=made, return_annotation=inspect.Signature.empty))


class _Shown:
    """A default as it is written, if it is a plain value; `…` for all others."""

    def __init__(self, value: Any):
        self.text = repr(value) if isinstance(value, str | int | float | tuple | None) else "…"

    def __repr__(self) -> str:
        return self.text


def main(words: list[str]) -> None:
    """Prints the names, or writes them."""
    text = "\n".join(lines()) + "\n"
    if words == ["--write"]:
        KEPT.write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main(sys.argv[1:])
