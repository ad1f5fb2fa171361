"""FedAvg with google/fedjax: its own `for_each_client` backend and data pipeline, the model in Haiku.

With one device it uses the `jit` backend; with more, `pmap` over as many XLA CPU devices.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import os

import fedjax
import haiku as hk
import jax
import jax.numpy as jnp
import measure
from common import Layer, Workload, cohorts, decoded_population, held_out, initial_weights
from fedjax.algorithms import fed_avg


def network(workload: Workload, batch: dict) -> jax.Array:
    """Logits f32[B, 10] of a batch of f32[B, H, W, C]."""
    x = batch["x"]
    padding = "SAME" if workload.model == "mcmahan" else "VALID"
    for layer in workload.layers:
        if layer.kernel:
            x = jax.nn.relu(hk.Conv2D(layer.outputs, layer.kernel, padding=padding, name=layer.name)(x))
            x = hk.MaxPool(2, 2, "VALID")(x)
        else:
            x = hk.Linear(layer.outputs, name=layer.name)(hk.Flatten()(x))
            x = x if layer is workload.layers[-1] else jax.nn.relu(x)
    return x


def example_loss(batch: dict, logits: jax.Array) -> jax.Array:
    """Cross-entropy of each sample, f32[B]."""
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["y"][:, None], axis=1)[:, 0]


def _haiku(layer: Layer, weights: dict) -> dict[str, jax.Array]:
    weight, bias = weights[layer.name]
    return {"w": jnp.asarray(weight), "b": jnp.asarray(bias)}


def main() -> None:
    """Runs the rounds and prints the result."""
    args, workload = measure.arguments(__doc__)
    # Read when the first array is made, so this is early enough.
    flags = [os.environ.get("XLA_FLAGS", ""), f"--xla_force_host_platform_device_count={args.devices}"]
    if args.threads == 1:
        flags.append("--xla_cpu_multi_thread_eigen=false")
    os.environ["XLA_FLAGS"] = " ".join(flags)
    backend = "jit" if args.devices == 1 else "pmap"
    fedjax.set_for_each_client_backend(backend)
    # FedJAX's pmap backend takes shards apart by itself and expects them without their leading axis of 1.
    jax.config.update("jax_pmap_no_rank_reduction", False)

    images, labels = decoded_population(workload, args.seed)
    data = fedjax.InMemoryFederatedData(
        {client: {"x": images[client], "y": labels[client]} for client in range(workload.population)}
    )
    model = fedjax.create_model_from_haiku(
        hk.transform(lambda batch: network(workload, batch)),
        sample_batch={"x": images[0, :1], "y": labels[0, :1]},
        train_loss=example_loss,
        eval_metrics={"loss": fedjax.metrics.CrossEntropyLoss()},
    )
    weights = initial_weights(workload, args.seed)
    parameters = {layer.name: _haiku(layer, weights) for layer in workload.layers}
    expected = jax.tree_util.tree_map(jnp.shape, model.init(jax.random.PRNGKey(args.seed)))
    if jax.tree_util.tree_map(jnp.shape, parameters) != expected:
        raise RuntimeError(f"the initial weights do not fit the Haiku model: {expected}")

    held_images, held_labels = held_out(workload, args.seed)

    @jax.jit
    def loss(params: dict) -> jax.Array:
        return jnp.mean(example_loss({"y": held_labels}, model.apply_for_eval(params, {"x": held_images})))

    algorithm = fed_avg.federated_averaging(
        fedjax.model_grad(model),
        fedjax.optimizers.sgd(workload.learning_rate, workload.momentum or None),
        fedjax.optimizers.sgd(1.0),
        fedjax.ShuffleRepeatBatchHParams(
            batch_size=workload.batch, num_epochs=workload.epochs, seed=args.seed
        ),
    )
    state = algorithm.init(parameters)
    loss_of_start = float(loss(state.params))
    draw = cohorts(workload, args.seed)
    clock = measure.Clock()
    clock.start()
    for r in range(args.warmup + args.rounds):
        ids = [int(client) for client in next(draw)]
        keys = jax.random.split(jax.random.PRNGKey(r), len(ids))
        clients = [(client, data.get_client(client), key) for client, key in zip(ids, keys, strict=True)]
        state, _ = algorithm.apply(state, clients)
        jax.block_until_ready(state.params)
        clock.tick()
    measure.report(
        args,
        workload,
        clock,
        loss_of_start=loss_of_start,
        loss_at_end=float(loss(state.params)),
        parameters=sum(leaf.size for leaf in jax.tree_util.tree_leaves(state.params)),
        packages=("fedjax", "jax", "jaxlib", "dm-haiku", "numpy"),
        backend=backend,
    )


if __name__ == "__main__":
    main()
