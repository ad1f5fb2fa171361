"""Commands as frozen dataclasses: the fields are the flags, the docstring is the help.

A field is made by `words`, `value`, `switch` or `configuration`. tyro makes the parser and the help of them;
what it would refuse is refused before, with the package's own one-line errors.
"""

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

from fedjax_sim.cli import forms
from fedjax_sim.core import fields
from fedjax_sim.core.errors import UserError

HELP = ("-h", "--help")


class Command(Protocol):
    """What a command line becomes; frozen, and called once.

    Attributes:
      examples: (command line, what it is for) of each.
    """

    examples: ClassVar[Sequence[tuple[str, str]]]

    def __call__(self) -> int:
        """Does it. -> the exit status."""
        ...


# --- fields -----------------------------------------------------------------------------------------------


def words(metavar: str, least: int = 0, most: int | None = None, kind: str = "file") -> Any:
    """The words that are no flags: a field of type `tuple[str, ...]`.

    Args:
      metavar: what they are, in capitals.
      least: how many have to be there; fewer are told as a mistake.
      most: how many may be; None: any number.
      kind: what the shell completes: `file`, `folder`, `yaml`, or the words themselves with blanks between.
    """
    told = {"kind": "words", "metavar": metavar, "least": least, "most": most, "complete": kind}
    return dataclasses.field(default=(), metadata=told)


def value(metavar: str, default: Any = None, flag: str = "", kind: str = "", alone: str = "") -> Any:
    """A flag with a value.

    Args:
      metavar: what it is, in capitals.
      default: where it is left out.
      flag: `--name`, where it is not the field's own.
      kind: what the shell completes, as of `words`; "": nothing.
      alone: the value if the flag stands alone, of one whose value is a number that may be left out.
    """
    told = {"kind": "value", "metavar": metavar, "flag": flag, "complete": kind, "alone": alone}
    return dataclasses.field(default=default, metadata=told)


def switch(flag: str = "") -> Any:
    """A flag without a value, False unless it is there. `flag`: `--name`, where it is not the field's own."""
    return dataclasses.field(default=False, metadata={"kind": "switch", "metavar": "", "flag": flag})


def rest(prefix: str) -> Any:
    """A field of type `dict[str, str]`: the values of all flags that begin with `prefix`, by the rest."""
    told = {"kind": "rest", "prefix": prefix}
    return dataclasses.field(default_factory=dict, metadata=told)


def line() -> Any:
    """A field of type `tuple[str, ...]`: the command line as it was typed, after the command's name."""
    return dataclasses.field(default=(), metadata={"kind": "line"})


def configuration(or_sweep: bool = False) -> Any:
    """A field of type `RunConfig`: `[FILE.yaml]` and a flag for every field of it.

    Args:
      or_sweep: the file may be that of a sweep: the field is a `Sweep` then.
    """
    return dataclasses.field(default=None, metadata={"kind": "configuration", "or_sweep": or_sweep})


@dataclasses.dataclass(frozen=True)
class Option:
    """One field of a command.

    Attributes:
      name: of the field.
      kind: `words`, `value` or `switch`.
      flag: as it is typed; of words their metavar.
      metavar: of its value.
      hint: its annotation.
      default: where it is left out.
      text: what it means.
      complete: what the shell completes.
      least: how many words have to be there.
      alone: as of `value`.
    """

    name: str
    kind: str
    flag: str
    metavar: str
    hint: Any
    default: Any
    text: str
    complete: str = ""
    least: int = 0
    alone: str = ""


def options_of(command: type) -> list[Option]:
    """The fields of a command, without those of its configuration."""
    hints, texts = typing.get_type_hints(command), forms.field_texts(command)
    found = []
    for field in dataclasses.fields(command):
        told = field.metadata
        if told["kind"] not in ("words", "value", "switch"):
            continue
        flag = told.get("flag") or f"--{field.name.replace('_', '-')}"
        found.append(
            Option(
                field.name,
                told["kind"],
                flag if told["kind"] != "words" else told["metavar"],
                told["metavar"],
                hints[field.name],
                field.default,
                texts.get(field.name, ""),
                told.get("complete", ""),
                told.get("least", 0),
                told.get("alone", ""),
            )
        )
    return found


