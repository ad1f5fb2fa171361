"""Callbacks that hand a run over to an experiment tracker: Weights & Biases, MLflow, Aim.

    callbacks: [{name: wandb, project: my-study}]                   # in a file
    fs.run(config, callbacks=[fs.Wandb(project="my-study")])        # in Python

A tracker gets the configuration by dotted field, versions and checksums; every number of every round, with
TensorBoard's tags and the round as its step, but not those of single clients; and at the end the pictures of
the run, the newest and the best value of its headline metric, and how it ended. It decides nothing: a run
with a tracker has the bits of one without, and rounds that run as one program still do. Rows reach it once
the next evaluated round is done.

Keys and passwords are no settings: each tracker takes them from its own environment variables or files.

A tracker that fails, without a network for instance, is told of in one warning, and the run goes on without
it.
"""

import contextlib
import dataclasses
import re
import textwrap
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

from fedjax_sim.config.callbacks import UnderWay
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.fields import check
from fedjax_sim.core.versions import installed
from fedjax_sim.records import Row
from fedjax_sim.records.trackers import session as sessions
from fedjax_sim.records.trackers.session import Opening, Session

_STUDIES = "sweep.json", "search.json"
"""Files by which the folder of a study is known."""


class _Tracker:
    """What trackers have in common; each opens its own session."""

    every_round = False  # it acts on no round
    kind: ClassVar[str]
    packages: ClassVar[tuple[str, ...]]
    run_name: str | None
    group: str | None
    tags: tuple[str, ...]

    def open(self, opening: Opening) -> Session:
        """Opens a run in the tracker, or goes on with it."""
        raise NotImplementedError

    @property
    def place(self) -> str:
        """Where runs go: under this name the folder keeps the tracker's id."""
        raise NotImplementedError

    def check_installed(self) -> None:
        """Raises UserError unless the tracker's package is installed."""
        if not any(map(installed, self.packages)):
            why = f"the package {self.packages[0]} is not installed"
            fix = f"pip install 'fedjax-sim[{self.kind}]', or leave this callback out."
            raise UserError("callbacks", self.kind, why, fix)

    def on_start(self, run: UnderWay) -> None:
        """Opens the run in the tracker, and hands over what it lacks of the rounds that are done."""
        self._try(run, lambda: self._begin(run))

    def on_round(self, number: int, rows: Sequence[Row], run: UnderWay) -> None:
        """Hands over a round's rows."""
        self._try(run, lambda: self._log(run, rows))

    def on_end(self, run: UnderWay) -> None:
        """Hands over pictures and the summary."""
        self._try(run, lambda: self._sum_up(run))

    def on_exit(self, error: BaseException | None, run: UnderWay) -> None:
        """Says how this start of the run ended."""
        status = run.memory.get("status", "interrupted")
        told: dict[str, Any] = {"status": status}
        if isinstance(error, Exception):
            status = "failed"
            told = {"status": status, "error": " ".join(f"{type(error).__name__}: {error}".split())[:500]}

        def close(session: Session) -> None:
            session.summarise(told)
            session.close(status)

        self._try(run, lambda: _with(run, close))

    def _begin(self, run: UnderWay) -> None:
        group, name = _study(run)
        opening = Opening(
            name=self.run_name or name,
            group=self.group or group,
            title=run.title,
            tags=self.tags,
            settings=run.settings(),
            provenance=run.provenance(),
            kept=sessions.recall(run.folder, self._key),
        )
        run.memory["session"] = session = self.open(opening)
        sessions.keep(run.folder, self._key, session.kept)
        session.summarise({"status": "running"})
        if opening.kept:
            self._log(run, run.metrics)

    def _log(self, run: UnderWay, rows: Any) -> None:
        def log(session: Session) -> None:
            for number, values in sessions.tagged(rows).items():
                session.log(number, values)

        _with(run, log)

    def _sum_up(self, run: UnderWay) -> None:
        def sum_up(session: Session) -> None:
            for name, png in run.figures().items():
                session.picture(name, png)
            session.summarise(_summary(run))
            run.memory["status"] = "finished" if run.stopped is None else "stopped"

        _with(run, sum_up)

    @property
    def _key(self) -> str:
        return f"{self.kind}:{self.place}"

    def _try(self, run: UnderWay, act: Callable[[], None]) -> None:
        """Does something with the tracker, unless it has failed before."""
        if "lost" in run.memory:
            return
        try:
            act()
        except Exception as error:
            session = run.memory.pop("session", None)
            run.memory["lost"] = True
            if session is not None:
                with contextlib.suppress(Exception):
                    session.close("failed")
            told = textwrap.shorten(f"{type(error).__name__}: {error}", 700, placeholder=" …")
            warnings.warn(f"{self.kind} fails, and the run goes on without it: {told}", stacklevel=3)


def _with(run: UnderWay, act: Callable[[Session], None]) -> None:
    session = run.memory.get("session")
    if session is not None:
        act(session)


