"""The page of a run, a sweep, or a study under way: what it says, and that it is whole in itself."""

import base64
import fcntl
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import fedjax_sim as fs
from fedjax_sim import config, records
from fedjax_sim.cli import commands
from fedjax_sim.core.errors import UserError
from fedjax_sim.engine.simulation import NonFiniteUpdate
from fedjax_sim.reports.page import curves, entries, facts, render
from fedjax_sim.runs import packs
from fedjax_sim.runs.federation import Simulation
from fedjax_sim.runs.folder import Folder
from fedjax_sim.studies import comparison, packing, sources
from tests.reports import studies

OLD = Path(__file__).parents[1] / "fixtures" / "b254fa7"


class Read(HTMLParser):
    """A page's text by the id of its section, what it refers to, and the data of its chart."""

    def __init__(self, text):
        super().__init__()
        self.sections, self.refers, self.chart, self.tags = {}, [], None, []
        self._section, self._script = "", None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.append((tag, found))
        if tag in ("section", "header", "footer"):
            self._section = found.get("id", tag)
        self._script = found.get("type", "own") if tag in ("script", "style") else None
        self.refers += [value for name, value in attrs if name in ("src", "href", "action", "data", "poster")]

    def handle_data(self, data):
        if self._script == "application/json":
            self.chart = json.loads(data)
        elif self._script is None:
            self.sections[self._section] = self.sections.get(self._section, "") + data

    def handle_endtag(self, tag):
        self._script = None

    def __getitem__(self, name):
        return " ".join(self.sections[name].split())


def read(path):
    return Read(Path(path).read_text())


def page_of(given, home, **named):
    return read(fs.report(given, home / "page.html", **named))


def test_an_old_run_with_the_probe_has_every_section(tmp_path):
    run = shutil.copytree(OLD / "peel" / "run", tmp_path / "run")
    path = fs.report(run)
    assert path == run / "report.html"
    page = read(path)
    assert {"curves", "numbers", "partition", "layers", "bytes", "time", "configuration", "repeat"} <= set(
        page.sections
    )
    assert "finished, 2 rounds" in page["header"] and "fedmr" in page["header"]
    assert "fedjax-sim run my.yaml" in page["repeat"] and "jax==0.10.1" in page["repeat"]
    assert "effective" not in page["bytes"] and "1 + 1" in page["bytes"]
    assert "of 10" in page["partition"]  # classes: digits are there to be counted
    assert any(tag == "img" and "layer" in found["alt"] for tag, found in page.tags)
    changed = [found for tag, found in page.tags if tag == "mark"]
    assert {"title": "default: 100"} in changed  # rounds


def test_the_page_fetches_nothing_and_is_small(tmp_path):
    path, sweep = studies.written(tmp_path)
    for job in sweep.jobs:
        studies.record(job)
    out = fs.report(path)
    assert out == tmp_path / "study" / "report.html" and out.stat().st_size < 300_000
    page = read(out)
    for place in page.refers:
        assert place.startswith(("data:", "#", "runs/")), place
        assert not place.startswith("runs/") or (out.parent / place).is_dir()
    style = "".join(re.findall(r"<style>(.*?)</style>", out.read_text(), re.S))
    assert "@import" not in style and "url(" not in style
    assert "default-src 'none'" in out.read_text()


def test_the_table_has_paired_differences_and_their_interval(tmp_path):
    path, sweep = studies.written(tmp_path, rounds_of_interest=[10])
    last = {(job.method, job.config.seed): studies.record(job) for job in sweep.jobs}
    table = page_of(path, tmp_path)["table"]
    value = {key: fs.load(folder).metrics.last("accuracy") for key, folder in last.items()}
    differences = [value["FedMR", seed] - value["FedAvg", seed] for seed in (0, 1, 2)]
    low, high = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    assert f"{np.mean(differences):+.4f} [{low:+.4f}, {high:+.4f}]" in table
    assert "up to round 10" in table and "(3)" in table


