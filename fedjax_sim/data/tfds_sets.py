"""Sets prepared by tensorflow-datasets, read without TensorFlow and decoded once into memory.

Only what lies prepared on disk is read: nothing is downloaded, no generation code is run.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

from fedjax_sim.core.errors import UserError
from fedjax_sim.core.paths import local
from fedjax_sim.data.dataset import Dataset
from fedjax_sim.data.images import on_white
from fedjax_sim.tasks.preprocessing import Preprocessing

PREPARE = ".venv/bin/pip install -e '.[prepare]'"
"""What installs TensorFlow, in the folder of a clone: there is the script that prepares a set."""


def how_to_prepare(name: str, data_dir: str | Path) -> str:
    """The commands that prepare a set; the first one needs a machine where TensorFlow installs."""
    return (
        "Prepare it once, which needs TensorFlow (reading does not), in a clone of this repository: "
        f"{PREPARE}, then .venv/bin/python scripts/prepare_tfds.py {name} --data-dir {data_dir}"
    )


def find_prepared(name: str, data_dir: str | Path) -> Path | None:
    """Folder of the newest prepared version of `name` (or `name/config`) below `data_dir`, or None."""
    root = local(data_dir, "data.data_dir") / name
    infos = [*root.glob("*/dataset_info.json")]
    if "/" not in name and not infos:
        infos = [*root.glob("*/*/dataset_info.json")]
        if len({i.parent.parent for i in infos}) > 1:
            configs = sorted({i.parent.parent.name for i in infos})
            why = f"several configurations are prepared: {', '.join(configs)}"
            raise UserError("data.source", f"tfds:{name}", why, f"Name one: tfds:{name}/{configs[0]}")
    found = [i.parent for i in infos if re.fullmatch(r"\d+\.\d+\.\d+", i.parent.name)]
    return max(found, key=lambda p: tuple(int(v) for v in p.name.split(".")), default=None)


def read_tfds(
    name: str,
    data_dir: str | Path,
    *,
    label: str = "label",
    dataset_name: str = "",
    size: tuple[int, int] | None = None,
    transpose: bool = False,
    preprocessing: Preprocessing | None = None,
    origin: str = "",
    licence: str = "not stated",
) -> Dataset:
    """Reads a prepared image classification set.

    Args:
      name: as tensorflow-datasets calls it, with `/config` where it has several.
      data_dir: the folder it was prepared in.
      label: the feature to use as label (`"coarse_label"` for CIFAR-100's 20 classes).
      dataset_name: for records; `name` if empty.
      size: (H, W) to resize to; None where all images have one size already.
      transpose: swap height and width (EMNIST is stored that way).
      preprocessing: mean and std 0.5 if None.
      origin: see `Dataset`.
      licence: see `Dataset`.

    Raises:
      UserError: not installed, not prepared, not readable without TensorFlow, not such a set.
    """
    source = f"tfds:{name}"
    folder = find_prepared(name, data_dir)
    if folder is None:
        why = f"not prepared in {Path(data_dir).expanduser()}"
        raise UserError("data.source", source, why, how_to_prepare(name, data_dir))
    try:
        import array_record  # noqa: F401
        import importlib_resources  # noqa: F401
        import PIL  # noqa: F401
        import tensorflow_datasets as tfds
    except ImportError as e:
        fix = "pip install tensorflow-datasets array_record pillow importlib_resources"
        raise UserError("data.source", source, f"{e.name} is missing", fix) from e
    try:
        builder = tfds.builder_from_directory(str(folder))
    except Exception as e:  # a damaged folder raises whatever its reader happens to meet
        why = f"{folder} cannot be read ({type(e).__name__}: {e})"
        raise UserError("data.source", source, why, how_to_prepare(name, data_dir)) from e
    features: Any = builder.info.features or {}
    for key in ("image", label):
        if key not in features:
            why = f"has no feature {key!r}, only {', '.join(features)}"
            raise UserError(
                "data.source", source, why, "Use an image classification set, or name the label: #KEY."
            )
    num_classes = getattr(features[label], "num_classes", None)
    if num_classes is None:
        why = f"its feature {label!r} holds no classes ({type(features[label]).__name__})"
        raise UserError("data.source", source, why, "Name a feature that is a ClassLabel: #KEY.")
    file_format = getattr(builder.info.file_format, "value", str(builder.info.file_format))
    if file_format != "array_record":
        why = f"prepared as {file_format}, which only TensorFlow reads"
        raise UserError("data.source", source, why, how_to_prepare(name, data_dir))
    splits = builder.info.splits
    test = next((s for s in ("test", "validation") if s in splits), None)
    if "train" not in splits or test is None:
        why = f"has the parts {', '.join(splits)}, not train and test"
        raise UserError("data.source", source, why, "Use a set with train and test (or validation).")
    train_images, train_labels = _decode(builder, "train", label, size, transpose, source)
    test_images, test_labels = _decode(builder, test, label, size, transpose, source)
    return Dataset(
        name=dataset_name or name.replace("/", "-"),
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
        num_classes=num_classes,
        preprocessing=preprocessing or Preprocessing(),
        class_names=tuple(features[label].names or ()),
        origin=(origin + "; " if origin else "")
        + f"tensorflow-datasets {name} {folder.name}, split {test!r} as test",
        licence=licence,
    )


def _decode(
    builder: Any, split: str, label: str, size: tuple[int, int] | None, transpose: bool, source: str
) -> tuple[np.ndarray, np.ndarray]:
    """u8[n, H, W, C] and i32[n]. One thread reads 2 to 7 thousand small images a second."""
    rows = builder.as_data_source(split=split)
    labels = np.empty(len(rows), np.int32)
    images = None
    for i, row in enumerate(rows):
        pixels = _eight_bits(np.asarray(row["image"]), source)
        if size and pixels.shape[:2] != tuple(size):
            pixels = _resize(pixels, size)
        pixels = pixels.swapaxes(0, 1) if transpose else pixels
        if images is None:
            images = np.empty((len(rows), *pixels.shape), np.uint8)
        if pixels.shape != images.shape[1:]:
            why = f"image {i} of {split} has the shape {pixels.shape}, those before it {images.shape[1:]}"
            raise UserError("data.source", source, why, f"Say a size: {source}#size=64")
        images[i], labels[i] = pixels, row[label]
    if images is None:
        raise UserError("data.source", source, f"{split} is empty", "Prepare the set again.")
    return images, labels


def _eight_bits(pixels: np.ndarray, source: str) -> np.ndarray:
    """u8[H, W, C] by the rules of `fedjax_sim.data.pictures`: v >> 8 of 16 bits, alpha on white."""
    if pixels.dtype == np.uint16:
        pixels = (pixels >> 8).astype(np.uint8)
    if pixels.dtype != np.uint8:
        why = f"its images are {pixels.dtype}, and nothing says what is white"
        raise UserError("data.source", source, why, "Use a set of 8-bit or 16-bit pictures.")
    return on_white(pixels) if pixels.ndim == 3 and pixels.shape[-1] in (2, 4) else pixels


def _resize(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    from PIL import Image

    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    resized = np.asarray(image.resize((size[1], size[0]), Image.Resampling.BILINEAR), np.uint8)
    return resized[..., None] if resized.ndim == 2 else resized
