"""What a user sees of a run under way, and how one asks it to end."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator

from tqdm.auto import tqdm

from fedjax_sim import algorithms, hosts, records
from fedjax_sim.config import RunConfig
from fedjax_sim.records import Table


class Clock:
    """Wall-clock time, and the process's CPU time."""

    def __init__(self):
        self._mark = self._read()

    def lap(self) -> tuple[float, float]:
        """(seconds, CPU seconds) since the last call, to the microsecond, as timing.csv has them."""
        now = self._read()
        then, self._mark = self._mark, now
        return round(now[0] - then[0], 6), round(now[1] - then[1], 6)

    @staticmethod
    def _read() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()


class Bar:
    """The progress bar: rounds/s and ETA by tqdm, clients/s over the last rounds, the newest accuracy."""

    def __init__(self, config: RunConfig, start: int, clients: int, table: Table):
        self._clients, self._pace, self._start = clients, 0.0, start
        known = table.series("accuracy")[1]
        self._accuracy = float(known[-1]) if len(known) else None
        name = algorithms.name_of(config.algorithm) or type(config.algorithm).__name__
        self._bar = tqdm(
            total=config.rounds,
            initial=start,
            desc=name,
            unit="round",
            disable=not (config.output.progress and hosts.first()),
            dynamic_ncols=True,
        )

    def advance(self, rows: list[records.Row], seconds: float) -> None:
        """Counts a round, with its rows and how long it took."""
        if self._bar.n > self._start:  # the first round's time is the compiler's
            self._pace = seconds if not self._pace else 0.8 * self._pace + 0.2 * seconds
        for row in rows:
            if row.metric == "accuracy":
                self._accuracy = row.value
        told = {"clients/s": f"{self._clients / self._pace:,.0f}"} if self._pace else {}
        if self._accuracy is not None:
            told["accuracy"] = f"{self._accuracy:.4f}"
        self._bar.set_postfix(told, refresh=False)
        self._bar.update()

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._bar.close()


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
