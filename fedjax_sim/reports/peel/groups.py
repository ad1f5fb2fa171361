"""Which runs belong together: seeds of one configuration, and the configurations of one model."""

import dataclasses

from fedjax_sim.core.errors import UserError
from fedjax_sim.reports import shared
from fedjax_sim.reports.peel import analysis
from fedjax_sim.reports.peel.analysis import Measurements
from fedjax_sim.reports.shared import Given
from fedjax_sim.runs import Run

__all__ = ["Given", "Group", "families", "groups"]


@dataclasses.dataclass(frozen=True, eq=False)
class Group(shared.Group):
    """Runs that differ in their seed only.

    Attributes:
      measured: what was measured in all of them.
    """

    measured: Measurements


def groups(given: Given) -> list[Group]:
    """Runs, or folders of runs, as groups of one model.

    Raises:
      UserError: a folder holds no run, a run is not finished or was not probed, two runs are the same, or
        their models have different layers.
    """
    found = [group for family in families(given) for group in family]
    analysis.pooled([group.measured for group in found])  # of one model, or refused
    return found


def families(given: Given) -> list[list[Group]]:
    """The same of any models: the groups of each model, told apart by the names of its layers.

    Raises:
      UserError: as `groups`, different layers excepted.
    """
    out: dict[tuple[str, ...], list[Group]] = {}
    for group in shared.groups(given, _group):
        out.setdefault(group.measured.names, []).append(group)
    return list(out.values())


def _group(name: str, made: tuple[Run, ...]) -> Group:
    measured = []
    for run in made:
        try:
            measured.append(analysis.measurements(run.metrics, run.config.seed))
        except UserError:
            why, fix = "the run has no records of the layer-peeled probe", "Run it with --peel.every."
            raise UserError("folder", shared.where(run), why, fix) from None
    return Group(name, made, analysis.pooled(measured))
