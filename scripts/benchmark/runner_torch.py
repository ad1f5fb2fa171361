"""FedAvg as a plain PyTorch loop: one client after another, then the weighted mean.

What somebody writes who uses no simulator, without waste: one network is reused for all clients, data are
tensors beforehand, the mean is accumulated in place.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import measure
import numpy as np
import torch
from common import cohorts, decoded_population
from torch_models import HeldOut, Network, count, train_client


def main() -> None:
    """Runs the rounds and prints the result."""
    args, workload = measure.arguments(__doc__)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    images, labels = decoded_population(workload, args.seed, channels_first=True)
    images, labels = torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))
    network, loss = Network(workload, args.seed), HeldOut(workload, args.seed)
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
                for p, start in zip(parameters, server, strict=True):
                    p.copy_(start)
            train_client(network, workload, images[client], labels[client])
            with torch.no_grad():
                for leaf, p in zip(total, parameters, strict=True):
                    leaf.add_(p, alpha=1 / workload.cohort)
        server, total = total, server
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
