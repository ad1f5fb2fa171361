"""A debug run: what any run gives, and errors and NaN that say where they are."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec as P

import fedjax_sim as fs
from fedjax_sim import models
from fedjax_sim.algorithms import LIPS, Ditto, FedAvg, FedMR, Scaffold
from fedjax_sim.core import stacked
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.stacked import AXIS
from fedjax_sim.core.task import task_loss
from fedjax_sim.engine import debugging, placement
from fedjax_sim.engine.debugging import Debugger, NotFinite, RoundError
from fedjax_sim.models.norms import BatchNorm
from fedjax_sim.runs import drive, plan
from fedjax_sim.runs.folder import Folder
from tests import oracles

SIZES = (13, 4, 8)
# A debug run compiles each operation for each shape: the fewer layers, the fewer of them.
LINEAR = models.create("mlp", (3, 3, 1), 3, hidden=())


class Small(nn.Module):
    """Dense layers with batch norm and dropout."""

    @nn.compact
    def __call__(self, x, *, train=False, mask=None):
        x = x.reshape(x.shape[0], -1)
        models.peel(self, "fc1", x)
        x = nn.relu(nn.Dense(4, name="fc1")(x))
        models.peel(self, "middle", x)
        x = nn.Dense(4, name="middle")(x)
        x = nn.relu(BatchNorm(name="bn")(x, train=train, mask=mask))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        models.peel(self, "fc2", x)
        return nn.Dense(3, name="fc2")(x)


def pair(**settings):
    """A run and its debug run, of clients that draw, keep momentum and walk twice through their samples."""
    model = models.from_flax(Small(), (3, 3, 1), 3, name="small")
    settings = {"model": model, "cohort": 2, "momentum": 0.5, "lr": 0.05, "batch_size": 5, **settings}
    return [oracles.simulate(SIZES, debug=debug, **settings) for debug in (False, True)]


def assert_alike(settings):
    plain, debugged = pair(**settings)
    rows, again = oracles.run(plain), oracles.run(debugged)
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, jax.device_get(debugged.state), jax.device_get(plain.state))
    wanted = {row[:1] + row[1:2] + row[3:]: row.value for row in rows if row.metric != "padding_waste"}
    found = {row[:1] + row[1:2] + row[3:]: row.value for row in again if row.metric != "padding_waste"}
    assert found == pytest.approx(wanted, rel=1e-4)
    assert debugged.program.num_compiled() == 0


def test_results_are_those_of_a_run():
    assert_alike({"model": LINEAR, "keep_optimizer": True, "evaluation": fs.EvaluationConfig(every=1)})


@pytest.mark.slow
@pytest.mark.parametrize(
    "algorithm",
    [FedAvg(), Scaffold(), FedMR(), LIPS(layers="inner", density=0.5), Ditto()],
    ids=lambda a: type(a).__name__,
)
def test_results_of_other_algorithms(algorithm):
    assert_alike({"algorithm": algorithm})


# --- one's own functions ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Own:
    """FedAvg of equal weights, with something of a test's in it."""

    loss: Callable[..., Any] = lambda value, variables: value
    upload: Callable[..., Any] = lambda steps: None
    merge: Callable[..., Any] = lambda mean: mean

    def build(self, context):
        def gradient(loss_and_grad, variables, batch, extra):
            def loss(apply, variables, batch):
                value, moved = task_loss(apply, variables, batch)
                return self.loss(value, variables), moved

            (value, moved), found = loss_and_grad(variables, batch, loss)
            return fs.core.algorithm.Step(value, moved, found)

        def finish_round(start, trained, client_state, extra, steps, lr, gradient):
            return client_state, self.upload(steps)

        return fs.Algorithm(
            init=lambda key, variables: variables,
            dispatch=lambda state, cohort, key: fs.Starts(state),
            merge=lambda state, cohort, starts, results, key: (self.merge(results.mean), {}),
            deploy=lambda state: state,
            weights=lambda cohort: jnp.ones(len(cohort.ids), jnp.float32),
            local=fs.LocalRule(gradient=gradient, finish_round=finish_round),
        )


def debugged(**own):
    return oracles.simulate(
        SIZES, algorithm=Own(**own), model=LINEAR, debug=True, steps=2, batch_size=4, cohort=2
    )


def line_of(text):
    """`FILE:LINE` of the one line of this file that ends so."""
    lines = Path(__file__).read_text().splitlines()
    (found,) = [number for number, line in enumerate(lines, 1) if line.endswith(text)]
    return f"{__file__}:{found}"


