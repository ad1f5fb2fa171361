import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim import data, runs
from fedjax_sim.algorithms import CONFIGS
from fedjax_sim.config import (
    CohortConfig,
    ExecutionConfig,
    LocalConfig,
    ModelConfig,
    OutputConfig,
    PeelConfig,
    RunConfig,
)
from fedjax_sim.core.errors import UserError
from fedjax_sim.engine import jaxpr_memory, placement
from fedjax_sim.runs import parts
from fedjax_sim.runs import plan as planning
from fedjax_sim.runs.assemble import prepare
from fedjax_sim.runs.federation import Simulation
from fedjax_sim.runs.parts import Part
from fedjax_sim.runs.plan import MemoryPlan


def config(**changes):
    base = RunConfig(
        partition=data.PartitionConfig(kind="dirichlet", clients=16, alpha=1.0),
        model=ModelConfig(options={"hidden": [256]}),
        local=LocalConfig(epochs=1, batch_size=16),
        cohort=CohortConfig(size=8),
        execution=ExecutionConfig(devices=2),
    )
    return dataclasses.replace(base, **changes)


def part(plan, start):
    return next(part for part in plan.parts if part.name.startswith(start))


def params(plan_config):
    return prepare(plan_config).model.num_params() * 4


def test_stacks_count_by_k_and_n():
    made = config(algorithm=CONFIGS["fedmr"]())
    plan = planning.plan(made)
    one = params(made)
    assert part(plan, "server: slots").total == 8 * one
    assert part(plan, "server: slots").device == 4 * one
    kept = planning.plan(config(local=LocalConfig(epochs=1, momentum=0.9, keep_optimizer=True)))
    assert part(kept, "clients' own state").total == 16 * one


@pytest.mark.parametrize(("folder", "when"), [("run", "files"), (None, "always")])
def test_clients_state_on_the_host_is_no_part_of_the_devices_and_in_memory_without_a_folder(folder, when):
    made = config(
        local=LocalConfig(epochs=1, momentum=0.9, keep_optimizer=True),
        execution=ExecutionConfig(devices=2, client_state="host"),
        output=OutputConfig(dir=folder),
    )
    plan, one = planning.plan(made), params(made)
    held = part(plan, "clients' own state on the host (16 clients)")
    assert (held.device, held.total, held.when) == (0, 16 * one, when)
    assert part(plan, "clients' own state (8 of 16 clients)").device == 4 * one
    assert part(plan, "the initial model").device == one


@pytest.mark.smoke
def test_a_mean_needs_no_k_models_and_a_recombination_needs_them():
    def stacks(algorithm):
        made = config(
            algorithm=CONFIGS[algorithm](),
            local=LocalConfig(epochs=1, batch_size=1),
            cohort=CohortConfig(size=16),
            execution=ExecutionConfig(devices=2, wave=1),
        )
        names = (
            "models put in order",
            "models before and after",
            "what the merge makes",
            "what a round says",
        )
        return sum(part.device for part in planning.plan(made).parts if part.name.startswith(names))

    one = params(config())
    assert stacks("fedavg") < 3 * one
    assert 8 * one <= stacks("fedmr") <= 4 * 8 * one


def test_what_is_held_always_is_what_the_simulation_holds():
    setup = prepare(config(algorithm=CONFIGS["fedmr"]()))
    simulation = Simulation(setup)
    plan = planning.plan(setup)
    state = sum(part.device for part in plan.parts if part.name.startswith("server"))
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(simulation.state))
    assert state == held
    data = simulation.data
    assert part(plan, "who holds which").device == data.samples.nbytes + data.offsets.nbytes


@pytest.mark.parametrize("algorithm", ["fedavg", "fedmr"])
def test_the_estimate_of_a_round_is_near_what_xla_says(algorithm):
    plan = planning.plan(config(algorithm=CONFIGS[algorithm]()), exact=True)
    compiled = plan.compiled
    measured = compiled["temporaries"] + compiled["output"] - compiled["of which in place"]
    estimate = sum(part.device for part in plan.parts if part.when == "round")
    assert measured / 2 < estimate < measured * 2


