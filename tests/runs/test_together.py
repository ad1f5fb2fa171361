"""Runs side by side: each one's records, folder, errors and resumption are what they are alone."""

import dataclasses
import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

import fedjax_sim as fs
from fedjax_sim import runs
from fedjax_sim.core.errors import NotWritten, UserError
from fedjax_sim.engine import simulation
from fedjax_sim.engine.device_data import DataStore, abstract
from fedjax_sim.engine.simulation import NonFiniteUpdate
from fedjax_sim.engine.together import Group, _Stack
from fedjax_sim.runs import opening, parts, together
from fedjax_sim.runs.assemble import prepare
from fedjax_sim.runs.checkpoint import Checkpoints
from fedjax_sim.runs.plan import plan

A = fs.algorithms
BASE = fs.RunConfig(
    rounds=7,
    partition=fs.PartitionConfig(kind="dirichlet", clients=8, alpha=0.5, min_size=5, local_test="matching"),
    model=fs.ModelConfig("mlp", options={"hidden": [8]}),
    local=fs.LocalConfig(epochs=2, batch_size=32, lr=0.1, momentum=0.5),
    cohort=fs.CohortConfig(size=4),
    evaluation=fs.EvaluationConfig(every=3),
    output=fs.OutputConfig(progress=False, tensorboard=False, figures=False, checkpoint_every=2),
)


def of(config=BASE, **changes):
    """A configuration with some fields of its sections changed: `local={"lr": 0.2}`."""
    for name, value in changes.items():
        if isinstance(value, dict):
            changes[name] = dataclasses.replace(getattr(config, name), **value)
    return dataclasses.replace(config, **changes)


def seeds(count, config=BASE, **changes):
    return [of(config, seed=seed, **changes) for seed in range(count)]


def alone(config):
    """The run by itself on one device."""
    return fs.run(of(config, execution={"devices": 1}, output={"dir": None}))


def keyed(run):
    return {
        (row.round, row.metric, row.layer, row.client, row.state): row.value
        for row in run.metrics
        if row.metric != "padding_waste"
    }


def same(one, other, rtol=1e-5):
    first, second = keyed(one), keyed(other)
    assert list(first) == list(second)
    np.testing.assert_allclose(list(first.values()), list(second.values()), rtol=rtol, atol=1e-6)
    mine, theirs = one.variables, other.variables
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), mine, theirs)


def groups_of(monkeypatch):
    """The groups that are made from now on, each by its members and the values of its numbers."""
    made = []
    begin = Group.__init__

    def noted(self, members, family, values, devices, side=None):
        made.append((len(members), [dict(one) for one in values], self))
        begin(self, members, family, values, devices, side)

    monkeypatch.setattr(Group, "__init__", noted)
    return made


@pytest.mark.parametrize("devices", [1, 2, 3])
def test_each_run_has_the_records_that_it_has_alone(devices, monkeypatch):
    made = groups_of(monkeypatch)
    configs = [
        of(seed=3, algorithm=A.FedProx(mu=0.1), execution={"devices": devices}),
        of(seed=3, algorithm=A.FedProx(mu=1.0), execution={"devices": devices}, local={"lr": 0.05}),
        of(seed=5, algorithm=A.FedProx(mu=0.1), execution={"devices": devices}, local={"momentum": 0.9}),
        of(
            seed=6,
            algorithm=A.FedProx(mu=0.2),
            execution={"devices": devices},
            local={"schedule": "cosine", "decay": 0.1},
            partition={"alpha": 5.0},
        ),
    ]
    found = fs.run_many(configs)
    for run, config in zip(found, configs, strict=True):
        same(run, alone(config))
        assert run.config == config and run.seconds > 0
    (count, values, group), *others = made
    assert count == 4 and not others
    assert [sorted(one) for one in values] == [["algorithm.mu", "local.lr", "local.momentum"]] * 4
    # One program, though no two runs have the same numbers.
    assert [program.num_compiled() for program in group._programs.values()] == [1]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"algorithm": A.FedMR(first_stage=3)}, marks=pytest.mark.slow),
        {"algorithm": A.Scaffold(), "local": {"keep_optimizer": True}},
        {"algorithm": A.FedOpt(), "evaluation": {"per_client": True, "per_class": True}},
        # The host chooses the clients of each round.
        pytest.param({"algorithm": A.CONFIGS["clusamp"]()}, marks=pytest.mark.slow),
        pytest.param(
            {"algorithm": A.LIPS(inner=A.FedPer(), period=2, leaves=("params/fc1/kernel",))},
            marks=pytest.mark.slow,
        ),
        {
            "algorithm": A.FedMR(),
            "inertia": fs.InertiaConfig(measure=True, every=5, samples=20),
            "peel": fs.PeelConfig(every=3, clients=2, samples=20, class_samples=1),
        },
        # One run after another on a device.
        {
            "model": fs.ModelConfig("mcmahan"),
            "local": {"epochs": None, "steps": 1},
            "rounds": 2,
            "execution": {"conv": "patches"},
        },
        {"partition": {"kind": "iid"}, "local": {"epochs": None, "steps": 3}},  # equal clients
        {"algorithm": A.Ditto(), "evaluation": {"per_client": True, "finetune": 1}},
    ],
    ids=lambda changes: " ".join(changes),
)
def test_under_methods_and_diagnostics(changes, monkeypatch):
    made = groups_of(monkeypatch)
    configs = seeds(3, **(changes | {"execution": changes.get("execution", {}) | {"devices": 2}}))
    for run, config in zip(fs.run_many(configs), configs, strict=True):
        same(run, alone(config), rtol=2e-4)
    assert [count for count, _, _ in made] == [3]


