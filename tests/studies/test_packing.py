"""Records in a pack are those of the folders that they came from, whoever reads them, whatever goes wrong."""

import dataclasses
import json
import math
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import fedjax_sim as fs
from fedjax_sim import cli, records, runs
from fedjax_sim import config as config_lib
from fedjax_sim.core.errors import UserError
from fedjax_sim.records import Lap, Row, Table
from fedjax_sim.reports import shared as reports
from fedjax_sim.reports.inertia import report as inertia_report
from fedjax_sim.runs import packs
from fedjax_sim.runs.folder import Folder
from fedjax_sim.runs.packs import Pack
from fedjax_sim.studies import packing, sweep, tables

FOUR = ("config.yaml", "metrics.parquet", "provenance.json", "timing.csv")
BASE = {
    "rounds": 3,
    "partition": {"kind": "dirichlet", "clients": 8, "alpha": 1.0},
    "model": {"options": {"hidden": [8]}},
    "execution": {"devices": 1},
    "inertia": {"measure": True},
}
METHODS = {"FedAvg": {"algorithm": "fedavg"}, "FedMR, 1": {"algorithm": {"name": "fedmr", "first_stage": 1}}}


def asked(out, **changes):
    grid = {"partition.alpha": [0.5, 1.0]}
    mapping = {"base": BASE, "methods": METHODS, "grid": grid, "seeds": [0, 1], "reference": "FedAvg"}
    return sweep.from_mapping({**mapping, "out": str(out), **changes})


def rows_of(job):
    draw = np.random.default_rng([job.seed, len(job.method)])
    for number in (1, 2, 3):
        yield Row(number, "accuracy", draw.uniform())
        for client in (5, 2):
            yield Row(number, "client_accuracy", draw.uniform(), client=client)
        for layer in ("fc1", "fc2", "fc3"):
            yield Row(number, "inertia_step", draw.uniform(0.1, 1), layer=layer)
    yield Row(3, "nonfinite/loss", 0.0, state="after")


def finish(job):
    """A finished run's folder, as far as reading it needs it."""
    where = Path(str(job.config.output.dir))
    where.mkdir(parents=True)
    partition = {"clients": 8, "kind": "dirichlet", "alpha": 1.0, "dataset": "digits", "crc32": job.seed}
    about = {"versions": {"jax": "0.10.1"}, "data": {"name": "digits"}, "partition": partition}
    about["config"] = config_lib.to_dict(job.config)
    laps = [Lap(n, 1.5 + job.seed, math.nan if n == 1 and job.seed else 0.25 * n, 8) for n in (1, 2, 3)]
    (where / "provenance.json").write_text(json.dumps(about, indent=2) + "\n")
    (where / "config.yaml").write_text(config_lib.dump(job.config))
    (where / "timing.csv").write_text(records.timing(laps))
    records.write_parquet(Table(rows_of(job)), where / "metrics.parquet")
    return where


@pytest.fixture
def study(tmp_path):
    """A sweep of eight runs, all finished."""
    made = asked(tmp_path / "study")
    for job in made.jobs:
        finish(job)
    return made


