"""What every framework in the comparison shares: models, workloads, data, cohorts, arithmetic. NumPy only.

This file runs in each peer's own environment, so it needs nothing but NumPy. A model is a table of
layers, from which its parameter count, its floating-point operations and its initial weights follow;
all peers start from these same weights, so that their held-out loss before the first round must agree
(`Workload.loss_of_start` in the results), which shows that they hold the same function.

Sources: the LeNet is that of FedMR's published code (FOUND: 62,006 parameters), the CNN that of McMahan
et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data" (2017), for 32x32x3
inputs (2,156,490 parameters). The MLP, the synthetic data and all sizes are our choice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

CLASSES = 10
HELD_OUT = 512
"""Number of held-out samples."""


@dataclass(frozen=True)
class Layer:
    """One linear layer: a square convolution of stride 1, or a dense layer.

    Attributes:
      name: its key among the weights.
      inputs: input channels or features.
      outputs: output channels or features.
      kernel: side of the convolution's window; 0 for a dense layer.
      side: side of the convolution's output map (before pooling); 1 for a dense layer.
    """

    name: str
    inputs: int
    outputs: int
    kernel: int = 0
    side: int = 1

    @property
    def fan_in(self) -> int:
        """Number of products summed into one output."""
        return self.inputs * max(self.kernel, 1) ** 2

    @property
    def parameters(self) -> int:
        """Weights and biases."""
        return self.outputs * (self.fan_in + 1)

    @property
    def forward_flops(self) -> int:
        """Floating-point operations of the forward product for one sample (a multiply-add is two)."""
        return 2 * self.fan_in * self.outputs * self.side**2


MODELS: dict[str, tuple[Layer, ...]] = {
    # Convolutions without padding; each is followed by relu and 2x2 max pooling.
    "lenet": (
        Layer("conv1", 3, 6, kernel=5, side=28),
        Layer("conv2", 6, 16, kernel=5, side=10),
        Layer("fc1", 400, 120),
        Layer("fc2", 120, 84),
        Layer("fc3", 84, CLASSES),
    ),
    # Convolutions with SAME padding; each is followed by relu and 2x2 max pooling.
    "mcmahan": (
        Layer("conv1", 3, 32, kernel=5, side=32),
        Layer("conv2", 32, 64, kernel=5, side=16),
        Layer("fc1", 4096, 512),
        Layer("fc2", 512, CLASSES),
    ),
    "mlp": (Layer("fc1", 64, 64), Layer("fc2", 64, CLASSES)),
}


@dataclass(frozen=True)
class Workload:
    """One federated training task.

    Attributes:
      name: what the command line and the tables call it.
      model: key of `MODELS`.
      shape: one sample, channels last.
      population: number of clients N.
      cohort: clients trained in a round, K; drawn without replacement.
      samples: samples that each client holds; a multiple of `batch`.
      batch: samples in a step.
      epochs: local epochs.
      learning_rate: of the clients' SGD.
      momentum: of the clients' SGD, started from zero in each round.
      signal: how strongly the class shows in a sample, against noise of standard deviation 1.
      rounds: rounds timed in one process, unless the command line says otherwise.
    """

    name: str
    model: str
    shape: tuple[int, int, int]
    population: int
    cohort: int
    samples: int
    batch: int
    epochs: int
    learning_rate: float
    momentum: float
    signal: float
    rounds: int

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The model's layers, input first."""
        return MODELS[self.model]

    @property
    def parameters(self) -> int:
        """The model's parameter count."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def steps(self) -> int:
        """Optimiser steps of one client in one round."""
        return self.epochs * math.ceil(self.samples / self.batch)

    @property
    def images_per_round(self) -> int:
        """Samples that pass through forward and backward in one round."""
        return self.cohort * self.epochs * self.samples

    @property
    def flops_per_image(self) -> int:
        """Operations to train on one sample, products only.

        Forward, weight gradient and input gradient cost the same; the first layer needs no input
        gradient. Activations, pooling, the loss, the optimiser and the mean are left out: the figure is
        a floor, for setting a result against the machine's peak.
        """
        forward = sum(layer.forward_flops for layer in self.layers)
        return 3 * forward - self.layers[0].forward_flops

    @property
    def flops_per_round(self) -> int:
        """`flops_per_image` over all samples of a round."""
        return self.flops_per_image * self.images_per_round


def _mcmahan(name: str, cohort: int, rounds: int) -> Workload:
    return Workload(name, "mcmahan", (32, 32, 3), 100, cohort, 50, 10, 1, 0.05, 0.0, 0.5, rounds)


def _mlp(name: str, cohort: int, rounds: int) -> Workload:
    return Workload(name, "mlp", (8, 8, 1), 2000, cohort, 20, 10, 1, 0.05, 0.0, 0.5, rounds)


WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload("lenet", "lenet", (32, 32, 3), 100, 10, 500, 50, 5, 0.01, 0.5, 0.5, 3),
        _mcmahan("mcmahan-10", 10, 5),
        _mcmahan("mcmahan-100", 100, 3),
        _mlp("mlp-100", 100, 20),
        _mlp("mlp-1000", 1000, 10),
    )
}


CHECKS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload("check-lenet", "lenet", (32, 32, 3), 4, 4, 20, 20, 3, 0.02, 0.5, 0.5, 1),
        Workload("check-mcmahan", "mcmahan", (32, 32, 3), 4, 4, 20, 20, 2, 0.02, 0.0, 0.5, 1),
        Workload("check-mlp", "mlp", (8, 8, 1), 4, 4, 20, 20, 3, 0.1, 0.9, 0.5, 1),
    )
}
"""Not for timing. All clients take part and a batch holds all that a client has, so that neither the draw of
cohorts nor the shuffling matters: every framework must end at the same held-out loss but for rounding."""

ACCELERATOR: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload("pfl-cifar10", "mcmahan", (32, 32, 3), 1000, 50, 50, 10, 1, 0.1, 0.0, 0.5, 5),
        Workload("blazefl-cnn", "mcmahan", (32, 32, 3), 100, 100, 500, 50, 5, 0.05, 0.0, 0.5, 3),
        *(
            Workload(f"mlp-of-{k}", "mlp", (8, 8, 1), 10_000, k, 20, 10, 1, 0.05, 0.0, 0.5, 10)
            for k in (10, 100, 1_000, 10_000)
        ),
    )
}
"""For a machine with an accelerator. The first has the population, cohort, batch and rate of pfl-research's
CIFAR-10 benchmark, the second the population, epochs and full cohorts of BlazeFL's; the network is McMahan's
and not theirs, images are synthetic, and BlazeFL's batch and rate are our choice."""

