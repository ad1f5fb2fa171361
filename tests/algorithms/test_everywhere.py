"""What every algorithm owes: devices, waves and checkpoints are invisible; plans and files know it."""

import dataclasses
import importlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import fedjax_sim
from fedjax_sim import algorithms, models
from fedjax_sim import config as config_lib
from fedjax_sim.algorithms import CONFIGS
from fedjax_sim.algorithms.card import Card
from fedjax_sim.core.errors import UserError
from fedjax_sim.engine.simulation import Simulation
from fedjax_sim.models import norms, peel
from fedjax_sim.reports import algorithm_docs
from fedjax_sim.runs import plan as planning
from tests import oracles
from tests.algorithms.families import PRESETS, STATELESS, but_slow, one_of_each

SIZES = (12, 7, 20, 3, 31, 9, 5)  # which two devices divide as little as a cohort of three
EAGER = {
    "lips": {"period": 2, "layers": "inner"},
    "fedrep": {"head_epochs": 1},
    "fedgen": {"generator_steps": 3},
    "partial": {"first": 1},
}


FIRST = 2**24 + 1
"""Of a counter: as a float32 it would be one less."""


class Counting(nn.Module):
    """Dense layers, and state of many kinds: a count of batches, flags, a mean in half precision."""

    widths: tuple[int, ...]
    normalises: bool = False

    @nn.compact
    def __call__(self, x, *, train=False, mask=None):
        batches = self.variable("told", "batches", lambda: jnp.int32(FIRST))
        bright = self.variable("told", "bright", lambda: jnp.zeros(9, bool))
        grey = self.variable("told", "grey", lambda: jnp.float16(0))
        x = x.reshape(x.shape[0], -1)
        if train and not self.is_initializing():
            rows = jnp.ones(len(x), bool) if mask is None else mask
            batches.value = batches.value + rows.any().astype(jnp.int32)
            bright.value = bright.value | ((x > 0.85) & rows[:, None]).any(0)
            now = jnp.where(rows[:, None], x, 0).sum() / (9 * jnp.maximum(rows.sum(), 1).astype(jnp.float32))
            grey.value = (0.9 * grey.value.astype(jnp.float32) + 0.1 * now).astype(jnp.float16)
        for depth, width in enumerate(self.widths, 1):
            peel(self, f"fc{depth}", x)
            x = nn.Dense(width, name=f"fc{depth}")(x)
            if depth < len(self.widths):
                x = norms.BatchNorm(name=f"bn{depth}")(x, train=train, mask=mask) if self.normalises else x
                x = nn.relu(x)
        return x


class Exact(nn.Module):
    """Three dense layers whose own products ask for all of float32."""

    @nn.compact
    def __call__(self, x, *, train=False, mask=None):
        del train, mask
        x = x.reshape(x.shape[0], -1)
        for depth, width in enumerate((5, 4, 3), 1):
            peel(self, f"fc{depth}", x)
            x = nn.Dense(width, name=f"fc{depth}", precision="highest")(x)
            x = norms.BatchNorm(name=f"bn{depth}")(x) if depth < 3 else x
        return x


def config_of(name):
    return CONFIGS[name](**EAGER.get(name, {}))


def prepared(name, **keywords):
    """Three rounds of three in seven clients on a model of few layers and state that is no float."""
    settings = {"cohort": 3, "rounds": 3, "momentum": 0.5, **keywords}
    widths = (5, 4, 3) if name == "lips" else (5, 3)  # which looks at what is between the first and the last
    model = models.from_flax(Counting(widths, name == "fedbn"), (3, 3, 1), 3, name="counting")
    return oracles.prepared(SIZES, algorithm=config_of(name), model=model, **settings)


def at_rate(simulation, lr):
    """The rounds to come train at `lr`; 0 is what a schedule may come to, and no setting."""
    config = simulation.setup.config
    local = dataclasses.replace(config.local, lr=lr or 1e-60)
    simulation.setup = dataclasses.replace(simulation.setup, config=dataclasses.replace(config, local=local))


