"""Aggregation effectiveness: accuracy after a merge minus before, for some of a round's clients.

Before is the model that a client has trained, after what it holds once merged, what it will start from in the
next round (a sparse one, after a round in which LIPS prunes). Both are run on the client's own test samples,
where the partition has them, and on one random sample of the global test set.

That accuracy is taken before and after the average on each client's test set is FOUND in the code of LIPS
(arXiv 2506.00932); that their difference is what the paper calls effectiveness is INFERRED. The global test
set is OUR CHOICE.

Rows: `merge_own_accuracy`, `merge_own_loss`, `merge_global_accuracy`, `merge_global_loss`, each by client and
state; and over clients `effectiveness_own` and `effectiveness_global`, mean accuracy after minus before.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fedjax_sim.config import InertiaConfig, RunConfig
from fedjax_sim.core import stacked
from fedjax_sim.core.model import Model
from fedjax_sim.core.rng import INERTIA
from fedjax_sim.core.task import Task
from fedjax_sim.data import Partition, Samples
from fedjax_sim.data.ragged import Ragged
from fedjax_sim.engine import evaluation, placement
from fedjax_sim.engine.device_data import DeviceData
from fedjax_sim.engine.round import MergeView
from fedjax_sim.engine.setup import DiagnosticContext
from fedjax_sim.probes.peel.samples import best_ranked
from fedjax_sim.records import Row, make_row

NAME = "effectiveness"
STATES = ("before", "after")


@dataclasses.dataclass(frozen=True)
class Accuracies:
    """The observer (`fedjax_sim.engine.observing.Observer`).

    Attributes:
      model: the network.
      task: how it is judged.
      mesh: the devices.
      batch_size: samples in one forward pass.
      from_test: whether clients' own test samples are of the global test set; else of the training set.
    """

    model: Model
    task: Task
    mesh: Mesh
    batch_size: int
    from_test: bool

    def observe(self, view: MergeView, inputs: Any, data: DeviceData) -> dict[str, jax.Array]:
        """By client and state: f32[m, 2, s] of the task's headline metric, f32[m, 2] of the loss."""
        pools = {"global": inputs["tests"], "own": inputs["tests"] if self.from_test else data.train}
        count = len(view.cohort.ids)
        everything = jnp.broadcast_to(inputs["global"], (count, *inputs["global"].shape))
        chosen = {
            "global": {"index": everything, "count": jnp.full((count,), everything.shape[1], jnp.int32)}
        }
        if inputs["own"] is not None:
            chosen["own"] = inputs["own"]
        filled = partial(jax.tree.map, lambda leaf: stacked.filled_up(leaf, self.mesh.size))
        spare = -count % self.mesh.size
        fill = partial(
            jax.tree.map, lambda leaf: jnp.concatenate([leaf, leaf[-1:].repeat(spare, 0)]) if spare else leaf
        )
        out = {}
        for name, part in chosen.items():
            found = [
                self._figures(filled(models), fill(part), pools[name]) for models in (view.before, view.after)
            ]
            for metric in found[0]:
                out[f"merge_{name}_{metric}"] = jnp.stack([state[metric][:count] for state in found], 1)
        return out

    def _figures(self, models, part, pool):
        """Means over each client's samples: of the headline's statistics f32[m, s], and `loss` f32[m]."""
        losses, statistics = evaluation.of_clients(
            self.model, self.task, self.mesh, self.batch_size, models, part["index"], pool
        )
        mask = jnp.arange(losses.shape[1], dtype=jnp.int32)[None] < part["count"][:, None]
        total = part["count"].astype(jnp.float32)
        headline = self.task.headline.name
        figures = jnp.where(mask[..., None], statistics[headline], 0).sum(1) / total[:, None]
        return {headline: figures, "loss": jnp.where(mask, losses, 0).sum(1) / total}


