"""Where things live: devices, the mesh over which client slots are sharded, and shared host buffers."""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fedjax_sim.config import EvaluationConfig, ExecutionConfig, ModelConfig
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.model import Model
from fedjax_sim.core.stacked import AXIS
from fedjax_sim.engine.waves import Work, widths


def use_all_cores() -> None:
    """Gives JAX one CPU device a core, unless it has started already or the user has chosen.

    Slots sharded over single-core devices use a CPU far better than one device's threads do. Called on
    import; before it, `JAX_NUM_CPU_DEVICES`, `jax.config.update("jax_num_cpu_devices", …)` and XLA's own
    `XLA_FLAGS=--xla_force_host_platform_device_count=…` take precedence.
    """
    if "JAX_NUM_CPU_DEVICES" in os.environ or jax.config.jax_num_cpu_devices > 0:  # pyright: ignore[reportAttributeAccessIssue] dynamic attribute
        return
    if "xla_force_host_platform_device_count" in _xla_flags():
        return
    try:
        jax.config.update("jax_num_cpu_devices", cores())
    except RuntimeError:
        warnings.warn(
            "JAX had started before fedjax_sim was imported, so the CPU stays a single device and training "
            "uses it badly. Import fedjax_sim first.",
            stacklevel=3,
        )


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _xla_flags() -> str:
    """The flags of the environment; XLA reads them from a file where the variable names one."""
    flags = os.environ.get("XLA_FLAGS", "").strip()
    if not flags or flags.startswith("-"):
        return flags
    try:
        return Path(flags).read_text()
    except (OSError, ValueError):
        return flags


def make_mesh(devices: int | None = None) -> Mesh:
    """The mesh of the first `devices` devices (None: all), one axis, `clients`.

    Raises:
      UserError: there are fewer devices than asked for.
    """
    present = jax.devices()
    count = len(present) if devices is None else devices
    if count > len(present):
        raise UserError(
            "execution.devices",
            devices,
            f"JAX sees {len(present)} {present[0].platform} device(s)",
            "Lower it, or leave it null for all (on a CPU, JAX_NUM_CPU_DEVICES makes more).",
        )
    if count < len(present) and jax.process_count() > 1:
        raise UserError(
            "execution.devices",
            devices,
            f"{jax.process_count()} processes have {len(present)} devices, and none can be left out",
            "Leave it null, or start fewer processes.",
        )
    return mesh_of(present[:count])


def mesh_of(devices: Sequence[Any]) -> Mesh:
    """The mesh of some devices, one axis, `clients`."""
    return Mesh(np.asarray(devices), (AXIS,), axis_types=(AxisType.Auto,))


def platform_of(mesh: Mesh) -> str:
    """What the devices are: cpu, gpu or tpu. Not JAX's default, where a program is for another machine."""
    return mesh.devices.flat[0].platform


def cut(mesh: Mesh) -> NamedSharding:
    """Sharding of a stack, whose rows the devices divide."""
    return NamedSharding(mesh, P(AXIS))


def lapack_on_one_thread() -> None:
    """Lets the LAPACK that XLA's CPU devices call use the thread that calls it, and no more.

    Devices call it side by side. Left alone, each call starts as many threads as there are cores, and
    small decompositions take up to six times longer.
    """
    import scipy.linalg  # noqa: F401 - loads the library in question
    import threadpoolctl

    for library in threadpoolctl.ThreadpoolController().lib_controllers:
        if library.internal_api == "openblas" and "scipy.libs" in Path(library.filepath).parts:
            library.set_num_threads(1)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same whole array on every device."""
    return NamedSharding(mesh, P())


def readable(mesh: Mesh) -> dict[str, Any]:
    """Options of `jax.jit` for results that every process reads on its host."""
    return {"out_shardings": replicated(mesh)} if jax.process_count() > 1 else {}


def put(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A NumPy array, which every process has whole, on the devices; each process fills its own.

    CPU devices that have it whole share one buffer instead of holding a copy each.

    Args:
      array: of any shape [n, …].
      sharding: where its parts lie; its mesh names the devices.
    """
    mesh = cast(Mesh, sharding.mesh)
    if platform_of(mesh) == "cpu" and sharding.is_fully_replicated:
        base = _aligned(array)
        parts = [jax.device_put(base, device, may_alias=True) for device in mesh.local_devices]
        return jax.make_array_from_single_device_arrays(array.shape, sharding, parts)
    return jax.make_array_from_callback(array.shape, sharding, lambda part: array[part])


