"""What a user sees of a run under way, and how one asks it to end."""

import contextlib
import contextvars
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from fedjax_sim import algorithms, records
from fedjax_sim.config import RunConfig
from fedjax_sim.engine import hosts
from fedjax_sim.records import Table


class Clock:
    """Wall-clock time, and the process's CPU time."""

    def __init__(self):
        self._mark = self._read()

    def lap(self, rounds: int = 1) -> tuple[float, float]:
        """(seconds, CPU seconds) of each of so many rounds since the last call, to the microsecond, as
        timing.csv has them.
        """
        now = self._read()
        then, self._mark = self._mark, now
        return round((now[0] - then[0]) / rounds, 6), round((now[1] - then[1]) / rounds, 6)

    @staticmethod
    def _read() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()


EVERY = 30.0
"""Seconds between lines where no bar can be drawn."""

BLINK = 0.25
"""Seconds between two states of a bar in a notebook."""

_JOB: contextvars.ContextVar[str] = contextvars.ContextVar("job", default="")


@contextlib.contextmanager
def part_of(job: str) -> Iterator[None]:
    """Has the runs inside told of as `job`, one of many: their bars go when they are done."""
    token = _JOB.set(job)
    try:
        yield
    finally:
        _JOB.reset(token)


_NOTES: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("notes", default=())


@contextlib.contextmanager
def noted(*lines: str) -> Iterator[None]:
    """Has a run inside print these lines once it is checked, before its first round."""
    token = _NOTES.set(lines)
    try:
        yield
    finally:
        _NOTES.reset(token)


def print_notes() -> None:
    """Prints what `noted` holds, in the first of several processes."""
    for line in _NOTES.get():
        if hosts.first():
            print(line, flush=True)


class Bar:
    """How far a run is, on standard error.

    On a terminal a bar: rounds/s and ETA by tqdm, clients/s (`records.pace`, of this
    start), the newest headline metric.
    In a notebook the same as one line of text, which is replaced and needs no widgets, so that what is saved
    is its last state alone; the runs of a sweep share it. Elsewhere (a log file, a pipe, `TERM=dumb`, a
    terminal of continuous integration) plain lines: after the first round, then at most one in `EVERY`
    seconds, and after the last. A run that is `part_of` a sweep has only those between: the sweep tells of
    its end. `COLUMNS` sets the width; no colours are used.
    """

    def __init__(self, config: RunConfig, start: int, clients: int, table: Table, headline: str = "accuracy"):
        """Begins to show a run.

        Args:
          config: of the run.
          start: rounds that are done already.
          clients: of a round, for clients/s.
          table: the run's rows so far.
          headline: the metric that is shown.
        """
        self._clients, self._pace = clients, 0.0
        self._first: float | None = None  # what each round of the first call took, which compiles
        self._sum, self._counted = 0.0, 0  # of the rounds after it
        self._done, self._start, self._rounds = start, start, config.rounds
        known = table.series(headline)[1]
        self._headline, self._newest = headline, float(known[-1]) if len(known) else None
        job = _JOB.get()
        self._name = job or algorithms.name_of(config.algorithm) or type(config.algorithm).__name__
        self._brief, self._said = bool(job), time.monotonic()
        wanted = config.output.progress and hosts.first() and sys.stderr is not None and not sys.stderr.closed
        self._way, self._shown, self._begun = (_way() if wanted else ""), 0.0, time.monotonic()
        self._cell = _cell(shared=self._brief) if self._way == "notebook" else None
        columns = _columns()
        self._told: dict[str, str] = {}
        self._bar = tqdm(
            total=config.rounds,
            initial=start,
            desc=self._name,
            unit="round",
            disable=self._way != "bar",
            ncols=columns,
            dynamic_ncols=columns is None,
            file=sys.stderr,
            leave=not job,
        )

    def advance(self, rows: list[records.Row], seconds: float) -> None:
        """Counts a round, with its rows and how long it took."""
        if self._first is None:
            self._first = seconds
        elif self._counted or seconds != self._first:
            self._sum, self._counted = self._sum + seconds, self._counted + 1
            self._pace = self._sum / self._counted
        self._done += 1
        for row in rows:
            if row.metric == self._headline:
                self._newest = row.value
        told = {"clients/s": f"{self._clients / self._pace:,.0f}"} if self._pace else {}
        if self._newest is not None:
            told[self._headline] = f"{self._newest:.4f}"
        self._told = told
        if self._way == "lines":
            self._say(told)
        elif self._way == "notebook":
            self._show()
        elif self._way == "bar":
            # A terminal that has been closed is no reason to end a run.
            with contextlib.suppress(OSError, ValueError):
                self._bar.set_postfix(told, refresh=False)
                self._bar.update()

    def _show(self, last: bool = False) -> None:
        """Replaces the line in the notebook, unless it was just replaced."""
        now = time.monotonic()
        if self._cell is None or (now - self._shown < BLINK and not last):
            return
        self._shown = now
        text = tqdm.format_meter(
            self._done,
            self._rounds,
            now - self._begun,
            ncols=_columns() or 100,
            prefix=self._name,
            unit="round",
            postfix=", ".join(f"{name}={value}" for name, value in self._told.items()),
            initial=self._start,
        )
        self._cell.update({"text/plain": text}, raw=True)

    def _say(self, told: dict[str, str]) -> None:
        now, done, left = time.monotonic(), self._done, self._rounds - self._done
        ends = done == self._start + 1 or not left
        if now - self._said < EVERY and (self._brief or not ends):
            return
        self._said = now
        line = f"{self._name}: round {done} of {self._rounds}"
        line += "".join(f", {name} {value}" for name, value in told.items())
        if self._pace and left:
            line += f", {tqdm.format_interval(left * self._pace)} left"
        # A log that cannot be written, on a full disk perhaps, is no reason to end a run.
        with contextlib.suppress(OSError, ValueError):
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._show(last=True)
        with contextlib.suppress(OSError, ValueError):
            self._bar.close()


def _way() -> str:
    """How progress can be shown: `notebook`, `bar` (on a terminal) or `lines`."""
    if getattr(_shell(), "kernel", None) is not None:
        return "notebook"
    automated = os.environ.get("CI", "").lower() not in ("", "0", "false")
    terminal = getattr(sys.stderr, "isatty", bool)() and os.environ.get("TERM") != "dumb"
    return "bar" if terminal and not automated else "lines"


def _shell() -> Any:
    """IPython's shell, if this process is one; it need not be installed."""
    python = sys.modules.get("IPython")
    return None if python is None else python.get_ipython()


_CELLS: dict[Any, Any] = {}
"""Number of the notebook's cell that runs -> the line in its output that a sweep's runs share."""


def _cell(shared: bool) -> Any:
    """A line in the output of the notebook's cell that can be replaced."""
    from IPython.display import display

    number = getattr(_shell(), "execution_count", None)
    if not shared or number not in _CELLS:
        handle = display({"text/plain": ""}, raw=True, display_id=True)
        if not shared:
            return handle
        _CELLS.clear()
        _CELLS[number] = handle
    return _CELLS[number]


def _columns() -> int | None:
    """The width that the user has set; None: what the terminal says."""
    given = os.environ.get("COLUMNS", "")
    return int(given) if given.isdecimal() and int(given) else None


@contextlib.contextmanager
def signals() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT in a list instead of dying of them; a second SIGINT interrupts at once."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def handle(number, frame):
        del frame
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
