"""The ResNets of LIPS's code base (Fling), and the CIFAR ResNet-18 with a 3×3 stem."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from fedjax_sim.models import layers
from fedjax_sim.models.initialisers import fan_out_normal
from fedjax_sim.models.norms import norm


class BasicBlock(nn.Module):
    """conv3×3 – norm – ReLU – conv3×3 – norm, plus the shortcut, then ReLU.

    The shortcut of a block that changes the shape is a 1×1 convolution with a norm of its own.

    Attributes:
      features: output channels.
      stride: of the first convolution and of the shortcut.
      norm: "batch", "group" or "none".
      dtype: compute dtype.
    """

    features: int
    stride: int
    norm: str
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False, mask: jax.Array | None = None) -> jax.Array:
        """f[B, H, W, C] -> f[B, ⌈H/stride⌉, ⌈W/stride⌉, features]."""

        def conv_norm(y, conv_name, norm_name, kernel, stride):
            y = layers.conv(
                self, y, conv_name, self.features, kernel, stride=stride, padding=kernel // 2,
                use_bias=self.norm == "none", kernel_init=fan_out_normal,
            )  # fmt: skip
            return norm(self.norm)(dtype=self.dtype, name=norm_name)(y, train=train, mask=mask)

        y = nn.relu(conv_norm(x, "conv1", "norm1", 3, self.stride))
        y = conv_norm(y, "conv2", "norm2", 3, 1)
        if self.stride != 1 or x.shape[-1] != self.features:
            x = conv_norm(x, "shortcut", "norm_shortcut", 1, self.stride)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Stem – stages of basic blocks (64, 128, 256, 512 channels) – mean over places – dense.

    FOUND in LIPS's code: stem conv7×7 stride 2 – norm – ReLU – 3×3 max pooling stride 2; Kaiming-normal
    fan_out convolutions without bias, γ = 1, β = 0, the dense layer as PyTorch has it. Parameters: ResNet-6
    (1, 1) 314,954 with 10 classes; ResNet-8 (1, 1, 1) 1,235,274 with 10 and 1,258,404 with 100; ResNet-10
    5,008,392 with 200; ResNet-18 (2, 2, 2, 2) 11,227,812 with 100; ResNet-34 (3, 4, 6, 3).

    `stem="3x3"` (stride 1, no pooling) is the usual CIFAR network, in FedMR's code base FedMut's ResNet-18.
    With norm "none" convolutions have a bias (OUR CHOICE).

    Attributes:
      num_classes: width of the logits.
      blocks: number of blocks of each stage, one to four stages.
      stem: "7x7" or "3x3".
      norm: "batch" (the code's), "group" or "none" (ours).
      dtype: compute dtype.
    """

    num_classes: int
    blocks: tuple[int, ...] = (2, 2, 2, 2)
    stem: str = "7x7"
    norm: str = "batch"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False, mask: jax.Array | None = None) -> jax.Array:
        """f32[B, H, W, C] -> f32[B, num_classes]. mask: bool[B], False for padding."""
        kernel, stride = (7, 2) if self.stem == "7x7" else (3, 1)
        x = layers.conv(
            self, x, "conv1", 64, kernel, stride=stride, padding=kernel // 2,
            use_bias=self.norm == "none", kernel_init=fan_out_normal,
        )  # fmt: skip
        x = nn.relu(norm(self.norm)(dtype=self.dtype, name="norm1")(x, train=train, mask=mask))
        if self.stem == "7x7":
            x = layers.padded_max_pool(x, 3, 2, 1)
        for stage, (features, count) in enumerate(
            zip((64, 128, 256, 512), self.blocks, strict=False), start=1
        ):
            for i in range(count):
                stride = 2 if stage > 1 and i == 0 else 1
                block = BasicBlock(features, stride, self.norm, self.dtype, name=f"stage{stage}_block{i}")
                x = block(x, train=train, mask=mask)
        return layers.classifier(self, layers.global_mean(x), "fc")
