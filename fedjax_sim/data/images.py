"""Arrays of 8-bit images: resizing and channels, in NumPy, with the same bits on every platform."""

import numpy as np

_BITS = 14
"""Weights are integers of 14 bits: 255 * 2^14 < 2^24, so a float32 matrix product of them is exact."""


def resize(images: np.ndarray, size: tuple[int, int], *, chunk: int = 4096) -> np.ndarray:
    """Resizes with a triangle filter, widened when shrinking (so that it does not alias).

    The two passes round to 8 bits each. All sums are exact integers, so the result does not depend
    on the order of summation of a platform's matrix product.

    Args:
      images: u8[n, h, w, C].
      size: (H, W).
      chunk: images converted to float at a time; memory only.

    Returns:
      u8[n, H, W, C].
    """
    if images.shape[1:3] == tuple(size):
        return images
    height, width, channels = images.shape[1:]
    rows, columns = _weights(height, size[0]), _weights(width, size[1])
    out = np.empty((len(images), *size, channels), np.uint8)
    for start in range(0, len(images), chunk):
        part = images[start : start + chunk].astype(np.float32)
        part = _round(_product(rows, part.reshape(-1, height, width * channels)))
        part = part.reshape(-1, size[0], width, channels).swapaxes(2, 3)  # the last axis is contracted
        part = _round(_product(np.ascontiguousarray(part).reshape(-1, width), columns.T))
        out[start : start + chunk] = part.reshape(-1, size[0], channels, size[1]).swapaxes(2, 3)
    return out


def on_white(images: np.ndarray) -> np.ndarray:
    """u8[..., C + 1], alpha in the last channel -> u8[..., C]: what is seen of it on white paper."""
    colour, alpha = images[..., :-1].astype(np.uint32), images[..., -1:].astype(np.uint32)
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def with_channels(images: np.ndarray, channels: int) -> np.ndarray:
    """u8[n, H, W, 1 or channels] -> u8[n, H, W, channels]; grey images are repeated.

    Raises:
      ValueError: where the channels can be neither kept nor repeated.
    """
    if images.shape[-1] == channels:
        return images
    if images.shape[-1] != 1:
        raise ValueError(f"{images.shape[-1]} channels cannot become {channels}")
    return np.repeat(images, channels, axis=-1)


def _product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    # A BLAS kernel for odd shapes may compute on lanes that belong to no entry and leave the
    # processor's "invalid" flag raised, which NumPy reports; finite integers cannot raise it.
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        return left @ right


def _round(scaled: np.ndarray) -> np.ndarray:
    return np.floor((scaled + (1 << (_BITS - 1))) / (1 << _BITS))


def _weights(old: int, new: int) -> np.ndarray:
    """f32[new, old] of integers; each row sums to 2^14."""
    scale = old / new
    width = max(scale, 1.0)
    centres = (np.arange(new) + 0.5) * scale - 0.5
    weights = np.maximum(0.0, 1.0 - np.abs(np.arange(old)[None] - centres[:, None]) / width)
    weights = np.round(weights / weights.sum(1, keepdims=True) * (1 << _BITS))
    largest = weights.argmax(1)
    weights[np.arange(new), largest] += (1 << _BITS) - weights.sum(1)
    return weights.astype(np.float32)
