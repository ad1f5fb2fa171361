"""Where the runs of a sweep are started: as one job array under Slurm, or as tasks of Ray.

A launcher is a record of what each task asks for. Its `launch` starts one task for each batch of runs, and
yields what became of each batch as it ends. A task does for its runs what a start on this machine would do:
it begins them, resumes those that were cut, and notes those that fail (`fedjax_sim.studies.sweep`). All tasks
and this process see the folder of the sweep under one path.

submitit and Ray are installed by the extras `slurm` and `ray`, and imported when they are asked for.
"""

import contextlib
import dataclasses
import functools
import importlib
import io
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Protocol

from fedjax_sim.core import fields
from fedjax_sim.core.errors import UserError

Batch = Sequence[Mapping[str, Any]]
"""Runs of one task: plain values, which any version of Python can read."""
Ended = dict[str, tuple[str, str | None]]
"""Run's name -> (what was done, why it failed or None)."""
Call = Callable[[Batch], Ended]
"""What a task calls; a function of a module, as the other process imports it."""
Result = tuple[int, Ended | str]
"""(number of a batch, what became of its runs, or why its task was lost)."""
Tell = Callable[[str], None]
"""Is given a line where there is something to say."""

POLL = 5.0
"""Seconds between two looks at the queue."""
SAY = 60.0
"""Seconds after which the state of the queue is said again, if it has changed."""
GRACE = 30.0
"""Seconds in which the result of a task that has left the queue may still come, over a slow file system."""
NOTICE = 120
"""Seconds before its time is up at which a task is told."""
END = 60.0
"""Seconds that Ray's tasks have to write a checkpoint when this process is stopped."""

_DEVICES = "JAX_NUM_CPU_DEVICES"
_CORRECT = "Correct launcher.partition, minutes, cpus, gpus, memory_gb or sbatch (sinfo shows what there is)."
_NEVER = ("BadConstraints", "PartitionConfig", "PartitionNodeLimit", "PartitionTimeLimit")
"""Why Slurm keeps tasks waiting that ask for more than there is, where it does not refuse them at once."""


_AGAIN = """status=$?
state=$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T)
if [[ $status =~ ^(138|140|143)$ && $state == RUNNING && ${{SLURM_RESTART_COUNT:-0}} -lt {most} ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status\""""
"""Shell after a task: what SIGTERM, SIGUSR1 or SIGUSR2 has ended comes back, unless it was cancelled."""


