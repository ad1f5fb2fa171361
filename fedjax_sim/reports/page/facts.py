"""A page's facts: time, traffic, versions, what to be warned of, the configuration, how to repeat it."""

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedjax_sim import algorithms, records, runs
from fedjax_sim import config as config_lib
from fedjax_sim.config import RunConfig
from fedjax_sim.core.errors import UserError
from fedjax_sim.records import Lap, goal_of, plots
from fedjax_sim.reports.page.curves import Curves
from fedjax_sim.reports.page.entries import Entry, duration
from fedjax_sim.runs import own_code
from fedjax_sim.runs.folder import Folder
from fedjax_sim.runs.parts import human

Line = tuple[str, str]
"""(what, its value) of a list of facts."""


def provenance_of(entry: Entry) -> dict[str, Any]:
    """What a run wrote down of itself; nothing of one that is in memory or cannot be read."""
    if entry.folder is None or entry.run is None:
        return {}
    try:
        return Folder(entry.folder).records.provenance()
    except UserError:
        return {}


def laps_of(entry: Entry) -> list[Lap]:
    """What each round of a run cost; nothing of one that is in memory."""
    if entry.folder is None or entry.run is None:
        return []
    try:
        return Folder(entry.folder).records.laps()
    except UserError:
        return []


# --- numbers --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Number:
    """A metric of one group of seeds in a few numbers, as text.

    Attributes:
      name: of the metric.
      last: its newest value, mean ± deviation.
      best: its best value, and in which round; – of what is not the better for being large or small.
      rounds: how many values it has.
    """

    name: str
    last: str
    best: str
    rounds: str


_NO_GOAL = ("lr", "padding_waste")
"""Of which neither much nor little is better."""


def numbers(found: Curves) -> list[Number]:
    """Every metric of a page that has one row and one setting."""
    told = []
    for name in found.metrics:
        curve = found.curves.get((name, found.rows[0], found.columns[0]))
        if curve is None or not np.isfinite(curve.mean).any():
            continue
        known = np.flatnonzero(np.isfinite(curve.mean))
        last = known[-1]
        pick = np.nanargmax if goal_of(name) == "max" else np.nanargmin
        best = int(pick(curve.mean))
        spread = math.nan if curve.deviation is None else float(curve.deviation[last])
        told.append(
            Number(
                plots.label_of(name),
                short(float(curve.mean[last])) + (f" ± {short(spread)}" if math.isfinite(spread) else ""),
                "–" if name in _NO_GOAL else f"{short(curve.mean[best])} in round {curve.rounds[best]:,}",
                f"{len(known):,}",
            )
        )
    return told


def short(value: float) -> str:
    """Four decimals of numbers about 1, four digits of others."""
    if not math.isfinite(value):
        return "–"
    return f"{value:.4f}" if 0.01 <= abs(value) < 100 or value == 0 else f"{value:.4g}"


# --- time -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Cost:
    """What the runs of one row took, as text; means over its runs.

    Attributes:
      row: of the table.
      runs: how many there are.
      wall: seconds of all rounds of a run.
      cpu: CPU time of them.
      first: the first round, which compiles.
      later: a round of those after the first call (`records.pace`).
      clients: clients a second, of the same rounds.
    """

    row: str
    runs: str
    wall: str
    cpu: str
    first: str
    later: str
    clients: str


def costs(entries: Sequence[Entry]) -> list[Cost]:
    """What the rounds of each row took."""
    rows: dict[str, list[tuple[Entry, list[Lap]]]] = {}
    for entry in entries:
        if entry.seen:
            rows.setdefault(entry.row, []).append((entry, laps_of(entry)))
    told = []
    for row, own in rows.items():
        wall = [entry.run.seconds for entry, _ in own if entry.run is not None]
        cpu = [entry.run.cpu_seconds for entry, _ in own if entry.run is not None]
        known = [seconds for seconds in cpu if seconds is not None]
        first = [laps[0].seconds for _, laps in own if laps]
        paces = [pace for _, laps in own if (pace := records.pace(laps)) is not None]
        told.append(
            Cost(
                row,
                str(len(own)),
                duration(float(np.mean(wall))),
                duration(float(np.mean(known))) if len(known) == len(own) else "–",
                duration(float(np.mean(first))) if first else "–",
                duration(float(np.mean([seconds for seconds, _ in paces]))) if paces else "–",
                f"{np.mean([clients for _, clients in paces]):,.0f}" if paces else "–",
            )
        )
    return told