def about(command: type) -> str:
    """What the docstring says before its sections."""
    return re.split(r"\n\nAttributes:", inspect.getdoc(command) or "")[0]


# --- a command line -> a command ---------------------------------------------------------------------------


def parse(command: type, line: Sequence[str], name: str) -> Any:
    """The command that a line asks for.

    Args:
      command: its class.
      line: what follows the name.
      name: of the command.

    Raises:
      UserError: an unknown flag, a flag without its value, a value of the wrong type, too many words.
      SystemExit: after `--help`.
    """
    asked_for_help = any(word in HELP for word in line)
    kinds = {field.metadata["kind"]: field for field in dataclasses.fields(command)}
    try:
        if "configuration" in kinds:
            return _configured(command, line, name, kinds["configuration"].metadata["or_sweep"])
        options = options_of(command)
        if asked_for_help:
            _tyro(command, options, name, ["--help"])
        made: dict[str, Any] = {kinds["line"].name: tuple(line)} if "line" in kinds else {}
        left = list(line)
        if "rest" in kinds:
            left, made[kinds["rest"].name] = _prefixed(left, kinds["rest"].metadata["prefix"], name)
        known = {option.flag: option for option in options if option.kind != "words"}
        given, flags = _sorted(left, known, name, usage_of(command, name))
        _check_count(command, given, line, name)
        filled = _tyro(command, options, name, [*flags, *given])
        return command(**made, **_meant(options, filled))
    except SystemExit as end:
        if asked_for_help and not end.code:
            print(examples_of(command))
        raise


def usage_of(command: type, name: str) -> str:
    """`fedjax-sim NAME WORDS [--flags]`."""
    parts = [f"fedjax-sim {name}"]
    for option in sorted(options_of(command), key=lambda option: option.kind != "words"):
        if option.kind == "words":
            parts.append(option.metavar)
        else:
            parts.append(f"[{option.flag}{' ' * bool(option.metavar)}{option.metavar}]")
    return " ".join(parts)


def examples_of(command: Any) -> str:
    """The examples below a command's help."""
    lines = ["examples:"]
    for line, meant in command.examples:
        lines += [f"  # {meant}", f"  {line}"] if len(line) > 44 else [f"  {line:44}  # {meant}"]
    return "\n".join(lines)


def _prefixed(words: list[str], prefix: str, name: str) -> tuple[list[str], dict[str, str]]:
    """(the other words, what is said by `--launcher.FIELD VALUE`)."""
    others: list[str] = []
    given: dict[str, str] = {}
    left = list(words)
    while left:
        word = left.pop(0)
        flag, equals, text = word.partition("=")
        if not flag.startswith(prefix):
            others.append(word)
            continue
        if not equals:
            if not left:
                raise UserError(flag, None, "its value is missing", f"See fedjax-sim {name} --help.")
            text = left.pop(0)
        given[flag.removeprefix(prefix).replace("-", "_")] = text
    return others, given


def _sorted(left: list[str], known: dict[str, Option], name: str, usage: str) -> tuple[list[str], list[str]]:
    """(words, flags with their values as `--flag=value`) of a line; refuses what is not known."""
    given, flags = [], []
    while left:
        word = left.pop(0)
        if not word.startswith("-") or word == "-":
            given.append(word)
            continue
        flag, equals, text = word.partition("=")
        option = known.get(flag.replace("_", "-"))
        if option is None:
            following = left[0] if left and not left[0].startswith("-") else ""
            fix = _nearest(flag, known) or f"Write {usage}."
            raise UserError(flag, text if equals else following, f"{name} has no such flag", fix)
        if option.kind == "switch":
            if equals:
                raise UserError(option.flag, text, "this flag takes no value", f"Write {option.flag}.")
            flags.append(option.flag)
            continue
        if not equals and option.alone and not (left and re.fullmatch(r"-?\d*\.?\d+", left[0])):
            text = option.alone
        elif not equals:
            if not left or (left[0].startswith("-") and not re.match(r"-\.?\d", left[0])):
                raise UserError(option.flag, None, "its value is missing", f"Write {usage}.")
            text = left.pop(0)
        flags.append(f"{option.flag}={text}")
    return given, flags


def _nearest(flag: str, known: dict[str, Option]) -> str:
    fix = fields.nearest(flag, known) if known else ""
    return fix if fix.startswith("Did") else f"See --help; there are {', '.join(known)}." if known else ""


