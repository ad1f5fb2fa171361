"""Local methods on top of other algorithms and of each other, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from fedjax_sim import config as config_lib
from fedjax_sim import models
from fedjax_sim.algorithms import (
    CONFIGS,
    LIPS,
    MOON,
    Ditto,
    FedASAM,
    FedAvg,
    FedBABU,
    FedMR,
    FedNTD,
    FedProx,
    FedRoD,
    FedSAM,
    PFedSD,
)
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.task import Batch, Training
from tests import oracles
from tests.algorithms import objectives, personal
from tests.algorithms.families import but_slow
from tests.algorithms.objectives import Given, entropy

NAMES = ("fedprox", "fedsam", "fedasam", "fedntd", "moon", "pfedsd")
CONTEXT = oracles.context(personal.deep(), num_clients=5, cohort_size=3, rounds=3, epochs=2)


def simulate(algorithm, **keywords):
    """Three rounds; client 4 sits one out and comes back, 2 is never drawn."""
    settings = {"cohort": 3, "rounds": 3, "momentum": 0.5, "seed": 1, **keywords}
    model = settings.pop("model", None) or models.create("mlp", (3, 3, 1), 3, hidden=(6, 8))
    return oracles.simulate(personal.SIZES, algorithm=algorithm, model=model, **settings)


# --- over algorithms with a model a slot ----------------------------------------------------------------


def masked(slot, kept):
    """The slot with all but the `kept` largest entries of fc2's kernel zero."""
    kernel = slot["fc2"]["kernel"]
    order = np.argsort(-np.abs(kernel).reshape(-1), kind="stable")
    sparse = np.zeros(kernel.size)
    sparse[order[:kept]] = kernel.reshape(-1)[order[:kept]]
    return {**slot, "fc2": {**slot["fc2"], "kernel": sparse.reshape(kernel.shape)}}


@pytest.mark.parametrize("sparse", [pytest.param(False, marks=pytest.mark.slow), True])
def test_fedprox_over_fedmr_pulls_each_client_to_its_own_start(sparse):
    """The slot's model, and under LIPS what that leaves of it: 12 of 48 weights in the second round."""
    algorithm = FedProx(FedMR(), mu=2.0)
    if sparse:
        algorithm = LIPS(algorithm, density=0.25, period=1, leaves=("params/fc2/kernel",), score="magnitude")
    simulation = simulate(algorithm, rounds=2)
    oracles.run(simulation, 1)
    state = simulation.state.algorithm.inner if sparse else simulation.state.algorithm
    slots = [oracles.doubled(personal.row(state.slots, k))["params"] for k in range(3)]
    assert oracles.far_apart(slots[0], slots[1]) > 1e-3
    starts = [masked(slot, 12) for slot in slots] if sparse else slots
    ids = simulation.inputs(1)[0].cohort.ids.tolist()
    objective = objectives.proximal(entropy, 2.0)
    trained = [
        objectives.trained(simulation, 1, client, objective, Given(start, None))[0]
        for client, start in zip(ids, starts, strict=True)
    ]
    oracles.run(simulation)
    oracles.assert_trees_close(simulation.variables["params"], oracles.weighted_mean(trained, [1, 1, 1]))


# --- on top of each other -------------------------------------------------------------------------------

both = objectives.contrast(objectives.not_true(entropy, 0.7, 2.0), 2.0, 0.3)
STACKS = {
    "FedNTD over MOON": (FedNTD(MOON(mu=2.0, temperature=0.3), beta=0.7, temperature=2.0), both),
    "MOON over FedNTD": (MOON(FedNTD(beta=0.7, temperature=2.0), mu=2.0, temperature=0.3), both),
    "FedSAM over FedProx": (
        FedSAM(FedProx(mu=0.5), rho=0.3),
        objectives.flat(objectives.proximal(entropy, 0.5), 0.3, objectives.ones),
    ),
    "FedProx over FedSAM": (
        FedProx(FedSAM(rho=0.3), mu=0.5),
        objectives.proximal(objectives.flat(entropy, 0.3, objectives.ones), 0.5),
    ),
    "FedSAM over pFedSD": (
        FedSAM(PFedSD(weight=0.6, temperature=2.0), rho=0.3),
        objectives.flat(objectives.taught(entropy, 0.6, 2.0), 0.3, objectives.ones),
    ),
}


