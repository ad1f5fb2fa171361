"""One way in for every set: `load("cifar10")`, `load("npz:my.npz")`, `load("folder:cats#size=64")`."""

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedjax_sim.core import imports
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.paths import local
from fedjax_sim.data import digits, tables
from fedjax_sim.data.dataset import Dataset, union
from fedjax_sim.data.folders import read_folder
from fedjax_sim.data.idx import read_idx
from fedjax_sim.data.npz import read_npz
from fedjax_sim.data.presets import PRESETS, Preset
from fedjax_sim.data.samples import Samples
from fedjax_sim.data.tfds_sets import find_prepared, how_to_prepare, read_tfds
from fedjax_sim.tasks.preprocessing import Preprocessing

ENVIRONMENT = "FEDJAX_SIM_DATA"
EMBEDDED = ("digits", "digits-domains", *tables.EMBEDDED)
SCHEMES = {
    "npz": "NumPy arrays in one file; npz:PATH#coarse for other labels",
    "npy": "a folder of NumPy arrays, whose images are memory-mapped; npy:PATH#coarse for other labels",
    "folder": "folders of pictures, one for each class; #size=64, #classes=cat+dog, #test=0.25",
    "idx": "a folder with the four idx files of MNIST, Fashion-MNIST, EMNIST …; idx:PATH#letters",
    "table": "rows of a CSV or Parquet file; table:PATH#target=price,user=town,task=regression,test=0.25",
    "tfds": "a prepared tensorflow-datasets set; #coarse_label, #size=64",
}
"""The words before a colon, and what follows them."""

_OPTIONS = {
    "npz": "#NAME, which takes the labels train_NAME_labels and test_NAME_labels",
    "npy": "#NAME, which takes the labels train_NAME_labels and test_NAME_labels",
    "folder": "size (64, or 48x64 for height x width), classes (cat+dog) and test (0.25), "
    "joined by commas: #size=64,test=0.25",
    "idx": "#NAME, of one of several sets in the folder",
    "table": "target (a column), user (a column), task (regression or classification) and test (0.25, or a "
    "column), joined by commas: #target=price,user=town",
    "tfds": "#NAME of the feature with the labels, or size (64): #size=64",
}
"""Scheme -> what may follow its #, in words."""


def may_hold_pictures(source: str) -> bool:
    """Whether files of a source may be pictures, which Pillow decodes: not those of arrays and tables."""
    return source not in EMBEDDED and source.partition(":")[0] not in ("npz", "npy", "idx", "table")


