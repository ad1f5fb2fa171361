"""What a run recorded, wherever it lies: in files of the run's own folder, or in the pack of a study.

A pack is two files beside the folder `runs` of a study. They hold the records of its finished runs:

    runs.parquet   metrics: the columns of `metrics.parquet`, and `run`; a row group (or several) for each run
    runs.json      what each run's config.yaml, provenance.json and timing.csv say

A run's name in both is the path of its folder below `runs`, so that a study can be moved. `runs.json`:

    {"format": 1,
     "shared": {"config": {…}, "provenance": {…}},      settings and facts that are the same in all runs
     "runs": {"FedMR/base/seed0": {"config": {…}, "provenance": {…},                 those that are not
                                   "timing": [[round, seconds, cpu_seconds, clients], …]}}}

Each section of a configuration stands on a line of its own. A CPU time that was not recorded is null.
"""

import copy
import functools
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fedjax_sim import config as config_lib
from fedjax_sim import records
from fedjax_sim.config import RunConfig
from fedjax_sim.core import paths
from fedjax_sim.core.errors import UserError
from fedjax_sim.records import Lap, Row, Table

FORMAT = 1
CONFIG, PROVENANCE = "config.yaml", "provenance.json"
RUNS = "runs"
"""Name of the folder that a pack stands for, and the stem of the pack's files."""


class Records(Protocol):
    """What a run recorded. Every method raises UserError for what is missing or cannot be read."""

    def settings(self) -> Mapping[str, Any]:
        """The configuration as it is written, of whichever version wrote it."""
        ...

    def config(self) -> RunConfig:
        """The configuration."""
        ...

    def provenance(self) -> dict[str, Any]:
        """What `fedjax_sim.runs.provenance` wrote at the start of the run."""
        ...

    def laps(self) -> list[Lap]:
        """What each round cost."""
        ...

    def reached(self) -> int:
        """The newest round in the run's table; 0 without one."""
        ...

    def read(self, rounds: int) -> tuple[Table, int]:
        """The rows of the run, which is to have so many rounds, and the newest round that they know."""
        ...


class Files:
    """Records in a run's folder.

    Attributes:
      path: of the folder.
    """

    def __init__(self, path: Path):
        self.path = path

    def settings(self) -> Mapping[str, Any]:
        """See `Records`, as for the other methods."""
        return config_lib.read_yaml(self.path / CONFIG)

    def config(self) -> RunConfig:
        """See `Records`."""
        return config_lib.read_config(self.path / CONFIG)

    def provenance(self) -> dict[str, Any]:
        """See `Records`."""
        try:
            return json.loads((self.path / PROVENANCE).read_text())
        except (OSError, ValueError) as error:
            why = f"{PROVENANCE} cannot be read: {error}"
            raise UserError("folder", str(self.path), why, "Start the run anew.") from None

    def laps(self) -> list[Lap]:
        """See `Records`."""
        return records.read_timing(self.path)

    def reached(self) -> int:
        """See `Records`."""
        return records.reached(self.path)

    def read(self, rounds: int) -> tuple[Table, int]:
        """See `Records`."""
        return records.read(self.path, rounds)


class Packed:
    """Records in a pack.

    Attributes:
      pack: where.
      name: of the run in there.
    """

    def __init__(self, pack: "Pack", name: str):
        self.pack, self.name = pack, name

    def settings(self) -> Mapping[str, Any]:
        """See `Records`, as for the other methods."""
        return self._told("config")

    def config(self) -> RunConfig:
        """See `Records`."""
        return config_lib.from_dict(self.settings())

    def provenance(self) -> dict[str, Any]:
        """See `Records`."""
        return self._told("provenance")

    def laps(self) -> list[Lap]:
        """See `Records`."""
        timing = self.pack.content()["runs"][self.name]["timing"]
        return [Lap(number, wall, math.nan if cpu is None else cpu, n) for number, wall, cpu, n in timing]

    def reached(self) -> int:
        """See `Records`."""
        return int(self.pack.rows(self.name, ["round"])["round"].to_numpy().max(initial=0))

    def read(self, rounds: int) -> tuple[Table, int]:
        """See `Records`. Only finished runs are packed, so the number of rounds makes no difference."""
        del rounds
        table = records.from_arrow(self.pack.rows(self.name, list(Row._fields)))
        return table, int(table.column("round").max(initial=0))

    def _told(self, about: str) -> dict[str, Any]:
        content = self.pack.content()
        return copy.deepcopy({**content["shared"][about], **content["runs"][self.name][about]})


