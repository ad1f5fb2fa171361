"""Principal angles between features and the next weights, against SVDs in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim.probes.peel import alignment
from tests.peel import reference


def cosines(kernel, means, r):
    weights = alignment.kernel_basis(jnp.asarray(kernel, jnp.float32), len(means))
    features = alignment.basis(alignment.means_matrix(jnp.asarray(means, jnp.float32)))
    values, rank = alignment.cosines(*alignment.overlap(weights, features, len(means)), jnp.int32(r))
    return np.asarray(values), int(rank)


@pytest.mark.parametrize(
    ("kernel", "means"),
    [((40, 12), (5, 40)), ((12, 40), (5, 12)), ((3, 3, 8, 16), (5, 6, 6, 8)), ((5, 5, 20, 4), (5, 2, 2, 20))],
    ids=str,
)
def test_cosines_agree_with_numpy(kernel, means):
    draw = np.random.default_rng(0)
    w, m = draw.normal(size=kernel), draw.normal(size=means) + 1.0
    for r in (1, 3, 5):
        got, rank = cosines(w, m, r)
        assert rank == r and not got[r:].any()
        np.testing.assert_allclose(got[:r], reference.principal_cosines(w, m, r), atol=1e-3)


def test_weights_that_are_the_class_means_are_aligned_at_any_scale():
    means = np.random.default_rng(1).normal(size=(4, 30))
    for factor in (1e-3, 1.0, 1e3):
        got, rank = cosines(factor * means.T, means, 4)
        assert rank == 4
        np.testing.assert_allclose(got, 1, atol=1e-5)


def test_a_1x1_convolution_on_one_pixel_is_a_dense_layer():
    draw = np.random.default_rng(2)
    kernel, means = draw.normal(size=(10, 6)), draw.normal(size=(3, 10))
    dense = cosines(kernel, means, 3)[0]
    np.testing.assert_allclose(cosines(kernel[None, None], means[:, None, None], 3)[0], dense, atol=1e-5)


def test_the_dimension_is_no_more_than_the_rank():
    """Two of four means are the same: their span has three dimensions; a zero kernel has none."""
    draw = np.random.default_rng(3)
    means = draw.normal(size=(4, 12))
    means[3] = means[2]
    assert cosines(draw.normal(size=(12, 9)), means, 4)[1] == 3
    assert cosines(np.zeros((12, 9)), means, 4)[1] == 0


def test_a_wide_kernel_has_the_rank_of_what_it_is_made_of():
    """Rank 2 and 3 of 8 channels, exactly and but for float32's rounding; more classes than that."""
    draw = np.random.default_rng(4)
    means = draw.normal(size=(5, 6, 6, 8))
    once = np.concatenate([draw.normal(size=(3, 3, 2, 16)), np.zeros((3, 3, 6, 16))], 2)
    mixed = np.einsum("hwcf,dc->hwdf", draw.normal(size=(3, 3, 3, 16)), draw.normal(size=(8, 3)))
    for kernel, rank in ((once, 2), (mixed, 3), (1e-6 * mixed, 3), (np.zeros_like(mixed), 0)):
        got, r = cosines(kernel, means, 5)
        assert r == rank
        np.testing.assert_allclose(got[:r], reference.principal_cosines(kernel, means, r), atol=1e-4)


def test_a_tall_kernel_has_the_leading_vectors_of_its_decomposition():
    """More columns than are wanted: from products of columns, at whatever scale, and with its rank."""
    draw = np.random.default_rng(7)
    means = draw.normal(size=(5, 60))
    kernel = draw.normal(size=(60, 40)) * np.linspace(2, 0.2, 40)
    flat = draw.normal(size=(60, 3)) @ draw.normal(size=(3, 40))
    for matrix, rank in ((kernel, 5), (1e-5 * kernel, 5), (flat, 3)):
        got, r = cosines(matrix, means, 5)
        assert r == rank
        np.testing.assert_allclose(got[:r], reference.principal_cosines(matrix, means, r), atol=1e-4)


def test_chance_is_what_the_method_sheet_simulated():
    for (d, r), wanted in {(32, 7): 0.40, (64, 10): 0.34, (512, 10): 0.12}.items():
        assert alignment.chance(d, r) == pytest.approx(wanted, abs=0.015)
    assert alignment.chance(4, 4) == 1.0 and np.isnan(alignment.corrected(1.0, 4, 4))
    assert np.isnan(alignment.corrected(0.0, 4, 0))
    assert (
        alignment.corrected(alignment.chance(64, 10), 64, 10) == 0.0
        and alignment.corrected(1.0, 64, 10) == 1.0
    )
