"""What a run writes down: tidy rows, their journal while it runs, and their table afterwards.

The journal (`journal.jsonl`) gets one line a round, flushed at once, so that a kill costs at most the round
under way; a line is whole or it does not count. `metrics.parquet` is written from it at checkpoints, and at
the end when all else is in place: a run is finished when that table reaches its last round, and the journal
is then needed no more, unless the run is to get more rounds. For these a line says which metrics are there
only because its round was the last: a run of more rounds does not have them, and they count no more.

Time is never the same twice, so it has a file of its own (`timing.csv`), and the metrics of a run that was
cut and resumed are bit for bit those of one that was not. Its columns:

    round          from 1; a round that was run again after a cut has its newest cost only
    seconds        wall-clock time; includes time when the process was stopped or others had the processor
    cpu_seconds    of all threads of the process, user and system; includes neither of these, and not what an
                   accelerator does; empty in files of older versions
    clients        trained in the round

The first round of each start includes compilation. Rounds that ran as one program have each its share of it.

No NaN and no infinity gets into the metrics. A value that is not finite is written under the name
`nonfinite/<metric>` instead, as -1 for minus infinity, 1 for infinity and 0 for NaN, with a warning.
"""

import csv
import importlib.util
import json
import math
import re
import warnings
from array import array
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fedjax_sim.core import paths
from fedjax_sim.core.errors import UserError

JOURNAL, METRICS, TIMING = "journal.jsonl", "metrics.parquet", "timing.csv"
_JSON = json.JSONEncoder(separators=(",", ":"))


class Row(NamedTuple):
    """One number of a run.

    Attributes:
      round: rounds of training that the model had behind it, from 1; for training metrics the round itself.
      metric: what was measured.
      value: the number.
      layer: at which layer, or "".
      client: of which client, or -1.
      state: of which model (`start`, `before`, `after` …), or "".
    """

    round: int
    metric: str
    value: float
    layer: str = ""
    client: int = -1
    state: str = ""


def make_row(number: int, metric: str, value: float, **where: Any) -> Row:
    """A row of round `number`; for a value that is not defined one that says so.

    Args:
      number: of the round, from 1.
      metric: its name.
      value: the number; one that is not finite is not defined.
      **where: `layer`, `client` and `state`, as in `Row`.
    """
    if math.isfinite(value):
        return Row(number, metric, float(value), **where)
    return Row(number, f"undefined/{metric}", 1.0, **where)


def goal_of(metric: str) -> str:
    """`max` or `min`: which is better of a metric, by its name."""
    return "min" if re.search("loss|waste|time|mse", metric) else "max"


def encode_nonfinite(rows: Iterable[Row]) -> list[Row]:
    """The rows, those with a value that is not finite renamed and coded as this module's docstring says."""
    rows = list(rows)
    if all(map(math.isfinite, [row.value for row in rows])):
        return rows
    out = []
    for row in rows:
        if not math.isfinite(row.value):
            code = 0.0 if math.isnan(row.value) else math.copysign(1.0, row.value)
            warnings.warn(
                f"round {row.round}: {row.metric} is {row.value}, "
                f"written as nonfinite/{row.metric} = {code:g}",
                stacklevel=2,
            )
            row = row._replace(metric=f"nonfinite/{row.metric}", value=code)
        out.append(row)
    return out


class _Texts:
    """A column of strings, most of them repeated: a code for each row, and what the codes mean."""

    def __init__(self):
        self.codes, self.known = array("i"), {}

    def extend(self, texts: Sequence[str]) -> None:
        known = self.known
        self.codes.extend([known.setdefault(text, len(known)) for text in texts])

    def arrow(self) -> pa.DictionaryArray:
        texts = pa.array(list(self.known), pa.string())
        return pa.DictionaryArray.from_arrays(pa.array(np.asarray(self.codes, np.int32)), texts)

    def numpy(self) -> np.ndarray:
        return np.asarray(list(self.known) or [""], dtype=object)[np.asarray(self.codes, np.int64)]


