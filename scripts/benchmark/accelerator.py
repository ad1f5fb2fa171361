"""What a machine with one accelerator is wanted for, in parts of ten minutes; needs no network.

    scripts/benchmark/accelerator.sh PART [--dry] [--minutes 9] [--out DIR] [--only model=lenet wave=1]
    scripts/benchmark/accelerator.sh peers --install [--dry]    # makes the environments first, with pip

grid   seconds of a round by wave, convolution, precision, trip count and XLA's command buffers; accuracy
       after a few rounds shows whether precisions agree
peers  our rounds beside a PyTorch loop, torch.func.vmap, pfl-research and Flower, those that are installed
seeds  1, 10 and 100 runs one after another in one process (runs side by side in one program do not exist yet)
full   FedMR, FedAvg and FedMut on CIFAR-10 by network and partition, in folders from which the next call
       goes on (--runs); FedCross is left out where this project has none

Each part ends by itself after the case in which its minutes are over. Rows go to DIR/accelerator-PART.csv as
they come (DIR: $OUT, else scripts/benchmark/results). A case that has a row there, or in
scripts/benchmark/results, of the same card and JAX is not measured again unless --again is given: the next
call goes on with the next cases. A case that fails is a row with its reason. `grid` and `seeds` take CIFAR-10
from $FEDJAX_SIM_DATA, or else scikit-learn's digits, resized; `full` wants CIFAR-10. `--dry` runs each part
small on CPUs; its rows go to build/accelerator and say nothing about speed.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import common
import envs
import jax
import measure
import numpy as np
import plan
import rounds
import run
from rows import Table

import fedjax_sim as fs
from fedjax_sim.config import from_dict
from fedjax_sim.core import memo
from fedjax_sim.core.versions import installed
from fedjax_sim.data.images import resize
from fedjax_sim.engine.clients import Trainer

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results"
Case = dict[str, Any]

# --- the machine --------------------------------------------------------------------------------------


def machine() -> Case:
    """The columns that every row has: card, versions, date."""
    device, driver = jax.devices()[0], ""
    if device.platform == "gpu" and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.strip().partition("\n")[0]
    elif device.platform != "cpu":
        driver = " ".join(device.client.platform_version.split())
    return {
        "card": device.device_kind,
        "jax": jax.__version__,
        "jaxlib": installed("jaxlib"),
        "driver": driver,
        "date": time.strftime("%Y-%m-%d"),
    }


@functools.cache
def images(name: str, side: int, channels: int) -> fs.Dataset:
    """Real images of that shape: CIFAR-10 where it is asked for, else scikit-learn's digits."""
    dataset = fs.DataConfig(name).load()
    assert isinstance(dataset, fs.Dataset)

    def shaped(pixels: np.ndarray) -> np.ndarray:
        pixels = resize(pixels, (side, side))
        if pixels.shape[3] > channels:
            return pixels[..., :channels]
        return np.broadcast_to(pixels, (*pixels.shape[:3], channels)).copy()

    train, test = shaped(dataset.train_images), shaped(dataset.test_images)
    half = dataclasses.replace(dataset.preprocessing, mean=(0.5,), std=(0.5,))
    return dataclasses.replace(dataset, train_images=train, test_images=test, preprocessing=half)


def source() -> str:
    """CIFAR-10 where its images lie at hand, else digits."""
    folder = os.environ.get("FEDJAX_SIM_DATA")
    return "cifar10" if folder and (Path(folder) / "cifar10.npz").is_file() else "digits"


# --- grid ---------------------------------------------------------------------------------------------

SHAPES = {"lenet": (32, 3, 50), "mcmahan": (28, 1, 10), "resnet20": (32, 3, 50), "vit": (32, 3, 50)}
"""Side and channels of an image, and the batch that is usual."""

PRECISIONS = {"float32": "float32", "tf32": "tensorfloat32", "bfloat16": None}
"""`jax.default_matmul_precision`; bfloat16 is `model.dtype`."""

BUFFERS = {
    "default": "",
    "off": "--xla_gpu_enable_command_buffer=",
    "loops": "--xla_gpu_enable_command_buffer=FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,CONDITIONAL,WHILE",
}
"""XLA's flags by what its command buffers may hold."""

GRID = ("model", "wave", "conv", "precision", "trips", "buffers")


