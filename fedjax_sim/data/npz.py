"""Image sets in one `.npz` file or one folder of `.npy` files, and the rules of their layout.

Required: `train_images`, `test_images` (u8, NHWC or NHW) and `train_labels`, `test_labels`.
Optional, for both parts: `*_domain`, `*_writer`, other labels as `*_NAME_labels`. Optional once:
`class_names`, `domain_names`, `NAME_names` for other labels, `fine_names` for the main ones.
Whatever else the file holds is left alone. In a folder each of these is a file, `train_images.npy` and so
on; images are memory-mapped there and never read as a whole by training, so that a set may be larger than
memory.
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
    mapped: bool = False,
) -> Dataset:
    """Reads an image set.

    Args:
      path: the file, or the folder.
      name: for records; the file's stem if empty.
      labels: which labels: `""` for `train_labels`, `"coarse"` for `train_coarse_labels`.
      preprocessing: mean and std 0.5 if None.
      num_classes: what the set is known to have, where the file does not name its classes.
      class_names: used where the file has none.
      origin: see `Dataset`.
      licence: see `Dataset`.
      mapped: it is a folder of `.npy` files, whose images are memory-mapped.

    Raises:
      UserError: naming `data.source` (the file) or the array in it.
    """
    path = local(path, "data.source")
    source = f"{'npy' if mapped else 'npz'}:{path}"
    if not (path.is_dir() if mapped else path.is_file()):
        raise UserError("data.source", source, f"no such {'folder' if mapped else 'file'}", FIX)
    infix = f"_{labels}" if labels else ""
    wanted = [f"{p}_{k}" for p in ("train", "test") for k in ("images", f"{infix[1:]}_labels".lstrip("_"))]
    wanted += [f"{p}_{k}" for p in ("train", "test") for k in ("domain", "writer")]
    names_keys = [f"{labels}_names"] if labels else ["class_names", "fine_names"]
    try:
        arrays, present = (_of_folder if mapped else _of_file)(path, [*wanted, *names_keys, "domain_names"])
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
        raise UserError("data.source", source, f"cannot be read ({e})", FIX) from e
    missing = [k for k in wanted[:4] if k not in arrays]
    if missing:
        why = f"holds no {', '.join(missing)}, only {', '.join(present) or 'nothing'}"
        raise UserError("data.source", f"{source}{'#' + labels if labels else ''}", why, FIX)
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


def _of_file(path: Path, wanted: list[str]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Arrays by name, and the names of all that there are."""
    # Opened here: NumPy does not close a file that turns out to be damaged.
    with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
        return {k: file[k] for k in file.files if k in wanted}, sorted(file.files)


def _of_folder(path: Path, wanted: list[str]) -> tuple[dict[str, np.ndarray], list[str]]:
    """As `_of_file`; images stay in their files."""
    files = {file.stem: file for file in sorted(path.glob("*.npy"))}
    arrays = {
        name: np.load(file, mmap_mode="r" if name.endswith("_images") else None, allow_pickle=False)
        for name, file in files.items()
        if name in wanted
    }
    return arrays, sorted(files)


def _with_channel_axis(images: np.ndarray) -> np.ndarray:
    return images[..., None] if images.ndim == 3 else images