DRY: dict[str, Workload] = {
    f"dry-{name}": replace(
        workload,
        name=f"dry-{name}",
        population=min(workload.population, 20),
        cohort=min(workload.cohort, 4),
        samples=20,
        batch=10,
        epochs=1,
        rounds=2,
    )
    for name, workload in ACCELERATOR.items()
}
"""The same, so small that a CPU shows in seconds whether they run."""

ALL = WORKLOADS | CHECKS | ACCELERATOR | DRY


def client_data(workload: Workload, client: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """One client's samples: its class's prototype plus noise, quantised.

    Depends on the seed, the client and the workload's shape alone, so that any process can make any
    client's data by itself.

    Returns:
      images u8[n, H, W, C] and labels i32[n].
    """
    return _samples(workload, workload.samples, np.random.default_rng([seed, 1, client]), seed)


def held_out(workload: Workload, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Fresh samples of the same classes: images f32[512, H, W, C] (decoded) and labels i32[512]."""
    images, labels = _samples(workload, HELD_OUT, np.random.default_rng([seed, 2]), seed)
    return decode(images), labels


def population(workload: Workload, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """All clients' samples: u8[N, n, H, W, C] and i32[N, n]."""
    images = np.empty((workload.population, workload.samples, *workload.shape), np.uint8)
    labels = np.empty((workload.population, workload.samples), np.int32)
    for client in range(workload.population):
        images[client], labels[client] = client_data(workload, client, seed)
    return images, labels


def decoded_population(
    workload: Workload, seed: int = 0, channels_first: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """`population` decoded to float32, for frameworks that take their samples ready-made.

    Returns:
      f32[N, n, H, W, C], or f32[N, n, C, H, W] where `channels_first`; and i32[N, n].
    """
    height, width, depth = workload.shape
    shape = (depth, height, width) if channels_first else workload.shape
    images = np.empty((workload.population, workload.samples, *shape), np.float32)
    labels = np.empty((workload.population, workload.samples), np.int32)
    for client in range(workload.population):
        quantised, labels[client] = client_data(workload, client, seed)
        ready = decode(quantised)
        images[client] = np.moveaxis(ready, -1, 1) if channels_first else ready
    return images, labels


def _samples(
    workload: Workload, count: int, rng: np.random.Generator, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    labels = rng.integers(0, CLASSES, size=count).astype(np.int32)
    values = rng.standard_normal((count, *workload.shape), dtype=np.float32)
    values += np.float32(workload.signal) * _prototypes(workload, seed)[labels]
    return np.clip(np.rint(128 + 32 * values), 0, 255).astype(np.uint8), labels


def _prototypes(workload: Workload, seed: int) -> np.ndarray:
    """Class means f32[10, H, W, C] on a grid of 8x8 patches: coarse enough to outlive two poolings."""
    height, width, depth = workload.shape
    means = np.random.default_rng([seed, 0]).standard_normal((CLASSES, 8, 8, depth))
    return means.repeat(height // 8, axis=1).repeat(width // 8, axis=2).astype(np.float32)


def decode(images: np.ndarray) -> np.ndarray:
    """From u8 to f32 of about zero mean and unit variance: `(images - 128) / 32`."""
    return (images.astype(np.float32) - np.float32(128)) / np.float32(32)


def cohorts(workload: Workload, seed: int = 0) -> Iterator[np.ndarray]:
    """For each round the ids of its K clients, i64[K], without end."""
    rng = np.random.default_rng([seed, 3])
    while True:
        yield rng.choice(workload.population, size=workload.cohort, replace=False)


def initial_weights(workload: Workload, seed: int = 0) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The weights that every framework starts from: normal weights of variance 1/fan_in, zero biases.

    Returns:
      by layer name, (weight, bias[out]); weights are [k, k, in, out] for a convolution and [in, out] for
      a dense layer, where the first dense layer reads its input as [H, W, C] flattened.
    """
    rng = np.random.default_rng([seed, 4])
    weights = {}
    for layer in workload.layers:
        window = (layer.kernel, layer.kernel) if layer.kernel else ()
        weight = rng.standard_normal((*window, layer.inputs, layer.outputs)) * math.sqrt(1 / layer.fan_in)
        weights[layer.name] = (weight.astype(np.float32), np.zeros(layer.outputs, np.float32))
    return weights


def channels_first_weights(workload: Workload, seed: int = 0) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """`initial_weights` as a channels-first framework lays them out.

    Convolutions are [out, in, k, k] and dense layers [out, in]; the rows of the first dense layer after a
    convolution are reordered, as its input is [C, H, W] flattened. The function is the same.
    """
    turned = {}
    depth = workload.shape[2]
    for layer, (weight, bias) in zip(workload.layers, initial_weights(workload, seed).values(), strict=True):
        if layer.kernel:
            weight, depth = weight.transpose(3, 2, 0, 1), layer.outputs
        else:
            side = math.isqrt(layer.inputs // depth) if depth > 1 else 1
            if depth > 1:
                weight = weight.reshape(side, side, depth, -1).transpose(2, 0, 1, 3).reshape(layer.inputs, -1)
            weight, depth = weight.T, 1
        turned[layer.name] = (np.ascontiguousarray(weight), bias)
    return turned
