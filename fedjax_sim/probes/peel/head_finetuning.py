"""What training the classifier alone, on each client's own samples, recovers of a merge.

After the merge everything but the last block of leaves (`Model.blocks`) is held still, and the rest is
trained for `PeelConfig.finetune` epochs on the client's training samples, by the run's own local settings:
optimiser, the round's learning rate, batch size, augmentation. That the layer-peeled paper looks at
fine-tuning of the classifier is FOUND in a review of it; how it trains is not. OUR CHOICE: the body runs in
evaluation mode, so that the classifier learns from the very features that are measured, and no batch
statistic moves. By construction features do not change, so neither do variances, ranks and probes: if the
merge hurts because features and classifier no longer match, this cures it; what stays is the features' own.

Rows with the state `finetuned`, by client: `peel_accuracy` and `peel_loss` on the measured samples, and, by
the classifier's layer, `pabs` and `pabs_centred` of the new kernel with the penultimate features. Where the
probe measures halves of the training samples, these are among those that are trained on, as they are for
`before`. Nothing of it comes back into the run.

Cost: finetune · n_k + s_measured forward passes of a sample for each measured client, clients side by side
taking the steps of the largest; backward passes are those of the classifier alone.
"""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from jax.sharding import PartitionSpec as P

from fedjax_sim.core import gradients, stacked
from fedjax_sim.core.algorithm import LocalRule
from fedjax_sim.core.rng import PEEL, key_for
from fedjax_sim.core.stacked import AXIS
from fedjax_sim.core.task import Training, task_loss
from fedjax_sim.engine.clients import Lanes, Trainer
from fedjax_sim.engine.device_data import DeviceData
from fedjax_sim.engine.round import MergeView
from fedjax_sim.probes.peel import moments
from fedjax_sim.probes.peel.clients import shares
from fedjax_sim.probes.peel.feature_probe import Probe, leaf_at
from fedjax_sim.records import Row, make_row

STATE = "finetuned"
FIGURES = ("pabs", "pabs_centred")


@dataclasses.dataclass(frozen=True)
class Finetuning:
    """Measures rounds; the engine compiles it (`fedjax_sim.engine.observing.Observer`).

    Attributes:
      probe: whose samples, devices and figures are used; clients are measured as it measures them, one after
        another or side by side.
      trainer: of the run.
    """

    probe: Probe
    trainer: Trainer

    def classifier_trainer(self, width: int) -> Trainer:
        """The run's trainer, `width` clients side by side, of the last block alone."""
        place = self.trainer.model.blocks()
        still = Training(self.trainer.model, self.trainer.task, train=False)
        last = max(place.values())

        def loss(apply, variables, batch, extra):
            del apply, extra  # the one is in training mode, the other empty
            return task_loss(still, variables, batch)

        def which(variables, batch):
            del batch
            return traverse_util.path_aware_map(
                lambda path, _: place[cast(Any, path)] == last, dict(variables)
            )

        epochs = self.probe.forward.config.finetune
        return dataclasses.replace(
            self.trainer,
            rule=LocalRule(gradient=gradients.moving(which, gradients.of_loss(loss))),
            local=dataclasses.replace(self.trainer.local, epochs=epochs, steps=None, keep_optimizer=False),
            width=width,
            ragged=True,
        )

    # --- on the devices ----------------------------------------------------------------------------

    def observe(self, view: MergeView, inputs: Any, data: DeviceData) -> dict[str, jax.Array]:
        """Accuracy, loss and `FIGURES` of each client's model with its new classifier, f32[m] each."""
        count, mesh = len(view.cohort.ids), self.probe.mesh
        trainer = self.classifier_trainer(min(self.trainer.width, -(-count // mesh.size)))
        key = key_for(view.key, PEEL, view.cohort.round)

        def share(numbers, models, own, cohort, lr, key, data, pool):
            client_state, weights = trainer.init_client(None), jnp.ones(numbers.shape, jnp.float32)
            ids, counts = cohort.ids[numbers], cohort.counts[numbers]
            lanes = Lanes(client_state=client_state, ids=ids, counts=counts, weights=weights)
            lanes = trainer.ready(lanes, key, data)

            def wave(wave):
                numbers, models, lanes = wave
                measured = jax.tree.map(lambda leaf: leaf[numbers], own)
                steps = -(-lanes.counts // trainer.local.batch_size) * trainer.local.epochs
                trained = trainer.train_wave(models, None, lanes, steps.max(), lr, data)[0]
                return jax.lax.map(
                    lambda one: self._measured(one, pool),
                    (trained, measured),
                    batch_size=None if self.probe.width == 1 else trainer.width,
                )

            waves = jax.tree.map(
                lambda leaf: leaf.reshape(-1, trainer.width, *leaf.shape[1:]), (numbers, models, lanes)
            )
            return jax.tree.map(lambda leaf: leaf.reshape(-1), jax.lax.map(wave, waves))

        specs = (P(AXIS), P(AXIS), *[P()] * 6)
        run = jax.shard_map(share, mesh=mesh, in_specs=specs, out_specs=P(AXIS), check_vma=False)
        places = mesh.size * trainer.width
        numbers, pool = shares(count, places), inputs["test"] or data.train
        models = jax.tree.map(lambda leaf: stacked.filled_up(leaf, places), view.after)
        out = run(numbers, models, inputs["measured"], view.cohort, view.lr, key, data, pool)
        return jax.tree.map(lambda leaf: leaf[:count], out)

    def _measured(self, own, pool) -> dict[str, jax.Array]:
        """One client: its fine-tuned model on its samples."""
        (model, measured), forward = own, self.probe.forward

        def seen(images, labels, mask):
            logits, features = forward.features(model, images)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            right = ((jnp.argmax(logits, -1) == labels) & mask).sum().astype(jnp.float32)
            loss = jnp.where(mask, losses, 0).sum()
            return (right, loss), forward.moments(features[-1:], labels, mask)

        def added(old, new):
            return jax.tree.map(jnp.add, old[0], new[0]), moments.merge(old[1], new[1])

        (right, loss), found = forward.over(measured, pool, seen, added)
        count = measured["count"].astype(jnp.float32)
        kernel = leaf_at(model["params"], forward.model.peel_points[-1].kernel)
        figures = self.probe.angles(found, [kernel], forward.shapes()[-1:])
        return {"peel_accuracy": right / count, "peel_loss": loss / count} | {
            name: figures[name][0] for name in FIGURES
        }

    # --- on the host --------------------------------------------------------------------------------

    def rows(self, number: int, ids: np.ndarray, out: dict[str, np.ndarray], counts: np.ndarray) -> list[Row]:
        """The tidy rows of a round.

        Args:
          number: of the round, from 1.
          ids: i32[m], the clients that were looked at.
          out: what `observe` returned, by name; f32[m] each.
          counts: not used.
        """
        del counts
        classifier = self.probe.forward.model.peel_points[-1].name
        return [
            make_row(
                number,
                name,
                values[place],
                client=client,
                state=STATE,
                layer=classifier if name in FIGURES else "",
            )
            for place, client in enumerate(ids.tolist())
            for name, values in out.items()
        ]