def leaves(tree):
    """As NumPy arrays."""
    return jax.tree.leaves(jax.device_get(tree))


OWN = {"local", "fedcac", "partial", "lg_fedavg"}
"""Whose clients go on from a count of their own; in the other cases from the server's."""


def told(simulation):
    """What the deployed model says beside its parameters."""
    return jax.device_get(simulation.variables["told"])


def counted(name, simulation, cohorts):
    """The deployed model's count of batches, and whose images it has been trained on."""
    steps, server = simulation.setup.steps, FIRST
    if name == "fedrep":  # the count is part of the body, which trains in one of two epochs
        steps = steps // 2
    own = dict.fromkeys(range(len(SIZES)), FIRST)
    for ids in cohorts:
        for client in ids:
            own[client] = int(steps[client]) + (own[client] if name in OWN else server)
        server = max(own[client] for client in ids)
    return max(own.values()) if name == "local" else server


SHOWN = ("fedopt", "lg_fedavg", "fedrep", "pfedsd")
"""By others: `fedadam` is the class of `fedopt` with more state; clients of `partial` and `fedper` keep
layers as those of `lg_fedavg` and `fedrep` do; `moon` keeps a model of each client as `pfedsd` does."""


@pytest.mark.parametrize("name", but_slow(CONFIGS, *PRESETS, *STATELESS, *SHOWN))
def test_devices_waves_and_resuming_are_invisible(name):
    """Nor do counts and flags suffer from an average. All start from what two devices make."""
    setup = prepared(name, devices=2, wave=2)
    wide, again, plain = Simulation(setup), Simulation(setup), Simulation(prepared(name))
    plain.restore(oracles.state_of(wide), 0)
    start, first, cohorts = plain.variables, told(plain), []
    for number in range(3):
        cohorts.append(plain.inputs(number)[0].cohort.ids.tolist())
        oracles.run(plain, 1)
    last = told(plain)
    assert {key: leaf.dtype for key, leaf in last.items()} == {key: leaf.dtype for key, leaf in first.items()}
    if name in ("fedmr", "fedindep"):  # where a slot's model goes next is a matter of chance
        assert 0 < last["batches"] - FIRST <= 3 * max(plain.setup.steps)
    else:
        assert last["batches"] == counted(name, plain, cohorts)
    assert 0 < last["bright"].sum() < 9
    assert last["grey"] != 0
    oracles.run(wide, 2)
    again.restore(oracles.state_of(wide), 2)
    oracles.run(wide)
    oracles.run(again)
    resumed, uncut = oracles.state_of(again), oracles.state_of(wide)
    for got, wanted in zip(leaves(resumed), leaves(uncut), strict=True):
        np.testing.assert_array_equal(got, wanted)
    if name != "local":
        assert oracles.far_apart(plain.variables["params"], start["params"]) > 1e-3
    oracles.assert_trees_close(wide.variables["params"], plain.variables["params"], atol=2e-5)
    for key in ("batches", "bright"):
        np.testing.assert_array_equal(told(wide)[key], last[key])
    np.testing.assert_allclose(told(wide)["grey"], last["grey"], rtol=2e-3)
    for got, wanted in zip(leaves(uncut.clients), leaves(oracles.state_of(plain).clients), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
    # Here and not in a test of its own, as the round is compiled.
    for lr in (0.0, 1e-45, 1e-39, 1e-30, 0.1):
        at_rate(plain, lr)
        rows = oracles.run(plain, 1)
        assert all(np.isfinite(row.value) for row in rows) and "left_out" not in {row.metric for row in rows}
        for leaf in leaves((plain.state, plain.variables)):
            assert np.isfinite(leaf).all(), lr


@pytest.mark.parametrize("name", one_of_each(CONFIGS, *PRESETS))
def test_a_plan_counts_it(name, monkeypatch):
    setup = prepared(name)
    with monkeypatch.context() as patched:  # not even by an algorithm that chooses its clients
        patched.setattr(Simulation, "_initial_state", lambda self: pytest.fail("a plan makes no state"))
        plan = planning.plan(setup)
    parts = {
        when: sum(part.device for part in plan.parts if part.when == when) for when in ("always", "round")
    }
    assert parts["round"] > 0 and plan.peak > parts["always"] + parts["round"] - 1


def test_configurations_survive_yaml():
    for name, cls in CONFIGS.items():
        config = dataclasses.replace(config_lib.RunConfig(), algorithm=cls())
        assert config_lib.from_dict(config_lib.to_dict(config)).algorithm == cls(), name


def test_the_catalogue_is_complete_and_written_down():
    for name, cls in CONFIGS.items():
        assert cls.card.defaults and cls.card.holds, name
    measured = json.loads((Path(__file__).parents[2] / "scripts/benchmark/results/methods.json").read_text())
    for name, ratio in measured["ratios"].items():
        assert ratio < 1.3 * measured["explained"][name], name
    written = (Path(fedjax_sim.__file__).parent / "algorithms" / "ALGORITHMS.md").read_text()
    assert written == algorithm_docs.document(measured)
    ours = {"fedindep", "local", "partial", "interpolation"}
    for name, cls in CONFIGS.items():
        assert algorithm_docs.reference(cls).startswith("https://") or name in ours, name
    for cls in CONFIGS.values():
        assert getattr(algorithms, cls.__name__) is getattr(fedjax_sim, cls.__name__) is cls
        assert cls.__name__ in algorithms.__all__ and cls.__name__ in fedjax_sim.__all__


def test_no_optimiser_is_kept_of_more_than_the_model_that_is_sent():
    for name in ("ditto", "fedrod"):
        with pytest.raises(UserError, match="keep_optimizer"):
            prepared(name, keep_optimizer=True)


def test_a_file_of_methods_is_in_the_table():
    """A configuration with a card that the table does not have could be found by nobody."""
    folder = Path(fedjax_sim.__file__).parent / "algorithms"
    for path in folder.glob("*.py"):
        module = importlib.import_module(f"fedjax_sim.algorithms.{path.stem}")
        for value in vars(module).values():
            card = getattr(value, "card", None)
            if isinstance(value, type) and isinstance(card, Card):
                assert CONFIGS[card.name] is value


# --- accelerators ---------------------------------------------------------------------------------------

PRODUCTS = {"fedavg", "fedmr", "lips", "fedcac"}
"""What the others have of products, these have."""


def operations(jaxpr):
    """All equations, those of loops and calls too."""
    for equation in jaxpr.eqns:
        yield equation
        for part in jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "jaxpr")):
            inner = getattr(part, "jaxpr", part)
            if hasattr(inner, "eqns"):
                yield from operations(inner)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in PRODUCTS else pytest.mark.slow) for name in CONFIGS]
)
def test_models_are_merged_in_all_of_float32(name):
    """A product without a precision leaves it to XLA whether factors are rounded, to bfloat16 on a TPU."""
    model = models.from_flax(Exact(), (3, 3, 1), 3, name="exact")
    setup = oracles.prepared(
        SIZES, algorithm=config_of(name), model=model, cohort=3, rounds=3, momentum=0.5, wave=3
    )
    simulation = Simulation(setup)
    inputs, _ = simulation.inputs(0)
    with jax.set_mesh(simulation.mesh):
        traced = jax.make_jaxpr(simulation.function)(simulation.abstract_state(), inputs, simulation.data)
    # Networks of an algorithm's own are trained as any is; tiny multiples only tell whether all is finite.
    own = ("all_finite", "apply_dense", "linear.py")
    products = [one for one in operations(traced.jaxpr) if one.primitive.name == "dot_general"]
    assert len(products) > 12
    for one in products:
        where = str(one.source_info.traceback)
        if not any(word in where for word in own):
            assert "HIGHEST" in str(one.params["precision"]), where
