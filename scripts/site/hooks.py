"""What MkDocs calls while it builds the site: pages made from code, and links that leave `docs/`.

A page that `PAGES` names has no file: its text is what its function returns. Links from a page to a file of
the repository that is no page (`../experiments/demo.yaml`) become links to the repository's address, which
pyproject.toml names; a link to nothing is a warning, and so ends the build.
"""

from __future__ import annotations

import functools
import logging
import posixpath
import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

sys.path.insert(0, str(Path(__file__).parent))  # MkDocs loads this file by its path

import commands_page
import configuration_page
import generated
import methods_page
import python_page

ROOT = Path(__file__).resolve().parents[2]
COPIED = {"about/changelog.md": "CHANGELOG.md", "about/contributing.md": "CONTRIBUTING.md"}
"""Pages that are files of the repository as they are; their links are seen from there."""
PAGES: dict[str, Callable[[], str]] = {
    **{page: functools.partial(generated.of_file, name) for page, name in COPIED.items()},
    "reference/methods.md": methods_page.page,
    "reference/configuration.md": configuration_page.page,
    "reference/commands.md": commands_page.page,
    "reference/python.md": python_page.overview,
    **{
        f"reference/python/{name}.md": functools.partial(python_page.page, name) for name in python_page.PAGES
    },
}
SOURCES = {
    **{name: page for page, name in COPIED.items()},
    "README.md": "index.md",
    "fedjax_sim/algorithms/ALGORITHMS.md": "reference/methods.md",
}
"""Files of the repository -> the pages of the site that have what is in them."""

LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\])\(([^)\s]+)\)")
PICTURES = "pictures"
"""Folder of the site for pictures that lie outside `docs/`."""

log = logging.getLogger("mkdocs.hooks.fedjax_sim")


def repository() -> str:
    """The address of the repository."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]


def on_config(config: Any) -> Any:
    """The repository's address stands in pyproject.toml alone."""
    config.repo_url = repository()
    config.repo_name = "/".join(repository().split("/")[-2:])
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that are made, and pictures of the repository that pages show from outside `docs/`."""
    for name, text in PAGES.items():
        files.append(File.generated(config, name, content=text()))
    shown = {
        place
        for file in files.documentation_pages()
        for mark, target in LINK.findall(file.content_string)
        if mark.startswith("!") and (place := _outside(target, _origin(file.src_uri)))
    }
    for place in sorted(shown):
        files.append(File.generated(config, f"{PICTURES}/{place}", abs_src_path=str(ROOT / place)))
    return files


def _origin(name: str) -> str:
    """The file that a page's links are seen from."""
    return COPIED.get(name, f"docs/{name}")


def _outside(target: str, origin: str) -> str | None:
    """The file of the repository that a link leads to, if that lies outside `docs/`."""
    if "://" in target:
        return None
    place = posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))
    return place if not place.startswith("docs/") and (ROOT / place).is_file() else None


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turns links that leave `docs/` to where they lead; code blocks are left as they are."""
    name = page.file.src_uri
    origin = _origin(name)
    parts = re.split(r"(^```.*?^```[^\S\n]*$)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else _linked(part, name, origin) for part in parts)


def _linked(text: str, name: str, origin: str) -> str:
    def turned(found: re.Match[str]) -> str:
        target, mark, anchor = found.group(2).partition("#")
        if not target or "://" in target or target.startswith("mailto:"):
            return found.group(0)
        place = posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))
        own = SOURCES.get(place) or (place.removeprefix("docs/") if place.startswith("docs/") else None)
        if own is not None:
            target = posixpath.relpath(own, posixpath.dirname(name) or ".")
        elif found.group(1).startswith("!") and (ROOT / place).is_file():
            target = posixpath.relpath(f"{PICTURES}/{place}", posixpath.dirname(name) or ".")
        elif (ROOT / place).exists():
            kind = "tree" if (ROOT / place).is_dir() else "blob"
            target = f"{repository()}/{kind}/main/{place}"
        else:
            log.warning("%s links to %s, which is not there", origin, found.group(2))
        return f"{found.group(1)}({target}{mark}{anchor})"

    return LINK.sub(turned, text)
