"""What moves rows and slots between devices, on 2 to 6 of them, with sizes that coincide in nothing.

Four devices are there in a run of the tests; the cases of five and six run in a process that has six.
"""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from fedjax_sim.algorithms import FedMR, Scaffold
from fedjax_sim.core import stacked
from fedjax_sim.engine import placement
from fedjax_sim.engine.held import Held
from tests import oracles

DEVICES = [pytest.param(count, id=f"on-{count}") for count in (2, 3, 4, 5, 6)]


@pytest.fixture
def mesh(devices):
    if devices > jax.device_count():
        pytest.skip(f"needs {devices} devices: see test_five_and_six_devices")
    return placement.make_mesh(devices)


def test_five_and_six_devices():
    """Shapes in annotations are checked along with it (tests/conftest.py)."""
    if jax.device_count() >= 6:
        pytest.skip("they are here")
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": "6", "JAX_PLATFORMS": "cpu", "FEDJAX_SIM_CHECK_SHAPES": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n0",
        "-p",
        "no:cacheprovider",
        __file__,
        str(Path(__file__).with_name("test_shapes.py")),
        "-k",
        "on-5 or on-6 or seen_at_the_door or right_ones",
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-3000:]


def stack_of(count, seed=0):
    """A row of each of `count` clients: numbers that a sum would change, flags, a scalar each."""
    rng = np.random.default_rng(seed)
    odd = rng.normal(size=(count, 3)).astype(np.float32)
    odd[0] = -0.0, np.nan, 1e-45
    return {"odd": odd, "flag": rng.random(count) < 0.5, "count": rng.permutation(count).astype(np.int32)}


def every_dtype(count, seed=0):
    """The same in every dtype that a state may have."""
    rng = np.random.default_rng(seed)
    return {
        **stack_of(count, seed),
        "half": rng.normal(size=(count, 2)).astype(jnp.bfloat16),
        "small": rng.integers(-128, 128, (count, 3)).astype(np.int8),
        "byte": rng.integers(0, 256, count).astype(np.uint8),
        "large": (2**31 - 1 - rng.permutation(count)).astype(np.int32),
        "pair": rng.normal(size=(count, 2, 2)).astype(np.float32).view(np.complex64),
        "keys": jax.random.split(jax.random.key(seed), (count, 2)),
    }


def plain(tree):
    """Dtype and bits of each leaf."""

    def one(leaf):
        raw = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        raw = np.ascontiguousarray(raw)
        return leaf.dtype, raw.reshape(len(raw), -1).view(np.uint8)

    return {name: one(leaf) for name, leaf in tree.items()}


def on(mesh, function, *trees, cut=1):
    """`function` compiled on a mesh; the first `cut` trees sharded as the engine would."""
    with jax.set_mesh(mesh):
        put = lambda tree: jax.tree.map(  # noqa: E731
            lambda leaf: jax.device_put(leaf, placement.cut(mesh)), tree
        )
        given = [put(tree) if number < cut else tree for number, tree in enumerate(trees)]
        return jax.jit(function)(*given)


# (rows a device holds, rows wanted): one, fewer than devices, between, a multiple of the devices, all.
ROWS = [(7, 1), (7, -1), (5, "prime"), (3, "twice"), (3, "all")]


def _wanted(devices, held, wanted):
    return {-1: devices - 1, "prime": 2 * devices + 1, "twice": 2 * devices, "all": held * devices}.get(
        wanted, wanted
    )


def assert_rows(mesh, make, held, wanted):
    """Some of all clients' rows, taken and replaced, are NumPy's bit for bit."""
    devices = mesh.size
    count = held * devices
    rng = np.random.default_rng(devices)
    stack, new = make(count), make(wanted, 5)
    ids = rng.permutation(count)[:wanted].astype(np.int32)
    both = lambda s, i, n: (stacked.take_rows(s, i), stacked.put_rows(s, i, n))  # noqa: E731
    taken, put = (plain(tree) for tree in on(mesh, both, stack, ids, new))
    for name, (dtype, rows) in plain(stack).items():
        assert taken[name][0] == put[name][0] == dtype
        np.testing.assert_array_equal(taken[name][1], rows[ids], name)
        rows = rows.copy()
        rows[ids] = plain(new)[name][1]
        np.testing.assert_array_equal(put[name][1], rows, name)


