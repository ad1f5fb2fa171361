"""Controls: models that are measured in the place of the merged one, to tell what its changes are due to.

    perturbed          the client's own model plus noise whose norm, leaf by leaf, is that of its change by
                       the merge: what any perturbation of that size does. Its statistics stay the client's.
    reestimated        the merged model, batch statistics estimated anew on the client's own samples: what
                       the merge does to the weights alone.
    local_statistics   the merged model with the client's own batch statistics, as the DualFed code keeps
                       them (FOUND there); the merged model itself has those that the algorithm merged.

The matched perturbation answers a reviewer of the layer-peeled paper who found nothing federated about the
effect; all three are OUR CHOICE. Each costs as much again as `after`; `reestimated` one more forward pass
over the samples that probes are fitted to.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_sim.config import PeelConfig
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.model import Model
from fedjax_sim.core.stacked import averages
from fedjax_sim.probes.peel.forward import Forward

STATISTICS = "batch_stats"


def check_controls(config: PeelConfig, model: Model) -> None:
    """Raises UserError for a control of batch statistics on a model without any."""
    has = any(path[0] == STATISTICS for path in model.layer_order())
    wanted = [name for name in config.controls if name != "perturbed"]
    if wanted and not has:
        raise UserError(
            "peel.controls",
            ", ".join(config.controls),
            f"{model.name} has no batch statistics for {wanted[0]}",
            "Leave it out, or set model.norm to batch.",
        )


def make(name: str, forward: Forward, before: Any, after: Any, fit: Any, key: jax.Array) -> Any:
    """One control of one client.

    Args:
      name: see the module.
      forward: the model on samples.
      before: variables of the client's own model.
      after: of what it holds once merged.
      fit: (samples, pool) as `Forward.over` takes them, for `reestimated`.
      key: key[], of the client and round.
    """
    if name == "perturbed":
        return perturbed(before, after, key)
    if name == "reestimated":
        chosen, pool = fit
        return reestimated(forward, after, chosen, pool, key)
    return {**after, STATISTICS: before[STATISTICS]}


def perturbed(before: Any, after: Any, key: jax.Array) -> Any:
    """`before` with each leaf of `params` moved by ‖after - before‖ of that leaf in a Gaussian direction.

    Args:
      before: variables of the client's own model.
      after: of what it holds once merged.
      key: key[], of the client and round.
    """
    old, structure = jax.tree.flatten(before["params"])
    new = jax.tree.leaves(after["params"])

    def one(number, a, b):
        noise = jax.random.normal(jax.random.fold_in(key, number), a.shape, a.dtype)
        size, wanted = (jnp.sqrt((v * v).sum()) for v in (noise, b - a))
        return a + noise * (wanted / jnp.maximum(size, jnp.finfo(a.dtype).tiny))

    moved = [one(number, *pair) for number, pair in enumerate(zip(old, new, strict=True))]
    return {**before, "params": jax.tree.unflatten(structure, moved)}


def reestimated(forward: Forward, model: Any, chosen: Any, pool: Any, key: jax.Array) -> Any:
    """`model` with the mean statistics of the batches of `chosen`, each weighing by its samples.

    A layer moves its running statistics to (1 - rate) · old + rate · batch. From old = 0 that is
    rate · batch; how far old = 1 moves on the same batch says the rate, so nothing has to be known of the
    layer. What is no float, such as a count of batches, stays as it is.

    Args:
      forward: the model on samples.
      model: its variables.
      chosen: index i32[s], whole batches of it; count i32[].
      pool: samples that the index counts in, [n, …].
      key: key[], for dropout.
    """

    def moved(level, images, mask):
        statistics = jax.tree.map(lambda leaf: jnp.full_like(leaf, level), model[STATISTICS])
        variables = {**model, STATISTICS: statistics}
        return forward.model.apply(variables, images, train=True, mask=mask, rng=key)[1][STATISTICS]

    def measure(images, labels, mask):
        del labels
        count = mask.sum().astype(jnp.float32)
        return count, jax.tree.map(
            lambda leaf: count * leaf.astype(jnp.float32) if averages(leaf) else leaf,
            moved(0.0, images, mask),
        )

    count, total = forward.over(chosen, pool, measure, lambda a, b: jax.tree.map(jnp.add, a, b))
    images = jnp.zeros((2, *forward.model.input_shape), jnp.float32)
    both = jnp.ones((2,), bool)
    keeps = jax.tree.map(
        lambda one, none: one - none if averages(one) else none,
        moved(1.0, images, both),
        moved(0.0, images, both),
    )

    def new(total, keep, old):
        if not averages(old):
            return old
        found = total / (jnp.maximum(count, 1) * (1 - keep.astype(jnp.float32)))
        return jnp.where(count > 0, found.astype(old.dtype), old)

    return {
        **model,
        STATISTICS: jax.tree.map(new, total, keeps, model[STATISTICS]),
    }