def test_smaller_waves_and_batches_take_less():
    size = lambda plan: sum(part.total for part in plan.parts if part.when == "round")  # noqa: E731
    wide, narrow = (ExecutionConfig(devices=2, wave=wave) for wave in (4, 1))
    full = size(planning.plan(config(execution=wide)))
    assert size(planning.plan(config(execution=narrow))) < full
    fewer = LocalConfig(epochs=1, batch_size=4)
    assert size(planning.plan(config(execution=wide, local=fewer))) < full


def test_a_checkpoint_counts_where_one_is_written(tmp_path):
    with_folder = planning.plan(config(output=OutputConfig(dir=str(tmp_path / "run"))))
    assert part(with_folder, "a checkpoint").total >= params(config())
    assert not (tmp_path / "run").exists()
    assert not any(part.name.startswith("a checkpoint") for part in planning.plan(config()).parts)


def alive(function, *args, **options):
    """Bytes at the worst moment of a function of shapes."""
    return sum(jaxpr_memory.peak_bytes(jax.make_jaxpr(function)(*args), **options).values())


X = jax.ShapeDtypeStruct((1000,), jnp.float32)


def test_a_chain_takes_one_place_and_a_fan_one_for_each():
    assert alive(lambda x: jnp.sin(jnp.cos(jnp.tan(x))), X) == 4000
    assert alive(lambda x: (jnp.sin(x), jnp.cos(x), jnp.tan(x)), X) == 3 * 4000
    assert alive(lambda x: (jnp.sin(x), jnp.cos(x)), X, donated=1) == 4000


def test_what_fusion_never_writes_takes_nothing():
    """A sum of outer products: of its 4 MB product only the sum is written."""
    y = jax.ShapeDtypeStruct((1000,), jnp.float32)
    assert alive(lambda x, y: (x[:, None] * y[None, :]).sum(0), X, y) == 4000
    assert alive(lambda x, y: x[:, None] * y[None, :], X, y) == 4_000_000


@pytest.mark.smoke
def test_a_loop_updates_its_state_in_place():
    body = lambda i, x: jnp.sin(jnp.cos(x))  # noqa: E731
    assert alive(lambda x: jax.lax.fori_loop(0, 5, body, x), X) < 4100
    other = lambda i, x: jnp.sin(x) + x[::-1]  # noqa: E731
    assert 8000 <= alive(lambda x: jax.lax.fori_loop(0, 5, other, x), X) <= 12000
    stacked = lambda x: jax.lax.scan(lambda c, _: (jnp.sin(c), c), x, None, length=5)  # noqa: E731
    assert alive(stacked, X) >= 6 * 4000


def test_a_loop_writes_over_what_it_carries_and_over_nothing_else_that_it_reads():
    rows = jax.ShapeDtypeStruct((10, 1000), jnp.float32)

    def each(x):  # own rows in, new rows out
        return jax.lax.scan(lambda carry, row: (carry, jnp.sin(row)), 0.0, jnp.tan(x))[1]

    assert alive(each, rows) >= 2 * 40_000
    assert alive(lambda x: jax.lax.fori_loop(0, 5, lambda i, y: jnp.sin(y), jnp.tan(x)), rows) < 41_000


def test_the_estimate_counts_clients_own_rows_before_and_after_a_round():
    """A personal model of each client, one at a time: temporaries are both, and little else."""
    made = config(
        algorithm=CONFIGS["ditto"](),
        partition=data.PartitionConfig(kind="iid", clients=64, min_size=1),
        cohort=CohortConfig(fraction=1.0),
        execution=ExecutionConfig(devices=1, wave=1),
    )
    plan = planning.plan(made, exact=True)
    estimate = sum(part.device for part in plan.parts if part.when == "round")
    assert plan.compiled is not None
    assert estimate == pytest.approx(plan.compiled["temporaries"], rel=0.05)


