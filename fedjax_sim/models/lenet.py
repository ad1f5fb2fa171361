"""FedMR's small CNN for CIFAR."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from fedjax_sim.models import layers


class LeNet(nn.Module):
    """conv5×5 (6) – ReLU – pool – conv5×5 (16) – ReLU – pool – dense 120 – 84 – classes; no padding, no norm.

    FOUND in FedMR's code (flag `cnn`, CIFAR): 62,006 parameters with 10 classes, 62,856 with 20, in 10
    tensors, PyTorch's default initial weights. Features are flattened channels-innermost, see
    `layers.flatten`.

    Attributes:
      num_classes: width of the logits.
      dtype: compute dtype.
    """

    num_classes: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False, mask: jax.Array | None = None) -> jax.Array:
        """f32[B, H, W, C] -> f32[B, num_classes]."""
        x = layers.conv_relu_pool(self, x, "conv1", 6, 5)
        x = layers.conv_relu_pool(self, x, "conv2", 16, 5)
        x = nn.relu(layers.dense(self, layers.flatten(x), "fc1", 120))
        x = nn.relu(layers.dense(self, x, "fc2", 84))
        return layers.classifier(self, x, "fc3")
