"""How good the models are: rows of the deployed model, and of what each client uses."""

import functools
import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import numpy as np

from fedjax_sim.core.model import Variables
from fedjax_sim.data.ragged import Ragged, runs
from fedjax_sim.engine import evaluation, placement
from fedjax_sim.engine.device_data import DataStore
from fedjax_sim.engine.jaxpr_memory import bytes_of
from fedjax_sim.engine.programs import CachedJit, cached_jit
from fedjax_sim.engine.round import ServerState
from fedjax_sim.engine.setup import Setup
from fedjax_sim.records import Row

_UNDER_WAY, _BYTES = 32, 2**28
"""Chunks of clients whose own models an accelerator may be behind by, and bytes of these on one device, where
memory is taken when a program is started, not when it runs.

CPU devices are waited for after each chunk: of hundreds of programs in a row that exchange rows, XLA's CPU
backend came to a deadlock.
"""


class Scores:
    """What evaluations say of a run's models.

    Args:
      setup: of the run.
      store: has its samples on the devices.
      personal: (state, ids i32[m]) -> [m, …], the models that clients use themselves. Traced.
      state_for: ids i32[m] -> the run's state, with what these clients keep.
    """

    def __init__(
        self,
        setup: Setup,
        store: DataStore,
        personal: Callable[[ServerState, jax.Array], Any],
        state_for: Callable[[np.ndarray], ServerState],
    ):
        self._setup, self._store, self._mesh = setup, store, store.mesh
        self._personal, self._state_for = cached_jit(personal, self._mesh), state_for
        self._evaluators: dict[str, Any] = {}
        if setup.personalised and setup.config.evaluation.per_client:
            store.whole(self._clients_pool)  # before an evaluator cuts them

    @property
    def _clients_pool(self) -> Mapping[str, np.ndarray]:
        """What clients' own test samples are taken from."""
        dataset = self._setup.dataset
        return dataset.test if self._setup.partition.test_from == "test" else dataset.train

    def outcome(self, variables: Variables) -> Callable[[], evaluation.Outcome]:
        """Starts an evaluation of a model on the test set. Gives what `rows` makes records of."""
        with jax.set_mesh(self._mesh):
            found = self.evaluator("test")(variables)
        return lambda: found

    def of_clients(self, variables: Variables) -> Callable[[], np.ndarray]:
        """Starts evaluating what clients would use on their own test samples; call the result for f64[N].

        Args:
          variables: the deployed model, which clients use that have none of their own.
        """
        own = Ragged.of(self._setup.partition.test or ())
        with jax.set_mesh(self._mesh):
            return self._own_models(own) if self._setup.personalised else self._shared(own, variables)

    def programs_of_clients(
        self, variables: Any, state_for: Callable[[int], Any]
    ) -> list[tuple[CachedJit, tuple[Any, ...]]]:
        """What `of_clients` runs besides `deployed`, each with arguments of its first time; shapes will do.

        Args:
          variables: the deployed model.
          state_for: m -> the run's state, with what m clients keep.
        """
        setup = self._setup
        if setup.personalised:
            own, count = Ragged.of(setup.partition.test or ()), self._together
            ids, table = self._chunk(own, 0)
            given = state_for(count), ids
            mine, pool = placement.cut(self._mesh), self._store.whole(self._clients_pool)
            read = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=mine),
                (jax.eval_shape(self._personal.function, *given), table),
            )
            return [(self._personal, given), (self._client_evaluator.program, (*read, pool))]
        if setup.partition.test_from == "test":
            return []
        evaluator = self.evaluator("clients")
        return [(evaluator.program, (variables, *evaluator.data))]

    def evaluator(self, name: str) -> evaluation.Evaluator:
        """Over the global test set ("test"), or the pool of clients' own test samples ("clients")."""
        if name not in self._evaluators:
            setup = self._setup
            example, rows = setup.dataset.test, None
            if name == "clients":
                example, rows = setup.dataset.train, self._local_tests[0]
            batch = placement.forward_batch(setup.config.evaluation, setup.model, setup.mesh)
            self._evaluators[name] = evaluation.Evaluator(
                setup.model, setup.task, self._store, example, batch, rows
            )
        return self._evaluators[name]

    @functools.cached_property
    def _local_tests(self) -> tuple[np.ndarray, Ragged]:
        """Distinct samples that some client tests on, and each client's positions among them."""
        own = Ragged.of(self._setup.partition.test or ())
        pool, where = np.unique(own.flat, return_inverse=True)
        return pool, own.within(where)

    def _shared(self, own: Ragged, variables: Variables) -> Callable[[], np.ndarray]:
        """Of clients that all use one model. own: each client's test samples."""
        metric = self._setup.task.headline
        if self._setup.partition.test_from == "test":
            outcome, positions = self.evaluator("test")(variables), own
        else:
            positions = self._local_tests[1]
            outcome = self.evaluator("clients")(variables)

        def figures() -> np.ndarray:
            statistics = np.asarray(outcome[1][metric.name])
            return evaluation.by_group(metric, statistics[positions.flat], positions.owners, len(positions))

        return figures

    def _own_models(self, own: Ragged) -> Callable[[], np.ndarray]:
        """Of clients that have models of their own. own: each client's test samples."""
        metric, evaluator = self._setup.task.headline, self._client_evaluator
        sizes, pool = own.sizes, self._store.whole(self._clients_pool)
        columns = np.arange(sizes.max())
        share = bytes_of(self._setup.model.abstract) * -(-self._together // self._mesh.size)
        behind = 0 if self._store.shares_host else min(_UNDER_WAY, _BYTES // share)
        under_way: deque[tuple[int, jax.Array]] = deque()
        fetched: list[np.ndarray] = []

        def fetch() -> None:
            first, outcome = under_way.popleft()
            mine = columns < sizes[first : first + self._together, None]
            fetched.append(np.asarray(outcome)[: len(mine)][mine])

        for first in range(0, len(own), self._together):
            ids, table = self._chunk(own, first)
            outcome = evaluator(self._personal(self._state_for(ids), ids), table, pool)[1]
            under_way.append((first, outcome[metric.name]))
            if len(under_way) > behind:
                fetch()

        def figures() -> np.ndarray:
            while under_way:
                fetch()
            return evaluation.by_list(metric, np.concatenate(fetched), own)

        return figures

    @functools.cached_property
    def _client_evaluator(self) -> evaluation.ClientEvaluator:
        setup = self._setup
        batch = placement.forward_batch(setup.config.evaluation, setup.model, setup.mesh)
        return evaluation.ClientEvaluator(setup.model, setup.task, self._mesh, batch)

    @property
    def _together(self) -> int:
        return together(self._setup)

    def _chunk(self, own: Ragged, first: int) -> tuple[np.ndarray, np.ndarray]:
        """Clients from `first` on, i32[m], and their test samples, i32[m, t], with zeros behind them."""
        ids = np.arange(first, first + self._together, dtype=np.int32) % len(own)
        columns = np.arange(own.sizes.max())
        table = np.zeros((len(ids), len(columns)), np.int32)
        table[columns < own.sizes[ids, None]] = own.flat[runs(own.offsets[ids], own.sizes[ids])]
        return ids, table

    def rows(self, number: int, outcome: evaluation.Outcome) -> list[Row]:
        """The records of an evaluation on the global test set after round `number`."""
        setup, task = self._setup, self._setup.task
        losses, statistics = np.asarray(outcome[0]), {k: np.asarray(leaf) for k, leaf in outcome[1].items()}
        rows = [Row(number, m.name, evaluation.figure(m, statistics[m.name])) for m in task.metrics]
        rows.append(Row(number, "loss", float(losses.astype(np.float64).mean())))
        if setup.config.evaluation.per_class:
            first, classes = task.headline, cast(np.ndarray, setup.dataset.test_classes)
            each = evaluation.by_group(first, statistics[first.name], classes, task.num_classes)
            rows += [
                Row(number, f"{first.name}_class_{c}", float(value))
                for c, value in enumerate(each)
                if np.isfinite(value)
            ]
        return rows


def together(setup: Setup) -> int:
    """How many clients' own models are evaluated at once; the devices divide it."""
    return setup.devices * math.ceil(min(setup.num_clients, 64) / setup.devices)


def client_rows(number: int, figures: np.ndarray, name: str) -> list[Row]:
    """Mean, percentiles and each of clients' figures f64[N], NaN for those without test samples."""
    have = figures[np.isfinite(figures)]
    rows = [
        Row(number, f"{name}_mean", float(have.mean())),
        Row(number, f"{name}_p10", float(np.percentile(have, 10))),
        Row(number, f"{name}_p90", float(np.percentile(have, 90))),
    ]
    each = zip(np.flatnonzero(np.isfinite(figures)).tolist(), have.tolist(), strict=True)
    return rows + [Row(number, name, value, "", client) for client, value in each]
