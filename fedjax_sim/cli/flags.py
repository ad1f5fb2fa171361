"""Command-line flags for every field of a RunConfig, made by tyro from the dataclasses themselves.

tyro reads a *form*: a copy of the dataclass tree in which each value is taken as it was typed. The form then
goes through `config.from_dict`, so that a mistake on the command line gives the same message as one in YAML.
"""

import dataclasses
import difflib
import inspect
import types
import typing
from collections.abc import Mapping, Sequence, Set
from typing import Annotated, Any, Literal

import tyro
import yaml

from fedjax_sim import algorithms
from fedjax_sim import config as config_lib
from fedjax_sim.cli import forms
from fedjax_sim.cli.forms import Typed, as_yaml, field_texts
from fedjax_sim.config import RunConfig
from fedjax_sim.config import yaml as config_yaml
from fedjax_sim.config.run import sections_of
from fedjax_sim.config.sweep_files import Sweep, read_sweep
from fedjax_sim.core import deprecation
from fedjax_sim.core.algorithm import AlgorithmConfig
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.fields import SYNONYMS, nearest


def parse(
    argv: Sequence[str],
    command: str,
    about: str,
    extra: Mapping[str, str] | None = None,
    or_sweep: bool = False,
) -> tuple:
    """A RunConfig from `[FILE.yaml] [--flags]`, and which of the switches `extra` were set.

    The file gives the defaults, flags override. `--algorithm NAME` chooses the algorithm, whose own fields
    are then flags too; `--algorithm.inner NAME` likewise the one inside, of an algorithm that wraps
    another, and so on.

    Args:
      argv: what the user typed after the subcommand.
      command: for the help text.
      about: likewise.
      extra: switch -> its help (`{"print-config": "…"}`); one that takes a value is written with it
        (`{"on=MACHINE": "…"}`).
      or_sweep: the file may be that of a sweep, of which fields have no flags.

    Returns:
      (RunConfig or Sweep, switch -> its value, "" of those without).

    Raises:
      UserError: an unknown flag, a value of the wrong type or outside its range.
      SystemExit: after `--help`.
    """
    words, section = _help_wanted(list(argv))
    switches = {}
    for name, equals, _ in (switch.partition("=") for switch in extra or {}):
        while not equals and f"--{name}" in words:
            words.remove(f"--{name}")
            switches[name] = ""
        value, words = _named_by(f"--{name}", words) if equals else (None, words)
        if value is not None:
            switches[name] = value
    base: Any = RunConfig()
    if words and not words[0].startswith("-"):
        base, words = _of_file(words, or_sweep and section is None)
    if isinstance(base, Sweep):
        return base, switches
    option, inside = "--algorithm", 0
    while any(word.startswith(option) for word in words):
        name, words = _named_by(option, words)
        if name is not None:
            given: dict[str, Any] = {"name": name}
            for _ in range(inside):
                given = {"inner": given}
            base = config_lib.from_dict({"algorithm": given}, base=base)
        option, inside = f"{option}.inner", inside + 1
    words = [_by_new_name(word, base) for word in words]
    named = algorithms.name_of(base.algorithm)
    form = _form(type(base), base, "")
    prog = f"fedjax-sim {command} [FILE.yaml]"
    if section is not None:
        if not section and inside:
            section = "algorithm"
        shown = _with_switches(_part(form, section), extra or {})
        forms.filled(shown, prog, _told(command, about, form, section, named), ["--help"])
    _check_known(words, form)
    try:
        filled = forms.filled(form, prog, about, words)
    except SystemExit as end:
        if end.code:
            # Unknown flags and wrong values never get here: what is left is a flag without its value.
            raise UserError(
                "command line", " ".join(words), "a flag lacks its value", f"See fedjax-sim {command} --help."
            ) from None
        raise
    given = _given(filled, base)
    if "algorithm" in given:
        given["algorithm"] = {"name": named, **given["algorithm"]}
    return config_lib.from_dict(given, base=base), switches


# --- help ---------------------------------------------------------------------------------------------

EVERYTHING = "all"
"""After `--help`: the flags of all sections."""
_NOT_TYPED = ("version", "given")
"""Fields of a configuration that are for files."""


