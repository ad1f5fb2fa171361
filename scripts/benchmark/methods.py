"""What every algorithm's round costs beside FedAvg's: the same clients, in turn, in one run.

    python scripts/benchmark/methods.py          # LeNet, 10 clients x 250 images: ten minutes on 2 cores
    python scripts/benchmark/methods.py --write  # and renews results/methods.json and ALGORITHMS.md

Prints seconds a round (median, compilation and the first round apart) and the ratio to FedAvg's, the median
over repetitions in which the two ran one after the other. Images are random.
"""

import argparse
import json
import statistics
from datetime import date
from pathlib import Path

import jax
import numpy as np
from overhead import timed

import fedjax_sim as fs
from fedjax_sim.algorithms import CONFIGS, catalogue
from fedjax_sim.data import Dataset, Preprocessing

WITHOUT_NORM = {"fedbn"}
"""Names that want a model with batch normalisation, which LeNet has not."""
HERE = Path(__file__).parent
SETTINGS = {
    "lips": {"period": 1, "density": 0.3},
    "scaffold I": {"option": "I"},
    "fedrep": {"head_epochs": 1},
    "partial": {"first": 1},
}
"""Where the defaults will not do, or leave rounds without the method's work."""


def simulation(name, args):
    """A run whose rounds are to be timed."""
    rng = np.random.default_rng(0)
    count = args.clients * args.samples
    images = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
    labels = rng.integers(0, 10, count).astype(np.int32)
    dataset = Dataset("random", images, labels, images[:100], labels[:100], 10, Preprocessing())
    config = fs.RunConfig(
        rounds=1000,
        partition=fs.PartitionConfig(kind="iid", clients=args.clients),
        model=fs.ModelConfig("lenet"),
        algorithm=CONFIGS[name.split()[0]](**SETTINGS.get(name, {})),
        local=fs.LocalConfig(epochs=args.epochs, batch_size=50, lr=0.01, momentum=0.5),
        cohort=fs.CohortConfig(fraction=1.0),
        evaluation=fs.EvaluationConfig(every=0),
    )
    return fs.Simulation(config, dataset=dataset)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--samples", type=int, default=250)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    names = [name for name in CONFIGS if name not in WITHOUT_NORM | {"fedavg"}] + ["scaffold I"]
    base, ratios = simulation("fedavg", args), {}
    for _ in range(3):
        timed(base)
    for name in names:
        run = simulation(name, args)
        for _ in range(2):  # the generator and the control variates begin with the second round
            timed(run)
        pairs = [(timed(run), timed(base)) for _ in range(args.repetitions)]
        ratios[name] = round(statistics.median(own / other for own, other in pairs), 2)
        seconds = statistics.median(own for own, _ in pairs)
        print(f"{name:16} {seconds:8.3f} s   {ratios[name]:5.2f} x FedAvg", flush=True)
    about = (
        f"seconds of a round over FedAvg's, LeNet, {args.clients} clients of {args.samples} images, "
        f"batch 50, {args.epochs} epochs, {jax.device_count()} CPU devices, jax {jax.__version__}, "
        f"medians of {args.repetitions}, {date.today()} (LIPS: all starts sparse)."
    )
    if args.write:
        measured = {"setup": about, "ratios": ratios}
        (HERE / "results" / "methods.json").write_text(json.dumps(measured, indent=1) + "\n")
        (Path(fs.__file__).parent / "ALGORITHMS.md").write_text(catalogue.document(measured))


if __name__ == "__main__":
    main()
