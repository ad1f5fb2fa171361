"""A run in memory: everything that a RunConfig describes, made real, and advanced round by round."""

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fedjax_sim import (
    algorithms,
    cohorts,
    contract,
    evaluation,
    finetuning,
    hosts,
    initial,
    models,
    placement,
    waves,
)
from fedjax_sim.algorithms.base import Algorithm, AlgorithmConfig, Cohort, Context, Prolonged
from fedjax_sim.config import RunConfig, as_config, check_given
from fedjax_sim.data import Dataset, Partition, Population, as_dataset, as_partition
from fedjax_sim.errors import UserError
from fedjax_sim.inertia import Effectiveness, Movement
from fedjax_sim.models.base import Model
from fedjax_sim.peel import Peeling
from fedjax_sim.programs import Program
from fedjax_sim.records import Row
from fedjax_sim.rounds import FINE, NAN, Round, RoundInputs, RoundOutputs, ServerState, Watched
from fedjax_sim.streams import INIT, root, stream
from fedjax_sim.training import Shard, Trainer, make_optimizer


class NonFiniteUpdate(UserError):
    """A client's update held an infinity or NaN, and the run was told to stop at that."""


_ALL = " As it was all of the round's: a learning rate of the server (algorithm.lr) may be too high as well."


class NonFiniteServer(UserError):
    """What the server made of finite updates, or handed out, held an infinity or NaN."""


@dataclass(frozen=True)
class Setup:
    """A RunConfig resolved and checked, nothing on a device yet.

    Attributes:
      config: as given.
      dataset: the images.
      partition: who holds which.
      population: both, as padded tables.
      model: the network, its convolution spelled as this backend wants it.
      algorithm: the record.
      cohort_size: K.
      wave: clients side by side on a device.
      devices: how many.
      initial: the model of another run that the first round starts from; None if it does not, or if the run
        has begun, and may no longer need it.
    """

    config: RunConfig
    dataset: Dataset
    partition: Partition
    population: Population
    model: Model
    algorithm: Algorithm
    cohort_size: int
    wave: int
    devices: int
    initial: Any = None

    @property
    def num_clients(self) -> int:
        """N."""
        return self.partition.num_clients

    @functools.cached_property
    def draw(self) -> cohorts.Draw:
        """Round, from 0 -> client ids i32[K], where the algorithm does not choose them itself."""
        config = self.config
        return cohorts.sampler(config.cohort, self.population.counts, config.rounds, config.seed)

    @functools.cached_property
    def steps(self) -> np.ndarray:
        """i64[N], optimiser steps of each client in a round."""
        return waves.steps_of(self.population.counts, self.config.local)

    @functools.cached_property
    def trainer(self) -> Trainer:
        """Local training, specialised to all of this."""
        return Trainer(
            model=self.model,
            rule=self.algorithm.local,
            local=self.config.local,
            preprocessing=self.dataset.preprocessing,
            width=self.wave,
            ragged=len(np.unique(self.steps)) > 1,
            partial=bool(np.any(self.population.counts % self.config.local.batch_size)),
            stochastic=self.model.stochastic or self.algorithm.local.random,
            gradients=any(meter.gradients for meter in self.meters.values()),
        )

    @property
    def personalised(self) -> bool:
        """Whether clients may use models of their own."""
        return self.algorithm.personal is not None or self.algorithm.local.personal is not None

    @functools.cached_property
    def label_counts(self) -> np.ndarray:
        """i32[N, C], training samples of each class that each client has."""
        labels, classes = self.dataset.train_labels, self.model.num_classes
        return np.stack([np.bincount(labels[own], minlength=classes) for own in self.partition.train]).astype(
            np.int32
        )

    @functools.cached_property
    def meters(self) -> dict[str, Any]:
        """Diagnostics of every round, by name."""
        wanted = self.config.inertia
        return {"movement": Movement(self.model, wanted.reference)} if wanted.measure else {}


