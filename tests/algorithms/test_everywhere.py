"""What every algorithm owes: devices, waves and checkpoints are invisible; plans and files know it."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

import fedjax_sim
from fedjax_sim import algorithms, memory
from fedjax_sim import config as config_lib
from fedjax_sim.algorithms import CONFIGS, catalogue
from fedjax_sim.errors import UserError
from tests import oracles
from tests.algorithms import personal

SIZES = (12, 7, 20, 3, 31, 9)  # over two devices, as a cohort of three is not
EAGER = {
    "lips": {"period": 2, "layers": "inner"},
    "fedrep": {"head_epochs": 1},
    "fedgen": {"generator_steps": 3},
    "partial": {"first": 1},
}


def config_of(name):
    return CONFIGS[name](**EAGER.get(name, {}))


def simulated(name, **keywords):
    """Three rounds of three in six clients on an MLP of three layers."""
    settings = {"cohort": 3, "rounds": 3, "momentum": 0.5, **keywords}
    model = personal.normed() if name == "fedbn" else personal.deep()
    return oracles.simulate(SIZES, algorithm=config_of(name), model=model, **settings)


def at_rate(simulation, lr):
    """The rounds to come train at `lr`; 0 is what a schedule may come to, and no setting."""
    config = simulation.setup.config
    local = dataclasses.replace(config.local, lr=lr or 1e-60)
    simulation.setup = dataclasses.replace(simulation.setup, config=dataclasses.replace(config, local=local))


def leaves(tree):
    """As NumPy arrays."""
    return jax.tree.leaves(jax.device_get(tree))


@pytest.mark.parametrize("name", CONFIGS)
def test_devices_waves_and_resuming_are_invisible(name):
    plain = simulated(name)
    start = plain.variables
    oracles.run(plain)
    wide = simulated(name, devices=2, wave=2)
    oracles.run(wide, 2)
    saved = jax.device_get(wide.state)
    again = simulated(name, devices=2, wave=2)
    again.restore(saved, 2)
    oracles.run(wide)
    oracles.run(again)
    for got, wanted in zip(leaves(again.state), leaves(wide.state), strict=True):
        np.testing.assert_array_equal(got, wanted)
    if name != "local":
        assert oracles.far_apart(plain.variables, start) > 1e-3
    oracles.assert_trees_close(wide.variables, plain.variables, atol=2e-5)
    for got, wanted in zip(leaves(wide.state.clients), leaves(plain.state.clients), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
    # Here and not in a test of its own, as the round is compiled.
    for lr in (0.0, 1e-45, 1e-39, 1e-30, 0.1):
        at_rate(plain, lr)
        rows = oracles.run(plain, 1)
        assert all(np.isfinite(row.value) for row in rows) and "left_out" not in {row.metric for row in rows}
        for leaf in leaves((plain.state, plain.variables)):
            assert np.isfinite(leaf).all(), lr


@pytest.mark.parametrize("name", CONFIGS)
def test_a_plan_counts_it(name):
    plan = memory.plan(simulated(name).setup)
    assert "activations" in str(plan)


def test_configurations_survive_yaml():
    for name, cls in CONFIGS.items():
        config = dataclasses.replace(config_lib.RunConfig(), algorithm=cls())
        assert config_lib.from_dict(config_lib.to_dict(config)).algorithm == cls(), name


def test_the_catalogue_is_complete_and_written_down():
    assert set(catalogue.ENTRIES) == set(CONFIGS)
    for name, entry in catalogue.ENTRIES.items():
        assert entry.defaults and entry.holds, name
    measured = json.loads((Path(__file__).parents[2] / "scripts/benchmark/results/methods.json").read_text())
    for name, ratio in measured["ratios"].items():
        assert ratio < 1.3 * measured["explained"][name], name
    written = (Path(fedjax_sim.__file__).parent / "ALGORITHMS.md").read_text()
    assert written == catalogue.document(measured)
    ours = {"fedindep", "local", "partial", "interpolation"}
    for name, cls in CONFIGS.items():
        assert catalogue.reference(cls).startswith("https://") or name in ours, name
    assert all(getattr(algorithms, cls.__name__) is cls for cls in CONFIGS.values())


def test_no_optimiser_is_kept_of_more_than_the_model_that_is_sent():
    for name in ("ditto", "fedrod"):
        with pytest.raises(UserError, match="keep_optimizer"):
            simulated(name, keep_optimizer=True)
