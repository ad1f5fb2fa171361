"""LIPS: whole rounds against NumPy, what each client starts from, controls, layouts, mistakes."""

import dataclasses
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from flax import linen as nn
from flax import traverse_util

import fedjax_sim as fs
from fedjax_sim import config as config_lib
from fedjax_sim import models, runs
from fedjax_sim.algorithms import (
    CONFIGS,
    LIPS,
    FedAdam,
    FedAvg,
    FedBABU,
    FedBN,
    FedMR,
    FedPer,
    FedProx,
    FedRep,
    LayerInterpolation,
    Local,
)
from fedjax_sim.algorithms.lips import densities, eligible, kept_counts
from fedjax_sim.core.algorithm import Cohort, Results
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.rng import run_key
from fedjax_sim.engine import waves
from fedjax_sim.engine.round import Round
from fedjax_sim.models import norms, peel
from fedjax_sim.runs.federation import Simulation
from tests import oracles
from tests.algorithms import personal
from tests.algorithms.families import but_slow, one_of_each

EVEN = (8, 8, 8, 8)
KERNELS = ("params/fc1/kernel", "params/fc2/kernel")  # of 9 x 5 and 5 x 4


class Convolutional(nn.Module):
    """conv1 – batch norm – tanh – conv2 – tanh – conv3 (1×1) – tanh – fc, on 4×4 images of 3 classes.

    No unit dies, as under ReLU, so that no weight that was zeroed stays zero.
    """

    @nn.compact
    def __call__(self, x, *, train=False, mask=None):
        peel(self, "conv1", x)
        x = models.Conv(3, (3, 3), name="conv1")(x)
        x = nn.tanh(norms.BatchNorm(name="bn")(x, train=train, mask=mask))
        peel(self, "conv2", x)
        x = nn.tanh(models.Conv(4, (3, 3), name="conv2")(x))
        peel(self, "conv3", x)
        x = nn.tanh(models.Conv(5, (1, 1), name="conv3")(x)).mean((1, 2))
        peel(self, "fc", x)
        return nn.Dense(3, name="fc")(x)


def convolutional():
    return models.from_flax(Convolutional(), (4, 4, 1), 3, name="convolutional")


INNER = {"params/conv2/kernel": 108, "params/conv3/kernel": 20}


# --- what clients start from, as an observer sees it ----------------------------------------------------


@dataclasses.dataclass
class Seen:
    """One round: ids of the cohort, its models by path [K, …], the deployed model after it, its metrics."""

    ids: list[int]
    start: dict[str, np.ndarray]
    before: dict[str, np.ndarray]
    after: dict[str, np.ndarray]
    deployed: dict[str, np.ndarray]
    metrics: dict[str, float]
    state: Any


def by_name(tree) -> dict[str, np.ndarray]:
    flat: Any = traverse_util.flatten_dict(jax.device_get(tree))
    return {"/".join(path): leaf for path, leaf in flat.items()}


def watch(simulation, ids=None, seeds=(None,)):
    """Every round of a run, all clients watched; once for each seed. -> [[Seen, …], …].

    ids: whom slots 0, 1, … serve in every round; None: as drawn.
    """
    setup = simulation.setup
    function = Round(setup.algorithm, setup.trainer, simulation.mesh, in_order=False)
    program = jax.jit(lambda *args: function(*args))
    out = []
    for seed in seeds:
        state, rounds = simulation.state, []
        for index in range(setup.config.rounds):
            inputs, _ = simulation.inputs(index)
            if seed is not None:
                inputs = inputs.replace(key=run_key(seed))
            if ids is not None:
                counts = setup.counts[ids]
                inputs = inputs.replace(
                    cohort=Cohort(np.asarray(ids, np.int32), counts, np.int32(index)),  # type: ignore[arg-type]
                    plan=waves.make_plan(setup.steps[ids], setup.devices, setup.wave),
                )
            watched = np.arange(setup.cohort_size, dtype=np.int32)
            with jax.set_mesh(simulation.mesh):
                state, outputs = program(state, inputs, simulation.data, watched)
            assert np.asarray(outputs.included).all()
            view = jax.device_get(outputs.view)
            rounds.append(
                Seen(
                    np.asarray(inputs.cohort.ids).tolist(),
                    by_name(view.start),
                    by_name(view.before),
                    by_name(view.after),
                    by_name(setup.algorithm.deploy(state.algorithm)),
                    {name: float(value) for name, value in outputs.metrics.items()},
                    jax.device_get(state),
                )
            )
        out.append(rounds)
    return out


def zeros_of(leaf) -> list[int]:
    """Zero entries of each client's. [K, …] -> K counts."""
    return (leaf == 0).reshape(len(leaf), -1).sum(1).tolist()


# --- by hand, in NumPy ----------------------------------------------------------------------------------


def head_of(score: np.ndarray, count: int) -> np.ndarray:
    """A mask of the `count` largest; of equal ones those that come first."""
    mask = np.zeros(score.size, bool)
    mask[np.argsort(-score.reshape(-1), kind="stable")[:count]] = True
    return mask.reshape(score.shape)


