import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim import models
from fedjax_sim.models import initialisers

KEY = jax.random.key(3)


def start(name, classes):
    # This generator compiles several times faster than the default one.
    key = jax.random.key(3, impl="unsafe_rbg")
    return jax.jit(models.create(name, (32, 32, 3), classes).init)(key)["params"]


@pytest.mark.parametrize("shape", [(5, 5, 32, 64), (400, 300)])
def test_torch_default_is_uniform_within_one_over_root_fan_in(shape):
    fan_in = math.prod(shape[:-1])
    kernel = np.asarray(initialisers.torch_kernel(KEY, shape, jnp.float32))
    bound = 1 / math.sqrt(fan_in)
    assert np.abs(kernel).max() <= bound * (1 + 1e-6)
    assert np.abs(kernel).max() > 0.99 * bound
    np.testing.assert_allclose(kernel.std(), bound / math.sqrt(3), rtol=0.02)
    np.testing.assert_allclose(kernel.mean(), 0, atol=0.02 * bound)


def test_torch_bias_has_the_kernels_bound():
    bias = np.asarray(initialisers.torch_bias(75)((KEY), (20_000,)))
    assert bias.dtype == np.float32
    np.testing.assert_allclose(bias.std(), 1 / math.sqrt(75 * 3), rtol=0.02)
    assert np.abs(bias).max() <= 1 / math.sqrt(75)


def test_fan_out_normal_is_not_truncated():
    kernel = np.asarray(initialisers.fan_out_normal(KEY, (3, 3, 64, 128), jnp.float32))
    stddev = math.sqrt(2 / (9 * 128))
    np.testing.assert_allclose(kernel.std(), stddev, rtol=0.02)
    assert np.abs(kernel).max() > 3.5 * stddev


def test_lenet_starts_as_pytorch_starts():
    params = start("lenet", 10)
    for layer, fan_in in {"conv1": 75, "conv2": 150, "fc1": 400, "fc2": 120, "fc3": 84}.items():
        for leaf in params[layer].values():
            assert 0.5 / math.sqrt(fan_in) < np.abs(leaf).max() <= 1 / math.sqrt(fan_in) * (1 + 1e-6)
        np.testing.assert_allclose(params[layer]["kernel"].std(), 1 / math.sqrt(3 * fan_in), rtol=0.15)


def test_resnet20_starts_as_in_fedmrs_code():
    params = start("resnet20", 10)
    block = params["stage3_block1"]
    np.testing.assert_allclose(block["conv2"]["kernel"].std(), math.sqrt(2 / (9 * 64)), rtol=0.03)
    np.testing.assert_allclose(block["conv3"]["kernel"].std(), math.sqrt(2 / 256), rtol=0.03)
    for layer in (block["norm1"], params["unused_norm"]):
        np.testing.assert_array_equal(layer["scale"], np.float32(0.5))
        np.testing.assert_array_equal(layer["bias"], np.float32(0))
    assert "bias" not in params["conv1"]


def test_lips_networks_start_as_in_its_code():
    vgg = start("vgg11_bn", 100)
    np.testing.assert_allclose(vgg["conv5"]["kernel"].std(), math.sqrt(2 / (9 * 512)), rtol=0.02)
    np.testing.assert_allclose(vgg["fc1"]["kernel"].std(), 0.01, rtol=0.03)
    for layer in ("conv1", "conv5", "fc1"):
        np.testing.assert_array_equal(vgg[layer]["bias"], np.float32(0))
    resnet = start("resnet8", 10)
    np.testing.assert_allclose(resnet["conv1"]["kernel"].std(), math.sqrt(2 / (49 * 64)), rtol=0.03)
    np.testing.assert_array_equal(resnet["norm1"]["scale"], np.float32(1))
    assert np.abs(resnet["fc"]["kernel"]).max() <= 1 / 16
