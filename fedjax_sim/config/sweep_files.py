"""What a sweep is: its YAML file, read and checked.

    base: {rounds: 100, …}            # a configuration, or the path of one
    methods:                          # rows of the table: label -> what differs from base
      FedAvg: {algorithm: fedavg}
      FedMR: {algorithm: {name: fedmr, first_stage: 10}}
    grid:                             # columns: all combinations
      partition.alpha: [0.1, 0.5]     # or named: {mild: 0.5, IID: …}, of whole sections too
    seeds: [0, 1, 2]                  # of all methods and columns; neither of these may set a seed itself
    reference: FedAvg                 # paired differences against it
    metric: accuracy                  # what the table shows
    goal: max                         # or min; the default goes by the metric's name
    last_k: 1                         # mean over so many newest values of the metric
    rounds_of_interest: [50]          # further tables: the last_k evaluations up to that round
    out: runs/study                   # where everything goes

Each combination has a folder named after it, so that a second start skips what is finished and resumes what
was cut. All methods of one column and seed get the same seed, hence the same partition and the same cohorts
(but for those that choose their clients themselves). A value that is twice in a list of the grid, in two
spellings perhaps, is one column.
"""

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fedjax_sim import algorithms
from fedjax_sim.config import yaml as config_yaml
from fedjax_sim.config.run import NAMED_BY, RunConfig, check_given
from fedjax_sim.config.sections import OutputConfig
from fedjax_sim.core import paths
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.fields import nearest
from fedjax_sim.records import goal_of

_FIELDS = (
    "base",
    "methods",
    "grid",
    "seeds",
    "reference",
    "metric",
    "goal",
    "last_k",
    "rounds_of_interest",
    "out",
)
_OF_A_RUN = {field.name for field in dataclasses.fields(RunConfig)}


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of a sweep.

    Attributes:
      method: row of the table.
      setting: column of the table, as dotted field -> value, or its name.
      column: the same in words; "" without a grid.
      seed: of the run.
      config: complete, its output folder included.
    """

    method: str
    setting: tuple[tuple[str, Any], ...]
    column: str
    seed: int
    config: RunConfig

    @property
    def name(self) -> str:
        """For messages: method, setting, seed."""
        return ", ".join(part for part in (self.method, self.column, f"seed {self.seed}") if part)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A sweep, checked: every configuration in it is valid.

    Attributes:
      jobs: in the order in which they run: seed by seed, so that a first table is there early.
      reference: label of the method to which others are compared; None compares none.
      metric: of the table.
      goal: max or min.
      last_k: newest values of the metric that are averaged.
      rounds_of_interest: further tables.
      out: folder of everything.
    """

    jobs: tuple[Job, ...]
    reference: str | None
    metric: str
    goal: str
    last_k: int
    rounds_of_interest: tuple[int, ...]
    out: Path


def read_sweep(path: str | Path) -> Sweep:
    """A sweep from its file; relative paths of `base` are seen from the file's folder.

    Raises:
      UserError: the file is missing, or anything in it is wrong.
    """
    mapping = config_yaml.read_yaml(path)
    if "space" in mapping and not any(key in mapping for key in ("methods", "grid")):
        why = "this is the file of a search (it has space), and that of a sweep is wanted"
        raise UserError("sweep", str(path), why, f"Start it with: fedjax-sim tune {path}.")
    of_a_run = [str(key) for key in mapping if key in _OF_A_RUN]
    if of_a_run and not any(key in _FIELDS for key in mapping):
        raise UserError(
            "sweep",
            str(path),
            f"this is the configuration of one run (it has {of_a_run[0]}), and a sweep is wanted",
            f"Start it with: fedjax-sim run {path}. Or name it as `base: {path}` in the file of a sweep.",
        )
    return from_mapping(mapping, Path(path).parent, Path(path).stem)


def as_sweep(given: Sweep | str | Path) -> Sweep:
    """A sweep as it is, or read from its file.

    Raises:
      UserError: see `read_sweep`.
    """
    return given if isinstance(given, Sweep) else read_sweep(given)


