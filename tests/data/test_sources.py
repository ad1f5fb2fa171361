import importlib
import os
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from fedjax_sim.core.errors import UserError
from fedjax_sim.data import PRESETS, PartitionConfig, Preprocessing, load, names, partition, tfds_sets
from fedjax_sim.data.digits import DOMAINS

RNG = np.random.default_rng(0)


def arrays(train=12, test=6, shape=(5, 4, 3), classes=3, **more):
    given = {
        "train_images": RNG.integers(0, 256, (train, *shape), dtype=np.uint8),
        "train_labels": (np.arange(train) % classes).astype(np.uint8),
        "test_images": RNG.integers(0, 256, (test, *shape), dtype=np.uint8),
        "test_labels": (np.arange(test) % classes).astype(np.uint8),
    }
    return given | more


def test_digits_are_split_by_class_and_have_all_eight_bits():
    d = load("digits")
    assert d.train_images.shape == (1438, 8, 8, 1) and d.test_images.shape == (359, 8, 8, 1)
    assert d.train_images.min() == 0 and d.train_images.max() == 255
    shares = np.bincount(d.test_labels) / (np.bincount(d.train_labels) + np.bincount(d.test_labels))
    assert (abs(shares - 0.2) < 0.01).all()
    np.testing.assert_array_equal(d.train_images, load("digits").train_images)


def test_digits_domains_shift_features_and_not_labels():
    d = load("digits-domains")
    assert d.domain_names == DOMAINS and d.image_shape == (16, 16, 3)
    by_domain = [d.train_images[d.train_domains == k].astype(int) for k in range(5)]
    labels = [d.train_labels[d.train_domains == k] for k in range(5)]
    assert all(np.array_equal(labels[0], other) for other in labels)
    np.testing.assert_array_equal(by_domain[1], 255 - by_domain[0])
    means = [images.mean() for images in by_domain]
    assert all(abs(a - b) > 1 for i, a in enumerate(means) for b in means[:i])
    assert np.ptp(by_domain[4], axis=-1).mean() > 20 and np.ptp(by_domain[2], axis=-1).max() == 0
    train, test = (
        {im.tobytes() for im in part[:n]} for part, n in ((d.train_images, 1438), (d.test_images, 359))
    )
    assert not train & test


def test_npz_with_everything_optional(tmp_path):
    more = {
        "train_domain": np.arange(12) % 2,
        "test_domain": np.arange(6) % 2,
        "domain_names": np.array(["photo", "sketch"]),
        "train_writer": np.arange(12) % 4,
        "test_writer": np.arange(6) % 4,
        "class_names": np.array(["a", "b", "c"]),
        "train_coarse_labels": np.arange(12) % 2,
        "test_coarse_labels": np.arange(6) % 2,
        "coarse_names": np.array(["x", "y"]),
        "unrelated": np.zeros(3),
    }
    np.savez(tmp_path / "mine.npz", **arrays(**more))
    d = load(f"npz:{tmp_path}/mine.npz")
    assert (d.name, d.class_names, d.domain_names) == ("mine", ("a", "b", "c"), ("photo", "sketch"))
    assert d.train_writers.dtype == np.int32
    coarse = load(f"npz:{tmp_path}/mine.npz#coarse", preprocessing=Preprocessing((0.1,), (0.2,)))
    assert (
        coarse.num_classes == 2 and coarse.class_names == ("x", "y") and coarse.preprocessing.mean == (0.1,)
    )
    np.testing.assert_array_equal(coarse.train_labels, np.arange(12) % 2)


def test_a_folder_of_arrays_is_read_as_one_file_is_and_its_images_stay_there(tmp_path):
    given = arrays(train_domain=np.arange(12) % 2, test_domain=np.arange(6) % 2)
    np.savez(tmp_path / "mine.npz", **given)
    (tmp_path / "mine").mkdir()
    for name, array in given.items():
        np.save(tmp_path / "mine" / f"{name}.npy", array)
    one, other = load(f"npz:{tmp_path}/mine.npz"), load(f"npy:{tmp_path}/mine")
    assert isinstance(other.train_images, np.memmap) and not isinstance(other.train_labels, np.memmap)
    assert one.arrays.keys() == other.arrays.keys()
    for name, array in one.arrays.items():
        np.testing.assert_array_equal(array, other.arrays[name])
    with pytest.raises(UserError, match=r"npy:.*no such folder"):
        load(f"npy:{tmp_path}/mine.npz")
    (tmp_path / "mine" / "test_labels.npy").unlink()
    with pytest.raises(UserError, match=r"holds no test_labels"):
        load(f"npy:{tmp_path}/mine")


