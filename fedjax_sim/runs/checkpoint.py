"""Checkpoints: Orbax writes them in the background, and a damaged one is passed over for the one before.

A checkpoint is a folder named by its round. Orbax writes it under a temporary name and renames it at the
end, so one that a kill cut short is recognised by its name. Damage after that is recognised by a checksum of
every leaf, which we keep beside the state: Orbax's own files do not all carry one.

The deployed model lies beside the state, so that who has neither data nor algorithm can read it.

The next round overwrites the state in place (its buffers are donated), while Orbax may still be reading: on a
CPU its copy to the host is none. So the state is copied here before `save` returns.
"""

import contextlib
import errno
import logging
import os
import re
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fedjax_sim.core.errors import UserError
from fedjax_sim.engine import hosts
from fedjax_sim.runs.provenance import crc32


class Checkpoints:
    """The checkpoints of one run.

    Attributes:
      folder: where they are.
      keep: how many of the newest stay.
    """

    def __init__(self, folder: str | Path, keep: int = 2):
        self.folder, self.keep = Path(folder).absolute(), keep
        self._writer: ocp.CheckpointManager | None = None

    # --- writing ------------------------------------------------------------------------------------

    def save(
        self,
        round_index: int,
        state: Any,
        model: Any = None,
        shapes: Any = None,
        clients: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Starts writing a state; returns once it has been copied.

        Args:
          round_index: how many rounds it has seen.
          state: the state, as the devices hold it.
          model: the deployed one, to be read by itself; one that is not made of nested dicts is left out.
          shapes: of the state's leaves, with the rows alone that count; None: all do. Others are left out
            unless several processes have parts of them.
          clients: which of the rows on the host are theirs (`fedjax_sim.engine.client_rows.Snapshot`).
        """
        host = jax.tree.map(_to_host, state)
        if shapes is not None:
            host = jax.tree.map(_rows_of, host, shapes)
        about: dict[str, Any] = {"round": round_index, "leaves": _leaves(host, shapes)}
        items: dict[str, Any] = {"state": ocp.args.StandardSave(_numbered(host))}
        paths = _paths(model)
        if paths:
            deployed = jax.tree.map(_to_host, model)
            told = zip(paths, _leaves(deployed).values(), strict=True)
            about["model"] = [{"path": list(path), **entry} for path, entry in told]
            items["model"] = ocp.args.StandardSave(_numbered(deployed))
        if clients is not None:
            about["clients"] = {
                name: {"shape": list(part.shape), "dtype": str(part.dtype), "crc32": crc32(part)}
                for name, part in clients.items()
            }
            items["clients"] = ocp.args.StandardSave(dict(clients))
        with _plain_errors(self.folder):
            manager = self._manager()
            manager.save(round_index, args=ocp.args.Composite(**items, about=ocp.args.JsonSave(about)))
            if any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(host)):
                manager.wait_until_finished()

    def wait(self) -> None:
        """Waits until everything is on disk.

        Raises:
          OSError: it cannot be written; from here, as from `save` and `close`, for what went wrong in the
            background too.
        """
        if self._writer is not None:
            with _plain_errors(self.folder):
                self._writer.wait_until_finished()
                self._writer.check_for_errors()

    def close(self) -> None:
        """Waits and lets go."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            with _plain_errors(self.folder):
                writer.close()

    def _manager(self) -> ocp.CheckpointManager:
        if self._writer is None:
            options = ocp.CheckpointManagerOptions(
                max_to_keep=self.keep, enable_async_checkpointing=True, cleanup_tmp_directories=True
            )
            _without_tracebacks()
            self._writer = ocp.CheckpointManager(self.folder, options=options)
        return self._writer

    # --- reading ------------------------------------------------------------------------------------

    def rounds(self) -> list[int]:
        """Rounds of which there is a finished checkpoint, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if re.fullmatch(r"\d+", path.name))

    def restore(
        self,
        abstract: Any,
        shapes: Any = None,
        at_most: int | None = None,
        *,
        mend: bool = True,
        also: Callable[[int], None] = lambda number: None,
    ) -> tuple[Any, int] | None:
        """The newest sound state, on the host, and its round; None if there is none.

        Half-written and damaged checkpoints are passed over with a warning.

        Args:
          abstract: shapes, dtypes and shardings of the state as the devices hold it.
          shapes: with the rows alone that count; None: all do.
          at_most: newest round that is wanted.
          mend: those that are damaged or too new are moved to `damaged/` beside the checkpoints, so that
            their rounds can be written again, and half-written ones removed; False: nothing is touched, as
            the run may be writing.
          also: reads what else belongs to a round's checkpoint; what it raises is damage to it.

        Raises:
          UserError: a sound checkpoint holds a state of other shapes than `abstract`.
        """
        if mend:
            hosts.on_first(self._remove_unfinished)
        for number in reversed(hosts.on_first(self.rounds)):
            if at_most is not None and number > at_most:
                warnings.warn(
                    f"checkpoint of round {number} passed over: the journal ends at round {at_most}",
                    stacklevel=2,
                )
                if mend:
                    hosts.on_first(partial(self._put_aside, number))
                continue
            counted = jax.tree.map(_on_host, abstract if shapes is None else shapes)
            # Every process reads its part of what the devices hold; one alone what counts.
            wanted = jax.tree.map(_on_host, abstract) if jax.process_count() > 1 else counted

            def read(number: int = number, wanted: Any = wanted, counted: Any = counted) -> Any:
                state = self._read(number, wanted, counted)
                also(number)
                return state

            try:
                state = hosts.all_or_none(read)
            except hosts.OtherProcessLost:
                raise
            except hosts.OtherProcessFailed as error:  # it read what this one did not have to
                failed = error
            except UserError:
                raise
            except Exception as error:
                failed = error
            else:
                return jax.tree.map(_from_host, state, abstract), number
            why = f"{type(failed).__name__}: {failed}".splitlines()[0][:300]
            warnings.warn(f"checkpoint of round {number} is damaged, passed over ({why})", stacklevel=2)
            if mend:
                hosts.on_first(partial(self._put_aside, number))
        return None

    def clients(self, number: int) -> dict[str, np.ndarray] | None:
        """Which of the rows on the host were clients' in a round; None if their state lay on the devices.

        Raises:
          Exception: whatever damage to it leads to.
        """
        entries = self._about(number).get("clients")
        if entries is None:
            return None
        wanted = {name: np.empty(e["shape"], e["dtype"]) for name, e in entries.items()}
        with ocp.StandardCheckpointer() as reader:
            read = {
                k: np.asarray(v)
                for k, v in reader.restore(self.folder / str(number) / "clients", wanted).items()
            }
        for name, entry in entries.items():
            if crc32(read[name]) != entry["crc32"]:
                raise ValueError(f"clients' {name} do not have the checksum that was written")
        return read

    def model(self, number: int) -> Any:
        """The deployed model of a round, nested dicts of NumPy leaves; None if it was not kept by itself.

        Raises:
          Exception: whatever damage to it leads to.
        """
        entries = self._about(number).get("model")
        if entries is None:
            return None
        wanted = [jax.ShapeDtypeStruct(tuple(e["shape"]), jnp.dtype(e["dtype"])) for e in entries]
        if jax.process_count() > 1:
            everywhere = NamedSharding(Mesh(np.asarray(jax.devices()), ("all",)), PartitionSpec())
            wanted = [jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=everywhere) for w in wanted]
        targets = _numbered([_target(leaf) for leaf in wanted])
        with ocp.StandardCheckpointer() as reader:
            read = reader.restore(self.folder / str(number) / "model", targets)
        leaves: dict[Any, np.ndarray] = {}
        for place, (entry, leaf) in enumerate(zip(entries, wanted, strict=True)):
            found = jax.device_get(read[_key(place)]) if leaf.size else np.zeros(leaf.shape, leaf.dtype)
            if entry["crc32"] not in (None, crc32(found)):
                raise ValueError(f"{entry['path']} does not have the checksum that was written")
            leaves[tuple(entry["path"])] = found
        return traverse_util.unflatten_dict(leaves)

    def _about(self, number: int) -> dict[str, Any]:
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
            return reader.restore(self.folder / str(number) / "about", args=ocp.args.JsonRestore())

    def _read(self, number: int, wanted: Any, counted: Any) -> Any:
        path, about = self.folder / str(number), self._about(number)
        _check_same(about["leaves"], counted, number)
        # Not strict: several processes may have written more rows that do not count than are wanted here, or
        # fewer. The shapes that count have been compared above.
        with ocp.StandardCheckpointer() as reader:
            read = reader.restore(path / "state", _numbered(jax.tree.map(_target, wanted)), strict=False)
        leaves, structure = jax.tree.flatten(wanted)
        state = structure.unflatten(
            # For the host Orbax reads all rows, whatever shape is wanted.
            _rows_of(read[_key(i)], leaf) if leaf.size else np.zeros(leaf.shape, leaf.dtype)
            for i, leaf in enumerate(leaves)
        )
        found = _leaves(state)
        for name, entry in about["leaves"].items():
            if entry["crc32"] is not None and found[name]["crc32"] not in (entry["crc32"], None):
                raise ValueError(f"{name} does not have the checksum that was written")
        return state

    def _remove_unfinished(self) -> None:
        if not self.folder.is_dir():
            return
        for path in sorted(self.folder.iterdir()):
            if "orbax-checkpoint-tmp" in path.name:
                number = path.name.split(".")[0]
                warnings.warn(f"checkpoint of round {number} is half-written, passed over", stacklevel=3)
                shutil.rmtree(path, ignore_errors=True)

    def _put_aside(self, number: int) -> None:
        home = self.folder.parent / "damaged"
        home.mkdir(exist_ok=True)
        target = home / str(number)
        copies = 1
        while target.exists():
            target, copies = home / f"{number}-{copies}", copies + 1
        (self.folder / str(number)).rename(target)


# --- errors ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _plain_errors(folder: Path) -> Iterator[None]:
    """Makes the system's own error of what TensorStore says of a file that it cannot write."""
    try:
        yield
    except ValueError as error:
        told = re.search(r"os_error_code='(\d+)'", str(error))
        full = "RESOURCE_EXHAUSTED" in str(error) or "No space left" in str(error)
        if told is None and not full:
            raise
        code = errno.ENOSPC if told is None else int(told[1])
        raise OSError(code, os.strerror(code), str(folder)) from error


class _NoOrbax(logging.Filter):
    """Lets no traceback through that went by Orbax."""

    def filter(self, record: logging.LogRecord) -> bool:
        if not record.exc_info or record.exc_info[2] is None:
            return True
        frames = traceback.walk_tb(record.exc_info[2])
        return not any(frame.f_globals.get("__name__", "").startswith("orbax.") for frame, _ in frames)


_NO_ORBAX = _NoOrbax()


def _without_tracebacks() -> None:
    """Orbax logs the traceback of an error in the background once in each thread that the error goes through,
    and TensorStore that of every further write of the same checkpoint; we get the error itself.
    """
    logging.getLogger("absl").addFilter(_NO_ORBAX)  # once: a second time changes nothing
    if getattr(sys.unraisablehook, "ours", False):
        return
    before = sys.unraisablehook

    def hook(event: Any) -> None:
        if not (isinstance(event.exc_value, RuntimeError) and str(event.exc_value) == "Event loop is closed"):
            before(event)

    hook.ours = True  # pyright: ignore[reportFunctionMemberAccess]
    sys.unraisablehook = hook


# --- leaves -------------------------------------------------------------------------------------------


def _to_host(leaf: Any) -> Any:
    """A copy of its own in host memory; a leaf that other processes hold parts of stays as it is."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return leaf
    return np.array(leaf)


def _on_host(leaf: Any) -> jax.ShapeDtypeStruct:
    """What `_to_host` will have made of a leaf of this shape."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    if jax.process_count() > 1:
        return leaf
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _target(leaf: jax.ShapeDtypeStruct) -> Any:
    """What tells Orbax to read into host memory, on whatever devices it was written."""
    return leaf if jax.process_count() > 1 else np.empty(leaf.shape, leaf.dtype)


def _from_host(leaf: Any, abstract: Any) -> Any:
    if jnp.issubdtype(abstract.dtype, jax.dtypes.prng_key):
        implementation = []
        jax.eval_shape(lambda key: implementation.append(jax.random.key_impl(key)), abstract)
        return jax.random.wrap_key_data(leaf, impl=implementation[0])
    return leaf


def _key(index: int) -> str:
    return f"leaf{index:05d}"


def _numbered(tree: Any) -> dict[str, Any]:
    """The leaves by number, empty ones left out, which Orbax refuses."""
    return {_key(i): leaf for i, leaf in enumerate(jax.tree.leaves(tree)) if leaf.size}


def _rows_of(leaf: Any, shape: Any) -> Any:
    """The rows on the host that count."""
    ours = isinstance(leaf, np.ndarray) and leaf.ndim > 0
    return leaf[: shape.shape[0]] if ours and leaf.shape[0] != shape.shape[0] else leaf


def _leaves(tree: Any, shapes: Any = None) -> dict[str, dict[str, Any]]:
    """Path -> shape, with the rows that count, dtype and checksum (None where parts are elsewhere)."""
    out = {}
    shapes = jax.tree.leaves(tree if shapes is None else shapes)
    for (path, leaf), like in zip(jax.tree_util.tree_leaves_with_path(tree), shapes, strict=True):
        crc = None
        if isinstance(leaf, np.ndarray):
            crc = crc32(leaf)
        # Of a key, which is kept as the integers that it is made of, the shape is that of these.
        shape = [*like.shape[:1], *leaf.shape[1:]] if leaf.ndim else []
        out[jax.tree_util.keystr(path)] = {"shape": shape, "dtype": str(leaf.dtype), "crc32": crc}
    return out


def _paths(model: Any) -> list[tuple[Any, ...]] | None:
    """Paths of the leaves, in order, if they are all that is needed to make the tree again."""
    found = jax.tree_util.tree_leaves_with_path(model)
    keys = [tuple(getattr(key, "key", None) for key in path) for path, _ in found]
    if not keys or not all(path and all(isinstance(key, str) for key in path) for path in keys):
        return None
    again = traverse_util.unflatten_dict({path: leaf for path, (_, leaf) in zip(keys, found, strict=True)})
    return keys if jax.tree.structure(again) == jax.tree.structure(model) else None


def _check_same(recorded: dict[str, Any], wanted: Any, number: int) -> None:
    bare = lambda leaves: {k: (tuple(v["shape"]), v["dtype"]) for k, v in leaves.items()}  # noqa: E731
    have, want = bare(recorded), bare(_leaves(wanted))
    for name in sorted({*have, *want}):
        if have.get(name) != want.get(name):
            raise UserError(
                "checkpoints",
                number,
                f"its leaf {name} is {have.get(name, 'missing')}, and this configuration wants "
                f"{want.get(name, 'none')}",
                "Resume with the configuration, the model and the data that the run was started with.",
            )
