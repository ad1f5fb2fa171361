"""What a run's folder says of the run: written before its first round, read and compared after."""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedjax_sim import algorithms, data, models
from fedjax_sim import config as config_lib
from fedjax_sim.config import RunConfig, plugins
from fedjax_sim.core import imports
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.model import Model
from fedjax_sim.data import Partition, Samples
from fedjax_sim.data.sources import may_hold_pictures
from fedjax_sim.engine.setup import Setup
from fedjax_sim.runs import provenance
from fedjax_sim.runs.folder import Folder


def portable(config: RunConfig) -> RunConfig:
    """`config` for a record: its folder as seen from the working directory or from home, if it is below."""
    if config.output.dir is None:
        return config
    path = Folder(config.output.dir).path
    for base, start in ((Path.cwd(), "."), (Path(os.path.expanduser("~")), "~")):
        if path.is_relative_to(base):
            where = str(Path(start, path.relative_to(base)))
            return dataclasses.replace(config, output=dataclasses.replace(config.output, dir=where))
    return config


def describe(folder: Folder, setup: Setup) -> None:
    """Writes what can be known before the first round. config.yaml comes last: with it the run exists."""
    config = portable(yaml_safe(setup.config))
    pictures = "dataset" in setup.config.given or may_hold_pictures(setup.config.data.source)
    about = provenance.describe(setup.dataset, setup.partition, pictures=pictures)
    about["headline"] = setup.task.headline.name
    about["layout"] = {
        **{"devices": setup.devices, "wave": setup.wave, "conv": setup.model.conv},
        "calibration": setup.calibration,
    }
    about["config"] = config_lib.to_dict(config)
    own = imports.checksums(config_lib.flat(config).values())
    if own:
        about["own"] = own
    data.save(setup.partition, folder.partition)
    folder.write("provenance.json", json.dumps(about, indent=2) + "\n")
    folder.write("config.yaml", config_lib.dump(config))


def with_given(
    config: RunConfig,
    dataset: Samples | None = None,
    partition: Partition | None = None,
    model: Model | None = None,
    algorithm: Any = None,
    **lists: Sequence[Any] | None,
) -> RunConfig:
    """`config` with what Python has given.

    It has the algorithm and the `lists` that are given, and says in `given` what of all this a file cannot
    hold.

    Args:
      config: the configuration.
      dataset: the samples. None, here and below: it is not given.
      partition: the clients' samples.
      model: the network.
      algorithm: takes the place of `config.algorithm`.
      **lists: observers, meters and callbacks; each takes the place of the configuration's.

    Raises:
      UserError: one of the lists is no list.
    """
    said = dict(config.given)
    for kind, entries in lists.items():
        if entries is not None:
            if not isinstance(entries, list | tuple):
                raise UserError(kind, type(entries).__name__, "a list is wanted", f"Write {kind}=[…].")
            config = dataclasses.replace(config, **{kind: tuple(entries)})
            said.pop(kind, None)
    if algorithm is not None:
        config = dataclasses.replace(config, algorithm=algorithm)
        said.pop("algorithm", None)
    if dataset is not None:
        said["dataset"] = dataset.name
    if partition is not None:
        said["partition"] = f"{partition.num_clients:,} clients"
    if model is not None:
        said["model"] = models.name_of(model)
    if not algorithms.namable(config.algorithm):
        said["algorithm"] = algorithms.label(config.algorithm)
    for kind in plugins.LISTS:
        if not plugins.namable(getattr(config, kind)):
            said[kind] = plugins.label(getattr(config, kind))
    return dataclasses.replace(config, given=said)


def yaml_safe(config: RunConfig) -> RunConfig:
    """The configuration as YAML can hold it: the default stands for an algorithm without a name, and none for
    a list in which something has no name.
    """  # fmt: skip
    lists = {kind: () for kind in plugins.LISTS if not plugins.namable(getattr(config, kind))}
    config = dataclasses.replace(config, **lists)
    if not algorithms.namable(config.algorithm):
        return dataclasses.replace(config, algorithm=RunConfig().algorithm)
    return config


