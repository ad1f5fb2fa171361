"""What a partition looks like: counts, a few lines of text, a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fedjax_sim.core.errors import UserError
from fedjax_sim.data.partition_files import Partition
from fedjax_sim.data.ragged import Ragged
from fedjax_sim.data.samples import Samples


def label_counts(partition: Partition, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """i64[N, C]: training samples of each class at each client.

    Args:
      partition: N clients.
      labels: i32[n] of the training set.
      num_classes: C.
    """
    return counts_of(Ragged.of(partition.train), labels, num_classes)


def counts_of(parts: Ragged, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """i64[N, C]: samples of each class in each of the lists.

    Args:
      parts: N lists.
      labels: i32[n] of the samples.
      num_classes: C.

    Raises:
      UserError: a label is not below C.
    """
    held = labels[parts.flat]
    if held.max(initial=0) >= num_classes:
        raise UserError("labels", int(held.max()), f"there are {num_classes} classes", "Count all of them.")
    cells = parts.owners * num_classes + held
    return np.bincount(cells, minlength=len(parts) * num_classes).reshape(len(parts), num_classes)


def effective_classes(counts: np.ndarray) -> np.ndarray:
    """f64[N]: exp of the entropy of each client's label distribution; C if even, 1 if one class only."""
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    return np.exp(-(shares * logs).sum(1))


def held_by_nobody(partition: Partition, dataset: Samples) -> tuple[int, list[str]]:
    """Training samples that neither a client nor the server holds, and the classes that no client trains on.

    Of the classes only those of which the set has training samples.
    """
    aside = () if partition.server is None else partition.server
    count, labels = dataset.train_size - len(partition.held()) - len(aside), dataset.train_classes
    if labels is None:
        return count, []
    there, trained = (np.bincount(each) > 0 for each in (labels, labels[Ragged.of(partition.train).flat]))
    there[: len(trained)] &= ~trained
    return count, [dataset.class_names[c] for c in np.flatnonzero(there)]


def summary(partition: Partition, dataset: Samples) -> str:
    """A few lines for a person: sizes, heterogeneity, overlap, local tests."""
    sizes = partition.sizes()
    held = np.bincount(Ragged.of(partition.train).distinct().flat, minlength=dataset.train_size)
    recipe = partition.recipe
    facts = [f"{k} {recipe[k]}" for k in _FACTS.get(str(recipe.get("kind")), ()) if recipe.get(k) is not None]
    if partition.test is None:
        tests = "none"
    else:
        counts = Ragged.of(partition.test).sizes
        tests = (
            f"{counts.min():,} to {counts.max():,} samples a client, out of the {partition.test_from} images"
        )
    how = ", ".join([str(recipe.get("kind", "?")), *facts])
    spread = f"{sizes.min():,} / {np.median(sizes):,.0f} / {sizes.max():,}"
    used, shared = int((held > 0).sum()), int((held > 1).sum())
    left, lost = held_by_nobody(partition, dataset)
    nobody = ""
    if partition.test is not None and partition.test_from == "train":
        nobody = f"; {len(np.unique(Ragged.of(partition.test).flat)):,} held out for clients' tests"
    nobody += f"; {left:,} by nobody" + (f", all of {named(lost)} among them" if lost else "")
    lines = [
        f"{partition.num_clients:,} clients of {dataset.name}, {how}",
        f"  samples a client   {spread} (min / median / max)",
        *_mixes(partition, dataset),
        f"  samples used       {used:,} of {len(held):,}; {shared:,} by more than one client{nobody}",
        f"  local tests        {tests}",
    ]
    if partition.server is not None:
        lines.append(f"  put aside          {len(partition.server):,} samples, for the server")
    if partition.rng_ids is not None:
        lines.append(f"  randomness         {len(np.unique(partition.rng_ids)):,} keys for all clients")
    return "\n".join(lines)


def _mixes(partition: Partition, dataset: Samples) -> list[str]:
    """The line of `summary` about classes, if the samples have them."""
    if dataset.train_classes is None:
        return []
    counts = label_counts(partition, dataset.train_classes, dataset.task.num_classes)
    classes = effective_classes(counts)
    mixes = f"{classes.min():.2f} / {np.median(classes):.2f} / {classes.max():.2f} of {counts.shape[1]}"
    return [f"  effective classes  {mixes} (exp of the label entropy)"]


def named(classes: Sequence[str], most: int = 5) -> str:
    """`class 3`, or `classes a, b, c, d, e …`."""
    return (
        ("class " if len(classes) == 1 else "classes ")
        + ", ".join(classes[:most])
        + (" …" if len(classes) > most else "")
    )