def test_npz_without_channels_or_names(tmp_path):
    np.savez(tmp_path / "grey.npz", **arrays(shape=(5, 4)))
    d = load(f"npz:{tmp_path}/grey.npz")
    assert d.image_shape == (5, 4, 1) and d.class_names == ("0", "1", "2")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"train_labels": None}, "holds no train_labels"),
        ({"train_images": np.zeros((12, 5, 4, 3), np.float32)}, "floating-point"),
        ({"train_labels": np.zeros(12)}, "not integers"),
        ({"train_labels": np.array([{}] * 12)}, "cannot be read"),
        ({"class_names": np.array(["a", "b"])}, "outside 0..1"),
        ({"train_labels": np.full(12, -1)}, "data.train_labels = -1: negative"),
        ({"train_labels": np.full(12, -1).astype(np.uint32)}, r"num_classes = 4294967296: more classes than"),
        ({"train_labels": np.zeros(0, int)}, "empty"),
        (
            {"train_images": np.zeros((12, 3, 32, 32), np.uint8)}
            | {"test_images": np.zeros((6, 3, 32, 32), np.uint8)},
            "channels first",
        ),
    ],
)
def test_damaged_npz_says_what_is_wrong(change, says, tmp_path):
    given = {k: v for k, v in (arrays() | change).items() if v is not None}
    np.savez(tmp_path / "bad.npz", **given)
    with pytest.raises(UserError, match=says):
        load(f"npz:{tmp_path}/bad.npz")


def test_labels_that_start_at_one_are_told(tmp_path):
    np.savez(
        tmp_path / "one.npz", **arrays(train_labels=1 + np.arange(12) % 3, test_labels=1 + np.arange(6) % 3)
    )
    with pytest.warns(UserWarning, match=r"one: 1 of 4 classes have no training sample \(0\)"):
        assert load(f"npz:{tmp_path}/one.npz").num_classes == 4


def test_npz_that_is_cut_off_or_no_npz_at_all(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", **arrays(train=200))
    whole = (tmp_path / "a.npz").read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"hello", whole[:300] + b"\0" * 200 + whole[500:]):
        (tmp_path / "a.npz").write_bytes(content)
        with pytest.raises(UserError, match="cannot be read"):
            load(f"npz:{tmp_path}/a.npz")
    with pytest.raises(UserError, match="no such file"):
        load(f"npz:{tmp_path}/b.npz")


def paint(path, value=0, size=(4, 4), mode="RGB"):
    image = pytest.importorskip("PIL.Image")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.new(mode, size, (value, 0, 0) if mode == "RGB" else value).save(path)


def test_folder_of_classes_is_split_the_same_way_every_time(tmp_path):
    for c in ("cat", "dog"):
        for i in range(10):
            paint(tmp_path / c / f"{i}.png", 10 * i)
    d = load(f"folder:{tmp_path}#test=0.3")
    assert d.class_names == ("cat", "dog") and d.image_shape == (4, 4, 3)
    assert np.bincount(d.test_labels).tolist() == [3, 3] and np.bincount(d.train_labels).tolist() == [7, 7]
    np.testing.assert_array_equal(d.test_images, load(f"folder:{tmp_path}#test=0.3").test_images)
    assert len(load(f"folder:{tmp_path}").test_labels) == 4
    assert load(f"folder:{tmp_path}#size=2x3,classes=dog+cat").class_names == ("dog", "cat")
    assert load(f"folder:{tmp_path}", size=6).image_shape == (6, 6, 3)


def test_folder_with_domains_and_with_train_and_test(tmp_path):
    for part, count in (("train", 3), ("val", 1)):
        for domain in ("photo", "sketch"):
            for c in ("a", "b"):
                for i in range(count):
                    paint(tmp_path / part / domain / c / f"{i}.png", i, mode="L")
    d = load(f"folder:{tmp_path}")
    assert d.domain_names == ("photo", "sketch") and d.image_shape == (4, 4, 1)
    assert len(d.train_labels) == 12 and len(d.test_labels) == 4
    assert np.bincount(d.train_domains).tolist() == [6, 6]


