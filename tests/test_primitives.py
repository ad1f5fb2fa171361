"""What moves rows and slots between devices, on 2 to 6 of them, with sizes that coincide in nothing.

Four devices are there in a run of the tests; the cases of five and six run in a process that has six.
"""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim import placement, stacked

DEVICES = [pytest.param(count, id=f"on-{count}") for count in (2, 3, 4, 5, 6)]


@pytest.fixture
def mesh(devices):
    if devices > jax.device_count():
        pytest.skip(f"needs {devices} devices: see test_five_and_six_devices")
    return placement.make_mesh(devices)


def test_five_and_six_devices():
    if jax.device_count() >= 6:
        pytest.skip("they are here")
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": "6", "JAX_PLATFORMS": "cpu"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n0",
        "-p",
        "no:cacheprovider",
        __file__,
        "-k",
        "on-5 or on-6",
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
            lambda leaf: jax.device_put(leaf, placement.sharded(mesh, leaf.shape[0])), tree
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
