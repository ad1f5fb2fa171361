"""Operations on stacked pytrees against NumPy, and what a sharded permutation compiles to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fedjax_sim.core import stacked
from fedjax_sim.engine import placement
from tests import oracles


@pytest.fixture
def tree(rng):
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return {"a": draw(5, 3, 2), "b": draw(5), "c": {"d": draw(5, 4)}}


def test_broadcast_repeats_one_model(tree):
    out = stacked.broadcast(tree, 3)
    assert out["a"].shape == (3, 5, 3, 2)
    for k in range(3):
        oracles.assert_trees_equal(jax.tree.map(lambda leaf, k=k: leaf[k], out), tree)


def test_weighted_sum_and_mean(tree, rng):
    weights = rng.random(5).astype(np.float32)
    got = stacked.weighted_sum(tree, jnp.asarray(weights))
    wanted = oracles.map_trees(lambda leaf: np.einsum("k...,k->...", leaf, weights), oracles.doubled(tree))
    oracles.assert_trees_close(got, wanted, atol=1e-6)
    oracles.assert_trees_close(
        stacked.mean(tree), oracles.map_trees(lambda leaf: leaf.mean(0), oracles.doubled(tree)), atol=1e-6
    )


def test_select_takes_whole_slots(tree):
    flags = np.array([True, False, False, True, False])
    other = jax.tree.map(lambda leaf: leaf + 1, tree)
    out = stacked.where_slot(jnp.asarray(flags), tree, other)
    for k, flag in enumerate(flags):
        source = tree if flag else other
        oracles.assert_trees_equal(
            jax.tree.map(lambda leaf, k=k: leaf[k], out), jax.tree.map(lambda leaf, k=k: leaf[k], source)
        )


def test_norms_cosine_and_dispersion(tree):
    leaves = jax.tree.leaves(tree)
    flat = np.concatenate([np.asarray(leaf, np.float64).reshape(5, -1) for leaf in leaves], 1)
    np.testing.assert_allclose(stacked.squared_norms(tree), (flat**2).sum(1), rtol=1e-5)
    np.testing.assert_allclose(
        stacked.pairwise_cosine(leaves), oracles.mean_pairwise_cosine(leaves), atol=1e-6
    )
    np.testing.assert_allclose(stacked.dispersion(tree), oracles.dispersion(leaves), rtol=1e-5)


def test_cosine_of_one_slot_and_of_zeros_is_one_and_of_opposites_minus_one():
    assert stacked.pairwise_cosine([jnp.ones((1, 4))]) == 1
    assert stacked.pairwise_cosine([jnp.zeros((3, 4))]) == 1
    assert stacked.pairwise_cosine([jnp.asarray([[1.0, 2.0], [-2.0, -4.0]])]) == pytest.approx(-1)
    two_zeros = [jnp.asarray([[0.0, 0.0], [3.0, 0.0], [0.0, 2.0], [0.0, 0.0]])]
    assert stacked.pairwise_cosine(two_zeros) == pytest.approx(10 / 12)  # all pairs but that of the other two


def test_cosine_of_many_nearly_orthogonal_slots_is_small_and_right(rng):
    """Of 2,560 slots, as a matrix of all pairs in float64 has it."""
    leaves = [jnp.asarray(rng.normal(size=(2560, *shape)), jnp.float32) for shape in ((40,), (3, 5))]
    flat = np.concatenate([np.asarray(leaf, np.float64).reshape(2560, -1) for leaf in leaves], 1)
    directions = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    wanted = ((directions @ directions.T).sum() - 2560) / (2560 * 2559)
    assert abs(wanted) < 1e-3
    np.testing.assert_allclose(stacked.pairwise_cosine(leaves), wanted, atol=1e-6)


def test_cosine_of_slots_that_hardly_differ_is_as_sure_as_they_differ(rng):
    """As after FedMR's later rounds: 1 − cosine is 1e-5, and has five digits."""
    slots = jnp.asarray(rng.normal(size=(1, 9000)) + 3e-3 * rng.normal(size=(10, 9000)), jnp.float32)
    wanted = 1 - oracles.mean_pairwise_cosine([np.asarray(slots)])
    assert 5e-6 < wanted < 2e-5
    np.testing.assert_allclose(1 - stacked.pairwise_cosine([slots]), wanted, atol=1e-7)


