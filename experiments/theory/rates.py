"""FedMR's mean iterate against FedAvg's with diminishing steps, on two strongly convex problems.

    python experiments/theory/rates.py [--out DIR] [--rounds T] [--seeds S]

Runs the engine itself: `Simulation` with the records of `FedAvg` and `FedMR`, a model and a data set of one's
own, and for the quadratic a loss of one's own. Only the optimum w* and the excess F(w) − F* are computed
beside it, in NumPy float64. README.md says what comes of it.
"""

import argparse
import csv
import dataclasses
import itertools
import json
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from flax import linen as nn
from scipy import stats

from fedjax_sim.algorithms import FedAvg, FedMR
from fedjax_sim.config import (
    CohortConfig,
    EvaluationConfig,
    ExecutionConfig,
    LocalConfig,
    OutputConfig,
    RunConfig,
    to_dict,
)
from fedjax_sim.core import gradients
from fedjax_sim.core.algorithm import Algorithm, AlgorithmConfig, Context
from fedjax_sim.core.task import Batch, masked_mean
from fedjax_sim.data import Dataset, Partition, Preprocessing
from fedjax_sim.engine.setup import Setup
from fedjax_sim.models.adapter import from_flax
from fedjax_sim.records import plots
from fedjax_sim.runs import provenance
from fedjax_sim.runs.assemble import prepare
from fedjax_sim.runs.federation import Simulation

CLIENTS, SAMPLES, FEATURES, OUTPUTS, BLOCKS = 20, 32, 8, 2, 4
L2 = 0.1  # λ of the logistic regression
BATCH = 4
METHODS: dict[str, AlgorithmConfig] = {
    "FedAvg": FedAvg(weights="uniform"),
    "FedMR": FedMR(similarity=False),
    "no recombination": FedMR(granularity="model", similarity=False),  # K models that only swap clients
}
COHORTS = (20, 5)
WORK: dict[str, dict[str, Any]] = {
    "5 steps": {"epochs": None, "steps": 5},  # fewer than an epoch's 8: the sum of the batches is random
    "1 epoch": {"epochs": 1},
    "5 epochs": {"epochs": 5},
}


