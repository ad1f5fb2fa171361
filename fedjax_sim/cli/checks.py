"""What `fedjax-sim doctor` looks at. Nothing of JAX is imported here: it is asked in a process of its own."""

import dataclasses
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from fedjax_sim.core import paths, versions

OLDEST, NEWEST = (3, 11), (3, 14)
"""Releases of Python that the tests run on."""

WAIT = 90.0
"""Seconds that JAX may take to start."""

MEMORY, DISK = 2 * 2**30, 2**30
"""Bytes below which a run of the package's own examples may fail."""

EXTRAS = {
    "optuna": ("fedjax-sim tune", "optuna"),
    "wandb": ("the callback wandb", "wandb"),
    "mlflow": ("the callback mlflow", "mlflow-skinny"),
    "submitit": ("sweep --launcher slurm", "submitit"),
    "ray": ("sweep --launcher ray", "ray"),
    "tensorflow": ("preparing tensorflow-datasets sets", "tensorflow-cpu"),
    "safetensors": ("export to .safetensors", "safetensors"),
    "pandas": ("Table.to_pandas", "pandas"),
    "pytest": ("the tests that fedjax-sim new writes", "pytest"),
}
"""Module -> (what needs it, what to install)."""

VARIABLES = {
    "XLA_FLAGS": "options of the compiler; a run on another machine needs the same ones for the same bits",
    "JAX_PLATFORMS": "which devices JAX may use",
    "JAX_PLATFORM_NAME": "which devices JAX uses first; JAX_PLATFORMS is its newer name",
    "JAX_NUM_CPU_DEVICES": "CPU devices; without it there is one for each core",
    "JAX_COMPILATION_CACHE_DIR": "JAX's own cache of programs takes the place of this package's",
    "JAX_DEFAULT_MATMUL_PRECISION": "goes before model.products: auto, and changes numbers on accelerators",
    "JAX_ENABLE_X64": "numbers of models with dropout are others under it",
    "JAX_DISABLE_JIT": "every operation runs by itself: rounds take up to a hundred times as long",
    "JAX_DEBUG_NANS": "every program is checked for NaN: slower; execution.debug says more",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "whether JAX takes most of a GPU's memory at its start",
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "how much of a GPU's memory JAX takes at its start",
    "CUDA_VISIBLE_DEVICES": "which GPUs there are",
    "OMP_NUM_THREADS": "threads of LAPACK and of NumPy",
    "FEDJAX_SIM_CHECK_SHAPES": "shapes are checked at every call: slower, meant for tests",
}
"""Variable -> what it does. Those in `_COSTLY` are notes, the others are only said."""

_COSTLY = ("JAX_DISABLE_JIT", "JAX_DEBUG_NANS", "JAX_ENABLE_X64", "FEDJAX_SIM_CHECK_SHAPES")

_PROBE = """
import json
told = {}
try:
    import fedjax_sim
    from fedjax_sim.data.sources import default_data_dir, present
    told["data"] = str(default_data_dir()), present()
except Exception as error:
    told["package"] = f"{type(error).__name__}: {error}"
import jax
devices = jax.local_devices()
told["platform"] = devices[0].platform
told["kinds"] = [device.device_kind for device in devices]
told["memory"] = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
print("\\n" + json.dumps(told))
"""


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of the doctor.

    Attributes:
      name: what was looked at.
      state: `ok`, `note` or `problem`.
      found: what there is.
      fix: what to do; "" where there is nothing to do.
    """

    name: str
    state: str
    found: str
    fix: str = ""


def all_of_them() -> Iterator[Check]:
    """Every check, as it is done."""
    yield python()
    refused = False
    for name in versions.PACKAGES:
        check = package(name)
        refused = refused or (check.state == "problem" and name in ("jax", "jaxlib"))
        yield check
    yield cores()
    yield from accelerators()
    told: dict[str, Any] = {}
    if refused:
        fix = "Install another release first (above)."
        yield Check("devices", "note", "JAX was not started, as this release is refused", fix)
    else:
        told = probe()
        yield from devices(told)
    yield memory()
    yield disk()
    yield programs()
    yield calibration()
    yield data(told)
    yield from extras()
    yield from variables(told.get("error", ""))
    yield from revision()


# --- versions ----------------------------------------------------------------------------------------------


def python(version: tuple[int, int] | None = None) -> Check:
    """The release of Python; `version`: it, or None for this one."""
    found = version or sys.version_info[:2]
    told = platform.python_version() if version is None else ".".join(map(str, version))
    if found < OLDEST:
        fix = f"Make an environment with Python {'.'.join(map(str, NEWEST))}."
        return Check("python", "problem", f"{told}, which is too old", fix)
    if found > NEWEST:
        oldest, newest = (".".join(map(str, one)) for one in (OLDEST, NEWEST))
        return Check("python", "note", f"{told}; the tests run on {oldest} to {newest}")
    return Check("python", "ok", f"{told} ({sys.executable})")


def package(name: str) -> Check:
    """The release of a package that numbers depend on, against what is refused and what is asked for."""
    found = versions.installed(name)
    if not found:
        if name == "fedjax-sim":
            return Check(
                name, "note", "not installed; it runs from its clone", "pip install -e . installs it."
            )
        return Check(name, "problem", "not installed", f"{sys.executable} -m pip install {name}")
    if name in ("jax", "jaxlib"):
        try:
            versions.check_versions(**{"jax": "", "jaxlib": "", name: found})
        except ImportError:
            reason = next(why for release, why in versions.REFUSED.items() if found.startswith(release))
            return Check(name, "problem", f"{found} is refused: {reason}", versions.remedy())
    for origin in ("fedjax-sim", "jax") if name == "jaxlib" else ("fedjax-sim",):
        wanted = required(origin, name)
        if wanted and not wanted.contains(found, prereleases=True):
            fix = f'{sys.executable} -m pip install "{name}{wanted}"'
            return Check(name, "problem", f"{found}, and {origin} needs {wanted}", fix)
    return Check(name, "ok", found)


def required(origin: str, name: str) -> Any:
    """What an installed package asks of another one, as a specifier; None if it asks nothing."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires(origin) or []
    except metadata.PackageNotFoundError:
        return None
    for line in lines:
        wanted = Requirement(line)
        if wanted.name == name and (wanted.marker is None or wanted.marker.evaluate({"extra": ""})):
            return wanted.specifier
    return None


