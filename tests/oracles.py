"""Short NumPy float64 oracles that anyone can check by eye, and the small worlds in which they are asked.

Nothing of `fedjax_sim` takes part in an oracle except `training.batch_order`, which says in which order a
client walks through its samples.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from fedjax_sim import models
from fedjax_sim.algorithms import FedAvg
from fedjax_sim.config import (
    CohortConfig,
    EvaluationConfig,
    ExecutionConfig,
    LocalConfig,
    OutputConfig,
    RunConfig,
)
from fedjax_sim.core.algorithm import Context
from fedjax_sim.core.model import Model
from fedjax_sim.core.task import Task
from fedjax_sim.data import Dataset, Partition, Preprocessing
from fedjax_sim.engine.clients import batch_order
from fedjax_sim.engine.setup import Setup
from fedjax_sim.runs import diagnostics
from fedjax_sim.runs.assemble import prepare
from fedjax_sim.runs.federation import Simulation
from fedjax_sim.runs.start import with_start
from fedjax_sim.tasks import classification

Tree = dict[str, Any]
"""Nested dicts of arrays; here always {"fc1": {"kernel", "bias"}, …}."""


# --- trees --------------------------------------------------------------------------------------------


def map_trees(function, *trees):
    """`function` leaf by leaf over nested dicts."""
    if isinstance(trees[0], dict):
        return {name: map_trees(function, *(tree[name] for tree in trees)) for name in trees[0]}
    return function(*trees)


def leaves(tree) -> list[np.ndarray]:
    """The leaves of nested dicts, in the order of the dicts."""
    if isinstance(tree, dict):
        return [leaf for inner in tree.values() for leaf in leaves(inner)]
    return [np.asarray(tree)]


def doubled(tree) -> Any:
    """A device tree as nested dicts of float64."""
    return map_trees(lambda leaf: np.asarray(leaf, np.float64), jax.device_get(tree))


def weighted_mean(trees: list, weights) -> Any:
    """Σ w_k tree_k / Σ w_k."""
    shares = np.asarray(weights, np.float64) / np.sum(weights)
    return map_trees(lambda *parts: sum(s * part for s, part in zip(shares, parts, strict=True)), *trees)


# --- a multi-layer perceptron -------------------------------------------------------------------------


def normalised(images: np.ndarray, mean: float = 0.5, std: float = 0.5) -> np.ndarray:
    """u8[n, H, W, C] -> f64[n, H·W·C]."""
    return ((images / 255.0 - mean) / std).reshape(len(images), -1)


def mlp(params: Tree, x: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Logits and the input of each layer."""
    inputs = []
    for depth in range(1, len(params) + 1):
        inputs.append(x)
        x = x @ params[f"fc{depth}"]["kernel"] + params[f"fc{depth}"]["bias"]
        if depth < len(params):
            x = np.maximum(x, 0)
    return x, inputs


def cross_entropies(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """−log softmax(logits)[label], f64[n]."""
    shifted = logits - logits.max(1, keepdims=True)
    return np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(labels)), labels]


def mlp_gradient(
    params: Tree, x: np.ndarray, labels: np.ndarray, offset: np.ndarray | float = 0.0
) -> tuple[float, Tree]:
    """Mean cross-entropy of a batch and its gradient, by hand, with constants added to the logits."""
    logits, inputs = mlp(params, x)
    logits = logits + offset
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    delta = shifted / shifted.sum(1, keepdims=True)
    delta[np.arange(len(labels)), labels] -= 1
    delta /= len(labels)
    gradient = {}
    for depth in range(len(params), 0, -1):
        gradient[f"fc{depth}"] = {"kernel": inputs[depth - 1].T @ delta, "bias": delta.sum(0)}
        delta = (delta @ params[f"fc{depth}"]["kernel"].T) * (inputs[depth - 1] > 0)
    return float(cross_entropies(logits, labels).mean()), gradient


# --- local training and rounds --------------------------------------------------------------------------


def client_batches(seed: int, round_index: int, client: int, count: int, local: LocalConfig):
    """Positions of each step's samples in the client's own list, as the run walks through them."""
    size, epoch, steps = local.batch_size, 0, 0
    while count and (epoch < local.epochs if local.epochs else steps < local.steps):
        order = batch_order(seed, round_index, client, epoch, count)
        for start in range(0, count, size):
            if local.steps is None or steps < local.steps:
                yield order[start : start + size]
                steps += 1
        epoch += 1