def test_folder_with_the_lists_of_domainnet(tmp_path):
    for domain in ("clipart", "real"):
        files = [f"{domain}/{c}/{i}.png" for c in ("bird", "zebra") for i in range(3)]
        for file in files:
            paint(tmp_path / file)
        (tmp_path / f"{domain}_train.txt").write_text("".join(f"{f} 0\n" for f in files if "2" not in f))
        (tmp_path / f"{domain}_test.txt").write_text("".join(f"{f} 0\n" for f in files if "2" in f))
    d = load(f"folder:{tmp_path}")
    assert (len(d.train_labels), len(d.test_labels), d.domain_names) == (8, 4, ("clipart", "real"))


def test_folder_as_tiny_imagenet_is_published(tmp_path):
    for c in ("n01", "n02"):
        for i in range(3):
            paint(tmp_path / "train" / c / "images" / f"{c}_{i}.JPEG", size=(64, 64))
    rows = []
    for i, c in enumerate(("n02", "n01")):
        paint(tmp_path / "val" / "images" / f"val_{i}.JPEG", size=(64, 64))
        rows.append(f"val_{i}.JPEG\t{c}\t0\t0\t1\t1\n")
    (tmp_path / "val" / "val_annotations.txt").write_text("".join(rows))
    (tmp_path / "test" / "images").mkdir(parents=True)
    d = load(f"folder:{tmp_path}")
    assert d.class_names == ("n01", "n02") and d.test_labels.tolist() == [1, 0] and len(d.train_labels) == 6


def one_picture(folder, image, suffix="png", **options):
    """What a set of copies of this picture holds: u8[H, W, C]."""
    for i in range(4):
        path = folder / f"{'ab'[i % 2]}" / f"{i}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, **options)
    return load(f"folder:{folder}").train_images[0]


def test_sixteen_bits_lose_the_low_byte(tmp_path):
    image = pytest.importorskip("PIL.Image")
    ramp = (np.arange(64).reshape(8, 8) * 1040).astype(np.uint16)  # 0 .. 65,520
    for suffix in ("png", "tif", "ppm"):
        got = one_picture(tmp_path / suffix, image.fromarray(ramp), suffix)
        np.testing.assert_array_equal(got, (ramp >> 8)[..., None])
    big_endian = image.frombytes("I;16B", (8, 8), ramp.astype(">u2").tobytes())
    np.testing.assert_array_equal(one_picture(tmp_path / "b", big_endian, "tif"), (ramp >> 8)[..., None])
    seen = one_picture(tmp_path / "t", image.fromarray(ramp), transparency=1040)
    assert seen[0, 1, 0] == 255 and seen[0, 2, 0] == 2080 >> 8
    for name, dtype in (("i", np.int32), ("f", np.float32)):
        with pytest.raises(UserError, match=r"\.tif has 32 bits a pixel \(mode '[IF]'\)"):
            one_picture(tmp_path / name, image.fromarray(ramp.astype(dtype)), "tif")
    np.testing.assert_array_equal(
        tfds_sets._eight_bits(ramp[..., None], "tfds:x"), (ramp >> 8).astype(np.uint8)[..., None]
    )
    with pytest.raises(UserError, match="its images are float32"):
        tfds_sets._eight_bits(ramp.astype(np.float32), "tfds:x")


def test_pictures_are_turned_as_their_exif_tag_says(tmp_path):
    image = pytest.importorskip("PIL.Image")
    exif = image.Exif()
    exif[0x0112] = 6  # a camera held upright: the stored left is the seen top
    stored = image.new("RGB", (16, 8), (0, 0, 0))
    stored.paste((255, 255, 255), (0, 0, 8, 8))
    seen = one_picture(tmp_path / "jpg", stored, "jpg", exif=exif)
    assert seen.shape == (16, 8, 3) and seen[:6].min() > 200 and seen[10:].max() < 50
    deep = image.fromarray((np.arange(8).reshape(2, 4) * 256).astype(np.uint16))
    turned = one_picture(tmp_path / "png", deep, "png", exif=exif)
    np.testing.assert_array_equal(turned[..., 0], np.rot90(np.arange(8).reshape(2, 4), -1))


