"""What the host does for N clients, before the first round and between rounds: every step by itself.

    python scripts/benchmark/setup.py                                # 100 to 1,000,000 clients
    python scripts/benchmark/setup.py --clients 100000 --parts partitions planning

Prints a Markdown table for each part: seconds, the median of three where one took less than a second. A step
that took more than a tenth of `--limit` is left out for more clients. Ten samples a client on average, of
eight pixels and ten classes; values do not matter here. Run it on a machine that does nothing else.
"""

import argparse
import dataclasses
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rounds import noise

import fedjax_sim as fs
from fedjax_sim import data, records
from fedjax_sim.data import as_partition, splits
from fedjax_sim.engine import cohorts, waves
from fedjax_sim.engine.device_data import order_lengths, sample_table
from fedjax_sim.engine.scores import client_rows
from fedjax_sim.records import Lap, plots, table
from fedjax_sim.runs import provenance
from fedjax_sim.runs.assemble import prepare
from fedjax_sim.runs.describe import describe
from fedjax_sim.runs.folder import Folder
from fedjax_sim.runs.plan import plan

SIZES = (100, 1_000, 10_000, 100_000, 1_000_000)
EACH = 10
"""Samples of a client, on average."""


class Clock:
    """Seconds of named steps by the number of clients.

    Attributes:
      seconds: step -> clients -> seconds.
    """

    def __init__(self, limit: float):
        """`limit`: what one step may take, as far as the one before foretells it."""
        self.seconds: dict[str, dict[int, float]] = {}
        self._limit, self._clients = limit, 0

    def start(self, clients: int) -> None:
        """Times steps for so many clients from now on."""
        self._clients = clients

    def __call__(self, name: str, step: Callable[[], Any], repeat: int = 3) -> Any:
        """Times a step, unless it would take too long. -> what it returned, None if it did not run."""
        before = self.seconds.setdefault(name, {})
        if before and (max(before) < self._clients / 10 or before[max(before)] > self._limit / 10):
            return None
        taken, result = [], None
        while len(taken) < repeat and sum(taken) < 1:
            begun = time.perf_counter()
            result = step()
            taken.append(time.perf_counter() - begun)
        before[self._clients] = statistics.median(taken)
        print(f"{self._clients:,}, {name}: {before[self._clients]:.2g} s", file=sys.stderr, flush=True)
        return result

    def print(self) -> None:
        """Prints the table."""
        sizes = sorted({clients for row in self.seconds.values() for clients in row})
        print("\n| seconds | " + " | ".join(f"N = {clients:,}" for clients in sizes) + " |")
        print("|---|" + "---:|" * len(sizes))
        for name, row in self.seconds.items():
            cells = (f"{row[clients]:.2g}" if clients in row else "–" for clients in sizes)
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def made(clients: int) -> data.Dataset:
    """Ten images of eight pixels for each client, its writer, and five domains."""
    dataset = noise(EACH * clients, (2, 2, 2))
    return dataclasses.replace(
        dataset,
        train_writers=np.random.default_rng(1).permutation(np.repeat(np.arange(clients), EACH)),
        test_writers=np.arange(100) % clients,
        train_domains=np.arange(EACH * clients) % 5,
        test_domains=np.arange(100) % 5,
        class_names=tuple("0123456789"),
    )


def unequal(dataset: data.Dataset, clients: int, local_test: str = "none") -> fs.Partition:
    """Clients of very unequal sizes."""
    wanted = fs.PartitionConfig("quantity", clients=clients, sigma=1.0, min_size=2, local_test=local_test)
    return data.partition(dataset, wanted)


