"""The overview's rows against plain NumPy, from records made by hand."""

import csv

import numpy as np
import pytest

from fedjax_sim.core.errors import UserError
from fedjax_sim.records import Row, Table
from fedjax_sim.reports.peel import analysis, cfd, overview
from fedjax_sim.reports.peel.groups import Group
from fedjax_sim.runs.folder import Folder

LAYERS = ("fc1", "fc2", "fc3", "fc4")


def group_of(name, level, slope, seeds=2, clients=3, chimeras=True):
    """A group whose accuracy before the merge rises by round, and whose log C changes by `slope` a layer."""
    parts, draw = [], np.random.default_rng(int(100 * abs(slope)))
    for seed in range(seeds):
        rows = []
        for number in (1, 5):
            for client in range(clients):
                noise = draw.normal(0, 0.01)
                before = level + 0.05 * number + noise
                drop = 0.1 * slope + 0.02 * draw.normal()
                for state, value in (("start", before - 0.2), ("before", before), ("after", before - drop)):
                    rows.append(Row(number, "peel_accuracy", value, client=client, state=state))
                for depth, layer in enumerate(LAYERS):
                    change = slope * depth + noise
                    for metric in overview.CHANGES:
                        for state, value in (("before", 1.0), ("after", 1.0 + change)):
                            rows.append(Row(number, metric, value, layer=layer, client=client, state=state))
                    if chimeras and depth:
                        parts_ = {"injected": 0.01, "inherited": slope * (depth - 1), "total": change}
                        for part, value in parts_.items():
                            rows.append(Row(number, f"chimera_{part}", value, layer=layer, client=client))
        parts.append(analysis.measurements(Table(rows), seed))
    return Group(name, (), analysis.pooled(parts))


def table(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def test_a_row_says_what_its_round_measured():
    group = group_of("a", 0.3, 0.4)
    one = overview.outline(group, 1)
    here = group.measured.at(1)
    before, after = (here.scalar("peel_accuracy", state) for state in ("before", "after"))
    assert one.round == 1 and one.seeds == 2 and len(one.measured) == 6
    assert one.accuracy["before"] == pytest.approx(before.mean())
    assert one.drop[0] == pytest.approx((before - after).mean())
    assert one.drop[1] < one.drop[0] < one.drop[2]
    change = here.values("log_c", "after") - here.values("log_c", "before")
    assert one.final[0] == pytest.approx(change[:, -1].mean())
    assert one.verdict.slope == pytest.approx(cfd.verdict(change).slope) and one.verdict.present
    assert one.cause.cumulative and one.cause.inherited.final == pytest.approx(0.4 * 2)
    assert np.isnan(one.accuracy["finetuned"])


def test_groups_are_compared_where_they_are_equally_accurate(tmp_path):
    told = []
    groups = [group_of("slow", 0.2, 0.1), group_of("fast", 0.5, 0.3), group_of("never", -0.5, 0.2)]
    assert [overview.at_accuracy(group.measured, 0.4) for group in groups] == [5, 1, None]
    written = overview.write(groups, Folder(tmp_path), accuracy=0.4, tell=told.append)
    assert [path.name for path in written] == [f"overview_at_0.4.{end}" for end in ("png", "csv", "md")]
    rows = table(tmp_path / "overview_at_0.4.csv")
    assert [(row["group"], row["round"]) for row in rows] == [("slow", "5"), ("fast", "1")]
    assert any("never: left out" in line for line in told)
    with pytest.raises(UserError, match="no group of runs ever had it"):
        overview.write(groups, Folder(tmp_path), accuracy=0.99)


def test_correlations_over_groups_and_over_measurements():
    outlines = [overview.outline(group_of(str(slope), 0.3, slope)) for slope in (0.1, 0.2, 0.4, 0.6, 0.8)]
    called, between, within = overview.correlations(outlines)[0]
    assert called == overview.CHANGES["log_c"]
    drops = [one.drop[0] for one in outlines]
    assert between.pearson == pytest.approx(np.corrcoef(drops, [one.final[0] for one in outlines])[0, 1])
    assert between.measurements == 5 and within.measurements == 30
    assert between.pearson > 0.95 and within.pearson > 0.8


def test_report_and_picture_show_every_group(tmp_path):
    groups = [group_of("a", 0.3, 0.1), group_of("b", 0.3, 0.4, chimeras=False), group_of("c", 0.3, -0.2)]
    outlines = [overview.outline(group) for group in groups]
    text = overview.report(outlines, "About.")
    lines = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("| ")}
    assert "yes" in lines["b"] and lines["b"].rstrip("| ").endswith("–") and " no " in lines["c"]
    axes = overview.picture(outlines).axes
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["a", "b", "c"]
    shown = axes[1].containers[0].lines[0].get_xdata()
    np.testing.assert_allclose(shown, [one.final[0] for one in outlines])