class Table:
    """Rows as columns: what `Run.metrics` is.

    About 28 bytes a row in memory; `round` and `client` are i32, `value` f64, the others strings.
    """

    def __init__(self, rows: Iterable[Row] = ()):
        self._rounds, self._clients, self._values = array("i"), array("i"), array("d")
        self._texts = {name: _Texts() for name in ("metric", "layer", "state")}
        self.extend(rows)

    def extend(self, rows: Iterable[Row]) -> None:
        """Adds rows at the end."""
        rows = list(rows)
        if not rows:
            return
        columns = dict(zip(Row._fields, zip(*rows, strict=True), strict=True))
        self._rounds.extend(columns["round"])
        self._clients.extend(columns["client"])
        self._values.extend(columns["value"])
        for name, column in self._texts.items():
            column.extend(columns[name])

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[Row]:
        columns = [self.column(name).tolist() for name in Row._fields]
        return (Row(*values) for values in zip(*columns, strict=True))

    def __repr__(self):
        last = f", rounds to {max(self._rounds)}" if len(self) else ""
        return f"Table({len(self):,} rows{last}: {', '.join(self.names())})"

    def names(self) -> list[str]:
        """The metrics, in the order in which they first appeared."""
        return list(self._texts["metric"].known)

    def column(self, name: str) -> np.ndarray:
        """One column by the name of the `Row`'s field.

        Raises:
          UserError: no such column.
        """
        if name in self._texts:
            return self._texts[name].numpy()
        plain: dict[str, Any] = {"round": (self._rounds, np.int32), "client": (self._clients, np.int32)}
        plain["value"] = (self._values, np.float64)
        if name not in plain:
            raise UserError("column", name, "no such column", f"There are {', '.join(Row._fields)}.")
        return np.array(plain[name][0], plain[name][1])

    def series(
        self, metric: str, *, layer: str = "", client: int = -1, state: str = ""
    ) -> tuple[np.ndarray, np.ndarray]:
        """One number over time; without `layer`, `client` and `state` of the deployed model or the round.

        What is recorded of single clients, layers or states alone has rows of these only: ask with
        `client=3`, or take `by_client`.

        Args:
          metric: its name.
          layer: at which layer, or "".
          client: of which client, or -1.
          state: of which model, or "".

        Returns:
          (rounds i32[length], values f64[length]); empty if it was never recorded there.
        """
        wanted = {"metric": metric, "layer": layer, "state": state}
        chosen = np.asarray(self._clients, np.int32) == client
        for name, text in wanted.items():
            column = self._texts[name]
            chosen &= np.asarray(column.codes, np.int32) == column.known.get(text, -1)
        return np.asarray(self._rounds, np.int32)[chosen], np.asarray(self._values, np.float64)[chosen]

    def last(self, metric: str, **where: Any) -> float:
        """The newest value of a series.

        Raises:
          UserError: it was never recorded there.
        """
        values = self.series(metric, **where)[1]
        if not len(values):
            row = next((row for row in self if row.metric == metric), None)
            if row is not None:
                parts = {"layer": row.layer, "client": row.client, "state": row.state}
                told = [f"{name}={part!r}" for name, part in parts.items() if part not in ("", -1)]
                why = "this run has recorded it, but not " + ("there" if where else "of the round as a whole")
                fix = f"Say where, such as {', '.join(told)}." if told else "Give no layer, client, state."
                raise UserError("metric", metric, why, fix)
            known = ", ".join(self.names()) or "nothing"
            raise UserError("metric", metric, "this run has not recorded it", f"It has {known}.")
        return float(values[-1])

    def rounds_of(self, metric: str) -> np.ndarray:
        """The rounds of all its rows, whatever the layer, client and state. i32[n]."""
        return np.asarray(self._rounds, np.int32)[self._are(metric)]

    def _are(self, metric: str) -> np.ndarray:
        known = self._texts["metric"]
        return np.asarray(known.codes, np.int32) == known.known.get(metric, -1)

    def by_client(self, metric: str, round_index: int) -> tuple[np.ndarray, np.ndarray]:
        """A round's values of all clients: (ids i32[n], values f64[n])."""
        clients = np.asarray(self._clients, np.int32)
        chosen = self._are(metric) & (clients >= 0)
        chosen &= np.asarray(self._rounds, np.int32) == round_index
        return clients[chosen], np.asarray(self._values, np.float64)[chosen]

    def to_arrow(self) -> pa.Table:
        """The columns as a pyarrow Table."""
        columns = {
            "round": pa.array(self.column("round")),
            "metric": self._texts["metric"].arrow(),
            "value": pa.array(self.column("value")),
            "layer": self._texts["layer"].arrow(),
            "client": pa.array(self.column("client")),
            "state": self._texts["state"].arrow(),
        }
        return pa.table(columns)

    def to_pandas(self) -> Any:
        """The columns as a pandas DataFrame; texts are categories.

        Raises:
          UserError: pandas is not installed; nothing else of fedjax_sim needs it.
        """
        if importlib.util.find_spec("pandas") is None:
            fix = "Install it (pip install pandas), or take to_arrow(), column(name) or series(metric)."
            raise UserError("to_pandas", "pandas", "this package is not installed", fix)
        return self.to_arrow().to_pandas()