def partitions(clock: Clock, clients: int, home: Path) -> None:
    """Every kind of partition, clients' own tests, files and reports."""
    dataset = made(clients)
    plain = {"clients": clients, "min_size": 1}
    kinds: dict[str, dict[str, Any]] = {
        "iid": {"kind": "iid"},
        "dirichlet, alpha 10": {"kind": "dirichlet", "alpha": 10.0},
        "dirichlet-classes": {"kind": "dirichlet-classes", "samples_per_client": EACH},
        "pathological": {"kind": "pathological"},
        "shards": {"kind": "shards"},
        "domain": {"kind": "domain"},
        "natural": {"kind": "natural"},
        "quantity": {"kind": "quantity"},
        "identical": {"kind": "identical", "samples_per_client": EACH},
        "iid, samples_per_client": {"kind": "iid", "samples_per_client": 5},
        "iid, local_test holdout": {"kind": "iid", "local_test": "holdout"},
        "iid, local_test matching": {
            "kind": "iid",
            "local_test": "matching",
            "test_samples_per_client": 5,
        },
        "dirichlet-classes, local_test holdout": {
            "kind": "dirichlet-classes",
            "samples_per_client": 40,
            "local_test": "holdout",
            "holdout": 0.5,
        },
        "iid, a tenth put aside": {"kind": "iid"},
    }
    for name, fields in kinds.items():
        config = fs.PartitionConfig(**{**plain, **fields})
        aside = 0.1 if "aside" in name else 0.0
        clock(name, lambda config=config, aside=aside: data.partition(dataset, config, 0, aside))
    own = splits.iid(dataset.train_size, clients, np.random.default_rng(0))
    arrays = [np.asarray(part) for part in own]
    partition = clock("a given list of arrays", lambda: as_partition(arrays))
    partition = partition or fs.Partition(tuple(arrays))
    clock("write the file", lambda: data.save(partition, home / "p.json"))
    if (home / "p.json").exists():
        clock("read the file", lambda: data.load_partition(home / "p.json", dataset))
    clock("label_counts", lambda: data.label_counts(partition, dataset.train_labels, 10))
    clock("checksums of the record", lambda: provenance.describe_partition(partition))
    clock("summary", lambda: data.summary(partition, dataset))
    clock("picture", lambda: data.plot(partition, dataset, home / "p.png"))


def planning(clock: Clock, clients: int, home: Path) -> None:
    """What a round asks for: cohorts and their waves, of very unequal clients; seconds of one round."""
    dataset = noise(EACH * clients, (1, 1, 1))
    counts = unequal(dataset, clients).sizes().astype(np.int32)
    local = fs.LocalConfig(epochs=5, batch_size=10)
    for size in (100, 10_000):
        if size > clients:
            continue
        for sampling in ("uniform", "by_size", "cyclic"):
            config = fs.CohortConfig(size=size, sampling=sampling)
            draw = cohorts.sampler(config, counts, 100, 0)
            clock(f"draw {size:,}, {sampling}", lambda draw=draw: draw(7))
        drawn = cohorts.Schedule.drawn(
            cohorts.sampler(fs.CohortConfig(size=size), counts, 100, 0), 100, clients
        )
        drawn.save(home / "s.json")
        config = fs.CohortConfig(size=size, sampling="schedule", schedule=str(home / "s.json"))
        clock(
            f"read a schedule of 100 rounds, {size:,} each",
            lambda config=config: cohorts.sampler(config, counts, 100, 0),
        )
        ids = draw(7)
        for devices, width in ((2, 1), (16, 4), (256, 1)):
            plan_round = lambda ids=ids, devices=devices, width=width: waves.padding_waste(  # noqa: E731
                counts[ids], waves.make_plan(waves.steps_of(counts[ids], local), devices, width), local, width
            )
            clock(f"plan {size:,}, {devices} devices × {width}", plan_round)
    steps = waves.steps_of(counts, local)
    clock("plan all N, 2 devices × 1", lambda: waves.make_plan(steps, 2, 1))


def recording(clock: Clock, clients: int, home: Path) -> None:
    """Rows of one evaluation of all N clients: made, written, read and drawn."""
    figures = np.random.default_rng(0).random(clients)
    rows = clock("make the rows", lambda: client_rows(1, figures, "client_accuracy"))
    if rows is None:
        return
    clock("check that they are finite", lambda: records.encode_nonfinite(rows))
    kept = clock("add them to the table", lambda: records.Table(rows))
    clock("write the journal", lambda: _journal(home, rows))
    clock("read the journal", lambda: list(records.read_journal(home / table.JOURNAL)))
    clock("write Parquet", lambda: table.write_parquet(kept, home / "m.parquet"))
    clock("read Parquet", lambda: table.read_parquet(home / "m.parquet"))
    drawn = clock("clients' figure", lambda: plots.client_figures(kept, "t"))
    if drawn is not None:
        clock("write that figure", lambda: plots.save(drawn, home / "c.png"))


def _journal(home: Path, rows: list[records.Row]) -> None:
    journal = records.Journal(home, upto=0)
    journal.write(rows, Lap(1, 0.0, 0.0, 1))
    journal.close()