def grid(dry: bool) -> Iterator[Case]:
    """Cases, those that decide most first; wave 0 is K, the whole cohort."""

    def case(model, wave, conv, precision="float32", trips="dynamic", buffers="default"):
        values = (model, wave, conv, precision, trips, buffers)
        return {**dict(zip(GRID, values, strict=True)), "data": "digits" if dry else source()}

    if dry:
        yield case("lenet", 1, "xla", "tf32")
        yield case("lenet", 0, "patches", "bfloat16")
        yield case("lenet", 0, "canonical", trips="static")
        yield case("lenet", 0, "patches", buffers="loops")
        return
    convs = {model: ("xla", "patches", "canonical") for model in SHAPES} | {"vit": ("xla",)}
    for precision, model in itertools.product(PRECISIONS, SHAPES):
        for wave, conv in itertools.product((1, 4, 16, 0), convs[model]):
            yield case(model, wave, conv, precision)
        if precision == "float32":
            for wave, conv in itertools.product((1, 0), convs[model][:2]):
                yield case(model, wave, conv, trips="static")
    for buffers, trips, model, wave in itertools.product(
        ("off", "loops"), ("dynamic", "static"), SHAPES, (1, 0)
    ):
        yield case(model, wave, "xla", trips=trips, buffers=buffers)


@dataclasses.dataclass(frozen=True)
class Fixed(Trainer):
    """Local training of equal clients, whose number of steps is part of the program.

    Attributes:
      steps: of every wave.
    """

    steps: int = 0

    def train_wave(self, start, broadcast, lanes, bound, lr, data):
        """As `Trainer.train_wave`, whatever `bound` says."""
        del bound
        return super().train_wave(start, broadcast, lanes, self.steps, lr, data)  # pyright: ignore[reportArgumentType]


def with_static_trips(simulation: fs.Simulation) -> fs.Simulation:
    """The same run, whose waves are loops of a length that XLA knows."""
    setup, old = simulation.setup, simulation.setup.trainer
    (steps,) = set(setup.steps.tolist())
    fields = {field.name: getattr(old, field.name) for field in dataclasses.fields(old) if field.init}
    vars(setup)["trainer"] = Fixed(**fields, steps=steps)  # where functools.cached_property keeps it
    return fs.Simulation(setup)