# Rows that a device holds, and rows wanted on D devices.
ROWS = {
    "one": (7, lambda devices: 1),
    "fewer-than-devices": (4, lambda devices: devices - 1),
    "no-multiple": (5, lambda devices: 2 * devices + 1),
    "a-multiple": (5, lambda devices: 2 * devices),
    "all": (3, lambda devices: 3 * devices),
}


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize(("held", "wanted"), ROWS.values(), ids=ROWS)
def test_rows_are_taken_and_put_back_bit_for_bit(mesh, held, wanted):
    assert_rows(mesh, stack_of, held, wanted(mesh.size))


@pytest.mark.parametrize("devices", DEVICES[1:2])
@pytest.mark.parametrize("wanted", [6, 7])
def test_rows_of_any_dtype_keep_it(mesh, wanted):
    """A sum over devices would make an integer of a flag, and +0 of -0; of a random key there is none."""
    assert_rows(mesh, every_dtype, 5, wanted)


def shapes(devices):
    """Of leaves beside each other: whose axis or size the devices divide, and do not."""
    return {"even": (2 * devices, devices, 3), "odd": (2 * devices, 7), "bare": (2 * devices,)}


@pytest.mark.parametrize("devices", DEVICES)
def test_slots_move_as_numpy_moves_them(mesh):
    devices, rng = mesh.size, np.random.default_rng(0)
    count = 2 * devices
    stack = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes(devices).items()}
    stack["flag"] = rng.random((count, devices)) < 0.5
    stack["count"] = rng.integers(0, 2**30, (count, 3)).astype(np.int32)
    indices = {
        "all": rng.permutation(count),
        "fewer": rng.integers(0, count, devices),
        "odd": np.arange(devices + 1),
    }
    indices = {name: index.astype(np.int32) for name, index in indices.items()}
    row = {name: leaf[0] + leaf[1] for name, leaf in stack.items()}

    def run(stack, indices, row):
        moved = {
            name: jax.tree.map(lambda leaf, index=index: stacked.permute(leaf, index), stack)
            for name, index in indices.items()
        }
        written = [stacked.overwrite(stack, row, jnp.asarray(when)) for when in (True, False)]
        floats = [leaf for leaf in jax.tree.leaves(stack) if stacked.averages(leaf)]
        return moved, written, stacked.pairwise_cosine(floats)

    moved, written, cosine = on(mesh, run, stack, indices, row)
    for name, index in indices.items():
        for leaf, whole in stack.items():
            np.testing.assert_array_equal(moved[name][leaf], whole[index], f"{name} {leaf}")
            assert moved[name][leaf].dtype == whole.dtype
    for leaf, whole in stack.items():
        np.testing.assert_array_equal(written[0][leaf], np.broadcast_to(row[leaf], whole.shape))
        np.testing.assert_array_equal(written[1][leaf], whole)
    floats = [stack[name] for name in ("even", "odd", "bare")]
    np.testing.assert_allclose(cosine, oracles.mean_pairwise_cosine(floats), atol=1e-6)


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("more", [-1, 1])
def test_of_a_stack_that_the_devices_do_not_divide_each_has_its_share(mesh, more):
    """It is held with rows that do not count, as the engine holds it; nothing is gathered."""
    devices, rng = mesh.size, np.random.default_rng(2)
    count = 3 * devices + more
    stack, new = stack_of(count), stack_of(2, 5)
    ids = np.asarray([count - 1, 0], np.int32)
    indices = [rng.permutation(count).astype(np.int32) for _ in stack]
    longer = rng.integers(0, count + 1, count + 2).astype(np.int32)  # the number `count` reads the last
    held, names = Held((count,) * len(stack), devices), list(stack)

    def run(stack, new, row, ids, indices, longer):
        stack = held.cut(stack)
        moved = stacked.permute_each([stack[name] for name in names], indices)
        made = {
            "taken": stacked.take_rows(stack, ids),
            "put": stacked.put_rows(stack, ids, new),
            "moved": dict(zip(names, moved, strict=True)),
            "longer": {name: stacked.permute(leaf, longer) for name, leaf in stack.items()},
            "over": stacked.overwrite(stack, row, jnp.asarray(True)),
        }
        return jax.tree.map(lambda leaf: stacked.filled_up(leaf, devices), made)

    spare = -count % devices
    grown = {name: np.concatenate([leaf, leaf[:1].repeat(spare, 0)]) for name, leaf in stack.items()}
    with jax.set_mesh(mesh):
        row = {name: leaf[0] for name, leaf in new.items()}
        given = jax.device_put(grown, placement.cut(mesh)), new, row, ids, indices, longer
        program = jax.jit(run, out_shardings=placement.cut(mesh)).lower(*given).compile()
        made = jax.device_get(program(*given))
    assert "all-gather" not in program.as_text()
    for name, index in zip(names, indices, strict=True):
        whole = stack[name]
        np.testing.assert_array_equal(made["taken"][name][:2], whole[ids])
        np.testing.assert_array_equal(made["put"][name][ids], new[name])
        np.testing.assert_array_equal(made["put"][name][1 : count - 1], whole[1:-1])
        np.testing.assert_array_equal(made["moved"][name][:count], whole[index])
        last = np.minimum(longer, count - 1)
        np.testing.assert_array_equal(made["longer"][name][: len(longer)], whole[last])
        over = np.broadcast_to(new[name][0], whole.shape)
        np.testing.assert_array_equal(made["over"][name][:count], over)


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize(("more", "given"), [(0, 1), (-1, 5)])
def test_of_every_pair_each_device_has_the_rows_of_its_own(mesh, more, given):
    """Also where the devices divide neither rows nor slots; whole stacks are nowhere."""
    devices, rng = mesh.size, np.random.default_rng(3)
    rows = rng.normal(size=(3 * devices + more, 4)).astype(np.float32)
    slots = rng.normal(size=(given, 4)).astype(np.float32)
    held = Held((len(rows),), devices)

    def run(rows, slots):
        apart = stacked.of_pairs(
            lambda one, block: jnp.abs(block - one[None]).sum(1), *held.cut([rows]), slots
        )
        return stacked.filled_up(apart, devices)

    grown = np.concatenate([rows, rows[: -len(rows) % devices]])
    with jax.set_mesh(mesh):
        whole = jax.device_put(grown, placement.cut(mesh))
        program = jax.jit(run, out_shardings=placement.cut(mesh)).lower(whole, slots).compile()
        made = np.asarray(program(whole, slots))[: len(rows)]
    assert "all-gather" not in program.as_text()
    np.testing.assert_allclose(made, np.abs(rows[:, None] - slots).sum(2), rtol=1e-6)


