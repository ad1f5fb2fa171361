"""Algorithms: one short file each, and the table of their names."""

from typing import Any

from fedjax_sim.algorithms.base import Algorithm, Batch, Cohort, Context, LocalRule, Results, Starts
from fedjax_sim.algorithms.fedavg import FedAvg
from fedjax_sim.algorithms.fedmr import FedMR
from fedjax_sim.algorithms.independent import FedIndep, Local

CONFIGS: dict[str, type] = {
    "fedavg": FedAvg,
    "fedmr": FedMR,
    "fedindep": FedIndep,
    "local": Local,
}
"""Name -> hyper-parameters, whose `build(context)` makes the record."""


def name_of(config: Any) -> str | None:
    """The name under which an algorithm's configuration is known; None if it is not one."""
    return next((name for name, cls in CONFIGS.items() if type(config) is cls), None)


__all__ = [
    "CONFIGS",
    "Algorithm",
    "Batch",
    "Cohort",
    "Context",
    "FedAvg",
    "FedIndep",
    "FedMR",
    "Local",
    "LocalRule",
    "Results",
    "Starts",
    "name_of",
]