def test_an_interval_needs_two_values():
    assert comparison.interval([1.0]) is None
    low, high = comparison.interval([1.0, 2.0, 4.0]) or (0, 0)
    assert math.isclose(low + high, 14 / 3) and math.isclose(
        high - low, 2 * 4.302652729911275 * 0.881917103688197
    )


def test_names_are_text_wherever_they_stand(tmp_path):
    bad = "</script><b>&\"x'"
    path, sweep = studies.written(
        tmp_path, methods={"FedAvg": {"algorithm": "fedavg"}, bad: {"algorithm": "fedmr"}}
    )
    for job in sweep.jobs:
        studies.record(job)
    out = fs.report(path)
    page = read(out)
    assert bad in page["table"] and bad in page["runs"] and bad in page["header"]
    assert page.chart["rows"][1]["name"] == bad
    assert "<b>&" not in out.read_text() and not any(tag == "b" and found for tag, found in page.tags)


def decoded(text, kind="<f4"):
    return np.frombuffer(base64.b64decode(text), kind)


def test_a_value_that_is_not_finite_is_a_gap_and_a_warning(tmp_path):
    def rows(job, upto):
        yield from (r._replace(value=math.nan) if r.round == 8 and r.metric == "accuracy" else r
                    for r in studies.rows_of(job, upto))  # fmt: skip

    _, sweep = studies.written(tmp_path, seeds=[0])
    with pytest.warns(UserWarning, match="accuracy is nan"):
        folder = studies.record(sweep.jobs[0], rows=rows)
    page = page_of(folder, tmp_path)
    assert "accuracy was not finite once, first in round 8" in page["warnings"]
    accuracy = next(curve for curve in page.chart["curves"] if curve["m"] == 0)
    rounds, values = decoded(page.chart["rounds"][accuracy["x"]], "<i4"), decoded(accuracy["y"])
    assert page.chart["metrics"][0]["name"] == "accuracy"
    assert np.isnan(values[rounds == 8]).all() and np.isfinite(values[rounds != 8]).all()


def test_a_run_without_a_test_set_shows_what_it_has(tmp_path):
    def rows(job, upto):
        return (row for row in studies.rows_of(job, upto) if row.metric == "train_loss")

    _, sweep = studies.written(tmp_path, seeds=[0])
    page = page_of([studies.record(job, rows=rows) for job in sweep.jobs], tmp_path)
    assert [each["name"] for each in page.chart["metrics"]] == ["train_loss"]
    assert "Train_loss, last value" in page["table"]


def test_of_an_error_the_smaller_is_the_better(tmp_path):
    def rows(job, upto):
        return studies.rows_of(job, upto, "mse")

    _, sweep = studies.written(tmp_path)
    folders = [studies.record(job, rows=rows, headline="mse") for job in sweep.jobs]
    page = page_of(folders, tmp_path)
    best = [found for tag, found in page.tags if tag == "td" and found.get("class") == "best"]
    assert len(best) == 1 and page.chart["metrics"][0] == {"name": "mse", "label": "mse", "goal": "min"}
    assert any(
        tag == "small" and found.get("class") == "worse" for tag, found in page.tags
    )  # fedmr's is larger
    found = curves.gather(sources.find(folders[0]).entries, "mse")
    assert facts.numbers(found)[0].best.endswith("in round 2")


def test_runs_that_no_sweep_holds_together_are_named_by_what_differs(tmp_path):
    _, sweep = studies.written(tmp_path)
    page = page_of([studies.record(job) for job in sweep.jobs], tmp_path)
    assert "fedavg" in page["table"] and "fedmr" in page["table"] and "the first row" in page["table"]


def test_a_tile_says_that_the_value_is_the_last_one(tmp_path):
    path, sweep = studies.written(tmp_path)
    for job in sweep.jobs:
        studies.record(job)
    header = page_of(path, tmp_path)["header"]
    assert "highest last accuracy: FedMR" in header and "best accuracy" not in header