def put_beside(there: jax.Array, array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """As `put`, of an array that lies whole on some of the devices already, and is to lie on all.

    Args:
      there: it, where it lies; these buffers are a part of the result.
      array: the same on the host, any shape [n, …].
      sharding: whole on every device.
    """
    if platform_of(cast(Mesh, sharding.mesh)) == "cpu":
        array = np.asarray(there)  # the buffer itself, which further devices may share
    held = {shard.device: shard.data for shard in there.addressable_shards}
    others = [device for device in _own_devices(cast(Mesh, sharding.mesh)) if device not in held]
    if others:
        rest = put(array, NamedSharding(mesh_of(others), P()))
        held |= {shard.device: shard.data for shard in rest.addressable_shards}
    parts = [held[device] for device in _own_devices(cast(Mesh, sharding.mesh))]
    return jax.make_array_from_single_device_arrays(array.shape, sharding, parts)


def put_own(rows: np.ndarray, each: int, sharding: NamedSharding) -> jax.Array:
    """A stack of `each` rows a device, of which this process has those of its own devices alone.

    Args:
      rows: [m, …], m at most what they hold; zeros follow.
      each: rows of a device.
      sharding: that of `cut`, in whatever memory.

    Returns:
      [D·each, …].
    """
    mesh = cast(Mesh, sharding.mesh)
    shape = (mesh.size * each, *rows.shape[1:])
    parts = []
    for number, device in enumerate(_own_devices(mesh)):
        part = rows[number * each : (number + 1) * each]
        if len(part) < each:
            part = np.concatenate([part, np.zeros((each - len(part), *rows.shape[1:]), rows.dtype)])
        there = jax.sharding.SingleDeviceSharding(device, memory_kind=sharding.memory_kind)
        parts.append(jax.device_put(part, there))
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)