def _help_wanted(words: list[str]) -> tuple[list[str], str | None]:
    """(the other words, the section whose flags `--help SECTION` asks for: "" for none, None: no help)."""
    place = next((place for place, word in enumerate(words) if word in ("-h", "--help")), None)
    if place is None:
        return words, None
    named = words[place + 1 : place + 2]
    if not named or named[0].startswith("-"):
        return words[:place] + words[place + 1 :], ""
    known = [*sections_of(RunConfig), EVERYTHING]
    if named[0] not in known:
        raise UserError("--help", named[0], "there is no such section", nearest(named[0], known))
    return words[:place] + words[place + 2 :], named[0]


def _part(form: type, section: str) -> type:
    """The form with the flags of one section, or with those outside of all for ""."""
    inside = sections_of(form)
    kept = [
        (field.name, field.type, _again(field))
        for field in dataclasses.fields(form)
        if section == EVERYTHING or (field.name == section if section else field.name not in inside)
        if field.name not in _NOT_TYPED
    ]
    made = dataclasses.make_dataclass(form.__name__, kept, frozen=True)
    made.__doc__ = form.__doc__
    return made


def _told(command: str, about: str, form: type, section: str, algorithm: str | None) -> str:
    """What the help says above the flags."""
    parts = [about, "With no FILE.yaml the defaults hold; flags override both."]
    if section in ("algorithm", EVERYTHING):
        parts.append(
            f"The flags under `algorithm` are those of {algorithm}; `--algorithm NAME` shows and takes "
            f"another's ({', '.join(algorithms.CONFIGS)})."
        )
    if not section:
        parts[-1] += (
            " Every field of the configuration is a flag, --SECTION.FIELD VALUE. "
            f"`fedjax-sim {command} --help SECTION` lists those of one section, `--help {EVERYTHING}` "
            "every one:"
        )
        texts = field_texts(RunConfig)
        parts.append("\n".join(f"- {name}: {texts[name]}" for name in sections_of(form)))
    return "\n\n".join(parts)


def _of_file(words: list[str], or_sweep: bool) -> tuple[RunConfig | Sweep, list[str]]:
    """(what the file that is the first word describes, the other words); of a sweep there may be none."""
    file, *others = words
    if not or_sweep or config_yaml.of_a_sweep(config_lib.read_yaml(file)) is None:
        return config_lib.read_config(file), others
    if others:
        why = f"{file} is the file of a sweep, and fields are flags of one run"
        raise UserError("command line", others[0], why, "Change the file, or leave this out.")
    return read_sweep(file), others


def _by_new_name(word: str, base: Any) -> str:
    """A flag of a renamed field by the field's new name; any other word as it is."""
    flag, equals, value = word.partition("=")
    *sections, field = flag.removeprefix("--").split(".")
    for section in sections:
        base = getattr(base, section.replace("-", "_"), None)
    name = field.replace("-", "_")
    no = "no-" if name.startswith("no_") and name[3:] in deprecation.of_class(type(base)) else ""
    renamed = deprecation.of_class(type(base)).get(name[3:] if no else name)
    if renamed is None or not flag.startswith("--"):
        return word
    new = "--" + ".".join([*sections, no + renamed.to.replace("_", "-")])
    deprecation.warn(flag, new, renamed)
    return new + equals + value


def _named_by(option: str, words: list[str]) -> tuple[str | None, list[str]]:
    """Takes `--algorithm NAME` (that option, also `--algorithm.name`, and with `=`) out of the words."""
    name, rest, i = None, [], 0
    while i < len(words):
        flag, equals, value = words[i].partition("=")
        if flag in (option, f"{option}.name"):
            if not equals:
                i += 1
                value = words[i] if i < len(words) else ""
            name = value
        else:
            rest.append(words[i])
        i += 1
    return name, rest


# --- the form -----------------------------------------------------------------------------------------