@pytest.mark.parametrize("devices", DEVICES)
def test_a_mean_over_devices_and_the_largest_of_what_has_none(mesh):
    """Three slots a device; of one device none counts, and of the largest values some do not."""
    devices, rng = mesh.size, np.random.default_rng(1)
    count = 3 * devices
    stack = {
        "w": rng.normal(size=(count, 2)).astype(np.float32),
        "half": rng.normal(size=(count, 2)).astype(np.float16),
        "batches": (2**24 + rng.permutation(count)).astype(np.int32),
        "below": -1 - rng.permutation(count).astype(np.int8),
        "byte": rng.integers(0, 256, (count, 2)).astype(np.uint8),
        "flag": np.arange(count)[:, None] == np.asarray([[1, count - 1]]),
    }
    weights = rng.integers(1, 9, count).astype(np.float32)
    weights[-3:] = 0  # the last device; it alone has the flag of the second column
    weights[np.argmax(stack["batches"])] = 0

    def share(stack, weights):
        one = jax.tree.map(lambda leaf: leaf[0], stack)
        total, weight = stacked.nothing(one), jnp.float32(0)
        for slot in range(3):  # as waves do
            part = jax.tree.map(lambda leaf, slot=slot: leaf[slot : slot + 1], stack)
            total = stacked.add(total, stacked.weighted_sum(part, weights[slot : slot + 1]))
            weight = weight + weights[slot]
        total, weight = stacked.over_devices(total, weight)
        mean = stacked.divided(total, weight, one)
        none = stacked.over_devices(stacked.nothing(one), jnp.float32(0))[0]
        return mean, weight, none

    own, same = P(stacked.AXIS), P()
    run = jax.shard_map(share, mesh=mesh, in_specs=own, out_specs=same, check_vma=False)
    mean, weight, none = on(mesh, run, stack, weights, cut=2)
    counted = weights > 0
    assert weight == weights.sum()
    assert {name: leaf.dtype for name, leaf in mean.items()} == {
        name: leaf.dtype for name, leaf in stack.items()
    }
    for name in ("w", "half"):
        wanted = np.average(stack[name].astype(np.float64), axis=0, weights=weights)
        np.testing.assert_allclose(mean[name], wanted, rtol=1e-5 if name == "w" else 1e-3, atol=1e-6)
    for name in ("batches", "below", "byte", "flag"):
        np.testing.assert_array_equal(mean[name], stack[name][counted].max(0), name)
    assert mean["flag"].tolist() == [True, False]
    assert (
        none["below"] == -128
        and none["byte"].tolist() == [0, 0]
        and not none["flag"].any()
        and none["w"][0] == 0
    )


