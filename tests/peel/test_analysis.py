"""From records to a verdict: known numbers through the table, and what is missing said out loud."""

import numpy as np
import pytest

from fedjax_sim.errors import UserError
from fedjax_sim.peel import degradation, layers
from fedjax_sim.records import Row, Table

NAMES = ("conv1", "conv2", "fc1", "fc2")


def table(change, clients=6, number=4, missing=(), metric="log_c"):
    """log_c is 1 before, and 1 + change[layer] + a client's own offset after, from the second layer on."""
    rows = []
    for client in range(clients):
        for depth, name in enumerate(NAMES):
            after = 1.0 + (change[depth - 1] + 0.01 * client if depth else 0.0)
            for state, value in (("before", 1.0), ("after", after)):
                where = dict(layer=name, client=client, state=state)
                if (client, name) in missing:
                    rows.append(Row(number, f"undefined/{metric}", 1.0, **where))
                else:
                    rows.append(Row(number, metric, value, **where))
    return Table(rows)


def test_layers_are_read_in_order_without_the_image():
    got = layers(table([0.1, 0.2, 0.4]), "log_c")
    assert got.names == NAMES[1:] and got.clients.tolist() == list(range(6))
    np.testing.assert_allclose(got.change[2], [0.12, 0.22, 0.42])
    np.testing.assert_allclose(got.relative, got.change)
    assert layers(table([0.1, 0.2, 0.4], metric="pabs"), "pabs").names == NAMES


def test_a_growing_change_is_cumulative_degradation_and_a_shrinking_one_is_not():
    found = degradation(table([0.1, 0.2, 0.4]), table([0.1, 0.25, 0.45]))
    assert found.present and found.rank == 1 and found.measurements == 12
    assert found.slope == pytest.approx((0.325) / (2 / 3), rel=1e-6)
    assert not degradation(table([0.4, 0.2, 0.1])).present


def test_clients_without_a_value_are_nan_and_left_out_of_the_verdict():
    records = table([0.1, 0.2, 0.4], missing={(3, "fc1")})
    assert np.isnan(layers(records, "log_c").change[3]).tolist() == [False, True, False]
    assert degradation(records).measurements == 5


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda: layers(Table(), "log_c"), r"--peel\.every"),
        (lambda: layers(table([1, 2, 3]), "cdnv"), "It has log_c"),
        (lambda: layers(table([1, 2, 3]), "log_c", 7), "It was in 4"),
        (lambda: degradation(table([1, 2, 3], clients=1, missing={(0, "fc2")})), "class_samples"),
        (lambda: degradation(table([1, 2, 3]), Table([Row(4, "log_c", 1.0, "x", 0, "before")])), "one model"),
    ],
)
def test_what_is_not_there_is_said(ask, says):
    with pytest.raises(UserError, match=says):
        ask()
