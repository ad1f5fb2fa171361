"""A whole round against NumPy in float64, and what must not show in its result."""

import dataclasses
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from fedjax_sim import models
from fedjax_sim.algorithms import LIPS, FedAvg, FedMR, Local, Scaffold
from fedjax_sim.core import gradients, stacked
from fedjax_sim.core.conv_impl import CONV_IMPLS
from fedjax_sim.core.task import task_loss
from fedjax_sim.engine import placement
from fedjax_sim.engine.simulation import NonFiniteUpdate
from fedjax_sim.models.norms import BatchNorm
from fedjax_sim.runs.aot import hlo
from tests import oracles

RAGGED = (1, 37, 10, 23, 20, 4, 31)


class SmallCNN(nn.Module):
    """A convolution, batch norm, pooling, a dense layer."""

    @nn.compact
    def __call__(self, x, *, train=False, mask=None):
        x = models.Conv(3, (3, 3), name="conv")(x)
        x = BatchNorm(name="bn")(x, train=train, mask=mask)
        x = models.max_pool(nn.relu(x))
        return nn.Dense(3, name="fc")(x.reshape(x.shape[0], -1))


class OnlyNorm(nn.Module):
    """Batch norm of the pixels themselves, so that its statistics are the data's."""

    @nn.compact
    def __call__(self, x, *, train=False, mask=None):
        x = BatchNorm(name="bn")(x, train=train, mask=mask)
        return nn.Dense(3, name="fc")(x.reshape(x.shape[0], -1))


class WithDropout(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.relu(nn.Dense(8, name="fc1")(x.reshape(x.shape[0], -1)))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(3, name="fc2")(x)


def small_cnn():
    return models.from_flax(SmallCNN(), (6, 6, 1), 3, name="small-cnn")


# --- against NumPy --------------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("weights", "local"),
    [
        ("samples", {"epochs": 2}),
        pytest.param("uniform", {"epochs": 1, "momentum": 0.9}, marks=pytest.mark.slow),
        ("samples", {"epochs": 2, "momentum": 0.5, "weight_decay": 0.1, "nesterov": True}),
        ("uniform", {"epochs": 2, "momentum": 0.9, "weight_decay": 0.05, "clip_norm": 0.3}),
        ("samples", {"steps": 5, "schedule": "exponential", "decay": 0.5}),
    ],
)
def test_fedavg_rounds_equal_numpy(weights, local):
    simulation = oracles.simulate(
        RAGGED, algorithm=FedAvg(weights=weights), cohort=5, devices=2, wave=2, **local
    )
    expected = start = oracles.doubled(simulation.variables["params"])
    rows = oracles.run(simulation)
    for index in range(2):
        expected, losses = oracles.fedavg_round(expected, simulation, index, weights)
        counts = oracles.sizes_of(simulation)[simulation.inputs(index)[0].cohort.ids]
        wanted = np.average(losses, weights=counts)
        assert oracles.value_of(rows, "train_loss", index + 1) == pytest.approx(wanted, rel=1e-5)
    oracles.assert_trees_close(simulation.variables["params"], expected)
    assert oracles.far_apart(start, expected) > 1e-2


@pytest.mark.parametrize("keep", [True, False])
def test_a_kept_momentum_continues_in_the_clients_next_round(keep):
    simulation = oracles.simulate(
        (12, 7, 20, 3), cohort=3, rounds=3, keep_optimizer=keep, momentum=0.9, epochs=1, lr=0.05, wave=2
    )
    expected = forgetful = oracles.doubled(simulation.variables["params"])
    buffers = {}
    oracles.run(simulation)
    for index in range(3):
        expected, _ = oracles.fedavg_round(expected, simulation, index, buffers=buffers if keep else None)
        forgetful, _ = oracles.fedavg_round(forgetful, simulation, index)
    oracles.assert_trees_close(simulation.variables["params"], expected)
    assert (oracles.far_apart(expected, forgetful) > 1e-3) == keep


