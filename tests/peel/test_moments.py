"""Streamed class moments against NumPy in float64, and the laws that they keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_sim.probes.peel import moments
from tests.peel import reference


def made(seed, n=60, d=7, classes=4, offset=0.0, spread=1.0):
    draw = np.random.default_rng(seed)
    y = np.concatenate([np.arange(classes), draw.integers(0, classes, n - classes)]).astype(np.int32)
    centres = draw.normal(size=(classes, d))
    return (centres[y] + spread * draw.normal(size=(n, d)) + offset).astype(np.float32), y


of_batch = jax.jit(moments.of_batch, static_argnums=3)
merge = jax.jit(moments.merge)


def streamed(z, y, classes, batch):
    """Moments merged over batches, the last one padded with what must not count."""
    total = moments.empty(classes, z.shape[1:])
    for first in range(0, len(z), batch):
        part, label = z[first : first + batch], y[first : first + batch]
        spare = batch - len(part)
        mask = np.arange(batch) < len(part)
        part = np.concatenate([part, np.full((spare, z.shape[1]), 1e6, np.float32)])
        label = np.concatenate([label, np.zeros(spare, np.int32)])
        total = merge(total, of_batch([jnp.asarray(part)], jnp.asarray(label), mask, classes))
    return total


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1, 7, 60]), st.sampled_from([0.0, 100.0]))
def test_traces_agree_with_numpy_however_they_are_streamed(seed, batch, offset):
    """Also far from the origin, where sums of squares in float32 would have lost everything."""
    z, y = made(seed, offset=offset)
    got = streamed(z, y, 5, batch)  # the fifth class has no sample
    for balanced in (False, True):
        wanted = reference.traces(z.astype(np.float64), y, balanced)
        found = moments.traces(got, balanced=balanced)
        np.testing.assert_allclose(np.ravel(found[:2]), wanted[:2], rtol=1e-4)
        if not balanced:
            np.testing.assert_allclose(found.total[0], wanted[2], rtol=1e-4)
    np.testing.assert_allclose(moments.cdnv(got)[0], reference.cdnv(z.astype(np.float64), y), rtol=1e-3)


def test_a_collapsed_layer_keeps_its_small_variance():
    """Within-class variance a millionth of the total: to 1e-4 of itself."""
    z, y = made(3, spread=1e-3)
    wanted = reference.traces(z.astype(np.float64), y)
    got = moments.traces(streamed(z, y, 4, 16))
    np.testing.assert_allclose(got.within[0], wanted[0], rtol=1e-4)


def test_the_normalised_variances_ignore_scale():
    z, y = made(1)
    one, other = (moments.traces(streamed(factor * z, y, 4, 60)) for factor in (1.0, 37.0))
    np.testing.assert_allclose(one.within / one.total, other.within / other.total, rtol=1e-5)


def test_distances_and_cosines_of_class_means():
    z, y = made(5, offset=2.0)
    means = np.stack([z[y == c].mean(0) for c in range(4)]).astype(np.float64)
    (apart,), (cosine,) = moments.distances(streamed(z, y, 6, 20))
    wanted = ((means[:, None] - means[None]) ** 2).sum(-1)
    np.testing.assert_allclose(apart[:4, :4], wanted, rtol=1e-4, atol=1e-4)
    norms = np.linalg.norm(means, axis=1)
    np.testing.assert_allclose(cosine[:4, :4], means @ means.T / np.outer(norms, norms), atol=1e-5)
    assert not np.asarray(apart)[4:].any() and not np.asarray(cosine)[4:].any()


def test_the_nearest_mean_is_never_an_absent_class():
    z, y = made(2, offset=50.0)
    m = streamed(z, y, 9, 60)
    means = np.stack([z[y == c].mean(0) for c in range(4)])
    wanted = ((z[:, None] - means[None]) ** 2).sum(-1).argmin(1)
    assert (np.asarray(moments.nearest_mean(m, [jnp.asarray(z)]))[:, 0] == wanted).mean() > 0.98


@pytest.mark.parametrize("count", [0, 1])
def test_without_two_classes_what_compares_classes_is_not_defined(count):
    m = moments.of_batch([jnp.ones((3, 2))], jnp.zeros(3, jnp.int32), np.arange(3) < count, 4)
    assert np.isnan(moments.cdnv(m)) and np.isnan(moments.discrimination(m))
    assert all(value == 0 for value in moments.traces(m))


def test_merging_with_nothing_changes_nothing():
    z, y = made(4)
    m = streamed(z, y, 4, 60)
    for pair in ((m, moments.empty(4, [7])), (moments.empty(4, [7]), m)):
        jax.tree.map(np.testing.assert_array_equal, moments.merge(*pair), m)


def test_the_nearest_of_means_of_unequal_length():
    m = moments.of_batch([jnp.asarray([[0.0, 0.0], [4.0, 0.0]])], jnp.asarray([0, 1]), np.ones(2, bool), 2)
    z = jnp.asarray([[1.5, 3.0], [1.9, -9.0], [2.1, 9.0], [9.0, 0.0]])
    np.testing.assert_array_equal(moments.nearest_mean(m, [z])[:, 0], [0, 0, 1, 1])
    far = moments.of_batch([jnp.asarray([[1.0], [-1.0], [9.0]])], jnp.asarray([0, 0, 1]), np.ones(3, bool), 2)
    np.testing.assert_array_equal(moments.nearest_mean(far, [jnp.asarray([[4.4], [4.6]])])[:, 0], [0, 1])
    three = jnp.asarray([[0.0], [1.0], [9.0]])
    m = moments.of_batch([three], jnp.asarray([0, 1, 2]), np.ones(3, bool), 3)
    np.testing.assert_array_equal(
        moments.nearest_mean(m, [jnp.asarray([[4.9], [5.1], [0.6], [0.4]])])[:, 0], [1, 2, 1, 0]
    )


def test_means_that_oppose_each_other_discriminate_beyond_one():
    m = moments.of_batch([jnp.asarray([[1.0, 0.0], [-2.0, 0.0]])], jnp.asarray([0, 1]), np.ones(2, bool), 3)
    assert moments.discrimination(m) == pytest.approx(2)


def test_layers_side_by_side_are_each_what_they_are_alone():
    """Of widths that fill whole blocks or not; what is infinite in one layer leaves the others alone."""
    draw = np.random.default_rng(7)
    y = jnp.asarray(draw.integers(0, 4, 30), jnp.int32)
    features = [jnp.asarray(draw.normal(size=(30, d)) + d, jnp.float32) for d in (3, 32, 70)]
    features.append(jnp.full((30, 2), jnp.inf))
    mask = np.arange(30) < 27
    both = moments.of_batch(features, y, mask, 4)
    both = moments.merge(both, moments.of_batch([2 * z for z in features], y, mask, 4))
    found = {name: getattr(moments, name)(both) for name in ("cdnv", "discrimination")}
    nearest = moments.nearest_mean(both, features)
    for layer, z in enumerate(features[:3]):
        own = moments.merge(*(moments.of_batch([factor * z], y, mask, 4) for factor in (1, 2)))
        for got, wanted in zip(moments.traces(both), moments.traces(own), strict=True):
            np.testing.assert_allclose(got[layer], wanted[0], rtol=1e-6)
        for name, got in found.items():
            np.testing.assert_allclose(got[layer], getattr(moments, name)(own)[0], rtol=1e-5)
        np.testing.assert_array_equal(nearest[:, layer], moments.nearest_mean(own, [z])[:, 0])
        np.testing.assert_array_equal(both.means()[layer], own.means()[0])


def test_means_alone_and_layers_side_by_side_are_those_of_all():
    z, y = made(6, d=40)
    mask = np.arange(len(z)) < 50
    parts = [jnp.asarray(z[:, :33]), jnp.asarray(z[:, 33:])]
    whole = of_batch(parts, jnp.asarray(y), mask, 5)
    alone = moments.means_of_batch(parts, jnp.asarray(y), mask, 5)
    np.testing.assert_allclose(alone.mean, whole.mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(alone.count, whole.count)
    assert not np.asarray(alone.scatter).any()
    one, other = (of_batch([part], jnp.asarray(y), mask, 5) for part in parts)
    joined = moments.side_by_side(one, other)
    assert joined.layers == whole.layers
    np.testing.assert_allclose(joined.mean, whole.mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(joined.scatter, whole.scatter, rtol=1e-5)
