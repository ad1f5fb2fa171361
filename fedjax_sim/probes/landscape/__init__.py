"""Loss landscapes: how flat the minimum is that a run has found, and whether clients' models share a basin.

    from fedjax_sim import landscape

    loss = landscape.Objective(model, images, labels)
    direction = landscape.filter_normalised(jax.random.key(0), variables)
    landscape.line(loss, variables, direction, np.linspace(-1, 1, 41)).loss
    landscape.spectrum(loss, variables, jax.random.key(1)).eigenvalues

`fedjax_sim.reports.landscape.report.draw` does all of it for finished runs.
"""

from fedjax_sim.probes.landscape.curvature import Spectrum, spectrum
from fedjax_sim.probes.landscape.directions import filter_normalised
from fedjax_sim.probes.landscape.objective import CrossEntropy, Objective, Values
from fedjax_sim.probes.landscape.sharpness import Sharpness, sharpness
from fedjax_sim.probes.landscape.surfaces import Barrier, Curve, Plane, Surface, barrier, line, plane, surface

__all__ = [
    "Barrier",
    "CrossEntropy",
    "Curve",
    "Objective",
    "Plane",
    "Sharpness",
    "Spectrum",
    "Surface",
    "Values",
    "barrier",
    "filter_normalised",
    "line",
    "plane",
    "sharpness",
    "spectrum",
    "surface",
]
