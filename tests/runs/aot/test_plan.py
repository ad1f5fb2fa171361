"""A configuration compiled for a machine: on CPU devices here, on TPUs where their compiler is installed."""

import dataclasses
import json

import jax
import pytest

from fedjax_sim import data, runs
from fedjax_sim.algorithms import CONFIGS
from fedjax_sim.cli.commands import main
from fedjax_sim.config import (
    CohortConfig,
    EvaluationConfig,
    ExecutionConfig,
    LocalConfig,
    ModelConfig,
    PeelConfig,
    RunConfig,
)
from fedjax_sim.core.errors import UserError
from fedjax_sim.engine.device_data import DataStore, abstract
from fedjax_sim.engine.programs import CachedJit
from fedjax_sim.runs import finetune
from fedjax_sim.runs.aot import programs
from fedjax_sim.runs.aot.machines import machine
from fedjax_sim.runs.plan import plan


def config(**changes):
    base = RunConfig(
        rounds=3,
        algorithm=CONFIGS["fedmr"](),
        partition=data.PartitionConfig(kind="iid", clients=16),
        model=ModelConfig(options={"hidden": [256]}),
        local=LocalConfig(epochs=1, batch_size=16),
        cohort=CohortConfig(size=8),
    )
    return dataclasses.replace(base, **changes)


@pytest.fixture(scope="module")
def found():
    return plan(config(peel=PeelConfig(every=1, clients=2)), on="cpu-4")


def test_it_compiles_the_programs_of_a_run(found):
    assert [one.name for one in found.programs] == ["round", "measured round", "observers", "evaluation"]
    first, measured = found.programs[:2]
    assert first.seconds > 0 and first.flops > 0 and first.traffic > 0 and first.arguments > 0
    model = runs.api.prepare(config()).model.num_params() * 4
    new = measured.outputs - measured.in_place
    assert 3 * model < new < 5 * model  # the models that are looked at, of four devices one each; the mean
    assert found.fits


def test_its_figures_are_xlas_of_the_very_round(found):
    setup = runs.api.prepare(config(execution=ExecutionConfig(devices=4, rounds_per_call=1)))
    simulation = runs.Simulation(setup)
    inputs, _ = simulation.inputs(0)
    with jax.set_mesh(simulation.mesh):
        made = simulation.program.lower(simulation.state, inputs, simulation.data).compile()
    sizes, first = made.memory_analysis(), found.programs[0]
    assert first.arguments == sizes.argument_size_in_bytes
    assert first.temporaries == sizes.temp_size_in_bytes
    assert first.in_place == sizes.alias_size_in_bytes


def test_of_rounds_that_run_together_it_is_their_program_and_counts_one():
    together, alone = (
        plan(config(execution=ExecutionConfig(rounds_per_call=call)), on="cpu-4") for call in (8, 1)
    )
    several, one = together.programs[0], alone.programs[0]
    assert several.arguments > one.arguments  # what the host decides of eight rounds
    assert several.flops == pytest.approx(one.flops, rel=0.01) and several.unknown_loops == 0
    assert several.traffic == pytest.approx(one.traffic, rel=0.3)


def test_operations_are_those_of_the_steps(found):
    """Of an MLP: forward, the weights' gradients and, but for the first layer, the inputs'."""
    setup = runs.api.prepare(config(execution=ExecutionConfig(devices=4)))
    steps, batch, clients = setup.steps[0], 16, 8 // 4
    products = 64 * 256 * 2 + 256 * 10 * 3
    wanted = clients * steps * batch * 2 * products
    assert found.programs[0].flops == pytest.approx(wanted, rel=0.25)


def test_the_recombination_is_named_with_its_line():
    wide = plan(config(model=ModelConfig(options={"hidden": [4096]})), on="cpu-2")
    found = wide.programs[0].collectives
    large = [one for one in found if one.bytes >= 2**20 and one.op == "all-to-all"]
    assert large
    assert all("fedjax_sim/algorithms/fedmr.py:" in one.where and "(recombine)" in one.where for one in large)
    assert "core/stacked.py:" in large[0].where
    assert "asked for by fedjax_sim/algorithms/fedmr.py" in str(wide)