def test_fedmr_rounds_equal_numpy_up_to_the_slots_order():
    """With one client the whole trajectory is known: no permutation can move anything."""
    simulation = oracles.simulate((23,), algorithm=FedMR(), rounds=3, momentum=0.5)
    expected = oracles.doubled(simulation.variables["params"])
    oracles.run(simulation)
    for index in range(3):
        expected, _ = oracles.fedavg_round(expected, simulation, index)
    oracles.assert_trees_close(simulation.variables["params"], expected)


def test_an_optimiser_whose_steps_are_not_proportional_to_its_rate_is_made_at_the_rounds_rate():
    """Fromage moves by η/√(1+η²) and shrinks by 1/√(1+η²): made at rate 1 it would be another."""
    simulation = oracles.simulate((17,), optimizer="fromage", lr=0.5, schedule="exponential", decay=0.5)
    params = oracles.doubled(simulation.variables["params"])
    oracles.run(simulation)
    own = simulation.setup.partition.train[0]
    x = oracles.normalised(simulation.setup.dataset.train_images[own])
    y = simulation.setup.dataset.train_labels[own]

    def step(w, g, lr):
        length, size = np.linalg.norm(w), np.linalg.norm(g)
        ratio = max(length, 1e-6) / max(size, 1e-6)
        return (w - lr * ratio * g) / np.sqrt(1 + lr**2)

    for index, lr in enumerate((0.5, 0.25)):
        for chosen in oracles.client_batches(7, index, 0, 17, simulation.setup.config.local):
            _, g = oracles.mlp_gradient(params, x[chosen], y[chosen])
            params = oracles.map_trees(lambda w, g, lr=lr: step(w, g, lr), params, g)
    oracles.assert_trees_close(simulation.variables["params"], params, atol=3e-5)


def test_an_optax_optimiser_is_optaxs_with_the_rounds_rate():
    """Adam by hand, one client, two epochs, a rate that falls from round to round."""
    simulation = oracles.simulate(
        (17,), optimizer="adam", options={"b1": 0.8, "b2": 0.9}, lr=0.02, schedule="exponential", decay=0.5
    )
    params = oracles.doubled(simulation.variables["params"])
    oracles.run(simulation)
    own = simulation.setup.partition.train[0]
    x = oracles.normalised(simulation.setup.dataset.train_images[own])
    y = simulation.setup.dataset.train_labels[own]
    for index, lr in enumerate((0.02, 0.01)):
        m = v = oracles.map_trees(np.zeros_like, params)
        batches = oracles.client_batches(7, index, 0, 17, simulation.setup.config.local)
        for t, chosen in enumerate(batches, start=1):
            _, g = oracles.mlp_gradient(params, x[chosen], y[chosen])
            m = oracles.map_trees(lambda m, g: 0.8 * m + 0.2 * g, m, g)
            v = oracles.map_trees(lambda v, g: 0.9 * v + 0.1 * g**2, v, g)
            params = oracles.map_trees(
                lambda p, m, v, t=t, lr=lr: (
                    p - lr * (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.9**t)) + 1e-8)
                ),
                params, m, v,
            )  # fmt: skip
    oracles.assert_trees_close(simulation.variables["params"], params, atol=3e-5)


# --- execution is invisible -----------------------------------------------------------------------------

# Sums over clients are taken in another order, nothing else changes: float32 rounding over a few dozen steps.
TOLERANCE = {"rtol": 2e-5, "atol": 2e-6}
LAYOUTS = [
    *((2, 3), (4, 1)),
    *(pytest.param(*layout, marks=pytest.mark.slow) for layout in ((1, 2), (1, 6), (2, 1), (4, 2))),
]


@pytest.fixture(scope="module", params=["fedavg", "fedmr"])
def mlp_reference(request):
    algorithm = {"fedavg": FedAvg(), "fedmr": FedMR()}[request.param]
    keywords = {"algorithm": algorithm, "cohort": 6, "momentum": 0.5, "rounds": 2}
    simulation = oracles.simulate(RAGGED, donate=False, **keywords)
    rows = oracles.run(simulation)
    return keywords, oracles.state_of(simulation), rows