_FACTS = {
    "dirichlet": ("alpha", "seed", "tries"),
    "dirichlet-classes": ("alpha", "seed"),
    "pathological": ("classes_per_client", "seed"),
    "shards": ("classes_per_client", "seed"),
    "quantity": ("sigma", "seed"),
    "iid": ("seed",),
    "domain": ("seed",),
    "natural": ("seed", "writers_too_small"),
    "identical": ("seed",),
    "file": ("path",),
}


class Columns(NamedTuple):
    """What `plot` draws of clients in order.

    Attributes:
      sizes: f64[columns], mean number of samples.
      smallest: i64[columns], of the column's smallest client.
      largest: likewise.
      shares: f64[columns, C], mean share of each class.
      each: clients of a column, on average.
    """

    sizes: np.ndarray
    smallest: np.ndarray
    largest: np.ndarray
    shares: np.ndarray
    each: float

    @classmethod
    def of(cls, sizes: np.ndarray, shares: np.ndarray) -> "Columns":
        """A column for each client, or `_COLUMNS` in all of more than `_APART`.

        Args:
          sizes: i64[N], samples of the clients.
          shares: f64[N, C], of each class.
        """
        clients = len(sizes)
        if clients <= _APART:
            return cls(sizes, sizes, sizes, shares, 1)
        starts = np.arange(_COLUMNS) * clients // _COLUMNS
        members = np.diff(starts, append=clients)
        return cls(
            np.add.reduceat(sizes, starts) / members,
            np.minimum.reduceat(sizes, starts),
            np.maximum.reduceat(sizes, starts),
            np.add.reduceat(shares, starts) / members[:, None],
            clients / _COLUMNS,
        )


_APART, _COLUMNS = 1000, 500
"""So many clients have a column each in a picture; of more there are so many columns."""


def plot(partition: Partition, dataset: Samples, path: str | Path) -> None:
    """Draws clients by classes, with sizes above, and saves it (the suffix says the format).

    Clients are sorted by their most frequent class and its share. A cell's colour is the class's
    share of that client, so that small clients are as visible as large ones; sizes have their own
    panel. Columns have no borders: a thousand clients stay readable. Of more, a column is the mean of
    neighbours in that order, 500 columns in all, and a band in the upper panel goes from the smallest
    client of a column to the largest.

    Args:
      partition: N clients.
      dataset: what they hold.
      path: of the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if dataset.train_classes is None:
        counts = partition.sizes()[:, None]
    else:
        counts = label_counts(partition, dataset.train_classes, dataset.task.num_classes)
    shares = counts / counts.sum(1, keepdims=True)
    top = shares.argmax(1)
    order = np.lexsort((-shares[np.arange(len(top)), top], top))
    clients, classes = counts.shape
    drawn = Columns.of(counts.sum(1)[order], shares[order])
    width, height = float(np.clip(clients / 10, 6, 14)), float(np.clip(classes / 4, 2.5, 9))
    figure = Figure(figsize=(width, height + 1.6), layout="constrained")
    FigureCanvasAgg(figure)
    bars, cells = figure.subplots(2, 1, sharex=True, height_ratios=(1, max(2.0, height / 1.2)))
    edges = np.arange(len(drawn.shares) + 1) - 0.5
    bars.stairs(drawn.sizes, edges, fill=True, color="0.4")
    if drawn.each > 1:
        bars.stairs(drawn.largest, edges, baseline=drawn.smallest, fill=True, color="0.4", alpha=0.3)
    bars.set_ylabel("samples")
    bars.spines[["top", "right"]].set_visible(False)
    picture = cells.imshow(
        drawn.shares.T, aspect="auto", origin="lower", cmap="Blues", vmin=0, vmax=1, interpolation="nearest"
    )
    figure.colorbar(picture, ax=cells, label="share of the client's samples", fraction=0.03, pad=0.01)
    if classes <= 30:
        cells.set_yticks(range(classes), dataset.class_names or ("all",), fontsize=8)
    cells.set_ylabel("class" if dataset.class_names else "samples")
    if clients <= 40:
        cells.set_xticks(range(clients), order, fontsize=7)
        cells.set_xlabel("client")
    else:
        columns = f"; a column is the mean of {drawn.each:,.0f}" if drawn.each > 1 else ""
        cells.set_xlabel(f"{clients:,} clients, sorted by their most frequent class{columns}")
        cells.tick_params(labelbottom=drawn.each == 1)
    bars.set_title(summary(partition, dataset).splitlines()[0], fontsize=9, loc="left")
    figure.savefig(Path(path).expanduser(), dpi=120)
