"""The profile of a run, from rows made by hand."""

import math

import numpy as np
import pytest

from fedjax_sim.records import Row
from fedjax_sim.reports.inertia import profile

LAYERS = ("conv1", "conv2", "conv3", "fc")


def rows_of(values, metric="inertia_step"):
    """Round -> values in the order of LAYERS."""
    return [
        Row(number, metric, value, layer=layer)
        for number, of_round in values.items()
        for layer, value in zip(LAYERS, of_round, strict=True)
    ]


# Rounds 1 to 3 would say that conv3 moves least.
STEPS = {
    1: (9.0, 8.0, 1e-6, 7.0),
    3: (9.0, 8.0, 1e-6, 7.0),
    4: (0.4, 0.02, 0.3, 0.1),
    5: (0.1, 0.08, 0.3, 0.4),
    6: (0.4, 0.01, 0.3, 0.4),
}


def test_geometric_means_over_the_rounds_that_count():
    found = profile(rows_of(STEPS), LAYERS)
    assert found is not None and found.layers == LAYERS
    wanted = [
        (0.4 * 0.1 * 0.4) ** (1 / 3),
        (0.02 * 0.08 * 0.01) ** (1 / 3),
        0.3,
        (0.1 * 0.4 * 0.4) ** (1 / 3),
    ]
    np.testing.assert_allclose(found.values, wanted)
    ends = math.sqrt(wanted[0] * wanted[3])
    assert found.ends == pytest.approx(ends)
    assert found.least == "conv2"
    assert found.inertia == pytest.approx(1 - wanted[1] / ends)


def test_first_and_last_round_may_be_chosen():
    found = profile(rows_of(STEPS), LAYERS, start=5, stop=5)
    assert found is not None
    np.testing.assert_allclose(found.values, STEPS[5])
    assert found.least == "conv2" and found.ends == pytest.approx(0.2)
    assert found.inertia == pytest.approx(0.6)
    whole = profile(rows_of(STEPS), LAYERS, start=1, stop=3)
    assert whole is not None and whole.least == "conv3" and whole.inertia == pytest.approx(1, abs=1e-6)


def test_ends_are_never_the_least_and_inertia_may_be_negative():
    found = profile(rows_of({4: (0.01, 0.4, 0.2, 0.04)}), LAYERS)
    assert found is not None and found.least == "conv3" and found.inertia == pytest.approx(1 - 0.2 / 0.02)
    even = profile(rows_of({4: (0.2, 0.2, 0.2, 0.2)}), LAYERS)
    assert even is not None and even.inertia == pytest.approx(0)


def test_other_metrics_layers_and_rows_do_not_matter():
    wanted = profile(rows_of(STEPS), LAYERS)
    noise = [
        *rows_of({4: (5.0, 5.0, 5.0, 5.0)}, "inertia_l2"),
        Row(4, "inertia_step", 5.0, layer="elsewhere"),
        Row(4, "inertia_step", 5.0),
        Row(5, "undefined/inertia_step", 1.0, layer="conv2"),
        Row(6, "inertia_step", 0.0, layer="conv2"),
    ]
    found = profile(noise + rows_of(STEPS)[::-1], LAYERS)
    assert found is not None and wanted is not None
    np.testing.assert_allclose(found.values, wanted.values)
    assert found.least == wanted.least and found.inertia == pytest.approx(wanted.inertia)
    other = profile(noise, LAYERS, metric="inertia_l2")
    assert other is not None and other.values.tolist() == pytest.approx([5.0] * 4)


def test_there_is_none_of_too_few_layers():
    rows = rows_of(STEPS)
    assert profile(rows, LAYERS[:2]) is None
    found = profile(rows, LAYERS[:3])
    assert found is not None and found.least == "conv2"


@pytest.mark.parametrize("start", [7, 100])
def test_there_is_none_of_no_rounds(start):
    assert profile(rows_of(STEPS), LAYERS, start=start) is None


def test_there_is_none_where_a_layer_never_moves_or_is_not_there():
    still = {number: (a, 0.0, c, d) for number, (a, _, c, d) in STEPS.items()}
    assert profile(rows_of(still), LAYERS) is None
    assert profile(rows_of(STEPS), (*LAYERS, "fc2")) is None
