"""Local training: every client of a cohort, in waves, inside one compiled program.

Clients differ in size, so a cohort is cut into *waves*: `width` clients side by side under `vmap` (one
alone without it), as many optimiser steps as the wave's largest client has. A wave is a loop with a length
known only at run time; nothing is recompiled when sizes change. Slots are sharded over devices, and each
device runs its own waves without waiting for another.

Everything random is a function of (seed, round, client, epoch or step), never of the layout. A client is
named in it by its id, or by the number that the partition gives it (`Partition.rng_ids`).
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jaxtyping import PyTree

from fedjax_sim.config import LocalConfig
from fedjax_sim.core import optimizers, stacked
from fedjax_sim.core.algorithm import LocalRule, Step
from fedjax_sim.core.model import Model, Variables
from fedjax_sim.core.rng import CLIENTS, key_for, run_key, settled
from fedjax_sim.core.task import Batch, Task, Training, differentiated
from fedjax_sim.engine.debugging import UNWATCHED, Watch
from fedjax_sim.engine.device_data import CohortData, DeviceData

_ORDER, _STEP, _RECEIVE = 0, 1, 2  # below a client's key: order of samples; augmentation and dropout; receipt


WAVE, STEP = "wave", "local_step"
"""Parts of local training, as profiles and a plan of memory name them."""

# --- the order of samples -----------------------------------------------------------------------------


def client_key(seed: int, round_index: int, client: int) -> jax.Array:
    """The key from which everything random of a client in a round comes; `client` as in `batch_order`."""
    return key_for(run_key(seed), CLIENTS, round_index, client)


def shuffled(key: jax.Array, epoch: jax.Array, count: jax.Array, length: int) -> jax.Array:
    """A uniform permutation of 0 … count-1, then the numbers from count on.

    Does not depend on `length`: a client's order is the same beside larger ones.

    Args:
      key: key[], of the client and round.
      epoch: i32[], from 0.
      count: i32[], samples of the client, `length` at most.
      length: of the result, static.

    Returns:
      i32[length].
    """
    with settled():  # by itself; inside of a program that program's own counts
        bits = jax.random.bits(key_for(key, _ORDER, epoch), (length,), jnp.uint32) >> 1
    drawn = jnp.where(jnp.arange(length, dtype=jnp.int32) < count, bits, jnp.uint32(0xFFFFFFFF))
    return argsort(drawn)


_COUNTED = 64
"""Up to this length who comes before whom is counted, and not sorted. Ten orders take a CPU so many
microseconds, what is drawn included, sorted and counted: 12 long 8 and 2, 32 long 27 and 7, 64 long 60 and
40, 128 long 126 and 125 (Intel Xeon, one core, jaxlib 0.10.1).
"""


def argsort(drawn: jax.Array) -> jax.Array:
    """The places of numbers in ascending order, equal ones as they stand. u32[n] -> i32[n]."""
    if len(drawn) > _COUNTED:
        return jnp.argsort(drawn, stable=True).astype(jnp.int32)
    places = jnp.arange(len(drawn), dtype=jnp.int32)
    other, one = drawn[None, :], drawn[:, None]
    before = (other < one) | ((other == one) & (places[None, :] < places[:, None]))
    rank = before.sum(1, dtype=jnp.int32)
    return jnp.where(rank[None, :] == places[:, None], places[None, :], 0).sum(1, dtype=jnp.int32)


def batch_order(seed: int, round_index: int, client: int, epoch: int, count: int) -> np.ndarray:
    """The order in which a client walks through its samples: what the compiled round uses.

    Args:
      seed: of the run.
      round_index: from 0.
      client: its id; where the partition names others, `Partition.rng_ids[id]`.
      epoch: from 0, anew in each round.
      count: training samples of the client.

    Returns:
      i32[count], positions in the client's own list of samples; batch b is [b*B : (b+1)*B].
    """
    key = client_key(seed, round_index, client)
    return np.asarray(shuffled(key, jnp.int32(epoch), jnp.int32(count), count))


# --- the optimiser ------------------------------------------------------------------------------------


def make_optimizer(local: LocalConfig, lr: float | jax.Array | None = None) -> optax.GradientTransformation:
    """The client optimiser.

    Args:
      local: names it, with its options.
      lr: f32[] or a number, the rate to make it at; None: 1 if the round's rate scales its updates
        (`is_scaled`), else that of round 0.

    Raises:
      UserError: optax has no such optimiser, it refuses the options, or it wants more than a gradient.
    """
    if lr is None:
        lr = 1.0 if is_scaled(local) else local.lr
    parts = [] if local.clip_norm is None else [optax.clip_by_global_norm(local.clip_norm)]
    if local.optimizer == "sgd":
        if optimizers.is_on(local.weight_decay):
            parts.append(optax.add_decayed_weights(local.weight_decay))
        momentum = local.momentum if optimizers.is_on(local.momentum) else None
        parts.append(optax.sgd(lr, momentum=momentum, nesterov=local.nesterov))
        return optax.chain(*parts)
    return optax.chain(*parts, optimizers.make(local.optimizer, lr, local.options, "local"))


def is_scaled(local: LocalConfig) -> bool:
    """Whether the optimiser is made once, at rate 1, and the round's rate scales its updates.

    Else it is made at each round's rate.
    """
    return optimizers.proportional(local.optimizer, local.options)


# --- what a wave reads --------------------------------------------------------------------------------


@struct.dataclass
class Lanes:
    """Clients side by side, leaves [S, …]: all of a device, or those of a wave.

    Attributes:
      client_state: their own state between rounds.
      ids: i32[S].
      counts: i32[S], training samples; 0 for an empty place.
      weights: f32[S], in the mean; 0 for an empty place.
      keys: key[S], of each in this round.
      first: i32[S], where each one's samples begin, see `DeviceData.first_of`.
    """

    client_state: Any
    ids: jax.Array
    counts: jax.Array
    weights: jax.Array
    keys: Any = None
    first: Any = None


def _orders(lanes: Lanes, epochs: jax.Array, lengths: tuple[int, ...]) -> jax.Array:
    """Every client's order of its own samples. i32[S] epochs -> i32[S, lengths[-1]].

    Computed at the shortest of `lengths` that holds the largest of these clients; what comes after a client's
    samples is nobody's.
    """

    def of_length(length: int) -> jax.Array:
        order = jax.vmap(partial(shuffled, length=length))(lanes.keys, epochs, lanes.counts)
        return jnp.pad(order, ((0, 0), (0, lengths[-1] - length)))

    if len(lengths) == 1:
        return of_length(lengths[0])
    wanted = (jnp.asarray(lengths, jnp.int32) < lanes.counts.max()).sum()
    return jax.lax.switch(stacked.most_of_runs(wanted), [partial(of_length, length) for length in lengths])


# --- one wave -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Trainer:
    """The static part of local training: everything that the compiled program is specialised to.

    Attributes:
      model: the network.
      rule: what the algorithm does on a client.
      local: hyper-parameters.
      task: what is learned.
      width: clients side by side.
      order_lengths: see `fedjax_sim.engine.device_data.order_lengths`.
      ragged: some clients of the population take more steps than others.
      partial: some client has a last batch that is not full.
      gradients: every round's clients hand over the gradient of their last step, for diagnostics; else only
        those of rounds in which the rule asks for it.
      watch: is told what is computed.
      optimizer: of the clients, as `make_optimizer` has it.
    """

    model: Model
    rule: LocalRule
    local: LocalConfig
    task: Task
    width: int
    order_lengths: tuple[int, ...]
    ragged: bool
    partial: bool
    gradients: bool = False
    watch: Watch = UNWATCHED
    optimizer: optax.GradientTransformation = dataclasses.field(init=False, compare=False)

    def __post_init__(self):
        object.__setattr__(self, "optimizer", make_optimizer(self.local))

    def init_client(self, variables: Any, labels: Any = None) -> Any:
        """State that one client keeps between rounds (a pytree, possibly empty).

        Args:
          variables: the initial model.
          labels: i32[C], the client's training samples of each class; C = 0 where samples have no classes.
        """
        rule = self.rule.init_client(variables, labels) if self.rule.init_client else None
        opt_state = self.optimizer.init(variables["params"]) if self.local.keep_optimizer else None
        return {"rule": rule, "optimizer": opt_state}

    def ready(self, lanes: Lanes, key: jax.Array, data: DeviceData | CohortData) -> Lanes:
        """Fills in what the clients' training draws on.

        Args:
          lanes: [S, …] with ids, counts, weights and client_state.
          key: of the run and round.
          data: the training set.
        """
        keys = self.keys(key, data.numbers_of(lanes.ids))
        return dataclasses.replace(lanes, keys=keys, first=data.first_of(lanes.ids))

    def receive(self, sent: Any, broadcast: Any, client_state: Any, keys: jax.Array) -> Any:
        """What clients start from.

        Args:
          sent: [L, …], the models that were sent to them.
          broadcast: extra of the algorithm, no lane axis.
          client_state: [L, …], their own state.
          keys: key[L], theirs in this round.
        """
        if self.rule.receive is None:
            return sent
        over = _vmapped if len(keys) > 1 else _single
        receive = over(self.rule.receive, (0, 0, None, 0))
        return receive(
            sent, client_state["rule"], broadcast, jax.vmap(lambda key: key_for(key, _RECEIVE))(keys)
        )

    def send(self, variables: Any) -> Any:
        """The model that goes back to the server, of leaves with any leading axes."""
        return variables if self.rule.send is None else self.rule.send(variables)

    def keys(self, key: jax.Array, numbers: jax.Array) -> jax.Array:
        """Each client's key in a round.

        Args:
          key: of the run and round.
          numbers: i32[S], of the clients, see `DeviceData.numbers_of`.

        Returns:
          key[S].
        """
        return jax.vmap(partial(jax.random.fold_in, key))(numbers)

    @jax.named_scope(WAVE)
    def train_wave(
        self,
        start: Variables,
        broadcast: PyTree,
        lanes: Lanes,
        bound: jax.Array,
        lr: jax.Array,
        data: DeviceData | CohortData,
    ) -> tuple[Variables, PyTree, PyTree, jax.Array, jax.Array, PyTree]:
        """Trains `width` clients to the end.

        Args:
          start: [L, …] models, as received.
          broadcast: extra of the algorithm, no lane axis.
          lanes: the clients.
          bound: i32[], steps of the wave.
          lr: f32[].
          data: the training set.

        Returns:
          (trained, client_state, uploads, loss f32[L], finite bool[L], gradient of each one's last step,
          zero or None where nobody asked for it).
        """
        over = _vmapped if self.width > 1 else _single
        batch, counts, keys = self.local.batch_size, lanes.counts, lanes.keys
        per_epoch = jnp.maximum(-(-counts // batch), 1)
        length = per_epoch * self.local.epochs if self.local.epochs else self.local.steps
        assert length is not None
        total = jnp.where(counts > 0, length, 0)

        rule, client_state = self.rule, lanes.client_state
        extra = over(rule.start_round, (0, 0, None))(start, client_state["rule"], broadcast)
        params = start["params"]
        optimizer = self.optimizer if is_scaled(self.local) else make_optimizer(self.local, lr)
        opt_state = (
            client_state["optimizer"] if self.local.keep_optimizer else over(optimizer.init, (0,))(params)
        )
        zeros = jnp.zeros(counts.shape, jnp.float32)
        step = over(self.watch.called("step", partial(self._step, optimizer)), (0, 0, 0, 0, 0, None))
        wanted = self._wants_gradient(broadcast)
        last_gradient = None if wanted is None else jax.tree.map(jnp.zeros_like, params)

        # A client alone in its wave is carried without the lane axis: with it, XLA's CPU backend would not
        # update its weights where they lie, but copy them in every step.
        bare, laned = (_bare, _laned) if self.width == 1 else (lambda tree: tree, lambda tree: tree)

        @jax.named_scope(STEP)
        def body(t: jax.Array, carry: tuple[PyTree, ...]) -> tuple[PyTree, ...]:
            orders, loss_sum, seen, carried = carry
            variables, opt_state, last_gradient, extra = laned(carried)
            epoch, within = t // per_epoch, t % per_epoch
            if not single:
                orders = jax.lax.cond(
                    stacked.any_of_runs(jnp.any(within == 0)),
                    lambda: jnp.where((within == 0)[:, None], ordered(epoch), orders),
                    lambda: orders,
                )
            position = within[:, None] * batch + jnp.arange(batch, dtype=jnp.int32)[None, :]
            # Padding repeats a sample of the client's own: what it holds must not matter, but inf * 0 would.
            last = jnp.maximum(counts - 1, 0)[:, None]
            own = jnp.take_along_axis(orders, jnp.minimum(position, last), axis=1, mode="clip")
            index = data.rows_at(lanes.first[:, None] + own)
            mask = (position < counts[:, None]) & (t < total)[:, None]
            rngs = self._step_keys(keys, t)
            made = self._batch(data, index, mask, rngs, epoch)
            new, new_opt_state, loss, gradient, new_extra = step(variables, opt_state, made, extra, rngs, lr)
            if wanted is not None:
                here = wanted & (t == total - 1)
                last_gradient = _written(here, gradient, last_gradient)
            size = mask.sum(1).astype(jnp.float32)
            if self._uneven():
                active = t < total
                new = stacked.where_slot(active, new, variables)
                new_opt_state = stacked.where_slot(active, new_opt_state, opt_state)
                loss = jnp.where(active, loss, 0)
                new_extra = _changed(active, new_extra, extra)
            carried = bare((new, new_opt_state, last_gradient, new_extra))
            return orders, loss_sum + loss * size, seen + size, carried

        ordered, longest = partial(_orders, lanes, lengths=self.order_lengths), self.order_lengths[-1]
        # One epoch gets by with one order. Of several each draws its own, the first too: what draws it is
        # there, and compiled, once.
        single = self.local.epochs == 1
        orders = ordered(jnp.zeros_like(counts)) if single else jnp.zeros((len(counts), longest), jnp.int32)
        carried = bare((start, opt_state, last_gradient, extra))
        _, loss_sum, seen, carried = jax.lax.fori_loop(0, bound, body, (orders, zeros, zeros, carried))
        trained, opt_state, last_gradient, extra = laned(carried)
        rule_state, uploads = over(rule.finish_round, (0, 0, 0, 0, 0, None, 0))(
            start, trained, client_state["rule"], extra, total, lr, last_gradient
        )
        finite = jnp.isfinite(loss_sum) & all_finite((trained, uploads))
        self.watch.look("upload", uploads)
        self.watch.look("client state", rule_state, client_state["rule"], infinite=True)
        client_state = {"rule": rule_state, "optimizer": opt_state if self.local.keep_optimizer else None}
        return trained, client_state, uploads, loss_sum / jnp.maximum(seen, 1), finite, last_gradient

    def _wants_gradient(self, broadcast: PyTree) -> jax.Array | None:
        """Whether the last gradient is kept in this round, bool[]; None: in none."""
        if self.gradients:
            return jnp.asarray(True)
        return None if self.rule.wants_last_gradient is None else self.rule.wants_last_gradient(broadcast)

    def _batch(
        self,
        data: DeviceData | CohortData,
        index: jax.Array,
        mask: jax.Array,
        rngs: jax.Array,
        epoch: jax.Array,
    ) -> Batch:
        """All lanes' samples: one gather, prepared at once. -> leaves [L, B, …].

        Args:
          data: the training set.
          index: i32[L, B], rows of it.
          mask: bool[L, B], False for padding.
          rngs: key[L], of this step.
          epoch: i32[L], of each client.
        """
        chosen = index.reshape(-1)
        example = self.task.prepare({key: leaf[chosen] for key, leaf in data.train.items()})
        example = jax.tree.map(lambda leaf: leaf.reshape(*index.shape, *leaf.shape[1:]), dict(example))
        if self.task.augment is not None:
            keys = jax.vmap(lambda key: jax.random.fold_in(key, 0))(rngs)
            example = stacked.per_slot(self.task.augment)(keys, example)
        return Batch(example, mask if self._masked() else None, None, epoch)

    def _step(
        self,
        optimizer: optax.GradientTransformation,
        variables: Variables,
        opt_state: PyTree,
        batch: Batch,
        extra: PyTree,
        rng: jax.Array,
        lr: jax.Array,
    ) -> tuple[Variables, PyTree, jax.Array, PyTree, PyTree]:
        """One optimiser step of one client.

        Args:
          optimizer: as `make_optimizer` has it.
          variables: the model.
          opt_state: the optimiser's state.
          batch: the step's samples.
          extra: of the rule, see `LocalRule.start_round`.
          rng: key of the step.
          lr: f32[], the round's rate.

        Returns:
          (model, optimiser's state, loss f32[], gradient by `params`, extra).
        """
        batch = dataclasses.replace(batch, rng=jax.random.fold_in(rng, 1))  # where nobody draws, XLA drops it
        loss_and_grad = differentiated(Training(self.model, self.task))
        made = Step(*self.rule.gradient(loss_and_grad, variables, batch, extra))
        loss, moved, gradient, extra, moves = made
        seen = variables["params"]
        if moves is not None:
            still = jax.tree.map(jnp.zeros_like, gradient)
            gradient = _where(moves["params"], gradient, still)
            # Nor is there weight decay for the optimiser's state to take in.
            seen = _where(moves["params"], seen, still)
        with jax.numpy_dtype_promotion("standard"):  # optax's bias correction: a float and an int32
            updates, opt_state = optimizer.update(gradient, opt_state, seen)
        if is_scaled(self.local):
            updates = jax.tree.map(lambda u: lr * u, updates)
        params = jax.tree.map(jnp.add, variables["params"], updates)
        new = {**moved, "params": params}
        new = new if moves is None else _where(moves, new, dict(variables))
        look = self.watch.look
        look("loss", loss)
        look("gradient", gradient)
        look("optimiser update", updates)
        look("parameters", new)
        look("optimiser state", opt_state, infinite=True)
        return new, opt_state, loss, gradient, extra

    def _step_keys(self, keys: jax.Array, t: jax.Array) -> jax.Array:
        return jax.vmap(lambda key: key_for(key, _STEP, t))(keys)

    def _masked(self) -> bool:
        return self.partial or self._uneven()

    def _uneven(self) -> bool:
        """Whether some client that trains beside others takes more steps than another of them."""
        return self.ragged and (self.width > 1 or stacked.side_by_side())


def _written(flags: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """Lane by lane new or old, [L, …]; at no cost where no flag of bool[L] is set."""
    branches = (lambda new, old: stacked.where_slot(flags, new, old)), (lambda new, old: old)
    return jax.lax.cond(stacked.any_of_runs(flags.any()), *branches, new, old)


def _changed(flags: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """Lane by lane new or old, [L, …], of the leaves that are not the same anyway."""
    return jax.tree.map(lambda a, b: a if a is b else stacked.where_slot(flags, a, b), new, old)


def _where(moves: PyTree, new: PyTree, old: PyTree) -> PyTree:
    """Leaf by leaf new or old; of a flag known while tracing only one side is ever computed."""

    def one(flag: bool | jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        return (a if flag else b) if isinstance(flag, bool) else jnp.where(flag, a, b)

    return jax.tree.map(one, moves, new, old)


def _vmapped(function: Callable[..., Any], axes: tuple) -> Callable[..., Any]:
    return stacked.per_slot(function, axes)


def _single(function: Callable[..., Any], axes: tuple) -> Callable[..., Any]:
    """`function` on a wave of one client: the lane axis comes off and goes on again, without `vmap`."""

    def call(*args: PyTree) -> PyTree:
        bare = [arg if axis is None else _bare(arg) for arg, axis in zip(args, axes, strict=True)]
        return _laned(function(*bare))

    return call


def _bare(tree: PyTree) -> PyTree:
    """Of a wave of one, that client's: [1, …] -> […]."""
    return jax.tree.map(lambda x: x[0], tree)


def _laned(tree: PyTree) -> PyTree:
    """Of one client, a wave: […] -> [1, …]."""
    return jax.tree.map(lambda x: jnp.asarray(x)[None], tree)


def all_finite(tree: PyTree) -> jax.Array:
    """bool[L]: whether every number of a slot is finite, as integers are.

    A sum of tiny multiples, which overflows for no finite number. Written as products, row by row, because
    XLA's CPU backend makes a plain sum a slow windowed reduction.
    """
    total = jnp.float32(0)
    leaves = [leaf for leaf in jax.tree.leaves(tree) if stacked.averages(leaf)]
    split = [(leaf.real, leaf.imag) if jnp.iscomplexobj(leaf) else (leaf,) for leaf in leaves]
    for leaf in (leaf for parts in split for leaf in parts):
        rows = leaf.reshape(leaf.shape[0], -1, leaf.shape[-1] if leaf.ndim > 1 else 1).astype(jnp.float32)
        sums = rows @ jnp.full((rows.shape[2],), 1e-30, jnp.float32)
        total = total + sums @ jnp.ones((rows.shape[1],), jnp.float32)
    return jnp.isfinite(total)
