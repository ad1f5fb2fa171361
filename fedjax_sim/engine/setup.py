"""What a run is made of: its data, clients, model and algorithm, resolved and checked."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from jax.sharding import Mesh

from fedjax_sim.config import RunConfig
from fedjax_sim.core.algorithm import Algorithm
from fedjax_sim.core.model import Model
from fedjax_sim.core.task import Task
from fedjax_sim.data import Partition, Samples, label_counts
from fedjax_sim.engine import cohorts, feed, waves
from fedjax_sim.engine.clients import Trainer
from fedjax_sim.engine.debugging import UNWATCHED, Watch
from fedjax_sim.engine.device_data import order_lengths
from fedjax_sim.engine.observing import Instrument
from fedjax_sim.engine.round import Meter


@dataclass(frozen=True)
class DiagnosticContext:
    """What a diagnostic is built for.

    Attributes:
      setup: the run: its config, dataset, partition, model, algorithm … For a meter it has no meters yet, so
        that a meter must not take its trainer.
      mesh: the devices.
      put: places an array [n, …] on all of them; samples of several axes, such as images, as
        `engine.device_data.Rows`, of which `rows[index]` are the samples.
    """

    setup: "Setup"
    mesh: Mesh
    put: Callable[[np.ndarray], Any]


class ObserverConfig(Protocol):
    """The settings of a diagnostic of measured rounds, a frozen dataclass."""

    def build(self, context: DiagnosticContext) -> Instrument:
        """The instrument. It may be built several times, also for a mere plan of memory."""
        ...


class MeterConfig(Protocol):
    """The settings of a diagnostic of every round, a frozen dataclass."""

    def build(self, context: DiagnosticContext) -> Meter:
        """The meter."""
        ...


@dataclass(frozen=True)
class Setup:
    """A RunConfig resolved and checked, nothing on a device yet.

    Attributes:
      config: as given.
      dataset: the samples.
      partition: who holds which.
      model: the network, its convolution implemented as this backend wants it.
      algorithm: the record.
      algorithm_name: for messages.
      cohort_size: K.
      wave: clients side by side on a device.
      mesh: the devices.
      meters: diagnostics of every round, by name.
      observers: what builds the diagnostics of measured rounds, see
        `fedjax_sim.engine.observing.Instrument`.
      watch: is told what the round computes.
      initial: gives the model that the first round starts from, NumPy leaves; None: a fresh one.
      calibration: for the record, what was measured on this machine that `config.execution` goes by; None: it
        goes by no measurement.
    """

    config: RunConfig
    dataset: Samples
    partition: Partition
    model: Model
    algorithm: Algorithm
    algorithm_name: str
    cohort_size: int
    wave: int
    mesh: Mesh
    meters: Mapping[str, Meter] = field(default_factory=dict)
    observers: Sequence[ObserverConfig] = ()
    watch: Watch = UNWATCHED
    initial: Callable[[], Any] | None = None
    calibration: Mapping[str, Any] | None = None

    @property
    def devices(self) -> int:
        """D."""
        return self.mesh.size

    @property
    def task(self) -> Task:
        """What is learned."""
        return self.dataset.task

    @property
    def num_clients(self) -> int:
        """N."""
        return self.partition.num_clients

    @functools.cached_property
    def placement(self) -> str:
        """Where training samples lie: copied, cut or streamed.

        Raises:
          UserError: something that the configuration asks for needs all of them on every device.
        """
        config, at_home = self.config, self.partition.test_from == "test"
        return feed.placement_of(
            config.execution.data,
            self.dataset,
            self.mesh,
            {
                "a diagnostic of measured rounds (peel.every, inertia.every, observers)": bool(
                    self.observers
                ),
                "evaluation.per_client on clients' training samples": config.evaluation.per_client
                and not at_home,
                "evaluation.finetune": config.evaluation.finetune > 0,
            },
        )

    @functools.cached_property
    def counts(self) -> np.ndarray:
        """i32[N], training samples of each client."""
        return self.partition.sizes().astype(np.int32)

    @functools.cached_property
    def draw(self) -> cohorts.Draw:
        """Round, from 0 -> client ids i32[K], where the algorithm does not choose them itself."""
        config = self.config
        return cohorts.sampler(config.cohort, self.counts, config.rounds, config.seed)

    @functools.cached_property
    def steps(self) -> np.ndarray:
        """i64[N], optimiser steps of each client in a round."""
        return waves.steps_of(self.counts, self.config.local)

    @functools.cached_property
    def trainer(self) -> Trainer:
        """Local training, specialised to all of this."""
        return Trainer(
            model=self.model,
            rule=self.algorithm.local,
            local=self.config.local,
            task=self.task,
            width=self.wave,
            order_lengths=order_lengths(self.counts),
            ragged=len(np.unique(self.steps)) > 1,
            partial=bool(np.any(self.counts % self.config.local.batch_size)),
            gradients=any(meter.gradients for meter in self.meters.values()),
            watch=self.watch,
        )

    @property
    def personalised(self) -> bool:
        """Whether clients may use models of their own."""
        return self.algorithm.personal_models is not None or self.algorithm.local.personal is not None

    @functools.cached_property
    def label_counts(self) -> np.ndarray:
        """i32[N, C], training samples of each class that each client has; C is 0 without classes."""
        labels = self.dataset.train_classes
        if labels is None:
            return np.zeros((self.num_clients, 0), np.int32)
        return label_counts(self.partition, labels, self.model.outputs).astype(np.int32)
