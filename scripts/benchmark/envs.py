"""One virtual environment for each peer, with the versions that work together.

    python scripts/benchmark/envs.py flwr    # prints what goes into the environment of a peer

The pins are direct requirements only; every result records what was really installed. PyTorch goes in by
itself, first and with an exact version, through pip: so it is the build that pip's own configuration
offers for that version (set PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL to where the CPU build lies, or the
CUDA libraries of several GB come along), and later steps cannot replace it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

_TORCH = ("torch==2.13.0", "numpy==2.4.6")

ENVIRONMENTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "torch": (_TORCH,),
    # pfl 0.6.0 is for Python 3.10 to 3.12.
    "pfl": (_TORCH, (*_TORCH, "pfl==0.6.0")),
    "flwr": (_TORCH, (*_TORCH, "flwr[simulation]==1.41.0", "ray==2.55.1")),
    # A newer jax has no jax.tree_map and the like, and fedjax 0.0.17 fails on it.
    "fedjax": (
        (
            "jax==0.5.3",
            "jaxlib==0.5.3",
            "fedjax==0.0.17",
            "dm-haiku==0.0.14",
            "optax==0.2.4",
            "chex==0.1.89",
            "numpy==2.4.6",
        ),
    ),
}
"""By peer, what to install, one tuple for each call of pip."""


class EnvironmentFailed(RuntimeError):
    """An environment could not be made; the message ends with the last lines of the tool's output."""


def fingerprint(peer: str) -> str:
    """Changes when a peer's pins or the Python version do."""
    facts = json.dumps([ENVIRONMENTS[peer], sys.version_info[:3]])
    return hashlib.sha256(facts.encode()).hexdigest()


def interpreter(peer: str, directory: Path) -> Path:
    """Where the Python of a peer's environment is, or will be."""
    return directory / peer / "bin" / "python"


def is_ready(peer: str, directory: Path) -> bool:
    """Whether the environment was completed with today's pins."""
    mark = directory / peer / "fingerprint"
    return mark.exists() and mark.read_text() == fingerprint(peer)


def ensure(peer: str, directory: Path) -> Path:
    """Makes a peer's environment if need be.

    Args:
      peer: key of `ENVIRONMENTS`.
      directory: holds one folder for each peer.

    Returns:
      its interpreter.

    Raises:
      EnvironmentFailed: pip or venv failed. The half-made folder stays until the next try.
    """
    python = interpreter(peer, directory)
    if is_ready(peer, directory):
        return python
    home = directory / peer
    if home.exists():
        shutil.rmtree(home)
    home.parent.mkdir(parents=True, exist_ok=True)
    _call(peer, [sys.executable, "-m", "venv", str(home)])
    for requirements in ENVIRONMENTS[peer]:
        _call(peer, [str(python), "-m", "pip", "install", "--disable-pip-version-check", *requirements])
    (home / "fingerprint").write_text(fingerprint(peer))
    return python


def _call(peer: str, command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-15:])
        raise EnvironmentFailed(f"environment {peer!r}: `{' '.join(command)}` failed:\n{tail}")


if __name__ == "__main__":
    for name in sys.argv[1:] or ENVIRONMENTS:
        print(*dict.fromkeys(pin for several in ENVIRONMENTS[name] for pin in several))
