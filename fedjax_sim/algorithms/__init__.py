"""Algorithms: one short file each, and the table of their names."""

from typing import Any

from fedjax_sim.algorithms.base import Algorithm, Batch, Cohort, Context, LocalRule, Results, Starts
from fedjax_sim.algorithms.fedavg import FedAvg
from fedjax_sim.algorithms.fedbabu import FedBABU
from fedjax_sim.algorithms.fedbn import FedBN
from fedjax_sim.algorithms.fedmr import FedMR
from fedjax_sim.algorithms.fedper import FedPer
from fedjax_sim.algorithms.fedrep import FedRep
from fedjax_sim.algorithms.independent import FedIndep, Local
from fedjax_sim.algorithms.interpolation import LayerInterpolation
from fedjax_sim.algorithms.lg_fedavg import LGFedAvg
from fedjax_sim.algorithms.lips import LIPS
from fedjax_sim.algorithms.partial import PartialAveraging

CONFIGS: dict[str, type] = {
    "fedavg": FedAvg,
    "fedmr": FedMR,
    "fedindep": FedIndep,
    "local": Local,
    "fedbn": FedBN,
    "fedper": FedPer,
    "fedrep": FedRep,
    "lg_fedavg": LGFedAvg,
    "fedbabu": FedBABU,
    "partial": PartialAveraging,
    "interpolation": LayerInterpolation,
    "lips": LIPS,
}
"""Name -> hyper-parameters, whose `build(context)` makes the record."""


def name_of(config: Any) -> str | None:
    """The name under which an algorithm's configuration is known; None if it is not one."""
    return next((name for name, cls in CONFIGS.items() if type(config) is cls), None)


__all__ = [
    "CONFIGS",
    "LIPS",
    "Algorithm",
    "Batch",
    "Cohort",
    "Context",
    "FedAvg",
    "FedBABU",
    "FedBN",
    "FedIndep",
    "FedMR",
    "FedPer",
    "FedRep",
    "LGFedAvg",
    "LayerInterpolation",
    "Local",
    "LocalRule",
    "PartialAveraging",
    "Results",
    "Starts",
    "name_of",
]
