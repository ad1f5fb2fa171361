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
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from fedjax_sim.core import stacked
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.model import Model, Variables
from fedjax_sim.core.task import Batch, LossAndGrad, Task

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
      included: bool[K], False where an update (the model, its uploads or its loss) was not finite and has
        been left out; such a slot of `models` holds its start, and its uploads are 0.
      loss: f32[K], mean training loss over all samples that the client saw in the round.
    """

    models: Variables | None
    mean: Variables | None
    uploads: Any
    included: jax.Array
    loss: jax.Array


# --- on a client ------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """What an optimiser step of one client is made of: what `LocalRule.gradient` returns.

    Attributes:
      loss: f32[], of the batch; for the records.
      variables: the model with its state (batch statistics) moved on. Its `params` are not looked at.
      gradient: by `params`, as the optimiser gets it; like `params`.
      extra: what the next step sees as `extra`, in the same shapes.
      moves: tree like the variables of bool, Python's or bool[]: which leaves the step moves. The others stay
        as they are, batch statistics among them; the optimiser sees a zero gradient of them, and no weight to
        decay. None: all move.
    """

    loss: jax.Array
    variables: Variables
    gradient: Any
    extra: Any = None
    moves: Any = None


class InitClient(Protocol):
    """`LocalRule.init_client`."""

    def __call__(self, variables: Variables, labels: jax.Array, /) -> Any:
        """A client's own state before its first round.

        Args:
          variables: the initial model.
          labels: i32[C], how many training samples of each class it has; i32[0] where samples have none.

        Returns:
          Any pytree; it is kept in a stack over all N clients.
        """
        ...


class Receive(Protocol):
    """`LocalRule.receive`."""

    def __call__(self, model: Variables, client_state: Any, broadcast: Any, key: jax.Array, /) -> Variables:
        """What a client starts to train.

        Args:
          model: what it was sent.
          client_state: its own, as its last round left it.
          broadcast: `Starts.broadcast`.
          key: the client's in this round.

        Returns:
          The start: like `model`, or with more beside it if the rule has a `send`.
        """
        ...


class Send(Protocol):
    """`LocalRule.send`."""

    def __call__(self, variables: Variables, /) -> Variables:
        """The model that goes back, like the one that was sent. Leaves may lead with any axes."""
        ...


class StartRound(Protocol):
    """`LocalRule.start_round`."""

    def __call__(self, start: Variables, client_state: Any, broadcast: Any, /) -> Any:
        """What the steps of a round see besides the model: the start, a control variate, a teacher.

        Args:
          start: what the client starts to train.
          client_state: its own.
          broadcast: `Starts.broadcast`.

        Returns:
          extra: any pytree of arrays.
        """
        ...


class GradientRule(Protocol):
    """`LocalRule.gradient`; `fedjax_sim.core.gradients` makes the usual ones."""

    def __call__(self, loss_and_grad: LossAndGrad, variables: Variables, batch: Batch, extra: Any, /) -> Step:
        """One step's gradient.

        Args:
          loss_and_grad: the loss and its gradient at any variables; of the task's loss, or of one that it is
            given. What goes around the method may have added terms to either.
          variables: the client's, in training.
          batch: the samples; `batch.rng` is a key of this step.
          extra: what `start_round` gave, or the step before.
        """
        ...


class WantsLastGradient(Protocol):
    """`LocalRule.wants_last_gradient`."""

    def __call__(self, broadcast: Any, /) -> jax.Array:
        """Whether `finish_round` gets the gradient of a client's last step in this round. -> bool[]."""
        ...


class FinishRound(Protocol):
    """`LocalRule.finish_round`."""

    def __call__(
        self,
        start: Variables,
        trained: Variables,
        client_state: Any,
        extra: Any,
        steps: jax.Array,
        lr: jax.Array,
        gradient: Any,
        /,
    ) -> tuple[Any, Any]:
        """The end of a client's round.

        Args:
          start: what it started to train.
          trained: what came of it.
          client_state: its own.
          extra: as the last step left it.
          steps: i32[], how many it took.
          lr: f32[], the round's rate.
          gradient: of its last step, by `params`, as the optimiser got it; zero in a round that does not want
            it, None if none does.

        Returns:
          (client_state, upload): the state, in the same shapes, and what goes to the server besides the
          model.
        """
        ...


