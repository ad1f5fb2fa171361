"""LIPS: from time to time every client starts from a sparse copy of what the server sends it.

Xiao, Wu, Poddubnyy, Mocanu, Nguyen, Pechenizkiy, Mocanu. Addressing the Collaboration Dilemma in Low-Data
Federated Learning via Transient Sparsity. 2025. https://arxiv.org/abs/2506.00932

    d_i     <-  min(1, d0 + (1 − d0) i / T)              after the rounds i = 0, F, 2F, …, else 1
    s       <-  |g_k,l ⊙ w_l|                            g_k: the gradient of client k's last local step
    m_k,l   <-  1 on the ⌊d_i n_l⌋ largest entries of s, else 0, for every eligible tensor l
    w_k,l   <-  m_k,l ⊙ w_l                              where client k starts round i + 1

w is what the inner algorithm sends (for FedAvg the mean). The mask is used once and forgotten: training is
dense, so that a zeroed weight may grow again in the very next step, and nothing else about the inner
algorithm changes. A client applies it to what it receives, with a gradient of its own: only a gradient store
of the eligible tensors is added, for all N clients, and nothing is sent
unless all clients share one mask.

Facts and choices. FOUND in the authors' code: all of the above, with linear density, per-client masks, the
same density in every eligible tensor, and as eligible the kernels of all convolutions but the stem
(`inner_convs`); the scores magnitude, lowest and random and the refill by initial values as alternatives;
gradients in float16; full participation. The authors' gradient is taken after clipping, on which the
selection does not depend.
As released the code cannot run, and what it does with biases and normalisation is ambiguous: it looks up a
mask that they do not have. INFERRED: they are skipped, so that they stay with each client after
initialisation, as in FedBN: that is `sync = weights_only`. OUR CHOICE is `full`, in which everything is sent
as the inner algorithm does: local normalisation alone may explain a gain under label skew. Compare either
only with FedAvg of the same synchronisation (`density: 1`). Also OUR CHOICE: ties go to the entry that comes
first; a client that has never trained ranks by |w|, and how often is recorded; with fewer than all clients in
a round, the gradient is that of a client's last one; a period as long as the run means never (the rule above
would still make the start after round 0 sparse); `inner` eligibility, one shared mask, the cosine and
constant schedules, and `noise`. Not available: the paper's body, so none of its numbers.

An algorithm whose server goes on by more than the mean (FedNova, FedExP, FedMut, a server optimiser) is
refused: from the model that it sent to the zeros that came back would be a step for it, to be lengthened.

A weight that is zeroed while its unit is dead for every client has no gradient and stays zero: the share of
weights that are not zero (`lips_nonzero`) may lie below the density.
"""

import dataclasses
import functools
import math
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct, traverse_util

from fedjax_sim.algorithms import private
from fedjax_sim.algorithms.card import Card
from fedjax_sim.algorithms.fedavg import FedAvg
from fedjax_sim.algorithms.shared import build_inner, named, nested_with
from fedjax_sim.algorithms.wrap import Layer, wrap
from fedjax_sim.core import stacked
from fedjax_sim.core.algorithm import Algorithm, AlgorithmConfig, Cohort, Context, Starts, Step
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.fields import at_least, check, within
from fedjax_sim.core.model import Model
from fedjax_sim.core.task import Batch
from fedjax_sim.core.top_k import top_k_mask

Path = private.Path


@struct.dataclass
class LIPSState:
    """Attributes: inner: the wrapped algorithm's state. initial: name -> the eligible tensors' first values,
    if they are refilled from there. gradient: name -> mean |g| over the last cohort, for a shared mask.
    """

    inner: Any
    initial: Any
    gradient: Any


@struct.dataclass
class Sent:
    """What clients are told besides the model.

    Attributes:
      inner: the inner algorithm's broadcast.
      sparse: bool[], whether this round starts sparse.
      keep: i32[L], entries that are kept of each eligible tensor.
      wanted: bool[], whether the last gradient of this round will be wanted.
      initial: name -> first values; None if they are not.
      masks: name -> the mask for all clients; None if each makes its own.
    """

    inner: Any
    sparse: jax.Array
    keep: jax.Array
    wanted: jax.Array
    initial: Any
    masks: Any