class Launcher(Protocol):
    """What starts the runs of a sweep.

    Attributes:
      name: of it, as users write it.
      runs: how many runs one task does, one after another.
    """

    name: ClassVar[str]

    @property
    def runs(self) -> int:
        """See the class."""
        ...

    def launch(self, call: Call, batches: Sequence[Batch], folder: Path, tell: Tell) -> Iterator[Result]:
        """Starts a task for each batch; -> (number of the batch, what became of it or why it was lost).

        Args:
          call: what a task does with its batch.
          batches: of runs.
          folder: of the sweep.
          tell: is given a line where there is something to say.

        Raises:
          UserError: the library is missing, or what a task asks for cannot be had.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Slurm:
    """One job array under Slurm, through submitit. Logs and submitit's own files go to `slurm` in the folder.

    A task whose time is up, or that is asked to end before preemption, writes a checkpoint and is queued
    again. Stopping this process cancels the array; runs that are under way write a checkpoint.

    Attributes:
      partition: of the cluster; None: its default, as for the next two.
      account: that is charged.
      qos: quality of service.
      minutes: that one task may take.
      cpus: of one task, which has as many CPU devices.
      gpus: of one task.
      memory_gb: of one task, in GiB; None: the cluster's default.
      runs: of the sweep in one task, one after another; those of one shape compile once.
      at_once: tasks that may run at the same time; None: as many as there is room for.
      requeues: how often a task may be queued again.
      setup: lines of shell before it, such as `module load cuda`.
      sbatch: further options by name, such as `constraint: a100`.
      wait: whether this process waits for the end. Otherwise it only submits, and a later start of the sweep
        writes the table.
    """

    name: ClassVar[str] = "slurm"

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    minutes: int = 60
    cpus: int = 1
    gpus: int = 0
    memory_gb: float | None = None
    runs: int = 1
    at_once: int | None = None
    requeues: int = 20
    setup: tuple[str, ...] = ()
    sbatch: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    wait: bool = True

    def __post_init__(self):
        fields.check(self, "launcher.")
        _check_counts(self, minutes=1, cpus=1, gpus=0, runs=1, requeues=0)
        if self.at_once is not None:
            _check_counts(self, at_once=1)
        if self.memory_gb is not None:
            fields.positive("launcher.memory_gb", self.memory_gb)

    def launch(self, call: Call, batches: Sequence[Batch], folder: Path, tell: Tell) -> Iterator[Result]:
        """See `Launcher`."""
        jobs = self._submit(call, batches, folder)
        array = jobs[0].job_id.partition("_")[0]
        tell(f"submitted {len(jobs)} tasks to Slurm as job {array}; their logs: {folder / 'slurm'}")
        if not self.wait:
            tell("start the sweep again once they have ended: that writes the table")
            return
        try:
            yield from _results(jobs, array, tell)
        except (KeyboardInterrupt, SystemExit, UserError):
            subprocess.run(["scancel", array], capture_output=True)
            tell(f"cancelled Slurm's job {array}")
            raise

    def _submit(self, call: Call, batches: Sequence[Batch], folder: Path) -> list[Any]:
        submitit = _installed("submitit", self.name)
        options = {
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "gpus_per_node": self.gpus or None,
            "mem": None if self.memory_gb is None else f"{round(self.memory_gb * 1024)}M",
        }
        # The environment is the submitter's, so that what the user has set goes before.
        setup = [f'export {_DEVICES}="${{{_DEVICES}:-{self.cpus}}}"', *self.setup]
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                executor = submitit.SlurmExecutor(folder=folder / "slurm")
                executor.update_parameters(
                    job_name=folder.name,
                    time=self.minutes,
                    cpus_per_task=self.cpus,
                    # Since 22.05 srun does not take it from sbatch.
                    srun_args=[f"--cpus-per-task={self.cpus}"],
                    array_parallelism=self.at_once or len(batches),
                    signal_delay_s=NOTICE,
                    stderr_to_stdout=True,
                    setup=setup,
                    teardown=_AGAIN.format(most=self.requeues).splitlines(),
                    additional_parameters={"requeue": True, **self.sbatch},
                    **{name: value for name, value in options.items() if value is not None},
                )
                return executor.map_array(functools.partial(slurm_task, call), batches)
        except OSError as error:
            raise UserError("launcher", self.name, f"it cannot submit: {error}", "Correct that.") from None
        except (RuntimeError, ValueError, submitit.core.utils.FailedJobError) as error:
            raise UserError(
                "launcher",
                self.name,
                f"Slurm does not take the tasks: {_last_line(str(error))}",
                _CORRECT,
            ) from None


def slurm_task(call: Call, batch: Batch) -> Ended:
    """What a task of the array calls: a batch, as far as it comes until the task is asked to end.

    On SIGTERM, and on submitit's signal that the time is up soon, the run under way writes a checkpoint. The
    process then exits with the status of SIGTERM, by which the script of the array knows that it goes on.

    Args:
      call: what is done with a batch.
      batch: of runs.

    Raises:
      Terminated: it was asked to end, in a run.
      SystemExit: likewise, between runs.
    """

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    def stop(number: int, frame: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.Signals[f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}"], stop)
    return call(batch)


@dataclasses.dataclass(frozen=True)
class Ray:
    """Tasks of Ray, on a running cluster or on one that is started here and ends with this process.

    A task whose worker dies, or whose machine does, is started again, and goes on from the runs' folders.

    Attributes:
      address: of a running cluster, or `auto`; None: the one that RAY_ADDRESS names, or else a new one here.
      cpus: of one task, which has as many CPU devices.
      gpus: of one task.
      memory_gb: of one task, in GiB; None: not counted.
      resources: others by name, such as `TPU: 4`.
      runs: of the sweep in one task, one after another; those of one shape compile once.
      retries: how often a task whose worker was lost is started again.
    """

    name: ClassVar[str] = "ray"

    address: str | None = None
    cpus: int = 1
    gpus: int = 0
    memory_gb: float | None = None
    resources: Mapping[str, float] = dataclasses.field(default_factory=dict)
    runs: int = 1
    retries: int = 3

    def __post_init__(self):
        fields.check(self, "launcher.")
        _check_counts(self, cpus=1, gpus=0, runs=1, retries=0)
        if self.memory_gb is not None:
            fields.positive("launcher.memory_gb", self.memory_gb)
        for name, amount in self.resources.items():
            if isinstance(amount, bool) or not isinstance(amount, int | float):
                raise UserError(f"launcher.resources.{name}", amount, "a number is wanted", "Write TPU: 4.")
            fields.positive(f"launcher.resources.{name}", amount)

    def launch(self, call: Call, batches: Sequence[Batch], folder: Path, tell: Tell) -> Iterator[Result]:
        """See `Launcher`."""
        ray = _installed("ray", self.name)
        ours = not ray.is_initialized()
        if ours:
            address = self.address or os.environ.get("RAY_ADDRESS")
            try:
                _reach(address)
                ray.init(address=address, log_to_driver=False, include_dashboard=None if address else False)
            except (ConnectionError, ValueError, RuntimeError, OSError) as error:
                raise UserError(
                    "launcher.address",
                    address,
                    f"Ray cannot be reached: {_last_line(str(error))}",
                    "Start it there (ray start --head), or leave the address out.",
                ) from None
        try:
            self._check_room(ray)
            where = ray.cluster_resources()
            tell(f"{len(batches)} tasks for Ray, which has {where.get('CPU', 0):g} CPUs")
            yield from self._results(ray, call, batches)
        finally:
            if ours:
                ray.shutdown()

    def _results(self, ray: ModuleType, call: Call, batches: Sequence[Batch]) -> Iterator[Result]:
        devices = os.environ.get(_DEVICES, str(self.cpus))
        task = ray.remote(_ray_task).options(
            num_cpus=self.cpus,
            num_gpus=self.gpus,
            memory=None if self.memory_gb is None else round(self.memory_gb * 2**30),
            resources=dict(self.resources) or None,
            max_retries=self.retries,
            runtime_env={"env_vars": {_DEVICES: devices}},
        )
        number_of = {task.remote(call, batch, os.getcwd()): number for number, batch in enumerate(batches)}
        try:
            while number_of:
                for ended in ray.wait(list(number_of), num_returns=1, timeout=POLL)[0]:
                    number = number_of.pop(ended)
                    try:
                        yield number, ray.get(ended)
                    except ray.exceptions.RayError as error:
                        yield number, f"{type(error).__name__}: {_last_line(str(error))}"
        except (KeyboardInterrupt, SystemExit):
            for ended in number_of:
                ray.cancel(ended)  # as Ctrl-C: a run under way writes a checkpoint
            ray.wait(list(number_of), num_returns=len(number_of), timeout=END)
            raise

    def _check_room(self, ray: ModuleType) -> None:
        """Raises UserError where no machine of the cluster has what one task asks for: Ray would wait."""
        asked = {"CPU": float(self.cpus), "GPU": float(self.gpus), **self.resources}
        if self.memory_gb is not None:
            asked["memory"] = self.memory_gb * 2**30
        alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if any(all(node.get(name, 0) >= amount for name, amount in asked.items()) for node in alive):
            return
        name = next((name for name in asked if all(node.get(name, 0) < asked[name] for node in alive)), "CPU")
        field = {"CPU": "cpus", "GPU": "gpus", "memory": "memory_gb"}.get(name, f"resources.{name}")
        unit = 2**30 if name == "memory" else 1
        wanted = getattr(self, field, None) or asked[name]
        most = max((node.get(name, 0) for node in alive), default=0) / unit
        raise UserError(
            f"launcher.{field}",
            wanted,
            f"no machine of Ray's cluster has all that one task asks for; the most of this is {most:g}",
            "Ask for less, or start a machine that has it before the sweep.",
        )


LAUNCHERS: dict[str, type[Slurm] | type[Ray]] = {Slurm.name: Slurm, Ray.name: Ray}
"""By name; `local` stands for none of them."""
LOCAL = "local"


def launcher_of(given: str | Launcher) -> Launcher | None:
    """The launcher that a user means; None where runs are started in this process.

    Args:
      given: a launcher, or the name of one, which then has its defaults.

    Raises:
      UserError: there is no such launcher.
    """
    if not isinstance(given, str):
        if not callable(getattr(given, "launch", None)):
            why = "this is no launcher"
            raise UserError("launcher", given, why, 'Give "local", "slurm", "ray", Slurm(…) or Ray(…).')
        return given
    if given == LOCAL:
        return None
    if given not in LAUNCHERS:
        known = (LOCAL, *LAUNCHERS)
        raise UserError("launcher", given, "no such launcher", f"Choose {', '.join(known)}.")
    return LAUNCHERS[given]()


def _check_counts(launcher: Any, **least: int) -> None:
    for name, smallest in least.items():
        fields.at_least(f"launcher.{name}", getattr(launcher, name), smallest)


def _installed(module: str, extra: str) -> ModuleType:
    """A module of an extra. Raises UserError where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            "launcher",
            extra,
            f"{module} cannot be imported ({error})",
            f"Install it: pip install {module}, or in the clone pip install '.[{extra}]'.",
        ) from None


