"""Programs: values of `jax.jit`, found again in memory, not on disk where CPU devices exchange data."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import PartitionSpec as P

import fedjax_sim as fs
from fedjax_sim.config import from_dict
from fedjax_sim.core import memo
from fedjax_sim.core.stacked import AXIS
from fedjax_sim.engine import placement, programs
from fedjax_sim.engine.programs import CachedJit
from fedjax_sim.runs.federation import Simulation


def around(x):
    """Every device's part from its neighbour, and the sum."""
    devices = jax.lax.axis_size(AXIS)
    moved = jax.lax.ppermute(x, AXIS, [(d, (d + 1) % devices) for d in range(devices)])
    return moved, jax.lax.psum(x, AXIS)


def exchange(mesh):
    return jax.shard_map(around, mesh=mesh, in_specs=P(AXIS), out_specs=(P(AXIS), P()), check_vma=False)


@pytest.fixture
def disk(tmp_path):
    """JAX's cache in an empty folder, for programs of any size."""
    names = (
        "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )  # fmt: skip
    before = [getattr(jax.config, name) for name in names]
    for name, value in zip(names, (str(tmp_path / "xla"), 0.0, -1), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield tmp_path / "xla"
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.mark.parametrize("devices", [1, 2])
def test_values_are_those_of_jit(devices):
    mesh = placement.make_mesh(devices)
    program = CachedJit(exchange(mesh), mesh)
    for size in (4, 4, 8):
        x = np.arange(size, dtype=np.float32)
        moved, total = program(x)
        np.testing.assert_array_equal(moved, np.roll(x.reshape(devices, -1), 1, axis=0).reshape(-1))
        np.testing.assert_array_equal(total, x.reshape(devices, -1).sum(0))
    assert program.num_compiled() == 2


@pytest.mark.parametrize("devices", [1, 2])
def test_arguments_from_the_host_arrive_as_they_are(devices):
    mesh = placement.make_mesh(devices)
    halves = np.array([1, np.nan, -0.0, 1e-42], np.float32)  # bits that arithmetic would not keep
    host = {
        "f32": halves, "strided": np.arange(12, dtype=np.int32).reshape(3, 4)[:, ::2],
        "empty": np.zeros((0, 3), np.float32), "scalar": np.float32(2.5), "none": None,
        "u32": np.array([[2**32 - 1]], np.uint32), "u8": np.arange(3, dtype=np.uint8),
        "bool": np.array([True, False]), "device": jnp.arange(3),
    }  # fmt: skip
    program = CachedJit(lambda state, given: (state + 1, given), mesh, donate_argnums=(0,))
    state = jax.device_put(jnp.zeros(4), placement.replicated(mesh))
    for _ in range(2):
        held, (state, got) = state, program(state, host)
        assert held.is_deleted()
        assert got["none"] is None
        for name, value in host.items():
            if value is not None:
                assert (got[name].shape, got[name].dtype) == (np.shape(value), value.dtype), name
                assert np.asarray(got[name]).tobytes() == np.asarray(value).tobytes(), name
    np.testing.assert_array_equal(state, np.full(4, 2))
    assert program.num_compiled() == 1
    program(state, host | {"scalar": np.int32(2)})
    assert program.num_compiled() == 2


def test_several_cpu_devices_leave_nothing_on_disk_and_one_does(disk):
    mesh = placement.make_mesh(2)
    CachedJit(exchange(mesh), mesh)(np.arange(6, dtype=np.float32))
    assert not list(disk.glob("*")), "a program with exchanges was written"
    one = placement.make_mesh(1)
    CachedJit(lambda x: jnp.sin(x) * 3, one)(np.arange(6, dtype=np.float32))
    assert list(disk.glob("*")), "JAX's cache is off for good"


def test_the_second_seed_compiles_nothing(monkeypatch):
    compiled = []
    lower = jax.stages.Lowered.compile

    def counted(self, *args, **kwargs):
        compiled.append(self)
        return lower(self, *args, **kwargs)

    monkeypatch.setattr(programs, "_RECENT", type(programs._RECENT)())
    monkeypatch.setattr(memo, "SHIPPED", set())  # so that each run traces its own
    monkeypatch.setattr(jax.stages.Lowered, "compile", counted)
    accuracies = []
    for seed in (0, 1):
        config = from_dict(
            {
                "seed": seed, "rounds": 2, "model": {"name": "mlp", "options": {"hidden": [8]}},
                "partition": {"kind": "iid", "clients": 4}, "execution": {"devices": 2},
            }
        )  # fmt: skip
        simulation = Simulation(config)
        rows = [row for rows in simulation.advance() for row in rows]
        accuracies.append([row.value for row in rows if row.metric == "accuracy"][-1])
        if seed == 0:
            first = len(compiled)
    assert first > 0
    assert len(compiled) == first
    assert accuracies[0] != accuracies[1]


def test_only_so_many_are_kept(monkeypatch):
    monkeypatch.setattr(programs, "_RECENT", type(programs._RECENT)())
    monkeypatch.setattr(programs, "MAX_CACHED", 2)
    mesh = placement.make_mesh(2)
    for factor in (2.0, 3.0, 4.0):
        program = CachedJit(lambda x, factor=factor: x * factor, mesh)
        np.testing.assert_array_equal(program(np.ones(2, np.float32)), np.full(2, factor, np.float32))
    assert len(programs._RECENT) == 2


def test_arguments_that_go_unused_tell_programs_apart():
    mesh = placement.make_mesh(2)
    for count in (5, 6):
        unused, used = np.zeros(count, np.float32), np.ones(2, np.float32)
        np.testing.assert_array_equal(CachedJit(lambda a, b: b + 1, mesh)(unused, used), [2, 2])


@pytest.mark.parametrize("size", [3, 5000])
def test_what_a_function_holds_tells_programs_apart(size):
    mesh = placement.make_mesh(2)
    for value in (1.0, 2.0):
        held = jnp.full(size, value)
        got = CachedJit(lambda x, held=held: x + held, mesh)(np.zeros(size, np.float32))
        np.testing.assert_array_equal(got, np.full(size, value))


def test_llvm_optimises_less_on_cpus_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    assert set(programs._compiler_options("cpu", False).values()) == {programs.CPU_LEVEL}
    assert programs._compiler_options("gpu", True) == programs._compiler_options("tpu", True) == {}
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=2")
    assert programs._compiler_options("cpu", False) == {}
    for older, options in ((True, {programs._EMITTER: False}), (False, {})):
        monkeypatch.setattr(programs, "OLDER_EMITTER", older)
        assert programs._compiler_options("cpu", True) == options


def test_llvms_level_changes_rounding_at_most(monkeypatch):
    """Of a product, reductions, a random draw and transcendental functions."""
    x = np.random.default_rng(0).normal(size=(33, 57)).astype(np.float32)

    def function(x):
        noise = jax.random.normal(jax.random.key(0), x.shape)
        return jax.nn.softmax(x * noise) @ jnp.tanh(x).T, jnp.cumsum(jnp.exp(x), 1), (x * noise).var(0)

    got = []
    for level in (1, 3):
        monkeypatch.setattr(programs, "CPU_LEVEL", level)
        got.append(jax.device_get(CachedJit(function, placement.make_mesh(1))(x)))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), *got)