@pytest.mark.parametrize("name", but_slow(STACKS, "FedSAM over FedProx", "FedSAM over pFedSD"))
def test_stacks_equal_numpy(name):
    algorithm, objective = STACKS[name]
    simulation = simulate(algorithm)
    wanted, _, _ = objectives.rounds(simulation, objective, 3)
    oracles.run(simulation)
    oracles.assert_trees_close(simulation.variables["params"], wanted)


def test_fedsam_does_not_climb_along_what_is_held_fixed():
    """Over FedBABU, whose classifier neither moves nor counts in ‖g‖."""

    def body(w, x, labels, given):
        loss, gradient = entropy(w, x, labels, given)
        return loss, {**gradient, "fc3": oracles.map_trees(np.zeros_like, gradient["fc3"])}

    simulation = simulate(FedSAM(FedBABU(), rho=0.3), rounds=1)
    wanted, _, _ = objectives.rounds(simulation, objectives.flat(body, 0.3, objectives.ones), 1)
    oracles.run(simulation)
    oracles.assert_trees_close(simulation.variables["params"], wanted)


@pytest.mark.slow  # each by itself: tests/algorithms/test_everywhere.py
def test_a_wave_does_not_show_under_batch_normalisation():
    """All of them on top of each other; clients of unequal size, alone and side by side."""
    stack = FedASAM(FedProx(MOON(FedNTD(PFedSD()), mu=1.0)))
    settings = {"model": personal.normed(), "batch_size": 8}
    alone, together = (simulate(stack, wave=wave, **settings) for wave in (1, 3))
    for simulation in (alone, together):
        oracles.run(simulation)
    oracles.assert_trees_close(together.variables, alone.variables, rtol=1e-4, atol=2e-5)


def test_the_model_is_run_once_for_all_terms_of_the_loss():
    """A step of MOON over FedNTD over pFedSD: one pass in training, and one for each other model."""
    counted = {True: 0, False: 0}

    class Counting(models.Model):
        def _call(self, *args, **keywords):
            counted[bool(keywords.get("train"))] += 1
            return super()._call(*args, **keywords)

    plain = personal.deep()
    model = Counting(*(getattr(plain, name) for name in plain.__dataclass_fields__))
    context = oracles.context(model, num_clients=5, cohort_size=3, rounds=3, epochs=2)
    for config in (MOON(FedNTD(PFedSD())), PFedSD(FedNTD(MOON()))):
        rule = config.build(context).local
        init = rule.init_client
        assert init is not None
        variables = jax.eval_shape(model.init, jax.random.key(0))

        def step(variables, images, labels, rule=rule, init=init):
            extra = rule.start_round(variables, init(variables, labels), None)
            batch = Batch(oracles.examples(images, labels), None, None)
            apply, losses = Training(model, oracles.task_of(model)), []

            def undifferentiated(variables, batch, loss):
                losses.append(loss(apply, variables, batch))
                return losses[-1], variables["params"]

            rule.gradient(undifferentiated, variables, batch, extra)
            return losses

        images = jax.ShapeDtypeStruct((4, 3, 3, 1), jnp.float32)
        counted.update({True: 0, False: 0})
        jax.eval_shape(step, variables, images, jax.ShapeDtypeStruct((4,), jnp.int32))
        # MOON asks the received and the previous model, FedNTD the received, pFedSD the previous.
        assert counted == {True: 1, False: 4}


# --- YAML and mistakes ----------------------------------------------------------------------------------


