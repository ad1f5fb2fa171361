"""Cohorts, rounds in sequence, resuming, errors before anything is compiled."""

import dataclasses
import logging
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim import models
from fedjax_sim.algorithms import (
    CONFIGS,
    MOON,
    FedAdam,
    FedAvg,
    FedIndep,
    FedMR,
    FedMut,
    FedNova,
    FedOpt,
    FedProx,
    Local,
    Scaffold,
)
from fedjax_sim.config import CohortConfig, EvaluationConfig, LocalConfig, RunConfig
from fedjax_sim.core import memo
from fedjax_sim.core.algorithm import LocalRule
from fedjax_sim.core.errors import UserError
from fedjax_sim.engine.simulation import NonFiniteServer, NonFiniteUpdate, _rate
from fedjax_sim.runs.assemble import prepare
from fedjax_sim.runs.federation import Simulation
from tests import oracles
from tests.algorithms.personal import By

SIZES = (12, 7, 20, 3, 31)


@pytest.fixture(scope="module")
def small():
    """A FedMR run that switches stage, keeps momentum, and meets cohorts of every mixture of sizes."""
    simulation = oracles.simulate(
        SIZES,
        algorithm=FedMR(first_stage=2),
        cohort=3,
        rounds=5,
        momentum=0.9,
        keep_optimizer=True,
        devices=2,
        wave=2,
    )
    return simulation, jax.device_get(simulation.state)


def _rewind(small):
    simulation, start = small
    simulation.restore(start, 0)
    return simulation


# --- cohorts --------------------------------------------------------------------------------------------


def test_all_algorithms_see_the_same_cohorts():
    drawn = []
    for algorithm in (FedAvg(), FedMR(), FedIndep(), Local()):
        simulation = oracles.simulate(SIZES, algorithm=algorithm, cohort=3)
        drawn.append([simulation.inputs(r)[0].cohort.ids.tolist() for r in range(5)])
    assert drawn[0] == drawn[1] == drawn[2] == drawn[3]


# --- rounds ---------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_nothing_is_compiled_after_the_first_round(small, caplog):
    """Other clients, other sizes, the switch from averaging to recombination: the same program."""
    memo.forget()
    simulation = _rewind(small)
    oracles.run(simulation, 1)
    with jax.log_compiles(), caplog.at_level(logging.DEBUG, logger="jax"):
        oracles.run(simulation, 4)
        assert not [record for record in caplog.records if "Compiling" in record.getMessage()]
        jax.jit(lambda x: x + 1)(np.float32(1))  # the log would have told
    assert [record for record in caplog.records if "Compiling" in record.getMessage()]
    assert oracles.rounds_compiled(simulation) == 1
    assert len({tuple(simulation.inputs(r)[0].cohort.counts) for r in range(5)}) > 2


@pytest.mark.smoke
def test_a_run_that_is_resumed_equals_one_that_was_not(small):
    """Bit for bit, optimiser states of the clients included, from a state that lay on the host."""
    simulation = _rewind(small)
    rows = oracles.run(simulation)
    final = jax.device_get(simulation.state)
    _rewind(small)
    head = oracles.run(simulation, 2)
    halfway = jax.device_get(simulation.state)
    simulation.restore(jax.tree.map(np.copy, halfway), 2)
    tail = oracles.run(simulation)
    assert head + tail == rows
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(simulation.state), final)


def test_restoring_leaves_the_given_state_usable(small):
    """With donation a round overwrites its state: the caller's own must not be the one."""
    simulation = _rewind(small)
    given = simulation.state
    simulation.restore(given, 0)
    oracles.run(simulation, 1)
    simulation.restore(given, 0)
    assert np.isfinite(np.asarray(jax.tree.leaves(given)[0])).all()


def test_the_deployed_model_survives_the_next_round(small):
    simulation = _rewind(small)
    oracles.run(simulation, 1)
    held = simulation.variables
    copied = jax.device_get(held)
    oracles.run(simulation, 1)
    oracles.assert_trees_equal(held, copied)
    assert oracles.far_apart(held, simulation.variables) > 0


def test_a_larger_seed_is_another_run(small):
    simulation = _rewind(small)
    other = oracles.simulate(SIZES, algorithm=FedMR(), seed=8)
    assert oracles.far_apart(simulation.variables, other.variables) > 0


def test_abstract_state_describes_the_state(small):
    simulation = _rewind(small)
    described = jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), simulation.abstract_state()
    )
    real = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), simulation.state)
    assert described == real


def test_rows_of_a_round(small):
    simulation = _rewind(small)
    rows = list(simulation.advance())
    assert [{row.round for row in part} for part in rows] == [{1}, {2}, {3}, {4}, {5}]
    for part in rows:
        assert {row.metric for row in part} == {"padding_waste", "lr", "train_loss", "slot_similarity"}
    assert simulation.round == 5
    assert list(simulation.advance()) == []


