"""The commands of `fedjax-sim`: what each is for, and in which module it is. Imports nothing heavy."""

import dataclasses
import os
import sys
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Entry:
    """One command.

    Attributes:
      name: as it is typed.
      place: `module:Class` below `fedjax_sim.cli`.
      takes: what follows the name, in short.
      about: what it does, in one line.
      computes: whether it needs the whole package, JAX included, to work.
      configured: whether its flags are the fields of a configuration, so that its help needs the package too.
      joins: whether several processes may do it together (`--join`).
    """

    name: str
    place: str
    takes: str
    about: str
    computes: bool = True
    configured: bool = False
    joins: bool = False


GROUPS: dict[str, tuple[Entry, ...]] = {
    "begin": (
        Entry("demo", "sweeping:Demo", "", "FedMR against FedAvg on digits: a table, curves"),
        Entry("list", "listing:List", "", "algorithms, models, data sets, partitions"),
        Entry("doctor", "doctor:Doctor", "", "checks this machine, and says what to do", computes=False),
    ),
    "run": (
        Entry("run", "running:Run", "[FILE.yaml]", "runs a configuration", configured=True, joins=True),
        Entry("resume", "running:Resume", "FOLDER", "continues a run that was cut; more rounds", joins=True),
        Entry("sweep", "sweeping:Sweep", "FILE.yaml", "runs a grid of configurations: one table", joins=True),
        Entry("tune", "searching:Tune", "FILE.yaml", "searches settings by successive halving"),
    ),
    "look at runs": (
        Entry("compare", "looking:Compare", "RUN|SWEEP.yaml …", "mean and deviation over seeds, as a table"),
        Entry("report", "looking:Report", "PATH …", "one HTML page of runs or a sweep, also under way"),
        Entry("peel", "looking:Peel", "RUN|SWEEP.yaml …", "layer-peeled analysis (runs with --peel.every)"),
        Entry("inertia", "looking:Inertia", "RUN|SWEEP.yaml …", "how far layers move (--inertia.measure)"),
        Entry("landscape", "looking:Landscape", "RUN|SWEEP.yaml …", "how flat minima are: Hessian, barriers"),
        Entry("export", "looking:Export", "FOLDER FILE", "a run's weights as .npz or .safetensors"),
    ),
    "plan": (
        Entry("plan", "planning:Plan", "[FILE.yaml]", "memory it needs, here or on a pod", configured=True),
        Entry(
            "tune-machine",
            "planning:TuneMachine",
            "[FILE.yaml]",
            "measures the fastest layout, and keeps it",
            configured=True,
        ),
    ),
    "make your own": (
        Entry("new", "new:New", "KIND NAME", "a method, task, diagnostic or study to edit", computes=False),
        Entry("completion", "completion:Completion", "SHELL", "completion for bash, zsh and fish"),
    ),
}
"""What a person wants to do -> the commands for it."""

COMMANDS: dict[str, Entry] = {entry.name: entry for group in GROUPS.values() for entry in group}
"""Name -> command."""

_WIDTH = 28


def usage() -> str:
    """What `fedjax-sim --help` says: all commands, on one screen of 80 columns."""
    lines = ["usage: fedjax-sim COMMAND …    (fedjax-sim COMMAND --help: flags and examples)"]
    for group, entries in GROUPS.items():
        lines.append(f"{group}:")
        lines += [f"  {f'{entry.name} {entry.takes}':{_WIDTH}} {entry.about}" for entry in entries]
    lines.append("On several hosts: run, resume and sweep take --join (fedjax-sim run --help).")
    return "\n".join(lines)


def light(words: Sequence[str] | None = None) -> bool:
    """Whether this process is `fedjax-sim` and has been asked for nothing that needs JAX.

    Then the package loads without its public names: help takes a moment, and `doctor` works where JAX is
    refused or broken.

    Args:
      words: of the command line; None: those of the process, if it is `fedjax-sim`.
    """
    if words is None:
        words = _own_words()
    if words is None:
        return False
    if not words:
        return True
    name, *rest = words
    if name.startswith("--") and name != "--help" and name != "--version":
        return False  # --join, of a command that follows
    entry = COMMANDS.get(name)
    if entry is None or not entry.computes:
        return True
    return not entry.configured and ("-h" in rest or "--help" in rest)


def _own_words() -> list[str] | None:
    """What follows `fedjax-sim`, or `python -m fedjax_sim.cli`; None in any other process."""
    program, original = sys.argv[0] if sys.argv else "", sys.orig_argv
    if program == "-m":  # while Python looks for the module
        at = original.index("-m") if "-m" in original else len(original)
        return sys.argv[1:] if original[at + 1 : at + 2] == ["fedjax_sim.cli"] else None
    stem = os.path.splitext(os.path.basename(program))[0]
    return sys.argv[1:] if stem == "fedjax-sim" else None
