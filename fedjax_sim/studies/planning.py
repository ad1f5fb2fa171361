"""What the runs of a sweep will need in memory, before any of them begins."""

import dataclasses
from pathlib import Path

from fedjax_sim.config.sweep_files import Job, Sweep, as_sweep
from fedjax_sim.core.errors import UserError
from fedjax_sim.reports.shared import markdown
from fedjax_sim.runs import plan as of_runs
from fedjax_sim.runs.parts import human
from fedjax_sim.runs.plan import MemoryPlan


@dataclasses.dataclass(frozen=True)
class SweepPlan:
    """The plan of each method in each setting, for the first seed. `print` it.

    Attributes:
      plans: (job, its plan), in the order of the sweep.
      runs: of the whole sweep, one after another.
    """

    plans: tuple[tuple[Job, MemoryPlan], ...]
    runs: int

    @property
    def largest(self) -> tuple[Job, MemoryPlan]:
        """The one that needs most."""
        return max(self.plans, key=lambda pair: pair[1].peak)

    @property
    def fits(self) -> bool | None:
        """Whether all of them fit; None where the memory is not known."""
        found = [plan.fits for _, plan in self.plans]
        return False if False in found else None if None in found else True

    def __str__(self):
        heads, rows = ["method", "setting", "peak", "fits"], []
        for job, plan in self.plans:
            rows.append([job.method, job.column, human(plan.peak), _VERDICTS[plan.fits]])
        if not any(job.column for job, _ in self.plans):
            heads, *rows = ([first, *rest] for first, _, *rest in (heads, *rows))
        counted = f"{self.runs} run{'s' * (self.runs != 1)}, one after another"
        job, plan = self.largest
        told = [f"{counted}. Of each method and setting, with the first seed:", "", *markdown(heads, rows)]
        return "\n".join([*told, f"most is asked for by {job.name}:", "", str(plan)])


_VERDICTS = {True: "yes", False: "NO", None: "not known"}


def plan(sweep: Sweep | str | Path) -> SweepPlan:
    """What each method will need in each setting. Loads the data, and allocates nothing on a device.

    Args:
      sweep: of which the first seed is planned, as seeds differ by little; or the path of its file.

    Raises:
      UserError: a configuration cannot work; names the run.
    """
    sweep = as_sweep(sweep)
    first: dict[tuple[str, str], Job] = {}
    for job in sweep.jobs:
        first.setdefault((job.method, job.column), job)
    found = []
    for job in first.values():
        try:
            found.append((job, of_runs.plan(job.config)))
        except UserError as error:
            raise UserError(error.field, error.value, f"{error.why} (in {job.name})", error.fix) from None
    return SweepPlan(tuple(found), len(sweep.jobs))
