"""What a configuration will need in memory, part by part, before anything is compiled.

Sizes of data, tables, states and model stacks are exact: they come from shapes. What a training step and an
evaluation batch need in between is an estimate: the peak of live values in the traced, not yet optimised
program, which fusion lowers and padding raises. `exact=True` compiles the round and asks XLA instead.
"""

import contextlib
import dataclasses
import os
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_sim.config import RunConfig
from fedjax_sim.core.algorithm import Cohort
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.rng import run_key
from fedjax_sim.core.task import Batch, Training
from fedjax_sim.engine import placement
from fedjax_sim.engine.clients import make_optimizer
from fedjax_sim.engine.device_data import DataStore, abstract, sample_table
from fedjax_sim.engine.jaxpr_memory import bytes_of, leaf_bytes, peak_bytes
from fedjax_sim.engine.observing import watch
from fedjax_sim.engine.round import Witness
from fedjax_sim.engine.setup import DiagnosticContext, Setup
from fedjax_sim.engine.simulation import Simulation
from fedjax_sim.runs.assemble import prepare
from fedjax_sim.runs.provenance import total_memory
from fedjax_sim.runs.start import with_start


@dataclasses.dataclass(frozen=True)
class Part:
    """One thing that takes memory.

    Attributes:
      name: what it is.
      device: bytes on one device.
      total: bytes on all devices together.
      when: `always`, `round`, `probe` (of a measured round, after its merge) or `evaluation`.
      remedy: what makes it smaller.
    """

    name: str
    device: int
    total: int
    when: str
    remedy: str = ""


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """All parts, and what there is to hold them. `print` it.

    Attributes:
      parts: largest first within their kind.
      devices: how many.
      platform: cpu, gpu or tpu. CPU devices share one memory, and only totals count.
      available: bytes for one device, or for all of them on a CPU; None where it cannot be told.
      compiled: XLA's own figures for the round in bytes a device, if asked for.
    """

    parts: tuple[Part, ...]
    devices: int
    platform: str
    available: int | None
    compiled: dict[str, int] | None = None

    @property
    def peak(self) -> int:
        """Bytes at the worst moment: on one device, or in all of the CPU's memory."""
        size = lambda when: sum(  # noqa: E731
            part.total if self.platform == "cpu" else part.device for part in self.parts if part.when == when
        )
        return size("always") + max(size("round"), size("probe"), size("evaluation"))

    @property
    def fits(self) -> bool | None:
        """Whether it fits; None where the memory is not known."""
        return None if self.available is None else self.peak <= self.available

    def advice(self) -> list[str]:
        """What to change, the most effective first; empty if it fits."""
        if self.fits is not False:
            return []
        whole = self.platform == "cpu"
        ranked = sorted(self.parts, key=lambda part: -(part.total if whole else part.device))
        lines = [f"{part.name}: {part.remedy}" for part in ranked if part.remedy]
        return list(dict.fromkeys(lines))[:4]

    def __str__(self):
        width = max(len(part.name) for part in self.parts)
        lines = [f"{'part':{width}}  {'one device':>11}  {'all ' + str(self.devices):>11}  when"]
        lines += [
            f"{part.name:{width}}  {human(part.device):>11}  {human(part.total):>11}  {part.when}"
            for part in self.parts
        ]
        where = "all of the machine" if self.platform == "cpu" else "one device"
        lines.append(f"\npeak, {where}: {human(self.peak)}")
        if self.compiled:
            figures = ", ".join(f"{name} {human(size)}" for name, size in self.compiled.items())
            lines.append(f"the compiled round, one device: {figures}")
        if self.available is None:
            lines.append("available: not known on this platform")
        else:
            lines.append(f"available: {human(self.available)}: it {'fits' if self.fits else 'does NOT fit'}")
        if self.advice():
            lines += ["what to change, the most effective first:", *(f"  - {line}" for line in self.advice())]
        return "\n".join(lines)


