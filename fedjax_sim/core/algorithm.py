"""The record that every algorithm is, and what most of them share.

A federated round is three verbs on stacked pytrees (leading axis K, the client slot):

    dispatch   server state -> what each slot's client starts from
    train      K starts     -> K trained models            (the engine's, see fedjax_sim.engine.clients)
    merge      K trained    -> next server state

An algorithm is a frozen record of pure functions over those verbs, as an optax transformation is one of
`init` and `update`. The engine knows no algorithm's name; what it may do faster for one (never hold K
models, say) the record itself states.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from fedjax_sim.core import stacked
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.model import Model, Variables
from fedjax_sim.core.task import Batch, LossAndGrad, Task, task_loss

State = Any
"""An algorithm's own pytree, best a `flax.struct.dataclass`."""


@struct.dataclass
class Cohort:
    """Who takes part in a round.

    Attributes:
      ids: i32[K], client ids; slot k trains on the samples of client ids[k].
      counts: i32[K], training samples of each.
      round: i32[], from 0.
      steps: i32[K], optimiser steps that each takes in the round.
    """

    ids: jax.Array
    counts: jax.Array
    round: jax.Array
    steps: jax.Array | None = None


@struct.dataclass
class Starts:
    """What a round's clients start from.

    Attributes:
      models: one model that all start from if `shared`, else one a slot, [K, …].
      broadcast: whatever else the local rule is to see, the same for all clients.
      shared: whether `models` is a single model.
    """

    models: Variables
    broadcast: Any = None
    shared: bool = struct.field(pytree_node=False, default=True)


@struct.dataclass
class Results:
    """What came back.

    Attributes:
      models: trained models [K, …]; None if the algorithm said that it does not need them.
      mean: their mean with the algorithm's `weights`; None if it has none. Dtypes are the models'; of a leaf
        that is no float it is the largest, see `fedjax_sim.core.stacked`.
      uploads: what `LocalRule.finish_round` sent, [K, …].
      included: bool[K], False where an update was not finite and has been left out; such a slot of
        `models` holds its start.
      loss: f32[K], mean training loss over all samples that the client saw in the round.
    """

    models: Variables | None
    mean: Variables | None
    uploads: Any
    included: jax.Array
    loss: jax.Array


def plain_gradient(loss_and_grad: LossAndGrad, variables: Variables, batch: Batch, extra: Any):
    """The gradient as it is."""
    del extra
    return loss_and_grad(variables, batch)


def nothing_sent(start, trained, client_state, extra, steps, lr, gradient):
    """The end of a client's round that changes nothing and sends nothing besides the model."""
    del start, trained, extra, steps, lr, gradient
    return client_state, None