@pytest.mark.parametrize(("devices", "wave"), LAYOUTS)
def test_layout_changes_no_result_of_an_mlp(mlp_reference, devices, wave):
    keywords, state, rows = mlp_reference
    simulation = oracles.simulate(RAGGED, devices=devices, wave=wave, **keywords)
    again = oracles.run(simulation)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **TOLERANCE), oracles.state_of(simulation), state
    )
    for one, other in zip(rows, again, strict=True):
        assert one[:2] == other[:2]
        assert one.metric == "padding_waste" or one.value == pytest.approx(other.value, rel=1e-5)


@pytest.fixture(scope="module")
def cnn_reference(request):
    algorithm = {"fedavg": FedAvg(), "fedmr": FedMR(batch_stats="tied")}[request.param]
    given = oracles.world((13, 4, 20, 8, 1), (6, 6, 1))
    keywords = {"algorithm": algorithm, "given": given, "model": small_cnn(), "rounds": 2, "epochs": 1}
    simulation = oracles.simulate(conv="xla", **keywords)
    oracles.run(simulation)
    return keywords, oracles.state_of(simulation)


OTHERS = [impl for impl in CONV_IMPLS if impl != "canonical"]
CNNS = [
    *(("fedavg", 4, 1, "canonical"), ("fedmr", 4, 1, "canonical")),
    # Clients of FedAvg train by the same; its means in this layout are asked for above.
    *(("fedmr", 2, 3, impl) for impl in OTHERS),
]
SLOW_CNNS = [
    *((name, 2, 2, "canonical") for name in ("fedavg", "fedmr")),
    *((name, 2, 1, impl) for name in ("fedavg", "fedmr") for impl in OTHERS),
    *(("fedavg", 2, 3, impl) for impl in OTHERS),
]


@pytest.mark.parametrize(
    ("cnn_reference", "devices", "wave", "conv"),
    [*CNNS, *(pytest.param(*layout, marks=pytest.mark.slow) for layout in SLOW_CNNS)],
    indirect=["cnn_reference"],
)
def test_layout_and_implementation_change_no_result_of_a_cnn(cnn_reference, devices, wave, conv):
    """Batch norm divides by the deviation of very small batches, hence the wider tolerance."""
    keywords, state = cnn_reference
    simulation = oracles.simulate(devices=devices, wave=wave, conv=conv, **keywords)
    oracles.run(simulation)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5),
        oracles.state_of(simulation),
        state,
    )


def test_randomness_on_a_client_does_not_depend_on_the_layout():
    """Dropout and augmentation draw in the same round."""
    model = models.from_flax(WithDropout(), (4, 4, 1), 3, name="dropout")
    given = oracles.world((13, 4, 20, 8), (4, 4, 1), flip=True, crop_padding=1)
    plain = oracles.world((13, 4, 20, 8), (4, 4, 1))

    def variables(given, **layout):
        algorithm = FedMR(similarity=False)
        simulation = oracles.simulate(given=given, model=model, algorithm=algorithm, **layout)
        oracles.run(simulation)
        return simulation.variables

    alone = variables(given)
    oracles.assert_trees_close(variables(given, devices=2, wave=2), alone, **TOLERANCE)
    assert oracles.far_apart(variables(plain), alone) > 1e-3


def test_a_users_module_with_dropout_is_known_to_need_randomness():
    """Training such a model must not fail for want of a key."""
    model = models.from_flax(WithDropout(), (3, 3, 1), 3, name="dropout")
    simulation = oracles.simulate((10, 10), model=model, rounds=1)
    oracles.run(simulation)
    assert simulation.round == 1


# --- padding is invisible -------------------------------------------------------------------------------


def _with_a_large_client(size, wave, module=None):
    """Every client trains alone (`Local`); the last one is `size` samples large."""
    dataset, partition = oracles.world((13, 7, 1, 160), (6, 6, 1))
    parts = (*partition.train[:3], partition.train[3][:size])
    model = None if module is None else module
    simulation = oracles.simulate(
        given=(dataset, type(partition)(parts)), model=model, algorithm=Local(), wave=wave, momentum=0.5
    )
    oracles.run(simulation)
    return jax.tree.map(lambda leaf: np.asarray(leaf)[:3], simulation.state.algorithm.models)


