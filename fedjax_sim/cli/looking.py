"""Commands that look at runs: `fedjax-sim compare`, `report`, `peel`, `inertia`, `landscape` and `export`."""

import dataclasses
from typing import ClassVar

from fedjax_sim.cli.options import switch, value, words
from fedjax_sim.core.errors import UserError

_RUNS = "RUN|SWEEP.yaml"


def _say(line: str) -> None:
    print(line, flush=True)


def _one_or_all(given: tuple[str, ...]) -> str | list[str]:
    """What reports take: a single folder or file as it is, several as a list."""
    return given[0] if len(given) == 1 else list(given)


@dataclasses.dataclass(frozen=True)
class Compare:
    """Prints the table of finished runs, as a sweep's: a row for each group of runs that differ in nothing
    but the seed, mean and deviation over seeds, the best in bold. Of a sweep's file the finished runs are
    taken, named as in its table.

    Attributes:
      runs: folders of runs, and files of sweeps
      out: writes table.md, table.csv, table.tex, curves.png and curves.pdf there
      metric: of the table
      reference: differences to that row as well, seed by seed; of a sweep's file, its reference unless said
      last_k: mean of the newest K values
      rounds: further tables, of the mean of the newest values up to these rounds
    """

    examples: ClassVar = (
        ("fedjax-sim compare runs/first runs/second", "two runs"),
        ("fedjax-sim compare my_study.yaml --reference FedMR", "a sweep, with differences to that row"),
        ("fedjax-sim compare my_study.yaml --last-k 5 --rounds 50,150 --out table", "as in a paper"),
    )

    runs: tuple[str, ...] = words(f"{_RUNS} …", kind="folder")
    out: str | None = value("DIR", kind="folder")
    metric: str = value("NAME", "accuracy")
    reference: str | None = value("ROW")
    last_k: str = value("K", "1")
    rounds: str = value("R,R", "")

    def __call__(self) -> int:
        """See `Command`."""
        from fedjax_sim.reports import shared
        from fedjax_sim.studies import tables

        rounds = [number for number in self.rounds.split(",") if number]
        for flag, numbers in (("--last-k", [self.last_k]), ("--rounds", rounds)):
            for number in numbers:
                if not number.isdecimal() or not int(number):
                    raise UserError(flag, number, "it must be a whole number", "Give one from 1.")
        table = tables.compare(
            _one_or_all(self.runs),
            metric=self.metric,
            reference=self.reference,
            last_k=int(self.last_k),
            rounds_of_interest=tuple(map(int, rounds)),
        )
        print(table.markdown())
        if self.out is not None:
            for path in tables.write(shared.writable(self.out), table):
                print(f"wrote {path}")
        return 0


@dataclasses.dataclass(frozen=True)
class Report:
    """Writes one self-contained HTML page: what ran and on what, curves to zoom into, the table with paired
    differences and their intervals, the partition, diagnostics where they were measured, bytes, time,
    warnings, the configuration, and how to repeat it.

    Attributes:
      paths: folders of runs or of a sweep, finished or under way; or a sweep's file, by which the runs to
        come are known too
      out: default: report.html in that folder; of several runs beside the first
      watch: writes it again whenever a record has changed, until all runs are at their ends, or Ctrl-C; the
        page then reads itself again. Looks every so many seconds; 10 unless said
      open: opens it in the browser
    """

    examples: ClassVar = (
        ("fedjax-sim report runs/first", "a run"),
        ("fedjax-sim report my_study.yaml --watch", "a study under way, until it ends"),
        ("fedjax-sim report runs/first runs/second --out both.html", "two runs on one page"),
    )

    paths: tuple[str, ...] = words("PATH …", least=1, kind="folder")
    out: str | None = value("FILE", kind="file")
    watch: float | None = value("[SECONDS]", alone="10")
    open: bool = switch()

    def __call__(self) -> int:
        """See `Command`."""
        from fedjax_sim.studies import report

        report.report(self.paths, self.out, watch=self.watch, open=self.open, tell=_say)
        return 0


@dataclasses.dataclass(frozen=True)
class Peel:
    """Draws what the layer-peeled probe recorded (PNG and PDF), and writes layers.csv and report.md. Runs
    that differ only in their seed are pooled, others compared; several groups have an overview too. Of a
    sweep's file the finished runs are taken. The runs need --peel.every.

    Attributes:
      runs: folders of runs, and files of sweeps
      out: default: FOLDER/figures/peel for one run, peel in a sweep's folder, else beside the first
      round: which round is shown and judged; default: the newest
      only: of several groups, the overview without the figures of each
      at_accuracy: the overview compares in each group's first round with this accuracy before the merge
      reference: the overview has differences to the group G as well, client by client
    """

    examples: ClassVar = (
        ("fedjax-sim run my.yaml --peel.every 10 --output.dir runs/a", "a run that is measured"),
        ("fedjax-sim peel runs/a", "its figures"),
        ("fedjax-sim peel my_study.yaml --only overview --at-accuracy 0.6", "a sweep at one accuracy"),
    )

    runs: tuple[str, ...] = words(f"{_RUNS} …", kind="folder")
    out: str | None = value("DIR", kind="folder")
    round: str | None = value("N")
    only: str | None = value("overview", kind="overview")
    at_accuracy: float | None = value("A")
    reference: str | None = value("G")

    def __call__(self) -> int:
        """See `Command`."""
        from fedjax_sim.reports.peel import report

        if self.only not in (None, "overview"):
            why = "only the overview can be written alone"
            raise UserError("--only", self.only, why, "Write --only overview.")
        if self.round is not None and not self.round.isdecimal():
            fix = "Give one, such as 10."
            raise UserError("--round", self.round, "a round is a whole number, from 1", fix)
        report.draw(
            _one_or_all(self.runs),
            self.out,
            round_index=None if self.round is None else int(self.round),
            accuracy=self.at_accuracy,
            reference=self.reference,
            figures=self.only is None,
            tell=_say,
        )
        return 0