# --- the problems -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """F = mean_k F_k over N clients with n samples each; w is f64[d, C].

    quadratic  F_k(w) = 1/(2n) Σ_i ‖x_i w − y_i‖²
    logistic   F_k(w) = 1/n Σ_i cross-entropy(x_i w, y_i) + λ/2 ‖w‖²

    Attributes:
      name: quadratic or logistic.
      x: f64[N, n, d], multiples of 1/64.
      y: f64[N, n, C], multiples of 1/16, or one-hot.
      l2: λ; 0 for the quadratic.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    l2: float = 0.0

    def values(self, w: np.ndarray) -> np.ndarray:
        """F_k(w), f64[N]."""
        out = self.x @ w
        if self.name == "quadratic":
            return 0.5 * ((out - self.y) ** 2).sum(2).mean(1)
        top = out.max(2)
        losses = np.log(np.exp(out - top[..., None]).sum(2)) + top - (out * self.y).sum(2)
        return losses.mean(1) + 0.5 * self.l2 * (w**2).sum()

    def gradients(self, w: np.ndarray) -> np.ndarray:
        """Of each F_k, f64[N, d, C]."""
        out = self.x @ w
        delta = (out if self.name == "quadratic" else _softmax(out)) - self.y
        return np.swapaxes(self.x, 1, 2) @ delta / self.x.shape[1] + self.l2 * w

    def hessians(self, w: np.ndarray) -> np.ndarray:
        """Of each F_k, f64[N, dC, dC]."""
        clients, samples, features = self.x.shape
        size = features * self.y.shape[2]
        if self.name == "quadratic":
            curvature = np.broadcast_to(np.eye(self.y.shape[2]), (clients, samples, *[self.y.shape[2]] * 2))
        else:
            p = _softmax(self.x @ w)
            curvature = p[..., :, None] * np.eye(p.shape[2]) - p[..., :, None] * p[..., None, :]
        full = np.einsum("kia,kib,kicd->kacbd", self.x, self.x, curvature) / samples
        return full.reshape(clients, size, size) + self.l2 * np.eye(size)

    def minimum(self, clients: slice | list[int] = slice(None)) -> np.ndarray:
        """The minimiser of the mean of these clients' F_k, by Newton's method. -> f64[d, C]."""
        w = np.zeros(self.x.shape[2:] + self.y.shape[2:])
        for _ in range(50):
            gradient = self.gradients(w)[clients].mean(0)
            step = np.linalg.solve(self.hessians(w)[clients].mean(0), gradient.ravel())
            w = w - step.reshape(w.shape)
            if np.abs(step).max() < 1e-13:
                return w
        raise ArithmeticError(f"Newton's method did not settle on the {self.name} problem")

    def constants(self) -> dict[str, float]:
        """μ and L of all F_k, κ, Γ = F* − mean_k F_k*, and how far clients and batches disagree at w*."""
        best = self.minimum()
        if self.name == "quadratic":
            eigenvalues = np.linalg.eigvalsh(self.hessians(best))
            mu, smooth = eigenvalues.min(), eigenvalues.max()
        else:  # p(1-p) ≤ 1/4, and both columns see it: ½ λ_max(XᵀX/n) + λ
            second = np.einsum("kia,kib->kab", self.x, self.x) / self.x.shape[1]
            mu, smooth = self.l2, 0.5 * np.linalg.eigvalsh(second).max() + self.l2
        own = [self.minimum([k]) for k in range(len(self.x))]
        lowest = [self.values(w)[k] for k, w in enumerate(own)]
        delta = self.x @ best
        delta = (delta if self.name == "quadratic" else _softmax(delta)) - self.y
        each = self.x[..., :, None] * delta[..., None, :]
        noise = ((each - each.mean(1, keepdims=True)) ** 2).sum((2, 3)).mean() / BATCH
        return {
            "mu": float(mu),
            "L": float(smooth),
            "kappa": float(smooth / mu),
            "F_star": float(self.values(best).mean()),
            "Gamma": float(self.values(best).mean() - np.mean(lowest)),
            "mean_squared_distance_of_client_optima": float(np.mean([((w - best) ** 2).sum() for w in own])),
            "batch_gradient_variance": float(noise),
            "client_gradient_variance": float((self.gradients(best) ** 2).sum((1, 2)).mean()),
        }

    def excess(self, w: np.ndarray) -> np.ndarray:
        """F(w) − F* for f64[T, d, C]; of the quadratic without cancellation. -> f64[T]."""
        best = self.minimum()
        if self.name == "quadratic":
            gap = (w - best).reshape(len(w), -1)
            return 0.5 * np.einsum("ta,ab,tb->t", gap, self.hessians(best).mean(0), gap)
        return np.array([self.values(one).mean() for one in w]) - self.values(best).mean()


def quadratic(seed: int = 0) -> Problem:
    """Least squares; clients differ in A_k (scale and direction of their features) and in their optima."""
    rng = np.random.default_rng(seed)
    scale = rng.uniform(0.5, 0.9, (CLIENTS, 1, FEATURES))
    x = scale * rng.standard_normal((CLIENTS, SAMPLES, FEATURES))
    w = rng.standard_normal((FEATURES, OUTPUTS)) + 0.5 * rng.standard_normal((CLIENTS, FEATURES, OUTPUTS))
    x = _on_grid(x, 64)
    y = x @ w + 0.5 * rng.standard_normal((CLIENTS, SAMPLES, OUTPUTS))
    return Problem("quadratic", x, _on_grid(y, 16))


def logistic(seed: int = 0) -> Problem:
    """Two classes; clients differ in where their features lie and in the rule that labels them."""
    rng = np.random.default_rng(seed)
    centre = 0.4 * rng.standard_normal((CLIENTS, 1, FEATURES))
    x = _on_grid(centre + 0.6 * rng.standard_normal((CLIENTS, SAMPLES, FEATURES)), 64)
    w = rng.standard_normal((FEATURES, OUTPUTS)) + rng.standard_normal((CLIENTS, FEATURES, OUTPUTS))
    labels = (2 * x @ w + rng.gumbel(size=(CLIENTS, SAMPLES, OUTPUTS))).argmax(2)
    return Problem("logistic", x, np.eye(OUTPUTS)[labels], L2)


