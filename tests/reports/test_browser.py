"""The page in a real browser: drawn, zoomed into, on a phone, printed, in the dark, without scripts."""

import pytest

import fedjax_sim as fs
from fedjax_sim.studies import pages, sources
from tests import browsers
from tests.reports import studies

pytestmark = browsers.needed


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The page of a small sweep of two settings that is under way."""
    home = tmp_path_factory.mktemp("browser")
    path, sweep = studies.written(home, grid={"partition.alpha": [0.1, 1.0]})
    for job in sweep.jobs[:-1]:
        studies.record(job)
    studies.record(sweep.jobs[-1], upto=16)
    page = fs.report(path, home / "page.html")
    return page.as_uri()


@pytest.fixture(scope="module")
def browser():
    with browsers.started() as started:
        yield started


@pytest.fixture
def opened(browser, study):
    """`opened(**settings)`: the page in a window of its own; any message of the console fails the test."""
    contexts, told = [], []

    def open_one(address=study, **settings):
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **settings})
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: told.append(message.text))
        page.on("pageerror", lambda error: told.append(str(error)))
        page.on("request", lambda asked: None if asked.url.startswith(OWN) else told.append(asked.url))
        page.goto(address)
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert not told, told


OWN = "file:", "data:"
RANGE = "() => [fedjaxSimChart().scales.x.min, fedjaxSimChart().scales.x.max]"
INK = """() => {
    const canvas = document.querySelector("#chart canvas");
    const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
    const seen = new Set();
    for (let i = 0; i < pixels.length; i += 4)
        if (pixels[i + 3] > 200) seen.add(pixels.slice(i, i + 3).join());
    return seen.size;
}"""


def drag(page, start, end):
    box = page.locator("#chart .u-over").bounding_box()
    y = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + start * box["width"], y)
    page.mouse.down()
    page.mouse.move(box["x"] + end * box["width"], y, steps=4)
    page.mouse.up()


def test_the_curve_is_drawn_and_zooms(opened):
    page = opened()
    assert page.evaluate(INK) > 10
    assert page.evaluate(RANGE) == [2, 30]  # accuracy is of every second round
    assert page.locator("#whole").is_disabled()
    drag(page, 0.25, 0.5)
    low, high = page.evaluate(RANGE)
    assert 8 < low < 10 and 15 < high < 17
    page.locator("#chart .u-over").dblclick()
    assert page.evaluate(RANGE) == [2, 30]
    drag(page, 0.5, 0.75)
    page.locator("#whole").click()
    assert page.evaluate(RANGE) == [2, 30]


def test_the_legend_hides_a_curve_with_its_band_and_tells_values(opened):
    page = opened()
    second = page.locator("#legend button").nth(1)
    assert "FedMR" in second.text_content() and " ± " in second.text_content()
    second.click()
    shown = "() => fedjaxSimChart().series.map((one) => one.show)"
    assert page.evaluate(shown) == [True, True, True, True, False, False, False]
    page.locator("#band").uncheck()
    assert page.evaluate(shown) == [True, True, False, False, False, False, False]
    page.locator("#legend button").nth(1).click()
    page.mouse.move(
        *(lambda box: (box["x"] + 3, box["y"] + 30))(page.locator("#chart .u-over").bounding_box())
    )
    assert page.locator("#at").text_content() == "round 2"


def test_metrics_settings_and_a_log_scale_are_chosen(opened):
    page = opened()
    page.locator("#metric").select_option("train_loss")
    assert page.evaluate(RANGE) == [1, 30]
    page.locator("#log").check()
    assert page.evaluate("() => fedjaxSimChart().scales.y.distr") == 3
    page.locator("#column").select_option("alpha 1.0")
    assert page.evaluate("() => fedjaxSimChart().data.length") == 7 and page.evaluate(INK) > 10


def test_zoom_choices_and_scroll_outlive_a_reload(opened, study, tmp_path):
    page = opened()
    page.locator("#column").select_option("alpha 1.0")
    drag(page, 0.25, 0.5)
    before = page.evaluate(RANGE)
    page.reload()
    assert page.evaluate(RANGE) == before and page.locator("#column").input_value() == "alpha 1.0"


def test_a_phone_shows_it_all_without_moving_sideways(opened):
    page = opened(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 360
    box = page.locator("#chart .u-over").bounding_box()
    assert box["width"] > 230 and page.evaluate(INK) > 10
    touch = page.context.new_cdp_session(page)
    page.evaluate("document.querySelector('#chart').scrollIntoView()")
    box = page.locator("#chart .u-over").bounding_box()
    y = box["y"] + 60

    def send(kind, *points):
        spots = [{"x": box["x"] + share * box["width"], "y": y, "id": n} for n, share in enumerate(points)]
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": spots})

    send("touchStart", 0.2)
    for share in (0.3, 0.4, 0.6):
        send("touchMove", share)
    send("touchEnd")
    low, high = page.evaluate(RANGE)
    assert 6 < low < 9 and 17 < high < 20
    send("touchStart", 0.4, 0.6)  # two fingers
    send("touchMove", 0.3, 0.7)
    send("touchEnd")
    closer = page.evaluate(RANGE)
    assert closer[1] - closer[0] < 0.7 * (high - low)
    for _ in range(2):
        send("touchStart", 0.5)
        send("touchEnd")
    assert page.evaluate(RANGE) == [2, 30]


def test_print_has_the_still_picture_and_no_controls(opened):
    page = opened()
    assert not page.locator(".stands img").is_visible()
    page.emulate_media(media="print")
    assert page.locator(".stands img").is_visible()
    for hidden in ("nav", ".controls", "#chart", "#legend", ".copy"):
        assert not page.locator(hidden).first.is_visible(), hidden
    assert page.pdf().startswith(b"%PDF")


def test_without_scripts_the_still_picture_and_the_tables_are_there(opened):
    page = opened(java_script_enabled=False)
    assert page.locator(".stands img").is_visible() and page.locator("table.grid").first.is_visible()
    assert not page.locator(".controls").is_visible()


CONTRAST = """() => {
    const light = (text) => {
        const [r, g, b] = text.match(/[0-9.]+/g).slice(0, 3).map((c) => c / 255)
            .map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const behind = (one) => {
        for (; one; one = one.parentElement) {
            const colour = getComputedStyle(one).backgroundColor;
            if (!colour.endsWith(", 0)")) return colour;
        }
        return "rgb(255, 255, 255)";
    };
    const wanted = "h1, h2, p, li, td, th, dt, dd, a, button, small, figcaption, summary, code, mark, .state";
    const seen = [...document.querySelectorAll(wanted)].filter((one) => one.offsetParent && !one.disabled);
    return seen.map((one) => {
        const [a, b] = [light(getComputedStyle(one).color), light(behind(one))].sort((x, y) => y - x);
        return [(a + 0.05) / (b + 0.05), one.outerHTML.slice(0, 80)];
    }).sort((x, y) => x[0] - y[0])[0];
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_schemes(opened, scheme):
    page = opened(color_scheme=scheme)
    least, where = page.evaluate(CONTRAST)
    assert least >= 4.5, where  # WCAG 2.1, level AA


def test_a_page_of_a_study_under_way_reads_itself_again(opened, tmp_path):
    _, sweep = studies.written(tmp_path, seeds=[0])
    folder = studies.record(sweep.jobs[0], upto=10)
    out = tmp_path / "page.html"
    text = lambda: pages.html_of(sources.find(folder), out, refresh=1)  # noqa: E731
    out.write_text(text())
    page = opened(out.as_uri())
    page.evaluate("() => scrollTo(0, 250)")
    drag(page, 0.25, 0.75)
    before = page.evaluate(RANGE)
    out.write_text(text().replace("round 10 of 30", "round 11 of 30"))
    page.locator(".state", has_text="round 11 of 30").wait_for(timeout=15_000)
    page.wait_for_function("() => window.fedjaxSimChart")
    assert page.evaluate(RANGE) == before and page.evaluate("() => scrollY") > 100
