"""MNIST's own file format, idx: a type, the sizes of the axes, then the numbers, big-endian.

The four files of a set lie in one folder, as they are published or packed with gzip:
`train-images-idx3-ubyte`, `train-labels-idx1-ubyte`, `t10k-images-idx3-ubyte`, `t10k-labels-idx1-ubyte`
(MNIST, Fashion-MNIST, KMNIST, and what Linux distributions package of them), with `.` for `-` before `idx`,
with `test` for `t10k`, or with a set's name before, as EMNIST has it
(`emnist-letters-train-images-idx3-ubyte.gz`).
"""

import gzip
import math
import re
import zlib
from pathlib import Path

import numpy as np

from fedjax_sim.core.errors import UserError
from fedjax_sim.data.dataset import Dataset, count_classes
from fedjax_sim.tasks.preprocessing import Preprocessing

_NAME = re.compile(r"(?:(.+)[-_.])?(train|t10k|test)[-_.](images|labels)[-_.]idx\d[-_.]\w+?(\.gz)?")
_TYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
_FIX = "Give the folder with the four files of MNIST (train-images-idx3-ubyte[.gz], train-labels-…, t10k-…)."


def read_idx(path: str | Path, *, member: str = "", preprocessing: Preprocessing | None = None) -> Dataset:
    """Reads an image set.

    EMNIST's pictures are stored with rows and columns swapped, and are turned; its `letters` are numbered
    from 1, and here from 0.

    Args:
      path: the folder.
      member: which of several sets in it: how the names of its files begin (`emnist-letters`), or the end of
        that (`letters`).
      preprocessing: mean and std 0.5 if None.

    Raises:
      UserError: naming `data.source` and the file at fault.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise UserError("data.source", f"idx:{root}", "no such folder", _FIX)
    name, files = _one_of(_found(root), root, member)
    missing = [f"{p}-{k}" for p in ("train", "test") for k in ("images", "labels") if (p, k) not in files]
    if missing:
        begin = f" that begin with {name}" if name else ""
        raise UserError("data.source", f"idx:{root}", f"no files{begin} for {', '.join(missing)}", _FIX)
    images = [_read(files[part, "images"], "images") for part in ("train", "test")]
    labels = [_read(files[part, "labels"], "labels") for part in ("train", "test")]
    if name.startswith("emnist"):
        images = [np.ascontiguousarray(i.swapaxes(1, 2)) for i in images]
        if name.endswith("letters") and min(part.min() for part in labels) == 1:
            labels = [part - 1 for part in labels]
    return Dataset(
        name=name or root.resolve().name,
        train_images=images[0],
        train_labels=labels[0],
        test_images=images[1],
        test_labels=labels[1],
        num_classes=count_classes(*labels),
        preprocessing=preprocessing or Preprocessing(),
        origin=f"read from idx files in {root.resolve().name}",
    )


def _found(root: Path) -> dict[str, dict[tuple[str, str], Path]]:
    """The files by set, part and kind; an unpacked one goes before a packed one."""
    sets: dict[str, dict[tuple[str, str], Path]] = {}
    for file in sorted(root.iterdir()):  # `x` sorts before `x.gz`
        match = _NAME.fullmatch(file.name)
        if match and file.is_file():
            part = "train" if match[2] == "train" else "test"
            sets.setdefault(match[1] or "", {}).setdefault((part, match[3]), file)
    return sets


def _one_of(
    sets: dict[str, dict[tuple[str, str], Path]], root: Path, member: str
) -> tuple[str, dict[tuple[str, str], Path]]:
    if not sets:
        raise UserError("data.source", f"idx:{root}", "no idx files in it", _FIX)
    names = [n for n in sets if not member or n == member or re.search(rf"[-_.]{re.escape(member)}$", n)]
    if len(names) != 1:
        there = ", ".join(n or "(no name)" for n in sets)
        why = f"no set {member!r}" if member and not names else "several sets"
        raise UserError(
            "data.source",
            f"idx:{root}" + (f"#{member}" if member else ""),
            f"{why} in it; there: {there}",
            f"Name one: idx:{root}#{next(n for n in sets if n)}" if any(sets) else "Leave the name out.",
        )
    return names[0], sets[names[0]]


def _read(file: Path, kind: str) -> np.ndarray:
    """u8[n, H, W, C] of images, i64[n] of labels."""
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as e:
        raise _wrong(file, f"cannot be read ({e})") from e
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in _TYPES or not content[3]:
        raise _wrong(file, "is not an idx file: it does not begin with 0, 0, a type and a number of axes")
    axes, start = content[3], 4 + 4 * content[3]
    shape = tuple(int(n) for n in np.frombuffer(content[4:start], ">u4")) if len(content) >= start else ()
    dtype = np.dtype(_TYPES[content[2]])
    wanted = start + math.prod(shape) * dtype.itemsize
    if len(shape) != axes or len(content) != wanted:
        why = f"holds {len(content)} bytes, and its first ones say {wanted if shape else f'at least {start}'}"
        raise _wrong(file, f"{why} (shape {shape})")
    values = np.frombuffer(content, dtype, offset=start).reshape(shape)
    if kind == "images":
        if axes not in (3, 4) or dtype != np.uint8:
            raise _wrong(file, f"holds {dtype.name} with {axes} axes, not 8-bit pictures with 3 or 4")
        return values if axes == 4 else values[..., None]
    if axes != 1 or dtype.kind not in "iu":
        raise _wrong(file, f"holds {dtype.name} with {axes} axes, not one integer for each picture")
    return values.astype(np.int64)


def _wrong(file: Path, why: str) -> UserError:
    return UserError("data.source", f"idx:{file.parent}", f"{file.name} {why}", "Fetch or unpack it again.")
