"""What rounds take on machines that are not here: memory a chip, exchanges, XLA's estimate of cycles.

    python scripts/benchmark/machines.py rounds [--on v5e-16 v5e-64] [--algorithms fedmr] [--models lenet]
    python scripts/benchmark/machines.py conv [--on v5e-1] [--models lenet mcmahan]

Compiles for them with libtpu (`pip install -e '.[tpu]'`) or the CUDA compiler (`'.[cuda-plan]'`) and runs
nothing. `rounds` compiles whole rounds of K of N clients (50 images of 32×32×3 each, batch 50, one step).
`conv` compares implementations of convolutions and widths of a wave: estimated cycles of a local step of a
client. Rows go to scripts/benchmark/results/machines-PART.csv as they come; a case that is there is not
compiled again unless --again is given. Cycles are estimates of XLA's cost model and no measurements.
"""

import argparse
import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
from rows import Table

import fedjax_sim as fs
from fedjax_sim.config import from_dict
from fedjax_sim.runs.aot.machines import machine, start_for
from fedjax_sim.runs.aot.plan import MachinePlan, plan_on

RESULTS = Path(__file__).parent / "results"
MODELS = {
    "lenet": ((32, 32, 3), 50),
    "mcmahan": ((28, 28, 1), 10),
    "resnet20": ((32, 32, 3), 50),
    "vit": ((32, 32, 3), 50),
    "mlp": ((8, 8, 1), 10),
}
"""Shape of an image, and the batch that is usual."""

ALGORITHMS: dict[str, dict[str, Any]] = {
    "fedmr": {"name": "fedmr"},
    "fedmr-module": {"name": "fedmr", "granularity": "module"},
    "fedmr-block": {"name": "fedmr", "granularity": "block"},
    "fedavg": {"name": "fedavg"},
    "fedadam": {"name": "fedopt"},
    "scaffold": {"name": "scaffold"},
    "feddyn": {"name": "feddyn"},
    "fedbn": {"name": "fedbn"},
    "ditto": {"name": "ditto"},
    "moon": {"name": "moon"},
    "lips-fedmr": {"name": "lips", "inner": {"name": "fedmr"}},
    "clusamp": {"name": "clusamp"},
}
SIZES = ((160, 1_000), (2_560, 10_007))


def images(clients: int, each: int, shape: tuple[int, ...]) -> fs.Dataset:
    """So many black images; what they show does not matter to a compiler."""
    count = clients * each
    labels = np.arange(count) % 10
    return fs.Dataset(
        "black",
        np.zeros((count, *shape), np.uint8),
        labels,
        np.zeros((100, *shape), np.uint8),
        labels[:100],
        10,
    )


def settings(
    model: str, algorithm: dict[str, Any], clients: int, cohort: int, batch: int, **execution: Any
) -> fs.RunConfig:
    """A run of one local step a client, without evaluation, each round a program of its own."""
    dtype = execution.pop("dtype", "float32")
    return from_dict(
        {
            "rounds": 100,
            "algorithm": algorithm,
            "model": {"name": model, "dtype": dtype},
            "partition": {"kind": "iid", "clients": clients},
            "local": {"epochs": 1, "batch_size": batch},
            "cohort": {"size": cohort},
            "evaluation": {"every": 0},
            "execution": {"rounds_per_call": 1, **execution},
        }
    )


def row_of_round(found: MachinePlan, shown: dict[str, Any]) -> dict[str, Any]:
    """What the table of rounds says of one."""
    first, mib = found.programs[0], 2**20
    largest = max(first.collectives, key=lambda one: one.bytes, default=None)
    return {
        **shown,
        "needed_mib": round(found.needed / mib, 1),
        "total_mib": round(found.total / mib, 1),
        "ratio": round(found.total / found.needed, 2),
        "arguments_mib": round(first.arguments / mib, 1),
        "temporaries_mib": round(first.temporaries / mib, 1),
        "largest_exchange": "" if largest is None else f"{largest.op} of {largest.bytes / mib:.2f} MiB",
        "asked_for_by": "" if largest is None else largest.where,
        "cycles_m": "" if first.cycles is None else round(first.cycles / 1e6, 2),
        "tiles": round(first.padding, 2),
        "compile_s": round(first.seconds, 1),
        "wave": found.wave,
        "conv": found.conv,
        "jax": found.versions["jax"],
        "date": time.strftime("%Y-%m-%d"),
    }