def from_mapping(mapping: Mapping[str, Any], home: Path = Path("."), name: str = "sweep") -> Sweep:
    """A sweep from what its file says.

    Args:
      mapping: the file's content.
      home: folder from which a relative `base` is seen.
      name: of the sweep; gives the default of `out`.

    Raises:
      UserError: an unknown field, a configuration that is not valid, two runs of one name, or one run
        under two names.
    """
    for key in mapping:
        if key not in _FIELDS:
            fix = f"Put {key} under `base`." if key in _OF_A_RUN else nearest(str(key), _FIELDS)
            raise UserError(f"sweep.{key}", mapping[key], "no such field", fix)
    base = mapping.get("base", {})
    if isinstance(base, str):
        base = config_yaml.read_yaml(home / paths.local(base, "sweep.base"))
    config = config_yaml.from_dict(base)
    check_given(config)
    methods = mapping.get("methods") or {algorithms.name_of(config.algorithm) or "base": {}}
    grid = mapping.get("grid") or {}
    seeds = mapping.get("seeds", [config.seed])
    _check(methods, grid, seeds, mapping)
    _check_fields(methods, grid)
    out = paths.local(str(mapping.get("out", f"runs/{name}")), "sweep.out").absolute()
    jobs: list[Job] = []
    known: dict[tuple[int, str], Job] = {}
    for seed in seeds:
        for chosen in itertools.product(*(_choices(values) for values in grid.values())):
            setting = tuple((key, name) for key, (name, _) in zip(grid, chosen, strict=True))
            values = {key: value for key, (_, value) in zip(grid, chosen, strict=True)}
            column = ", ".join(
                name if isinstance(grid[key], Mapping) else f"{key.split('.')[-1]} {_value(name)}"
                for key, name in setting
            )
            for label, changes in methods.items():
                made = _apply(config, {**_flat(changes), **_flat(values), "seed": seed}, label)
                where = out / "runs" / _slug(label) / _slug(_path_part(setting)) / f"seed{seed}"
                output = dataclasses.replace(made.output, dir=str(where))
                job = Job(label, setting, column, seed, dataclasses.replace(made, output=output))
                same = known.setdefault((seed, _meaning(made)), job)
                if same is job:
                    jobs.append(job)
                elif same.method != label or any(isinstance(values, Mapping) for values in grid.values()):
                    why = f"it is the same run as {same.name}: no setting differs"
                    raise UserError("sweep", job.name, why, "Remove one of them, or correct its settings.")
                # Else a list has a value in two spellings (0.01 and 1e-2), and the column is there already.
    taken: dict[str | None, Job] = {}
    for job in jobs:
        other = taken.setdefault(job.config.output.dir, job)
        if other is not job:
            raise UserError(
                "sweep", job.name, f"it has the same folder as {other.name}", "Rename one of them."
            )
    metric = str(mapping.get("metric", "accuracy"))
    goal = mapping.get("goal", goal_of(metric))
    rounds = tuple(mapping.get("rounds_of_interest") or ())
    longest = max(job.config.rounds for job in jobs)
    if rounds and max(rounds) > longest:
        why = f"no run has more than {longest} rounds"
        raise UserError("sweep.rounds_of_interest", max(rounds), why, "Leave it out, or raise rounds.")
    for start, field in {"client_accuracy": "per_client", "finetuned": "finetune"}.items():
        if metric.startswith(start) and not any(getattr(job.config.evaluation, field) for job in jobs):
            why, fix = f"no run records it without evaluation.{field}", f"Set evaluation.{field} in base."
            raise UserError("sweep.metric", metric, why, fix)
    return Sweep(tuple(jobs), mapping.get("reference"), metric, goal, mapping.get("last_k", 1), rounds, out)


def _check(methods: Any, grid: Any, seeds: Any, mapping: Mapping[str, Any]) -> None:
    def wrong(field, why, fix):
        return UserError(f"sweep.{field}", mapping.get(field), why, fix)

    if not isinstance(methods, Mapping):
        raise wrong(
            "methods", "a mapping of label to changes is wanted", "Write `FedAvg: {algorithm: fedavg}`."
        )
    _check_text("methods", "a method's label", methods)
    for label, changes in methods.items():
        if not isinstance(changes, Mapping):
            example = changes if isinstance(changes, str) else "…"
            fix = f"Write {{algorithm: {example}}}."
            raise UserError(f"sweep.methods.{label}", changes, "a mapping is wanted", fix)
    if not isinstance(grid, Mapping) or not all(isinstance(v, list | Mapping) and v for v in grid.values()):
        raise wrong(
            "grid",
            "a mapping of dotted field to a list, or to named values, is wanted",
            "Write `partition.alpha: [0.1, 1]`, or `partition.alpha: {strong: 0.1, weak: 1}`.",
        )
    _check_text("grid", "a field", grid)
    for field, values in grid.items():
        if isinstance(values, Mapping):
            _check_text(f"grid.{field}", "a column's name", values)
    if not isinstance(seeds, list) or not seeds or not all(type(s) is int for s in seeds):
        raise wrong("seeds", "a list of whole numbers is wanted", "Write `seeds: [0, 1, 2]`.")
    if len(set(seeds)) < len(seeds):
        raise wrong("seeds", "a seed is there twice", "Name each once.")
    reference = mapping.get("reference")
    if reference is not None and reference not in methods:
        raise wrong("reference", "no such method", nearest(str(reference), map(str, methods)))
    if mapping.get("goal", "max") not in ("max", "min"):
        raise wrong("goal", "not one of the choices", "Choose max or min.")
    last_k = mapping.get("last_k", 1)
    if type(last_k) is not int or last_k < 1:
        raise wrong("last_k", "a whole number from 1 is wanted", "1 takes the newest value.")
    rounds = mapping.get("rounds_of_interest") or []
    if not isinstance(rounds, list) or not all(type(r) is int and r > 0 for r in rounds):
        raise wrong("rounds_of_interest", "a list of rounds is wanted", "Write `[50, 100]`.")