def numpy_rounds(simulation, config):
    """FedAvg inside LIPS in float64, on an MLP. -> a list of (ids, starts, trained, mean), one a round."""
    setup = simulation.setup
    local, count = setup.config.local, setup.config.rounds
    paths = [tuple(name.split("/")[1:]) for name in config.leaves]
    mean, last, out = oracles.doubled(simulation.variables["params"]), {}, []
    for index in range(count):
        ids = simulation.inputs(index)[0].cohort.ids.tolist()
        previous = index - 1
        density = config.density + (1 - config.density) * previous / count
        starts, trained = [], []
        for client in ids:
            start = oracles.map_trees(np.copy, mean)
            if previous >= 0 and previous % config.period == 0:
                for layer, leaf in paths:
                    w = mean[layer][leaf]
                    gradients = [g[layer][leaf] for c, g in last.items() if c == client]
                    if config.masks == "shared":
                        gradients = [np.mean([np.abs(g[layer][leaf]) for g in last.values()], axis=0)]
                    score = np.abs(w * gradients[0]) if gradients else np.abs(w)
                    start[layer][leaf] = w * head_of(score, int(np.floor(density * w.size)))
            starts.append(start)
        for client, start in zip(ids, starts, strict=True):
            own = setup.partition.train[client]
            x, y = oracles.normalised(setup.dataset.train_images[own]), setup.dataset.train_labels[own]
            batches = list(oracles.client_batches(setup.config.seed, index, client, len(own), local))
            near, buffer, _ = oracles.local_sgd(start, x, y, batches[:-1], local, local.lr)
            _, last[client] = oracles.mlp_gradient(near, x[batches[-1]], y[batches[-1]])
            trained.append(oracles.local_sgd(near, x, y, batches[-1:], local, local.lr, buffer)[0])
        mean = oracles.weighted_mean(trained, oracles.sizes_of(simulation)[ids])
        out.append((ids, starts, trained, mean))
    return out


def assert_as_by_hand(seen, wanted):
    """Starts (which entries are zero, and the others), trained models and means."""
    for got, (ids, starts, trained, mean) in zip(seen, wanted, strict=True):
        assert got.ids == ids
        for k in range(len(ids)):
            for mine, theirs in ((got.start, starts[k]), (got.before, trained[k])):
                for path, leaf in by_name({"params": theirs}).items():
                    np.testing.assert_array_equal(mine[path][k] == 0, leaf == 0, err_msg=path)
                    np.testing.assert_allclose(mine[path][k], leaf, rtol=1e-5, atol=2e-6, err_msg=path)
        for path, leaf in by_name({"params": mean}).items():
            np.testing.assert_allclose(got.deployed[path], leaf, rtol=1e-5, atol=2e-6, err_msg=path)


# --- FedAvg inside, all clients: module fixture ---------------------------------------------------------

FULL = LIPS(period=2, leaves=KERNELS)
WHOLE_BATCHES: dict[str, Any] = {
    "sizes": (9, 7, 12, 5), "model": personal.deep(), "rounds": 4, "seed": 26,
    "batch_size": 12, "momentum": 0.9, "lr": 0.1,
}  # fmt: skip


@pytest.fixture(scope="module")
def averaged():
    """Four rounds of full-batch SGD with momentum; rounds 1 and 3 start sparse. -> (simulation, [Seen, …])"""
    simulation = oracles.simulate(algorithm=FULL, donate=False, **WHOLE_BATCHES)
    return simulation, watch(simulation)[0]


def test_rounds_equal_numpy(averaged):
    simulation, seen = averaged
    wanted = numpy_rounds(simulation, FULL)
    assert_as_by_hand(seen, wanted)
    # Clients have masks of their own; the mean alone would not show it.
    assert any(
        (wanted[1][1][0][layer]["kernel"] == 0).tolist() != (wanted[1][1][1][layer]["kernel"] == 0).tolist()
        for layer in ("fc1", "fc2")
    )


def test_the_first_round_and_its_mean_are_the_inner_algorithms(averaged):
    simulation, seen = averaged
    plain = oracles.simulate(**WHOLE_BATCHES)
    oracles.run(plain, 1)
    first, second = (by_name(run.variables) for run in (plain, simulation))
    assert first.keys() == seen[0].deployed.keys()
    for path, leaf in first.items():
        np.testing.assert_array_equal(seen[0].deployed[path], leaf)
        assert path.endswith("bias") or not np.array_equal(leaf, second[path])


def test_what_a_client_holds_after_a_round_is_what_it_starts_the_next_from(averaged):
    """In rounds after which all start sparse and in others; cohorts come in another order each round."""
    _, seen = averaged
    for earlier, later in pairwise(seen):
        order = [earlier.ids.index(client) for client in later.ids]
        for path, leaf in later.start.items():
            np.testing.assert_array_equal(earlier.after[path][order], leaf)
    assert seen[0].ids != seen[1].ids


def test_what_is_no_candidate_is_as_it_was_sent_and_dense_rounds_are_dense(averaged):
    _, seen = averaged
    for index, (earlier, later) in enumerate(pairwise(seen)):
        for path, leaf in later.start.items():
            sent = np.broadcast_to(earlier.deployed[path], leaf.shape)
            if path in KERNELS and index % 2 == 0:
                np.testing.assert_array_equal(leaf, np.where(leaf == 0, 0, sent))
            else:
                np.testing.assert_array_equal(leaf, sent)


