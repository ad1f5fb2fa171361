"""Rows of a CSV file, one a case, written as they come."""

import csv
from pathlib import Path
from typing import Any


class Table:
    """The newest row of each case; a case that has one need not be measured again."""

    def __init__(self, path: Path, keys: tuple[str, ...], again: bool = False, earlier: Path | None = None):
        """Reads what is there.

        Args:
          path: of the file.
          keys: the columns that name a case.
          again: cases that are there are wanted too.
          earlier: another file of such rows, which is read first and left as it is.
        """
        self.path, self.keys, self.again = path, keys, again
        self.rows: list[dict[str, Any]] = []
        for file in dict.fromkeys([earlier or path, path]):
            self.rows = self._without(_read(file)) + _read(file)

    def wants(self, shown: dict[str, Any]) -> bool:
        """Whether the case is still to be measured."""
        return self.again or not self.of(shown)

    def of(self, shown: dict[str, Any]) -> list[dict[str, Any]]:
        """The case's row, if there is one."""
        return [row for row in self.rows if self._same(row, shown)]

    def keep(self, row: dict[str, Any]) -> None:
        """Writes a row to the file, in the place of an older one of its case."""
        self.rows = [*self._without([row]), row]
        fields = list(dict.fromkeys(name for one in self.rows for name in one))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fields, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)

    def add(self, row: dict[str, Any], seconds: float) -> None:
        """Keeps a row that took so many seconds, and prints it."""
        self.keep(row)
        print(f"{seconds:5.0f} s", {k: v for k, v in row.items() if k not in ("jax", "date")}, flush=True)

    def _without(self, new: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [old for old in self.rows if not any(self._same(old, row) for row in new)]

    def _same(self, row: dict[str, Any], shown: dict[str, Any]) -> bool:
        return all(str(row.get(key)) == str(shown[key]) for key in self.keys)


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
