"""`fedjax-sim tune`."""

import dataclasses
import shlex
from typing import ClassVar

from fedjax_sim.cli import options, output
from fedjax_sim.cli.options import value, words


@dataclasses.dataclass(frozen=True)
class Tune:
    """Searches settings by successive halving: all trials come side by side to a first round, one in so many
    goes on to a later one, and so on; those of the last comparison do all rounds. Needs an extra
    (pip install optuna). The same command goes on with a search that was cut. The file says:

    - base: a configuration, or the path of one
    - space: dotted field -> {log_uniform: [0.001, 1]}, or uniform, integers, choice
    - runs: trials; default: 27
    - rungs: how often they are compared, the last time after all rounds; default: 3
    - factor: one in so many goes on; default: 3
    - metric: what they are compared by, and goal, max or min; default: the headline of the task
    - seeds: runs of each trial, whose mean counts; default: 1
    - sampler: what proposes trials: qmc, random or tpe; default: qmc
    - out: the folder; default: runs/FILE

    Attributes:
      file: of the search
      out: another folder
    """

    examples: ClassVar = (
        ("fedjax-sim tune rates.yaml", "search, then print the best"),
        ("fedjax-sim tune rates.yaml --out runs/again", "the same in another folder"),
    )

    file: tuple[str, ...] = words("FILE.yaml", least=1, most=1, kind="yaml")
    out: str | None = value("DIR", kind="folder")
    line: tuple[str, ...] = options.line()

    def __call__(self) -> int:
        """See `Command`."""
        from fedjax_sim import runs
        from fedjax_sim.studies import search

        asked = search.load(self.file[0])
        if self.out is not None:
            asked = dataclasses.replace(asked, out=self.out)
        again = f"continue with: {shlex.join(['fedjax-sim', 'tune', *self.line])}"
        try:
            with output.without_loader_noise():
                found = search.run(asked, tell=lambda line: print(line, flush=True))
        except (runs.Interrupted, runs.Terminated) as stop:
            stop.advice = again
            raise
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"interrupted; {again}") from None
        print(found.report())
        return 0
