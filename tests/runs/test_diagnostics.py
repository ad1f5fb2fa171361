"""Diagnostics of one's own, from Python and by name, beside the package's own: all by the same door."""

import dataclasses
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedjax_sim as fs
from fedjax_sim import config as config_lib
from fedjax_sim.core.errors import UserError
from fedjax_sim.probes import table
from fedjax_sim.probes.peel.instrument import LayerPeeled
from fedjax_sim.runs import diagnostics
from fedjax_sim.runs.assemble import prepare

MODULE = '''
import dataclasses

import jax
import jax.numpy as jnp

import fedjax_sim as fs


def norm(tree):
    return jnp.sqrt(sum((leaf.astype(jnp.float32) ** 2).sum() for leaf in jax.tree.leaves(tree)))


@dataclasses.dataclass(frozen=True)
class Drift:
    """How far each watched client's model lies from what it started from."""

    every: int = 2
    wrong: str = ""

    def build(self, context):
        def measure(view, data):
            away = jax.tree.map(lambda a, b: a - b, view.before, view.start)
            if self.wrong == "measure":
                raise KeyError("away")
            return jax.vmap(norm)(away)

        def records(number, ids, found):
            if self.wrong == "records":
                return [number]
            return [fs.Row(number, "drift", d, client=i) for i, d in zip(ids, found)]

        if self.wrong == "build":
            return 3
        return fs.Measurement(measure, records, every=self.every, clients=2)


@dataclasses.dataclass(frozen=True)
class Travel:
    """The way that the deployed model has gone, summed over rounds."""

    wrong: bool = False

    def build(self, context):
        return Way(self.wrong)


@dataclasses.dataclass(frozen=True)
class Way:
    wrong: bool
    gradients: bool = False

    def init(self, deployed):
        return jnp.float32(0)

    def per_client(self, start, trained, gradient):
        return jnp.float32(1)

    def summand(self, start, trained, gradient):
        return jnp.float32(0)

    def finish(self, carried, cohort, old, new, each, mean):
        way = carried + norm(jax.tree.map(lambda a, b: a - b, new, old))
        return (way[None] if self.wrong else way), {"way": way, "clients": each.sum()}

    def rows(self, number, said):
        return [fs.Row(number, "way", said["way"]), fs.Row(number, "counted", said["clients"])]
'''

SMALL = fs.RunConfig(
    rounds=5,
    partition=fs.PartitionConfig(kind="iid", clients=4),
    model=fs.ModelConfig("mlp", options={"hidden": [4]}),
    local=fs.LocalConfig(epochs=None, steps=2, lr=0.5),
    cohort=fs.CohortConfig(size=3),
    evaluation=fs.EvaluationConfig(every=0),
    execution=fs.ExecutionConfig(devices=1),
    output=fs.OutputConfig(progress=False, figures=False, tensorboard=False, checkpoint_every=2),
)


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of one's own in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_diagnostics.py").write_text(MODULE)
    yield "own_diagnostics"
    sys.modules.pop("own_diagnostics", None)


def norm(tree):
    return np.sqrt(sum(float((np.asarray(leaf, np.float64) ** 2).sum()) for leaf in jax.tree.leaves(tree)))


def test_by_name_in_a_file_they_measure_and_change_nothing(own, tmp_path):
    asked = {
        "observers": [{"name": f"{own}:Drift", "every": 3}],
        "meters": [f"{own}:Travel"],
        "output": {**config_lib.to_dict(SMALL.output), "dir": str(tmp_path / "run")},
    }
    file = tmp_path / "my.yaml"
    file.write_text(config_lib.dump(config_lib.from_dict(asked, base=SMALL)))
    run = fs.run(file)
    plain, models = fs.Simulation(SMALL), []
    for rounds in (1, 1, 3):
        list(plain.advance(rounds))
        models.append(plain.variables)
    for a, b in zip(jax.tree.leaves(run.variables), jax.tree.leaves(models[-1]), strict=True):
        np.testing.assert_array_equal(a, b)
    rows = [row for row in run.metrics if row.metric == "drift"]
    assert [row.round for row in rows] == [1, 1, 3, 3, 5, 5]
    way = run.metrics.series("way")[1]
    assert run.metrics.series("counted")[1].tolist() == [3.0] * 5
    np.testing.assert_allclose(
        way[1] - way[0], norm(jax.tree.map(np.subtract, models[1], models[0])), rtol=1e-5
    )
    assert np.all(np.diff(way) > 0)
    assert fs.load(run.folder).config.observers == run.config.observers
    # What a meter carries from round to round is part of a checkpoint.
    (run.folder / "metrics.parquet").unlink()
    lines = (run.folder / "journal.jsonl").read_text().splitlines(keepends=True)
    (run.folder / "journal.jsonl").write_text("".join(lines[:3]))
    with pytest.warns(UserWarning, match="passed over|no checkpoint is left"):
        again = fs.resume(run.folder)
    assert list(again.metrics) == list(run.metrics)


