"""Image sets as folders of image files; `fedjax_sim.data.pictures` reads those.

Layouts, where `class` (and `domain`) are folder names in alphabetical order:

- `class/file` and `domain/class/file`: split here, by class (and domain), with a fixed seed;
- `train/class/file` with `test/…` or `val/…`, also with a domain between: split as it lies;
- `domain/class/file` beside `DOMAIN_train.txt` and `DOMAIN_test.txt` (DomainNet's own lists);
- Tiny-ImageNet as it is published (`val/val_annotations.txt`; a level `images` is skipped).

Links are followed, to files and to folders. What is hidden (`.ipynb_checkpoints`, `._0.png`) and what
systems leave behind (`__MACOSX`) is passed over.
"""

import functools
import os
import warnings
import zlib
from collections import Counter
from collections.abc import Collection
from pathlib import Path

import numpy as np

from fedjax_sim.core.errors import UserError
from fedjax_sim.core.paths import local
from fedjax_sim.data.dataset import Dataset
from fedjax_sim.data.pictures import EXTENSIONS, decode
from fedjax_sim.tasks.preprocessing import Preprocessing

_PARTS = ("train", "test", "val", "validation")
_LEFT_BEHIND = (
    "__MACOSX",
    "__pycache__",
    "@eaDir",
    "$RECYCLE.BIN",
    "System Volume Information",
    "lost+found",
)
_NOT_READ = (
    *(".heic", ".heif", ".avif", ".jxl", ".jp2", ".jfif", ".svg", ".tga", ".psd", ".exr", ".hdr"),
    *(".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"),
)
"""How names of pictures end that are not read: such a file is missed, and a text beside pictures is not."""
_Item = tuple[Path, str, str]  # file, domain ("" where there is none), class


def read_folder(
    path: str | Path,
    *,
    name: str = "",
    size: tuple[int, int] | None = None,
    classes: tuple[str, ...] | str = (),
    test_share: float = 0.2,
    preprocessing: Preprocessing | None = None,
    origin: str = "",
    licence: str = "not stated",
) -> Dataset:
    """Reads an image set; see the module for layouts.

    Args:
      path: the folder.
      name: for records; the folder's name if empty.
      size: (H, W) to resize to; None where all images have one size already.
      classes: which classes to keep, and their order; all if empty. As a text, with + between them: cut so
        that names of classes come out, which may hold a + themselves (`c++`).
      test_share: of each class and domain, where the folder is not split.
      preprocessing: mean and std 0.5 if None.
      origin: see `Dataset`.
      licence: see `Dataset`.

    Raises:
      UserError: naming `data.source` and the file at fault.
    """
    root = local(path, "data.source")
    if not root.is_dir():
        fix = "Give a folder with one sub-folder of images for each class."
        raise UserError("data.source", f"folder:{root}", "no such folder", fix)
    if not 0 < test_share < 1:
        raise UserError("data.test_share", test_share, "not between 0 and 1", "0.2 is usual.")
    train, test = _split_lists(root, test_share)
    known = {c for _, _, c in train}
    if isinstance(classes, str):
        classes = _cut(classes, known)
    names = classes or tuple(sorted(known))
    missing = [c for c in names if not any(c == item[2] for item in train)]
    if missing:
        why = f"no training images of {', '.join(missing[:5])}"
        there = ", ".join(sorted(known)[:20]) + (" …" if len(known) > 20 else "")
        raise UserError("data.source", f"folder:{root}", why, f"The classes are {there}.")
    if classes:
        train, test = ([item for item in part if item[2] in classes] for part in (train, test))
    unknown = sorted({c for _, _, c in test} - set(names))
    if unknown or not test:
        why = f"test classes that are not in train: {', '.join(unknown[:5])}" if unknown else "no test images"
        raise UserError("data.source", f"folder:{root}", why, "Train and test need the same class folders.")
    domains = sorted({d for _, d, _ in train + test} - {""})
    images = decode([file for file, _, _ in train + test], size, root)
    labels = np.array([names.index(c) for _, _, c in train + test], np.int32)
    ids = np.array([domains.index(d) for _, d, _ in train + test], np.int32) if domains else None
    cut = len(train)
    return Dataset(
        name=name or root.name,
        train_images=images[:cut],
        train_labels=labels[:cut],
        test_images=images[cut:],
        test_labels=labels[cut:],
        num_classes=len(names),
        preprocessing=preprocessing or Preprocessing(),
        train_domains=ids[:cut] if ids is not None else None,
        test_domains=ids[cut:] if ids is not None else None,
        class_names=names,
        domain_names=tuple(domains),
        origin=(origin + "; " if origin else "") + f"read from the folder {root.name}",
        licence=licence,
    )