@struct.dataclass
class ClientState:
    """Attributes: inner: the inner rule's. gradient: name -> of the last step; None if no score wants it.
    trained: bool[], whether there is one.
    """

    inner: Any
    gradient: Any
    trained: jax.Array


@dataclasses.dataclass(frozen=True)
class LIPS:
    """Transient sparsity on top of another algorithm.

    Attributes:
      inner: the algorithm whose models are sent (`fedavg`, `{name: fedmr, granularity: module}` …).
      density: d0 in (0, 1], the share of an eligible tensor that is kept after the first round; 1 is never
        sparse.
      schedule: `linear` from d0 to 1 over the run (the paper), half a `cosine` there, or `constant`.
      period: F, rounds from one sparse start to the next; with as many as the run has there is none.
      score: what is kept is largest in |gradient · weight| (`sensitivity`, the paper's), in |weight|
        (`magnitude`), smallest in |weight| (`lowest`), or `random`.
      refill: what takes the others' place: `zero`, their `initial` values, or `noise`: a control that zeroes
        nothing and adds Gaussian noise to the whole tensor, as long as what zeroing would have taken away.
      masks: each `client` its own, or one `shared` by all, made of the deployed model and the mean |gradient|
        of the last cohort.
      sync: `full`, or `weights_only`: biases and normalisation stay with each client.
      layers: which tensors are eligible: `inner_convs`, all convolution kernels but the first (the paper), or
        `inner`, kernels of all weight layers but first and last (ours, for an MLP or a transformer).
      leaves: patterns of the paths of eligible leaves instead (`[params/fc1/kernel]`); () for `layers`.
      store: dtype of clients' last gradients; the authors' is float16, in which small ones vanish.
    """

    card: ClassVar[Card] = Card(
        "lips",
        keeps="the last gradient of the eligible tensors",
        besides="masks in sparse rounds",
        defaults="code of LIPS",
        holds="density 1 or no sparse round is what it wraps; counts kept are exact",
    )

    starts_sparse: ClassVar[bool] = True
    """Clients start rounds from sparse copies of what they are sent."""

    inner: AlgorithmConfig = dataclasses.field(default_factory=FedAvg)
    density: float = 0.5
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    period: int = 5
    score: Literal["sensitivity", "magnitude", "lowest", "random"] = "sensitivity"
    refill: Literal["zero", "initial", "noise"] = "zero"
    masks: Literal["client", "shared"] = "client"
    sync: Literal["full", "weights_only"] = "full"
    layers: Literal["inner_convs", "inner"] = "inner_convs"
    leaves: tuple[str, ...] = ()
    store: Literal["float32", "bfloat16", "float16"] = "float32"

    def __post_init__(self):
        check(self, "algorithm.")
        within("algorithm.density", self.density, 0.0, 1.0, open_left=True)
        at_least("algorithm.period", self.period, 1)
        sparse = next(nested_with(self, "starts_sparse"), None)
        if sparse is not None:
            raise UserError(
                "algorithm.inner",
                named(sparse),
                "its clients start from sparse models already, which LIPS would make sparse again",
                "Name another algorithm.",
            )

    def build(self, context: Context) -> Algorithm:
        """The record of pure functions.

        Raises:
          UserError: no tensor of the model is eligible, or the score wants gradients that training never
            makes; the server inside goes further than the mean (`Algorithm.steps_beyond_mean`).
        """
        inner = build_inner(self.inner, context)
        if self.sync == "weights_only":
            inner = private.keep(inner, _not_weights(context.model), context.num_clients)
        leaves = eligible(context.model, self.layers, self.leaves)
        if self.score == "sensitivity":
            _check_trained(inner, leaves, context)
        if self.density == 1 or self.period >= context.rounds:
            return inner
        if inner.steps_beyond_mean:
            raise UserError(
                "algorithm.inner",
                type(self.inner).__name__,
                "its server goes further than the mean, and would take what was zeroed for progress",
                "Choose another algorithm for LIPS to go around.",
            )
        return _Wrapped(self, inner, leaves, context).algorithm()


