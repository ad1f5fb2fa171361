"""Closed-form probes, ranks and CKA against their definitions in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim.probes.peel import linear_probes
from tests.peel import reference


def streamed(x, y, batch):
    total = linear_probes.empty(x.shape[1], y.shape[1])
    for first in range(0, len(x), batch):
        a, b = x[first : first + batch], y[first : first + batch]
        spare = ((0, batch - len(a)), (0, 0))
        mask = jnp.arange(batch) < len(a)
        a, b = (jnp.asarray(np.pad(v, spare, constant_values=9e4), jnp.float32) for v in (a, b))
        total = linear_probes.merge(total, linear_probes.of_batch(a, b, mask))
    return total


@pytest.mark.parametrize("batch", [11, 50, 200])
def test_comoments_are_those_of_numpy(batch):
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(120, 6)) + 30, draw.normal(size=(120, 4)) - 5
    got = streamed(x, y, batch)
    dx, dy = x - x.mean(0), y - y.mean(0)
    for found, wanted in ((got.xx, dx.T @ dx), (got.yy, dy.T @ dy), (got.xy, dx.T @ dy)):
        np.testing.assert_allclose(found, wanted, atol=2e-3)
    assert got.count == 120


@pytest.mark.parametrize("seed", range(4))
def test_the_ridge_probe_predicts_what_the_plain_system_does(seed):
    draw = np.random.default_rng(seed)
    y = draw.integers(0, 5, 300)
    centres = draw.normal(size=(5, 20))
    z = (centres[y] + 1.5 * draw.normal(size=(300, 20)) + 10).astype(np.float32)
    z[:, 3] = 7.0  # a constant feature must do no harm
    probe = linear_probes.ridge(streamed(z[:200], np.eye(5)[y[:200]], 64))
    got = np.asarray(linear_probes.predict(probe, jnp.asarray(z[200:])))
    wanted = reference.ridge_guess(z[:200].astype(np.float64), y[:200], z[200:].astype(np.float64), 5)
    assert (got != wanted).sum() <= 1


def test_cka_agrees_with_its_definition_and_ignores_rotation_and_scale():
    draw = np.random.default_rng(1)
    x = draw.normal(size=(80, 6))
    y = x @ draw.normal(size=(6, 3)) + draw.normal(size=(80, 3))
    assert linear_probes.linear_cka(streamed(x, y, 32)) == pytest.approx(reference.linear_cka(x, y), abs=1e-5)
    turned = 3.0 * x @ np.linalg.qr(draw.normal(size=(6, 6)))[0]
    assert linear_probes.linear_cka(streamed(x, turned, 80)) == pytest.approx(1.0, abs=1e-5)
    flat = np.ones((80, 2))
    assert (
        linear_probes.linear_cka(streamed(flat, flat, 80)) == 1
        and linear_probes.linear_cka(streamed(x, flat, 80)) == 0
    )


def test_ranks():
    vectors = np.linalg.qr(np.random.default_rng(2).normal(size=(5, 5)))[0]
    covariance = (vectors * [9.0, 4.0, 1.0, 1e-9, 0.0]) @ vectors.T
    numerical, stable = linear_probes.ranks(jnp.asarray(covariance, jnp.float32))
    assert numerical == 3 and stable == pytest.approx(14 / 9, rel=1e-4)
    assert linear_probes.ranks(jnp.zeros((3, 3))) == (0, 0)


def test_the_ridge_probe_is_the_plain_systems_solution(rng):
    """Standardised features and a column of ones, all penalised by n / 100, in float64."""
    z, y = rng.normal(size=(40, 5)) * [1, 2, 3, 4, 5] + 6, np.eye(3)[rng.integers(0, 3, 40)]
    probe = linear_probes.ridge(streamed(z, y, 16))
    columns = np.concatenate([(z - z.mean(0)) / z.std(0), np.ones((40, 1))], 1)
    wanted = np.linalg.solve(columns.T @ columns + 0.01 * 40 * np.eye(6), columns.T @ y)
    np.testing.assert_allclose(probe.weights, wanted[:-1], atol=1e-4)
    np.testing.assert_allclose(probe.bias, wanted[-1], atol=1e-5)


def test_the_numerical_rank_counts_singular_values_and_not_their_squares():
    """Of 1, 0.01 and 0.0003 two are above a thousandth of the largest."""
    numerical, stable = linear_probes.ranks(jnp.diag(jnp.asarray([1e-4, 9e-8, 1.0])))
    assert numerical == 2
    assert stable == pytest.approx(1.0001, abs=1e-5)