def test_runs_on_different_data_sets_have_no_highest_and_a_caution(tmp_path):
    _, sweep = studies.written(tmp_path)
    folders = [studies.record(job) for job in sweep.jobs]
    for folder in folders[3:]:
        about = json.loads((folder / "provenance.json").read_text())
        about["partition"]["dataset"] = "others"
        (folder / "provenance.json").write_text(json.dumps(about))
    page = page_of(folders, tmp_path)
    assert "highest" not in page["header"] and "last accuracy" not in page["header"]
    assert "on different data sets (digits, others): their values of accuracy are not" in " ".join(
        page.sections.values()
    )


def test_a_long_title_says_how_many_runs_there_are(tmp_path):
    methods = {f"a method with a long name, number {n}": {"local.lr": 0.1 + n} for n in range(4)}
    path, sweep = studies.written(tmp_path, methods=methods, seeds=[0], reference=None)
    for job in sweep.jobs:
        studies.record(job)
    page = page_of(path, tmp_path)
    assert "study: 4 runs" in page["header"] and "number 3" in page["table"]


def test_a_packed_sweep_has_the_same_page(tmp_path):
    path, sweep = studies.written(tmp_path)
    for job in sweep.jobs:
        studies.record(job)
    before = page_of(path, tmp_path)
    packing.pack(sweep)
    assert packs.Pack(sweep.out / "runs").names()
    for given in (path, sweep.out):
        after = page_of(given, tmp_path)
        assert "all 6 runs finished" in after["header"]
    after = page_of(path, tmp_path)
    assert after["table"] == before["table"] and after.chart == before.chart


def test_a_study_under_way_says_how_far_it_is(tmp_path):
    path, sweep = studies.written(tmp_path)
    studies.record(sweep.jobs[0])
    half = studies.record(sweep.jobs[1], upto=15)
    page = page_of(path, tmp_path)
    assert "1 of 6 runs finished, 1 under way, 4 to come" in page["header"]
    assert any(tag == "progress" and found["value"] == "0.2500" for tag, found in page.tags)
    assert "15/30" in page["runs"] and "Runs are missing" in page["table"]
    for name in ("journal.jsonl", "timing.csv", "config.yaml"):
        os.utime(half / name, (time.time() - 3600,) * 2)
    page = page_of(half, tmp_path)
    assert "not finished: round 15 of 30, and no process works on it here" in page["header"]
    assert "fedjax-sim resume" in page["repeat"]
    with (half / ".lock").open("w") as lock:  # as the process of a run does
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = entries.state_of(fs.load(half))
    if Path("/proc/locks").exists():
        assert found.kind == "running" and found.words.startswith(
            "under way, round 15 of 30, about 0.3 s left"
        )


def test_how_to_repeat_it_installs_this_package_and_what_decoded_the_pictures(tmp_path):
    path, sweep = studies.written(tmp_path, seeds=[0])
    studies.record(sweep.jobs[0])
    assert "pip install fedjax-sim==0.1.0 jax==0.10.1 jaxlib==0.10.1" in page_of(path, tmp_path)["repeat"]
    versions = {"python": "3.11.7", "fedjax-sim": "0.1.0", "jax": "0.10.1", "jaxlib": "0.10.1"}
    studies.record(sweep.jobs[1], versions={**versions, "pillow": "12.0.0"})
    page = page_of(path, tmp_path)
    assert "jaxlib==0.10.1 pillow==12.0.0" in page["repeat"]
    assert "different sets of versions" not in " ".join(page.sections.get("warnings", "").split())


