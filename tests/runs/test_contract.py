"""A mistake in an algorithm of one's own is named by its function, before anything is compiled."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import struct

import fedjax_sim as fs
from fedjax_sim import algorithms, data
from fedjax_sim.algorithms.shared import by_samples
from fedjax_sim.core import gradients, stacked
from fedjax_sim.core.algorithm import LocalRule, Starts, plain_gradient
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.task import task_loss
from fedjax_sim.engine import placement
from fedjax_sim.runs import assemble, contract

CONFIG = fs.RunConfig(
    partition=fs.PartitionConfig(kind="iid", clients=12),
    cohort=fs.CohortConfig(size=6),
    model=fs.ModelConfig("mlp", options={"hidden": [5]}),
    local=fs.LocalConfig(steps=2, epochs=None, batch_size=8),
)
KERNEL = r"\['params'\]\['Dense_0'\]\['kernel'\]|\['params'\]\['dense1'\]\['kernel'\]"
DIGITS = data.load("digits")


@dataclasses.dataclass(frozen=True)
class Own:
    """FedAvg by a weighted mean, with other functions in the place of its own."""

    changes: Any = None

    def build(self, context):
        sound = fs.Algorithm(
            init=lambda key, variables: variables,
            dispatch=lambda state, cohort, key: Starts(state),
            merge=lambda state, cohort, starts, results, key: (results.mean, {}),
            deploy=lambda state: state,
            weights=by_samples,
        )
        return dataclasses.replace(sound, **(self.changes(context) if self.changes else {}))


def own(**changes):
    return Own(lambda context: changes)


def rule(**changes):
    return own(local=LocalRule(**changes))


def prepared(algorithm, **others):
    return assemble.prepare(dataclasses.replace(CONFIG, **others), dataset=DIGITS, algorithm=algorithm)


@struct.dataclass
class Pair:
    model: Any
    count: Any


def half(tree):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree)


def without_bias(tree):
    return {"params": {name: {"kernel": layer["kernel"]} for name, layer in tree["params"].items()}}


def dropped(state, cohort, starts, results, key):
    return {"model": results.mean}, {}


def tripped(state, cohort, starts, results, key):
    return state.no_such_field, {}


def branching(apply, variables, batch, extra):
    loss, variables = task_loss(apply, variables, batch)
    return (loss if loss > 1 else 2 * loss), variables


def vector(apply, variables, batch, extra):
    logits, variables = apply(variables, batch)
    return logits.sum(1), variables


def counting(init, end):
    return rule(init_client=lambda variables, labels: init, finish_round=end)


def end(state):
    return lambda start, trained, client_state, extra, steps, lr, gradient: (state, None)


MERGE = "state, cohort, starts, results, key"
MISTAKES: dict[str, tuple[Any, str, str]] = {
    "the mean forgotten": (
        own(merge=lambda state, cohort, starts, results, key: (results.models, {})),
        "merge",
        r"float32\[6, .*of the state at \['params'\].*, where init gave float32\[.*leads with the 6 slots",
    ),
    "a mean without weights": (
        own(weights=None),
        "merge",
        "returned nothing of the state.*results.mean is None: give the algorithm `weights`",
    ),
    "an array's own mean, and a field that is not there": (
        own(
            weights=None,
            merge=lambda state, cohort, starts, results, key: (
                jax.tree.map(lambda leaf: leaf.mean(0) * cohort.num_examples, results.models),
                {},
            ),
        ),
        "merge",
        r"fails: (?!.*results.mean is None).*has no attribute 'num_examples'",
    ),
    "a mean without weights, used": (
        own(
            weights=None,
            merge=lambda state, cohort, starts, results, key: (
                jax.tree.map(jnp.add, state, results.mean),
                {},
            ),
        ),
        "merge",
        r"fails: .*test_contract.py, line \d+\).*results.mean is None: give",
    ),
    "models that were not wanted": (
        own(
            needs_models=False,
            merge=lambda state, cohort, starts, results, key: (stacked.mean(results.models), {}),
        ),
        "merge",
        "results.models is None: the algorithm says needs_models = False",
    ),
    "models that were not wanted, in a part of the state": (
        own(
            init=lambda key, variables: {"model": variables, "rounds": jnp.int32(0)},
            dispatch=lambda state, cohort, key: Starts(state["model"]),
            deploy=lambda state: state["model"],
            needs_models=False,
            merge=lambda state, cohort, starts, results, key: (
                {**state, "model": jax.tree.map(lambda leaf: leaf.mean(0), results.models)},
                {},
            ),
        ),
        "merge",
        r"returned nothing of the state at \['model'\].*results.models is None: .* needs_models = False",
    ),
    "the whole state deployed": (
        own(
            init=lambda key, variables: {"model": variables, "rounds": jnp.int32(0)},
            dispatch=lambda state, cohort, key: Starts(state["model"]),
            deploy=lambda state: state,
        ),
        "deploy",
        r"returned the whole state, where the model is wanted\. .* perhaps state\['model'\]\.",
    ),
    "the whole state dispatched": (
        own(
            init=lambda key, variables: Pair(variables, jnp.int32(0)),
            dispatch=lambda state, cohort, key: Starts(state),
            deploy=lambda state: state.model,
        ),
        "dispatch",
        r"returned the whole state, where the model is wanted\. .* perhaps state\.model\.",
    ),
    "a client's state that does not begin": (
        rule(start_round=lambda start, kept, broadcast: kept["anchor"]),
        "local.start_round",
        r"test_contract.py, line \d+\)\. No `init_client` is given, so the client's state is None",
    ),
    "a client's state that begins at its end": (
        rule(finish_round=end({"anchor": jnp.zeros(2)})),
        "local.finish_round",
        "where init_client gave nothing.*begins in `init_client`",
    ),
    "a key dropped": (
        own(
            init=lambda key, variables: {"model": variables, "rounds": jnp.int32(0)},
            dispatch=lambda state, cohort, key: Starts(state["model"]),
            deploy=lambda state: state["model"],
            merge=dropped,
        ),
        "merge",
        r"returned nothing of the state at \['rounds'\], where init gave int32\[\].*\{\*\*state",
    ),
    "a part that init did not give": (
        own(merge=lambda state, cohort, starts, results, key: ({**results.mean, "more": jnp.ones(3)}, {})),
        "merge",
        r"returned float32\[3\] of the state at \['more'\], where init gave nothing",
    ),
    "no metrics": (
        own(merge=lambda state, cohort, starts, results, key: results.mean),
        "merge",
        r"returned a dict, not \(state, metrics\). Without metrics return `state, \{\}`",
    ),
    "a vector as metric": (
        own(merge=lambda state, cohort, starts, results, key: (results.mean, {"loss": results.loss})),
        "merge",
        r"for the metric 'loss' float32\[6\].*one number",
    ),
    "a metric in a metric": (
        own(merge=lambda state, cohort, starts, results, key: (results.mean, {"a": {"b": jnp.float32(0)}})),
        "merge",
        "for the metric 'a' a dict",
    ),
    "a complex metric": (
        own(merge=lambda state, cohort, starts, results, key: (results.mean, {"a": jnp.complex64(1)})),
        "merge",
        "for the metric 'a' complex64",
    ),
    "a metric by number": (
        own(merge=lambda state, cohort, starts, results, key: (results.mean, {3: jnp.float32(1)})),
        "merge",
        "named a metric 3. The name of a metric is text",
    ),
    "a metric of the run": (
        own(merge=lambda state, cohort, starts, results, key: (results.mean, {"accuracy": jnp.float32(1)})),
        "merge",
        "it names a metric 'accuracy', which the run records itself. Choose another name",
    ),
    "a metric that the run would record of clients": (
        own(merge=lambda state, cohort, starts, results, key: (results.mean, {"client_accuracy_p10": 1.0})),
        "merge",
        "it names a metric 'client_accuracy_p10', which the run records itself",
    ),
    "a string as metric": (
        own(merge=lambda state, cohort, starts, results, key: (results.mean, {"a": "b"})),
        "merge",
        "a str, not an array",
    ),
    "half precision": (
        own(init=lambda key, variables: half(variables)),
        "deploy",
        r"returned bfloat16\[.*where the model has float32\[.*Convert it, .astype\(float32\)",
    ),
    "half precision inside": (
        own(
            init=lambda key, variables: Pair(variables, jnp.float16(0)),
            dispatch=lambda state, cohort, key: Starts(state.model),
            deploy=lambda state: state.model,
            merge=lambda state, cohort, starts, results, key: (Pair(results.mean, jnp.float32(1)), {}),
        ),
        "merge",
        r"float32\[\] of the state at \.count, where init gave float16\[\]",
    ),
    "a line that fails": (
        own(merge=tripped),
        "merge",
        r"fails: AttributeError: .*no_such_field.* \(test_contract.py, line \d+\)",
    ),
    "too few arguments": (
        own(merge=lambda state, results: (state, {})),
        "merge",
        "positional argument.*core/algorithm.py says which",
    ),
    "NumPy": (
        own(weights=lambda cohort: np.sqrt(np.asarray(cohort.counts))),
        "weights",
        "Use jax.numpy",
    ),
    "weights of another length": (
        own(weights=lambda cohort: jnp.ones(3)),
        "weights",
        r"float32\[3\].*float32\[6\]",
    ),
    "a model instead of starts": (
        own(dispatch=lambda state, cohort, key: state),
        "dispatch",
        r"returned a dict. Return Starts\(model\)",
    ),
    "one start that is said to be many": (
        own(dispatch=lambda state, cohort, key: Starts(state, shared=False)),
        "dispatch",
        r"where 6 stacked models have float32\[6, .*stacked.broadcast\(model, 6\)",
    ),
    "many starts that are said to be one": (
        own(dispatch=lambda state, cohort, key: Starts(stacked.broadcast(state, len(cohort.ids)))),
        "dispatch",
        r"float32\[6, .*, where the model has float32\[",
    ),
    "a deployed model without biases": (own(deploy=without_bias), "deploy", "returned nothing at .*'bias'"),
    "a stack that is none": (
        own(
            init=lambda key, variables: Pair(variables, jnp.zeros(7)),
            stacked=("count",),
        ),
        "init",
        r"gave float32\[7\] at \.count, which `stacked` names.*K = 6 slots or the N = 12 clients",
    ),
    "rows of slots that are said to be clients'": (
        own(
            init=lambda key, variables: Pair(variables, jnp.zeros(6)),
            stacked=("count",),
            by_client=("count",),
        ),
        "init",
        r"gave float32\[6\] at \.count, which `by_client` names.*N = 12 clients",
    ),
    "rows of clients that are not cut": (
        own(init=lambda key, variables: Pair(variables, jnp.zeros(12)), by_client=("count",)),
        "init",
        r"gave float32\[12\] at \.count, which `by_client` names.*name it in `stacked` too",
    ),
    "one model for all clients": (
        own(personal_models=lambda state, ids: state),
        "personal_models",
        r"where 6 stacked models have",
    ),
    "a loss of each sample": (
        rule(gradient=lambda *args: plain_gradient(*args)._replace(loss=jnp.zeros(8))),
        "local.gradient",
        r"a loss of float32\[8\], not one number.*masked_mean",
    ),
    "a gradient alone": (
        rule(gradient=lambda *args: plain_gradient(*args)[:2]),
        "local.gradient",
        r"returned a tuple of 2, not a Step\(loss, variables, gradient, extra\)",
    ),
    "a branch on values": (rule(gradient=gradients.of_loss(branching)), "local.gradient", "no `if`"),
    "a loss that is not one number": (
        rule(gradient=gradients.of_loss(vector)),
        "local.gradient",
        "fails: TypeError: Gradient only defined for scalar-output functions",
    ),
    "flags of some leaves": (
        rule(gradient=gradients.moving(lambda variables, batch: {"params": {}})),
        "local.gradient",
        "returned nothing at .*a flag for each leaf of the variables is wanted",
    ),
    "a gradient of everything": (
        rule(
            gradient=lambda *args: (step := plain_gradient(*args))._replace(
                gradient={"params": step.gradient}
            )
        ),
        "local.gradient",
        "of the gradient at",
    ),
    "an end of another shape": (
        counting(jnp.zeros(3), end(jnp.zeros(4))),
        "local.finish_round",
        r"returned float32\[4\] of the client's state, where init_client gave float32\[3\]",
    ),
    "an end of another dtype": (
        counting(jnp.zeros(3), end(jnp.zeros(3, jnp.int32))),
        "local.finish_round",
        r"int32\[3\] of the client's state, where init_client gave float32\[3\].*Convert it",
    ),
    "an end without an upload": (
        rule(finish_round=lambda start, trained, client_state, extra, steps, lr, gradient: client_state),
        "local.finish_round",
        r"returned None, not \(client_state, upload\)",
    ),
    "what is gathered is not what began": (
        rule(
            start_round=lambda start, kept, broadcast: jnp.zeros(2),
            gradient=gradients.accumulating(lambda loss, batch, extra: jnp.concatenate([extra, extra])),
        ),
        "local.gradient",
        r"returned float32\[4\] of extra, where it got float32\[2\]",
    ),
    "what comes back is not what was sent": (
        rule(
            receive=lambda model, kept, broadcast, key: {
                **model,
                "params": {**model["params"], "own": jnp.ones(2)},
            }
        ),
        "local.receive",
        r"returned float32\[2\] at \['params'\]\['own'\], where the model has nothing",
    ),
    "another model of a client": (
        rule(personal=lambda kept, model: half(model)),
        "local.personal",
        r"bfloat16\[",
    ),
}


@pytest.mark.parametrize(("algorithm", "where", "told"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named_by_its_function(algorithm, where, told):
    with pytest.raises(UserError, match=told) as caught:
        prepared(algorithm)
    assert caught.value.field == f"algorithm.{where}"
    assert str(caught.value.value).startswith("Own(")


def test_what_failed_stands_behind_the_message():
    with pytest.raises(UserError) as caught:
        prepared(own(merge=tripped))
    assert isinstance(caught.value.__cause__, AttributeError)


@pytest.mark.parametrize("changes", [lambda context: 1 / 0, lambda context: {"no_such": 1}])
def test_a_build_that_fails_is_named(changes):
    with pytest.raises(UserError, match=r"algorithm\.build = .*fails: .*test_contract.py, line \d+\)"):
        prepared(Own(changes))


def test_a_build_that_gives_something_else_is_named():
    @dataclasses.dataclass(frozen=True)
    class Other:
        def build(self, context):
            return {}

    with pytest.raises(UserError, match="returned a dict, not an Algorithm"):
        prepared(Other())


def test_it_is_found_inside_of_a_method_of_the_package():
    wrong = own(deploy=without_bias)
    with pytest.raises(UserError, match=r"algorithm\.deploy = 'fedprox\(Own\("):
        prepared(algorithms.FedProx(inner=wrong))


def randomly(apply, variables, batch, extra):
    loss, variables = task_loss(apply, variables, batch)
    return loss * jax.random.uniform(batch.rng), variables


def told(state, cohort, starts, results, key):
    return results.mean, {"six": 6, "mean_loss": results.loss.mean()}


def averaged(state, cohort, starts, results, key):
    return stacked.mean(results.models), {}


def test_what_is_right_passes():
    for algorithm in (
        Own(),
        counting(jnp.zeros(3), end(jnp.ones(3))),
        own(merge=told),
        own(merge=averaged, weights=None),
        rule(gradient=gradients.of_loss(randomly)),
        algorithms.FedProx(inner=Own()),
        algorithms.LIPS(inner=Own(), layers="inner"),
    ):
        assert not algorithms.builtin(algorithm)
        prepared(algorithm, model=fs.ModelConfig("mlp", options={"hidden": [5, 5]}))


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Dense(4, name="first")(x.reshape(x.shape[0], -1))
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(10, name="last")(x)


SETTINGS: dict[str, Any] = {
    **algorithms.CONFIGS,
    "partial": lambda: algorithms.CONFIGS["partial"](first=1),
    "lips": lambda: algorithms.LIPS(layers="inner"),
    "lips of fedmr": lambda: algorithms.LIPS(layers="inner", inner=algorithms.FedMR()),
}


@pytest.mark.parametrize(
    ("name", "cohort"),
    [*((name, 8) for name in SETTINGS), *((name, 5) for name in ("fedmr", "scaffold", "lips of fedmr"))],
)
def test_those_of_the_package_keep_the_contract(name, cohort):
    algorithm = SETTINGS[name]()
    assert algorithms.builtin(algorithm)
    model = fs.from_flax(Normed(), (8, 8, 1), 10, name="normed") if name == "fedbn" else None
    config = dataclasses.replace(
        CONFIG,
        algorithm=algorithm,
        model=fs.ModelConfig("mlp", options={"hidden": [5, 5]}),
        cohort=fs.CohortConfig(size=cohort),
        local=fs.LocalConfig(epochs=5, batch_size=8),
    )
    setup = assemble.prepare(config, dataset=DIGITS, model=model)
    mesh = placement.make_mesh(setup.devices)
    sizes = {"num_clients": 12, "cohort_size": cohort}
    contract.check_contract(setup.algorithm, setup.trainer, name=name, mesh=mesh, **sizes)
