"""Finished runs are looked at by one command, from their folders alone; gaps and mistakes are told."""

import csv
import dataclasses
import itertools
import shutil
import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

import fedjax_sim as fs
from fedjax_sim.algorithms import FedAvg, FedIndep, FedMR, Local
from fedjax_sim.cli import commands
from fedjax_sim.core.errors import UserError
from fedjax_sim.reports.landscape import pictures, report
from fedjax_sim.reports.landscape.measurement import Settings, measure, trained
from fedjax_sim.runs import restored

# Of all models of a cohort, as below: one program trains them.
QUICK = Settings(
    points=5, grid=3, samples=90, lanczos=4, eigenvalues=2, probes=2, ascent=2, draws=2, models=4
)
WORDS = [f"--{name}={value}" for name, value in dataclasses.asdict(QUICK).items()]


def config_of(where, algorithm, seed=0, **more):
    return fs.RunConfig(
        **{
            "seed": seed,
            "rounds": 2,
            "algorithm": algorithm,
            "partition": fs.PartitionConfig(kind="dirichlet", alpha=0.5, clients=6),
            "model": fs.ModelConfig("mlp", options={"hidden": [6]}),
            "local": fs.LocalConfig(epochs=None, steps=4, batch_size=20, lr=0.1),
            "cohort": fs.CohortConfig(size=4),
            "evaluation": fs.EvaluationConfig(every=2),
            "execution": fs.ExecutionConfig(devices=1, wave=1),
            "output": fs.OutputConfig(dir=str(where), tensorboard=False, figures=False, progress=False),
            **more,
        }
    )


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Folders of finished runs, by name."""
    home = tmp_path_factory.mktemp("study")
    found = {"fedmr": FedMR(), "fedavg": FedAvg(), "local": Local()}
    for name, algorithm in found.items():
        fs.run(config_of(home / name, algorithm))
    fs.run(config_of(home / "fedmr1", FedMR(), seed=1))
    return home


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_one_command_compares_runs(study, tmp_path, capsys):
    names = ("fedmr", "fedmr1", "fedavg", "local")
    words = [str(study / name) for name in names]
    assert commands.main(["landscape", *words, "--out", str(tmp_path), *WORDS]) == 0
    told = capsys.readouterr().out
    assert "warning" not in told and "not drawn" not in told
    for name in ("random_line", "random_surface", "models_line", "models_plane"):
        for suffix in ("png", "pdf"):
            assert (tmp_path / f"{name}.{suffix}").stat().st_size > 5000
    rows = rows_of(tmp_path / "flatness.csv")
    found = {(row["group"], row["seed"], row["name"]): float(row["value"]) for row in rows}
    assert {row["group"] for row in rows} == {"fedmr", "fedavg", "local"}
    weights = jax.device_get(restored(study / "fedavg").variables["params"])
    wanted = np.sqrt(sum((leaf.astype(np.float64) ** 2).sum() for leaf in jax.tree.leaves(weights)))
    assert found["fedavg", "0", "norm"] == pytest.approx(wanted, rel=1e-5)
    for group, seed in (("fedmr", "0"), ("fedmr", "1"), ("fedavg", "0"), ("local", "0")):
        one = {name: value for (g, s, name), value in found.items() if (g, s) == (group, seed)}
        assert one["eigenvalue_1"] > one["eigenvalue_2"] >= one["eigenvalue_least"]
        assert one["trace_error"] > 0 and one["sharpness_worst"] > one["sharpness_average"]
        assert one["barrier_train_max"] >= one["barrier_train_mean"] >= 0
        assert one["prominence_train_max"] >= 0 and one["distance_mean"] > 0
    curve = rows_of(tmp_path / "curves.csv")
    middle = [
        r for r in curve if r["curve"] == "random_line" and float(r["x"]) == 0 and r["group"] == "local"
    ]
    assert [r["samples"] for r in middle] == ["train", "test"]
    assert float(middle[1]["loss"]) == pytest.approx(found["local", "0", "test_loss"], rel=1e-5)
    assert len([r for r in curve if r["curve"] == "models_line"]) == 4 * 6 * 2 * 5
    assert {r["seed"] for r in curve if r["curve"] == "models_plane" and r["group"] == "fedmr"} == {"0"}
    text = (tmp_path / "report.md").read_text()
    assert "| fedmr | 2 |" in text and text.count(" ± ") > 8 and text.count(" (± ") == 2 * 3
    assert "losses on 90 random samples" in text and "pairs of 4 clients" in text
    assert "batch norm with its running statistics" in text and "![models_plane](models_plane.png)" in text


def test_the_losses_are_those_that_the_run_recorded(study):
    run = fs.load(study / "fedavg")
    measured = measure(restored(run.folder), dataclasses.replace(QUICK, samples=10**6, models=0, grid=0))
    for name, metric in (("loss", "loss"), ("accuracy", "accuracy")):
        recorded = run.metrics.series(metric)[1][-1]
        assert getattr(measured, name)["test"] == pytest.approx(recorded, rel=1e-4)
    assert not measured.between and not measured.planes and not measured.surfaces and not measured.clients


# FedIndep's slots are FedMR's.
@pytest.mark.parametrize(
    "name", ["fedmr", "fedavg", "local", pytest.param("fedindep", marks=pytest.mark.slow)]
)
def test_the_models_are_what_one_more_round_trains(study, name):
    """The mean of all K of them, with the algorithm's own weights, is what that round would deploy."""
    if name == "fedindep":
        fs.run(config_of(study / name, FedIndep()))
    simulation = restored(study / name)
    models, clients = trained(simulation, 99)
    again = jax.device_get(simulation.variables)
    inputs, _ = simulation.inputs(2)
    assert len(models) == 4 and clients == tuple(np.asarray(inputs.cohort.ids).tolist())
    flat = np.stack([np.concatenate([np.ravel(x) for x in jax.tree.leaves(model)]) for model in models])
    assert len(np.unique(flat.round(6), axis=0)) == 4
    simulation.step()
    if name == "local":  # of whom clients keep what they trained
        assert simulation.setup.algorithm.personal_models is not None
        own = simulation.setup.algorithm.personal_models(
            simulation.state.algorithm, jnp.asarray(inputs.cohort.ids)
        )
        expected = np.concatenate([np.asarray(x).reshape(4, -1) for x in jax.tree.leaves(own)], 1)
        np.testing.assert_allclose(flat, expected, atol=1e-6)
        return
    weights = np.asarray(inputs.cohort.counts, np.float64) if name == "fedavg" else np.ones(4)
    merged = np.concatenate([np.ravel(x) for x in jax.tree.leaves(jax.device_get(simulation.variables))])
    np.testing.assert_allclose(weights @ flat / weights.sum(), merged, atol=1e-5)
    before = np.concatenate([np.ravel(x) for x in jax.tree.leaves(again)])
    assert np.abs(merged - before).max() > 1e-3  # and measuring left the state alone until then