def test_an_error_says_where_and_comes_with_its_own_line():
    calls = []

    def loss(value, variables):
        calls.append(bool(value > 0))  # a Python bool: values are there
        if len(calls) == 6:
            raise KeyError("lost")  # sixth step
        return value

    simulation = debugged(loss=loss)
    second = int(simulation.inputs(1)[0].cohort.ids[0])
    with pytest.raises(RoundError) as caught:
        oracles.run(simulation)
    error = caught.value
    assert all(calls)
    assert str(error).startswith(f"{line_of('# sixth step')}, in loss: raise KeyError")
    assert f"in round 2, client {second}, step 2, KeyError: 'lost'" in str(error)
    assert error.field == "algorithm.local.gradient failed"
    assert isinstance(error.__cause__, KeyError)
    assert "KeyError: 'lost'\n" in error.detail
    assert "site-packages" not in error.detail.splitlines()[1]


def test_an_error_of_the_server_names_no_client():
    def merge(mean):
        return mean["nothing"]  # of the kind

    with pytest.raises(
        RoundError, match=r"algorithm.merge failed: in round 1, KeyError: 'nothing'"
    ) as caught:
        oracles.run(debugged(merge=merge))
    assert line_of("# of the kind") in str(caught.value)


def test_the_first_nan_of_a_gradient_is_found():
    """The root of 0 has no derivative. At a client's first step it is a root of 1."""
    first = []

    def loss(value, variables):
        layer = variables["params"]["fc1"]
        begins = (layer["bias"] == first[0]).all().astype(jnp.float32)
        return value + jnp.sqrt((layer["kernel"] * 0).sum() + begins)  # not at 0

    simulation = debugged(loss=loss)
    first.append(simulation.state.algorithm["params"]["fc1"]["bias"])
    client = int(simulation.inputs(0)[0].cohort.ids[0])
    with pytest.raises(NotFinite) as caught:
        oracles.run(simulation)
    told = str(caught.value)
    assert caught.value.field == "gradient is not finite"
    assert (
        f"gradient['fc1']['kernel']: in round 1, client {client}, step 2, 27 of its 27 numbers are NaN"
        in told
    )
    assert "When it was last finite it lay from" in told
    assert f"(round 1, client {client}, step 1)" in told
    assert "The loss is finite and its derivative is not" in told
    assert told.startswith(line_of("# not at 0"))
    assert simulation.round == 0


def test_the_line_that_gave_the_first_nan_is_named():
    def merge(mean):
        return jax.tree.map(lambda leaf: jnp.log(-1 - leaf**2), mean)  # of what is below 0

    with pytest.raises(
        NotFinite, match=r"merged state\['params'\].*in round 1, \d+ of its \d+ numbers are NaN"
    ) as caught:
        oracles.run(debugged(merge=merge))
    assert str(caught.value).startswith(line_of("# of what is below 0"))


@pytest.mark.parametrize(
    ("what", "own"),
    [
        ("loss", {"loss": lambda value, variables: value / 0}),
        ("upload", {"upload": lambda steps: {"ratio": 1 / (steps - steps)}}),
        ("deployed model", {"merge": lambda mean: jax.tree.map(lambda leaf: leaf + jnp.inf, mean)}),
    ],
)
def test_what_is_not_finite_is_named(what, own):
    with pytest.raises(NotFinite) as caught:
        oracles.run(debugged(**own))
    assert caught.value.field == f"{what} is not finite"


def test_where_no_line_is_the_users_own_the_message_is_all():
    simulation = oracles.simulate(SIZES, debug=True, model=LINEAR, cohort=1, lr=3e38, weight_decay=1e3)
    with pytest.raises(NotFinite) as caught:
        oracles.run(simulation)
    assert caught.value.detail == ""
    told = str(caught.value)
    assert told.startswith(f"{caught.value.field}: ") and caught.value.value == ""


def test_what_was_not_finite_before_is_passed_over():
    """A rule may keep an infinity; a NaN is told of where it comes up."""
    debugger = Debugger()
    debugger.look("client state", {"best": jnp.inf}, infinite=True)
    debugger.look("merged state", {"a": jnp.array([jnp.nan, 1])}, {"a": jnp.array([jnp.nan, 0])})
    with pytest.raises(NotFinite, match=r"1 of its 2 numbers are NaN, the finite ones lie from 1 to 1"):
        debugger.look("merged state", {"a": jnp.array([jnp.nan, 1])}, {"a": jnp.zeros(2)})


@dataclasses.dataclass(frozen=True)
class Looks:
    """An observer that does with values what a compiled one cannot."""

    def build(self, context):
        def measure(view, data):
            return {"first": jnp.float32(float(view.start["params"]["fc1"]["kernel"].sum()))}

        def records(number, ids, found):
            return [fs.Row(number, "first", float(found["first"]))]

        return fs.Measurement(measure, records)


