"""Multi-layer perceptron on flattened images, or on vectors."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from fedjax_sim.models import layers


class MLP(nn.Module):
    """Dense layers `fc1`, `fc2`, … with ReLU between them.

    The default is the "2NN" of McMahan et al., "Communication-Efficient Learning of Deep Networks from
    Decentralized Data", AISTATS 2017: 199,210 parameters on 28×28×1 images with 10 classes. Initial weights
    are PyTorch's (OUR CHOICE).

    Attributes:
      num_classes: width of the logits.
      hidden: widths of the hidden layers; () is multinomial logistic regression.
      dtype: compute dtype.
    """

    num_classes: int
    hidden: tuple[int, ...] = (200, 200)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False, mask: jax.Array | None = None) -> jax.Array:
        """f32[B, H, W, C] or f32[B, d] -> f32[B, num_classes]."""
        x = layers.flatten(x)
        for i, width in enumerate(self.hidden, start=1):
            x = nn.relu(layers.dense(self, x, f"fc{i}", width))
        return layers.classifier(self, x, f"fc{len(self.hidden) + 1}")
