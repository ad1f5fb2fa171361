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
from rounds import equal, in_turn, noise, ratio, training

import fedjax_sim as fs
from fedjax_sim.algorithms import CONFIGS, fedgen
from fedjax_sim.reports import algorithm_docs

MODELS = {"fedbn": "resnet8"}
"""Where LeNet will not do: it has no batch normalisation."""
LENET = 28**2 * 6 * 75 + 10**2 * 16 * 150 + 400 * 120 + 120 * 84 + 84 * 10
"""Multiplications of its forward pass on one image."""
HERE = Path(__file__).parent
SETTINGS = {
    "lips": {"period": 1, "density": 0.3},
    "scaffold I": {"option": "I"},
    "fedrep": {"head_epochs": 1},
    "partial": {"first": 1},
}
"""Where the defaults will not do, or leave rounds without the method's work."""


def explained(name, args):
    """Seconds of a round over FedAvg's, by arithmetic.

    A step's forward pass is a third of it. FedGen's clients run the generator twice a step, forward alone;
    its server trains it, which no device does for another, while clients are divided among them.
    """
    passes = {
        "moon": 5 / 3,
        "fedntd": 4 / 3,
        "pfedsd": 4 / 3,
        "fedsam": 2,
        "fedasam": 2,
        "ditto": 2,
        "scaffold I": 1 + 1 / args.epochs,
    }
    if name != "fedgen":
        return round(passes.get(name, 1), 2)
    config, classes, width = CONFIGS["fedgen"](), 10, 84  # of LeNet's representation
    generator = (classes + fedgen.NOISE + width) * fedgen.HIDDEN
    teachers = args.clients * classes * width
    apart = config.generator_batch * width  # of each sample from all, for diversity
    trained = args.clients * args.samples * args.epochs * 3 * LENET
    server = config.generator_steps * config.generator_batch * 3 * (generator + teachers + apart)
    return round(1 + 2 * generator / (3 * LENET) + server * jax.device_count() / trained, 2)


def simulation(name, model, args):
    """A run whose rounds are to be timed."""
    dataset = noise(args.clients * args.samples)
    return training(
        dataset,
        equal(dataset, args.clients, args.samples),
        model=fs.ModelConfig(model),
        algorithm=CONFIGS[name.split()[0]](**SETTINGS.get(name, {})),
        local=fs.LocalConfig(epochs=args.epochs, batch_size=50, lr=0.01, momentum=0.5),
    )


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--samples", type=int, default=250)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    names = [name for name in CONFIGS if name != "fedavg"] + ["scaffold I"]
    bases, ratios = {}, {}
    for name in names:
        model = MODELS.get(name, "lenet")
        if model not in bases:
            bases[model] = simulation("fedavg", model, args)
        # The generator and the control variates begin with the second round, which is not counted either.
        seconds = in_turn({name: simulation(name, model, args), "fedavg": bases[model]}, args.repetitions)
        ratios[name] = round(ratio(seconds[name], seconds["fedavg"]).median, 2)
        print(
            f"{name:16} {statistics.median(seconds[name]):8.3f} s   {ratios[name]:5.2f} x FedAvg", flush=True
        )
    models = ", ".join(["LeNet", *(f"{name}: {model}" for name, model in MODELS.items())])
    about = (
        f"seconds of a round over FedAvg's, {models}; {args.clients} clients of {args.samples} images, "
        f"batch 50, {args.epochs} epochs, {jax.device_count()} CPU devices, jax {jax.__version__}, "
        f"medians of {args.repetitions}, {date.today()} (LIPS: all starts sparse)."
    )
    if args.write:
        measured = {
            "setup": about,
            "ratios": ratios,
            "explained": {name: explained(name, args) for name in names},
        }
        (HERE / "results" / "methods.json").write_text(json.dumps(measured, indent=1) + "\n")
        (Path(fs.__file__).parent / "algorithms" / "ALGORITHMS.md").write_text(
            algorithm_docs.document(measured)
        )


if __name__ == "__main__":
    main()