def human(size: float) -> str:
    """Bytes as people write them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def plan(config: RunConfig | Setup, *, exact: bool = False, **replacements: Any) -> MemoryPlan:
    """The memory that a run will take. Loads the data, allocates nothing on a device unless `exact`.

    Args:
      config: what is to be run, or what `prepare` made of it.
      exact: compile the round too, and add XLA's own figures.
      **replacements: as for `prepare`.

    Raises:
      UserError: a configuration that cannot work.
    """
    setup = config if isinstance(config, Setup) else with_start(prepare(config, **replacements))
    platform = jax.default_backend()
    parts = [
        *_data_parts(setup, platform),
        *_state_parts(setup),
        *_round_parts(setup),
        *_evaluation_parts(setup),
        *_probe_parts(setup, platform),
    ]
    parts.append(_checkpoint_part(setup, platform))
    parts = [_advised(setup, platform, part) for part in parts if part.total]
    order = {"always": 0, "round": 1, "probe": 2, "evaluation": 3}
    parts.sort(key=lambda part: (order[part.when], -part.total))
    compiled = compiled_round(Simulation(setup)) if exact else None
    return MemoryPlan(tuple(parts), setup.devices, platform, available(platform), compiled)


def compiled_round(simulation: Simulation) -> dict[str, int]:
    """XLA's own account of the compiled round: bytes on one device."""
    inputs, _ = simulation.inputs(simulation.round)
    with jax.set_mesh(simulation.mesh):
        made = simulation.program.lower(simulation.abstract_state(), inputs, simulation.data).compile()
    found: Any = made.memory_analysis()
    return {
        "arguments": int(found.argument_size_in_bytes),
        "output": int(found.output_size_in_bytes),
        "of which in place": int(found.alias_size_in_bytes),
        "temporaries": int(found.temp_size_in_bytes),
    }


def check_memory(setup: Setup) -> None:
    """Refuses a run whose data and states alone are more than the memory that there is; quick.

    Counts only what is exact and held all the time, and all of the machine's memory, so that nothing is
    refused that could work. `plan` also estimates what a round takes in between.

    Raises:
      UserError: names the largest part, and what makes it smaller.
    """
    platform = jax.default_backend()
    there = total(platform)
    if not there:
        return
    # A data set in host memory may be the very buffer that the devices read.
    held = (part for part in _data_parts(setup, platform) if part.name != _ON_HOST)
    parts = [*held, *_state_parts(setup)]
    size = lambda part: part.total if platform == "cpu" else part.device  # noqa: E731
    needed = sum(map(size, parts))
    if needed > there:
        worst = _advised(setup, platform, max(parts, key=size))
        raise UserError(
            "memory",
            human(needed),
            f"so much is held all the time ({worst.name}: {human(size(worst))}), and "
            f"{'this machine' if platform == 'cpu' else 'a device'} has {human(there)}",
            f"What helps: {worst.remedy or 'a smaller model'}. `fedjax-sim plan` shows every part.",
        )


def total(platform: str) -> int | None:
    """Bytes of one accelerator, or of the machine for a CPU, swap included; None where it cannot be told."""
    if platform != "cpu":
        return available(platform)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        limit = sizes["MemTotal"] + sizes.get("SwapTotal", 0)
    except (OSError, KeyError, ValueError, IndexError):
        return total_memory() or None
    with contextlib.suppress(OSError, ValueError):  # where there is no such limit
        limit = min(limit, int(Path("/sys/fs/cgroup/memory.max").read_text()) + sizes.get("SwapTotal", 0))
    return limit


def _advised(setup: Setup, platform: str, part: Part) -> Part:
    """The part, of whose remedies those are left that would change something."""
    config = setup.config
    moot = {
        "more devices": platform == "cpu",  # which share one memory
        "local.keep_optimizer = false": not config.local.keep_optimizer,
        "a smaller execution.wave": setup.wave == 1,
        "a smaller local.batch_size": config.local.batch_size == 1,
        "a smaller cohort.size": setup.cohort_size == 1,
        "fewer clients": setup.num_clients == 1,
        "peel.split = train": config.peel.split == "train",
    }
    options = [option.strip().removeprefix("or ") for option in part.remedy.split(",")]
    options = [option for option in options if option and not moot.get(option, False)]
    return dataclasses.replace(part, remedy=", or ".join(options))