def test_a_study_at_rest_is_not_called_under_way_and_its_head_names_model_and_data(tmp_path):
    path, sweep = studies.written(tmp_path)
    page = page_of(path, tmp_path)  # nothing has begun
    assert "mlp on digits, 12 clients" in page["header"]
    half = studies.record(sweep.jobs[0], upto=15)
    page = page_of(path, tmp_path)
    assert "mlp on digits, 12 clients" in page["header"] and "Some runs" not in page["curves"]
    studies.record(sweep.jobs[2], upto=9)
    assert "Some runs are under way: where seeds" in page_of(path, tmp_path)["curves"]
    for folder in (half, Path(str(sweep.jobs[2].config.output.dir))):
        for name in ("journal.jsonl", "timing.csv", "config.yaml"):
            os.utime(folder / name, (time.time() - 3600,) * 2)
    assert "Some runs are not finished: where seeds" in page_of(path, tmp_path)["curves"]
    assert "Some runs" not in page_of(half, tmp_path)["curves"]


@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="the system does not tell of locks")
def test_a_run_whose_process_was_killed_here_is_not_under_way(tmp_path):
    _, sweep = studies.written(tmp_path)
    half = studies.record(sweep.jobs[1], upto=15)
    assert entries.state_of(fs.load(half)).kind == "running"  # by its records, which are new
    with Folder(half).claimed(to_run=True):
        assert entries.state_of(fs.load(half)).kind == "running"
        with pytest.raises(UserError, match="another process"), Folder(half).claimed(to_run=True):
            pass
        assert (half / ".lock").read_text()
    found = entries.state_of(fs.load(half))
    assert found.kind == "cut" and found.words.startswith(
        "not running: round 15 of 30; go on with: fedjax-sim"
    )
    (half / ".lock").write_text("another machine")
    assert entries.state_of(fs.load(half)).kind == "running"


