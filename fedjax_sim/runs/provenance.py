"""Where a run's numbers come from: versions, hardware, source revision, fingerprints of data and partition.

No path is among them, so that the record may be published and is true on another machine.
"""

import functools
import hashlib
import os
import platform
import subprocess
import sys
import time
import zlib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fedjax_sim.core.errors import UserError
from fedjax_sim.core.versions import PACKAGES, installed
from fedjax_sim.data import Partition, Samples
from fedjax_sim.data.ragged import Ragged
from fedjax_sim.engine.placement import cores

PILLOW = "pillow"
"""The package that decodes pictures."""


def describe(dataset: Samples, partition: Partition, *, pictures: bool = False) -> dict[str, Any]:
    """Everything that is written to `provenance.json`, JSON as it stands.

    Args:
      dataset: what the run trains on.
      partition: who holds which samples of it.
      pictures: whether it may come of picture files; Pillow's version is then told, if it has been imported.
    """
    decoder = (PILLOW,) if pictures and "PIL.Image" in sys.modules else ()
    return {
        "versions": describe_versions(*decoder),
        **hardware(),
        "jax": jax_settings(),
        "git": {"package": _commit(Path(__file__).parent), "working_directory": _commit(Path.cwd())},
        "data": fingerprint(dataset),
        "partition": describe_partition(partition),
    }


def describe_partition(partition: Partition) -> dict[str, Any]:
    """A partition in short: of its recipe what a title says, the number of clients, and two checksums.

    `crc32_train` is of the training samples that each client holds, `crc32` of all that the partition says.
    """
    told = {name: partition.recipe[name] for name in ("kind", "alpha", "dataset") if name in partition.recipe}
    train = whole = _crc(partition.train, 0)
    asides = [part for part in (partition.server, partition.rng_ids) if part is not None]
    for lists in (partition.test or (), asides):
        whole = _crc(lists, whole)
    return {**told, "clients": partition.num_clients, "crc32": whole, "crc32_train": train}


def _crc(lists: Sequence[np.ndarray], crc: int) -> int:
    lists = Ragged.of(lists)
    content = memoryview(lists.flat.astype("<i8").tobytes())
    for start, stop in pairwise(lists.offsets.tolist()):
        crc = zlib.crc32(content[8 * start : 8 * stop], zlib.crc32(b"%d:" % (stop - start), crc))
    return crc


def describe_versions(*more: str) -> dict[str, str | None]:
    """Versions of Python, of packages that numbers depend on, and of `more`; None: it is not installed."""
    names = (*PACKAGES, *more)
    return {"python": platform.python_version(), **{name: _installed(name) or None for name in names}}


_installed = functools.cache(installed)  # what a process has loaded stays


SETTINGS = (
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_enable_x64",
    "jax_random_seed_offset",
    "jax_threefry_partitionable",
)
"""JAX's global settings that can change numbers of what is compiled under them.

A run's draws are the same under all of the generator's; a model's dropout is another under `jax_enable_x64`.
"""


def jax_settings() -> dict[str, Any]:
    """How SETTINGS stand."""
    return {name: getattr(jax.config, name) for name in SETTINGS}


def check_jax_settings(recorded: dict[str, Any]) -> None:
    """Raises UserError where a run that goes on would draw or round otherwise than it began."""
    found = jax_settings()
    for name in ("jax_enable_x64", "jax_default_matmul_precision"):
        if name in recorded and recorded[name] != found[name]:
            raise UserError(
                name,
                found[name],
                f"the run began with {recorded[name]}, and would go on with other numbers",
                f'Set it as it was: jax.config.update("{name}", {recorded[name]!r}), or start a new run.',
            )


def check_dtype(dtype: str, recorded: dict[str, Any]) -> None:
    """Raises UserError where a run that goes on would compute in another dtype.

    Args:
      dtype: `model.dtype` of the run.
      recorded: devices that it began on, as `hardware` has them.
    """
    began, now = recorded.get("platform"), jax.devices()[0].platform
    if dtype == "auto" and began is not None and (began == "cpu") != (now == "cpu"):
        raise UserError(
            "model.dtype",
            dtype,
            f"the run began on {began}, and would go on with another dtype on {now}",
            f"Resume it on {began}, or start a new run from its model (initial.run).",
        )


