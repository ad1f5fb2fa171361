"""What a tracker does with a run, and what a run's folder keeps of it.

A run that was cut and goes on continues the same run of the tracker: its id is in `trackers.json` in the
run's folder. The rounds after the newest checkpoint are computed again then, to the same bits. A session is
handed all rounds that are done when the run goes on, and those that are done again. It leaves out what its
tracker has already, or writes it to the same step. So no round is there twice, and none is missing that the
tracker had lost.
"""

import dataclasses
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from fedjax_sim.core import paths
from fedjax_sim.records.table import Row
from fedjax_sim.records.tensorboard import tag_of

FILE = "trackers.json"
"""In a run's folder: the ids of its runs in trackers."""


@dataclasses.dataclass(frozen=True)
class Opening:
    """What a tracker is told of a run that starts or goes on.

    Attributes:
      name: of the run.
      group: of the study that it belongs to; "" if it belongs to none.
      title: method, data and partition in a line.
      tags: words to find it by.
      settings: the configuration, dotted field -> plain value.
      provenance: versions, machine, checksums, as provenance.json has them.
      kept: what `keep` wrote of an earlier start of this run; empty if this is the first.
    """

    name: str
    group: str
    title: str
    tags: tuple[str, ...]
    settings: Mapping[str, Any]
    provenance: Mapping[str, Any]
    kept: Mapping[str, Any]


class Session(Protocol):
    """A run, open in a tracker.

    Attributes:
      kept: what the next start of the run has to know, JSON as it stands; `id` is in it.
    """

    kept: dict[str, Any]

    def log(self, number: int, values: Mapping[str, float]) -> None:
        """Hands over numbers of a round; what the tracker has already is left out.

        Args:
          number: of the round, from 1: the tracker's step.
          values: tag -> number.
        """
        ...

    def picture(self, name: str, png: bytes) -> None:
        """Hands over a picture of the whole run."""
        ...

    def summarise(self, values: Mapping[str, Any]) -> None:
        """Sets what is shown of the run as a whole: numbers and words by name."""
        ...

    def close(self, status: str) -> None:
        """Ends it: `finished`, `stopped`, `interrupted` or `failed`."""
        ...


def tagged(rows: Iterable[Row]) -> dict[int, dict[str, float]]:
    """Round -> tag -> value, with TensorBoard's tags; rows of single clients are left out."""
    rounds: dict[int, dict[str, float]] = {}
    for row in rows:
        tag = tag_of(row)
        if tag is not None:
            rounds.setdefault(row.round, {})[tag] = row.value
    return rounds


def dotted(mapping: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Nested mappings by dotted name; what is None is left out."""
    out: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            out |= dotted(value, f"{path}{key}.")
        elif value is not None:
            out[f"{path}{key}"] = value
    return out


def image_of(png: bytes) -> Any:
    """A picture as Pillow's image, which all trackers take."""
    from PIL import Image

    return Image.open(io.BytesIO(png))


def recall(folder: Path | None, key: str) -> dict[str, Any]:
    """What `keep` wrote in a run's folder under that key; empty where nothing is, or it cannot be read."""
    if folder is None:
        return {}
    try:
        return dict(_read(folder).get(key, {}))
    except (ValueError, TypeError):  # damaged: the tracker gets another run
        return {}


def keep(folder: Path | None, key: str, kept: Mapping[str, Any]) -> None:
    """Writes down, in one go, what the next start of a run has to know of a tracker."""
    if folder is None:
        return
    try:
        there = _read(folder)
    except (ValueError, TypeError):
        there = {}
    with paths.whole(folder / FILE) as unfinished:
        unfinished.write_text(json.dumps({**there, key: dict(kept)}, indent=2) + "\n")


def _read(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / FILE).read_text()))
    except FileNotFoundError:
        return {}
