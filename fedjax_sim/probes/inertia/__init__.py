"""Layer-wise inertia: how far each layer moves in a round, and what a merge gains, for any algorithm."""