def test_transparent_pictures_lie_on_white(tmp_path):
    image = pytest.importorskip("PIL.Image")
    alpha = np.array([[0, 51], [204, 255]], np.uint8)
    red = np.stack([np.full_like(alpha, 200), np.zeros_like(alpha), np.zeros_like(alpha), alpha], -1)
    share = alpha[..., None] / 255
    wanted = np.floor(np.array([200, 0, 0]) * share + 255 * (1 - share) + 0.5)
    np.testing.assert_array_equal(one_picture(tmp_path / "rgba", image.fromarray(red)), wanted)
    np.testing.assert_array_equal(tfds_sets._eight_bits(red, "tfds:x"), wanted)
    grey = image.fromarray(np.ascontiguousarray(red[..., [1, 3]]))
    np.testing.assert_array_equal(one_picture(tmp_path / "la", grey)[..., 0], 255 - alpha)
    palette = image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.putpixel((0, 0), 0)
    seen = one_picture(tmp_path / "p", palette, transparency=0)
    assert seen[0, 0].tolist() == [255] * 3 and seen[1, 1].tolist() == [10, 20, 30]
    dark = image.new("L", (2, 2), 7)
    dark.putpixel((0, 0), 9)
    assert one_picture(tmp_path / "l", dark, transparency=9)[..., 0].tolist() == [[255, 7], [7, 7]]


def test_pictures_of_other_kinds_become_grey_or_rgb(tmp_path):
    image = pytest.importorskip("PIL.Image")
    assert set(one_picture(tmp_path / "1", image.new("1", (2, 2), 1)).ravel()) == {255}
    cmyk = one_picture(tmp_path / "cmyk", image.new("CMYK", (2, 2), (0, 255, 255, 0)), "tif")
    assert cmyk[0, 0].tolist() == [255, 0, 0]


def test_hidden_folders_and_what_systems_leave_make_no_class(tmp_path):
    for base in (tmp_path / "one", tmp_path / "two" / "art"):
        for c in ("cat", "dog", ".ipynb_checkpoints", "__MACOSX"):
            for i in range(2):
                paint(base / c / f"{i}.png")
        paint(base / "cat" / "._0.png")
        (base / "cat" / "Thumbs.db").write_bytes(b"no picture")
    for i in range(2):
        paint(tmp_path / "two" / ".ipynb_checkpoints" / "cat" / f"{i}.png")
        paint(tmp_path / "two" / "__MACOSX" / "art" / "cat" / f"{i}.png")
    one, two = load(f"folder:{tmp_path}/one"), load(f"folder:{tmp_path}/two")
    assert (one.class_names, one.domain_names) == (("cat", "dog"), ())
    assert (two.class_names, two.domain_names) == (("cat", "dog"), ("art",))
    assert len(one.train_labels) + len(one.test_labels) == 4
    (tmp_path / "one" / "notes").mkdir()
    with pytest.warns(UserWarning, match="no images .* in notes: no class is made of it"):
        assert load(f"folder:{tmp_path}/one").class_names == ("cat", "dog")
    # DomainNet's lists: a hidden folder beside the domains has none, and needs none.
    for part, i in (("train", 0), ("test", 1)):
        lines = "".join(f"art/{c}/{i}.png {n}\n" for n, c in enumerate(("cat", "dog")))
        (tmp_path / "two" / f"art_{part}.txt").write_text(lines)
    assert len(load(f"folder:{tmp_path}/two").train_labels) == 2


def test_pictures_that_cannot_be_read_are_counted_by_class(tmp_path):
    """A class of which half is missing would else look like a small class."""
    for c in ("a", "b"):
        for i in range(4):
            paint(tmp_path / c / f"{i}.png")
    for i in range(5):
        (tmp_path / "b" / f"p{i}.HEIC").write_bytes(b"not read")
    (tmp_path / "a" / "notes.txt").write_text("no picture")
    with pytest.warns(UserWarning) as found:
        assert len(load(f"folder:{tmp_path}").train_labels) == 6
    (told,) = [str(one.message) for one in found]
    assert f"folder:{tmp_path}: 5 files of class b are passed over (.heic); convert them to .png" in told
    (tmp_path / "a" / "one.cr2").write_bytes(b"not read")
    with pytest.warns(UserWarning, match=r"1 file of class a is passed over \(\.cr2\), 5 files of class b"):
        load(f"folder:{tmp_path}")


