"""Who takes part in a round, and schedules that fix it for all methods of a comparison.

A draw is a function of (seed, round) and of the population alone, so methods with the same seed see the same
cohorts, and a resumed run those that it would have seen. A schedule is the same as data: a JSON file

    {"clients": 100, "cohorts": [[3, 71, 12], [40, 2, 9]]}

with the client ids of every round, slot by slot.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedjax_sim.config import CohortConfig
from fedjax_sim.core.documents import parse_json
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.paths import local
from fedjax_sim.core.rng import COHORTS

Draw = Callable[[int], np.ndarray]
"""Round, from 0 -> client ids i32[K]."""


def generator(seed: int, round_index: int) -> np.random.Generator:
    """What a round's cohort is drawn with."""
    words = [seed, COHORTS, round_index]
    # The same draws; of an array NumPy makes the generator in two thirds of the time.
    return np.random.default_rng(np.asarray(words, np.uint32) if seed < 2**32 else words)


def sampler(config: CohortConfig, counts: np.ndarray, rounds: int, seed: int) -> Draw:
    """The draw that a configuration asks for.

    Args:
      config: how.
      counts: i64[N], training samples of each client.
      rounds: of the run.
      seed: of the run.

    Raises:
      UserError: the cohort is larger than the population, or the schedule does not fit the run.
    """
    clients, size = len(counts), config.count(len(counts))
    if config.sampling == "schedule":
        assert config.schedule is not None
        return _scheduled(Schedule.load(config.schedule), clients, size, rounds)
    if config.sampling == "cyclic":
        order = generator(seed, 0).permutation(clients)
        return lambda r: order[(r * size + np.arange(size)) % clients].astype(np.int32)
    shares = None
    if config.sampling == "by_size":
        shares = counts / counts.sum()
        if np.count_nonzero(counts) < size:
            raise UserError(
                "cohort.sampling",
                "by_size",
                f"only {np.count_nonzero(counts)} clients have samples, and {size} are wanted",
                "Choose a smaller cohort.",
            )
    return lambda r: generator(seed, r).choice(clients, size=size, replace=False, p=shares).astype(np.int32)


@dataclass(frozen=True)
class Schedule:
    """The cohorts of a run.

    Attributes:
      clients: N.
      cohorts: client ids of each round, all rounds alike many.
    """

    clients: int
    cohorts: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        """K."""
        return len(self.cohorts[0])

    def save(self, path: str | Path) -> None:
        """Writes the JSON."""
        rows = ",\n  ".join(json.dumps(list(cohort)) for cohort in self.cohorts)
        local(path).write_text(f'{{"clients": {self.clients}, "cohorts": [\n  {rows}\n]}}\n')

    @classmethod
    def drawn(cls, draw: Draw, rounds: int, clients: int) -> "Schedule":
        """The first `rounds` cohorts of a draw."""
        return cls(clients, tuple(tuple(draw(r).tolist()) for r in range(rounds)))

    @classmethod
    def load(cls, path: str | Path) -> "Schedule":
        """Reads the JSON.

        Raises:
          UserError: there is no such file, or it is no schedule.
        """
        file = local(path, "cohort.schedule")
        try:
            read = parse_json(file.read_text())
        except OSError as error:
            raise _bad(path, f"it cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise _bad(path, f"it cannot be read as JSON: {error}") from None
        try:
            clients, cohorts = read["clients"], [_ids(cohort) for cohort in read["cohorts"]]
        except (KeyError, TypeError):
            raise _bad(path, "this is not a schedule of cohorts") from None
        if type(clients) is not int or clients < 1:
            raise _bad(path, f"its number of clients is {clients!r}")
        if not cohorts or not cohorts[0]:
            raise _bad(path, "it holds no cohort")
        for number, cohort in enumerate(cohorts):
            if len(cohort) != len(cohorts[0]):
                raise _bad(
                    path, f"cohort {number} has {len(cohort)} clients, and the first {len(cohorts[0])}"
                )
            if len(set(cohort)) < len(cohort):
                raise _bad(path, f"cohort {number} names a client twice")
            outside = [client for client in cohort if not 0 <= client < clients]
            if outside:
                raise _bad(path, f"cohort {number} names client {outside[0]} of {clients}")
        return cls(clients, tuple(cohorts))


def _ids(cohort: Sequence[int]) -> tuple[int, ...]:
    if any(type(client) is not int for client in cohort):
        raise TypeError
    return tuple(cohort)


def _bad(path: str | Path, why: str) -> UserError:
    return UserError(
        "cohort.schedule",
        str(path),
        why,
        'Give a JSON file {"clients": N, "cohorts": [[ids of a round], …]}; Schedule.save writes one.',
    )


def _scheduled(schedule: Schedule, clients: int, size: int, rounds: int) -> Draw:
    for what, has, wanted in (
        ("clients", schedule.clients, clients),
        ("clients a round", schedule.size, size),
    ):
        if has != wanted:
            raise UserError(
                "cohort.schedule",
                f"{has} {what}",
                f"the run has {wanted}",
                "Let partition.clients and cohort.size be the schedule's.",
            )
    if len(schedule.cohorts) < rounds:
        raise UserError(
            "cohort.schedule",
            f"{len(schedule.cohorts)} rounds",
            f"the run has {rounds}",
            "Shorten the run, or write a longer schedule.",
        )
    table = np.asarray(schedule.cohorts, np.int32)
    return lambda r: table[r]
