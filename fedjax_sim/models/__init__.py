"""The model zoo in Flax linen, and what is needed to bring one's own network."""

from fedjax_sim.core.model import Model, PeelPoint, peel
from fedjax_sim.models.adapter import adapted, from_flax, name_of
from fedjax_sim.models.kernels.conv import Conv, max_pool
from fedjax_sim.models.zoo import create, names

__all__ = [
    "Conv",
    "Model",
    "PeelPoint",
    "adapted",
    "create",
    "from_flax",
    "max_pool",
    "name_of",
    "names",
    "peel",
]
