"""Several hosts, one run: a process on each, all of which make the same calls, and the first alone writes.

Slots are sharded over the devices of all processes, and what a round says of itself is the same everywhere:
records, checkpoints and results are those of one process that has as many devices. The folder of a run has to
be on a file system that all see.

In one process every function here does the obvious, at no cost.
"""

import atexit
import contextlib
import importlib
import os
import pickle
import re
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fedjax_sim.core.errors import UserError
from fedjax_sim.data.dataset import in_ranges

T = TypeVar("T")

PATIENCE = 5.0
"""Seconds that a process waits for the others to start before it says so."""
BUSY = 60.0
"""The same later on, when the others may well be loading or compiling."""
START = 300.0
"""Seconds after which it gives up waiting for the first to start; JAX's own limit."""


class OtherProcessFailed(UserError):
    """Another process failed, and says itself why. All have been told."""


class OtherProcessLost(OtherProcessFailed):
    """Another process has ended without a word, or cannot be reached. No other run can follow in this one."""


LINGER = 5.0
"""Seconds that the first process stays when it leaves: JAX ends the others with a crash once it has gone."""


def join(address: str = "auto", processes: int | None = None, process: int | None = None) -> None:
    """Makes this process one of several, before JAX starts: `jax.distributed.initialize`.

    Args:
      address: HOST:PORT of the first process, the same everywhere; `auto` finds all three on a TPU pod and
        under Slurm, Open MPI and Kubernetes.
      processes: how many there are.
      process: which this is, from 0.

    Raises:
      UserError: they do not make sense, or the others cannot be found.
    """
    if address == "auto":
        if processes is not None or process is not None:
            raise UserError(
                "--join", address, "the cluster says how many there are", "Give HOST:PORT instead."
            )
        _initialize(address, "Give HOST:PORT, --processes and --process.")
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(
            "--join", address, "this is not an address", "Write HOST:PORT of the first process, or auto."
        )
    if processes is None or processes < 1:
        raise UserError(
            "--processes", processes, "an address needs the number of processes", "Give it, from 1."
        )
    if process is None or not 0 <= process < processes:
        why = "an address needs the number of this process"
        raise UserError("--process", process, why, f"Give one from 0 to {processes - 1}.")
    if process == 0:
        _check_free(host, int(port))
    else:
        _reach(host, int(port), f"process {process} of {processes}")
    _initialize(
        address, "Start all processes, and see that they reach that address.", address, processes, process
    )


def first() -> bool:
    """Whether this process is the one that writes and talks."""
    return jax.process_index() == 0


def check_backend() -> None:
    """Starts JAX where it has not started yet.

    Raises:
      UserError: it finds no device of the kind that JAX_PLATFORMS asks for, or jit is switched off.
    """
    if jax.config.jax_disable_jit:  # pyright: ignore[reportAttributeAccessIssue] dynamic attribute
        raise UserError(
            "JAX_DISABLE_JIT",
            True,
            "a round is one compiled program, and nothing here runs without compiling",
            "Unset it. To look into a round use jax.debug.print or jax.debug.callback.",
        )
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # jax gives an empty AssertionError for cuda
        wanted = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue] dynamic attribute
        told = " ".join(str(error).split())
        raise UserError(
            "JAX_PLATFORMS",
            wanted,
            f"JAX cannot start on it{': ' * bool(told)}{told}",
            "Install jax for that hardware (jax[cuda12], jax[tpu]) and see that its driver is there, or "
            "unset JAX_PLATFORMS to take what there is.",
        ) from None


def on_first(action: Callable[[], T]) -> T:
    """What `action` gives, or raises, in the first process: known to all, done there alone.

    All have to call it, and none goes on before it is done; `action` must not call it again.

    Raises:
      OtherProcessFailed: one of the others has failed on its way here, in an action of `all_or_none`.
      UserError: JAX cannot start (`check_backend`).
    """
    check_backend()
    if jax.process_count() == 1:
        return action()
    _meet()
    error = value = None
    if first():
        try:
            value = action()
        except Exception as raised:
            error = raised
    told = pickle.loads(_broadcast(pickle.dumps((error, value))))
    if not first():
        error, value = told
    if error is not None:
        raise error
    return cast(T, value)


def all_or_none(action: Callable[[], T]) -> T:
    """What `action` gives in each process. Where it fails in one, all stop, instead of waiting for it.

    `action` may call `on_first`: those who come so far hear there of one who does not.

    Raises:
      OtherProcessFailed: another process has failed.
      UserError: JAX cannot start (`check_backend`).
    """
    check_backend()
    if jax.process_count() == 1:
        return action()
    error = value = None
    try:
        value = action()
    except OtherProcessFailed:
        raise
    except Exception as raised:
        error = raised
    _meet(failed=error is not None)
    if error is not None:
        raise error
    return cast(T, value)


def as_loss(error: Exception, fix: str) -> Exception:
    """What an error of JAX means where it comes of another process that is gone; otherwise the error itself.

    This process then leaves without waiting for the others when Python ends: JAX would wait for the one that
    is gone until that one has missed its heartbeats, and end with a crash. The status is 1.

    Args:
      error: of a round, or of whatever else all processes do together.
      fix: what the user does now.
    """
    told = " ".join(str(error).split())
    if isinstance(error, UserError) or jax.process_count() == 1 or not _LOSS.search(told):
        return error
    atexit.unregister(_leave)
    atexit.register(_leave)
    why = f"another process has ended without a word, or cannot be reached any more ({told[:200]})"
    return OtherProcessLost("process", jax.process_index(), why, fix)


_LOSS = re.compile(r"gloo|nccl|coordination service|closed by peer|reset by peer", re.IGNORECASE)


