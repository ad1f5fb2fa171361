"""How long measured rounds take to compile, and to run, beside rounds that nothing measures.

    python scripts/benchmark/compiling.py [--cases lenet lenet-peel] [--rounds 5]

Prints a Markdown table. Every case is a process of its own, without a cache of compiled programs. `first` is
the wall time of a run's first round, tracing and compiling included; `compile` is that less the median of
the rounds after it, all of which are of the same kind; `cpu` is the same in processor seconds of all cores,
which say something on a busy machine too. Clients are ten, with 600 images each of 32×32×3; the probe looks
at all of them.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

from rounds import equal, noise, timed, training

import fedjax_sim as fs

PEEL = fs.PeelConfig(every=1)
CONTROLS = ("perturbed", "reestimated", "local_statistics")
ALL = fs.PeelConfig(every=1, chimeras=True, controls=CONTROLS, others=True, finetune=1)
LENET, CNN8 = fs.ModelConfig("lenet"), fs.ModelConfig("cnn8", norm="batch")
CASES = {
    "lenet": {"model": LENET},
    "lenet-peel": {"model": LENET, "peel": PEEL},
    "lenet-fedmr": {"model": LENET, "algorithm": fs.FedMR()},
    "lenet-fedmr-peel": {"model": LENET, "algorithm": fs.FedMR(), "peel": PEEL},
    "cnn8": {"model": CNN8},
    "cnn8-peel": {"model": CNN8, "peel": PEEL},
    "cnn8-all": {"model": CNN8, "peel": ALL},
}


def seconds(case: str, rounds: int) -> list[tuple[float, float]]:
    """Wall time and processor time of a case's first rounds, 1 + `rounds` of them."""
    dataset = noise(6_100)
    local = fs.LocalConfig(epochs=1, batch_size=50, momentum=0.5)
    run = training(dataset, equal(dataset, 10, 600), local=local, **CASES[case])
    told = []
    for _ in range(1 + rounds):
        before = time.process_time()
        wall = timed(run)
        told.append((wall, time.process_time() - before))
    return told


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one", choices=list(CASES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(seconds(args.one, args.rounds)))
        return
    print("| case | first s | compile s | compile cpu s | round s |\n|---|---:|---:|---:|---:|")
    for case in args.cases:
        command = [sys.executable, __file__, "--one", case, "--rounds", str(args.rounds)]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        first, *later = json.loads(said.splitlines()[-1])
        wall, cpu = (statistics.median(times) for times in zip(*later, strict=True))
        columns = f"{first[0]:.1f} | {first[0] - wall:.1f} | {first[1] - cpu:.1f} | {wall:.3f}"
        print(f"| {case} | {columns} |", flush=True)


if __name__ == "__main__":
    main()
