"""What a run writes down: tidy rows, their journal while it runs, and their table afterwards.

The journal (`journal.jsonl`) gets one line a round, flushed at once, so that a kill costs at most the round
under way; a line is whole or it does not count. `metrics.parquet` is written from it at checkpoints and at
the end. Wall-clock time is never the same twice, so it has a file of its own (`timing.csv`), and the metrics
of a run that was cut and resumed are bit for bit those of one that was not.

No NaN and no infinity gets into the metrics. A value that is not finite is written under the name
`nonfinite/<metric>` instead, as -1 for minus infinity, 1 for infinity and 0 for NaN, with a warning.
"""

import json
import math
import os
import warnings
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fedjax_sim.errors import UserError

JOURNAL, METRICS, TIMING = "journal.jsonl", "metrics.parquet", "timing.csv"


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


def finite(rows: Iterable[Row]) -> list[Row]:
    """The rows, those with a value that is not finite renamed and coded as this module's docstring says."""
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

    def append(self, text: str) -> None:
        self.codes.append(self.known.setdefault(text, len(self.known)))

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
        for row in rows:
            self._rounds.append(row.round)
            self._clients.append(row.client)
            self._values.append(row.value)
            for name, column in self._texts.items():
                column.append(getattr(row, name))

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
        """One number over time: (rounds i32[T], values f64[T]); empty if it was never recorded."""
        wanted = {"metric": metric, "layer": layer, "state": state}
        chosen = np.asarray(self._clients, np.int32) == client
        for name, text in wanted.items():
            column = self._texts[name]
            chosen &= np.asarray(column.codes, np.int32) == column.known.get(text, -1)
        return np.asarray(self._rounds, np.int32)[chosen], np.asarray(self._values, np.float64)[chosen]

    def last(self, metric: str, **where: Any) -> float:
        """The newest value of a series.

        Raises:
          UserError: it was never recorded.
        """
        values = self.series(metric, **where)[1]
        if not len(values):
            known = ", ".join(self.names()) or "nothing"
            raise UserError("metric", metric, "this run has not recorded it", f"It has {known}.")
        return float(values[-1])

    def by_client(self, metric: str, round_index: int) -> tuple[np.ndarray, np.ndarray]:
        """A round's values of all clients: (ids i32[n], values f64[n])."""
        known = self._texts["metric"]
        clients = np.asarray(self._clients, np.int32)
        chosen = (np.asarray(known.codes, np.int32) == known.known.get(metric, -1)) & (clients >= 0)
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
        """The columns as a pandas DataFrame; needs pandas, which fedjax_sim does not."""
        return self.to_arrow().to_pandas()


def write_parquet(table: Table, path: str | Path) -> None:
    """Writes the table in one go: a reader sees the old file or the new one, never half of it."""
    path = Path(path)
    unfinished = path.with_name(path.name + ".part")
    pq.write_table(table.to_arrow(), unfinished)
    os.replace(unfinished, path)


def read_parquet(path: str | Path) -> Table:
    """Reads what `write_parquet` wrote."""
    columns = pq.read_table(path, columns=list(Row._fields))
    values = [columns[name].to_pylist() for name in Row._fields]
    return Table(Row(*row) for row in zip(*values, strict=True))


# --- while it runs ------------------------------------------------------------------------------------


class Journal:
    """The rows and times of a run in progress, on disk; `table` holds the rows.

    Opening it keeps rounds 1 … `upto` of what is there and cuts off the rest, torn lines included.

    Attributes:
      table: all rows so far.
      last: newest round on disk.
      seconds: wall-clock time of all rounds so far.
    """

    def __init__(self, folder: str | Path, upto: int | None = 0):
        folder = Path(folder)
        self._path = folder / METRICS
        self.table, self.last, self.seconds = Table(), 0, 0.0
        end = 0
        for number, rows, offset in read_journal(folder / JOURNAL):
            if upto is not None and number > upto:
                break
            self.table.extend(rows)
            self.last, end = number, offset
        self._rows = _opened_at(folder / JOURNAL, end)
        lines = _timing_lines(folder / TIMING, self.last)
        self.seconds = sum(float(line.split(",")[1]) for line in lines)
        header = "round,seconds,clients\n"
        self._times = _opened_at(folder / TIMING, 0)
        self._times.write((header + "".join(lines)).encode())
        self._times.flush()

    def append(self, number: int, rows: Iterable[Row], seconds: float, clients: int) -> list[Row]:
        """Writes a round's rows and how long it took. Returns the rows as they were written."""
        rows = finite(rows)
        self.table.extend(rows)
        self._rows.write((json.dumps({"round": number, "rows": rows}, separators=(",", ":")) + "\n").encode())
        self._rows.flush()
        self._times.write(f"{number},{seconds:.6f},{clients}\n".encode())
        self._times.flush()
        self.last, self.seconds = number, self.seconds + seconds
        return rows

    def sync(self) -> None:
        """Brings the journal to the disk itself (a power cut spares it), and writes the table."""
        self._rows.flush()
        os.fsync(self._rows.fileno())
        write_parquet(self.table, self._path)

    def close(self) -> None:
        """Closes the files."""
        self._rows.close()
        self._times.close()


def read_journal(path: str | Path) -> Iterator[tuple[int, list[Row], int]]:
    """Whole lines of a journal, in order and without a gap: (round, rows, offset of the line's end)."""
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        return
    offset, expected = 0, 1
    for line in content.splitlines(keepends=True):
        try:
            entry = json.loads(line)
            rows = [Row(*values) for values in entry["rows"]]
            number = entry["round"]
        except (ValueError, TypeError, KeyError):
            return
        if number != expected or not line.endswith(b"\n"):
            return
        offset, expected = offset + len(line), expected + 1
        yield number, rows, offset


def read_timing(folder: str | Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(rounds i64[R], seconds f64[R], clients trained i64[R]) of a run's folder."""
    lines = [line.split(",") for line in _timing_lines(Path(folder) / TIMING, None)]
    columns = list(zip(*lines, strict=True)) or [(), (), ()]
    return np.array(columns[0], np.int64), np.array(columns[1], np.float64), np.array(columns[2], np.int64)


def _timing_lines(path: Path, upto: int | None) -> list[str]:
    try:
        lines = path.read_text().splitlines(keepends=True)[1:]
    except FileNotFoundError:
        return []
    whole = [line for line in lines if line.endswith("\n") and line.count(",") == 2]
    return whole if upto is None else [line for line in whole if int(line.split(",")[0]) <= upto]


def _opened_at(path: Path, offset: int) -> IO[bytes]:
    path.touch()
    file = path.open("r+b")
    file.truncate(offset)
    file.seek(offset)
    return file
