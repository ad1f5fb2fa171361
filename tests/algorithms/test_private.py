"""Private leaves around any algorithm: rounds against NumPy, extremes, layouts, left-out clients, FedMR."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from fedjax_sim import models
from fedjax_sim.algorithms import FedAvg, FedMR, Local, PartialAveraging, private
from fedjax_sim.config import from_dict
from fedjax_sim.core.errors import UserError
from fedjax_sim.runs.federation import Simulation
from tests import oracles
from tests.algorithms import personal

LAYER = {n: {(f"fc{n}", "kernel"), (f"fc{n}", "bias")} for n in (1, 2, 3)}


@pytest.mark.parametrize(
    ("algorithm", "leaves", "layout"),
    [
        (PartialAveraging(first=2), LAYER[1] | LAYER[2], {"devices": 2, "wave": 2}),
        pytest.param(PartialAveraging(last=1, weights="uniform"), LAYER[3], {}, marks=pytest.mark.slow),
        pytest.param(PartialAveraging(only=1), LAYER[2], {}, marks=pytest.mark.slow),
        (
            PartialAveraging(leaves=("params/fc1/kernel", "*/bias")),
            {("fc1", "kernel"), ("fc1", "bias"), ("fc2", "bias"), ("fc3", "bias")},
            {},
        ),
    ],
    ids=["first", "last", "only", "leaves"],
)
def test_rounds_equal_numpy(algorithm, leaves, layout):
    """Cohorts of 2 out of 5: who is drawn takes its private leaves from where it left them."""
    simulation = oracles.simulate(
        personal.SIZES, algorithm=algorithm, model=personal.deep(), cohort=2, momentum=0.5, **layout
    )
    personal.assert_rounds(simulation, leaves, 2, weights=algorithm.weights)


def test_with_nothing_private_it_is_the_inner_algorithm():
    runs = []
    for algorithm in (FedAvg(), PartialAveraging(first=0)):
        runs.append(oracles.simulate(personal.SIZES, algorithm=algorithm, model=personal.deep(), cohort=3))
        oracles.run(runs[-1])
    oracles.assert_trees_equal(runs[1].variables, runs[0].variables)
    assert not runs[1].setup.algorithm.needs_models


@pytest.mark.slow
def test_with_all_private_every_client_trains_alone():
    runs = []
    for algorithm in (Local(), PartialAveraging(first=3)):
        runs.append(oracles.simulate(personal.SIZES, algorithm=algorithm, model=personal.deep(), cohort=3))
        oracles.run(runs[-1])
    alone, kept = (personal.rows_of(run.setup.algorithm, run.state.algorithm, range(5)) for run in runs)
    for one, other in zip(alone, kept, strict=True):
        oracles.assert_trees_equal(one, other)
    assert oracles.far_apart(alone[0], alone[4]) > 1e-2


def test_layout_does_not_show_and_the_stack_is_sharded():
    sizes, held = (12, 7, 20, 3, 31, 9, 4, 16), []
    for layout in ({"devices": 1, "wave": 1}, {"devices": 4, "wave": 1}):
        simulation = oracles.simulate(
            sizes, algorithm=PartialAveraging(last=1), model=personal.deep(), cohort=4, **layout
        )
        oracles.run(simulation)
        state = simulation.state.algorithm
        for leaf in jax.tree.leaves(state.private):
            assert leaf.addressable_shards[0].data.shape[0] == 8 // layout["devices"]
        own = simulation.setup.algorithm.personal_models(state, jnp.arange(8, dtype=jnp.int32))
        held.append(jax.device_get(own))
    oracles.assert_trees_close(held[1], held[0], rtol=2e-5, atol=2e-6)


# --- clients that are left out --------------------------------------------------------------------------


class Poisonable(nn.Module):
    """fc1 – ReLU – fc2, infinite for an image whose first pixel is 255."""

    @nn.compact
    def __call__(self, x, *, train=False, mask=None):
        poison = jnp.where(x[:, 0, 0, 0] > 0.999, jnp.inf, 0.0).astype(jnp.float32)
        x = nn.relu(nn.Dense(4, name="fc1")(x.reshape(x.shape[0], -1)))
        return nn.Dense(3, name="fc2")(x) * (1 + poison[:, None])


def test_a_client_that_is_left_out_keeps_its_own_and_does_not_count():
    dataset, partition = oracles.world((12, 7, 20, 3))
    dataset.train_images[partition.train[2][0]] = 255
    simulation = oracles.simulate(
        given=(dataset, partition),
        model=models.from_flax(Poisonable(), (3, 3, 1), 3, name="poisonable"),
        algorithm=PartialAveraging(leaves=("params/fc2/*",)),
        non_finite="skip",
        devices=2,
        rounds=1,
    )
    start = oracles.doubled(simulation.variables["params"])
    rows = oracles.run(simulation)
    assert [row.client for row in rows if row.metric == "left_out"] == [2]
    ids, trained, _ = oracles.train_cohort([start] * 4, simulation, 0)
    healthy = {client: model for client, model in zip(ids, trained, strict=True) if client != 2}
    mean = oracles.weighted_mean(list(healthy.values()), [len(partition.train[c]) for c in healthy])
    oracles.assert_trees_close(simulation.variables["params"], mean)
    held = personal.rows_of(simulation.setup.algorithm, simulation.state.algorithm, range(4))
    for client, model in {**healthy, 2: start}.items():
        oracles.assert_trees_close(held[client]["params"], {"fc1": mean["fc1"], "fc2": model["fc2"]})
    np.testing.assert_array_equal(held[2]["params"]["fc2"]["kernel"], start["fc2"]["kernel"])


def test_a_round_in_which_all_overflow_changes_nothing():
    simulation = oracles.simulate(
        (5, 8),
        algorithm=PartialAveraging(last=1),
        **{"lr": 3e38, "weight_decay": 1e3, "steps": 1, "non_finite": "skip", "rounds": 1},
    )
    before = jax.device_get(simulation.state.algorithm)
    rows = oracles.run(simulation)
    assert sorted(row.client for row in rows if row.metric == "left_out") == [0, 1]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(simulation.state.algorithm), before)


# --- another inner algorithm ------------------------------------------------------------------------------


def test_fedmr_recombines_what_is_shared_and_leaves_what_is_private():
    """Slots wander and carry fc1 and fc2; fc3 waits for its client."""
    config = FedMR(granularity="module", similarity=False)

    def build(context):
        return private.keep(config.build(context), private.last(context.model, 1), context.num_clients)

    simulation = oracles.simulate(
        personal.SIZES, algorithm=personal.By(build), model=personal.deep(), cohort=3, rounds=2, devices=1
    )
    start = oracles.doubled(simulation.variables["params"])
    slots, own = [start] * 3, dict.fromkeys(range(5), start["fc3"])
    for index in range(2):
        ids = simulation.inputs(index)[0].cohort.ids.tolist()
        starts = [{**slot, "fc3": own[c]} for slot, c in zip(slots, ids, strict=True)]
        _, trained, _ = oracles.train_cohort(starts, simulation, index)
        oracles.run(simulation, 1)
        state = simulation.state.algorithm
        got = [personal.row(state.inner.slots, k)["params"] for k in range(3)]
        for layer in ("fc1", "fc2"):
            left = [np.asarray(model[layer]["kernel"]) for model in trained]
            for slot in got:
                near = [np.abs(slot[layer]["kernel"] - kernel).max() for kernel in left]
                assert min(near) < 1e-5
                left.pop(int(np.argmin(near)))
        own.update({c: model["fc3"] for c, model in zip(ids, trained, strict=True)})
        slots, clients = jnp.int32([2, 0]), jnp.int32([ids[2], ids[0]])
        after = simulation.setup.algorithm.client_models(state, slots, clients)
        for place, slot in enumerate((2, 0)):
            held = personal.row(after, place)["params"]
            oracles.assert_trees_equal(held["fc1"], got[slot]["fc1"])
            oracles.assert_trees_close(held["fc3"], own[ids[slot]])
        slots = [oracles.doubled(model) for model in got]
    first, second = (simulation.inputs(index)[0].cohort.ids for index in range(2))
    assert any(first != second)  # or slots and clients could not be told apart


# --- the probe ------------------------------------------------------------------------------------------


def test_a_private_prefix_does_not_change_by_the_merge():
    """What enters fc2 comes of a private layer: the same bits before and after. What enters fc3 does not."""
    simulation = Simulation(
        from_dict(
            {
                "rounds": 1,
                "model": {"name": "mlp", "options": {"hidden": [12, 8]}},
                "partition": {"kind": "dirichlet", "alpha": 1.0, "clients": 6, "min_size": 20},
                "cohort": {"size": 3},
                "local": {"epochs": 1, "batch_size": 20, "lr": 0.1},
                "evaluation": {"every": 0},
                "peel": {"every": 1, "clients": 3, "samples": 60, "class_samples": 2},
                "algorithm": {"name": "partial", "first": 1},
            }
        )
    )
    found = {(row.client, row.layer, row.state, row.metric): row.value for row in oracles.run(simulation)}
    clients = {client for client, layer, *_ in found if layer == "fc2"}
    assert len(clients) == 3
    traces = ("trace_within", "trace_between", "trace_total", "sigma_within", "log_c")
    for client in clients:
        for metric in (*traces, "cdnv", "ncm", "ridge"):
            before, after = (found[client, "fc2", state, metric] for state in ("before", "after"))
            assert before == after, (client, metric)
        assert found[client, "fc1", "", "spread"] == 0 < found[client, "fc2", "", "spread"]
        assert found[client, "fc3", "before", "trace_within"] != found[client, "fc3", "after", "trace_within"]


# --- which leaves ---------------------------------------------------------------------------------------


def test_blocks_are_cut_where_the_network_is():
    model = personal.normed()
    below = lambda *modules: {p for p in model.layer_order() if p[1] in modules}  # noqa: E731
    assert private.first(model, 1) == below("fc1", "bn1")
    assert ("batch_stats", "bn1", "var") in private.first(model, 1)
    assert private.last(model, 2) == below("fc2", "bn2", "fc3")
    assert private.only(model, 1) == below("fc2", "bn2")
    assert private.first(model, 3) == private.last(model, 3) == set(model.layer_order())
    assert private.first(model, 0) == private.last(model, 0) == set()
    assert private.normalisation(model) == below("bn1", "bn2")
    assert private.matching(model, ["batch_stats/*", "params/fc3/bias"]) == {
        *(p for p in model.layer_order() if p[0] == "batch_stats"),
        ("params", "fc3", "bias"),
    }


@pytest.mark.parametrize(
    ("choose", "field", "told"),
    [
        (lambda model: private.first(model, 4), "algorithm.blocks", "3 blocks.*0 fc1, 1 fc2, 2 fc3"),
        (lambda model: private.last(model, 4), "algorithm.blocks", "3 blocks"),
        (lambda model: private.only(model, 3), "algorithm.only", "= 3.*3 blocks"),
        (lambda model: private.head(model, 3), "algorithm.blocks", "one of them is empty"),
        (
            lambda model: private.matching(model, ["params/*", "params/cf1/*"]),
            "algorithm.leaves",
            "'params/cf1/.'.*params/fc1/",
        ),
        (private.normalisation, "algorithm", "no batch normalisation.*model.norm"),
        (
            lambda model: private.first(dataclasses.replace(model, peel_points=()), 1),
            "algorithm.blocks",
            "peel",
        ),
    ],
)
def test_what_the_model_has_not_cannot_be_private(choose, field, told):
    with pytest.raises(UserError, match=told) as caught:
        choose(personal.deep())
    assert caught.value.field == field
