"""FedAvg with Flower's simulation engine: Ray actors side by side, PyTorch clients, message API.

`--devices` is the number of actors and `--threads` what each may use. Flower draws the cohorts itself, and
sends the model to every client and back; that is its way of working and stays in the time.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import argparse
import functools
import logging
import os
from pathlib import Path

import measure
import torch
from common import ALL, Workload, decoded_population
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch_models import HeldOut, Network, count, on_device, start, train_client


@functools.cache
def actor_data(name: str, seed: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """All clients' samples, made once in each actor (in its first, untimed round)."""
    return on_device(*decoded_population(ALL[name], seed, channels_first=True), torch.device(device))


def make_client(name: str, args: argparse.Namespace) -> ClientApp:
    """The client's side: load the weights, train, send them back."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        import runner_flwr  # in the actor the module, whose cache lives from message to message

        device = start(args)
        images, labels = runner_flwr.actor_data(name, args.seed, str(device))
        client = int(context.node_config["partition-id"])
        network = Network(ALL[name], args.seed).to(device)
        network.load_state_dict(message.content["arrays"].to_torch_state_dict())
        train_client(network, ALL[name], images[client], labels[client])
        reply = RecordDict(
            {
                "arrays": ArrayRecord(network.state_dict()),
                "metrics": MetricRecord({"num-examples": len(labels[client])}),
            }
        )
        return Message(content=reply, reply_to=message)

    return app


def make_server(
    workload: Workload, rounds: int, network: Network, clock: measure.Clock, out: dict
) -> ServerApp:
    """The server's side: FedAvg, with its evaluation hook as the clock's tick.

    `out` receives the last round's arrays, and the peak memory while the actors still live.
    """
    app = ServerApp()

    @app.main()
    def serve(grid: Grid, context: Context) -> None:
        def after(server_round: int, arrays: ArrayRecord) -> None:
            if server_round == 0:
                clock.start()
            else:
                clock.tick()
                out["arrays"] = arrays

        FedAvg(
            fraction_train=workload.cohort / workload.population,
            fraction_evaluate=0.0,
            min_train_nodes=workload.cohort,
            min_evaluate_nodes=0,
            min_available_nodes=workload.population,
        ).start(
            grid=grid, initial_arrays=ArrayRecord(network.state_dict()), num_rounds=rounds, evaluate_fn=after
        )
        out["peak_rss_mb"] = measure.peak_rss_mb(os.getpid())

    return app


def main() -> None:
    """Runs the rounds and prints the result."""
    args, workload = measure.arguments(__doc__)
    here = str(Path(__file__).resolve().parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    os.environ |= {
        "FLWR_TELEMETRY_ENABLED": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DISABLE_DOCKER_CPU_WARNING": "1",
    }
    logging.getLogger("flwr").setLevel(logging.WARNING)
    torch.manual_seed(args.seed)
    network, loss = Network(workload, args.seed), HeldOut(workload, args.seed)
    loss_of_start = loss(network)
    clock, out = measure.Clock(), {}
    run_simulation(
        server_app=make_server(workload, args.warmup + args.rounds, network, clock, out),
        client_app=make_client(workload.name, args),
        num_supernodes=workload.population,
        backend_config={
            "client_resources": {
                "num_cpus": 1,
                "num_gpus": 1 / args.devices if args.device == "gpu" else 0.0,
            },
            "init_args": {"num_cpus": args.devices, "include_dashboard": False},
        },
    )
    network.load_state_dict(out["arrays"].to_torch_state_dict())
    measure.report(
        args,
        workload,
        clock,
        loss_of_start=loss_of_start,
        loss_at_end=loss(network),
        parameters=count(network),
        packages=("flwr", "ray", "torch", "numpy"),
        peak_rss_mb=round(out["peak_rss_mb"], 1),
    )


if __name__ == "__main__":
    main()
