import gzip

import numpy as np
import pytest

from fedjax_sim.core.errors import UserError
from fedjax_sim.data import PRESETS, load
from fedjax_sim.data.sources import how_to_get

RNG = np.random.default_rng(0)
IMAGES = {
    "train": RNG.integers(0, 256, (12, 5, 4), np.uint8),
    "t10k": RNG.integers(0, 256, (6, 5, 4), np.uint8),
}


def idx(values):
    """The bytes of the format, written by hand: zeros, the type, the axes, sizes and numbers, big-endian."""
    kind = {"uint8": 8, "int8": 9, "int16": 11, "int32": 12, "float32": 13, "float64": 14}[values.dtype.name]
    sizes = b"".join(int(n).to_bytes(4, "big") for n in values.shape)
    return bytes([0, 0, kind, values.ndim]) + sizes + values.astype(values.dtype.newbyteorder(">")).tobytes()


def write(folder, begin="", middle="-idx{}-ubyte", test="t10k", first=0, pack=False, dtype=np.uint8):
    folder.mkdir(parents=True, exist_ok=True)
    for part, images in IMAGES.items():
        name = begin + (test if part == "t10k" else part)
        labels = (first + np.arange(len(images)) % 3).astype(dtype)
        for kind, axes, values in (("images", 3, images), ("labels", 1, labels)):
            path = folder / f"{name}-{kind}{middle.format(axes)}{'.gz' if pack else ''}"
            path.write_bytes(gzip.compress(idx(values)) if pack else idx(values))
    return folder


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"pack": True},
        {"middle": ".idx{}-ubyte"},
        {"test": "test", "pack": True},
        {"begin": "kuzushiji-", "dtype": np.int32},
    ],
)
def test_the_four_files_are_read_as_they_are_named(how, tmp_path):
    d = load(f"idx:{write(tmp_path / 'my#set', **how)}")
    assert d.image_shape == (5, 4, 1) and d.num_classes == 3
    assert d.name == how.get("begin", "my#set-").rstrip("-")
    for got, wanted in ((d.train_images, IMAGES["train"]), (d.test_images, IMAGES["t10k"])):
        np.testing.assert_array_equal(got[..., 0], wanted)
    np.testing.assert_array_equal(d.train_labels, np.arange(12) % 3)
    np.testing.assert_array_equal(d.test_labels, np.arange(6) % 3)


def test_sets_of_emnist_are_turned_and_chosen_by_name(tmp_path):
    write(tmp_path, begin="emnist-letters-", test="test", first=1, pack=True)
    write(tmp_path, begin="emnist-digits-", test="test", pack=True)
    for member in ("letters", "emnist-letters"):
        d = load(f"idx:{tmp_path}#{member}")
        assert d.name == "emnist-letters" and d.image_shape == (4, 5, 1)
        np.testing.assert_array_equal(d.train_images[..., 0], IMAGES["train"].swapaxes(1, 2))
        np.testing.assert_array_equal(d.train_labels, np.arange(12) % 3)  # numbered from 1 in the files
    with pytest.raises(UserError, match=r"several sets in it; there: emnist-digits, emnist-letters"):
        load(f"idx:{tmp_path}")
    with pytest.raises(UserError, match=r"no set 'fashion' in it"):
        load(f"idx:{tmp_path}#fashion")


def test_colour_and_labels_that_start_at_one(tmp_path):
    write(tmp_path, first=1)
    colour = RNG.integers(0, 256, (12, 5, 4, 3), np.uint8)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(colour))
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(colour[:6]))
    with pytest.warns(UserWarning, match=r"1 of 4 classes have no training sample \(0\)"):
        d = load(f"idx:{tmp_path}")
    np.testing.assert_array_equal(d.train_images, colour)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda whole: b"hello world", "is not an idx file"),
        (lambda whole: b"", "is not an idx file"),
        (lambda whole: whole[:10], "holds 10 bytes, and its first ones say at least 16"),
        (lambda whole: whole[:-1], r"holds 255 bytes, and its first ones say 256 \(shape \(12, 5, 4\)\)"),
        (lambda whole: whole + b"\0", "holds 257 bytes"),
        (lambda whole: idx(np.zeros((12, 5, 4), np.float32)), "float32 with 3 axes, not 8-bit pictures"),
        (lambda whole: idx(np.zeros((12, 20), np.uint8)), "uint8 with 2 axes"),
        (lambda whole: idx(np.zeros((11, 5, 4), np.uint8)), "11 images need the shape"),
    ],
)
def test_damaged_files_name_what_is_wrong(change, says, tmp_path):
    path = write(tmp_path) / "train-images-idx3-ubyte"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=says):
        load(f"idx:{tmp_path}")


def test_files_that_are_missing_or_cut_off(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load(f"idx:{tmp_path}/none")
    with pytest.raises(UserError, match=r"no idx files in it. Give the folder with the four files of MNIST"):
        load(f"idx:{tmp_path}")
    write(tmp_path, pack=True)
    labels = tmp_path / "t10k-labels-idx1-ubyte.gz"
    whole = labels.read_bytes()
    for content in (whole[:-9], b"no gzip", whole[:12] + b"\xff" * 9 + whole[21:]):
        labels.write_bytes(content)
        with pytest.raises(UserError, match=r"t10k-labels-idx1-ubyte\.gz cannot be read"):
            load(f"idx:{tmp_path}")
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(
        idx(np.zeros((6, 3), np.uint8))
    )  # goes before the packed
    with pytest.raises(UserError, match="with 2 axes, not one integer for each picture"):
        load(f"idx:{tmp_path}")
    for file in tmp_path.glob("t10k-labels*"):
        file.unlink()
    with pytest.raises(UserError, match="no files for test-labels"):
        load(f"idx:{tmp_path}")
    with pytest.raises(UserError, match="'size=4' is not an option of idx"):
        load(f"idx:{tmp_path}#size=4")


def test_presets_that_are_published_so_say_it(tmp_path):
    told = {name for name in PRESETS if "idx:" in how_to_get(name, tmp_path)}
    assert told == {"mnist", "fashion_mnist", "emnist"}
