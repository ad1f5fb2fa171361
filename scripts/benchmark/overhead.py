"""What masks and measurements add to a round: the same rounds with and without, in turn.

    python scripts/benchmark/overhead.py                     # long: 100 clients of ResNet-8
    python scripts/benchmark/overhead.py --parts probe       # the layer-peeled probe alone
    python scripts/benchmark/overhead.py --parts lips --clients 20

Prints Markdown tables: medians of rounds, compilation apart, and ratios within each repetition, median
(lowest–highest). Images are random. Run it on a machine that does nothing else.
"""

import argparse
import statistics

import jax
from rounds import equal, in_turn, noise, ratio, training

import fedjax_sim as fs

MEASURES = {
    "probe": {},
    "and ranks": {"ranks": True},
    "and one control": {"controls": ("perturbed",)},
    "and chimeras": {"chimeras": True},
    "and others": {"others": True},
    "and fine-tuning": {"finetune": 1},
}


def lips(args) -> None:
    """LIPS's masks and movement of layers, against FedAvg's round: 100 samples a client, 5 full batches."""
    dataset, each = noise(10_000), 100

    def run(period=0, **fields):
        return training(
            dataset,
            equal(dataset, args.clients, each),
            model=fs.ModelConfig(args.model or "resnet8"),
            local=fs.LocalConfig(epochs=5, batch_size=each, lr=0.01, momentum=0.9),
            algorithm=fs.LIPS(density=0.3, period=period, layers=args.layers) if period else fs.FedAvg(),
            **fields,
        )

    seconds = in_turn(
        {
            "FedAvg": run(),
            "movement measured": run(inertia=fs.InertiaConfig(measure=True)),
            "LIPS, gradients kept and a sparse start": run(period=1),
        },
        args.repetitions,
    )
    print(f"\n{args.model or 'resnet8'}, {args.clients} clients:")
    print("\n| | s a round | over FedAvg |\n|---|---:|---|")
    for name, values in seconds.items():
        print(f"| {name} | {statistics.median(values):.3f} | {ratio(values, seconds['FedAvg'])} |")


def probe(args) -> None:
    """The layer-peeled probe, 16 clients x 500 samples, in rounds of 10 clients x 500 images x 5 epochs."""
    dataset = noise(8000)
    for model in [args.model] if args.model else ["lenet", "resnet8"]:

        def run(clients, peel=None, model=model):
            return training(
                dataset,
                equal(dataset, clients, 500),
                model=fs.ModelConfig(model),
                local=fs.LocalConfig(epochs=5, batch_size=50, lr=0.01, momentum=0.5),
                peel=fs.PeelConfig() if peel is None else fs.PeelConfig(every=1, **peel),
            )

        runs = {"ten": run(10), "sixteen": run(16)}
        wanted = {name: MEASURES[name] for name in args.measures}
        runs |= {name: run(16, peel) for name, peel in wanted.items()}
        seconds = in_turn(runs, args.repetitions)
        ten = seconds["ten"]
        print(f"\n{model}; a round of ten clients takes {statistics.median(ten):.2f} s:")
        print("\n| measured | s | over that round |\n|---|---:|---|")
        for name in wanted:
            cost = [one - plain for one, plain in zip(seconds[name], seconds["sixteen"], strict=True)]
            print(f"| {name} | {statistics.median(cost):.3f} | {ratio(cost, ten)} |", flush=True)


def main() -> None:
    """Prints the tables that were asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    asked = {"lips": lips, "probe": probe}
    parser.add_argument("--parts", nargs="+", choices=asked, default=list(asked))
    parser.add_argument("--clients", type=int, default=100, help="of the part lips")
    parser.add_argument("--layers", default="inner_convs", help="that LIPS makes sparse; inner for an MLP")
    parser.add_argument(
        "--measures", nargs="+", choices=MEASURES, default=list(MEASURES), help="of the part probe"
    )
    parser.add_argument("--model", help="default: resnet8, and lenet too for the part probe")
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.device_count()} × {jax.devices()[0].device_kind}")
    for name in args.parts:
        print(f"\n## {name}\n\n{(asked[name].__doc__ or '').splitlines()[0]}")
        asked[name](args)


if __name__ == "__main__":
    main()
