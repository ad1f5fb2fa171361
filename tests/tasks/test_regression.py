"""Regression on tables: by hand in NumPy, its metrics against scikit-learn, and what is refused."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import r2_score

import fedjax_sim as fs
from fedjax_sim.config import (
    CohortConfig,
    EvaluationConfig,
    ExecutionConfig,
    LocalConfig,
    ModelConfig,
    OutputConfig,
)
from fedjax_sim.config.sweep_files import from_mapping
from fedjax_sim.core.errors import UserError
from fedjax_sim.engine.evaluation import by_group, figure
from fedjax_sim.runs import Simulation
from fedjax_sim.tasks.regression import R2, regression

SIZES = (5, 8, 3)


def world(seed=0):
    draw = np.random.default_rng(seed)
    x = draw.normal(3, 2, (sum(SIZES) + 9, 4))
    y = 5 + x @ np.array([1.0, -2, 0.5, 0]) + 0.1 * draw.normal(size=len(x))
    table = fs.TableDataset("t", x[9:], y[9:], x[:9], y[:9])
    places = np.split(np.arange(sum(SIZES)), np.cumsum(SIZES)[:-1])
    return table, fs.Partition(tuple(places), tuple(np.split(np.arange(9), [2, 5])))


def config(**changes):
    base = fs.RunConfig(
        rounds=2,
        model=ModelConfig(options={"hidden": []}),
        local=LocalConfig(epochs=2, batch_size=100, lr=0.1),
        cohort=CohortConfig(fraction=1.0),
        evaluation=EvaluationConfig(every=1, per_client=True),
        execution=ExecutionConfig(devices=1),
        output=OutputConfig(progress=False),
    )
    return dataclasses.replace(base, **changes)


def test_federated_averaging_of_a_linear_model_equals_numpy():
    table, partition = world()
    simulation = Simulation(config(), dataset=table, partition=partition)
    start = simulation.variables["params"]["fc1"]
    w, b = np.asarray(start["kernel"], np.float64)[:, 0], float(start["bias"][0])
    rows = list(simulation.advance())[-1]
    x = (table.train_x - table.train_x.mean(0, dtype=np.float64)) / table.train_x.std(0, dtype=np.float64)
    centre, scale = table.train_y.mean(dtype=np.float64), table.train_y.std(dtype=np.float64)
    y = (table.train_y - centre) / scale
    for _ in range(2):
        trained = []
        for part in partition.train:
            own, slope = w.copy(), b
            for _ in range(2):
                error = x[part] @ own + slope - y[part]
                own, slope = own - 0.1 * 2 * x[part].T @ error / len(part), slope - 0.1 * 2 * error.mean()
            trained.append(np.append(own, slope))
        mean = np.average(trained, axis=0, weights=SIZES)
        w, b = mean[:-1], mean[-1]
    found = simulation.variables["params"]["fc1"]
    np.testing.assert_allclose(found["kernel"][:, 0], w, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["bias"][0], b, rtol=1e-4, atol=1e-6)

    seen = (table.test_x - table.train_x.mean(0, dtype=np.float64)) / table.train_x.std(0, dtype=np.float64)
    guess = (seen @ w + b) * scale + centre
    told = {row.metric: row.value for row in rows if row.client is None or row.client < 0}
    error = (guess - table.test_y) ** 2
    np.testing.assert_allclose(told["mse"], error.mean(), rtol=1e-4)
    np.testing.assert_allclose(told["r2"], r2_score(table.test_y, guess), rtol=1e-4)
    np.testing.assert_allclose(told["loss"], error.mean() / scale**2, rtol=1e-4)
    each = [error[part].mean() for part in partition.test]
    np.testing.assert_allclose(told["client_mse_mean"], np.mean(each), rtol=1e-4)


def test_r2_is_merged_over_groups_and_undefined_for_one_value(rng):
    task = regression((0.0,), (1.0,), (2.0, 3.0))
    raw = {"x": np.zeros((12, 1), np.float32), "target": rng.normal(2, 3, 12).astype(np.float32)}
    prepared = task.prepare(raw)
    outputs = jnp.asarray(prepared["target"] + 0.5 * rng.normal(size=12).astype(np.float32))[:, None]
    statistics = np.asarray(R2.of(outputs, prepared))
    guess = np.asarray(outputs)[:, 0] * 3 + 2
    np.testing.assert_allclose(figure(R2, statistics), r2_score(raw["target"], guess), rtol=1e-5)
    owners = np.array([0] * 5 + [2] * 6 + [3])
    found = by_group(R2, statistics, owners, 4)
    for group in (0, 2):
        mine = owners == group
        np.testing.assert_allclose(found[group], r2_score(raw["target"][mine], guess[mine]), rtol=1e-4)
    assert np.isnan(found[[1, 3]]).all()


@pytest.mark.parametrize(
    "algorithm",
    [
        fs.LIPS(inner=fs.FedMR(), layers="inner"),
        fs.Scaffold(),
        *(
            pytest.param(algorithm, marks=pytest.mark.slow)
            for algorithm in (fs.FedMR(), fs.FedProx(), fs.MOON(), fs.Ditto())
        ),
    ],
    ids=lambda a: type(a).__name__,
)
def test_methods_that_need_no_classes_learn(algorithm):
    table, partition = world()
    deep = ModelConfig(options={"hidden": [6, 6]})
    wanted = config(
        algorithm=algorithm, model=deep, rounds=8, inertia=fs.InertiaConfig(every=4, measure=True)
    )
    run = fs.run(wanted, dataset=table, partition=partition)
    values = run.metrics.series("mse")[1]
    assert values[-1] < values[0] and np.isfinite(run.metrics.series("r2")[1]).all()
    assert "mse" in repr(run) and run.headline == "mse"
    assert np.isfinite(run.metrics.last("effectiveness_global"))


def test_a_merge_that_lowers_the_error_is_effective():
    table, partition = world()
    run = fs.run(config(inertia=fs.InertiaConfig(every=1)), dataset=table, partition=partition)
    rows = [row for row in run.metrics if row.metric == "merge_global_mse" and row.round == 1]
    before, after = (np.mean([r.value for r in rows if r.state == s]) for s in ("before", "after"))
    effect = next(r.value for r in run.metrics if r.metric == "effectiveness_global" and r.round == 1)
    np.testing.assert_allclose(effect, before - after, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"algorithm": fs.FedGen()}, "algorithm"),
        ({"algorithm": fs.FedRoD()}, "algorithm"),
        ({"algorithm": fs.FedNTD()}, "algorithm"),
        ({"algorithm": fs.PFedSD()}, "algorithm"),
        ({"peel": fs.PeelConfig(every=1)}, "peel.every"),
        ({"evaluation": EvaluationConfig(per_class=True)}, "evaluation.per_class"),
        ({"model": ModelConfig("lenet")}, "model.name"),
        ({"partition": fs.PartitionConfig("dirichlet", clients=3, min_size=1)}, "partition.kind"),
        ({"partition": fs.PartitionConfig("pathological", clients=3, min_size=1)}, "partition.kind"),
        (
            {"partition": fs.PartitionConfig("iid", clients=3, min_size=1, local_test="matching")},
            "partition.local_test",
        ),
    ],
)
def test_what_needs_classes_is_refused_before_anything_is_compiled(changes, field):
    table, partition = world()
    given = {} if "partition" in changes else {"partition": partition}
    with pytest.raises(UserError) as caught:
        fs.run(config(**{"evaluation": EvaluationConfig(every=1), **changes}), dataset=table, **given)
    assert caught.value.field == field


def test_a_sweep_of_a_regression_names_the_metric_that_there_is(tmp_path):
    plan = {
        "base": {
            "rounds": 1,
            "data": {"source": "diabetes"},
            "partition": {"kind": "iid", "clients": 4},
            "model": {"options": {"hidden": []}},
        },
        "methods": {"FedAvg": {"algorithm": "fedavg"}},
        "out": str(tmp_path / "out"),
    }
    with pytest.raises(UserError, match="metric: mse"):
        fs.sweep.run(from_mapping(plan))
