"""What it saves to run several runs as one program: whole runs, one by one and side by side in turn.

    python scripts/benchmark/together.py
    python scripts/benchmark/together.py --parts demo seeds --repetitions 5

Prints a Markdown table: seconds of all runs of a case without compiling, runs an hour, ratios within each
repetition, median (lowest–highest), and by how many seconds the first time took longer, which is mostly the
compiler's. Runs write their folders, with one checkpoint and no figures, and evaluate as they say. Run it on
a machine that does nothing else.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from rounds import ratio

import fedjax_sim as fs
from fedjax_sim.config.sweep_files import read_sweep

HERE = Path(__file__).parents[2]


def demo(devices: int) -> list[fs.RunConfig]:
    """The sweep that the README begins with."""
    jobs = read_sweep(HERE / "experiments" / "demo.yaml").jobs
    return [_on(job.config, devices) for job in jobs]


def seeds(devices: int) -> list[fs.RunConfig]:
    """32 seeds of an MLP, ten clients a round."""
    return [_on(dataclasses.replace(_small(), seed=seed), devices) for seed in range(32)]


def rates(devices: int) -> list[fs.RunConfig]:
    """16 learning rates under FedAvg and under SCAFFOLD."""
    small = _small()
    return [
        _on(
            dataclasses.replace(
                small,
                algorithm=fs.algorithms.CONFIGS[name](),
                local=dataclasses.replace(small.local, lr=float(lr)),
            ),
            devices,
        )
        for name in ("fedavg", "scaffold")
        for lr in np.geomspace(0.005, 0.2, 16)
    ]


def lenet(devices: int) -> list[fs.RunConfig]:
    """8 seeds of LeNet on images of 32×32, ten clients a round."""
    config = dataclasses.replace(
        _small(),
        rounds=8,
        partition=fs.PartitionConfig(kind="iid", clients=20),
        model=fs.ModelConfig("lenet"),
        local=fs.LocalConfig(epochs=1, batch_size=50, lr=0.05),
        evaluation=fs.EvaluationConfig(every=8),
    )
    return [_on(dataclasses.replace(config, seed=seed), devices) for seed in range(8)]


CASES: dict[str, Callable[[int], list[fs.RunConfig]]] = {
    "demo": demo,
    "seeds": seeds,
    "rates": rates,
    "lenet": lenet,
}


def _small() -> fs.RunConfig:
    return fs.RunConfig(
        rounds=600,
        partition=fs.PartitionConfig(kind="iid", clients=140),
        model=fs.ModelConfig("mlp", options={"hidden": [32]}),
        local=fs.LocalConfig(epochs=1, batch_size=10, lr=0.05),
        cohort=fs.CohortConfig(size=10),
        evaluation=fs.EvaluationConfig(every=50),
    )


def _on(config: fs.RunConfig, devices: int) -> fs.RunConfig:
    return dataclasses.replace(config, execution=fs.ExecutionConfig(devices=devices))


def pictures() -> fs.Dataset:
    """2,000 images of 32×32×3, of noise."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2200, 32, 32, 3), dtype=np.uint8)
    labels = rng.integers(0, 10, 2200).astype(np.int32)
    return fs.Dataset("noise", images[:2000], labels[:2000], images[2000:], labels[2000:], 10)


def seconds(configs: Sequence[fs.RunConfig], together: bool, dataset: fs.Dataset | None) -> float:
    """Wall-clock seconds of all runs, from their first round to their last file."""
    with tempfile.TemporaryDirectory() as home:
        placed = [
            dataclasses.replace(
                config,
                output=fs.OutputConfig(
                    dir=f"{home}/{number}",
                    progress=False,
                    tensorboard=False,
                    figures=False,
                    checkpoint_every=0,
                ),
            )
            for number, config in enumerate(configs)
        ]
        start = time.perf_counter()
        if together:
            fs.run_many(placed, dataset=dataset)
        else:
            for config in placed:
                fs.run(config, dataset=dataset)
        return time.perf_counter() - start


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    columns = "runs", "devices", "one by one, s", "together, s", "runs an hour", "ratio", "first, s"
    print(f"| | {' | '.join(columns)} |\n|---|---:|---:|---:|---:|---:|---|---|")
    for name in args.parts:
        for devices in args.devices:
            configs, dataset = CASES[name](devices), pictures() if name == "lenet" else None
            first = {together: seconds(configs, together, dataset) for together in (False, True)}
            found: dict[bool, list[float]] = {False: [], True: []}
            for _ in range(args.repetitions):
                for together, values in found.items():
                    values.append(seconds(configs, together, dataset))
            alone, side = (statistics.median(found[together]) for together in (False, True))
            more = ", ".join(f"{first[kind] - statistics.median(found[kind]):+.1f}" for kind in found)
            hourly = f"{3600 * len(configs) / alone:,.0f} → {3600 * len(configs) / side:,.0f}"
            times = f"{alone:.2f} | {side:.2f} | {hourly} | {ratio(found[False], found[True])} | {more}"
            print(f"| {name} | {len(configs)} | {devices} | {times} |", flush=True)


if __name__ == "__main__":
    main()