def test_labels_along_a_line_do_not_touch():
    at = np.linspace(-1, 1, 41)
    line = SimpleNamespace(at=at, loss=at**2 + 1, accuracy=1 - at**2 / 2)
    measured = SimpleNamespace(lines={"train": line, "test": line})
    group = SimpleNamespace(name="fedavg", title="fedavg on digits")
    figure = pictures.random_line([group], [[measured]], QUICK)  # pyright: ignore[reportArgumentType]
    figure.draw_without_rendering()
    for axis in figure.axes:
        low, high = axis.get_window_extent().intervalx
        boxes = [text.get_window_extent() for text in axis.get_xticklabels() if text.get_text()]
        boxes = [box for box in boxes if box.x1 > low and box.x0 < high]
        assert len(boxes) >= 3
        assert all(one.x1 + 8 < other.x0 for one, other in itertools.pairwise(boxes))


@pytest.mark.slow
def test_a_sweep_and_a_single_run_have_their_own_folders(study, tmp_path, capsys):
    sweep = {
        "base": {
            "rounds": 1,
            "partition": {"clients": 4, "kind": "iid"},
            "model": {"name": "mlp", "options": {"hidden": []}},
            "local": {"epochs": None, "steps": 2, "batch_size": 20},
            "cohort": {"size": 2},
            "execution": {"devices": 1, "wave": 1},
            "output": {"tensorboard": False, "figures": False, "progress": False},
        },
        "methods": {"A": {"algorithm": "fedavg"}},
        "seeds": [0, 1],
        "out": str(tmp_path / "out"),
    }
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(sweep))
    assert commands.main(["sweep", str(path)]) == 0
    few = [*WORDS, "--models=2", "--grid=0"]
    assert commands.main(["landscape", str(path), *few]) == 0
    told = capsys.readouterr().out
    assert "random_surface: not drawn" in told and "models_plane: not drawn" in told
    text = (tmp_path / "out" / "landscape" / "report.md").read_text()
    assert "| A | 2 |" in text and "models_plane was not drawn" in text
    assert commands.main(["landscape", str(study / "fedavg"), str(tmp_path / "out" / "A, seed 0"), *few]) == 2
    # Different rounds and models are said.
    folder = next(p.parent for p in (tmp_path / "out").rglob("config.yaml"))
    where = tmp_path / "both"
    assert commands.main(["landscape", str(study / "fedavg"), str(folder), *few, "--out", str(where)]) == 0
    text = (where / "report.md").read_text()
    assert "different rounds (1, 2)" in text and "different models" in text


