"""Configurations as mappings and YAML: written, read, and renewed from older versions."""

import dataclasses
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedjax_sim import algorithms
from fedjax_sim.config import plugins
from fedjax_sim.config.run import NAMED_BY, VERSION, RunConfig, _check_version
from fedjax_sim.core import deprecation, paths
from fedjax_sim.core.algorithm import AlgorithmConfig
from fedjax_sim.core.documents import dump_yaml, parse_yaml
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.fields import coerce, nearest

# --- reading and writing ------------------------------------------------------------------------------


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain dicts and lists that YAML can hold; an algorithm gains its `name`."""
    out: dict[str, Any] = {}
    name = algorithms.name_of(config) or plugins.name_of(config)
    if name is not None:
        out["name"] = name
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(config, RunConfig) and field.name in plugins.LISTS:
            if value:  # as before there were such lists, where there are none
                out[field.name] = plugins.plain(value, to_dict)
            continue
        out[field.name] = to_dict(value) if dataclasses.is_dataclass(value) else _plain(value)
    return out


def flat(config: Any) -> dict[str, Any]:
    """`to_dict` by dotted field: `partition.alpha`, `algorithm.inner.mu`, `callbacks.0.patience` …"""
    out: dict[str, Any] = {}

    def walk(mapping: Mapping[str, Any], path: str) -> None:
        for key, value in mapping.items():
            if not path and key in plugins.LISTS:
                value = {str(place): entry for place, entry in enumerate(value)}
            if isinstance(value, Mapping) and value:
                walk(value, f"{path}{key}.")
            else:
                out[f"{path}{key}"] = value

    walk(to_dict(config), "")
    return out


def from_dict(mapping: Mapping[str, Any], cls: type = RunConfig, path: str = "", base: Any = None) -> Any:
    """The dataclass that `mapping` describes; fields that it does not name come from `base` or the default.

    In the place of a section that `NAMED_BY` lists a bare name may stand: `model: lenet`.

    Args:
      mapping: field -> value, sections within; the name alone for one of `NAMED_BY`.
      cls: the dataclass that is wanted.
      path: of the section, with a dot behind it, for messages; "" at the top.
      base: an object of `cls`; None: the defaults.

    Raises:
      UserError: an unknown field, or a value of the wrong type; names the field by its dotted path.

    In the place of a section that `NAMED_BY` lists a bare name may stand: `model: lenet`.
    """
    section = path.rstrip(".")
    if isinstance(mapping, str) and section in NAMED_BY:
        mapping = {NAMED_BY[section]: mapping}
    if not isinstance(mapping, Mapping):
        raise UserError(
            section or "config", mapping, "a mapping is wanted here", "Write `field: value` lines."
        )
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    if cls is RunConfig:
        mapping = migrate_v1(mapping)  # first: in another version anything may be unknown
    mapping = deprecation.current(cls, mapping, path)
    values = {} if base is None else {name: getattr(base, name) for name in names}
    for key, value in mapping.items():
        dotted = f"{path}{key}"
        if key not in names:
            raise UserError(dotted, value, "no such field", _nearest(str(key), names))
        inner = values.get(key)
        if cls is RunConfig and key in plugins.LISTS:
            values[key] = plugins.entries_of(key, value, from_dict)
        elif hints[key] is AlgorithmConfig:
            values[key] = _algorithm(value, dotted, inner)
        elif dataclasses.is_dataclass(hints[key]):
            values[key] = from_dict(value, typing.cast(type, hints[key]), f"{dotted}.", inner)
        else:
            values[key] = coerce(value, hints[key], dotted, text=True)
    for field in dataclasses.fields(cls):
        wanted = field.default is field.default_factory is dataclasses.MISSING
        if wanted and field.name not in values:
            raise UserError(f"{path}{field.name}", None, "it has no default", "Set it.")
    try:
        return cls(**values)
    except UserError as error:  # an algorithm does not know that it is inside another
        raise error.moved("algorithm.", path) if path.startswith("algorithm.") else error from None


def _nearest(key: str, names: list[str]) -> str:
    """What was meant by a field that there is not; perhaps one of another section."""
    known = [name for name in flat(RunConfig()) if "." in name and not name.startswith("given.")]
    meant = [name for name in known if name == key or name.rpartition(".")[2] == key]
    if key != "name" and meant:
        section, _, field = meant[0].partition(".")
        return f"Did you mean {' or '.join(meant)}? Write {section}: {{{field}: …}}."
    return nearest(key, names)


def read_config(path: str | Path) -> RunConfig:
    """A RunConfig from a YAML file.

    Raises:
      UserError: the file is missing, is not YAML, or holds a wrong field or value.
    """
    mapping = read_yaml(path)
    key = of_a_sweep(mapping)
    if key is not None:
        why = f"this is the file of a sweep (it has {key}), and the configuration of one run is wanted"
        raise UserError("config", str(path), why, f"Start it with: fedjax-sim sweep {path}.")
    return from_dict(mapping)


def of_a_sweep(mapping: Mapping[str, Any]) -> str | None:
    """The key by which a file is one of a sweep, and not of a run."""
    return next((key for key in ("methods", "grid", "seeds") if key in mapping), None)


def as_config(given: Any) -> RunConfig:
    """A RunConfig as it is, or that of a YAML file whose path is given.

    Raises:
      UserError: as `read_config`; or it is neither.
    """
    if isinstance(given, RunConfig):
        return given
    if isinstance(given, str | Path):
        return read_config(given)
    fix = (
        "Give fs.RunConfig(…), or the path of its YAML file. A mapping becomes one by fs.config.from_dict(…)."
    )
    raise UserError("config", type(given).__name__, "this is not the configuration of a run", fix)


def read_yaml(path: str | Path) -> Mapping[str, Any]:
    """The mapping in a YAML file.

    Raises:
      UserError: the file is missing, is not a YAML mapping, or has a key twice.
    """
    file = paths.local(path, "config")
    try:
        loaded = parse_yaml(file.read_text())
    except FileNotFoundError:
        raise UserError("config", str(path), "no such file", "Check the path.") from None
    except (ValueError, OSError) as error:
        raise UserError("config", str(path), f"it cannot be read: {error}", "Correct the file.") from None
    if not isinstance(loaded, Mapping):
        raise UserError("config", str(path), "it holds no mapping", "Write `field: value` lines.")
    return loaded


def dump(config: RunConfig) -> str:
    """A RunConfig as YAML, every field written out."""
    return dump_yaml(to_dict(config))


def migrate_v1(mapping: Mapping[str, Any]) -> Mapping[str, Any]:
    """A run's configuration of an older version as one of this.

    Since version 2 a server optimiser is an algorithm around another, where it was FedAvg's, and SCAFFOLD
    counts momentum unless told otherwise.
    """
    version = mapping.get("version", VERSION)
    if version != 1:
        _check_version(version)
        return mapping

    def migrated(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        fields = {key: migrated(inner) for key, inner in value.items()}
        if fields.get("name") == "scaffold":
            fields.setdefault("divisor", "steps")
        if fields.get("name", "fedavg") != "fedavg":
            return fields
        optimizer = fields.pop("server_optimizer", "none")
        server = {"lr": fields.pop("server_lr", 1.0), "options": fields.pop("server_options", {})}
        if optimizer == "none":
            return fields
        return {"name": "fedopt", "optimizer": optimizer, **server, "inner": {"name": "fedavg", **fields}}

    return {**mapping, "version": VERSION, "algorithm": migrated(mapping.get("algorithm", "fedavg"))}


def _algorithm(value: Any, path: str, base: Any) -> Any:
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping):
        raise UserError(path, value, "a name or a mapping with `name` is wanted", "Write `name: fedavg`.")
    fields = dict(value)
    name = fields.pop("name", None if base is None else algorithms.name_of(base))
    cls = algorithms.named(name, f"{path}.name")
    try:
        return from_dict(fields, cls, f"{path}.", base if isinstance(base, cls) else None)
    except UserError as error:
        own = "algorithm."  # as an algorithm's own checks call its fields, wherever it stands
        if path == "algorithm" or not error.field.startswith(own) or error.field.startswith(f"{path}."):
            raise
        why = str(error).split(": ", 1)[-1]
        raise UserError(f"{path}.{error.field.removeprefix(own)}", error.value, why, "") from None


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, Path) else value