@pytest.mark.parametrize(
    "model", [pytest.param(None, id="mlp", marks=pytest.mark.slow), pytest.param(small_cnn(), id="cnn")]
)
def test_a_client_does_not_feel_a_larger_one(model):
    oracles.assert_trees_equal(_with_a_large_client(160, 1, model), _with_a_large_client(7, 1, model))


def test_a_client_does_not_feel_a_larger_one_in_its_own_wave():
    oracles.assert_trees_equal(_with_a_large_client(160, 4), _with_a_large_client(15, 4))


def test_padding_never_reads_another_clients_image():
    """Image 0 makes the model infinite; it belongs to client 1, and client 0's last batch is partial.

    A padded row weighs nothing, but 0 times infinity is NaN in its gradient.
    """
    dataset, _ = oracles.world((20,))
    dataset.train_images[0] = 255
    partition = oracles.Partition((np.arange(1, 4), np.array([0, *range(4, 16)])))
    model = models.from_flax(Poisonable(), (3, 3, 1), 3, name="poisonable")
    simulation = oracles.simulate(given=(dataset, partition), model=model, non_finite="skip", rounds=1)
    rows = oracles.run(simulation)
    assert [row.client for row in rows if row.metric == "left_out"] == [1]


def test_batch_statistics_are_averaged_and_do_not_see_padding():
    """Clients of 3, 14 and 1 samples at batch 10: each batch moves the running mean by a tenth of the way."""
    given = oracles.world((3, 14, 1))
    dataset, partition = given
    model = models.from_flax(OnlyNorm(), (3, 3, 1), 3, name="only-norm")
    simulation = oracles.simulate(given=given, model=model, rounds=1, epochs=1, wave=3)
    oracles.run(simulation)
    means, variances = [], []
    for client, own in enumerate(partition.train):
        mean, var = 0.0, 1.0
        order = oracles.batch_order(7, 0, client, 0, len(own))
        for start in range(0, len(own), 10):
            x = oracles.normalised(dataset.train_images[own[order[start : start + 10]]])
            mean, var = 0.9 * mean + 0.1 * x.mean(), 0.9 * var + 0.1 * x.var(ddof=1)
        means.append(mean)
        variances.append(var)
    statistics = jax.device_get(simulation.variables["batch_stats"]["bn"])
    np.testing.assert_allclose(statistics["mean"], np.average(means, weights=[3, 14, 1]), rtol=1e-5)
    np.testing.assert_allclose(statistics["var"], np.average(variances, weights=[3, 14, 1]), rtol=1e-5)


# --- what a sharded round moves -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("algorithm", "keep"),
    [
        pytest.param(FedMR(similarity=False), False, marks=pytest.mark.slow),
        (FedMR(), False),
        (Local(), False),
        (FedAvg(), True),
    ],
    ids=["recombination", "similarity", "personal-models", "kept-optimisers"],
)
@pytest.mark.parametrize("measured", [False, True])
def test_no_stack_of_models_is_gathered_on_one_device(algorithm, keep, measured):
    """Memory a device stays its share; a handful of numbers (keys, losses, a bias of 3) may travel to all."""
    model = models.create("mlp", (3, 3, 1), 3, hidden=(64,))
    simulation = oracles.simulate(
        (5,) * 8, algorithm=algorithm, devices=4, model=model, rounds=1, momentum=0.9, keep_optimizer=keep
    )
    given = simulation.state, simulation.inputs(0)[0], simulation.data
    given += (np.arange(8, dtype=np.int32),) if measured else ()
    with jax.set_mesh(simulation.mesh):
        text = simulation.program.lower(*given).compile().as_text()
    gathered = re.findall(r"= \(?\w+\[([\d,]*)\][^=]*? all-gather(?:-start)?\(", text)
    sizes = [math.prod(int(n) for n in shape.split(",") if n) for shape in gathered]
    # Even the smallest leaf that can be cut over 4 devices has 8 slots of 64 numbers.
    assert max(sizes, default=0) < 8 * 64, gathered


# --- measured rounds ------------------------------------------------------------------------------------


MEASURED = {
    "mean": FedAvg(),
    "recombination": FedMR(similarity=False),
    "kept-by-clients": Scaffold(),
    "masks": LIPS(FedMR(similarity=False), leaves=("params/fc2/kernel",)),
}


