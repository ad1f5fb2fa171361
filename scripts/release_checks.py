"""What scripts/release.sh asks of a release, one part a call; tests/test_packaging.py asks some of it too.

release_checks.py versions [--final]    the version's places agree; --final: it is ready to be published
release_checks.py contents              dist/ holds what git tracks, and nothing else
release_checks.py tools                 the requirements of tests beside the package's own, one a line
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOP = re.compile(r"^## (\d+\.\d+\.\d+) \((unreleased|\d{4}-\d{2}-\d{2})\)$", re.M)
"""A release's heading in CHANGELOG."""
TOOLS = (
    "pytest",
    "pytest-xdist",
    "hypothesis",
    "beartype",
    "pandas",
    "safetensors",
    "optuna",
    "nbclient",
    "ipykernel",
    "hatchling",
    "hatch-fancy-pypi-readme",
)
"""Of the extra `dev`: what tests import beside the package and its dependencies."""


def version(root: Path) -> str:
    """The version that the package says."""
    return re.findall(r'^__version__ = "(.+)"$', (root / "fedjax_sim/__init__.py").read_text(), re.M)[0]


def disagreements(root: Path) -> list[str]:
    """Where another version, or another address of the repository, is written than the package's."""
    here, out = version(root), []
    address = tomllib.loads((root / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    heading = TOP.search((root / "CHANGELOG.md").read_text())
    places = {
        "CHANGELOG.md's first release": heading[1] if heading else "none",
        "version in CITATION.cff": _field(root / "CITATION.cff", r"^version: (.+)$"),
        "version in scripts/conda/recipe.yaml": _field(
            root / "scripts/conda/recipe.yaml", r'^  version: "(.+)"$'
        ),
    }
    out += [
        f"{place} is {found}, and the package's version {here}"
        for place, found in places.items()
        if found != here
    ]
    for name, pattern in (
        ("CITATION.cff", r'^repository-code: "(.+)"$'),
        ("scripts/conda/recipe.yaml", r"^  repository: (.+)$"),
    ):
        found = _field(root / name, pattern)
        if found != address:
            out.append(f"the repository in {name} is {found}, and in pyproject.toml {address}")
    return out


def unready(root: Path) -> list[str]:
    """What keeps the present commit from being published: no date, no tag, or uncommitted changes."""
    heading = TOP.search((root / "CHANGELOG.md").read_text())
    tag, out = f"v{version(root)}", []
    if heading and heading[2] == "unreleased":
        out.append(f"CHANGELOG.md has no date at {heading[1]}")
    if tag not in _git(root, "tag", "--points-at", "HEAD").split():
        out.append(f"HEAD has no tag {tag}")
    if changed := _git(root, "status", "--porcelain").strip():
        out.append(f"there are changes that are not committed:\n{changed}")
    return out


def tracked(root: Path) -> set[str]:
    """Every file of the repository that is not ignored, by its path from the root."""
    names = set(_git(root, "ls-files", "--cached", "--others", "--exclude-standard", "-z").split("\0")) - {""}
    return {name for name in names if (root / name).is_file() and not (root / name).is_symlink()}


def of_sdist(path: Path, files: set[str]) -> list[str]:
    """How a source distribution differs from `files`."""
    with tarfile.open(path) as sdist:
        names = {member.name.split("/", 1)[1] for member in sdist.getmembers() if member.isfile()}
    return _differences(path.name, names - {"PKG-INFO"}, files)


def of_wheel(path: Path, files: set[str]) -> list[str]:
    """How a wheel differs from the package's part of `files`."""
    with zipfile.ZipFile(path) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    return _differences(path.name, names, {name for name in files if name.startswith("fedjax_sim/")})


def tools(root: Path) -> list[str]:
    """The requirement of each of `TOOLS`."""
    lines = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]["dev"]
    named = {re.split(r"[><=\[; ]", line, maxsplit=1)[0]: line for line in lines}
    return [named[name] for name in TOOLS]


def _field(path: Path, pattern: str) -> str:
    found = re.search(pattern, path.read_text(), re.M)
    return found[1] if found else "not there"


def _git(root: Path, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=root, check=True, capture_output=True, text=True).stdout


def _differences(name: str, found: set[str], wanted: set[str]) -> list[str]:
    lacks = [f"{name} lacks {one}" for one in sorted(wanted - found)]
    return lacks + [f"{name} holds {one}, which git does not track" for one in sorted(found - wanted)]


def main(words: list[str]) -> int:
    """Prints what is wrong, a line each; 1 if there is anything."""
    if words == ["tools"]:
        print("\n".join(tools(ROOT)))
        return 0
    if words[:1] == ["versions"]:
        wrong = disagreements(ROOT) + (unready(ROOT) if "--final" in words else [])
    else:
        files = tracked(ROOT)
        (sdist,), (wheel,) = ROOT.glob("dist/*.tar.gz"), ROOT.glob("dist/*.whl")
        wrong = of_sdist(sdist, files) + of_wheel(wheel, files)
        print(*(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB" for path in (sdist, wheel)), sep="\n")
    for line in wrong:
        print(f"release: {line}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
