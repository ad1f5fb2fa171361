"""Which client holds which samples: from a set and the settings to a partition."""

import dataclasses
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedjax_sim.core.errors import UserError
from fedjax_sim.core.versions import installed
from fedjax_sim.data import partition_files, splits
from fedjax_sim.data.partition_config import PartitionConfig, wrong
from fedjax_sim.data.partition_files import Partition
from fedjax_sim.data.partition_reports import counts_of, held_by_nobody, named
from fedjax_sim.data.ragged import Ragged, once, without
from fedjax_sim.data.samples import Samples


def partition(
    dataset: Samples,
    config: PartitionConfig,
    seed: int = 0,
    put_aside: float = 0.0,
    given: Partition | None = None,
) -> Partition:
    """Cuts the training set (and, for local tests, the test set) into clients.

    With `put_aside`, that fraction of the training images is the server's, drawn before all else, every
    class in its share; clients get theirs from the rest. `file`, whose indices are given, must leave as many
    to nobody. So must a partition that is `given`, which takes the place of what would be drawn and keeps
    what it puts aside already.

    The result depends on the data, the settings and the seed alone: each step draws from a NumPy
    generator of its own, keyed by the seed and a fixed tag. (NumPy may change what a generator
    draws between its versions, and libm the last bit of a logarithm: `save` the partition where
    exactly these clients are needed elsewhere. The recipe keeps the versions.)

    Where it leaves samples to nobody that no setting says to leave (`samples_per_client` does,
    `dirichlet-classes` by nature), or a class that nobody trains on, it warns.

    Args:
      dataset: what is cut.
      config: how.
      seed: of the run; `config.seed` comes before it.
      put_aside: share of the training samples, from 0 to 1, that is the server's.
      given: a partition that takes the place of a drawn one.

    Raises:
      UserError: naming the setting that cannot be met with this set.
    """
    if given is not None:
        return for_server(given, dataset, put_aside, seed if config.seed is None else config.seed)
    made = _partition(dataset, config, seed, put_aside)
    _warn_of_unheld(made, dataset, config)
    return made


def _partition(dataset: Samples, config: PartitionConfig, seed: int, put_aside: float) -> Partition:
    seed = config.seed if config.seed is not None else seed
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise wrong("seed", seed, "not a whole number >= 0", "Use 0.")
    if config.kind == "file":
        return for_server(_from_file(dataset, config, int(seed)), dataset, put_aside, int(seed))
    pool, server = np.arange(dataset.train_size), None
    if put_aside:
        server = _drawn_for_server(dataset, pool, put_aside, int(seed))
        pool = without(dataset.train_size, server)
    if config.clients is not None and config.kind not in ("natural", "identical"):
        _check_enough(len(pool), config)
    parts, recipe, mixes, groups = _split(dataset, pool, config, int(seed))
    parts = parts.within(pool[parts.flat])
    size = config.samples_per_client
    if size is not None and config.kind != "dirichlet-classes":
        _check_smallest(parts, size, "samples_per_client", size)
        rng = _rng(seed, "samples-per-client")
        picked = splits.choices(parts.sizes, np.full(len(parts), size), rng)
        chosen = parts.flat[np.repeat(parts.offsets[:-1], size) + picked]
        parts = Ragged.cut(chosen, np.full(len(parts), size)).ascending()
    _check_smallest(parts, max(config.min_size, 1), "min_size", config.min_size)
    made = _finish(dataset, config, int(seed), parts, recipe, mixes, groups)
    return made if server is None else _with_server(made, server, put_aside)