def _check_text(field: str, what: str, names: Mapping[Any, Any]) -> None:
    """Raises UserError for a name that YAML takes for something else than text."""
    for name in names:
        if not isinstance(name, str):
            why = f"{what} is text, and YAML reads this as a value of type {type(name).__name__}"
            raise UserError(f"sweep.{field}", name, why, "Put it in quotes.")


_ITS_OWN = {
    "seed": (
        "a sweep takes its seeds from `seeds`, so that all methods share them",
        "Write `seeds: [0, 1]` beside `methods` and `grid`.",
    ),
    "output.dir": ("a sweep gives each run a folder of its own below `out`", "Set `out` instead."),
}
"""Fields that a sweep sets itself: why, and the way out."""


def _check_fields(methods: Mapping[str, Mapping[str, Any]], grid: Mapping[str, Any]) -> None:
    """Raises UserError for a field that is set twice, or that the sweep sets itself."""

    def free(where: str, value: Any, name: str) -> None:
        if name in _ITS_OWN:
            raise UserError(where, value, *_ITS_OWN[name])

    varied: dict[str, str] = {}
    for field, values in grid.items():
        where = f"sweep.grid.{field}"
        for name in {name for _, value in _choices(values) for name in _names({field: value})}:
            free(where, values, name)
            other = varied.setdefault(name, field)
            if other != field:
                raise UserError(where, values, f"{other} sets {name} too", "Set it in one of them.")
    for label, changes in methods.items():
        where, names = f"sweep.methods.{label}", _names(changes)
        for name in names:
            free(where, changes, name)
            if names.count(name) > 1:
                raise UserError(where, changes, f"it sets {name} twice", "Keep one of them.")
            if name in varied:
                why = f"the grid sets {name} too, and would take the place of the method's"
                raise UserError(where, changes, why, "Set it in one of them.")


def _names(changes: Mapping[str, Any], path: str = "") -> list[str]:
    """The dotted name of everything that is set; one that is set twice is there twice."""
    out: list[str] = []
    for key, value in changes.items():
        dotted = f"{path}{key}"
        if isinstance(value, Mapping) and value:
            out += _names(value, f"{dotted}.")
        elif isinstance(value, str) and dotted in _NAMED_BY:
            out.append(f"{dotted}.{_NAMED_BY[dotted]}")
        else:
            out.append(dotted)
    return out


def _meaning(config: RunConfig) -> str:
    """The same text for configurations of the same run, however their numbers were written."""
    fields = config_yaml.flat(dataclasses.replace(config, output=OutputConfig()))
    return repr(sorted((name, float(v) if type(v) is int else v) for name, v in fields.items()))


def _choices(values: Sequence[Any] | Mapping[str, Any]) -> list[tuple[Any, Any]]:
    """(name, value) of each; a value without a name is its own."""
    if isinstance(values, Mapping):
        return [(str(name), value) for name, value in values.items()]
    return [(value, value) for value in values]


def _flat(changes: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Nested changes by dotted field; an algorithm stays whole, as its fields depend on its name."""
    out: dict[str, Any] = {}
    for key, value in changes.items():
        dotted = f"{path}{key}"
        if isinstance(value, Mapping) and dotted in _SECTIONS:
            out |= _flat(value, f"{dotted}.")
        elif isinstance(value, str) and dotted in NAMED_BY:
            out[f"{dotted}.{NAMED_BY[dotted]}"] = value
        else:
            out[dotted] = value
    return out


_SECTIONS = {
    field.name
    for field in dataclasses.fields(RunConfig)
    if field.name != "algorithm" and dataclasses.is_dataclass(getattr(RunConfig(), field.name))
}
_NAMED_BY = {**NAMED_BY, "algorithm": "name"}


def set_fields(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """`config` with dotted fields set; fields of the algorithm after the algorithm itself.

    Raises:
      UserError: there is no such field, or it cannot have that value.
    """
    nested: dict[str, Any] = {}
    for key, value in sorted(_flat(changes).items(), key=lambda item: item[0].count(".")):
        *way, last = key.split(".")
        place: dict[str, Any] = nested
        for part in way:
            inner = place.setdefault(part, {})
            if isinstance(inner, str):  # `algorithm: fedmr` beside `algorithm.first_stage: 5`
                inner = place[part] = {"name": inner}
            # Never the user's own mapping: two methods may share it.
            place[part] = place = dict(inner)
        place[last] = dict(value) if isinstance(value, Mapping) else value
    return config_yaml.from_dict(nested, base=config)


def _apply(config: RunConfig, changes: Mapping[str, Any], label: str) -> RunConfig:
    """See `set_fields`; a mistake is told as that of a method."""
    try:
        return set_fields(config, changes)
    except UserError as error:
        raise UserError(error.field, error.value, f"(of {label!r}) {error.why}", error.fix) from None


def _value(value: Any) -> str:
    return (
        str(value)
        if isinstance(value, str | int | float)
        else yaml.safe_dump(value, default_flow_style=True).strip()
    )


def _path_part(setting: Sequence[tuple[str, Any]]) -> str:
    return ",".join(f"{key}={_value(value)}" for key, value in setting) or "base"


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._=,+-]+", "_", text).strip("._") or "_"