def _results(jobs: Sequence[Any], array: str, tell: Tell) -> Iterator[Result]:
    """What became of each task of an array, as they end."""
    waiting = dict(enumerate(jobs))
    gone: dict[int, float] = {}
    said, before = time.monotonic(), ""
    while waiting:
        for number, job in list(waiting.items()):
            if job.paths.result_pickle.exists():
                yield number, _result(waiting.pop(number))
        if not waiting:
            return
        states = _queue(array)
        for number, job in list(waiting.items()) if states is not None else ():
            if states and job.job_id in states:
                gone.pop(number, None)
            elif time.monotonic() - gone.setdefault(number, time.monotonic()) > GRACE:
                yield number, f"Slurm's job {job.job_id} ended without a result; see {job.paths.stdout}"
                del waiting[number]
        summary = _summary(states or {})
        reasons = {state.rpartition("(")[2].removesuffix(")") for state in (states or {}).values()}
        if reasons and reasons <= set(_NEVER):
            why = f"the tasks would wait for ever: {summary}"
            raise UserError("launcher", Slurm.name, why, _CORRECT)
        if summary not in ("", before) and time.monotonic() - said > SAY:
            tell(f"Slurm's job {array}: {summary}")
            said, before = time.monotonic(), summary
        time.sleep(POLL)


