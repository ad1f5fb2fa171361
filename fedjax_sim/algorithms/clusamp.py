"""CluSamp: cohorts drawn from clusters of clients whose updates are alike.

Fraboni, Vidal, Kameni, Lorenzi. Clustered Sampling: Low-Variance and Improved Representativity for Clients
Selection in Federated Learning. ICML 2021 (Algorithm 2). https://arxiv.org/abs/2105.05883

With p_i = n_i / n and a cohort of m, clients are clustered (Ward linkage) by the distances of their last
known updates, zero at the start; the tree is cut so low that no cluster's weight exceeds 1/m; the m heaviest
clusters are the m distributions, whose remaining weight the clients of the others fill up; one client is
drawn from each, and the m models are averaged equally, which makes the mean unbiased for FedAvg's over all
clients. A client of p_i ≥ 1/m first has ⌊m p_i⌋ distributions to itself, a case that the authors' code of
Algorithm 2 leaves out. A client that is drawn twice does the same work in both slots, and counts twice.

FOUND in the code of FedMR, as `weights: samples`: the models are weighted by n_i once more. L1 distances are
its default; the paper's are arccos of the cosine. FOUND in both codes, as `points: rows`: the clustering
takes the matrix for N points in N dimensions. By default it is what it says, the distances (OUR CHOICE), of
which Ward's criterion is a variance only for `l2`. Two things of FedMR's code are not repeated here: the
refresh of the matrix writes one entry a row only; and its L2 is the squared distance.

All N last updates are kept, of parameters without batch statistics, and an N × N matrix of distances, of
which a round renews the cohort's rows and columns, by K passes over all updates. The clustering runs on the
host between rounds, which therefore wait for one another, in time that grows with N².
"""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from fedjax_sim.algorithms import shared
from fedjax_sim.algorithms.card import Card
from fedjax_sim.core import stacked
from fedjax_sim.core.algorithm import Algorithm, CohortChooser, Context, LocalRule, Starts
from fedjax_sim.core.fields import check


@struct.dataclass
class CluSampState:
    """Attributes: model: x. updates: f32[N, P], each client's last. distances: f32[N, N]."""

    model: Any
    updates: jax.Array
    distances: jax.Array


@dataclasses.dataclass(frozen=True)
class CluSamp:
    """FedAvg with clustered sampling.

    Attributes:
      distance: of two updates: `l1`, `l2`, or `arccos` of their cosine, 0 where one is zero.
      weights: of the mean: `uniform` (the paper) or `samples`.
      points: what is clustered: clients by their `distances`, or the `rows` of that matrix, see above.
    """

    card: ClassVar[Card] = Card(
        "clusamp",
        besides="N last updates and N² distances on the server; Ward's clustering on the host",
        defaults="code of FedMR (L1); Fraboni et al. (weights)",
        holds="places' distributions add up to p_i; draws are unbiased",
    )

    distance: Literal["l1", "l2", "arccos"] = "l1"
    weights: Literal["uniform", "samples"] = "uniform"
    points: Literal["distances", "rows"] = "distances"

    def __post_init__(self):
        check(self, "algorithm.")

    def build(self, context: Context) -> Algorithm:
        """The record of pure functions."""
        clients = context.num_clients

        def init(key, variables):
            del key
            size = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
            return CluSampState(variables, jnp.zeros((clients, size)), jnp.zeros((clients, clients)))

        def finish_round(start, trained, kept, extra, steps, lr, gradient):
            del extra, steps, lr, gradient
            moved = jax.tree.map(jnp.subtract, trained["params"], start["params"])
            return kept, jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(moved)])

        def merge(state, cohort, starts, results, key):
            del starts, key
            old = stacked.take_rows(state.updates, cohort.ids)
            new = stacked.where_slot(results.included, results.uploads, old)
            updates = stacked.put_rows(state.updates, cohort.ids, new)
            columns = stacked.of_pairs(self._distances, updates, new)  # [N, K]
            distances = stacked.put_rows(state.distances, cohort.ids, columns.T)
            distances = distances.at[:, cohort.ids].set(columns)
            return CluSampState(results.mean, updates, distances), {}

        def choose(distances, counts, size, generator):
            chances = distributions(distances, counts, size, self.points)
            return np.asarray([generator.choice(clients, p=row) for row in chances], np.int32)

        return Algorithm(
            init=init,
            dispatch=lambda state, cohort, key: Starts(state.model),
            merge=merge,
            deploy=lambda state: state.model,
            local=LocalRule(finish_round=finish_round),
            weights=shared.weighing(self.weights),
            needs_models=False,
            stacked=("updates", "distances"),
            with_model=lambda state, model: state.replace(model=model),
            cohort_chooser=CohortChooser(lambda state: state.distances, choose),
        )

    def _distances(self, one: jax.Array, others: jax.Array) -> jax.Array:
        """f32[P], f32[N, P] -> f32[N]."""
        if self.distance == "l1":
            return jnp.abs(others - one[None]).sum(1)
        if self.distance == "l2":
            away = others - one[None]
            return jnp.sqrt((away * away).sum(1))
        squares = (others * others).sum(1) * (one * one).sum()
        products = jnp.matmul(others, one, precision=jax.lax.Precision.HIGHEST)
        cosine = products / jnp.sqrt(jnp.where(squares > 0, squares, 1))
        return jnp.where(squares > 0, jnp.arccos(jnp.clip(cosine, -1, 1)), 0)


