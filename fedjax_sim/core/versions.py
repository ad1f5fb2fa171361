"""Which releases of JAX this package refuses to run on, and why."""

import importlib.metadata
import platform
import re
import sys
from collections.abc import Mapping
from types import MappingProxyType

REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "0.10.2": (
            "it computes wrong numbers on CPU without a word (a jitted vmap and reduce gives 1,065,369,600 "
            "where 1,073,741,824 is right: jax-ml/jax#39103) and dies on others (jax-ml/jax#39257)"
        ),
        "0.11.0": (
            "on CPU it kills the process, or hangs, on a broadcast, multiply and reduce of arrays of rank 7 "
            "and more (jax-ml/jax#39257)"
        ),
    }
)
"""Release of jax or jaxlib -> its fault. FOUND in JAX's issue tracker, and seen again by us on a CPU."""


PACKAGES = ("fedjax-sim", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
"""Those that a run's numbers depend on."""


def described() -> dict[str, str | None]:
    """Versions of Python and of `PACKAGES`; None for one that is not installed."""
    return {"python": platform.python_version(), **{name: installed(name) or None for name in PACKAGES}}


def check_versions(jax: str | None = None, jaxlib: str | None = None) -> None:
    """Refuses to go on with a JAX that is known to break results. Imports nothing of JAX.

    Development and release-candidate builds of a refused release are refused as well, since nobody says on
    which side of the fault they were built; a `.post` release mends its parent and passes.

    Args:
      jax: version of jax; None asks for the installed one. One that is not installed passes: importing
        it says so better than we could.
      jaxlib: version of jaxlib, likewise.

    Raises:
      ImportError: names the package, its version, what is wrong with it and the command that mends it.
    """
    for name, version in (("jax", jax), ("jaxlib", jaxlib)):
        version = installed(name) if version is None else version
        reason = REFUSED.get(_release(version))
        if reason is not None:
            raise ImportError(
                f"fedjax_sim does not run on {name} {version}: {reason}. Install another release with\n"
                f"    {remedy()}\n"
                "(on an accelerator name its extra too: jax[cuda12] or jax[tpu] in place of jax)",
                name=name,
            )


def remedy() -> str:
    """The shell command that installs a release of jax and jaxlib which `check_versions` lets through."""
    excluded = "".join(f",!={version}" for version in REFUSED)
    return f'{sys.executable} -m pip install --upgrade "jax>=0.10.1{excluded}" "jaxlib>=0.10.1{excluded}"'


def installed(name: str) -> str:
    """The version of a package; empty if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _release(version: str) -> str:
    """`0.10.2` of `0.10.2`, `0.10.2+cuda`, `0.10.2.dev20260601`, `0.10.2rc1`; the whole of anything else."""
    match = re.match(r"(\d+\.\d+\.\d+)(?!\d)(?!\.\d)(?!\.?post)", version)
    return match.group(1) if match else version
