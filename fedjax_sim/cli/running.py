"""`fedjax-sim run` and `fedjax-sim resume`."""

import dataclasses
from typing import Any, ClassVar

from fedjax_sim.cli import output
from fedjax_sim.cli.options import configuration, switch, value, words
from fedjax_sim.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class Run:
    """Runs a configuration.

    On several hosts start the same command on each, with --join: --join auto on a TPU pod or under Slurm, or
    --join HOST:PORT --processes COUNT --process THIS, HOST being the first. They share one folder.

    Attributes:
      config: of the run.
      print_config: print the configuration as YAML, and stop
    """

    examples: ClassVar = (
        (
            "fedjax-sim run --algorithm fedmr --partition.clients 20 --output.dir runs/first",
            "a first run, kept in runs/first",
        ),
        ("fedjax-sim run --algorithm fedmr --print-config > my.yaml", "every field as YAML, to edit"),
        ("fedjax-sim run my.yaml --seed 1 --output.dir runs/1", "the file, with another seed"),
    )

    config: Any = configuration()  # noqa: RUF009
    print_config: bool = switch()

    def __call__(self) -> int:
        """See `Command`."""
        from fedjax_sim import runs
        from fedjax_sim.config import dump
        from fedjax_sim.engine import hosts
        from fedjax_sim.runs import progress

        if self.print_config:
            print(dump(self.config), end="")
            return 0
        hosts.check_backend()
        kept = "output.dir is not set: nothing of this run is kept. Set --output.dir FOLDER to keep it."
        with progress.noted(*[kept] * (self.config.output.dir is None)):
            output.told(runs.run(self.config))
        return 0


@dataclasses.dataclass(frozen=True)
class Resume:
    """Continues a run that was cut, to the numbers that it would have had uncut. A finished run is only
    shown, unless more rounds are asked of it.

    Attributes:
      folder: of the run
      rounds: how many the run is to have in all. Its config.yaml will say so, and its numbers will be those
        of a run of so many from the start; where they cannot be, as under a cosine, it is refused
      debug: the rounds to come without jit, one client after another; see execution.debug of run
      no_debug: the rounds to come compiled, of a run that was debugged so far
    """

    examples: ClassVar = (
        ("fedjax-sim resume runs/first", "after a crash"),
        ("fedjax-sim resume runs/first --rounds 200", "more rounds"),
    )

    folder: tuple[str, ...] = words("FOLDER", least=1, most=1, kind="folder")
    rounds: str | None = value("N")
    debug: bool = switch("--execution.debug")
    no_debug: bool = switch("--execution.no-debug")

    def __call__(self) -> int:
        """See `Command`."""
        from fedjax_sim import runs

        if self.rounds is not None and not self.rounds.isdecimal():
            fix = "Give how many rounds the run is to have in all."
            raise UserError("--rounds", self.rounds, "it must be a whole number", fix)
        if self.debug and self.no_debug:
            raise UserError("--execution.debug", None, "--execution.no-debug is there too", "Give one.")
        rounds = None if self.rounds is None else int(self.rounds)
        debug = True if self.debug else False if self.no_debug else None
        output.told(runs.resume(self.folder[0], rounds=rounds, debug=debug))
        return 0
