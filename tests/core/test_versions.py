import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim.core import versions

ROOT = Path(__file__).resolve().parents[2]
GOOD = "0.10.1"


@pytest.mark.parametrize("bad", ["0.10.2", "0.11.0", "0.10.2+cuda12", "0.10.2.dev20260601", "0.11.0rc1"])
@pytest.mark.parametrize("package", ["jax", "jaxlib"])
def test_refuses_a_known_bad_release_of_either_package(package, bad):
    installed = {"jax": GOOD, "jaxlib": GOOD, package: bad}
    with pytest.raises(ImportError) as caught:
        versions.check_versions(**installed)
    message = str(caught.value)
    assert f"{package} {bad}" in message
    assert "jax-ml/jax#39" in message
    assert versions.remedy() in message
    assert caught.value.name == package


@pytest.mark.parametrize(
    "good", ["0.10.1", "0.10.20", "0.10.3", "0.11.1", "0.12.0", "0.12.0.1", "0.10.2.post1", "1.0"]
)
def test_lets_other_releases_through(good):
    versions.check_versions(good, good)


@pytest.mark.smoke
def test_the_running_release_passes():
    versions.check_versions()


def test_asks_for_the_installed_release_when_none_is_given(monkeypatch):
    monkeypatch.setattr(versions.importlib.metadata, "version", {"jax": GOOD, "jaxlib": "0.10.2"}.__getitem__)
    with pytest.raises(ImportError, match=r"jaxlib 0\.10\.2"):
        versions.check_versions()


def test_a_package_that_is_not_installed_is_left_to_its_own_import_error(monkeypatch):
    def missing(name):
        raise versions.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(versions.importlib.metadata, "version", missing)
    versions.check_versions()


def test_the_check_imports_nothing_of_jax():
    # Loaded by itself: the package's __init__ goes on to import JAX once the check has passed.
    code = (
        "import runpy, sys; runpy.run_path(sys.argv[1])['check_versions']();"
        "assert not {'jax', 'jaxlib'} & set(sys.modules), 'the check must come before JAX'"
    )
    subprocess.run([sys.executable, "-c", code, versions.__file__], check=True)


def test_pyproject_excludes_what_the_check_refuses():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    requirements = [*project["dependencies"], *extras["cuda"], *extras["tpu"]]
    of_jax = [line for line in requirements if re.match(r"jax(lib)?\b", line)]
    assert len(of_jax) == 4
    for line in of_jax:
        assert set(re.findall(r"!=([\d.]+)", line)) == set(versions.REFUSED)
        assert line.split(">=")[1].split(",")[0] in versions.remedy()


@pytest.mark.smoke
@pytest.mark.parametrize("rows", [32_767, 32_768, 32_769, 65_537])
def test_jitted_vmap_and_reduce_is_right(rows):
    # jax-ml/jax#39103. jaxlib 0.10.2 on CPU gives 1,065,369,600 for the last of 32,769 rows: 2**30 is right.
    ramp = np.arange(rows, dtype=np.float32)
    points = jnp.asarray(np.stack([ramp, 0 * ramp, 0 * ramp], axis=1))

    @jax.jit
    def squared_lengths(points, matrix):
        return jax.vmap(lambda point: jnp.sum((matrix @ point) ** 2))(points)

    lengths = np.asarray(squared_lengths(points, jnp.eye(3, dtype=jnp.float32)))
    expected = np.arange(rows, dtype=np.float64) ** 2
    if rows > 32_768:
        assert lengths[32_768] == 1_073_741_824
    np.testing.assert_allclose(lengths, expected, rtol=2**-23)


CRASH = """
import jax, jax.numpy as jnp
weights = jnp.full((10, 4, 6), 0.5, jnp.float32)
table = jnp.ones((10, 4, 6, 9, 9, 9, 9, 9), jnp.float32)
@jax.jit
def f(weights, table):
    mixed = jnp.sum(weights[..., None, None, None, None, None] * table, axis=2)
    return jnp.log(jnp.maximum(mixed, jnp.float32(1e-16)))
print(f(weights, table).max(), f(weights, table).min())
"""


@pytest.mark.smoke
def test_high_rank_broadcast_multiply_reduce_survives():
    # jax-ml/jax#39257: jaxlib 0.10.2 and 0.11.0 die or hang here on some CPUs, hence a process of its own.
    run = subprocess.run(
        [sys.executable, "-c", CRASH],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    np.testing.assert_allclose([float(value) for value in run.stdout.split()], np.log(3.0), rtol=1e-6)
