"""The site builds without a warning, its links lead somewhere, and it is complete without a network."""

import functools
import inspect
import re
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import pytest

import fedjax_sim as fs

LOADED = {
    "script": "src",
    "img": "src",
    "link": "href",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "audio": "src",
}
"""Tag -> the attribute whose address a browser loads by itself."""
SHOWN = {"canonical", "next", "prev", "alternate", "edit"}
"""Kinds of <link> that are told and not loaded."""


class Page(HTMLParser):
    """Attributes: ids: anchors. links: addresses to click. loaded: what a browser fetches by itself."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.loaded = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = {name: value or "" for name, value in attrs}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if LOADED.get(tag) in given and not (tag == "link" and SHOWN & set(given.get("rel", "").split())):
            self.loaded.append(given[LOADED[tag]])


@functools.cache
def page(path):
    return Page(path.read_text())


def pages(site):
    # The page for a wrong address is shown at any depth, and so begins its links at the root.
    return sorted(path for path in site.rglob("*.html") if path.name != "404.html")


def lost(site, path):
    """The links of a page that lead nowhere."""
    for link in page(path).links:
        address = urlsplit(link)
        if address.scheme or address.netloc:
            continue
        target = (path.parent / unquote(address.path)).resolve() if address.path else path
        if target.is_dir():
            target = target / "index.html"
        anchor = unquote(address.fragment)
        if (
            not target.is_file()
            or not target.is_relative_to(site.resolve())
            or (anchor and target.suffix == ".html" and anchor not in page(target).ids)
        ):
            yield link


def test_it_builds(built):
    folder, code, said = built
    assert code == 0, said
    assert "WARNING" not in said, said
    assert len(pages(folder)) > 10


def test_links_lead_somewhere(site):
    found = {str(path.relative_to(site)): bad for path in pages(site) if (bad := list(lost(site, path)))}
    assert not found


def test_a_lost_link_is_seen(tmp_path):
    (tmp_path / "a.html").write_text('<h1 id="top">A</h1><a href="b.html#x">b</a><a href="#top">t</a>')
    (tmp_path / "b.html").write_text(
        '<a href="a.html#top">a</a><a href="c.html">c</a><a href="https://c.org">c</a>'
    )
    assert list(lost(tmp_path, tmp_path / "a.html")) == ["b.html#x"]
    assert list(lost(tmp_path, tmp_path / "b.html")) == ["c.html"]


def test_nothing_is_fetched_from_elsewhere(site):
    for path in site.rglob("*.html"):
        away = [one for one in page(path).loaded if urlsplit(one).netloc]
        assert not away, path
    for path in site.rglob("*.css"):
        assert not re.findall(r"url\(['\"]?(?:https?:)?//[^)]*|@import[^;]*//[^;]*", path.read_text()), path


def test_pictures_are_there(site):
    for path in pages(site):
        for one in page(path).loaded:
            address = urlsplit(one)
            if address.path and not address.scheme:
                assert (path.parent / unquote(address.path)).is_file(), (path, one)


@pytest.mark.parametrize("name", fs.__all__)
def test_every_public_name_is_documented(site, name):
    import python_page

    home = next(own for own, names in python_page.names().items() if name in names)
    there = page(site / "reference" / "python" / f"{home}.html")
    assert f"fedjax_sim.{name}" in there.ids
    listed = page(site / "reference" / "python.html")
    assert f"python/{home}.html#fedjax_sim.{name}" in listed.links


def test_what_is_in_public_modules_is_documented(site):
    import python_page

    for home, names in python_page.names().items():
        there = page(site / "reference" / "python" / f"{home}.html")
        for name in names:
            module = getattr(fs, name)
            if inspect.ismodule(module) and name != "algorithms":
                shown = {one for listed in python_page.members(module, names) for one in listed}
                told = {one for one in shown if getattr(getattr(module, one), "__doc__", None)}
                told = {
                    one
                    for one in told
                    if not isinstance(getattr(module, one), tuple | dict | str | ModuleType)
                }
                assert not {one for one in told if f"fedjax_sim.{name}.{one}" not in there.ids}


def test_no_page_names_a_machine(site):
    """Nor a folder of one, as of the machine that built it."""
    home = str(Path.cwd())
    for path in site.rglob("*.html"):
        assert home not in path.read_text(), path
