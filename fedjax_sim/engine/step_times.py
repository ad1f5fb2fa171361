"""How long a client's local step takes on these devices, in one layout and another, measured in turn.

Which layout is fastest depends on the processor, on what XLA makes of it, and on shapes. So the real step is
timed: that of `fedjax_sim.engine.clients.Trainer`, on every device at once as in a round, with made-up
samples of the task's shapes. A machine is rarely quiet: layouts take turns, and are compared within a turn.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from fedjax_sim.config import ExecutionConfig, LocalConfig
from fedjax_sim.core import stacked
from fedjax_sim.core.algorithm import LocalRule
from fedjax_sim.core.model import Model, Variables
from fedjax_sim.core.stacked import AXIS
from fedjax_sim.core.task import Task
from fedjax_sim.engine import placement
from fedjax_sim.engine.clients import Lanes, Trainer
from fedjax_sim.engine.device_data import DataStore, DeviceData
from fedjax_sim.engine.jaxpr_memory import peak_bytes
from fedjax_sim.engine.programs import cached_jit
from fedjax_sim.engine.waves import Work

WIDTHS = (1, 2, 4, 8, 16)
"""Of waves that are tried beside the default, a device's whole share at most."""

BATCHES = 4
"""That a made-up client has samples for."""

LEAST, MOST = 6, 30
"""Turns, however short or long the time is."""

TURN = 0.04
"""Seconds that the default layout's steps take in a turn, or one step if that takes longer."""