def available(platform: str) -> int | None:
    """Bytes that may be used: of one accelerator, or of the machine for a CPU."""
    if platform != "cpu":
        stats = jax.local_devices()[0].memory_stats() or {}
        return stats.get("bytes_limit")
    limits = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        limits.append(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")))
    except (OSError, StopIteration, ValueError):
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    try:
        ceiling = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text().strip()
        limits.append(int(ceiling) - int(used))
    except (OSError, ValueError):
        pass  # no such limit
    return max(min(limits), 0)


_ON_HOST = "data set in host memory"

# --- parts --------------------------------------------------------------------------------------------


def _data_parts(setup: Setup, platform: str) -> list[Part]:
    dataset = setup.dataset
    # CPU devices share one buffer, see placement.put_replicated; the set itself is host memory.
    copies = 1 if platform == "cpu" else setup.devices
    images = sum(leaf.nbytes for leaf in dataset.train.values())
    table = sum(array.nbytes for array in sample_table(setup.partition, dataset.train_size))
    tests = sum(leaf.nbytes for leaf in dataset.test.values())
    parts = [
        Part("training samples", images, images * copies, "always", "smaller samples, or fewer"),
        Part(
            "clients' index table",
            table,
            table * copies,
            "always",
            "a less skewed partition, or fewer clients",
        ),
        Part("test samples", -(-tests // setup.devices), tests, "always", "fewer test samples"),
    ]
    if platform == "cpu":
        held = images + tests
        parts.append(Part(_ON_HOST, held, held, "always", "smaller samples, or fewer"))
    return parts


def _shapes(setup: Setup) -> tuple[Any, Any, Any]:
    """(variables of one model, the algorithm's state, all clients' kept state), abstract."""
    key = jax.random.key(0)
    variables = setup.model.abstract
    state = jax.eval_shape(setup.algorithm.init, key, variables)
    one = jax.eval_shape(partial(_one_client, setup), variables)
    grown = lambda leaf: _abstract((setup.num_clients, *leaf.shape), leaf.dtype)  # noqa: E731
    return variables, state, jax.tree.map(grown, one)


def _abstract(shape: tuple[int, ...], dtype: Any) -> Any:
    """An array's shape and dtype, where the type checker expects an array."""
    return jax.ShapeDtypeStruct(shape, dtype)


def _one_client(setup: Setup, variables: Any) -> Any:
    rule, local = setup.algorithm.local, setup.config.local
    kept = make_optimizer(local).init(variables["params"]) if local.keep_optimizer else None
    labels = jnp.zeros(setup.label_counts.shape[1:], jnp.int32)
    return {"rule": rule.init_client(variables, labels) if rule.init_client else None, "optimizer": kept}


def _state_parts(setup: Setup) -> list[Part]:
    _, state, clients = _shapes(setup)
    stacks: dict[str, list] = {}
    single: dict[str, list] = {}
    flags = jax.tree.leaves(setup.algorithm.is_stacked(state))
    leaves = jax.tree_util.tree_leaves_with_path(state)
    for flag, (path, leaf) in zip(flags, leaves, strict=True):
        names = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
        chosen = next((name for name in names if name in setup.algorithm.stacked), None)
        (stacks if flag else single).setdefault(chosen or (*names, "state")[0], []).append(leaf)
    parts = []
    for name, tree in stacks.items():
        leading = {leaf.shape[0] for leaf in tree}
        what = f"server: {name} ({'×'.join(str(n) for n in sorted(leading))} models)"
        of_slots = leading == {setup.cohort_size}
        remedy = "more devices, or " + ("a smaller cohort.size" if of_slots else "fewer clients")
        parts.append(Part(what, *_stack_bytes(setup, tree), "always", remedy))
    for name, tree in single.items():
        size = bytes_of(tree)
        parts.append(Part(f"server: {name}", size, size * setup.devices, "always", "a smaller model"))
    device, total = _stack_bytes(setup, clients)
    remedy = "local.keep_optimizer = false, more devices, or fewer clients"
    parts.append(Part(f"clients' own state ({setup.num_clients} clients)", device, total, "always", remedy))
    return parts


def _round_parts(setup: Setup) -> list[Part]:
    variables, state, clients = _shapes(setup)
    algorithm, devices, lanes = setup.algorithm, setup.devices, setup.wave
    one = bytes_of(variables)
    key = jax.eval_shape(lambda: jax.random.key(0))
    integers = _abstract((setup.cohort_size,), jnp.int32)
    cohort = Cohort(integers, integers, _abstract((), jnp.int32), integers)
    starts = jax.eval_shape(algorithm.dispatch, state, cohort, key)
    places = devices * lanes * -(-setup.cohort_size // (devices * lanes))
    even = places == setup.cohort_size and (not setup.trainer.ragged or devices * lanes == 1)

    parts = []
    flags = jax.tree.leaves(algorithm.is_stacked(state))
    stacks = [leaf for leaf, flag in zip(jax.tree.leaves(state), flags, strict=True) if flag]
    if algorithm.needs_models or not starts.shared:
        remedy = "more devices, or a smaller cohort.size"
        size = places * one
        slots = bytes_of([leaf for leaf in stacks if leaf.shape[0] == setup.cohort_size])
        if starts.shared or slots < setup.cohort_size * one:  # else slots of the state are trained in place
            parts.append(Part(f"models in training ({places})", -(-size // devices), size, "round", remedy))
        if not even:
            text = "models put in order of size, and back"
            parts.append(Part(text, -(-size // devices), size, "round", remedy))
        if not setup.config.execution.donate:
            out = bytes_of(stacks)
            parts.append(Part("the new state beside the old", -(-out // devices), out, "round", remedy))
    if algorithm.weights is not None:
        parts.append(Part("sums for the mean model", 2 * one, 2 * one * devices, "round", "a smaller model"))

    kept = jax.tree.map(lambda leaf: _abstract(leaf.shape[1:], leaf.dtype), clients)
    rule, received = algorithm.local, variables
    if rule.receive is not None:
        received = jax.eval_shape(rule.receive, variables, kept["rule"], starts.broadcast, key)
    extra = jax.eval_shape(rule.start_round, received, kept["rule"], starts.broadcast)
    optimizer = make_optimizer(setup.config.local)
    memory = bytes_of(jax.eval_shape(optimizer.init, received["params"]))
    # The step updates a model in place; its gradient is among the activations.
    lane = bytes_of(received) + memory + bytes_of(extra) + bytes_of(kept)
    text = f"a wave's models and optimisers ({lanes} a device)"
    parts.append(Part(text, lanes * lane, lanes * lane * devices, "round", "a smaller execution.wave"))
    if setup.trainer.gradients or algorithm.local.wants_last_gradient is not None:
        size = lanes * bytes_of(variables["params"])
        text = "a wave's last gradients"
        parts.append(Part(text, size, size * devices, "round", "a smaller execution.wave"))
    if setup.meters:
        parts.append(Part("meters' sums", 2 * one, 2 * one * devices, "round", "inertia.measure = false"))
    step = lanes * step_bytes(setup, received, extra)
    remedy = "a smaller execution.wave, or a smaller local.batch_size"
    parts.append(Part("a wave's activations and gradients", step, step * devices, "round", remedy))
    gradient = None
    if setup.trainer.gradients or rule.wants_last_gradient is not None:
        gradient = received["params"]
    one_step, rate = _abstract((), jnp.int32), _abstract((), jnp.float32)
    ended = (received, received, kept["rule"], extra, one_step, rate, gradient)
    size = places * bytes_of(jax.eval_shape(rule.finish_round, *ended)[1])
    if size:
        text = "what clients send besides"
        parts.append(Part(text, -(-size // devices), size, "round", "a smaller cohort.size"))
    moved = -(-setup.cohort_size * bytes_of(kept) // devices)
    parts.append(Part("the cohort's own state", moved, moved * devices, "round", "a smaller cohort.size"))
    return parts


def step_bytes(setup: Setup, variables: Any, extra: Any) -> int:
    """Peak of live values in one client's gradient step, an estimate from the traced program."""
    rule, model, size = setup.algorithm.local, setup.model, setup.config.local.batch_size
    if not model.convolves:  # outer products of `kernels.dense_gradients` fuse, and leave the gradient only
        model = model.with_conv("xla")
    rng = jax.eval_shape(lambda: jax.random.key(0)) if setup.trainer.stochastic else None
    batch = Batch(
        jax.eval_shape(setup.task.prepare, setup.task.abstract(size)),
        _abstract((size,), jnp.bool_) if model.takes_mask else None,
        rng,
        _abstract((), jnp.int32),
    )

    apply = Training(model, setup.task)

    def loss_and_grad(variables, batch):
        def loss(params):
            return rule.loss(apply, {**variables, "params": params}, batch, extra_)

        return jax.value_and_grad(loss, has_aux=True)(variables["params"])

    def step(variables, batch, extra):
        nonlocal extra_
        extra_ = extra
        out = rule.direction(loss_and_grad, variables, batch, extra)
        return out if rule.gather is None else (out, rule.gather(loss_and_grad, batch, extra))

    extra_ = extra
    return peak_bytes(jax.make_jaxpr(step)(variables, batch, extra)) + bytes_of(batch)


def _evaluation_parts(setup: Setup) -> list[Part]:
    batch = placement.forward_batch(setup.config.evaluation, setup.model)
    size = min(batch, -(-setup.dataset.test_size // setup.devices))
    variables = setup.model.abstract
    inputs = setup.task.abstract_inputs(size)
    forward = lambda variables, *inputs: setup.model.apply(variables, *inputs)[0]  # noqa: E731
    peak = peak_bytes(jax.make_jaxpr(forward)(variables, *inputs)) + bytes_of(inputs)
    parts = []
    if setup.config.evaluation.every:
        one = bytes_of(variables)
        remedy = "a smaller evaluation.batch_size"
        parts.append(Part("evaluation's activations", peak, peak * setup.devices, "evaluation", remedy))
        parts.append(Part("the deployed model", one, one * setup.devices, "evaluation", "a smaller model"))
    if setup.config.evaluation.finetune:
        kept = jax.eval_shape(make_optimizer(setup.config.local).init, variables["params"])
        size = setup.num_clients * (bytes_of(variables) + bytes_of(kept))
        text = f"all clients' models and optimisers, to fine-tune ({setup.num_clients})"
        parts.append(Part(text, -(-size // setup.devices), size, "evaluation", "evaluation.finetune = 0"))
    return parts


def _probe_parts(setup: Setup, platform: str) -> list[Part]:
    """What measured rounds need besides, from the traced observers."""
    if not setup.observers:
        return []
    mesh = placement.make_mesh(setup.devices)
    store = DataStore(mesh, abstract)
    context = DiagnosticContext(setup, mesh, store.put)
    due = [observer.build(context) for observer in setup.observers]  # as if all were, in one round
    ids = setup.draw(0)
    watched: Any = watch(due, ids)
    count = len(watched.slots)
    held = store.nbytes
    variables = _shapes(setup)[0]
    models = jax.tree.map(lambda leaf: _abstract((count, *leaf.shape), leaf.dtype), variables)
    integers, lr = _abstract((count,), jnp.int32), _abstract((), jnp.float32)
    them = Cohort(integers, integers, _abstract((), jnp.int32))
    witness = Witness(them, models, models, models, lr, jax.eval_shape(lambda: run_key(0)))
    shard = store.of_round(setup.dataset, setup.partition)
    with jax.set_mesh(mesh):
        peak = max(
            peak_bytes(jax.make_jaxpr(observer.observe)(witness, watched.given[name], shard))
            for instrument in due
            for name, observer in instrument.observers.items()
        )
    stacks = 3 * bytes_of(models)
    remedy = "a smaller peel.clients or inertia.clients"
    copies = 1 if platform == "cpu" else setup.devices
    return [
        Part("test samples that observers read", held, held * copies, "always", "peel.split = train"),
        Part(f"models of {count} measured clients", stacks, stacks * setup.devices, "round", remedy),
        Part(f"models of {count} clients at the probe", stacks, stacks * setup.devices, "probe", remedy),
        Part("the probe's features and moments", peak, peak * setup.devices, "probe", remedy),
    ]


def _checkpoint_part(setup: Setup, platform: str) -> Part:
    """A checkpoint is copied to the host before it is written."""
    if setup.config.output.dir is None or platform != "cpu":
        return Part("checkpoint", 0, 0, "always")
    _, state, clients = _shapes(setup)
    size = bytes_of((state, clients))
    return Part("a checkpoint on its way to disk", size, size, "always", "output.dir = null writes none")


# --- bytes --------------------------------------------------------------------------------------------


def _stack_bytes(setup: Setup, tree: Any) -> tuple[int, int]:
    """(on one device, on all) of leaves that are cut over devices where they can be."""
    device = total = 0
    for leaf in jax.tree.leaves(tree):
        size = leaf_bytes(leaf)
        even = leaf.shape[0] % setup.devices == 0
        device += size // setup.devices if even else size
        total += size if even else size * setup.devices
    return device, total
