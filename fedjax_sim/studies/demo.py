"""The demonstration: a sweep that comes with the package, and that runs on data which come with it too."""

from importlib import resources
from pathlib import Path

from fedjax_sim.core.documents import parse_yaml
from fedjax_sim.core.paths import local
from fedjax_sim.studies.sweep import Sweep, from_mapping


def text() -> str:
    """The sweep's file, with its comments."""
    return (resources.files("fedjax_sim.studies") / "demo.yaml").read_text(encoding="utf-8")


def sweep(out: str | Path | None = None, rounds: int | None = None) -> Sweep:
    """The sweep.

    Args:
      out: its folder; None: the file's, `runs/demo`.
      rounds: of each run; None: the file's. The further tables are of those rounds that are left.
    """
    mapping = parse_yaml(text())
    if out is not None:
        mapping["out"] = str(local(out, "--out"))
    if rounds is not None:
        mapping["base"]["rounds"] = rounds
        mapping["rounds_of_interest"] = [one for one in mapping["rounds_of_interest"] if one < rounds]
    return from_mapping(mapping)