def local_sgd(params: Tree, x, labels, batches, local: LocalConfig, lr: float, buffer: Tree | None = None):
    """Clip, L2, momentum, step: PyTorch's SGD. -> (params, momentum buffer, mean loss over samples seen)."""
    buffer = map_trees(np.zeros_like, params) if buffer is None else buffer
    total, seen = 0.0, 0
    for chosen in batches:
        loss, gradient = mlp_gradient(params, x[chosen], labels[chosen])
        total, seen = total + loss * len(chosen), seen + len(chosen)
        if local.clip_norm is not None:
            norm = np.sqrt(sum((leaf**2).sum() for leaf in leaves(gradient)))
            shrink = min(1.0, local.clip_norm / norm)
            gradient = map_trees(lambda g, s=shrink: g * s, gradient)
        gradient = map_trees(lambda g, p: g + local.weight_decay * p, gradient, params)
        buffer = map_trees(lambda b, g: local.momentum * b + g, buffer, gradient)
        step = map_trees(lambda g, b: g + local.momentum * b, gradient, buffer) if local.nesterov else buffer
        params = map_trees(lambda p, s: p - lr * s, params, step)
    return params, buffer, total / max(seen, 1)


def train_cohort(starts, simulation, round_index: int, buffers: dict[int, Tree] | None = None):
    """Every client of a round's cohort in turn. -> (ids, trained models, mean losses).

    Args:
      starts: one model a slot.
      simulation: says who takes part and what a client does.
      round_index: from 0.
      buffers: client -> momentum buffer kept from its last round; changed in place. None: none is kept.
    """
    setup = simulation.setup
    local, ids = setup.config.local, simulation.inputs(round_index)[0].cohort.ids.tolist()
    lr = local.lr_at(round_index, setup.config.rounds)
    trained, losses = [], []
    for client, start in zip(ids, starts, strict=True):
        own = setup.partition.train[client]
        x, labels = normalised(setup.dataset.train_images[own]), setup.dataset.train_labels[own]
        batches = client_batches(setup.config.seed, round_index, client, len(own), local)
        kept = None if buffers is None else buffers.get(client)
        model, buffer, loss = local_sgd(start, x, labels, batches, local, lr, kept)
        if buffers is not None:
            buffers[client] = buffer
        trained.append(model)
        losses.append(loss)
    return ids, trained, losses


def fedavg_round(params: Tree, simulation, round_index: int, weights: str = "samples", buffers=None):
    """One round of federated averaging. -> (mean model, cohort's losses)."""
    starts = [params] * simulation.setup.cohort_size
    ids, trained, losses = train_cohort(starts, simulation, round_index, buffers)
    sizes = [len(simulation.setup.partition.train[c]) if weights == "samples" else 1 for c in ids]
    return weighted_mean(trained, sizes), losses


# --- diagnostics ----------------------------------------------------------------------------------------


def dispersion(stack: list[np.ndarray]) -> float:
    """Σ_k ‖w_k − w̄‖² over stacked leaves [K, …]."""
    return sum(((leaf - leaf.mean(0)) ** 2).sum() for leaf in map(lambda x: np.asarray(x, np.float64), stack))


def mean_pairwise_cosine(stack: list[np.ndarray]) -> float:
    """Mean over pairs i < j of the cosine between slots i and j, the leaves [K, …] as one vector."""
    flat = np.concatenate([np.asarray(leaf, np.float64).reshape(len(leaf), -1) for leaf in stack], 1)
    count = len(flat)
    cosines = [
        flat[i] @ flat[j] / (np.linalg.norm(flat[i]) * np.linalg.norm(flat[j]))
        for i in range(count)
        for j in range(i + 1, count)
    ]
    return float(np.mean(cosines))


# --- small worlds ---------------------------------------------------------------------------------------


def world(sizes, shape=(3, 3, 1), classes: int = 3, tests: int = 23, seed: int = 0, **preprocessing):
    """A made-up data set and a partition of it into clients of `sizes`. -> (Dataset, Partition)."""
    rng = np.random.default_rng(seed)
    count = int(np.sum(sizes))
    # A class shows in the mean, so that training has something to find; 255 is left free as a marker.
    labels, test_labels = rng.integers(0, classes, count), rng.integers(0, classes, tests)
    draw = lambda y: (rng.integers(0, 160, (len(y), *shape)) + 40 * y[:, None, None, None]).clip(0, 250)  # noqa: E731
    dataset = Dataset(
        "made-up",
        draw(labels).astype(np.uint8),
        labels.astype(np.int32),
        draw(test_labels).astype(np.uint8),
        test_labels.astype(np.int32),
        classes,
        Preprocessing(**preprocessing),
    )
    return dataset, Partition(tuple(np.split(rng.permutation(count), np.cumsum(sizes)[:-1])))


