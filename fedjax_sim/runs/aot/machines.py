"""Machines that programs are compiled for without being there: TPU slices, GPU nodes, CPUs.

Compiling for a TPU takes libtpu, for a GPU NVIDIA's compiler; neither needs the chip. Names of TPU slices are
Google's: the number counts chips of v5e and v6e, and TensorCores, of which a chip has two, of v4 and v5p.
`2xv5e-256` are two slices, `8xh100` eight cards.

Memory is what XLA lets programs use of a TPU's chip where it says so (15.75 of 16 GiB of v5e, 31.25 of 32 of
v6e), else the maker's figure; of a GPU three quarters, which is what JAX takes unless
XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise. Clocks of TPUs follow from the maker's peak rate and the size
and number of the units that multiply matrices (v5e: 197e12 / (2 · 4 · 128 · 128)).
"""

import contextlib
import dataclasses
import importlib.util
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from fedjax_sim.core.errors import UserError
from fedjax_sim.core.stacked import AXIS

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a configuration is compiled for.

    Attributes:
      name: as the user wrote it.
      kind: what a device is, in words.
      mesh: its devices.
      memory: bytes of one device that programs may use; None: of the CPU that is here, and its devices share
        it.
      clock: cycles a second; None where XLA estimates no cycles.
      options: of XLA's compiler.
    """

    name: str
    kind: str
    mesh: Mesh
    memory: int | None
    clock: float | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def chips(self) -> int:
        """How many devices there are."""
        return self.mesh.size


@dataclasses.dataclass(frozen=True)
class _Tpu:
    """A generation: its name, bytes and clock of a chip, chips of a slice -> its shape.

    `counted`: what a name counts of each chip.
    """

    kind: str
    memory: float
    clock: float
    shapes: Mapping[int, str]
    counted: int = 1
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8"}
_CUBES |= {512: "8x8x8", 1024: "8x8x16", 2048: "8x16x16"}

_TPUS = {
    "v4": _Tpu("TPU v4", 32 * _GIB, 1.05e9, _CUBES, 2, {"chip_config_name": "megacore"}),
    "v5e": _Tpu("TPU v5e", 15.75 * _GIB, 1.5e9, _FLAT),
    "v5p": _Tpu("TPU v5p", 95 * _GIB, 1.75e9, _CUBES, 2),
    "v6e": _Tpu("TPU v6e", 31.25 * _GIB, 1.75e9, _FLAT),
}


@dataclasses.dataclass(frozen=True)
class _Gpu:
    """A card, as XLA wants to know it; see `_target`. Sizes in bytes, rates a second.

    `shared` is that of a multiprocessor, `block` the most that a block can have of it.
    """

    kind: str
    capability: tuple[int, int]
    memory: int
    bandwidth: float
    cores: int
    units: int
    clock: float
    cache: int
    shared: int
    block: int
    threads: int


_GPUS = {
    "h100": _Gpu(
        "NVIDIA H100 80GB HBM3",
        (9, 0),
        84942979072,
        3352.32e9,
        132,
        128,
        1.98,
        52428800,
        233472,
        232448,
        2048,
    ),
    "a100": _Gpu(
        "NVIDIA A100-SXM4-40GB", (8, 0), 42405855232, 1555.2e9, 108, 64, 1.41, 41943040, 167936, 166912, 2048
    ),
    "a100-80": _Gpu(
        "NVIDIA A100-SXM4-80GB", (8, 0), 84986691584, 2039.04e9, 108, 64, 1.41, 41943040, 167936, 166912, 2048
    ),
    "t4": _Gpu("Tesla T4", (7, 5), 15655829504, 320.064e9, 40, 64, 1.59, 4194304, 65536, 65536, 1024),
}
"""Of cards that XLA has a target file for, its figures; else NVIDIA's."""


def names() -> list[str]:
    """Examples of every kind of name."""
    tpus = [f"{name}-{8 * one.counted}" for name, one in _TPUS.items()]
    return [*tpus, "2xv5e-256", *_GPUS, "8xh100", "cpu-8"]


def machine(name: str) -> Machine:
    """The machine of a name, such as v5e-256, 2xv5e-256, 8xh100, t4 or cpu-8.

    Raises:
      UserError: no such machine, or the compiler for it is not installed.
    """
    found = re.fullmatch(r"(?:(\d+)x)?([a-z]\w*?)(?:-(\d+))?", name.strip().lower())
    times, family, size = (int(found[1] or 1), found[2], found[3]) if found else (1, "", None)
    if family in _TPUS and size and times > 0:
        return _tpu(name, _TPUS[family], family, times, int(size))
    card = family if size is None else f"{family}-{size}"
    if card in _GPUS and times > 0:
        return _gpu(name, _GPUS[card], times)
    if family == "cpu" and size and times == 1 and int(size) > 0:
        return _cpu(name, int(size))
    raise UserError("on", name, "no such machine", f"Write one like these: {', '.join(names())}.")


