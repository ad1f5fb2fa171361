"""Algorithms: one short file each, and the table of their names."""

import dataclasses
from typing import Any

from fedjax_sim.algorithms.clusamp import CluSamp
from fedjax_sim.algorithms.ditto import Ditto
from fedjax_sim.algorithms.fedavg import FedAvg
from fedjax_sim.algorithms.fedbabu import FedBABU
from fedjax_sim.algorithms.fedbn import FedBN
from fedjax_sim.algorithms.fedcac import FedCAC
from fedjax_sim.algorithms.feddyn import FedDyn
from fedjax_sim.algorithms.fedexp import FedExP
from fedjax_sim.algorithms.fedgen import FedGen
from fedjax_sim.algorithms.fedmr import FedMR
from fedjax_sim.algorithms.fedmut import FedMut
from fedjax_sim.algorithms.fednova import FedNova
from fedjax_sim.algorithms.fedntd import FedNTD
from fedjax_sim.algorithms.fedopt import FedAdam, FedAvgM, FedOpt, FedYogi
from fedjax_sim.algorithms.fedper import FedPer
from fedjax_sim.algorithms.fedprox import FedProx
from fedjax_sim.algorithms.fedrep import FedRep
from fedjax_sim.algorithms.fedrod import FedRoD
from fedjax_sim.algorithms.fedsam import FedASAM, FedSAM
from fedjax_sim.algorithms.independent import FedIndep, Local
from fedjax_sim.algorithms.interpolation import LayerInterpolation
from fedjax_sim.algorithms.lg_fedavg import LGFedAvg
from fedjax_sim.algorithms.lips import LIPS
from fedjax_sim.algorithms.moon import MOON
from fedjax_sim.algorithms.partial import PartialAveraging
from fedjax_sim.algorithms.pfedsd import PFedSD
from fedjax_sim.algorithms.scaffold import Scaffold
from fedjax_sim.algorithms.shared import nested
from fedjax_sim.core.algorithm import Algorithm, AlgorithmConfig, Cohort, Context, LocalRule, Results, Starts
from fedjax_sim.core.plugins import Names, written
from fedjax_sim.core.task import Batch

CONFIGS: dict[str, type] = {
    "fedavg": FedAvg,
    "fedopt": FedOpt,
    "fedavgm": FedAvgM,
    "fedadam": FedAdam,
    "fedyogi": FedYogi,
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
    "fedprox": FedProx,
    "moon": MOON,
    "fedntd": FedNTD,
    "feddyn": FedDyn,
    "fedsam": FedSAM,
    "fedasam": FedASAM,
    "pfedsd": PFedSD,
    "scaffold": Scaffold,
    "fedexp": FedExP,
    "fednova": FedNova,
    "fedmut": FedMut,
    "clusamp": CluSamp,
    "fedgen": FedGen,
    "fedrod": FedRoD,
    "fedcac": FedCAC,
    "ditto": Ditto,
}
"""Name -> hyper-parameters, whose `build(context)` makes the record."""


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


__all__ = [
    "CONFIGS",
    "LIPS",
    "MOON",
    "Algorithm",
    "Batch",
    "CluSamp",
    "Cohort",
    "Context",
    "Ditto",
    "FedASAM",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedBABU",
    "FedBN",
    "FedCAC",
    "FedDyn",
    "FedExP",
    "FedGen",
    "FedIndep",
    "FedMR",
    "FedMut",
    "FedNTD",
    "FedNova",
    "FedOpt",
    "FedPer",
    "FedProx",
    "FedRep",
    "FedRoD",
    "FedSAM",
    "FedYogi",
    "LGFedAvg",
    "LayerInterpolation",
    "Local",
    "LocalRule",
    "PFedSD",
    "PartialAveraging",
    "Results",
    "Scaffold",
    "Starts",
    "name_of",
    "named",
]