@dataclasses.dataclass(frozen=True)
class _Wrapped:
    """The pure functions of one LIPS.

    Attributes:
      config: its hyper-parameters.
      inner: the algorithm inside.
      leaves: eligible ones, in network order.
      context: the run.
    """

    config: LIPS
    inner: Algorithm
    leaves: tuple[Path, ...]
    context: Context

    def algorithm(self) -> Algorithm:
        return wrap(
            self.inner,
            Layer(
                pairs=("state", "client", "extra", "broadcast", "uploads"),
                init=self.init,
                dispatch=self.dispatch,
                merge=self.merge,
                init_client=self.init_client,
                receive=self.receive,
                start_round=self.start_round,
                wants_last_gradient=self.wants_last_gradient if self._stores else None,
                finish_round=self.finish_round,
                keeps_model=False,
            ),
        )

    @property
    def _stores(self) -> bool:
        return self.config.score == "sensitivity"

    @property
    def _shares(self) -> bool:
        return self.config.masks == "shared"

    def _of(self, tree: Any) -> dict[str, jax.Array]:
        """The eligible leaves of a tree like `variables`, by name."""
        flat: Any = traverse_util.flatten_dict(tree)
        return {"/".join(path): flat[path] for path in self.leaves}

    def _gradient_of(self, gradient: Any) -> dict[str, jax.Array]:
        return self._of({"params": gradient})

    # --- server -------------------------------------------------------------------------------------

    def init(self, inside, key, variables):
        own = self._of(variables)
        return LIPSState(
            inside(key, variables),
            own if self.config.refill == "initial" else None,
            # Before there is one, of equal numbers: then |w| decides.
            jax.tree.map(jnp.ones_like, own) if self._shares and self._stores else None,
        )

    def dispatch(self, inside, state, cohort, key):
        starts = inside(state, cohort, key)
        sparse, keep = self._plan(cohort.round - 1)
        masks = None
        if self._shares:
            own = self._of(self.inner.deploy(state.inner))

            def make():
                shared = jax.random.fold_in(key, 1)
                return self._masks(own, state.gradient, jnp.asarray(True), keep, shared)

            masks = jax.lax.cond(sparse, make, lambda: jax.tree.map(lambda w: jnp.ones(w.shape, bool), own))
        wanted = jnp.asarray(False)
        if self._stores:
            # The sparse start after this round wants its gradient; if some clients sit that round out, any
            # later one may.
            full = self.context.cohort_size == self.context.num_clients
            wanted = self._plan(cohort.round)[0] | (not full)
        sent = Sent(starts.broadcast, sparse, keep, wanted, state.initial, masks)
        return Starts(starts.models, sent, shared=starts.shared)

    def merge(self, inside, state, cohort, starts, results, key):
        sent, reports = starts.broadcast, results.uploads["lips"]
        new, metrics = inside(state, cohort, starts, results, key)
        counted = results.included.astype(jnp.float32)
        mean = lambda values: (values * counted).sum() / jnp.maximum(counted.sum(), 1)  # noqa: E731
        total = sum(self._sizes)
        density = lambda sparse, keep: jnp.where(sparse, keep.sum().astype(jnp.float32) / total, 1)  # noqa: E731
        metrics = metrics | {
            "lips_density": density(sent.sparse, sent.keep),
            "lips_density_after": density(*self._plan(cohort.round)),
            "lips_nonzero": mean(reports["nonzero"]),
        }
        if self._stores and not self._shares:
            metrics["lips_untrained"] = mean(reports["untrained"])
        if self._shares and self._stores:
            # Of a round that did not ask for gradients, or left all clients out, there is nothing new.
            fresh = stacked.weighted_sum(reports["gradient"], counted)
            count = counted.sum()
            gradient = jax.tree.map(
                lambda new, old: jnp.where(sent.wanted & (count > 0), new / jnp.maximum(count, 1), old),
                fresh,
                state.gradient,
            )
            new = new.replace(gradient=gradient)
        return new, metrics

    @functools.cached_property
    def _sizes(self) -> list[int]:
        shapes = self._of(self.context.model.abstract)
        return [leaf.size for leaf in shapes.values()]

    def _plan(self, after: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(whether the start after round `after` is sparse, bool[]; entries it keeps, i32[L])."""
        table = kept_counts(self.config, self.context.rounds, self._sizes)
        number = jnp.clip(after // self.config.period, 0, len(table) - 1)
        keep = jnp.asarray(table, jnp.int32)[number]
        sparse = (after >= 0) & (after % self.config.period == 0)
        return sparse & (keep < jnp.asarray(self._sizes, jnp.int32)).any(), keep

    # --- client -------------------------------------------------------------------------------------

    def init_client(self, inside, variables, labels):
        gradient = None
        if self._stores and not self._shares:
            store = jnp.dtype(self.config.store)
            gradient = jax.tree.map(lambda w: jnp.zeros(w.shape, store), self._of(variables))
        return ClientState(inside(variables, labels), gradient, jnp.asarray(False))

    def receive(self, inside, model, client, sent, key):
        model = inside(model, client, sent, jax.random.fold_in(key, 0))
        flat: Any = traverse_util.flatten_dict(model)
        own = self._of(model)

        def sparse():
            masks = sent.masks
            if masks is None:
                drawn = jax.random.fold_in(key, 1)
                masks = self._masks(own, client.gradient, client.trained, sent.keep, drawn)
            return {name: self._refilled(own[name], masks[name], name, sent, key) for name in own}

        start = jax.lax.cond(sent.sparse, sparse, lambda: own)
        return traverse_util.unflatten_dict(
            {**flat, **{tuple(name.split("/")): leaf for name, leaf in start.items()}}
        )

    def _masks(self, weights, gradient, trained, keep, key):
        """Name -> bool, exactly `keep` of each set."""
        out = {}
        for number, (name, w) in enumerate(weights.items()):
            if self.config.score == "random":
                score = jax.random.uniform(jax.random.fold_in(key, number), w.shape, jnp.float32)
            elif self.config.score == "lowest":
                score = -jnp.abs(w)
            else:
                score = jnp.abs(w)
                if self._stores:
                    score = jnp.where(trained, score * jnp.abs(gradient[name].astype(jnp.float32)), score)
            out[name] = top_k_mask(score.reshape(-1), keep[number]).reshape(w.shape)
        return out

    def _refilled(self, w, mask, name, sent, key):
        if self.config.refill == "zero":
            return jnp.where(mask, w, 0)
        if self.config.refill == "initial":
            return jnp.where(mask, w, sent.initial[name])
        number = list(self.leaves).index(tuple(name.split("/")))
        drawn = jax.random.fold_in(jax.random.fold_in(key, 2), number)
        noise = jax.random.normal(drawn, w.shape, jnp.float32)
        removed = jnp.where(mask, 0, w)
        return w + noise * jnp.sqrt((removed * removed).sum() / (noise * noise).sum())

    def wants_last_gradient(self, inside, sent):
        return sent.wanted | inside(sent)

    def start_round(self, inside, start, client, sent):
        own = list(self._of(start).values())
        total = sum(leaf.size for leaf in own)
        nonzero = jax.lax.cond(
            sent.sparse,
            lambda: jnp.stack([(w != 0).sum() for w in own]).sum().astype(jnp.float32) / total,
            lambda: jnp.float32(1),
        )
        asks = self.inner.local.wants_last_gradient
        return {
            "inner": inside(start, client, sent),
            "nonzero": nonzero,
            "wanted": sent.wanted,
            "asked": jnp.asarray(False) if asks is None else asks(sent.inner),
            "sparse": sent.sparse,
        }

    def finish_round(self, inside, start, trained, client, extra, steps, lr, gradient):
        asked = None
        if self.inner.local.wants_last_gradient is not None:
            asked = jax.tree.map(lambda g: jnp.where(extra["asked"], g, 0), gradient)
        after, upload = inside(start, trained, client, extra, steps, lr, asked)
        report = {"nonzero": extra["nonzero"]}
        stored, seen = client.gradient, client.trained
        if self._stores:
            fresh, new = self._gradient_of(gradient), extra["wanted"] & (steps > 0)
            seen = seen | new
            if self._shares:
                report["gradient"] = jax.tree.map(jnp.abs, fresh)
            else:
                report["untrained"] = (extra["sparse"] & ~client.trained).astype(jnp.float32)
                stored = jax.tree.map(lambda old, g: jnp.where(new, g.astype(old.dtype), old), stored, fresh)
        return after.replace(gradient=stored, trained=seen), {"inner": upload, "lips": report}


def densities(config: LIPS, rounds: int) -> list[float]:
    """d_i after the rounds i = 0, F, 2F, … of a run of `rounds`, each in (0, 1]."""
    out = []
    for i in range(0, rounds, config.period):
        share = {
            "linear": i / rounds,
            "cosine": (1 - math.cos(math.pi * i / rounds)) / 2,
            "constant": 0.0,
        }[config.schedule]
        out.append(min(1.0, config.density + (1 - config.density) * share))
    return out


def kept_counts(config: LIPS, rounds: int, sizes: list[int]) -> np.ndarray:
    """⌊d_i · n⌋ for tensors of these sizes. -> i64[sparse starts, L]."""
    return np.asarray([[int(density * size) for size in sizes] for density in densities(config, rounds)])


def eligible(model: Model, layers: str = "inner_convs", patterns: Collection[str] = ()) -> tuple[Path, ...]:
    """Paths of the leaves that may be made sparse, in network order; see `LIPS`.

    Raises:
      UserError: there are none.
    """
    order = model.layer_order()
    if patterns:
        chosen = private.matching(model, patterns)
        odd = sorted(path for path in chosen if path[0] != "params")
        if odd:
            raise UserError(
                "algorithm.leaves",
                "/".join(odd[0]),
                "is not a parameter and has no gradient",
                "Leave it out.",
            )
    elif layers == "inner":
        points = [("params", *point.kernel) for point in model.peel_points]
        chosen = frozenset(points[1:-1])
    else:
        shapes: Any = traverse_util.flatten_dict(model.abstract)
        kernels = [path for path in order if path[0] == "params" and len(shapes[path].shape) == 4]
        chosen = frozenset(kernels[1:])
    if not chosen:
        other = "inner_convs" if layers == "inner" else "inner"
        raise UserError(
            "algorithm.layers",
            layers,
            f"no tensor of {model.name} is eligible",
            f"Try layers: {other}, or name some in algorithm.leaves.",
        )
    return tuple(path for path in order if path in chosen)


def _not_weights(model: Model) -> frozenset[Path]:
    """Biases, scales, shifts and statistics: all leaves that are vectors."""
    shapes: Any = traverse_util.flatten_dict(model.abstract)
    return frozenset(path for path, leaf in shapes.items() if len(leaf.shape) < 2)


def _check_trained(inner: Algorithm, leaves: Collection[Path], context: Context) -> None:
    """Raises UserError if one of the leaves is not trained at the end of a round."""
    flags = _moves_at_the_end(inner, context)
    frozen = [] if flags is None else [path for path in leaves if not flags[path]]
    if frozen:
        raise UserError(
            "algorithm.score",
            "sensitivity",
            f"the last local steps of the inner algorithm do not train {'/'.join(frozen[0])}, so there is no "
            "gradient to rank it by",
            "Choose the score magnitude, or other leaves.",
        )


def _moves_at_the_end(inner: Algorithm, context: Context) -> Mapping[Path, Any] | None:
    """Path -> whether a client's last step moves that leaf; None: it moves all. No model is run."""
    model, rule, cohort_size = context.model, inner.local, context.cohort_size
    labels = jnp.zeros(context.task.num_classes, jnp.int32)

    def zeros(tree):
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)

    def loss_and_grad(variables, batch, loss=None, /):
        del batch, loss
        return (jnp.float32(0), variables), zeros(variables["params"])

    def last_step(epoch):
        key, variables = jax.random.key(0), zeros(model.abstract)
        ids = jnp.arange(cohort_size, dtype=jnp.int32)
        cohort = Cohort(ids, ids, jnp.int32(0), ids)
        starts = inner.dispatch(inner.init(key, variables), cohort, key)
        client_state = rule.init_client(variables, labels) if rule.init_client else None
        start = variables
        if rule.receive is not None:
            start = rule.receive(start, client_state, starts.broadcast, key)
        extra = rule.start_round(start, client_state, starts.broadcast)
        example = context.task.prepare(zeros(context.task.abstract(1)))
        batch = Batch(example, jnp.ones(1, bool), key, epoch)
        return Step(*rule.gradient(loss_and_grad, start, batch, extra)).moves

    last = jnp.int32((context.local.epochs or 1) - 1)
    if jax.eval_shape(last_step, last) is None:
        return None
    flat: Any = traverse_util.flatten_dict(jax.jit(last_step)(last))  # of all else XLA computes nothing
    return flat
