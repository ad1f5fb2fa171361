"""FedAvg as PyTorch without a simulator, clients side by side: `torch.func.vmap` over the whole cohort.

Models of the cohort lie in one stack [K, …]; gradients of all are one call, and SGD is written out.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import measure
import torch
import torch.nn.functional as F
from common import cohorts, decoded_population
from torch.func import functional_call, grad, vmap
from torch_models import HeldOut, Network, count, on_device, start, wait


def main() -> None:
    """Runs the rounds and prints the result."""
    args, workload = measure.arguments(__doc__)
    device = start(args)
    images, labels = on_device(*decoded_population(workload, args.seed, channels_first=True), device)
    network, loss = Network(workload, args.seed).to(device), HeldOut(workload, args.seed)
    loss_of_start = loss(network)

    def of_batch(parameters: dict, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(functional_call(network, parameters, (x,)), y)

    gradients = vmap(grad(of_batch))
    server = {name: p.detach().clone() for name, p in network.named_parameters()}
    draw = cohorts(workload, args.seed)
    members = torch.arange(workload.cohort, device=device)[:, None]
    clock = measure.Clock()
    clock.start()
    for _ in range(args.warmup + args.rounds):
        ids = torch.from_numpy(next(draw)).to(device)
        x, y = images[ids], labels[ids]
        models = {name: p.expand(workload.cohort, *p.shape).clone() for name, p in server.items()}
        moments = {name: torch.zeros_like(p) for name, p in models.items()}
        for _ in range(workload.epochs):
            order = torch.rand(y.shape, device=device).argsort(1)
            for rows in order.split(workload.batch, 1):
                for name, g in gradients(models, x[members, rows], y[members, rows]).items():
                    moments[name].mul_(workload.momentum).add_(g)
                    models[name].sub_(moments[name], alpha=workload.learning_rate)
        server = {name: p.mean(0) for name, p in models.items()}
        wait(device)
        clock.tick()
    network.load_state_dict(server)
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
