"""`fedjax-sim completion`: a script for the shell, which knows all commands, flags and names by itself.

The script is made once, from the commands' own dataclasses; completing starts no Python.
"""

import dataclasses
import re
import typing
from importlib import resources
from typing import Any, ClassVar

from fedjax_sim.cli import overview
from fedjax_sim.cli.options import Option, options_of, words
from fedjax_sim.core import fields
from fedjax_sim.core.errors import UserError

SHELLS = ("bash", "zsh", "fish")


@dataclasses.dataclass(frozen=True)
class Completion:
    """Prints a completion script for bash, zsh or fish: commands, flags, those of an algorithm after
    `--algorithm NAME`, names of algorithms, models, data and partitions, files and folders. Print it again
    after an upgrade.

    - bash: fedjax-sim completion bash > ~/.local/share/bash-completion/completions/fedjax-sim
    - zsh: fedjax-sim completion zsh > a folder of $fpath/_fedjax_sim, such as ~/.zfunc/_fedjax_sim
    - fish: fedjax-sim completion fish > ~/.config/fish/completions/fedjax-sim.fish

    Attributes:
      shell: which one
    """

    examples: ClassVar = (
        ("source <(fedjax-sim completion bash)", "try it in this shell"),
        ("fedjax-sim completion fish | source", "likewise in fish"),
    )

    shell: tuple[str, ...] = words("SHELL", least=1, most=1, kind=" ".join(SHELLS))

    def __call__(self) -> int:
        """See `Command`."""
        if self.shell[0] not in SHELLS:
            raise UserError(
                "completion", self.shell[0], "no such shell", fields.nearest(self.shell[0], SHELLS)
            )
        print(script(self.shell[0]), end="")
        return 0


@dataclasses.dataclass(frozen=True)
class Flag:
    """One flag, for the shell.

    Attributes:
      name: as it is typed.
      about: in a few words.
      takes: `""` nothing, `value` what cannot be completed, `file`, `folder`, `yaml`, or words with blanks.
    """

    name: str
    about: str
    takes: str

    @property
    def choices(self) -> str:
        """The words that it takes, with blanks between; "" where they are not known."""
        return "" if self.takes in ("", "value", "file", "folder", "yaml") else self.takes


def script(shell: str) -> str:
    """The script for a shell."""
    import jinja2

    folder = resources.files("fedjax_sim.cli") / "templates" / "completion"
    engine = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    engine.filters["quoted"] = lambda text: text.replace("\\", "\\\\").replace("'", "")
    return (
        engine.from_string((folder / f"{shell}.jinja").read_text(encoding="utf-8")).render(**table()) + "\n"
    )


def table() -> dict[str, Any]:
    """What the scripts are made of: the commands, each one's flags, and those of algorithms."""
    from fedjax_sim.cli.commands import command_of

    own = {name: _own_flags(command_of(name)) for name in overview.COMMANDS}
    configured = [name for name, entry in overview.COMMANDS.items() if entry.configured]
    general, of_algorithms = _of_configuration()
    sections = _sections()
    for name in configured:
        own[name] = [
            dataclasses.replace(flag, takes=sections) if flag.name == "--help" else flag
            for flag in (*own[name], *general)
        ]
    own["sweep"] = [*own["sweep"], *_of_launchers()]
    takes = {name: _positional(command_of(name)) for name in overview.COMMANDS}
    return {
        "commands": {name: entry.about for name, entry in overview.COMMANDS.items()},
        "flags": own,
        "takes": takes | dict.fromkeys(configured, "yaml") | {"new": " ".join(_kinds())},
        "configured": configured,
        "algorithms": of_algorithms,
    }


def _sections() -> str:
    from fedjax_sim.cli.flags import EVERYTHING
    from fedjax_sim.config.run import RunConfig, sections_of

    return " ".join([*sections_of(RunConfig), EVERYTHING])


def _kinds() -> tuple[str, ...]:
    from fedjax_sim.cli.new import NEXT

    return tuple(NEXT)


