"""What a user wrote, called `module:Name` in a file: models and data (algorithms are in test_config)."""

import dataclasses
import json
import sys
import warnings

import jax
import numpy as np
import pytest
from flax import linen as nn

import fedjax_sim as fs
from fedjax_sim import config, data, models, runs
from fedjax_sim.cli import commands
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.imports import imported, place_of
from fedjax_sim.studies import sweep

OWN = """
import numpy as np
from flax import linen as nn, nnx

import fedjax_sim as fs


class Net(nn.Module):
    num_classes: int
    widths: tuple[int, ...] = (5,)

    @nn.compact
    def __call__(self, x):
        x = x.reshape(x.shape[0], -1)
        for width in self.widths:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.num_classes)(x)


class Fixed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x.reshape(x.shape[0], -1))


class Newer(nnx.Module):
    pass


def build(input_shape, num_classes, *, width=4):
    return fs.from_flax(Net(num_classes, (width, *input_shape)), input_shape, num_classes, name="built")


def unbound(input_shape, num_classes):
    return Net(num_classes)


def broken(input_shape, num_classes):
    return 1 / 0


def stripes(samples=60, *, seed=0):
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 3, samples)
    images = draw.integers(0, 64, (samples, 4, 4, 1)).astype(np.uint8)
    images[np.arange(samples), 0, labels] += 150
    return fs.Dataset("stripes", images, labels, images[:30], labels[:30], 3)


def arrays():
    return np.zeros((4, 2, 2, 1), np.uint8), np.zeros(4, int)


number = 3
"""
SHAPE = (4, 4, 1)


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_for_tests.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    yield "own_for_tests"
    sys.modules.pop("own_for_tests", None)


def shapes(model):
    return [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0)))]


def test_a_module_class_gets_the_number_of_classes_and_its_options(own):
    model = models.create(f"{own}:Net", SHAPE, 3, widths=[6, 7])
    assert model.name == f"{own}:Net"
    assert shapes(model) == [(6,), (16, 6), (7,), (6, 7), (3,), (7, 3)]
    assert model == models.create(f"{own}:Net", SHAPE, 3, widths=[6, 7])  # and so shares compiled programs
    assert hash(model.module) == hash(models.create(f"{own}:Net", SHAPE, 3, widths=[6, 7]).module)
    assert shapes(models.create(f"{own}:Fixed", SHAPE, 3)) == [(3,), (16, 3)]


@pytest.mark.parametrize("function", ["build", "unbound"])
def test_a_function_gets_the_shape_of_the_images_and_the_number_of_classes(own, function):
    model = models.create(f"{own}:{function}", SHAPE, 3)
    assert (model.name, model.input_shape, model.outputs) == (f"{own}:{function}", SHAPE, 3)
    assert shapes(models.create(f"{own}:build", SHAPE, 3, width=9))[1] == (16, 9)


@pytest.mark.parametrize(
    ("name", "options", "field", "told"),
    [
        ("{}:Nets", {}, "model.name", "has no attribute 'Nets'.*Did you mean Net"),
        (
            "no_such_module_here:Net",
            {},
            "model.name",
            "No module named.*with the module in",
        ),
        ("{}.py:Net", {}, "model.name", "without folder and without .py: `{}:Net`"),
        ("{}:number", {}, "model.name", "a model is wanted here, and this is a int"),
        ("{}:arrays", {}, "model.name", "cannot be called with 2 arguments.*arrays()"),
        ("{}:stripes", {}, "model.name", "stripes"),
        ("{}:broken", {}, "model.name", r"ZeroDivisionError.* \(own_for_tests.py, line 39\)"),
        ("{}:Newer", {}, "model.name", r"flax\.nnx module.*nnx\.bridge\.to_linen\(Newer, …\)"),
        ("{}:Net", {"width": 3}, "model.width", "no such field. Did you mean widths"),
        ("{}:Fixed", {"norm": "batch"}, "model.norm", "no such field"),
        ("{}:build", {"widths": 3}, "model.widths", "no such option. Did you mean width"),
        ("{}:unbound", {"width": 3}, "model.width", "Leave it out"),
        ("lenett", {}, "model.name", "Did you mean lenet.*module:Class"),
    ],
)
def test_what_is_wrong_with_a_model_of_ones_own_is_named(own, name, options, field, told):
    with pytest.raises(UserError, match=told.format(own)) as caught:
        models.create(name.format(own), SHAPE, 3, **options)
    assert caught.value.field == field