def test_stages_are_averaging_and_then_recombination(small):
    """Before R0 all slots are one model, from R0 on they are not; the mean of the slots is deployed."""
    simulation = _rewind(small)
    spread = []
    for _ in range(4):
        oracles.run(simulation, 1)
        state = oracles.state_of(simulation).algorithm
        spread.append(oracles.dispersion(oracles.leaves(state.slots)))
        oracles.assert_trees_close(
            oracles.map_trees(lambda leaf: leaf.mean(0), state.slots), state.mean, atol=1e-6
        )
    assert spread[0] < 1e-12 and spread[1] < 1e-12
    assert spread[2] > 1e-4 and spread[3] > 1e-4


def test_a_round_says_which_client_was_not_finite():
    """lr of 3e38: with an L2 term the first step leaves float32."""
    simulation = oracles.simulate((5, 8), lr=3e38, weight_decay=1e3, steps=1, cohort=1, rounds=3)
    client = int(simulation.inputs(0)[0].cohort.ids[0])
    with pytest.raises(NonFiniteUpdate, match=rf"round 1 .*client\(s\) \[{client}\]") as caught:
        oracles.run(simulation, 1)
    assert caught.value.field == "local.non_finite"
    assert "server" not in str(caught.value)  # FedAvg has no learning rate of its own


@pytest.mark.parametrize(
    ("algorithm", "name"), [("fedadam", "algorithm.lr"), ("scaffold", "algorithm.server_lr")]
)
def test_where_all_clients_fail_the_rate_of_a_server_that_has_one_is_named(algorithm, name):
    made = CONFIGS[algorithm]()
    simulation = oracles.simulate((5, 8), algorithm=made, lr=3e38, weight_decay=1e3, steps=1, cohort=1)
    with pytest.raises(NonFiniteUpdate) as caught:
        oracles.run(simulation, 1)
    assert f"the server's learning rate ({name})" in str(caught.value)


def test_the_rate_of_an_algorithm_inside_another_counts():
    Outer = dataclasses.make_dataclass("Outer", [("inner", Any)])
    assert _rate(Outer(CONFIGS["fedadam"]()), "algorithm") == "algorithm.inner.lr"
    assert _rate(Outer(CONFIGS["fedavg"]()), "algorithm") is None


def test_an_upload_is_named_as_a_cause_where_a_method_has_one():
    def uploading(context):
        def end(start, trained, client_state, extra, steps, lr, gradient):
            return client_state, jnp.log(-jnp.ones(()))

        return dataclasses.replace(FedAvg().build(context), local=LocalRule(finish_round=end))

    told = r"round 1 .*client\(s\) \[0, 1\].*an upload of local.finish_round.*execution.debug names"
    with pytest.raises(NonFiniteUpdate, match=told):
        oracles.run(oracles.simulate((5, 8), algorithm=By(uploading), steps=1, rounds=1))
    with pytest.raises(NonFiniteUpdate) as caught:
        oracles.run(oracles.simulate((5, 8), lr=3e38, weight_decay=1e3, steps=1, rounds=1))
    assert "upload" not in str(caught.value)


def _from_round_2(value, otherwise, number):
    """`otherwise`, and from round 2 on `value` in its first leaf's place."""
    leaves, tree = jax.tree.flatten(otherwise)
    leaves[0] = jnp.where(number > 0, leaves[0] * value, leaves[0])
    return jax.tree.unflatten(tree, leaves)


def _merging(record, value):
    def merge(state, cohort, starts, results, key):
        new, metrics = record.merge(state, cohort, starts, results, key)
        return _from_round_2(value, new, cohort.round), metrics

    return dataclasses.replace(record, merge=merge)


def _deploying(record, value):
    def deploy(state):
        return {"params": jax.tree.map(lambda leaf: leaf * value, state.model["params"])}

    return dataclasses.replace(record, deploy=deploy)


def _dispatching(record, value):
    def dispatch(state, cohort, key):
        starts = record.dispatch(state, cohort, key)
        return dataclasses.replace(starts, models=_from_round_2(value, starts.models, cohort.round))

    return dataclasses.replace(record, dispatch=dispatch)


@pytest.mark.parametrize(
    ("inner", "spoil", "value", "number", "told"),
    [
        (FedAvg(), _merging, np.nan, 2, r"merge made.*: state\.model\['params'\]\['fc1'\]\['bias'\], deploy"),
        (FedAvg(), _merging, np.inf, 2, r"merge made.*: state\.model\['params'\]\['fc1'\]\['bias'\], deploy"),
        (FedAvg(), _deploying, np.nan, 1, r"deploy made.*: deploy\(state\)\['params'\].* and 1 more"),
        (FedAvg(), _dispatching, np.nan, 2, r"dispatch sent to client\(s\) \[0, 1\]"),
        (
            Local(),
            _merging,
            np.nan,
            3,
            r"dispatch sent to client\(s\) \[0, 1\].*round 2.*: state\.models\['p",
        ),
    ],
    ids=["merge", "merge-inf", "deploy", "dispatch", "stacked"],
)
def test_what_the_server_makes_is_not_blamed_on_clients(inner, spoil, value, number, told):
    """Not even where clients whose updates are not finite may be left out."""
    algorithm = By(lambda context: spoil(inner.build(context), value))
    simulation = oracles.simulate((5, 8), algorithm=algorithm, steps=1, rounds=3, non_finite="skip")
    oracles.run(simulation, number - 1)
    with pytest.raises(NonFiniteServer, match=rf"in round {number} (its|what its) {told}") as caught:
        oracles.run(simulation, 1)
    assert caught.value.field == "algorithm"


