"""Initial values of weights: PyTorch's defaults, and those which the papers' code sets by hand.

The papers' code is PyTorch, so a layer that says nothing there starts from PyTorch's defaults; Flax's own
(LeCun normal, zero bias) would be another experiment.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

Initialiser = Callable[..., jax.Array]
"""`(key, shape, dtype) -> array`, the signature of `flax.linen.initializers`."""

torch_kernel: Initialiser = nn.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")
"""PyTorch's default for convolutions and dense layers: Kaiming uniform with a = √5, that is
U(−1/√fan_in, 1/√fan_in), for kernels HWIO and (in, out)."""

fan_out_normal: Initialiser = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
"""N(0, √(2/(k²·c_out))), not truncated: FedMR's ResNet-20 and, as Kaiming normal with fan_out, all of LIPS's
convolutions. (FOUND in both code bases)"""


def torch_bias(fan_in: int) -> Initialiser:
    """PyTorch's default bias, U(−1/√fan_in, 1/√fan_in), with the fan-in of the layer's *kernel*."""
    bound = 1.0 / math.sqrt(fan_in)

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def normal(stddev: float) -> Initialiser:
    """N(0, stddev), not truncated."""
    return nn.initializers.normal(stddev)


zeros: Initialiser = nn.initializers.zeros