class PersonalModel(Protocol):
    """`LocalRule.personal`."""

    def __call__(self, client_state: Any, model: Variables, /) -> Variables:
        """What a client uses itself, of its own state and the model that the algorithm has for it."""
        ...


def plain_gradient(loss_and_grad: LossAndGrad, variables: Variables, batch: Batch, extra: Any, /) -> Step:
    """The gradient as it is, of all leaves.

    Args:
      loss_and_grad: (variables, batch) -> ((loss f32[], variables), gradient like `params`).
      variables: the client's model, no slot axis.
      batch: B samples, prepared, with their mask.
      extra: what the step before left; passed on as it is.
    """
    (loss, moved), gradient = loss_and_grad(variables, batch)
    return Step(loss, moved, gradient, extra)


def nothing_more(start: Variables, client_state: Any, broadcast: Any, /) -> None:
    """The start of a round whose steps see the model alone."""
    del start, client_state, broadcast


def nothing_sent(
    start: Variables,
    trained: Variables,
    client_state: Any,
    extra: Any,
    steps: jax.Array,
    lr: jax.Array,
    gradient: Any,
    /,
) -> tuple[Any, None]:
    """The end of a round that changes nothing and sends nothing besides the model.

    Args:
      start: what the client started to train, one model.
      trained: what came of it.
      client_state: what the client keeps between rounds.
      extra: as the last step left it.
      steps: i32[], how many it took.
      lr: f32[], the round's rate.
      gradient: of its last step, like `params`; None if no round wants it.

    Returns:
      (`client_state` as it is, None for no upload).
    """
    del start, trained, extra, steps, lr, gradient
    return client_state, None


@dataclasses.dataclass(frozen=True)
class LocalRule:
    """What a client does differently from plain SGD on the task's loss. All functions are of one client.

    Attributes:
      init_client: a client's own state, kept from round to round. None: it has none.
      receive: what a client makes of the model that it is sent before it trains. None: nothing.
      start_round: what the steps see besides the model.
      gradient: one step's gradient.
      wants_last_gradient: whether `finish_round` is to get the last one. None: never.
      finish_round: what a client keeps, and sends besides the model.
      send: what of the trained variables is the model that goes back; for a rule whose `receive` puts
        something beside it. None: all.
      personal: what a client uses itself. None: the model that the algorithm has for it.
    """

    init_client: InitClient | None = None
    receive: Receive | None = None
    start_round: StartRound = nothing_more
    gradient: GradientRule = plain_gradient
    wants_last_gradient: WantsLastGradient | None = None
    finish_round: FinishRound = nothing_sent
    send: Send | None = None
    personal: PersonalModel | None = None


# --- on the server ----------------------------------------------------------------------------------------


class Init(Protocol):
    """`Algorithm.init`."""

    def __call__(self, key: jax.Array, variables: Variables, /) -> State:
        """The server's state before the first round. variables: one freshly initialised model."""
        ...


class Dispatch(Protocol):
    """`Algorithm.dispatch`."""

    def __call__(self, state: State, cohort: Cohort, key: jax.Array, /) -> Starts:
        """What the clients of a round are sent. key: of the round, for this function alone."""
        ...


class Merge(Protocol):
    """`Algorithm.merge`."""

    def __call__(
        self, state: State, cohort: Cohort, starts: Starts, results: Results, key: jax.Array, /
    ) -> tuple[State, dict[str, jax.Array]]:
        """The server's step.

        Args:
          state: before the round.
          cohort: who took part.
          starts: what `dispatch` gave.
          results: what came back.
          key: of the round, for this function alone.

        Returns:
          (state, metrics): the state in the same shapes, and scalars by name for the run's records.
        """
        ...


