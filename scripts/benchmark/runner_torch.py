"""FedAvg as a plain PyTorch loop: one client after another, then the weighted mean.

What somebody writes who uses no simulator, without waste: one network is reused for all clients, data are
tensors beforehand, the mean is accumulated in place.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import measure
import torch
from common import cohorts, decoded_population
from torch_models import HeldOut, Network, count, on_device, start, train_client, wait


def main() -> None:
    """Runs the rounds and prints the result."""
    args, workload = measure.arguments(__doc__)
    device = start(args)
    images, labels = on_device(*decoded_population(workload, args.seed, channels_first=True), device)
    network, loss = Network(workload, args.seed).to(device), HeldOut(workload, args.seed)
    parameters = list(network.parameters())
    loss_of_start = loss(network)

    server = [p.detach().clone() for p in parameters]
    total = [torch.zeros_like(p) for p in server]
    draw = cohorts(workload, args.seed)
    clock = measure.Clock()
    clock.start()
    for _ in range(args.warmup + args.rounds):
        for leaf in total:
            leaf.zero_()
        for client in next(draw):
            with torch.no_grad():
                for p, old in zip(parameters, server, strict=True):
                    p.copy_(old)
            train_client(network, workload, images[client], labels[client])
            with torch.no_grad():
                for leaf, p in zip(total, parameters, strict=True):
                    leaf.add_(p, alpha=1 / workload.cohort)
        server, total = total, server
        wait(device)
        clock.tick()
    with torch.no_grad():
        for p, leaf in zip(parameters, server, strict=True):
            p.copy_(leaf)
    measure.report(
        args,
        workload,
        clock,
        loss_of_start=loss_of_start,
        loss_at_end=loss(network),
        parameters=count(network),
        packages=("torch", "numpy"),
    )


if __name__ == "__main__":
    main()
