"""The dense layer's own gradient agrees with autodiff, for few samples and for many."""

import jax
import numpy as np
import pytest
from flax import linen as nn

from fedjax_sim.models.dense import Dense
from fedjax_sim.models.spelling import spelling


def gradients(layer, batch, wave=None):
    x = jax.random.normal(jax.random.key(0), (batch, 7))
    variables = layer.init(jax.random.key(1), x)
    weights = jax.random.normal(jax.random.key(2), (batch, 5))
    pull = jax.grad(lambda v, x: (weights * layer.apply(v, x) ** 2).sum(), (0, 1))
    if wave:
        variables, x = (
            jax.tree.map(lambda a: np.stack([a * k for k in range(wave)]), t) for t in (variables, x)
        )
        pull = jax.vmap(pull)
    return pull(variables, x)


@pytest.mark.parametrize("wave", [None, 3])
@pytest.mark.parametrize("batch", [1, 16, 17])
def test_gradients_are_those_of_flax(batch, wave):
    got, wanted = (jax.tree.leaves(gradients(layer, batch, wave)) for layer in (Dense(5), nn.Dense(5)))
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_only_xla_has_a_forward_mode():
    layer, x = Dense(5), np.ones((4, 7), np.float32)
    variables = layer.init(jax.random.key(1), x)
    with spelling("xla"):
        jax.jvp(lambda v: layer.apply(v, x), (variables,), (variables,))
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda v: layer.apply(v, x), (variables,), (variables,))