def test_the_share_that_is_kept_is_recorded(averaged):
    """d = 0.5 and 0.75: of 45 and 20 entries 22 and 10 are kept, then 33 and 15."""
    _, seen = averaged
    assert [zeros_of(seen[1].start[path]) for path in KERNELS] == [[23] * 4, [10] * 4]
    for round_, kept in zip(seen, (65, 32, 65, 48), strict=True):
        nonzero = np.mean([(round_.start[path] != 0).sum() for path in KERNELS]) * 2 / 4
        assert round_.metrics["lips_density"] == pytest.approx(kept / 65)
        assert round_.metrics["lips_nonzero"] == pytest.approx(nonzero / 65)
        assert round_.metrics["lips_untrained"] == 0


# --- FedMR inside, a convolutional network: module fixture -----------------------------------------------


@pytest.fixture(scope="module")
def recombined():
    """Three rounds, the second and third sparse; slot k serves client k in each. -> [Seen, …]"""
    simulation = oracles.simulate(
        given=oracles.world(EVEN, (4, 4, 1)), algorithm=LIPS(FedMR(similarity=False), period=1, density=0.4),
        model=convolutional(), rounds=3, epochs=1, batch_size=4, momentum=0.5, donate=False,
    )  # fmt: skip
    return watch(simulation, ids=list(range(4)))[0]


def test_slots_of_fedmr_are_made_sparse_where_they_are_received(recombined):
    seen = recombined
    for index, (earlier, later) in enumerate(pairwise(seen)):
        slots = by_name(earlier.state.algorithm.inner.slots)
        for path, leaf in later.start.items():
            np.testing.assert_array_equal(earlier.after[path], leaf)
            if path in INNER:
                size = INNER[path]
                kept = int((0.4 + 0.6 * index / 3) * size)
                assert zeros_of(leaf) == [size - kept] * 4
                np.testing.assert_array_equal(leaf, np.where(leaf == 0, 0, slots[path]))
            else:
                np.testing.assert_array_equal(leaf, slots[path])
        # What the server keeps and deploys has nothing of it.
        assert not any((slots[path] == 0).any() for path in INNER)
    assert {path for path, leaf in seen[1].start.items() if (leaf == 0).sum() > 20} == set(INNER)


def test_slots_are_ranked_by_the_gradient_that_the_client_keeps(recombined):
    seen = recombined
    for earlier, later in pairwise(seen):
        slots = by_name(earlier.state.algorithm.inner.slots)
        gradients = earlier.state.clients["rule"].gradient
        for path in INNER:
            for k in range(4):
                mask = later.start[path][k] != 0
                np.testing.assert_array_equal(
                    mask, head_of(np.abs(slots[path][k] * gradients[path][k]), mask.sum())
                )
            assert np.abs(gradients[path]).max() > 1e-4


# --- part of the clients in a round ---------------------------------------------------------------------


def test_with_some_clients_a_round_each_ranks_by_its_last_gradient_or_by_size():
    """One local step a round: what was zeroed and has a gradient has grown again by its end."""
    config = LIPS(period=3, leaves=KERNELS)
    simulation = oracles.simulate(
        personal.SIZES, algorithm=config, model=personal.deep(), cohort=2, rounds=6, steps=1, lr=0.2, seed=17
    )
    seen = watch(simulation)[0]
    assert_as_by_hand(seen, numpy_rounds(simulation, config))
    grown = sum(((seen[1].start[path] == 0) & (seen[1].before[path] != 0)).sum() for path in KERNELS)
    assert grown > sum(sum(zeros_of(seen[1].start[path])) for path in KERNELS) / 2

    last: dict[int, int] = {}
    waited = 0
    for index, round_ in enumerate(seen):
        ids = simulation.inputs(index)[0].cohort.ids.tolist()
        untrained = np.mean([client not in last for client in ids]) if index % 3 == 1 else 0
        assert round_.metrics["lips_untrained"] == untrained
        waited += sum(last.get(client, index) < index - 1 for client in ids if index % 3 == 1)
        last.update(dict.fromkeys(ids, index))
    assert waited and any(round_.metrics["lips_untrained"] == 0.5 for round_ in seen)


# --- masks that all share -------------------------------------------------------------------------------


def test_a_shared_mask_is_made_of_the_mean_gradient():
    config = LIPS(period=2, masks="shared", leaves=KERNELS)
    simulation = oracles.simulate(algorithm=config, **WHOLE_BATCHES)
    assert jax.tree.leaves(simulation.state.clients["rule"].gradient) == []  # of nobody's own
    seen = watch(simulation)[0]
    assert_as_by_hand(seen, numpy_rounds(simulation, config))
    # Nobody falls back on anything of its own.
    assert all("lips_untrained" not in round_.metrics for round_ in seen)
    for path in KERNELS:
        np.testing.assert_array_equal(seen[1].start[path], np.stack([seen[1].start[path][0]] * 4))
    for earlier, later in pairwise(seen):
        order = [earlier.ids.index(client) for client in later.ids]
        for path in KERNELS:
            np.testing.assert_array_equal(earlier.after[path][order], later.start[path])


