"""Whether runs of the same data setting were made on the same data, by the checksums in their provenance.

A data setting names data (`folder:photos`), and what it names may change between two runs. Runs of other data
settings are not looked at, nor are runs without checksums: those in memory, and very old ones.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from fedjax_sim.config import RunConfig
from fedjax_sim.data import Samples
from fedjax_sim.runs import provenance
from fedjax_sim.runs.own_code import in_short

Known = tuple[str, RunConfig, Mapping[str, Any]]
"""(name, configuration, provenance) of a run."""


def others(known: Iterable[Known]) -> dict[str, list[list[str]]]:
    """Data setting -> names of its runs, a list for each version of the data, the first run's version first.

    Settings of which all runs had the same data are left out.
    """
    found: dict[str, list[tuple[Mapping[str, Any], list[str]]]] = {}
    for name, config, about in known:
        data = about.get("data")
        if not data:
            continue
        versions = found.setdefault(_setting(config), [])
        for had, names in versions:
            if _alike(had, data):
                names.append(name)
                break
        else:
            versions.append((data, [name]))
    told = {setting: [names for _, names in versions] for setting, versions in found.items()}
    return {setting: versions for setting, versions in told.items() if len(versions) > 1}


def cautions(known: Iterable[Known]) -> list[str]:
    """A sentence for each data setting of which the runs had several versions of the data."""
    out = []
    for setting, versions in others(known).items():
        made = " ".join(f"Version {n}: {in_short(names)}." for n, names in enumerate(versions, 1))
        out.append(
            f"The data of {setting} changed between runs: their checksums are of {len(versions)} versions. "
            f"{made} A method with runs of another version than 1 is neither ranked nor paired. To have all "
            "runs on the same data, remove the folders of those whose version is not today's, and start "
            "again."
        )
    return out


def changed(dataset: Samples, recorded: Iterable[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Names of the runs that had other data than these.

    Args:
      dataset: what their data setting gives now.
      recorded: (name, provenance) of each run.
    """
    recorded = [(name, about["data"]) for name, about in recorded if about.get("data")]
    if not recorded:
        return []
    now = provenance.fingerprint(dataset)
    return [name for name, data in recorded if not _alike(data, now)]


def _setting(config: RunConfig) -> str:
    """The data that a run was to have: as Python gave them, or by its settings that are not the default."""
    if "dataset" in config.given:
        return str(config.given["dataset"])
    data = config.data
    more = [f"data_dir {data.data_dir}"] if data.data_dir is not None else []
    return ", ".join([data.source, *more, *(f"{name} {value}" for name, value in data.options.items())])


def _alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two fingerprints are of the same data, as far as both tell; names of data sets aside."""
    return all(one[part] == other[part] for part in one.keys() & other.keys() - {"name"})
