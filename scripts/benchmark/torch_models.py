"""The benchmark's models in PyTorch, channels first, with the shared initial weights."""

# pyright: reportMissingImports=false
from __future__ import annotations

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from common import Layer, Workload, channels_first_weights, held_out


def start(args: argparse.Namespace) -> torch.device:
    """Threads, seed and precision as a runner was asked for; the device that it works on.

    Raises:
      RuntimeError: a GPU was asked for, and PyTorch sees none.
    """
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high" if args.precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = args.precision == "tf32"
    if args.device == "gpu" and not torch.cuda.is_available():
        raise RuntimeError("PyTorch sees no GPU")
    return torch.device("cuda" if args.device == "gpu" else "cpu")


def on_device(
    images: np.ndarray, labels: np.ndarray, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels as tensors there."""
    return torch.from_numpy(images).to(device), torch.from_numpy(labels.astype(np.int64)).to(device)


def wait(device: torch.device) -> None:
    """Returns when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


class Network(torch.nn.Module):
    """Convolutions with relu and 2x2 max pooling, then dense layers with relu between them."""

    def __init__(self, workload: Workload, seed: int = 0):
        super().__init__()
        padding = "same" if workload.model == "mcmahan" else "valid"
        self.convolutions = torch.nn.ModuleList(
            torch.nn.Conv2d(layer.inputs, layer.outputs, layer.kernel, padding=padding)
            for layer in workload.layers
            if layer.kernel
        )
        dense = [layer for layer in workload.layers if not layer.kernel]
        self.hidden = torch.nn.ModuleList(_dense(layer) for layer in dense[:-1])
        self.head = _dense(dense[-1])
        weights = channels_first_weights(workload, seed).values()
        with torch.no_grad():
            for module, (weight, bias) in zip(
                [*self.convolutions, *self.hidden, self.head], weights, strict=True
            ):
                module.weight.copy_(torch.from_numpy(weight))
                module.bias.copy_(torch.from_numpy(bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """From f32[B, C, H, W] to logits f32[B, 10]."""
        for convolution in self.convolutions:
            x = F.max_pool2d(F.relu(convolution(x)), 2)
        x = x.flatten(1)
        for layer in self.hidden:
            x = F.relu(layer(x))
        return self.head(x)


def _dense(layer: Layer) -> torch.nn.Linear:
    return torch.nn.Linear(layer.inputs, layer.outputs)


def count(network: torch.nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in network.parameters())


class HeldOut:
    """Held-out cross-entropy of a network."""

    def __init__(self, workload: Workload, seed: int = 0):
        images, labels = held_out(workload, seed)
        images = np.ascontiguousarray(np.moveaxis(images, -1, 1))
        self.images, self.labels = on_device(images, labels, torch.device("cpu"))

    @torch.no_grad()
    def __call__(self, network: torch.nn.Module) -> float:
        """Mean over the held-out samples, in nats."""
        device = next(network.parameters()).device
        return F.cross_entropy(network(self.images.to(device)), self.labels.to(device)).item()


def train_client(
    network: torch.nn.Module, workload: Workload, images: torch.Tensor, labels: torch.Tensor
) -> None:
    """One client's local epochs of SGD on shuffled batches; changes `network` in place."""
    optimiser = torch.optim.SGD(network.parameters(), lr=workload.learning_rate, momentum=workload.momentum)
    for _ in range(workload.epochs):
        for rows in torch.randperm(len(labels), device=labels.device).split(workload.batch):
            optimiser.zero_grad()
            F.cross_entropy(network(images[rows]), labels[rows]).backward()
            optimiser.step()