def _form(cls: type, base: Any, path: str) -> type:
    """The dataclass of which tyro makes flags; its defaults are those of `base`."""
    hints = typing.get_type_hints(cls)
    texts = field_texts(cls)
    fields = []
    for field in dataclasses.fields(cls):
        value, name = getattr(base, field.name), f"{path}{field.name}"
        if hints[field.name] is AlgorithmConfig or dataclasses.is_dataclass(hints[field.name]):
            inner = _form(type(value), value, f"{name}.")
            fields.append((field.name, inner, dataclasses.field(default_factory=inner)))
            continue
        kind = _kind(hints[field.name], value, texts.get(field.name, ""))
        fields.append((field.name, kind, dataclasses.field(default_factory=lambda value=value: value)))
    form = dataclasses.make_dataclass(cls.__name__, fields, frozen=True)
    form.__doc__ = (inspect.getdoc(cls) or "").split("\n\n")[0]
    return form


def _with_switches(form: type, extra: Mapping[str, str]) -> type:
    """The form with a command's own switches, which are no fields of a configuration, for its help."""
    own = []
    for switch, text in extra.items():
        name, _, metavar = switch.partition("=")
        told = tyro.conf.arg(help=text, name=name, help_behavior_hint="")
        kind = Annotated[bool, tyro.conf.FlagCreatePairsOff, told]
        if metavar:
            spec = forms.as_typed(metavar, str)
            kind = Annotated[Any, spec, told]
        default = dataclasses.field(default=None if metavar else False)
        own.append((f"own_{name.replace('-', '_')}", kind, default))
    fields = [(field.name, field.type, _again(field)) for field in dataclasses.fields(form)]
    made = dataclasses.make_dataclass(form.__name__, [*own, *fields], frozen=True)
    made.__doc__ = form.__doc__
    return made


def _again(field: dataclasses.Field) -> Any:
    """A field like another one."""
    if field.default_factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=field.default_factory)
    return dataclasses.field(default=field.default)


def _kind(hint: Any, default: Any, text: str) -> Any:
    help_text = tyro.conf.arg(help=text)
    if hint is bool:
        return Annotated[bool, help_text]
    spec = forms.as_typed(_metavar(hint), _shown)
    return Annotated[Any, spec, help_text]