def run(clock: Clock, clients: int, home: Path) -> None:
    """A run of an MLP in memory, cohorts of 100, from the settings to the end of its first round."""
    dataset = made(clients)
    partition = unequal(dataset, clients, "holdout")

    def config(algorithm: Any, per_client: bool) -> fs.RunConfig:
        return fs.RunConfig(
            rounds=3,
            model=fs.ModelConfig("mlp", options={"hidden": [16]}),
            cohort=fs.CohortConfig(size=100),
            evaluation=fs.EvaluationConfig(every=1, per_client=per_client),
            algorithm=algorithm,
            output=fs.OutputConfig(dir=str(home / f"run-{clients}")),
        )

    plain = config(fs.FedAvg(), False)
    wanted = fs.PartitionConfig("quantity", clients=clients, sigma=1.0, min_size=2)
    plain = dataclasses.replace(plain, partition=wanted)
    setup = clock("prepare, partition included", lambda: prepare(plain, dataset=dataset), 1)
    setup = setup or prepare(plain, dataset=dataset, partition=partition)
    clock("Setup.counts", lambda: dataclasses.replace(setup).counts)
    clock("Setup.label_counts", lambda: dataclasses.replace(setup).label_counts)
    clock("Setup.draw", lambda: dataclasses.replace(setup).draw)
    clock("Setup.trainer", lambda: dataclasses.replace(setup).trainer)
    clock("order lengths and table for the devices", lambda: _tables(partition, dataset))
    clock("describe, in a folder", lambda: _described(home, setup))
    clock("fedjax-sim plan, of the setup", lambda: plan(setup), 1)
    for name, algorithm in (("FedAvg", fs.FedAvg()), ("personal models", fs.Local())):
        asked = config(algorithm, True)
        simulation = clock(f"{name}: set-up", lambda asked=asked: _simulation(asked, dataset, partition), 1)
        if simulation is None:
            continue
        clock(f"{name}: first round, compiled", lambda run=simulation: _round(run), 1)
        clock(f"{name}: evaluation per client, first", lambda run=simulation: run.evaluate()(), 1)
        clock(f"{name}: evaluation per client, again", lambda run=simulation: run.evaluate()(), 1)
    if clock.seconds.get("FedAvg: set-up", {}).get(clients) is not None:
        whole = dataclasses.replace(config(fs.FedAvg(), True), rounds=2)
        clock("a whole run of two rounds, evaluated per client", lambda: _whole(whole, dataset, partition), 1)


def _tables(partition: fs.Partition, dataset: data.Dataset) -> None:
    order_lengths(partition.sizes())
    sample_table(partition, dataset.train_size)


def _described(home: Path, setup: Any) -> None:
    folder = Folder(home / f"described-{setup.num_clients}")
    folder.path.mkdir(exist_ok=True)
    describe(folder, setup)


def _simulation(config: fs.RunConfig, dataset: data.Dataset, partition: fs.Partition) -> fs.Simulation:
    simulation = fs.Simulation(config, dataset=dataset, partition=partition)
    jax.block_until_ready(simulation.state)
    return simulation


def _round(simulation: fs.Simulation) -> None:
    inputs, _ = simulation.inputs(0)
    with jax.set_mesh(simulation.mesh):
        simulation.state, _ = simulation.program(simulation.state, inputs, simulation.data, None)
    jax.block_until_ready(simulation.state)


def _whole(config: fs.RunConfig, dataset: data.Dataset, partition: fs.Partition) -> None:
    with tempfile.TemporaryDirectory() as home:
        output = dataclasses.replace(config.output, dir=home, progress=False)
        fs.run(dataclasses.replace(config, output=output), dataset=dataset, partition=partition)


PARTS = {"partitions": partitions, "planning": planning, "recording": recording, "run": run}


def main() -> None:
    """Prints the tables that were asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--clients", nargs="+", type=int, default=SIZES)
    parser.add_argument("--limit", type=float, default=100, help="seconds that one step may take")
    args = parser.parse_args()
    devices = f"{jax.device_count()} × {jax.devices()[0].device_kind}"
    print(f"jax {jax.__version__}, numpy {np.__version__}, {devices}")
    for name in args.parts:
        clock, peaks = Clock(args.limit), {}
        with tempfile.TemporaryDirectory() as home:
            for clients in sorted(args.clients):
                clock.start(clients)
                PARTS[name](clock, clients, Path(home))
                peaks[clients] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"\n## {name}\n\n{(PARTS[name].__doc__ or '').splitlines()[0]}")
        clock.print()
        told = ", ".join(f"{peak:.2f} GiB (N = {clients:,})" for clients, peak in peaks.items())
        print(f"\nMemory of the process at most so far: {told}.")


if __name__ == "__main__":
    main()
