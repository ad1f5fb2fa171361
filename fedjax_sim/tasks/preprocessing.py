"""What happens to a batch of 8-bit images inside the compiled step: normalisation and augmentation."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sim.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """Normalisation x -> (x / 255 - mean) / std, and random augmentation of training batches.

    Attributes:
      mean: one number for each channel in units of [0, 1], or a single one for all channels.
      std: the same, positive.
      flip: mirror left and right with probability 1/2.
      crop_padding: pixels of zeros around the normalised image, out of which a random window of the
        image's own size is cut. 0 is off.
      rotation: the angle is uniform in [-rotation, rotation] degrees. 0 is off.
      invert: replace x by 255 - x first. FedMR feeds FEMNIST as (0.5 - x) / 0.5, which is this with
        mean and std 0.5 (FOUND, FedMR utils/get_dataset.py).

    Raises:
      UserError: for lengths that disagree, numbers that are not finite, or out of range.
    """

    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    flip: bool = False
    crop_padding: int = 0
    rotation: float = 0.0
    invert: bool = False

    def __post_init__(self):
        for name in ("mean", "std"):
            values = getattr(self, name)
            if isinstance(values, (str, bytes)) or not np.iterable(values):
                raise UserError(
                    f"preprocessing.{name}", values, "not a list of numbers", "Write one number a channel."
                )
            values = tuple(values)
            if not values or not all(_is_number(v) and math.isfinite(v) for v in values):
                raise UserError(
                    f"preprocessing.{name}", values, "not finite numbers", "Write one number a channel."
                )
            object.__setattr__(self, name, tuple(float(v) for v in values))
        if len(self.mean) != len(self.std):
            raise UserError(
                "preprocessing.std",
                self.std,
                f"{len(self.std)} numbers, but preprocessing.mean has {len(self.mean)}",
                "Give both one number a channel.",
            )
        if min(self.std) <= 0:
            raise UserError(
                "preprocessing.std", self.std, "not positive", "Use 1.0 to leave the scale alone."
            )
        for name in ("flip", "invert"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(
                    f"preprocessing.{name}", getattr(self, name), "not a truth value", "Write true or false."
                )
        if (
            not _is_number(self.crop_padding)
            or self.crop_padding != int(self.crop_padding)
            or self.crop_padding < 0
        ):
            raise UserError(
                "preprocessing.crop_padding", self.crop_padding, "not a whole number >= 0", "4 is usual."
            )
        if not _is_number(self.rotation) or not 0 <= self.rotation <= 180:
            raise UserError(
                "preprocessing.rotation", self.rotation, "not in [0, 180] degrees", "15 is usual."
            )

    @property
    def augments(self) -> bool:
        """Whether `augment` changes anything."""
        return self.flip or self.crop_padding > 0 or self.rotation > 0

    def check_channels(self, channels: int) -> None:
        """Raises UserError unless there is one mean for all channels or one for each."""
        if len(self.mean) not in (1, channels):
            raise UserError(
                "preprocessing.mean",
                self.mean,
                f"{len(self.mean)} numbers for images with {channels} channels",
                f"Give 1 or {channels} numbers.",
            )


def normalise(images: jax.Array | np.ndarray, preprocessing: Preprocessing) -> jax.Array:
    """u8[..., H, W, C] -> f32[..., H, W, C]. Deterministic; for training and evaluation alike."""
    if images.dtype != np.uint8:
        raise UserError(
            "images", str(images.dtype), "not uint8", "Keep images as 8-bit integers from 0 to 255."
        )
    preprocessing.check_channels(images.shape[-1])
    mean, std = np.asarray(preprocessing.mean), np.asarray(preprocessing.std)
    scale, offset = 1 / (255 * std), -mean / std
    if preprocessing.invert:  # (1 - x/255 - mean) / std
        scale, offset = -scale, (1 - mean) / std
    pixels = jnp.asarray(images).astype(jnp.float32)
    scale, offset = (
        v.astype(np.float32).reshape((1,) * (pixels.ndim - 1) + v.shape) for v in (scale, offset)
    )
    return pixels * scale + offset


def augment(key: jax.Array, images: jax.Array, preprocessing: Preprocessing) -> jax.Array:
    """Randomly flips, rotates and crops each image of a normalised batch.

    Image i draws from `fold_in(key, i)`: what happens to it does not depend on how many images come
    after it, so padding a batch changes nothing for the images before the padding.

    The order is that of LIPS's transforms for CIFAR-100 (FOUND: flip, rotation, normalise, crop).
    Flip and rotation come after `normalise` here, which commutes with them because the rotation
    fills with what a black pixel is normalised to. Two differences from LIPS: the rotation samples
    bilinearly (theirs takes the nearest pixel) and does not round to 8 bits in between.

    Args:
      key: one PRNG key for the batch.
      images: f32[B, H, W, C], already normalised.
      preprocessing: which of the three are on; those that are off cost nothing.

    Returns:
      f32[B, H, W, C].
    """
    if not preprocessing.augments:
        return images
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(images.shape[0]))
    return jax.vmap(lambda k, image: _augment_one(k, image, preprocessing))(keys, images)


def _augment_one(key: jax.Array, image: jax.Array, preprocessing: Preprocessing) -> jax.Array:
    flip_key, angle_key, crop_key = jax.random.split(key, 3)
    if preprocessing.flip:
        image = jnp.where(jax.random.bernoulli(flip_key, jnp.float32(0.5)), image[:, ::-1], image)
    if preprocessing.rotation > 0:
        limit = math.radians(preprocessing.rotation)
        angle = jax.random.uniform(angle_key, (), jnp.float32, -limit, limit)
        image = rotate(image, angle, black(preprocessing))
    if preprocessing.crop_padding > 0:
        shift = jax.random.randint(crop_key, (2,), 0, 2 * int(preprocessing.crop_padding) + 1, jnp.int32)
        image = shifted_crop(image, shift, int(preprocessing.crop_padding))
    return image


def black(preprocessing: Preprocessing) -> np.ndarray:
    """f32[1 or C]: what a pixel of value 0 is normalised to."""
    mean, std = np.asarray(preprocessing.mean), np.asarray(preprocessing.std)
    return ((float(preprocessing.invert) - mean) / std).astype(np.float32)


def shifted_crop(image: jax.Array, shift: jax.Array, padding: int) -> jax.Array:
    """Window of the image's own size at `shift` (i32[2], each in 0..2*padding) of the zero-padded image."""
    padded = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    return jax.lax.dynamic_slice(padded, (shift[0], shift[1], jnp.zeros((), shift.dtype)), image.shape)