def _metavar(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return "|".join(_metavar(arg) for arg in args)
    if origin is Literal:
        return "{" + ",".join(map(str, args)) + "}"
    if hint is type(None):
        return "null"
    if origin in (tuple, list):
        return f"[{_metavar(args[0])}, …]"
    if origin in (dict, Mapping) or hint is dict:
        return "{KEY: VALUE}"
    return str(getattr(hint, "__name__", "value")).upper()


def _shown(value: Any) -> str:
    if dataclasses.is_dataclass(value):
        value = config_lib.to_dict(value)
    if isinstance(value, str):
        return value
    if isinstance(value, tuple):
        value = list(value)
    return yaml.safe_dump(value, default_flow_style=True, width=1000).strip().removesuffix("\n...")


# --- and back -----------------------------------------------------------------------------------------


def _given(filled: Any, base: Any, path: str = "") -> dict[str, Any]:
    """The fields that were typed, as the mapping that YAML would have given."""
    out: dict[str, Any] = {}
    for field in dataclasses.fields(base):
        value, default = getattr(filled, field.name), getattr(base, field.name)
        if dataclasses.is_dataclass(value):
            inner = _given(value, default, f"{path}{field.name}.")
            if inner:
                out[field.name] = inner
        elif isinstance(value, Typed):
            out[field.name] = meant(
                str(value), typing.get_type_hints(type(base))[field.name], path + field.name
            )
        elif value != default:
            out[field.name] = value
    return out


def meant(text: str, hint: Any, path: str) -> Any:
    """A word as its field takes it: as text where text is wanted, as YAML everywhere else.

    Args:
      text: what was typed.
      hint: the field's annotation.
      path: its dotted name, for messages.

    Raises:
      UserError: it is not valid YAML, or names a key twice.
    """
    args = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    literals = [
        choice for arg in args if typing.get_origin(arg) is Literal for choice in typing.get_args(arg)
    ]
    if text in literals:
        return text
    if text in ("null", "None") and type(None) in args:
        return None
    if str in args:
        return text
    return as_yaml(text, path, f"Write it as in YAML: {_metavar(hint)}.")


def _check_known(words: Sequence[str], form: type) -> None:
    known = set(_flags(form, "")) | {"--help", "--tyro-print-completion", "--tyro-write-completion"}
    readable = {flag.replace("_", "-") for flag in known}
    switches = readable - _valued(form)
    skip = False
    for place, word in enumerate(words):
        flag, equals, _ = word.partition("=")
        if skip:
            skip = False
            continue
        if not flag.startswith("-"):
            before = words[place - 1] if place else ""
            fix = _switch(before, switches) if before else "Only the first word may be a FILE.yaml."
            raise UserError("command line", word, "a flag is wanted here", fix)
        if equals and flag.replace("_", "-") in switches:
            raise UserError("command line", word, "this flag takes no value", _switch(flag, switches))
        if flag.replace("_", "-") not in readable:
            value = word.partition("=")[2] if equals else (words[place + 1] if place + 1 < len(words) else "")
            raise UserError(flag, value, "no such flag", _nearest(flag.replace("_", "-"), readable))
        skip = not equals and flag.replace("_", "-") in _valued(form)


def _nearest(flag: str, known: Set[str]) -> str:
    """What was meant by a flag that there is not: `--local.lr` by `--lr`, `--model.name` by `--model`."""
    order = [*sections_of(RunConfig)]
    names = {one.removeprefix("--"): one for one in sorted(known) if one.startswith("--")}
    wanted = flag.lstrip("-")
    head, _, last = wanted.rpartition(".")
    if head == "algorithm":
        own = [name.removeprefix("algorithm.") for name in names if name.startswith("algorithm.")]
        close = difflib.get_close_matches(last, own, n=3, cutoff=0.6)
        if close:
            return f"Did you mean {' or '.join(f'--algorithm.{name}' for name in close)}?"
        return f"The algorithm that is chosen has {', '.join(own) or 'no settings'}."
    called = SYNONYMS.get(last.replace("-", "_"), wanted).replace("_", "-")
    inside = [one for name, one in names.items() if name.rpartition(".")[2] == called]
    inside = [one for one in inside if one.startswith(f"--{head}.")] or inside
    inside.sort(key=lambda one: order.index(one[2:].partition(".")[0]) if "." in one else -1)
    section = config_lib.NAMED_BY.get(wanted)
    if section is not None:
        inside = [names[f"{wanted}.{section}"], *inside]
    if inside:
        return f"Did you mean {' or '.join(inside[:3])}?"
    for place in (lambda name: name, lambda name: name.rpartition(".")[2]):
        by_word: dict[str, list[str]] = {}
        for name, one in names.items():
            by_word.setdefault(place(name), []).append(one)
        close = difflib.get_close_matches(wanted.lower(), by_word, n=1, cutoff=0.7)
        if close:
            return f"Did you mean {' or '.join(by_word[close[0]][:3])}?"
    return "See --help all."


def _switch(flag: str, switches: Set[str]) -> str:
    """How the flag before a stray word is written, if it is one of those without a value."""
    flag = flag.replace("_", "-")
    head, dot, name = flag.removeprefix("--").rpartition(".")
    name = name.removeprefix("no-")
    if flag not in switches or f"--{head}{dot}no-{name}" not in switches:
        return "Only the first word may be a FILE.yaml."
    return f"Write --{head}{dot}{name} or --{head}{dot}no-{name}."


def _flags(form: type, path: str) -> list[str]:
    out = []
    for field in dataclasses.fields(form):
        if dataclasses.is_dataclass(field.type):
            out += _flags(typing.cast(type, field.type), f"{path}{field.name}.")
        else:
            out.append(f"--{path}{field.name}")
            if typing.get_args(field.type)[0] is bool:
                out.append(f"--{path}no-{field.name}")
    return out


def _valued(form: type, path: str = "") -> set[str]:
    out: set[str] = set()
    for field in dataclasses.fields(form):
        if dataclasses.is_dataclass(field.type):
            out |= _valued(typing.cast(type, field.type), f"{path}{field.name}.")
        elif typing.get_args(field.type)[0] is not bool:
            out.add(f"--{path}{field.name}".replace("_", "-"))
    return out