def measure_grid(case: Case, dry: bool, until: float) -> Case:
    """One combination: seconds of a round, images a second, compilation, accuracy."""
    del until
    clients, cohort, each, epochs, last = (4, 4, 20, 1, 3) if dry else (128, 64, 100, 5, 10)
    side, channels, batch = SHAPES[case["model"]]
    dataset = images(case["data"], side, channels)
    memo.forget()
    jax.clear_caches()
    dtype = "bfloat16" if case["precision"] == "bfloat16" else "float32"
    with jax.default_matmul_precision(PRECISIONS[case["precision"]]):
        simulation = rounds.training(
            dataset,
            rounds.equal(dataset, clients, each),
            model=fs.ModelConfig(case["model"], dtype=dtype),
            local=fs.LocalConfig(epochs=epochs, batch_size=min(batch, each // 2), lr=0.05),
            cohort=fs.CohortConfig(size=cohort),
            execution=fs.ExecutionConfig(devices=1, wave=case["wave"] or cohort, conv=case["conv"]),
        )
        if case["trips"] == "static":
            simulation = with_static_trips(simulation)
        seconds = [rounds.timed(simulation) for _ in range(last)]
        scores = {row.metric: row.value for row in simulation.evaluate()()}
    middle = statistics.median(seconds[2:])
    return {
        "round_s": _short(middle),
        "lowest_s": _short(min(seconds[2:])),
        "highest_s": _short(max(seconds[2:])),
        "images_per_s": round(cohort * each * epochs / middle),
        "compile_s": _short(seconds[0] - middle),
        "rounds": last,
        "accuracy": round(scores["accuracy"], 4),
        "loss": round(scores["loss"], 5),
        "k": cohort,
    }


# --- peers --------------------------------------------------------------------------------------------

PEERS = {plan.OURS: "jax", "torch": "torch", "vmap": "torch", "pfl": "pfl", "flwr": "flwr"}
"""By runner, the module that it needs."""

ENVIRONMENTS = {"vmap": "torch"}
"""Where that is not the runner's own."""

ENVS = ROOT / "build" / "benchmark-envs"
"""Those of `run.py` too."""

_TOO_LONG = "left out: it sends each model between processes, and 1,000 clients would take minutes a round"
LEFT_OUT = {("mlp-of-1000", "flwr"): _TOO_LONG, ("mlp-of-10000", "flwr"): _TOO_LONG}


def peers(dry: bool) -> Iterator[Case]:
    """Each peer on each workload, at the precision that PyTorch's users and JAX's mostly choose first.

    Those that are named `check` are not for timing: at float32 all must end at the same loss.
    """
    names: dict[str, Iterable[str]] = {
        "tf32": common.ACCELERATOR,
        "float32": ("check-mcmahan", "check-mlp", *common.ACCELERATOR),
    }
    if dry:
        names = {"tf32": ["dry-pfl-cifar10"], "float32": ["check-mlp"]}
    for precision, several in names.items():
        for name, peer in itertools.product(several, PEERS):
            yield {"workload": name, "peer": peer, "precision": precision}


def install(cases: Iterable[Case]) -> None:
    """Makes the environments of the peers in these cases; says which cannot be had, and goes on."""
    for peer in dict.fromkeys(ENVIRONMENTS.get(case["peer"]) or str(case["peer"]) for case in cases):
        if peer == plan.OURS:
            continue
        print(f"environment of {peer}", flush=True)
        try:
            envs.ensure(peer, ENVS)
        except envs.EnvironmentFailed as error:
            print(error, flush=True)


def measure_peer(case: Case, dry: bool, until: float) -> Case:
    """One process of a runner; half of the minutes at most."""
    name, peer = str(case["workload"]), str(case["peer"])
    if why := LEFT_OUT.get((name, peer)):
        return {"why": why}
    python = envs.interpreter(ENVIRONMENTS.get(peer) or peer, ENVS)
    python = str(python) if python.exists() else sys.executable
    if run.call([python, "-c", f"import {PEERS[peer]}"], 120)[1] is not None:
        return {"why": f"{PEERS[peer]} is not installed"}
    options = ("--device", "cpu" if dry else "gpu", "--precision", case["precision"])
    actors = 10 if peer == "flwr" and not dry else 1
    variant = plan.Variant(options[1], 1, actors, options=options)
    limit = max(60.0, (until - time.time()) / 2)
    asked = argparse.Namespace(warmup=2, rounds=None, timeout=limit)
    line = run.execute(plan.Run(peer, variant, name, 0), python, asked)
    if line["kind"] == "failed":
        return {"why": line["why"]}
    middle = statistics.median(line["seconds"])
    return {
        "round_s": _short(middle),
        "lowest_s": _short(min(line["seconds"])),
        "highest_s": _short(max(line["seconds"])),
        "images_per_s": round(common.ALL[name].images_per_round / middle),
        "first_s": _short(line["warmup_seconds"][0]),
        "loss_of_start": line["loss_of_start"],
        "loss_at_end": line["loss_at_end"],
        "versions": " ".join(f"{package} {version}" for package, version in line["versions"].items()),
    }


# --- seeds --------------------------------------------------------------------------------------------

MISSING = ("is not installed", "is not in this project", "is not in FEDJAX_SIM_DATA")
"""Ends of reasons that may hold no longer in another call."""

ONE_BY_ONE = "one after another in one process; side by side in one program does not exist yet"


def seeds(dry: bool) -> Iterator[Case]:
    """So many runs of each network."""
    for count, model in itertools.product((1, 2) if dry else (1, 10, 100), ("mlp", "lenet")):
        if not (dry and model == "lenet" and count == 1):
            yield {"model": model, "seeds": count, "data": "digits" if dry else source()}


def measure_seeds(case: Case, dry: bool, until: float) -> Case:
    """Whole runs that differ in their seed, with their evaluation."""
    last, clients = (2, 10) if dry else (20, 100)
    dataset = images(case["data"], *((32, 3) if case["model"] == "lenet" else (8, 1)))
    memo.forget()
    jax.clear_caches()
    seconds, accuracies = [], []
    for seed in range(case["seeds"]):
        if seconds and time.time() > until:
            break
        config = fs.RunConfig(
            seed=seed,
            rounds=last,
            model=fs.ModelConfig(case["model"]),
            partition=fs.PartitionConfig(kind="dirichlet", alpha=0.5, clients=clients),
            local=fs.LocalConfig(epochs=1, batch_size=10, lr=0.05),
            cohort=fs.CohortConfig(size=min(clients, 10)),
            evaluation=fs.EvaluationConfig(every=last),
            execution=fs.ExecutionConfig(devices=1),
            output=fs.OutputConfig(progress=False),
        )
        begun = time.perf_counter()
        accuracies.append(fs.run(config, dataset=dataset).metrics.last("accuracy"))
        seconds.append(time.perf_counter() - begun)
    return {
        "first_s": _short(seconds[0]),
        "later_s": _short(statistics.median(seconds[1:])) if seconds[1:] else "",
        "total_s": _short(sum(seconds)),
        "done": len(seconds),
        "rounds": last,
        "accuracy": round(statistics.mean(accuracies), 4),
        "how": ONE_BY_ONE,
        "why": "" if len(seconds) == case["seeds"] else "the minutes were over",
    }


# --- full ---------------------------------------------------------------------------------------------

ALGORITHMS: dict[str, dict[str, Any]] = {
    "fedavg": {"name": "fedavg", "weights": "uniform"},
    "fedmr": {"name": "fedmr"},
    "fedmut": {"name": "fedmut"},
    "fedcross": {"name": "fedcross"},
}
PARTITIONS: dict[str, dict[str, Any]] = {
    "dirichlet-0.1": {"kind": "dirichlet", "alpha": 0.1, "min_size": 10},
    "dirichlet-0.5": {"kind": "dirichlet", "alpha": 0.5, "min_size": 10},
    "iid": {"kind": "iid"},
}
STAGES = (100, 300, 1000)
"""Every run comes to the first number of rounds before one of them goes on to the next."""


def full(dry: bool) -> Iterator[Case]:
    """Runs in stages; their folders remember how far they are."""
    models = ("lenet",) if dry else ("lenet", "resnet20", "vgg16_bn")
    kinds = ("iid",) if dry else PARTITIONS
    for stage, seed, model, kind in itertools.product((2, 4) if dry else STAGES, (0, 1, 2), models, kinds):
        for algorithm in ALGORITHMS:
            if not (dry and seed):
                yield {
                    "model": model,
                    "partition": kind,
                    "algorithm": algorithm,
                    "seed": seed,
                    "stage": stage,
                }


def measure_full(case: Case, dry: bool, until: float, folder: Path | None = None) -> Case:
    """Brings a run to its stage, or as far as time goes, and tells how far it is."""
    if case["algorithm"] not in fs.algorithms.CONFIGS:
        return {"why": f"{case['algorithm']} is not in this project"}
    if not dry and source() != "cifar10":
        return {"why": "cifar10.npz is not in FEDJAX_SIM_DATA"}
    names = [str(case[name]) for name in ("model", "partition", "algorithm")]
    place = (folder or _runs(dry)) / "-".join([*names, f"seed{case['seed']}"])
    dataset = images("digits", 32, 3) if dry else None
    try:
        with _stopped_at(until):
            result, why = _advanced(case, dry, place, dataset), ""
    except SystemExit as asked:  # Terminated: after a checkpoint
        result, why = getattr(asked, "run", None), "the minutes were over"
    if result is None:
        return {"why": why}
    curve = result.metrics.series("accuracy")[1]
    return {
        "rounds": result.rounds,
        "accuracy": round(float(curve[-1]), 4) if len(curve) else "",
        "best": round(float(curve.max()), 4) if len(curve) else "",
        "seconds": _short(result.seconds),
        "why": why,
    }


def _advanced(case: Case, dry: bool, place: Path, dataset: fs.Dataset | None) -> fs.Run:
    """The run of a case, brought to its stage from wherever it is."""
    if not (place / "config.yaml").exists():
        return fs.run(_full_config(case, dry, place), dataset=dataset)
    found = fs.load(place, dataset=dataset)
    if found.rounds >= case["stage"]:
        return found
    return fs.resume(place, rounds=max(case["stage"], found.config.rounds), dataset=dataset)


def _runs(dry: bool) -> Path:
    """Where runs lie: the worker's environment says so."""
    return Path(os.environ.get(RUNS) or ROOT / "build" / "accelerator" / ("dry" if dry else "full"))


RUNS = "FEDJAX_SIM_ACCELERATOR_RUNS"


def _full_config(case: Case, dry: bool, place: Path) -> fs.RunConfig:
    return from_dict(
        {
            "seed": case["seed"],
            "rounds": case["stage"],
            "data": {"source": "digits" if dry else "cifar10"},
            "model": {"name": case["model"]},
            "algorithm": ALGORITHMS[case["algorithm"]],
            "partition": {"clients": 10 if dry else 100, **PARTITIONS[case["partition"]]},
            "local": {"epochs": 1 if dry else 5, "batch_size": 50, "lr": 0.01, "momentum": 0.5},
            "cohort": {"fraction": 0.1 if not dry else 0.2},
            "evaluation": {"every": 2 if dry else 10},
            "execution": {"devices": 1},
            "output": {
                "dir": str(place),
                "checkpoint_every": 100,
                "keep": 1,
                "tensorboard": False,
                "figures": False,
                "progress": False,
            },
        }
    )


@contextlib.contextmanager
def _stopped_at(until: float) -> Iterator[None]:
    """Asks this process to end at that time; a run then writes a checkpoint and raises Terminated."""

    def end(number: int, frame: Any) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    timer = threading.Timer(max(until - time.time(), 0.0), os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        signal.signal(signal.SIGTERM, before)


# --- cases one after another --------------------------------------------------------------------------


class Part(NamedTuple):
    """Attributes: cases: in order. measure: one of them. keys: what names one. shown: of a row, on a line."""

    cases: Callable[[bool], Iterator[Case]]
    measure: Callable[[Case, bool, float], Case]
    keys: tuple[str, ...]
    shown: tuple[str, ...]


_CLOCK = ("round_s", "images_per_s")
PARTS = {
    "grid": Part(grid, measure_grid, (*GRID, "data"), (*_CLOCK, "compile_s", "accuracy")),
    "peers": Part(
        peers, measure_peer, ("workload", "peer", "precision"), (*_CLOCK, "first_s", "loss_at_end")
    ),
    "seeds": Part(
        seeds, measure_seeds, ("model", "seeds", "data"), ("first_s", "later_s", "total_s", "accuracy")
    ),
    "full": Part(
        full,
        measure_full,
        ("model", "partition", "algorithm", "seed", "stage"),
        ("rounds", "accuracy", "best", "seconds"),
    ),
}


def attempt(part: str, case: Case, dry: bool, until: float) -> Case:
    """What was measured, or `why` not."""
    try:
        return PARTS[part].measure(case, dry, until)
    except Exception as error:  # a case that fails is a row: out of memory, refused, not compiled
        told = " ".join(str(error).split())[:300]
        return {"why": f"{type(error).__name__}: {told}"}


class Worker:
    """A process that measures one case after another, and may die of one."""

    def __init__(self, part: str, dry: bool, flags: str):
        """Starts it with these flags of XLA besides the user's own."""
        told = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
        environment = os.environ | ({"XLA_FLAGS": told} if told else {})
        environment |= {"JAX_ENABLE_COMPILATION_CACHE": "false"}  # compilation is measured
        command = [
            sys.executable,
            str(HERE / "accelerator.py"),
            part,
            "--worker",
            *(["--dry"] if dry else []),
        ]
        self._process = subprocess.Popen(
            command,
            text=True,
            env=environment,
            start_new_session=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._errors: list[str] = []
        threading.Thread(target=self._listen, daemon=True).start()

    def __call__(self, case: Case | None, until: float, grace: float = 240.0) -> Case:
        """What came of a case (None: what the machine is). It is ended `grace` seconds after `until`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        limit = max(until - time.time(), 0.0) + grace
        timer = threading.Timer(limit, self._process.kill)
        timer.start()
        try:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(json.dumps({"case": case, "until": until}) + "\n")
                self._process.stdin.flush()
            for line in self._process.stdout:
                if line.startswith(measure.MARK):
                    return measure.parse(line)
        finally:
            timer.cancel()
        code = self._process.wait()
        said = [line.strip() for line in self._errors if any(map(str.isalnum, line))]
        last = said[-1][:300] if said else "nothing was said"
        return {"why": f"its process ended with status {code}: {last}"}

    @property
    def alive(self) -> bool:
        """Whether it can take another case."""
        return self._process.poll() is None

    def close(self) -> None:
        """Ends it."""
        run.end(self._process)

    def _listen(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._errors = [*self._errors[-50:], line]


def work(part: str, dry: bool) -> None:
    """The worker's side: cases from standard input, rows to standard output."""
    for line in sys.stdin:
        asked = json.loads(line)
        case, until = asked["case"], asked["until"]
        row = machine() if case is None else attempt(part, case, dry, until)
        print(measure.MARK + json.dumps(row), flush=True)


def conduct(part: str, args: argparse.Namespace) -> Table:
    """Measures cases until the minutes are over."""
    until = time.time() + 60 * args.minutes
    about = _machine(args.dry)
    keys = (*PARTS[part].keys, "card", "jax")
    name = f"accelerator-{part}.csv"
    table = Table(args.out / name, keys, args.again or args.dry, None if args.dry else RESULTS / name)
    print(", ".join(f"{name} {value}" for name, value in about.items() if value), flush=True)
    if part == "seeds":
        print(f"runs go {ONE_BY_ONE}", flush=True)
    worker, flags, left = None, "", 0
    try:
        for case in PARTS[part].cases(args.dry):
            shown = {**case, **about}
            if not _asked_for(case, args.only) or not _wanted(table, shown):
                continue
            if time.time() >= until:
                left += 1
                continue
            begun = time.perf_counter()
            if part == "peers":  # whose runners are processes themselves, and want the card to themselves
                row = attempt(part, case, args.dry, until)
            else:
                wanted = BUFFERS[case.get("buffers", "default")]
                if worker is not None and (flags != wanted or not worker.alive):
                    worker.close()
                    worker = None
                if worker is None:
                    worker, flags = Worker(part, args.dry, wanted), wanted
                row = worker(case, until)
            if row.get("why") != "the minutes were over" or row.get("rounds") or row.get("done"):
                _say(part, case, row, time.perf_counter() - begun)
                # A run that was cut goes on in the next call: it has no row of its stage yet.
                cut = part == "full" and row.get("why") == "the minutes were over"
                table.keep({**shown, **({"stage": f"on the way to {case['stage']}"} if cut else {}), **row})
    finally:
        if worker is not None:
            worker.close()
    print(f"{left} cases are left for another call; rows are in {table.path}", flush=True)
    return table


def _machine(dry: bool) -> Case:
    """`machine()` of another process, which leaves the card free; ends this one where there is none."""
    worker = Worker("grid", dry, "")
    try:
        about = worker(None, time.time())
    finally:
        worker.close()
    if "card" not in about:
        sys.exit(f"JAX does not start: {about['why']}")
    if about["card"] == "cpu" and not dry:
        sys.exit("JAX sees no accelerator here, only CPUs; --dry tries the parts on these")
    return about


def _wanted(table: Table, shown: Case) -> bool:
    """Whether a case has no row, or one that says what was missing on the machine."""
    return table.wants(shown) or any(str(row.get("why")).endswith(MISSING) for row in table.of(shown))


def _say(part: str, case: Case, row: Case, seconds: float) -> None:
    """One line of the table."""
    name = " ".join(str(case[key]) for key in PARTS[part].keys)
    told = "  ".join(f"{key} {row[key]}" for key in PARTS[part].shown if row.get(key, "") != "")
    print(f"{seconds:5.0f} s  {name:48}  {told}{'  ' if told else ''}{row.get('why', '')}", flush=True)


def _asked_for(case: Case, only: list[str]) -> bool:
    """Whether a case has one of the values that were asked for of each field."""
    wanted: dict[str, set[str]] = {}
    for text in only:
        field, _, value = text.partition("=")
        wanted.setdefault(field, set()).add(value)
    return all(str(case.get(field)) in values for field, values in wanted.items())


def _short(number: float) -> float:
    return float(f"{number:.4g}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--dry", action="store_true", help="small, on CPUs")
    parser.add_argument("--minutes", type=float, default=9.0, help="no case starts after so many")
    parser.add_argument("--out", type=Path, help="folder of the rows")
    parser.add_argument("--runs", type=Path, help="folder of the runs of `full`; default build/accelerator")
    parser.add_argument("--only", nargs="+", default=[], help="cases with these values: model=lenet wave=1")
    parser.add_argument("--again", action="store_true", help="measure what has a row as well")
    parser.add_argument("--install", action="store_true", help="make the environments of `peers` first")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.out is None:
        usual = ROOT / "build" / "accelerator" if args.dry else Path(os.environ.get("OUT") or RESULTS)
        args.out = usual
    if args.install and args.part != "peers":
        parser.error(f"argument --install: {args.part} has no environments of its own, peers has")
    known = {field for part in PARTS.values() for field in part.keys}
    for text in args.only:
        if text.partition("=")[0] not in known:
            parser.error(f"argument --only: {text} is not FIELD=VALUE; fields are {', '.join(sorted(known))}")
    return args


def main() -> None:
    """See the module."""
    args = parse()
    if args.dry:
        os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
        jax.config.update("jax_platforms", "cpu")
    if args.runs is not None:
        os.environ[RUNS] = str(args.runs.resolve())
    if args.worker:
        work(args.part, args.dry)
    else:
        if args.install:
            install(case for case in peers(args.dry) if _asked_for(case, args.only))
        conduct(args.part, args)


if __name__ == "__main__":
    main()
