"""Compiled programs in a folder, for processes that start later on the same kind of machine.

JAX has a cache of its own. This one differs in what it takes of several CPU devices. jaxlib keeps the order
among the exchanges of a program (they share a resource, which is written down by computation): of a program
that is loaded, those of one computation keep it, but a loop or branch that exchanges has lost its place among
the exchanges beside it. Two devices may then wait in two different ones, for ever, or the process dies. We
saw both with jaxlib 0.10.1 and 0.12.0.1, four devices, at the first or second load; never where all exchanges
of a computation are its own (jaxlib 0.10.1: 22 further starts of five methods, 17 programs each, on two and
four devices). So only programs are kept that have no loop or branch beside another exchange.

A file is written whole or not at all, and one that cannot be read is as none.
"""

import contextlib
import hashlib
import os
import pickle
import re
import sys
import tempfile
import threading
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable

LIMIT = 2**30
"""Bytes of a folder. Beyond, the programs go that were used longest ago, until a quarter is free."""

_ENDING = ".program"


class ProgramFiles:
    """Programs of one kind of machine, by name."""

    def __init__(self, folder: Path):
        """`folder`: of this kind of processor alone; need not be there yet."""
        self.folder = folder

    def load(self, name: str, lowered: jax.stages.Lowered, devices: Sequence[Any]) -> Any:
        """The program, as `lowered.compile()` would make it; None if it is not here.

        Args:
          name: see `name_of`.
          lowered: it, not compiled.
          devices: that it is for.
        """
        path = self.folder / f"{name}{_ENDING}"
        try:
            held = zlib.decompress(path.read_bytes())
            with _without_remarks():
                made = serialize_executable.deserialize_and_load(
                    held, lowered.in_tree, lowered.out_tree, devices[0].client, list(devices)
                )
            os.utime(path)  # used now
        except Exception:  # whatever is wrong with a file, without it the program is compiled
            return None
        return made

    def save(self, name: str, program: jax.stages.Compiled) -> None:
        """Keeps a program, if it can be kept."""
        try:
            held, _, _ = serialize_executable.serialize(program)
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            file, draft = tempfile.mkstemp(dir=self.folder)
            try:
                with open(file, "wb") as out:
                    out.write(zlib.compress(held, 1))
                os.replace(draft, self.folder / f"{name}{_ENDING}")
            except BaseException:
                os.unlink(draft)
                raise
            self._make_room()
        except (OSError, ValueError, NotImplementedError, pickle.PicklingError, jax.errors.JaxRuntimeError):
            return  # the disk is full, say, or the program calls back to the host

    def _make_room(self) -> None:
        found = []
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process removed it
                about = path.stat()
                found.append((about.st_mtime, about.st_size, path))
        total = sum(size for _, size, _ in found)
        if total <= LIMIT:
            return
        for _, size, path in sorted(found):
            path.unlink(missing_ok=True)
            total -= size
            if total <= LIMIT * 3 // 4:
                break


def name_of(text: str, lowered: jax.stages.Lowered, devices: Sequence[Any], options: Any) -> str:
    """A name for all that a program is made of, versions and JAX's settings included.

    Args:
      text: of the program.
      lowered: it, of which the text has only those arguments that are used.
      devices: that it is for.
      options: of the compiler.
    """
    plain = str | int | float | bool | None
    settings = {name: getattr(jax.config, name, None) for name in sorted(jax.config.values)}
    arguments = [(leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(lowered.args_info)]
    made_of = (
        text,
        str(lowered.in_tree),
        arguments,
        str(lowered.out_tree),
        [device.id for device in devices],
        options,
        os.environ.get("XLA_FLAGS", ""),
        [version(package) for package in ("jax", "jaxlib")],
        {name: value for name, value in settings.items() if isinstance(value, plain)},
    )
    return hashlib.sha256(repr(made_of).encode()).hexdigest()


_EXCHANGE = re.compile(
    r" (?:all-gather|all-reduce|(?:ragged-)?all-to-all|collective-\w+|reduce-scatter|send|recv)(?:-start)?\("
)
OF_ONE = re.compile(r"replica_groups=\{\{\d+\}(?:,\{\d+\})*\}")
"""Says that a sum goes over an axis of one device."""

_CALLED = re.compile(r"\w=\{?(%[\w.\-]+(?:, %[\w.\-]+)*)")


def keeps_its_order(text: str) -> bool:
    """Whether no computation of a compiled program has a loop, a branch or a call that exchanges beside
    another exchange.

    Args:
      text: of `jax.stages.Compiled`.
    """
    if not text:  # of which nothing is known
        return False
    own: dict[str, int] = defaultdict(int)  # exchanges of each computation
    called: dict[str, list[str]] = defaultdict(list)
    here = ""
    for line in text.splitlines():
        if line.endswith("{") and line[:1] not in " }":
            here = line.removeprefix("ENTRY ").split(" ", 1)[0]
        elif _EXCHANGE.search(line):
            own[here] += not OF_ONE.search(line)
        elif "=%" in line or "={%" in line:
            called[here] += [name for names in _CALLED.findall(line) for name in names.split(", ")]
    exchanging = {name for name, count in own.items() if count}
    while more := {name for name in called if exchanging & set(called[name])} - exchanging:
        exchanging |= more
    for name, inner in called.items():
        loops = sum(one in exchanging for one in inner)
        if loops and loops + own[name] > 1:
            return False
    return True


_STDERR = threading.Lock()
_REMARK = re.compile(rb"Target machine feature \+prefer-no-\w+ is not")


@contextlib.contextmanager
def _without_remarks() -> Iterator[None]:
    """Leaves out what jaxlib 0.10 says of each program that it loads on some processors, in 2,000 letters.

    It misses `prefer-no-gather` among the processor's instructions, which is none, but LLVM's advice.
    """
    if not version("jaxlib").startswith("0.10."):
        yield
        return
    sys.stderr.flush()
    with _STDERR, tempfile.TemporaryFile() as told, contextlib.ExitStack() as after:
        kept = os.dup(2)
        after.callback(os.close, kept)
        os.dup2(told.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            told.seek(0)
            for line in told:
                if not _REMARK.search(line):
                    os.write(2, line)
