"""How general features are: every measured client's models on the other measured clients' samples.

That aggregation makes features more general, while it makes them worse for the client's own samples, is FOUND
of the layer-peeled paper in its reviews; that probes by layer measure it is FOUND in a summary; probe,
samples and averaging are OUR CHOICE. For client k, each state (`start`, `before`, `after`), and every other
measured client j that has samples to measure:

    peel_accuracy_others, peel_loss_others    the model of k on the measured samples of j, mean over j
    peel_accuracy_global, peel_loss_global    the same on the global test set
    ridge_others                              by layer: a probe on the features of k, fitted to the samples
                                              that j fits probes to, tested on j's measured ones, mean over j

`ridge_others` is for features what `ridge` of `fedjax_sim.probes.peel.feature_probe` is on the client's
own samples, with the same penalty and standardisation. The first weight layer, whose input is the image, is
left out.

Cost: a model takes m · (s_fit + s_measured) + n_test forward passes of a sample, where s pads every client to
the longest, and m · (L - 1) systems of equations in as many unknowns as a layer has pooled features. A client
has three models, so all of it grows with m². Slots in a row that hold the same model are measured once:
start and after of an algorithm with one global model cost one model a device, whatever m.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from fedjax_sim.core import stacked
from fedjax_sim.core.stacked import AXIS
from fedjax_sim.engine.device_data import DeviceData
from fedjax_sim.engine.round import MergeView
from fedjax_sim.probes.peel import linear_probes
from fedjax_sim.probes.peel.forward import Forward, side_by_side
from fedjax_sim.records import Row, make_row

STATES = ("start", "before", "after")
OTHERS = ("peel_accuracy_others", "peel_loss_others")
GLOBAL = ("peel_accuracy_global", "peel_loss_global")


@dataclasses.dataclass(frozen=True)
class Generality:
    """Measures rounds; the engine compiles it (`fedjax_sim.engine.observing.Observer`).

    Attributes:
      forward: the model on samples.
      mesh: devices, over which the measured clients' models are sharded.
    """

    forward: Forward
    mesh: Mesh

    # --- on the devices ----------------------------------------------------------------------------

    def observe(self, view: MergeView, inputs: Any, data: DeviceData) -> dict[str, jax.Array]:
        """What the m clients' models say on everybody's samples.

        Args:
          view: the models.
          inputs: `fit`, `measured` and `test` as for the probe, and `global`: the samples of the global
            test set.
          data: the training set.

        Returns:
          f32[m, 3, m] by client k, state and client j, for each of `OTHERS`, NaN where j has no sample to
          measure; `ridge_others` f32[m, 3, m, L - 1]; f32[m, 3] for each of `GLOBAL`.
        """
        count = len(view.cohort.ids)
        models = (view.start, view.before, view.after)
        train = data.train
        samples = {name: inputs[name] for name in ("fit", "measured")}
        pools = {"fit": train, "measured": inputs["test"] or train, "global": inputs["global"]}

        run = jax.shard_map(
            self._each, mesh=self.mesh, in_specs=(P(AXIS), P(), P()), out_specs=P(AXIS), check_vma=False
        )
        models = jax.tree.map(lambda leaf: stacked.filled_up(leaf, self.mesh.size), models)
        return jax.tree.map(lambda leaf: leaf[:count], run(models, samples, pools))

    def _each(self, stacks, samples, pools):
        """A device's clients, leaves of `stacks` [S, …] -> figures [S, 3, …]."""
        states, slots = len(stacks), len(jax.tree.leaves(stacks)[0])
        measure = partial(self._model, samples=samples, pools=pools)
        pick = [
            partial(lambda stack, slot: jax.tree.map(lambda a: a[slot], stack), stack) for stack in stacks
        ]

        def step(last, number):
            old, found = last
            new = jax.lax.switch(number // slots, pick, number % slots)
            same = [(a == b).all() for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)]
            known = (number > 0) & jnp.stack(same).all()
            found = jax.lax.cond(known, lambda _: found, measure, new)
            return (new, found), found

        first = pick[0](0)
        nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(measure, first))
        # One state after another, so that slots with the same model follow each other.
        numbers = jnp.arange(states * slots, dtype=jnp.int32)
        _, out = jax.lax.scan(step, (first, nothing), numbers)
        return jax.tree.map(lambda a: a.reshape(states, slots, *a.shape[1:]).swapaxes(0, 1), out)

    def _model(self, model, samples, pools):
        """One model on every client's samples, and on the global test set."""
        others = jax.lax.map(lambda one: self._client(model, one, pools), samples)
        count = len(jax.tree.leaves(pools["global"])[0])
        size = min(self.forward.batch_size, count)
        everything = jnp.arange(-(-count // size) * size, dtype=jnp.int32)
        chosen = {"index": jnp.minimum(everything, count - 1), "count": jnp.int32(count)}

        def seen(images, labels, mask):
            return _sums(self.forward.features(model, images)[0], labels, mask)

        sums = self.forward.over(chosen, pools["global"], seen, partial(jax.tree.map, jnp.add))
        return others | {name: value / count for name, value in zip(GLOBAL, sums, strict=True)}

    def _client(self, model, samples, pools):
        """One model on one client's samples."""
        parts = [(samples[part], pools[part]) for part in ("fit", "measured")]
        depth = len(self.forward.model.peel_points)

        def seen(part, total, images, labels, mask):
            del part, total
            logits, features = self.forward.features(model, images)
            rows = side_by_side(features[1:]) if depth > 1 else jnp.zeros((len(logits), 0, 1))
            return _sums(logits, labels, mask), rows

        nothing = jnp.float32(0), jnp.float32(0)
        sums, rows = self.forward.collected(parts, seen, partial(jax.tree.map, jnp.add), nothing)
        (fit_labels, known), (labels, mask) = (self.forward.labels(*part) for part in parts)
        target = jax.nn.one_hot(fit_labels, self.forward.num_classes)

        def hits(layer):
            scores = linear_probes.ridge_scores(layer[0], target, known, layer[1])
            return _right(jnp.argmax(scores, 1), labels, mask)

        stacks = [jnp.moveaxis(jax.lax.collapse(own, 0, 2), 1, 0) for own in rows]
        count = samples["measured"]["count"].astype(jnp.float32)
        sums = *(of_part[1] for of_part in sums), jax.lax.map(hits, stacks)
        return {name: value / count for name, value in zip((*OTHERS, "ridge_others"), sums, strict=True)}

    # --- on the host --------------------------------------------------------------------------------

    def rows(self, number: int, ids: np.ndarray, out: dict[str, np.ndarray], counts: np.ndarray) -> list[Row]:
        """The tidy rows of a round.

        Args:
          number: of the round, from 1.
          ids: i32[m], the clients that were looked at.
          out: what `observe` returned, by name; [m, …].
          counts: i32[m], samples that were measured of each.
        """
        made = []
        names = [point.name for point in self.forward.model.peel_points[1:]]
        for place, client in enumerate(ids.tolist()):
            others = np.flatnonzero((np.arange(len(ids)) != place) & (counts > 0))

            def mean(values, others=others):
                return values[others].astype(np.float64).mean() if len(others) else np.nan

            for s, state in enumerate(STATES):
                where = dict(client=client, state=state)
                for metric in OTHERS:
                    made.append(make_row(number, metric, mean(out[metric][place, s]), **where))
                for metric in GLOBAL:
                    made.append(make_row(number, metric, out[metric][place, s], **where))
                for layer, name in enumerate(names):
                    value = mean(out["ridge_others"][place, s, :, layer])
                    made.append(make_row(number, "ridge_others", value, layer=name, **where))
        return made


def _right(guess, labels, mask):
    return ((guess == labels) & mask).sum().astype(jnp.float32)


def _sums(logits, labels, mask):
    """(correct, loss) of a batch, summed over its samples."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return _right(jnp.argmax(logits, -1), labels, mask), jnp.where(mask, losses, 0).sum()