def _own_flags(command: type) -> list[Flag]:
    """Those that are fields of the command itself."""
    found = [Flag("--help", "flags and examples", "")]
    for option in options_of(command):
        if option.kind != "words":
            takes = "" if option.kind == "switch" else option.complete or "value"
            found.append(Flag(option.flag, brief(option.text), takes))
    return found


def _positional(command: type) -> str:
    """What the words are that are no flags."""
    given: list[Option] = [option for option in options_of(command) if option.kind == "words"]
    if not given:
        return "value"
    return {"folder file": "file"}.get(given[0].complete, given[0].complete)


def _of_configuration() -> tuple[list[Flag], dict[str, list[Flag]]]:
    """(flags of every configuration, algorithm -> its own flags)."""
    from fedjax_sim import algorithms, data, models
    from fedjax_sim.config import RunConfig

    known = {
        "--algorithm": " ".join(algorithms.CONFIGS),
        "--model.name": " ".join(models.names()),
        "--data.source": " ".join(data.names()),
        "--partition.kind": " ".join(data.KINDS),
        "--output.dir": "folder",
        "--data.data-dir": "folder",
        "--initial.run": "folder",
        "--partition.path": "file",
        "--cohort.schedule": "file",
    }
    base = RunConfig()
    general = [flag for flag in _of_dataclass(base, "--") if not flag.name.startswith("--algorithm.")]
    general.append(Flag("--algorithm", "its name; its own flags follow from it", ""))
    general = [dataclasses.replace(flag, takes=known.get(flag.name, flag.takes)) for flag in general]
    of_algorithms = {
        name: [
            dataclasses.replace(flag, takes=known["--algorithm"])
            if flag.name == "--algorithm.inner"
            else flag
            for flag in _of_dataclass(config(), "--algorithm.")
            if not flag.name.startswith("--algorithm.inner.")
        ]
        for name, config in algorithms.CONFIGS.items()
    }
    for name, config in algorithms.CONFIGS.items():
        if "inner" in {field.name for field in dataclasses.fields(config)}:
            flag = Flag("--algorithm.inner", "the algorithm inside", known["--algorithm"])
            of_algorithms[name].append(flag)
    return general, of_algorithms


def _of_dataclass(config: Any, prefix: str) -> list[Flag]:
    """The flags of a dataclass and of those inside it."""
    from fedjax_sim.cli.forms import field_texts

    hints, texts, found = typing.get_type_hints(type(config)), field_texts(type(config)), []
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), field.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            found += _of_dataclass(value, f"{prefix}{name}.")
            continue
        about = brief(texts.get(field.name, ""))
        if hints[field.name] is bool:
            found += [Flag(f"{prefix}{name}", about, ""), Flag(f"{prefix}no-{name}", f"not: {about}", "")]
        else:
            found.append(Flag(f"{prefix}{name}", about, _choices(hints[field.name]) or "value"))
    return found


def _choices(hint: Any) -> str:
    """The words of a `Literal`, alone or beside other types; "" where there is none."""
    if typing.get_origin(hint) is typing.Literal:
        return " ".join(map(str, typing.get_args(hint)))
    return " ".join(filter(None, map(_choices, typing.get_args(hint))))


def _of_launchers() -> list[Flag]:
    """`--launcher.FIELD` of all launchers."""
    from fedjax_sim.cli.forms import field_texts
    from fedjax_sim.studies import launchers

    found: dict[str, Flag] = {}
    for kind in launchers.LAUNCHERS.values():
        for name, text in field_texts(kind).items():
            flag = f"--launcher.{name.replace('_', '-')}"
            found.setdefault(flag, Flag(flag, brief(text), "value"))
    return list(found.values())


def brief(text: str) -> str:
    """The first words of a text, for one line of a list."""
    plain = re.sub(r"[`:\[\]$]", "", re.split(r"[.;](?:\s|$)", text)[0]).strip()
    return plain if len(plain) <= 60 else plain[:57].rsplit(" ", 1)[0] + " …"
