"""Operations on stacked pytrees: every leaf has a leading axis, the client slot, called K here.

Reductions over the slot axis are written as contractions: as multiply-then-sum XLA's CPU backend takes up
to a hundred times longer on some versions.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

AXIS = "clients"
"""Name of the mesh axis over which slots are sharded."""


def broadcast(tree: Any, count: int) -> Any:
    """One model -> [count, …], every slot the same."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape)), tree)


def weighted_sum(tree: Any, weights: jax.Array) -> Any:
    """Sum over slots of weights[k] * leaf[k]. [K, …] leaves, f32[K] -> […] leaves, float32."""
    return jax.tree.map(lambda leaf: jnp.tensordot(weights, leaf.astype(jnp.float32), axes=1), tree)


def mean(tree: Any) -> Any:
    """Uniform mean over slots. [K, …] -> […]."""
    count = jax.tree.leaves(tree)[0].shape[0]
    return weighted_sum(tree, jnp.full((count,), 1.0 / count, jnp.float32))


def select(flags: jax.Array, yes: Any, no: Any) -> Any:
    """Slot by slot: yes[k] where flags[k], else no[k]. bool[K], [K, …], [K, …] -> [K, …]."""
    return jax.tree.map(
        lambda a, b: jnp.where(flags.reshape(flags.shape + (1,) * (a.ndim - flags.ndim)), a, b), yes, no
    )


def permute(leaf: jax.Array, index: jax.Array) -> jax.Array:
    """leaf[index] along the slot axis: out[k] = leaf[index[k]]. [K, …], i32[K'] -> [K', …].

    Sharded over the mesh axis `clients`, a gather with an unknown index would bring all slots to every
    device. So the sharding moves instead: from the slot axis to the parameters and back, two all-to-alls,
    and memory a device stays what its share is.
    """
    devices = _devices()
    count, size = leaf.shape[0], leaf[0].size
    movable = devices > 1 and count % devices == 0 and index.shape[0] % devices == 0 and size % devices == 0
    if not movable:
        return jnp.take(leaf, index, axis=0, mode="clip")
    flat = jax.lax.with_sharding_constraint(leaf.reshape(count, size), P(None, AXIS))
    flat = jnp.take(flat, index, axis=0, mode="clip")
    flat = jax.lax.with_sharding_constraint(flat, P(None, AXIS))
    out = flat.reshape(index.shape[0], *leaf.shape[1:]) if leaf.ndim == 2 else flat
    out = jax.lax.with_sharding_constraint(out, P(AXIS))
    return out.reshape(index.shape[0], *leaf.shape[1:])


def squared_norms(tree: Any) -> jax.Array:
    """Squared L2 norm of each slot's model over all leaves. [K, …] -> f32[K]."""
    return jnp.stack([_dots(leaf, leaf) for leaf in jax.tree.leaves(tree)]).sum(0)


def gram(leaves: list[jax.Array]) -> jax.Array:
    """Inner products between slots, summed over `leaves`. [K, …] each -> f32[K, K]."""
    total = jnp.float32(0)
    for leaf in leaves:
        flat = leaf.reshape(leaf.shape[0], -1).astype(jnp.float32)
        total = total + jnp.matmul(flat, flat.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.asarray(total)


def pairwise_cosine(leaves: list[jax.Array]) -> jax.Array:
    """Mean cosine over pairs of different slots, `leaves` taken together as one vector. -> f32[].

    1 for a single slot, and for slots that are all zero.
    """
    products = gram(leaves)
    count = products.shape[0]
    if count == 1:
        return jnp.float32(1)
    norms = jnp.sqrt(jnp.diagonal(products))
    scale = norms[:, None] * norms[None, :]
    cosine = jnp.where(scale > 0, products / jnp.where(scale > 0, scale, 1), jnp.float32(1))
    return (cosine.sum() - jnp.trace(cosine)) / (count * (count - 1))


def dispersion(tree: Any) -> jax.Array:
    """D = sum over slots of ‖w_k − w̄‖², all leaves. [K, …] -> f32[]."""
    center = mean(tree)
    return squared_norms(jax.tree.map(lambda leaf, c: leaf - c[None], tree, center)).sum()


def _dots(a: jax.Array, b: jax.Array) -> jax.Array:
    a, b = (x.reshape(x.shape[0], -1).astype(jnp.float32) for x in (a, b))
    return jnp.einsum("kp,kp->k", a, b)


def _devices() -> int:
    mesh = jax.sharding.get_abstract_mesh()
    return dict(mesh.shape).get(AXIS, 1) if not mesh.empty else 1
