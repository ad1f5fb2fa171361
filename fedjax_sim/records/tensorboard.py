"""TensorBoard events of a run: scalars only, one tag a metric."""

import time
from collections.abc import Iterable
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue] made on import
from tensorboardX.summary import scalar

from fedjax_sim.records.table import Row


def tag_of(row: Row) -> str | None:
    """`metric/layer/state`, what there is of it; None for a single client's row, of which there are many."""
    if row.client >= 0:
        return None
    return "/".join(part for part in (row.metric, row.layer, row.state) if part)


class Events:
    """Writes rows as scalars to a folder; what an earlier, cut run wrote after `round_index` is masked.

    Not with tensorboardX's SummaryWriter, which writes in a thread: where that cannot write, it dies with a
    traceback, and the next round waits for ever for room in its queue. Here whoever calls gets the error.
    """

    def __init__(self, folder: str | Path, round_index: int = 0):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"))
        self._flushed = time.monotonic()
        if round_index:
            purge = {"wall_time": time.time(), "step": round_index + 1}
            self._writer.write_event(Event(file_version="brain.Event:2", **purge))
            start = SessionLog(status=SessionLog.START)
            self._writer.write_event(Event(session_log=start, **purge))

    def write(self, rows: Iterable[Row]) -> None:
        """Adds a round's rows."""
        now = time.time()
        for row in rows:
            tag = tag_of(row)
            if tag is not None:
                event = Event(wall_time=now, step=row.round, summary=scalar(tag, row.value))
                self._writer.write_event(event)
        if time.monotonic() - self._flushed > 30:
            self.flush()

    def flush(self) -> None:
        """Writes down what is still in memory."""
        self._writer.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Flushes and closes."""
        self._writer.close()
