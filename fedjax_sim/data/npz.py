"""Image sets in one `.npz` file, and the rules of its layout.

Required: `train_images`, `test_images` (u8, NHWC or NHW) and `train_labels`, `test_labels`.
Optional, for both parts: `*_domain`, `*_writer`, other labels as `*_NAME_labels`. Optional once:
`class_names`, `domain_names`, `NAME_names` for other labels, `fine_names` for the main ones.
Whatever else the file holds is left alone.
"""

import zipfile
import zlib
from pathlib import Path

import numpy as np

from fedjax_sim.core.errors import UserError
from fedjax_sim.core.paths import local
from fedjax_sim.data.dataset import Dataset, count_classes
from fedjax_sim.tasks.preprocessing import Preprocessing

FIX = "Save train_images, train_labels, test_images, test_labels with numpy.savez, images as uint8 NHWC."


def read_npz(
    path: str | Path,
    *,
    name: str = "",
    labels: str = "",
    preprocessing: Preprocessing | None = None,
    num_classes: int | None = None,
    class_names: tuple[str, ...] = (),
    origin: str = "",
    licence: str = "not stated",
) -> Dataset:
    """Reads an image set.

    Args:
      path: the file.
      name: for records; the file's stem if empty.
      labels: which labels: `""` for `train_labels`, `"coarse"` for `train_coarse_labels`.
      preprocessing: mean and std 0.5 if None.
      num_classes: what the set is known to have, where the file does not name its classes.
      class_names: used where the file has none.
      origin: see `Dataset`.
      licence: see `Dataset`.

    Raises:
      UserError: naming `data.source` (the file) or the array in it.
    """
    path = local(path, "data.source")
    if not path.is_file():
        raise UserError("data.source", f"npz:{path}", "no such file", FIX)
    infix = f"_{labels}" if labels else ""
    wanted = [f"{p}_{k}" for p in ("train", "test") for k in ("images", f"{infix[1:]}_labels".lstrip("_"))]
    wanted += [f"{p}_{k}" for p in ("train", "test") for k in ("domain", "writer")]
    names_keys = [f"{labels}_names"] if labels else ["class_names", "fine_names"]
    try:
        # Opened here: NumPy does not close a file that turns out to be damaged.
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = {k: file[k] for k in file.files if k in (*wanted, *names_keys, "domain_names")}
            present = sorted(file.files)
    except (
        OSError,
        ValueError,
        TypeError,
        EOFError,
        KeyError,
        AttributeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as e:
        raise UserError("data.source", f"npz:{path}", f"cannot be read ({e})", FIX) from e
    missing = [k for k in wanted[:4] if k not in arrays]
    if missing:
        why = f"holds no {', '.join(missing)}, only {', '.join(present) or 'nothing'}"
        raise UserError("data.source", f"npz:{path}{'#' + labels if labels else ''}", why, FIX)
    found = next((arrays[k] for k in names_keys if k in arrays), None)
    names = tuple(str(c) for c in found) if found is not None else class_names
    label_arrays = [arrays[f"{p}{infix}_labels"] for p in ("train", "test")]
    if not names and num_classes is None:
        num_classes = count_classes(*label_arrays)
    return Dataset(
        name=name or path.stem + infix.replace("_", "-"),
        train_images=_with_channel_axis(arrays["train_images"]),
        train_labels=label_arrays[0],
        test_images=_with_channel_axis(arrays["test_images"]),
        test_labels=label_arrays[1],
        num_classes=len(names) if names else num_classes or 0,
        preprocessing=preprocessing or Preprocessing(),
        train_domains=arrays.get("train_domain"),
        test_domains=arrays.get("test_domain"),
        train_writers=arrays.get("train_writer"),
        test_writers=arrays.get("test_writer"),
        class_names=names,
        domain_names=tuple(str(d) for d in arrays.get("domain_names", ()))
        if "train_domain" in arrays
        else (),
        origin=(origin + "; " if origin else "") + f"read from {path.name}",
        licence=licence,
    )


def _with_channel_axis(images: np.ndarray) -> np.ndarray:
    return images[..., None] if images.ndim == 3 else images