def _split_lists(root: Path, test_share: float) -> tuple[list[_Item], list[_Item]]:
    folders = {p.name for p in root.iterdir() if p.is_dir() and not _passed_over(p.name)}
    annotations = root / "val" / "val_annotations.txt"
    held_out = next((p for p in ("test", "val", "validation") if p in folders), None)
    if annotations.is_file():
        rows = [line.split("\t") for line in annotations.read_text().splitlines() if line.strip()]
        if any(len(row) < 2 for row in rows):
            why = f"{annotations.relative_to(root)} has a line without a file, a tab and a class"
            raise UserError("data.source", f"folder:{root}", why, "Unpack the set again.")
        return _items(root / "train"), [(root / "val" / "images" / row[0], "", row[1]) for row in rows]
    if "train" in folders and held_out:
        return _items(root / "train"), _items(root / held_out)
    if "train" in folders:
        why = "a folder `train` without `test` or `val` beside it"
        raise UserError(
            "data.source", f"folder:{root}", why, "Add `test`, or point at `train` itself to have it split."
        )
    lists = [(_listed(root, f"{d}_train.txt"), _listed(root, f"{d}_test.txt")) for d in sorted(folders)]
    if lists and all(a and b for a, b in lists):
        return [i for a, _ in lists for i in a], [i for _, b in lists for i in b]
    return _split_by_seed(_items(root), root, test_share)


def _items(root: Path) -> list[_Item]:
    """All images below `root`, in alphabetical order of their paths."""
    items: list[_Item] = []
    files, bare, unread = _walk(root, root, ())
    for file in sorted(files, key=lambda p: p.relative_to(root).as_posix()):
        parts = [p for p in file.relative_to(root).parts[:-1] if p != "images"]
        if len(parts) not in (1, 2):
            why = f"{file.relative_to(root)} lies neither at class/file nor at domain/class/file"
            raise UserError(
                "data.source", f"folder:{root}", why, "Sort the images into one folder for each class."
            )
        items.append((file, parts[0] if len(parts) == 2 else "", parts[-1]))
    if items and bare:
        told = ", ".join(str(p.relative_to(root)) for p in bare[:5]) + (" …" if len(bare) > 5 else "")
        warnings.warn(
            f"folder:{root}: no images ({', '.join(EXTENSIONS)}) in {told}: no class is made of it",
            stacklevel=5,
        )
    _warn_of_unread(unread, root, {label for *_, label in items})
    if not items:
        why = f"no images ({', '.join(EXTENSIONS)}) in it"
        raise UserError(
            "data.source", f"folder:{root}", why, "Point at the folder that holds the class folders."
        )
    if len({bool(d) for _, d, _ in items}) == 2:
        why = "some images lie at class/file and some at domain/class/file"
        raise UserError("data.source", f"folder:{root}", why, "Use one layout throughout.")
    return items


def _warn_of_unread(files: list[Path], root: Path, classes: set[str]) -> None:
    """Warns of pictures that are not read, of those `classes`: other folders are told of already."""
    found: dict[str, Counter[str]] = {}
    for file in files:
        above = [part for part in file.relative_to(root).parts[:-1] if part != "images"]
        if above and above[-1] in classes:
            found.setdefault(above[-1], Counter())[file.suffix.lower()] += 1
    told = [
        f"{(count := sum(kinds.values()))} file{'s' * (count > 1)} of class {label} "
        f"{'are' if count > 1 else 'is'} passed over ({', '.join(sorted(kinds))})"
        for label, kinds in sorted(found.items())
    ]
    if told:
        more = f" and files of {len(told) - 5} more classes" if len(told) > 5 else ""
        fix = f"convert them to {', '.join(EXTENSIONS[:2])} or another of {', '.join(EXTENSIONS[2:])}"
        warnings.warn(f"folder:{root}: {', '.join(told[:5])}{more}; {fix}", stacklevel=6)


