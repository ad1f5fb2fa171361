"""A page's partitions: who holds how much of what, in numbers and as pictures."""

import dataclasses
import functools
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedjax_sim import data
from fedjax_sim.config import RunConfig
from fedjax_sim.core.errors import UserError
from fedjax_sim.data import Partition, Samples
from fedjax_sim.reports.page.entries import Entry
from fedjax_sim.reports.page.pictures import Image, image_of_file
from fedjax_sim.runs import Run
from fedjax_sim.runs.folder import Folder

MOST_ROWS, MOST_PICTURES = 24, 4
LOADED = 2**28
"""Bytes of a data set up to which it is loaded for its labels, where the page needs them."""


@dataclasses.dataclass(frozen=True)
class Holding:
    """A partition in numbers.

    Attributes:
      name: of which setting and seed.
      kind: how it was made.
      clients: how many.
      samples: training samples that they hold together.
      sizes: samples a client: smallest, median, largest.
      classes: effective number of classes a client, likewise, and of how many; "" where it is not known.
      tests: samples of clients' own tests; "" for none.
      image: its picture; None where there is none.
    """

    name: str
    kind: str
    clients: str
    samples: str
    sizes: str
    classes: str
    tests: str
    image: Image | None


def holdings(entries: Sequence[Entry]) -> tuple[list[Holding], list[str]]:
    """(the different partitions, what is left out).

    Of every setting the partition of the first seed that has begun; another seed draws another one of the
    same kind.
    """
    first: dict[str, Entry] = {}
    for entry in entries:
        if entry.run is not None:
            first.setdefault(entry.column, entry)
    known: dict[object, tuple[list[str], Entry]] = {}
    for column, entry in first.items():
        assert entry.run is not None
        key = entry.run.recipe.get("crc32", column)
        known.setdefault(key, ([], entry))[0].append(column)
    found, notes = [], []
    for names, entry in list(known.values())[:MOST_ROWS]:
        assert entry.run is not None
        seed = f"seed {entry.config.seed}"
        name = ", ".join(
            [*filter(None, names[:2]), *([f"and {len(names) - 2} more"] * (len(names) > 2)), seed]
        )
        found.append(_holding(name, entry.run, picture=len(found) < MOST_PICTURES))
    if len(known) > MOST_ROWS:
        notes.append(f"The first {MOST_ROWS} of {len(known)} partitions.")
    if len(known) > MOST_PICTURES:
        notes.append(f"Pictures of the first {MOST_PICTURES}; each run's folder has its own.")
    seeds = {entry.config.seed for entry in entries}
    if len(seeds) > 1:
        notes.append("Each seed draws a partition of its own; those of one seed are shown.")
    return found, notes


def _holding(name: str, run: Run, *, picture: bool) -> Holding:
    recipe, clients = run.recipe, run.recipe.get("clients")
    kind = str(recipe.get("kind", "given"))
    if recipe.get("alpha") is not None and kind.startswith("dirichlet"):
        kind += f" (α = {recipe['alpha']})"
    partition, dataset = _partition(run), None
    samples = sizes = classes = tests = "–"
    if partition is not None:
        dataset = _dataset(run)
        counts = partition.sizes()
        samples, sizes = f"{int(counts.sum()):,}", _three(counts, ",.0f")
        if partition.test is not None:
            tests = _three(np.asarray([len(own) for own in partition.test]), ",.0f")
        if dataset is not None and dataset.train_classes is not None:
            try:
                table = data.label_counts(partition, dataset.train_classes, dataset.task.num_classes)
            except (UserError, IndexError):  # they are not the data that the run had
                dataset = None
            else:
                classes = f"{_three(data.effective_classes(table), '.1f')} of {table.shape[1]}"
    image = _picture(run, partition, dataset) if picture else None
    return Holding(name, kind, f"{clients:,}" if clients else "–", samples, sizes, classes, tests, image)


def _three(values: np.ndarray, style: str) -> str:
    return " / ".join(format(value, style) for value in (values.min(), np.median(values), values.max()))


def _partition(run: Run) -> Partition | None:
    """As it lies in the run's folder; it is not drawn again."""
    if run.folder is None:
        return run.partition
    path = Folder(run.folder).partition
    try:
        return data.load_partition(path) if path.is_file() else None
    except UserError:
        return None


def _dataset(run: Run) -> Samples | None:
    """The run's samples, if they can be had at little cost."""
    if "dataset" in run.config.given:
        return None
    return _loaded(_Key(repr(run.config.data), run.config, _bytes(run)))


@dataclasses.dataclass(frozen=True)
class _Key:
    """A data set by what its configuration says."""

    told: str
    config: RunConfig = dataclasses.field(compare=False)
    size: int = dataclasses.field(compare=False)


@functools.lru_cache(maxsize=4)
def _loaded(key: _Key) -> Samples | None:
    if key.size > LOADED:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return key.config.data.load()
    except (UserError, OSError):
        return None


def _bytes(run: Run) -> int:
    """Elements of the arrays of a run's data, as its provenance has them: bytes, of images."""
    if run.folder is None:
        return 0
    try:
        told = Folder(run.folder).records.provenance().get("data", {})
    except UserError:
        return 0
    shapes = [part["shape"] for part in told.values() if isinstance(part, dict) and "shape" in part]
    return int(sum(np.prod(shape, dtype=np.float64) for shape in shapes))


def _picture(run: Run, partition: Partition | None, dataset: Samples | None) -> Image | None:
    caption = (
        "Clients, sorted by their most frequent class; above, how many samples each has; below, which share "
        "of them is of each class."
    )
    drawn = None if run.folder is None else run.folder / "figures" / "partition.png"
    if drawn is not None and drawn.is_file():
        try:
            return image_of_file(drawn, "partition", caption)
        except UserError:
            pass  # it is drawn anew
    if partition is None or dataset is None:
        return None
    with tempfile.TemporaryDirectory() as home:
        path = Path(home) / "partition.png"
        try:
            data.plot(partition, dataset, path)
        except (UserError, IndexError):  # they are not the data that the run had
            return None
        return image_of_file(path, "partition", caption)