def prepare(
    config: RunConfig,
    *,
    dataset: Dataset | None = None,
    partition: Partition | None = None,
    model: Model | None = None,
    algorithm: AlgorithmConfig | None = None,
    began: int | None = None,
) -> Setup:
    """Resolves a RunConfig; the keywords take the place of what it would load or build.

    Args:
      config: what to run.
      dataset: in the place of what `config` names, as the next three.
      partition: likewise.
      model: likewise.
      algorithm: likewise.
      began: rounds that the run was to have when its first ones were done, if it has others now.

    Raises:
      UserError: anything that cannot work, before anything is compiled; with `began`, perhaps later, see
        `fedjax_sim.algorithms.base.Prolonged`.
    """
    hosts.check_backend()
    config, dataset, partition = as_config(config), as_dataset(dataset), as_partition(partition)
    check_given(config, dataset=dataset, partition=partition, model=model, algorithm=algorithm)
    if algorithm is not None:
        config = replace(config, algorithm=algorithm)
    dataset = dataset or config.data.load()
    shape = dataset.train_images.shape[1:]
    if model is None:
        options = dict(config.model.options)
        if config.model.norm is not None:
            options["norm"] = config.model.norm
        if config.model.dtype != "float32":
            options["dtype"] = jnp.dtype(config.model.dtype)
        model = models.create(config.model.name, shape, dataset.num_classes, **options)
    else:
        model = models.adapted(model, shape, dataset.num_classes, name=models.name_of(model))
    if tuple(model.input_shape) != tuple(shape) or model.num_classes < dataset.num_classes:
        raise UserError(
            "model",
            model.name,
            f"it takes images {tuple(model.input_shape)} of {model.num_classes} classes, and {dataset.name} "
            f"has {tuple(shape)} of {dataset.num_classes}",
            "Make the model for these images.",
        )
    partition = initial.partition(config, dataset, partition)
    population = Population.build(dataset, partition)
    cohort_size = config.cohort.count(partition.num_clients)
    if config.evaluation.per_client and partition.test is None:
        raise UserError(
            "evaluation.per_client",
            True,
            "the partition gives clients no test samples of their own",
            "Set partition.local_test to holdout or matching.",
        )
    make_optimizer(config.local)
    devices = placement.make_mesh(config.execution.devices).size
    wave, conv = placement.speed_defaults(config.execution, model, cohort_size, devices)
    model, first = model.spelled(conv), None
    makes = Context if began is None else partial(Prolonged, began=began)
    context = makes(
        model=model,
        num_clients=partition.num_clients,
        cohort_size=cohort_size,
        rounds=config.rounds,
        epochs=config.local.epochs,
        optimizer=config.local.optimizer,
        momentum=config.local.momentum,
        nesterov=config.local.nesterov,
    )
    record = contract.build(config.algorithm, context)
    if record.local.send is not None and config.local.keep_optimizer:
        raise UserError(
            "local.keep_optimizer",
            True,
            "the algorithm's clients train more than the model that they are sent; of that no state is kept",
            "Leave it out, or take another algorithm.",
        )
    if record.selection is not None and config.cohort.sampling != "uniform":
        raise UserError(
            "cohort.sampling",
            config.cohort.sampling,
            "the algorithm chooses its clients itself",
            "Leave cohort.sampling out, or take another algorithm.",
        )
    if config.cohort.sampling == "by_size" and record.weighs_by_samples:
        warnings.warn(
            "cohort.sampling = 'by_size' draws large clients more often, and the algorithm weighs those that "
            "it got by their samples: a client's size enters the mean model twice. Unless that is meant, set "
            "the algorithm's weights to uniform, or leave cohort.sampling at uniform.",
            stacklevel=2,
        )
    if config.initial.run is not None and not initial.begun(config):
        first = initial.of_run(config.initial.run, model, dataset)
    setup = Setup(config, dataset, partition, population, model, record, cohort_size, wave, devices, first)
    _ = setup.draw  # which may find fault with a schedule
    if not algorithms.builtin(config.algorithm):  # those are held to it by a test
        contract.check(
            record,
            setup.trainer,
            name=algorithms.label(config.algorithm),
            num_clients=setup.num_clients,
            cohort_size=cohort_size,
            mesh=placement.make_mesh(setup.devices),
        )
    return setup