def test_a_function_makes_the_data(own):
    made = data.load(f"{own}:stripes", options={"samples": 45, "seed": 3})
    assert (made.name, len(made.train_labels), made.image_shape) == ("stripes", 45, SHAPE)
    read = config.from_dict({"data": {"source": f"{own}:stripes", "options": {"samples": 50}}})
    assert config.from_dict(config.to_dict(read)) == read
    assert len(read.data.load().train_labels) == 50


@pytest.mark.parametrize(
    ("source", "options", "field", "told"),
    [
        ("{}:arrays", {}, "data.source", "its value is a tuple, not a Dataset"),
        ("{}:number", {}, "data.source", "not a function"),
        ("{}:stripe", {}, "data.source", "Did you mean stripes"),
        ("{}:stripes", {"sample": 3}, "data.options.sample", "Did you mean samples"),
        ("{}:stripes", {"samples": "many"}, "data.source", r"own_for_tests.py, line 44\)"),
        ("npx:images.npz", {}, "data.source", "Did you mean npz:…"),
        ("digits", {"samples": 3}, "data.options", "only a function of one's own"),
        ("ditigs", {}, "data.source", "module:function"),
    ],
)
def test_what_is_wrong_with_data_of_ones_own_is_named(own, source, options, field, told):
    with pytest.raises(UserError, match=told) as caught:
        data.load(source.format(own), options=options)
    assert caught.value.field == field


def test_size_and_preprocessing_are_the_functions_own(own):
    with pytest.raises(UserError, match=r"data\.source.*no `size`.*data\.options"):
        data.load(f"{own}:stripes", size=8)


def test_the_line_that_is_told_is_the_users(own):
    try:
        imported(f"{own}:broken", "here")(None, None)
    except ZeroDivisionError as error:
        assert place_of(error) == " (own_for_tests.py, line 39)"
    assert place_of(ValueError()) == ""


# --- in files ------------------------------------------------------------------------------------------


def asked(own):
    return {
        "rounds": 2,
        "data": {"source": f"{own}:stripes", "options": {"samples": 48}},
        "partition": {"kind": "iid", "clients": 4},
        "model": {"name": f"{own}:Net", "options": {"widths": [4]}},
        "local": {"epochs": 1, "batch_size": 6},
        "evaluation": {"every": 1},
        "output": {"dir": "run", "figures": False, "tensorboard": False, "progress": False},
    }