# --- devices -----------------------------------------------------------------------------------------------


def cores() -> Check:
    """CPU cores, and how many CPU devices JAX is told to have."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    given = os.environ.get("JAX_NUM_CPU_DEVICES", "")
    if given.isdecimal() and int(given) > count:
        fix = "Unset it, unless you try out several devices on purpose."
        return Check("cores", "note", f"{count}, and JAX_NUM_CPU_DEVICES={given} is more", fix)
    return Check("cores", "ok", f"{count}")


def probe(wait: float | None = None) -> dict[str, Any]:
    """What JAX says of its devices, in a process of its own; under `error` why it does not start."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE],
            capture_output=True,
            text=True,
            timeout=WAIT if wait is None else wait,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
    except subprocess.TimeoutExpired:
        return {"error": "it did not start in time", "late": True}
    except OSError as error:
        return {"error": str(error)}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        return {"error": done.stderr.strip() or f"exit status {done.returncode}"}
    return {**json.loads(lines[-1]), "said": done.stderr}


def devices(told: dict[str, Any]) -> Iterator[Check]:
    """JAX's devices. `told`: see `probe`."""
    if "error" in told:
        why = _short(told["error"])
        fix = _remedy(told["error"], "late" in told)
        yield Check("devices", "problem", f"JAX does not start: {why}", fix)
        return
    kinds = {kind: told["kinds"].count(kind) for kind in told["kinds"]}
    words = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    limits = [limit for limit in told["memory"] if limit]
    words += f", {min(limits) / 2**30:.0f} GiB each" if limits else ""
    yield Check("devices", "ok", f"{told['platform']}: {words}")
    if told["platform"] != "cpu" or os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        return
    if shutil.which("nvidia-smi") and _gpus():
        fix = f'{sys.executable} -m pip install "jax[cuda12]=={versions.installed("jax")}"'
        if versions.installed("jax-cuda12-plugin") or versions.installed("jax-cuda13-plugin"):
            fix = "The driver or CUDA_VISIBLE_DEVICES keeps JAX from it: JAX_PLATFORMS=cuda says how."
        yield Check("gpu", "problem", "there is one, and JAX uses the CPU", fix)
    if _tpus():
        fix = f'{sys.executable} -m pip install "jax[tpu]=={versions.installed("jax")}"'
        yield Check("tpu", "problem", "there is one, and JAX uses the CPU", fix)


_UNKNOWN_FLAGS = re.compile(r"Unknown flags? in XLA_FLAGS: *(.*)")


def _blamed(said: str) -> str:
    """The variable of the environment with which JAX does not start, by what it said; "" if it is none."""
    if _UNKNOWN_FLAGS.search(said):
        return "XLA_FLAGS"
    if said.strip().endswith("AssertionError") and os.environ.get("JAX_PLATFORMS"):
        return "JAX_PLATFORMS"  # JAX says no more where the plugin for CUDA is missing
    if "Unable to initialize backend" in said or "Unknown backend" in said:
        return "JAX_PLATFORMS"
    return ""


