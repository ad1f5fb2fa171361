"""The browser that tests of pages use: whichever Chromium is on the path."""

import contextlib
import shutil

import pytest

NAMES = "chromium", "chromium-browser", "google-chrome", "google-chrome-stable"
FOUND = next(filter(None, map(shutil.which, NAMES)), None)
needed = pytest.mark.skipif(FOUND is None, reason=f"needs one of {', '.join(NAMES)} on the path")


@contextlib.contextmanager
def started():
    """The browser, without a window."""
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        # A root user's browser has no sandbox.
        browser = driver.chromium.launch(executable_path=FOUND, args=["--no-sandbox"])
        yield browser
        browser.close()
