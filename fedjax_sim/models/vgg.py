"""VGG networks: FedMR's VGG-16-BN, LIPS's five-convolution "vgg11_bn", FedMR's "VGG16_mnist"."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from fedjax_sim.models import initialisers, layers
from fedjax_sim.models.kernels.conv import max_pool
from fedjax_sim.models.norms import norm


class VGG(nn.Module):
    """Stages of (conv3×3 – norm – ReLU), each stage closed by 2×2 max pooling; hidden dense layers;
    classifier.

    The default is FedMR's VGG-16-BN (FOUND): 33,646,666 parameters with 10 classes, 33,687,636 with 20, for
    32×32×3; PyTorch's default initial weights; dropout 0.5 after both hidden dense layers, which needs an rng
    when training.

    LIPS's "vgg11_bn" (FOUND, and no VGG-11) is `stages=((64,), (128,), (256,), (512,), (512,))`, `hidden=()`,
    `weights="kaiming"`: 3,918,858 parameters with 10 classes, 3,965,028 with 100; convolutions Kaiming-normal
    fan_out, dense N(0, 0.01), biases 0 (that the convolutions' are 0 too is INFERRED).

    Images larger than 32×32 leave a map larger than 1×1, which is flattened (OUR CHOICE).

    Attributes:
      num_classes: width of the logits.
      stages: channels of the convolutions of each stage.
      hidden: widths of the hidden dense layers.
      dropout: rate after each hidden dense layer.
      weights: initial ones, "torch" or "kaiming".
      norm: "batch" (the codes'), "group" or "none" (ours).
      dtype: compute dtype.
    """

    num_classes: int
    stages: tuple[tuple[int, ...], ...] = ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3)
    hidden: tuple[int, ...] = (4096, 4096)
    dropout: float = 0.5
    weights: str = "torch"
    norm: str = "batch"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False, mask: jax.Array | None = None) -> jax.Array:
        """f32[B, H, W, C] -> f32[B, num_classes]. mask: bool[B], False for padding."""
        conv_inits: dict[str, Any] = {}
        dense_inits: dict[str, Any] = {}
        if self.weights == "kaiming":
            conv_inits = {"kernel_init": initialisers.fan_out_normal, "bias_init": initialisers.zeros}
            dense_inits = {"kernel_init": initialisers.normal(0.01), "bias_init": initialisers.zeros}
        i = 0
        for stage in self.stages:
            for features in stage:
                i += 1
                x = layers.conv(self, x, f"conv{i}", features, 3, padding=1, **conv_inits)
                x = nn.relu(norm(self.norm)(dtype=self.dtype, name=f"norm{i}")(x, train=train, mask=mask))
            x = max_pool(x)
        x = layers.flatten(x)
        for j, width in enumerate(self.hidden, start=1):
            x = nn.relu(layers.dense(self, x, f"fc{j}", width, **dense_inits))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return layers.classifier(self, x, f"fc{len(self.hidden) + 1}", **dense_inits)


class VGG16Mnist(nn.Module):
    """FedMR's network behind the flag `vgg` on MNIST and FEMNIST: five convolutions, no norm, no dropout.

    FOUND: conv1×1 (64, padding 1, so the map grows by two) – ReLU – conv3×3 (64) – ReLU – pool 2×2 stride 1 –
    conv3×3 (128) – ReLU – pool 2×2 stride 1 – conv3×3 (256) – ReLU – conv3×3 (512) – ReLU – pool 2×2 stride
    2 – average to 7×7 – dense 256 – dense, with *no* ReLU between the two dense layers. 8,024,958 parameters
    on 28×28×1 with 62 classes, in 14 tensors; PyTorch's default initial weights.

    Attributes:
      num_classes: width of the logits.
      dtype: compute dtype.
    """

    num_classes: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False, mask: jax.Array | None = None) -> jax.Array:
        """f32[B, H, W, C] -> f32[B, num_classes]."""
        x = nn.relu(layers.conv(self, x, "conv1", 64, 1, padding=1))
        x = max_pool(nn.relu(layers.conv(self, x, "conv2", 64, 3, padding=1)), 2, 1)
        x = max_pool(nn.relu(layers.conv(self, x, "conv3", 128, 3, padding=1)), 2, 1)
        x = nn.relu(layers.conv(self, x, "conv4", 256, 3, padding=1))
        x = max_pool(nn.relu(layers.conv(self, x, "conv5", 512, 3, padding=1)))
        x = layers.flatten(layers.adaptive_mean(x, 7))
        return layers.classifier(self, layers.dense(self, x, "fc1", 256), "fc2")