@pytest.mark.parametrize("count", [4, 5])
def test_a_correlation_has_its_number_beside_it_and_a_dash_where_that_is_below_five(count):
    outlines = [overview.outline(group_of(f"{n}", 0.3, 0.1 + 0.2 * n)) for n in range(count)]
    row = next(line for line in overview.report(outlines, "").splitlines() if line.startswith("| log C"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1] == str(count) and cells[5] == str(6 * count)
    assert (cells[2:5] == ["–"] * 3) == (count < 5) and "–" not in cells[6:]


def test_what_was_not_measured_is_empty_and_not_nan(tmp_path):
    overview.write([group_of("a", 0.3, 0.1), group_of("b", 0.3, 0.2)], Folder(tmp_path))
    assert "nan" not in (tmp_path / "overview.csv").read_text().lower()
    row = table(tmp_path / "overview.csv")[0]
    assert row["accuracy_finetuned"] == "" and row["cfd"] == "True"


def test_differences_are_of_the_same_client_and_seed(tmp_path):
    one, other = group_of("a", 0.3, 0.1), group_of("b", 0.3, 0.4, seeds=3)
    few = Group("few", (), one.measured.where(one.measured.clients > 0))
    a, b, c = (overview.outline(group) for group in (one, other, few))
    for x, y, pairs in ((b, a, 6), (a, b, 6), (c, b, 4)):
        apart = overview.difference(x, y)
        assert apart.pairs == pairs
        of_pairs = []
        for seed, client in zip(x.measured.seeds, x.measured.clients, strict=True):
            rows = [(of.seeds == seed) & (of.clients == client) for of in (x.measured, y.measured)]
            if all(row.any() for row in rows):
                change = [
                    of.pair("log_c").change[row][0]
                    for of, row in zip((x.measured, y.measured), rows, strict=True)
                ]
                of_pairs.append(change[0] - change[1])
        assert apart.final[0] == pytest.approx(np.mean(of_pairs, 0)[-1])
        assert apart.slope[0] == pytest.approx(cfd.slope(np.mean(of_pairs, 0)))
        assert apart.final[1] < apart.final[0] < apart.final[2]
    shared = overview.outline(Group("b", (), other.measured.where(other.measured.seeds < 2)))
    assert overview.difference(b, a).drop[0] == pytest.approx(shared.drop[0] - a.drop[0])
    alone = overview.outline(Group("alone", (), other.measured.where(other.measured.seeds == 2)))
    nothing = overview.difference(alone, a)
    assert nothing.pairs == 0 and np.isnan([nothing.drop, nothing.final, nothing.slope]).all()

    overview.write([one, other], Folder(tmp_path), reference="a")
    rows = table(tmp_path / "overview.csv")
    assert [row["pairs"] for row in rows] == ["6", "6"] and float(rows[0]["delta_last_difference"]) == 0
    assert float(rows[1]["beta_difference_low"]) == pytest.approx(overview.difference(b, a).slope[1])
    text = (tmp_path / "overview.md").read_text().split("Differences to a")[1]
    assert "| b | 6 |" in text and "| a |" not in text
    with pytest.raises(UserError, match="no group has this name"):
        overview.write([one, other], Folder(tmp_path), reference="c")