def test_random_masks_come_from_the_seed_and_differ_between_clients_and_rounds():
    simulation = oracles.simulate(
        EVEN, algorithm=LIPS(period=1, schedule="constant", score="random", leaves=KERNELS),
        model=personal.deep(), rounds=3, epochs=1, wave=2, donate=False,
    )  # fmt: skip
    one, again, other = watch(simulation, ids=[0, 1, 2, 3], seeds=(1, 1, 2))
    masks = lambda seen, index: seen[index].start[KERNELS[0]] != 0  # noqa: E731
    np.testing.assert_array_equal(masks(one, 1), masks(again, 1))
    distinct = [
        mask.tobytes() for run, index in ((one, 1), (one, 2), (other, 1)) for mask in masks(run, index)
    ]
    assert len(set(distinct)) == 12
    assert {mask.sum() for run in (one, other) for mask in masks(run, 2)} == {22}
    assert "lips_untrained" not in one[1].metrics
    for path in KERNELS:
        np.testing.assert_array_equal(one[0].after[path], one[1].start[path])


# --- the record, function by function -------------------------------------------------------------------

NET = convolutional()
CONTEXT = oracles.context(NET, num_clients=4, cohort_size=4, rounds=4, epochs=1)
KEY = run_key(5)


def draw(seed):
    """A model of the network's with normal leaves, none of them zero."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(NET.init, KEY)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), shapes)


def received(model, key=KEY, gradient=None, **settings):
    """What a client starts round 1 from, who ended round 0 with `gradient`. -> (start by name, its state)."""
    algorithm = LIPS(period=2, **settings).build(CONTEXT)
    rule: Any = algorithm.local
    cohort = Cohort(jnp.arange(4), jnp.full(4, 8), jnp.int32(0))
    state = algorithm.init(KEY, draw(0))
    client = rule.init_client(draw(0), None)
    sent = algorithm.dispatch(state, cohort, KEY).broadcast
    extra = rule.start_round(model, client, sent)
    given = gradient if rule.wants_last_gradient is not None else None
    client, _ = rule.finish_round(model, model, client, extra, jnp.int32(3), jnp.float32(0.1), given)
    sent = algorithm.dispatch(state, dataclasses.replace(cohort, round=jnp.int32(1)), KEY).broadcast
    start = rule.receive(model, client, sent, key)
    return by_name(start), client


def test_which_entries_each_score_keeps():
    model, gradient = draw(1), draw(2)["params"]
    weights, slopes = by_name(model), by_name({"params": gradient})
    scores = {
        "sensitivity": lambda name: np.abs(weights[name] * slopes[name]),
        "magnitude": lambda name: np.abs(weights[name]),
        "lowest": lambda name: -np.abs(weights[name]),
    }
    for score, of in scores.items():
        start, client = received(model, gradient=gradient, score=score, density=0.3)
        assert (client.gradient is None) == (score != "sensitivity")
        for name, leaf in weights.items():
            wanted = leaf * head_of(of(name), int(0.3 * leaf.size)) if name in INNER else leaf
            np.testing.assert_array_equal(start[name], wanted)


def test_refill_by_initial_values():
    model, gradient = draw(1), draw(2)["params"]
    weights, first = by_name(model), by_name(draw(0))
    sparse, _ = received(model, gradient=gradient, density=0.3)
    start, _ = received(model, gradient=gradient, refill="initial", density=0.3)
    for name, leaf in weights.items():
        wanted = np.where(sparse[name] == 0, first[name], leaf) if name in INNER else leaf
        np.testing.assert_array_equal(start[name], wanted)


def test_noise_is_as_long_as_what_zeroing_takes_away():
    model, gradient = draw(1), draw(2)["params"]
    weights = by_name(model)
    sparse, _ = received(model, gradient=gradient, density=0.3)
    starts = [received(model, key, gradient, refill="noise", density=0.3)[0] for key in (KEY, run_key(6))]
    for name, leaf in weights.items():
        changes = [start[name].astype(np.float64) - leaf for start in starts]
        removed = np.linalg.norm((sparse[name] - leaf).astype(np.float64))
        assert (removed > 0) == (name in INNER)
        for change in changes:
            assert np.linalg.norm(change) == pytest.approx(removed, rel=1e-5)
            assert name not in INNER or (change != 0).mean() > 0.99
        if name in INNER:
            cosine = (changes[0] * changes[1]).sum() / removed**2
            assert abs(cosine) < 0.6  # another client's, another noise


@pytest.mark.parametrize("store", ["bfloat16", "float16"])
def test_gradients_are_kept_as_the_store_says(store):
    """Of numbers below float16's least, 6e-8, nothing is left: all scores tie at zero, the first are kept."""
    model = draw(1)
    gradient = jax.tree.map(lambda leaf: leaf * 1e-9, draw(2)["params"])
    start, client = received(model, gradient=gradient, store=store, density=0.25)
    for name, size in INNER.items():
        kept = by_name({"params": gradient})[name].astype(jnp.dtype(store))
        np.testing.assert_array_equal(client.gradient[name], kept)
        assert client.gradient[name].dtype == store
        mask = start[name].reshape(-1) != 0
        if store == "float16":
            np.testing.assert_array_equal(mask, np.arange(size) < size // 4)
        else:
            wanted = head_of(np.abs(by_name(model)[name] * kept.astype(np.float32)), size // 4)
            np.testing.assert_array_equal(mask, wanted.reshape(-1))


def test_a_client_without_a_gradient_ranks_by_size_and_one_that_took_no_step_has_none():
    model = draw(1)
    algorithm = LIPS(period=2, density=0.3).build(CONTEXT)
    rule: Any = algorithm.local
    cohort = Cohort(jnp.arange(4), jnp.full(4, 8), jnp.int32(0))
    sent = algorithm.dispatch(algorithm.init(KEY, model), cohort, KEY).broadcast
    client = rule.init_client(model, None)
    extra = rule.start_round(model, client, sent)
    client, _ = rule.finish_round(
        model, model, client, extra, jnp.int32(0), jnp.float32(0.1), draw(2)["params"]
    )
    assert not client.trained and all(not leaf.any() for leaf in client.gradient.values())
    sent = algorithm.dispatch(
        algorithm.init(KEY, model), dataclasses.replace(cohort, round=jnp.int32(1)), KEY
    ).broadcast
    start, weights = by_name(rule.receive(model, client, sent, KEY)), by_name(model)
    for name, size in INNER.items():
        np.testing.assert_array_equal(start[name] != 0, head_of(np.abs(weights[name]), int(0.3 * size)))


def shared_round(algorithm, state, index, gradients, included):
    """Round `index` of four clients that end with these gradients, None: an update that was not finite."""
    cohort = Cohort(jnp.arange(4), jnp.full(4, 8), jnp.int32(index))
    starts = algorithm.dispatch(state, cohort, KEY)
    model, reports = algorithm.deploy(state), []
    for gradient in gradients:
        client = algorithm.local.init_client(model, None)
        extra = algorithm.local.start_round(model, client, starts.broadcast)
        given = (jnp.int32(1), jnp.float32(0.1), gradient)
        reports.append(algorithm.local.finish_round(model, model, client, extra, *given)[1])
    uploads = jax.tree.map(lambda *leaves: jnp.stack(leaves), *reports)
    results = Results(None, model, uploads, jnp.asarray(included), jnp.zeros(4))
    return algorithm.merge(state, cohort, starts, results, KEY)[0]


def test_a_shared_mask_knows_only_those_that_were_not_left_out():
    """By size until there is a gradient; then by the mean over those that count, the last that there was."""
    algorithm = LIPS(period=1, schedule="constant", masks="shared").build(CONTEXT)
    gradients = [draw(seed)["params"] for seed in (1, 2, 3, 4)]
    weights, slopes = by_name(draw(0)), [by_name({"params": g}) for g in gradients]
    state = algorithm.init(KEY, draw(0))
    shares = {name: np.ones_like(weights[name]) for name in INNER}
    for index, included in enumerate([[False] * 4, [True, True, False, True], [False] * 4]):
        state = shared_round(algorithm, state, index, gradients, included)
        if any(included):
            shares = {name: np.mean([np.abs(slopes[k][name]) for k in (0, 1, 3)], axis=0) for name in INNER}
        cohort = Cohort(jnp.arange(4), jnp.full(4, 8), jnp.int32(index + 1))
        masks = algorithm.dispatch(state, cohort, KEY).broadcast.masks
        for name, size in INNER.items():
            wanted = head_of(np.abs(weights[name]) * shares[name], size // 2)
            np.testing.assert_array_equal(masks[name], wanted, err_msg=f"{name} after round {index}")


# --- when, and how many ---------------------------------------------------------------------------------


def test_densities_of_the_papers_run():
    linear = densities(LIPS(), 300)
    assert len(linear) == 60
    np.testing.assert_allclose(
        linear[:2] + linear[-1:], [0.5, 0.5 + 0.5 / 60, 0.5 + 0.5 * 59 / 60], rtol=1e-14
    )
    np.testing.assert_allclose(np.diff(linear), 0.5 / 60, rtol=1e-10)
    assert densities(LIPS(density=0.3), 300)[-1] == pytest.approx(0.3 + 0.7 * 295 / 300)
    assert densities(LIPS(density=0.1, period=10), 300)[-1] == pytest.approx(0.97)


def test_densities_of_the_other_schedules():
    assert densities(LIPS(density=0.2, schedule="constant", period=4), 10) == [0.2] * 3
    cosine = densities(LIPS(density=0.2, schedule="cosine", period=3), 12)
    np.testing.assert_allclose(cosine, [0.2 + 0.4 * (1 - np.cos(np.pi * i / 12)) for i in (0, 3, 6, 9)])
    assert cosine[2] == pytest.approx(0.6)


def test_counts_are_rounded_down():
    config, sizes = LIPS(density=0.3, period=2), [7, 1, 1000, 2_359_296]
    wanted = [[np.floor(np.float64(d) * n) for n in sizes] for d in densities(config, 7)]
    np.testing.assert_array_equal(kept_counts(config, 7, sizes), wanted)
    np.testing.assert_array_equal(kept_counts(config, 7, sizes)[0], [2, 0, 300, 707_788])


# --- which tensors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size"),
    [("vgg11_bn", 3_907_584), ("resnet6", 303_104), ("resnet8", 1_220_608), ("resnet10", 4_890_624)],
)
def test_inner_convolutions_of_the_papers_networks(name, size):
    """All convolutions but the stem, 1×1 shortcuts among them: entries counted from the authors' code."""
    model = models.create(name, (32, 32, 3), 10)
    flat: Any = traverse_util.flatten_dict(jax.eval_shape(model.init, KEY))
    assert sum(flat[path].size for path in eligible(model)) == size


def test_inner_weight_layers_are_all_but_the_first_and_the_last():
    names = lambda model, *args: ["/".join(path) for path in eligible(model, *args)]  # noqa: E731
    assert names(personal.deep(), "inner") == ["params/fc2/kernel"]
    assert names(NET, "inner") == names(NET) == list(INNER)
    assert names(NET, "inner_convs", ["params/fc/kernel", "*/conv1/*"]) == [
        "params/conv1/kernel",
        "params/conv1/bias",
        "params/fc/kernel",
    ]
    vit = names(models.create("vit", (8, 8, 1), 10), "inner")
    assert len(vit) == 6 * 6 and not any("embed" in name or "head" in name for name in vit)


# --- controls: when it is nothing but the inner algorithm ---------------------------------------------------


@pytest.mark.parametrize("inner", [FedAvg(), FedMR()], ids=["fedavg", "fedmr"])
def test_kept_whole_or_never_due_it_is_the_inner_algorithm(inner):
    results = []
    for algorithm in (
        inner,
        LIPS(inner, density=1.0, period=1, layers="inner"),
        LIPS(inner, density=0.2, period=3, layers="inner"),
    ):
        simulation = oracles.simulate(
            EVEN, algorithm=algorithm, model=personal.deep(), rounds=3, epochs=1, cohort=3
        )
        results.append((oracles.run(simulation), simulation.variables))
    for rows, variables in results[1:]:
        assert rows == results[0][0]
        oracles.assert_trees_equal(variables, results[0][1])


# --- what is synchronised -------------------------------------------------------------------------------


def test_biases_and_normalisation_stay_at_home_if_only_weights_are_synchronised():
    simulation = oracles.simulate(
        EVEN, algorithm=LIPS(period=2, density=0.4, layers="inner", sync="weights_only"),
        model=personal.normed(), rounds=3, epochs=1, batch_size=4,
    )  # fmt: skip
    seen = watch(simulation)[0]
    kernels = {"params/fc1/kernel", "params/fc2/kernel", "params/fc3/kernel"}
    for index, (earlier, later) in enumerate(pairwise(seen)):
        order = [earlier.ids.index(client) for client in later.ids]
        for path, leaf in later.start.items():
            np.testing.assert_array_equal(earlier.after[path][order], leaf)
            if path not in kernels:
                np.testing.assert_array_equal(leaf, earlier.before[path][order])
            elif path == "params/fc2/kernel" and index == 0:
                assert zeros_of(leaf) == [25 - 10] * 4
            else:
                np.testing.assert_array_equal(leaf, np.broadcast_to(earlier.deployed[path], leaf.shape))
        for path in ("batch_stats/bn2/mean", "params/bn1/scale", "params/fc3/bias"):
            assert len({row.tobytes() for row in later.start[path]}) == 4


# --- other algorithms inside ----------------------------------------------------------------------------


PERSONALISED = {"fedbn": FedBN(), "fedper": FedPer(), "interpolation": LayerInterpolation(), "local": Local()}


@pytest.mark.parametrize("inner", but_slow(PERSONALISED, "fedper", "local"))
def test_around_personalised_algorithms(inner):
    simulation = oracles.simulate(
        EVEN,
        algorithm=LIPS(PERSONALISED[inner], period=2, layers="inner"),
        model=personal.normed(),
        epochs=1,
        rounds=3,
    )
    rows = oracles.run(simulation)
    assert [oracles.value_of(rows, "lips_nonzero", number) for number in (1, 2, 3)] == [
        1,
        pytest.approx(12 / 25),
        1,
    ]
    held = personal.rows_of(simulation.setup.algorithm, simulation.state.algorithm, range(4))
    for model in held:
        assert all(np.isfinite(leaf).all() and leaf.any() for leaf in by_name(model).values())
    assert oracles.far_apart(held[0], held[3]) > 1e-4


SETTINGS = {"fedrep": {"head_epochs": 1}, "partial": {"first": 1}, "fedgen": {"generator_steps": 2}}
SHOWN = ("fedrod", "fedindep", "feddyn", "clusamp", "fedcac")
"""By others: what LIPS asks is the same of all methods that keep state for clients, and of all averages."""
FURTHER = ("fednova", "fedexp", "fedmut", "fedopt", "fedavgm", "fedadam", "fedyogi")


@pytest.mark.parametrize(
    "name", one_of_each((name for name in CONFIGS if name not in (*FURTHER, "lips")), *PERSONALISED, *SHOWN)
)
def test_around_every_algorithm_what_is_zeroed_is_zero_and_the_rest_is_as_it_was(name):
    """One mask for all and next to no training: the server adds nothing of its own to what was zeroed."""
    inner = CONFIGS[name](**SETTINGS.get(name, {}))
    lips = LIPS(inner, density=0.4, period=1, masks="shared", score="magnitude", leaves=KERNELS[1:])
    model = personal.normed() if name == "fedbn" else personal.deep()
    simulation = oracles.simulate(EVEN, algorithm=lips, model=model, lr=1e-12, rounds=2)
    start = by_name(simulation.variables)
    rows = oracles.run(simulation)
    size = start[KERNELS[1]].size
    count = 2 * size // 5
    assert oracles.value_of(rows, "lips_nonzero", 2) == pytest.approx(count / size)
    for path, leaf in by_name(simulation.variables).items():
        if path == KERNELS[1]:
            kept = np.argsort(-np.abs(start[path]).ravel())[:count]
            expected = np.zeros(size, np.float32)
            expected[kept] = start[path].ravel()[kept]
            np.testing.assert_allclose(leaf.ravel(), expected, atol=1e-6)
        elif path.startswith("params"):
            np.testing.assert_allclose(leaf, start[path], atol=1e-6)


@pytest.mark.parametrize("name", FURTHER)
def test_a_server_that_goes_past_the_mean_is_refused(name):
    context = oracles.context(personal.deep(), num_clients=4, cohort_size=4, rounds=9, epochs=1)
    with pytest.raises(UserError, match="take what was zeroed for progress") as caught:
        LIPS(CONFIGS[name](), layers="inner").build(context)
    assert caught.value.field == "algorithm.inner"
    with pytest.raises(UserError, match="more than an average"):
        FedAdam(inner=LIPS(layers="inner")).build(context)


def test_not_over_itself_at_any_depth():
    with pytest.raises(UserError, match="sparse again"):
        LIPS(FedProx(LIPS()))


# --- layouts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inner", "masks", "layouts"),
    [
        pytest.param(FedAvg(), "shared", [(1, 1), (2, 1)], marks=pytest.mark.slow),
        (FedMR(similarity=False), "client", [(1, 1), (2, 3)]),
    ],
    ids=["fedavg", "fedmr"],
)
def test_layout_does_not_show(inner, masks, layouts):
    results = []
    for devices, wave in layouts:
        simulation = oracles.simulate(
            (1, 37, 10, 23, 20, 4, 31), algorithm=LIPS(inner, period=1, masks=masks, leaves=KERNELS[:1]),
            cohort=6, rounds=3, epochs=1, momentum=0.5, devices=devices, wave=wave,
        )  # fmt: skip
        rows = [row for row in oracles.run(simulation) if row.metric != "padding_waste"]
        results.append((rows, oracles.state_of(simulation)))
        if devices == 2 and isinstance(inner, FedMR):
            slots = simulation.state.algorithm.inner.slots
            assert all(leaf.addressable_shards[0].data.shape[0] == 3 for leaf in jax.tree.leaves(slots))
    for rows, state in results[1:]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), state, results[0][1]
        )
        for row, first in zip(rows, results[0][0], strict=True):
            assert row[:2] == first[:2] and row.value == pytest.approx(first.value, rel=1e-5)


