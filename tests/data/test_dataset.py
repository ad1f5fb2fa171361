import numpy as np
import pytest

from fedjax_sim.core.errors import UserError
from fedjax_sim.data import Dataset, Preprocessing, union

RNG = np.random.default_rng(0)


def make(name="small", shape=(6, 6, 1), train=20, test=8, classes=4, **more):
    given = {
        "name": name,
        "train_images": RNG.integers(0, 256, (train, *shape), dtype=np.uint8),
        "train_labels": np.arange(train) % classes,
        "test_images": RNG.integers(0, 256, (test, *shape), dtype=np.uint8),
        "test_labels": np.arange(test) % classes,
        "num_classes": classes,
    }
    return Dataset(**(given | more))


def test_labels_become_i32_and_classes_get_names():
    d = make(train_labels=(np.arange(20) % 4).astype(np.uint8))
    assert d.train_labels.dtype == np.int32
    assert d.class_names == ("0", "1", "2", "3")
    assert d.image_shape == (6, 6, 1)
    assert "20 train" in repr(d)


@pytest.mark.parametrize(
    ("field", "change", "says"),
    [
        ("train_images", {"train_images": np.zeros((20, 6, 6, 1), np.float32)}, "floating-point"),
        ("train_images", {"train_images": np.full((20, 6, 6, 1), 0.5)}, r"\(255 \* images\).round"),
        ("train_images", {"train_images": np.full((20, 6, 6, 1), 1.5)}, "normalisation belongs"),
        ("train_images", {"train_images": np.full((20, 6, 6, 1), np.nan)}, "NaN"),
        ("test_images", {"test_images": np.zeros((8, 6, 6, 1), np.int64)}, "not uint8"),
        ("train_images", {"train_images": np.zeros((20, 6, 6), np.uint8)}, "height, width, channels"),
        ("train_images", {"train_images": np.zeros((0, 6, 6, 1), np.uint8)}, "empty"),
        ("train_images", {"train_images": [[1]]}, "not a NumPy array"),
        ("test_images", {"test_images": np.zeros((8, 7, 6, 1), np.uint8)}, "train images have the shape"),
        ("train_labels", {"train_labels": np.arange(20)}, "outside 0..3"),
        ("test_labels", {"test_labels": np.arange(8) - 1}, "outside 0..3"),
        ("train_labels", {"train_labels": np.zeros(19, int)}, "20 images need"),
        ("train_labels", {"train_labels": np.full(20, np.nan)}, "not integers"),
        ("train_images", {"train_images": np.zeros((20, 6, 6, 1), np.uint16)}, "images >> 8"),
        ("train_images", {"train_images": np.zeros((20, 3, 32, 32), np.uint8)}, "channels first.*transpose"),
        ("train_images", {"train_images": np.zeros((20, 3, 48, 64), np.uint8)}, "channels first"),
        ("test_images", {"test_images": np.zeros((8, 1, 28, 28), np.uint8)}, "channels first"),
        ("num_classes", {"num_classes": 2**31}, r"more classes than there are images \(28\)"),
        (
            "train_domains",
            {"train_domains": np.full(20, 2**31 - 1), "test_domains": np.zeros(8, int)},
            "more domains than",
        ),
        ("num_classes", {"num_classes": 1}, "tell apart"),
        ("num_classes", {"num_classes": 4.0}, "whole number"),
        ("class_names", {"class_names": ("a", "b")}, "2 names for 4"),
        ("train_domains", {"train_domains": np.zeros(20, int)}, "only one of"),
        ("test_writers", {"train_writers": np.zeros(20, int), "test_writers": np.full(8, -1)}, "outside"),
        (
            "train_domains",
            {"train_domains": np.full(20, 3), "test_domains": np.zeros(8, int), "domain_names": ("a", "b")},
            "outside 0..1",
        ),
    ],
)
def test_mistakes_name_the_field(field, change, says):
    with pytest.raises(UserError, match=says) as caught:
        make(**change)
    assert caught.value.field == f"data.{field}"


@pytest.mark.parametrize(
    ("labels", "classes", "says"),
    [
        (1 + np.arange(20) % 4, 5, r"1 of 5 classes have no training sample \(0\)"),
        (((np.arange(20) % 4) - 1).astype(np.uint8), 256, r"252 of 256 .*\(3 to 254\).*uint8 is 255"),
        (np.array([0, 2, 5] * 6 + [9, 9]), 11, r"7 of 11 .*\(1, 3 to 4, 6 to 8, 10\)"),
    ],
)
def test_classes_that_no_sample_has_are_told(labels, classes, says):
    with pytest.warns(UserWarning, match=says):
        d = make(train_labels=labels, num_classes=classes)
    assert d.num_classes == classes


def test_shapes_that_may_be_meant_are_taken():
    for shape in ((3, 3, 8), (1, 128, 9), (3, 32, 3), (4, 4, 1), (5, 16, 16)):
        assert make(shape=shape).image_shape == shape


def test_channels_of_the_preprocessing_must_fit():
    with pytest.raises(UserError, match=r"preprocessing.mean"):
        make(preprocessing=Preprocessing((0.5,) * 3, (0.5,) * 3))


def test_union_gives_each_set_a_domain_and_one_shape():
    a, b = make("a"), make("b", shape=(8, 8, 3), train=12)
    u = union([a, b])
    assert u.image_shape == (8, 8, 3)
    assert u.domain_names == ("a", "b")
    np.testing.assert_array_equal(u.train_domains, [0] * 20 + [1] * 12)
    np.testing.assert_array_equal(u.train_labels, np.concatenate([a.train_labels, b.train_labels]))
    np.testing.assert_array_equal(u.train_images[20:], b.train_images)
    assert (u.train_images[:20, ..., 0] == u.train_images[:20, ..., 2]).all()


def test_union_keeps_domains_and_renumbers_writers():
    ids = {"train_writers": np.arange(20) % 3, "test_writers": np.arange(8) % 3}
    domains = {
        "train_domains": np.arange(20) % 2,
        "test_domains": np.arange(8) % 2,
        "domain_names": ("x", "y"),
    }
    u = union([make("a", **ids), make("b", **ids, **domains)])
    assert u.domain_names == ("a", "x", "y")
    np.testing.assert_array_equal(u.train_domains[20:], 1 + np.arange(20) % 2)
    np.testing.assert_array_equal(u.train_writers[20:], 3 + np.arange(20) % 3)
    assert union([make("a", **ids), make("c")]).train_writers is None


def test_union_refuses_what_does_not_belong_together():
    with pytest.raises(UserError, match="no sets"):
        union([])
    with pytest.raises(UserError, match="classes are not those"):
        union([make("a"), make("b", classes=5)])
    other = make("b", preprocessing=Preprocessing((0.1,), (0.5,)))
    with pytest.raises(UserError, match="preprocessing="):
        union([make("a"), other])
    assert union([make("a"), other], preprocessing=Preprocessing()).preprocessing == Preprocessing()
    with pytest.raises(UserError, match="2 channels"):
        union([make("a", shape=(6, 6, 2)), make("b", shape=(6, 6, 3))])