def test_a_run_of_a_file_alone_is_planned_run_kept_and_opened_again(own, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(json.dumps(asked(own)))
    assert commands.main(["plan", "mine.yaml"]) == 0
    assert commands.main(["run", "mine.yaml"]) == 0
    assert f"fedavg, {own}:Net on stripes" in capsys.readouterr().out
    done = runs.load("run")
    assert done.config.given == {}
    assert config.read_config("run/config.yaml").model.name == f"{own}:Net"
    again = runs.restored("run")
    first = jax.tree.leaves(jax.device_get(again.variables))
    for one, other in zip(first, jax.tree.leaves(done.variables), strict=True):
        np.testing.assert_array_equal(one, other)
    about = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert set(about["own"]) == {f"{own}:Net", f"{own}:stripes"}
    (tmp_path / f"{own}.py").write_text(OWN + "\n# another\n")
    with pytest.warns(UserWarning, match="is not what it was when the run in"):
        runs.restored("run")


def edit(own, tmp_path, text="\n# another\n"):
    """As in a new process after the file was edited."""
    (tmp_path / f"{own}.py").write_text(OWN + text)
    sys.modules.pop(own, None)


@pytest.mark.parametrize("how", [{}, {"together": True}])
def test_a_sweep_says_which_finished_runs_an_edited_module_made(own, tmp_path, how):
    spec = {"base": asked(own), "methods": {"A": {}, "B": {"local.lr": 0.1}}, "seeds": [0]}
    spec["out"] = str(tmp_path / "sweep")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sweep.run(sweep.from_mapping(spec), **how).comparison.cautions == ()
    edit(own, tmp_path)
    with pytest.warns(
        UserWarning, match="is not what it was for 2 finished runs: A, seed 0; B, seed 0"
    ) as told:
        sweep.run(sweep.from_mapping(spec), **how)
    assert len(told) == 1
    message = str(told[0].message)
    assert "not run again" in message and "choose another out, or remove the folders" in message
    # A further seed is run with the new version, and the table says that there are two.
    with pytest.warns(UserWarning, match=own):
        outcome = sweep.run(sweep.from_mapping({**spec, "seeds": [0, 1]}), **how)
    (caution,) = outcome.comparison.cautions
    assert f"2 versions of the module {own}" in caution
    assert "Version 1: A, seed 0; B, seed 0. Version 2: A, seed 1; B, seed 1." in caution
    assert caution in outcome.report() and caution in outcome.comparison.latex()
    home = tmp_path / "sweep/runs"
    folders = [home / method / "base" / f"seed{seed}" for method in "AB" for seed in (0, 1)]
    page = fs.report(folders, out=tmp_path / "page.html").read_text()
    assert f"2 versions of the module {own}" in page
    assert f"2 versions of the module {own}" in fs.compare(folders).markdown()


def test_a_run_that_goes_on_with_an_edited_module_keeps_both_versions(own, tmp_path):
    def provenance():
        return json.loads((tmp_path / "run/provenance.json").read_text())

    runs.run(config.from_dict(asked(own)))
    began = provenance()
    runs.resume("run", rounds=3)
    assert "starts" not in provenance()  # nothing was another
    edit(own, tmp_path)
    with pytest.warns(UserWarning, match="is not what it was"):
        runs.resume("run", rounds=4)
    told = provenance()
    assert told["own"] == began["own"] and [start["round"] for start in told["starts"]] == [3]
    (start,) = told["starts"]
    assert set(start) == {"round", "own"} and set(start["own"]) == set(began["own"])
    assert all(began["own"][name] != checksum for name, checksum in start["own"].items())
    runs.load("run")
    page = fs.report("run", out=tmp_path / "page.html").read_text()
    assert f"went on after round 3 with another version of the module {own}" in page
    # Of older records there is no `starts`, and versions that differ are told as well.
    began["versions"]["jax"] = "0.0.1"
    (tmp_path / "run/provenance.json").write_text(json.dumps(began | {"config": told["config"]}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runs.resume("run", rounds=5)
    assert provenance()["starts"][0]["versions"] == {"jax": jax.__version__}
    page = fs.report("run", out=tmp_path / "page.html").read_text()
    assert f"jax {jax.__version__} in place of 0.0.1" in page


def test_a_sweep_has_them_in_its_grid_and_checks_them_before_it_starts(own, tmp_path):
    base = asked(own)
    grid = {"model.name": [f"{own}:Fixed", "mlp"], "data.options": [{"samples": 40}]}
    base["model"] = {}
    made = sweep.from_mapping({"base": base, "grid": grid, "out": str(tmp_path / "sweep")})
    assert [job.config.model.name for job in made.jobs] == [f"{own}:Fixed", "mlp"]
    sweep._check(made, shared := sweep.Shared())
    assert len(shared._datasets) == 1
    grid["model.name"][0] = f"{own}:broken"
    with pytest.raises(UserError, match="ZeroDivisionError"):
        sweep._check(sweep.from_mapping({"base": base, "grid": grid, "out": str(tmp_path / "other")}), shared)


# --- given from Python ---------------------------------------------------------------------------------


class Inside(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x.reshape(x.shape[0], -1))


@pytest.mark.parametrize("given", [Inside(), Inside, lambda shape, classes: Inside()])
def test_a_module_its_class_and_a_function_do_for_a_model(given):
    assert shapes(models.adapted(given, SHAPE, 3, name="inside")) == [(3,), (16, 3)]


def test_a_model_stays_as_it_is():
    model = models.create("mlp", SHAPE, 3)
    assert models.adapted(model, SHAPE, 3, name="x") is model
    assert dataclasses.replace(model, name="y").name == "y"