# --- traffic --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What a method sends, as text.

    Attributes:
      row: of the table.
      formula: models down + up for a client of a cohort, by the method's definition.
      model: size of one model.
      down: bytes that the server sends in a round.
      up: that it receives.
      all: both, of all rounds so far.
    """

    row: str
    formula: str
    model: str
    down: str
    up: str
    all: str


def traffic(entries: Sequence[Entry]) -> list[Traffic]:
    """What each row sends, of its first run that has a round."""
    first: dict[str, Entry] = {}
    for entry in entries:
        if entry.seen:
            first.setdefault(entry.row, entry)
    sizes: dict[str, int | None] = {}
    told = []
    for row, entry in first.items():
        assert entry.run is not None
        key = f"{entry.config.model} {entry.config.data} {entry.config.given}"
        if sizes.get(key) is None:
            sizes[key] = model_bytes(entry.folder)
        formula, laps = sends(entry.config.algorithm), laps_of(entry)
        size, cohort = sizes[key], laps[-1].clients if laps else None
        counted = re.fullmatch(r"(\d+)(?: \+ (\d+)(?: and a number)?)?", formula)
        cells = ["–"] * 3
        if counted and size is not None and cohort is not None:
            down, up = (int(part or 0) * size * cohort for part in counted.groups())
            cells = [human(down), human(up), human((down + up) * entry.run.rounds)]
        told.append(Traffic(row, formula or "not stated", "–" if size is None else human(size), *cells))
    return told


def sends(algorithm: Any) -> str:
    """Models down + up, of the method; of one around another that adds nothing, the inner one's."""
    card = getattr(type(algorithm), "card", None)
    own = getattr(card, "sends", "")
    inner = getattr(algorithm, "inner", None)
    return sends(inner) if inner is not None and own in ("", "1 + 1") else own


def model_bytes(folder: Path | None) -> int | None:
    """Bytes of the deployed model, by the shapes that a checkpoint tells of; None where there is none."""
    if folder is None:
        return None
    home = Folder(folder).checkpoints
    for path in sorted(home.glob("*/about/metadata"), reverse=True):
        try:
            leaves = json.loads(path.read_text())["model"]
            return sum(math.prod(leaf["shape"]) * np.dtype(leaf["dtype"]).itemsize for leaf in leaves)
        except (OSError, ValueError, LookupError, TypeError):
            continue
    return None


# --- where it ran ---------------------------------------------------------------------------------------


def places(entries: Sequence[Entry]) -> list[Line]:
    """Machine, devices, layout, versions and revision; what differs between runs is said to."""
    told = [provenance_of(entry) for entry in entries]
    told = [about for about in told if about]
    if not told:
        return []

    def all_of(get: Any) -> str:
        known = Counter(filter(None, (get(about) for about in told)))
        return "; ".join(
            f"{value} ({count} runs)" if len(known) > 1 else value for value, count in known.items()
        )

    facts = {
        "Devices": _devices,
        "Processor": _processor,
        "System": lambda about: about.get("platform", ""),
        "Layout": _layout,
        "Calibration": _calibration,
        "Versions": lambda about: ", ".join(f"{n} {v}" for n, v in about.get("versions", {}).items() if v),
        "Package at": lambda about: _revision(about.get("git", {}).get("package")),
        "Working directory at": lambda about: _revision(about.get("git", {}).get("working_directory")),
        "Data": _data,
    }
    return [(name, value) for name, get in facts.items() if (value := all_of(get))]


def _devices(about: Mapping[str, Any]) -> str:
    found = about.get("devices", {})
    if not found:
        return ""
    processes = found.get("processes", 1)
    return f"{found.get('count')} × {found.get('kind')}" + (
        f" in {processes} processes" if processes > 1 else ""
    )


def _processor(about: Mapping[str, Any]) -> str:
    cpu = about.get("cpu", {})
    memory = f", {human(cpu['memory_bytes'])} of memory" if cpu.get("memory_bytes") else ""
    return f"{cpu.get('model')}, {cpu.get('cores')} cores{memory}" if cpu else ""


def _layout(about: Mapping[str, Any]) -> str:
    layout = about.get("layout", {})
    names = {"devices": "devices", "wave": "clients at once on a device", "conv": "convolutions as"}
    told = [(text, layout.get(name)) for name, text in names.items()]
    return ", ".join(f"{text} {value}" for text, value in told if value not in (None, ""))


def _calibration(about: Mapping[str, Any]) -> str:
    found = about.get("layout", {}).get("calibration")
    return "" if not found else found if isinstance(found, str) else json.dumps(found)


def _revision(git: Mapping[str, Any] | None) -> str:
    if not git or "commit" not in git:
        return ""
    return f"{git['commit'][:12]}" + (", with changes that are not committed" if git.get("modified") else "")


def _data(about: Mapping[str, Any]) -> str:
    found = about.get("data", {})
    parts = [
        f"{name.replace('_', ' ')} {' × '.join(map(str, part['shape']))} (CRC-32 {part['crc32']:08x})"
        for name, part in found.items()
        if isinstance(part, Mapping) and "shape" in part
    ]
    return f"{found.get('name')}: {', '.join(parts)}" if found else ""


# --- warnings -------------------------------------------------------------------------------------------