@pytest.mark.parametrize("devices", DEVICES)
def test_what_is_placed_is_where_it_should_be(mesh):
    devices = mesh.size
    assert mesh.shape == {"clients": devices}
    assert list(mesh.devices.flat) == jax.devices()[:devices]
    array = np.arange(2 * devices * 3, dtype=np.float32).reshape(2 * devices, 3)
    cut = placement.put(array, placement.cut(mesh))
    for number, shard in enumerate(sorted(cut.addressable_shards, key=lambda shard: shard.index[0].start)):
        assert shard.device == mesh.devices.flat[number]
        np.testing.assert_array_equal(shard.data, array[2 * number : 2 * number + 2])
    placed = placement.put(array[1:], placement.replicated(mesh))
    assert placed.sharding.is_fully_replicated and len(placed.addressable_shards) == devices
    np.testing.assert_array_equal(placed, array[1:])


# Of three devices tests/runs/test_checkpoint.py has whole rounds as well, of both methods.
@pytest.mark.parametrize("devices", [pytest.param(3, id="on-3", marks=pytest.mark.slow), DEVICES[3]])
@pytest.mark.parametrize("algorithm", [Scaffold(), FedMR(similarity=False)], ids=["kept-by-clients", "slots"])
def test_a_round_is_the_same_on_one_device(mesh, algorithm):
    """Some of all clients, of unequal sizes, in waves of two with places left empty."""
    sizes = (12, 7, 20, 3, 31, 9, 1, 25, 14, 5, 17, 8, 2, 11, 6)
    runs = [
        oracles.simulate(sizes, algorithm=algorithm, cohort=7, devices=d, wave=w, epochs=1)
        for d, w in ((1, 1), (mesh.size, 2))
    ]
    for one in runs:
        oracles.run(one)
    one, many = (jax.tree.leaves(oracles.state_of(run)) for run in runs)
    for wanted, got in zip(one, many, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
