"""Eigenvalues and trace of the Hessian of the loss by the parameters, from products with vectors alone."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sim.core.errors import UserError
from fedjax_sim.core.rng import key_for, settled
from fedjax_sim.probes.landscape.objective import Objective, size


@dataclasses.dataclass(frozen=True, eq=False)
class Spectrum:
    """What is known of a Hessian.

    Attributes:
      eigenvalues: f64[k], the largest, descending.
      residuals: f64[k], ‖H v − λ v‖ of each and its vector of length 1, by one more product: an eigenvalue
        lies within that of it, but for the rounding of the product itself (float32).
      least: the smallest (most negative) eigenvalue found.
      trace: estimate.
      trace_error: its standard error over probes.
    """

    eigenvalues: np.ndarray
    residuals: np.ndarray
    least: float
    trace: float
    trace_error: float


def spectrum(
    objective: Objective, variables: Any, key: jax.Array, *, k: int = 3, steps: int = 20, probes: int = 10
) -> Spectrum:
    """Largest eigenvalues by Lanczos' method, trace by Hutchinson's.

    The Hessian is that of the mean loss over the objective's samples, by variables["params"] only; of a
    model, in evaluation mode (batch norm with its running statistics). Lanczos orthogonalises every vector
    twice against all before it. Hutchinson's probes are random signs v, of which vᵀHv has the trace as its
    mean (Hutchinson, "A Stochastic Estimator of the Trace of the Influence Matrix for Laplacian Smoothing
    Splines", 1990). Host memory: 4 · steps + 16 · k bytes a parameter.

    Args:
      objective: what is differentiated.
      variables: one model.
      key: key[], typed; of the first vector and of the probes.
      k: how many eigenvalues.
      steps: of Lanczos; more than there are parameters are not taken.
      probes: of Hutchinson.

    Raises:
      UserError: k or probes out of range, or a Hessian that is not finite.
    """
    length = size(variables)
    steps = min(steps, length)
    if not 1 <= k <= steps:
        why = f"{steps} steps find 1 to {steps} eigenvalues"
        raise UserError("eigenvalues", k, why, "Ask for fewer, or take more Lanczos steps.")
    if probes < 2:
        raise UserError("probes", probes, "must be at least 2", "A standard error needs two.")

    def product(vector: np.ndarray) -> np.ndarray:
        out = objective.hessian_product(variables, vector)
        if not np.isfinite(out).all():
            why = "the Hessian is not finite at this model"
            raise UserError("variables", "…", why, "Its run may have diverged.")
        return out

    def start(number: int) -> np.ndarray:
        with settled():
            drawn = jax.random.normal(key_for(key, 0, number), (length,), jnp.float32)
        return np.asarray(drawn, np.float64)

    def sign(probe: int) -> np.ndarray:
        with settled():
            drawn = jax.random.rademacher(key_for(key, 1, probe), (length,), jnp.float32)
        return np.asarray(drawn)

    values, vectors = lanczos(product, length, steps, start, k)
    residuals = [
        np.linalg.norm(product(vector) - value * vector)
        for value, vector in zip(values, vectors, strict=False)
    ]
    signs = map(sign, range(probes))
    quadratic = np.asarray([sign.astype(np.float64) @ product(sign) for sign in signs])
    return Spectrum(
        values[:k],
        np.asarray(residuals),
        float(values[-1]),
        float(quadratic.mean()),
        float(quadratic.std(ddof=1) / np.sqrt(probes)),
    )


def lanczos(
    product: Callable[[np.ndarray], np.ndarray],
    length: int,
    steps: int,
    start: Callable[[int], np.ndarray],
    k: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Ritz values of a symmetric matrix, and vectors, by Lanczos with full re-orthogonalisation.

    Where the Krylov space is exhausted it goes on from a new vector at right angles to it, so that `length`
    steps find every eigenvalue as often as it occurs.

    Args:
      product: f64[P] -> f64[P], by the matrix.
      length: P.
      steps: m ≤ P.
      start: number -> a random vector f64[P].
      k: vectors that are wanted, at most m.

    Returns:
      (values f64[m], descending; vectors of the first k f64[k, P], of length 1).
    """
    basis = np.empty((steps, length), np.float32)
    diagonal, beside = np.zeros(steps), np.zeros(steps)
    starts = 1
    vector = start(0)
    vector /= np.linalg.norm(vector)
    for step in range(steps):
        basis[step] = vector
        moved = product(vector)
        diagonal[step] = vector @ moved
        scale = np.linalg.norm(moved)
        moved = _outside(moved, basis[: step + 1])
        beside[step] = np.linalg.norm(moved)
        if step + 1 == steps:
            break
        if beside[step] <= 1e-6 * max(scale, np.abs(diagonal[: step + 1]).max()):
            beside[step] = 0.0
            moved, starts = _outside(start(starts), basis[: step + 1]), starts + 1
        vector = moved / np.linalg.norm(moved)
    small = np.diag(diagonal) + np.diag(beside[:-1], 1) + np.diag(beside[:-1], -1)
    values, inside = np.linalg.eigh(small)
    vectors = np.zeros((k, length))
    for row, parts in zip(basis, inside[:, ::-1][:, :k], strict=True):
        vectors += np.outer(parts, row)
    return values[::-1], vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _outside(vector: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """What of a vector is at right angles to the rows of `basis`. f64[P], f32[m, P] -> f64[P]."""
    for _ in range(2):
        for row in basis:
            row = row.astype(np.float64)
            vector = vector - (row @ vector) * row
    return vector