def _short(said: str) -> str:
    """Why JAX does not start, in one line, of all that it said."""
    last = said.strip().splitlines()[-1]
    if flags := _UNKNOWN_FLAGS.search(said):
        return f"XLA does not know {flags[1].strip()}"
    return (
        f"{os.environ['JAX_PLATFORMS']} is not here" if last == "AssertionError" and _blamed(said) else last
    )


def _remedy(said: str, late: bool) -> str:
    """What to do where JAX does not start."""
    if re.search(r"already in use|libtpu.*lockfile|accel\d.*(busy|in use)", said, re.IGNORECASE) or (
        late and _tpus()
    ):
        held = holders(_tpus())
        whom = f" (process {', '.join(map(str, held))})" if held else ""
        return f"Another process has the TPU{whom}: end it, or set JAX_PLATFORMS=cpu."
    if re.search(r"driver version is insufficient|CUDA_ERROR|cuInit|no CUDA-capable", said):
        return (
            "The NVIDIA driver does not fit: CUDA 12 needs 525 or newer (nvidia-smi). Or JAX_PLATFORMS=cpu."
        )
    if blamed := _blamed(said):
        return {
            "XLA_FLAGS": "XLA_FLAGS holds a flag that this release does not have: correct or unset it.",
            "JAX_PLATFORMS": "JAX_PLATFORMS names a device that is not here: unset it, or set it to cpu.",
        }[blamed]
    return "Try: python -c 'import jax; print(jax.devices())'; JAX_PLATFORMS=cpu leaves accelerators out."


def accelerators() -> Iterator[Check]:
    """GPUs by their driver, and their plugin; TPUs by their files."""
    for gpu in _gpus():
        driver = re.search(r"(\d+)\.[\d.]+", gpu)
        if driver and int(driver[1]) < 525:
            yield Check(
                "gpu", "problem", f"{gpu}: the driver is too old for CUDA 12", "Install driver 525 or newer."
            )
        else:
            yield Check("gpu", "ok", gpu)
    for plugin in ("jax-cuda12-plugin", "jax-cuda13-plugin"):
        version, jaxlib = versions.installed(plugin), versions.installed("jaxlib")
        if version and version.split("+")[0] != jaxlib.split("+")[0]:
            fix = f'{sys.executable} -m pip install "{plugin}=={jaxlib}"'
            yield Check(plugin, "problem", f"{version}, and jaxlib is {jaxlib}", fix)
    files = _tpus()
    held = [process for process in holders(files) if process != os.getpid()]
    if held:
        fix = "End it, or run beside it on the CPU: JAX_PLATFORMS=cpu."
        yield Check("tpu", "problem", f"process {', '.join(map(str, held))} is using it", fix)
    elif files:
        yield Check("tpu", "ok", ", ".join(files))


