"""Layer-peeled analysis, reported: what aggregation did to every layer."""

from fedjax_sim.reports.peel.analysis import Layers, Measurements, degradation, layers, measurements
from fedjax_sim.reports.peel.cfd import Verdict

__all__ = [
    "Layers",
    "Measurements",
    "Verdict",
    "degradation",
    "layers",
    "measurements",
]