def test_links_are_followed_and_broken_ones_told(tmp_path):
    for c in ("bird", "fox"):
        for i in range(2):
            paint(tmp_path / "store" / c / f"{i}.png")
    (tmp_path / "set").mkdir()
    for c in ("bird", "fox"):
        (tmp_path / "set" / c).symlink_to(tmp_path / "store" / c)
    paint(tmp_path / "set" / "ant" / "0.png")
    (tmp_path / "set" / "ant" / "1.png").symlink_to(tmp_path / "store" / "fox" / "1.png")
    assert load(f"folder:{tmp_path}/set").class_names == ("ant", "bird", "fox")
    (tmp_path / "domains").mkdir()
    for domain in ("art", "photo"):
        (tmp_path / "domains" / domain).symlink_to("../store")
    assert load(f"folder:{tmp_path}/domains").domain_names == ("art", "photo")
    (tmp_path / "set" / "gone").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"gone is a link to nothing \(nowhere\)"):
        load(f"folder:{tmp_path}/set")
    (tmp_path / "set" / "gone").unlink()
    (tmp_path / "set" / "self").symlink_to("self")
    with pytest.raises(UserError, match="self is a link to nothing"):
        load(f"folder:{tmp_path}/set")
    (tmp_path / "set" / "self").unlink()
    for ring in (("store", "fox", "round", ".."), ("store", "fox", "round", "../../set")):
        link = tmp_path.joinpath(*ring[:-1])
        link.symlink_to(ring[-1])
        with pytest.raises(UserError, match="is a link to a folder in which it lies"):
            load(f"folder:{tmp_path}/{'set' if 'set' in ring[-1] else 'store'}")
        link.unlink()


def test_a_path_that_exists_goes_first(tmp_path):
    for c in ("c#", "c++", "a, b", "cat"):
        for i in range(2):
            paint(tmp_path / "c#" / "set#1" / c / f"{i}.png", size=(4, 4))
    d = load(f"folder:{tmp_path}/c#/set#1")
    assert d.class_names == ("a, b", "c#", "c++", "cat") and d.name == "set#1"
    d = load(f"folder:{tmp_path}/c#/set#1#size=2x3,classes=cat+c+++c#+a, b,test=0.5")
    assert d.class_names == ("cat", "c++", "c#", "a, b") and d.image_shape == (2, 3, 3)
    more = {f"{part}_x_labels": np.arange(n) % 2 for part, n in (("train", 12), ("test", 6))}
    np.savez(tmp_path / "c#" / "my#set.npz", **arrays(**more))
    assert load(f"npz:{tmp_path}/c#/my#set.npz").num_classes == 3
    assert load(f"npz:{tmp_path}/c#/my#set.npz#x").num_classes == 2
    with pytest.raises(UserError, match=r"c#/none\.npz': no such file"):
        load(f"npz:{tmp_path}/c#/none.npz#x")
    with pytest.raises(UserError, match=r"images of c, zebra\. The classes are a, b, c#, c\+\+, cat\."):
        load(f"folder:{tmp_path}/c#/set#1#classes=cat+c+zebra")
    with pytest.raises(UserError, match="no such folder"):
        load("folder:none#classes=" + "+".join(f"class {i}" for i in range(345)))


def test_very_large_pictures_are_told(tmp_path, monkeypatch):
    image = pytest.importorskip("PIL.Image")
    for i in range(4):
        paint(tmp_path / "ab"[i % 2] / f"{i}.png", size=(4, 4))
    monkeypatch.setattr(image, "MAX_IMAGE_PIXELS", 10)  # 16 are warned of by Pillow, 20 are too many
    assert load(f"folder:{tmp_path}#size=2").image_shape == (2, 2, 3)
    monkeypatch.setattr(image, "MAX_IMAGE_PIXELS", 7)
    with pytest.raises(UserError, match=r"\.png is too large for Pillow"):
        load(f"folder:{tmp_path}#size=2")