def distributions(
    distances: np.ndarray, counts: np.ndarray, size: int, points: str = "distances"
) -> np.ndarray:
    """From what each place of the cohort is drawn.

    Args:
      distances: f[N, N], of clients' updates; symmetric in theory, made so here. NaN counts as 0, infinity
        as 1e38: beyond single precision there is little to tell.
      counts: i64[N], training samples.
      size: m.
      points: see `CluSamp`.

    Returns:
      f64[m, N], rows that add up to 1, and columns to m p_i.
    """
    mass = size * np.asarray(counts, np.float64) / np.sum(counts)
    alone = np.floor(mass + 1e-12).astype(int)
    chances = np.zeros((size, len(mass)))
    row = 0
    for client in np.flatnonzero(alone):
        chances[row : row + alone[client], client] = 1
        row += alone[client]
    left = np.maximum(mass - alone, 0)
    left[left < 1e-9] = 0
    places = size - row
    if not places:
        return chances
    groups = sorted(_clusters(distances, left, points), key=lambda group: -left[group].sum())
    for place, group in enumerate(groups[:places]):
        chances[row + place, group] = left[group]
    room = np.maximum(1 - chances[row:].sum(1), 0)  # a full row may add up to a little more than 1
    place = 0
    for client in (client for group in groups[places:] for client in group):
        rest = left[client]
        while rest > 1e-12 and place < places:
            part = min(rest, room[place])
            chances[row + place, client] += part
            room[place], rest = room[place] - part, rest - part
            if room[place] <= 1e-12:
                place += 1
    return chances / chances.sum(1, keepdims=True)


def _clusters(distances: np.ndarray, weights: np.ndarray, points: str) -> list[np.ndarray]:
    """Ward's tree, cut into the largest branches of weight at most 1. f64[N], each below 1 -> ids."""
    # Here, as they take a tenth of every start of the program, and no other algorithm needs them.
    from scipy.cluster import hierarchy
    from scipy.spatial.distance import pdist, squareform

    ids = np.flatnonzero(weights)
    if len(ids) == 1:
        return [ids]
    finite = np.nan_to_num(distances[np.ix_(ids, ids)].astype(np.float64), posinf=1e38)
    symmetric = (finite + finite.T) / 2
    np.fill_diagonal(symmetric, 0)
    apart = pdist(symmetric) if points == "rows" else squareform(symmetric, checks=False)
    tree: Any = hierarchy.to_tree(hierarchy.ward(apart))
    out, waiting = [], [tree]
    while waiting:
        node = waiting.pop()
        members = ids[node.pre_order()]
        if node.is_leaf() or weights[members].sum() <= 1 + 1e-9:
            out.append(np.sort(members))
        else:
            waiting += [node.get_left(), node.get_right()]
    return out
