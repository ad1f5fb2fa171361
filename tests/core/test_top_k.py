"""The k largest against a stable sort in plain Python: ties, zeros of both signs, denormals, NaN."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_sim.core.top_k import top_k_mask

TINY = 1e-45  # the least float32 above zero
ODD = [0.0, -0.0, TINY, -TINY, 1e-40, 2e-40, 1.0, 1.0000001, -1.0, 3e38, -3e38, math.inf, -math.inf, math.nan]

one = jax.jit(top_k_mask)
side_by_side = jax.jit(jax.vmap(top_k_mask))
in_turn = jax.jit(lambda scores, counts: jax.lax.map(lambda pair: top_k_mask(*pair), (scores, counts)))


def wanted(scores: np.ndarray, count: int) -> np.ndarray:
    """By a stable sort of Python's own floats, largest first, NaN after all numbers."""
    values = [float(score) for score in scores]
    order = sorted(
        range(len(values)), key=lambda i: (True, 0) if math.isnan(values[i]) else (False, -values[i])
    )
    mask = np.zeros(len(values), bool)
    mask[order[:count]] = True
    return mask


def assert_selects(scores, count):
    scores = np.asarray(scores, np.float32)
    got = np.asarray(one(scores, np.int32(count)))
    assert got.dtype == bool
    np.testing.assert_array_equal(got, wanted(scores, count))


@settings(max_examples=60, deadline=None)
@given(
    scores=st.sampled_from([1, 2, 7, 16]).flatmap(
        lambda n: st.lists(st.sampled_from(ODD) | st.floats(-2, 2, width=16), min_size=n, max_size=n)
    ),
    share=st.floats(0, 1),
)
def test_it_is_a_stable_sorts_head(scores, share):
    assert_selects(scores, round(share * len(scores)))


@pytest.mark.parametrize("size", [33, 1000])
def test_every_kind_of_many_numbers(rng, size):
    for scores in (
        rng.normal(size=size),
        np.abs(rng.normal(size=size)) * 10.0 ** rng.integers(-44, 38, size),  # the whole range, denormals too
        rng.integers(-2, 3, size),  # many ties
        -rng.random(size),
        rng.choice(ODD, size),
        np.where(rng.random(size) < 0.9, 0, rng.random(size)),  # fewer than are wanted are above zero
        np.full(size, -0.0),
        np.full(size, np.nan),
    ):
        for count in (0, 1, size // 3, size // 2, size - 1, size):
            assert_selects(scores, count)


def test_of_equal_ones_those_that_come_first():
    np.testing.assert_array_equal(one(np.zeros(5, np.float32), np.int32(2)), [1, 1, 0, 0, 0])
    signs = np.array([-1.0, 0.0, -0.0, 0.0, 1.0], np.float32)
    np.testing.assert_array_equal(one(signs, np.int32(3)), [0, 1, 1, 0, 1])


def test_denormal_numbers_have_an_order_and_are_no_zeros():
    scores = np.array([0.0, 1e-40, TINY, -TINY, -0.0, 3e-40], np.float32)
    np.testing.assert_array_equal(one(scores, np.int32(2)), [0, 1, 0, 0, 0, 1])
    np.testing.assert_array_equal(one(scores, np.int32(5)), [1, 1, 1, 0, 1, 1])


def test_nan_is_the_least():
    scores = np.array([np.nan, -np.inf, np.nan, -3.0], np.float32)
    np.testing.assert_array_equal(one(scores, np.int32(2)), [0, 1, 0, 1])
    np.testing.assert_array_equal(one(scores, np.int32(3)), [1, 1, 0, 1])


def test_one_number():
    for value in ODD:
        for count in (0, 1):
            assert np.asarray(one(np.array([value], np.float32), np.int32(count))).tolist() == [bool(count)]


def test_side_by_side_and_in_turn_are_the_same(rng):
    """Rows of which one needs the choice among equals and another does not, each with a count of its own."""
    scores = np.stack(
        [rng.normal(size=40), np.zeros(40), rng.integers(0, 3, 40), rng.choice(ODD, 40), np.ones(40)]
    ).astype(np.float32)
    counts = np.array([13, 7, 20, 11, 40], np.int32)
    expected = np.stack([wanted(row, count) for row, count in zip(scores, counts, strict=True)])
    np.testing.assert_array_equal(side_by_side(scores, counts), expected)
    np.testing.assert_array_equal(in_turn(scores, counts), expected)
    shared = jax.jit(jax.vmap(top_k_mask, in_axes=(0, None)))(scores, jnp.int32(7))
    np.testing.assert_array_equal(shared, np.stack([wanted(row, 7) for row in scores]))
