"""FedAvg with fedjax_sim: 8-bit images on the device, one compiled function a round, slots over devices.

The settings are the defaults that a user gets; only the devices are as many as `--devices` says. Decoding the
images is part of the round here, where the peers receive float32 images beforehand. The cohorts are the
engine's own draw.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import common
import measure
import numpy as np


@dataclasses.dataclass(frozen=True)
class Program:
    """What the clock needs of a simulator.

    Attributes:
      step: runs one round and returns when the new server model is there.
      loss: held-out cross-entropy of the server model.
      parameters: the model's trainable scalars.
      details: settings that the defaults chose, for the record.
    """

    step: Callable[[], None]
    loss: Callable[[], float]
    parameters: int
    details: dict[str, Any]


def build(workload: common.Workload, seed: int, devices: int) -> Program:
    """The simulation of a workload, compiled at its first round."""
    import jax
    import jax.numpy as jnp

    from fedjax_sim import config, data, models, runs

    class SharedStart(models.Model):
        """The zoo's model, started from the weights that all frameworks share."""

        def init(self, key: jax.Array) -> dict[str, Any]:
            del key
            weights = common.initial_weights(workload, seed)
            return {
                "params": {
                    name: {"kernel": jnp.asarray(w), "bias": jnp.asarray(b)}
                    for name, (w, b) in weights.items()
                }
            }

    options = {"hidden": (64,)} if workload.model == "mlp" else {}
    zoo = models.create(workload.model, workload.shape, common.CLASSES, **options)
    model = SharedStart(**{field.name: getattr(zoo, field.name) for field in dataclasses.fields(zoo)})

    images, labels = common.population(workload, seed)
    held_images, held_labels = common.held_out(workload, seed)
    dataset = data.Dataset(
        name=workload.name,
        train_images=images.reshape(-1, *workload.shape),
        train_labels=labels.reshape(-1),
        test_images=np.zeros((1, *workload.shape), np.uint8),
        test_labels=np.zeros(1, np.int32),
        num_classes=common.CLASSES,
        preprocessing=data.Preprocessing(mean=(128 / 255,), std=(32 / 255,)),  # common.decode
    )
    holds = np.arange(labels.size).reshape(labels.shape)
    run = config.RunConfig(
        seed=seed,
        rounds=10**6,
        local=config.LocalConfig(
            epochs=workload.epochs,
            batch_size=workload.batch,
            lr=workload.learning_rate,
            momentum=workload.momentum,
        ),
        cohort=config.CohortConfig(size=workload.cohort),
        evaluation=config.EvaluationConfig(every=0),
        execution=config.ExecutionConfig(devices=devices),
    )
    engine = runs.Simulation(run, dataset=dataset, partition=data.Partition(tuple(holds)), model=model)

    @jax.jit
    def held_out_loss(variables: Any) -> jax.Array:
        logits, _ = engine.setup.model.apply(variables, jnp.asarray(held_images))
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(held_labels)[:, None], axis=1)
        return -jnp.mean(chosen)

    def step() -> None:
        rows = engine.step()
        rows()
        jax.block_until_ready(engine.state)

    return Program(
        step=step,
        loss=lambda: float(held_out_loss(engine.variables)),
        parameters=model.num_params(),
        details={"wave": engine.setup.wave, "conv": engine.setup.model.conv},
    )


def main() -> None:
    """Runs the rounds and prints the result."""
    args, workload = measure.arguments(__doc__)
    os.environ["JAX_NUM_CPU_DEVICES"] = str(args.devices)  # before JAX is imported
    if args.device == "gpu":  # on CPUs all products are float32
        names = {"float32": "float32", "tf32": "tensorfloat32"}
        os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = names[args.precision]
    program = build(workload, args.seed, args.devices)
    loss_of_start = program.loss()
    clock = measure.Clock()
    clock.start()
    for _ in range(args.warmup + args.rounds):
        program.step()
        clock.tick()
    measure.report(
        args,
        workload,
        clock,
        loss_of_start=loss_of_start,
        loss_at_end=program.loss(),
        parameters=program.parameters,
        packages=("jax", "jaxlib", "flax", "optax", "numpy"),
        **program.details,
    )


if __name__ == "__main__":
    main()
