"""FedAvg with apple/pfl-research: PyTorch model, `SimulatedBackend`, cohort of our drawing.

Started by `torch.distributed.run` it trains the cohort in several processes (`--devices` says how many),
each its share of the users, with one all-reduce a round; only rank 0 reports.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import os

import measure
import numpy as np
import torch
import torch.nn.functional as F
from common import cohorts, decoded_population
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Weighted
from pfl.model.pytorch import PyTorchModel
from torch_models import HeldOut, Network, count, on_device, start, wait


class PflNetwork(Network):
    """The network with the two methods that pfl calls."""

    def loss(self, images: torch.Tensor, labels: torch.Tensor, is_eval: bool = False) -> torch.Tensor:
        """Mean cross-entropy of a batch."""
        self.train(not is_eval)
        return F.cross_entropy(self(images), labels)

    @torch.no_grad()
    def metrics(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, Weighted]:
        """What pfl would report if it were asked to evaluate; it is not."""
        return {"loss": Weighted(self.loss(images, labels, is_eval=True).item() * len(labels), len(labels))}


class Tick(TrainingProcessCallback):
    """Clocks pfl's rounds."""

    def __init__(self, clock: measure.Clock, device: torch.device):
        self.clock, self.device = clock, device

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
        """Called when the server model holds the round's result."""
        wait(self.device)
        self.clock.tick()
        return False, type(aggregate_metrics)()


def main() -> None:
    """Runs the rounds and prints the result."""
    args, workload = measure.arguments(__doc__)
    device = start(args)
    np.random.seed(args.seed)
    images, labels = on_device(*decoded_population(workload, args.seed, channels_first=True), device)
    draw = cohorts(workload, args.seed)
    queue: list[int] = []

    def next_user() -> int:
        if not queue:
            queue.extend(int(client) for client in next(draw))
        return queue.pop(0)

    def dataset(user: int) -> Dataset:
        return Dataset(raw_data=(images[user], labels[user]), user_id=str(user))

    network, loss = PflNetwork(workload, args.seed).to(device), HeldOut(workload, args.seed)
    loss_of_start = loss(network)
    users = FederatedDataset(dataset, next_user)
    model = PyTorchModel(
        network,
        lambda parameters, lr: torch.optim.SGD(parameters, lr, momentum=workload.momentum),
        torch.optim.SGD(network.parameters(), 1.0),
    )
    clock = measure.Clock()
    clock.start()
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=args.warmup + args.rounds,
            evaluation_frequency=10**9,
            train_cohort_size=workload.cohort,
            val_cohort_size=0,
        ),
        backend=SimulatedBackend(training_data=users, val_data=users, postprocessors=[WeightByDatapoints()]),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=workload.epochs,
            local_learning_rate=workload.learning_rate,
            local_batch_size=workload.batch,
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=None),
        callbacks=[Tick(clock, device)],
    )
    if int(os.environ.get("RANK", "0")) == 0:
        measure.report(
            args,
            workload,
            clock,
            loss_of_start=loss_of_start,
            loss_at_end=loss(network),
            parameters=count(network),
            packages=("pfl", "torch", "numpy"),
            process_tree=os.getppid() if "RANK" in os.environ else None,
        )


if __name__ == "__main__":
    main()