def _check_count(command: type, given: list[str], line: Sequence[str], name: str) -> None:
    """Raises UserError for too few words, or too many."""
    field = next((field for field in dataclasses.fields(command) if field.metadata["kind"] == "words"), None)
    told = {"metavar": "", "least": 0, "most": 0} if field is None else field.metadata
    most = told["most"]
    if len(given) < told["least"] or (most is not None and len(given) > most):
        metavars = told["metavar"].split()
        wanted = " and ".join(f"a {one}" if most != 1 else f"one {one}" for one in metavars)
        why = f"it takes {wanted}" if wanted else "this command takes no arguments"
        raise UserError(name, " ".join(line), why, f"Write {usage_of(command, name)}.")


def _meant(options: Sequence[Option], filled: Any) -> dict[str, Any]:
    """Field -> value, of what was typed."""
    made = {}
    for option in options:
        typed = getattr(filled, option.name)
        if isinstance(typed, forms.Typed):
            typed = meant_by(str(typed), option.hint, option.flag)
        elif option.kind == "words":
            typed = tuple(map(str, typed))
        made[option.name] = typed
    return made


def meant_by(text: str, hint: Any, path: str) -> Any:
    """A word as its field takes it, checked.

    Args:
      text: what was typed.
      hint: the field's annotation.
      path: the flag, for messages.

    Raises:
      UserError: it is not what is annotated.
    """
    arguments = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if str in arguments or typing.get_origin(hint) is typing.Literal:
        return fields.coerce(text, hint, path)
    read = forms.as_yaml(text, path, "See --help.")
    if isinstance(read, str) or read is None:
        read = text
    return fields.coerce(read, hint, path, text=True)


def _configured(command: type, line: Sequence[str], name: str, or_sweep: bool) -> Any:
    """A command whose flags are those of a configuration, and some of its own."""
    from fedjax_sim.cli import flags

    options = {option.flag.removeprefix("--"): option for option in options_of(command)}
    extra = {
        f"{flag}={option.metavar}" if option.metavar else flag: option.text
        for flag, option in options.items()
    }
    config, chosen = flags.parse(line, name, about(command), extra, or_sweep)
    made: dict[str, Any] = {"config": config}
    for flag, text in chosen.items():
        option = options[flag]
        made[option.name] = True if option.kind == "switch" else meant_by(text, option.hint, option.flag)
    return command(**made)


# --- tyro --------------------------------------------------------------------------------------------------


def _tyro(command: type, options: Sequence[Option], name: str, line: list[str]) -> Any:
    """The form of a command, filled by tyro; with `--help` it prints its help and raises SystemExit."""
    made = [(option.name, kind_of(option), default_of(option)) for option in options]
    form = dataclasses.make_dataclass(command.__name__, made, frozen=True)
    needed = next((option.metavar for option in options if option.least), "")
    return forms.filled(form, f"fedjax-sim {name}", about(command), line, needed)


def kind_of(option: Option) -> Any:
    """The annotation by which tyro reads a field as text, and shows it."""
    import tyro

    name = None if option.kind == "words" else option.flag.removeprefix("--")
    plain = option.default in (None, False, "", ()) or option.default is dataclasses.MISSING
    said = "" if plain else f"(default: {shown(option.default)})"
    told = tyro.conf.arg(help=option.text, help_behavior_hint=said, name=name)
    if option.kind == "switch":
        return typing.Annotated[bool, tyro.conf.FlagCreatePairsOff, told]
    if option.kind == "value":
        return typing.Annotated[Any, forms.as_typed(option.metavar, shown), told]
    spec = tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar=option.metavar,
        instance_from_str=tuple,
        is_instance=lambda given: True,
        str_from_instance=list,
    )
    return typing.Annotated[Any, spec, told, tyro.conf.Positional]


def default_of(option: Option) -> Any:
    """The field of a form with an option's default; words that have to be there have none."""
    if option.kind == "words" and option.least:
        return dataclasses.field()
    return dataclasses.field(default=option.default)


def shown(given: Any) -> str:
    """A default as help shows it."""
    return "none" if given is None else f"{given:g}" if isinstance(given, float) else str(given)