def rounds(args: argparse.Namespace) -> None:
    """See the module."""
    table = Table(RESULTS / "machines-rounds.csv", ("on", "algorithm", "model", "k", "n"), args.again)
    for on, model, (k, n), name in itertools.product(args.on, args.models, args.sizes, args.algorithms):
        shown = {"on": on, "algorithm": name, "model": model, "k": k, "n": n}
        if not table.wants(shown):
            continue
        shape, batch = MODELS[model]
        config = settings(model, ALGORITHMS[name], n, k, batch, **chosen(args))
        start = time.monotonic()
        try:
            row = row_of_round(plan_on(config, on, dataset=images(n, 50, shape)), shown)
        except fs.UserError as error:
            row = {**shown, "asked_for_by": f"refused: {error}"}
        table.add(row, time.monotonic() - start)


def conv(args: argparse.Namespace) -> None:
    """See the module."""
    table = Table(
        RESULTS / "machines-conv.csv", ("on", "model", "batch", "dtype", "conv", "wave"), args.again
    )
    for on, model, dtype, impl, wave in itertools.product(
        args.on, args.models, args.dtypes, args.convs, args.waves
    ):
        shape, batch = MODELS[model]
        shown = {"on": on, "model": model, "batch": batch, "dtype": dtype, "conv": impl, "wave": wave}
        if not table.wants(shown):
            continue
        clients, steps = wave * machine(on).chips, 20
        config = settings(
            model, {"name": "fedavg"}, clients, clients, batch, wave=wave, conv=impl, dtype=dtype
        )
        start = time.monotonic()
        found = plan_on(config, on, dataset=images(clients, steps * batch, shape))
        first = found.programs[0]
        cycles = "" if first.cycles is None else round(first.cycles / (wave * steps))
        row = {
            **shown,
            "cycles_a_client_step": cycles,
            "temporaries_mib": round(first.temporaries / 2**20, 1),
            "traffic_mib_a_client_step": round(first.traffic / (wave * steps) / 2**20, 1),
            "tiles": round(first.padding, 2),
            "compile_s": round(first.seconds, 1),
            "jax": found.versions["jax"],
            "date": time.strftime("%Y-%m-%d"),
        }
        table.add(row, time.monotonic() - start)


def chosen(args: argparse.Namespace) -> dict[str, Any]:
    """Of `execution`, what the command line sets."""
    return {name: getattr(args, name) for name in ("wave", "conv") if getattr(args, name) is not None}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("part", choices=["rounds", "conv"])
    parser.add_argument("--on", nargs="+")
    parser.add_argument("--algorithms", nargs="+", choices=list(ALGORITHMS), default=list(ALGORITHMS))
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["lenet"])
    parser.add_argument("--sizes", nargs="+", type=_size, default=list(SIZES), help="K,N of rounds")
    parser.add_argument("--convs", nargs="+", default=["xla", "patches", "canonical"])
    parser.add_argument("--waves", nargs="+", type=int, default=[1, 10])
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--wave", type=int, help="of rounds")
    parser.add_argument("--conv", help="of rounds")
    parser.add_argument("--again", action="store_true")
    args = parser.parse_args()
    args.on = args.on or (["v5e-16", "v5e-64", "v5e-256"] if args.part == "rounds" else ["v5e-1"])
    for name in args.on:
        start_for(name)
    {"rounds": rounds, "conv": conv}[args.part](args)


def _size(text: str) -> tuple[int, int]:
    k, _, n = text.partition(",")
    return int(k), int(n)


if __name__ == "__main__":
    main()
