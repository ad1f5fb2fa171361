"""Runs in MLflow, by its client, which keeps no global run.

FOUND (read in its client and file store): a metric may have several values at one step, and all are kept. So
a run that goes on asks, metric by metric, which steps are there, and leaves those out.
"""

import re
import time
from collections.abc import Mapping
from typing import Any

from fedjax_sim.records.trackers.session import Opening, dotted, image_of

_STATUS = {"finished": "FINISHED", "stopped": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
_AT_ONCE = 100
"""Parameters, and tags, of a request; it may have so many."""


class MLflowSession:
    """See `fedjax_sim.records.trackers.session.Session`."""

    def __init__(self, opening: Opening, experiment: str, uri: str | None):
        """Opens the run, or goes on with it.

        Args:
          opening: the run.
          experiment: where it belongs; made if it is not there.
          uri: of the server or store; None: as MLFLOW_TRACKING_URI says.
        """
        from mlflow.entities import Metric, Param, RunTag
        from mlflow.tracking import MlflowClient

        self._metric, self._client = Metric, MlflowClient(tracking_uri=uri)
        self._known: dict[str, set[int]] | None = None
        known = opening.kept.get("id")
        if known:
            self._client.update_run(known, status="RUNNING")
            self._id, self._known = str(known), {}
        else:
            tags = {"mlflow.note.content": opening.title, "group": opening.group}
            tags |= dict.fromkeys(opening.tags, "true")
            where = self._experiment(experiment)
            made = self._client.create_run(where, tags=tags, run_name=opening.name)
            self._id = made.info.run_id
            params = [Param(_plain(key), str(value)) for key, value in opening.settings.items()]
            about = dotted({"provenance": opening.provenance})
            labels = [RunTag(_plain(key), str(value)) for key, value in about.items()]
            for start in range(0, max(len(params), len(labels)), _AT_ONCE):
                stop = start + _AT_ONCE
                self._client.log_batch(self._id, params=params[start:stop], tags=labels[start:stop])
        self.kept: dict[str, Any] = {"id": self._id}

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return self._client.create_experiment(name)
            except Exception:  # another run has made it meanwhile
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise
        return found.experiment_id

    def log(self, number: int, values: Mapping[str, float]) -> None:
        """See `Session`."""
        now = int(1000 * time.time())
        named = {_plain(tag): value for tag, value in values.items()}
        metrics = [
            self._metric(key, value, now, number)
            for key, value in named.items()
            if number not in self._steps(key)
        ]
        for start in range(0, len(metrics), 1000):  # of a request
            self._client.log_batch(self._id, metrics=metrics[start : start + 1000])

    def _steps(self, key: str) -> set[int]:
        """The steps at which a metric was there when this start of the run began."""
        if self._known is None:
            return set()
        if key not in self._known:
            self._known[key] = {one.step for one in self._client.get_metric_history(self._id, key)}
        return self._known[key]

    def picture(self, name: str, png: bytes) -> None:
        """See `Session`."""
        self._client.log_image(self._id, image_of(png), artifact_file=f"figures/{name}.png")

    def summarise(self, values: Mapping[str, Any]) -> None:
        """See `Session`: numbers are metrics at step 0, words are tags."""
        for name, value in values.items():
            if isinstance(value, str):
                self._client.set_tag(self._id, name, value)
            else:
                self._client.log_metric(self._id, _plain(name), value, step=0)

    def close(self, status: str) -> None:
        """See `Session`."""
        self._client.set_terminated(self._id, status=_STATUS[status])


def _plain(name: str) -> str:
    """A name with the letters that MLflow allows."""
    return re.sub(r"[^\w\-./: ]", "_", name)