def _leave() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    if first():
        time.sleep(LINGER)
    os._exit(1)


def check_same(told: Mapping[str, Any], fix: str) -> None:
    """Raises one and the same UserError in all processes unless `told` is the same in each.

    Args:
      told: plain values by name; of several that differ the first is named.
      fix: what the user does now.
    """
    if jax.process_count() == 1:
        return
    expected = on_first(lambda: told)
    names = [name for name in {**expected, **told} if told.get(name) != expected.get(name)]
    mine = (names[0], told.get(names[0])) if names else None
    found = {n: other for n, other in enumerate(map(pickle.loads, _gathered(pickle.dumps(mine)))) if other}
    if found:
        name, value = next(iter(found.values()))
        who = in_ranges([number for number, other in found.items() if other[0] == name])
        raise UserError(name, value, f"so in process {who}; the first has {expected.get(name)!r}", fix)


def gathered(array: np.ndarray) -> np.ndarray:
    """Each process's array, of one shape and dtype of at most 32 bits. [m, …] -> [processes, m, …]."""
    return array[None] if jax.process_count() == 1 else np.asarray(multihost_utils.process_allgather(array))


@contextlib.contextmanager
def locked_by_first(claim: Callable[[], contextlib.AbstractContextManager[Any]]) -> Iterator[None]:
    """A context that the first process enters for all, such as the lock on a folder."""
    with contextlib.ExitStack() as stack:
        on_first(lambda: stack.enter_context(claim()) and None)
        yield


class StopVote:
    """Whether one of the processes wants to stop; the same answer in all, asked once a round.

    Others hear of it two rounds later, so that no round under way is waited for. At once in one process.
    """

    def __init__(self, wish: Callable[[], bool]):
        """`wish`: whether this process wants to."""
        self._wish = wish
        self._cast: deque[jax.Array] = deque()
        mesh = Mesh(np.asarray(jax.devices()), ("voters",), axis_types=(AxisType.Auto,))
        self._each, everywhere = (
            NamedSharding(mesh, PartitionSpec("voters")),
            NamedSharding(mesh, PartitionSpec()),
        )
        self._any = jax.jit(jnp.any, out_shardings=everywhere)

    def __call__(self) -> bool:
        """See the class."""
        if jax.process_count() == 1:
            return self._wish()
        mine = np.full(jax.device_count(), self._wish())
        self._cast.append(self._any(jax.make_array_from_callback(mine.shape, self._each, mine.__getitem__)))
        return len(self._cast) > 2 and bool(self._cast.popleft())


def _meet(*, failed: bool = False) -> None:
    """Waits until all processes are here. If one has failed, the others raise OtherProcessFailed."""
    with _waiting(BUSY, f"process {jax.process_index()} of {jax.process_count()}"):
        found = np.flatnonzero(multihost_utils.process_allgather(np.asarray(failed)))
    if len(found) and not failed:
        failing = int(found[0])
        raise OtherProcessFailed("process", failing, "it failed", "See what it says, and start all again.")


def _initialize(address: str, fix: str, *where: Any) -> None:
    who = f"process {where[2]} of {where[1]}" if where else "this process"
    try:
        with _waiting(PATIENCE, who, address):
            jax.distributed.initialize(*where)
    except (ValueError, RuntimeError) as error:
        told = " ".join(str(error).split())
        if not where and "should be defined" in told:  # no cluster has told JAX the address
            told = "no TPU pod, Slurm or Open MPI was found here"
        raise UserError("--join", address, told, fix) from None


@contextlib.contextmanager
def _waiting(seconds: float, who: str, address: str = "auto") -> Iterator[None]:
    """Says on standard error, once and if it takes longer than so many seconds, who waits and where."""

    def say() -> None:
        told = address
        if address == "auto":
            # JAX has no public name for what the cluster told it; without it the line says less.
            with contextlib.suppress(ImportError, AttributeError):
                told = importlib.import_module("jax._src.distributed").global_state.coordinator_address
        known = told not in (None, "auto")
        where = f"the first is at {told}" if known else "the cluster is asked where the first is"
        with contextlib.suppress(OSError, ValueError):
            print(f"{who} waits for the others: {where}", file=sys.stderr, flush=True)

    timer = threading.Timer(seconds, say)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _broadcast(content: bytes) -> bytes:
    """The first process's bytes."""
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    padded = np.zeros(length, np.uint8)
    if first():
        padded[:] = np.frombuffer(content, np.uint8)
    return multihost_utils.broadcast_one_to_all(padded).tobytes()


def _gathered(content: bytes) -> list[bytes]:
    """Each process's bytes, in all of them."""
    lengths = multihost_utils.process_allgather(np.int32(len(content)))
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: len(content)] = np.frombuffer(content, np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [row[:length].tobytes() for row, length in zip(rows, lengths, strict=True)]


def _reach(host: str, port: int, who: str) -> None:
    """Waits until the first process listens. JAX would wait too, and end the process with a crash."""
    address, began = f"{host}:{port}", time.monotonic()
    with _waiting(PATIENCE, who, address):
        while True:
            try:
                socket.create_connection((host.strip("[]"), port), timeout=10).close()
                return
            except OSError as error:
                if time.monotonic() - began > START:
                    why = f"no process listens there after {START:.0f} s ({error.strerror or error})"
                    fix = "Start the first process, and see that this host reaches that address."
                    raise UserError("--join", address, why, fix) from None
            time.sleep(0.5)


def _check_free(host: str, port: int) -> None:
    """Raises UserError where the first process could not listen: JAX would end the process instead."""
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        why = f"the first process cannot listen there: {error.strerror}"
        raise UserError(
            "--join", f"{host}:{port}", why, "Choose another port, or this host's address."
        ) from None
