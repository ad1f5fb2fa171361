"""Several runs brought to their ends side by side: which go together, and what becomes of each.

Runs go together whose programs are the same but for numbers: seeds, cohorts, partitions of equally many
clients, the model that the first round starts from, learning rates with their schedules, and every float of
an algorithm, of momentum, weight decay and clipping, unless one of them is 0 (which mostly leaves something
out) or the algorithm decides by it while it is traced. All others are different programs, and different
groups. A run's folder, records and checkpoints are those that it has alone, and alone it can be resumed.

Numbers are those of the run alone up to the rounding of float32 arithmetic: a device has whole runs, so sums
over clients are added up as on one device, and products of several runs may be added up in another order.
"""

import contextlib
import copy
import dataclasses
import functools
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import jax
from jax.sharding import Mesh

from fedjax_sim import data
from fedjax_sim.config import LocalConfig, RunConfig, as_config
from fedjax_sim.core.algorithm import Algorithm, AlgorithmConfig, Context
from fedjax_sim.core.errors import NotWritten, UserError
from fedjax_sim.data import Samples
from fedjax_sim.engine import placement
from fedjax_sim.engine.device_data import DataStore
from fedjax_sim.engine.setup import Setup
from fedjax_sim.engine.together import Group, can_take, obstacle, shape_of
from fedjax_sim.records import Row, Table
from fedjax_sim.runs import opening, parts, progress
from fedjax_sim.runs.assemble import prepare
from fedjax_sim.runs.callbacks import check_installed
from fedjax_sim.runs.describe import differing
from fedjax_sim.runs.drive import Drive, bar_of
from fedjax_sim.runs.federation import Simulation
from fedjax_sim.runs.folder import Folder
from fedjax_sim.runs.kept_programs import kept
from fedjax_sim.runs.loading import load_run
from fedjax_sim.runs.opening import Opened
from fedjax_sim.runs.plan import plan
from fedjax_sim.runs.progress import Clock, signals
from fedjax_sim.runs.result import Interrupted, Run, Terminated

Outcome = Run | Exception
"""What became of a run."""


@overload
def run_many(
    configs: Sequence[RunConfig | str | Path],
    *,
    dataset: Samples | None = ...,
    errors: Literal["raise"] = ...,
    tell: Callable[[str], None] = ...,
) -> list[Run]: ...
@overload
def run_many(
    configs: Sequence[RunConfig | str | Path],
    *,
    dataset: Samples | None = ...,
    errors: Literal["return"],
    tell: Callable[[str], None] = ...,
) -> list[Outcome]: ...
def run_many(
    configs: Sequence[RunConfig | str | Path],
    *,
    dataset: Samples | None = None,
    errors: Literal["raise", "return"] = "raise",
    tell: Callable[[str], None] = lambda line: None,
) -> list[Run] | list[Outcome]:
    """Runs configurations to their ends, side by side where they go together.

    A run whose folder holds it already is resumed, or loaded if it is finished.

    Args:
      configs: what to run, or paths of YAML files; no two have the same `output.dir`.
      dataset: takes the place of what they name.
      errors: `raise`: once all others are at their end, the first error is raised; `return`: it takes the
        place of its run.
      tell: is given a line of each group, and of why it is not larger.

    Returns:
      The runs, in the order of `configs`.

    Raises:
      UserError: a setting that cannot work, before any run begins, or several processes; or, of the first
        such run, an update that is not finite.
      NotWritten: the disk is full, or fails; all can be started again.
      Interrupted, Terminated: on SIGINT and SIGTERM, after a checkpoint of each.
    """
    if errors not in ("raise", "return"):
        raise UserError("errors", errors, "it is neither raise nor return", "Write one of them.")
    if isinstance(configs, RunConfig | str | Path):
        raise UserError("configs", type(configs).__name__, "it is one run", "Give a list, or use fs.run.")
    if jax.process_count() > 1:
        why = "several processes share each run, and runs go side by side in one"
        raise UserError("run_many", jax.process_count(), why, "Start them one after another, with run.")
    made = [as_config(config) for config in configs]
    _check_folders(made)
    samples = data.as_dataset(dataset)
    loads: dict[str, Samples] = {}

    def samples_of(config: RunConfig) -> Samples:
        if samples is not None:
            return samples
        key = repr(config.data)
        if key not in loads:
            loads[key] = config.data.load()
        return loads[key]

    if errors == "raise":
        _check_settings(made, samples_of)

    def open_one(number: int, mesh: Mesh | None, store: DataStore | None) -> Any:
        config = made[number]
        here: Any = {"dataset": samples_of(config), "mesh": mesh, "store": store}
        return opening.again(str(config.output.dir), **here) if _held(config) else opening.new(config, **here)

    found = run_groups(made, open_one, tell)
    if errors == "raise":
        for outcome in found:
            if isinstance(outcome, Exception):
                raise outcome
    return found


