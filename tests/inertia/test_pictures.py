"""The figures show what was recorded, the report and the table say it in numbers, and gaps are said."""

import csv
import dataclasses
import json

import numpy as np
import pytest

import fedjax_sim as fs
from fedjax_sim import config as config_lib
from fedjax_sim import records
from fedjax_sim.algorithms.lips import LIPS
from fedjax_sim.cli import commands
from fedjax_sim.config import InertiaConfig, sweep_files
from fedjax_sim.core.errors import UserError
from fedjax_sim.records import Row, Table
from fedjax_sim.records.plots import caption_of
from fedjax_sim.reports.inertia import pictures, report
from fedjax_sim.reports.inertia.report import groups
from fedjax_sim.reports.shared import Missing, home_of, spread

LAYERS = ("zeta", "beta", "gamma", "alpha")  # in no alphabetic order, so that only the rows tell it
ROUNDS, SEEDS = 12, (0, 1, 2)
METHODS = {"fedavg": fs.FedAvg(), "lips": LIPS(density=0.4, period=3, layers="inner")}
STARTS = {2: 0.4, 5: 0.4 + 0.6 * 3 / 12, 8: 0.4 + 0.6 * 6 / 12, 11: 0.4 + 0.6 * 9 / 12}


def config_of(where, algorithm, seed, **more):
    return fs.RunConfig(
        seed=seed,
        rounds=ROUNDS,
        algorithm=algorithm,
        partition=fs.PartitionConfig(kind="iid", clients=6, local_test="matching"),
        model=fs.ModelConfig("mlp", options={"hidden": [16, 12, 8]}),
        inertia=InertiaConfig(measure=True, every=1, clients=2, samples=50),
        local=fs.LocalConfig(epochs=1, batch_size=100, lr=0.1),
        cohort=fs.CohortConfig(size=6),
        execution=fs.ExecutionConfig(devices=1, wave=1),
        output=fs.OutputConfig(dir=str(where), tensorboard=False, figures=False, progress=False),
        **more,
    )


def folder_of(where, config, rows):
    """A finished run's folder, as far as looking at it needs it."""
    where.mkdir(parents=True)
    about = {"data": {"name": "digits"}, "partition": {"clients": 6, "kind": "iid", "dataset": "digits"}}
    (where / "provenance.json").write_text(json.dumps(about))
    (where / "config.yaml").write_text(config_lib.dump(config))
    records.write_parquet(Table(rows), where / "metrics.parquet")
    return where


def made_up(method, seed):
    """(rows, name -> f64[T, L] or f64[T]) of a run whose inner layers move less, `gamma` least."""
    draw = np.random.default_rng([seed, len(method)])
    shape, data, rows = (ROUNDS, len(LAYERS)), {}, []
    data["inertia_step"] = np.asarray([1.0, 0.3, 0.1, 0.8])[None] * np.exp(draw.normal(0, 0.1, shape))
    data["inertia_cancellation"] = draw.uniform(0.2, 0.9, shape)
    data["inertia_displacement"] = draw.uniform(0.1, 0.9, shape)
    data["inertia_cosine"] = draw.uniform(-0.2, 0.9, shape)
    data["effectiveness_own"] = draw.normal(0, 0.1, ROUNDS)
    data["accuracy"] = draw.uniform(0, 1, ROUNDS)
    if method == "lips":
        after = np.ones(ROUNDS)
        after[[number - 2 for number in STARTS]] = list(STARTS.values())  # sparse after the round before
        data["lips_density_after"] = after
        data["lips_density"] = np.asarray([1.0, *after[:-1]])
        data["lips_nonzero"] = data["lips_density"] - 0.002
    for t in range(ROUNDS):
        for name, values in data.items():
            if name in ("inertia_displacement", "inertia_cosine") and t < 3:
                values[t] = np.nan
            elif values.ndim == 1:
                rows.append(Row(t + 1, name, values[t]))
            else:
                rows += [Row(t + 1, name, values[t, i], layer=layer) for i, layer in enumerate(LAYERS)]
    return rows, data


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """(folders, method -> what each seed recorded) of two methods and three seeds, by hand."""
    home, folders, data = tmp_path_factory.mktemp("study"), [], {}
    for method, algorithm in METHODS.items():
        for seed in SEEDS:
            rows, values = made_up(method, seed)
            where = home / f"{method}{seed}"
            folders.append(folder_of(where, config_of(where, algorithm, seed), rows))
            data.setdefault(method, []).append(values)
    return folders, data


@pytest.fixture(scope="module")
def drawn(study, tmp_path_factory):
    """(folder, lines told) of everything drawn."""
    told, out = [], tmp_path_factory.mktemp("drawn")
    report.draw(study[0], out, tell=told.append)
    return out, told


