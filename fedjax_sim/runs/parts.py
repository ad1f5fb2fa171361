"""What a run takes in memory, part by part, of shapes alone: what is held, and estimates of the rest.

Sizes of data and states are exact: they come from shapes and from how these are cut over devices. What a
round and an evaluation need in between is an estimate: the programs themselves are traced, on shapes, and
followed to the moment at which most is alive (`fedjax_sim.engine.jaxpr_memory`).
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fedjax_sim.engine import clients, evaluation, placement
from fedjax_sim.engine.device_data import DataStore, DeviceData, abstract
from fedjax_sim.engine.feed import AHEAD, CutData, RoundData
from fedjax_sim.engine.jaxpr_memory import bytes_of, leaf_bytes, peak_bytes, share_bytes
from fedjax_sim.engine.observing import AllObservers, observer_request
from fedjax_sim.engine.round import DISPATCH, MERGE, OF_CLIENTS, ORDER, SAMPLES, WAVES, RoundInputs
from fedjax_sim.engine.scores import together
from fedjax_sim.engine.setup import Setup
from fedjax_sim.engine.simulation import Simulation
from fedjax_sim.runs.provenance import total_memory


@dataclasses.dataclass(frozen=True)
class Part:
    """One thing that takes memory.

    Attributes:
      name: what it is.
      device: bytes on one device.
      total: bytes on all devices together.
      when: `always`, `round`, `probe` (of a measured round, after its merge), `evaluation`, or `files`: in
        mapped files of the run's folder, and in memory only while there is room.
      remedy: what makes it smaller.
    """

    name: str
    device: int
    total: int
    when: str
    remedy: str = ""


def human(size: float) -> str:
    """Bytes as people write them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def parts_of(simulation: Simulation) -> list[Part]:
    """What a run takes, part by part: what is held all the time first, and the largest first."""
    setup, platform = simulation.setup, placement.platform_of(simulation.mesh)
    parts = [
        *_round_parts(simulation),
        *_evaluation_parts(simulation),
        *data_parts(simulation, platform),  # after the others, which have asked for what they read
        *state_parts(simulation),
        _checkpoint_part(simulation, platform),
    ]
    parts = [advised(setup, platform, part) for part in parts if part.total]
    order = {"always": 0, "round": 1, "probe": 2, "evaluation": 3, "files": 4}
    return sorted(parts, key=lambda part: (order[part.when], -part.total))


def on_paper(setup: Setup) -> Simulation:
    """The run, with shapes in the place of what would lie on the devices."""
    return Simulation(setup, DataStore(setup.mesh, abstract))


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


def advised(setup: Setup, platform: str, part: Part) -> Part:
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
        "execution.client_state = host": not _lowered_on_host(setup, platform),
    }
    options = [option.strip().removeprefix("or ") for option in part.remedy.split(",")]
    options = [option for option in options if option and not moot.get(option, False)]
    return dataclasses.replace(part, remedy=", or ".join(options))


def _lowered_on_host(setup: Setup, platform: str) -> bool:
    """Whether clients' own state takes less if it lies on the host, and only the cohort's on the devices."""
    if setup.cohort_size >= setup.num_clients:
        return False
    return platform != "cpu" or setup.config.output.dir is not None  # files then, and the same memory else


def shown(parts: Iterable[Part], size: Callable[[Part], int]) -> list[Part]:
    """The parts that a table shows: those of 1 KiB or more, by `size`; where none is, all that have any."""
    there = [part for part in parts if size(part)]
    return [part for part in there if size(part) >= 1024] or there


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


ON_HOST = "data set in host memory"
TABLES = "who holds which sample"

# --- what is held all the time --------------------------------------------------------------------------


