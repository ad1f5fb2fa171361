"""Numbers are strict, devices are four, and nothing compiles twice: set before JAX starts a backend."""

import contextlib
import ctypes
import gc
import hashlib
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

# Tests are written for the CPU, and run there even where an accelerator is: JAX_PLATFORMS says otherwise.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")
# Nothing is measured in tests, and no layout goes by what was measured on the machine that they run on.
os.environ["FEDJAX_SIM_CALIBRATION"] = ""
# Nor are programs taken that other runs of this user have kept.
os.environ["FEDJAX_SIM_PROGRAMS"] = ""
# Most of the time goes into compiling, and the programs are small: what LLVM's levels above 0 and XLA's newer
# emitter of fusions would gain is less than they cost. At level 0 two programs of one sum may differ in the
# sixth digit; a test that holds them to the seventh asks for the fixture `optimised`.
# Other runs keep XLA's choices. XLA after jaxlib 0.10 has no other emitter, and a flag that it does not
# know ends the process.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    " --xla_cpu_parallel_codegen_split_count=1"
    if version("jaxlib").startswith("0.10.")
    else "--xla_backend_optimization_level=0",
)
# A process that may keep no bytecode compiles all sources, JAX's too, at its start: 2.5 s of 4.2. Tests start
# many processes, so that the folder of pytest's cache keeps it.
if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
    sys.pycache_prefix = str(Path(__file__).parents[1] / ".pytest_cache" / "d" / "bytecode")
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix
    sys.dont_write_bytecode = False
# Nobody looks up the Python lines behind a compiled test's instructions: a tenth of tracing and lowering.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

# Tests import helpers as `tests.…`. Last on the path: an installed package goes before the sources here.
sys.path.append(str(Path(__file__).parents[1]))

import jax
import jaxtyping
import matplotlib
import numpy as np
import pytest

NUM_DEVICES = int(os.environ.get("JAX_NUM_CPU_DEVICES", "4"))

matplotlib.use("Agg", force=True)
jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
# A float32 that meets an int32 or a float64, a vector that meets a matrix: said out loud, or refused.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Shapes in the annotations of these modules can be checked at every call, also while a program is traced.
# That takes up to a tenth of the time: tests/core/test_shapes.py and test_primitives.py ask for it, in
# processes of their own. To be said before anything imports the modules.
CHECKED = ("core.stacked", "core.top_k", "core.rng", "engine.waves")
if os.environ.get("FEDJAX_SIM_CHECK_SHAPES"):
    jaxtyping.install_import_hook([f"fedjax_sim.{name}" for name in CHECKED], "beartype.beartype")


def pytest_configure(config: pytest.Config) -> None:
    """Keeps compiled programs between runs and between xdist's workers, in pytest's own cache folder."""
    if not hasattr(config, "cache") or os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    folder = config.cache.mkdir("xla-" + _machine())
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # The cheap ones are many: writing them would cost more than compiling them.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_sessionstart() -> None:
    """What tests define stays as it is, or is replaced by `monkeypatch`: runs may share its traces."""
    from fedjax_sim.core import memo

    memo.SHIPPED.add("tests")


def pytest_collection_finish() -> None:
    """What importing left stays: tracing makes many small objects, and each collection would look at all."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


MOST_MEMORY = 3 * 2**30
"""Bytes of a process beyond which it lets go of all compiled programs at the end of a file."""


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Compiled programs of hundreds of tests would be some 6 GB in each process."""
    if nextitem is None or nextitem.path == item.path or _memory() < MOST_MEMORY:
        return
    from fedjax_sim.core import memo

    memo.forget()
    jax.clear_caches()
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # of the GNU C library, which keeps what is freed
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _memory() -> int:
    """Bytes that this process has in memory; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Doctests are for the package: a helper beside the tests is not imported on its own account."""
    if collection_path.suffix == ".py" and not collection_path.name.startswith("test_"):
        return True
    return None


def _machine() -> str:
    """A name for this processor: a compiled program must not travel to one that lacks its instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        told = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        told = platform.processor()
    return hashlib.sha256(f"{platform.machine()} {told}".encode()).hexdigest()[:12]


# Files, folders and words: nothing of these is ever part of a traced program.
NEVER_TRACED = re.compile(
    r"(importlib|os|pathlib|sys|time)(\..*)?"
    r"|fedjax_sim(\.data(\.load)?)?"
    r"|fedjax_sim\.(cli|records|studies)(\..*)?"
    r"|fedjax_sim\.runs(\.(checkpoint|drive|federation|folder|loading|packs|plan|progress)(\..*)?)?"
    r"|fedjax_sim\.engine\.(hosts(\..*)?|simulation\.Simulation(\..*)?)"
)


def _path(target: Any) -> str:
    """Where a module, a class or a function is, or what is named so already."""
    if isinstance(target, str):
        return target
    module = getattr(target, "__module__", None)
    if isinstance(target, ModuleType) or module is None:
        return getattr(target, "__name__", "")
    return f"{module}.{getattr(target, '__qualname__', '')}"


@pytest.fixture
def monkeypatch(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """pytest's, which also lets no traced program outlive what it was traced with."""
    from fedjax_sim.core import memo

    replace, forgotten = monkeypatch.setattr, []

    def setattr_and_forget(*args: Any, **keywords: Any) -> None:
        if not NEVER_TRACED.fullmatch(_path(args[0])):
            memo.forget()
            forgotten.append(args[0])
        replace(*args, **keywords)

    monkeypatch.setattr = setattr_and_forget
    yield monkeypatch
    if forgotten:
        memo.forget()


@pytest.fixture
def optimised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of the engine are compiled at the level that runs use."""
    from fedjax_sim.engine import programs

    options = {"xla_backend_optimization_level": programs.CPU_LEVEL}
    monkeypatch.setattr(programs, "_compiler_options", lambda platform, many_kernels: options)


@pytest.fixture
def rng() -> np.random.Generator:
    """NumPy's generator with a fixed seed, for oracles and made-up data."""
    return np.random.default_rng(20260)


@pytest.fixture
def real_data() -> Callable[[str], Path]:
    """`real_data("cifar10")`: the path of `$FEDJAX_SIM_DATA/cifar10.npz`; skips where there is none."""

    def find(name: str) -> Path:
        folder = os.environ.get("FEDJAX_SIM_DATA")
        if not folder:
            pytest.skip("needs real images: set FEDJAX_SIM_DATA to a folder of npz files")
        path = Path(folder) / f"{name}.npz"
        if not path.is_file():
            pytest.skip(f"needs {path.name}, which is not in FEDJAX_SIM_DATA")
        return path

    return find
