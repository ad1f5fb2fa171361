"""Runs in Aim.

FOUND (seen with 3.29 on Python 3.11): a value that is tracked at a step takes the place of an earlier one at
that step, so a run that goes on may hand over rounds again. Aim shows a run once it is in its index, to which
`aim up` and `aim storage reindex` add it. It locks a run that is open; the lock of a process that was killed
is taken over.
"""

import importlib
from collections.abc import Mapping
from typing import Any

from fedjax_sim.records.trackers.session import Opening, image_of


class AimSession:
    """See `fedjax_sim.records.trackers.session.Session`."""

    def __init__(self, opening: Opening, experiment: str, repo: str | None):
        """Opens the run, or goes on with it.

        Args:
          opening: the run.
          experiment: where it belongs.
          repo: folder or `aim://…` address of the repository; None: Aim's default.
        """
        self._aim: Any = importlib.import_module("aim")
        known = opening.kept.get("id")
        self._run: Any = self._aim.Run(
            run_hash=known,
            repo=repo,
            experiment=experiment,
            force_resume=bool(known),
            system_tracking_interval=None,
            capture_terminal_logs=False,  # standard output has the progress bar
        )
        self._run.name, self._run.description = opening.name, opening.title
        if not known:
            for tag in (*opening.tags, *filter(None, [opening.group])):
                self._run.add_tag(tag)
        self._run["config"] = {name: _plain(value) for name, value in opening.settings.items()}
        self._run["provenance"] = {name: _plain(value) for name, value in opening.provenance.items()}
        self._newest = 0
        self.kept: dict[str, Any] = {"id": self._run.hash}

    def log(self, number: int, values: Mapping[str, float]) -> None:
        """See `Session`."""
        for tag, value in values.items():
            self._run.track(value, name=tag, step=number)
        self._newest = max(self._newest, number)

    def picture(self, name: str, png: bytes) -> None:
        """See `Session`."""
        self._run.track(self._aim.Image(image_of(png)), name=f"figures/{name}", step=self._newest)

    def summarise(self, values: Mapping[str, Any]) -> None:
        """See `Session`."""
        for name, value in values.items():
            self._run["summary", name] = value

    def close(self, status: str) -> None:
        """See `Session`."""
        self._run.close()


def _plain(value: Any) -> Any:
    """What Aim can hold: numbers, words, lists and mappings of them."""
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
