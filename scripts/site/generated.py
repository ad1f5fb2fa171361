"""Pages of the site that are made from code: the configuration's fields, the commands' help."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def of_file(name: str) -> str:
    """A file of the repository, as it is."""
    return (ROOT / name).read_text(encoding="utf-8")


def configuration() -> str:
    """Every field of a run's configuration."""
    return "# Configuration\n"


def commands() -> str:
    """Every command's help."""
    return "# Commands\n"
