"""The figures show the numbers of the analysis, the report says them, and what cannot be shown is said."""

import csv
import dataclasses
import io
import math
import re
import shutil
import textwrap

import numpy as np
import pytest

import fedjax_sim as fs
from fedjax_sim.config import PeelConfig, sweep_files
from fedjax_sim.core.errors import UserError
from fedjax_sim.records import Row, Table
from fedjax_sim.records.plots import caption_of
from fedjax_sim.reports.peel import analysis, cfd, degradation, pictures, report
from fedjax_sim.reports.peel.groups import families, groups

LAYERS = ("fc1", "fc2", "fc3")


def settings(where, seed, **more):
    known = dict(
        seed=seed,
        rounds=3,
        partition=fs.PartitionConfig(kind="dirichlet", clients=6, alpha=0.5, min_size=30),
        model=fs.ModelConfig("mlp", options={"hidden": [16, 12]}),
        local=fs.LocalConfig(epochs=2, batch_size=20, lr=0.1),
        cohort=fs.CohortConfig(size=4),
        evaluation=fs.EvaluationConfig(every=0),
        peel=PeelConfig(every=1, clients=3, chimeras=True, class_samples=2),
        execution=fs.ExecutionConfig(devices=1, wave=1),
        output=fs.OutputConfig(dir=str(where), tensorboard=False, figures=False, progress=False),
    )
    return fs.RunConfig(**(known | more))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two seeds of one run."""
    home = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        fs.run(settings(home / f"seed{seed}", seed))
    return [home / f"seed{seed}" for seed in (0, 1)]


@pytest.fixture(scope="module")
def seeds(folders):
    return [fs.load(folder) for folder in folders]


def with_rows(run, rows, **config):
    """`run` with other rows, and with other settings."""
    return dataclasses.replace(run, metrics=Table(rows), config=dataclasses.replace(run.config, **config))


def only(monkeypatch, *makers):
    monkeypatch.setattr(pictures, "PICTURES", {make.__name__: make for make in makers})


def lines_of(axis):
    return {line.get_label(): np.asarray(line.get_ydata(), float) for line in axis.get_lines()}


def raw(runs, metric, state="", number=None):
    """Straight from the rows: {layer: values over clients and seeds}, NaN where undefined is left out."""
    found = {}
    for run in runs:
        for row in run.metrics:
            if (row.metric, row.state) == (metric, state) and number in (None, row.round):
                found.setdefault(row.layer, []).append(row.value)
    return found


# --- the numbers ----------------------------------------------------------------------------------------


def test_by_layer_shows_means_over_clients_and_seeds(seeds):
    figure = pictures.by_layer(seeds)
    axes = {axis.get_ylabel(): axis for axis in figure.axes}
    for metric in ("sigma_within", "log_c", "pabs_corrected", "ridge"):
        lines = lines_of(axes[pictures.LABELS[metric]])
        names = LAYERS if metric == "pabs_corrected" else LAYERS[1:]
        for state in ("before", "after"):
            values = raw(seeds, metric, state, 3)
            np.testing.assert_allclose(lines[state], [np.mean(values[name]) for name in names])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["before", "after"]
    caption = caption_of(figure)
    assert "3 clients × 2 seeds in round 3" in caption and "95% bootstrap" in caption
    assert "in round 1." in caption_of(pictures.by_layer(seeds, 1))


def test_relative_change_has_a_line_for_each_layer(seeds):
    figure = pictures.relative_change(seeds[0])
    axis = next(axis for axis in figure.axes if axis.get_title() == pictures.LABELS["sigma_within"])
    lines = lines_of(axis)
    for name in LAYERS[1:]:
        for place, number in enumerate((1, 2, 3)):
            before = np.asarray(raw(seeds[:1], "sigma_within", "before", number)[name])
            after = np.asarray(raw(seeds[:1], "sigma_within", "after", number)[name])
            assert lines[name][place] == pytest.approx(100 * np.mean((after - before) / before))
    assert "fc1" not in lines


def test_causes_add_up_and_the_first_layer_inherits_nothing(seeds):
    lines = lines_of(pictures.causes(seeds).axes[0])
    for name in ("total", "injected", "inherited", "interaction"):
        values = raw(seeds, f"chimera_{name}", "", 3)
        np.testing.assert_allclose(lines[name], [np.mean(values[layer]) for layer in LAYERS[1:]])
    np.testing.assert_allclose(lines["total"], lines["injected"] + lines["inherited"] + lines["interaction"])
    assert lines["inherited"][0] == 0


def test_points_of_the_accuracy_drop_and_their_correlations(seeds):
    figure = pictures.accuracy_drop(seeds)
    points = np.asarray(figure.axes[0].collections[0].get_offsets())
    told = {}
    for run in seeds:
        for row in run.metrics:
            if row.layer in ("", "fc3") and row.metric in ("peel_accuracy", "log_c"):
                told[run.config.seed, row.round, row.client, row.metric, row.state] = row.value
    wanted = [
        (
            told[*key, "log_c", "after"] - told[*key, "log_c", "before"],
            told[*key, "peel_accuracy", "before"] - told[*key, "peel_accuracy", "after"],
            told[*key, "peel_accuracy", "before"],
        )
        for key in sorted({one[:3] for one in told})
    ]
    assert len(points) == len(wanted) == 2 * 3 * 3
    change, drop, before = np.asarray(wanted).T
    np.testing.assert_allclose(sorted(map(tuple, points)), sorted(zip(change, drop, strict=True)))
    assert f"r = {np.corrcoef(change, drop)[0, 1]:.3f}" in figure.axes[0].get_title()
    rest = [v - np.polyval(np.polyfit(before, v, 1), before) for v in (change, drop)]
    assert f"partial {np.corrcoef(*rest)[0, 1]:.3f}, n = 18" in figure.axes[0].get_title()


def test_heat_map_is_the_change_by_layer_and_round(seeds):
    shown = np.asarray(pictures.heat_map(seeds).axes[0].images[0].get_array())
    assert shown.shape == (2, 3)
    for column, number in enumerate((1, 2, 3)):
        before, after = (raw(seeds, "log_c", state, number) for state in ("before", "after"))
        for row, name in enumerate(LAYERS[1:]):
            assert shown[row, column] == pytest.approx(np.mean(after[name]) - np.mean(before[name]))


def test_stitched_accuracies_end_where_all_or_nothing_is_merged(seeds):
    lines = lines_of(pictures.stitched(seeds).axes[0])
    for kind, label in (("prefix", "merged up to it"), ("single", "it alone merged")):
        values = raw(seeds, f"stitched_{kind}", "", 3)
        np.testing.assert_allclose(lines[label], [np.mean(values[name]) for name in LAYERS])
    after = np.mean(raw(seeds, "peel_accuracy", "after", 3)[""])
    assert lines["merged up to it"][-1] == pytest.approx(after)
    assert lines["merged from it on"][0] == pytest.approx(after)
    assert lines["none merged"][0] == pytest.approx(np.mean(raw(seeds, "peel_accuracy", "before", 3)[""]))


def test_accuracy_is_a_sawtooth(seeds):
    axis = pictures.accuracy(seeds).axes[0]
    lines = {line.get_label(): line for line in axis.get_lines()}
    for state, shift in (("start", 1), ("before", 0), ("after", 0)):
        wanted = [np.mean(raw(seeds, "peel_accuracy", state, number)[""]) for number in (1, 2, 3)]
        np.testing.assert_allclose(lines[state].get_ydata(), wanted)
        np.testing.assert_array_equal(lines[state].get_xdata(), np.arange(1, 4) - shift)


def test_further_states_and_samples_are_shown_where_recorded(seeds):
    rows = list(seeds[0].metrics)
    rows += [row._replace(state="perturbed") for row in rows if row.state == "after" and row.layer]
    rows += [row._replace(metric="ridge_others") for row in rows if row.metric == "ridge"]
    for row in [row for row in rows if row.metric == "peel_accuracy" and row.state == "after"]:
        rows.append(row._replace(state="finetuned", value=row.value / 2))
        rows.append(row._replace(metric="peel_accuracy_global"))
    run = with_rows(seeds[0], rows)
    axis = next(a for a in pictures.by_layer(run).axes if a.get_ylabel() == pictures.LABELS["log_c"])
    lines = lines_of(axis)
    np.testing.assert_array_equal(lines["perturbed"], lines["after"])
    probes = [a for a in pictures.by_layer(run).axes if "probe" in a.get_ylabel()]
    np.testing.assert_array_equal(*(lines_of(probe)["after"] for probe in probes))
    assert "perturbed, a control" in caption_of(pictures.by_layer(run))
    own, everyone = pictures.accuracy(run).axes
    np.testing.assert_allclose(lines_of(own)["finetuned"], lines_of(own)["after"] / 2)
    np.testing.assert_allclose(lines_of(everyone)["after"], lines_of(own)["after"])
    assert everyone.get_title() == "on the global test set"
    # The control, being the merged model here, gets the same verdict; the fine-tuned state none.
    text = report.text(run)
    cells = [
        line.split(" | ")[2:] for line in text.splitlines() if line.startswith("| fedavg") and "[" in line
    ]
    assert len(cells) == 2 and cells[0] == cells[1] and "| fedavg, perturbed |" in text


def test_undefined_values_are_gaps(seeds):
    def lost(row):
        gone = row.layer == "fc3" and row.metric == "log_c" and row.round == 3
        return row._replace(metric="undefined/log_c", value=1.0) if gone else row

    run = with_rows(seeds[0], map(lost, seeds[0].metrics))
    axis = next(a for a in pictures.by_layer(run).axes if a.get_ylabel() == pictures.LABELS["log_c"])
    assert np.isnan(lines_of(axis)["after"]).tolist() == [False, True]
    shown = pictures.heat_map(run).axes[0].images[0].get_array()
    assert shown.mask.tolist() == [[False] * 3, [False, False, True]]
    assert "; of these, 0 to 3 have a value at a point" in caption_of(pictures.by_layer(run))
    assert "; of these, 0 to 3 have a value at a point" in caption_of(pictures.heat_map(run))
    assert "a value at a point" not in caption_of(pictures.by_layer(run, 2))
    assert "fedavg: no verdict" in report.text(run) and "fedavg: no verdict" not in report.text(run, 2)


def test_layers_that_alignment_does_not_have_are_no_ticks(seeds):
    def lost(row):
        gone = row.layer == "fc1" and row.metric == "pabs_corrected"
        return row._replace(metric="undefined/pabs_corrected", value=1.0) if gone else row

    def ticks(run):
        label = pictures.LABELS["pabs_corrected"]
        axis = next(axis for axis in pictures.by_layer(run).axes if axis.get_ylabel() == label)
        return tuple(text.get_text() for text in axis.get_xticklabels())

    assert ticks(seeds[0]) == LAYERS
    assert ticks(with_rows(seeds[0], map(lost, seeds[0].metrics))) == LAYERS[1:]


def test_the_bar_of_rounds_names_those_that_were_measured(seeds):
    kept = [row for row in seeds[0].metrics if row.round != 2]
    figure = pictures.accuracy_drop(with_rows(seeds[0], kept))
    assert [text.get_text() for text in figure.axes[-1].get_yticklabels()] == ["1", "3"]


def test_the_report_says_how_many_samples_and_classes_were_measured(seeds):
    sizes = {
        name: [row.value for row in seeds[0].metrics if row.metric == name and row.round == 3]
        for name in ("peel_samples", "peel_classes", "peel_class_samples")
    }
    assert all(len(values) == 3 for values in sizes.values())
    told = [f"median {np.median(values):g}, least {min(values):g}" for values in sizes.values()]
    text = report.text(seeds[0])
    assert f"measured samples a client: {told[0]}; classes of these: {told[1]}; samples of its" in text
    assert f"smallest class: {told[2]}" in text
    few = sum(value < 5 for value in sizes["peel_class_samples"])
    assert few and f"**Caution**: in {few} of the 3 measurements" in text
    many = [
        row._replace(value=5.0) if row.metric == "peel_class_samples" else row for row in seeds[0].metrics
    ]
    assert "Caution" not in report.text(with_rows(seeds[0], many))
    older = [row for row in seeds[0].metrics if not row.metric.startswith("peel_class")]
    assert f"measured samples a client: {told[0]}\n" in report.text(with_rows(seeds[0], older))


# --- several runs ----------------------------------------------------------------------------------------


def test_runs_of_other_settings_are_compared_and_named_by_what_differs(seeds):
    local = dataclasses.replace(seeds[0].config.local, lr=0.2)
    other = with_rows(seeds[0], seeds[0].metrics, local=local)
    found = groups([*seeds, other])
    assert [(group.name, len(group.runs)) for group in found] == [
        ("fedavg, local.lr 0.1", 2),
        ("fedavg, local.lr 0.2", 1),
    ]
    fedmr = with_rows(seeds[0], seeds[0].metrics, algorithm=fs.FedMR())
    assert [group.name for group in groups([seeds[0], fedmr])] == ["fedavg", "fedmr"]
    figure = pictures.by_layer([*seeds, other])
    axis = next(a for a in figure.axes if a.get_ylabel() == pictures.LABELS["ridge"])
    one, both = (pictures.by_layer(runs).axes for runs in (seeds[0], seeds))
    for label, axes in (("fedavg, local.lr 0.2: after", one), ("fedavg, local.lr 0.1: after", both)):
        alone = next(a for a in axes if a.get_ylabel() == pictures.LABELS["ridge"])
        np.testing.assert_array_equal(lines_of(axis)[label], lines_of(alone)["after"])
    assert [a.get_title() for a in pictures.causes([*seeds, other]).axes] == [group.name for group in found]


# --- files -------------------------------------------------------------------------------------------------


def test_draw_writes_figures_table_and_report(folders, seeds, tmp_path):
    told = []
    written = report.draw(folders, tmp_path / "out", tell=told.append)
    names = {path.name for path in written}
    assert names == {f"{name}.{end}" for name in pictures.PICTURES for end in ("png", "pdf")} | {
        "layers.csv",
        "report.md",
    }
    assert told == [f"wrote {path}" for path in written] and all(path.stat().st_size for path in written)

    rows = list(csv.DictReader(io.StringIO((tmp_path / "out" / "layers.csv").read_text())))
    group = groups(seeds)[0]
    wanted = analysis.summary(group.measured)
    assert len(rows) == len(wanted)
    for row, one in zip(rows, wanted, strict=True):
        assert row == {"group": "fedavg"} | {k: "" if v is None else str(v) for k, v in one.items()}
    row = next(r for r in rows if (r["round"], r["layer"], r["metric"]) == ("2", "fc3", "log_c"))
    before, after = (np.asarray(raw(seeds, "log_c", state, 2)["fc3"]) for state in ("before", "after"))
    assert (row["state"], row["measurements"]) == ("after", "6")
    assert float(row["change"]) == pytest.approx((after - before).mean())
    assert float(row["change_low"]) < float(row["change"]) < float(row["change_high"])

    text = (tmp_path / "out" / "report.md").read_text()
    verdict = degradation(*[run.metrics for run in seeds])
    values = (verdict.slope, verdict.low, verdict.high, verdict.rank, verdict.final, verdict.area)
    slope, low, high, *rest = (f"{value:.3f}" for value in values)
    assert f"| fedavg | 3 | {slope} [{low}, {high}] | {' | '.join(rest)} | 6 |" in text
    assert verdict.words() in text
    assert analysis.cause(group.measured.at(3)).words() in text
    assert "seeds 0, 1" in text and all(f"`{folder}`" in text for folder in folders)
    for name, make in pictures.PICTURES.items():
        assert f"![{name}]({name}.png)\n\n*{name}.* {caption_of(make(seeds))}" in text


def test_default_places(folders, seeds, tmp_path, monkeypatch):
    only(monkeypatch)
    assert {p.parent for p in report.draw(folders[0])} == {folders[0] / "figures" / "peel"}
    assert {p.parent for p in report.draw(folders)} == {folders[0].parent / "peel"}
    with pytest.raises(UserError, match="in memory"):
        report.draw(dataclasses.replace(seeds[0], folder=None))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        report.draw(seeds, tmp_path / "file")


def test_groups_of_other_models_have_folders_of_their_own_and_one_overview(seeds, tmp_path, monkeypatch):
    only(monkeypatch, pictures.causes)
    rows = [row._replace(layer=row.layer and f"{row.layer}b") for row in seeds[0].metrics]
    deeper = with_rows(seeds[0], rows, model=fs.ModelConfig("mlp", options={"hidden": [9, 9]}))
    with pytest.raises(UserError, match="different layers"):
        groups([*seeds, deeper])
    assert [len(family) for family in families([*seeds, deeper])] == [1, 1]
    alone = report.draw([*seeds, deeper], tmp_path / "alone", figures=False)
    assert {path.name for path in alone} == {f"overview.{end}" for end in ("png", "csv", "md")}
    assert sorted((tmp_path / "alone").iterdir()) == sorted(alone)
    for field, asked in {
        "only": {"figures": False},
        "reference": {"reference": "fedavg"},
        "accuracy": {"accuracy": 0.5},
    }.items():
        with pytest.raises(UserError, match=f"^{field} =.*one group"):
            report.draw(seeds, tmp_path / "none", **asked)
    report.draw([*seeds, deeper], tmp_path)
    assert (tmp_path / "overview.md").exists()
    assert len(list(tmp_path.glob("*/causes.png"))) == len(list(tmp_path.glob("*/report.md"))) == 2
    monkeypatch.setattr(report, "MOST", 1)
    several = [with_rows(seeds[0], seeds[0].metrics, local=local_of(rate)) for rate in (0.2, 0.3)]
    report.draw([*seeds, *several], tmp_path / "many")
    assert len(list((tmp_path / "many").glob("*/causes.png"))) == 3


def local_of(rate):
    return fs.LocalConfig(epochs=2, batch_size=20, lr=rate)


def test_a_sweeps_file_stands_for_its_finished_runs(folders, tmp_path):
    text = f"""
    base: {{rounds: 3, model: {{name: mlp}}}}
    methods: {{A: {{algorithm: fedavg}}, B: {{algorithm: fedmr}}}}
    seeds: [0, 1]
    out: {tmp_path / "study"}
    """
    (tmp_path / "study.yaml").write_text(textwrap.dedent(text))
    with pytest.raises(UserError, match="none of its runs is finished"):
        groups(tmp_path / "study.yaml")
    jobs = sweep_files.read_sweep(tmp_path / "study.yaml").jobs
    for job in jobs:
        if job.method == "A":
            shutil.copytree(folders[job.seed], job.config.output.dir)
    found = groups(tmp_path / "study.yaml")
    assert [(group.name, len(group.runs)) for group in found] == [("A", 2)]
    report.draw(tmp_path / "study.yaml")
    assert (tmp_path / "study" / "peel" / "report.md").exists()
    (tmp_path / "other").mkdir()
    for place, names in (
        ("again.yaml", ["study: A", "again: A"]),
        ("other/study.yaml", [f"{tmp_path}/study: A", f"{tmp_path}/other/study: A"]),
    ):
        shutil.copy(tmp_path / "study.yaml", tmp_path / place)
        assert [group.name for group in groups([tmp_path / "study.yaml", tmp_path / place])] == names


def test_what_was_not_recorded_is_left_out_and_said(seeds, tmp_path, monkeypatch):
    only(monkeypatch, pictures.causes, pictures.accuracy)
    report.draw(seeds[0], tmp_path)
    assert (tmp_path / "causes.png").exists()
    bare = [row for row in seeds[0].metrics if not row.metric.startswith(("chimera", "stitched"))]
    told = []
    written = {p.name for p in report.draw(with_rows(seeds[0], bare), tmp_path, tell=told.append)}
    assert (
        "accuracy.png" in written and "causes.png" not in written and not (tmp_path / "causes.png").exists()
    )
    assert any("--peel.chimeras" in line for line in told)
    assert "causes was not drawn: chimera_total, " in (tmp_path / "report.md").read_text()
    with pytest.raises(UserError, match=r"--peel\.chimeras"):
        pictures.stitched(with_rows(seeds[0], bare))


def test_a_metric_that_is_undefined_throughout_gives_a_message(seeds, tmp_path, monkeypatch):
    only(monkeypatch, pictures.heat_map, pictures.by_layer)
    rows = [
        row._replace(metric="undefined/log_c", value=1.0) if row.metric == "log_c" else row
        for row in seeds[0].metrics
    ]
    run = with_rows(seeds[0], rows)
    with pytest.raises(UserError, match=r"no client's samples define it.*class_samples"):
        degradation(run.metrics)
    for make in (pictures.heat_map, pictures.accuracy_drop):
        with pytest.raises(UserError, match="no client's samples define it"):
            make(run)
    written = {path.name for path in report.draw(run, tmp_path)}
    assert "heat_map.png" not in written and "by_layer.png" in written
    assert "no verdict" in (tmp_path / "report.md").read_text()


# --- mistakes ----------------------------------------------------------------------------------------------


def test_mistakes_are_said_once(seeds, tmp_path):
    unprobed = with_rows(seeds[0], [Row(3, "accuracy", 0.5)])
    half = dataclasses.replace(seeds[0], rounds=2)
    renamed = [row._replace(layer=row.layer and "conv" + row.layer) for row in seeds[0].metrics]
    other = with_rows(seeds[0], renamed, model=fs.ModelConfig("lenet"))
    for given, says in (
        (unprobed, r"no records of the layer-peeled probe.*--peel\.every"),
        (half, "2 of its 3 rounds.*resume"),
        ([seeds[0], seeds[0]], "same seed, 0"),
        ([], "no run"),
        (tmp_path / "nowhere", "no such folder"),
    ):
        with pytest.raises(UserError, match=says):
            report.draw(given, tmp_path / "out")
    with pytest.raises(UserError, match=r"different layers.*one model"):
        pictures.by_layer([seeds[0], other])
    with pytest.raises(UserError, match="It was in 1, 2, 3"):
        report.draw(seeds, tmp_path / "out", round_index=7)
    assert not (tmp_path / "out").exists()


def test_a_single_measurement_has_a_picture_and_no_interval(seeds, tmp_path):
    first = next(row.client for row in seeds[0].metrics if row.layer and row.round == 1)
    rows = [row for row in seeds[0].metrics if row.client == first and row.round == 1]
    run = with_rows(seeds[0], rows)
    assert "1 client × 1 seed in round 1. No band" in caption_of(pictures.by_layer(run))
    verdict = degradation(run.metrics)
    assert re.search(r"\| 1 +\| undecided +\|", report.text(run))
    assert math.isnan(verdict.low) and not verdict.present and "Undecided" in report.text(run)
    assert "r = –" in pictures.accuracy_drop(run).axes[0].get_title()
    assert math.isnan(cfd.estimate(np.ones((1, 2)))[1, 0])
