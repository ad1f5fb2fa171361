"""The drawn figures of the site are what their script draws, and small."""

import importlib.util
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def figures():
    spec = importlib.util.spec_from_file_location("figures", ROOT / "scripts" / "site" / "figures.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["round.svg", "waves.svg"])
def test_a_figure_is_what_is_drawn(figures, name):
    drawn = figures.FIGURES[name]()
    assert (figures.ASSETS / name).read_text(encoding="utf-8") == drawn, "run scripts/site/figures.py"
    assert ElementTree.fromstring(drawn).tag.endswith("svg") and len(drawn) < 150_000


def test_sorted_clients_wait_less(figures):
    """The two numbers under the figure of waves, computed another way."""
    drawn, steps = figures.waves(), sorted(figures.STEPS.tolist(), reverse=True)
    waves = sum(3 * max(steps[start : start + 3]) for start in range(0, 12, 3)) / sum(steps)
    assert f"waves of three {waves:.2f}" in drawn
    assert f"{waves:.2f}" == "1.15" and "one wave of six 1.79" in drawn