@dataclasses.dataclass(frozen=True)
class Inertia:
    """Draws how far each layer moved and what merges gained (PNG and PDF), and writes inertia.csv and
    report.md. Runs that differ only in their seed are pooled, others compared. Of a sweep's file the finished
    runs are taken. The runs need --inertia.measure.

    Attributes:
      runs: folders of runs, and files of sweeps
      out: default: FOLDER/figures/inertia for one run, inertia in a sweep's folder, else beside the first
        run's
      metric: what says how far a layer moves
    """

    examples: ClassVar = (
        ("fedjax-sim run my.yaml --inertia.measure --output.dir runs/a", "a run that is measured"),
        ("fedjax-sim inertia runs/a", "its figures"),
        ("fedjax-sim inertia runs/a runs/b --metric gradient_norm", "two runs by another metric"),
    )

    runs: tuple[str, ...] = words(f"{_RUNS} …", kind="folder")
    out: str | None = value("DIR", kind="folder")
    metric: str = value("NAME", "inertia_step")

    def __call__(self) -> int:
        """See `Command`."""
        from fedjax_sim.reports.inertia import report

        report.draw(_one_or_all(self.runs), self.out, metric=self.metric, tell=_say)
        return 0


@dataclasses.dataclass(frozen=True)
class Landscape:
    """Measures how flat the loss is around the model that a finished run deploys, and what lies between the
    models of its clients: figures (PNG and PDF), flatness.csv, curves.csv and report.md. Runs that differ
    only in their seed are pooled, others compared, all in the same directions and on samples drawn alike.
    Needs the runs' checkpoints. Of a sweep's file the finished runs are taken.

    Attributes:
      runs: folders of runs, and files of sweeps
      out: default: FOLDER/landscape for one run, landscape in a sweep's folder, else beside the first run's
      points: points of a line
      grid: points on each side of a plane; 0 leaves planes out
      radius: lines and planes reach from -R to R, in filter-normalised directions
      samples: training samples, and as many test samples
      seed: of directions, samples and probes
      eigenvalues: how many of the largest eigenvalues of the Hessian
      lanczos: Lanczos steps
      probes: Hutchinson probes of the trace
      rho: radius of the ball of sharpness
      scale: its unit: absolute, relative (to the norm of the weights), filter
      ascent: gradient steps of worst-case sharpness
      draws: random pairs of average sharpness
      models: clients' models that are compared; 0 leaves them out
      batch: samples that a device takes at once
    """

    examples: ClassVar = (
        ("fedjax-sim landscape runs/a", "one run"),
        ("fedjax-sim landscape my_study.yaml --samples 500 --grid 0", "a sweep, faster"),
    )

    runs: tuple[str, ...] = words(f"{_RUNS} …", kind="folder")
    out: str | None = value("DIR", kind="folder")
    points: int = value("N", 41)
    grid: int = value("N", 21)
    radius: float = value("R", 1.0)
    samples: int = value("N", 1000)
    seed: int = value("N", 0)
    eigenvalues: int = value("K", 3)
    lanczos: int = value("N", 20)
    probes: int = value("N", 10)
    rho: float = value("R", 0.05)
    scale: str = value("UNIT", "absolute", kind="absolute relative filter")
    ascent: int = value("N", 20)
    draws: int = value("N", 20)
    models: int = value("N", 3)
    batch: int = value("N", 250)

    def __call__(self) -> int:
        """See `Command`."""
        from fedjax_sim.reports.landscape import report
        from fedjax_sim.reports.landscape.measurement import Settings

        chosen = {field.name: getattr(self, field.name) for field in dataclasses.fields(Settings)}
        report.draw(_one_or_all(self.runs), self.out, Settings(**chosen), tell=_say)
        return 0


@dataclasses.dataclass(frozen=True)
class Export:
    """Writes the weights of a run's deployed model at its newest checkpoint into one file, each under its
    path: params/fc1/kernel and so on. The data need not be there. FILE ends in .npz, or in .safetensors, for
    which that package has to be installed.

    Attributes:
      given: the folder of the run, and the file to write
      best: the model that a callback kept as the best, instead of the newest
    """

    examples: ClassVar = (
        ("fedjax-sim export runs/a model.npz", "the newest weights"),
        ("fedjax-sim export runs/a best.npz --best", "those of callback keep_best"),
    )

    given: tuple[str, ...] = words("FOLDER FILE", least=2, most=2, kind="folder file")
    best: bool = switch()

    def __call__(self) -> int:
        """See `Command`."""
        from fedjax_sim import runs
        from fedjax_sim.runs import export

        folder, file = self.given
        export.checked_path(file)
        print(f"wrote {runs.load(folder).export(file, best=self.best)}")
        return 0