def rotate(image: jax.Array, angle: jax.Array, fill: np.ndarray) -> jax.Array:
    """Rotates counter-clockwise about the centre with bilinear sampling.

    Args:
      image: f32[H, W, C].
      angle: f32[], radians.
      fill: f32[1 or C], what lies outside the image.

    Returns:
      f32[H, W, C].
    """
    height, width, channels = image.shape
    y = jnp.arange(height, dtype=jnp.float32)[:, None] - jnp.float32((height - 1) / 2)
    x = jnp.arange(width, dtype=jnp.float32)[None, :] - jnp.float32((width - 1) / 2)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    # Where each output pixel comes from. Rows count downwards, hence the sign of the sines.
    from_y = cos * y + sin * x + jnp.float32((height - 1) / 2)
    from_x = cos * x - sin * y + jnp.float32((width - 1) / 2)
    top, left = jnp.floor(from_y), jnp.floor(from_x)
    # One pixel of fill all round, so that a clipped index reads the fill.
    framed = jnp.broadcast_to(jnp.asarray(fill), (height + 2, width + 2, channels))
    framed = framed.at[1:-1, 1:-1].set(image)

    def corner(row, column):
        rows = jnp.clip(row, -1, height).astype(jnp.int32) + 1
        columns = jnp.clip(column, -1, width).astype(jnp.int32) + 1
        return framed[rows, columns]

    down, right = (from_y - top)[..., None], (from_x - left)[..., None]
    upper = corner(top, left) * (1 - right) + corner(top, left + 1) * right
    lower = corner(top + 1, left) * (1 - right) + corner(top + 1, left + 1) * right
    return upper * (1 - down) + lower * down


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