def hardware() -> dict[str, Any]:
    """The machine: system, devices that JAX sees, processor."""
    devices = jax.devices()
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "devices": {
            "platform": devices[0].platform,
            "kind": devices[0].device_kind,
            "count": len(devices),
            "processes": jax.process_count(),
        },
        "cpu": {"model": _cpu_model(), "cores": cores(), "memory_bytes": total_memory()},
    }


def machine() -> str:
    """A name for this kind of processor: compiled programs must not travel to one that lacks instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        told = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        told = platform.processor()
    return hashlib.sha256(f"{platform.machine()} {told}".encode()).hexdigest()[:12]


def fingerprint(dataset: Samples) -> dict[str, Any]:
    """Shapes and checksums of a data set, by which another one is recognised."""
    out: dict[str, Any] = {"name": dataset.name, "num_classes": dataset.task.num_classes}
    for name, values in dataset.arrays.items():
        out[name] = {"shape": list(values.shape), "crc32": crc32(values)}
    return out


def crc32(values: np.ndarray) -> int:
    """Checksum of an array's bytes."""
    return zlib.crc32(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)


READ_WHOLE = 2**26
"""Bytes up to which `digests` reads a memory-mapped array as a whole."""
ROWS = 256
"""How many rows it reads of a larger one."""


def digests(dataset: Samples) -> dict[str, str]:
    """What processes that run together compare of their copies of the data, without writing it down.

    By `data.train.LEAF` and `data.test.LEAF`: type, shape and CRC-32. Arrays in memory are read in full, and
    memory-mapped ones up to 64 MiB. A larger one may be larger than memory: of that ROWS rows are read, from
    the first to the last at equal distances, the same in every process. Another size, another type, another
    order or other samples are found so; a copy in which only rows between these differ is not.
    """
    out = {"data.num_classes": str(dataset.task.num_classes)}
    parts = {"train": dataset.train, "test": dataset.test}
    out |= {f"data.{part}.{key}": _digest(leaf) for part, held in parts.items() for key, leaf in held.items()}
    groups = ("train_domains", "test_domains", "train_writers", "test_writers")
    ids = {f"data.{name}": getattr(dataset, name) for name in groups}
    return out | {name: _digest(values) for name, values in ids.items() if values is not None}


def _digest(leaf: np.ndarray) -> str:
    told, part = f"{leaf.dtype}{list(leaf.shape)}, CRC-32", ""
    if isinstance(leaf, np.memmap) and leaf.nbytes > READ_WHOLE and len(leaf) > ROWS:
        leaf, part = leaf[np.linspace(0, len(leaf) - 1, ROWS).astype(np.int64)], f" of {ROWS} rows"
    return f"{told}{part} {crc32(leaf):08x}"


def check_fingerprint(dataset: Samples, recorded: dict[str, Any]) -> None:
    """Raises UserError unless `dataset` is the one that was recorded."""
    found = fingerprint(dataset)
    for name, value in recorded.items():
        if name != "name" and found.get(name) != value:
            raise UserError(
                f"data.{name}",
                found.get(name),
                f"the run was started with other data: {value} of {recorded.get('name')}",
                "Give resume the same data, or start a new run in another folder.",
            )


def total_memory() -> int:
    """Bytes of memory in this machine; 0 where it cannot be told."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


_COMMITS: dict[Path, tuple[float, dict[str, Any] | None]] = {}
"""When a folder was last looked at, and what git said of it."""

_FRESH = 5.0
"""Seconds in which runs that begin one after another share it."""


def _commit(folder: Path) -> dict[str, Any] | None:
    """The commit that a folder is at and whether files differ from it; None outside of a repository."""
    now = time.monotonic()
    if folder not in _COMMITS or now - _COMMITS[folder][0] > _FRESH:
        _COMMITS[folder] = now, _asked_of_git(folder)
    return _COMMITS[folder][1]


def _asked_of_git(folder: Path) -> dict[str, Any] | None:
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return {"commit": commit, "modified": bool(_git(folder, "status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()
