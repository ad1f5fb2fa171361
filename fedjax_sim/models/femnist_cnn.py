"""FedMR's small CNN for FEMNIST."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from fedjax_sim.models import layers


class FemnistCNN(nn.Module):
    """conv5×5 (16) – pool – ReLU – conv5×5 (32) – pool – ReLU – dense 256 – classes; no padding, no norm.

    FOUND in FedMR's code (flag `cnn`, FEMNIST): pooling comes *before* the ReLU, a dropout layer is declared
    and never called (it has no weights, so it is left out here); 160,510 parameters on 28×28×1 with 62
    classes, in 8 tensors; PyTorch's default initial weights. Pooling and ReLU commute, values and gradients
    alike, so the fused layer serves.

    Attributes:
      num_classes: width of the logits.
      dtype: compute dtype.
    """

    num_classes: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False, mask: jax.Array | None = None) -> jax.Array:
        """f32[B, H, W, C] -> f32[B, num_classes]."""
        x = layers.conv_relu_pool(self, x, "conv1", 16, 5)
        x = layers.conv_relu_pool(self, x, "conv2", 32, 5)
        x = nn.relu(layers.dense(self, layers.flatten(x), "fc1", 256))
        return layers.classifier(self, x, "fc2")
