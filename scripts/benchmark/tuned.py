"""What `fedjax-sim tune-machine` chooses here, and what that does to whole rounds, in turn with the default.

    python scripts/benchmark/tuned.py [--seconds 30] [--turns 11] [mlp-100 lenet default …]

A name is a workload of `common.py`, or `default`: the package's default configuration, whose clients are
unequal; `default:mcmahan` is that with another network. Nothing is kept. Where the default stays, the best of
the others is run beside it.
"""

import argparse
import dataclasses
import os
import statistics
import time
from typing import Any

import common
import jax
import numpy as np

import fedjax_sim as fs
from fedjax_sim.engine.simulation import Simulation
from fedjax_sim.engine.step_times import Layout
from fedjax_sim.runs import calibration
from fedjax_sim.runs.assemble import prepare

_TURN = 0.1
"""Seconds of a turn, or one round if that takes longer."""


def described(name: str) -> tuple[fs.RunConfig, dict[str, Any]]:
    """(Configuration, data and partition that take the place of what it names)."""
    forever = {"rounds": 10**4, "evaluation": fs.EvaluationConfig(every=0)}
    if name.startswith("default"):
        return fs.RunConfig(**forever, model=fs.ModelConfig(name.partition(":")[2] or "mlp")), {}
    load = common.ALL[name]
    images, labels = common.population(load)
    dataset = fs.Dataset(
        name=name,
        train_images=images.reshape(-1, *load.shape),
        train_labels=labels.reshape(-1),
        test_images=np.zeros((1, *load.shape), np.uint8),
        test_labels=np.zeros(1, np.int32),
        num_classes=common.CLASSES,
    )
    config = fs.RunConfig(
        **forever,
        model=fs.ModelConfig(load.model, options={"hidden": [64]} if load.model == "mlp" else {}),
        local=fs.LocalConfig(
            epochs=load.epochs, batch_size=load.batch, lr=load.learning_rate, momentum=load.momentum
        ),
        cohort=fs.CohortConfig(size=load.cohort),
    )
    return config, {
        "dataset": dataset,
        "partition": fs.Partition(tuple(np.arange(labels.size).reshape(labels.shape))),
    }


def simulation(config: fs.RunConfig, given: dict[str, Any], layout: Layout) -> Simulation:
    """Of rounds one by one in a layout, compiled and warm."""
    execution = dataclasses.replace(
        config.execution, wave=layout.wave, conv=layout.conv, rounds_per_call=1, calibration="ignore"
    )
    made = Simulation(prepare(dataclasses.replace(config, execution=execution), **given))
    for _ in range(3):
        made.step()()
    return made


def seconds(of: Simulation, rounds: int) -> float:
    """Of a round."""
    start = time.perf_counter()
    for _ in range(rounds):
        rows = of.step()
    rows()
    jax.block_until_ready(of.state)
    return (time.perf_counter() - start) / rounds


def main() -> None:
    """Prints what was chosen and the ratios of whole rounds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=calibration.SECONDS)
    parser.add_argument("--turns", type=int, default=11)
    parser.add_argument("names", nargs="*", default=["default", *common.WORKLOADS])
    args = parser.parse_args()
    for name in args.names:
        config, given = described(name)
        setup = prepare(config, **given)
        case = calibration.Case(setup.model, setup.task, setup.config, setup.counts, setup.mesh)
        chosen, ratios = calibration.judged(case, calibration.measured(case, args.seconds))
        told = {(one.wave, one.conv): round(statistics.median(turns), 2) for one, turns in ratios.items()}
        print(f"{name}: chosen {chosen.wave} {chosen.conv} of {told}", flush=True)
        default = case.layouts[0]
        others = [one for one in ratios if one != default]
        if not others:
            continue
        other = min(others, key=lambda one: statistics.median(ratios[one])) if chosen == default else chosen
        pair = [simulation(config, given, layout) for layout in (default, other)]
        rounds = max(1, int(_TURN / seconds(pair[0], 1)))
        turns = []
        for turn in range(args.turns):
            order = (0, 1) if turn % 2 else (1, 0)
            took = {number: seconds(pair[number], rounds) for number in order}
            turns.append(took[1] / took[0])
        print(
            f"  whole rounds, {other.wave} {other.conv} over the default: {statistics.median(turns):.2f} "
            f"({min(turns):.2f}-{max(turns):.2f}) in {args.turns} turns of {rounds}; "
            f"load {os.getloadavg()[0]:.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
