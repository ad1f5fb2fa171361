"""Layer-wise inertia, reported: profiles over layers, figures and tables."""

from fedjax_sim.reports.inertia.profile import Profile, profile

__all__ = [
    "Profile",
    "profile",
]
