"""FedCAC: the weights that matter to a client come from those to whom the same weights matter.

Wu, Liu, Niu, Zhu, Tang. Bold but Cautious: Unlocking the Potential of Personalized Federated Learning through
Cautiously Aggressive Collaboration. ICCV 2023. https://arxiv.org/abs/2309.11103

After training, entry by entry, a client's sensitivity is |Δw · w|; of every tensor its ⌊τ n⌋ most sensitive
entries are critical, m_i. With o_ij the share of critical entries that i and j have in common,

    C_i = {j : o_ij ≥ ō + (r/β) (max o − ō)}         ō, max: over pairs i ≠ j of round r, from 1
    w_i ← m_i ⊙ mean_{C_i ∪ {i}}(w_j) + (1 − m_i) ⊙ mean_S(w_j)

so that ever fewer share: in round β only the most alike, after it nobody. Batch statistics stay with their
client.

FOUND in the code that LIPS builds on: all of this, and τ = 0.5, β = 100 on CIFAR-10, 0.4 and 170 on
CIFAR-100, 40 clients, all in every round. OUR CHOICE: exactly ⌊τ n⌋ entries are critical, where the code
takes all ties, and fewer if sensitivities vanish; after round β nobody shares although all overlaps be equal,
where the code goes on. With partial participation only the cohort's models are mixed, and the others keep
theirs; a client whose update was left out keeps its own and lends nothing. The deployed model is the mean
over the cohort S, batch statistics included.

One model a client is kept, and a cohort's models are held at once.
"""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import struct

from fedjax_sim.algorithms.card import Card
from fedjax_sim.algorithms.shared import mean_of_included, weighing
from fedjax_sim.core import stacked
from fedjax_sim.core.algorithm import Algorithm, Context, Starts
from fedjax_sim.core.fields import at_least, check, within
from fedjax_sim.core.top_k import top_k_mask


@struct.dataclass
class FedCACState:
    """Attributes: mean: of the last cohort's models. models: every client's own, [N, …]."""

    mean: Any
    models: Any


@dataclasses.dataclass(frozen=True)
class FedCAC:
    """Collaboration on critical parameters.

    Attributes:
      critical: τ, share of critical entries; 0 is FedAvg, but for batch statistics.
      until: β, the last round in which clients share critical entries.
      weights: of the cohort's mean, by `samples` or `uniform`; collaborators count equally.
    """

    card: ClassVar[Card] = Card(
        "fedcac",
        keeps="1 model",
        besides="K masks and their overlaps on the server",
        defaults="code LIPS builds on, CIFAR-10",
        holds="τ = 0 is FedAvg but for batch statistics; after β nobody shares",
    )

    critical: float = 0.5
    until: int = 100
    weights: Literal["samples", "uniform"] = "samples"

    def __post_init__(self):
        check(self, "algorithm.")
        within("algorithm.critical", self.critical, 0.0, 1.0)
        at_least("algorithm.until", self.until, 1)

    def build(self, context: Context) -> Algorithm:
        """The record of pure functions."""
        weights = weighing(self.weights)

        def merge(state, cohort, starts, results, key):
            del key
            mean = mean_of_included(results, weights(cohort), state.mean)
            start, trained = starts.models["params"], results.models["params"]
            masks = jax.tree.map(self._critical, start, trained)
            sharing = self._collaborators(masks, results.included, cohort.round + 1)
            share = sharing / sharing.sum(1, keepdims=True)

            def mixed(mask, w, mean):
                together = jnp.tensordot(share, w, 1, precision=jax.lax.Precision.HIGHEST)
                return jnp.where(mask, together, mean[None])

            params = jax.tree.map(mixed, masks, trained, mean["params"])
            models = {**results.models, "params": params}
            # Who was left out keeps what it had.
            models = stacked.where_slot(results.included, models, starts.models)
            metrics = {"collaborators": (sharing.sum(1) - 1).mean()}
            return FedCACState(mean, stacked.put_rows(state.models, cohort.ids, models)), metrics

        def of(state, ids):
            return stacked.take_rows(state.models, ids)

        return Algorithm(
            init=lambda key, variables: FedCACState(
                variables, stacked.broadcast(variables, context.num_clients)
            ),
            dispatch=lambda state, cohort, key: Starts(of(state, cohort.ids), shared=False),
            merge=merge,
            deploy=lambda state: state.mean,
            weights=weights,
            stacked=("models",),
            by_client=("models",),
            personal_models=of,
        )

    def _critical(self, start: jax.Array, trained: jax.Array) -> jax.Array:
        """M of a tensor of all clients. [K, …] twice -> bool[K, …]."""
        count = jnp.int32(int(self.critical * start[0].size))
        score = jnp.abs((trained - start) * trained).reshape(len(start), -1)
        # One after another: the search stays in the cache with one tensor, and not with K.
        return jax.lax.map(lambda row: top_k_mask(row, count), score).reshape(start.shape)

    def _collaborators(self, masks: Any, included: jax.Array, number: jax.Array) -> jax.Array:
        """Who takes from whom, with themselves. -> f32[K, K], of 0 and 1; a row is a client."""
        flat = [mask.reshape(len(mask), -1).astype(jnp.float32) for mask in jax.tree.leaves(masks)]
        shared = [jnp.matmul(mask, mask.T, precision=jax.lax.Precision.HIGHEST) for mask in flat]
        common = jnp.stack(shared).sum(0)
        critical = sum(int(self.critical * mask.shape[1]) for mask in flat)
        overlap = common / max(critical, 1)
        slots = len(included)
        both = included[:, None] & included[None, :] & ~jnp.eye(slots, dtype=bool)
        pairs = both.sum().astype(jnp.float32)
        average = jnp.where(both, overlap, 0).sum() / jnp.maximum(pairs, 1)
        most = jnp.where(both, overlap, -jnp.inf).max(initial=0)
        reach = number.astype(jnp.float32) / self.until
        # Rounding must not lift the threshold above the most alike.
        threshold = jnp.minimum(average + reach * (most - average), most)
        shared = both & (overlap >= threshold) & (number <= self.until)
        return (shared | jnp.eye(slots, dtype=bool)).astype(jnp.float32)