def test_as_data(found):
    there = json.loads(found.to_json())
    assert there["machine"]["name"] == "cpu-4" and there["chips"] == 4 and there["fits"] is True
    assert set(there["memory"]) == {"needed", "total", "available", "parts"}
    assert there["memory"]["total"] == found.total
    assert {"op", "bytes", "where", "times", "program"} <= set(there["collectives"][0])
    assert there["flops"] == found.programs[0].flops and there["cycles"] is None
    assert there["compile_seconds"] == pytest.approx(sum(one.seconds for one in found.programs))


def test_what_is_too_large_is_said_with_a_remedy(found):
    little = dataclasses.replace(machine("cpu-4"), memory=2**20)
    tight = dataclasses.replace(found, machine=little, available=2**20)
    assert tight.fits is False
    text = str(tight)
    assert "does NOT fit, by" in text and "what to change, the cheapest first:" in text
    assert tight.to_dict()["advice"] == tight.advice() != []
    assert not found.advice()


def test_the_first_remedy_is_a_narrower_wave_where_that_does():
    made = plan(config(execution=ExecutionConfig(wave=2), model=ModelConfig("mcmahan")), on="cpu-4")
    waves = sum(part.device for part in made.waves)
    assert waves > 0
    little = dataclasses.replace(made.machine, memory=1)
    tight = dataclasses.replace(made, machine=little, available=made.programs[0].total - waves // 4)
    assert tight.advice()[0].startswith("execution.wave = 1 instead of 2")


def test_a_narrower_wave_is_no_remedy_for_what_an_evaluation_needs(found):
    """Of the round it was one: `found` has waves of two."""
    worst = dataclasses.replace(found.programs[3], temporaries=2**30)
    tight = dataclasses.replace(
        found,
        programs=(*found.programs[:3], worst),
        machine=dataclasses.replace(machine("cpu-4"), memory=1),
        available=worst.total - 1,
    )
    assert found.wave > 1 and tight.fits is False
    assert not any("execution.wave =" in line for line in tight.advice())
    of_round = dataclasses.replace(found.programs[0], temporaries=2**30)
    other = dataclasses.replace(tight, programs=(of_round,), available=of_round.total - 1)
    assert "execution.wave =" in other.advice()[0]


def test_what_a_wave_needs_counts_where_a_merge_holds_more():
    """67 clients over four devices are 68 rows, of which each has 17."""
    made = plan(
        config(
            algorithm=CONFIGS["clusamp"](),
            partition=data.PartitionConfig(kind="iid", clients=67),
            model=ModelConfig(options={"hidden": [512]}),
            local=LocalConfig(epochs=1, batch_size=1),
            cohort=CohortConfig(size=3),
        ),
        on="cpu-4",
    )
    device = {part.name: part.device for part in made.parts}
    updates = device["server: updates (68 models)"]
    assert "a wave's models and optimisers" not in device and made.waves
    assert made.needed > sum(made.size(part) for part in made.parts if part.when == "always")
    assert device["what the merge makes"] < 3 * updates  # each device's own rows


def test_runs_side_by_side_exchange_nothing_and_hold_the_samples_once():
    one = config(evaluation=EvaluationConfig(every=0), algorithm=CONFIGS["fedavg"]())
    alone, several = plan(one, on="cpu-1"), plan(one, on="cpu-2", together=5)
    assert [program.name for program in several.programs] == ["round of 5 runs"]
    assert several.programs[0].collectives == ()
    assert several.runs == several.to_dict()["runs"] == 5 and "5 runs side by side" in str(several)
    # Three places a device: states, tables, and what all runs share.
    sizes = {part.name: several.size(part) for part in several.parts}
    own = {part.name: alone.size(part) for part in alone.parts}
    assert sizes["training samples"] == own["training samples"] == several.shared
    for name in ("server: model", "who holds which sample"):
        assert sizes[name] == 5 * own[name]
    each = own["server: model"] + own["who holds which sample"]
    assert 3 * each < several.programs[0].arguments - own["training samples"] < 4 * each
    # One compiled program of a run's rounds takes what a place takes, and no copy of the samples in between.
    assert several.programs[0].temporaries < 3 * 1.2 * alone.programs[0].temporaries


@pytest.mark.parametrize(
    ("changes", "runs_asked", "why"),
    [({}, 1, "2 or more"), ({"execution": ExecutionConfig(data="streamed")}, 3, "go one by one")],
)
def test_what_cannot_go_side_by_side_is_said(changes, runs_asked, why):
    with pytest.raises(UserError, match=why):
        plan(config(**changes), on="cpu-2", together=runs_asked)
    with pytest.raises(UserError, match="for a machine"):
        plan(config(), together=3)


def test_exact_is_no_question_to_a_machine_that_is_not_here():
    with pytest.raises(UserError, match="compiles its programs anyway"):
        plan(config(), on="cpu-2", exact=True)


def test_what_xla_refuses_for_lack_of_memory_is_read():
    message = "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
    message += "Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G."
    assert programs._wanted(message) == int(20.5 * 2**30)
    assert programs._wanted("INTERNAL: something else") is None
    refused = programs.Program("round", refused=2**30, besides=5, seconds=1.0)
    assert refused.total == 2**30 + 5


def test_on_the_command_line(tmp_path, capsys):
    jax.devices()  # of all tests; started by the command it would have but what that needs
    text = (
        "rounds: 2\nmodel: {name: mlp, options: {hidden: []}}\npartition: {clients: 4}\ncohort: {size: 4}\n"
    )
    (tmp_path / "my.yaml").write_text(text)
    words = ["plan", str(tmp_path / "my.yaml"), "--on", "cpu-2"]
    assert main(words) == 0
    told = capsys.readouterr()
    assert "cpu-2: 2 × CPU" in told.out and "compiling the round" in told.err
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["chips"] == 2
    assert main(["plan", "--json"]) == 2
    assert "--on" in capsys.readouterr().err
    assert main(["plan", "--on", "v9-8"]) == 2
    assert "no such machine" in capsys.readouterr().err


def test_runs_side_by_side_on_the_command_line(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("rounds: 3\n")
    words = ["plan", str(tmp_path / "mine.yaml")]
    assert main([*words, "--together", "3"]) == 2
    assert "--on" in capsys.readouterr().err
    assert main([*words, "--on", "cpu-2", "--together", "many"]) == 2
    assert "it is no number" in capsys.readouterr().err


def test_samples_of_rounds_to_come_count_where_they_are_streamed():
    streamed = config(
        algorithm=CONFIGS["fedavg"](),
        execution=ExecutionConfig(data="streamed"),
        evaluation=EvaluationConfig(every=0),
    )
    found = plan(streamed, on="cpu-4")
    three = next(part for part in found.parts if "rounds' clients" in part.name)
    assert found.programs[0].besides == pytest.approx(2 / 3 * three.device, rel=0.01)


def test_what_a_cpus_devices_share_is_what_lies_there():
    """Without an evaluation no test samples do."""
    kinds = [EvaluationConfig(every=every) for every in (0, 1)]
    made = [plan(config(evaluation=kind), on="cpu-4") for kind in kinds]
    tests = sum(leaf.nbytes for leaf in data.load("digits").test.values())
    assert made[1].shared - made[0].shared == tests
    assert all(one.shared < one.programs[0].total for one in made)


def test_errors_of_a_configuration_are_those_of_a_run():
    with pytest.raises(UserError, match=r"cohort\.size"):
        plan(config(cohort=CohortConfig(size=99)), on="cpu-2")


# --- what clients use themselves --------------------------------------------------------------------------


def personal(algorithm, *, local_test="holdout", client_state="auto", **changes):
    return config(
        rounds=1,
        algorithm=CONFIGS[algorithm](),
        partition=data.PartitionConfig(kind="iid", clients=18, local_test=local_test),
        evaluation=EvaluationConfig(every=1, per_client=True, **changes),
        execution=ExecutionConfig(client_state=client_state),
    )


@pytest.mark.parametrize(
    ("algorithm", "local_test", "own"),
    [
        ("fedavg", "matching", []),  # of the test set, which the deployed model's evaluation goes through
        ("fedavg", "holdout", ["clients' evaluation"]),
        ("local", "matching", ["clients' models", "clients' evaluation"]),
        ("ditto", "holdout", ["clients' models", "clients' evaluation"]),
    ],
)
def test_evaluations_of_clients_are_compiled_where_they_are_asked_for(algorithm, local_test, own):
    made = plan(personal(algorithm, local_test=local_test), on="cpu-4")
    assert [one.name for one in made.programs] == ["round", "evaluation", *own]
    there = made.to_dict()
    assert [one["name"] for one in there["programs"]] == [one.name for one in made.programs]
    assert all(f"\n{name} " in str(made) for name in own)
    if len(own) == 2:
        models, figures = made.programs[-2:]
        one = sum(part.device for part in made.parts if part.name == "the deployed model")
        assert models.outputs >= 5 * one  # of 18 clients over four devices
        assert figures.arguments >= 5 * one and figures.flops > 0
        held = next(part for part in made.parts if part.name == "clients' own models, 20 at a time")
        assert (held.device, held.total, held.when) == (5 * one, 20 * one, "evaluation")
    unasked = dataclasses.replace(
        personal(algorithm, local_test=local_test), evaluation=EvaluationConfig(every=1)
    )
    assert [one.name for one in plan(unasked, on="cpu-4").programs] == ["round", "evaluation"]


def test_fine_tuning_counts_into_the_verdict():
    """It holds a model for each of all clients, which a round of FedAvg does not."""
    without, made = (plan(personal("fedavg", finetune=epochs), on="cpu-4") for epochs in (0, 2))
    names = [
        "models to fine-tune",
        "fine-tuning",
        "clients' models, fine-tuned",
        "clients' evaluation, fine-tuned",
    ]
    assert [one.name for one in made.programs[-4:]] == names
    one = sum(part.device for part in made.parts if part.name == "the deployed model")
    setup = runs.api.prepare(personal("fedavg", finetune=2), mesh=machine("cpu-4").mesh)
    # 18 clients over four devices, and of a round of eight two on each.
    assert finetune.phase(setup, DataStore(setup.mesh, abstract)).setup.wave == setup.wave == 2
    phase = made.programs[-3]
    assert phase.arguments >= 5 * one
    assert made.total > without.total
    assert made.total - made.shared == 4 * (max(p.total for p in made.programs) - made.shared) + next(
        part.total for part in made.parts if part.name == "data set in host memory"
    )


@pytest.mark.parametrize(
    ("algorithm", "client_state"), [("ditto", "device"), ("ditto", "host"), ("fedavg", "device")]
)
def test_what_is_compiled_for_clients_is_what_a_run_calls(algorithm, client_state, monkeypatch):
    """By the functions, and the shapes of all arguments."""
    asked = personal(algorithm, client_state=client_state, finetune=1)
    calls, lowered = [], []

    def seen(program, args):
        name = getattr(program.function, "__qualname__", type(program.function).__qualname__)
        return name, tuple((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(args))

    call, lower = CachedJit.__call__, CachedJit.lower
    monkeypatch.setattr(CachedJit, "__call__", lambda p, *args: calls.append(seen(p, args)) or call(p, *args))
    monkeypatch.setattr(CachedJit, "lower", lambda p, *args: lowered.append(seen(p, args)) or lower(p, *args))
    made = plan(asked, on="cpu-4")
    assert len(lowered) == len(made.programs) and not calls
    compiled, lowered[:] = list(lowered), []
    execution = dataclasses.replace(asked.execution, devices=4)
    runs.run(dataclasses.replace(asked, execution=execution))
    missing = [one for one in compiled if one not in calls]
    assert not missing
