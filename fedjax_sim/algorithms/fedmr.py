"""FedMR: the server recombines the uploaded models layer by layer instead of averaging them.

Hu, Yue, Xie, Chen, Huang, Wei, Lian, Liu, Chen. Is Aggregation the Only Choice? Federated Learning via
Layer-wise Model Recombination. KDD 2024. https://doi.org/10.1145/3637528.3671722

K model slots live on the server. In each round slot k goes to the k-th client of a fresh cohort, which
trains it; then, for every layer ℓ, a fresh random permutation π_ℓ of the slots:

    slots[k].ℓ  <-  trained[π_ℓ(k)].ℓ

Before round R0 (`first_stage`) all slots become the uniform mean instead. What is deployed is always the
uniform mean of the trained models, which recombination does not change (Lemma 4.4). A client that was left
out has no part in a mean of the first stage; later its slot is recombined as it was.

Facts and choices. FOUND in the authors' code: the unit is one tensor (kernel and bias of a layer move
apart; batch-norm scale, shift and statistics too), identity permutations are allowed, the mean is
uniform, the stage switch is hard, R0 = 0 by default and 50 or 100 for VGG. FOUND in a review: the paper
speaks of layers, so `module` is offered too. The partition option follows the code's walk over the tensors
in network order: a new permutation whenever the running index reaches p·n·c, c permutations drawn so far;
the code's n tensors include batch normalisation's counters of batches, which there are none of here.
Not available here: the paper's text, so none of its numbers.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, cast

import jax
import jax.numpy as jnp
from flax import struct, traverse_util

from fedjax_sim.algorithms import shared
from fedjax_sim.algorithms.card import Card
from fedjax_sim.core import stacked
from fedjax_sim.core.algorithm import Algorithm, Context, Starts
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.fields import check

Path = tuple[str, ...]


@struct.dataclass
class FedMRState:
    """Attributes: slots: the K recombined models, [K, …]. mean: uniform mean of the trained ones."""

    slots: Any
    mean: Any


@dataclasses.dataclass(frozen=True)
class FedMR:
    """Layer-wise model recombination.

    Attributes:
      granularity: what moves as one: a `tensor` (the code), a `module` (the paper's layer), one of the
        contiguous `block`s that `partition` gives, or the whole `model` (slots only swap places).
      partition: p in (0, 1], for `block`: 0.25 gives four contiguous blocks in network order.
      first_stage: R0, rounds of plain averaging at the start.
      batch_stats: running statistics move `apart` (the code; each its own permutation), or `tied` to
        their module (with `tensor`: to the module's scale and shift, which then move together too).
      similarity: record the mean cosine between the trained slots each round.
      similarity_group: consecutive tensors that count as one vector there (the code's 5).
    """

    card: ClassVar[Card] = Card(
        "fedmr",
        besides="K models on the server",
        defaults="code of FedMR",
        holds="recombination keeps mean and dispersion; first stage ≥ rounds is uniform FedAvg",
    )

    granularity: Literal["tensor", "module", "block", "model"] = "tensor"
    partition: float = 0.25
    first_stage: int = 0
    batch_stats: Literal["apart", "tied"] = "apart"
    similarity: bool = True
    similarity_group: int = 5

    def __post_init__(self):
        check(self, "algorithm.")
        if not 0 < self.partition <= 1:
            raise UserError(
                "algorithm.partition", self.partition, "lies outside (0, 1]", "0.25 gives four blocks."
            )
        if self.partition != 0.25 and self.granularity != "block":
            why = f"algorithm.granularity is {self.granularity}, which has no use for it"
            raise UserError("algorithm.partition", self.partition, why, "Set algorithm.granularity to block.")
        if self.first_stage < 0:
            raise UserError("algorithm.first_stage", self.first_stage, "is negative", "Give 0 or more.")
        if self.similarity_group < 1:
            raise UserError("algorithm.similarity_group", self.similarity_group, "is below 1", "Give 5.")

    def build(self, context: Context) -> Algorithm:
        """The record of pure functions."""
        slots = context.cohort_size
        order = context.model.layer_order()
        groups = group_of(order, self.granularity, self.partition, self.batch_stats)

        def init(key, variables):
            del key
            return FedMRState(stacked.broadcast(variables, slots), variables)

        def dispatch(state, cohort, key):
            del cohort, key
            return Starts(state.slots, shared=False)

        def merge(state, cohort, starts, results, key):
            del starts
            metrics, draws = {}, permutations(groups, slots, key)
            if self.similarity:
                cosine = similarity(results.models, order, self.similarity_group)
                metrics["slot_similarity"] = cosine
                # Adds nothing, as no cosine is above 2; but so the slots are measured before they are dealt
                # out, which can then happen in place.
                draws = draws + (cosine > 2).astype(jnp.int32)
            new = recombine(results.models, groups, draws)
            mean = results.mean
            if self.first_stage:
                average = cohort.round < self.first_stage
                of_included = shared.mean_of_included(results, shared.uniform(cohort), state.mean)
                mean = jax.tree.map(lambda one, other: jnp.where(average, one, other), of_included, mean)
                new = stacked.overwrite(new, mean, average)
            return FedMRState(new, mean), metrics

        return Algorithm(
            init=init,
            dispatch=dispatch,
            merge=merge,
            deploy=lambda state: state.mean,
            weights=shared.uniform,
            stacked=("slots",),
            slot_models=lambda state, slots, ids: stacked.take_rows(state.slots, slots),
        )


def group_of(
    order: Sequence[Path], granularity: str, partition: float = 0.25, batch_stats: str = "apart"
) -> dict[Path, int]:
    """Which permutation moves which leaf: path -> group number, from 0 in network order.

    Args:
      order: paths of all leaves in network order, collection first (`Model.layer_order()`).
      granularity: tensor, module, block or model.
      partition: p of `block`.
      batch_stats: apart or tied, see `FedMR`.
    """
    walk = _network_order(order)
    statistics = {path[1:-1] for path in order if path[0] != "params"}
    labels: dict[Path, Any] = {}
    blocks = 0
    for index, path in enumerate(walk):
        is_state = path[0] != "params"
        if granularity == "model":
            labels[path] = ()
        elif granularity == "block":
            if index >= partition * len(walk) * blocks:
                blocks += 1
            labels[path] = blocks
        elif batch_stats == "tied" and path[1:-1] in statistics:
            labels[path] = path[1:-1]
        elif is_state or granularity == "tensor":
            labels[path] = path
        else:
            labels[path] = path[1:-1]
    numbers = {label: number for number, label in enumerate(dict.fromkeys(labels.values()))}
    return {path: numbers[label] for path, label in labels.items()}


def permutations(groups: dict[Path, int], slots: int, key: jax.Array) -> jax.Array:
    """A uniform permutation of the slots for every group; g draws from fold_in(key, g). -> i32[G, K]."""
    numbers = jnp.arange(max(groups.values()) + 1, dtype=jnp.uint32)
    return jax.vmap(lambda g: jax.random.permutation(jax.random.fold_in(key, g), slots))(numbers)


def recombine(models: Any, groups: dict[Path, int], draws: jax.Array) -> Any:
    """Permutes every group of leaves along the slot axis.

    Args:
      models: [K, …] leaves.
      groups: path -> group number.
      draws: i32[G, K], a permutation for every group.

    Returns:
      The same leaves, slots exchanged: per leaf the multiset of slices along K is unchanged, hence so are
      the mean model and, for every x, the sum over slots of ‖w_k − x‖².
    """
    flat = cast(dict[Path, jax.Array], traverse_util.flatten_dict(models))
    moved = stacked.permute_each(list(flat.values()), [draws[groups[path]] for path in flat])
    return traverse_util.unflatten_dict(dict(zip(flat, moved, strict=True)))


def similarity(models: Any, order: Sequence[Path], group: int = 5) -> jax.Array:
    """Mean over slot pairs of the cosine, averaged over runs of `group` consecutive tensors. -> f32[].

    After the authors' similarity probe (FOUND in the code, there for K = 10), which counts the last run
    twice, and among a model's tensors batch normalisation's counter of batches as well. Here tensors of
    floats count.
    """
    flat = cast(dict[Path, jax.Array], traverse_util.flatten_dict(models))
    leaves = [flat[path] for path in _network_order(order) if stacked.averages(flat[path])]
    parts = [leaves[start : start + group] for start in range(0, len(leaves), group)]
    return jnp.stack([stacked.pairwise_cosine(part) for part in parts]).mean()


def _network_order(order: Sequence[Path]) -> list[Path]:
    """Parameters and statistics of a module side by side, modules in network order."""
    first: dict[Path, int] = {}
    for index, path in enumerate(order):
        if path[0] == "params":
            first.setdefault(path[1:-1], index)
    last = len(order)
    return sorted(order, key=lambda path: (first.get(path[1:-1], last), path[0] != "params"))
