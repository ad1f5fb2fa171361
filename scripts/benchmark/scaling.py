"""How cost grows: time per client with population and cohort, padding, compile time, memory.

    python scripts/benchmark/scaling.py [--parts clients padding compile memory]

Prints Markdown tables. Data are synthetic (their values do not matter here); clocks are medians of rounds,
compilation apart. Run it on a machine that does nothing else.
"""

import argparse
import statistics
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rounds import equal, in_turn, noise, ratio, timed, training

import fedjax_sim as fs
from fedjax_sim.engine import cohorts, programs, waves
from fedjax_sim.runs.plan import compiled_round

MIB = 2**20


def made(dataset, partition, model, cohort, algorithm=None, devices=None, **local) -> fs.Simulation:
    """A run of which rounds are timed or compiled."""
    return training(
        dataset,
        partition,
        model=model,
        local=fs.LocalConfig(**local),
        cohort=fs.CohortConfig(size=cohort),
        execution=fs.ExecutionConfig(devices=devices),
        algorithm=algorithm or fs.FedAvg(),
    )


def compared(cases: dict[tuple[int, int], fs.Simulation], repetitions: int) -> None:
    """Prints time per client of (population, cohort), and against the first case's, in turn with it."""
    seconds = in_turn(cases, repetitions)
    each = {case: [one / case[1] for one in values] for case, values in seconds.items()}
    print("\n| population | cohort | ms a client | against the first |\n|---:|---:|---:|---|")
    first = next(iter(each.values()))
    for (population, cohort), values in each.items():
        middle = statistics.median(values) * 1e3
        print(f"| {population} | {cohort} | {middle:.4g} | {ratio(values, first)} |", flush=True)


def clients() -> None:
    """Time per client: medians of rounds; the last column by repetition, median (lowest–highest)."""
    print("\nMLP 64-64-10, 20 samples, batch 10:")
    model = fs.ModelConfig("mlp", options={"hidden": [64]})
    dataset, local = noise(45_000, (8, 8, 1)), {"epochs": 1, "batch_size": 10, "lr": 0.05}
    cases = [(5000, 100), (100, 100), (1000, 100), (5000, 10), (5000, 1000), (5000, 5000)]
    compared({(n, k): made(dataset, equal(dataset, n, 20), model, k, **local) for n, k in cases}, 30)

    print("\nLeNet, 100 samples a client, batch 50, one epoch:")
    model, dataset, local = (
        fs.ModelConfig("lenet"),
        noise(45_000, (32, 32, 3)),
        {"epochs": 1, "batch_size": 50},
    )
    cases = [(5000, 100), (100, 100), (1000, 100), (5000, 10), (5000, 1000)]
    compared({(n, k): made(dataset, equal(dataset, n, 100), model, k, **local) for n, k in cases}, 5)


def padding() -> None:
    """Samples that go through the network over samples that should, 100 clients of 50,000 images."""
    dataset = noise(50_000, (1, 1, 1))
    print(
        "\n| alpha | sizes (min, median, max) | wave | devices | padding waste |\n|---:|---|---:|---:|---:|"
    )
    for alpha in (0.1, 0.5):
        config = fs.PartitionConfig(kind="dirichlet", clients=100, alpha=alpha)
        sizes = fs.data.partition(dataset, config, 0).sizes()
        local = fs.LocalConfig(epochs=5, batch_size=50)
        told = f"{sizes.min()}, {np.median(sizes):.0f}, {sizes.max()}"
        draw = cohorts.sampler(fs.CohortConfig(size=10), sizes, 200, 0)
        for wave, devices in [(1, 1), (1, 2), (5, 1), (10, 1)]:
            wastes = []
            for number in range(200):
                ids = draw(number)
                plan = waves.make_plan(waves.steps_of(sizes[ids], local), devices, wave)
                wastes.append(waves.padding_waste(sizes[ids], plan, local, wave))
            print(f"| {alpha} | {told} | {wave} | {devices} | {np.mean(wastes):.3f} |")