def test_mistakes_are_told(study, tmp_path, capsys):
    bare = tmp_path / "bare"
    shutil.copytree(study / "fedavg", bare)
    shutil.rmtree(bare / "checkpoints")
    early = tmp_path / "early"
    shutil.copytree(study / "fedavg", early)
    (early / "checkpoints" / "2").rename(early / "checkpoints" / "1")
    run = str(study / "fedavg")
    for words, told in (
        ([str(tmp_path / "none")], "there is no such folder"),
        ([str(tmp_path)], "no config.yaml"),
        ([str(bare)], "no checkpoint"),
        ([str(early)], "no sound checkpoint of its last round"),
        ([run, run], "same seed"),
        ([run, "--points", "2"], "points = 2: must be at least 3"),
        ([run, "--points", "many"], "points = 'many'"),
        ([run, "--samples", "0"], "samples = 0"),
        ([run, "--radius", "0"], "radius = 0"),
        ([run, "--rho", "-1"], "rho = -1"),
        ([run, "--scale", "log"], "scale = 'log'"),
        ([run, "--grid", "2"], "grid = 2"),
        ([run, "--models", "1"], "models = 1"),
        ([run, "--eigenvalues", "30"], "eigenvalues = 30"),
        ([run, "--colour", "red"], "no such flag"),
        ([], "no run to look at"),
    ):
        assert commands.main(["landscape", *words]) == 2, words
        assert told in capsys.readouterr().err
    assert commands.main(["landscape", "--help"]) == 0 and "--lanczos" in capsys.readouterr().out
    in_memory = fs.run(config_of(tmp_path, FedAvg(), output=fs.OutputConfig(progress=False)))
    with pytest.raises(UserError, match="in memory"):
        report.draw(in_memory)


def test_a_damaged_checkpoint_is_told_and_left_where_it_is(study, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(study / "fedavg", run)
    newest = run / "checkpoints" / "2"
    shutil.copytree(newest, run / "checkpoints" / "1.orbax-checkpoint-tmp")  # as of a run that is writing
    shutil.rmtree(newest / "state")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert commands.main(["landscape", str(run), *WORDS]) == 2
    told = capsys.readouterr().err
    assert "round 2 is damaged" in told and "no sound checkpoint of its last round" in told
    assert len(list(newest.parent.iterdir())) == 2 and newest.is_dir()


def test_what_python_gave_cannot_be_read_back(tmp_path):
    model = fs.models.create("mlp", (8, 8, 1), 10, hidden=[3])
    fs.run(config_of(tmp_path / "own", FedAvg()), model=model)
    with pytest.raises(UserError, match="model from Python"):
        report.draw(tmp_path / "own")


def test_clients_that_are_all_alike_span_no_plane(tmp_path):
    alike = fs.PartitionConfig(kind="identical", clients=4)
    config = config_of(None, FedAvg(), partition=alike, output=fs.OutputConfig(progress=False))
    simulation = fs.Simulation(config)
    for _ in simulation.advance():
        pass
    measured = measure(simulation, QUICK)
    assert not measured.planes and measured.surfaces
    assert np.abs(measured.pairs("test", "height")).max() < 1e-5


def test_a_rate_that_ends_at_zero_still_tells_clients_apart(tmp_path):
    quiet = fs.OutputConfig(progress=False)
    local = fs.LocalConfig(epochs=None, steps=4, batch_size=20, lr=0.1, schedule="cosine", decay=0.0)
    simulation = fs.Simulation(config_of(None, FedAvg(), local=local, output=quiet))
    for _ in simulation.advance():
        pass
    models, _ = trained(simulation, 2)
    first, second = (np.ravel(model["params"]["fc1"]["kernel"]) for model in models)
    assert np.abs(first - second).max() > 1e-4


def test_a_small_cohort_and_a_small_set_are_told_as_they_are(tmp_path, capsys):
    fs.run(config_of(tmp_path / "run", FedAvg(), cohort=fs.CohortConfig(size=1)))
    words = [word for word in WORDS if "samples" not in word]
    words = [*words, "--rho=1e-2", "--samples=5000"]
    assert commands.main(["landscape", str(tmp_path / "run"), *words]) == 0
    assert "models and the cohort to 3 or more" in capsys.readouterr().out
    text = (tmp_path / "run" / "landscape" / "report.md").read_text()
    assert "and 359 test samples" in text and "pairs of 1 clients" in text and "ρ = 0.01" in text


def test_an_infinite_barrier_is_not_left_out_of_the_table():
    finite, infinite = {"barrier_train_max": 0.0}, {"barrier_train_max": np.inf}
    assert report._told([infinite, finite, finite], "barrier_train_max") == "∞ in 1 of 3"
    assert report._told([finite, finite], "barrier_train_max") == "0 ± 0"
    assert report._told([{}], "barrier_train_max") == "–"
    traces = [{"trace": 1.0, "trace_error": 3.0}, {"trace": 3.0, "trace_error": 4.0}]
    assert report._told(traces, "trace") == "2 ± 1.4 (± 3.5)"
