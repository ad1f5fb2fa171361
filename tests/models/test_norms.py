import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_sim.core.errors import UserError
from fedjax_sim.models.norms import BatchNorm, GroupNorm, NoNorm, norm

CHANNELS = 5


def oracle(x, stats, scale, bias, momentum=0.1, epsilon=1e-5):
    """PyTorch's batch norm in float64, on rows that all count."""
    x = np.asarray(x, np.float64)
    axes = tuple(range(x.ndim - 1))
    n = x[..., 0].size
    mean, var = x.mean(axes), x.var(axes)
    unbiased = var * n / max(n - 1, 1)
    new = {
        "mean": (1 - momentum) * stats["mean"] + momentum * mean,
        "var": (1 - momentum) * stats["var"] + momentum * unbiased,
    }
    return (x - mean) / np.sqrt(var + epsilon) * scale + bias, new


def make(rng, shape):
    # An offset of many standard deviations, as a one-pass variance in float32 would not survive it.
    x = (rng.normal(size=shape) + 100.0).astype(np.float32)
    params = {name: rng.normal(size=shape[-1:]).astype(np.float32) for name in ("scale", "bias")}
    stats = {"mean": rng.normal(size=shape[-1:]), "var": rng.uniform(0.5, 2, size=shape[-1:])}
    return x, {"params": params, "batch_stats": {k: v.astype(np.float32) for k, v in stats.items()}}


def train(variables, x, mask=None):
    return BatchNorm().apply(variables, jnp.asarray(x), train=True, mask=mask, mutable=["batch_stats"])


@pytest.mark.parametrize("shape", [(6, 4, 3, CHANNELS), (2, 1, 1, CHANNELS), (8, CHANNELS)])
def test_batch_norm_is_pytorchs(rng, shape):
    x, variables = make(rng, shape)
    y, new = train(variables, x)
    expected, stats = oracle(x, variables["batch_stats"], **variables["params"])
    np.testing.assert_allclose(y, expected, rtol=2e-4, atol=2e-4)
    for name in ("mean", "var"):
        np.testing.assert_allclose(new["batch_stats"][name], stats[name], rtol=1e-4)


def test_batch_norm_in_evaluation_uses_running_statistics(rng):
    x, variables = make(rng, (3, 2, 2, CHANNELS))
    y = BatchNorm().apply(variables, jnp.asarray(x), mask=jnp.asarray([True, False, True]))
    p, s = variables["params"], variables["batch_stats"]
    expected = (x - s["mean"]) / np.sqrt(s["var"] + 1e-5) * p["scale"] + p["bias"]
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=15, deadline=None)
@given(mask=st.lists(st.booleans(), min_size=4, max_size=4), seed=st.integers(0, 99))
def test_padding_is_invisible(mask, seed):
    mask = np.asarray(mask)
    x, variables = make(np.random.default_rng(seed), (4, 3, 2, CHANNELS))
    garbage = np.where(mask[:, None, None, None], x, np.float32(1e6))
    y, new = train(variables, garbage, jnp.asarray(mask))
    if not mask.any():
        for name in ("mean", "var"):
            np.testing.assert_array_equal(new["batch_stats"][name], variables["batch_stats"][name])
        assert np.isfinite(y).all()
        return
    expected, stats = oracle(x[mask], variables["batch_stats"], **variables["params"])
    np.testing.assert_allclose(y[mask], expected, rtol=2e-4, atol=2e-4)
    for name in ("mean", "var"):
        np.testing.assert_allclose(new["batch_stats"][name], stats[name], rtol=1e-4)


def test_padding_has_no_gradient(rng):
    x, variables = make(rng, (4, 3, 2, CHANNELS))
    mask = np.asarray([True, True, False, True])
    target = jnp.asarray(rng.normal(size=x.shape), jnp.float32)

    def loss(params, x, target, mask):
        y, _ = train({**variables, "params": params}, x, mask)
        rows = jnp.square(y - target).sum((1, 2, 3))
        return jnp.sum(rows if mask is None else jnp.where(mask, rows, 0.0))

    grads = jax.grad(loss, argnums=(0, 1))
    masked = grads(variables["params"], jnp.asarray(x), target, jnp.asarray(mask))
    short = grads(variables["params"], jnp.asarray(x[mask]), target[mask], None)
    np.testing.assert_array_equal(masked[1][2], 0.0)
    np.testing.assert_allclose(masked[1][mask], short[1], rtol=1e-3, atol=1e-3)
    for name in ("scale", "bias"):
        np.testing.assert_allclose(masked[0][name], short[0][name], rtol=1e-4)


def test_one_place_and_an_empty_batch_stay_finite(rng):
    x, variables = make(rng, (2, CHANNELS))
    for mask in ([True, False], [False, False]):
        y, new = train(variables, x, jnp.asarray(mask))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((y, new)))


def test_initialising_in_training_mode_does_not_count_as_a_step(rng):
    x, _ = make(rng, (3, CHANNELS))
    variables = BatchNorm(scale=0.5).init(jax.random.key(0), jnp.asarray(x), train=True)
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], np.zeros(CHANNELS))
    np.testing.assert_array_equal(variables["params"]["scale"], np.full(CHANNELS, 0.5))


def test_group_norm_against_numpy(rng):
    x = (rng.normal(size=(3, 4, 4, 12)) * 3 + 50).astype(np.float32)
    params = {name: rng.normal(size=12).astype(np.float32) for name in ("scale", "bias")}
    y = GroupNorm(groups=8).apply({"params": params}, jnp.asarray(x), train=True)
    groups = 4  # the greatest common divisor of 8 and 12
    g = x.astype(np.float64).reshape(3, 16, groups, 3)
    g = (g - g.mean((1, 3), keepdims=True)) / np.sqrt(g.var((1, 3), keepdims=True) + 1e-5)
    np.testing.assert_allclose(y, g.reshape(x.shape) * params["scale"] + params["bias"], rtol=1e-3, atol=1e-4)


def test_no_norm_passes_through_and_unknown_kinds_are_refused(rng):
    x = jnp.asarray(rng.normal(size=(2, 3)), jnp.float32)
    y, variables = NoNorm().init_with_output(jax.random.key(0), x, train=True)
    np.testing.assert_array_equal(x, y)
    assert not variables
    with pytest.raises(UserError, match=r"model\.norm"):
        norm("instance")
