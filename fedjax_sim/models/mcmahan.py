"""The two-convolution network of the FedAvg paper."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from fedjax_sim.models import layers


class McMahanCNN(nn.Module):
    """conv5×5 (32) – pool – conv5×5 (64) – pool – dense 512 – dense, ReLU after each but the last.

    McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017:
    1,663,370 parameters on 28×28×1 with 10 classes, as the paper counts them; 2,156,490 on 32×32×3. Padding
    "SAME" (which those counts imply), pooling 2×2, ReLU before pooling. Initial weights are PyTorch's
    (OUR CHOICE).

    Attributes:
      num_classes: width of the logits.
      dtype: compute dtype.
    """

    num_classes: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False, mask: jax.Array | None = None) -> jax.Array:
        """f32[B, H, W, C] -> f32[B, num_classes]."""
        x = layers.conv_relu_pool(self, x, "conv1", 32, 5, padding="SAME")
        x = layers.conv_relu_pool(self, x, "conv2", 64, 5, padding="SAME")
        x = nn.relu(layers.dense(self, layers.flatten(x), "fc1", 512))
        return layers.classifier(self, x, "fc2")
