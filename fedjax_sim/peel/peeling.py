"""The probe as part of a run: when it measures, whom, and what it hands to the compiled round."""

from collections.abc import Callable
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import Mesh

from fedjax_sim import placement
from fedjax_sim.config import RunConfig
from fedjax_sim.data import Dataset, Partition
from fedjax_sim.errors import UserError
from fedjax_sim.models.base import Model
from fedjax_sim.peel.chimera import Chimeras
from fedjax_sim.peel.forward import Forward
from fedjax_sim.peel.probe import Probe
from fedjax_sim.peel.samples import Samples
from fedjax_sim.records import Row
from fedjax_sim.rounds import Observer, Watched

PROBE, CHIMERAS = "probe", "chimeras"


class Peeling:
    """Measures the rounds of a run that `config.peel` asks for.

    Attributes:
      observers: what is compiled into them, by name.
    """

    def __init__(
        self,
        config: RunConfig,
        dataset: Dataset,
        partition: Partition,
        model: Model,
        mesh: Mesh,
        width: int,
        put: Callable[[np.ndarray], jax.Array],
    ):
        """`width`: clients side by side; `put`: places an array on all devices.

        Raises:
          UserError: the model has no peel points, or clients no samples of the wanted split.
        """
        if not model.peel_points:
            raise UserError(
                "peel.every",
                config.peel.every,
                f"{model.name} declares no peel points",
                "Mark the input of each weight layer with fedjax_sim.models.peel, or set peel.every to 0.",
            )
        self._config, self._rounds = config.peel, config.rounds
        batch = config.evaluation.batch_size
        if jax.default_backend() == "cpu":
            batch = min(batch, 50)  # whose features stay in a core's cache
            placement.lapack_on_one_thread()
        self._samples = Samples(config.peel, dataset, partition, config.seed, batch)
        forward = Forward(model, dataset.preprocessing, config.peel, dataset.num_classes, batch)
        self._probe, self._chimeras = Probe(forward, mesh, width), Chimeras(forward, mesh)
        self.observers: dict[str, Observer] = {PROBE: self._probe, CHIMERAS: self._chimeras}
        self._test = None
        if self._samples.of_test:
            self._test = {"images": put(dataset.test_images), "labels": put(dataset.test_labels)}

    def due(self, number: int) -> bool:
        """Whether round `number`, from 1, is measured: the first, the last and every so many."""
        return number in (1, self._rounds) or number % self._config.every == 0

    def watched(self, cohort: np.ndarray) -> Watched:
        """What the round of this cohort, i32[K] client ids, is asked for."""
        slots = self._samples.slots(cohort)
        given = {**self._samples.given(cohort[slots]), "test": self._test}
        asked = {PROBE: given}
        if self._config.chimeras:
            asked[CHIMERAS] = {name: given[name] for name in ("measured", "test")}
        return Watched(cast(jax.Array, slots), asked)

    def rows(self, number: int, cohort: np.ndarray, watched: Watched, observed: dict[str, Any]) -> list[Row]:
        """What came of it."""
        ids = cohort[np.asarray(watched.slots)]
        counts = watched.given[PROBE]["measured"]["count"]
        rows = self._probe.rows(number, ids, observed[PROBE], counts)
        if CHIMERAS in observed:
            rows += self._chimeras.rows(number, ids, observed[CHIMERAS])
        return rows