SLOW = 2.0
"""A layout that takes so many times as long as the fastest at first gets no turns, nor do wider waves of its
kind."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """What is chosen among.

    Attributes:
      wave: clients side by side on a device.
      conv: implementation of the convolution.
    """

    wave: int
    conv: str


@dataclasses.dataclass(frozen=True)
class Timing:
    """What came of a layout; times are of one step of one client, on a device among all that work.

    Attributes:
      layout: the layout.
      seconds: median.
      ratios: to the default layout's time, turn by turn; of one that got no turns the first alone.
    """

    layout: Layout
    seconds: float
    ratios: tuple[float, ...]


def layouts(
    execution: ExecutionConfig, model: Model, cohort_size: int, mesh: Mesh, work: Work | None = None
) -> tuple[Layout, ...]:
    """The default layout, then others to try, waves like the default one first.

    What the user has chosen is the same in all. Convolutions that round more coarsely than XLA's own are not
    among them, nor, on a CPU, those that several clients side by side make grouped ones, where XLA is slow.

    Args:
      execution: what the user has chosen.
      model: the network.
      cohort_size: K.
      mesh: the devices.
      work: of the clients; None: all take equally many steps.
    """
    default = Layout(*placement.speed_defaults(execution, model, cohort_size, mesh, work))
    share, on_cpu = -(-cohort_size // mesh.size), placement.platform_of(mesh) == "cpu"
    widths = {min(width, share) for width in WIDTHS} if execution.wave is None else {default.wave}
    found = [default]
    for wave in sorted(widths, key=lambda wave: (abs(math.log(wave / default.wave)), wave)):
        if execution.conv != "auto" or not model.convolves:
            asked = dataclasses.replace(execution, wave=wave)
            convs = [placement.speed_defaults(asked, model, cohort_size, mesh)[1]]
        elif on_cpu:
            convs = ["canonical", "patches", "xla"] if wave == 1 else ["patches"]
        else:
            convs = ["xla", "patches"]
        found += [Layout(wave, conv) for conv in convs]
    return tuple(dict.fromkeys(found))


def timings(
    layouts: Sequence[Layout],
    make: Callable[[Layout], Callable[[int], Any] | None],
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[Timing, ...]:
    """Times layouts in turn, each turn in the reverse order of the one before.

    Args:
      layouts: the first is the default, which the others are compared with.
      make: gives what runs a number of steps of a whole wave, and waits for them; its first run compiles.
        None: the layout is not to be tried.
      seconds: of all, roughly. Once two thirds of them are gone no other layout is compiled.
      clock: gives seconds.

    Returns:
      Of those that were run, in their order; none if the default was not.
    """
    began, default = clock(), layouts[0]
    runs: dict[Layout, Callable[[int], Any]] = {}
    first: dict[Layout, float] = {}

    def timed(layout: Layout, steps: int) -> float:
        start = clock()
        runs[layout](steps)
        return (clock() - start) / (steps * layout.wave)

    def hopeless(layout: Layout) -> bool:
        narrower = [one for one in runs if one.conv == layout.conv and default.wave < one.wave < layout.wave]
        return any(first[one] >= SLOW * min(first.values()) for one in narrower)

    for layout in layouts:
        if runs and clock() - began > seconds * 2 / 3:
            break
        run = None if hopeless(layout) else make(layout)
        if run is None and not runs:
            return ()
        if run is None:
            continue
        runs[layout] = run
        run(1)
        steps = 1
        # By itself the start of a program takes as long as many steps of a small model.
        while (each := timed(layout, steps)) * steps * layout.wave < TURN / 2:
            steps *= 4
        first[layout] = min(each, timed(layout, steps))
    fastest = min(first.values())
    kept = [layout for layout in runs if layout == default or first[layout] < SLOW * fastest]
    total = max(round(TURN / first[default]), 1)  # steps of one client after another, in a turn
    turns: list[dict[Layout, float]] = []
    while len(turns) < LEAST or (clock() - began < seconds and len(turns) < MOST):
        order = kept if len(turns) % 2 else kept[::-1]
        turns.append({layout: timed(layout, max(round(total / layout.wave), 1)) for layout in order})

    def timing(layout: Layout) -> Timing:
        if layout not in kept:
            return Timing(layout, first[layout], (first[layout] / first[default],))
        ratios = tuple(turn[layout] / turn[default] for turn in turns)
        return Timing(layout, statistics.median(turn[layout] for turn in turns), ratios)

    return tuple(timing(layout) for layout in runs)


@dataclasses.dataclass(frozen=True)
class _Wave:
    """One wave on each device, as a function.

    Attributes:
      trainer: local training.
      mesh: the devices.
    """

    trainer: Trainer
    mesh: Mesh

    def __call__(
        self, variables: Variables, lanes: Lanes, key: jax.Array, bound: jax.Array, data: DeviceData
    ) -> Any:
        """The trained models [D·L, …] and their losses f32[D·L].

        Args:
          variables: one model, which all start from.
          lanes: [D·L, …], the clients.
          key: of the round.
          bound: i32[], steps.
          data: the training set.
        """

        def on_device(
            variables: Variables, lanes: Lanes, key: jax.Array, bound: jax.Array, data: DeviceData
        ) -> tuple[Variables, jax.Array]:
            trainer = self.trainer
            start, lanes = stacked.broadcast(variables, trainer.width), trainer.ready(lanes, key, data)
            # So low a rate that numbers stay what they are, normal ones, however many steps there are.
            found = trainer.train_wave(start, None, lanes, bound, jnp.float32(1e-6), data)
            return found[0], found[3]

        own, same = P(AXIS), P()
        run = stacked.on_devices(on_device, self.mesh, (same, own, same, same, data.spec), (own, own))
        with self.trainer.model.precisely():
            return run(variables, lanes, key, bound, data)


def step_of(
    model: Model, task: Task, local: LocalConfig, mesh: Mesh, *, uneven: bool, room: int | None = None
) -> Callable[[Layout], Callable[[int], Any] | None]:
    """What `timings` takes as `make`: real steps of FedAvg's clients on made-up samples.

    What runs them gives (models [D·L, …], losses f32[D·L]).

    Args:
      model: the network.
      task: what is learned.
      local: hyper-parameters.
      mesh: the devices.
      uneven: clients differ in size, so that batches are masked.
      room: bytes; a layout of several clients side by side that would hold more on a device is not tried.
        None: all are.
    """
    local = dataclasses.replace(local, keep_optimizer=False)
    each, store = BATCHES * local.batch_size, DataStore(mesh)
    key = jax.random.key(0)
    variables = jax.device_get(jax.jit(model.init)(key))

    def make(layout: Layout) -> Callable[[int], Any] | None:
        trainer = Trainer(
            model=dataclasses.replace(model, conv=layout.conv),
            rule=LocalRule(),
            local=local,
            task=task,
            width=layout.wave,
            order_lengths=(each,),
            ragged=uneven,
            partial=uneven,
        )
        clients = layout.wave * mesh.size
        data = _made_up(task, clients, each, store)
        lanes = Lanes(
            client_state=trainer.init_client(variables),
            ids=np.arange(clients, dtype=np.int32),  # type: ignore[arg-type]
            counts=np.full(clients, each, np.int32),  # type: ignore[arg-type]
            weights=np.ones(clients, np.float32),  # type: ignore[arg-type]
        )
        wave = _Wave(trainer, mesh)
        start, round_key = jax.tree.map(store.same, variables), store.key(key)
        if room is not None and layout.wave > 1:
            with jax.set_mesh(mesh):
                traced = jax.make_jaxpr(wave)(start, lanes, round_key, np.int32(1), data)
            if sum(peak_bytes(traced).values()) > room:
                return None
        program = cached_jit(wave, mesh)

        def run(steps: int) -> Any:
            with jax.set_mesh(mesh):
                return jax.block_until_ready(program(start, lanes, round_key, np.int32(steps), data))

        return run

    return make


def _made_up(task: Task, clients: int, each: int, store: DataStore) -> DeviceData:
    """Samples of the task's shapes, `each` for a client; clients share them where they would be too many."""
    drawn = np.random.default_rng(0)
    size = sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in task.spec.values())
    distinct = int(np.clip(_BYTES // size, each, clients * each))

    def leaf(name: str, spec: jax.ShapeDtypeStruct) -> np.ndarray:
        shape = (distinct, *spec.shape)
        if not np.issubdtype(spec.dtype, np.integer):
            return drawn.standard_normal(shape, np.float32).astype(spec.dtype)
        return drawn.integers(0, task.outputs if name == task.label else 2, shape).astype(spec.dtype)

    train = {name: leaf(name, spec) for name, spec in task.spec.items()}
    samples = (np.arange(clients * each) % distinct).astype(np.int32)
    offsets = (np.arange(clients + 1) * each).astype(np.int32)
    return DeviceData(store.whole(train), store.put(samples), store.put(offsets))


_BYTES = 2**26
"""That made-up samples take at most."""
