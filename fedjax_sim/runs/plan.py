"""What a configuration will need in memory, part by part, before anything is compiled.

Sizes of data and states are exact: they come from shapes and from how these are cut over devices. What a
round and an evaluation need in between is an estimate: the programs themselves are traced, on shapes, and
followed to the moment at which most is alive (`fedjax_sim.engine.jaxpr_memory`). `exact=True` compiles the
round too, and adds what XLA says of it.
"""

import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Any

import jax

from fedjax_sim.config import RunConfig, as_config
from fedjax_sim.core.errors import UserError
from fedjax_sim.engine import clients, evaluation, placement
from fedjax_sim.engine.device_data import DataStore, abstract
from fedjax_sim.engine.jaxpr_memory import bytes_of, leaf_bytes, peak_bytes
from fedjax_sim.engine.observing import AllObservers, observer_request
from fedjax_sim.engine.round import DISPATCH, MERGE, OF_CLIENTS, ORDER, WAVES
from fedjax_sim.engine.setup import Setup
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
    if not isinstance(config, Setup):  # of a run that is debugged, what it takes otherwise
        config = as_config(config)
        execution = dataclasses.replace(config.execution, debug=False)
        config = with_start(prepare(dataclasses.replace(config, execution=execution), **replacements))
    setup = config
    platform, simulation = placement.platform_of(setup.mesh), _on_paper(setup)
    parts = [
        *_round_parts(simulation),
        *_evaluation_parts(simulation),
        *_data_parts(simulation, platform),  # after the others, which have asked for what they read
        *_state_parts(simulation),
        _checkpoint_part(simulation, platform),
    ]
    parts = [_advised(setup, platform, part) for part in parts if part.total]
    order = {"always": 0, "round": 1, "probe": 2, "evaluation": 3}
    parts.sort(key=lambda part: (order[part.when], -part.total))
    compiled = compiled_round(simulation) if exact else None
    return MemoryPlan(tuple(parts), setup.devices, platform, available(platform), compiled)


def _on_paper(setup: Setup) -> Simulation:
    """The run, with shapes in the place of what would lie on the devices."""
    return Simulation(setup, DataStore(setup.mesh, abstract))


def compiled_round(simulation: Simulation) -> dict[str, int]:
    """XLA's own account of the compiled round: bytes on one device."""
    inputs, _ = simulation.inputs_of(0, simulation.setup.draw(0))
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
    platform = placement.platform_of(setup.mesh)
    there = total(platform)
    if not there:
        return
    # A data set in host memory may be the very buffer that the devices read.
    simulation = _on_paper(setup)
    held = (part for part in _data_parts(simulation, platform) if part.name != _ON_HOST)
    parts = [*held, *_state_parts(simulation)]
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

# --- what is held all the time --------------------------------------------------------------------------