class Instrument(Protocol):
    """Observers that belong together, when and whom they observe, and the records that come of it.

    Attributes:
      observers: what is compiled into measured rounds, by name; their rows come in this order.
    """

    observers: dict[str, Any]

    def due(self, number: int, rounds: int) -> bool:
        """Whether round `number`, from 1, of a run of `rounds` is measured."""
        ...

    def slots(self, cohort: np.ndarray) -> np.ndarray:
        """Whom to watch. i32[K] client ids -> i32[m] slots."""
        ...

    def given(self, ids: np.ndarray) -> dict[str, Any]:
        """What each observer wants at hand for the clients i32[m], by name."""
        ...

    def rows(self, number: int, ids: np.ndarray, given: Any, observed: dict[str, Any]) -> list[Row]:
        """The records of round `number`; `given`, `observed`: by the observers' names."""
        ...


def instruments(setup: Setup, mesh: Mesh, put: Callable[[np.ndarray], Any]) -> list[Instrument]:
    """Those that the configuration asks for. `put` places an array on all devices."""
    config, dataset, partition = setup.config, setup.dataset, setup.partition
    made: list[Instrument] = []
    if config.peel.every:
        made.append(Peeling(config, dataset, partition, setup.trainer, mesh, put))
    if config.inertia.every:
        made.append(Effectiveness(config, setup.model, dataset, partition, mesh, put))
    return made


def watch(due: Sequence[Instrument], cohort: np.ndarray) -> Watched | None:
    """What is asked of a round: all observers look at the clients that the first instrument chooses."""
    if not due:
        return None
    slots = due[0].slots(cohort)
    given = [instrument.given(cohort[slots]) for instrument in due]
    return Watched(cast(jax.Array, slots), {name: g for part in given for name, g in part.items()})


