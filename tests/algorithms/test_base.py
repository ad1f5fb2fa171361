"""What algorithms share: losses over masked batches, weights, the record's defaults."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedjax_sim as fs
from fedjax_sim import algorithms
from fedjax_sim.algorithms import CONFIGS, Batch, Cohort, FedAvg, FedMR, name_of
from fedjax_sim.algorithms.shared import by_samples, mean_of_included, uniform
from fedjax_sim.core.algorithm import LocalRule, Results
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.task import masked_mean, task_loss
from fedjax_sim.tasks.classification import cross_entropy
from tests import oracles


def test_masked_mean_counts_what_is_no_padding():
    values = jnp.asarray([1.0, 2.0, jnp.inf, 9.0])
    assert masked_mean(values, jnp.asarray([True, True, False, True])) == 4
    assert masked_mean(values, jnp.zeros(4, bool)) == 0
    assert masked_mean(values[:2], None) == 1.5


def test_cross_entropy_and_its_gradient_do_not_see_padding(rng):
    x, labels = rng.normal(size=(4, 5)), np.array([0, 2, 1, 2])
    params = {"fc1": {"kernel": rng.normal(size=(5, 3)), "bias": rng.normal(size=3)}}
    single = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    filled = jnp.asarray(np.concatenate([x, 50 * np.ones((2, 5))]), jnp.float32)
    mask = jnp.asarray([True] * 4 + [False] * 2)
    batch = Batch({"x": filled, "label": jnp.asarray([*labels, 1, 1], jnp.int32)}, mask, None)

    class Linear:
        def __call__(self, variables, batch):
            return batch["x"] @ variables["fc1"]["kernel"] + variables["fc1"]["bias"][None], variables

        def losses(self, outputs, batch):
            return cross_entropy(outputs, batch.example)

    loss = lambda p: task_loss(Linear(), p, batch)[0]  # noqa: E731
    wanted, gradient = oracles.mlp_gradient(params, x, labels)
    np.testing.assert_allclose(loss(single), wanted, rtol=1e-5)
    oracles.assert_trees_close(jax.grad(loss)(single), gradient, atol=1e-6)


def test_weights():
    cohort = Cohort(jnp.asarray([4, 2]), jnp.asarray([30, 10]), jnp.int32(0))
    np.testing.assert_array_equal(by_samples(cohort), np.float32([30, 10]))
    np.testing.assert_array_equal(uniform(cohort), np.float32([1, 1]))


def test_the_default_rule_keeps_nothing_and_sends_nothing():
    rule = LocalRule()
    assert rule.init_client is None
    assert rule.start_round({"w": 1}, None, None) is None
    assert rule.finish_round({"w": 1}, {"w": 2}, "mine", None, 3, 0.1, None) == ("mine", None)


def test_names_of_configurations():
    assert name_of(FedAvg()) == "fedavg"
    assert name_of(FedMR()) == "fedmr"
    assert name_of(object()) is None
    assert all(name_of(cls()) == name for name, cls in CONFIGS.items())


def test_labels_tell_what_is_inside():
    assert algorithms.label(algorithms.FedProx()) == "fedprox"
    inside = algorithms.FedProx(inner=algorithms.FedMR())
    assert algorithms.label(inside) == "fedprox(fedmr)"
    assert algorithms.label(algorithms.LIPS(inner=inside)) == "lips(fedprox(fedmr))"


@pytest.mark.parametrize(
    ("inside", "field"),
    [
        ({"name": "fedper", "blocks": 7}, "algorithm.inner.blocks"),
        ({"name": "moon", "inner": {"name": "fedper", "blocks": 7}}, "algorithm.inner.inner.blocks"),
        ({"name": "fedadam", "inner": {"name": "moon", "inner": "fedmr"}}, "algorithm.inner.inner.inner"),
    ],
)
def test_an_error_inside_names_the_whole_way(inside, field):
    config = fs.config.from_dict({"algorithm": {"name": "fedprox", "inner": inside}})
    with pytest.raises(UserError) as told:
        fs.Simulation(config)
    assert told.value.field == field


def test_a_mean_of_clients_without_weight_is_what_it_was():
    """Left out, or without samples: 0 / 0 is no model. The one without weight counts in no maximum either."""
    models = {"w": jnp.asarray([1.0, 3.0]), "count": jnp.asarray([7, 2**24 + 1])}
    before = {"w": jnp.float32(-1), "count": jnp.int32(5)}
    nan = {"w": jnp.float32(jnp.nan), "count": jnp.int32(-(2**31))}

    def mean(included, weights):
        results = Results(models, nan, None, jnp.asarray(included), jnp.zeros(2))
        found = mean_of_included(results, jnp.asarray(weights, jnp.float32), before)
        assert found["count"].dtype == jnp.int32
        return float(found["w"]), int(found["count"])

    assert mean([True, True], [0, 0]) == mean([False, False], [1, 1]) == (-1, 5)
    assert mean([False, True], [1, 1]) == (3, 2**24 + 1)
    assert mean([True, False], [0.5, 1]) == (1, 7)
