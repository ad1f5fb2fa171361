"""Rounds that run as one program: the bits of one by one, what each says of itself, and who has none."""

import dataclasses

import jax
import numpy as np
import pytest

import fedjax_sim as fs
from fedjax_sim.engine import fusing, hosts
from fedjax_sim.engine.simulation import NonFiniteUpdate
from fedjax_sim.runs.federation import Simulation

PLAIN = fs.RunConfig(
    rounds=11,
    seed=3,
    partition=fs.PartitionConfig(kind="dirichlet", clients=9, alpha=0.5, min_size=5, local_test="matching"),
    model=fs.ModelConfig("mlp", options={"hidden": [8]}),
    local=fs.LocalConfig(epochs=1, batch_size=16, lr=0.1, schedule="cosine"),
    cohort=fs.CohortConfig(size=4),
    evaluation=fs.EvaluationConfig(every=4, per_client=True),
)
A = fs.algorithms


def _placed(config, call, devices=1, **more):
    return dataclasses.replace(
        config, execution=fs.ExecutionConfig(devices=devices, rounds_per_call=call, **more)
    )


def _simulated(config):
    """(rows, state, how many rounds each call of several had)."""
    simulation, calls = Simulation(config), []
    fused = simulation.fused
    if fused is not None:

        def counted(state, inputs, count, data):
            calls.append(int(count))
            return fused(state, inputs, count, data)

        simulation.fused = counted
    rows = [[tuple(row) for row in part] for part in simulation.advance()]
    return rows, jax.device_get(simulation.state), calls


def _same(one, other):
    assert repr(one[0]) == repr(other[0])  # also where something is not a number
    jax.tree.map(np.testing.assert_array_equal, one[1], other[1])


@pytest.mark.parametrize(
    ("algorithm", "changes", "devices"),
    [
        (A.FedMR(first_stage=3), {}, 1),
        (A.FedMR(first_stage=3), {}, 3),
        (A.Scaffold(), {"local": {"momentum": 0.9, "keep_optimizer": True}}, 2),
        (A.FedOpt(), {"inertia": fs.InertiaConfig(measure=True, every=5)}, 2),
        (A.LIPS(inner=A.FedPer(), period=2, leaves=("params/fc1/kernel",)), {}, 1),
    ],
)
def test_rounds_of_one_call_have_the_bits_of_rounds_one_by_one(algorithm, changes, devices):
    local = dataclasses.replace(PLAIN.local, **changes.get("local", {}))
    config = dataclasses.replace(PLAIN, algorithm=algorithm, **(changes | {"local": local}))
    alone = _simulated(_placed(config, 1, devices))
    several = _simulated(_placed(config, 3, devices))
    _same(several, alone)
    assert not alone[2] and sum(several[2]) >= 7 and max(several[2]) == 3
    assert [{row[0] for row in rows} for rows in several[0]] == [{number} for number in range(1, 12)]


def test_a_call_ends_where_the_host_looks():
    config = _placed(dataclasses.replace(PLAIN, peel=fs.PeelConfig(every=5, clients=2, samples=20)), 100)
    simulation, ends = Simulation(config), []
    while simulation.round < 11:
        simulation.steps()()
        ends.append(simulation.round)
    # Evaluated after 4, 8 and 11; measured alone in 1, 5, 10 and 11.
    assert ends == [1, 4, 5, 8, 9, 10, 11]
    simulation = Simulation(_placed(PLAIN, 100))
    simulation.steps(3)
    assert simulation.round == 3
    simulation.steps(3)
    assert simulation.round == 4


