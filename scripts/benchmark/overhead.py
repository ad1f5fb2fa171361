"""What LIPS's masks and the inertia meter add to a round: the same rounds with and without, in turn.

    python scripts/benchmark/overhead.py                # 100 clients, ResNet-8: an hour or so on 2 cores
    python scripts/benchmark/overhead.py --clients 20   # a fifth of that

Prints seconds a round (median, compilation apart) and ratios to FedAvg's. Images are random.
"""

import argparse
import statistics
import time

import numpy as np

import fedjax_sim as fs
from fedjax_sim.data import Dataset, Preprocessing


def simulation(args, algorithm, movement):
    """A run whose rounds are to be timed."""
    rng = np.random.default_rng(0)
    count = args.clients * 100
    images = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
    labels = rng.integers(0, 10, count).astype(np.int32)
    dataset = Dataset("random", images, labels, images[:100], labels[:100], 10, Preprocessing())
    config = fs.RunConfig(
        rounds=1000,
        partition=fs.PartitionConfig(kind="iid", clients=args.clients),
        model=fs.ModelConfig(args.model),
        algorithm=algorithm,
        local=fs.LocalConfig(epochs=5, batch_size=100, lr=0.01, momentum=0.9),
        cohort=fs.CohortConfig(fraction=1.0),
        evaluation=fs.EvaluationConfig(every=0),
        inertia=fs.InertiaConfig(measure=movement),
    )
    return fs.Simulation(config, dataset=dataset)


def timed(run) -> float:
    """Seconds of one round."""
    begun = time.perf_counter()
    run.step()()
    return time.perf_counter() - begun


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--model", default="resnet8")
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()
    lips = fs.LIPS(density=0.3, period=2)
    runs = {
        "FedAvg": simulation(args, fs.FedAvg(), False),
        "FedAvg, movement measured": simulation(args, fs.FedAvg(), True),
        "LIPS": simulation(args, lips, False),
    }
    for run in runs.values():
        timed(run)
        timed(run)
    seconds: dict[str, list[float]] = {}
    for _ in range(args.repetitions):
        for name, run in runs.items():
            # With a period of 2, rounds 2, 4, … start sparse, and those before them keep gradients.
            for part in ("gradients kept", "sparse start") if name == "LIPS" else ("",):
                label = f"{name}, {part}" if part else name
                seconds.setdefault(label, []).append(timed(run))
    base = seconds["FedAvg"]
    about = f"{args.model}, {args.clients} clients x 100 samples, 5 full batches"
    print(f"{about}; {args.repetitions} repetitions")
    for label, values in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(values, base, strict=True))
        print(f"{label:28} {statistics.median(values):8.2f} s   {ratio:5.2f} x FedAvg")


if __name__ == "__main__":
    main()
