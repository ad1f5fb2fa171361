"""An image classification set in memory: 8-bit images, integer labels, and where they come from."""

import dataclasses
import functools
import itertools
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedjax_sim.core.errors import UserError
from fedjax_sim.core.task import Example, Task
from fedjax_sim.data.images import resize, with_channels
from fedjax_sim.data.samples import Samples
from fedjax_sim.tasks.classification import classification
from fedjax_sim.tasks.preprocessing import Preprocessing

_ANY_COUNT = 1000
"""So many classes or domains may be numbered and not named, however few the images are."""


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset(Samples):
    """A train and a test set, checked once, here.

    Attributes:
      name: for records.
      train_images, test_images: u8[n, H, W, C], the same (H, W, C) in both.
      train_labels, test_labels: i32[n] in 0..num_classes-1 (any integer type is accepted).
      num_classes: at least 2.
      preprocessing: what the compiled step does to a batch.
      train_domains, test_domains: i32[n] ids of the domain an image belongs to, or None.
      train_writers, test_writers: i32[n] ids of the person an image comes from, or None.
      class_names: one for each class; `("0", "1", …)` where the source has none.
      domain_names: one for each domain id.
      origin: where the images come from, in words.
      licence: what is known of the terms, in words.

    Classes without a training sample are told in a warning: the model gets an output for each of them.

    Raises:
      UserError: naming the field (`data.train_images`), for anything that does not fit together.
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    num_classes: int
    preprocessing: Preprocessing = dataclasses.field(default_factory=Preprocessing)
    train_domains: np.ndarray | None = None
    test_domains: np.ndarray | None = None
    train_writers: np.ndarray | None = None
    test_writers: np.ndarray | None = None
    class_names: tuple[str, ...] = ()
    domain_names: tuple[str, ...] = ()
    origin: str = "not stated"
    licence: str = "not stated"

    def __post_init__(self):
        for part in ("train", "test"):
            _check_images(f"{part}_images", getattr(self, f"{part}_images"))
        if self.train_images.shape[1:] != self.test_images.shape[1:]:
            raise UserError(
                "data.test_images",
                self.test_images.shape,
                f"train images have the shape {self.train_images.shape[1:]}",
                "Bring both to one height, width and number of channels.",
            )
        if isinstance(self.num_classes, bool) or not isinstance(self.num_classes, (int, np.integer)):
            raise UserError("data.num_classes", self.num_classes, "not a whole number", "Count the classes.")
        if self.num_classes < 2:
            raise UserError(
                "data.num_classes", self.num_classes, "nothing to tell apart", "Use 2 classes or more."
            )
        object.__setattr__(self, "num_classes", int(self.num_classes))
        for part in ("train", "test"):
            self._check_ids(part, "labels", self.num_classes)
        if not self.class_names:
            self._check_count("num_classes", self.num_classes, "classes")
        names = tuple(str(c) for c in self.class_names) or tuple(str(c) for c in range(self.num_classes))
        if len(names) != self.num_classes:
            why = f"{len(names)} names for {self.num_classes} classes"
            raise UserError("data.class_names", names[:10], why, "Give one name for each class, or none.")
        object.__setattr__(self, "class_names", names)
        object.__setattr__(self, "domain_names", tuple(str(d) for d in self.domain_names))
        for part in ("train", "test"):
            self._check_ids(part, "domains", len(self.domain_names) or None)
            self._check_ids(part, "writers", None)
        for ids in ("domains", "writers"):
            if (getattr(self, f"train_{ids}") is None) != (getattr(self, f"test_{ids}") is None):
                raise UserError(
                    f"data.train_{ids}", None, "only one of train and test has them", "Give both or none."
                )
        if self.train_domains is not None and not self.domain_names:
            count = 1 + int(max(self.train_domains.max(), self.test_domains.max()))  # type: ignore[union-attr]
            self._check_count("train_domains", count, "domains")
            object.__setattr__(self, "domain_names", tuple(f"domain {d}" for d in range(count)))
        self.preprocessing.check_channels(self.image_shape[-1])
        warn_of_empty_classes(self.name, self.train_labels, self.num_classes)

    @functools.cached_property
    def task(self) -> Task:
        """Classification of these images."""
        return classification(self.image_shape, self.num_classes, self.preprocessing)

    @property
    def train(self) -> Example:
        """The training samples: `image` u8[n, H, W, C], `label` i32[n]."""
        return {"image": self.train_images, "label": self.train_labels}

    @property
    def test(self) -> Example:
        """The test samples, likewise."""
        return {"image": self.test_images, "label": self.test_labels}

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """All samples, by the names under which records know them."""
        names = ("train_images", "train_labels", "test_images", "test_labels")
        return {name: getattr(self, name) for name in names}

    def training_on(self, index: np.ndarray) -> "Dataset":
        """The set with the training samples i64[n'] alone, and without domains and writers."""
        groups = dict.fromkeys(("train_domains", "test_domains", "train_writers", "test_writers"))
        images, labels = self.train_images[index], self.train_labels[index]
        return dataclasses.replace(self, train_images=images, train_labels=labels, **groups)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        height, width, channels = self.train_images.shape[1:]
        return int(height), int(width), int(channels)

    def __repr__(self):
        extra = f", domains {', '.join(self.domain_names)}" if self.train_domains is not None else ""
        writers = f", {len(np.unique(self.train_writers))} writers" if self.train_writers is not None else ""
        return (
            f"Dataset({self.name}: {len(self.train_labels):,} train, {len(self.test_labels):,} test, "
            f"{self.image_shape}, {self.num_classes} classes{extra}{writers})"
        )

    def _check_count(self, field: str, count: int, what: str) -> None:
        """Refuses ids that cannot be meant, before anything is made for each number up to the largest."""
        images = len(self.train_labels) + len(self.test_labels)
        if count > max(images, _ANY_COUNT):
            why = f"more {what} than there are images ({images})"
            fix = (
                f"Number the {what} 0, 1, 2 …, as numpy.unique(ids, return_inverse=True) does, or name each."
            )
            raise UserError(f"data.{field}", count, why, fix)

    def _check_ids(self, part: str, kind: str, bound: int | None) -> None:
        """Checks one id for each image in 0..bound-1, and stores the ids as i32."""
        name = f"{part}_{kind}"
        ids = getattr(self, name)
        if ids is None and kind != "labels":
            return
        ids = np.asarray(ids)
        if ids.dtype.kind not in "iu":
            raise UserError(
                f"data.{name}", str(ids.dtype), "not integers", f"Give {kind} as integers from 0 up."
            )
        images = getattr(self, f"{part}_images")
        if ids.shape != (len(images),):
            why = f"{len(images)} images need the shape ({len(images)},)"
            raise UserError(f"data.{name}", ids.shape, why, "Give one integer for each image.")
        bad = np.flatnonzero((ids < 0) | (ids >= (bound if bound is not None else 2**31)))
        if len(bad):
            why = f"at position {bad[0]}, outside 0..{(bound or 2**31) - 1} ({len(bad)} such entries)"
            raise UserError(f"data.{name}", int(ids[bad[0]]), why, f"Number the {kind} from 0.")
        object.__setattr__(self, name, np.ascontiguousarray(ids, np.int32))


def warn_of_empty_classes(name: str, labels: np.ndarray, num_classes: int) -> None:
    """Tells in a warning which classes have no sample among the training labels i32[n] of the set `name`."""
    empty = np.flatnonzero(np.bincount(labels, minlength=num_classes) == 0)
    if len(empty):
        warnings.warn(
            f"{name}: {len(empty)} of {num_classes} classes have no training sample "
            f"({in_ranges(empty.tolist())}), and the model gets an output for each. If they are not "
            "meant: number the classes 0, 1, 2 … without gaps (a -1 that is stored as uint8 is 255)",
            stacklevel=4,
        )


def as_dataset(given: Any) -> Any:
    """`given`, which is a Dataset, another `Samples`, or None.

    Raises:
      UserError: it is anything else; says what to write.
    """
    if given is None or isinstance(given, Samples):
        return given
    fix = (
        "Write fs.Dataset(name, train_images, train_labels, test_images, test_labels, num_classes), images "
        "u8[n, H, W, C]."
    )
    raise UserError("dataset", type(given).__name__, "this is not a Dataset", fix)


def count_classes(*labels: np.ndarray) -> int:
    """1 + the largest of these labels.

    Raises:
      UserError: where they are no integers from 0 up, or none at all.
    """
    for given in labels:
        if given.dtype.kind not in "iu" or given.size == 0:
            why = "not integers" if given.size else "empty"
            raise UserError("data.train_labels", str(given.dtype), why, "Give integers from 0 up.")
        if given.min() < 0:
            raise UserError("data.train_labels", int(given.min()), "negative", "Number the classes from 0.")
    return 1 + max(int(given.max()) for given in labels)


def in_ranges(ids: Sequence[int], most: int = 5) -> str:
    """Sorted numbers for a person.

    >>> in_ranges([0, 3, 4, 5, 9])
    '0, 3 to 5, 9'
    """
    runs = [
        [i for _, i in run]
        for _, run in itertools.groupby(enumerate(ids), key=lambda pair: pair[1] - pair[0])
    ]
    told = [str(r[0]) if len(r) == 1 else f"{r[0]} to {r[-1]}" for r in runs[:most]]
    return ", ".join(told) + (" …" if len(runs) > most else "")


def union(
    datasets: Sequence[Dataset],
    *,
    name: str = "",
    size: tuple[int, int] | None = None,
    preprocessing: Preprocessing | None = None,
) -> Dataset:
    """Puts sets with the same classes one after another, each as a domain of its own.

    Images are resized to `size` (the largest height and width if None) and grey ones repeated over
    three channels if any set has colour. A set that has domains already keeps them. Writer ids are
    kept, renumbered, if every set has them.

    Args:
      datasets: one or more, with the same class names in the same order.
      name: of the union.
      size: (height, width) in pixels.
      preprocessing: of the union; None: theirs, which has to be the same.

    Raises:
      UserError: no sets, classes that differ, or preprocessing that differs and is not given.
    """
    if not datasets:
        raise UserError("data.union", (), "no sets to join", "Give at least one.")
    first = datasets[0]
    for other in datasets[1:]:
        if other.class_names != first.class_names:
            why = f"its {other.num_classes} classes are not those of {first.name!r} ({first.num_classes})"
            raise UserError(
                "data.union", other.name, why, "Join sets which name the same classes in the same order."
            )
        if preprocessing is None and other.preprocessing != first.preprocessing:
            why = f"its preprocessing is not that of {first.name!r}"
            raise UserError("data.union", other.name, why, "Say `preprocessing=` for the union.")
    size = size or (max(d.image_shape[0] for d in datasets), max(d.image_shape[1] for d in datasets))
    channels = max(d.image_shape[2] for d in datasets)
    for d in datasets:
        if d.image_shape[2] not in (1, channels):
            why = f"{d.image_shape[2]} channels cannot become {channels}"
            raise UserError("data.union", d.name, why, "Join grey and three-channel sets only.")

    def images(part):
        return np.concatenate(
            [with_channels(resize(getattr(d, f"{part}_images"), size), channels) for d in datasets]
        )

    def ids(part, kind, counts):
        offsets = np.cumsum([0, *counts])
        given = [getattr(d, f"{part}_{kind}") for d in datasets]
        sizes = [len(getattr(d, f"{part}_labels")) for d in datasets]
        given = [np.zeros(n, np.int32) if g is None else g for g, n in zip(given, sizes, strict=True)]
        return np.concatenate([g + np.int32(o) for g, o in zip(given, offsets, strict=False)])

    domains = [1 if d.train_domains is None else len(d.domain_names) for d in datasets]
    names = [n for d in datasets for n in ((d.name,) if d.train_domains is None else d.domain_names)]
    writers = [
        0
        if d.train_writers is None or d.test_writers is None
        else 1 + max(d.train_writers.max(), d.test_writers.max())
        for d in datasets
    ]
    return Dataset(
        name=name or "+".join(d.name for d in datasets),
        train_images=images("train"),
        train_labels=np.concatenate([d.train_labels for d in datasets]),
        test_images=images("test"),
        test_labels=np.concatenate([d.test_labels for d in datasets]),
        num_classes=first.num_classes,
        preprocessing=preprocessing or first.preprocessing,
        train_domains=ids("train", "domains", domains),
        test_domains=ids("test", "domains", domains),
        train_writers=ids("train", "writers", writers) if all(writers) else None,
        test_writers=ids("test", "writers", writers) if all(writers) else None,
        class_names=first.class_names,
        domain_names=tuple(names),
        origin=" | ".join(f"{d.name}: {d.origin}" for d in datasets),
        licence=" | ".join(f"{d.name}: {d.licence}" for d in datasets),
    )


def _check_images(name: str, images: object) -> None:
    field = f"data.{name}"
    if not isinstance(images, np.ndarray):
        raise UserError(field, type(images).__name__, "not a NumPy array", "Give u8[n, H, W, C].")
    if images.dtype != np.uint8:
        nan = images.dtype.kind == "f" and bool(np.isnan(images).any())
        why = (
            "floating-point images" + (", some of them NaN" if nan else "")
            if images.dtype.kind == "f"
            else "not uint8"
        )
        fix = "Give 8-bit pixels from 0 to 255; normalisation belongs in `preprocessing`."
        if images.dtype.kind == "f" and not nan and images.size and 0 <= images.min() <= images.max() <= 1:
            fix = "Give 8-bit pixels: (255 * images).round().astype(numpy.uint8), as these go from 0 to 1."
        if images.dtype == np.uint16:
            fix = "Give 8-bit pixels: (images >> 8).astype(numpy.uint8), if they go from 0 to 65535."
        raise UserError(field, str(images.dtype), why, fix)
    if images.ndim != 4:
        raise UserError(
            field, images.shape, "not of the shape (n, height, width, channels)", "Add the missing axis."
        )
    if images.size == 0:
        raise UserError(field, images.shape, "empty", "Both train and test need images.")
    height, width, channels = images.shape[1:]
    square = width == channels
    if min(width, channels) >= 8 and (height in (3, 4) or (height in (1, 2) and square)):
        why = f"channels first, it seems: {height} pixels high, {width} wide, with {channels} channels"
        raise UserError(field, images.shape, why, "Put the channels last: images.transpose(0, 2, 3, 1).")
