"""The command line: `fedjax-sim COMMAND`, each of its commands one call of the library."""

import contextlib
import importlib
import sys
import typing
import warnings
from collections.abc import Sequence

from fedjax_sim.cli import output
from fedjax_sim.cli.overview import COMMANDS, usage
from fedjax_sim.core.errors import NotWritten, UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
      The exit status: 0 done, 1 a sweep had failures, a plan does not fit, `doctor` found a problem, another
      process was lost, or something could not be written (a full disk; where that is standard output, the
      work was done), 2 the user's mistake, 130 and 143 cut short by SIGINT and SIGTERM.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    output.open_closed()
    out = output.Output(sys.stdout)
    with contextlib.redirect_stdout(typing.cast(typing.TextIO, out)):
        status = _status(words)
        out.flush()
    if out.lost is None or isinstance(out.lost, BrokenPipeError):  # of `fedjax-sim list | head`
        return status
    lost = getattr(out.lost, "strerror", None) or out.lost
    output.complain(f"error: standard output cannot be written: {lost}")
    return status or 1


def _status(words: list[str]) -> int:
    try:
        with warnings.catch_warnings():
            warnings.showwarning = output.show_warning
            return _dispatch(words)
    except UserError as error:
        if error.detail:
            output.complain(error.detail)
        output.complain("error: " + " ".join(str(error).split()))
        return 1 if isinstance(error, NotWritten) else 2
    except KeyboardInterrupt as stop:
        output.complain(str(stop) or "interrupted")
        return 130
    except SystemExit as stop:
        if type(stop) is not SystemExit:
            output.complain(str(stop))
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 2


def _dispatch(words: list[str]) -> int:
    words = _joined(words)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        from fedjax_sim.core import versions

        print(", ".join(f"{name} {version}" for name, version in versions.described().items()))
        return 0
    name, *rest = words
    if name not in COMMANDS:
        from fedjax_sim.core.fields import nearest

        raise UserError("command", name, "no such command", nearest(name, COMMANDS))
    return perform(name, rest)


def perform(name: str, words: list[str]) -> int:
    """Reads the words of a command, and does it. -> the exit status."""
    from fedjax_sim.cli import options

    return options.parse(command_of(name), words, name)()


def command_of(name: str) -> type:
    """The dataclass of a command."""
    module, _, attribute = COMMANDS[name].place.partition(":")
    return getattr(importlib.import_module(f"fedjax_sim.cli.{module}"), attribute)


def _joined(words: list[str]) -> list[str]:
    """Becomes one of several processes, if the command line asks for it anywhere. -> the other words."""
    given: dict[str, str] = {}
    others, left = [], list(words)
    while left:
        name, equals, value = left.pop(0).partition("=")
        if name not in ("--join", "--processes", "--process"):
            others.append(name + equals + value)
            continue
        if not equals and left and not left[0].startswith("--"):
            value = left.pop(0)
        if not value:
            raise UserError(name, None, "its value is missing", "See fedjax-sim --help.")
        if name in given:
            raise UserError(name, value, f"it is there twice, also as {given[name]}", "Give it once.")
        given[name] = value
    words = others
    if given:
        from fedjax_sim.engine import hosts

        known = COMMANDS.get(words[0]) if words else None
        if words and (known is None or not known.joins):
            raise UserError("command", words[0], "this command runs in one process", "Leave --join out.")
        counts = {}
        for name in ("--processes", "--process"):
            if name in given and not given[name].isdecimal():
                raise UserError(name, given[name], "it must be a whole number", "Give one, such as 2.")
            counts[name[2:]] = int(given[name]) if name in given else None
        hosts.join(given.get("--join", ""), **counts)
    return words


if __name__ == "__main__":
    sys.exit(main())