# --- clients that are left out --------------------------------------------------------------------------


class Poisonable(nn.Module):
    """fc1 – ReLU – fc2, infinite for an image whose first pixel is 255."""

    @nn.compact
    def __call__(self, x, *, train=False, mask=None):
        poison = jnp.where(x[:, 0, 0, 0] > 0.999, jnp.inf, 0.0).astype(jnp.float32)
        x = nn.relu(nn.Dense(4, name="fc1")(x.reshape(x.shape[0], -1)))
        return nn.Dense(3, name="fc2")(x) * (1 + poison[:, None])


def test_a_client_that_is_left_out_leaves_no_gradient():
    dataset, partition = oracles.world((12, 7, 20))
    dataset.train_images[partition.train[1][0]] = 255
    simulation = oracles.simulate(
        given=(dataset, partition), model=models.from_flax(Poisonable(), (3, 3, 1), 3, name="poisonable"),
        algorithm=LIPS(period=1, leaves=("params/fc1/kernel",)), non_finite="skip", epochs=1,
    )  # fmt: skip
    rows = oracles.run(simulation)
    assert [row.client for row in rows if row.metric == "left_out"] == [1, 1]
    assert oracles.value_of(rows, "lips_untrained", 2) == 0  # of those that count
    state = jax.device_get(simulation.state)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    np.testing.assert_array_equal(state.clients["rule"].trained, [True, False, True])
    gradient = state.clients["rule"].gradient["params/fc1/kernel"]
    assert [bool(row.any()) for row in gradient] == [True, False, True]


