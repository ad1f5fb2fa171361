"""Layer-wise inertia: how far each layer moves in a round, and what a merge gains, for any algorithm."""

from fedjax_sim.inertia.effectiveness import Effectiveness
from fedjax_sim.inertia.movement import Movement
from fedjax_sim.inertia.profile import Profile, profile

__all__ = ["Effectiveness", "Movement", "Profile", "profile"]
