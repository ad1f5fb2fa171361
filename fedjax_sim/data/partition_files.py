"""The result of a partition, its checks, and its JSON files."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from fedjax_sim.core.documents import parse_json
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.paths import local, whole
from fedjax_sim.data.ragged import Ragged, once
from fedjax_sim.data.samples import Samples

FORMAT = "fedjax_sim.partition"
VERSION = 1
_RNG_IDS = "streams"
"""What files call `Partition.rng_ids`: a field of version 1, which keeps its name."""
_FIX = "Write it with fedjax_sim.data.save, or use one of the JSON files of FedMR's authors."


@dataclasses.dataclass(frozen=True, eq=False)
class Partition:
    """Who holds what.

    Attributes:
      train: i64[n_k] for each of the N clients, indices into the training images. Given as any sequence of
        arrays, it is held as one array with offsets (`fedjax_sim.data.ragged.Ragged`), as is `test`.
      test: i64[t_k] for each client, or None where clients have no test set of their own.
      test_from: `"test"` or `"train"`: the images that `test` points into (`holdout` takes part of
        the training images, which are then in no client's `train`).
      recipe: how it came about: kind, parameters, seed, tries, the set, versions. JSON as it stands.
      server: i64[h], training images that are put aside: the server's own, in no client's lists. None
        where there are none.
      rng_ids: i32[N], the number that each client's randomness is keyed by; None: its id. Clients with
        the same number and the same samples train alike.
    """

    train: Sequence[np.ndarray]
    test: Sequence[np.ndarray] | None = None
    test_from: str = "test"
    recipe: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    server: np.ndarray | None = None
    rng_ids: np.ndarray | None = None

    def __post_init__(self):
        if not len(self.train):
            raise UserError("partition.train", (), "no clients", "Give one array of indices for each client.")
        if self.test_from not in ("train", "test"):
            raise UserError(
                "partition.test_from", self.test_from, "neither 'train' nor 'test'", "Use one of them."
            )
        if self.test is not None and len(self.test) != len(self.train):
            why = f"{len(self.test)} test sets for {len(self.train)} clients"
            raise UserError(
                "partition.test", len(self.test), why, "Give one for each client, or none at all."
            )
        for part in ("train", "test"):
            given = getattr(self, part)
            if given is not None:
                object.__setattr__(self, part, _lists(part, given))
        if self.test_from == "train":
            self._check_held_out()
        if self.server is not None:
            object.__setattr__(self, "server", _indices("server", "the server", self.server))
            taken = once(self.server[np.isin(self.server, self.held())])
            if len(taken):
                why = f"clients hold {len(taken)} of the samples that are put aside for the server"
                raise UserError("partition.server", int(taken[0]), why, "Take them from one or the other.")
        if self.rng_ids is not None:
            object.__setattr__(self, "rng_ids", _checked_rng_ids(self.rng_ids, self.num_clients))

    @property
    def num_clients(self) -> int:
        """N."""
        return len(self.train)

    def sizes(self) -> np.ndarray:
        """i64[N]: training samples of each client."""
        return Ragged.of(self.train).sizes

    def held(self) -> np.ndarray:
        """i64[·]: the training images that some client trains or tests on, each once, sorted."""
        tests = [Ragged.of(self.test or ())] if self.test_from == "train" else []
        return once(np.concatenate([part.flat for part in (Ragged.of(self.train), *tests)]))

    def _check_held_out(self) -> None:
        train, tests = Ragged.of(self.train), Ragged.of(self.test or ())
        leaks = np.flatnonzero(np.isin(tests.flat, train.flat))
        if not len(leaks):
            return
        k, sample = tests.list_at(int(leaks[0])), int(tests.flat[leaks[0]])
        trainer = train.list_at(int(np.argmax(train.flat == sample)))
        why = (
            f"client {k} tests on this training image, and client {trainer} trains on it; the same holds for "
            f"{len(leaks)} of {len(tests.flat)} held-out samples"
        )
        fix = "Take what is held out from every client's `train`, or test on images of the test set."
        raise UserError("partition.test", sample, why, fix)

    def __repr__(self):
        sizes = self.sizes()
        tests = "no local tests" if self.test is None else f"local tests from {self.test_from}"
        kind = self.recipe.get("kind", "unknown")
        held = f"{sizes.min()} to {sizes.max()} samples"
        server = "" if self.server is None else f", {len(self.server):,} samples put aside"
        return f"Partition({kind}, {self.num_clients:,} clients of {held}, {tests}{server})"


def as_partition(given: Any) -> Partition | None:
    """A Partition or None as it is; of a sequence or mapping of index arrays, one a client, the Partition.

    Args:
      given: the clients of a mapping are numbered from 0; it must have every number up to the largest.

    Raises:
      UserError: it is none of these, or holds what no client can.
    """
    if given is None or isinstance(given, Partition):
        return given
    if isinstance(given, Mapping):
        if set(given) != set(range(len(given))):
            why = f"its keys are not the clients 0 to {len(given) - 1}"
            raise UserError("partition", list(given)[:5], why, "Number the clients from 0, without a gap.")
        given = [given[client] for client in range(len(given))]
    if not isinstance(given, list | tuple):
        fix = "Give a list of arrays, each client's indices into the training set, or fs.data.partition(…)."
        raise UserError("partition", type(given).__name__, "this is not a partition", fix)
    return Partition(tuple(given))


def describe(dataset: Samples) -> dict[str, Any]:
    """What a recipe says of the set, so that indices are not used on another one by mistake."""
    return {
        "dataset": dataset.name,
        "num_train": dataset.train_size,
        "num_test": dataset.test_size,
        "labels_crc32": dataset.answers_crc32,
    }


def check_partition(partition: Partition, dataset: Samples) -> None:
    """Raises UserError unless the indices lie inside the set, and the set is the one they were made for."""
    crc = partition.recipe.get("labels_crc32")
    if crc is not None and crc != describe(dataset)["labels_crc32"]:
        made_for = partition.recipe.get("dataset", "another set")
        why = f"made for {made_for}; the training labels of {dataset.name} are not the same"
        fix = "Load that set. (If other labels of the same images are meant: remove `labels_crc32` from it.)"
        raise UserError("partition.recipe", made_for, why, fix)
    bounds = {"train": dataset.train_size, "test": dataset.test_size}
    for part, bound in (("train", bounds["train"]), ("test", bounds[partition.test_from])):
        lists = Ragged.of(getattr(partition, part) or ())
        if lists.flat.max(initial=-1) >= bound:
            k = lists.list_at(int(np.argmax(lists.flat >= bound)))
            why = f"client {k} points beyond the {bound} images of {dataset.name}"
            fix = "Use the set that it was made for."
            raise UserError(f"partition.{part}", int(lists[k].max()), why, fix)
    if partition.server is not None and partition.server.max() >= bounds["train"]:
        why = f"beyond the {bounds['train']} training images of {dataset.name}"
        raise UserError(
            "partition.server", int(partition.server.max()), why, "Use the set that it was made for."
        )


def save(partition: Partition, path: str | Path) -> None:
    """Writes JSON: format, version, recipe, a list of indices for each client, `server` and `streams`."""
    path = local(path, "partition.path")
    content = {
        "format": FORMAT,
        "version": VERSION,
        "recipe": dict(partition.recipe),
        "test_from": partition.test_from,
        "train": Ragged.of(partition.train).tolist(),
        "test": None if partition.test is None else Ragged.of(partition.test).tolist(),
    }
    for key, value in (("server", partition.server), (_RNG_IDS, partition.rng_ids)):
        if value is not None:
            content[key] = value.tolist()
    with whole(path) as unfinished:
        unfinished.write_text(json.dumps(content, separators=(",", ":")))


def load_partition(path: str | Path, dataset: Samples | None = None) -> Partition:
    """Reads our own format, or a `{"train_data": {client: [index]}}` file of FedMR's authors.

    Args:
      path: the JSON file.
      dataset: what the indices are checked against, if given.

    Raises:
      UserError: unreadable, a client or another key that is there twice, empty clients, duplicates inside a
        client (allowed where the recipe draws with replacement), indices that are negative or out of range.
    """
    path = local(path, "partition.path")
    try:
        content = parse_json(path.read_text())
    except FileNotFoundError as e:
        raise UserError("partition.path", str(path), "no such file", _FIX) from e
    except (OSError, ValueError) as e:
        raise UserError("partition.path", str(path), f"cannot be read as JSON ({e})", _FIX) from e
    if isinstance(content, dict) and "train_data" in content:
        loaded = _read_fedmr(content, path)
    elif isinstance(content, dict) and content.get("format") == FORMAT:
        loaded = _read_own(content, path)
    else:
        raise UserError("partition.path", str(path), "neither of the two formats", _FIX)
    if dataset is not None:
        check_partition(loaded, dataset)
    return loaded


def _read_own(content: dict[str, Any], path: Path) -> Partition:
    if content.get("version") != VERSION:
        why = f"version {content.get('version')!r} of the format, this library reads {VERSION}"
        raise UserError(
            "partition.path", str(path), why, "Upgrade the library, or write the partition again."
        )
    recipe, test = content.get("recipe", {}), content.get("test")
    if not isinstance(recipe, dict):
        raise UserError("partition.path", str(path), "the recipe is not an object", _FIX)
    return Partition(
        _arrays("train", content.get("train"), path, _draws_with_replacement(recipe)),
        None if test is None else _arrays("test", test, path, repeats=True),
        content.get("test_from", "test"),
        recipe,
        *(_optional(name, content.get(name), path) for name in ("server", _RNG_IDS)),
    )


def _draws_with_replacement(recipe: Mapping[str, Any]) -> bool:
    """Whether a client may hold a sample twice. Under `from` is the recipe of the file that was read."""
    before = recipe.get("from")
    return recipe.get("kind") == "dirichlet-classes" or (
        isinstance(before, dict) and _draws_with_replacement(before)
    )


def _read_fedmr(content: dict[str, Any], path: Path) -> Partition:
    clients = content["train_data"]
    if not isinstance(clients, dict) or not all(k.isdecimal() for k in clients):
        raise UserError(
            "partition.path", str(path), "`train_data` does not map client numbers to indices", _FIX
        )
    if sorted(map(int, clients)) != list(range(len(clients))):
        why = "the clients in `train_data` are not numbered from 0 without gaps"
        raise UserError("partition.path", str(path), why, _FIX)
    about = {k: v for k, v in content.items() if isinstance(v, (str, int, float))}
    recipe = {"kind": "file", "path": path.name, "format": "FedMR", "stated": about}
    arrays = [clients[k] for k in sorted(clients, key=int)]
    return Partition(_arrays("train", arrays, path, repeats=False), recipe=recipe)


def _arrays(part: str, lists: object, path: Path, repeats: bool) -> Sequence[np.ndarray]:
    if not isinstance(lists, list) or not lists:
        raise UserError("partition.path", str(path), f"`{part}` is not a list of clients", _FIX)
    made = _sound(lists, repeats)
    return (
        tuple(_one(part, k, given, path, repeats) for k, given in enumerate(lists)) if made is None else made
    )


def _sound(lists: list[Any], repeats: bool) -> Ragged | None:
    """All clients' lists at once; None if one of them may be at fault, which `_one` then tells."""
    if set(map(type, lists)) != {list} or set(map(type, chain.from_iterable(lists))) != {int}:
        return None
    sizes = np.fromiter(map(len, lists), np.int64, len(lists))
    try:
        made = Ragged.cut(np.fromiter(chain.from_iterable(lists), np.int64, int(sizes.sum())), sizes)
    except OverflowError:
        return None
    if not sizes.all() or made.flat.min() < 0:
        return None
    return made if repeats or len(made.distinct().flat) == len(made.flat) else None


def _one(part: str, k: int, given: object, path: Path, repeats: bool) -> np.ndarray:
    """What client k holds, from a file. Raises UserError for what it cannot."""
    indices = _integers(f"client {k} of `{part}`", given, path)
    if not len(indices):
        raise UserError(
            "partition.path", str(path), f"client {k} of `{part}` is empty", "Remove that client."
        )
    if not repeats and len(np.unique(indices)) < len(indices):
        values, counts = np.unique(indices, return_counts=True)
        why = f"client {k} of `{part}` holds index {values[counts > 1][0]} more than once"
        raise UserError("partition.path", str(path), why, "Remove the duplicates.")
    return indices


def _integers(what: str, given: object, path: Path) -> np.ndarray:
    # bool is an int to Python and 1.0 would be cut silently: look at every entry's type.
    if not isinstance(given, list) or not all(type(i) is int for i in given):
        raise UserError("partition.path", str(path), f"{what} is not a list of integers", _FIX)
    try:
        return np.array(given, np.int64)
    except OverflowError as e:
        raise UserError("partition.path", str(path), f"{what}: an integer is too large", _FIX) from e


def _optional(name: str, given: object, path: Path) -> np.ndarray | None:
    return None if given is None else _integers(f"`{name}`", given, path)


def _lists(part: str, given: Sequence[Any]) -> Ragged:
    """What all clients hold. Raises UserError for the first of them who holds what no client can."""
    lists = given
    if not isinstance(given, Ragged):
        lists = [np.asarray(values) for values in given]
    if isinstance(lists, Ragged) or all(each.ndim == 1 and each.dtype.kind in "iu" for each in lists):
        made = Ragged.of(lists)
        if made.sizes.all() and made.flat.min() >= 0:
            return made
    return Ragged.of([_indices(part, f"client {k}", values) for k, values in enumerate(lists)])


def _indices(part: str, whose: str, values: object) -> np.ndarray:
    indices = np.asarray(values)
    if indices.ndim != 1 or indices.dtype.kind not in "iu" or not len(indices):
        why = "not a list of integers" if len(indices.shape) != 1 or indices.size else "empty"
        raise UserError(f"partition.{part}", whose, why, "Give one index or more.")
    if indices.min() < 0:
        raise UserError(
            f"partition.{part}", int(indices.min()), f"{whose} has a negative index", "Count from 0."
        )
    return indices.astype(np.int64)


def _checked_rng_ids(values: object, clients: int) -> np.ndarray:
    rng_ids = np.asarray(values)
    if rng_ids.shape != (clients,) or rng_ids.dtype.kind not in "iu":
        why = f"not one integer for each of the {clients} clients"
        raise UserError("partition.rng_ids", rng_ids.shape, why, "Give one integer for each client.")
    bad = rng_ids[(rng_ids < 0) | (rng_ids >= 2**31)]
    if len(bad):
        raise UserError("partition.rng_ids", int(bad[0]), "outside 0..2147483647", "Number them from 0.")
    return rng_ids.astype(np.int32)
