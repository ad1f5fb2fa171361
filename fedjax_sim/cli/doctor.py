"""`fedjax-sim doctor`: whether this machine is ready, and what to do where it is not."""

import dataclasses
import json
import os
import sys
from typing import ClassVar

from fedjax_sim.cli import checks
from fedjax_sim.cli.options import switch

_COLOURS = {"ok": "32", "note": "33", "problem": "31"}


@dataclasses.dataclass(frozen=True)
class Doctor:
    """Checks this machine: versions, releases of JAX that compute wrong numbers, devices, memory, disk,
    caches, data, extras, and variables of the environment that matter. Each line is ok, a note or a problem,
    and says what to do. The exit status is 1 if there is a problem.

    JAX is started in a process of its own, so that one that is broken or hangs is told as well.

    Attributes:
      json: print one object for programs
    """

    examples: ClassVar = (
        ("fedjax-sim doctor", "before the first run, or when something is odd"),
        ("fedjax-sim doctor --json > machine.json", "to send with a question"),
    )

    json: bool = switch()

    def __call__(self) -> int:
        """See `Command`."""
        found = []
        for check in checks.all_of_them():
            found.append(check)
            if not self.json:
                print(_told(check), flush=True)
        problems = sum(check.state == "problem" for check in found)
        notes = sum(check.state == "note" for check in found)
        if self.json:
            told = {"ok": not problems, "checks": [dataclasses.asdict(check) for check in found]}
            print(json.dumps(told, indent=2))
        else:
            many = lambda count, word: f"{count} {word}{'' if count == 1 else 's'}"  # noqa: E731
            print(f"\n{many(problems, 'problem')}, {many(notes, 'note')}" if found else "")
        return 1 if problems else 0


def _told(check: checks.Check) -> str:
    state = f"{check.state:8}"
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb":
        state = f"\033[{_COLOURS[check.state]}m{state}\033[0m"
    lines = [f"{state}{check.name}: {check.found}"]
    lines += [f"{'':10}{line}" for line in check.fix.splitlines()]
    return "\n".join(lines)
