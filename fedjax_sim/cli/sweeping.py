"""`fedjax-sim sweep`, and `fedjax-sim demo`, which is a sweep that lies in the package."""

import dataclasses
import re
import shlex
import typing
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from fedjax_sim.cli import options, output
from fedjax_sim.cli.options import switch, value, words
from fedjax_sim.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Runs every method in every setting with every seed, and writes tables, curves and sweep.json in the
    sweep's folder. What is finished is not run again, what was cut goes on; a failure does not end the rest.

    --launcher NAME says where the runs are started. The process waits for them, and writes the table.
    --launcher.FIELD VALUE says what each of its tasks asks for, and how many runs of the sweep it does.

    both launchers: cpus 1, gpus 0, memory-gb, runs 1.

    slurm: partition, account, qos, minutes 60, at-once (tasks side by side), requeues 20,
    setup "[module load cuda]", sbatch "{constraint: a100}", wait true (false only submits).

    ray: address (auto, or HOST:PORT), resources "{TPU: 4}", retries 3.

    Attributes:
      file: of the sweep
      together: runs that differ in numbers alone (seeds, rates, a method's own) go side by side, as one
        program, up to three times as fast where each is small; numbers are those of a run alone on one
        device, up to rounding
      part: run the I-th of N parts alone: every N-th run, from the I-th. Start one part on each machine, with
        one folder for all on a file system that they share, or each with its own, and copy the runs together.
        Another start, without --part, writes the whole table
      launcher: local, here, one after another; slurm, in one job array; ray, as tasks of Ray. The last two
        need an extra (pip install submitit, or ray) and a folder that all machines share
      pack: runs nothing. Moves the records of the finished runs into two files, runs.json and runs.parquet.
        Later starts and all reports read them from there. Checkpoints, figures and whatever else is in the
        runs' folders stay where they are
      unpack: the reverse: writes the records into the runs' folders, and removes the two files
    """

    examples: ClassVar = (
        ("fedjax-sim sweep my_study.yaml", "all runs here, then the table"),
        ("fedjax-sim sweep my_study.yaml --together", "small runs side by side"),
        ("fedjax-sim sweep my_study.yaml --part 1/4", "a fourth of the runs"),
        (
            "fedjax-sim sweep my_study.yaml --launcher slurm --launcher.gpus 1 --launcher.minutes 240",
            "as a job array",
        ),
    )

    file: tuple[str, ...] = words("FILE.yaml", least=1, most=1, kind="yaml")
    together: bool = switch()
    part: str | None = value("I/N")
    launcher: str | None = value("NAME", kind="local slurm ray")
    pack: bool = switch()
    unpack: bool = switch()
    of_launcher: dict[str, str] = options.rest("--launcher.")  # noqa: RUF009
    line: tuple[str, ...] = options.line()

    def __call__(self) -> int:
        """See `Command`."""
        from fedjax_sim.engine import hosts
        from fedjax_sim.studies import sweep

        part = re.fullmatch(r"(\d+)/(\d+)", self.part or "1/1")
        if part is None:
            fix = "Write 1/4 for the first of four parts."
            raise UserError("--part", self.part, "this is not I/N", fix)
        launcher = launcher_of(self.launcher or "local", self.of_launcher)
        asked = sweep.load(self.file[0])
        if self.pack + self.unpack + (self.part is not None) + (self.launcher is not None) > 1:
            why = "--part, --launcher, --pack and --unpack exclude each other"
            raise UserError("sweep", " ".join(self.line), why, f"Write {options.usage_of(Sweep, 'sweep')}.")
        if self.pack or self.unpack:
            moved = hosts.on_first(lambda: (sweep.pack if self.pack else sweep.unpack)(asked))
            if hosts.first():
                print(moved.report())
            return 0
        parts = int(part[1]), int(part[2])
        return swept(asked, "sweep", self.line, part=parts, launcher=launcher, together=self.together)


@dataclasses.dataclass(frozen=True)
class Demo:
    """FedMR against FedAvg on the handwritten digits that come with the package: 50 non-IID clients, 10 a
    round, three seeds. Takes one to two minutes on two cores, and needs no data.

    Attributes:
      out: the folder: table.md, .csv and .tex, curves.png and .pdf, and a folder for each run. The same
        command goes on with a demonstration that was cut
      rounds: of each run; the numbers that the file states are those of all of its rounds
      print_file: print the sweep's file, to edit, and stop
    """

    examples: ClassVar = (
        ("fedjax-sim demo", "then look at runs/demo/table.md"),
        ("fedjax-sim demo --rounds 50 --out runs/short", "in a few seconds"),
        ("fedjax-sim demo --print-file > my_study.yaml", "then fedjax-sim sweep my_study.yaml"),
    )

    out: str | None = value("DIR", kind="folder")
    rounds: int | None = value("N")
    print_file: bool = switch()
    line: tuple[str, ...] = options.line()

    def __call__(self) -> int:
        """See `Command`."""
        from fedjax_sim.core.fields import at_least
        from fedjax_sim.studies import demo

        if self.print_file:
            print(demo.text(), end="")
            return 0
        if self.rounds is not None:
            at_least("--rounds", self.rounds, 1)
        status = swept(demo.sweep(self.out, self.rounds), "demo", self.line)
        if not status:
            print("\nnext: fedjax-sim demo --print-file > mine.yaml; edit it; fedjax-sim sweep mine.yaml")
        return status


def swept(asked: Any, command: str, line: Sequence[str], **how: Any) -> int:
    """Runs a sweep, says how it goes on if it is cut, and prints its table. -> the exit status.

    Args:
      asked: the sweep.
      command: that runs it.
      line: what followed the command's name.
      **how: see `fedjax_sim.studies.sweep.run`.
    """
    from fedjax_sim import runs
    from fedjax_sim.engine import hosts
    from fedjax_sim.studies import sweep

    again = f"continue with: {shlex.join(['fedjax-sim', command, *line])}"
    # Before a launcher's tasks have ended JAX does not start here, and there is one process.
    here = how.get("launcher", "local") == "local"
    first: Callable[[], bool] = hosts.first if here else lambda: True
    try:
        with output.without_loader_noise():
            outcome = sweep.run(asked, tell=lambda line: print(line, flush=True) if first() else None, **how)
    except (runs.Interrupted, runs.Terminated) as stop:
        stop.advice = again
        raise
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; {again}") from None
    if hosts.first():
        print(outcome.report())
    return 1 if outcome.failures else 0


def launcher_of(name: str, given: dict[str, str]) -> Any:
    """What `--launcher NAME` and its fields mean; the name itself where it stands for this process."""
    from fedjax_sim.cli.flags import meant
    from fedjax_sim.core import fields
    from fedjax_sim.studies import launchers

    if launchers.launcher_of(name) is None:  # which refuses a wrong name
        for field, text in given.items():
            fix = f"Choose --launcher {' or '.join(launchers.LAUNCHERS)}."
            raise UserError(f"launcher.{field}", text, f"the launcher is {name}", fix)
        return name
    kind = launchers.LAUNCHERS[name]
    hints, values = typing.get_type_hints(kind), {}
    known = [field.name for field in dataclasses.fields(kind)]
    for field, text in given.items():
        if field not in known:
            why = f"the launcher {name} has no such field"
            raise UserError(f"launcher.{field}", text, why, fields.nearest(field, known))
        read = meant(text, hints[field], f"launcher.{field}")
        values[field] = fields.coerce(read, hints[field], f"launcher.{field}", text=True)
    return kind(**values)