def _check_folders(configs: Sequence[RunConfig]) -> None:
    """Raises UserError for two runs of one folder, or a folder of another run."""
    seen: set[str] = set()
    for config in configs:
        where = config.output.dir
        if where is None:
            continue
        place = str(Path(where).resolve())
        if place in seen:
            why = "two of the runs have this folder"
            raise UserError("output.dir", where, why, "Give each its own, or none.")
        seen.add(place)
        if _held(config) and (others := differing(Folder(where).path, config)):
            why = f"it holds a run of other settings: {'; '.join(others[:3])}"
            raise UserError("output.dir", where, why, "Remove it, or choose another.")


def _check_settings(configs: Sequence[RunConfig], samples_of: Callable[[RunConfig], Samples]) -> None:
    """Raises UserError where a family's settings cannot work; its group would find out after others ran."""
    for family in families(configs):
        number = next((one for one in family if not _held(configs[one])), None)
        if number is None:
            continue
        config = configs[number]
        try:
            check_installed(config)
            prepare(config, dataset=samples_of(config))
        except UserError as error:
            raise UserError(f"configs[{number}]: {error.field}", error.value, error.why, error.fix) from None


def _held(config: RunConfig) -> bool:
    """Whether the run has begun already."""
    return config.output.dir is not None and Folder(config.output.dir).started


# --- which go together --------------------------------------------------------------------------------

_FREE = ("seed", "output.", "partition.", "initial.", "cohort.", "local.schedule", "local.decay")
"""What may differ without the program's knowing; shapes are compared once they are known."""

_NUMBERS = ("algorithm.", "local.lr", "local.momentum", "local.weight_decay", "local.clip_norm")
"""Below these a float other than 0 may be an argument of the program."""


@dataclasses.dataclass(frozen=True)
class _Open:
    """Stands in the place of a number that is an argument."""


_OPEN = _Open()


def fields_of(config: RunConfig) -> dict[str, Any]:
    """What runs must have in common to go together, by dotted field; `_OPEN` for what may be an argument."""
    out: dict[str, Any] = {}

    def walk(value: Any, path: str) -> None:
        if path.startswith(_FREE):
            return
        if dataclasses.is_dataclass(value):
            if path:
                out[path.removesuffix(".")] = type(value)
            for field in dataclasses.fields(value):
                name = f"{path}{field.name}"
                inner = getattr(value, field.name)
                walk(inner, f"{name}." if dataclasses.is_dataclass(inner) else name)
        elif isinstance(value, float) and value and path.startswith(_NUMBERS):
            out[path] = _OPEN
        else:
            out[path] = value

    walk(config, "")
    return out


def numbers_of(config: RunConfig) -> dict[str, float]:
    """The floats that may be arguments, by dotted field."""
    found = {}
    for path, value in fields_of(config).items():
        if value is _OPEN:
            found[path] = functools.reduce(getattr, path.split("."), config)
    return found


def families(configs: Sequence[RunConfig]) -> list[list[int]]:
    """Which runs may go together by their settings: groups of numbers, in the order of their first runs."""
    groups: list[tuple[dict[str, Any], list[int]]] = []
    for number, config in enumerate(configs):
        fields = fields_of(config)
        for other, group in groups:
            if not _unlike(fields, other):
                group.append(number)
                break
        else:
            groups.append((fields, [number]))
    return [group for _, group in groups]


