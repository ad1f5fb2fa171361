"""Convolution and pooling whose gradients stay fast inside loops and over stacked clients.

(first version: plain XLA; the spellings follow)
"""

import contextlib
import contextvars

import jax
import jax.numpy as jnp
from flax import linen as nn

SPELLINGS = ("xla", "canonical", "patches")
_current = contextvars.ContextVar("conv_spelling", default="canonical")


@contextlib.contextmanager
def spelling(name: str):
    """While a model is traced inside this context, `conv_general_dilated` below uses that spelling."""
    token = _current.set(name)
    try:
        yield
    finally:
        _current.reset(token)


def conv_general_dilated(x, kernel, strides, padding, lhs_dilation=None, rhs_dilation=None,
                         dimension_numbers=None, feature_group_count=1, precision=None, **unused):
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, lhs_dilation=lhs_dilation, rhs_dilation=rhs_dilation,
        dimension_numbers=dimension_numbers, feature_group_count=feature_group_count, precision=precision)


class Conv(nn.Conv):
    """`flax.linen.Conv` (NHWC, kernel HWIO) whose gradients stay fast inside loops."""

    conv_general_dilated = staticmethod(conv_general_dilated)


def max_pool(x: jax.Array, window: int = 2, strides: int | None = None) -> jax.Array:
    """Maximum over `window`×`window` patches, no padding. f32[B, H, W, C] -> f32[B, H', W', C]."""
    strides = strides or window
    return nn.max_pool(x, (window, window), (strides, strides))
