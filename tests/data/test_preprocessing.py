import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from fedjax_sim.core.errors import UserError
from fedjax_sim.data import Preprocessing, augment, normalise
from fedjax_sim.tasks.preprocessing import black, rotate, shifted_crop

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (6, 9, 7, 3), dtype=np.uint8)
COLOUR = Preprocessing((0.5, 0.4, 0.3), (0.2, 0.25, 0.5))


def test_normalise_agrees_with_float64():
    expected = (IMAGES.astype(np.float64) / 255 - np.array(COLOUR.mean)) / np.array(COLOUR.std)
    got = normalise(IMAGES, COLOUR)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_invert_is_what_fedmr_does_to_femnist():
    got = normalise(IMAGES, Preprocessing((0.5,), (0.5,), invert=True))
    np.testing.assert_allclose(got, (0.5 - IMAGES / 255) / 0.5, atol=1e-6)


def test_normalise_takes_any_leading_axes():
    got = normalise(IMAGES.reshape(2, 3, 9, 7, 3), COLOUR)
    np.testing.assert_array_equal(np.asarray(got).reshape(IMAGES.shape), normalise(IMAGES, COLOUR))


def test_normalise_refuses_floats_and_wrong_channels():
    with pytest.raises(UserError, match="uint8"):
        normalise(IMAGES.astype(np.float32), COLOUR)
    with pytest.raises(UserError, match=r"preprocessing.mean.*3 numbers.*1 channels"):
        normalise(IMAGES[..., :1], COLOUR)


def test_nothing_on_returns_the_same_images():
    images = normalise(IMAGES, COLOUR)
    assert augment(jax.random.key(0), images, COLOUR) is images


def test_flip_gives_the_image_or_its_mirror_about_half_the_time():
    images = jnp.tile(normalise(IMAGES[:1], COLOUR), (400, 1, 1, 1))
    got = np.asarray(augment(jax.random.key(1), images, Preprocessing(flip=True)))
    original = (got == np.asarray(images)).all((1, 2, 3))
    mirrored = (got == np.asarray(images)[:, :, ::-1]).all((1, 2, 3))
    assert (original ^ mirrored).all()
    assert 150 < mirrored.sum() < 250


def test_crop_is_a_window_of_the_zero_padded_image_and_reaches_every_shift():
    pad = 2
    images = jnp.tile(normalise(IMAGES[:1], COLOUR), (300, 1, 1, 1))
    got = np.asarray(augment(jax.random.key(2), images, Preprocessing(crop_padding=pad)))
    padded = np.pad(np.asarray(images[0]), ((pad, pad), (pad, pad), (0, 0)))
    windows = [padded[i : i + 9, j : j + 7] for i in range(5) for j in range(5)]
    which = [[k for k, w in enumerate(windows) if np.array_equal(w, g)] for g in got]
    assert all(len(w) == 1 for w in which)
    assert {w[0] for w in which} == set(range(25))


def test_shifted_crop_at_the_middle_is_the_image():
    image = normalise(IMAGES[0], COLOUR)
    np.testing.assert_array_equal(shifted_crop(image, jnp.array([3, 3]), 3), image)


@pytest.mark.parametrize("degrees", [-30.0, -4.0, 0.0, 11.0, 90.0])
def test_rotation_agrees_with_scipy(degrees):
    image, fill = np.asarray(normalise(IMAGES[0], COLOUR)), black(COLOUR)
    angle = np.deg2rad(degrees)
    y, x = np.mgrid[:9, :7] - np.array([4.0, 3.0])[:, None, None]
    where = np.cos(angle) * y + np.sin(angle) * x + 4, np.cos(angle) * x - np.sin(angle) * y + 3
    expected = np.stack(
        [
            scipy.ndimage.map_coordinates(image[..., c], where, order=1, mode="grid-constant", cval=fill[c])
            for c in range(3)
        ],
        -1,
    )
    np.testing.assert_allclose(rotate(jnp.asarray(image), jnp.float32(angle), fill), expected, atol=2e-4)


def test_rotation_by_90_degrees_is_counter_clockwise():
    square = jnp.asarray(IMAGES[0, :7], jnp.float32)
    got = rotate(square, jnp.float32(np.pi / 2), np.zeros(1, np.float32))
    np.testing.assert_allclose(got, np.rot90(square), atol=1e-2)


def test_rotation_fills_with_black_so_that_it_commutes_with_normalisation():
    white = np.full((1, 9, 9, 3), 255, np.uint8)
    got = np.asarray(
        augment(
            jax.random.key(5), normalise(white, COLOUR), Preprocessing(COLOUR.mean, COLOUR.std, rotation=45)
        )
    )
    low, high = normalise(np.zeros((1, 1, 1, 3), np.uint8), COLOUR), normalise(white[:, :1, :1], COLOUR)
    assert (got >= np.asarray(low) - 1e-4).all() and (got <= np.asarray(high) + 1e-4).all()
    assert (got < np.asarray(high) - 0.1).any()
    np.testing.assert_allclose(black(COLOUR), np.asarray(low).ravel(), atol=1e-6)


ALL = Preprocessing(COLOUR.mean, COLOUR.std, flip=True, crop_padding=2, rotation=15.0)


def test_augmentation_is_the_same_under_jit_vmap_and_scan():
    images = jnp.stack([normalise(IMAGES, COLOUR)] * 2)
    keys = jax.random.split(jax.random.key(3), 2)
    plain = jnp.stack([augment(k, x, ALL) for k, x in zip(keys, images, strict=True)])
    vmapped = jax.jit(jax.vmap(lambda k, x: augment(k, x, ALL)))(keys, images)
    _, scanned = jax.lax.scan(lambda c, kx: (c, augment(kx[0], kx[1], ALL)), 0, (keys, images))
    np.testing.assert_allclose(vmapped, plain, atol=1e-5)
    np.testing.assert_allclose(scanned, plain, atol=1e-5)
    assert not np.allclose(plain[0], plain[1])


def test_augmentation_is_the_same_under_x64():
    """Which makes JAX draw 64 bits where a draw leaves its type open."""
    every = Preprocessing((0.5,), (0.25,), flip=True, rotation=20, crop_padding=2)
    images, key = normalise(IMAGES, every), jax.random.key(5)
    wanted = augment(key, images, every)
    with jax.enable_x64(True):
        found = augment(key, images, every)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, wanted)


def test_padding_a_batch_changes_nothing_for_the_images_before_it():
    images = normalise(IMAGES, COLOUR)
    padded = jnp.concatenate([images, jnp.zeros_like(images)])
    key = jax.random.key(4)
    np.testing.assert_allclose(augment(key, padded, ALL)[: len(images)], augment(key, images, ALL), atol=1e-6)


@pytest.mark.parametrize(
    ("field", "kwargs"),
    [
        ("mean", {"mean": ()}),
        ("mean", {"mean": (float("nan"),)}),
        ("mean", {"mean": "0.5"}),
        ("mean", {"mean": ("half",)}),
        ("std", {"std": (0.0,)}),
        ("std", {"mean": (0.5, 0.5)}),
        ("flip", {"flip": "yes"}),
        ("crop_padding", {"crop_padding": -1}),
        ("crop_padding", {"crop_padding": 1.5}),
        ("rotation", {"rotation": 200}),
        ("rotation", {"rotation": float("nan")}),
    ],
)
def test_mistakes_name_the_field(field, kwargs):
    with pytest.raises(UserError) as caught:
        Preprocessing(**kwargs)
    assert caught.value.field == f"preprocessing.{field}"