def _tpu(name: str, kind: _Tpu, family: str, slices: int, size: int) -> Machine:
    sizes = [chips * kind.counted for chips in kind.shapes]
    shape = kind.shapes.get(size // kind.counted) if size % kind.counted == 0 else None
    if shape is None:
        fix = f"Sizes are {', '.join(f'{family}-{one}' for one in sizes)}."
        raise UserError("on", name, f"{kind.kind} has no slice of that size", fix)
    options = dict(kind.options)
    if set(shape.split("x")) == {"1"}:
        options["chips_per_host_bounds"] = [1, 1, 1]
    if slices > 1:
        options["num_slices"] = slices
    if importlib.util.find_spec("libtpu") is None:
        raise _missing(name, "libtpu", "tpu")
    devices = _described(name, f"{family}:{shape}", "tpu", options)
    return Machine(name, kind.kind, _mesh(devices), int(kind.memory), kind.clock)


def _gpu(name: str, card: _Gpu, count: int) -> Machine:
    toolkit = cuda_compiler()
    if toolkit is None:
        raise _missing(name, "JAX's CUDA plugin or NVIDIA's compiler (nvcc)", "cuda-plan")
    options = {"topology": f"1x1x{count}", "target_config": _target(card)}
    devices = _described(name, name, "cuda", options)
    compiler = {"xla_gpu_cuda_data_dir": toolkit, "xla_gpu_autotune_level": 0}
    return Machine(name, card.kind, _mesh(devices), card.memory * 3 // 4, None, compiler)


def _cpu(name: str, count: int) -> Machine:
    present = jax.devices("cpu")
    if len(present) < count:
        raise UserError(
            "on",
            name,
            f"JAX has started with {len(present)} CPU device(s) in this process",
            f"Set JAX_NUM_CPU_DEVICES={count} before it starts; the command line does so by itself.",
        )
    return Machine(name, "CPU", _mesh(present[:count]), None)


def start_for(name: str) -> None:
    """Lets JAX start as compiling for a machine wants it, in a process that does nothing else.

    JAX takes the CPU alone, of as many devices as the name says, and libraries keep to themselves what they
    miss of the machine.
    """
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    jax.config.update("jax_platforms", "cpu")
    devices = re.fullmatch(r"cpu-([1-9]\d*)", name.strip().lower())
    if devices:
        with contextlib.suppress(RuntimeError):  # it has started; `machine` says what is missing
            jax.config.update("jax_num_cpu_devices", int(devices[1]))


def _mesh(devices: Any) -> Mesh:
    return Mesh(np.asarray(devices).reshape(-1), (AXIS,), axis_types=(AxisType.Auto,))


def _described(name: str, topology: str, platform: str, options: dict[str, Any]) -> Any:
    from jax.experimental import topologies

    # Else libtpu asks the cloud who it is, for a minute, and JAX wants all of CUDA's libraries.
    alone = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": re.sub(r"^\d+x", "", name),  # of one slice
        "TPU_WORKER_HOSTNAMES": "localhost",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    }
    before = {key: os.environ.get(key) for key in alone}
    os.environ.update(alone)
    try:
        return topologies.get_topology_desc(topology, platform, **options).devices
    except Exception as error:
        said = " ".join(str(error).split())
        if platform == "tpu" and re.search(r"lockfile|already in use", said):
            raise _taken(name) from error
        extra, fix = "cuda-plan", "Start with JAX_PLATFORMS=cpu, as JAX leaves CUDA out without a driver."
        if platform == "tpu":
            extra, fix = "tpu", "Only one process at a time can compile for TPUs: wait for others."
        raise UserError(
            "on",
            name,
            f"XLA's compiler for it does not start: {said[:300]}",
            f"{fix} Or install the version that belongs to this JAX: pip install 'fedjax-sim[{extra}]'.",
        ) from error
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


def _taken(name: str) -> UserError:
    return UserError(
        "on",
        name,
        "another process holds libtpu, and one at a time can compile for TPUs; where libtpu is installed, "
        "any process that starts JAX takes it, unless JAX_PLATFORMS=cpu is set",
        "Wait for that process, or set JAX_PLATFORMS=cpu for commands that plan for no TPU, or install "
        "'fedjax-sim[tpu]' in an environment of its own.",
    )


def _missing(name: str, what: str, extra: str) -> UserError:
    return UserError(
        "on",
        name,
        f"{what} is not installed, which compiles for it; the machine itself is not needed",
        f"pip install 'fedjax-sim[{extra}]', or .venv/bin/pip install -e '.[{extra}]' in a checkout.",
    )


def cuda_compiler() -> str | None:
    """The folder with NVIDIA's ptxas and libdevice, if that wheel and JAX's CUDA plugin are installed."""
    if not (importlib.util.find_spec("jax_plugins") and importlib.util.find_spec("jax_plugins.xla_cuda12")):
        return None
    try:
        found = importlib.util.find_spec("nvidia.cuda_nvcc")
    except ModuleNotFoundError:
        return None
    places = list(found.submodule_search_locations or ()) if found else []
    return next((place for place in places if (Path(place) / "bin" / "ptxas").exists()), None)


def _target(card: _Gpu) -> str:
    """XLA's `GpuTargetConfigProto` as text."""
    info: dict[str, Any] = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49152,
        "shared_memory_per_core": card.shared,
        "threads_per_core_limit": card.threads,
        "core_count": card.cores,
        "fpus_per_core": card.units,
        "block_dim_limit_x": 2147483647,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "memory_bandwidth": int(card.bandwidth),
        "l2_cache_size": card.cache,
        "clock_rate_ghz": card.clock,
        "device_memory_size": card.memory,
        "shared_memory_per_block_optin": card.block,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
    }
    lines = " ".join(f"{key}: {value}" for key, value in info.items())
    major, minor = card.capability
    return (
        f"gpu_device_info {{ {lines} cuda_compute_capability {{ major: {major} minor: {minor} }} }} "
        f'platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 patch: 0 }} '
        f'device_description_str: "{card.kind}"'
    )
