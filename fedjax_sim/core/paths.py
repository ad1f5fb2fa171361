"""Paths of files and folders: of a file system that this host has mounted, and no addresses.

A run appends to its journal, locks its folder and renames files in one go, which buckets do not offer.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from fedjax_sim.core.errors import UserError

_BUCKETS = "gs|gcs|s3|s3a|s3n|r2|oci|abfs|abfss|az|adl|wasb|wasbs|hdfs"
# `Path("gs://bucket")` has lost a slash. Any other word before `:/` may be a folder.
_ADDRESS = re.compile(rf"([A-Za-z][A-Za-z0-9+.-]+)://|({_BUCKETS}):/", re.IGNORECASE)


@contextlib.contextmanager
def whole(path: Path, mark: str = "") -> Iterator[Path]:
    """A name beside `path` to write a file under: it takes the place of `path` at the end, or is removed.

    A reader sees the old file or the new one, never half of it. With `mark` several may write at once.
    """
    unfinished = path.with_name(f"{path.name}{mark}.part")
    try:
        yield unfinished
        os.replace(unfinished, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            unfinished.unlink()
        raise


def to_disk(file: IO[Any]) -> None:
    """Brings what was written to the disk itself: a power cut spares it."""
    file.flush()
    os.fsync(file.fileno())


def local(path: str | os.PathLike[str], field: str = "path") -> Path:
    """`path` as a Path, with `~` for the home folder.

    Raises:
      UserError: it is an address (`gs://bucket/run`, `https://…`); names `field`.
    """
    text = os.fspath(path)
    found = _ADDRESS.match(text)
    if found is None:
        return Path(path).expanduser()
    scheme = (found[1] or found[2]).lower()
    if scheme == "file":
        raise UserError(field, text, "a path is wanted, not an address", f"Write {text[found.end() :]}.")
    if scheme in _BUCKETS.split("|"):
        why = "this is a bucket, and only file systems are read and written here"
        fix = (
            "Mount the bucket (gcsfuse, s3fs …) and give the mounted folder, or use a file system that all "
            "hosts share and copy the files from or to the bucket."
        )
    else:
        why = f"this is an address ({scheme}:), and only files and folders are read and written here"
        fix = "Give a path; to and from elsewhere files are copied by hand."
    raise UserError(field, text, why, fix)


def kept(variable: str, name: str) -> Path | None:
    """Where the package keeps a file or a folder for the user: in the user's cache folder.

    Args:
      variable: of the environment, which may name another place; where it is empty, nothing is kept: None.
      name: of the file or folder.
    """
    given = os.environ.get(variable)
    if given is not None:
        return Path(given).expanduser() if given else None
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(home) / "fedjax-sim" / name
