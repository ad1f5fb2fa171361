"""Compiled programs, one for each shape of their arguments, shared by the runs of one process.

A function that equals an earlier one is neither traced nor compiled again (`cached_jit`), on any backend. The
others are traced, and on CPUs their programs are found again in memory by their text, or in a folder
(`kept_in`) that knows which of them may be taken from there. JAX's own cache on disk serves those of one CPU
device alone: see `fedjax_sim.engine.program_files` for what happens to others.

On CPUs LLVM optimises at level 1, not 3: compiling takes less time, of forward passes and initial states much
less, and the programs run as fast, since products and convolutions are library calls and loops are vectorised
at either level. Measured by `scripts/benchmark/scaling.py --parts compile`.

Draws come out the same under any setting of JAX's generator (`fedjax_sim.core.rng.settled`).

Numbers that are still on the host go to the devices in one piece. JAX takes arrays there one by one, and in a
round of a few milliseconds that was a tenth.
"""

import contextlib
import dataclasses
import hashlib
import math
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from types import MethodType
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, NamedSharding

from fedjax_sim.core import memo
from fedjax_sim.core.rng import settled
from fedjax_sim.engine.placement import platform_of, replicated
from fedjax_sim.engine.program_files import ProgramFiles, keeps_its_order, name_of


def cached_jit(function: Callable[..., Any], mesh: Mesh, **options: Any) -> "CachedJit":
    """A `CachedJit`; one and the same for equal functions with equal options, see `fedjax_sim.core.memo`.

    Args:
      function: it depends on nothing that may differ between equal ones; a frozen dataclass, say, or a method
        of one.
      mesh: the devices.
      **options: of `CachedJit`.
    """
    bound = isinstance(function, MethodType)
    of = (function.__func__, function.__self__) if bound else function
    leaves, structure = jax.tree.flatten(options)
    made_of = of, mesh, structure, tuple(leaves), CPU_LEVEL
    return memo.once("program", made_of, lambda: CachedJit(function, mesh, **options))


class CachedJit:
    """A function under `jax.jit`, for arguments on the devices of a mesh; called as the function is.

    Attributes:
      function: as it was given.
    """

    def __init__(
        self, function: Callable[..., Any], mesh: Mesh, *, many_kernels: bool = False, **options: Any
    ):
        """Compiles nothing yet.

        Args:
          function: to be compiled.
          mesh: the devices.
          many_kernels: it is made of hundreds of small operations, which take longer to compile than to run.
          **options: of `jax.jit`, arguments by number.
        """
        self.function = function

        # Else XLA cuts what is unpacked over the devices as the function goes on, and exchanges the parts.
        whole = None if mesh.size == 1 else replicated(mesh)

        def joined(packing: _Packing, words: Any, *rest: Any) -> Any:
            return function(*packing.join(words, rest, whole))

        # What profiles and logs show.
        joined.__name__ = getattr(function, "__name__", type(function).__name__)
        donated = tuple(number + 2 for number in options.pop("donate_argnums", ()))
        platform = platform_of(mesh)
        compiler = _compiler_options(platform, many_kernels)
        self._jitted: Any = jax.jit(
            joined, static_argnums=0, donate_argnums=donated, compiler_options=compiler, **options
        )
        self._plain = platform != "cpu"
        self._place = tuple(mesh.devices.flat), tuple(compiler.items())
        self._compiled: dict[Any, Any] = {}

    def __call__(self, *args: Any) -> Any:
        """The function's value."""
        packing, words, rest = _pack(args)
        # Without jit there is nothing to compile.
        if self._plain or jax.config.jax_disable_jit:  # pyright: ignore[reportAttributeAccessIssue] dynamic attribute
            with settled():
                return self._jitted(packing, words, *rest)
        shape = packing, tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(rest))
        if shape not in self._compiled:
            with settled():
                lowered = self._jitted.lower(packing, words, *rest)
                self._compiled[shape] = _compile(lowered, shape, *self._place)
        return self._compiled[shape](words, *rest)

    def lower(self, *args: Any) -> jax.stages.Lowered:
        """As `jax.jit(…).lower`."""
        packing, words, rest = _pack(args)
        with settled():
            return self._jitted.lower(packing, words, *rest)

    def num_compiled(self) -> int:
        """For how many shapes of arguments it has been called."""
        return self._jitted._cache_size() if self._plain else len(self._compiled)


CPU_LEVEL = 1
"""LLVM's level of optimisation for programs made from now on."""

_LEVEL = "xla_backend_optimization_level"

OLDER_EMITTER = version("jaxlib").startswith("0.10.")
"""Whether XLA has its older emitter of CPU kernels, which takes less time for each; later releases do not."""

_EMITTER = "xla_cpu_use_fusion_emitters"


def _compiler_options(platform: str, many_kernels: bool) -> dict[str, Any]:
    """The user's own flags go before these."""
    if platform != "cpu":
        return {}
    options: dict[str, Any] = {_LEVEL: CPU_LEVEL}
    if many_kernels and OLDER_EMITTER:
        options[_EMITTER] = False
    return {name: value for name, value in options.items() if name not in os.environ.get("XLA_FLAGS", "")}