@dataclasses.dataclass(frozen=True)
class LocalRule:
    """What a client does differently from plain SGD on the task's loss. All functions are of one client.

    Attributes:
      loss: (apply, variables, batch, extra) -> (scalar, variables).
      direction: (loss_and_grad, variables, batch, extra) -> ((loss, variables), gradient).
      trains: (variables, batch) -> tree like `variables` of bool, Python's or bool[]: which leaves a step
        moves. The others stay as they are, batch statistics among them, and the optimiser sees a zero
        gradient of them. None: all move.
      receive: (model, client_state, broadcast, key) -> start: what a client makes of the model that it is
        sent before it trains; key: the client's in this round. None: nothing.
      send: variables -> what of them is the model that goes back, like the one that was sent; for a rule
        whose `receive` puts something beside it. None: all.
      wants_last_gradient: broadcast -> bool[]: whether `finish_round` gets, in this round, the gradient of
        the client's last step (by `params`, as the optimiser gets it). None: in none.
      start_round: (start, client_state, broadcast) -> extra; what the loss sees besides (the start, a control
        variate, a teacher).
      gather: (loss_and_grad, batch, extra) -> extra; what a step adds to `extra`, which is kept from step to
        step. None: `extra` stays as it began.
      random: whether steps draw at random, from `Batch.rng`.
      finish_round: (start, trained, client_state, extra, steps, lr, gradient) -> (client_state, upload);
        gradient as asked for, zero in rounds that do not ask, None if none does.
      init_client: (variables, labels) -> a client's own state, kept from round to round in a stack over all
        N clients; labels: i32[C], how many training samples of each class it has, i32[0] where samples have
        no classes. None keeps none.
      personal: (client_state, model) -> variables that a client uses itself, made of what it keeps and the
        model that the algorithm has for it. None: that model.
    """

    loss: Callable[..., tuple[jax.Array, Variables]] = task_loss
    direction: Callable[..., Any] = plain_gradient
    trains: Callable[[Variables, Batch], Any] | None = None
    receive: Callable[[Variables, Any, Any, jax.Array], Variables] | None = None
    send: Callable[[Variables], Variables] | None = None
    wants_last_gradient: Callable[[Any], jax.Array] | None = None
    start_round: Callable[[Variables, Any, Any], Any] = lambda start, client_state, broadcast: None
    gather: Callable[[LossAndGrad, Batch, Any], Any] | None = None
    random: bool = False
    finish_round: Callable[..., tuple[Any, Any]] = nothing_sent
    init_client: Callable[[Variables, jax.Array], Any] | None = None
    personal: Callable[[Any, Variables], Variables] | None = None