def cautions(entries: Sequence[Entry]) -> list[str]:
    """What a reader of the numbers must know."""
    told = _not_finite(entries)
    if undefined := _undefined(entries):
        told.append(
            f"Not defined everywhere, for instance for clients with a single class: {', '.join(undefined)}. "
            "Means are over what is defined."
        )
    about = [(entry, provenance_of(entry)) for entry in entries]
    changed = [entry for entry, known in about if _modified(known)]
    if changed:
        whose = "" if len(entries) == 1 else f" of {len(changed)} of {len(entries)} runs"
        told.append(
            f"The source{whose} had changes that are not committed: its revision alone does not repeat it."
        )
    for part in ("versions", "devices"):
        had = [known[part] for _, known in about if part in known]
        # Pillow's version is told of runs on pictures alone, and older records tell of fewer packages.
        shared = sorted(set.intersection(*map(set, had))) if had else []
        kinds = {json.dumps([one[name] for name in shared]) for one in had}
        if len(kinds) > 1:
            told.append(f"The runs were made with {len(kinds)} different sets of {part}.")
    told += own_code.cautions((entry.name, known) for entry, known in about)
    if any(entry.config.execution.debug for entry in entries):
        told.append("execution.debug was on: the rounds ran without jit, and their times say nothing.")
    return told


def _not_finite(entries: Sequence[Entry]) -> list[str]:
    """A line for each metric that was NaN or infinite somewhere."""
    lost: dict[str, list[tuple[str, np.ndarray]]] = {}
    for entry in entries:
        for name in _names(entry, "nonfinite/"):
            assert entry.run is not None
            rounds = entry.run.metrics.rounds_of(f"nonfinite/{name}")
            lost.setdefault(name, []).append((entry.name, rounds))
    told = []
    for metric, where in lost.items():
        count, (first, rounds) = sum(len(own) for _, own in where), where[0]
        runs_ = f" in {len(where)} runs" if len(where) > 1 else ""
        often = "once" if count == 1 else f"{count:,} times"
        told.append(f"{metric} was not finite {often}{runs_}, first in round {rounds.min()} of {first}.")
    return told


def _undefined(entries: Sequence[Entry]) -> list[str]:
    return list(dict.fromkeys(name for entry in entries for name in _names(entry, "undefined/")))


def _names(entry: Entry, prefix: str) -> list[str]:
    known = [] if entry.run is None else entry.run.metrics.names()
    return [name.removeprefix(prefix) for name in known if name.startswith(prefix)]


def _modified(about: Mapping[str, Any]) -> bool:
    return any((part or {}).get("modified") for part in about.get("git", {}).values())


# --- configuration --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Setting:
    """A line of a configuration.

    Attributes:
      text: of YAML.
      changed: whether it is not the default.
      default: what that is; "" where it is the same.
    """

    text: str
    changed: bool
    default: str = ""


def settings(config: RunConfig) -> list[Setting]:
    """A configuration as lines of YAML, those marked that differ from the default."""
    config = runs.portable(config)
    has, usual = config_lib.flat(config), config_lib.flat(_defaults(config))
    lines, way = [], []
    for text in config_lib.dump(config).splitlines():
        found = re.match(r"( *)([^\s:#-][^:]*):(.*)", text)
        if found is None:  # goes on from the line before
            lines.append(Setting(text, bool(lines) and lines[-1].changed))
            continue
        depth = len(found[1]) // 2
        way = [*way[:depth], found[2].strip("'\"")]
        name = ".".join(way)
        if name not in has and found[3].strip() in ("", "{}"):
            lines.append(Setting(text, False))
            continue
        differs = has.get(name) != usual.get(name)
        default = "" if not differs else str(usual[name]) if name in usual else "not set"
        lines.append(Setting(text, differs, default))
    return lines


def _defaults(config: RunConfig) -> RunConfig:
    """The default configuration, with the default settings of the same algorithm."""
    try:
        return dataclasses.replace(RunConfig(), algorithm=type(config.algorithm)())
    except (TypeError, UserError):  # of one's own, without defaults
        return RunConfig()


def described(config: RunConfig) -> list[Line]:
    """What a run is, in the few settings that a reader looks for first."""
    given = config.given
    local = config.local
    count, unit = (local.steps, "step") if local.epochs is None else (local.epochs, "epoch")
    train = f"{count} {unit}{'s' * (count != 1)}"
    rate = f"lr {local.lr:g}" + (f", {local.schedule}" if local.schedule != "constant" else "")
    momentum = f", momentum {local.momentum:g}" if local.momentum else ""
    return [
        ("Algorithm", given.get("algorithm", algorithms.label(config.algorithm))),
        ("Model", given.get("model", config.model.name)),
        ("Local training", f"{train}, batch {local.batch_size}, {local.optimizer}, {rate}{momentum}"),
    ]