# --- by name, cut and resumed ---------------------------------------------------------------------------

NESTED = {
    "name": "lips",
    "density": 0.4,
    "period": 1,
    "store": "bfloat16",
    "leaves": ["params/fc2/*"],
    "inner": {"name": "fedmr", "granularity": "module"},
}


def test_an_algorithm_in_an_algorithm_travels_through_yaml():
    config = config_lib.from_dict(
        {"algorithm": {"name": "lips", "inner": {"name": "fedmr", "granularity": "module"}}}
    )
    assert config.algorithm == LIPS(FedMR(granularity="module"))
    written = config_lib.to_dict(config)
    assert written["algorithm"]["name"] == "lips"
    assert written["algorithm"]["inner"]["name"] == "fedmr"
    assert written["algorithm"]["inner"]["granularity"] == "module"
    assert config_lib.from_dict(written) == config
    assert config_lib.from_dict(yaml.safe_load(config_lib.dump(config))) == config
    assert config_lib.from_dict({"algorithm": {"name": "lips", "inner": "fedmr"}}).algorithm == LIPS(FedMR())
    assert config_lib.from_dict({"algorithm": "lips"}).algorithm == LIPS(FedAvg())


@pytest.mark.slow
def test_a_run_cut_and_resumed_is_the_run_uncut(tmp_path, monkeypatch):
    config = config_lib.from_dict(
        {
            "rounds": 3,
            "algorithm": NESTED,
            "partition": {"clients": 8},
            "local": {"epochs": 1, "batch_size": 64, "lr": 0.1},
            "cohort": {"size": 4},
            "evaluation": {"every": 3},
            "output": {"checkpoint_every": 1, "tensorboard": False, "figures": False, "progress": False},
        }
    )
    model = models.create("mlp", (8, 8, 1), 10, hidden=(6, 5))
    whole = runs.run(config, model=model)
    assert 0 < whole.metrics.last("lips_density") < 1

    steps = Simulation.steps

    def cut(self, most=None):
        if self.round == 2:
            raise RuntimeError("cut")
        return steps(self, 1)

    folder = dataclasses.replace(config.output, dir=str(tmp_path / "run"))
    with monkeypatch.context() as patch:
        patch.setattr(Simulation, "steps", cut)
        with pytest.raises(RuntimeError, match="cut"):
            runs.run(dataclasses.replace(config, output=folder), model=model)
    done = runs.resume(tmp_path / "run", model=model)
    assert done.finished and list(done.metrics) == list(whole.metrics)
    oracles.assert_trees_equal(done.variables, whole.variables)