def _study(run: UnderWay) -> tuple[str, str]:
    """(the study that a run belongs to, or ""; the run's name in it, or in general), by its folder."""
    if run.folder is None:
        return "", run.title
    for home in list(run.folder.parents)[:6]:
        if any((home / name).is_file() for name in _STUDIES):
            parts = [part for part in run.folder.relative_to(home).parts if part != "base"]
            return home.name, ", ".join(parts[1:] if parts[0] == "runs" else parts)
    return "", run.folder.name


def _summary(run: UnderWay) -> dict[str, Any]:
    """The newest and the best value of the headline, and where the run ended."""
    rounds, values = run.metrics.series(run.headline)
    told: dict[str, Any] = {"headline": run.headline}
    done = run.metrics.column("round")
    if len(done):
        told["rounds"] = int(done.max())
    if len(values):
        best = int(values.argmin() if run.goal == "min" else values.argmax())
        told |= {f"last/{run.headline}": float(values[-1]), f"best/{run.headline}": float(values[best])}
        told["best/round"] = int(rounds[best])
    if run.stopped is not None:
        told["stopped"] = str(run.stopped)
    return told


def _without_secret(field: str, address: str | None) -> None:
    """Raises UserError for an address with a password in it."""
    if address is not None and re.match(r"[\w+.-]+://[^/@]*:[^/@]*@", address):
        why = "it holds a password, and a configuration is written down"
        fix = "Give it by the tracker's own variables."
        raise UserError(field, re.sub(r"://[^/@]*@", "://…@", address), why, fix)


@dataclasses.dataclass(frozen=True)
class Wandb(_Tracker):
    """Hands a run over to Weights & Biases (`pip install 'fedjax-sim[wandb]'`).

    The key comes from `wandb login` or WANDB_API_KEY. Without a network, WANDB_MODE=offline writes to
    WANDB_DIR, and `wandb sync` uploads it later.

    Attributes:
      project: where runs belong.
      entity: the user's or the team's name; None: the user's default.
      run_name: None: that of its folder, in a study with those above it; in memory a title.
      group: None: the study that it belongs to, if it does.
      tags: words to find it by.
      mode: `auto` goes by WANDB_MODE.
    """

    project: str = "fedjax_sim"
    entity: str | None = None
    run_name: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"

    kind: ClassVar[str] = "wandb"
    packages: ClassVar[tuple[str, ...]] = ("wandb",)

    def __post_init__(self):
        check(self, "callbacks.wandb.")

    @property
    def place(self) -> str:
        """See `_Tracker`."""
        return self.project

    def open(self, opening: Opening) -> Session:
        """See `_Tracker`."""
        from fedjax_sim.records.trackers.wandb import WandbSession

        return WandbSession(opening, self.project, self.entity, None if self.mode == "auto" else self.mode)


@dataclasses.dataclass(frozen=True)
class MLflow(_Tracker):
    """Hands a run over to MLflow (`pip install 'fedjax-sim[mlflow]'`).

    User and password come from MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or a token from
    MLFLOW_TRACKING_TOKEN.

    Attributes:
      experiment: where runs belong; it is made if it is not there.
      uri: of the server or the store (`http://…`, `sqlite:///…`, `file:…`); None: MLFLOW_TRACKING_URI, then
        MLflow's own default.
      run_name: None: that of its folder, in a study with those above it; in memory a title.
      group: a tag; None: the study that it belongs to, if it does.
      tags: words to find it by.
    """

    experiment: str = "fedjax_sim"
    uri: str | None = None
    run_name: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()

    kind: ClassVar[str] = "mlflow"
    packages: ClassVar[tuple[str, ...]] = ("mlflow-skinny", "mlflow")

    def __post_init__(self):
        check(self, "callbacks.mlflow.")
        _without_secret("callbacks.mlflow.uri", self.uri)

    @property
    def place(self) -> str:
        """See `_Tracker`."""
        return self.experiment

    def open(self, opening: Opening) -> Session:
        """See `_Tracker`."""
        from fedjax_sim.records.trackers.mlflow import MLflowSession

        return MLflowSession(opening, self.experiment, self.uri)


@dataclasses.dataclass(frozen=True)
class Aim(_Tracker):
    """Hands a run over to Aim (`pip install 'fedjax-sim[aim]'`). `aim up` shows it.

    Attributes:
      experiment: where runs belong.
      repo: folder, or `aim://…` address, of the repository; None: Aim's default, `.aim` in the working
        directory or above.
      run_name: None: that of its folder, in a study with those above it; in memory a title.
      group: a tag; None: the study that it belongs to, if it does.
      tags: words to find it by.
    """

    experiment: str = "fedjax_sim"
    repo: str | None = None
    run_name: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()

    kind: ClassVar[str] = "aim"
    packages: ClassVar[tuple[str, ...]] = ("aim",)

    def __post_init__(self):
        check(self, "callbacks.aim.")

    @property
    def place(self) -> str:
        """See `_Tracker`."""
        return self.experiment

    def open(self, opening: Opening) -> Session:
        """See `_Tracker`."""
        from fedjax_sim.records.trackers.aim import AimSession

        return AimSession(opening, self.experiment, self.repo)


TRACKERS: dict[str, type] = {"wandb": Wandb, "mlflow": MLflow, "aim": Aim}
"""Name -> settings."""