def _warn_of_unheld(made: Partition, dataset: Samples, config: PartitionConfig) -> None:
    count, classes = held_by_nobody(made, dataset)
    asked = _leaves_samples(made.recipe) or (config.kind == "natural" and config.clients is not None)
    if not classes and (asked or not count):
        return
    why = f"{count:,} of {dataset.train_size:,} training samples are held by nobody"
    if classes:
        why += f", and no client trains on {named(classes)}, although the model is tested on them"
    if config.kind == "pathological":
        why += ". Use more partition.clients, or more partition.classes_per_client"
    elif config.kind == "natural" and config.clients is None:
        why += f": {made.recipe['writers_too_small']} writers have fewer than partition.min_size"
        why += f" = {config.min_size} samples. Lower it to keep them"
    elif config.kind == "file":
        why += f" in {config.path}"
    warnings.warn(f"partition.kind = {config.kind!r}: {why}", stacklevel=3)


def _leaves_samples(recipe: Mapping[str, Any]) -> bool:
    """Whether a recipe says itself that samples are left: by their number, or by drawing with replacement."""
    before = recipe.get("from")
    return (
        recipe.get("kind") == "dirichlet-classes"
        or recipe.get("samples_per_client") is not None
        or (isinstance(before, dict) and _leaves_samples(before))
    )


def for_server(given: Partition, dataset: Samples, fraction: float, seed: int) -> Partition:
    """`given`, with samples put aside that none of its clients holds; one that has such already stays.

    So many as `fraction` of all training images, with the classes in the shares that the free ones have.

    Args:
      given: the clients' samples.
      dataset: the set that they index.
      fraction: from 0 to 1; 0 puts nothing aside.
      seed: of the draw.

    Raises:
      UserError: clients hold too many of the images.
    """
    if not fraction or given.server is not None:
        return given
    partition_files.check_partition(given, dataset)
    free = without(dataset.train_size, given.held())
    return _with_server(given, _drawn_for_server(dataset, free, fraction, seed), fraction)