@dataclasses.dataclass(frozen=True)
class CohortChooser:
    """A cohort chosen by what the server knows of its clients, instead of `cohort.sampling`.

    Attributes:
      measure: the algorithm's state -> arrays; traced.
      choose: (measured, counts i64[N], K, generator) -> client ids i32[K], which may repeat; on the host,
        `measured` as NumPy arrays. The round waits for it.
    """

    measure: Callable[[State], Any]
    choose: Callable[[Any, np.ndarray, int, np.random.Generator], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """A federated algorithm.

    Attributes:
      init: (key, variables) -> state. `variables` is one freshly initialised model.
      dispatch: (state, cohort, key) -> Starts.
      merge: (state, cohort, starts, results, key) -> (state, metrics). `metrics` is a dict of scalars for
        the run's records.
      deploy: state -> variables of the one model under evaluation.
      local: what happens on a client.
      weights: cohort -> f32[K], unnormalised weights of `Results.mean`; None: no mean is wanted.
      needs_models: False lets the engine accumulate the mean wave by wave and never hold K models.
      stacked: names of the state's fields, at any depth, whose leaves lead with K or N; they are sharded
        over devices.
      personal: (state, ids) -> variables [len(ids), …], what each client itself would use; None: the
        deployed model.
      slot_models: (state, slots, ids) -> variables [len(slots), …], what slots hold after the merge of a
        round in which they served the clients `ids`, of an algorithm whose slots have models of their own;
        None: what their clients would use.
      cohort_chooser: who takes part; None: the run's configuration says.
      with_model: (state, variables) -> state with these as the model that `deploy` gives and that the next
        round starts from; None if the two are not one, or the state has more to say about the next start.
      steps_beyond_mean: whether the merge goes on from the model that was sent by more than the mean of what
        came back, so that a client must have started from just that model.
    """

    init: Callable[[jax.Array, Variables], State]
    dispatch: Callable[[State, Cohort, jax.Array], Starts]
    merge: Callable[[State, Cohort, Starts, Results, jax.Array], tuple[State, dict[str, jax.Array]]]
    deploy: Callable[[State], Variables]
    local: LocalRule = LocalRule()
    weights: Callable[[Cohort], jax.Array] | None = None
    needs_models: bool = True
    stacked: tuple[str, ...] = ()
    personal: Callable[[State, jax.Array], Variables] | None = None
    slot_models: Callable[[State, jax.Array, jax.Array], Variables] | None = None
    cohort_chooser: CohortChooser | None = None
    with_model: Callable[[State, Variables], State] | None = None
    steps_beyond_mean: bool = False

    def client_models(self, state: State, slots: jax.Array, ids: jax.Array) -> Variables:
        """What a round's clients hold once its models are merged. i32[m] slots and ids -> [m, …] models.

        What a client makes of that and of its own state (`LocalRule.personal`) is not looked at.
        """
        if self.slot_models is not None:
            return self.slot_models(state, slots, ids)
        if self.personal is not None:
            return self.personal(state, ids)
        return stacked.broadcast(self.deploy(state), len(ids))

    @property
    def weighs_by_samples(self) -> bool:
        """Whether `weights` gives more to a client that has more samples and takes as many steps."""
        if self.weights is None:
            return False
        ids, counts, steps = (jnp.asarray(pair, jnp.int32) for pair in ((0, 1), (1, 3), (1, 1)))
        less, more = np.asarray(self.weights(Cohort(ids, counts, jnp.int32(0), steps)))
        return bool(more > less)

    def is_stacked(self, state: State) -> Any:
        """Which leaves of a state lead with K or N: a tree of bool like `state`."""

        def below(path, leaf):
            del leaf
            return any(getattr(key, "name", None) in self.stacked for key in path)

        return jax.tree_util.tree_map_with_path(below, state)


class LocalSettings(Protocol):
    """How clients train: of `fedjax_sim.LocalConfig`, which has them all, what an algorithm may ask for."""

    @property
    def epochs(self) -> int | None:
        """Passes over a client's samples in a round; None if the run counts steps instead."""
        ...

    @property
    def steps(self) -> int | None:
        """Optimiser steps of a client in a round; None if the run counts epochs instead."""
        ...

    @property
    def batch_size(self) -> int:
        """Samples in a step."""
        ...

    @property
    def optimizer(self) -> str:
        """Name of the clients' optimiser."""
        ...

    @property
    def lr(self) -> float:
        """Its learning rate in round 0."""
        ...

    @property
    def momentum(self) -> float:
        """Its momentum, if it is sgd."""
        ...

    @property
    def nesterov(self) -> bool:
        """Whether that is Nesterov's."""
        ...


@dataclasses.dataclass(frozen=True)
class Context:
    """What an algorithm may know of the run when it is built.

    Attributes:
      model: the network.
      task: what is learned.
      num_clients: N.
      cohort_size: K.
      rounds: of the run. An algorithm that asks for it makes runs that get no more rounds later, see
        `Prolonged`.
      local: how clients train.
    """

    model: Model
    task: Task
    num_clients: int
    cohort_size: int
    rounds: int
    local: LocalSettings

    def needs_classes(self, name: str) -> None:
        """Raises UserError where the samples have no classes. name: of the algorithm that asks."""
        if self.task.label is None:
            raise UserError(
                "algorithm",
                name,
                f"it works on classes, and the samples of the task {self.task.name} have none",
                "Choose another algorithm, or a classification set.",
            )


@dataclasses.dataclass(frozen=True)
class Prolonged(Context):
    """The context of a run some of whose rounds were done when it was to have another number of them.

    An algorithm that asks for that number is refused, at whatever time it does: its rounds so far may not be
    those of a run of so many.

    Attributes:
      began: the number then.
    """

    began: int = 0

    def __getattribute__(self, name: str) -> Any:
        """Raises UserError for `rounds`."""
        value = super().__getattribute__(name)
        if name == "rounds":
            raise UserError(
                "rounds",
                value,
                f"the run began with {self.began}, and its algorithm goes by their number",
                f"Leave it at {self.began}, or start another run from this one's model, in a folder of its "
                "own (initial.run).",
            )
        return value


@runtime_checkable
class AlgorithmConfig(Protocol):
    """An algorithm's hyper-parameters: a frozen dataclass that builds the record.

    A field annotated so holds another algorithm, in YAML a mapping with its `name`.
    """

    def build(self, context: Context) -> Algorithm:
        """The record. Raises UserError for settings that do not fit the run."""
        ...