def test_bytes_belong_to_the_innermost_label_and_a_device_has_its_own_share():
    @jax.named_scope("outer")
    def function(x):
        with jax.named_scope("inner"):
            y = jnp.outer(x, x)
        return jnp.tril(y) @ x, y

    found = jaxpr_memory.peak_bytes(jax.make_jaxpr(function)(X), ("outer", "inner"))
    assert found["inner"] == 4_000_000 and found[""] == 0 and found["outer"] > 0
    halved = jaxpr_memory.peak_bytes(
        jax.make_jaxpr(function)(X), ("inner",), size=lambda leaf: jaxpr_memory.leaf_bytes(leaf) // 2
    )
    assert halved["inner"] == 2_000_000


def test_what_does_not_fit_says_what_to_change():
    big = Part("server: slots (100 models)", 60, 120, "always", "more devices, or a smaller cohort.size")
    small = Part("evaluation's activations", 5, 10, "evaluation", "a smaller evaluation.batch_size")
    step = Part("a wave's activations", 20, 40, "round", "a smaller execution.wave")
    plan = MemoryPlan((big, small, step), 2, "gpu", 70)
    assert plan.peak == 80 and plan.fits is False
    assert plan.advice()[0].endswith("smaller cohort.size")
    assert "does NOT fit" in str(plan) and "execution.wave" in str(plan)
    assert MemoryPlan((big, small, step), 2, "cpu", 159).fits is False
    roomy = MemoryPlan((big, small, step), 2, "cpu", 160)
    assert roomy.fits and roomy.advice() == []
    assert MemoryPlan((big,), 2, "gpu", None).fits is None


def test_a_table_leaves_out_what_takes_next_to_nothing():
    big, small = Part("slots", 2048, 4096, "always"), Part("what a round says", 500, 1000, "round")
    assert "what a round says" not in str(MemoryPlan((big, small), 2, "cpu", None))
    assert MemoryPlan((big, small), 2, "cpu", None).peak == 5096
    assert "what a round says" in str(MemoryPlan((small,), 2, "cpu", None))


def test_the_verdict_of_an_exact_plan_heeds_the_compiled_round():
    state = Part("server: slots (100 models)", 60, 100, "always", "a smaller cohort.size")
    step = Part("a wave's activations", 20, 40, "round", "a smaller execution.wave")
    compiled = {"arguments": 50, "output": 62, "of which in place": 60, "temporaries": 70}
    plan = MemoryPlan((state, step), 2, "cpu", 200, compiled)
    assert (plan.by_parts, plan.as_compiled, plan.peak) == (140, 100 + 2 * 72, 244)
    assert plan.fits is False and plan.advice()
    assert "peak, all of the machine: 244 B (the larger of 140 B by the parts and 244 B as comp" in str(plan)
    assert MemoryPlan((state, step), 2, "gpu", 131, compiled).fits is False  # 60 + 72 on one device
    padded = dict(compiled, arguments=70)
    assert MemoryPlan((state, step), 2, "gpu", None, padded).peak == 70 + 72
    small = dict(compiled, temporaries=1)
    assert MemoryPlan((state, step), 2, "cpu", 140, small).fits is True
    assert MemoryPlan((state, step), 2, "cpu", 140).as_compiled is None


def test_bytes_are_written_as_people_do():
    assert [parts.human(n) for n in (5, 2048, 3 * 2**20, 5 * 2**30)] == [
        "5 B",
        "2.0 KiB",
        "3.0 MiB",
        "5.0 GiB",
    ]
    assert parts.available("cpu") > 2**20
    assert jaxpr_memory.bytes_of({"a": np.zeros((3, 4), np.float32), "b": jax.random.key(0)}) == 56


