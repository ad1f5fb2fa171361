"""Runs in Weights & Biases.

FOUND (seen with its client 0.31): steps of a run only grow; what is logged to an earlier step than the newest
is dropped with a line on standard error. Offline the client writes its file at intervals, so that a killed
process loses its newest rounds, and each start has a folder of its own under the run's id.

OUR CHOICE: online the server says how far a run has come, and a run that goes on hands over what is later.
Offline nobody says so, and a run that goes on hands over all of its rounds: the newest folder is the whole
run.
"""

from collections.abc import Mapping
from typing import Any

from fedjax_sim.records.trackers.session import Opening, dotted, image_of


class WandbSession:
    """See `fedjax_sim.records.trackers.session.Session`."""

    def __init__(self, opening: Opening, project: str, entity: str | None, mode: str | None):
        """Opens the run, or goes on with it.

        Args:
          opening: the run.
          project: where it belongs.
          entity: the user's or the team's name; None: the user's default.
          mode: online, offline or disabled; None: as WANDB_MODE says.
        """
        import wandb

        known = opening.kept.get("id")
        self._run: Any = wandb.init(
            project=project,
            entity=entity,
            mode=mode,  # pyright: ignore[reportArgumentType] one of its words
            id=known,
            resume="allow" if known else None,
            name=opening.name,
            notes=opening.title,
            group=opening.group or None,
            tags=opening.tags or None,
            config={**opening.settings, **dotted({"provenance": opening.provenance})},
            allow_val_change=True,
            # An object of its own: several runs may be open in this process, and the user's stay theirs.
            reinit="create_new",
            # Standard output has the progress bar.
            settings=wandb.Settings(console="off"),
        )
        self._there = 0 if self._run.offline else int(self._run.starting_step) - 1
        self._newest = max(self._there, 0)
        self.kept: dict[str, Any] = {"id": self._run.id}

    def log(self, number: int, values: Mapping[str, float]) -> None:
        """See `Session`."""
        if number > self._there:
            self._run.log(dict(values), step=number)
            self._newest = max(self._newest, number)

    def picture(self, name: str, png: bytes) -> None:
        """See `Session`."""
        import wandb

        self._run.log({f"figures/{name}": wandb.Image(image_of(png))}, step=self._newest)

    def summarise(self, values: Mapping[str, Any]) -> None:
        """See `Session`."""
        self._run.summary.update(dict(values))

    def close(self, status: str) -> None:
        """See `Session`."""
        self._run.finish(exit_code=0 if status in ("finished", "stopped") else 1)
