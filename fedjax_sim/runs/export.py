"""A model's weights in one file that other programs read: `.npz` (NumPy) or `.safetensors`.

Every leaf stands under its path, joined by slashes (`params/fc1/kernel`, `batch_stats/bn1/mean`), in its own
shape and dtype. NumPy's format has no name for bfloat16 and its like: such a leaf is read as raw bytes, and
`array.view(ml_dtypes.bfloat16)` gives it back; safetensors names it.
"""

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fedjax_sim.core import paths
from fedjax_sim.core.errors import UserError

FORMATS = (".npz", ".safetensors")


def checked_path(path: str | Path) -> Path:
    """The path, as far as can be said before there is a model.

    Raises:
      UserError: its ending is no format, or the format's package is not installed.
    """
    path = paths.local(path, "path")
    if path.suffix not in FORMATS:
        raise UserError("path", str(path), "its ending names no format", f"End it in {' or '.join(FORMATS)}.")
    if path.suffix == ".safetensors" and not _installed("safetensors"):
        fix = "Install it (pip install safetensors), or end the file in .npz."
        raise UserError("path", str(path), "the package safetensors is not installed", fix)
    return path


def named(variables: Any) -> dict[str, np.ndarray]:
    """A tree's leaves by their path, joined by slashes."""
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.array(leaf, order="C")
        for path, leaf in leaves
    }


def write(variables: Any, path: str | Path) -> Path:
    """Writes a model's leaves in one go, over a file that is there. -> the path.

    Raises:
      UserError: see `check`; or the file cannot be written.
    """
    path, leaves = checked_path(path), named(variables)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with paths.whole(path, f".{os.getpid()}") as unfinished:
            (_npz if path.suffix == ".npz" else _safetensors)(leaves, unfinished)
    except OSError as error:
        why = f"it cannot be written: {error.strerror or error}"
        raise UserError("path", str(path), why, "Choose another file.") from None
    return path


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # as it is put into sys.modules to hide it
        return False


def _npz(leaves: Mapping[str, np.ndarray], path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, **leaves)  # type: ignore[arg-type]


def _safetensors(leaves: Mapping[str, np.ndarray], path: Path) -> None:
    from safetensors.numpy import save  # type: ignore[import-not-found]

    path.write_bytes(save(dict(leaves)))