@pytest.mark.parametrize(
    ("kind", "name", "settings", "told"),
    [
        (
            "observers",
            "Drift",
            {"wrong": "build"},
            r"observers\.0\.build = .*returned a int, which has no",
        ),
        ("observers", "Drift", {"wrong": "measure"}, r"observers\.0\.observe = .*KeyError.*\.py, line 25"),
        ("meters", "Travel", {"wrong": True}, r"meters\.0\.finish = .*float32\[1\].*gave float32\[\]"),
    ],
)
def test_a_mistake_in_one_is_told_before_anything_is_compiled(own, kind, name, settings, told, monkeypatch):
    asked = config_lib.from_dict({kind: [{"name": f"{own}:{name}", **settings}]}, base=SMALL)
    monkeypatch.setattr(fs.Simulation, "steps", None)
    with pytest.raises(UserError, match=told):
        fs.run(asked)


def test_what_is_no_row_is_told_with_its_round(own):
    (entry,) = config_lib.from_dict({"observers": [{"name": f"{own}:Drift", "wrong": "records"}]}).observers
    (observer,) = diagnostics.of(prepare(dataclasses.replace(SMALL, observers=(entry,))))["observers"]
    instrument = observer.build(None)
    (name,) = instrument.observers
    with pytest.raises(UserError, match=r"observers\.0\.rows = .*in round 7: .* type int\. .*fs\.Row"):
        instrument.rows(7, np.zeros(1, np.int32), {name: {}}, {name: jnp.zeros(1)})


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (fs.Row(7, "drift", np.ones(3)), "of metric 'drift' value is an array [3], one number is wanted"),
        (fs.Row(7, "drift", "much"), "of metric 'drift' value is 'much', one number is wanted"),
        (fs.Row(7, "drift", 1.0, client=None), "of metric 'drift' client is None, one number is wanted"),
        ((7, "drift"), "one of them has 2 parts: 7, 'drift'"),
    ],
)
def test_a_bad_row_is_told_by_what_is_wrong_with_it(row, told):
    setup = prepare(dataclasses.replace(SMALL, observers=(Named(row),)))
    (observer,) = diagnostics.of(setup)["observers"]
    instrument = observer.build(None)
    (name,) = instrument.observers
    with pytest.raises(UserError, match=re.escape(f"in round 7: {told}. Return a list")):
        instrument.rows(7, np.zeros(1, np.int32), {name: {}}, {name: jnp.zeros(())})


@pytest.mark.parametrize(
    ("row", "refused"),
    [
        (fs.Row(7, "accuracy", 1.0), True),
        (fs.Row(7, "client_accuracy", 1.0, client=2), True),
        (fs.Row(7, "accuracy", 1.0, client=2), False),
        (fs.Row(7, "loss", 1.0, state="before"), False),
        (fs.Row(7, "accuracy_class_size", 1.0), False),
    ],
)
def test_a_row_does_not_take_the_name_of_what_the_run_records(row, refused):
    setup = prepare(dataclasses.replace(SMALL, observers=(Named(row),)))
    (observer,) = diagnostics.of(setup)["observers"]
    instrument = observer.build(None)
    (name,) = instrument.observers
    given = 7, np.zeros(1, np.int32), {name: {}}, {name: jnp.zeros(())}
    if refused:
        with pytest.raises(UserError, match=rf"observers\.0\.rows = .*'{row.metric}', which the run records"):
            instrument.rows(*given)
    else:
        assert instrument.rows(*given) == [row]


@dataclasses.dataclass(frozen=True)
class Named:
    """An observer that gives one row."""

    row: fs.Row

    def build(self, context):
        """See `ObserverConfig`."""
        return fs.Measurement(lambda view, data: jnp.float32(0), lambda number, ids, found: [self.row])


@dataclasses.dataclass(frozen=True)
class Constant:
    """An observer that Python gives."""

    value: float

    def build(self, context):
        """See `ObserverConfig`."""
        assert context.setup.model.name == "mlp"
        return fs.Measurement(
            lambda view, data: jnp.float32(self.value),
            lambda number, ids, found: [fs.Row(number, f"constant_{self.value:g}", found)],
        )


def test_two_of_a_kind_from_python_beside_a_built_in_one():
    config = dataclasses.replace(SMALL, rounds=1, inertia=fs.InertiaConfig(every=1, clients=1, samples=5))
    run = fs.run(config, observers=[Constant(1.0), Constant(2.0)])
    assert [run.metrics.last(f"constant_{n}") for n in (1, 2)] == [1.0, 2.0]
    assert "effectiveness_global" in run.metrics.names()
    assert run.config.given["observers"] == "Constant(value=1.0), Constant(value=2.0)"


def test_the_built_in_ones_come_through_the_same_door():
    config = dataclasses.replace(
        SMALL, peel=fs.PeelConfig(every=2, clients=2), inertia=fs.InertiaConfig(measure=True, every=3)
    )
    assert [type(one).__name__ for one in table.observers(config)] == [
        "LayerPeeled",
        "AggregationEffectiveness",
    ]
    assert set(diagnostics.of(prepare(config))["meters"]) == {"movement"}
    plugged = dataclasses.replace(SMALL, observers=(LayerPeeled(config.peel),))
    (observer,) = diagnostics.of(prepare(plugged))["observers"]
    assert observer.own.settings == config.peel
