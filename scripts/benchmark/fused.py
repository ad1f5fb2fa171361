"""What it saves to run rounds as one program: whole runs, one by one and together in turn.

    python scripts/benchmark/fused.py
    python scripts/benchmark/fused.py --rounds 400 --repetitions 5

Prints a Markdown table: milliseconds a round of a run that writes its folder and evaluates every 50 rounds,
without the first 50, in which it compiles; ratios within each repetition, median (lowest–highest). Run it on
a machine that does nothing else.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import numpy as np
from rounds import ratio

import fedjax_sim as fs

EVERY = 50
CASES = {
    "FedAvg, MLP, 10 clients": ("fedavg", 10),
    "FedMR, MLP, 10 clients": ("fedmr", 10),
    "SCAFFOLD, MLP, 10 clients": ("scaffold", 10),
    "FedAvg, MLP, 100 clients": ("fedavg", 100),
}


def seconds_a_round(algorithm: str, cohort: int, devices: int, call: int | str, rounds: int) -> float:
    """Of one run on scikit-learn's digits."""
    with tempfile.TemporaryDirectory() as home:
        config = fs.RunConfig(
            rounds=rounds,
            partition=fs.PartitionConfig(kind="iid", clients=140),
            model=fs.ModelConfig("mlp", options={"hidden": [32]}),
            local=fs.LocalConfig(epochs=1, batch_size=10, lr=0.05),
            cohort=fs.CohortConfig(size=cohort),
            algorithm=fs.algorithms.CONFIGS[algorithm](),
            evaluation=fs.EvaluationConfig(every=EVERY),
            execution=fs.ExecutionConfig(devices=devices, rounds_per_call=call),  # type: ignore[arg-type]
            output=fs.OutputConfig(
                dir=f"{home}/run", progress=False, tensorboard=False, figures=False, checkpoint_every=0
            ),
        )
        fs.run(config)
        laps = np.loadtxt(Path(home) / "run" / "timing.csv", delimiter=",", skiprows=1)
        return float(laps[EVERY:, 1].mean())


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    print(
        "| | devices | one by one, ms | together, ms | one by one over together |\n|---|---:|---:|---:|---|"
    )
    for name, (algorithm, cohort) in CASES.items():
        for devices in args.devices:
            found: dict[int | str, list[float]] = {1: [], 32: []}
            for _ in range(args.repetitions):
                for call, values in found.items():
                    values.append(seconds_a_round(algorithm, cohort, devices, call, args.rounds))
            alone, together = (1000 * statistics.median(values) for values in found.values())
            told = f"{alone:.2f} | {together:.2f} | {ratio(found[1], found[32])}"
            print(f"| {name} | {devices} | {told} |", flush=True)


if __name__ == "__main__":
    main()