@pytest.mark.parametrize(
    "names",
    [("fedcac", "fedgen", "fedmut", "feddyn"), pytest.param(tuple(A.CONFIGS), marks=pytest.mark.slow)],
    ids=["some", "all"],
)
def test_methods_go_side_by_side(names):
    special = {
        "lips": A.LIPS(leaves=("params/fc1/kernel",)),
        "partial": A.CONFIGS["partial"](first=1),
        "fedrep": A.CONFIGS["fedrep"](head_epochs=1),
    }
    told = []
    for name in names:
        if name == "fedbn":  # of networks with batch normalisation
            continue
        method = special.get(name) or A.CONFIGS[name]()
        configs = seeds(2, algorithm=method, rounds=1, execution={"devices": 1})
        fs.run_many(configs, tell=told.append)
    assert not told


def test_numbers_by_which_a_method_decides_are_not_arguments(monkeypatch):
    made = groups_of(monkeypatch)
    told = []
    rates = [0.5, 1.0, 0.5, 1.0]
    configs = [
        of(seed=n, algorithm=A.Scaffold(server_lr=rate), rounds=1, execution={"devices": 1})
        for n, rate in enumerate(rates)
    ]
    found = fs.run_many(configs, tell=told.append)
    assert [run.config.algorithm.server_lr for run in found] == rates
    assert [(count, values) for count, values, _ in made] == [(2, [{}, {}])] * 2
    assert told == ["2 runs side by side, 2 after them"]


def test_what_keeps_runs_apart_is_told(monkeypatch):
    made, told = groups_of(monkeypatch), []
    configs = [
        of(rounds=1),
        of(rounds=2),
        of(rounds=1, seed=1, partition={"clients": 10}),
        of(rounds=1, seed=2),
        of(rounds=1, model=fs.ModelConfig("mlp", options={"hidden": [4]})),
        of(rounds=1, execution={"data": "streamed"}),
    ]
    found = fs.run_many(configs, tell=told.append)
    assert [run.config for run in found] == configs
    assert [count for count, _, _ in made] == [2]
    assert told == [
        "6 runs in 4 groups, which differ in: rounds, model.options, execution.data",
        "2 runs side by side, 1 after them, as these differ: clients of the partition",
        "runs go one by one: samples are sent to the devices for each (execution.data: streamed)",
    ]


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_the_others_go_on_wherever_one_leaves(broken):
    lrs = [1e30 if seed == broken else 0.1 for seed in range(4)]
    local = {"epochs": None, "steps": 1, "momentum": 0.0}
    configs = [of(local=local | {"lr": lr}, seed=seed) for seed, lr in enumerate(lrs)]
    found = fs.run_many(configs, errors="return")
    assert isinstance(found.pop(broken), NonFiniteUpdate)
    for run in found:
        same(run, alone(run.config))