class Pack:
    """The records of the finished runs of one study.

    Attributes:
      runs: the folder that it stands for.
      about: the file of configurations, provenance and times.
      table: the file of metrics.
    """

    def __init__(self, runs: Path, about: Path | None = None, table: Path | None = None):
        self.runs = runs
        self.about = about or runs.with_name(f"{RUNS}.json")
        self.table = table or runs.with_name(f"{RUNS}.parquet")

    def content(self) -> dict[str, Any]:
        """What `about` holds; not to be changed.

        Raises:
          UserError: it is damaged, or of another format.
        """
        try:
            stat = self.about.stat()
            return _parsed(self.about, (stat.st_ino, stat.st_mtime_ns, stat.st_size))
        except (OSError, ValueError, LookupError, TypeError) as error:
            if isinstance(error, UserError):
                raise
            why = f"it cannot be read: {' '.join(str(error).split())}"
            fix = "Restore that file, or remove it together with its runs.parquet."
            raise UserError("pack", str(self.about), why, fix) from None

    def names(self) -> list[str]:
        """The runs in it; none if there is no pack."""
        # Without its table it is no pack: another program may have a runs.json of its own.
        return list(self.content()["runs"]) if self.about.is_file() and self.table.is_file() else []

    def rows(self, name: str, columns: Sequence[str]) -> pa.Table:
        """Columns of one run's metrics.

        Raises:
          UserError: the file is damaged.
        """
        try:
            with pq.ParquetFile(self.table) as file:
                number = file.schema_arrow.names.index("run")
                groups = [i for i in range(file.num_row_groups) if _may_hold(file, i, number, name)]
                found = file.read_row_groups(groups, columns=["run", *columns])
            return found.filter(pc.field("run") == name).select(list(columns))
        except (pa.ArrowException, OSError, LookupError, ValueError) as error:
            why = f"it cannot be read: {' '.join(str(error).split())}"
            raise UserError("pack", str(self.table), why, "Restore that file.") from None

    def write(self, sources: Mapping[str, Records]) -> None:
        """Writes a pack of these runs. It takes the place of an older one after it was read and found equal.

        An older pack must have no run that the new one has not: of a process that is killed between the two
        files, the new table and the older `about` are left, and are whole.

        Raises:
          UserError: a record cannot be packed without loss; nothing has changed.
        """
        with paths.whole(self.about) as about, paths.whole(self.table) as table:
            with about.open("w") as text:
                text.write(_text(_about(sources)) + "\n")
                paths.to_disk(text)
            with table.open("wb") as file:
                _write_tables(sources, file)
                paths.to_disk(file)
            draft = Pack(self.runs, about, table)
            for name, source in sources.items():
                if lost := differing(source, Packed(draft, name)):
                    why = f"its {lost} cannot be packed without loss"
                    raise UserError("run", name, why, "Keep this study in its folders.")
        sync(self.about.parent)


def find(folder: Path) -> Packed | None:
    """The records of the run that had this folder, if a pack has them. `folder` is absolute."""
    for runs in folder.parents:
        if runs.name == RUNS:
            pack, name = Pack(runs), folder.relative_to(runs).as_posix()
            if name in pack.names():
                return Packed(pack, name)
    return None


def end(source: Records) -> int:
    """The last round of a run: that in which a callback stopped it, if one did."""
    stopped = source.provenance().get("stopped")
    return source.config().rounds if stopped is None else stopped["round"]


