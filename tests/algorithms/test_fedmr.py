"""FedMR: the lemma, the units that move, the controls that it must equal."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_sim import models
from fedjax_sim.algorithms import FedAvg, FedIndep, FedMR
from fedjax_sim.algorithms.fedmr import group_of, permutations, recombine, similarity
from fedjax_sim.core import stacked
from tests import oracles
from tests.engine.test_round import poisoned

LENET = models.create("lenet", (32, 32, 3), 10)
RESNET = models.create("resnet20", (32, 32, 3), 10)
SIZES = (12, 7, 20, 3, 31)


# --- the lemma ------------------------------------------------------------------------------------------


def deal(stack, groups, key):
    count = jax.tree.leaves(stack)[0].shape[0]
    return recombine(stack, groups, permutations(groups, count, key))


_deal = jax.jit(deal, static_argnums=1)
_dispersion = jax.jit(stacked.dispersion)


class _Groups(dict):
    """A group table that can be a static argument."""

    def __hash__(self):  # type: ignore[override]
        return hash(tuple(sorted(self.items())))


@settings(max_examples=25, deadline=None)
@given(
    slots=st.sampled_from([1, 2, 3, 7]),
    tied=st.booleans(),
    key=st.integers(0, 2**31 - 1),
    seed=st.integers(0, 1000),
)
def test_recombination_keeps_multiset_mean_distances_and_dispersion(slots, tied, key, seed):
    draw = np.random.default_rng(seed)
    shapes = {
        ("params", "a", "kernel"): (2, 3),
        ("params", "a", "bias"): (3,),
        ("batch_stats", "a", "mean"): (),
    }
    flat = {path: draw.normal(size=(slots, *shape)).astype(np.float32) for path, shape in shapes.items()}
    groups = _Groups({path: 0 if tied else n for n, path in enumerate(shapes)})
    before = traverse_util.unflatten_dict(flat)
    after = jax.device_get(_deal(before, groups, jax.random.key(key)))
    moved = traverse_util.flatten_dict(after)
    for path, leaf in flat.items():
        rows = lambda stack: sorted(slot.tobytes() for slot in stack)  # noqa: E731
        assert rows(moved[path]) == rows(leaf)
        np.testing.assert_allclose(moved[path].mean(0), leaf.mean(0), rtol=1e-5, atol=1e-6)
        x = draw.normal(size=leaf.shape[1:])
        distance = lambda stack, x=x: ((stack.astype(np.float64) - x) ** 2).sum()  # noqa: E731
        assert distance(moved[path]) == pytest.approx(distance(leaf), rel=1e-12)
    spread = [float(_dispersion(stack)) for stack in (after, before)]
    assert spread[0] == pytest.approx(spread[1], rel=1e-4, abs=1e-5)


def _indices(groups, slots, keys):
    """i64[len(keys), leaves, slots]: which slot each place of each leaf came from."""
    stack = traverse_util.unflatten_dict(
        {path: jnp.tile(jnp.arange(slots, dtype=jnp.int32)[:, None], (1, 2)) for path in groups}
    )
    out = jax.jit(jax.vmap(lambda key: deal(stack, groups, key)))(jax.random.split(jax.random.key(0), keys))
    flat = traverse_util.flatten_dict(out)
    return np.stack([np.asarray(flat[path])[..., 0] for path in groups], 1)


def test_permutations_are_uniform_with_the_identity_among_them_and_independent():
    drawn = _indices({("params", "a"): 0, ("params", "b"): 1}, 3, 3600)
    codes = np.unique(drawn.reshape(-1, 3), axis=0, return_inverse=True)[1].reshape(3600, 2)
    for column in codes.T:
        seen = np.bincount(column, minlength=6)
        assert len(seen) == 6
        assert ((seen - 600) ** 2 / 600).sum() < 20.5  # chi-square, 5 degrees of freedom, 0.999 quantile
    pairs = np.bincount(codes[:, 0] * 6 + codes[:, 1], minlength=36)
    assert ((pairs - 100) ** 2 / 100).sum() < 66.6  # 35 degrees of freedom
    assert (drawn == np.arange(3)).all(-1).any()


def test_leaves_of_one_group_move_together_and_those_of_two_do_not():
    drawn = _indices({("params", "a"): 0, ("params", "b"): 1, ("params", "c"): 0}, 5, 20)
    np.testing.assert_array_equal(drawn[:, 0], drawn[:, 2])
    assert (drawn[:, 0] != drawn[:, 1]).any(-1).mean() > 0.9


# --- which leaves move as one ---------------------------------------------------------------------------


def _parts(model, *args):
    groups = group_of(model.layer_order(), *args)
    return [{path for path, g in groups.items() if g == number} for number in range(max(groups.values()) + 1)]


def test_network_order_is_that_of_a_state_dict():
    """Module by module as the network has them; in a module the weights, then the running statistics."""
    walk = list(group_of(LENET.layer_order(), "tensor"))
    layers = ("conv1", "conv2", "fc1", "fc2", "fc3")
    assert walk == [("params", layer, leaf) for layer in layers for leaf in ("kernel", "bias")]
    walk = list(group_of(RESNET.layer_order(), "tensor"))
    norm = [("params", "scale"), ("params", "bias"), ("batch_stats", "mean"), ("batch_stats", "var")]
    expected = [("params", "conv1", "kernel")]
    for stage in (1, 2, 3):
        for block in (0, 1):
            name = f"stage{stage}_block{block}"
            for i in (1, 2, 3):
                expected += [(collection, name, f"norm{i}", leaf) for collection, leaf in norm]
                expected += [("params", name, f"conv{i}", "kernel")]
            if block == 0:
                expected += [("params", name, "shortcut", "kernel")]
    expected += [(collection, "unused_norm", leaf) for collection, leaf in norm]
    expected += [("params", "fc", "kernel"), ("params", "fc", "bias")]
    assert walk == expected


def test_numbers_follow_the_network():
    for granularity in ("tensor", "module", "block", "model"):
        numbers = list(group_of(RESNET.layer_order(), granularity).values())
        assert numbers[0] == 0
        assert set(numbers) == set(range(max(numbers) + 1))


def test_tensor_is_the_codes_unit():
    assert [len(part) for part in _parts(LENET, "tensor")] == [1] * 10
    assert [len(part) for part in _parts(RESNET, "tensor")] == [1] * 100


def test_module_keeps_a_layer_together():
    assert [{path[1] for path in part} for part in _parts(LENET, "module")] == [
        {"conv1"}, {"conv2"}, {"fc1"}, {"fc2"}, {"fc3"}
    ]  # fmt: skip
    apart = _parts(RESNET, "module", 0.25, "apart")
    tied = _parts(RESNET, "module", 0.25, "tied")
    # 22 kernels of convolutions, 19 norms, 1 classifier; apart: 38 statistics each on its own.
    assert len(tied) == 22 + 19 + 1
    assert len(apart) == len(tied) + 38
    norm = {(c, "stage1_block0", "norm1", leaf) for c, leaf in (("params", "scale"), ("params", "bias"))}
    assert norm in apart
    assert norm | {("batch_stats", "stage1_block0", "norm1", leaf) for leaf in ("mean", "var")} in tied


def test_tied_statistics_with_tensors_tie_the_norm_and_nothing_else():
    parts = _parts(RESNET, "tensor", 0.25, "tied")
    assert sorted(len(part) for part in parts) == [1] * (22 + 2) + [4] * 19


@pytest.mark.parametrize("model", [LENET, RESNET], ids=["lenet", "resnet20"])
@pytest.mark.parametrize("p", [0.1, 0.25, 0.3, 0.5, 1.0])
def test_blocks_are_those_of_the_authors_walk(model, p):
    """A new permutation whenever the running index reaches p·n·c, c permutations drawn so far."""
    numbers = list(group_of(model.layer_order(), "block", p).values())
    drawn, expected = 0, []
    for index in range(len(numbers)):
        if index >= p * len(numbers) * drawn:
            drawn += 1
        expected.append(drawn - 1)
    assert numbers == expected
    assert numbers == sorted(numbers)
    assert max(numbers) + 1 == math.ceil(1 / p)


def test_a_quarter_is_four_blocks_and_one_is_the_whole_model():
    assert list(group_of(LENET.layer_order(), "block", 0.25).values()) == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]
    assert set(group_of(LENET.layer_order(), "block", 1.0).values()) == {0}
    assert set(group_of(RESNET.layer_order(), "model").values()) == {0}


# --- similarity -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [1, 5, 100])
def test_the_similarity_probe(group, rng):
    order = LENET.layer_order()
    small = {path: rng.normal(size=(4, 3, 2)).astype(np.float32) for path in order}
    parts = [list(small.values())[start : start + group] for start in range(0, len(order), group)]
    wanted = np.mean([oracles.mean_pairwise_cosine(part) for part in parts])
    stack = jax.tree.map(jnp.asarray, traverse_util.unflatten_dict(small))
    got = similarity(stack, order, group)
    assert float(got) == pytest.approx(wanted, abs=1e-6)


# --- what it must equal ---------------------------------------------------------------------------------


def _final(algorithm, sizes=SIZES, **keywords):
    simulation = oracles.simulate(sizes, algorithm=algorithm, **{"momentum": 0.5, **keywords})
    oracles.run(simulation)
    return simulation


@pytest.mark.parametrize("wave", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_first_stage_without_end_is_uniform_fedavg_bit_for_bit(wave):
    keywords = {"cohort": 3, "rounds": 3, "wave": wave, "devices": 2}
    recombined = _final(FedMR(first_stage=3), **keywords)
    averaged = _final(FedAvg(weights="uniform"), **keywords)
    oracles.assert_trees_equal(recombined.variables, averaged.variables)
    shorter = _final(FedMR(first_stage=1), **keywords)
    assert oracles.far_apart(shorter.variables, averaged.variables) > 1e-4


def test_in_the_first_stage_a_client_that_is_left_out_is_in_no_mean():
    finals = []
    for algorithm in (FedMR(first_stage=2), FedAvg(weights="uniform")):
        simulation = poisoned(algorithm, non_finite="skip", cohort=4, rounds=2)
        rows = oracles.run(simulation)
        assert [row.client for row in rows if row.metric == "left_out"] == [2, 2]
        finals.append(jax.device_get(simulation.variables))
    oracles.assert_trees_close(*finals, atol=1e-6)


@pytest.mark.slow
def test_one_slot_is_fedavg_with_one_client():
    one = _final(FedMR(), cohort=1, rounds=3)
    other = _final(FedAvg(weights="uniform"), cohort=1, rounds=3)
    oracles.assert_trees_equal(one.variables, other.variables)


def test_whole_models_that_change_places_are_fedindep():
    """After a round the same models, in another order perhaps, and the same mean, bit for bit."""
    moved = _final(FedMR(granularity="model"), rounds=1).state.algorithm
    stayed = _final(FedIndep(), rounds=1).state.algorithm
    oracles.assert_trees_equal(moved.mean, stayed.mean)
    rows = [
        sorted(
            np.concatenate([np.asarray(leaf)[k].ravel() for leaf in jax.tree.leaves(state.slots)]).tobytes()
            for k in range(5)
        )
        for state in (moved, stayed)
    ]
    assert rows[0] == rows[1]
    assert len(set(rows[0])) == 5


@pytest.mark.smoke
def test_identical_clients_make_recombination_invisible():
    dataset, partition = oracles.world((8,))
    same = oracles.Partition(partition.train * 3)
    local = {"given": (dataset, same), "batch_size": 8, "rounds": 3}
    one = _final(FedMR(), **local)
    other = _final(FedAvg(), **local)
    oracles.assert_trees_close(one.variables, other.variables, atol=1e-6)
