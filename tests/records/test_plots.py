"""What all figures share: captions beside the image, and ticks at what was measured."""

import base64
import re

import numpy as np
import pytest

from fedjax_sim.records import plots


def test_a_caption_stands_beside_the_image_and_is_no_part_of_it():
    figure, axes = plots.new_figure()
    axes[0, 0].plot([1, 2], [0.1, 0.2])
    bare = figure._repr_png_()
    assert figure._repr_html_() is None and plots.caption_of(figure) == ""
    plots.captioned(figure, "Mean of\n  a < b.")
    assert plots.caption_of(figure) == "Mean of a < b." and figure._repr_png_() == bare
    html = figure._repr_html_()
    assert "<figcaption" in html and "Mean of a &lt; b." in html
    assert base64.b64decode(re.search('base64,([^"]+)', html)[1]) == bare


@pytest.mark.parametrize(
    ("rounds", "ticks"),
    [([1, 10, 20, 30], [1, 10, 20, 30]), ([5], [5]), (range(1, 101), None), ([1, 2, 100], None)],
)
def test_ticks_are_where_measurements_are_if_these_are_few(rounds, ticks):
    figure, axes = plots.new_figure()
    axis = axes[0, 0]
    axis.plot(rounds, np.ones(len(rounds)))
    axis.axhline(0)  # runs over the whole panel, and is no measurement
    plots.dress(axis, "accuracy")
    figure.canvas.draw()
    if ticks is None:
        assert len(axis.get_xticks()) < 15 and set(axis.get_xticks()) != set(rounds)
    else:
        assert axis.get_xticks().tolist() == ticks


def test_the_panels_of_a_comparison_have_one_vertical_range():
    rounds = np.arange(1, 4)
    panels = {
        "mild": {"FedAvg": (rounds, np.asarray([[0.8, 0.85, 0.9]]))},
        "skewed": {"FedAvg": (rounds, np.asarray([[0.1, 0.3, 0.4]]))},
        "skewed more": {"FedAvg": (rounds, np.asarray([[np.nan, np.nan, np.nan]]))},
    }
    figure = plots.compared_curves(panels, "accuracy", "digits")
    ranges = {axis.get_ylim() for axis in figure.axes if axis.get_visible()}
    assert len(ranges) == 1
    low, high = ranges.pop()
    assert low <= 0.1 and 0.9 <= high <= 1.1