def test_cut_arrays_count_by_their_share():
    mesh = placement.make_mesh(4)
    leaf = jax.ShapeDtypeStruct((8, 3), np.float32, sharding=placement.cut(mesh))
    whole = jax.ShapeDtypeStruct((8, 3), np.float32, sharding=placement.replicated(mesh))
    unsaid = jax.ShapeDtypeStruct((8, 3), np.float32)
    assert [jaxpr_memory.share_bytes(one) for one in (leaf, whole, unsaid)] == [
        2 * 3 * 4,
        8 * 3 * 4,
        8 * 3 * 4,
    ]


def test_measured_rounds_are_counted_and_grow_by_pooled_features_alone():
    def of(**peel):
        return planning.plan(config(peel=PeelConfig(every=1, class_samples=1, **peel)))

    plain, one, two = planning.plan(config()), of(clients=1), of(clients=2)
    assert not any("probe" in p.name for p in plain.parts)
    model = params(config())
    assert part(one, "models of 1 measured").device == 3 * model
    assert part(two, "models of 2 measured").device == 3 * model  # of two devices one each
    # One on each device. Of two devices that look at one client, one is filled up, for which its models are
    # copied.
    alone, both = (part(made, "the probe's").device for made in (one, two))
    assert 0 < alone <= both + 2 * 3 * model
    few, many = (part(of(clients=1, samples=count), "the probe's").device for count in (160, 1000))
    # Of every sample of both halves, for three models and two layers; held once more by layer.
    pooled = 4 * 3 * 2 * 256 * (1000 - 160)
    assert pooled < many - few < 2 * pooled
    everything = of(clients=2, chimeras=True, others=True, finetune=1)
    assert everything.peak >= two.peak > plain.peak


def test_a_run_that_cannot_be_held_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    """Control variates of many clients; by `run`, and by what a sweep asks of its runs first."""
    partition = data.PartitionConfig(kind="iid", clients=1000, samples_per_client=1, min_size=1)
    local = LocalConfig(epochs=1, batch_size=16)
    output = OutputConfig(dir=str(tmp_path / "run"))
    made = config(algorithm=CONFIGS["scaffold"](), partition=partition, local=local, output=output)
    monkeypatch.setattr(planning, "total", lambda platform: 50 * 2**20)
    monkeypatch.setattr(Simulation, "__init__", lambda *_: pytest.fail("nothing is made"))
    with pytest.raises(UserError, match=r"clients' own state \(1000 clients\).* has 50\.0 MiB") as caught:
        runs.run(made)
    assert not (tmp_path / "run" / "config.yaml").exists()
    assert "keep_optimizer" not in str(caught.value) and "fewer clients" in str(caught.value)
    setup = prepare(made)
    with pytest.raises(UserError, match="memory = "):
        runs.validate(made, setup.dataset, setup.partition)
    monkeypatch.setattr(planning, "total", lambda platform: 500 * 2**20)
    runs.validate(made, setup.dataset, setup.partition)


def test_advice_is_only_what_would_change_something():
    def told(**changes):
        plan = planning.plan(config(algorithm=CONFIGS["scaffold"](), **changes))
        return " ".join(dataclasses.replace(plan, available=0).advice())

    narrow = told(execution=ExecutionConfig(devices=2, wave=1), cohort=CohortConfig(size=1))
    for moot in ("keep_optimizer", "more devices", "execution.wave", "cohort.size"):
        assert moot not in narrow
    files, host = OutputConfig(dir="run"), "execution.client_state = host"
    assert host in told(output=files)
    assert host not in told(output=files, cohort=CohortConfig(fraction=1.0))  # all of whom are on the devices
    assert host not in told()  # which is the same memory of a CPU
    kept = LocalConfig(epochs=1, batch_size=16, momentum=0.9, keep_optimizer=True)
    assert "local.keep_optimizer = false" in told(local=kept)


def test_all_memory_is_at_least_what_is_free():
    there = parts.total("cpu")
    assert there is not None and there >= (parts.available("cpu") or 0)