def _data_parts(simulation: Simulation, platform: str) -> list[Part]:
    setup, store, data = simulation.setup, simulation.store, simulation.data
    # CPU devices share one buffer; the set itself is host memory.
    copies = 1 if platform == "cpu" else setup.devices
    train, tests = bytes_of(data.train), bytes_of(dict(setup.dataset.test))
    table = bytes_of((data.samples, data.offsets, data.rng_ids))
    whole = store.has(setup.dataset.test)
    parts = [
        Part("training samples", train, train * copies, "always", "smaller samples, or fewer"),
        Part("who holds which sample", table, table * copies, "always", "fewer samples, or fewer clients"),
        Part(
            "test samples",
            tests if whole else -(-tests // setup.devices),
            tests * copies if whole else tests,
            "always",
            "fewer test samples" + (", peel.split = train" if setup.config.peel.every else ""),
        ),
    ]
    if platform == "cpu":
        held = train + tests
        parts.append(Part(_ON_HOST, held, held, "always", "smaller samples, or fewer"))
    return parts


def _state_parts(simulation: Simulation) -> list[Part]:
    setup, state = simulation.setup, simulation.abstract_state()
    named: dict[str, list[Any]] = {}
    flags = jax.tree.leaves(setup.algorithm.is_stacked(state.algorithm))
    leaves = jax.tree_util.tree_leaves_with_path(state.algorithm)
    for stack, (path, leaf) in zip(flags, leaves, strict=True):
        names = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
        chosen = next((name for name in names if name in setup.algorithm.stacked), (*names, "state")[0])
        rows = f" ({leaf.shape[0]} models)" if stack else ""
        named.setdefault(f"server: {chosen}{rows}", []).append(leaf)
    parts = []
    for name, tree in named.items():
        leading = {leaf.shape[0] for leaf in tree if leaf.ndim}
        of_slots = leading == {setup.cohort_size}
        remedy = "more devices, or " + ("a smaller cohort.size" if of_slots else "fewer clients")
        parts.append(_held(name, tree, setup, remedy if "models)" in name else "a smaller model"))
    remedy = "local.keep_optimizer = false, more devices, or fewer clients"
    parts.append(_held(f"clients' own state ({setup.num_clients} clients)", state.clients, setup, remedy))
    parts.append(_held("what meters carry", state.meters, setup, "inertia.measure = false"))
    return parts


def _held(name: str, tree: Any, setup: Setup, remedy: str) -> Part:
    """Arrays that are held all the time; leaves know how they are cut."""
    device = total = 0
    for leaf in jax.tree.leaves(tree):
        share = leaf_bytes(jax.ShapeDtypeStruct(leaf.sharding.shard_shape(leaf.shape), leaf.dtype))
        device, total = device + share, total + share * setup.devices
    return Part(name, device, total, "always", remedy)


def _checkpoint_part(simulation: Simulation, platform: str) -> Part:
    """A checkpoint is copied to the host before it is written."""
    if simulation.setup.config.output.dir is None or platform != "cpu":
        return Part("checkpoint", 0, 0, "always")
    size = bytes_of(simulation.abstract_state())
    return Part("a checkpoint on its way to disk", size, size, "always", "output.dir = null writes none")


# --- what a round, a measurement and an evaluation need -----------------------------------------------------

_IN_ROUND = {
    DISPATCH: ("what clients are sent", "a smaller model"),
    OF_CLIENTS: ("the cohort's own state", "a smaller cohort.size"),
    ORDER: ("models put in order of size, and back", "more devices, or a smaller cohort.size"),
    WAVES: ("models before and after training, and their sum", "more devices, or a smaller cohort.size"),
    clients.WAVE: ("a wave's models and optimisers", "a smaller execution.wave"),
    clients.STEP: (
        "a wave's activations and gradients",
        "a smaller execution.wave, or a smaller local.batch_size",
    ),
    MERGE: ("what the merge makes", "more devices, or a smaller cohort.size"),
    "": ("what a round says of itself", "a smaller cohort.size"),
}
"""Label of a part of the traced round -> its name, and what makes it smaller."""


def _round_parts(simulation: Simulation) -> list[Part]:
    """What is alive at the worst moment of a round, and of its observers, were all of them due in one."""
    setup, parts = simulation.setup, []
    ids, state = setup.draw(0), simulation.abstract_state()
    request = observer_request(simulation.instruments, ids)
    with jax.set_mesh(simulation.mesh):
        traced, (_, outputs) = jax.make_jaxpr(simulation.function, return_shape=True)(
            state, simulation.inputs_of(0, ids)[0], simulation.data, request and request.slots
        )
        if request is not None:
            observe, view = AllObservers(simulation.observers), outputs.view
            observed = jax.make_jaxpr(observe)(view, request.inputs, simulation.data)
            remedy = "a smaller peel.clients or inertia.clients"
            sizes = {
                f"models of {len(request.slots)} measured clients": bytes_of(
                    (view.start, view.before, view.after)
                ),
                "the probe's features and moments": sum(peak_bytes(observed).values()),
            }
            parts = [Part(name, size, size * setup.devices, "probe", remedy) for name, size in sizes.items()]
    donated = len(jax.tree.leaves(state)) if setup.config.execution.donate else 0
    rows = {setup.cohort_size, setup.num_clients}

    def size_of(array: Any) -> int:
        is_cut = bool(array.shape) and array.shape[0] in rows and array.shape[0] % setup.devices == 0
        return leaf_bytes(array) // (setup.devices if is_cut else 1)

    alive = peak_bytes(traced, tuple(_IN_ROUND), donated=donated, size=size_of)
    return parts + [
        Part(_IN_ROUND[label][0], size, size * setup.devices, "round", _IN_ROUND[label][1])
        for label, size in alive.items()
    ]


def _evaluation_parts(simulation: Simulation) -> list[Part]:
    setup, model = simulation.setup, simulation.setup.model
    parts, one = [], bytes_of(model.abstract)
    if setup.config.evaluation.every:
        batch = placement.forward_batch(setup.config.evaluation, model, setup.mesh)
        evaluator = evaluation.Evaluator(model, setup.task, simulation.store, setup.dataset.test, batch)
        with jax.set_mesh(simulation.mesh):
            traced = jax.make_jaxpr(evaluator.function)(model.abstract, *evaluator.data)
        peak = sum(peak_bytes(traced).values())
        remedy = "a smaller evaluation.batch_size"
        parts.append(Part("evaluation's activations", peak, peak * setup.devices, "evaluation", remedy))
        parts.append(Part("the deployed model", one, one * setup.devices, "evaluation", "a smaller model"))
    if setup.config.evaluation.finetune:
        optimizer = clients.make_optimizer(setup.config.local)
        size = setup.num_clients * (one + bytes_of(jax.eval_shape(optimizer.init, model.abstract["params"])))
        text = f"all clients' models and optimisers, to fine-tune ({setup.num_clients})"
        parts.append(Part(text, -(-size // setup.devices), size, "evaluation", "evaluation.finetune = 0"))
    return parts