class Simulation:
    """A federated run: `for rows in simulation.advance(): …`, or `simulation.run()`.

    Attributes:
      setup: what is being run.
      round: the next round, from 0; also the number of rounds done.
      state: the server's state, on the devices. The initial one is made here, or, of a run that has begun,
        when it is asked for: a checkpoint mostly takes its place.
      mesh: the devices.
      program: the compiled round, `(state, inputs(r)[0], shard) -> (state, outputs)`.
      shard: the training set, on the devices.
      ending: metrics that the last round has only because it is the last.
    """

    def __init__(self, config: RunConfig | Setup, **replacements: Any):
        """Takes a RunConfig and the keywords of `prepare`, or a Setup."""
        setup = config if isinstance(config, Setup) else prepare(config, **replacements)
        self.setup = setup
        self.mesh = placement.make_mesh(setup.devices)
        self.round = 0
        self.ending: set[str] = set()
        put = partial(placement.put_replicated, mesh=self.mesh)
        key = root(setup.config.seed)
        self._key = jax.random.wrap_key_data(
            put(np.asarray(jax.random.key_data(key))), impl=jax.random.key_impl(key)
        )
        population = setup.population
        self._steps, self._trainer = setup.steps, setup.trainer
        even = setup.cohort_size % (setup.devices * setup.wave) == 0
        in_order = even and (not self._trainer.ragged or setup.devices * setup.wave == 1)
        self._instruments = instruments(setup, self.mesh, put)
        observers = {name: o for instrument in self._instruments for name, o in instrument.observers.items()}
        self._function = Round(setup.algorithm, self._trainer, self.mesh, in_order, observers, setup.meters)
        streams = None if population.streams is None else put(population.streams)
        self.shard = Shard(put(population.images), put(population.labels), put(population.indices), streams)
        self._shardings = self._state_shardings()
        if not initial.begun(setup.config):
            self.state = self._initial_state()
        self.program = Program(
            _named(self._function),
            self.mesh,
            donate_argnums=(0,) if setup.config.execution.donate else (),
            out_shardings=(self._shardings, placement.replicated(self.mesh)),
        )
        self._evaluators: dict[str, Any] = {}
        chooser = setup.algorithm.selection
        self._measure = chooser and Program(chooser.measure, self.mesh, **placement.readable(self.mesh))
        self._deploy = Program(
            setup.algorithm.deploy, self.mesh, out_shardings=placement.replicated(self.mesh)
        )

    # --- state --------------------------------------------------------------------------------------

    @functools.cached_property
    def state(self) -> ServerState:
        """See the class."""
        return self._initial_state()

    def _make_state(self, key: jax.Array, variables: Any = None) -> ServerState:
        """The state before the first round; `variables` None: of a fresh model."""
        if variables is None:
            variables = self.setup.model.init(stream(key, 0))
        else:  # a copy, as in `restore`: passed through, they might be overwritten by the next round
            variables = jax.tree.map(jnp.copy, variables)
        labels = jnp.asarray(self.setup.label_counts)
        clients = jax.vmap(self._trainer.init_client, in_axes=(None, 0))(variables, labels)
        state = self.setup.algorithm.init(stream(key, 1), variables)
        deployed = self.setup.algorithm.deploy(state)
        meters = {name: meter.init(deployed) for name, meter in self.setup.meters.items()}
        # A copy, so that no two leaves of the state share a buffer that a round will overwrite.
        return ServerState(state, clients, jax.tree.map(jnp.copy, meters))

    def _state_shardings(self) -> ServerState:
        shapes = jax.eval_shape(self._make_state, root(0))
        same, cut = placement.replicated(self.mesh), partial(placement.sharded, self.mesh)
        inner = jax.tree.map(
            lambda stack, leaf: cut(leaf.shape[0]) if stack else same,
            self.setup.algorithm.is_stacked(shapes.algorithm),
            shapes.algorithm,
        )
        clients = jax.tree.map(lambda leaf: cut(leaf.shape[0]), shapes.clients)
        return ServerState(inner, clients, jax.tree.map(lambda leaf: same, shapes.meters))

    def _initial_state(self) -> ServerState:
        key, variables = stream(self._key, INIT), initial.variables(self.setup)
        with jax.set_mesh(self.mesh):
            return Program(self._make_state, self.mesh, out_shardings=self._shardings)(key, variables)

    def abstract_state(self) -> ServerState:
        """Shapes, dtypes and shardings of the state, as a checkpoint's restore wants them."""
        return jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
            jax.eval_shape(self._make_state, root(0)),
            self._shardings,
        )

    def restore(self, state: ServerState, round_index: int) -> None:
        """Continues from a copy of `state` after `round_index` rounds."""
        # A copy, because device_put may alias what it is given, and the next round overwrites its state.
        self.state = jax.tree.map(jnp.copy, jax.device_put(state, self._shardings))
        self.round = round_index

    # --- rounds -------------------------------------------------------------------------------------

    def inputs(self, round_index: int) -> tuple[RoundInputs, float]:
        """What the host decides of a round, and the plan's padding waste.

        Of an algorithm that chooses its clients itself, only of the next round.
        """
        setup = self.setup
        ids = setup.draw(round_index) if self._measure is None else self._selected(round_index)
        counts = setup.population.counts[ids]
        plan = waves.make_plan(self._steps[ids], setup.devices, setup.wave)
        waste = waves.padding_waste(counts, plan, setup.config.local, setup.wave)
        lr = setup.config.local.lr_at(round_index, setup.config.rounds)
        # Host values still; the compiled round, whose view the types give, takes them as device arrays.
        cohort = Cohort(
            cast(jax.Array, ids),
            cast(jax.Array, counts.astype(np.int32)),
            cast(jax.Array, np.int32(round_index)),
            cast(jax.Array, self._steps[ids].astype(np.int32)),
        )
        return RoundInputs(
            cohort=cohort,
            plan=plan,
            lr=cast(jax.Array, np.float32(lr)),
            key=self._key,
        ), waste

    def _selected(self, round_index: int) -> np.ndarray:
        """The cohort that the algorithm chooses."""
        chooser = self.setup.algorithm.selection
        assert chooser is not None
        assert self._measure is not None
        with jax.set_mesh(self.mesh):
            measured = jax.device_get(self._measure(self.state.algorithm))
        drawn = cohorts.generator(self.setup.config.seed, round_index)
        counts, wanted = self.setup.population.counts, self.setup.cohort_size
        chosen = np.asarray(chooser.choose(measured, counts, wanted, drawn))
        integers = np.issubdtype(chosen.dtype, np.integer)
        if chosen.shape != (wanted,) or not integers or chosen.min() < 0 or chosen.max() >= len(counts):
            raise UserError(
                "algorithm.selection.choose",
                chosen[:8].tolist() if chosen.ndim else chosen.tolist(),
                f"in round {round_index + 1} it did not choose {wanted} of clients 0 to {len(counts) - 1}",
                f"Return i32[{wanted}], their numbers.",
            )
        return chosen

    def trace(self) -> None:
        """Traces the next round, and what the algorithm deploys, without compiling either."""
        inputs, state = self.inputs(self.round)[0], self.abstract_state()
        with jax.set_mesh(self.mesh):
            jax.eval_shape(self._function, state, inputs, self.shard)
            jax.eval_shape(self.setup.algorithm.deploy, state.algorithm)
            if self.setup.personalised:
                jax.eval_shape(self._function.personal, state, inputs.cohort.ids)

    def step(self) -> Callable[[], list[Row]]:
        """Starts the next round, and its evaluation if one is due, without waiting for them.

        Call the result for the round's rows. It raises NonFiniteUpdate if a client's update was not finite
        and `local.non_finite` is stop; the state has moved on by then, without that update. It raises
        NonFiniteServer if what the algorithm's own functions made is not finite, whatever that setting.
        """
        inputs, waste = self.inputs(self.round)
        watched = watch(self._due(self.round + 1), np.asarray(inputs.cohort.ids))
        with jax.set_mesh(self.mesh):
            self.state, outputs = self.program(self.state, inputs, self.shard, watched)
        self.round += 1
        parts: list[Callable[[], list[Row]]] = [
            partial(self._rows, self.round, inputs, outputs, waste, watched)
        ]
        if self.due():
            parts.append(self.evaluate())
        return partial(_joined, parts)

    def _rows(
        self,
        number: int,
        inputs: RoundInputs,
        outputs: RoundOutputs,
        waste: float,
        watched: Watched | None,
    ) -> list[Row]:
        fetched: RoundOutputs = jax.device_get(outputs)
        ids, included = np.asarray(inputs.cohort.ids), fetched.included
        bad = np.unique(ids[~included]).tolist()
        stops = bad and self.setup.config.local.non_finite == "stop"
        if not stops or not fetched.handed.all():
            self._check_server(number, ids, fetched)
        if stops:
            raise NonFiniteUpdate(
                "local.non_finite",
                "stop",
                f"in round {number} the update of client(s) {bad} was not finite",
                "Lower local.lr, set local.clip_norm, or leave such clients out with "
                "local.non_finite = skip." + (_ALL if not included.any() else ""),
            )
        weights = np.where(included, np.asarray(inputs.cohort.counts), 0).astype(np.float64)
        rows = [Row(number, "padding_waste", waste), Row(number, "lr", float(inputs.lr))]
        if weights.sum() > 0:
            loss = np.where(included, fetched.loss, 0).astype(np.float64)
            rows.append(Row(number, "train_loss", float(loss @ weights / weights.sum())))
        rows += [Row(number, "left_out", 1.0, client=client) for client in bad]
        rows += [Row(number, name, float(value)) for name, value in fetched.metrics.items()]
        for name, meter in self.setup.meters.items():
            rows += meter.rows(number, fetched.observed[name])
        if watched is not None:
            them = ids[np.asarray(watched.slots)]
            for instrument in self._due(number):
                made = instrument.rows(number, them, watched.given, fetched.observed)
                if not instrument.due(number, number + 1):
                    self.ending.update(row.metric for row in made)
                rows += made
        return rows

    def _check_server(self, number: int, ids: np.ndarray, fetched: RoundOutputs) -> None:
        """Raises NonFiniteServer for a fault of round `number` that is none of its clients'."""
        server, misled = fetched.server, np.unique(ids[~fetched.handed]).tolist()
        of_state, of_model = np.asarray(server.state), np.asarray(server.deployed)
        if misled:
            found = self._not_finite()
            before = f", of what merge made in round {number - 1} or before" if number > 1 else ""
            why = f"in round {number} what its dispatch sent to client(s) {misled} was not finite{before}"
        elif (of_state == NAN).any() or (of_model != FINE).any():
            kinds = np.concatenate([of_state, of_model])
            found = [name for name, kind in zip(server.names, kinds, strict=True) if kind != FINE]
            maker = "merge" if of_state.any() else "deploy"
            why = f"in round {number} its {maker} made numbers that are not finite, of finite updates"
        else:
            return
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            why += f": {', '.join(found[:3])}{more}"
        raise NonFiniteServer(
            "algorithm",
            algorithms.label(self.setup.config.algorithm),
            why,
            "Lower the server's learning rate if it has one (algorithm.lr, algorithm.server_lr) or local.lr; "
            "in an algorithm of your own look for a division by 0, or a root of what is below it.",
        )

    def _not_finite(self) -> list[str]:
        """Leaves of the algorithm's state as it now is that are not, as far as this process has them."""
        return [
            f"state{jax.tree_util.keystr(path)}"
            for path, leaf in jax.tree_util.tree_flatten_with_path(self.state.algorithm)[0]
            if jnp.issubdtype(leaf.dtype, jnp.inexact)
            and leaf.is_fully_addressable
            and not np.isfinite(np.asarray(leaf, np.complex64)).all()
        ]

    def _due(self, number: int) -> list[Instrument]:
        """The instruments that measure round `number`, from 1."""
        rounds = self.setup.config.rounds
        return [instrument for instrument in self._instruments if instrument.due(number, rounds)]

    def due(self) -> bool:
        """Whether the model as it now is should be evaluated."""
        every = self.setup.config.evaluation.every
        return every > 0 and (self.round % every == 0 or self.round == self.setup.config.rounds)

    def advance(self, rounds: int | None = None) -> Iterator[list[Row]]:
        """Runs `rounds` rounds (None: to the end), and yields each one's rows, evaluation included.

        One round is always under way while the rows of the one before are handed out.
        """
        last = self.setup.config.rounds if rounds is None else self.round + rounds
        waiting: list[Callable[[], list[Row]]] = []
        while self.round < last:
            under_way = self.step()
            for part in waiting:
                yield part()
            waiting = [under_way]
        for part in waiting:
            yield part()

    # --- evaluation ---------------------------------------------------------------------------------

    @property
    def variables(self) -> Any:
        """The deployed model."""
        with jax.set_mesh(self.mesh):
            return self._deploy(self.state.algorithm)

    def evaluate(self) -> Callable[[], list[Row]]:
        """Starts an evaluation of the model as it now is; call the result for its rows."""
        number, config = self.round, self.setup.config.evaluation
        variables = self.variables
        with jax.set_mesh(self.mesh):
            outcome = self._evaluator("test")(variables)
            personal = self._personal(variables) if config.per_client else None
        tune = config.finetune > 0 and number == self.setup.config.rounds
        kept = self.state if tune else None  # which no later round overwrites

        def rows() -> list[Row]:
            out = _global_rows(number, outcome, self.setup.dataset, config.per_class)
            if personal is not None:
                out += client_rows(number, personal(), "client_accuracy")
            if config.every and number % config.every:
                self.ending.update(row.metric for row in out)
            if kept is not None:
                tuned = finetuning.rows(self.setup, self._function, kept)
                self.ending.update(row.metric for row in tuned)
                out += tuned
            return out

        return rows

    def client_accuracies(self) -> Callable[[], np.ndarray]:
        """Starts evaluating what clients would use on their own test samples; call the result for f64[N]."""
        with jax.set_mesh(self.mesh):
            return self._personal(self.variables)

    def _evaluator(self, name: str) -> evaluation.Evaluator:
        """Over the global test set, or over the pool that clients' own test samples come from."""
        if name not in self._evaluators:
            setup = self.setup
            images, labels = setup.dataset.test_images, setup.dataset.test_labels
            if name == "clients":
                pool = self._local_tests()[0]
                images, labels = setup.dataset.train_images[pool], setup.dataset.train_labels[pool]
            self._evaluators[name] = evaluation.Evaluator(
                setup.model,
                setup.dataset.preprocessing,
                self.mesh,
                images,
                labels,
                placement.forward_batch(setup.config.evaluation, setup.model),
            )
        return self._evaluators[name]

    def _local_tests(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """Distinct samples that some client tests on, and each client's positions among them."""
        own = self.setup.partition.test or ()
        pool, where = np.unique(np.concatenate(own), return_inverse=True)
        return pool, np.split(where, np.cumsum([len(part) for part in own])[:-1])

    def _personal(self, variables: Any) -> Callable[[], np.ndarray]:
        """Starts what each client's own accuracy needs; call the result for f64[N]."""
        setup = self.setup
        own = setup.partition.test or ()
        if setup.personalised:
            return self._personal_models(own)
        if setup.partition.test_from == "test":
            outcome, positions, labels = self._evaluator("test")(variables), own, setup.dataset.test_labels
        else:
            pool, positions = self._local_tests()
            outcome, labels = self._evaluator("clients")(variables), setup.dataset.train_labels[pool]

        def accuracies() -> np.ndarray:
            correct = np.asarray(outcome[1]) == labels
            owners = np.repeat(np.arange(len(positions)), [len(part) for part in positions])
            return evaluation.by_client(correct[np.concatenate(positions)], owners, len(positions))

        return accuracies

    def _personal_models(self, own: Any) -> Callable[[], np.ndarray]:
        setup = self.setup
        holder = (
            setup.dataset.test_images if setup.partition.test_from == "test" else setup.dataset.train_images
        )
        labels = (
            setup.dataset.test_labels if setup.partition.test_from == "test" else setup.dataset.train_labels
        )
        if "personal" not in self._evaluators:
            self._evaluators["personal"] = evaluation.ClientEvaluator(
                setup.model,
                setup.dataset.preprocessing,
                self.mesh,
                placement.put_replicated(holder, self.mesh),
                placement.put_replicated(labels, self.mesh),
                placement.forward_batch(setup.config.evaluation, setup.model),
            )
            self._evaluators["personal_of"] = Program(self._function.personal, self.mesh)
        width = max(len(part) for part in own)
        table = np.zeros((len(own), width), np.int32)
        for row, part in zip(table, own, strict=True):
            row[: len(part)] = part
        chunk = setup.devices * math.ceil(min(len(own), 64) / setup.devices)
        predicted = []
        for first in range(0, len(own), chunk):
            ids = np.arange(first, first + chunk, dtype=np.int32) % len(own)
            stack = self._evaluators["personal_of"](self.state, ids)
            predicted.append(self._evaluators["personal"](stack, table[ids])[1])

        def accuracies() -> np.ndarray:
            guesses = np.concatenate([np.asarray(part) for part in predicted])[: len(own)]
            hits = [
                np.mean(g[: len(p)] == labels[p]) if len(p) else np.nan
                for g, p in zip(guesses, own, strict=True)
            ]
            return np.asarray(hits)

        return accuracies


def _named(function: Round) -> Callable[..., Any]:
    """The round under a name that profiles and logs can show."""

    def federated_round(state, inputs, shard, watched=None):
        return function(state, inputs, shard, watched)

    return federated_round


def _joined(parts: list[Callable[[], list[Row]]]) -> list[Row]:
    return [row for part in parts for row in part()]


def _global_rows(number: int, outcome: Any, dataset: Dataset, per_class: bool) -> list[Row]:
    losses, predicted = (np.asarray(part) for part in outcome)
    correct = predicted == dataset.test_labels
    rows = [
        Row(number, "accuracy", float(correct.mean())),
        Row(number, "loss", float(losses.astype(np.float64).mean())),
    ]
    if per_class:
        each = evaluation.by_client(correct, dataset.test_labels, dataset.num_classes)
        rows += [
            Row(number, f"accuracy_class_{c}", float(value))
            for c, value in enumerate(each)
            if np.isfinite(value)
        ]
    return rows


def client_rows(number: int, accuracies: np.ndarray, name: str) -> list[Row]:
    """Mean, percentiles and each of clients' accuracies f64[N], NaN for those without test samples."""
    have = accuracies[np.isfinite(accuracies)]
    rows = [
        Row(number, f"{name}_mean", float(have.mean())),
        Row(number, f"{name}_p10", float(np.percentile(have, 10))),
        Row(number, f"{name}_p90", float(np.percentile(have, 90))),
    ]
    rows += [Row(number, name, float(a), client=c) for c, a in enumerate(accuracies) if np.isfinite(a)]
    return rows