def test_a_run_that_diverged_says_so_in_its_folder_until_it_goes_on(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    config = fs.RunConfig(
        rounds=2,
        partition=fs.data.PartitionConfig(kind="iid", clients=4),
        cohort=fs.CohortConfig(size=2),
        local=fs.LocalConfig(epochs=1, batch_size=64),
        execution=fs.ExecutionConfig(devices=1),
        output=fs.OutputConfig(dir=str(folder), figures=False),
    )

    def diverge(self, number, *_):
        raise NonFiniteUpdate("local.non_finite", "stop", f"round {number} was not finite", "Lower local.lr.")

    with monkeypatch.context() as broken:
        broken.setattr(Simulation, "_told", diverge)
        with pytest.raises(NonFiniteUpdate, match="run it again from the first round"):
            fs.run(config)
    found = entries.state_of(fs.load(folder))
    assert found.kind == "failed"
    assert found.words.startswith("failed at round 0 of 2: local.non_finite") and "local.lr" in found.words
    assert "round 1 was not finite" in page_of(folder, tmp_path)["header"]
    fs.resume(folder)
    assert Folder(folder).failure == "" and entries.state_of(fs.load(folder)).kind == "finished"


def test_what_failed_is_told_first(tmp_path):
    path, sweep = studies.written(tmp_path)
    for job in sweep.jobs[:-1]:
        studies.record(job)
    failed = sweep.jobs[-1]
    about = {"folder": str(Path(str(failed.config.output.dir)).relative_to(sweep.out))}
    (sweep.out / "sweep.json").write_text(
        json.dumps({"jobs": [{**about, "failure": "NonFinite: <round> 3"}]})
    )
    page = page_of(path, tmp_path)
    assert "FedMR, seed 2: failed: NonFinite: <round> 3" in page["warnings"]
    assert "5 of 6 runs finished, 1 failed" in page["header"]


def test_a_damaged_run_is_one_clear_error_and_in_a_sweep_one_line(tmp_path, capsys):
    path, sweep = studies.written(tmp_path)
    for job in sweep.jobs:
        folder = studies.record(job)
    (folder / "metrics.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(UserError, match="cannot be read"):
        fs.report(folder)
    assert commands.main(["report", str(folder)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    page = page_of(path, tmp_path)
    assert "cannot be read" in page["warnings"] and "1 damaged" in page["header"]


@pytest.mark.parametrize("given", ["nowhere", "."])
def test_what_is_no_run_is_refused(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no such file|neither a run nor a sweep"):
        fs.report(given)


def test_what_python_gave_has_to_be_given_again(tmp_path):
    _, sweep = studies.written(tmp_path, seeds=[0])
    folder = studies.record(sweep.jobs[0])
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("given: {}", "given: {dataset: my <photos>}"))
    page = page_of(folder, tmp_path)
    assert "dataset (my <photos>)" in page["repeat"] and "dataset=…" in page["repeat"]


def test_a_run_in_memory_needs_a_place(tmp_path):
    run = fs.load(OLD / "fedavg" / "run")
    memory = fs.Run(**{**{f: getattr(run, f) for f in run.__dataclass_fields__}, "folder": None})
    with pytest.raises(UserError, match="out"):
        fs.report(memory)
    assert "finished" in page_of(memory, tmp_path)["header"]


def test_clients_a_second_go_by_sums_without_the_first_call():
    costs = [3.0, 3.0, *[0.9, 0.1] * 4, 0.1, 0.1]
    laps = [records.Lap(n, seconds, 0.0, 5) for n, seconds in enumerate(costs, 1)]
    assert records.pace(laps) == pytest.approx((0.42, 5 / 0.42))
    assert records.pace(laps[:2]) is None and records.pace([]) is None
    assert records.pace(laps[1:2] + laps[2:4]) == pytest.approx((0.5, 10))


def test_long_curves_are_thinned_and_the_page_says_so():
    rounds = np.arange(1, 5001, dtype=np.int32)
    one = {(m, "a", ""): curves.Curve(rounds, rounds / 5000, None, 1) for m in ("accuracy", "loss")}
    found = curves.Curves(("accuracy", "loss"), ("a",), ("",), one)
    told, notes = curves.packed(found, budget=2100)
    kept = decoded(told["rounds"][0], "<i4")
    assert len(kept) == 1000 and kept[-1] == 5000 and set(np.diff(kept)) == {5}
    assert np.allclose(decoded(told["curves"][0]["y"]), kept / 5000)
    assert any("of up to 5 recorded rounds one is drawn" in note for note in notes)
    told, notes = curves.packed(found, budget=70)
    assert [each["name"] for each in told["metrics"]] == ["accuracy"]
    assert any("1 of 2 metrics are left out" in note for note in notes)


def test_means_and_deviations_are_over_the_seeds_that_have_the_round(tmp_path):
    _, sweep = studies.written(tmp_path, methods={"FedAvg": {"algorithm": "fedavg"}})
    folders = [studies.record(job, upto=None if job.config.seed else 10) for job in sweep.jobs]
    values = [dict(zip(*fs.load(folder).metrics.series("accuracy"), strict=True)) for folder in folders]
    curve = curves.gather(sources.find(folders).entries, "accuracy").curves["accuracy", "fedavg", ""]
    for number, mean, deviation in zip(curve.rounds, curve.mean, curve.deviation, strict=True):
        own = [one[number] for one in values if number in one]
        assert len(own) == (3 if number <= 10 else 2)
        assert np.isclose(mean, np.mean(own)) and np.isclose(deviation, np.std(own, ddof=1))


def test_the_command_line(tmp_path, capsys):
    _, sweep = studies.written(tmp_path, seeds=[0])
    folder = studies.record(sweep.jobs[0])
    assert commands.main(["report", str(folder), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").is_file() and "wrote" in capsys.readouterr().out
    assert commands.main(["report", str(folder), "--watch"]) == 0  # it is finished: written once
    assert commands.main(["report", "--watch", "0", str(folder)]) == 2
    assert commands.main(["report", "--help"]) == 0 and "--watch" in capsys.readouterr().out


def test_watching_writes_anew_until_all_is_over(tmp_path):
    path, sweep = studies.written(tmp_path, seeds=[0], methods={"FedAvg": {"algorithm": "fedavg"}})
    folder = studies.record(sweep.jobs[0], upto=10)
    told = []

    def go_on():
        while not told:
            time.sleep(0.02)
        first = (sweep.out / "report.html").read_text()
        assert 'data-refresh="1"' in first and "round 10 of 30" in first
        table = records.Table(list(studies.rows_of(sweep.jobs[0], 30)))
        records.write_parquet(table, folder / "metrics.parquet")

    other = threading.Thread(target=go_on)
    other.start()
    out = fs.report(path, watch=0.05, tell=told.append)
    other.join()
    assert len(told) >= 2 and "data-refresh=" not in out.read_text() and "all 1 runs" not in out.read_text()
    assert "finished, 30 rounds" in read(out)["header"]


def test_runs_that_begin_later_come_onto_the_page_of_a_folder(tmp_path):
    _, sweep = studies.written(tmp_path, seeds=[0])
    studies.record(sweep.jobs[0])
    told = []

    def go_on():
        while not told:
            time.sleep(0.02)
        studies.record(sweep.jobs[1])
        while len(told) < 2 or "2 runs" not in (sweep.out / "report.html").read_text():
            time.sleep(0.02)
        # As a sweep does at its end.
        jobs = [
            {
                "method": job.method,
                "setting": {},
                "seed": 0,
                "folder": str(Path(str(job.config.output.dir)).relative_to(sweep.out)),
                "config": config.to_dict(job.config),
            }
            for job in sweep.jobs
        ]
        (sweep.out / "sweep.json").write_text(json.dumps({"jobs": jobs, "reference": "FedAvg"}))

    other = threading.Thread(target=go_on)
    other.start()
    page = read(fs.report(sweep.out, watch=0.05, tell=told.append))
    other.join()
    assert "all 2 runs finished" in page["header"] and "FedMR" in page["table"]


def test_ctrl_c_leaves_a_page_that_rests(tmp_path, monkeypatch):
    _, sweep = studies.written(tmp_path, seeds=[0])
    folder = studies.record(sweep.jobs[0], upto=10)

    def interrupt(seconds):
        assert "data-refresh" in (folder / "report.html").read_text()
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupt)
    out = fs.report(folder, watch=5)
    assert "data-refresh=" not in out.read_text() and "round 10 of 30" in read(out)["header"]


def test_a_sweep_and_a_run_share_a_page(tmp_path):
    path, sweep = studies.written(tmp_path)
    for job in sweep.jobs:
        studies.record(job)
    _, other = studies.written(tmp_path, "other", seeds=[7], methods={"FedAvg": {"algorithm": "scaffold"}})
    page = page_of([path, studies.record(other.jobs[0])], tmp_path)
    assert "study: FedMR" in page["table"] and "scaffold" in page["table"] and "7 runs" in page["header"]


def test_no_device_is_touched(tmp_path):
    """Another process may have them all, as a run under way has."""
    code = (
        "import sys, fedjax_sim as fs\n"
        "from jax._src import xla_bridge\n"
        "fs.report(sys.argv[1], sys.argv[2])\n"
        "assert not xla_bridge.backends_are_initialized()\n"
    )
    words = [sys.executable, "-c", code, str(OLD / "peel" / "run"), str(tmp_path / "page.html")]
    subprocess.run(words, check=True)


def test_every_section_of_the_menu_is_on_the_page(tmp_path):
    path, sweep = studies.written(tmp_path)
    for job in sweep.jobs:
        studies.record(job)
    page = page_of(path, tmp_path)
    ids = {found["id"] for tag, found in page.tags if tag == "section"}
    assert {place[1:] for place in page.refers if place.startswith("#")} == ids
    assert render.UPLOT in (render.HOME / "uPlot.iife.min.js").read_text()[:200]
