"""TensorBoard events of a run: scalars, one tag a metric; hyper-parameters, figures, weights' histograms."""

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.api_pb2 import Status  # pyright: ignore[reportAttributeAccessIssue] made on import
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.proto.summary_pb2 import Summary, SummaryMetadata  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.summary import histogram, scalar

from fedjax_sim.records.table import Row

_BINS = 64
"""Of a histogram."""
_NOT_HYPER = "version", "given", "output.", "execution.", "observers.", "meters.", "callbacks."
"""Fields of a configuration that change no result."""


def tag_of(row: Row) -> str | None:
    """`metric/layer/state`, what there is of it; None for a single client's row, of which there are many."""
    if row.client >= 0:
        return None
    return "/".join(part for part in (row.metric, row.layer, row.state) if part)


class Events:
    """Writes a run to a folder; what an earlier, cut start wrote after `round_index` is masked.

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

    def settings(self, settings: Mapping[str, Any]) -> None:
        """Writes the hyper-parameters: of a configuration, by dotted field, those that may change results.

        No list of columns is written (the plugin's `Experiment`): TensorBoard takes the first that it finds
        for all runs of a folder, and methods have settings of their own. Without one it gathers the columns
        from all runs.
        """
        about = HParamsPluginData(version=0)
        about.session_start_info.start_time_secs = time.time()
        for name, value in settings.items():
            if value in (None, {}, []) or name.startswith(_NOT_HYPER):
                continue
            held = about.session_start_info.hparams[name]
            if isinstance(value, bool):
                held.bool_value = value
            elif isinstance(value, int | float):
                held.number_value = value
            else:
                held.string_value = str(value)
        self._hyper("session_start_info", about)

    def write(self, rows: Iterable[Row]) -> None:
        """Adds a round's rows."""
        for row in rows:
            tag = tag_of(row)
            if tag is not None:
                self._add(scalar(tag, row.value), row.round)
        if time.monotonic() - self._flushed > 30:
            self.flush()

    def histograms(self, variables: Any, number: int) -> None:
        """Adds a histogram of each leaf of a model after round `number`; of its finite values."""
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
            values = np.asarray(leaf, np.float64).reshape(-1)
            values = values[np.isfinite(values)]
            if len(values):
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                self._add(histogram(f"weights/{name}", values, _BINS), number)

    def end(self, pictures: Mapping[str, bytes], number: int) -> None:
        """Adds what is known once the run is finished after round `number`: PNG by name, and that it is."""
        for name, png in pictures.items():
            image = Summary.Image(encoded_image_string=png, **_size(png))
            self._add(Summary(value=[Summary.Value(tag=f"figures/{name}", image=image)]), number)
        about = HParamsPluginData(version=0)
        about.session_end_info.status = Status.Value("STATUS_SUCCESS")
        about.session_end_info.end_time_secs = time.time()
        self._hyper("session_end_info", about)

    def _hyper(self, name: str, about: Any) -> None:
        plugin = SummaryMetadata.PluginData(plugin_name="hparams", content=about.SerializeToString())
        value = Summary.Value(tag=f"_hparams_/{name}", metadata=SummaryMetadata(plugin_data=plugin))
        self._add(Summary(value=[value]), 0)

    def _add(self, summary: Any, step: int) -> None:
        self._writer.write_event(Event(wall_time=time.time(), step=step, summary=summary))

    def flush(self) -> None:
        """Writes down what is still in memory."""
        self._writer.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Flushes and closes."""
        self._writer.close()


def _size(png: bytes) -> dict[str, int]:
    """Width and height of a PNG, from its header, and what TensorBoard calls RGBA."""
    width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))
    return {"width": width, "height": height, "colorspace": 4}