def task_of(model: Model, **preprocessing: Any) -> Task:
    """Classification of what a model takes, by its outputs, with `Preprocessing` or its settings."""
    return classification(model.input_shape, model.outputs, Preprocessing(**preprocessing))


def context(model: Model, num_clients: int, cohort_size: int, rounds: int, **local: Any) -> Context:
    """An algorithm's context, of classification; `local`: settings of local training."""
    return Context(model, task_of(model), num_clients, cohort_size, rounds, LocalConfig(**local))


def examples(images, labels) -> dict[str, Any]:
    """Images and their classes as the task has them."""
    return {"image": images, "label": labels}


def configured(setup: Setup, config: RunConfig) -> Setup:
    """The same world under another configuration of what is measured."""
    setup = dataclasses.replace(setup, config=config)
    return dataclasses.replace(setup, **diagnostics.of(setup))


def prepared(
    sizes=(),
    *,
    algorithm: Any = None,
    model: Any = None,
    given: tuple[Dataset, Partition] | None = None,
    rounds: int = 2,
    cohort: int | CohortConfig | None = None,
    seed: int = 7,
    devices: int = 1,
    wave: int | None = 1,
    conv: str = "auto",
    donate: bool = True,
    debug: bool = False,
    evaluation: EvaluationConfig | None = None,
    **local: Any,
) -> Setup:
    """A run in a small world, by default FedAvg of all clients on an MLP with 4 hidden units; not begun."""
    dataset, partition = given or world(sizes)
    model = model or models.create("mlp", dataset.train_images.shape[1:], dataset.num_classes, hidden=(4,))
    settings = {"epochs": None if "steps" in local else 2, "batch_size": 10, "lr": 0.1, **local}
    config = RunConfig(
        seed=seed,
        rounds=rounds,
        algorithm=algorithm or FedAvg(),
        local=LocalConfig(**settings),
        cohort=cohort
        if isinstance(cohort, CohortConfig)
        else CohortConfig(size=cohort or partition.num_clients),
        evaluation=evaluation or EvaluationConfig(every=0),
        execution=ExecutionConfig(devices=devices, wave=wave, conv=conv, donate=donate, debug=debug),
        output=OutputConfig(progress=False),
    )
    return with_start(prepare(config, dataset=dataset, partition=partition, model=model))


def simulate(sizes=(), **settings: Any) -> Simulation:
    """A Simulation of what is `prepared`, whose first state is there."""
    simulation = Simulation(prepared(sizes, **settings))
    _ = simulation.state
    return simulation


def rounds_compiled(simulation: Simulation) -> int:
    """How many programs of rounds a run has made: of one, measured or not, and of several."""
    return sum(made.num_compiled() for made in (simulation.program, simulation.fused) if made is not None)


def run(simulation: Simulation, rounds: int | None = None) -> list:
    """Advances to the end, or by `rounds`; all rows."""
    return [row for rows in simulation.advance(rounds) for row in rows]


def state_of(simulation: Simulation) -> Any:
    """The state on the host, with the rows alone that count."""
    cut = lambda leaf, like: leaf if leaf.shape == like.shape else leaf[: like.shape[0]]  # noqa: E731
    return jax.tree.map(cut, jax.device_get(simulation.state), simulation.shapes)


def value_of(rows: list, metric: str, round_number: int) -> float:
    """The one value of a metric in a round."""
    (found,) = [row.value for row in rows if row.metric == metric and row.round == round_number]
    return found


def assert_trees_close(got, wanted, rtol: float = 1e-5, atol: float = 1e-5) -> None:
    """Leaf by leaf."""
    got, wanted = doubled(got), doubled(wanted)
    assert _paths(got) == _paths(wanted)
    map_trees(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, wanted)


def assert_trees_equal(got, wanted) -> None:
    """Leaf by leaf, bit for bit."""
    got, wanted = jax.device_get(got), jax.device_get(wanted)
    assert _paths(got) == _paths(wanted)
    map_trees(np.testing.assert_array_equal, got, wanted)


def far_apart(tree, other) -> float:
    """Largest difference between two trees: shows that a test of equality could have failed."""
    return max(
        float(np.abs(a - b).max()) for a, b in zip(leaves(doubled(tree)), leaves(doubled(other)), strict=True)
    )


def sizes_of(simulation: Simulation) -> np.ndarray:
    """Training samples of each client."""
    return np.asarray(simulation.setup.partition.sizes())


def _paths(tree, above: tuple = ()) -> set:
    if isinstance(tree, dict):
        return {path for name, inner in tree.items() for path in _paths(inner, (*above, name))}
    return {above}
