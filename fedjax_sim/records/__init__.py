"""What a run says of itself, row by row: rows, tables, journals, plots and TensorBoard events."""

from fedjax_sim.records.table import (
    JOURNAL,
    Journal,
    Lap,
    Row,
    Table,
    finite,
    reached,
    read,
    read_journal,
    read_parquet,
    read_timing,
    tidy,
    total,
    write_parquet,
)

__all__ = [
    "JOURNAL",
    "Journal",
    "Lap",
    "Row",
    "Table",
    "finite",
    "reached",
    "read",
    "read_journal",
    "read_parquet",
    "read_timing",
    "tidy",
    "total",
    "write_parquet",
]