@dataclasses.dataclass(frozen=True)
class _Packing:
    """Which leaves of a call's arguments are packed, and as what.

    Attributes:
      structure: of the arguments.
      leaves: (position, shape, dtype) of each packed leaf.
    """

    structure: Any
    leaves: tuple[tuple[int, tuple[int, ...], np.dtype], ...]

    def join(self, words: jax.Array, rest: Any, where: NamedSharding | None) -> Any:
        """The arguments, of `_pack`'s other two results, those that were packed lying so. Traced."""
        leaves, start = self.structure.flatten_up_to(rest), 0
        for position, shape, dtype in self.leaves:
            end = start + math.prod(shape)
            leaf = jax.lax.bitcast_convert_type(words[start:end], dtype).reshape(shape)
            leaves[position] = leaf if where is None else jax.lax.with_sharding_constraint(leaf, where)
            start = end
        return self.structure.unflatten(leaves)


def _pack(args: Any) -> tuple[_Packing, np.ndarray, Any]:
    """(what was packed, u32[words] of it, the arguments with None in its place).

    That is every NumPy array or scalar of four bytes an entry.
    """
    leaves, structure = jax.tree.flatten(args)
    packed = [
        (position, leaf)
        for position, leaf in enumerate(leaves)
        if isinstance(leaf, np.ndarray | np.generic) and leaf.dtype.itemsize == 4
    ]
    for position, _ in packed:
        leaves[position] = None
    words = [np.ravel(leaf).view(np.uint32) for _, leaf in packed]
    packing = _Packing(structure, tuple((position, leaf.shape, leaf.dtype) for position, leaf in packed))
    return packing, np.concatenate([np.zeros(0, np.uint32), *words]), structure.unflatten(leaves)


_RECENT: OrderedDict[Any, jax.stages.Compiled] = OrderedDict()
MAX_CACHED = 128
_ON_DISK = "jax_enable_compilation_cache"


def _compile(
    lowered: jax.stages.Lowered, shape: Any, devices: Sequence[Any], options: Any
) -> jax.stages.Compiled:
    """Compiled now, or found among the last programs of this process, or in the folder, by its text.

    Args:
      lowered: the program.
      shape: of all arguments, as the text has only those that it uses.
      devices: of the mesh; the program of one device may come from JAX's cache on disk.
      options: of the compiler.
    """
    text = hashlib.sha256(lowered.as_text().encode()).hexdigest()
    name = text, shape, lowered.out_tree, len(devices), options
    if name in _RECENT:
        _COUNT.in_memory += 1
    else:
        _RECENT[name] = _from_folder_or_compiled(text, lowered, devices, options)
        if len(_RECENT) > MAX_CACHED:
            _RECENT.popitem(last=False)
    _RECENT.move_to_end(name)
    return _RECENT[name]


def _from_folder_or_compiled(
    text: str, lowered: jax.stages.Lowered, devices: Sequence[Any], options: Any
) -> jax.stages.Compiled:
    """See `_compile`."""
    name = "" if _FILES is None else name_of(text, lowered, devices, options)
    if _FILES is not None:
        before = time.perf_counter()
        found = _FILES.load(name, lowered, devices)
        if found is not None:
            _COUNT.from_disk += 1
            _COUNT.seconds += time.perf_counter() - before
            return found
    with _without_disk() if len(devices) > 1 else contextlib.nullcontext():
        made = lowered.compile()
    if _FILES is not None and (len(devices) == 1 or keeps_its_order(made.as_text() or "")):
        _FILES.save(name, made)
    return made


_FILES: ProgramFiles | None = None


@contextlib.contextmanager
def kept_in(folder: Path) -> Iterator[None]:
    """Compiled programs of CPUs are looked for in a folder meanwhile, and kept there.

    Args:
      folder: for this kind of processor alone, see `ProgramFiles`.
    """
    global _FILES
    before, _FILES = _FILES, ProgramFiles(folder)
    try:
        yield
    finally:
        _FILES = before


@dataclasses.dataclass
class Count:
    """Where this process has its programs from: all of them, those outside of this package included.

    Attributes:
      compiled: by XLA.
      from_disk: read there.
      in_memory: traced again, and found by their text.
      seconds: of compiling and reading, on the wall; without tracing.
    """

    compiled: int = 0
    from_disk: int = 0
    in_memory: int = 0
    seconds: float = 0.0

    def since(self, before: "Count") -> "Count":
        """What came after `before`."""
        fields = dataclasses.fields(self)
        return Count(**{f.name: getattr(self, f.name) - getattr(before, f.name) for f in fields})

    def __str__(self) -> str:
        """In words, such as `12 programs compiled, 3 read from disk, in 8.1 s`."""
        disk = f", {self.from_disk} read from disk" if self.from_disk else ""
        return f"{self.compiled} programs compiled{disk}, in {self.seconds:.1f} s"


_COUNT = Count()


def count() -> Count:
    """What this process has compiled and read so far."""
    return dataclasses.replace(_COUNT)


def _on_duration(event: str, duration_secs: float, **keywords: Any) -> None:
    del keywords
    if event.endswith("/backend_compile_duration"):  # of what JAX's own cache gives too
        _COUNT.compiled += 1
        _COUNT.seconds += duration_secs


def _on_event(event: str, **keywords: Any) -> None:
    del keywords
    if event.endswith("/compilation_cache/cache_hits"):
        _COUNT.compiled -= 1
        _COUNT.from_disk += 1


jax.monitoring.register_event_duration_secs_listener(_on_duration)
jax.monitoring.register_event_listener(_on_event)


@contextlib.contextmanager
def _without_disk() -> Iterator[None]:
    before = getattr(jax.config, _ON_DISK)
    jax.config.update(_ON_DISK, False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update(_ON_DISK, before)
        compilation_cache.reset_cache()
