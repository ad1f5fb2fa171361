"""What a run gives: `Run`; and how one ends that was asked to."""

import dataclasses
import functools
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedjax_sim import algorithms
from fedjax_sim.config import RunConfig
from fedjax_sim.core.errors import UserError
from fedjax_sim.data import Partition
from fedjax_sim.records import Table
from fedjax_sim.runs import export
from fedjax_sim.runs.folder import Stopped

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Interrupted(KeyboardInterrupt):
    """The user asked for an end (Ctrl-C): the round under way was finished and a checkpoint written.

    Attributes:
      run: what there is so far.
      advice: how to go on, where that is not to resume this run.
    """

    advice: str | None = None

    def __init__(self, run: "Run"):
        super().__init__()
        self.run = run

    def __reduce__(self):
        return type(self), (self.run,)

    def __str__(self):
        return f"interrupted after round {self.run.rounds}; {self.advice or resume_hint(self.run.folder)}"


class Terminated(SystemExit):
    """The process was asked to end (SIGTERM): the same; uncaught, it exits with status 143.

    Attributes:
      run: what there is so far.
      advice: how to go on, where that is not to resume this run.
    """

    advice: str | None = None

    def __init__(self, run: "Run"):
        super().__init__(128 + signal.SIGTERM)
        self.run = run

    def __reduce__(self):
        return type(self), (self.run,)

    def __str__(self):
        return f"terminated after round {self.run.rounds}; {self.advice or resume_hint(self.run.folder)}"


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A run, finished or not. It can be pickled, and so come from a process pool.

    Attributes:
      config: what it is.
      folder: where it is; None if nothing was written.
      metrics: its rows.
      recipe: its partition in short: `clients`, and as far as they are known `kind`, `alpha`, `dataset` and a
        checksum.
      seconds: wall-clock time of all its rounds, compilation included, over all its starts.
      cpu_seconds: CPU time of the process in them, all threads; None if not all rounds recorded it.
      rounds: how many are done.
      headline: the metric that the task shows first.
      stopped: why it ended before the last of `config.rounds`; None if it did not.
      best_round: whose deployed model was kept as the best (`fs.KeepBest`), from 1; None if none was.
    """

    config: RunConfig
    folder: Path | None
    metrics: Table
    recipe: Mapping[str, Any]
    seconds: float
    cpu_seconds: float | None
    rounds: int
    _partition: Callable[[], Partition] = dataclasses.field(repr=False)
    _model: Callable[[], Any] = dataclasses.field(repr=False)
    stopped: Stopped | None = None
    best_round: int | None = None
    _best: Callable[[], Any] | None = dataclasses.field(default=None, repr=False)
    headline: str = "accuracy"

    @property
    def finished(self) -> bool:
        """Whether all rounds are done, or it was stopped by a callback."""
        return self.rounds >= (self.config.rounds if self.stopped is None else self.stopped.round)

    @functools.cached_property
    def partition(self) -> Partition:
        """Who holds which samples; of a loaded run without partition.json it is drawn again from the data."""
        return self._partition()

    @functools.cached_property
    def variables(self) -> Any:
        """The deployed model, NumPy leaves; of a loaded run it is read from the newest checkpoint.

        The data set need not be there, nor what Python gave; for checkpoints of 0.1.0 both have to be.
        """
        return self._model()

    @functools.cached_property
    def best_variables(self) -> Any:
        """The model that was kept as the best (`best_round`), nested dicts of NumPy leaves.

        Raises:
          UserError: none was.
        """
        if self._best is None:
            fix = "Give the run a callback that does: callbacks=[fs.KeepBest(metric)]."
            raise UserError("best_variables", self.title, "no model of this run was kept as its best", fix)
        return self._best()

    @property
    def title(self) -> str:
        """One line: method, data, partition."""
        return title_of(self.config, self.recipe)

    def plot(self, *names: str) -> "Figure":
        """Learning curves, a Matplotlib figure; `names` chooses metrics."""
        from fedjax_sim.records import plots  # Matplotlib loads when something is drawn

        return plots.run_curves(self.metrics, self.title, names or None, self.headline)

    def export(self, path: str | Path, *, best: bool = False) -> Path:
        """Writes the deployed model's weights into one file, see `fedjax_sim.runs.export`. -> its path.

        Args:
          path: ends in `.npz`, or in `.safetensors`, for which that package has to be installed.
          best: whether `best_variables` are meant, not `variables`.

        Raises:
          UserError: it ends otherwise, cannot be written, or the run has no model.
        """
        export.checked_path(path)
        return export.write(self.best_variables if best else self.variables, path)

    def __repr__(self):
        state = "finished" if self.finished else f"{self.rounds} of {self.config.rounds} rounds"
        if self.finished and self.stopped is not None:
            state = str(self.stopped)
        known = self.metrics.series(self.headline)[1]
        newest = f", {self.headline} {known[-1]:.4f}" if len(known) else ""
        return f"Run({self.title}: {state}{newest}, {self.seconds:.1f} s)"


def title_of(config: RunConfig, recipe: Mapping[str, Any]) -> str:
    """One line about a run: method, data, partition (`Run.recipe`)."""
    kind = str(recipe.get("kind", "given partition"))
    if kind.startswith("dirichlet"):
        kind += f"({recipe.get('alpha')})"
    told = {"algorithm": algorithms.label(config.algorithm), "model": config.model.name, **config.given}
    return (
        f"{told['algorithm']}, {told['model']} on {recipe.get('dataset', config.data.source)}, "
        f"{recipe['clients']:,} clients, {kind}, seed {config.seed}"
    )


def known(thing: Any) -> Any:
    """The thing: what a `Run` calls for what it has at hand. A lambda could not be pickled."""
    return thing


def resume_hint(folder: Path | None) -> str:
    """How to go on with the run in `folder`."""
    if folder is None:
        return "output.dir is not set, so no file of it was written"
    return f"continue with: fedjax-sim resume {folder}"
