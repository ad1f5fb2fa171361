"""From records to a verdict: known numbers through the table, and what is missing said out loud."""

import numpy as np
import pytest

from fedjax_sim.core.errors import UserError
from fedjax_sim.records import Row, Table
from fedjax_sim.reports.peel import analysis, cfd, degradation, layers, measurements

NAMES = ("conv1", "conv2", "fc1", "fc2")
EVERYWHERE = {(client, name) for client in range(6) for name in NAMES}


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
        (lambda: layers(table([1, 2, 3]), "log_c", after="perturbed"), "It was of before, after"),
        (lambda: layers(table([1, 2, 3], missing=EVERYWHERE), "log_c"), "define it.*class_samples"),
        (lambda: degradation(table([1, 2, 3], missing=EVERYWHERE)), "define it.*class_samples"),
        (lambda: degradation(table([1, 2, 3], clients=1, missing={(0, "fc2")})), "class_samples"),
        (lambda: degradation(table([1, 2, 3]), Table([Row(4, "log_c", 1.0, "x", 0, "before")])), "one model"),
    ],
)
def test_what_is_not_there_is_said(ask, says):
    with pytest.raises(UserError, match=says):
        ask()


def test_other_states_are_compared_when_asked_for_and_in_nobody_s_way():
    rows = list(table([0.1, 0.2, 0.4]))
    rows += [row._replace(state="perturbed", value=1.5) for row in rows if row.state == "after"]
    rows += [Row(4, "peel_accuracy", 0.5, client=2, state="finetuned"), Row(4, "accuracy", 0.9)]
    records = Table(rows)
    np.testing.assert_allclose(layers(records, "log_c", after="perturbed").change, 0.5)
    np.testing.assert_allclose(
        layers(records, "log_c").change, layers(table([0.1, 0.2, 0.4]), "log_c").change
    )
    assert degradation(records, after="perturbed").slope == pytest.approx(0)
    whole = measurements(records)
    assert whole.states("log_c") == ["before", "after", "perturbed"]
    found = whole.scalar("peel_accuracy", "finetuned")
    assert np.isfinite(found).tolist() == (whole.clients == 2).tolist() and found[2] == 0.5


def test_a_newest_round_without_a_value_is_passed_over_unless_asked_for():
    rows = [*table([0.1, 0.2, 0.4]), *table([1, 1, 1], number=5, missing=EVERYWHERE)]
    assert layers(Table(rows), "log_c").change[0, 0] == pytest.approx(0.1)
    with pytest.raises(UserError, match="They do in 4"):
        layers(Table(rows), "log_c", 5)


def test_measurements_of_seeds_are_pooled_with_gaps_where_one_lacks_a_metric():
    one = measurements(table([0.1, 0.2, 0.4]), seed=1)
    two = measurements(Table([*table([0, 0, 0], clients=2), Row(4, "spread", 3.0, "fc1", 0)]), seed=2)
    both = analysis.pooled([one, two])
    assert both.seeds.tolist() == [1] * 6 + [2] * 2 and len(both) == 8
    np.testing.assert_allclose(both.pair("log_c").change[:6], one.pair("log_c").change)
    assert np.isfinite(both.values("spread")).sum() == 1 and both.values("spread")[6, 2] == 3


def test_the_summary_averages_over_whoever_has_both_values():
    records = table([0.1, 0.2, 0.4], clients=3, missing={(2, "fc1")})
    rows = {(row["layer"], row["metric"]): row for row in analysis.summary(measurements(records))}
    assert [row["measurements"] for row in rows.values()] == [3, 2, 3]
    assert rows["fc1", "log_c"]["change"] == pytest.approx(0.2 + 0.005)
    assert rows["fc2", "log_c"]["after"] == pytest.approx(1.41)
    gone = table([0.1, 0.2, 0.4], missing=EVERYWHERE)
    assert {row["change"] for row in analysis.summary(measurements(gone))} == {None}


def test_intervals_of_means_cover_and_leave_out_what_is_undefined():
    draw, hits = np.random.default_rng(0), 0
    for trial in range(100):
        values = draw.normal(loc=2.0, size=(40, 1))
        values[::4] = np.nan
        mean, low, high = cfd.estimate(values, resamples=400, seed=trial)[:, 0]
        assert mean == pytest.approx(np.nanmean(values)) and low < mean < high
        hits += low <= 2.0 <= high
    assert 85 <= hits <= 99
    few = cfd.estimate(np.array([[1.0, np.nan, 3.0], [2.0, np.nan, np.nan]]))
    np.testing.assert_array_equal(few[0], [1.5, np.nan, 3.0])
    assert few[1:, 0].tolist() == [1, 2] and np.isnan(few[1:, 1:]).all()


def test_associations_and_their_least_numbers():
    draw = np.random.default_rng(1)
    given = draw.normal(size=50)
    a, b = given + 0.1 * draw.normal(size=50), given + 0.1 * draw.normal(size=50)
    found = cfd.association(np.append(a, np.nan), np.append(b, 1.0), np.append(given, 1.0))
    assert found.measurements == 50 and found.pearson == pytest.approx(np.corrcoef(a, b)[0, 1])
    rest = [v - np.polyval(np.polyfit(given, v, 1), given) for v in (a, b)]
    assert found.partial == pytest.approx(np.corrcoef(*rest)[0, 1])
    four, five = (cfd.association(a[:n], b[:n], given[:n]) for n in (4, 5))
    assert np.isnan([four.pearson, four.spearman, four.partial]).all() and four.measurements == 4
    assert np.isfinite([five.pearson, five.spearman, five.partial]).all()
    assert cfd.pearson(np.full(3, 0.1), np.full(3, 0.7)) == 0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (np.arange(1.0, 5.0) + np.zeros((5, 1)), "CFD is present"),
        (-np.arange(1.0, 5.0) + np.zeros((5, 1)), "is not positive"),
        (np.arange(5.0, 1.0, -1) + np.zeros((5, 1)), "lies below zero"),
        (np.array([[1.0, 3.0], [3.0, 1.0]]), "does not exclude zero"),
        (np.ones((1, 3)), "Undecided"),
    ],
)
def test_verdicts_say_their_reason(changes, says):
    assert says in cfd.verdict(changes).words()


def test_what_is_inherited_is_told_from_what_is_injected():
    def chimeras(inherited, injected):
        rows = list(table([0.1, 0.2, 0.4]))
        for client in range(6):
            for part, values in (("inherited", inherited), ("injected", injected)):
                for name, value in zip(NAMES[1:], values, strict=True):
                    rows.append(Row(4, f"chimera_{part}", value + 0.001 * client, name, client))
        return analysis.cause(measurements(Table(rows)))

    found = chimeras([0, 0.3, 0.6], [0.3, 0.1, 0.0])
    assert found.cumulative and found.words().startswith("Cumulative")
    assert found.inherited.slope == pytest.approx(0.9) and found.excess[0] == pytest.approx(0.6)
    assert not chimeras([0, 0.3, 0.6], [0.3, 0.5, 0.7]).cumulative
    assert not chimeras([0, 0.0, 0.0], [-0.3, -0.1, -0.2]).cumulative
    assert analysis.cause(measurements(table([0.1, 0.2, 0.4]))) is None