def compile_times() -> None:
    """FedMR, cohort 10, no cache: tracing and compiling the round; a run's start up to its first evaluation.

    On CPUs start and later rounds are set against LLVM's full optimisation.
    """
    dataset = noise(2000, (32, 32, 3))
    levels = (programs.CPU_LEVEL, 3) if jax.default_backend() == "cpu" else (programs.CPU_LEVEL,)
    head = " | ".join(f"start s, level {level}" for level in levels)
    print(f"\n| model | trace s | compile s | {head} | round, against the last level |")
    print("|---|---:|---:|" + "---:|" * len(levels) + "---|")
    for name in ("mlp", "lenet", "mcmahan", "cnn8", "resnet20"):
        fresh = partial(
            made,
            dataset,
            equal(dataset, 20, 100),
            fs.ModelConfig(name),
            10,
            fs.FedMR(),
            epochs=1,
            momentum=0.5,
        )
        starts, runs = [], {}
        for level in levels:
            programs.CPU_LEVEL = level
            begin = time.perf_counter()
            runs[level] = run = fresh()
            timed(run)
            run.evaluate()()
            starts.append(time.perf_counter() - begin)
        programs.CPU_LEVEL = levels[0]
        run = fresh()
        with jax.set_mesh(run.mesh):
            begin = time.perf_counter()
            lowered = run.program.lower(run.state, run.inputs(0)[0], run.data)
            middle = time.perf_counter()
            lowered.compile()
            end = time.perf_counter()
        seconds = in_turn(runs, 5)
        told = " | ".join(f"{start:.1f}" for start in starts)
        rounds = ratio(seconds[levels[0]], seconds[levels[-1]])
        print(f"| {name} | {middle - begin:.1f} | {end - middle:.1f} | {told} | {rounds} |", flush=True)


def memory() -> None:
    """XLA's account of the compiled round against what the algorithm needs by definition, on one device.

    Needed: FedMR's K models and their mean (FedAvg: one model), the data, and the temporaries of one
    client's optimiser step compiled by itself.
    """
    dataset = noise(50_000, (32, 32, 3))
    print("\n| model | method | cohort | needed MiB | peak MiB | ratio |\n|---|---|---:|---:|---:|---:|")
    for name, algorithm, cohort in [
        ("lenet", fs.FedMR(), 10),
        ("lenet", fs.FedMR(), 100),
        ("mcmahan", fs.FedMR(), 50),
        ("mcmahan", fs.FedAvg(), 50),
    ]:
        run = made(
            dataset,
            equal(dataset, 100, 100),
            fs.ModelConfig(name),
            cohort,
            algorithm,
            1,
            epochs=5,
            momentum=0.5,
        )
        told = compiled_round(run)
        peak = told["arguments"] + told["temporaries"] + told["output"] - told["of which in place"]
        state = sum(leaf.nbytes for leaf in jax.tree.leaves((run.state, run.data)))
        needed = state + step_temporaries(run)
        row = f"{needed / MIB:.1f} | {peak / MIB:.1f} | {peak / needed:.2f}"
        print(f"| {name} | {type(algorithm).__name__} | {cohort} | {row} |")


def step_temporaries(run: fs.Simulation) -> int:
    """Bytes that one client's optimiser step takes by itself: activations, gradients, momentum."""
    model, batch = run.setup.model, run.setup.config.local.batch_size

    def step(variables, buffer, pixels, labels):
        def loss(params):
            logits, _ = model.apply({**variables, "params": params}, pixels, train=True)
            return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean()

        gradient = jax.grad(loss)(variables["params"])
        buffer = jax.tree.map(lambda b, g: 0.5 * b + g, buffer, gradient)
        return jax.tree.map(lambda p, b: p - 0.01 * b, variables["params"], buffer), buffer

    variables = jax.eval_shape(model.init, jax.random.key(0))
    pixels = jax.ShapeDtypeStruct((batch, *model.input_shape), jnp.float32)
    labels = jax.ShapeDtypeStruct((batch,), jnp.int32)
    compiled = jax.jit(step).lower(variables, variables["params"], pixels, labels).compile()
    told: Any = compiled.memory_analysis()
    return told.temp_size_in_bytes + told.argument_size_in_bytes + told.output_size_in_bytes


PARTS = {"clients": clients, "padding": padding, "compile": compile_times, "memory": memory}


def main() -> None:
    """Prints the tables that were asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    device = jax.devices()[0]
    args = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.device_count()} × {device.device_kind}")
    for name in args.parts:
        told = (PARTS[name].__doc__ or "").splitlines()[0]
        print(f"\n## {name}\n\n{told}")
        PARTS[name]()


if __name__ == "__main__":
    main()
