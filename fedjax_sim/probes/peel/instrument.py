"""Layer-peeled measurement as part of a run: when, whom, and what it hands to the compiled round."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from fedjax_sim import data
from fedjax_sim.config import PeelConfig, RunConfig
from fedjax_sim.core.errors import UserError
from fedjax_sim.data import Partition
from fedjax_sim.engine import placement
from fedjax_sim.engine.clients import Trainer
from fedjax_sim.engine.observing import Observer
from fedjax_sim.engine.setup import DiagnosticContext
from fedjax_sim.probes.peel.chimera import Chimeras
from fedjax_sim.probes.peel.feature_probe import Probe
from fedjax_sim.probes.peel.forward import Forward
from fedjax_sim.probes.peel.generality import Generality
from fedjax_sim.probes.peel.head_finetuning import Finetuning
from fedjax_sim.probes.peel.samples import Samples
from fedjax_sim.records import Row
from fedjax_sim.records.table import make_row


class Instrument(Observer, Protocol):
    """An observer that turns what it has observed into records."""

    def rows(self, number: int, ids: np.ndarray, out: Any, counts: np.ndarray) -> list[Row]:
        """The records of a round.

        Args:
          number: of the round, from 1.
          ids: i32[m], the clients that were looked at.
          out: what `observe` returned, by name; NumPy leaves.
          counts: i32[m], samples that were measured of each.
        """
        ...


class Peeling:
    """Measures the rounds of a run that `config.peel` asks for.

    Attributes:
      observers: what is computed of them, by name; their rows come in this order.
    """

    def __init__(
        self,
        config: RunConfig,
        dataset: data.Samples,
        partition: Partition,
        trainer: Trainer,
        mesh: Mesh,
        put: Callable[[np.ndarray], jax.Array],
    ):
        """Chooses the samples and builds the observers.

        Args:
          config: of the run.
          dataset: the samples and their task.
          partition: who holds them.
          trainer: the run's; has the model.
          mesh: the devices.
          put: places an array on all devices.

        Raises:
          UserError: the model has no peel points, samples have no classes, or clients have no samples of the
            wanted split.
        """
        model, peel = trainer.model, config.peel
        if not model.peel_points:
            raise UserError(
                "peel.every",
                peel.every,
                f"{model.name} declares no peel points",
                "Mark the input of each weight layer with fedjax_sim.models.peel, or set peel.every to 0.",
            )
        if dataset.task.label is None:
            raise UserError(
                "peel.every",
                peel.every,
                f"the probe measures features by class, and the samples of {dataset.name} have no classes",
                "Set peel.every to 0, or take a classification set.",
            )
        self._every = peel.every
        batch, width = placement.forward_batch(config.evaluation, model, mesh), trainer.width
        if placement.platform_of(mesh) == "cpu":
            batch = min(batch, 50)  # whose features stay in a core's cache
            placement.lapack_on_one_thread()
            # Side by side, clients' decompositions would be one batched LAPACK call. jaxlib 0.10 spreads it
            # over the very threads that wait for it: with as many devices as cores, for ever.
            width = 1
        self._samples = Samples(peel, dataset, partition, config.seed, batch)
        forward = Forward(model, dataset.task, peel, batch)
        self._samples.warn_of_single_classes()
        probe = Probe(forward, mesh, width)
        instruments: list[tuple[str, Instrument, bool]] = [
            ("probe", probe, True),
            ("chimeras", Chimeras(forward, mesh), peel.chimeras),
            ("generality", Generality(forward, mesh), peel.others),
            ("finetuning", Finetuning(probe, trainer), peel.finetune > 0),
        ]
        self.observers = {name: instrument for name, instrument, wanted in instruments if wanted}
        tests = None
        if self._samples.of_test or peel.others:
            tests = {key: put(leaf) for key, leaf in dataset.test.items()}
        self._pools = {"test": tests if self._samples.of_test else None, "global": tests}

    def due(self, number: int, rounds: int) -> bool:
        """Whether round `number`, from 1, of `rounds` is measured: the first, the last and every so many."""
        return number in (1, rounds) or number % self._every == 0

    def slots(self, cohort: np.ndarray) -> np.ndarray:
        """Whom to watch. i32[K] client ids -> i32[m] slots."""
        return self._samples.slots(cohort)

    def observer_inputs(self, ids: np.ndarray) -> dict[str, Any]:
        """What the observers want at hand for the clients i32[m]: which samples, and the test sets."""
        inputs = {**self._samples.of_clients(ids), **self._pools}
        return dict.fromkeys(self.observers, inputs)

    def rows(self, number: int, ids: np.ndarray, inputs: Any, observed: dict[str, Any]) -> list[Row]:
        """The records of a round.

        Args:
          number: of the round, from 1.
          ids: i32[m], the clients that were looked at.
          inputs: what `observer_inputs` gave.
          observed: what the observers returned, by their names; NumPy leaves.
        """
        measured = inputs["probe"]["measured"]
        counts = measured["count"]
        made = [
            row
            for name, instrument in self.observers.items()
            for row in instrument.rows(number, ids, observed[name], counts)
        ]
        for client, index, count in zip(ids.tolist(), measured["index"], counts, strict=True):
            sizes = self._samples.class_sizes(index[:count])
            made.append(make_row(number, "peel_classes", len(sizes), client=client))
            least = float(sizes.min()) if len(sizes) else np.nan
            made.append(make_row(number, "peel_class_samples", least, client=client))
        return made


@dataclasses.dataclass(frozen=True)
class LayerPeeled:
    """The diagnostic, as it plugs into a run.

    Attributes:
      settings: the section `peel` of a configuration.
    """

    settings: PeelConfig

    def build(self, context: DiagnosticContext) -> Peeling:
        """See `fedjax_sim.engine.setup.ObserverConfig`."""
        setup = context.setup
        config = dataclasses.replace(setup.config, peel=self.settings)
        return Peeling(config, setup.dataset, setup.partition, setup.trainer, context.mesh, context.put)