PROBLEMS = {"quadratic": quadratic, "logistic": logistic}


def _softmax(out: np.ndarray) -> np.ndarray:
    shifted = np.exp(out - out.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def _on_grid(values: np.ndarray, parts: int) -> np.ndarray:
    """The nearest number (p − 128) / parts with an integer p in 0 … 255."""
    return (np.clip(np.rint(values * parts), -128, 127)) / parts


# --- the same problems, for the engine ----------------------------------------------------------------------


class Blocks(nn.Module):
    """x w without a bias; w is cut by rows into `BLOCKS` tensors, so that there is something to recombine."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        parts = jnp.split(x[:, 0, 0, :FEATURES], BLOCKS, axis=1)
        shape = (FEATURES // BLOCKS, OUTPUTS)
        kernels = [self.param(f"w{b}", nn.initializers.zeros, shape) for b in range(BLOCKS)]
        return jnp.concatenate(parts, axis=1) @ jnp.concatenate(kernels)


def whole(variables: Any) -> np.ndarray:
    """The model as one matrix w, f64[…, d, C]."""
    params = variables["params"]
    return np.concatenate([np.asarray(params[f"w{b}"], np.float64) for b in range(BLOCKS)], axis=-2)


def half_squared_error(apply, variables, batch: Batch, extra):
    """½ ‖x w − y‖², where y is the last channels of the image."""
    del extra
    out, variables = apply(variables, batch)
    y = batch["image"][:, 0, 0, FEATURES:]
    return masked_mean(0.5 * ((out - y) ** 2).sum(1), batch.mask), variables


def world(problem: Problem) -> dict[str, Any]:
    """Data set, partition and model, as `Simulation` takes them.

    An image is one sample, u8[1, 1, channels]. Channels are normalised each with its own mean and deviation,
    both such that the compiled step's float32 arithmetic is exact: (p − 128) / 64, and / 16 for targets.
    """
    quadratic = problem.name == "quadratic"
    channels, parts = [problem.x], [64.0] * FEATURES
    if quadratic:
        channels, parts = [problem.x, problem.y], parts + [16.0] * OUTPUTS
    pixels = np.concatenate(channels, axis=2) * parts + 128
    images = pixels.astype(np.uint8).reshape(-1, 1, 1, len(parts))
    # The quadratic reads its targets from the images; its labels say nothing, and leave no class empty.
    labels = np.arange(len(images)) % OUTPUTS if quadratic else problem.y.argmax(2).reshape(-1)
    scaling = Preprocessing((128 / 255,) * len(parts), tuple(p / 255 for p in parts))
    return {
        "dataset": Dataset(problem.name, images, labels, images[:1], labels[:1], OUTPUTS, scaling),
        "partition": Partition(tuple(np.split(np.arange(len(images)), CLIENTS)), recipe={"kind": "own"}),
        "model": from_flax(Blocks(), images.shape[1:], OUTPUTS, name="linear"),
    }


@dataclasses.dataclass(frozen=True)
class Watched:
    """An algorithm, unchanged, that also records D and the mean before and after its merge.

    Attributes:
      inner: the algorithm.
      loss: of the clients; None leaves the engine's cross-entropy.
    """

    inner: AlgorithmConfig
    loss: Callable[..., Any] | None = None

    def build(self, context: Context) -> Algorithm:
        record = self.inner.build(context)
        slots = jnp.arange(context.cohort_size)

        def merge(state, cohort, starts, results, key):
            new, metrics = record.merge(state, cohort, starts, results, key)
            trained, held = results.models, record.client_models(new, slots, cohort.ids)
            moved = [
                jnp.abs(a.mean(0) - b.mean(0)).max()
                for a, b in zip(jax.tree.leaves(trained), jax.tree.leaves(held), strict=True)
            ]
            measured = {
                "dispersion": dispersion(trained),
                "dispersion_after": dispersion(held),
                "mean_moved": jnp.stack(moved).max(),
            }
            return new, {**metrics, **measured}

        local = record.local
        if self.loss is not None:
            local = dataclasses.replace(local, gradient=gradients.of_loss(self.loss))
        return dataclasses.replace(record, merge=merge, local=local, needs_models=True)


def dispersion(models: Any) -> jax.Array:
    """D = Σ_k ‖w_k − mean‖² over leaves [K, …]. -> f32[]."""
    return jnp.stack([((w - w.mean(0)[None]) ** 2).sum() for w in jax.tree.leaves(models)]).sum()


def step_size(constants: dict[str, float], local_steps: int) -> tuple[float, float]:
    """(lr, decay) such that round r, t = local_steps · r, has 2 / (μ (γ + t)) with γ = max(8κ, E)."""
    gamma = max(8 * constants["kappa"], local_steps)
    return 2 / (constants["mu"] * gamma), local_steps / gamma


class Case(NamedTuple):
    """One line of the table."""

    problem: str
    work: str
    cohort: int
    method: str


CASES = [Case(*values) for values in itertools.product(("quadratic", "logistic"), WORK, COHORTS, METHODS)]


def set_up(problem: Problem, case: Case, rounds: int, seed: int = 0, **local: Any) -> Setup:
    """The engine's view of a case; `local` replaces fields of its LocalConfig."""
    work = WORK[case.work]
    lr, decay = step_size(problem.constants(), work.get("steps") or work["epochs"] * (SAMPLES // BATCH))
    settings = {"batch_size": BATCH, "lr": lr, "weight_decay": problem.l2, **work}
    settings |= {"schedule": "inverse", "decay": decay, **local}
    config = RunConfig(
        seed=seed,
        rounds=rounds,
        algorithm=METHODS[case.method],
        local=LocalConfig(**settings),
        cohort=CohortConfig(size=case.cohort),
        evaluation=EvaluationConfig(every=0),
        execution=ExecutionConfig(devices=1, wave=case.cohort),
        output=OutputConfig(progress=False),
    )
    loss = half_squared_error if problem.name == "quadratic" else None
    return prepare(config, algorithm=Watched(METHODS[case.method], loss), **world(problem))


def trajectory(run: Simulation) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Runs to the end. -> (mean iterate after each round f64[T, d, C], metric -> f64[T])."""
    means, metrics = [], []
    while run.round < run.setup.config.rounds:
        rows = run.step()
        means.append(whole(jax.device_get(run.variables)))
        metrics.append({row.metric: row.value for row in rows()})
    return np.stack(means), {name: np.array([row[name] for row in metrics]) for name in metrics[0]}


# --- measurement --------------------------------------------------------------------------------------------

QUANTITIES = ("excess", "distance", "dispersion", "lr")


def measure(case: Case, rounds: int, seeds: int) -> dict[str, Any]:
    """Runs a case with every seed.

    Returns:
      case; rounds f64[B] and excess, distance, dispersion, lr f64[seeds, B], all means over bins of rounds
      that are even in log T; end_excess, end_dispersion f64[seeds], means over the last half of the rounds;
      dispersion_changed, the largest relative change of D by a merge; mean_moved, the largest change of any
      entry of the mean model by it; seconds.
    """
    started = time.perf_counter()
    problem = PROBLEMS[case.problem]()
    best, edges = problem.minimum(), bin_edges(rounds)
    out: dict[str, Any] = {name: [] for name in (*QUANTITIES, "end_excess", "end_dispersion")}
    changed, moved, program, run = 0.0, 0.0, None, None
    for seed in range(seeds):
        run = Simulation(set_up(problem, case, rounds, seed))
        run.program = program = program or run.program  # the seed is an argument: nothing compiles again
        means, metrics = trajectory(run)
        series = {
            "excess": problem.excess(means),
            "distance": ((means - best) ** 2).sum((1, 2)),
            "dispersion": metrics["dispersion"],
            "lr": metrics["lr"],
        }
        for name, values in series.items():
            out[name].append(np.add.reduceat(values, edges[:-1]) / np.diff(edges))
        for name in ("excess", "dispersion"):
            out[f"end_{name}"].append(series[name][rounds // 2 :].mean())
        changed = max(changed, np.abs(metrics["dispersion_after"] / metrics["dispersion"] - 1).max())
        moved = max(moved, metrics["mean_moved"].max())
    assert run is not None
    centres = np.sqrt((edges[:-1] + 1) * edges[1:])
    return {name: np.array(values) for name, values in out.items()} | {
        "case": case,
        "rounds": centres,
        "config": to_dict(run.setup.config),
        "dispersion_changed": float(changed),
        "mean_moved": float(moved),
        "seconds": time.perf_counter() - started,
    }


def bin_edges(rounds: int, per_decade: int = 12) -> np.ndarray:
    """Bin b holds the rounds with index edges[b] … edges[b + 1] − 1."""
    grid = np.geomspace(1, rounds, 1 + int(per_decade * np.log10(rounds)))
    return np.unique(np.concatenate([[0], np.rint(grid).astype(np.int64)]))


def slopes(result: dict[str, Any], name: str) -> np.ndarray:
    """Slope of log quantity against log T over the last decade of rounds, one a seed. -> f64[seeds]."""
    late = result["rounds"] >= result["rounds"][-1] / 10
    return np.polyfit(np.log(result["rounds"][late]), np.log(result[name][:, late]).T, 1)[0]


def interval(values: np.ndarray) -> tuple[float, float]:
    """Mean, and the half width of its 95 % interval by Student's t; NaN for a single value."""
    if len(values) < 2:
        return float(values.mean()), float("nan")
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean()), float(half)


def summary(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line for each case: slopes, ends, F − F* over FedAvg's with the same seeds, the lemma, the cost."""
    fedavg = {r["case"][:3]: r for r in results if r["case"].method == "FedAvg"}
    lines = []
    for r in results:
        line: dict[str, Any] = dict(r["case"]._asdict())
        for name in QUANTITIES:
            line[f"slope_{name}"], line[f"slope_{name}_pm"] = interval(slopes(r, name))
        line["end_excess"], line["end_dispersion"] = r["end_excess"].mean(), r["end_dispersion"].mean()
        logs, half = interval(np.log(r["end_excess"] / fedavg[r["case"][:3]]["end_excess"]))
        line["ratio"], line["ratio_low"], line["ratio_high"] = np.exp([logs, logs - half, logs + half])
        recombines = r["case"].method != "FedAvg"
        line["dispersion_changed"] = r["dispersion_changed"] if recombines else None
        line["mean_moved"] = r["mean_moved"]
        line["seconds"] = round(r["seconds"], 1)
        lines.append(line)
    return lines


# --- what is written ----------------------------------------------------------------------------------------


def table(lines: Sequence[dict[str, Any]]) -> str:
    """As Markdown."""
    heads = (
        "problem", "local work", "clients", "method", "slope of F − F*", "of ‖mean − w*‖²", "of D",
        "F − F*, last half", "over FedAvg's", "D, last half",
    )  # fmt: skip
    out = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for line in lines:
        cells = [line["problem"], line["work"], f"{line['cohort']} of {CLIENTS}", line["method"]]
        for name in ("excess", "distance", "dispersion"):
            cells.append(f"{line[f'slope_{name}']:.2f} ± {line[f'slope_{name}_pm']:.2f}")
        cells.append(f"{line['end_excess']:.2e}")
        same = line["method"] == "FedAvg"
        cells.append(
            "1" if same else f"{line['ratio']:.3f} ({line['ratio_low']:.3f} to {line['ratio_high']:.3f})"
        )
        cells.append(f"{line['end_dispersion']:.2e}")
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out) + "\n"


def draw(results: Sequence[dict[str, Any]]) -> Any:
    """F − F* and D against T: a row for each problem and quantity, a column for each local work."""
    rows = list(itertools.product(("quadratic", "logistic"), ("excess", "dispersion")))
    figure, axes = plots.new_figure(len(WORK), len(rows), width=3.2, height=2.2)
    dashes, labels = dict(zip(COHORTS, ("-", "--"), strict=True)), {"excess": "F − F*", "dispersion": "D"}
    for (row, (problem, name)), (column, work) in itertools.product(enumerate(rows), enumerate(WORK)):
        axis = axes[row, column]
        for r in results:
            if (r["case"].problem, r["case"].work) != (problem, work):
                continue
            method = r["case"].method
            axis.loglog(
                r["rounds"],
                np.exp(np.log(r[name]).mean(0)),
                dashes[r["case"].cohort],
                color=plots.COLOURS[list(METHODS).index(method)],
                lw=2 if method != "no recombination" else 0.6,
                label=f"{method}, {r['case'].cohort} of {CLIENTS}",
            )
        last = results[0]["rounds"][-1]
        along = np.array([last / 10, last])
        low, high = axis.get_ylim()
        for power in (1, 2):
            axis.plot(along, high / 2 * (along / along[0]) ** -power, color="#999999", lw=0.8)
            axis.text(last, high / 2 * 10.0**-power, f" 1/T{'²' if power == 2 else ''}", fontsize=7)
        axis.set_ylim(low, high)
        plots.dress(axis, f"{problem}: {labels[name]}", along="rounds T")
        if row == 0:
            axis.set_title(f"{work} a round", fontsize=9)
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(),
        loc="outside upper center",
        ncols=3,
        fontsize=8,
        frameon=False,
    )
    return figure


def write(out: Path, results: Sequence[dict[str, Any]], rounds: int, seeds: int, seconds: float) -> None:
    """Everything that a reader needs, in one folder."""
    out.mkdir(parents=True, exist_ok=True)
    columns: dict[str, list[Any]] = {name: [] for name in (*Case._fields, "seed", "round", *QUANTITIES)}
    for r in results:
        for seed, place in itertools.product(range(seeds), range(len(r["rounds"]))):
            values = (*r["case"], seed, r["rounds"][place], *(r[name][seed, place] for name in QUANTITIES))
            for name, value in zip(columns, values, strict=True):
                columns[name].append(value)
    arrays = {n: np.asarray(v, np.float32) if n in QUANTITIES else v for n, v in columns.items()}
    pq.write_table(pa.table(arrays), out / "metrics.parquet", compression="zstd")
    lines = summary(results)
    with open(out / "slopes.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    (out / "table.md").write_text(table(lines))
    figure = draw(results)
    for suffix in ("png", "pdf"):
        plots.save(figure, out / f"rates.{suffix}")
    parts = ("algorithm", "local", "cohort", "execution")
    varied = {", ".join(map(str, r["case"])): {part: r["config"][part] for part in parts} for r in results}
    (out / "config.yaml").write_text(yaml.safe_dump(varied, sort_keys=False))
    record = {
        "command": f"python experiments/theory/rates.py --rounds {rounds} --seeds {seeds}",
        "rounds": rounds,
        "seeds": list(range(seeds)),
        "seconds": round(seconds, 1),
        "runs": len(results) * seeds,
        "problems": {name: make().constants() for name, make in PROBLEMS.items()},
        "versions": provenance.describe_versions(),
        **provenance.hardware(),
    }
    (out / "provenance.json").write_text(json.dumps(record, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--rounds", type=int, default=3000)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2, help="processes side by side")
    chosen = parser.parse_args(arguments)
    started = time.perf_counter()
    count = len(CASES)
    with ProcessPoolExecutor(chosen.workers, multiprocessing.get_context("spawn")) as pool:
        results = []
        for r in pool.map(measure, CASES, [chosen.rounds] * count, [chosen.seeds] * count):
            results.append(r)
            print(
                f"{len(results):2d}/{count} {', '.join(map(str, r['case']))}: {r['seconds']:.0f} s",
                flush=True,
            )
    write(chosen.out, results, chosen.rounds, chosen.seeds, time.perf_counter() - started)
    print((chosen.out / "table.md").read_text())


if __name__ == "__main__":
    main()
