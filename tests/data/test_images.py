import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_sim.data.images import resize, with_channels

Image = pytest.importorskip("PIL.Image")


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(0, 1000))
def test_resize_agrees_with_pillow_within_one_level(h, w, new_h, new_w, seed):
    image = np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(image).resize((new_w, new_h), Image.Resampling.BILINEAR))
    got = resize(image[None], (new_h, new_w))[0]
    assert abs(got.astype(int) - expected.astype(int)).max() <= 2


def test_resize_keeps_a_constant_and_does_not_depend_on_the_chunk():
    flat = np.full((3, 7, 5, 1), 201, np.uint8)
    assert (resize(flat, (11, 3)) == 201).all()
    images = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), dtype=np.uint8)
    np.testing.assert_array_equal(resize(images, (28, 20)), resize(images, (28, 20), chunk=2))


def test_resize_to_the_same_size_is_the_array_itself():
    images = np.zeros((2, 4, 5, 1), np.uint8)
    assert resize(images, (4, 5)) is images


def test_channels_are_kept_or_repeated_and_nothing_else():
    grey = np.random.default_rng(0).integers(0, 256, (2, 3, 3, 1), dtype=np.uint8)
    assert with_channels(grey, 1) is grey
    np.testing.assert_array_equal(with_channels(grey, 3), np.concatenate([grey] * 3, -1))
    with pytest.raises(ValueError, match="3 channels"):
        with_channels(with_channels(grey, 3), 1)