def differing(one: Records, other: Records) -> str:
    """In what two records differ: "configuration", "provenance", "times", "metrics", or "" if in nothing."""
    if _exact(one.settings()) != _exact(other.settings()):
        return "configuration"
    if _exact(one.provenance()) != _exact(other.provenance()):
        return "provenance"
    if _exact(_timing(one)) != _exact(_timing(other)):
        return "times"
    last = end(other)
    tables = [kept.read(last)[0] for kept in (one, other)]
    return "" if all(_alike(*(table.column(name) for table in tables)) for name in Row._fields) else "metrics"


def sync(folder: Path) -> None:
    """Brings a folder's list of files to the disk itself."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- the two files ------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def _parsed(path: Path, version: tuple[int, ...]) -> dict[str, Any]:
    del version  # of the file: another one is read anew
    content = json.loads(path.read_text())
    if content["format"] != FORMAT:
        why = f"its format is {content['format']}, and this fedjax_sim reads {FORMAT}"
        raise UserError("pack", str(path), why, "Use the fedjax_sim that wrote it.")
    if not all(isinstance(content[part], dict) for part in ("shared", "runs")):
        raise TypeError("this is not a pack of runs")
    return content


def _may_hold(file: pq.ParquetFile, group: int, column: int, name: str) -> bool:
    known = file.metadata.row_group(group).column(column).statistics
    return known is None or not known.has_min_max or known.min <= name <= known.max


def _write_tables(sources: Mapping[str, Records], file: IO[bytes]) -> None:
    """Runs one by one, so that memory holds one at a time."""
    run = pa.field("run", pa.dictionary(pa.int32(), pa.string()))
    schema = Table().to_arrow().schema.insert(0, run)
    texts = [field.name for field in schema if field.name != "value"]
    # Values hardly repeat: a dictionary of them makes the file larger.
    options: dict[str, Any] = {"use_dictionary": texts, "write_statistics": ["run"]}
    with pq.ParquetWriter(file, schema, compression="zstd", compression_level=9, **options) as writer:
        for name, source in sources.items():
            table = source.read(end(source))[0].to_arrow()
            names = pa.DictionaryArray.from_arrays(pa.array(np.zeros(len(table), np.int32)), pa.array([name]))
            writer.write_table(table.add_column(0, run, names))


def _about(sources: Mapping[str, Records]) -> dict[str, Any]:
    told = {name: {"config": s.settings(), "provenance": s.provenance()} for name, s in sources.items()}
    shared = {part: _shared([one[part] for one in told.values()]) for part in ("config", "provenance")}
    runs = {
        name: {
            **{part: {k: v for k, v in one[part].items() if k not in shared[part]} for part in shared},
            "timing": _timing(sources[name]),
        }
        for name, one in told.items()
    }
    return {"format": FORMAT, "shared": shared, "runs": runs}


def _shared(mappings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The items that all mappings have alike."""
    first, *others = mappings
    return {
        key: value
        for key, value in first.items()
        if all(key in other and _exact(other[key]) == _exact(value) for other in others)
    }


def _alike(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two columns are the same; of floats the bits, so that a NaN is itself."""
    if one.dtype == np.float64:
        one, other = one.view(np.int64), other.view(np.int64)
    return np.array_equal(one, other)


def _timing(source: Records) -> list[list[float | None]]:
    return [[None if isinstance(x, float) and math.isnan(x) else x for x in lap] for lap in source.laps()]


def _exact(value: Any) -> str:
    """Text by which values are compared. The order of a mapping's keys does not matter; 1 and 1.0 differ."""
    return repr(dict(sorted(value.items(), key=str)) if isinstance(value, Mapping) else value)


def _text(value: Any, indent: str = "") -> str:
    """JSON in which a mapping that holds a mapping has a line for each key, and all else stands on one."""
    if not (isinstance(value, Mapping) and any(isinstance(v, Mapping) and v for v in value.values())):
        return json.dumps(value)
    lines = (f"{indent} {json.dumps(key)}: {_text(inner, f'{indent} ')}" for key, inner in value.items())
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