def _drawn_for_server(dataset: Samples, free: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """i64[h], sorted, out of the indices `free`: stratified by class, uniform inside a class."""
    count = max(1, round(fraction * dataset.train_size))
    if count >= dataset.train_size:
        why = f"it leaves none of the {dataset.train_size} training samples to clients"
        raise UserError("initial.holdout", fraction, why, "Lower it.")
    if count > len(free):
        why = (
            f"of the {dataset.train_size} training samples the partition gives all but {len(free)} to "
            f"clients, and these {count} are to be nobody's"
        )
        fix = "Lower it, or use a partition that leaves more (a kind that is drawn makes room by itself)."
        raise UserError("initial.holdout", fraction, why, fix)
    rng = _rng(seed, "server")
    if dataset.train_classes is None:
        return np.sort(rng.choice(free, count, replace=False))
    labels = dataset.train_classes[free]
    held = np.bincount(labels, minlength=dataset.task.num_classes)
    counts = splits.largest_remainder(held / held.sum(), count)
    (chosen,) = splits.draw_counts(labels, counts[None], rng, "initial.holdout")
    return free[chosen]


def _with_server(made: Partition, server: np.ndarray, fraction: float) -> Partition:
    return dataclasses.replace(made, server=server, recipe={**made.recipe, "put_aside": fraction})


def _split(
    dataset: Samples, pool: np.ndarray, config: PartitionConfig, seed: int
) -> tuple[splits.Parts, dict[str, Any], np.ndarray | None, np.ndarray | None]:
    """Parts of 0..len(pool)-1 (for `identical` the one that all share), what to add to the recipe,
    f64[N, C] class mixes where drawn, i64[N] groups where used.
    """
    rng, clients = _rng(seed, config.kind), config.clients or 0
    if config.kind == "identical":
        return Ragged.of([np.arange(len(pool))]), {}, None, None
    if config.kind == "iid":
        return splits.iid(len(pool), clients, rng), {}, None, None
    if config.kind == "quantity":
        return splits.quantity(len(pool), clients, config.sigma, config.min_size, rng), {}, None, None
    if config.kind not in ("domain", "natural"):
        return _split_by_class(dataset, pool, config, rng)
    if config.kind == "domain":
        if dataset.train_domains is None:
            why = f"{dataset.name} has no domain ids"
            raise wrong(
                "kind", "domain", why, "Use a cross-domain set (pacs, digit-five, digits-domains) or `union`."
            )
        ids = dataset.train_domains[pool]
        domains = len(once(ids))
        if clients and clients < domains:
            raise wrong(
                "clients", clients, f"fewer than the {domains} domains", f"Use {domains}, or a multiple."
            )
        parts, owner = splits.by_group(ids, clients or domains, rng)
        return parts, {"domains": owner.tolist()}, None, owner
    if dataset.train_writers is None:
        why = f"{dataset.name} has no writer ids"
        raise wrong("kind", "natural", why, "Use a set that has them (femnist), or kind 'dirichlet'.")
    ids = dataset.train_writers[pool]
    parts, writers = splits.by_writer(ids, config.clients, config.min_size, rng)
    too_small = int((np.unique(ids, return_counts=True)[1] < config.min_size).sum())
    return parts, {"writers": writers.tolist(), "writers_too_small": too_small}, None, writers


def _split_by_class(
    dataset: Samples, pool: np.ndarray, config: PartitionConfig, rng: np.random.Generator
) -> tuple[splits.Parts, dict[str, Any], np.ndarray | None, np.ndarray | None]:
    """`_split` for the kinds that go by the samples' classes."""
    if dataset.train_classes is None:
        why = f"it goes by classes, and the samples of {dataset.name} have none"
        raise wrong("kind", config.kind, why, "Use iid, quantity, identical, natural or file.")
    labels, clients = dataset.train_classes[pool], config.clients or 0
    if config.kind == "dirichlet":
        parts, tries = splits.dirichlet(labels, clients, config.alpha, config.min_size, config.max_tries, rng)
        return parts, {"tries": tries}, None, None
    if config.kind == "dirichlet-classes":
        size = config.samples_per_client or len(labels) // clients
        mixes = splits.class_mixes(config.alpha, clients, dataset.task.num_classes, rng)
        counts = splits.counts_of_mixes(mixes, size)
        return splits.draw_counts(labels, counts, rng, "data.train_labels"), {}, mixes, None
    classes = len(once(labels))
    if config.kind == "pathological" and config.classes_per_client > classes:
        why = f"the set has {classes} classes"
        raise wrong("classes_per_client", config.classes_per_client, why, f"Use {classes} or fewer.")
    if config.classes_per_client * clients > len(labels):
        why = f"{clients} clients with so many pieces each need more than {len(labels)} samples"
        raise wrong("classes_per_client", config.classes_per_client, why, "Lower it, or use fewer clients.")
    recipe = splits.pathological if config.kind == "pathological" else splits.shards
    return recipe(labels, clients, config.classes_per_client, rng), {}, None, None


def _finish(
    dataset: Samples,
    config: PartitionConfig,
    seed: int,
    parts: splits.Parts,
    extra: dict[str, Any],
    mixes: np.ndarray | None,
    groups: np.ndarray | None,
) -> Partition:
    """Adds the local tests and the recipe; of `identical` all clients."""
    test, test_from = None, "test"
    alike = (config.clients or 1) if config.kind == "identical" else 1
    rng = _rng(seed, f"local-test-{config.local_test}")
    if config.local_test == "holdout":
        parts, test = splits.hold_out(parts, config.holdout, rng)
        test_from = "train"
    elif config.local_test == "matching" and groups is not None:
        ids = dataset.test_domains if config.kind == "domain" else dataset.test_writers
        test = _matching_groups(np.asarray(ids), groups, config.test_samples_per_client, rng)
    elif config.local_test == "matching":
        if dataset.train_classes is None or dataset.test_classes is None:
            why = f"it matches classes, and the samples of {dataset.name} have none"
            raise wrong("local_test", "matching", why, "Use holdout, or a partition of kind natural.")
        size = config.test_samples_per_client or max(1, dataset.test_size // (alike * len(parts)))
        if mixes is not None:
            counts = splits.counts_of_mixes(mixes, size)
        else:
            shares = counts_of(parts, dataset.train_classes, dataset.task.num_classes)
            counts = splits.largest_remainder(shares / shares.sum(1, keepdims=True), size)
        test = splits.draw_counts(dataset.test_classes, counts, rng, "data.test_labels")
    parts, test = alike * parts, None if test is None else alike * test
    recipe = {**dataclasses.asdict(config), "seed": seed, "clients": len(parts), **extra}
    recipe |= partition_files.describe(dataset)
    recipe |= {"fedjax_sim": installed("fedjax_sim") or "unknown", "numpy": np.__version__}
    rng_ids = np.zeros(alike, np.int32) if config.kind == "identical" else None
    return Partition(parts, test, test_from, recipe, rng_ids=rng_ids)


def _matching_groups(
    ids: np.ndarray, groups: np.ndarray, size: int | None, rng: np.random.Generator
) -> splits.Parts:
    """Each client's test samples: those of its writer or domain, or `size` of them."""
    order = np.argsort(ids, kind="stable")
    starts, stops = (np.searchsorted(ids[order], groups, side=side) for side in ("left", "right"))
    sizes = stops - starts
    few = np.flatnonzero(sizes < (size or 1))
    if len(few):
        k = int(few[0])
        why = f"client {k} (writer or domain {groups[k]}) has {sizes[k]} test samples"
        raise wrong("test_samples_per_client", size, why, "Lower it, or use local_test 'holdout'.")
    if size is None:
        return Ragged.cut(order[splits.runs(starts, sizes)], sizes)
    wanted = np.full(len(groups), size)
    picked = np.repeat(starts, size) + splits.choices(sizes, wanted, rng)
    return Ragged.cut(order[picked], wanted).ascending()


def _from_file(dataset: Samples, config: PartitionConfig, seed: int) -> Partition:
    loaded = partition_files.load_partition(Path(str(config.path)), dataset)
    if config.clients is not None and config.clients != loaded.num_clients:
        why = f"{config.path} has {loaded.num_clients} clients"
        raise wrong("clients", config.clients, why, f"Use {loaded.num_clients}, or None.")
    if loaded.test is not None or config.local_test == "none":
        return loaded
    made = _finish(dataset, config, seed, Ragged.of(loaded.train), {"from": loaded.recipe}, None, None)
    return dataclasses.replace(made, server=loaded.server, rng_ids=loaded.rng_ids)


def _check_enough(count: int, config: PartitionConfig) -> None:
    clients = config.clients or 0
    if config.kind == "dirichlet-classes" and config.samples_per_client is not None:
        return  # drawn for each client by itself, as many clients as there may be
    if clients > count:
        least = max(config.min_size, 1)
        fix = f"Use {count // least} or fewer"
        if config.min_size > 1:
            fix += f", as partition.min_size gives each {config.min_size}, or lower that too"
        raise wrong("clients", clients, f"more than the {count} training samples", f"{fix}.")
    if config.kind != "dirichlet-classes" and clients * config.min_size > count:
        why = (
            f"{clients} clients with so many each need {clients * config.min_size} samples, there are {count}"
        )
        raise wrong("min_size", config.min_size, why, f"Use {count // clients} or less, or fewer clients.")


def _check_smallest(parts: splits.Parts, least: int, field: str, value: object) -> None:
    sizes = parts.sizes
    k = int(np.argmin(sizes))
    if sizes[k] < least:
        few = np.count_nonzero(sizes < least)
        why = f"client {k} has {sizes[k]} samples, and {few} of {len(sizes)} clients have too few"
        fix = f"Use {sizes[k]} or less, or fewer clients." if sizes[k] else "Use fewer clients."
        raise wrong(field, value, why, fix)


def _rng(seed: int, tag: str) -> np.random.Generator:
    return np.random.default_rng([int(seed), zlib.crc32(tag.encode())])