def test_folders_that_cannot_be_read_say_why(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load(f"folder:{tmp_path}/none")
    with pytest.raises(UserError, match="no images"):
        load(f"folder:{tmp_path}")
    paint(tmp_path / "x" / "a" / "0.png")
    with pytest.raises(UserError, match="only one image of class 'a'"):
        load(f"folder:{tmp_path}/x")
    paint(tmp_path / "x" / "a" / "1.png", size=(5, 5))
    with pytest.raises(UserError, match="Say a size"):
        load(f"folder:{tmp_path}/x")
    with pytest.raises(UserError, match="no training images of zebra"):
        load(f"folder:{tmp_path}/x#classes=a+zebra")
    (tmp_path / "x" / "a" / "2.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"2.png cannot be read as an image"):
        load(f"folder:{tmp_path}/x#size=4")
    paint(tmp_path / "0.png")
    with pytest.raises(UserError, match="neither at class/file nor"):
        load(f"folder:{tmp_path}")
    paint(tmp_path / "y" / "train" / "a" / "0.png")
    with pytest.raises(UserError, match="without `test`"):
        load(f"folder:{tmp_path}/y")


BUILDER = '''
import io
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

class Builder(tfds.core.GeneratorBasedBuilder):
    """Small."""
    VERSION = tfds.core.Version("1.0.0")
    def _info(self):
        features = {"image": tfds.features.Image(shape=(None, None, 3)),
                    "label": tfds.features.ClassLabel(names=["a", "b"]),
                    "coarse_label": tfds.features.ClassLabel(num_classes=3)}
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))
    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(6), "test": self._generate_examples(3)}
    def _generate_examples(self, count):
        for i in range(count):
            file = io.BytesIO()
            pixels = np.zeros((4, 5, 3), np.uint8)
            pixels[0, 1] = i
            Image.fromarray(pixels).save(file, "PNG")
            file.seek(0)
            yield i, {"image": file, "label": i % 2, "coarse_label": i % 3}
'''


@pytest.mark.filterwarnings("default")
def test_a_prepared_set_is_read_without_tensorflow(tmp_path, monkeypatch):
    for module in ("tensorflow_datasets", "array_record", "PIL", "importlib_resources"):
        pytest.importorskip(module)
    package = tmp_path / "code" / "fs_small_set"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "fs_small_set_dataset_builder.py").write_text(BUILDER)
    for file in ("README.md", "TAGS.txt", "CITATIONS.bib"):
        (package / file).write_text("")
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    module = importlib.import_module("fs_small_set.fs_small_set_dataset_builder")
    module.Builder(data_dir=str(tmp_path / "data"), file_format="array_record").download_and_prepare()
    assert "tensorflow" not in sys.modules
    d = load("tfds:fs_small_set", data_dir=tmp_path / "data")
    assert d.class_names == ("a", "b") and d.image_shape == (4, 5, 3) and len(d.test_labels) == 3
    assert sorted(d.train_images[:, 0, 1, 0].tolist()) == list(range(6))
    np.testing.assert_array_equal(d.train_labels, d.train_images[:, 0, 1, 0] % 2)
    coarse = load("tfds:fs_small_set#coarse_label,size=8", data_dir=tmp_path / "data")
    assert coarse.num_classes == 3 and coarse.image_shape == (8, 8, 3)
    with pytest.raises(UserError, match="no feature 'fine'"):
        load("tfds:fs_small_set#fine", data_dir=tmp_path / "data")
    with pytest.raises(UserError, match="'image' holds no classes"):
        load("tfds:fs_small_set#image", data_dir=tmp_path / "data")


def test_a_set_that_is_not_prepared_says_how(tmp_path):
    with pytest.raises(UserError) as caught:
        load("tfds:mnist", data_dir=tmp_path)
    for part in (
        "needs TensorFlow",
        "pip install -e '.[prepare]'",
        "scripts/prepare_tfds.py mnist --data-dir",
    ):
        assert part in str(caught.value)


def test_the_script_that_prepares_says_what_is_missing(monkeypatch, capsys):
    script = Path(__file__).parents[2] / "scripts" / "prepare_tfds.py"
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    assert runpy.run_path(str(script))["main"](["mnist"]) == 2
    assert ".venv/bin/pip install -e '.[prepare]'" in capsys.readouterr().err


def test_presets_are_found_as_npz_and_checked(tmp_path, monkeypatch):
    np.savez(tmp_path / "cifar10.npz", **arrays(train=20, test=10, shape=(32, 32, 3), classes=10))
    d = load("cifar10", data_dir=tmp_path)
    assert (
        d.num_classes == 10 and d.preprocessing == Preprocessing((0.5,), (0.5,)) and "Krizhevsky" in d.origin
    )
    monkeypatch.setenv("FEDJAX_SIM_DATA", str(tmp_path))
    assert load("cifar10-lips").preprocessing == Preprocessing((0.0,), (1.0,))
    np.savez(tmp_path / "cifar100.npz", **arrays(classes=7, class_names=np.array(list("abcdefg"))))
    with pytest.raises(UserError, match="has 7 classes, cifar100 has 100"):
        load("cifar100")
    with pytest.raises(UserError, match="no train_coarse_labels"):
        load("cifar100-coarse")


def test_digit_five_is_a_union_of_files_of_different_shapes(tmp_path):
    shapes = {"mnist": (28, 28, 1), "svhn": (32, 32, 3), "usps": (16, 16, 1), "mnist_m": (32, 32, 3)}
    for name, shape in (shapes | {"synth_digits": (32, 32, 3)}).items():
        np.savez(tmp_path / f"{name}.npz", **arrays(train=20, test=10, shape=shape, classes=10))
    d = load("digit-five", data_dir=tmp_path)
    assert d.image_shape == (28, 28, 3) and len(d.domain_names) == 5
    assert partition(d, PartitionConfig("domain", clients=5)).sizes().tolist() == [20] * 5


def test_a_missing_preset_names_every_way_to_get_it(tmp_path):
    with pytest.raises(UserError) as caught:
        load("cifar10", data_dir=tmp_path)
    for part in (
        f"{tmp_path}/cifar10.npz",
        "train_images and test_images, u8[n, 32, 32, 3], train_labels and test_labels, integers [n]",
        "; or prepare it once",
        "prepare_tfds.py cifar10",
        "FEDJAX_SIM_DATA",
    ):
        assert part in str(caught.value)
    with pytest.raises(UserError, match="train_coarse_labels and test_coarse_labels"):
        load("cifar100-coarse", data_dir=tmp_path)
    with pytest.raises(UserError, match="image folders into"):
        load("domainnet", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("cifar-10", "near: cifar10"),
        ("Digits", "near: digits"),
        ("qqqq", "Known: digits"),
        ("", "not the name of a set"),
        (None, "not the name of a set"),
        ("npz:", "nothing after the colon"),
        ("npz:a.npz#size=4", "not an option of npz"),
        ("folder:a#coarse", "not an option of folder"),
        ("folder:a#size=big", r"^data\.source = 'folder:a#size=big': size=big is not a size.*#size=64"),
        ("folder:a#resize=32", r"The options of folder: size \(64.* classes .* test "),
        ("folder:a#size=0", "not a size"),
        ("folder:a#test=much", "not a number"),
        ("folder:a#test=2", "between 0 and 1|no such folder"),
        ("tfds:a#b,c", "one too many"),
    ],
)
def test_sources_that_cannot_be_understood(source, says):
    with pytest.raises(UserError, match=says):
        load(source)


