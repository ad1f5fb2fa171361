"""What the zoo's networks are written in: weight layers that mark their input to be peeled, and pooling."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sim.core.model import peel
from fedjax_sim.models import initialisers
from fedjax_sim.models.initialisers import Initialiser
from fedjax_sim.models.kernels.conv import Conv, ConvReluPool, max_pool
from fedjax_sim.models.kernels.dense_gradients import Dense


def conv(
    module: Any,
    x: jax.Array,
    name: str,
    features: int,
    kernel: int,
    *,
    stride: int = 1,
    padding: int | str = 0,
    use_bias: bool = True,
    kernel_init: Initialiser = initialisers.torch_kernel,
    bias_init: Initialiser | None = None,
) -> jax.Array:
    """Adds the convolution `name` to `module` (inside its compact `__call__`) and marks its input.

    Args:
      module: a Flax module with a `dtype` field.
      x: f[B, H, W, C].
      name: name of the sub-module and of the peel point.
      features: output channels.
      kernel: side of the square kernel.
      stride: the same in both directions.
      padding: rows and columns added on every side, as PyTorch counts them, or "SAME".
      use_bias: whether a bias is added.
      kernel_init: initial kernel.
      bias_init: initial bias; None: PyTorch's default, which needs the kernel's fan-in.

    Returns:
      f[B, H', W', features] in the module's dtype.
    """
    x = peel(module, name, x)
    return Conv(
        features,
        (kernel, kernel),
        strides=(stride, stride),
        padding=padding,
        use_bias=use_bias,
        dtype=module.dtype,
        kernel_init=kernel_init,
        bias_init=bias_init or initialisers.torch_bias(kernel * kernel * x.shape[-1]),
        name=name,
    )(x)


def conv_relu_pool(
    module: Any, x: jax.Array, name: str, features: int, kernel: int, *, padding: str = "VALID"
) -> jax.Array:
    """max_pool(relu(conv(x)), 2) as one fused layer `name`, PyTorch's initial weights; marks its input.

    Args:
      module: whose method calls this, compact; its `dtype` is the layer's.
      x: f[B, H, W, C].
      name: of the layer.
      features: of the output.
      kernel: its height and width.
      padding: SAME or VALID.

    Returns:
      f[B, H'//2, W'//2, features], where H' and W' are the convolution's.
    """
    x = peel(module, name, x)
    return ConvReluPool(
        features,
        (kernel, kernel),
        padding,
        kernel_init=initialisers.torch_kernel,
        bias_init=initialisers.torch_bias(kernel * kernel * x.shape[-1]),
        dtype=module.dtype,
        name=name,
    )(x)


def dense(
    module: Any,
    x: jax.Array,
    name: str,
    features: int,
    *,
    kernel_init: Initialiser = initialisers.torch_kernel,
    bias_init: Initialiser | None = None,
) -> jax.Array:
    """Adds the dense layer `name` to `module` and marks its input.

    Args:
      module: whose method calls this, compact; its `dtype` is the layer's.
      x: f[..., C].
      name: of the layer.
      features: of the output.
      kernel_init: PyTorch's, unless another is given.
      bias_init: None: PyTorch's, which depends on C.

    Returns:
      f[..., features].
    """
    x = peel(module, name, x)
    return Dense(
        features,
        dtype=module.dtype,
        kernel_init=kernel_init,
        bias_init=bias_init or initialisers.torch_bias(x.shape[-1]),
        name=name,
    )(x)


def classifier(module: Any, x: jax.Array, name: str, **inits: Any) -> jax.Array:
    """Adds the last dense layer. Logits are float32 whatever the compute dtype.

    Args:
      module: whose method calls this, compact; has `num_classes` and `dtype`.
      x: f[B, d], the representation.
      name: of the layer.
      **inits: `kernel_init` and `bias_init`, as for `dense`.

    Returns:
      f32[B, num_classes].
    """
    return dense(module, x, name, module.num_classes, **inits).astype(jnp.float32)


def flatten(x: jax.Array) -> jax.Array:
    """f[B, H, W, C] -> f[B, H·W·C], channels innermost.

    PyTorch flattens (C, H, W). The two differ by a fixed permutation of the next kernel's rows, and so
    neither in what a network can compute nor in the law of its initial weights.
    """
    return x.reshape(x.shape[0], -1)


def global_mean(x: jax.Array) -> jax.Array:
    """Mean over all places. f[B, H, W, C] -> f[B, C]."""
    return jnp.mean(x, axis=(1, 2))


def padded_max_pool(x: jax.Array, window: int, stride: int, padding: int) -> jax.Array:
    """Max pooling with `padding` rows and columns on every side which never win.

    Args:
      x: f[B, H, W, C].
      window: its height and width.
      stride: of the window.
      padding: rows and columns that are added on every side.

    Returns:
      f[B, H', W', C].
    """
    lowest = jnp.finfo(x.dtype).min
    side = (padding, padding)
    x = jnp.pad(x, ((0, 0), side, side, (0, 0)), constant_values=lowest)
    return max_pool(x, window, stride)


def adaptive_mean(x: jax.Array, size: int) -> jax.Array:
    """Average pooling to a `size`×`size` map. f[B, H, W, C] -> f[B, size, size, C].

    Bin i of n places covers ⌊i·n/size⌋ … ⌈(i+1)·n/size⌉ − 1, as PyTorch's adaptive pooling has it.
    """
    rows = jnp.asarray(_bins(x.shape[1], size), x.dtype)
    columns = jnp.asarray(_bins(x.shape[2], size), x.dtype)
    return jnp.einsum("bhwc,ph,qw->bpqc", x, rows, columns)


def _bins(places: int, size: int) -> np.ndarray:
    weights = np.zeros((size, places))
    for i in range(size):
        start, stop = i * places // size, -(-(i + 1) * places // size)
        weights[i, start:stop] = 1.0 / (stop - start)
    return weights
