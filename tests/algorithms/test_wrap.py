"""The one wrapper: what a layer does not name is the inner algorithm's, in the inner algorithm's states."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import pytest
from flax import struct

from fedjax_sim.algorithms import wrap as wrapping
from fedjax_sim.algorithms.wrap import Layer, wrap
from fedjax_sim.core.algorithm import Algorithm, CohortChooser, LocalRule, Results, Starts, Step

RULE = [field.name for field in dataclasses.fields(LocalRule)]
SERVER = [
    field.name
    for field in dataclasses.fields(Algorithm)
    if field.name
    not in ("local", "needs_models", "stacked", "by_client", "cohort_chooser", "steps_beyond_mean")
]


@struct.dataclass
class Held:
    """A pair, as a layer holds it."""

    inner: Any
    own: Any = None


def recorded(calls: list, name: str, out: Any = None):
    """A hook that notes what it gets and gives `out`."""

    def hook(*args):
        calls.append((name, args))
        return out

    return hook


def algorithm(calls: list) -> Algorithm:
    """All hooks there are; what is a new state is called so."""
    gives: dict[str, Any] = {
        "merge": ("new state", {"m": 1}),
        "with_model": "new state",
        "gradient": Step(jnp.float32(1), {}, {}, "new extra"),
        "finish_round": ("new client", "upload"),
    }
    rule = {name: recorded(calls, name, gives.get(name, name)) for name in RULE}
    server: dict[str, Any] = {name: recorded(calls, name, gives.get(name, name)) for name in SERVER}
    chooser = CohortChooser(recorded(calls, "measure"), lambda *args: args)
    return Algorithm(
        **server, local=LocalRule(**rule), cohort_chooser=chooser, stacked=("a",), by_client=("a",)
    )


def returned(uploads: Any) -> Results:
    """A round's results of which only the uploads matter."""
    return Results(None, None, uploads, jnp.ones(1, bool), jnp.zeros(1))


ALL = ("state", "client", "extra", "broadcast", "uploads")


def every(held: Any) -> Layer:
    """A layer that pairs all states, by functions that do nothing else."""
    return Layer(
        pairs=ALL,
        init=lambda inside, *args: held(inside(*args)),
        dispatch=lambda inside, *args: inside(*args),
        init_client=lambda inside, *args: held(inside(*args)),
        start_round=lambda inside, *args: held(inside(*args)),
        finish_round=lambda inside, *args: inside(*args),
    )


def test_the_wrapper_knows_every_hook():
    """A hook that is new in the records cannot be forgotten here."""
    assert list(wrapping._CLIENT) == sorted(RULE, key=list(wrapping._CLIENT).index)
    assert set(wrapping._CLIENT) == set(RULE) and set(wrapping._SERVER) == set(SERVER)


def test_a_layer_that_names_nothing_changes_nothing():
    calls: list = []
    plain: Any = algorithm(calls)
    wrapped: Any = wrap(plain, Layer())
    state, starts, results = "state", Starts("models", "broadcast"), returned("up")
    for record in (plain, wrapped):
        assert record.merge(state, "cohort", starts, results, "key") == ("new state", {"m": 1})
        assert record.local.gradient("lag", "variables", "batch", "extra").extra == "new extra"
        assert record.local.personal("client", "model") == "personal"
        record.cohort_chooser.measure("state")
    assert calls[: len(calls) // 2] == calls[len(calls) // 2 :]
    assert wrapped.stacked == ("a",) and wrapped.needs_models and not wrapped.steps_beyond_mean
    none: Any = wrap(dataclasses.replace(plain, local=LocalRule(), slot_models=None), Layer())
    assert none.slot_models is None and none.local.receive is None and none.local.send is None


@pytest.mark.parametrize("held", [Held, lambda inner: {"inner": inner, "own": None}], ids=["class", "dict"])
def test_what_is_inside_sees_its_own_states(held):
    calls: list = []
    wrapped: Any = wrap(algorithm(calls), every(held))
    state, client, extra, sent = held("state"), held("client"), held("extra"), held("broadcast")
    starts, results = Starts("models", sent), returned(held("up"))

    def got(name):
        return next(args for called, args in calls if called == name)

    assert wrapped.merge(state, "cohort", starts, results, "key") == (held("new state"), {"m": 1})
    assert got("merge")[0] == "state" and got("merge")[2].broadcast == "broadcast"
    assert got("merge")[3].uploads == "up"
    assert wrapped.with_model(state, "model") == held("new state")
    for name, args in {"deploy": (), "personal_models": ("ids",), "slot_models": ("slots", "ids")}.items():
        assert getattr(wrapped, name)(state, *args) == name and got(name) == ("state", *args)
    wrapped.cohort_chooser.measure(state)
    assert got("measure") == ("state",)
    rule = wrapped.local
    rule.receive("model", client, sent, "key")
    assert got("receive") == ("model", "client", "broadcast", "key")
    assert rule.start_round("start", client, sent) == held("start_round")
    assert got("start_round") == ("start", "client", "broadcast")
    assert rule.gradient("lag", "variables", "batch", extra).extra == held("new extra")
    assert got("gradient")[3] == "extra"
    assert rule.wants_last_gradient(sent) == "wants_last_gradient"
    ended = rule.finish_round("start", "trained", client, extra, 3, 0.1, None)
    assert ended == (held("new client"), "upload")
    assert got("finish_round") == ("start", "trained", "client", "extra", 3, 0.1, None)
    rule.personal(client, "model")
    assert got("personal") == ("client", "model")


def test_a_layer_goes_around_a_hook_that_is_not_there():
    plain = dataclasses.replace(
        algorithm([]), local=LocalRule(), personal_models=None, slot_models=None, deploy=lambda state: state
    )
    passed = {
        name: (lambda inside, *args: inside(*args)) for name in (*RULE, "personal_models", "slot_models")
    }
    wrapped: Any = wrap(plain, Layer(**passed))
    rule = wrapped.local
    assert rule.receive("model", None, None, "key") == "model" and rule.send("model") == "model"
    assert rule.personal(None, "model") == "model" and rule.init_client("model", "labels") is None
    assert not rule.wants_last_gradient(None)
    model = {"w": jnp.arange(2.0)}
    for models in (wrapped.personal_models(model, [0, 1]), wrapped.slot_models(model, [0, 1], [0, 1])):
        assert models["w"].shape == (2, 2)


def test_flags_add_up_and_the_model_may_be_no_start():
    wrapped: Any = wrap(
        dataclasses.replace(algorithm([]), needs_models=False),
        Layer(stacked=("b",), by_client=("b",), needs_models=True, steps_beyond_mean=True, keeps_model=False),
    )
    assert (
        wrapped.stacked == wrapped.by_client == ("a", "b")
        and wrapped.needs_models
        and wrapped.steps_beyond_mean
    )
    assert wrapped.with_model is None


@pytest.mark.parametrize("name", ALL)
def test_a_pair_needs_who_makes_it(name):
    with pytest.raises(ValueError, match=f"pairs '{name}' must name"):
        Layer(pairs=(name,))
