"""Rounds as one program: which runs can have it, how many rounds a call has, and what goes in.

A small round takes less time than to start it, and to fetch and write down what it says. Where nobody on the
host wants to see the model between two rounds, these run as one call (`fedjax_sim.engine.round.Rounds`).
"""

import dataclasses
import time
import warnings
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import numpy as np

from fedjax_sim.engine import hosts
from fedjax_sim.engine.feed import COPIED
from fedjax_sim.engine.placement import platform_of
from fedjax_sim.engine.round import RoundInputs
from fedjax_sim.engine.setup import Setup

T = TypeVar("T")

MOST = 32
"""Rounds of a call. A program has room for so many, whatever a call has, so that one serves all calls."""

_SLOTS = 2**17
"""Slots of all rounds of a call, beyond which what the host decides of them would take much memory."""

_SECONDS = 0.25
"""That a call takes: progress is seen, and an interrupt answered, after one more."""

_STATE = 3 * 2**20
"""Bytes of state on a device beyond which rounds run one by one unless asked otherwise. XLA may hold twice
what a loop over rounds hands on, and where that is much a round takes long by itself. Compiled for 16 TPU v5e
chips, 160 slots of LeNet: SCAFFOLD with 1,000 clients (15 MiB of state) takes 246 MiB a chip one by one and
261 in a loop, LIPS over FedMR (3.2 MiB) 226 and 238, FedMR (2.6 MiB) 218 and 222.
"""


def limit(setup: Setup, reason: str | None, state: int, *, cut: bool) -> int:
    """R, how many rounds a call may have; 1: each is a program of its own.

    Args:
      setup: of the run.
      reason: what `wants_the_host` says of it.
      state: bytes of it that lie on one device.
      cut: whether a part of it is cut over the devices. Of several CPU devices that exchange rows a loop over
        rounds is slower than rounds one by one (`scripts/benchmark/fused.py`, an MLP of 10 clients on two:
        FedMR 0.77 of the speed, SCAFFOLD 0.46; FedAvg, which exchanges none, 2.8).
    """
    wanted = setup.config.execution.rounds_per_call
    if reason is not None:
        if wanted not in ("auto", 1):
            told = f"execution.rounds_per_call is {wanted}, and rounds run one by one: {reason}"
            warnings.warn(told, stacklevel=2)
        return 1
    if wanted != "auto":
        return min(wanted, setup.config.rounds)
    slower = cut and setup.devices > 1 and platform_of(setup.mesh) == "cpu"
    return 1 if slower or state > _STATE else room(setup.cohort_size)


def room(slots: int) -> int:
    """R, for rounds of so many slots."""
    return min(MOST, max(1, _SLOTS // slots))


def wants_the_host(setup: Setup, data: str, *, on_host: bool) -> str | None:
    """What has the host take part in every round, if anything has.

    Args:
      setup: of the run.
      data: where samples lie, see `fedjax_sim.engine.feed`.
      on_host: whether clients' own state lies on the host.
    """
    if setup.config.execution.debug:
        return "the run is debugged"
    if setup.algorithm.cohort_chooser is not None:
        return "the algorithm chooses the clients of each"
    if data != COPIED:
        return f"samples are sent to the devices for each (execution.data: {data})"
    if on_host:
        return "clients' own state lies on the host"
    return None


def with_room(inputs: RoundInputs, limit: int) -> RoundInputs:
    """Inputs of some rounds, leaves [R, …], with those of further ones, zeros, up to [limit, …]."""

    def filled(leaf: Any) -> np.ndarray:
        leaf = np.asarray(leaf)
        out = np.zeros((limit, *leaf.shape[1:]), leaf.dtype)
        out[: len(leaf)] = leaf
        return out

    made = jax.tree.map(filled, dataclasses.replace(inputs, key=cast(jax.Array, None)))
    return dataclasses.replace(made, key=inputs.key)


def inputs_of_round(inputs: RoundInputs, number: int) -> RoundInputs:
    """One of some rounds, of which `inputs` has leaves [R, …] and the key that they share."""
    made = jax.tree.map(lambda leaf: leaf[number], dataclasses.replace(inputs, key=cast(jax.Array, None)))
    return dataclasses.replace(made, key=inputs.key)


class Pace:
    """How many rounds a call has: so many as take `_SECONDS`, or as the user wants.

    It is the same in all processes of a run. From call to call it grows twofold at most, so that a call which
    the clock misjudges does no harm.
    """

    def __init__(self, wanted: int | str, limit: int):
        """`wanted`: what the user says, or auto; `limit`: R."""
        self._wanted, self._limit = wanted, limit
        self._calls, self._count = 0, 1
        self._mark = self._seconds = None

    def rounds(self, most: int) -> int:
        """How many the next call has, from 1 to `most`."""
        self._calls += 1
        if self._wanted != "auto" or self._limit == 1:
            return min(most, self._limit)
        # Several have to agree, which takes a while: at the second call, the fourth, the eighth, ….
        if jax.process_count() == 1 or self._calls & (self._calls - 1) == 0:
            seconds = hosts.on_first(lambda: self._seconds)
            if seconds is not None:
                fitting = int(_SECONDS / max(seconds, 1e-9))
                self._count = max(1, min(self._limit, fitting, 2 * self._count))
        return min(most, self._count)

    def timed(self, count: int, fetch: Callable[[], T]) -> T:
        """What `fetch` gives, which waits for a call of so many rounds."""
        found, now = fetch(), time.perf_counter()
        if self._mark is not None:
            self._seconds = (now - self._mark) / count
        self._mark = now
        return found