def _result(job: Any) -> Ended | str:
    try:
        return job.result()
    except Exception as error:
        return f"Slurm's job {job.job_id} failed: {_last_line(str(error))}; see {job.paths.stdout}"


def _queue(array: str) -> dict[str, str] | None:
    """Task's id -> its state, of those that Slurm has not ended yet; None where it cannot be asked now."""
    asked = subprocess.run(
        ["squeue", "--noheader", "--array", "--jobs", array, "--format", "%i %T (%r)"],
        capture_output=True,
        text=True,
    )
    if asked.returncode:
        return {} if "Invalid job id" in asked.stderr else None
    lines = [line.strip().partition(" ") for line in asked.stdout.splitlines() if line.strip()]
    return {name: state for name, _, state in lines}


def _summary(states: Mapping[str, str]) -> str:
    told = [state.lower().removesuffix(" (none)") for state in states.values()]
    return ", ".join(f"{told.count(state)} {state}" for state in sorted(set(told)))


def _ray_task(call: Call, batch: Batch, home: str) -> Ended:
    """A task of Ray, in the folder in which the sweep was started: `mine:Thing` lies there."""
    with contextlib.suppress(OSError):
        os.chdir(home)
    return call(batch)


def _reach(address: str | None) -> None:
    """Raises OSError where nobody listens at HOST:PORT: Ray would try for minutes, and end the process."""
    host, _, port = (address or "").rpartition(":")
    if host and "/" not in host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it does not say why"
