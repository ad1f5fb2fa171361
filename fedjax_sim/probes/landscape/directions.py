"""Random directions in which models of different scale can be compared.

Filter normalisation: Li, Xu, Taylor, Studer and Goldstein, "Visualizing the Loss Landscape of Neural Nets",
NeurIPS 2018, https://arxiv.org/abs/1712.09913.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_sim.core.rng import key_for, settled
from fedjax_sim.core.stacked import averages


def filter_normalised(key: jax.Array, variables: Any) -> Any:
    """A Gaussian direction, each of whose filters is scaled to the norm of the model's own: ‖d_f‖ = ‖w_f‖.

    A filter is what makes one output of a weight layer: kernel[..., f] of a convolution and of a dense layer.
    Biases, parameters of normalisation and batch statistics get 0, as do all leaves with fewer than two axes
    (FOUND in the authors' code, `create_random_direction` with its default ignore="biasbn"). A leaf with
    several axes that is no kernel, such as learned positions, counts as one filter (OUR CHOICE).

    Args:
      key: key[], typed; models of the same shapes get the same Gaussian for the same key.
      variables: one model.

    Returns:
      A tree like `variables`, float32.
    """
    with settled():
        scaled = _drawn(key, variables["params"])
    return {name: scaled if name == "params" else zeros_like(part) for name, part in variables.items()}


@jax.jit
def _drawn(key, params):
    leaves, structure = jax.tree.flatten(params)
    drawn = [jax.random.normal(key_for(key, n), leaf.shape, jnp.float32) for n, leaf in enumerate(leaves)]
    direction = structure.unflatten(drawn)
    wanted, own = (filter_norms({"params": tree}) for tree in (params, direction))
    scale = jax.tree.map(lambda to, norm: jnp.where(norm > 0, to / norm, 0), wanted, own)
    return jax.tree.map(jnp.multiply, direction, scale)


def filter_norms(variables: Any) -> Any:
    """‖w_f‖ of the filter that each parameter belongs to, and 0 for leaves with fewer than two axes.

    A tree like variables["params"], leaves of the same shapes.
    """
    return jax.tree_util.tree_map_with_path(_norms, variables["params"])


def _norms(path: Any, leaf: jax.Array) -> jax.Array:
    if jnp.ndim(leaf) < 2:
        return jnp.zeros(jnp.shape(leaf), jnp.float32)
    kernel = getattr(path[-1], "key", None) == "kernel"
    axes = tuple(range(jnp.ndim(leaf) - 1 if kernel else jnp.ndim(leaf)))
    squares = jnp.square(jnp.asarray(leaf, jnp.float32)).sum(axes, keepdims=True)
    return jnp.broadcast_to(jnp.sqrt(squares), jnp.shape(leaf))


def zeros_like(tree: Any) -> Any:
    """The same tree of zeros."""
    return jax.tree.map(jnp.zeros_like, tree)


def stack(*trees: Any) -> Any:
    """Trees -> one tree with leaves [d, …]."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def difference(to: Any, origin: Any) -> Any:
    """The direction from one model to another, batch statistics included; 0 of leaves that are no floats."""

    def one(a, b):
        return jnp.asarray(a) - jnp.asarray(b) if averages(b) else jnp.zeros_like(b)

    return jax.tree.map(one, to, origin)
