"""FedBN, FedPer, FedRep, LG-FedAvg, FedBABU, partial averaging, interpolation: what each adds to the rest."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

import fedjax_sim as fs
from fedjax_sim import config as config_lib
from fedjax_sim import runs
from fedjax_sim.algorithms import (
    CONFIGS,
    FedAvg,
    FedBABU,
    FedBN,
    FedPer,
    FedRep,
    LayerInterpolation,
    LGFedAvg,
    Local,
    PartialAveraging,
)
from fedjax_sim.cli import flags
from fedjax_sim.core.errors import UserError
from fedjax_sim.runs.federation import Simulation
from tests import oracles
from tests.algorithms import personal
from tests.algorithms.families import WIDE_OR_SINGLE

FC3 = {("fc3", "kernel"), ("fc3", "bias")}
CONTEXT = oracles.context(personal.deep(), num_clients=5, cohort_size=2, rounds=3, epochs=5)


def simulate(algorithm, **keywords):
    settings = {"model": personal.deep(), "cohort": 2, **keywords}
    return oracles.simulate(personal.SIZES, algorithm=algorithm, **settings)


def stack_of(simulation):
    """What all clients hold, [N, …]."""
    ids = jnp.arange(simulation.setup.num_clients, dtype=jnp.int32)
    return jax.device_get(simulation.setup.algorithm.personal_models(simulation.state.algorithm, ids))


# --- FedBN ----------------------------------------------------------------------------------------------


def test_fedbn_keeps_normalisation_at_home():
    """Two rounds, each beside the same clients training alone from the same models."""
    simulation = simulate(FedBN(), model=personal.normed())
    alone = simulate(Local(), model=personal.normed())
    start = personal.flat(simulation.variables)
    bn = {path for path in start if path[1].startswith("bn")}
    assert len(bn) == 8
    drawn = set()
    for index in range(2):
        before = stack_of(simulation)
        alone.restore(
            dataclasses.replace(alone.state, algorithm=alone.state.algorithm.replace(models=before)), index
        )
        oracles.run(simulation, 1)
        oracles.run(alone, 1)
        ids = simulation.inputs(index)[0].cohort.ids.tolist()
        drawn.update(ids)
        trained, held = personal.flat(stack_of(alone)), personal.flat(stack_of(simulation))
        sizes = oracles.sizes_of(simulation)[ids]
        for path, leaf in held.items():
            if path in bn:
                np.testing.assert_array_equal(leaf, trained[path])  # of those not drawn, what they had
            else:
                mean = np.average(trained[path][ids].astype(np.float64), axis=0, weights=sizes)
                np.testing.assert_allclose(leaf, np.stack([mean] * 5), rtol=1e-5, atol=1e-6)
    for path in bn:
        moved = {client for client in range(5) if not np.array_equal(held[path][client], start[path])}
        assert moved == drawn


# --- FedPer and LG-FedAvg -------------------------------------------------------------------------------


@pytest.mark.slow
def test_fedper_and_lg_fedavg_are_the_ends_of_partial_averaging():
    simulation = simulate(FedPer(weights="uniform"))
    personal.assert_rounds(simulation, FC3, 2, weights="uniform")
    for method, same in (
        (FedPer(blocks=2), PartialAveraging(last=2)),
        (LGFedAvg(), PartialAveraging(first=1)),
        (LGFedAvg(blocks=2, weights="uniform"), PartialAveraging(first=2, weights="uniform")),
    ):
        states = [
            jax.eval_shape(
                config.build(CONTEXT).init, jax.random.key(0), CONTEXT.model.init(jax.random.key(0))
            )
            for config in (method, same)
        ]
        assert states[0] == states[1]
        cohort = simulation.inputs(0)[0].cohort
        weights = [config.build(CONTEXT).weights(cohort) for config in (method, same)]
        np.testing.assert_array_equal(*weights)


# --- FedRep ---------------------------------------------------------------------------------------------


def head_then_body(head_epochs):
    """`oracles.train_cohort` in two phases: plain SGD of fc3 and then of the rest."""

    def train(starts, simulation, index):
        setup = simulation.setup
        local, ids = setup.config.local, simulation.inputs(index)[0].cohort.ids.tolist()
        trained = []
        for client, params in zip(ids, starts, strict=True):
            own = setup.partition.train[client]
            x, y = oracles.normalised(setup.dataset.train_images[own]), setup.dataset.train_labels[own]
            batches = list(oracles.client_batches(setup.config.seed, index, client, len(own), local))
            head_steps = head_epochs * len(batches) // local.epochs
            for step, chosen in enumerate(batches):
                _, gradient = oracles.mlp_gradient(params, x[chosen], y[chosen])
                moving = {"fc3"} if step < head_steps else {"fc1", "fc2"}
                params = {
                    layer: oracles.map_trees(lambda p, g: p - local.lr * g, leaves, gradient[layer])
                    if layer in moving
                    else leaves
                    for layer, leaves in params.items()
                }
            trained.append(params)
        return ids, trained, None

    return train


@pytest.mark.parametrize("layout", WIDE_OR_SINGLE)
def test_fedrep_trains_head_then_body(layout):
    simulation = simulate(FedRep(head_epochs=2), epochs=3, cohort=4 if layout else 2, **layout)
    personal.assert_rounds(simulation, FC3, 1 if layout else 2, train=head_then_body(2))


def test_weight_decay_does_not_gather_while_a_part_is_frozen():
    """With no gradient to speak of, the body decays by the steps of its own epoch alone."""
    simulation = simulate(
        FedRep(head_epochs=2), epochs=3, cohort=1, rounds=1, momentum=0.9, lr=1e-3, weight_decay=100.0
    )
    start = jax.device_get(simulation.variables["params"])
    steps = int(simulation.inputs(0)[0].cohort.steps[0]) // 3
    oracles.run(simulation)
    w, buffer = 1.0, 0.0
    for _ in range(steps):
        buffer = 0.9 * buffer + 100.0 * w
        w -= 1e-3 * buffer
    got = jax.device_get(simulation.variables["params"])
    for layer in ("fc1", "fc2"):
        ratio = got[layer]["kernel"] / start[layer]["kernel"]
        np.testing.assert_allclose(np.median(ratio), w, atol=0.03)


def test_a_frozen_part_does_not_move_at_all():
    """The head phase alone and a whole round of one client: which leaves each has moved, to the bit."""

    def head_only(context):  # the run has the head's epoch and no more
        context = dataclasses.replace(context, local=fs.LocalConfig(epochs=2))
        return FedRep(head_epochs=1, weights="uniform").build(context)

    held = []
    for epochs in (1, 2):
        simulation = simulate(
            personal.By(head_only), model=personal.normed(), cohort=1, rounds=1, epochs=epochs, momentum=0.9
        )
        start = personal.flat(simulation.variables)
        oracles.run(simulation)
        client = simulation.inputs(0)[0].cohort.ids[0]
        held.append(personal.flat(personal.row(stack_of(simulation), client)))
    head, whole = held
    assert any(path[0] == "batch_stats" for path in start)
    for path in start:
        if path[1] == "fc3":
            assert not np.array_equal(head[path], start[path])
            np.testing.assert_array_equal(whole[path], head[path])
        else:
            np.testing.assert_array_equal(head[path], start[path])
            # A bias before a batch normalisation has no gradient but rounding.
            assert path[1:] in {("fc1", "bias"), ("fc2", "bias")} or not np.array_equal(
                whole[path], start[path]
            )


# --- FedBABU --------------------------------------------------------------------------------------------


def test_fedbabu_never_moves_the_head():
    simulation = simulate(FedBABU(), cohort=3, rounds=3)
    start = oracles.doubled(simulation.variables["params"])
    shared = start
    for index in range(3):
        ids, trained, _ = head_then_body(0)([shared] * 3, simulation, index)
        shared = oracles.weighted_mean(trained, oracles.sizes_of(simulation)[ids])
    oracles.run(simulation)
    final = simulation.variables["params"]
    oracles.assert_trees_close(final, shared)
    oracles.assert_trees_equal(oracles.doubled(final)["fc3"], start["fc3"])
    assert oracles.far_apart(final["fc1"], start["fc1"]) > 1e-2


# --- interpolation --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("algorithm", "shares"),
    [
        pytest.param(LayerInterpolation(mean=0.3), (0, 0.3, 0.6), marks=pytest.mark.slow),
        (LayerInterpolation(mean=0.5, profile="falling", weights="uniform"), (1, 0.5, 0)),
    ],
    ids=["rising", "falling"],
)
def test_interpolation_equals_numpy(algorithm, shares):
    simulation = simulate(algorithm, rounds=3, devices=2)
    model = oracles.doubled(simulation.variables["params"])
    deviation = dict.fromkeys(range(5), oracles.map_trees(np.zeros_like, model))
    for index in range(3):
        ids = simulation.inputs(index)[0].cohort.ids.tolist()
        starts = [oracles.map_trees(np.add, model, deviation[c]) for c in ids]
        _, trained, _ = oracles.train_cohort(starts, simulation, index)
        counts = oracles.sizes_of(simulation)[ids] if algorithm.weights == "samples" else [1] * len(ids)
        model = oracles.weighted_mean(trained, counts)
        for client, one in zip(ids, trained, strict=True):
            deviation[client] = {
                layer: oracles.map_trees(lambda w, m, s=share: s * (w - m), one[layer], model[layer])
                for layer, share in zip(("fc1", "fc2", "fc3"), shares, strict=True)
            }
    oracles.run(simulation)
    oracles.assert_trees_close(simulation.variables["params"], model)
    held = stack_of(simulation)
    for client in range(5):
        expected = oracles.map_trees(np.add, model, deviation[client])
        oracles.assert_trees_close(personal.row(held, client)["params"], expected)
    assert max(np.abs(leaf).max() for tree in deviation.values() for leaf in oracles.leaves(tree)) > 1e-2


def test_shares_have_one_mean():
    model = personal.deep()
    shares = {
        profile: LayerInterpolation(mean=0.4, profile=profile).shares(model)
        for profile in ("rising", "falling", "flat")
    }
    np.testing.assert_allclose(shares["rising"], [0, 0.4, 0.8])
    np.testing.assert_allclose(shares["falling"], [0.8, 0.4, 0])
    np.testing.assert_allclose(shares["flat"], [0.4] * 3)


def test_interpolation_with_no_share_is_fedavg():
    """Bit for bit, batch statistics included."""
    built = [
        simulate(algorithm, model=personal.normed(), cohort=3, rounds=3, devices=1)
        for algorithm in (FedAvg(), LayerInterpolation(mean=0.0))
    ]
    for simulation in built:
        oracles.run(simulation)
    oracles.assert_trees_equal(built[1].variables, built[0].variables)
    held = stack_of(built[1])
    for client in range(5):
        oracles.assert_trees_equal(personal.row(held, client), built[0].variables)


@pytest.mark.slow  # test_interpolation_equals_numpy asks for other shares
def test_interpolation_with_all_of_it_is_training_alone():
    """But for batch statistics, which are averaged."""
    alone = simulate(Local(), cohort=5, rounds=2)
    kept = simulate(LayerInterpolation(mean=1.0, profile="flat"), cohort=5, rounds=2)
    for simulation in (alone, kept):
        oracles.run(simulation)
    oracles.assert_trees_close(stack_of(kept), stack_of(alone), rtol=1e-4, atol=1e-5)


def test_interpolation_averages_batch_statistics():
    simulation = simulate(LayerInterpolation(mean=0.5, profile="flat"), model=personal.normed(), cohort=3)
    oracles.run(simulation)
    held, mean = stack_of(simulation), simulation.variables
    for client in range(5):
        oracles.assert_trees_equal(personal.row(held, client)["batch_stats"], mean["batch_stats"])
    assert oracles.far_apart(personal.row(held, 0)["params"], personal.row(held, 4)["params"]) > 1e-3
    state = simulation.state.algorithm
    assert all(jax.tree.leaves(simulation.setup.algorithm.is_stacked(state).deviation))
    assert not any(jax.tree.leaves(simulation.setup.algorithm.is_stacked(state).model))


def test_a_client_that_is_left_out_keeps_its_deviation():
    """In a round in which every update overflows nothing changes, neither the mean nor what clients hold."""
    simulation = oracles.simulate(
        (5, 8),
        algorithm=LayerInterpolation(),
        epochs=1,
        rounds=2,
        non_finite="skip",
        weight_decay=1e3,
        lr=1e-4,
    )
    oracles.run(simulation, 1)
    before = jax.device_get(simulation.state.algorithm)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(before.deviation)) > 0
    inputs, _ = simulation.inputs(1)
    with jax.set_mesh(simulation.mesh):
        state, outputs = simulation.program(
            simulation.state, inputs.replace(lr=np.float32(3e38)), simulation.data, None
        )
    assert not np.asarray(outputs.included).any()
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.algorithm), before)


# --- by name, cut and resumed ---------------------------------------------------------------------------

BY_NAME = {
    "fedbn": (["--algorithm.weights", "uniform"], FedBN(weights="uniform")),
    "fedper": (["--algorithm.blocks", "2"], FedPer(blocks=2)),
    "fedrep": (["--algorithm.head-epochs", "1"], FedRep(head_epochs=1)),
    "lg_fedavg": (["--algorithm.blocks", "2"], LGFedAvg(blocks=2)),
    "fedbabu": ([], FedBABU()),
    "partial": (
        ["--algorithm.leaves", "[params/fc2/*, '*/bias']"],
        PartialAveraging(leaves=("params/fc2/*", "*/bias")),
    ),
    "interpolation": (["--algorithm.profile", "falling"], LayerInterpolation(profile="falling")),
}


@pytest.fixture
def by_name(tmp_path, name):
    """The configuration that a file and words of the command line give."""
    path = tmp_path / "run.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "rounds": 3,
                "algorithm": {"name": name},
                "partition": {"clients": 8, "local_test": "holdout"},
                "local": {"epochs": 2, "batch_size": 64, "lr": 0.1},
                "cohort": {"size": 4},
                "evaluation": {"every": 2, "per_client": True},
                "output": {
                    "checkpoint_every": 1, "tensorboard": False, "figures": False, "progress": False,
                },
            }
        )
    )  # fmt: skip
    return flags.parse([str(path), *BY_NAME[name][0]], "run", "")[0]


@pytest.mark.parametrize("name", BY_NAME)
def test_each_is_asked_for_by_name(by_name, name):
    assert by_name.algorithm == BY_NAME[name][1]
    assert config_lib.from_dict(config_lib.to_dict(by_name)) == by_name


@pytest.mark.slow  # each of them from a state on the host: tests/algorithms/test_everywhere.py
@pytest.mark.parametrize("name", BY_NAME)
def test_a_run_by_name_cut_and_resumed_is_the_run_uncut(tmp_path, monkeypatch, by_name):
    model, config = personal.normed((8, 8, 1), 10), by_name
    whole = runs.run(config, model=model)
    assert whole.metrics.last("client_accuracy_mean") > 0

    steps = Simulation.steps

    def cut(self, most=None):
        if self.round == 2:
            raise RuntimeError("cut")
        return steps(self, 1)

    folder = dataclasses.replace(config.output, dir=str(tmp_path / "run"))
    with monkeypatch.context() as patch:
        patch.setattr(Simulation, "steps", cut)
        with pytest.raises(RuntimeError, match="cut"):
            runs.run(dataclasses.replace(config, output=folder), model=model)
    done = runs.resume(tmp_path / "run", model=model)
    assert done.finished and list(done.metrics) == list(whole.metrics)
    oracles.assert_trees_equal(done.variables, whole.variables)


# --- mistakes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "field", "told"),
    [
        ("fedper", {"blocks": -1}, "algorithm.blocks", "at least 0"),
        ("fedper", {"blocks": 4}, "algorithm.blocks", "3 blocks"),
        ("lg_fedavg", {"blocks": 4}, "algorithm.blocks", "3 blocks"),
        ("fedbn", {}, "algorithm", "no batch normalisation"),
        ("fedbn", {"weights": "even"}, "algorithm.weights", "samples"),
        ("fedbabu", {"blocks": 3}, "algorithm.blocks", "empty"),
        ("fedbabu", {"blocks": 0}, "algorithm.blocks", "at least 1"),
        ("fedrep", {"blocks": 3}, "algorithm.blocks", "empty"),
        ("fedrep", {"head_epochs": 0}, "algorithm.head_epochs", "at least 1"),
        ("fedrep", {"head_epochs": 5}, "algorithm.head_epochs", "local.epochs = 5"),
        ("partial", {}, "algorithm.first", "first, last, only, leaves"),
        ("partial", {"first": 1, "only": 0}, "algorithm.only", "algorithm.first = 1 says"),
        ("partial", {"last": 1, "leaves": ["*"]}, "algorithm.leaves", "algorithm.last"),
        ("partial", {"only": 3}, "algorithm.only", "0 fc1, 1 fc2, 2 fc3"),
        ("partial", {"leaves": ["fc1/*"]}, "algorithm.leaves", "params/fc1"),
        ("interpolation", {"mean": 0.6}, "algorithm.mean", "0.5"),
        ("interpolation", {"mean": 1.1, "profile": "flat"}, "algorithm.mean", "1.0"),
        ("interpolation", {"profile": "steep"}, "algorithm.profile", "rising"),
    ],
)
def test_mistakes_are_named(name, settings, field, told):
    with pytest.raises(UserError, match=told) as caught:
        CONFIGS[name](**settings).build(CONTEXT)
    assert caught.value.field == field


def test_what_does_not_fit_the_run_is_told_before_it_starts():
    with pytest.raises(UserError, match="counts steps") as caught:
        simulate(FedRep(), steps=3)
    assert caught.value.field == "local.epochs"
    with pytest.raises(UserError, match=r"none is left"):
        simulate(FedRep(), epochs=4)
    shallow = dataclasses.replace(CONTEXT.model, peel_points=CONTEXT.model.peel_points[:1])
    with pytest.raises(UserError, match="1 blocks"):
        LayerInterpolation().build(dataclasses.replace(CONTEXT, model=shallow))
    assert LayerInterpolation(mean=1.0, profile="flat").shares(shallow) == [1.0]
