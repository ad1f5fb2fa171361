"""One compiled round, and the simulation that repeats it. It knows no diagnostic, no folder and no method."""
