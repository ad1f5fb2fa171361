"""FedMR's "ResNet-20": a pre-activation bottleneck network, for CIFAR and for FEMNIST."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from fedjax_sim.models import layers
from fedjax_sim.models.initialisers import fan_out_normal
from fedjax_sim.models.norms import norm

_EXPANSION = 4
_SCALE = 0.5  # initial γ of every norm (FOUND)


class Bottleneck(nn.Module):
    """(norm – ReLU – conv) three times: 1×1, 3×3 with the stride, 1×1 to 4·planes; plus the shortcut.

    The shortcut of a block that changes the shape is a bare 1×1 convolution of the block's un-normalised
    input. It is made last, where PyTorch's state dict has it.

    Attributes:
      planes: width of the two inner convolutions.
      stride: of the 3×3 convolution and of the shortcut.
      norm: see `ResNet20`.
      dtype: compute dtype.
    """

    planes: int
    stride: int
    norm: str
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False, mask: jax.Array | None = None) -> jax.Array:
        """f[B, H, W, C] -> f[B, H/stride, W/stride, 4·planes]."""
        width = self.planes * _EXPANSION
        y = x
        for i, (features, kernel, stride) in enumerate(
            ((self.planes, 1, 1), (self.planes, 3, self.stride), (width, 1, 1)), start=1
        ):
            y = norm(self.norm)(scale=_SCALE, dtype=self.dtype, name=f"norm{i}")(y, train=train, mask=mask)
            y = self._conv(nn.relu(y), f"conv{i}", features, kernel, stride)
        if self.stride != 1 or x.shape[-1] != width:
            x = self._conv(x, "shortcut", width, 1, self.stride)
        return x + y

    def _conv(self, x, name, features, kernel, stride):
        bias = self.norm == "none"
        return layers.conv(
            self, x, name, features, kernel, stride=stride, padding=kernel // 2,
            use_bias=bias, kernel_init=fan_out_normal,
        )  # fmt: skip


class ResNet20(nn.Module):
    """Stem conv3×3 (16) – three stages of two bottlenecks (planes 16, 32, 64) – mean over places – dense.

    FOUND in FedMR's code (flag `resnet20`). With 10 classes 219,482 parameters, with 20 222,052; FEMNIST
    (28×28×1, 62 classes, `stem_pool`) 232,558. The counts include a last norm of 256 channels which the code
    declares and never applies. Its tensors never change by training, yet are averaged and recombined like any
    other, so they exist here too: 62 trainable leaves and 19 × 2 running statistics; PyTorch's 119 state
    tensors are these 100 and 19 counters. (PyTorch's optimiser skips tensors without a gradient; here their
    gradient is zero, so weight decay would shrink them. The output cannot tell.)

    The code's average pooling (8×8, FEMNIST 7×7) covers the whole map at the papers' image sizes; here it is
    the mean over all places at any size. Convolutions have no bias, except with norm "none" (OUR CHOICE).

    Attributes:
      num_classes: width of the logits.
      norm: "batch" (the code's), "group" or "none" (ours).
      stem_pool: 3×3 max pooling with stride 1 after the stem, as in the FEMNIST variant.
      unused_norm: keep the never-applied last norm. Only with norm "batch".
      dtype: compute dtype.
    """

    num_classes: int
    norm: str = "batch"
    stem_pool: bool = False
    unused_norm: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False, mask: jax.Array | None = None) -> jax.Array:
        """f32[B, H, W, C] -> f32[B, num_classes]. mask: bool[B], False for padding."""
        use_bias = self.norm == "none"
        x = layers.conv(self, x, "conv1", 16, 3, padding=1, use_bias=use_bias, kernel_init=fan_out_normal)
        if self.stem_pool:
            x = layers.padded_max_pool(x, 3, 1, 1)
        for stage, planes in enumerate((16, 32, 64), start=1):
            for block in range(2):
                stride = 2 if stage > 1 and block == 0 else 1
                name = f"stage{stage}_block{block}"
                x = Bottleneck(planes, stride, self.norm, self.dtype, name=name)(x, train=train, mask=mask)
        if self.unused_norm and self.norm == "batch":
            norm("batch")(scale=_SCALE, dtype=self.dtype, name="unused_norm")(x)
        return layers.classifier(self, layers.global_mean(x), "fc")
