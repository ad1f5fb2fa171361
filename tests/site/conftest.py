"""The site, built once for all tests of a session, and what its makers say."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "scripts" / "site"))  # as MkDocs' hooks do


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """(Folder of the site, what `mkdocs build --strict` ended with, what it said). Workers share one."""
    own = tmp_path_factory.getbasetemp()
    home = (own.parent if os.environ.get("PYTEST_XDIST_WORKER") else own) / "site"
    home.mkdir(exist_ok=True)
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (home / "said").exists():
            command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(home / "html")]
            # One device is enough to read docstrings, and compiles nothing.
            environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "JAX_NUM_CPU_DEVICES": "1"}
            environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            (home / "code").write_text(str(done.returncode))
            (home / "said").write_text(done.stdout)
    return home / "html", int((home / "code").read_text()), (home / "said").read_text()


@pytest.fixture(scope="session")
def site(built):
    """Folder of the site."""
    folder, code, said = built
    assert code == 0, said
    return folder
