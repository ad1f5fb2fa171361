"""Layer-peeled analysis: what aggregation does to every layer, measured inside the compiled round."""

from fedjax_sim.peel.analysis import Layers, Measurements, degradation, layers, measurements
from fedjax_sim.peel.cfd import Verdict
from fedjax_sim.peel.peeling import Peeling

__all__ = ["Layers", "Measurements", "Peeling", "Verdict", "degradation", "layers", "measurements"]