BY_DEFAULT = {("mean", "some"), ("recombination", "all"), ("kept-by-clients", "some"), ("masks", "all")}


def measured_round(algorithm, devices, slots, wave=1, **settings):
    """The simulation, and the arguments of its first round, in which some slots are watched."""
    sizes = (12, 7, 20, 3, 31, 9, 1, 25)
    simulation = oracles.simulate(
        sizes, algorithm=algorithm, devices=devices, wave=wave, epochs=1, **settings
    )
    given = simulation.state, simulation.inputs(0)[0], simulation.data, np.asarray(slots, np.int32)
    return simulation, given


def view_of(*args, **settings):
    simulation, given = measured_round(*args, **settings)
    with jax.set_mesh(simulation.mesh):
        return simulation.program(*given)[1].view


SOME, ALL = (5, 2, 7), (6, 0, 3, 1, 7, 2, 4, 5)


@pytest.mark.parametrize(
    ("algorithm", "slots"),
    [
        pytest.param(
            algorithm,
            slots,
            id=f"{name}-{which}",
            # Recombination exchanges most; masks and sums of all slots are placed as those of some are.
            marks=pytest.mark.slow if (name, which) not in BY_DEFAULT else [],
        )
        for name, algorithm in MEASURED.items()
        for which, slots in (("some", SOME), ("all", ALL))
    ],
)
def test_watched_models_are_cut_over_the_devices_and_the_same_bits(algorithm, slots):
    """Clients of unequal sizes, which lie on their devices in another order than they are watched in."""
    one = view_of(algorithm, 1, slots)
    count = len(slots)
    for devices, wave in ((2, 1), (3, 2), (4, 1)):
        view = view_of(algorithm, devices, slots, wave)
        np.testing.assert_array_equal(view.cohort.ids, one.cohort.ids)
        np.testing.assert_array_equal(view.cohort.counts, one.cohort.counts)
        for name in ("start", "before", "after"):
            leaves = jax.tree.leaves(getattr(view, name))
            for leaf, wanted in zip(leaves, jax.tree.leaves(getattr(one, name)), strict=True):
                share = -(-count // devices)
                assert [shard.data.shape[0] for shard in leaf.addressable_shards] == [share] * devices
                assert len({shard.index[0].start for shard in leaf.addressable_shards}) == devices
                if name == "after" and not isinstance(algorithm, FedMR):  # made of sums over devices
                    np.testing.assert_allclose(leaf[:count], wanted, rtol=1e-4, atol=1e-5)
                else:
                    np.testing.assert_array_equal(leaf[:count], wanted)


def out_of_order(text):
    """Each (loop of exchanges, exchange or such loop that comes later without waiting for it); loops in all.

    CPU devices may take such two in different orders, and then wait for each other for ever.
    """
    module = hlo.read(text)
    roles = "body", "condition", "to_apply", "branch_computations", "true_computation", "false_computation"

    def exchanges(one):
        kinds = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
        inside = [module.computations.get(name, {}) for name in one.called(*roles)]
        return one.op in kinds or any(exchanges(part) for body in inside for part in body.values())

    found, loops = [], 0
    for body in module.computations.values():
        waiting = {}  # of each loop so far who waits for it
        for one in body.values():
            if one.op not in ("while", "conditional") and not exchanges(one):
                for names in waiting.values():
                    names |= {one.name} if names & set(one.operands) else set()
                continue
            for loop, names in waiting.items():
                if names & set(one.operands):
                    names.add(one.name)
                elif exchanges(one):
                    found.append((loop, one.op, one.op_name))
            if one.op in ("while", "conditional") and exchanges(one):
                waiting[f"{one.name} {one.op_name}"] = {one.name}
                loops += one.op == "while"
    return found, loops


@pytest.mark.parametrize("algorithm", list(MEASURED.values())[1:], ids=list(MEASURED)[1:])
def test_exchanges_of_a_measured_round_have_one_order(algorithm):
    simulation, given = measured_round(algorithm, 4, (5, 2, 7))
    with jax.set_mesh(simulation.mesh):
        text = simulation.program.lower(*given).compile().as_text()
    found, loops = out_of_order(text)
    assert loops
    assert not found


def test_what_reads_numbers_of_once_there_follows_the_exchanges_that_they_wait_for():
    """Two rings, and a sum over devices of a whole array; without it none waits for another."""
    mesh = placement.make_mesh(4)
    rng = np.random.default_rng(0)
    stack = {"w": rng.normal(size=(8, 40)).astype(np.float32), "flag": rng.random(8) < 0.5}
    other = {"b": rng.integers(0, 9, (8, 30)).astype(np.int32)}
    ids = np.asarray([6, 1, 3], np.int32)

    def run(ordered, stack, other, ids):
        first = stacked.take_rows(stack, ids)
        if ordered:
            ids = stacked.once_there(ids, first, stack["w"].sum())
        return first, stacked.take_rows(other, ids), stack["w"].sum(), ids

    with jax.set_mesh(mesh):
        given = (*jax.device_put((stack, other), placement.cut(mesh)), ids)
        free, ordered = (jax.jit(partial(run, way)).lower(*given).compile() for way in (False, True))
        first, second, _, numbers = ordered(*given)
    assert out_of_order(free.as_text()) != ([], 2)
    assert out_of_order(ordered.as_text()) == ([], 2)
    np.testing.assert_array_equal(numbers, ids)
    for got, wanted in ((first, stack), (second, other)):
        for name, leaf in got.items():
            np.testing.assert_array_equal(leaf, wanted[name][ids])


# --- updates that are not finite ------------------------------------------------------------------------


class Poisonable(nn.Module):
    """Infinite logits for an image whose first pixel is 255."""

    @nn.compact
    def __call__(self, x, *, train=False, mask=None):
        poison = jnp.where(x[:, 0, 0, 0] > 0.999, jnp.inf, 0.0).astype(jnp.float32)
        x = nn.Dense(3, name="fc1")(x.reshape(x.shape[0], -1))
        return x * (1 + poison[:, None])


def poisoned(algorithm, **keywords):
    """Four clients, of which client 2 holds one poisonous image (not the first of the set)."""
    dataset, partition = oracles.world((12, 7, 20, 3))
    own = partition.train[2]
    dataset.train_images[own[own != 0][0]] = 255
    model = models.from_flax(Poisonable(), (3, 3, 1), 3, name="poisonable")
    return oracles.simulate(given=(dataset, partition), model=model, algorithm=algorithm, **keywords)


@pytest.mark.parametrize(("devices", "wave"), [(1, 2), (2, 1)])
def test_a_poisoned_client_is_left_out_of_the_mean(devices, wave):
    simulation = poisoned(FedAvg(), non_finite="skip", devices=devices, wave=wave, rounds=1)
    start = oracles.doubled(simulation.variables["params"])
    rows = oracles.run(simulation)
    assert [row.client for row in rows if row.metric == "left_out"] == [2]
    ids, trained, losses = oracles.train_cohort([start] * 4, simulation, 0)
    sizes = [len(simulation.setup.partition.train[c]) for c in ids]
    kept = [slot for slot, client in enumerate(ids) if client != 2]
    expected = oracles.weighted_mean([trained[k] for k in kept], [sizes[k] for k in kept])
    oracles.assert_trees_close(simulation.variables["params"], expected)
    loss = np.average([losses[k] for k in kept], weights=[sizes[k] for k in kept])
    assert oracles.value_of(rows, "train_loss", 1) == pytest.approx(loss, rel=1e-5)


def test_a_poisoned_slot_of_fedmr_keeps_its_start():
    simulation = poisoned(FedMR(granularity="model"), non_finite="skip", rounds=1, devices=2)
    start = oracles.doubled(simulation.variables["params"])
    oracles.run(simulation)
    slots = simulation.state.algorithm.slots["params"]["fc1"]["kernel"]
    equal = [np.array_equal(slot, start["fc1"]["kernel"].astype(np.float32)) for slot in np.asarray(slots)]
    assert sum(equal) == 1
    ids, trained, _ = oracles.train_cohort([start] * 4, simulation, 0)
    trained[ids.index(2)] = start
    oracles.assert_trees_close(simulation.variables["params"], oracles.weighted_mean(trained, [1] * 4))


@pytest.mark.parametrize("algorithm", [FedAvg(), FedMR(similarity=False)], ids=["fedavg", "fedmr"])
def test_a_round_in_which_all_clients_overflow_keeps_the_model(algorithm):
    """A single step of a rate beyond float32: every loss is finite, every parameter is not."""
    simulation = oracles.simulate(
        (5, 8), algorithm=algorithm, lr=3e38, weight_decay=1e3, steps=1, non_finite="skip", rounds=1
    )
    before = jax.device_get(simulation.variables)
    rows = oracles.run(simulation)
    oracles.assert_trees_equal(simulation.variables, before)
    assert sorted(row.client for row in rows if row.metric == "left_out") == [0, 1]
    assert not [row for row in rows if row.metric == "train_loss"]


@dataclasses.dataclass(frozen=True)
class LossOnly:
    """FedAvg with a loss that is no number, though its gradient is one."""

    def build(self, context):
        record = FedAvg().build(context)

        def loss(apply, variables, batch, extra):
            value, variables = task_loss(apply, variables, batch)
            return value + jax.lax.stop_gradient(jnp.float32(jnp.nan)), variables

        local = dataclasses.replace(record.local, gradient=gradients.of_loss(loss))
        return dataclasses.replace(record, local=local)


def test_a_loss_that_is_not_finite_leaves_a_client_out_although_its_model_is():
    simulation = oracles.simulate((5, 8), algorithm=LossOnly(), non_finite="skip", rounds=1)
    before = jax.device_get(simulation.variables)
    rows = oracles.run(simulation)
    assert sorted(row.client for row in rows if row.metric == "left_out") == [0, 1]
    oracles.assert_trees_equal(simulation.variables, before)


@dataclasses.dataclass(frozen=True)
class Uploading:
    """FedAvg whose clients upload their trained model as well; the sum of these is recorded."""

    def build(self, context):
        record = FedAvg().build(context)

        def end(start, trained, client_state, extra, steps, lr, gradient):
            return client_state, trained["params"]["fc1"]["kernel"]

        def merge(state, cohort, starts, results, key):
            state, metrics = record.merge(state, cohort, starts, results, key)
            return state, {**metrics, "uploaded": results.uploads.sum()}

        local = dataclasses.replace(record.local, finish_round=end)
        return dataclasses.replace(record, merge=merge, local=local)


@dataclasses.dataclass(frozen=True)
class Dividing(Uploading):
    """The same, in which client 2's upload alone is divided by zero."""

    value: float = np.nan

    def build(self, context):
        record = super().build(context)

        def end(start, trained, client_state, extra, steps, lr, gradient):
            kept, sent = record.local.finish_round(start, trained, client_state, extra, steps, lr, gradient)
            return kept, jnp.where(steps == 3, jnp.float32(self.value), sent)

        return dataclasses.replace(record, local=dataclasses.replace(record.local, finish_round=end))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_client_whose_upload_is_not_finite_is_named_or_left_out(value):
    """Though its model is: it would be in what the server makes of uploads."""
    settings = {"algorithm": Dividing(value), "batch_size": 5, "epochs": 1, "rounds": 1}
    simulation = oracles.simulate((5, 10, 13, 7), non_finite="skip", **settings)
    rows = oracles.run(simulation)
    assert [row.client for row in rows if row.metric == "left_out"] == [2]
    assert np.isfinite(oracles.value_of(rows, "uploaded", 1))
    simulation = oracles.simulate((5, 10, 13, 7), **settings)
    with pytest.raises(NonFiniteUpdate, match=r"in round 1 the update of client\(s\) \[2\]"):
        oracles.run(simulation)


def test_the_upload_of_a_client_that_is_left_out_is_zero():
    simulation = poisoned(Uploading(), non_finite="skip", rounds=1)
    start = oracles.doubled(simulation.variables["params"])
    rows = oracles.run(simulation)
    ids, trained, _ = oracles.train_cohort([start] * 4, simulation, 0)
    wanted = sum(trained[k]["fc1"]["kernel"].sum() for k, client in enumerate(ids) if client != 2)
    assert oracles.value_of(rows, "uploaded", 1) == pytest.approx(wanted, rel=1e-4)