def test_an_observer_sees_numbers_and_a_cut_run_goes_on(tmp_path):
    dataset, partition = oracles.world(SIZES)
    given = {"dataset": dataset, "model": LINEAR, "observers": [Looks()]}
    config = fs.RunConfig(
        rounds=1,
        local=fs.LocalConfig(steps=2, epochs=None, batch_size=4),
        cohort=fs.CohortConfig(size=2),
        output=fs.OutputConfig(dir=str(tmp_path / "run"), progress=False, figures=False, tensorboard=False),
        evaluation=fs.EvaluationConfig(every=0),
        execution=fs.ExecutionConfig(debug=True),
    )
    fs.run(config, partition=partition, **given)
    with pytest.raises(UserError, match=r"observe.*ConcretizationTypeError"):  # traced, it has no values
        fs.resume(tmp_path / "run", rounds=2, debug=False, **given)
    run = fs.resume(tmp_path / "run", rounds=2, **given)
    assert [row.round for row in run.metrics if row.metric == "first"] == [1, 2]


@pytest.mark.slow
def test_a_run_goes_on_in_either_mode(tmp_path):
    output = fs.OutputConfig(dir=str(tmp_path / "run"), progress=False, figures=False, tensorboard=False)
    config = fs.RunConfig(
        rounds=1,
        data=fs.DataConfig("diabetes"),
        partition=fs.PartitionConfig("iid", clients=3),
        model=fs.ModelConfig("mlp", options={"hidden": (4,)}),
        local=fs.LocalConfig(steps=2, epochs=None),
        output=output,
    )
    fs.run(config)
    fs.resume(tmp_path / "run", rounds=2, debug=True)
    run = fs.resume(tmp_path / "run", rounds=3)
    whole = fs.run(dataclasses.replace(config, rounds=3, output=fs.OutputConfig(progress=False)))
    oracles.assert_trees_close(run.variables, whole.variables)
    assert "debug: false" in (tmp_path / "run" / "config.yaml").read_text()


# --- its parts --------------------------------------------------------------------------------------------


def test_slots_one_after_another():
    seen = []

    def one(x, scale):
        seen.append(float(x.sum()))
        return {"twice": x * scale, "key": jax.random.key(0)}

    with jax.disable_jit():
        found = stacked.per_slot(one, (0, None))(jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.float32(2))
    assert seen == [3.0, 7.0]
    np.testing.assert_array_equal(found["twice"], [[2, 4], [6, 8]])
    assert found["key"].shape == (2,)


def test_without_jit_one_device_needs_no_mesh():
    def share(x):
        return stacked.summed(x), stacked.summed((x > 1).astype(jnp.int32))

    x, specs = jnp.array([1.0, 2.0]), (P(), P())
    for devices in (1, 2):
        mesh = placement.make_mesh(devices)
        run = stacked.on_devices(share, mesh, P(AXIS), specs)
        assert run is not share
        if devices == 1:
            wanted = jax.jit(run)(x)
    with jax.disable_jit():
        alone = stacked.on_devices(share, placement.make_mesh(1), P(AXIS), specs)
        assert alone is share
        for got, want in zip(alone(x), wanted, strict=True):
            np.testing.assert_array_equal(got, want)


def test_an_error_in_a_compiled_round_is_told_of_debugging():
    with pytest.raises(KeyError) as caught, debugging.UNWATCHED.during(1), debugging.UNWATCHED.during(1):
        raise KeyError("mine")
    assert caught.value.__notes__ == [debugging.HINT]


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match=r"execution\.debug = True: 2 processes run it"):
        debugging.layout(fs.ExecutionConfig(debug=True))
    assert debugging.layout(fs.ExecutionConfig(devices=2)).devices == 2


def test_layout_is_one_client_on_one_device():
    execution = debugging.layout(fs.ExecutionConfig(devices=4, wave=3, debug=True))
    assert (execution.devices, execution.wave) == (1, 1)


@pytest.mark.slow
def test_a_plan_is_of_the_run_without_it():
    config = fs.RunConfig(
        model=fs.ModelConfig("mlp", options={"hidden": (4,)}),
        data=fs.DataConfig("diabetes"),
        partition=fs.PartitionConfig("iid", clients=3),
    )
    execution = fs.ExecutionConfig(debug=True)
    assert plan.plan(dataclasses.replace(config, execution=execution)).parts == plan.plan(config).parts


def test_a_run_that_stops_names_the_way(tmp_path):
    assert drive._look(None, 0) == "To see where it began, run it with execution.debug = True."
    told = drive._look(Folder(tmp_path), 50)
    assert f"from the checkpoint of round 50: fedjax-sim resume {tmp_path} --execution.debug." in told