@pytest.mark.parametrize("devices", [1, 2])
def test_draws_are_the_same_under_any_setting_of_the_generator(devices):
    """`jax_threefry_partitionable` counts when a program is compiled, not when it is traced."""

    def draw(key):
        return jax.random.normal(key, (7,)), jax.random.permutation(jax.random.split(key)[0], 11)

    mesh, key = placement.make_mesh(devices), jax.random.key(3)
    wanted = CachedJit(draw, mesh)(key)
    with jax.threefry_partitionable(False):
        assert not np.array_equal(jax.jit(draw)(key)[0], wanted[0])
        program = CachedJit(draw, mesh)
        found, lowered = program(key), program.lower(key).as_text()
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert lowered == CachedJit(draw, mesh).lower(key).as_text()


# --- runs that share programs ------------------------------------------------------------------------------

BASE = {
    "rounds": 2,
    "model": {"name": "mlp", "options": {"hidden": []}},
    "partition": {"kind": "iid", "clients": 4},
    "local": {"batch_size": 40, "lr": 0.1, "epochs": 1},
    "execution": {"devices": 1},
}
OWN_TESTS = {
    "partition": {"kind": "iid", "clients": 4, "local_test": "holdout"},
    "evaluation": {"per_client": True},
}
PROBE = {"every": 1, "clients": 2, "samples": 20, "controls": ["perturbed"]}