def data_parts(simulation: Simulation, platform: str) -> list[Part]:
    """The samples and who holds which, once whatever reads test samples has asked for them.

    Args:
      simulation: the run, on paper.
      platform: of its devices; those of a CPU share one buffer.
    """
    setup, store = simulation.setup, simulation.store
    ids = setup.draw(0)
    data = simulation.data_of(0, simulation.inputs_of(0, ids)[0])
    # CPU devices share one buffer; the set itself is host memory.
    copies = 1 if platform == "cpu" else setup.devices
    tests, whole = bytes_of(dict(setup.dataset.test)), store.has(setup.dataset.test)
    if isinstance(data, DeviceData):
        train, table = bytes_of(data.train), bytes_of((data.samples, data.offsets, data.rng_ids))
        samples = [
            Part("training samples", train, train * copies, "always", "smaller samples, or fewer"),
            Part(TABLES, table, table * copies, "always", "fewer samples, or fewer clients"),
        ]
    elif isinstance(data, CutData):
        cut, table = _held("training samples, a share", data.train, setup, "more devices"), data.wanted
        size = leaf_bytes(table)
        samples = [cut, Part("which samples a round wants", size, size * setup.devices, "round", "")]
    else:
        one = _held("", data.train, setup, "")
        name, rounds = f"samples of {1 + AHEAD} rounds' clients", 1 + AHEAD
        remedy = "more devices, or a smaller cohort.size"
        samples = [Part(name, rounds * one.device, rounds * one.total, "always", remedy)]
    parts = [
        *samples,
        Part(
            "test samples",
            tests if whole else -(-tests // setup.devices),
            tests * copies if whole else tests,
            "always",
            "fewer test samples" + (", peel.split = train" if setup.config.peel.every else ""),
        ),
    ]
    if platform == "cpu":
        mapped = any(isinstance(leaf, np.memmap) for leaf in setup.dataset.train.values())
        held = tests + (0 if mapped else bytes_of(dict(setup.dataset.train)))
        parts.append(Part(ON_HOST, held, held, "always", "smaller samples, or fewer"))
    return parts


def state_parts(simulation: Simulation) -> list[Part]:
    """The server's state, by its fields, clients' own and the meters'."""
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
    remedy = "local.keep_optimizer = false, execution.client_state = host, more devices, or fewer clients"
    whose = f"{setup.num_clients} clients"
    if simulation.client_state is not None:
        size = simulation.client_state.rows.row_bytes * -(-setup.num_clients // jax.process_count())
        when = "always" if setup.config.output.dir is None else "files"
        name = f"clients' own state on the host ({whose})"
        parts.append(Part(name, 0, size, when, "output.dir (it lies in files then)"))
        whose, remedy = f"{setup.cohort_size} of {whose}", "a smaller cohort.size"
    parts.append(_held(f"clients' own state ({whose})", state.clients, setup, remedy))
    parts.append(_held("the initial model", state.initial, setup, "a smaller model"))
    parts.append(_held("what meters carry", state.meters, setup, "inertia.measure = false"))
    return parts


def _held(name: str, tree: Any, setup: Setup, remedy: str) -> Part:
    """Arrays that are held all the time; leaves know how they are cut."""
    device = total = 0
    for leaf in jax.tree.leaves(tree):
        share = share_bytes(leaf)
        device, total = device + share, total + share * setup.devices
    return Part(name, device, total, "always", remedy)


def _checkpoint_part(simulation: Simulation, platform: str) -> Part:
    """A checkpoint is copied to the host before it is written."""
    if simulation.setup.config.output.dir is None or platform != "cpu":
        return Part("checkpoint", 0, 0, "always")
    size = bytes_of(simulation.abstract_state())
    return Part("a checkpoint on its way to disk", size, size, "always", "output.dir = null writes none")


# --- what a round, a measurement and an evaluation need -----------------------------------------------------

IN_ROUND = {
    DISPATCH: ("what clients are sent", "a smaller model"),
    SAMPLES: ("the cohort's samples, exchanged", "more devices, or a smaller cohort.size"),
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


OF_WAVE = {name for label, (name, _) in IN_ROUND.items() if label in (clients.WAVE, clients.STEP)}
"""Names of what a wave needs."""


def wave_parts(simulation: Simulation) -> list[Part]:
    """What a wave needs at its worst moment, which need not be that of the round."""
    parts = _round_parts(simulation, most=(clients.WAVE, clients.STEP))
    return [part for part in parts if part.name in OF_WAVE]


def _round_parts(simulation: Simulation, most: tuple[str, ...] = ()) -> list[Part]:
    """What is alive at the worst moment of a round, and of its observers, were all of them due in one.

    Args:
      simulation: the run, on paper.
      most: see `peak_bytes`.
    """
    setup, parts = simulation.setup, []
    ids, state = setup.draw(0), simulation.abstract_state()
    request = observer_request(simulation.instruments, ids)
    with jax.set_mesh(simulation.mesh):
        inputs, _ = simulation.inputs_of(0, ids)
        data = simulation.data_of(0, inputs)
        traced, (_, outputs) = jax.make_jaxpr(simulation.function, return_shape=True)(
            state, inputs, data, request and request.slots
        )
        if request is not None:
            observe, view = AllObservers(simulation.observers), outputs.view
            observed = jax.make_jaxpr(observe)(view, request.inputs, data)
            remedy = "a smaller peel.clients or inertia.clients"
            models = view.start, view.before, view.after
            cut = {
                (rows, *leaf.shape[1:])
                for leaf in jax.tree.leaves(models)
                for rows in (len(request.slots), leaf.shape[0])
            }

            def size_in_view(array: Any) -> int:
                return _share(array, setup.devices) if array.shape in cut else leaf_bytes(array)

            sizes = {
                f"models of {len(request.slots)} measured clients": bytes_of(models) // setup.devices,
                "the probe's features and moments": sum(peak_bytes(observed, size=size_in_view).values()),
            }
            parts = [Part(name, size, size * setup.devices, "probe", remedy) for name, size in sizes.items()]
    donated = len(jax.tree.leaves(state)) if setup.config.execution.donate else 0
    rows = cut_rows(simulation, inputs, data)

    def size_of(array: Any) -> int:
        cut = array.shape and array.shape[0] in rows
        return _share(array, setup.devices) if cut else leaf_bytes(array)

    alive = peak_bytes(traced, tuple(IN_ROUND), most=most, donated=donated, size=size_of)
    return parts + [
        Part(IN_ROUND[label][0], size, size * setup.devices, "round", IN_ROUND[label][1])
        for label, size in alive.items()
    ]


def _share(array: Any, devices: int) -> int:
    """Bytes of the rows that a device has of an array that is cut over them."""
    return leaf_bytes(array) // array.shape[0] * -(-array.shape[0] // devices)


def cut_rows(simulation: Simulation, inputs: RoundInputs, data: RoundData) -> set[int]:
    """Of how many rows arrays of a round are that are cut over the devices: slots, places, all clients."""
    setup = simulation.setup
    rows = {setup.cohort_size, setup.num_clients, len(inputs.plan.slot_of_place)}
    if isinstance(data, CutData):
        rows.add(len(data.wanted))
    return rows | {-(-count // setup.devices) * setup.devices for count in rows}


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
        if setup.config.evaluation.per_client and setup.personalised:
            size, remedy = together(setup) * one, "evaluation.per_client = false"
            text = f"clients' own models, {together(setup)} at a time"
            parts.append(Part(text, size // setup.devices, size, "evaluation", remedy))
    if setup.config.evaluation.finetune:
        optimizer = clients.make_optimizer(setup.config.local)
        size = setup.num_clients * (one + bytes_of(jax.eval_shape(optimizer.init, model.abstract["params"])))
        text = f"all clients' models and optimisers, to fine-tune ({setup.num_clients})"
        parts.append(Part(text, -(-size // setup.devices), size, "evaluation", "evaluation.finetune = 0"))
    return parts
