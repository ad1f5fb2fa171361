"""The table of algorithms: one line a method, in the order of lists and documents.

A configuration's `card` has its name; all other tables of methods are made of this one.
"""

# isort: off
from fedjax_sim.algorithms.fedavg import FedAvg as FedAvg
from fedjax_sim.algorithms.fedopt import FedOpt as FedOpt
from fedjax_sim.algorithms.fedopt import FedAvgM as FedAvgM
from fedjax_sim.algorithms.fedopt import FedAdam as FedAdam
from fedjax_sim.algorithms.fedopt import FedYogi as FedYogi
from fedjax_sim.algorithms.fedmr import FedMR as FedMR
from fedjax_sim.algorithms.independent import FedIndep as FedIndep
from fedjax_sim.algorithms.independent import Local as Local
from fedjax_sim.algorithms.fedbn import FedBN as FedBN
from fedjax_sim.algorithms.fedper import FedPer as FedPer
from fedjax_sim.algorithms.fedrep import FedRep as FedRep
from fedjax_sim.algorithms.lg_fedavg import LGFedAvg as LGFedAvg
from fedjax_sim.algorithms.fedbabu import FedBABU as FedBABU
from fedjax_sim.algorithms.partial import PartialAveraging as PartialAveraging
from fedjax_sim.algorithms.interpolation import LayerInterpolation as LayerInterpolation
from fedjax_sim.algorithms.lips import LIPS as LIPS
from fedjax_sim.algorithms.fedprox import FedProx as FedProx
from fedjax_sim.algorithms.moon import MOON as MOON
from fedjax_sim.algorithms.fedntd import FedNTD as FedNTD
from fedjax_sim.algorithms.feddyn import FedDyn as FedDyn
from fedjax_sim.algorithms.fedsam import FedSAM as FedSAM
from fedjax_sim.algorithms.fedsam import FedASAM as FedASAM
from fedjax_sim.algorithms.pfedsd import PFedSD as PFedSD
from fedjax_sim.algorithms.scaffold import Scaffold as Scaffold
from fedjax_sim.algorithms.fedexp import FedExP as FedExP
from fedjax_sim.algorithms.fednova import FedNova as FedNova
from fedjax_sim.algorithms.fedmut import FedMut as FedMut
from fedjax_sim.algorithms.clusamp import CluSamp as CluSamp
from fedjax_sim.algorithms.fedgen import FedGen as FedGen
from fedjax_sim.algorithms.fedrod import FedRoD as FedRoD
from fedjax_sim.algorithms.fedcac import FedCAC as FedCAC
from fedjax_sim.algorithms.ditto import Ditto as Ditto
# isort: on

from fedjax_sim.algorithms.card import Card as _Card

CONFIGS: dict[str, type] = {
    config.card.name: config
    for config in list(globals().values())
    if isinstance(config, type) and isinstance(getattr(config, "card", None), _Card)
}
"""Name -> hyper-parameters, whose `build(context)` makes the record."""

__all__ = [config.__name__ for config in CONFIGS.values()]  # pyright: ignore[reportUnsupportedDunderAll]