def _unlike(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The fields in which two differ."""
    names = {**one, **other}
    return [name for name in names if name not in one or name not in other or one[name] != other[name]]


def what_differs(configs: Sequence[RunConfig]) -> list[str]:
    """The fields for which some of these runs cannot go together."""
    fields = [fields_of(config) for config in configs]
    return list(dict.fromkeys(name for one in fields[1:] for name in _unlike(fields[0], one)))


@dataclasses.dataclass(frozen=True)
class Numbers:
    """Runs that differ in numbers, see `fedjax_sim.engine.together.Family`.

    Attributes:
      config: of their algorithm, with `_OPEN` in the place of these.
      context: likewise its local settings.
    """

    config: AlgorithmConfig
    context: Context

    def __call__(self, values: Mapping[str, jax.Array]) -> tuple[Algorithm, LocalConfig]:
        """See `Family`."""
        local: Any = _filled(self.context.local, values, "local.")
        context = dataclasses.replace(self.context, local=local)
        return _filled(self.config, values, "algorithm.").build(context), local


def _filled(config: Any, values: Mapping[str, Any], path: str) -> Any:
    """A copy of a dataclass with some of its numbers replaced, which are not checked again."""
    if not any(name.startswith(path) for name in values):
        return config
    made = copy.copy(config)
    for field in dataclasses.fields(config):
        name, value = f"{path}{field.name}", getattr(config, field.name)
        if name in values:
            object.__setattr__(made, field.name, values[name])
        elif dataclasses.is_dataclass(value):
            object.__setattr__(made, field.name, _filled(value, values, f"{name}."))
    return made


def _family_of(setup: Setup, names: Sequence[str]) -> Numbers:
    """Of the runs like this one that differ in these numbers."""
    context = Context(
        model=setup.model,
        task=setup.task,
        num_clients=setup.num_clients,
        cohort_size=setup.cohort_size,
        rounds=setup.config.rounds,
        local=setup.config.local,
    )
    blank = dict.fromkeys(names, _OPEN)
    local: Any = _filled(context.local, blank, "local.")
    algorithm = _filled(setup.config.algorithm, blank, "algorithm.")
    return Numbers(algorithm, dataclasses.replace(context, local=local))


# --- bringing them to their ends ----------------------------------------------------------------------


def run_groups(
    configs: Sequence[RunConfig],
    open_one: Callable[
        [int, Mesh | None, DataStore | None], contextlib.AbstractContextManager[Opened | None]
    ],
    tell: Callable[[str], None],
    ended: Callable[[int, Outcome], None] = lambda number, outcome: None,
    until: int | None = None,
) -> list[Outcome]:
    """Runs them group by group.

    Args:
      configs: of the runs.
      open_one: (number of a run, the devices that it is laid out for, who has samples there) -> the opened
        run; see `fedjax_sim.runs.opening`. None: all devices, nobody.
      tell: is given a line of each group.
      ended: is told what became of each run, as soon as it is known.
      until: the round after which all are cut, with a checkpoint; None: they come to their ends.

    Raises:
      NotWritten, Interrupted, Terminated: see `run_many`.
    """
    outcomes: dict[int, Outcome] = {}

    def end(number: int, outcome: Outcome) -> None:
        outcomes[number] = outcome
        ended(number, outcome)

    groups = families(configs)
    if len(groups) > 1:
        firsts = [configs[group[0]] for group in groups]
        told = ", ".join(what_differs(firsts)[:4])
        tell(f"{len(configs)} runs in {len(groups)} groups, which differ in: {told}")
    with kept():
        for group in groups:
            waiting = list(group)
            while waiting:
                waiting = _some(configs, waiting, open_one, tell, end, until)
    return [outcomes[number] for number in range(len(configs))]


def _some(
    configs: Sequence[RunConfig],
    waiting: Sequence[int],
    open_one: Callable[
        [int, Mesh | None, DataStore | None], contextlib.AbstractContextManager[Opened | None]
    ],
    tell: Callable[[str], None],
    end: Callable[[int, Outcome], None],
    until: int | None,
) -> list[int]:
    """Runs as many of one family as go together. -> the others."""
    devices = list(placement.make_mesh(configs[waiting[0]].execution.devices).devices.flat)
    # A run by itself is laid out over all devices, as ever.
    mesh, store = placement.mesh_of(devices[:1]) if len(waiting) > 1 else None, None
    ways: dict[int, _Way] = {}
    later, reasons, names, most = [], set(), [], len(waiting)
    with contextlib.ExitStack() as everything:
        for number in waiting:
            first = next(iter(ways.values()), None)
            if len(ways) >= most or (first and _by_value(configs[first.number], configs[number], names)):
                later.append(number)
                continue
            stack = everything.enter_context(contextlib.ExitStack())
            try:
                opened = stack.enter_context(open_one(number, mesh, store))
            except NotWritten:
                raise
            except Exception as error:
                end(number, error)
                continue
            if opened is None:
                end(number, load_run(str(configs[number].output.dir)))
                continue
            if first is None:
                store, reason = opened.simulation.store, obstacle(opened.simulation)
                names = [] if reason else _arguments(configs, waiting, opened.simulation)
                most = 1 if reason else _most(opened.simulation.setup, len(devices))
                if reason:
                    tell(f"runs go one by one: {reason}")
                if most == 1 and mesh is not None:
                    stack.close()
                    opened = stack.enter_context(open_one(number, None, None))
                    assert opened is not None
            elif apart := _unlike(shape_of(first.opened.simulation), shape_of(opened.simulation)):
                stack.close()
                later.append(number)
                reasons.add(apart[0])
                continue
            ways[number] = _Way(number, stack, opened)
        if later:
            why = f", as these differ: {', '.join(sorted(reasons))}" if reasons else ""
            tell(f"{len(ways)} runs side by side, {len(later)} after them{why}")
        if ways:
            family = _family_of(next(iter(ways.values())).opened.simulation.setup, names)
            values = [{name: numbers_of(configs[number])[name] for name in names} for number in ways]
            _Driven(list(ways.values()), family, values, devices, end, until).run()
    return later


def _by_value(one: RunConfig, other: RunConfig, arguments: Sequence[str]) -> bool:
    """Whether two runs of a family differ in a number that is no argument of the program."""
    mine, theirs = numbers_of(one), numbers_of(other)
    return any(mine[name] != theirs[name] for name in mine if name not in arguments)


def _arguments(configs: Sequence[RunConfig], family: Sequence[int], simulation: Simulation) -> list[str]:
    """Of the numbers in which runs differ, those that the round can take as arguments."""
    numbers = [numbers_of(configs[number]) for number in family]
    differing = [name for name in numbers[0] if len({one[name] for one in numbers}) > 1]
    return [name for name in differing if can_take(simulation, _family_of(simulation.setup, [name]), [name])]


_SHARE = 0.8
"""Of the memory that there is, what a group may take by the plan."""


def _most(setup: Setup, devices: int) -> int:
    """How many runs like this one fit side by side, by the plan of one alone."""
    one, platform = plan(setup), placement.platform_of(setup.mesh)
    there = parts.available(platform)
    if there is None:
        return 2**30
    held = sum(part.total for part in parts.data_parts(parts.on_paper(setup), platform))
    own = max(one.peak - held, 1)
    fitting = int((_SHARE * there - held) // own)
    return max(1, fitting if platform == "cpu" else fitting * devices)


@dataclasses.dataclass
class _Way:
    """A run on its way in a group.

    Attributes:
      number: of the run.
      stack: what has to be closed when it ends.
      opened: it.
      drive: what drives it.
    """

    number: int
    stack: contextlib.ExitStack
    opened: Opened
    drive: Drive | None = None


class _Driven:
    """A group on its way: all its runs in step, those that are behind first."""

    def __init__(
        self,
        ways: list[_Way],
        family: Numbers,
        values: Sequence[Mapping[str, float]],
        devices: Sequence[Any],
        end: Callable[[int, Outcome], None],
        until: int | None,
    ):
        """`end` is told what became of each run; `until` is as in `run_groups`, the others are `Group`'s."""
        self._ways, self._end, self._until = list(ways), end, until
        self._places = {way.number: place for place, way in enumerate(ways)}  # in the group
        simulations = [way.opened.simulation for way in ways]
        self._group = Group(simulations, family, values, devices) if len(ways) > 1 else None
        self._bar = _Bar(simulations[0].setup, len(ways))
        self._clock = Clock()

    def run(self) -> None:
        """Brings all runs to their ends.

        Raises:
          NotWritten, Interrupted, Terminated: see `run_many`.
        """
        for way in list(self._ways):
            self._try(way, lambda way=way: self._begin(way))
        with signals() as asked:
            while (active := self._behind()) and not asked:
                self._step(active)
            for way in list(self._ways):
                self._try(way, _drive(way).catch_up)
            for way in list(self._ways):  # all are on their way to the disk by now
                self._try(way, _drive(way).settle)
        for way in list(self._ways):
            self._try(way, lambda way=way: self._finish(way, bool(asked)))
        if cut := [_drive(way).end() for way in self._ways]:
            raise Interrupted(cut[0]) if signal.SIGINT in asked[:1] else Terminated(cut[0])

    def _begin(self, way: _Way) -> None:
        way.drive = way.stack.enter_context(Drive(*way.opened, bar=self._bar.part, until=self._until))
        way.drive.begin()
        if self._group is not None:
            way.opened.simulation.release()

    def _behind(self) -> list[_Way]:
        """The runs that have done the fewest rounds, of those that are not at their end."""
        under_way = [way for way in self._ways if _drive(way).open]
        least = min((way.opened.simulation.round for way in under_way), default=0)
        return [way for way in under_way if way.opened.simulation.round == least]

    def _step(self, active: list[_Way]) -> None:
        """Starts rounds of some runs, and has them written down."""
        first = active[0].opened.simulation.round + 1
        others = [way.opened.simulation.round - first + 1 for way in self._ways if way not in active]
        limits = [_drive(way).most for way in active] + [ahead for ahead in others if ahead > 0]
        most = min((limit for limit in limits if limit is not None), default=None)
        if self._group is None:
            fetches = [active[0].opened.simulation.steps(most)]
        else:
            fetches = self._group.steps([self._places[way.number] for way in active], most)
        lap = _Shared(self._clock, len(active))
        for way, fetch in zip(active, fetches, strict=True):
            self._try(way, lambda way=way, fetch=fetch: _drive(way).take(first, fetch, lap))

    def _finish(self, way: _Way, asked: bool) -> None:
        """Ends a run that has come to its end, or to where all are cut unless a signal has asked for it."""
        if _drive(way).open or (asked and not _drive(way).over):
            return
        result = _drive(way).end()
        way.stack.close()
        self._ways.remove(way)
        self._end(way.number, result)

    def _try(self, way: _Way, act: Callable[[], None]) -> None:
        """Does something for one run; an error ends that run, and no other."""
        try:
            act()
        except NotWritten:
            raise
        except Exception as error:
            self._ways.remove(way)
            found: Exception = error
            try:
                if not way.stack.__exit__(type(error), error, error.__traceback__):
                    raise error
            except NotWritten:
                raise
            except Exception as told:
                found = told
            self._end(way.number, found)


def _drive(way: _Way) -> Drive:
    assert way.drive is not None
    return way.drive


class _Shared:
    """The cost of a call, in equal parts to the runs that had it."""

    def __init__(self, clock: Clock, runs: int):
        self._clock, self._runs = clock, runs
        self._known: tuple[float, float] | None = None

    def __call__(self, rounds: int) -> tuple[float, float]:
        """See `Lapping`."""
        if self._known is None:
            self._known = self._clock.lap(rounds * self._runs)
        return self._known


class _Bar:
    """One bar for all runs of a group: the rounds that the first of them has come to."""

    def __init__(self, setup: Setup, runs: int):
        self._setup, self._runs = setup, runs
        self._bar: Any = None
        self._done = 0

    def part(self, done: int, table: Table) -> "_Bar._Part":
        """What a run takes for its own."""
        if self._bar is None:
            several = self._runs > 1
            with progress.part_of(f"{self._runs} runs") if several else contextlib.nullcontext():
                self._bar, self._done = bar_of(self._setup, done, table), done
        return _Bar._Part(self, done)

    class _Part:
        """See `part`."""

        def __init__(self, whole: "_Bar", done: int):
            self._whole, self._done = whole, done

        def advance(self, rows: list[Row], seconds: float) -> None:
            """See `Bar`."""
            self._done += 1
            if self._done > self._whole._done:
                self._whole._done = self._done
                self._whole._bar.advance(rows, seconds * self._whole._runs)

        def close(self) -> None:
            """See `Bar`; the last round closes it by itself."""
            self._whole._bar.close()
