"""Sharpness: how much the loss rises in a ball around the model, at worst and on average.

Worst case after Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization", ICLR
2021, https://arxiv.org/abs/2010.01412 (their first order is the first step here); average case and relative
balls after Andriushchenko et al., "A Modern Look at the Relationship between Sharpness and Generalization",
ICML 2023, https://arxiv.org/abs/2302.07011.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from fedjax_sim.core import fields
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.rng import key_for, settled
from fedjax_sim.probes.landscape.directions import filter_norms, stack, zeros_like
from fedjax_sim.probes.landscape.objective import Objective

Scale = Literal["absolute", "relative", "filter"]


@dataclasses.dataclass(frozen=True, eq=False)
class Sharpness:
    """Rise of the loss, L(w + δ) − L(w).

    Attributes:
      worst: the largest that was found in the ball; a lower bound of the true one, and at least 0.
      average: mean over random δ on its surface.
      average_error: standard error of that mean.
    """

    worst: float
    average: float
    average_error: float


def sharpness(
    objective: Objective,
    variables: Any,
    key: jax.Array,
    *,
    rho: float = 0.05,
    scale: Scale = "absolute",
    steps: int = 20,
    starts: int = 2,
    draws: int = 20,
) -> Sharpness:
    """Worst-case and average sharpness in a ball of radius ρ around the parameters.

    The ball is {T ν : ‖ν‖ ≤ ρ}: `absolute`, T = 1; `relative`, T = ‖w‖, so that ρ is a share of the norm of
    all parameters; `filter`, T of a parameter is the norm of its filter, so that ρ² is the sum over filters
    of (‖δ_f‖ / ‖w_f‖)², and leaves without filters stay (see `filter_normalised`).

    Worst: projected gradient ascent in ν with steps of length ρ along the normalised gradient, first from the
    model itself and then from random points on the surface; the largest loss on the way. Average: Gaussian ν
    scaled to length ρ, each with its opposite, in whose mean the slope at w drops out. Only the parameters
    move; batch statistics stay.

    Args:
      objective: what is evaluated.
      variables: one model, w.
      key: key[], typed; of the random points.
      rho: ρ.
      scale: absolute, relative or filter.
      steps: of each ascent.
      starts: how many ascents, the one from the model included.
      draws: random pairs ±ν.

    Raises:
      UserError: a number out of range, or an unknown scale.
    """
    fields.positive("rho", rho)
    fields.coerce(scale, Scale, "scale")
    for name, value, least in (("ascent", steps, 1), ("starts", starts, 1), ("draws", draws, 2)):
        fields.at_least(name, value, least)
    flat, tree = ravel_pytree(variables["params"])
    stretch = _stretch(variables, np.asarray(flat, np.float64), scale)

    def on_surface(number: int) -> np.ndarray:
        with settled():
            drawn = jax.random.normal(key_for(key, number), flat.shape, jnp.float32)
        drawn = np.array(drawn, np.float64)
        drawn[stretch == 0] = 0
        return rho * drawn / np.linalg.norm(drawn)

    here = float(objective.gradient(variables)[0])
    worst = here
    for number in range(starts):
        point = on_surface(number) if number else np.zeros(len(stretch))
        worst = max(worst, _ascent(objective, variables, stretch, point, rho, steps))
    still = {name: zeros_like(part) for name, part in variables.items()}
    rises = []
    for number in range(draws):
        moved = tree(jnp.asarray(stretch * on_surface(starts + number), flat.dtype))
        found = objective.values(variables, stack({**still, "params": moved}), np.asarray([[-1.0], [1.0]]))
        rises.append(found.loss.mean() - here)
    error = np.std(rises, ddof=1) / np.sqrt(draws)
    return Sharpness(worst - here, float(np.mean(rises)), float(error))


def _ascent(
    objective: Objective, variables: Any, stretch: np.ndarray, point: np.ndarray, rho: float, steps: int
) -> float:
    """The largest loss on the way up from a point ν, f64[P], of the ball."""
    best = -np.inf
    for step in range(steps + 1):
        loss, gradient = objective.gradient(variables, stretch * point)
        best = max(best, loss) if np.isfinite(loss) else np.inf
        slope = stretch * gradient
        length = np.linalg.norm(slope)
        if step == steps or not np.isfinite(length) or length == 0:
            break
        point = point + rho * slope / length
        point = point * min(1.0, rho / np.linalg.norm(point))
    return best


def _stretch(variables: Any, flat: np.ndarray, scale: Scale) -> np.ndarray:
    """The diagonal of T, f64[P]."""
    if scale == "absolute":
        return np.ones(len(flat))
    if scale == "relative":
        stretch = np.full(len(flat), np.linalg.norm(flat))
    else:
        stretch = np.asarray(ravel_pytree(filter_norms(variables))[0], np.float64)
    if not stretch.any():
        raise UserError("scale", scale, "the model has no weights other than 0", "Choose absolute.")
    return stretch