def lowered_by(action):
    """What came of it, and the names of the programs that were lowered meanwhile."""
    lowered = []

    def listen(event: str, duration_secs: float, **keywords) -> None:
        del duration_secs
        if event.endswith("jaxpr_to_mlir_module_duration"):
            lowered.append(keywords.get("fun_name"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        return action(), lowered
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def outcome(changes, **replacements):
    """All records of a run, and its model."""
    simulation = Simulation(from_dict({**BASE, **changes}), **replacements)
    rows = [tuple(row) for rows in simulation.advance() for row in rows]
    return rows, jax.device_get(simulation.variables)


def assert_same(got, wanted):
    assert got[0] == wanted[0]
    jax.tree.map(np.testing.assert_array_equal, got[1], wanted[1])


@pytest.mark.parametrize(
    "changes",
    [
        {"algorithm": {"name": "fedmr"}, "peel": PROBE},
        pytest.param(
            {
                "model": {"name": "mlp", "options": {"hidden": [8, 8]}},
                "algorithm": {"name": "lips", "layers": "inner", "inner": {"name": "fedmr"}},
                "inertia": {"every": 1},
            },
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"algorithm": {"name": "ditto"}, "execution": {"devices": 2}, **OWN_TESTS}, marks=pytest.mark.slow
        ),
        {"algorithm": {"name": "clusamp"}},
    ],
    ids=lambda changes: changes["algorithm"]["name"],
)
def test_a_run_with_another_seed_lowers_nothing_and_is_what_it_would_be_alone(changes):
    """Also with diagnostics, state of clients, personal models and a chooser of cohorts."""
    memo.forget()
    alone = outcome(changes)
    memo.forget()
    outcome({**changes, "seed": 1})
    after, lowered = lowered_by(lambda: outcome(changes))
    assert not lowered
    assert_same(after, alone)


def test_the_model_is_drawn_by_one_program_for_all_methods():
    memo.forget()
    drawn, named = [], []
    for method in ("fedavg", "scaffold", "fedmr"):
        config = from_dict({**BASE, "algorithm": method, "seed": 5})
        simulation, lowered = lowered_by(lambda config=config: Simulation(config))
        named += [name for name in lowered if "_Drawn" in name]
        drawn.append(jax.device_get(simulation.variables))
    assert len(named) == 1
    jax.tree.map(np.testing.assert_array_equal, drawn[0], drawn[1])
    jax.tree.map(np.testing.assert_array_equal, drawn[0], drawn[2])


UNLIKE = (
    {"kind": "iid"},
    {"kind": "shards"},
    {"kind": "dirichlet", "alpha": 0.1, "min_size": 1},
    {"kind": "dirichlet", "alpha": 0.3, "min_size": 1},
)
THREE = ["fedavg", "scaffold", "fedmr"]
NINE = [*THREE, "fedprox", "fednova", "fedexp", "fedasam", "fedmut", "feddyn"]


@pytest.mark.parametrize("methods", [THREE, pytest.param(NINE, marks=pytest.mark.slow)], ids=len)
def test_a_study_compiles_its_round_once_for_a_method_and_a_shape(methods):
    """As a sweep goes: seed by seed, partition by partition. Four partitions of 50 clients have two shapes.

    Clients of IID and shards are nearly equal and take equally many steps, those of both Dirichlet skews not.
    """
    memo.forget()
    widths = set()

    def study():
        for seed in range(3):
            for kind in UNLIKE:
                for method in methods:
                    partition = {**kind, "clients": 50}
                    local = {"epochs": 2, "batch_size": 20, "lr": 0.05}
                    changes = {"partition": partition, "local": local, "cohort": {"size": 10}, "seed": seed}
                    simulation = Simulation(from_dict({**BASE, **changes, "algorithm": method}))
                    widths.add((simulation.setup.wave, simulation.setup.trainer.ragged))
                    for _ in simulation.advance():
                        pass

    _, lowered = lowered_by(study)
    assert len(widths) == 2
    assert len([name for name in lowered if "Round" in name]) == 2 * len(methods)


ADAM = {"optimizer": "adam", "lr": 0.1}


@pytest.mark.parametrize(
    ("near", "changes"),
    [
        pytest.param({}, {"local": {**BASE["local"], "momentum": 0.9}}, marks=pytest.mark.slow),
        pytest.param(
            {"local": {**BASE["local"], **ADAM, "options": {"b1": 0.9}}},
            {"local": {**BASE["local"], **ADAM, "options": {"b1": 0.5}}},
            marks=pytest.mark.slow,
        ),
        ({"algorithm": {"name": "fedprox", "mu": 1.0}}, {"algorithm": {"name": "fedprox", "mu": 5.0}}),
        pytest.param(
            {"algorithm": {"name": "fedopt", **ADAM, "options": {"eps": 1e-3}}},
            {"algorithm": {"name": "fedopt", **ADAM, "options": {"eps": 0.5}}},
            marks=pytest.mark.slow,
        ),
        ({}, {"model": {"name": "mlp", "options": {"hidden": [], "dtype": "bfloat16"}}}),
        ({"peel": PROBE}, {"peel": {**PROBE, "ranks": True}}),
    ],
    ids=["momentum", "options", "mu", "server options", "dtype", "probe"],
)
def test_runs_that_differ_share_nothing_that_matters(near, changes):
    """Each after one that differs in little, against the same with nothing remembered."""
    memo.forget()
    alone = outcome(changes)
    memo.forget()
    before = outcome(near)
    after = outcome(changes)
    assert_same(after, alone)
    assert after[0] != before[0]


SCALE = 1.0


def scaled(x):
    """A user's helper, which another cell of a notebook may redefine."""
    return SCALE * x


class Net(nn.Module):
    """A user's network."""

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(10)(scaled(x).reshape(x.shape[0], -1))


@dataclasses.dataclass(frozen=True)
class Mine:
    """A user's algorithm, whose functions are the same objects in every run."""

    def build(self, context):
        return dataclasses.replace(fs.FedAvg().build(context), deploy=halved)


def halved(state):
    return jax.tree.map(scaled, state.model)


@pytest.mark.parametrize("given", [{"model": Net()}, {"algorithm": Mine()}], ids=["model", "algorithm"])
def test_what_a_user_has_changed_counts_in_the_next_run(given, monkeypatch):
    monkeypatch.setattr(memo, "SHIPPED", memo.SHIPPED - {"tests"})
    first = outcome({}, **given)
    globals()["SCALE"] = 0.5
    try:
        second = outcome({}, **given)
    finally:
        globals()["SCALE"] = 1.0
    assert first[0] != second[0]
    assert_same(outcome({}, **given), first)


def test_what_comes_from_the_host_is_not_cut_over_devices_and_exchanged():
    """Each device takes its part of the arguments that all of them were given."""
    mesh = placement.make_mesh(2)
    run = jax.shard_map(lambda x: jnp.sin(x) * 2, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS))
    program = CachedJit(lambda x, y: (run(x), run(y)), mesh)
    given = np.arange(8, dtype=np.float32), np.arange(6, dtype=np.float32)
    text = program.lower(*given).compile().as_text()
    assert not re.search(r" (collective-permute|all-gather|all-to-all|all-reduce)", text)
    np.testing.assert_allclose(program(*given)[1], np.sin(given[1]) * 2, rtol=1e-6)