class Deploy(Protocol):
    """`Algorithm.deploy`."""

    def __call__(self, state: State, /) -> Variables:
        """The one model under evaluation."""
        ...


class Weights(Protocol):
    """`Algorithm.weights`."""

    def __call__(self, cohort: Cohort, /) -> jax.Array:
        """Unnormalised weights of `Results.mean`. -> f32[K]."""
        ...


class PersonalModels(Protocol):
    """`Algorithm.personal_models`."""

    def __call__(self, state: State, ids: jax.Array, /) -> Variables:
        """What each client itself would use. i32[m] -> [m, …]."""
        ...


class SlotModels(Protocol):
    """`Algorithm.slot_models`."""

    def __call__(self, state: State, slots: jax.Array, ids: jax.Array, /) -> Variables:
        """What slots have after the merge of a round in which they served the clients `ids`.

        Args:
          state: after that merge.
          slots: i32[m].
          ids: i32[m].

        Returns:
          Models [m, …].
        """
        ...


class WithModel(Protocol):
    """`Algorithm.with_model`."""

    def __call__(self, state: State, variables: Variables, /) -> State:
        """The state with `variables` as the model that `deploy` gives and that the next round starts from."""
        ...


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
      init: the state before the first round.
      dispatch: what a round's clients are sent.
      merge: the server's step.
      deploy: the one model under evaluation.
      local: what happens on a client.
      weights: of `Results.mean`. None: no mean is wanted.
      needs_models: False lets the engine accumulate the mean wave by wave and never hold K models.
      stacked: names of the state's fields, at any depth, whose leaves lead with K or N; they are cut over the
        devices, whether these divide K and N or not.
      by_client: those of them that lead with N, begin with equal rows, and are touched by `take_rows` and
        `put_rows` of a cohort's clients alone (or, in `personal_models` and `slot_models`, of those asked
        for); they can lie on the host.
      personal_models: what each client itself would use. None: the deployed model.
      slot_models: what slots have after a merge, of an algorithm whose slots have models of their own. None:
        what their clients would use.
      cohort_chooser: who takes part. None: the run's configuration says.
      with_model: another model in the place of the deployed one. None if the next round starts from more than
        that model, or from another.
      steps_beyond_mean: whether the merge goes on from the model that was sent by more than the mean of what
        came back, so that a client must have started from just that model.
    """

    init: Init
    dispatch: Dispatch
    merge: Merge
    deploy: Deploy
    local: LocalRule = LocalRule()
    weights: Weights | None = None
    needs_models: bool = True
    stacked: tuple[str, ...] = ()
    personal_models: PersonalModels | None = None
    slot_models: SlotModels | None = None
    cohort_chooser: CohortChooser | None = None
    with_model: WithModel | None = None
    steps_beyond_mean: bool = False
    by_client: tuple[str, ...] = ()

    def client_models(self, state: State, slots: jax.Array, ids: jax.Array) -> Variables:
        """What a round's clients have once its models are merged. i32[m] slots and ids -> [m, …] models.

        What a client makes of that and of its own state (`LocalRule.personal`) is not looked at.
        """
        if self.slot_models is not None:
            return self.slot_models(state, slots, ids)
        if self.personal_models is not None:
            return self.personal_models(state, ids)
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
        return _below(self.stacked, state)

    def is_by_client(self, state: State) -> Any:
        """Which leaves of a state can lie on the host: likewise."""
        return _below(self.by_client, state)


def _below(names: tuple[str, ...], state: State) -> Any:
    """Which leaves lie below a field of such a name."""

    def one(path: tuple[Any, ...], leaf: jax.Array) -> bool:
        del leaf
        return any(getattr(key, "name", None) in names for key in path)

    return jax.tree_util.tree_map_with_path(one, state)


# --- how one is built -------------------------------------------------------------------------------------


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

    An algorithm that asks for the number of rounds is refused, whenever it asks: its rounds so far may differ
    from those of a run that was to have the new number from the start.

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