@pytest.mark.parametrize("call", [1, 3])
def test_what_is_not_finite_is_named_by_round_and_client(call):
    config = dataclasses.replace(PLAIN, local=fs.LocalConfig(epochs=None, steps=1, batch_size=16, lr=1e30))
    rows = []
    with pytest.raises(NonFiniteUpdate, match=r"in round 2 the update of client\(s\) \[\d") as stop:
        for part in Simulation(_placed(config, call)).advance():
            rows.append(part[0].round)
    assert rows == [1]
    left = dataclasses.replace(config, local=dataclasses.replace(config.local, non_finite="skip"))
    _same(_simulated(_placed(left, call)), _simulated(_placed(left, 1)))
    assert stop.value.field == "local.non_finite"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"algorithm": A.CONFIGS["clusamp"]()}, "the algorithm chooses"),
        ({"execution": {"data": "streamed"}}, "execution.data: streamed"),
        ({"execution": {"data": "cut", "devices": 2}}, "execution.data: cut"),
        ({"algorithm": A.FedPer(), "execution": {"client_state": "host"}}, "state lies on the host"),
        ({"execution": {"debug": True}}, "debugged"),
    ],
)
def test_what_needs_the_host_in_every_round_says_so_once(changes, why):
    execution = changes.pop("execution", {})
    with pytest.warns(UserWarning, match=f"rounds_per_call is 5, .*{why}") as told:
        simulation = Simulation(_placed(dataclasses.replace(PLAIN, **changes), 5, **execution))
    assert simulation.fused is None and len(told) == 1
    assert Simulation(_placed(dataclasses.replace(PLAIN, **changes), "auto", **execution)).fused is None


def test_a_call_has_room_for_the_rounds_of_the_run_at_most():
    assert Simulation(_placed(PLAIN, 10**9)).rounds_per_call == PLAIN.rounds


@pytest.mark.parametrize("call", [0, -1, 2.5, "all"])
def test_a_wrong_number_is_refused(call):
    with pytest.raises(fs.UserError, match=r"execution.rounds_per_call"):
        fs.ExecutionConfig(rounds_per_call=call)


def test_by_itself_it_does_so_where_it_helps():
    large = dataclasses.replace(PLAIN, model=fs.ModelConfig("mlp", options={"hidden": [30_000]}))
    recombined = dataclasses.replace(PLAIN, algorithm=A.FedMR())
    # One model of 8.5 MiB, which a loop might hold twice; slots of two CPU devices that exchange rows.
    for config, devices in ((large, 1), (recombined, 2)):
        assert Simulation(_placed(config, "auto", devices)).fused is None
        assert Simulation(_placed(config, 2, devices)).rounds_per_call == 2
    for config, devices in ((recombined, 1), (PLAIN, 2)):
        assert Simulation(_placed(config, "auto", devices)).rounds_per_call == 32


# --- how many -------------------------------------------------------------------------------------------


class _Time:
    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(fusing.time, "perf_counter", lambda: self.now)

    def passes(self, pace, rounds, seconds):
        self.now += seconds
        assert pace.timed(rounds, lambda: "found") == "found"


def test_a_call_takes_a_quarter_of_a_second_and_grows_twofold_at_most(monkeypatch):
    clock, pace = _Time(monkeypatch), fusing.Pace("auto", 32)
    assert pace.rounds(32) == 1
    clock.passes(pace, 1, 9.0)  # compiled
    assert pace.rounds(32) == 1
    counts = []
    for _ in range(6):
        clock.passes(pace, counts[-1] if counts else 1, 0.001 * (counts[-1] if counts else 1))
        counts.append(pace.rounds(32))
    assert counts == [2, 4, 8, 16, 32, 32]
    clock.passes(pace, 32, 3.2)
    assert pace.rounds(32) == 2 and pace.rounds(1) == 1
    clock.passes(pace, 2, 20.0)
    assert pace.rounds(32) == 1


def test_several_processes_agree_at_few_calls(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    asked, counts = [], []
    monkeypatch.setattr(hosts, "on_first", lambda action: asked.append(len(counts) + 1) or 0.01)
    pace = fusing.Pace("auto", 32)
    for _ in range(39):
        counts.append(pace.rounds(32))
    assert asked == [1, 2, 4, 8, 16, 32]
    assert [counts[number - 1] for number in (1, 2, 3, 4, 7, 8, 16, 31, 32)] == [
        2,
        4,
        4,
        8,
        8,
        16,
        25,
        25,
        25,
    ]


def test_what_the_user_says_is_taken():
    assert fusing.Pace(7, 7).rounds(100) == 7
    assert fusing.Pace(7, 7).rounds(3) == 3