def test_a_run_that_diverges_stops_alone(tmp_path):
    local = {"epochs": None, "steps": 1, "momentum": 0.0}
    configs = [
        of(local=local | {"lr": lr}, seed=seed, output={"dir": str(tmp_path / str(seed))})
        for seed, lr in enumerate((0.1, 1e30, 0.05))
    ]
    first, broken, third = fs.run_many(configs, errors="return")
    for run in (first, third):
        same(run, alone(run.config))
    assert isinstance(broken, NonFiniteUpdate)
    assert "in round 2 the update of client(s) [" in str(broken) and f"resume {tmp_path / '1'}" in str(broken)
    with pytest.raises(NonFiniteUpdate):
        fs.run_many(configs)


def cut(monkeypatch, after):
    """Has the process be asked to end after so many calls of groups."""
    steps, calls = Group.steps, []

    def counted(self, active, most=None):
        calls.append(list(active))
        if len(calls) == after:
            os.kill(os.getpid(), signal.SIGTERM)
        return steps(self, active, most)

    monkeypatch.setattr(Group, "steps", counted)
    return calls


def test_a_group_that_was_cut_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    whole = [of(one, output={"dir": str(tmp_path / f"whole{one.seed}")}) for one in seeds(3)]
    pieces = [of(one, output={"dir": str(tmp_path / f"cut{one.seed}")}) for one in seeds(3)]
    wanted = fs.run_many(whole)
    with monkeypatch.context() as patch:
        cut(patch, 3)
        with pytest.raises(runs.Terminated):
            fs.run_many(pieces)
    done = [runs.load(one.output.dir).rounds for one in pieces]
    assert len(set(done)) == 1 and 0 < done[0] < 7
    # As if the process had been killed before the second run's newest checkpoint was there.
    newest = max(Path(pieces[1].output.dir, "checkpoints").iterdir(), key=lambda path: int(path.name))
    for path in sorted(newest.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    newest.rmdir()
    calls = cut(monkeypatch, 0)
    found = fs.run_many(pieces)
    assert calls[0] == [1] and calls[-1] == [0, 1, 2]
    for one, other in zip(wanted, found, strict=True):
        assert keyed(one) == keyed(other)
        jax.tree.map(np.testing.assert_array_equal, one.variables, other.variables)
    assert [run.rounds for run in fs.run_many(pieces)] == [7, 7, 7]  # finished: they are only loaded


@pytest.mark.parametrize("name", ["scaffold", "fedmr"])
def test_large_states_are_held_once(name, tmp_path, monkeypatch):
    """Begun, cut, gone on with or saved: besides the group's there is the state of one run at most."""
    monkeypatch.setattr(simulation, "_LARGE", 0)
    configs = seeds(3, algorithm=A.CONFIGS[name]())
    wanted = fs.run_many(configs)
    groups, own, put, save = groups_of(monkeypatch), [], _Stack.put, Checkpoints.save

    def count():
        own.append(sum(member._state is not None for member in groups[-1][2].members))

    def noted(self, state, places):
        put(self, state, places)
        count()

    def saved(self, *args):
        save(self, *args)
        count()

    monkeypatch.setattr(_Stack, "put", noted)
    monkeypatch.setattr(Checkpoints, "save", saved)
    pieces = [of(one, output={"dir": str(tmp_path / str(one.seed))}) for one in configs]
    with monkeypatch.context() as patch:
        cut(patch, 3)
        with pytest.raises(runs.Terminated):
            fs.run_many(pieces)
    found = fs.run_many(pieces)
    assert len(own) > 12 and set(own) == {1}
    for one, other in zip(wanted, found, strict=True):
        assert keyed(one) == keyed(other)
        jax.tree.map(np.testing.assert_array_equal, one.variables, other.variables)


def test_a_run_of_a_group_is_resumed_alone(tmp_path, monkeypatch):
    configs = [of(one, output={"dir": str(tmp_path / str(one.seed))}) for one in seeds(2)]
    cut(monkeypatch, 3)
    with pytest.raises(runs.Terminated):
        fs.run_many(configs)
    same(fs.resume(configs[1].output.dir), alone(configs[1]))


def test_callbacks_act_on_their_own_run():
    stopping = fs.EarlyStopping(metric="loss", goal="min", patience=1, min_delta=10.0)
    configs = seeds(3, callbacks=(stopping,), evaluation={"every": 2})
    for run, config in zip(fs.run_many(configs), configs, strict=True):
        assert run.rounds == 4 and run.stopped is not None
        same(run, alone(config))


def test_a_group_is_no_larger_than_memory(monkeypatch):
    made = groups_of(monkeypatch)
    monkeypatch.setattr(together, "_most", lambda setup, devices: 2)
    assert len(fs.run_many(seeds(5, rounds=1))) == 5
    assert [count for count, _, _ in made] == [2, 2]  # and the fifth by itself


def test_memory_is_planned_for_data_once_and_all_states(monkeypatch):
    setup = prepare(of(execution={"devices": 1}))
    held = sum(part.total for part in parts.data_parts(parts.on_paper(setup), "cpu"))
    own = plan(setup).peak - held
    for runs_ in (1, 4):
        monkeypatch.setattr(parts, "available", lambda platform, n=runs_: int((held + n * own) / 0.8) + 2)
        assert together._most(setup, 2) == runs_
    monkeypatch.setattr(parts, "available", lambda platform: 1)
    assert together._most(setup, 2) == 1


def test_folders_are_looked_at_before_anything_runs(tmp_path):
    one = of(rounds=1, output={"dir": str(tmp_path / "a")})
    with pytest.raises(UserError, match="two of the runs have this folder"):
        fs.run_many([one, of(one, seed=1)])
    again = of(one, seed=1, output={"dir": str(tmp_path / "b" / ".." / "a")})
    with pytest.raises(UserError, match="two of the runs have this folder"):
        fs.run_many([one, again])
    fs.run(one)
    with pytest.raises(UserError, match="holds a run of other settings: seed"):
        fs.run_many([of(one, seed=1)])


def test_a_full_disk_ends_all(tmp_path, monkeypatch):
    configs = [of(one, output={"dir": str(tmp_path / str(one.seed))}) for one in seeds(2)]

    def full(self, *args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedjax_sim.records.Journal.write", full)
    with pytest.raises(NotWritten, match="No space left"):
        fs.run_many(configs)


def test_a_data_set_is_held_once(monkeypatch):
    placed = []
    whole = DataStore.whole

    def noted(self, example):
        if self._place is not abstract:  # of a plan on paper
            placed.append(self)
        return whole(self, example)

    monkeypatch.setattr(DataStore, "whole", noted)
    fs.run_many(seeds(4, rounds=1), dataset=BASE.data.load())
    assert len({id(store) for store in placed}) == 2  # of the runs, and of the group


def test_what_is_refused(monkeypatch):
    with pytest.raises(UserError, match="neither raise nor return"):
        fs.run_many([], errors="keep")  # type: ignore[call-overload]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="several processes share each run"):
        fs.run_many(seeds(2))


def test_settings_that_cannot_work_are_refused_before_any_run_begins(tmp_path):
    """LIPS's default layers are convolutions, of which an MLP has none."""
    configs = [of(output={"dir": str(tmp_path / "first")}), of(algorithm=A.LIPS(period=2), seed=1)]
    with pytest.raises(UserError, match=r"configs\[1\]: algorithm.layers .* no tensor of mlp is eligible"):
        fs.run_many(configs)
    assert not (tmp_path / "first").exists()
    first, refused = fs.run_many(configs, errors="return")
    assert first.finished and isinstance(refused, UserError)


def test_one_configuration_is_no_list():
    with pytest.raises(UserError, match="configs = 'RunConfig': it is one run"):
        fs.run_many(BASE)  # type: ignore[arg-type]


def test_no_runs():
    assert fs.run_many([]) == []


def test_a_group_that_is_cut_at_a_round_goes_on_to_the_same_bits(tmp_path):
    def until(name, *rounds):
        configs = [of(one, output={"dir": str(tmp_path / f"{name}{one.seed}")}) for one in seeds(3)]
        for end in rounds:
            found = together.run_groups(configs, lambda *given: opened(configs, *given), print, until=end)
        return found

    def opened(configs, number, mesh, store):
        config, here = configs[number], {"dataset": samples, "mesh": mesh, "store": store}
        folder = Path(config.output.dir)
        return opening.again(folder, **here) if folder.is_dir() else opening.new(config, **here)

    samples = BASE.data.load()
    for run in until("first", 5):  # which is neither evaluated nor a checkpoint's
        assert run.rounds == 5 and not run.finished and run.metrics.series("accuracy")[0].tolist() == [3]
        assert run.folder is not None and runs.load(run.folder).rounds == 5
    for one, other in zip(until("whole", None), until("cut", 3, 5, 5, None), strict=True):
        assert one.finished and other.finished and keyed(one) == keyed(other)
        jax.tree.map(np.testing.assert_array_equal, one.variables, other.variables)