def _gpus() -> list[str]:
    """`NAME, driver, memory` of each NVIDIA GPU."""
    if not shutil.which("nvidia-smi"):
        return []
    ask = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(ask, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if not done.returncode else []


def _tpus() -> list[str]:
    return sorted(str(path) for path in Path("/dev").glob("accel[0-9]*"))


def holders(files: list[str]) -> list[int]:
    """Processes that have one of the files open, as far as this user may see it."""
    found = set()
    for place in Path("/proc").glob("[0-9]*/fd/*") if files else ():
        try:
            if os.readlink(place) in files:
                found.add(int(place.parts[2]))
        except OSError:
            continue
    return sorted(found)


# --- room --------------------------------------------------------------------------------------------------


def memory() -> Check:
    """Main memory that is free, a container's limit included."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        told = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.split()[1:]}
    except (OSError, ValueError):
        return Check("memory", "ok", "unknown on this system")
    free, total = told.get("MemAvailable", 0), told.get("MemTotal", 0)
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        free, total = min(free, limit - used), min(total, limit)
    except (OSError, ValueError):
        pass
    words = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB are free"
    if free < MEMORY:
        return Check("memory", "note", words, "End other programs; fedjax-sim plan says what a run needs.")
    return Check("memory", "ok", words)


def disk(folder: str | Path = ".") -> Check:
    """Room in the working directory, where runs are written."""
    free = shutil.disk_usage(folder).free
    words = f"{free / 2**30:.1f} GiB are free in {Path(folder).resolve()}"
    if free < DISK:
        return Check("disk", "problem", words, "Make room, or name another place: --output.dir.")
    return Check("disk", "ok", words)


# --- caches and data ---------------------------------------------------------------------------------------


def programs() -> Check:
    """The folder of compiled programs."""
    folder = paths.kept("FEDJAX_SIM_PROGRAMS", "programs")
    own = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if own:
        folder = Path(own).expanduser()
    if folder is None:
        return Check(
            "programs", "note", "FEDJAX_SIM_PROGRAMS is empty: nothing is kept", "Unset it to keep them."
        )
    why = unwritable(folder)
    if why:
        fix = "Every start compiles anew until it can. Name another folder: FEDJAX_SIM_PROGRAMS"
        return Check("programs", "problem", f"{folder} cannot be written: {why}", fix)
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
    return Check("programs", "ok", f"{len(sizes)} compiled, {sum(sizes) / 2**20:.0f} MiB in {folder}")


def calibration() -> Check:
    """The file of what `fedjax-sim tune-machine` measured."""
    file = paths.kept("FEDJAX_SIM_CALIBRATION", "calibration.json")
    if file is None:
        return Check(
            "calibration", "note", "FEDJAX_SIM_CALIBRATION is empty: none is used", "Unset it to use it."
        )
    if not file.exists():
        why = unwritable(file.parent)
        if why:
            fix = "Name another file: FEDJAX_SIM_CALIBRATION"
            return Check("calibration", "problem", f"{file} cannot be written: {why}", fix)
        return Check("calibration", "ok", "nothing is measured; fedjax-sim tune-machine does so, in a minute")
    try:
        entries = json.loads(file.read_text())["entries"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        fix = "It is ignored. Remove it: fedjax-sim tune-machine --forget"
        return Check("calibration", "problem", f"{file} cannot be read: {type(error).__name__}", fix)
    return Check("calibration", "ok", f"{len(entries)} measured layouts in {file}")


def unwritable(folder: Path) -> str:
    """Why nothing can be written to a folder, which need not be there yet; "" if it can."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def data(told: dict[str, Any]) -> Check:
    """The folder of data sets, and which presets are there. `told`: see `probe`."""
    if "package" in told:
        return Check("data", "problem", f"fedjax_sim cannot be imported: {told['package']}", "See above.")
    if "data" not in told:
        return Check("data", "note", "not looked at, as JAX was not started", "See above.")
    folder, found = told["data"]
    named = "FEDJAX_SIM_DATA" if os.environ.get("FEDJAX_SIM_DATA") else "the default"
    if not Path(folder).is_dir():
        fix = (
            "digits and the small tables need no files. For others: fedjax-sim list, and the page "
            "'Data, partitions and cohorts' of the documentation."
        )
        state = "problem" if os.environ.get("FEDJAX_SIM_DATA") else "ok"
        return Check("data", state, f"{folder} ({named}) is no folder", fix)
    return Check("data", "ok", f"{', '.join(found) or 'no presets'} in {folder} ({named})")


# --- the rest ----------------------------------------------------------------------------------------------


def extras() -> Iterator[Check]:
    """Packages that only some commands need."""
    there, absent = [], []
    for name, (use, install) in EXTRAS.items():
        version = versions.installed(install) or versions.installed(name)
        (there if version else absent).append(f"{name} {version}" if version else f"{install} ({use})")
    if there:
        yield Check("extras", "ok", ", ".join(there))
    if absent:
        fix = f"If you need one: {sys.executable} -m pip install NAME"
        yield Check("not installed", "ok", ", ".join(absent), fix)


def variables(said: str = "") -> Iterator[Check]:
    """Variables of the environment that change speed or numbers.

    Args:
      said: by JAX, where it does not start; "" where it does.
    """
    blamed = _blamed(said)
    for name, meaning in VARIABLES.items():
        given = os.environ.get(name)
        if given is None:
            continue
        if name == blamed:
            yield Check(name, "note", f"{given}: JAX does not start with it", "See devices.")
            continue
        costly = name in _COSTLY and given.lower() not in ("", "0", "false")
        fix = f"unset {name}, unless you mean it" if costly else ""
        yield Check(name, "note" if costly else "ok", f"{given}: {meaning}", fix)
    flags = os.environ.get("XLA_FLAGS", "").strip()
    if flags and not flags.startswith("-") and not Path(flags).is_file():
        yield Check("XLA_FLAGS", "problem", f"{flags} is neither flags nor a file", "Correct or unset it.")


def revision() -> Iterator[Check]:
    """The working directory's commit, which runs write down, and whether the clock is behind it."""
    ask = ["git", "log", "-1", "--format=%h %ct"]
    try:
        done = subprocess.run(ask, capture_output=True, text=True, timeout=20)
        short, seconds = done.stdout.split()
        changed = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, timeout=20)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return
    if int(seconds) > time.time() + 60:
        ahead = time.strftime("%Y-%m-%d %H:%M", time.localtime(int(seconds)))
        fix = "Set the clock: dates in records and names of folders go by it."
        yield Check("clock", "problem", f"it is behind the newest commit ({short}, {ahead})", fix)
        return
    if changed.stdout.strip():
        fix = "Runs write down the commit: commit first, for numbers that you want to repeat."
        yield Check("git", "ok", f"{short} with changes that are not committed", fix)
    else:
        yield Check("git", "ok", short)
