"""Waves: which slot trains where and when. Planned on the host, a few integers handed to the round.

Clients differ in size (15 to 2,848 samples under Dirichlet 0.1), so a cohort is sorted by optimiser steps
and cut into waves of like length, and the waves are dealt to the devices by their work. The plan may change
speed only.
"""

# ruff: noqa: F722 - shapes in annotations, such as "K ...", are no expressions of Python

import dataclasses
import heapq
from collections.abc import Sequence
from typing import Any

import numpy as np
from flax import struct
from jaxtyping import Float, Integer

from fedjax_sim.config import LocalConfig


@struct.dataclass
class Plan:
    """Which slot trains where and when.

    Attributes:
      slot_of_place: i32[D * S], slot in each execution place, device after device; K for an empty place.
      place_of_slot: i32[K], where each slot is.
      wave_steps: i32[D * W], steps of each wave.
    """

    # Any: JAX also makes plans of shapes and of its own marks.
    slot_of_place: Any
    place_of_slot: Any
    wave_steps: Any


def steps_of(counts: Integer[np.ndarray, " K"], local: LocalConfig) -> Integer[np.ndarray, " K"]:
    """Optimiser steps of clients with `counts` samples. i64[K] -> i64[K]."""
    per_epoch = -(-np.asarray(counts) // local.batch_size)
    if local.epochs is not None:
        return per_epoch * local.epochs
    assert local.steps is not None
    return np.where(per_epoch > 0, local.steps, 0)


def make_plan(steps: Integer[np.ndarray, " K"], devices: int, width: int, *, beside: bool = False) -> Plan:
    """Balances slots over devices and cuts them into waves of like length.

    Slots are sorted by steps and dealt, largest first, to the device with the least work that still has a
    place (longest processing time first). Shapes depend on K, `devices` and `width` only.

    Args:
      steps: i64[K], of each slot.
      devices: D.
      width: L, lanes of a wave.
      beside: other runs' waves run beside these, the longest beside the longest.
    """
    plans = make_plans(steps[None], devices, width, beside=beside)
    return Plan(plans.slot_of_place[0], plans.place_of_slot[0], plans.wave_steps[0])


def make_plans(steps: Integer[np.ndarray, "R K"], devices: int, width: int, *, beside: bool = False) -> Plan:
    """The plans of R rounds, leaves [R, …], each as `make_plan` makes it.

    Args:
      steps: i64[R, K], of each slot.
      devices: D.
      width: L, lanes of a wave.
      beside: see `make_plan`.
    """
    rounds, count = steps.shape
    waves = -(-count // (devices * width))
    used = -(-count // width)
    # As `in_order`: these stay where they are.
    stay = np.full(rounds, True) if _one_by_one(devices, width, beside=beside) else _alike(steps)
    number = np.arange(rounds)[:, None]
    ranked = np.full((rounds, used * width), count)
    ranked[:, :count] = np.where(stay[:, None], np.arange(count), np.argsort(-steps, axis=1, kind="stable"))
    longest = steps[number, ranked[:, ::width]]  # of each wave, the longest wave first
    place = np.empty((rounds, used), np.int64)
    place[:] = np.arange(used)
    if devices > 1:
        for unlike in np.flatnonzero(~stay):
            place[unlike] = _places_of_waves(longest[unlike], devices, waves)
    wave_steps = np.zeros((rounds, devices * waves), np.int32)
    wave_steps[number, place] = longest
    slot_of_place = np.full((rounds, devices * waves, width), count, np.int32)
    slot_of_place[number, place] = ranked.reshape(rounds, used, width)
    flat = slot_of_place.reshape(rounds, -1)
    place_of_slot = np.zeros((rounds, count + 1), np.int32)  # the last is that of empty places
    place_of_slot[number, flat] = np.arange(flat.shape[1])
    return Plan(flat, place_of_slot[:, :count], wave_steps)


def _places_of_waves(longest: np.ndarray, devices: int, waves: int) -> np.ndarray:
    """Deals waves to devices: each to the one with the least work that has a place left, the first of those.

    Args:
      longest: i64[n], steps of each wave, descending.
      devices: D.
      waves: W, places of each device.

    Returns:
      i64[n], places among all D * W, those of the first device first.
    """
    if devices == 1:
        return np.arange(len(longest))
    least = [(0, device, device * waves) for device in range(devices)]  # work, device, its next place
    places = np.empty(len(longest), np.int64)
    for number, steps in enumerate(longest.tolist()):
        work, device, place = least[0]
        places[number] = place
        if place + 1 < (device + 1) * waves:
            heapq.heapreplace(least, (work + steps, device, place + 1))
        else:
            heapq.heappop(least)
    return places


def in_order(steps: Integer[np.ndarray, " K"], devices: int, width: int, *, beside: bool = False) -> bool:
    """Whether slots may simply stay where they are: all alike, or one after another on one device.

    Args:
      steps: i64[K], of each slot.
      devices: D.
      width: L, lanes of a wave.
      beside: see `make_plan`.
    """
    return _one_by_one(devices, width, beside=beside) or bool(_alike(steps))


def _one_by_one(devices: int, width: int, *, beside: bool) -> bool:
    return devices == 1 and width == 1 and not beside


def _alike(steps: Integer[np.ndarray, "*R K"]) -> np.ndarray:
    """Whether all slots of a round have as many steps, bool[*R]."""
    return (steps == steps[..., :1]).all(-1)


def padding_waste(
    counts: Integer[np.ndarray, "*R K"], plan: Plan, local: LocalConfig, width: int
) -> Float[np.ndarray, "*R"]:
    """Samples that go through the network over samples that should (1.0 is none wasted), f64[*R].

    Args:
      counts: i64[*R, K], training samples of each slot's client.
      plan: of the round or rounds, leaves [*R, …].
      local: epochs or steps, and the size of a batch.
      width: L, lanes of a wave.
    """
    counts = np.asarray(counts)
    done = np.asarray(plan.wave_steps, np.int64).sum(-1) * width * local.batch_size
    if local.epochs is not None:
        wanted = counts.sum(-1) * local.epochs
    else:
        assert local.steps is not None
        full, batch = np.maximum(counts, 1), local.batch_size
        per_epoch = -(-full // batch)
        whole, rest = np.divmod(local.steps, per_epoch)
        wanted = np.where(counts > 0, whole * counts + np.minimum(rest * batch, counts), 0).sum(-1)
    return done / np.maximum(wanted, 1)


# --- how wide ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Work:
    """What clients of a network of dense layers have to do on a CPU.

    Attributes:
      steps: i64[N], of each client in a round.
      flops: floating-point operations of a step of one client.
    """

    steps: np.ndarray
    flops: float

    @classmethod
    def of(cls, counts: np.ndarray, local: LocalConfig, params: int) -> "Work":
        """Of clients with `counts` samples, i64[N], who train so many parameters."""
        return cls(steps_of(counts, local), 6.0 * local.batch_size * params)

    def seconds(self, cohort_size: int, devices: int, width: int) -> float:
        """Of a round in waves of `width`, roughly: see `rounds_seconds`."""
        return rounds_seconds([self.cohorts(cohort_size)], devices, width, self.flops)

    def cohorts(self, size: int) -> np.ndarray:
        """Steps of some cohorts, i64[8, K], the same in each call; who is drawn in a run does not count."""
        rng = np.random.default_rng(0)
        return np.stack([rng.choice(self.steps, size, replace=size > len(self.steps)) for _ in range(8)])


def step_seconds(lanes: int, flops: float) -> float:
    """Seconds of a step of so many clients side by side on a CPU device, roughly.

    What starting a step's kernels takes, and what each client adds: several small products as one are slower
    than one of them. By rounds of six MLPs, of 36 thousand to 5.7 million operations a step and 1 to 10 lanes
    (Intel Xeon, one core, jaxlib 0.10.1); off by up to two there, and in the order of widths by few per cent.

    Args:
      lanes: clients side by side.
      flops: floating-point operations of a step of one.
    """
    each = 5e-6 + flops / 60e9 if lanes == 1 else 3e-6 + flops / 30e9
    return 12e-6 + lanes * each


def rounds_seconds(
    cohorts: Sequence[np.ndarray], devices: int, width: int, flops: float, side: int = 1
) -> float:
    """Seconds of a round of each of some runs, roughly, `side` of them side by side.

    Args:
      cohorts: i64[R, K] of each run, steps of the slots in R rounds.
      devices: D of each run.
      width: L, lanes of a wave of each run.
      flops: of a step of one client.
      side: runs of a block, of which the waves run beside one another.
    """
    steps = np.stack(cohorts)
    runs, rounds, slots = steps.shape
    flat = steps.reshape(runs * rounds, slots)
    waves = make_plans(flat, devices, width, beside=side > 1).wave_steps.reshape(runs, rounds, devices, -1)
    spare = -runs % side
    blocks = np.concatenate([waves, np.zeros((spare, *waves.shape[1:]), waves.dtype)])
    longest = blocks.reshape(-1, side, *waves.shape[1:]).max(1)  # of each block, [blocks, R, D, W]
    return float(longest.sum((0, 3)).max(1).mean()) * step_seconds(side * width, flops)


def widths(most: int) -> list[int]:
    """Widths worth looking at, the widest first."""
    return sorted({width for width in (1, 2, 5) if width < most} | {most}, reverse=True)