def own(stack: jax.Array) -> np.ndarray:
    """The rows of a cut stack that this process's devices hold, in the order of `put_own`. [n, …]."""
    if stack.is_fully_addressable:
        return np.asarray(stack)
    shards = sorted(stack.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return np.concatenate([np.asarray(shard.data) for shard in shards])


def _own_devices(mesh: Mesh) -> list[Any]:
    """Devices of this process, in the order of the mesh."""
    return [device for device in mesh.devices.flat if device.process_index == jax.process_index()]


def _aligned(array: np.ndarray, boundary: int = 64) -> np.ndarray:
    """A C-ordered copy that starts at a multiple of `boundary` bytes, as zero-copy transfer wants it."""
    array = np.ascontiguousarray(array)
    if array.ctypes.data % boundary == 0:
        return array
    raw = np.empty(array.nbytes + boundary, np.uint8)
    shift = -raw.ctypes.data % boundary
    out = raw[shift : shift + array.nbytes].view(array.dtype).reshape(array.shape)
    out[...] = array
    return out


def speed_defaults(
    execution: ExecutionConfig, model: Model, cohort_size: int, mesh: Mesh, work: Work | None = None
) -> tuple[int, str]:
    """(wave width, implementation of the convolution) for these devices, where the user has not chosen.

    On a CPU convolutions want their client alone (a wave of 1), and small dense models waves of up to 10 that
    stay in cache; narrower ones if some clients take more steps than others and starting more steps costs
    less than the waiting (`fedjax_sim.engine.waves.step_seconds`).

    On a TPU, by XLA's estimate of cycles (scripts/benchmark/results/machines-conv.csv), XLA's own
    convolutions are the fastest; where most of them have few input channels, clients side by side share tiles
    that one alone fills badly (LeNet: 144,000 cycles a client and step in waves of 10, 212,000 alone), and
    where they have many a client is better alone (ResNet-20: 3.2 against 5.4 million). On a GPU the device's
    whole share side by side and `patches` are reasoned and not measured.

    Args:
      execution: what the user has chosen.
      model: the network; on a CPU its convolutions decide.
      cohort_size: K.
      mesh: the D devices.
      work: of the clients; None: all take equally many steps.
    """
    share, platform = -(-cohort_size // mesh.size), platform_of(mesh)
    on_cpu = platform == "cpu"
    if execution.wave is not None:
        wave = min(execution.wave, share)
    elif on_cpu:
        wave = 1 if model.convolves else _width(min(10, share), cohort_size, mesh.size, work)
    elif platform == "tpu" and has_deep_convolutions(model):
        wave = 1
    else:
        wave = share
    conv = execution.conv
    if conv == "auto" and platform == "tpu":
        conv = "xla"
    elif conv == "auto" and (wave > 1 or not on_cpu):
        conv = "patches"  # under vmap the other two become grouped convolutions
    return wave, conv


def _width(most: int, cohort_size: int, devices: int, work: Work | None) -> int:
    """The width of waves of dense models on a CPU."""
    if work is None or len(np.unique(work.steps)) <= 1:
        return most
    return min(widths(most), key=lambda width: work.seconds(cohort_size, devices, width))


_PRODUCTS = {"float32": "float32", "tf32": "tensorfloat32", "bfloat16": "bfloat16"}
"""Of a configuration -> of `jax.default_matmul_precision`."""


def numerics(config: ModelConfig, mesh: Mesh) -> tuple[str, str | None]:
    """(dtype of a model's arithmetic, its `Model.products`) on these devices.

    A CPU multiplies float32 factors fully. A GPU, left to JAX, rounds them to 11 bits, and a TPU to 8 in the
    one pass that its hardware has; six passes make up for that.

    Raises:
      UserError: products of bfloat16 factors on a GPU, which has none of float32 numbers.
    """
    platform = platform_of(mesh)
    dtype = config.dtype
    if dtype == "auto":
        dtype = "float32" if platform == "cpu" else "bfloat16"
    if platform == "gpu" and config.products == "bfloat16":
        raise UserError(
            "model.products",
            "bfloat16",
            "a GPU multiplies float32 numbers as float32 or tf32",
            "Set model.products to tf32, or model.dtype to bfloat16.",
        )
    if platform == "cpu":
        return dtype, None
    if config.products != "auto":
        return dtype, _PRODUCTS[config.products]
    given = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue] dynamic
    return dtype, "float32" if platform == "gpu" and given is None else None


_DEEP = 16
"""Input channels from which a convolution fills a TPU's tiles well enough with one client."""


def has_deep_convolutions(model: Model) -> bool:
    """Whether more than half of the convolutions have many input channels."""
    kernels = [leaf for leaf in jax.tree.leaves(model.abstract["params"]) if leaf.ndim == 4]
    return 2 * sum(kernel.shape[2] >= _DEEP for kernel in kernels) > len(kernels)


def forward_batch(evaluation: EvaluationConfig, model: Model, mesh: Mesh) -> int:
    """Images in one forward pass without gradients, where the user has not chosen.

    On a CPU a convolution's features want to stay in a core's cache: evaluating 4,000 images of 32×32 on two
    cores with 50 at a time took 0.96 (ResNet-8) to 0.70 (LeNet, ResNet-20) of the time that 500 take.
    """
    if evaluation.batch_size is not None:
        return evaluation.batch_size
    return 50 if platform_of(mesh) == "cpu" and model.convolves else 500