def write_parquet(table: Table, path: str | Path) -> None:
    """Writes the table in one go: a reader sees the old file or the new one, never half of it."""
    with paths.whole(Path(path)) as unfinished, unfinished.open("wb") as file:
        pq.write_table(table.to_arrow(), file)
        paths.to_disk(file)


def read_parquet(path: str | Path) -> Table:
    """Reads what `write_parquet` wrote."""
    with pq.ParquetFile(path) as file:
        return from_arrow(file.read(columns=list(Row._fields)))


def from_arrow(columns: pa.Table) -> Table:
    """The Table of what `Table.to_arrow` gave."""
    table = Table()
    table._rounds.frombytes(columns["round"].to_numpy().astype(np.int32).tobytes())
    table._clients.frombytes(columns["client"].to_numpy().astype(np.int32).tobytes())
    table._values.frombytes(columns["value"].to_numpy().astype(np.float64).tobytes())
    for name, texts in table._texts.items():
        # Encoded anew: codes in the order in which the texts first appear, as `extend` gives them.
        coded = columns[name].cast(pa.string()).combine_chunks().dictionary_encode()
        texts.codes.frombytes(coded.indices.to_numpy().astype(np.int32).tobytes())
        texts.known.update((text, code) for code, text in enumerate(coded.dictionary.to_pylist()))
    return table


def reached(folder: str | Path) -> int:
    """The newest round in a run's table; 0 without one, or with a damaged one beside a journal.

    Raises:
      UserError: the table is damaged, and there is no journal.
    """
    folder = Path(folder)
    try:
        with pq.ParquetFile(folder / METRICS) as file:
            rounds = file.read(columns=["round"])["round"].to_numpy()
    except FileNotFoundError:
        return 0
    except (pa.ArrowException, OSError, KeyError) as error:
        if (folder / JOURNAL).is_file():
            return 0
        why = f"{METRICS} cannot be read: {' '.join(str(error).split())}"
        raise UserError("folder", str(folder), why, "Restore that file, or remove the folder.") from None
    return int(rounds.max(initial=0))


def read(folder: str | Path, rounds: int) -> tuple[Table, int]:
    """The rows of a run of `rounds` rounds, and the newest round that they know.

    The table's, and before its end whichever knows more, the table or the journal.
    """
    folder = Path(folder)
    last = reached(folder)
    if last < rounds:
        table, number = Table(), 0
        for number, rows, _ in read_journal(folder / JOURNAL, rounds):  # noqa: B007
            table.extend(rows)
        if number >= last:
            return table, number
    return read_parquet(folder / METRICS), last


# --- while it runs ------------------------------------------------------------------------------------


class Lap(NamedTuple):
    """What a round cost: a line of timing.csv, whose columns this module's docstring explains.

    Attributes:
      round: from 1.
      seconds: wall-clock time, in whole microseconds.
      cpu_seconds: of the process; NaN if it was not recorded.
      clients: how many were trained.
    """

    round: int
    seconds: float
    cpu_seconds: float
    clients: int


def total(laps: Sequence[Lap], rounds: int) -> tuple[float, float | None]:
    """(seconds, CPU seconds) of all laps; the second is None unless each of so many rounds recorded it."""
    cpu = math.fsum(lap.cpu_seconds for lap in laps)
    return math.fsum(lap.seconds for lap in laps), None if math.isnan(cpu) or len(laps) < rounds else cpu


def pace(laps: Sequence[Lap]) -> tuple[float, float] | None:
    """(seconds of a round, clients a second) of a run, without its first call, which compiles.

    They are ratios of sums. A round's own seconds say little: rounds are computed while the host prepares or
    writes others, so the waiting for several may be in the line of one, and those beside it are almost 0.

    Args:
      laps: of all rounds, in their order. Those of the first call are the first ones of equal cost.

    Returns:
      None where no round is left, or they took no time.
    """
    first = next((n for n, lap in enumerate(laps) if lap.seconds != laps[0].seconds), len(laps))
    later = laps[first:]
    seconds = math.fsum(lap.seconds for lap in later)
    return (seconds / len(later), sum(lap.clients for lap in later) / seconds) if seconds else None