def _walk(folder: Path, root: Path, above: tuple[str, ...]) -> tuple[list[Path], list[Path], list[Path]]:
    """Image files below `folder`, through links as well, folders that hold none, and pictures not read.

    Args:
      folder: where to look.
      root: for messages.
      above: the real paths of the folders that were come through.
    """
    real = os.path.realpath(folder)
    if real in above:
        why = f"{folder.relative_to(root)} is a link to a folder in which it lies"
        raise UserError("data.source", f"folder:{root}", why, "Remove that link.")
    try:
        entries = sorted(os.scandir(folder), key=lambda e: e.name)
    except OSError as e:
        why = f"{folder.relative_to(root)} cannot be read ({e.strerror or e})"
        raise UserError("data.source", f"folder:{root}", why, "Look at its permissions.") from e
    files: list[Path] = []
    bare: list[Path] = []
    unread: list[Path] = []
    for entry in entries:
        path = folder / entry.name
        if _passed_over(entry.name):
            continue
        if path.is_dir():
            inner, empty, missed = _walk(path, root, (*above, real))
            files += inner
            unread += missed
            bare += empty if inner else [path]
        elif path.suffix.lower() in EXTENSIONS and path.is_file():
            files.append(path)
        elif path.suffix.lower() in _NOT_READ and path.is_file():
            unread.append(path)
        elif entry.is_symlink() and not path.exists() and path.suffix.lower() in (*EXTENSIONS, ""):
            why = f"{path.relative_to(root)} is a link to nothing ({os.readlink(path)})"
            raise UserError("data.source", f"folder:{root}", why, "Repair or remove that link.")
    return files, bare, unread


def _passed_over(name: str) -> bool:
    return name.startswith(".") or name in _LEFT_BEHIND


def _cut(text: str, known: Collection[str]) -> tuple[str, ...]:
    """`cat+c+++dog` -> ("cat", "c++", "dog"), if these are known; else cut at every +."""
    pieces = text.split("+")

    @functools.cache
    def rest(start: int) -> tuple[str, ...] | None:
        if start == len(pieces):
            return ()
        for end in range(len(pieces), start, -1):
            name = "+".join(pieces[start:end])
            others = rest(end) if name in known else None
            if others is not None:
                return (name, *others)
        return None

    return rest(0) or tuple(p for p in pieces if p)


def _listed(root: Path, name: str) -> list[_Item]:
    """A DomainNet list: lines of `domain/class/file label`; empty where there is none."""
    if not (root / name).is_file():
        return []
    files = [root / line.rsplit(" ", 1)[0] for line in (root / name).read_text().splitlines() if line.strip()]
    return [(f, f.parts[-3], f.parts[-2]) for f in files]


def _split_by_seed(items: list[_Item], root: Path, share: float) -> tuple[list[_Item], list[_Item]]:
    groups: dict[tuple[str, str], list[_Item]] = {}
    for item in items:
        groups.setdefault(item[1:], []).append(item)
    train: list[_Item] = []
    test: list[_Item] = []
    for (domain, label), group in sorted(groups.items()):
        # A seed from the group's own name: adding a class does not reshuffle the others.
        order = np.random.default_rng(zlib.crc32(f"{domain}/{label}".encode())).permutation(len(group))
        count = min(max(1, round(share * len(group))), len(group) - 1)
        if count < 1:
            why = f"only one image of class {label!r}" + (f" in domain {domain!r}" if domain else "")
            raise UserError(
                "data.source", f"folder:{root}", why, "Each needs two: one to train, one to test."
            )
        chosen = set(order[:count].tolist())
        test += [item for i, item in enumerate(group) if i in chosen]
        train += [item for i, item in enumerate(group) if i not in chosen]
    return train, test