def load_dataset(
    source: str,
    *,
    data_dir: str | Path | None = None,
    preprocessing: Preprocessing | None = None,
    size: int | tuple[int, int] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Any:
    """Loads a set. Nothing is ever downloaded.

    Args:
      source: one of

        - `digits`, `digits-domains`: embedded, see `fedjax_sim.data.digits`;
        - `diabetes` (regression), `breast-cancer`, `wine`: embedded tables, see `fedjax_sim.data.tables`;
        - the name of a preset (`cifar10`, `cifar100-coarse`, `femnist`, `digit-five`, …), looked for
          in `data_dir` as `NAME.npz`, then as an image folder, then as a prepared
          tensorflow-datasets set;
        - `npz:PATH` or `npz:PATH#coarse` (the labels `train_coarse_labels`);
        - `npy:PATH`, likewise a folder with `train_images.npy` and so on, whose images are memory-mapped;
        - `folder:PATH`, with `#size=64` or `#size=48x64` (height x width), `#classes=cat+dog`, `#test=0.25`,
          several joined by commas;
        - `idx:PATH`, a folder with the four files of MNIST and its kin, or `idx:PATH#letters` (which of
          several sets in it; see `fedjax_sim.data.idx`);
        - `table:PATH#target=price`, a CSV or Parquet file, with `user=town`, `task=classification` and
          `test=0.25` or a column, see `fedjax_sim.data.tables.read_table`;
        - `tfds:NAME`, `tfds:NAME/CONFIG`, with `#coarse_label` and `#size=64`;
        - `module:function`, one's own, whose value is a `Dataset`; the module lies in the working directory
          or is installed.

        A path may hold a # (`folder:c#/set#size=64`): the longest one that exists as it stands is taken.
      data_dir: where presets and prepared sets lie; the environment variable FEDJAX_SIM_DATA if
        None, and `~/fedjax_sim_data` where that is not set.
      preprocessing: instead of the preset's, or of mean and std 0.5.
      size: of folders and prepared sets: resize to this side, or (H, W).
      options: arguments of one's own function.

    Returns:
      The set, checked.

    Raises:
      UserError: an unknown name (with near ones), or a set that is not there (with how to get it).
    """
    if not isinstance(source, str) or not source.strip():
        raise UserError("data.source", source, "not the name of a set", f"Try one of: {', '.join(names())}.")
    source = source.strip()
    check_path(source)
    if imports.is_own(source) and source.partition(":")[0] not in SCHEMES:
        for given, value in {"preprocessing": preprocessing, "size": size}.items():
            if value is not None:
                fix = "Let the function see to it; data.options are its arguments."
                raise UserError("data.source", source, f"a function of one's own takes no `{given}`", fix)
        return _own(source, options or {})
    if options:
        why = f"only a function of one's own has options, and {source} is none"
        raise UserError("data.options", dict(options), why, "Leave them out.")
    if preprocessing is not None and not isinstance(preprocessing, Preprocessing):
        raise UserError(
            "data.preprocessing", preprocessing, "not a Preprocessing", "Build one, or leave it out."
        )
    shape = _size(size, source)
    place = default_data_dir(data_dir)
    scheme, colon, rest = source.partition(":")
    if colon and scheme in SCHEMES:
        return _of_scheme(scheme, rest, source, place, shape, preprocessing)
    if source in EMBEDDED:
        if shape is not None:
            why = f"it has one size only, and `size` is {size}"
            raise UserError("data.source", source, why, "Leave `size` out.")
        if source in tables.EMBEDDED:
            _check_no_images(source, preprocessing)
            return tables.EMBEDDED[source]()
        return {"digits": digits.digits, "digits-domains": digits.digits_domains}[source](preprocessing)
    if source in PRESETS:
        return load_preset(source, place, preprocessing, shape)
    near = difflib.get_close_matches(source.lower(), names(), n=3, cutoff=0.5)
    why = "no such set" + (f"; near: {', '.join(near)}" if near else "")
    ways = "npz:PATH, npy:PATH, folder:PATH, idx:PATH, table:PATH, tfds:NAME, module:function"
    fix = f"Known: {', '.join(names())}; or {ways}."
    path, fragment = _path_first(source)
    if local(path, "data.source").is_dir():
        fix = f"Did you mean folder:{path}#{fragment or 'size=64'}? {fix}"
    raise UserError("data.source", source, why, fix)


def _of_scheme(
    scheme: str,
    rest: str,
    source: str,
    place: Path,
    shape: tuple[int, int] | None,
    preprocessing: Preprocessing | None,
) -> Samples:
    """What `scheme:rest` names."""
    path, fragment = rest.split("#", 1) if scheme == "tfds" and "#" in rest else _path_first(rest)
    if not path:
        raise UserError("data.source", source, "nothing after the colon", f"Write {scheme}:PATH.")
    # A comma inside a class's name is none between options.
    keys = {"folder": "size|classes|test", "table": "target|user|task|test"}
    parts = re.split(rf",(?=(?:{keys[scheme]})=)" if scheme in keys else ",", fragment)
    word, options = _options(parts, source)
    if "size" in options:
        shape = _size(options.pop("size"), source)
    if scheme == "folder" and not word:
        classes = options.pop("classes", "")
        share = _share(options.pop("test", "0.2"), source)
        if not options:
            return read_folder(
                path, size=shape, classes=classes, test_share=share, preprocessing=preprocessing
            )
    if scheme == "table" and not word and shape is None and set(options) <= set(keys["table"].split("|")):
        _check_no_images(source, preprocessing)
        return tables.read_table(path, **options)
    if scheme == "tfds" and not options:
        return read_tfds(path, place, label=word or "label", size=shape, preprocessing=preprocessing)
    if scheme in ("npz", "npy") and not options and shape is None:
        return read_npz(path, labels=word, preprocessing=preprocessing, mapped=scheme == "npy")
    if scheme == "idx" and not options and shape is None:
        return read_idx(path, member=word, preprocessing=preprocessing)
    why = f"{fragment or 'size'!r} is not an option of {scheme}"
    fix = f"The options of {scheme}: {_OPTIONS[scheme]}."
    raise UserError("data.source", source, why, fix)


def _check_no_images(source: str, preprocessing: Preprocessing | None) -> None:
    if preprocessing is not None:
        why = f"{source} is a table, and preprocessing is of images"
        raise UserError("data.preprocessing", preprocessing, why, "Leave it out.")


def _path_first(rest: str) -> tuple[str, str]:
    """`c#/set#size=4` -> ("c#/set", "size=4"): the longest path that exists goes first.

    Where none exists, what follows the last # is options unless it goes on like a path.
    """
    places = [i for i, letter in enumerate(rest) if letter == "#"]
    for end in (len(rest), *reversed(places)):
        if end and os.path.exists(os.path.expanduser(rest[:end])):
            return rest[:end], rest[end + 1 :]
    if not places or "/" in rest[places[-1] :]:
        return rest, ""
    return rest[: places[-1]], rest[places[-1] + 1 :]


def _own(source: str, options: Mapping[str, Any]) -> Samples:
    """The value of a user's own function."""
    try:
        function = imports.imported(source, "data.source")
    except UserError as error:
        scheme = source.partition(":")[0]
        if difflib.get_close_matches(scheme, SCHEMES, n=1, cutoff=0.6):
            fix = f"Did you mean {difflib.get_close_matches(scheme, SCHEMES, n=1)[0]}:…?"
            raise UserError(error.field, error.value, error.why, fix) from error
        raise
    if not callable(function):
        raise UserError(
            "data.source", source, "this is not a function", "Give a function that makes a Dataset."
        )
    made = imports.called(function, source, "data.source", "data.options", **options)
    if not isinstance(made, Samples):
        why = f"its value is a {type(made).__name__}, not a Dataset"
        fix = "Let it return fedjax_sim.Dataset(name=…, train_images=…, train_labels=…, test_images=…, …)."
        raise UserError("data.source", source, why, fix)
    return made


def load_preset(
    name: str, data_dir: Path, preprocessing: Preprocessing | None = None, size: tuple[int, int] | None = None
) -> Dataset:
    """Looks for a preset below `data_dir`: an npz file, then an image folder, then a prepared set.

    Args:
      name: of a preset.
      data_dir: the folder that is searched.
      preprocessing: None: the preset's.
      size: (height, width) in pixels of images from files; None: the preset's.

    Raises:
      UserError: where none is there, with every way to get it.
    """
    preset = PRESETS[name]
    preprocessing = preprocessing or preset.preprocessing
    size = size or preset.size
    told = {"name": name, "preprocessing": preprocessing, "origin": preset.origin, "licence": preset.licence}
    for stem in preset.npz:
        if (data_dir / f"{stem}.npz").is_file():
            dataset = read_npz(
                data_dir / f"{stem}.npz",
                labels=preset.npz_labels,
                num_classes=preset.num_classes,
                class_names=preset.class_names,
                **told,
            )
            return _checked(dataset, name, preset)
    for folder in preset.folder:
        if (data_dir / folder).is_dir():
            dataset = read_folder(data_dir / folder, size=size, classes=preset.classes, **told)
            return _checked(dataset, name, preset)
    if preset.tfds and find_prepared(preset.tfds, data_dir):
        told["dataset_name"] = told.pop("name")
        dataset = read_tfds(
            preset.tfds, data_dir, label=preset.tfds_label, size=size, transpose=preset.transpose, **told
        )
        return _checked(dataset, name, preset)
    if preset.members:
        return union(
            [load_preset(m, data_dir) for m in preset.members],
            name=name,
            size=size,
            preprocessing=preprocessing,
        )
    raise UserError("data.source", name, f"not found in {data_dir}", how_to_get(name, data_dir))


def present(data_dir: str | Path | None = None) -> list[str]:
    """The presets whose files lie in the folder of the data; a union needs all of its members."""
    place, found = default_data_dir(data_dir), []
    for name, preset in PRESETS.items():
        files = any((place / f"{stem}.npz").is_file() for stem in preset.npz)
        folders = any((place / folder).is_dir() for folder in preset.folder)
        try:
            prepared = bool(preset.tfds and find_prepared(preset.tfds, place))
        except UserError:  # several of them
            prepared = True
        if files or folders or prepared or (preset.members and set(preset.members) <= set(found)):
            found.append(name)
    return found


def how_to_get(name: str, data_dir: Path) -> str:
    """Every way to make a preset available, in words."""
    preset = PRESETS[name]
    shape = ", ".join(map(str, preset.shape or ("height", "width", "channels")))
    labels = f"{preset.npz_labels}_labels" if preset.npz_labels else "labels"
    ways = [
        f"put the arrays into {data_dir / (preset.npz[0] + '.npz')}: train_images and test_images, "
        f"u8[n, {shape}], train_{labels} and test_{labels}, integers [n]"
    ]
    if preset.folder:
        ways.append(f"unpack its image folders into {data_dir / preset.folder[0]}")
    if preset.idx:
        ways.append(f"name the folder with its idx files instead of {name}: idx:FOLDER")
    if preset.tfds:
        how = how_to_prepare(preset.tfds, data_dir)
        ways.append(how[0].lower() + how[1:])
    return "Either " + "; or ".join(ways) + ". Another place: data_dir=, or the variable FEDJAX_SIM_DATA."


def _checked(dataset: Dataset, name: str, preset: Preset) -> Dataset:
    if dataset.num_classes != preset.num_classes:
        why = f"what was found has {dataset.num_classes} classes, {name} has {preset.num_classes}"
        raise UserError("data.source", name, why, "Load it as npz:PATH or folder:PATH if that is meant.")
    return dataset


def names() -> list[str]:
    """The names that `load` knows, without the schemes."""
    return [*EMBEDDED, *PRESETS]


def check_path(source: str) -> None:
    """Raises UserError if a source names an address (`npz:gs://bucket/set.npz`) where a path is wanted."""
    scheme, colon, rest = source.strip().partition(":")
    local(rest if colon and scheme in SCHEMES else source, "data.source")


def default_data_dir(data_dir: str | Path | None = None) -> Path:
    """`data_dir`, else the environment variable FEDJAX_SIM_DATA, else `~/fedjax_sim_data`."""
    if data_dir:
        return local(data_dir, "data.data_dir")
    return local(os.environ.get(ENVIRONMENT) or "~/fedjax_sim_data", ENVIRONMENT)


def _options(parts: Iterable[str], source: str) -> tuple[str, dict[str, str]]:
    """`coarse` -> ("coarse", {}); `size=64`, `classes=a+b` -> ("", {...})."""
    word, options = "", {}
    for part in filter(None, parts):
        key, equals, value = part.partition("=")
        if equals and key not in options:
            options[key] = value
        elif not equals and not word:
            word = part
        else:
            raise UserError("data.source", source, f"{part!r} is one too many", "Say each option once.")
    return word, options


def _size(size: object, source: str) -> tuple[int, int] | None:
    if size is None:
        return None
    try:
        parts = str(size).split("x") if isinstance(size, (str, int)) else list(size)  # type: ignore[arg-type]
        height, width = (int(p) for p in (parts * 2 if len(parts) == 1 else parts))
    except (TypeError, ValueError):
        height = width = 0
    if min(height, width) < 1 or isinstance(size, bool):
        why, fix = (
            f"size={size} is not a size in pixels",
            "Write #size=64, or #size=48x64 for height x width.",
        )
        raise UserError("data.source", source, why, fix)
    return height, width


def _share(text: str, source: str) -> float:
    try:
        return float(text)
    except ValueError as e:
        raise UserError("data.source", source, f"test={text} is not a number", "Write test=0.2.") from e