def contents(folder):
    """Path -> bytes of all files below, locks aside."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def loaded(made):
    """Everything that is read of each run of a sweep."""
    out = []
    for job in made.jobs:
        run = fs.load(str(job.config.output.dir))
        known = (run.config, run.folder, dict(run.recipe), run.seconds, run.cpu_seconds, run.rounds)
        out.append((*known, run.title, list(run.metrics), run.metrics.names(), run.finished))
    return out


def never(*arguments, **more):
    raise AssertionError("a finished run was run again")


# --- what is packed is what comes out -----------------------------------------------------------------

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
any_row = st.builds(Row, st.integers(1, 5), text, st.floats(), text, st.integers(-1, 5000), text)
any_lap = st.builds(
    Lap,
    st.integers(1, 9),
    st.integers(0, 10**10).map(lambda n: n / 10**6),
    st.one_of(st.just(math.nan), st.integers(0, 10**10).map(lambda n: n / 10**6)),
    st.integers(1, 500),
)
any_value = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=5,
)
any_facts = st.dictionaries(st.sampled_from("abcde"), any_value, max_size=4)


@dataclasses.dataclass
class Made:
    """Records of a run that was never made."""

    rows: list
    times: list
    facts: dict
    seed: int = 0

    def settings(self):
        return config_lib.to_dict(self.config())

    def config(self):
        return fs.RunConfig(seed=self.seed, rounds=5, algorithm=fs.FedMR(first_stage=self.seed))

    def provenance(self):
        return self.facts

    def laps(self):
        return self.times

    def reached(self):
        return max((row.round for row in self.rows), default=0)

    def read(self, rounds):
        return Table(self.rows), self.reached()


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["a/base/seed0", "a/base/seed1", "b,_c/x=0.5/seed0", "ä"]),
        st.builds(
            Made, st.lists(any_row, max_size=12), st.lists(any_lap, max_size=4), any_facts, st.integers(0, 9)
        ),
        min_size=1,
    )
)
def test_a_pack_holds_rows_times_and_facts_as_they_are(made):
    """NaN, infinities, -0.0, clients, layers, any text; settings that all runs share and others."""
    with tempfile.TemporaryDirectory() as folder:
        pack = Pack(Path(folder) / "runs")
        pack.write(made)
        assert pack.names() == list(made)
        for name, source in made.items():
            found = packs.find(Path(folder) / "runs" / name)
            assert found is not None and packs.differing(source, found) == ""
            table, number = found.read(5)
            want = Table(source.rows)
            assert table.column("value").tobytes() == want.column("value").tobytes()
            assert [tuple(row)[:2] + tuple(row)[3:] for row in table] == [
                tuple(row)[:2] + tuple(row)[3:] for row in source.rows
            ]
            assert table.names() == want.names() and number == found.reached() == source.reached()
            assert records.timing(found.laps()) == records.timing(source.times)
            assert found.provenance() == source.facts and found.config() == source.config()


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"rows": [Row(1, "loss", 0.5), Row(1, "loss", -0.0)]}, "metrics"),
        ({"rows": [Row(1, "loss", 0.5)]}, "metrics"),
        ({"rows": [Row(1, "loss", 0.5, layer="x"), Row(1, "loss", 0.0)]}, "metrics"),
        ({"times": [Lap(1, 2.0, 1.0, 8)]}, "times"),
        ({"facts": {"a": 1.0}}, "provenance"),
        ({"facts": {"a": True}}, "provenance"),
        ({"seed": 1}, "configuration"),
    ],
)
def test_records_that_differ_anywhere_differ(other, told):
    one = Made([Row(1, "loss", 0.5), Row(1, "loss", 0.0)], [Lap(1, 2.0, math.nan, 8)], {"a": 1})
    assert packs.differing(one, one) == "" and packs.differing(one, dataclasses.replace(one, **other)) == told


def test_what_json_cannot_hold_is_refused_and_nothing_changes(study):
    before = contents(study.out)
    with pytest.raises(UserError, match="its provenance cannot be packed without loss"):
        Pack(study.out / "runs").write({"a": Made([], [], {"own": {1: 2}})})
    assert contents(study.out) == before


def test_packed_and_unpacked_a_study_is_what_it_was(study):
    before, known = contents(study.out), loaded(study)
    done = sweep.pack(study)
    assert sorted(contents(study.out)) == ["runs.json", "runs.parquet"] and len(done.runs) == 8
    assert list(study.out.iterdir()) and not (study.out / "runs").exists()
    assert loaded(study) == known and "packed 8 runs" in done.report()
    assert sweep.pack(study).before == 8  # again: nothing to do
    back = sweep.unpack(study)
    after = contents(study.out)
    assert after.keys() == before.keys() and loaded(study) == known and "again" in back.report()
    for name, content in before.items():
        if name.endswith("json"):
            assert json.loads(after[name]) == json.loads(content)
        elif name.endswith("yaml"):
            assert yaml.safe_load(after[name]) == yaml.safe_load(content)
        else:
            assert after[name] == content, name
    with pytest.raises(UserError, match="no packed runs"):
        sweep.unpack(study)


# --- who reads it -------------------------------------------------------------------------------------


def test_tables_curves_and_reports_are_the_same_bytes_from_a_pack(tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")  # Matplotlib writes the time into a PDF
    monkeypatch.setattr(runs, "run_prepared", never)
    mapping = {"base": BASE, "methods": METHODS, "seeds": [0, 1], "out": str(tmp_path / "study")}
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(mapping))
    study = sweep.load(file)
    given = [str(finish(job)) for job in study.jobs]

    def draw(home):
        home.mkdir()
        assert not sweep.run(study).failures
        for name in ("table.md", "table.csv", "table.tex", "curves.png", "curves.pdf"):
            (study.out / name).rename(home / name)
        inertia_report.draw(str(file), home / "inertia")
        texts = {str(these): tables.compare(these).csv() for these in (str(file), given)}
        return (
            contents(home),
            texts,
            reports.home_of(given[0], reports.groups(given[0]), "", "figures/inertia"),
        )

    from_folders = draw(tmp_path / "folders")
    assert len(from_folders[0]) > 10
    sweep.pack(study)
    assert draw(tmp_path / "pack") == from_folders


def test_a_sweep_goes_on_from_its_pack(tmp_path, monkeypatch):
    study = asked(tmp_path / "study", grid={})
    *others, last = study.jobs
    for job in others:
        finish(job)
    done = sweep.pack(study)
    assert (
        len(done.runs) == 3
        and done.left == {last.name: "not finished"}
        and "1 runs are not finished" in done.report()
    )
    started, told = [], []

    def start(config, dataset, partition):
        started.append(config)
        finish(last)
        return runs.load(config.output.dir)

    monkeypatch.setattr(runs, "run_prepared", start)
    assert not sweep.run(study, told.append).failures
    assert started == [last.config]
    assert [line.split(": ")[-1].split(",")[0] for line in told] == ["finished before"] * 3 + ["run"]
    known = loaded(study)
    done = sweep.pack(study)
    assert (len(done.runs), done.before) == (1, 3) and not (study.out / "runs").exists()
    monkeypatch.setattr(runs, "run_prepared", never)
    for part in ((1, 2), (2, 2)):
        outcome = sweep.run(study, part=part)
        assert not outcome.failures and not outcome.left
    assert loaded(study) == known


def test_sweeps_that_share_a_folder_share_its_pack(study):
    known = loaded(study)
    more = asked(study.out, methods={"FedProx": {"algorithm": "fedprox"}}, reference=None, seeds=[0])
    for job in more.jobs:
        finish(job)
    assert len(sweep.pack(more).runs) == 2 and len(list((study.out / "runs").rglob("config.yaml"))) == 8
    assert len(sweep.pack(study).runs) == 8 and len(Pack(study.out / "runs").names()) == 10
    assert loaded(study) == known and len(loaded(more)) == 2


def test_a_study_may_be_moved(study, tmp_path, monkeypatch):
    known = [rows for *_, rows, _, _ in loaded(study)]
    sweep.pack(study)
    study.out.rename(tmp_path / "elsewhere")
    moved = asked(tmp_path / "elsewhere")
    monkeypatch.setattr(runs, "run_prepared", never)
    assert [rows for *_, rows, _, _ in loaded(moved)] == known and not sweep.run(moved).failures


def test_a_packed_run_of_other_settings_is_refused_as_in_a_folder(study):
    changed = asked(study.out, base={**BASE, "local": {"lr": 0.5}})
    wanted = "it holds 8 runs of other settings, .*: local.lr is 0.01, not 0.5"
    with pytest.raises(UserError, match=wanted):
        sweep.run(changed)
    with pytest.raises(UserError, match=r"none of its runs can be packed: .*other settings: local.lr"):
        sweep.pack(changed)
    sweep.pack(study)
    with pytest.raises(UserError, match=f"{wanted}.*--unpack"):
        sweep.run(changed)


def test_a_run_does_not_start_where_one_is_packed_nor_goes_on(study):
    sweep.pack(study)
    job = study.jobs[0]
    where = str(job.config.output.dir)
    with pytest.raises(UserError, match=r"already holds a run \(finished\).*runs.json"):
        Folder(where).check_new()
    assert runs.resume(where).finished
    with pytest.raises(UserError, match="--unpack"):
        runs.resume(where, rounds=9)
    with pytest.raises(UserError, match=r"no sound checkpoint.*are packed: run that run of its study again"):
        runs.restored(where)
    with pytest.raises(UserError, match="there is no such folder"):
        fs.load(Path(where).with_name("seed9"))


# --- what is not packed -------------------------------------------------------------------------------


def test_all_but_the_records_stays_and_is_told(study):
    folders = [Path(str(job.config.output.dir)) for job in study.jobs[:3]]
    for folder in folders:
        for name in ("checkpoints/3/model/0", "figures/curves.png", "notes.txt", "partition.json"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(name)
        (folder / ".lock").touch()
    others = {name: content for name, content in contents(study.out).items() if Path(name).name not in FOUR}
    assert len(others) == 12
    report = sweep.pack(study).report()
    assert "left where it was" in report
    assert all(f"{name} (3)" in report for name in ("checkpoints", "figures", "notes.txt", "partition.json"))
    kept = contents(study.out)
    assert {name: kept[name] for name in others} == others and len(kept) == 14
    assert Folder(folders[0]).checkpoints.is_dir() and Folder(folders[0]).partition.is_file()
    sweep.unpack(study)
    assert {name: contents(study.out)[name] for name in others} == others


def test_unfinished_busy_changed_and_damaged_runs_stay_in_their_folders(study):
    folders = [Path(str(job.config.output.dir)) for job in study.jobs]
    records.write_parquet(Table(list(rows_of(study.jobs[0]))[:3]), folders[0] / "metrics.parquet")
    text = (folders[1] / "config.yaml").read_text()
    (folders[1] / "config.yaml").write_text(text.replace(" lr: 0.01", " lr: 0.3"))
    (folders[2] / "metrics.parquet").write_text("version https://git-lfs.github.com/spec/v1\n")
    before = contents(study.out)
    with Folder(folders[3]).claimed():
        done = sweep.pack(study)
    whys = [done.left[job.name] for job in study.jobs[:4]]
    expected = (
        "not finished",
        "other settings: local.lr is 0.3, not 0.01",
        "cannot be read",
        "another process",
    )
    assert all(part in why for part, why in zip(expected, whys, strict=True)) and len(done.runs) == 4
    after = contents(study.out)
    for folder in folders[:4]:
        for name in FOUR:
            path = str((folder / name).relative_to(study.out))
            assert after[path] == before[path]
    assert "1 runs are not finished" in done.report() and "cannot be read" in done.report()


def test_a_run_in_both_places_that_differs_is_refused(study):
    sweep.pack(study)
    where = finish(study.jobs[0])
    assert sweep.pack(study).before == 7 and not where.exists()  # alike: one of them is enough
    where = finish(study.jobs[0])
    (where / "timing.csv").write_text(records.timing([Lap(1, 9.0, 9.0, 8)]))
    before = contents(study.out)
    for act in (sweep.pack, sweep.unpack):
        with pytest.raises(UserError, match="they differ in their times"):
            act(study)
    assert {name: contents(study.out)[name] for name in before} == before


def test_a_damaged_pack_is_an_error_and_no_reason_to_run_again(study, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "run_prepared", never)
    sweep.pack(study)
    pack = Pack(study.out / "runs")
    sound = contents(study.out)
    for content in ("<<<<<<< ours\n", "{}", "[]", '{"format": 9}', '{"format": 1, "shared": [], "runs": {}}'):
        pack.about.write_text(content)
        with pytest.raises(UserError, match=r"runs.json"):
            sweep.run(study)
    pack.about.write_bytes(sound["runs.json"])
    pack.table.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match=r"runs.parquet.*cannot be read"):
        fs.load(str(study.jobs[0].config.output.dir))
    # Another program's runs.json, beside somebody's folder `runs`.
    (tmp_path / "runs.json").write_text("[1]")
    assert not Folder(tmp_path / "runs" / "first").started


# --- a process that dies ------------------------------------------------------------------------------


class Dead(BaseException):
    pass


@pytest.mark.parametrize("act", [sweep.pack, sweep.unpack])
def test_a_process_killed_at_any_moment_loses_nothing(tmp_path, monkeypatch, act):
    """It dies before each call that changes a name on the disk, in turn; then the same command goes on."""
    whole = asked(tmp_path / "template", grid={}, seeds=[0])
    (finish(whole.jobs[0]) / "checkpoints").mkdir()
    sweep.pack(whole)
    finish(whole.jobs[1])
    if act is sweep.unpack:
        sweep.pack(whole)
    calls, limit = 0, math.inf

    def deadly(real):
        def call(*arguments, **more):
            nonlocal calls
            if calls >= limit:
                raise Dead
            calls += 1
            return real(*arguments, **more)

        return call

    for place, name in ((os, "replace"), (os, "unlink"), (Path, "unlink"), (Path, "rename"), (Path, "rmdir")):
        monkeypatch.setattr(place, name, deadly(getattr(place, name)))

    def fresh(number):
        nonlocal calls, limit
        shutil.copytree(whole.out, tmp_path / str(number))
        calls, limit = 0, number
        return asked(tmp_path / str(number), grid={}, seeds=[0])

    made = fresh(10**6)
    limit, known = math.inf, [run[5:] for run in loaded(made)]
    calls = 0
    act(made)
    needed, result = calls, sorted(contents(made.out))
    assert needed > 8
    for number in range(needed):
        made = fresh(number)
        with pytest.raises(Dead):
            act(made)
        limit = math.inf
        assert [run[5:] for run in loaded(made)] == known, f"killed before call {number}"
        if Pack(made.out / "runs").names() or act is sweep.pack:
            act(made)
        assert [run[5:] for run in loaded(made)] == known
        left = [name for name in contents(made.out) if not name.endswith(".part")]
        assert left == result or act is sweep.unpack


def test_a_full_disk_leaves_folders_and_an_older_pack_as_they_were(study, monkeypatch):
    last = study.jobs[-1]
    shutil.rmtree(str(last.config.output.dir))
    sweep.pack(study)
    finish(last)
    before = contents(study.out)

    def full(*arguments, **more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedjax_sim.runs.packs.pq.ParquetWriter", full)
    with pytest.raises(UserError, match=r"No space left.*same command again"):
        sweep.pack(study)
    assert contents(study.out) == before


# --- the command line ---------------------------------------------------------------------------------


def test_commands_pack_and_unpack(study, tmp_path, capsys):
    file = tmp_path / "study.yaml"
    mapping = {"base": BASE, "methods": METHODS, "grid": {"partition.alpha": [0.5, 1.0]}, "seeds": [0, 1]}
    file.write_text(yaml.safe_dump({**mapping, "out": str(study.out)}))
    one = str(study.jobs[0].config.output.dir)
    assert cli.main(["compare", one]) == 0
    before = capsys.readouterr().out
    assert cli.main(["sweep", str(file), "--pack"]) == 0
    assert "packed 8 runs" in capsys.readouterr().out and not Path(one).exists()
    assert cli.main(["compare", one]) == 0 and capsys.readouterr().out == before
    for words in (["--pack", "--unpack"], ["--pack", "--part", "1/2"], ["--unpack", "--part=1/2"]):
        assert cli.main(["sweep", str(file), *words]) == 2
        assert "exclude each other" in capsys.readouterr().err
    assert cli.main(["sweep", str(file), "--unpack"]) == 0 and Path(one).is_dir()
    assert "folders again" in capsys.readouterr().out
    empty = asked(tmp_path / "empty")
    with pytest.raises(UserError, match="no such folder"):
        packing.pack(empty)
    empty.out.mkdir()
    with pytest.raises(UserError, match="none of its runs is finished"):
        packing.pack(empty)
    with Folder(study.out).drawn_into("packing it"), pytest.raises(UserError, match="process is packing it"):
        packing.pack(study)