# --- permute --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 12), (8, 3, 4), (8, 3, 2, 2), (8, 5), (8,), (6, 12), (8, 1)])
@pytest.mark.parametrize("devices", [1, 2, 4])
def test_permute_is_a_gather_of_slots_on_any_mesh(shape, devices, rng):
    """Also where the axis or the leaf cannot be cut evenly, and for an index of another length."""
    leaf = rng.normal(size=shape).astype(np.float32)
    mesh = placement.make_mesh(devices)
    for length in (shape[0], shape[0] + 4):
        index = rng.integers(0, shape[0], length).astype(np.int32)
        with jax.set_mesh(mesh):
            even = shape[0] % devices == 0
            given = jax.device_put(leaf, placement.cut(mesh) if even else placement.replicated(mesh))
            # Left to itself XLA cuts six slots over two of four devices, for which newer JAX has no name.
            wanted = None if even else placement.replicated(mesh)
            out = jax.jit(stacked.permute, out_shardings=wanted)(given, index)
        np.testing.assert_array_equal(out, leaf[index])


def test_the_index_one_past_the_last_slot_means_an_empty_place():
    """An empty place of a plan holds the number K; whatever it reads must exist."""
    leaf = jnp.arange(6.0).reshape(3, 2)
    np.testing.assert_array_equal(stacked.permute(leaf, jnp.asarray([0, 3])), leaf[np.array([0, 2])])


@pytest.mark.parametrize("shape", [(8, 64), (8, 4, 4, 4)])
def test_a_sharded_permutation_moves_the_sharding_and_gathers_nothing(shape):
    mesh = placement.make_mesh(4)
    own = NamedSharding(mesh, P(stacked.AXIS))
    leaf = jax.device_put(np.zeros(shape, np.float32), own)
    index = jax.device_put(np.arange(8, dtype=np.int32)[::-1].copy(), placement.replicated(mesh))
    with jax.set_mesh(mesh):
        moved = jax.jit(stacked.permute, out_shardings=own).lower(leaf, index).compile().as_text()
        plain = jax.jit(lambda x, i: x[i], out_shardings=own).lower(leaf, index).compile().as_text()
    assert "all-to-all" in moved
    assert "all-gather" not in moved
    # What it is measured against: the plain gather brings all slots to every device, one way or another.
    assert "all-gather" in plain or "all-reduce" in plain


def test_a_large_leaf_is_permuted_in_strips(monkeypatch):
    """However the columns fall into strips, it is a plain gather."""
    rng = np.random.default_rng(0)
    for size, strip in [(12, 4), (13, 4), (40, 7), (9, 1)]:
        monkeypatch.setattr(stacked, "_STRIP", 3 * strip)
        leaf, index = rng.normal(size=(3, size)).astype(np.float32), rng.permutation(3)
        got = jax.jit(lambda x, i: stacked.permute(x, i))(leaf, index)
        np.testing.assert_array_equal(got, leaf[index])


def test_the_mean_keeps_dtypes_and_takes_the_largest_of_what_has_none():
    """A slot without weight does not count; norms are of floats alone."""
    tree = {
        "w": jnp.asarray([[1.0, 2.0], [5.0, 4.0], [9.0, 9.0]]),
        "half": jnp.asarray([1.0, 3.0, 9.0], jnp.bfloat16),
        "pair": jnp.asarray([2j, 4.0, 9.0], jnp.complex64),
        "count": jnp.asarray([2**24 + 1, -3, 2**30], jnp.int32),
        "flag": jnp.asarray([[False, True], [False, False], [True, True]]),
    }
    mean = stacked.mean(tree, jnp.asarray([0.5, 0.5, 0.0]))
    wanted = {"w": [3.0, 3.0], "half": 2.0, "pair": 2 + 1j, "count": 2**24 + 1, "flag": [False, True]}
    for name, leaf in mean.items():
        assert leaf.dtype == tree[name].dtype
        np.testing.assert_array_equal(leaf, wanted[name])
    assert stacked.mean(tree)["count"] == 2**30
    del tree["pair"], tree["half"]
    floats = {"w": tree["w"]}
    np.testing.assert_array_equal(stacked.squared_norms(tree), stacked.squared_norms(floats))
    np.testing.assert_array_equal(stacked.dispersion(tree), stacked.dispersion(floats))
