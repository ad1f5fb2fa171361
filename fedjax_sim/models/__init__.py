"""The model zoo in Flax linen, and what is needed to bring one's own network."""

from fedjax_sim.models.adapter import from_flax
from fedjax_sim.models.base import Model, PeelPoint, peel
from fedjax_sim.models.conv import Conv, max_pool
from fedjax_sim.models.zoo import create, names

__all__ = ["Conv", "Model", "PeelPoint", "create", "from_flax", "max_pool", "names", "peel"]
