"""The site in a real browser: what works by script, and how pages fit on a telephone."""

import functools
import http.server
import json
import re
import threading

import pytest

from tests import browsers

pytestmark = browsers.needed
PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
WAIT = 30_000
"""Milliseconds; the index of the search takes some to load where other work is done."""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address(site):
    """Of a server of the site on this machine."""
    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def browser():
    with browsers.started() as started:
        yield started


@pytest.fixture
def open_page(browser, address):
    """Gives a page; at the end nothing may have been asked of another host, nor said on the console."""
    contexts, faults = [], []

    def watch(request):
        if not request.url.startswith((address, "data:", "blob:")):
            faults.append(f"asked for {request.url}")

    def make(size=DESK, scheme="light"):
        context = browser.new_context(viewport=size, color_scheme=scheme)
        context.grant_permissions(["clipboard-read", "clipboard-write"], origin=address)
        context.set_default_timeout(WAIT)
        contexts.append(context)
        page = context.new_page()
        page.on("request", watch)
        page.on(
            "console",
            lambda said: faults.append(f"{page.url}: {said.text}") if said.type == "error" else None,
        )
        page.on("pageerror", lambda error: faults.append(f"{page.url}: {error}"))
        page.on(
            "response", lambda got: faults.append(f"{got.status}: {got.url}") if got.status >= 400 else None
        )
        return page

    yield make
    for context in contexts:
        context.close()
    assert not faults


def names(site):
    return sorted(str(path.relative_to(site)) for path in site.rglob("*.html") if path.name != "404.html")


def test_tabs_lead_through_the_site(open_page, address):
    page = open_page()
    page.goto(f"{address}/index.html")
    tabs = page.locator(".md-tabs__link")
    titles = [title.strip() for title in tabs.all_inner_texts()]
    assert "Reference" in titles
    for title in titles:
        page.locator(".md-tabs__link", has_text=re.compile(rf"^\s*{re.escape(title)}\s*$")).click()
        page.wait_for_load_state()
        assert page.locator("h1").first.is_visible()
        assert page.locator(".md-tabs__item--active").inner_text().strip() == title


@pytest.mark.parametrize("words", ["local.clip_norm", "clip_norm"])
def test_search_finds_the_page_of_a_field(open_page, address, words):
    page = open_page()
    page.goto(f"{address}/index.html")
    page.locator("input.md-search__input").click()
    page.locator("input.md-search__input").fill(words)
    page.wait_for_function(
        "document.querySelector('.md-search-result__item a')?.href.includes('configuration.html')"
    )
    page.locator(".md-search-result__item a[href*='local.clip_norm']").first.click()
    page.wait_for_url("**/reference/configuration.html*")
    assert page.locator("[id='local.clip_norm']").is_visible()


def test_a_code_block_is_copied(open_page, address):
    page = open_page()
    page.goto(f"{address}/reference/metrics.html")
    block = page.locator("div.highlight").filter(has=page.locator("code")).first
    block.hover()
    block.locator(
        "button[data-clipboard-target], button.md-clipboard, .md-code__button[data-md-type=copy]"
    ).first.click()
    page.wait_for_function("navigator.clipboard.readText().then(text => text.length > 0)")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied.strip() == block.locator("code").inner_text().strip()


def test_the_palette_switches(open_page, address):
    page = open_page(scheme="dark")
    page.goto(f"{address}/index.html")
    assert page.locator("body").get_attribute("data-md-color-scheme") == "slate"
    page.locator("label.md-header__button[for^=__palette]:visible").first.click()
    assert page.locator("body").get_attribute("data-md-color-scheme") == "default"


PICTURES = """async () => {
    const pictures = [...document.images];
    pictures.forEach(one => one.loading = 'eager');
    await Promise.all(pictures.map(one => one.decode().catch(() => null)));
    return pictures.filter(one => !one.naturalWidth).map(one => one.src);
}"""
WIDE = """() => {
    const edge = document.documentElement.clientWidth;
    if (document.documentElement.scrollWidth <= edge) return [];
    return [...document.querySelectorAll('article *')]
        .filter(one => one.getBoundingClientRect().right > edge + 1)
        .slice(0, 5).map(one => one.outerHTML.slice(0, 200));
}"""


def test_every_page_fits_and_has_its_pictures(open_page, address, site):
    page = open_page(PHONE)
    # Each page would make the index of the whole site, of which nothing is wanted here.
    index = json.loads((site / "search" / "search_index.json").read_text()) | {"docs": []}
    page.route("**/search_index.json", lambda route: route.fulfill(json=index))
    lost, wide = {}, {}
    for name in names(site):
        page.set_viewport_size(PHONE)
        page.goto(f"{address}/{name}", wait_until="load")
        if missing := page.evaluate(PICTURES):
            lost[name] = missing
        for size in (PHONE, DESK):
            page.set_viewport_size(size)
            if out := page.evaluate(WIDE):
                wide[name, size["width"]] = out
    assert not lost
    assert not wide


def test_a_phone_has_the_navigation_in_a_drawer(open_page, address):
    page = open_page(PHONE)
    page.goto(f"{address}/reference/configuration.html")
    assert not page.locator(".md-sidebar--primary nav").first.is_visible() or (
        page.locator(".md-sidebar--primary").bounding_box()["x"] < 0
    )
    page.locator("label.md-header__button[for=__drawer]").click()
    page.wait_for_function("document.querySelector('.md-sidebar--primary').getBoundingClientRect().x >= 0")