def test_the_name_of_a_folder_gets_the_scheme_that_reads_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    with pytest.raises(UserError, match=r"Did you mean folder:photos#size=64\? Known"):
        load("photos")
    with pytest.raises(UserError, match=r"Did you mean folder:\./photos#size=8\?"):
        load("./photos#size=8")


def test_arguments_of_load_are_checked():
    with pytest.raises(UserError, match=r"^data\.source = 'digits': it has one size only"):
        load("digits", size=16)
    with pytest.raises(UserError, match="not a Preprocessing"):
        load("digits", preprocessing={"mean": 0})


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_complete(name):
    preset = PRESETS[name]
    assert preset.npz and preset.origin and preset.licence and preset.why and name in names()
    assert not preset.class_names or len(preset.class_names) == preset.num_classes
    assert not preset.classes or len(preset.classes) == preset.num_classes
    assert all(member in PRESETS for member in preset.members)


REAL = os.environ.get("FEDJAX_SIM_DATA")


@pytest.mark.skipif(not REAL, reason="FEDJAX_SIM_DATA names no folder with real sets")
@pytest.mark.parametrize("name", ["cifar10", "cifar100", "cifar100-coarse", "femnist", "mnist", "pacs"])
def test_real_sets_load_and_split(name):
    stem = PRESETS[name].npz[0]
    if not os.path.exists(os.path.join(str(REAL), f"{stem}.npz")):
        pytest.skip(f"no {stem}.npz there")
    d = load(name)
    assert d.num_classes == PRESETS[name].num_classes
    assert set(np.unique(d.train_labels)) == set(range(d.num_classes))
    p = partition(d, PartitionConfig(clients=20, alpha=0.5))
    assert p.sizes().sum() == len(d.train_labels)
    if d.train_writers is not None:
        partition(d, PartitionConfig("natural", clients=20))
