"""How good the models are: rows of the deployed model, and of what each client uses."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from fedjax_sim.data import Dataset
from fedjax_sim.engine import evaluation, placement
from fedjax_sim.engine.programs import Program
from fedjax_sim.engine.round import ServerState
from fedjax_sim.engine.setup import Setup
from fedjax_sim.records import Row


class Scores:
    """What evaluations say of a run's models.

    Args:
      setup: of the run.
      mesh: its devices.
      personal: (state, ids i32[m]) -> [m, …], the models that clients use themselves. Traced.
    """

    def __init__(self, setup: Setup, mesh: Mesh, personal: Callable[[ServerState, jax.Array], Any]):
        self._setup, self._mesh = setup, mesh
        self._personal = Program(personal, mesh)
        self._evaluators: dict[str, Any] = {}

    def deployed(self, number: int, variables: Any) -> Callable[[], list[Row]]:
        """Starts an evaluation of the deployed model after round `number`; call the result for its rows."""
        with jax.set_mesh(self._mesh):
            outcome = self._evaluator("test")(variables)
        config = self._setup.config.evaluation
        return lambda: _global_rows(number, outcome, self._setup.dataset, config.per_class)

    def of_clients(self, state: ServerState, variables: Any) -> Callable[[], np.ndarray]:
        """Starts evaluating what clients would use on their own test samples; call the result for f64[N].

        Args:
          state: of the server.
          variables: the deployed model, which clients use that have none of their own.
        """
        own = self._setup.partition.test or ()
        with jax.set_mesh(self._mesh):
            return self._own_models(own, state) if self._setup.personalised else self._shared(own, variables)

    def _evaluator(self, name: str) -> evaluation.Evaluator:
        """Over the global test set, or over the pool that clients' own test samples come from."""
        if name not in self._evaluators:
            setup = self._setup
            images, labels = setup.dataset.test_images, setup.dataset.test_labels
            if name == "clients":
                pool = self._local_tests()[0]
                images, labels = setup.dataset.train_images[pool], setup.dataset.train_labels[pool]
            self._evaluators[name] = evaluation.Evaluator(
                setup.model,
                setup.dataset.preprocessing,
                self._mesh,
                images,
                labels,
                placement.forward_batch(setup.config.evaluation, setup.model),
            )
        return self._evaluators[name]

    def _local_tests(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """Distinct samples that some client tests on, and each client's positions among them."""
        own = self._setup.partition.test or ()
        pool, where = np.unique(np.concatenate(own), return_inverse=True)
        return pool, np.split(where, np.cumsum([len(part) for part in own])[:-1])

    def _shared(self, own: Any, variables: Any) -> Callable[[], np.ndarray]:
        """Of clients that all use one model. own: each client's test samples."""
        setup = self._setup
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

    def _own_models(self, own: Any, state: ServerState) -> Callable[[], np.ndarray]:
        """Of clients that have models of their own. own: each client's test samples."""
        setup = self._setup
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
                self._mesh,
                placement.put_replicated(holder, self._mesh),
                placement.put_replicated(labels, self._mesh),
                placement.forward_batch(setup.config.evaluation, setup.model),
            )
        width = max(len(part) for part in own)
        table = np.zeros((len(own), width), np.int32)
        for row, part in zip(table, own, strict=True):
            row[: len(part)] = part
        chunk = setup.devices * math.ceil(min(len(own), 64) / setup.devices)
        predicted = []
        for first in range(0, len(own), chunk):
            ids = np.arange(first, first + chunk, dtype=np.int32) % len(own)
            stack = self._personal(state, ids)
            predicted.append(self._evaluators["personal"](stack, table[ids])[1])

        def accuracies() -> np.ndarray:
            guesses = np.concatenate([np.asarray(part) for part in predicted])[: len(own)]
            hits = [
                np.mean(g[: len(p)] == labels[p]) if len(p) else np.nan
                for g, p in zip(guesses, own, strict=True)
            ]
            return np.asarray(hits)

        return accuracies


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
