"""Layer-peeled analysis: what aggregation does to every layer, measured inside the compiled round."""

from fedjax_sim.peel.peeling import Peeling

__all__ = ["Peeling"]