def check_unchanged(folder: Folder, config: RunConfig, about: Mapping[str, Any]) -> None:
    """Raises UserError if config.yaml says what the run was not started with. Older records cannot tell.

    Another number of rounds may be asked for (see `_prolong`), and the data may have been moved: they are
    known by their checksums.
    """
    if "config" not in about:
        return
    began = config_lib.from_dict(about["config"])
    given = began.given or config.given  # for `_read`'s older records
    began = dataclasses.replace(began, rounds=config.rounds, data=config.data, given=given)
    changed = differences(began, config)
    if changed:
        raise UserError(
            "config.yaml",
            str(folder.config),
            f"it was edited since the run began: {'; '.join(changed[:3])}",
            "Put it back, or start a run of its own in another folder (initial.run takes over a model).",
        )


def read_run(folder: Folder) -> tuple[RunConfig, dict[str, Any]]:
    """A run's configuration, and its provenance, from its folder or a pack.

    Raises:
      UserError: no run is there, or one of the two cannot be read.
    """
    folder.check_run()
    config = folder.records.config()
    # The folder may have been moved or renamed since.
    output = dataclasses.replace(config.output, dir=str(folder.path))
    about = folder.records.provenance()
    told = {"model": config.model.name, **about.get("names", {})}  # by records of before `given`
    given = config.given or {name: told.get(name, name) for name in about.get("supplied", ())}
    return dataclasses.replace(config, output=output, given=given), about


def dataset_of(config: RunConfig, about: dict[str, Any], given: Samples | None) -> Samples:
    """The run's data: what is given, or what its configuration names.

    Raises:
      UserError: they are not those that provenance.json, `about`, tells of.
    """
    dataset = data.as_dataset(given) or config.data.load()
    provenance.check_fingerprint(dataset, about["data"])
    return dataset


def partition_of(
    folder: Folder, config: RunConfig, about: dict[str, Any], dataset: Samples | None
) -> Partition:
    """The run's partition: from its file, or drawn again where that was not kept.

    Args:
      folder: of the run.
      config: its configuration.
      about: its record of provenance.
      dataset: what it was given; None: loaded by the configuration.

    Raises:
      UserError: the file is missing and the configuration gives another partition than the run had.
    """
    if folder.partition.is_file():
        return data.load_partition(folder.partition, dataset)
    drawn = data.partition(
        dataset_of(config, about, dataset), config.partition, config.seed, config.initial.put_aside
    )
    recorded = about.get("partition", {}).get("crc32")
    if recorded not in (None, provenance.describe_partition(drawn)["crc32"]):
        raise UserError(
            "partition",
            str(folder.path),
            "partition.json is missing, and the configuration gives another partition than the run had",
            "Restore that file.",
        )
    return drawn


def recipe_of(
    folder: Folder, config: RunConfig, about: dict[str, Any], partition: Callable[[], Partition]
) -> Mapping[str, Any]:
    """`Run.recipe`, from the record; those of older versions do not have it.

    Args:
      folder: of the run.
      config: its configuration.
      about: its record of provenance.
      partition: gives the run's partition; called only where the record does not say enough.
    """
    if "partition" in about:
        return about["partition"]
    wanted = config.partition
    if wanted.clients is None or folder.partition.is_file():
        return provenance.describe_partition(partition())
    named = {"kind": wanted.kind, "alpha": wanted.alpha, "dataset": about["data"]["name"]}
    return {**named, "clients": wanted.clients}


def differing(folder: str | Path, config: RunConfig) -> tuple[str, ...]:
    """The settings in which a folder's run is another than `config`'s: "local.lr is 0.1, not 0.2".

    Those of layout and output, and what only costs time or memory, are left aside.
    """
    found, _ = read_run(Folder(folder))
    return differences(found, config)


def differences(found: RunConfig, wanted: RunConfig) -> tuple[str, ...]:
    """As `differing`, of two configurations."""
    has, asked = config_lib.flat(found), config_lib.flat(wanted)
    aside = ("execution.", "output.", "evaluation.batch_size")
    names = (name for name in has | asked if not name.startswith(aside))
    return tuple(
        f"{name} is {has.get(name, 'unset')}, not {asked.get(name, 'unset')}"
        for name in names
        if (name in has, has.get(name)) != (name in asked, asked.get(name))
    )