def test_nested_algorithms_travel_through_yaml():
    written = """
    algorithm:
      name: lips
      inner:
        name: fedprox
        mu: 1e-1
        inner: {name: moon, mu: 1, inner: {name: fedsam, inner: {name: fedmr, granularity: module}}}
    """
    config = config_lib.from_dict(yaml.safe_load(written))
    wanted = LIPS(FedProx(MOON(FedSAM(FedMR(granularity="module")), mu=1.0), mu=0.1))
    assert config.algorithm == wanted
    assert config_lib.from_dict(yaml.safe_load(config_lib.dump(config))) == config
    for name in NAMES:
        made = config_lib.from_dict({"algorithm": {"name": name, "inner": "fedmr"}}).algorithm
        assert made == CONFIGS[name](inner=FedMR()) and CONFIGS[name]().inner == FedAvg()


@dataclasses.dataclass(frozen=True)
class Foreign:
    """A method of somebody else's that says the same of itself as FedNova, Local and LIPS do."""

    counts_gradients = True
    returns_own_model = True
    starts_sparse = True

    def build(self, context):
        return FedAvg().build(context)


def test_methods_ask_for_what_another_says_of_itself_and_not_for_its_class():
    for around in (FedProx, MOON, LIPS):
        for inner in (Foreign(), FedSAM(Foreign())):
            with pytest.raises(UserError) as caught:
                around(inner).build(CONTEXT)
            assert (caught.value.field, caught.value.value) == ("algorithm.inner", "Foreign")
    FedProx(Foreign(), mu=0.0).build(CONTEXT)
    FedSAM(Foreign()).build(CONTEXT)


@pytest.mark.parametrize("inner", [Ditto(), FedRoD(), FedProx(Ditto())], ids=lambda inner: repr(inner)[:12])
@pytest.mark.parametrize("name", NAMES)
def test_clients_that_train_more_than_they_were_sent_are_refused(name, inner):
    with pytest.raises(UserError, match="more than the model they were sent") as caught:
        CONFIGS[name](inner=inner).build(CONTEXT)
    depth = 1 + isinstance(inner, FedProx)  # which refuses what is inside it
    assert caught.value.field == "algorithm" + depth * ".inner"


@pytest.mark.parametrize(
    ("name", "settings", "field"),
    [
        ("fedprox", {"mu": -0.1}, "mu"),
        ("fedprox", {"mu": float("nan")}, "mu"),
        ("fedprox", {"distance": "cubed"}, "distance"),
        ("fedprox", {"inner": "fedmr"}, "inner"),
        ("fedsam", {"rho": -1.0}, "rho"),
        ("fedsam", {"rho": float("inf")}, "rho"),
        ("fedasam", {"rho": -1.0}, "rho"),
        ("fedasam", {"eta": -0.01}, "eta"),
        ("fedntd", {"beta": -1.0}, "beta"),
        ("fedntd", {"temperature": 0.0}, "temperature"),
        ("moon", {"mu": -1.0}, "mu"),
        ("moon", {"temperature": 0.0}, "temperature"),
        ("moon", {"mu": "5"}, "mu"),
        ("pfedsd", {"weight": -1.0}, "weight"),
        ("pfedsd", {"temperature": -3.0}, "temperature"),
    ],
)
def test_mistakes_are_named(name, settings, field):
    with pytest.raises(UserError) as caught:
        CONFIGS[name](**settings)
    assert caught.value.field == f"algorithm.{field}"


def test_moon_wants_a_model_that_marks_its_representation():
    model = dataclasses.replace(personal.deep(), peel_points=())
    context = dataclasses.replace(CONTEXT, model=model)
    for config in (MOON(), FedProx(MOON())):
        with pytest.raises(UserError, match="MOON wants the representation") as caught:
            config.build(context)
        assert caught.value.field == "model"
    for name in set(NAMES) - {"moon"}:
        CONFIGS[name]().build(context)
