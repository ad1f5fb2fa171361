"""Closed-form probes, ranks and CKA against their definitions in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim.probes.peel import linear_probes
from tests.peel import reference


def padded(x, spare=3):
    """With rows at the end that are no samples: (f32[n + spare, p], bool[n + spare])."""
    rows = np.pad(x, ((0, spare), (0, 0)), constant_values=9e4)
    return jnp.asarray(rows, jnp.float32), jnp.arange(len(rows)) < len(x)


def scores_of(x, y, new):
    (x, mask), (y, _) = padded(x), padded(y)
    return np.asarray(linear_probes.ridge_scores(x, y, mask, jnp.asarray(new, jnp.float32)))


@pytest.mark.parametrize("width", [20, 300])  # fewer features than samples, and more
@pytest.mark.parametrize("seed", range(2))
def test_the_ridge_probe_predicts_what_the_plain_system_does(seed, width):
    draw = np.random.default_rng(seed)
    y = draw.integers(0, 5, 300)
    centres = draw.normal(size=(5, width))
    z = (centres[y] + 1.5 * draw.normal(size=(300, width)) + 10).astype(np.float32)
    z[:, 3] = 7.0  # a constant feature must do no harm
    got = scores_of(z[:200], np.eye(5)[y[:200]], z[200:]).argmax(1)
    wanted = reference.ridge_guess(z[:200].astype(np.float64), y[:200], z[200:].astype(np.float64), 5)
    assert (got != wanted).sum() <= 1


def cka(x, y):
    (x, mask), (y, _) = padded(x), padded(y)
    itself, other = linear_probes.linear_cka(jnp.stack([x, y]), mask)
    assert itself == 1
    return float(other)


@pytest.mark.parametrize("width", [6, 120])
def test_cka_agrees_with_its_definition_and_ignores_rotation_and_scale(width):
    draw = np.random.default_rng(1)
    x = draw.normal(size=(80, width))
    y = np.pad(x @ draw.normal(size=(width, 3)) + draw.normal(size=(80, 3)), ((0, 0), (0, width - 3)))
    assert cka(x, y) == pytest.approx(reference.linear_cka(x, y[:, :3]), abs=1e-5)
    turned = 3.0 * x @ np.linalg.qr(draw.normal(size=(width, width)))[0]
    assert cka(x, turned) == pytest.approx(1.0, abs=1e-5)
    flat = np.ones((80, width))
    assert cka(flat, flat) == 1 and cka(x, flat) == 0


@pytest.mark.parametrize("transposed", [False, True])
def test_ranks(transposed):
    """Of singular values 3, 2, 1 and two that float32 does not tell from 0."""
    draw = np.random.default_rng(2)
    left, right = (np.linalg.qr(draw.normal(size=(n, 5)))[0] for n in (9, 5))
    x = (left * [3.0, 2.0, 1.0, 3e-5, 0.0]) @ right.T
    numerical, stable = linear_probes.ranks(jnp.asarray(x.T if transposed else x, jnp.float32))
    assert numerical == 3 and stable == pytest.approx(14 / 9, rel=1e-4)
    assert linear_probes.ranks(jnp.zeros((3, 3))) == (0, 0)


@pytest.mark.parametrize("width", [5, 90])  # fewer features than samples, and more
def test_the_ridge_probe_is_the_plain_systems_solution(rng, width):
    """Standardised features and a column of ones, all penalised by n / 100, in float64."""
    scale = np.linspace(1, 5, width)
    z, y = rng.normal(size=(40, width)) * scale + 6, np.eye(3)[rng.integers(0, 3, 40)]
    new = rng.normal(size=(7, width)) + 6
    columns = np.concatenate([(z - z.mean(0)) / z.std(0), np.ones((40, 1))], 1)
    wanted = np.linalg.solve(columns.T @ columns + 0.01 * 40 * np.eye(width + 1), columns.T @ y)
    outputs = np.concatenate([(new - z.mean(0)) / z.std(0), np.ones((7, 1))], 1) @ wanted
    np.testing.assert_allclose(scores_of(z, y, new), outputs, atol=1e-4)


def test_the_numerical_rank_counts_singular_values_and_not_their_squares():
    """Of 1, 0.01 and 0.0003 two are above a thousandth of the largest."""
    numerical, stable = linear_probes.ranks(jnp.diag(jnp.asarray([1e-2, 3e-4, 1.0])))
    assert numerical == 2
    assert stable == pytest.approx(1.0001, abs=1e-5)