def test_a_server_optimiser_that_diverges_is_named():
    simulation = oracles.simulate((5, 8), algorithm=FedOpt("sgd", 3e38), steps=1, lr=1e4)
    with pytest.raises(NonFiniteServer, match=r"'fedopt'.*merge made.*state\.inner\.model.*algorithm\.lr"):
        oracles.run(simulation)


def test_evaluation_is_due_every_so_often_and_at_the_end(small):
    simulation = _rewind(small)
    config = dataclasses.replace(simulation.setup.config, evaluation=EvaluationConfig(every=2), rounds=5)
    simulation.setup = dataclasses.replace(simulation.setup, config=config)
    due = []
    for simulation.round in range(6):
        due.append(simulation.due())
    assert due == [True, False, True, False, True, True]


# --- mistakes -------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_compiles(caplog):
    with jax.log_compiles(), caplog.at_level(logging.DEBUG, logger="jax"):
        yield
    assert not [record for record in caplog.records if "Compiling" in record.getMessage()]


def _prepare(algorithm=None, model=None, given=None, **parts):
    dataset, partition = given or oracles.world(SIZES)
    config = RunConfig(algorithm=algorithm or FedAvg(), **{"cohort": CohortConfig(size=3), **parts})
    return prepare(config, dataset=dataset, partition=partition, model=model)


@pytest.mark.parametrize(
    ("field", "parts"),
    [
        ("cohort.size", {"cohort": CohortConfig(size=6)}),
        ("evaluation.per_client", {"evaluation": EvaluationConfig(per_client=True)}),
        ("local.optimizer", {"local": LocalConfig(optimizer="adamm")}),
        ("local.optimizer", {"local": LocalConfig(optimizer="lbfgs")}),
        ("local.optimizer", {"local": LocalConfig(optimizer="polyak_sgd")}),
        ("local.optimizer", {"local": LocalConfig(optimizer="noisy_sgd")}),
        ("algorithm.optimizer", {"algorithm": FedOpt("adamm", 0.1)}),
        ("algorithm.optimizer", {"algorithm": FedOpt("lbfgs", 0.1)}),
        ("algorithm.optimizer", {"algorithm": FedOpt("polyak_sgd", 0.1)}),
        ("algorithm.options.beta", {"algorithm": FedOpt("sgd", 0.1, {"beta": 1})}),
        ("algorithm.inner", {"algorithm": FedAdam(inner=FedMR())}),
        ("algorithm.inner", {"algorithm": FedProx(FedNova())}),
        ("algorithm.inner", {"algorithm": MOON(Local())}),
        ("cohort.size", {"algorithm": FedMut(), "cohort": CohortConfig(size=1)}),
        ("local.optimizer", {"algorithm": Scaffold(), "local": LocalConfig(optimizer="adam")}),
    ],
)
def test_mistakes_are_named_before_anything_is_compiled(field, parts, nothing_compiles):
    with pytest.raises(UserError) as caught:
        _prepare(**parts)
    assert caught.value.field == field
    assert str(caught.value).startswith(field)


@pytest.mark.parametrize(
    ("algorithm", "twice"),
    [
        (FedAvg(), True),
        (FedAvg("uniform"), False),
        (FedNova(), True),
        (FedNova("uniform"), False),
        (FedProx(FedAdam(inner=FedAvg())), True),
        (FedProx(FedAdam(inner=FedAvg("uniform"))), False),
        (FedMR(), False),
        (Local(), False),
    ],
)
def test_a_size_that_counts_twice_is_warned_of(algorithm, twice):
    for sampling in ("by_size", "uniform", "cyclic"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _prepare(algorithm, cohort=CohortConfig(size=3, sampling=sampling))
        told = [str(one.message) for one in caught if "enters the mean model twice" in str(one.message)]
        assert len(told) == (twice and sampling == "by_size")


def test_more_devices_than_there_are():
    with pytest.raises(UserError, match=r"execution\.devices = 64"):
        oracles.simulate(SIZES, devices=64)


def test_a_model_for_other_images_is_refused():
    with pytest.raises(UserError, match="model"):
        _prepare(model=models.create("mlp", (4, 4, 1), 3, hidden=()))
    with pytest.raises(UserError, match="model"):
        _prepare(model=models.create("mlp", (3, 3, 1), 2, hidden=()))


def test_a_setup_may_be_run_as_it_is(small):
    """What `prepare` resolved needs no resolving again, and both runs are the same."""
    simulation = _rewind(small)
    again = Simulation(simulation.setup)
    assert again.setup is simulation.setup
    oracles.assert_trees_equal(again.variables, simulation.variables)