class Effectiveness:
    """The instrument (`fedjax_sim.engine.observing.Instrument`).

    Attributes:
      observers: the one that there is, by name.
    """

    def __init__(
        self,
        config: RunConfig,
        model: Model,
        dataset: Samples,
        partition: Partition,
        mesh: Mesh,
        put: Callable[[np.ndarray], jax.Array],
    ):
        """Places the test set on the devices.

        Args:
          config: of the run.
          model: the network.
          dataset: the samples and their task.
          partition: who holds them, for tests on clients' own.
          mesh: the devices.
          put: places an array on all devices.
        """
        self._config, self._seed = config.inertia, config.seed
        self._dataset, self._partition = dataset, partition
        self._batch = placement.forward_batch(config.evaluation, model, mesh)
        self._tests = {key: put(leaf) for key, leaf in dataset.test.items()}
        from_test = partition.test_from == "test"
        self.observers = {NAME: Accuracies(model, dataset.task, mesh, self._batch, from_test)}

    def due(self, number: int, rounds: int) -> bool:
        """Whether round `number`, from 1, of `rounds` is measured."""
        return number in (1, rounds) or number % self._config.every == 0

    def slots(self, cohort: np.ndarray) -> np.ndarray:
        """Whom to watch. i32[K] client ids -> i32[m] slots."""
        return best_ranked(self._seed, self._partition.num_clients, cohort, self._config.clients)

    def observer_inputs(self, ids: np.ndarray) -> dict[str, Any]:
        """What the observer wants at hand for these clients, i32[m]: samples by index and count, test set."""
        draw, most = np.random.default_rng([self._seed, INERTIA]), self._config.samples
        everything = draw.permutation(self._dataset.test_size)[:most].astype(np.int32)
        inputs: dict[str, Any] = {"global": everything, "tests": self._tests, "own": None}
        if self._partition.test is not None:
            draws = (np.random.default_rng([self._seed, INERTIA, int(i)]) for i in ids)
            parts = [
                draw.permutation(self._partition.test[i])[:most] for draw, i in zip(draws, ids, strict=True)
            ]
            held, longest = int(Ragged.of(self._partition.test).sizes.max()), self._batch
            while longest < held:  # rounded up, so that seeds of a sweep mostly share one program
                longest *= 2
            index = np.zeros((len(ids), min(most, longest)), np.int32)
            for row, part in zip(index, parts, strict=True):
                row[: len(part)] = part
            inputs["own"] = {"index": index, "count": np.asarray([len(part) for part in parts], np.int32)}
        return {NAME: inputs}

    def rows(self, number: int, ids: np.ndarray, inputs: Any, observed: dict[str, Any]) -> list[Row]:
        """The tidy rows of a round.

        The task's headline metric and the loss by client and state, and how much the merge gains on average
        in the headline metric.

        Args:
          number: of the round, from 1.
          ids: i32[m], the clients that were looked at.
          inputs: not used.
          observed: what `observe` returned, by the observer's name; NumPy leaves.
        """
        del inputs
        headline = self._dataset.task.headline
        out = {
            metric: headline.finish(values) if metric.endswith(f"_{headline.name}") else values
            for metric, values in cast(dict[str, np.ndarray], observed[NAME]).items()
        }
        made = [
            make_row(number, metric, values[place, s], client=client, state=state)
            for metric, values in out.items()
            for place, client in enumerate(ids.tolist())
            for s, state in enumerate(STATES)
        ]
        for name in ("own", "global"):
            values = out.get(f"merge_{name}_{headline.name}")
            if values is not None:
                gain = values.astype(np.float64) * (1 if headline.goal == "max" else -1)
                effectiveness = float((gain[:, 1] - gain[:, 0]).mean())
                made.append(make_row(number, f"effectiveness_{name}", effectiveness))
        return made


@dataclasses.dataclass(frozen=True)
class AggregationEffectiveness:
    """The diagnostic, as it plugs into a run.

    Attributes:
      settings: the section `inertia` of a configuration.
    """

    settings: InertiaConfig

    def build(self, context: DiagnosticContext) -> Effectiveness:
        """See `fedjax_sim.engine.setup.ObserverConfig`."""
        setup = context.setup
        config = dataclasses.replace(setup.config, inertia=self.settings)
        return Effectiveness(config, setup.model, setup.dataset, setup.partition, context.mesh, context.put)
