"""The embedded sets: scikit-learn's handwritten digits, plain and drawn in five styles."""

import functools
from typing import Any

import numpy as np

from fedjax_sim.core.errors import UserError
from fedjax_sim.data.dataset import Dataset
from fedjax_sim.data.images import resize
from fedjax_sim.tasks.preprocessing import Preprocessing

TEST_SHARE = 0.2
DOMAINS = ("plain", "inverted", "rotated", "edges", "textured")
_SPLIT_SEED = 20240607
_TEXTURE_SEED = 20240608
_ORIGIN = (
    "Optical Recognition of Handwritten Digits (Alpaydin and Kaynak, 1998): its test part, "
    "as sklearn.datasets.load_digits ships it; the train/test split is ours"
)
_LICENCE = "CC BY 4.0 (UCI repository)"


def digits(preprocessing: Preprocessing | None = None) -> Dataset:
    """1,797 digits of 8x8x1 pixels; 0..16 becomes 0..255.

    A fifth of each class, rounded, is the test set (our choice, fixed seed): 1,438 + 359 images.
    """
    train, train_labels, test, test_labels = _split()
    return Dataset(
        name="digits",
        train_images=train,
        train_labels=train_labels,
        test_images=test,
        test_labels=test_labels,
        num_classes=10,
        preprocessing=preprocessing or Preprocessing((0.5,), (0.5,)),
        origin=_ORIGIN,
        licence=_LICENCE,
    )


def digits_domains(preprocessing: Preprocessing | None = None) -> Dataset:
    """The same digits in five domains, 16x16x3, every digit in every domain: feature shift alone.

    No digit is a test image in one domain and a training image in another; `local_test: holdout` of a
    partition takes images, though, and not digits: prefer `matching` with this set. The styles (our choice):
    `plain` is resized, `inverted` is 255 - x, `rotated` is turned by 36.87 degrees (the angle of a
    3-4-5 triangle, so that all coordinates are rational) and blurred, `edges` is the sum of absolute
    differences to the next pixel across and down, `textured` is the absolute difference to a piece
    of a fixed random coloured texture, as MNIST-M is made. All is integer arithmetic.
    """
    train, train_labels, test, test_labels = _split()
    domains = np.arange(len(DOMAINS), dtype=np.int32)
    return Dataset(
        name="digits-domains",
        train_images=_draw_domains(train),
        train_labels=np.tile(train_labels, len(DOMAINS)),
        test_images=_draw_domains(test),
        test_labels=np.tile(test_labels, len(DOMAINS)),
        num_classes=10,
        preprocessing=preprocessing or Preprocessing((0.5,) * 3, (0.5,) * 3),
        train_domains=np.repeat(domains, len(train)),
        test_domains=np.repeat(domains, len(test)),
        domain_names=DOMAINS,
        origin=_ORIGIN + "; five styles drawn from them by this library",
        licence=_LICENCE,
    )


@functools.lru_cache(maxsize=1)
def _split() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as e:
        raise UserError("data.source", "digits", "scikit-learn is missing", "pip install scikit-learn") from e
    raw: Any = load_digits()
    images = np.floor(raw.images * 255 / 16 + 0.5).astype(np.uint8)[..., None]
    labels = raw.target.astype(np.int32)
    rng = np.random.default_rng(_SPLIT_SEED)
    is_test = np.zeros(len(labels), bool)
    for c in range(10):
        members = rng.permutation(np.flatnonzero(labels == c))
        is_test[members[: round(TEST_SHARE * len(members))]] = True
    parts = images[~is_test], labels[~is_test], images[is_test], labels[is_test]
    for part in parts:
        part.setflags(write=False)
    return parts


def _draw_domains(images: np.ndarray) -> np.ndarray:
    """u8[n, 8, 8, 1] -> u8[5n, 16, 16, 3], domain after domain in the order of DOMAINS."""
    plain = resize(images, (16, 16)).astype(np.int32)
    styles = (plain, 255 - plain, _blur(_rotate(plain)), _edges(plain), _textured(plain))
    return np.concatenate([np.broadcast_to(s, (*plain.shape[:3], 3)) for s in styles]).astype(np.uint8)


def _rotate(images: np.ndarray) -> np.ndarray:
    side = images.shape[1]
    y, x = np.mgrid[:side, :side] * 2 - (side - 1)  # twice the distance from the centre
    # cos = 4/5, sin = 3/5; +5 rounds to the nearest pixel, all over the common denominator 10.
    row, column = (4 * y + 3 * x + 5 * (side - 1) + 5) // 10, (4 * x - 3 * y + 5 * (side - 1) + 5) // 10
    inside = (row >= 0) & (row < side) & (column >= 0) & (column < side)
    turned = images[:, row.clip(0, side - 1), column.clip(0, side - 1)]
    return np.where(inside[None, :, :, None], turned, 0)


def _blur(images: np.ndarray) -> np.ndarray:
    p = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    p = p[:, :-2] + 2 * p[:, 1:-1] + p[:, 2:]
    return (p[:, :, :-2] + 2 * p[:, :, 1:-1] + p[:, :, 2:] + 8) // 16


def _edges(images: np.ndarray) -> np.ndarray:
    p = np.pad(images, ((0, 0), (0, 1), (0, 1), (0, 0)), mode="edge")
    return (abs(p[:, 1:, :-1] - images) + abs(p[:, :-1, 1:] - images)).clip(0, 255)


def _textured(images: np.ndarray) -> np.ndarray:
    rng = np.random.default_rng(_TEXTURE_SEED)
    coarse = rng.integers(0, 256, (1, 24, 24, 3)).astype(np.uint8)
    texture = resize(coarse, (96, 96))[0].astype(np.int32)
    corners = rng.integers(0, 96 - 16, (len(images), 2))
    windows = np.lib.stride_tricks.sliding_window_view(texture, (16, 16), (0, 1))
    return abs(np.moveaxis(windows[corners[:, 0], corners[:, 1]], 1, -1) - images)