# --- mistakes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "field", "told"),
    [
        ({"density": 0.0}, "algorithm.density", "0"),
        ({"density": 1.5}, "algorithm.density", "1.5"),
        ({"density": -1.0}, "algorithm.density", "-1"),
        ({"density": float("nan")}, "algorithm.density", "nan"),
        ({"period": 0}, "algorithm.period", "at least 1"),
        ({"score": "gradient"}, "algorithm.score", "sensitivity"),
        ({"refill": "mean"}, "algorithm.refill", "initial"),
        ({"inner": LIPS()}, "algorithm.inner", "sparse"),
        ({"inner": 3}, "algorithm.inner", "3"),
        ({"leaves": ("params/conv9/*",)}, "algorithm.leaves", "conv"),
        ({"leaves": ("*/bn/*",)}, "algorithm.leaves", "batch_stats"),
        ({"inner": FedBABU(), "leaves": ("params/fc/*",)}, "algorithm.score", "params/fc"),
        ({"inner": FedRep(head_epochs=1), "leaves": ("params/fc/*",)}, "algorithm.score", "params/fc"),
        # One that moves does not make up for one that never does.
        ({"inner": FedBABU(), "leaves": ("params/*/kernel",)}, "algorithm.score", "params/fc/kernel"),
    ],
)
def test_mistakes_are_named(settings, field, told):
    with pytest.raises(UserError, match=told) as caught:
        LIPS(**settings).build(dataclasses.replace(CONTEXT, local=fs.LocalConfig(epochs=2)))
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        (personal.deep(), "inner_convs"),
        (models.create("vit", (8, 8, 1), 10), "inner_convs"),
        (models.create("mlp", (3, 3, 1), 3, hidden=(4,)), "inner"),
    ],
    ids=["mlp", "vit", "shallow"],
)
def test_a_model_without_such_layers_is_refused(model, layers):
    with pytest.raises(UserError, match=model.name) as caught:
        LIPS(layers=layers).build(dataclasses.replace(CONTEXT, model=model))
    assert caught.value.field == "algorithm.layers"


def test_a_score_that_needs_no_gradient_may_rank_what_never_moves():
    algorithm = LIPS(FedBABU(), score="magnitude", leaves=("params/fc/kernel",)).build(CONTEXT)
    assert algorithm.local.wants_last_gradient is None


@pytest.mark.parametrize(
    ("algorithm", "field"),
    [
        ({"name": "lips", "inner": "fedmrr"}, "algorithm.inner.name"),
        ({"name": "lips", "inner": {"name": "fedmr", "granularity": "leaf"}}, "algorithm.inner.granularity"),
        ({"name": "lips", "inner": {"name": "fedmr", "grain": 1}}, "algorithm.inner.grain"),
        ({"name": "lips", "inner": ["fedmr"]}, "algorithm.inner"),
        ({"name": "lips", "inner": "lips"}, "algorithm.inner"),
        ({"name": "lips", "densty": 0.5}, "algorithm.densty"),
    ],
)
def test_mistakes_in_yaml_are_named(algorithm, field):
    with pytest.raises(UserError) as caught:
        config_lib.from_dict({"algorithm": algorithm})
    assert caught.value.field == field