class Journal:
    """The rows and times of a run in progress, on disk; `table` holds the rows.

    Opening it keeps rounds 1 … `upto` of what is there and cuts off the rest, torn lines included. `rounds`:
    of the run, see `read_journal`.

    Attributes:
      table: all rows so far.
      last: newest round on disk.
      laps: what each round cost, those of earlier starts included.
    """

    def __init__(self, folder: str | Path, upto: int | None = 0, rounds: int | None = None):
        folder = Path(folder)
        self._path = folder / METRICS
        self.table, self.last = Table(), 0
        end = 0
        for number, rows, offset in read_journal(folder / JOURNAL, rounds):
            if upto is not None and number > upto:
                break
            self.table.extend(rows)
            self.last, end = number, offset
        self._rows = _opened_at(folder / JOURNAL, end)
        self.laps = [lap for lap in read_timing(folder) if lap.round <= self.last]
        with paths.whole(folder / TIMING) as unfinished:
            unfinished.write_text(timing(self.laps))
        self._times = (folder / TIMING).open("ab")

    def write(self, rows: Sequence[Row], lap: Lap, ending: Collection[str] = ()) -> None:
        """Writes a round's rows, which are finite and in the table already, and what it cost; see `flush`.

        Args:
          rows: of the round.
          lap: what it cost.
          ending: the metrics that are there only because the round is the run's last.
        """
        entry: dict[str, Any] = {"round": lap.round, "rows": rows}
        if ending:
            entry["ending"] = sorted(ending)
        self._rows.write((_JSON.encode(entry) + "\n").encode())
        self._times.write(_line(lap).encode())
        self.laps.append(lap)
        self.last = lap.round

    def flush(self) -> None:
        """Hands to the system what was written, so that it outlives this process."""
        self._rows.flush()
        self._times.flush()

    def sync(self) -> None:
        """Brings journal and times to the disk itself: a power cut spares them."""
        for file in (self._rows, self._times):
            paths.to_disk(file)

    def tabulate(self) -> None:
        """Writes the table. With the last round in it the run is finished."""
        write_parquet(self.table, self._path)

    def close(self) -> None:
        """Closes the files."""
        self._rows.close()
        self._times.close()


def read_journal(path: str | Path, rounds: int | None = None) -> Iterator[tuple[int, list[Row], int]]:
    """Whole lines of a journal, in order and without a gap: (round, rows, offset of the line's end).

    `rounds`: of the run; what a round before recorded only because it was the last then is left out.
    """
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        return
    offset, expected = 0, 1
    for line in content.splitlines(keepends=True):
        try:
            entry = json.loads(line)
            rows = [Row(*values) for values in entry["rows"]]
            number, ending = entry["round"], entry.get("ending", ())
        except (ValueError, TypeError, KeyError):
            return
        if number != expected or not line.endswith(b"\n"):
            return
        offset, expected = offset + len(line), expected + 1
        if rounds is not None and number < rounds:
            rows = [row for row in rows if row.metric.removeprefix("nonfinite/") not in ending]
        yield number, rows, offset


def read_timing(folder: str | Path) -> list[Lap]:
    """What each round in a run's folder cost; a torn line does not count."""
    try:
        text = (Path(folder) / TIMING).read_text()
    except FileNotFoundError:
        return []
    laps = []
    for cells in csv.DictReader(text[: text.rfind("\n") + 1].splitlines()):
        try:
            cpu = float(cells.get("cpu_seconds") or "nan")
            laps.append(Lap(int(cells["round"]), float(cells["seconds"]), cpu, int(cells["clients"])))
        except (ValueError, TypeError, KeyError):
            continue
    return laps


def timing(laps: Iterable[Lap]) -> str:
    """The content of timing.csv."""
    return ",".join(Lap._fields) + "\n" + "".join(map(_line, laps))


def _line(lap: Lap) -> str:
    cpu = "" if math.isnan(lap.cpu_seconds) else f"{lap.cpu_seconds:.6f}"
    return f"{lap.round},{lap.seconds:.6f},{cpu},{lap.clients}\n"


def _opened_at(path: Path, offset: int) -> IO[bytes]:
    path.touch()
    file = path.open("r+b")
    file.truncate(offset)
    file.seek(offset)
    return file