def lines_of(axis):
    return {line.get_label(): np.asarray(line.get_ydata(), float) for line in axis.get_lines()}


def row_of(folder, name):
    """Of the report's table, by column."""
    lines = [line for line in (folder / "report.md").read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return next(dict(zip(cells[0], row, strict=True)) for row in cells if row[0] == name)


def told(values):
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"


# --- the numbers ----------------------------------------------------------------------------------------


def test_report_says_profile_cancellation_and_effectiveness(study, drawn):
    for method, seeds in study[1].items():
        row = row_of(drawn[0], method)
        steps = [np.exp(np.log(one["inertia_step"][3:]).mean(0)) for one in seeds]
        assert all(np.argmin(step) == 2 for step in steps)
        assert row["layer of least"] == "gamma" and row["seeds"] == "3"
        assert row["inertia"] == told([1 - step[2] / np.sqrt(step[0] * step[3]) for step in steps])
        apart = [one["inertia_cancellation"][3:].mean(0) for one in seeds]
        assert row["cancellation, ends"] == told([(one[0] + one[3]) / 2 for one in apart])
        assert row["cancellation, least"] == told([one[2] for one in apart])
        gains = [one["effectiveness_own"] for one in seeds]
        sparse = (
            [3, 6, 9] if method == "lips" else []
        )  # of the rounds 4 to 12, after which 5, 8, 11 start sparse
        dense = [t for t in range(3, ROUNDS) if t not in sparse]
        assert row["effectiveness own, dense"] == told([gain[dense].mean() for gain in gains])
        assert row["own, sparse"] == (told([gain[sparse].mean() for gain in gains]) if sparse else "–")
        assert row["global, dense"] == "–"


def test_table_has_means_from_round_four_on(study, drawn):
    rows = list(csv.DictReader((drawn[0] / "inertia.csv").read_text().splitlines()))
    assert len(rows) == 2 * len(SEEDS) * len(LAYERS) * 4
    for row in rows:
        values = study[1][row["group"]][int(row["seed"])][row["metric"]][3:, LAYERS.index(row["layer"])]
        assert int(row["rounds"]) == len(values) == 9
        assert float(row["mean"]) == pytest.approx(values.mean(), rel=1e-12)
        if row["metric"] == "inertia_step":
            assert float(row["geometric_mean"]) == pytest.approx(np.exp(np.log(values).mean()), rel=1e-12)
    assert any(row["geometric_mean"] == "" for row in rows if row["metric"] == "inertia_cosine")


def test_heat_map_and_lines_show_means_over_seeds(study):
    found = groups(study[0])
    assert [group.name for group in found] == list(METHODS) and found[0].layers == LAYERS
    mean = {method: np.mean([one["inertia_step"] for one in seeds], 0) for method, seeds in study[1].items()}
    axes = pictures.heat_map(found).axes
    for axis, method in zip(axes, METHODS, strict=False):
        np.testing.assert_allclose(axis.get_images()[0].get_array(), mean[method].T)
        assert [label.get_text() for label in axis.get_yticklabels()] == list(LAYERS)
        assert axis.get_images()[0].get_extent()[:2] == [0.5, ROUNDS + 0.5]
    for axis, method in zip(pictures.lines(found).axes, METHODS, strict=False):
        for depth, name in enumerate(LAYERS):
            np.testing.assert_allclose(lines_of(axis)[name], mean[method][:, depth])
    for column, name in enumerate(("inertia_displacement", "inertia_cosine")):
        axis = pictures.reference(found).axes[2 + column]
        wanted = np.mean([one[name][3:, 1] for one in study[1]["lips"]], 0)
        np.testing.assert_allclose(lines_of(axis)["beta"], wanted)


def test_a_round_or_a_value_that_is_missing_leaves_a_gap(study):
    run = fs.load(study[0][0])
    rows = [row for row in run.metrics if row.round != 5 and (row.round, row.layer) != (7, "beta")]
    group = groups(dataclasses.replace(run, metrics=Table(rows)))[0]
    image = pictures.heat_map([group]).axes[0].get_images()[0].get_array()
    assert image.mask[:, 4].all() and image.mask[1, 6] and image.mask.sum() == len(LAYERS) + 1
    assert np.isnan(lines_of(pictures.lines([group]).axes[0])["beta"][5])


def test_profile_is_geometric_and_its_least_layer_is_ringed(study):
    axis = pictures.by_layer(groups(study[0])).axes[0]
    for place, (method, seeds) in enumerate(study[1].items()):
        logs = np.asarray([np.log(one["inertia_step"][3:]).mean(0) for one in seeds])
        np.testing.assert_allclose(lines_of(axis)[method], np.exp(logs.mean(0)))
        band = axis.collections[place].get_paths()[0].vertices[:, 1]
        assert band.max() == pytest.approx(np.exp(logs.mean(0) + logs.std(0, ddof=1)).max())
        _, ends, ring = axis.get_lines()[3 * place : 3 * place + 3]
        assert list(ends.get_xdata()) == [0, 3] and ring.get_xdata() == [2]


def test_effectiveness_marks_sparse_rounds(study):
    figure = pictures.effectiveness(groups(study[0]))
    (axis,) = [axis for axis in figure.axes if axis.get_visible()]
    marks = [line for line in axis.get_lines() if line.get_marker() == "v"]
    assert [list(line.get_xdata()) for line in marks] == [[], [1, 4, 7, 10]]
    gains = np.mean([one["effectiveness_own"] for one in study[1]["lips"]], 0)
    np.testing.assert_allclose(marks[1].get_ydata(), gains[[0, 3, 6, 9]])
    late = gains[[3, 6, 9]].mean(), gains[[4, 5, 7, 8, 10, 11]].mean()
    assert f"dense {late[1]:+.3f}, sparse {late[0]:+.3f}" in caption_of(figure)


def test_density_is_shown_against_its_plan(study):
    found = groups(study[0])
    figure = pictures.density(found)
    (axis,) = [axis for axis in figure.axes if axis.get_visible()]
    lines = lines_of(axis)
    assert list(axis.get_lines()[0].get_xdata()) == list(STARTS)
    np.testing.assert_allclose(lines["planned"], list(STARTS.values()))
    np.testing.assert_allclose(lines["recorded"], list(STARTS.values()))
    np.testing.assert_allclose(lines["not zero"], np.asarray(list(STARTS.values())) - 0.002)
    assert "not zero 2.0e-03" in caption_of(figure)
    with pytest.raises(Missing, match="no run starts a round sparse"):
        pictures.density(found[:1])


def test_accuracy_has_a_line_for_each_group(study):
    lines = lines_of(pictures.accuracy(groups(study[0])).axes[0])
    for method, seeds in study[1].items():
        np.testing.assert_allclose(lines[method], np.mean([one["accuracy"] for one in seeds], 0))


def test_mean_and_deviation_leave_out_what_is_not_there():
    mean, std = spread(np.asarray([[1.0, np.nan, np.nan], [4.0, 2.0, np.nan]]))
    np.testing.assert_allclose(mean, [2.5, 2.0, np.nan])
    np.testing.assert_allclose(std, [np.std([1, 4], ddof=1), 0, 0])


# --- files and mistakes ---------------------------------------------------------------------------------


def test_every_figure_has_two_files_and_a_caption(study, drawn):
    folder, lines = drawn
    text = (folder / "report.md").read_text()
    for name in pictures.PICTURES:
        assert (folder / f"{name}.png").stat().st_size > 1000 and (folder / f"{name}.pdf").is_file()
        assert f"![{name}]({name}.png)" in text
    assert f"wrote {folder / 'report.md'}" in lines and not any("not drawn" in line for line in lines)
    assert all(str(path) in text or path.name in text for path in study[0])


def test_what_was_not_recorded_is_said_and_an_old_figure_removed(study, drawn, tmp_path):
    told = []
    (tmp_path / "density.png").touch()
    run = fs.load(study[0][0])
    rows = [row for row in run.metrics if row.metric not in ("inertia_cosine", "inertia_displacement")]
    written = report.draw(dataclasses.replace(run, metrics=Table(rows)), tmp_path, tell=told.append)
    assert not (tmp_path / "density.png").exists() and tmp_path / "lines.png" in written
    assert [line.split(":")[0] for line in told if "not drawn" in line] == ["reference", "density"]
    assert "- reference was not drawn: " in (tmp_path / "report.md").read_text()
    assert "±" not in row_of(tmp_path, "fedavg")["inertia"]  # of one seed


def test_another_metric_takes_its_place(study, tmp_path):
    report.draw(study[0][:3], tmp_path, metric="inertia_cancellation")
    seeds = study[1]["fedavg"]
    means = [np.exp(np.log(one["inertia_cancellation"][3:]).mean(0)) for one in seeds]
    wanted = [1 - mean[1:3].min() / np.sqrt(mean[0] * mean[3]) for mean in means]
    assert row_of(tmp_path, "fedavg")["inertia"] == told(wanted)


def test_mistakes_are_said(study, tmp_path):
    run = fs.load(study[0][0])
    empty = dataclasses.replace(run, metrics=Table([Row(12, "accuracy", 0.5)]))
    for given, more, why in (
        (empty, {}, "--inertia.measure"),
        ([], {}, "no run to look at"),
        ([run, run], {}, "the same seed, 0"),
        (run, {"metric": "inertia_stepp"}, "no such metric"),
        (run, {"metric": "inertia_cosine"}, "beside every other"),
        (dataclasses.replace(run, rounds=5), {}, "fedjax-sim resume"),
        (dataclasses.replace(run, folder=None), {"out": None}, "in memory"),
        (tmp_path, {}, "holds no run"),
    ):
        with pytest.raises(UserError, match=why):
            report.draw(given, **({"out": tmp_path / "out"} | more))


def test_where_things_go(study, tmp_path):
    folders = [folder_of(tmp_path / "b" / f.name, config_of(f, METHODS["fedavg"], s), made_up("fedavg", s)[0])
               for s, f in enumerate(study[0][:2])]  # fmt: skip
    assert (
        home_of(folders[0], groups(folders[0]), "inertia", "figures/inertia")
        == folders[0] / "figures" / "inertia"
    )
    assert home_of(folders, groups(folders), "inertia", "figures/inertia") == tmp_path / "b" / "inertia"


def test_a_sweep_gives_its_finished_runs_by_method(tmp_path):
    file = tmp_path / "study.yaml"
    base = "{rounds: 12, partition: {clients: 6}, inertia: {measure: true}}"
    file.write_text(
        f"base: {base}\nmethods:\n  Mean: {{algorithm: fedavg}}\n  Other: {{algorithm: fedmr}}\n"
        f"seeds: [0, 1]\nout: {tmp_path / 'out'}\n"
    )
    with pytest.raises(UserError, match="none of its runs is finished"):
        groups(file)
    for job in sweep_files.read_sweep(file).jobs:
        if (job.method, job.seed) != ("Other", 1):
            where = type(tmp_path)(job.config.output.dir)
            folder_of(where, job.config, made_up("fedavg", job.seed)[0])
    found = groups(file)
    assert [(group.name, len(group.runs)) for group in found] == [("Mean", 2), ("Other", 1)]
    assert home_of(file, found, "inertia", "figures/inertia") == tmp_path / "out" / "inertia"


def test_command_passes_on_what_was_asked(monkeypatch, capsys):
    asked = []

    def draw(given, out, *, metric, tell):
        asked.append((given, out, metric))
        tell("wrote it")

    monkeypatch.setattr("fedjax_sim.reports.inertia.report.draw", draw)
    assert commands.main(["inertia", "a", "b", "--out", "c", "--metric=gradient_norm"]) == 0
    assert commands.main(["inertia", "a.yaml"]) == 0
    assert asked == [(["a", "b"], "c", "gradient_norm"), ("a.yaml", None, "inertia_step")]
    assert capsys.readouterr().out == "wrote it\n" * 2
    assert commands.main(["inertia", "--help"]) == 0 and "--metric NAME" in capsys.readouterr().out
    for words in (["a", "--outt", "b"], ["a", "--out"]):
        assert commands.main(["inertia", *words]) == 2 and words[1] in capsys.readouterr().err


# --- a real run -----------------------------------------------------------------------------------------


@pytest.mark.slow  # the others draw the same from made-up records
def test_a_real_run_of_lips_from_the_command_line(tmp_path, capsys):
    run = fs.run(config_of(tmp_path / "run", METHODS["lips"], 0))
    assert commands.main(["inertia", str(tmp_path / "run")]) == 0
    assert "not drawn" not in capsys.readouterr().out
    folder = tmp_path / "run" / "figures" / "inertia"
    assert {path.name for path in folder.iterdir()} == {
        *(f"{name}.{end}" for name in pictures.PICTURES for end in ("png", "pdf")),
        *("inertia.csv", "report.md"),
    }
    rows = list(csv.DictReader((folder / "inertia.csv").read_text().splitlines()))
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    assert layers == ["fc1", "fc2", "fc3", "fc4"]
    for row in rows:
        values = run.metrics.series(row["metric"], layer=row["layer"])
        assert float(row["mean"]) == pytest.approx(values[1][values[0] >= 4].mean(), rel=1e-12)
    rounds, gains = run.metrics.series("effectiveness_own")
    sparse, row = np.isin(rounds, [4, 7, 10]), row_of(folder, "lips")
    assert sparse.sum() == 3 and row["own, sparse"] == f"{gains[sparse].mean():.3f}"
    assert row["effectiveness own, dense"] == f"{gains[(rounds >= 4) & ~sparse].mean():.3f}"
    group = groups(run)[0]
    starts, planned = group.plan()
    assert dict(zip(starts.tolist(), planned, strict=True)) == pytest.approx(STARTS)
    recorded = run.metrics.series("lips_density")[1][starts - 1]
    total = 16 * 12 + 12 * 8
    assert ((planned - 2 / total <= recorded) & (recorded <= planned)).all()
