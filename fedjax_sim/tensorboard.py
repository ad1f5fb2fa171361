"""TensorBoard events of a run: scalars only, one tag a metric."""

import time
from collections.abc import Iterable
from pathlib import Path

from tensorboardX import SummaryWriter

from fedjax_sim.records import Row


def tag_of(row: Row) -> str | None:
    """`metric/layer/state`, what there is of it; None for a single client's row, of which there are many."""
    if row.client >= 0:
        return None
    return "/".join(part for part in (row.metric, row.layer, row.state) if part)


class Events:
    """Writes rows as scalars to a folder; what an earlier, cut run wrote after `round_index` is masked."""

    def __init__(self, folder: str | Path, round_index: int = 0):
        purge = round_index + 1 if round_index else None
        self._writer = SummaryWriter(str(folder), purge_step=purge, flush_secs=30)

    def write(self, rows: Iterable[Row]) -> None:
        """Adds a round's rows."""
        now = time.time()
        for row in rows:
            tag = tag_of(row)
            if tag is not None:
                self._writer.add_scalar(tag, row.value, row.round, walltime=now)

    def close(self) -> None:
        """Flushes and closes."""
        self._writer.close()
