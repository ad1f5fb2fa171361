import dataclasses
import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml

from fedjax_sim import runs
from fedjax_sim.cli import commands
from fedjax_sim.core.errors import UserError
from fedjax_sim.runs.federation import Simulation
from fedjax_sim.studies import launchers, sweep

BASE = {
    "rounds": 2,
    "partition": {"kind": "dirichlet", "clients": 8, "alpha": 1.0},
    "model": {"options": {"hidden": [8]}},
    "local": {"epochs": None, "steps": 2, "batch_size": 16, "lr": 0.1},
    "cohort": {"size": 4},
    "execution": {"devices": 1},
    "output": {"tensorboard": False, "figures": False, "progress": False, "checkpoint_every": 1},
}
METHODS = {"FedAvg": {"algorithm": "fedavg"}, "FedMR": {"algorithm": {"name": "fedmr", "first_stage": 1}}}


def asked(out, **changes):
    return {"base": BASE, "methods": METHODS, "seeds": [0, 1], "out": str(out), **changes}


@pytest.fixture
def study(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(asked(tmp_path / "out")))
    return path


@dataclasses.dataclass(frozen=True)
class Here:
    """A launcher whose tasks are calls in this process, after a way through text; some are lost."""

    runs: int = 1
    lost: tuple[int, ...] = ()
    wait: bool = True
    name = "here"

    def launch(self, call, batches, folder, tell):
        tell(f"{len(batches)} tasks")
        for number, batch in reversed(list(enumerate(batches)) if self.wait else []):
            yield (
                number,
                "the machine is gone" if number in self.lost else call(json.loads(json.dumps(batch))),
            )


def same(one, other):
    for job, twin in zip(one.jobs, other.jobs, strict=True):
        found, wanted = (runs.load(which.config.output.dir) for which in (job, twin))
        assert found.finished and list(found.metrics) == list(wanted.metrics)
        assert Path(found.folder).relative_to(one.out) == Path(wanted.folder).relative_to(other.out)
    assert (one.out / "table.md").read_text() == (other.out / "table.md").read_text()


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    made = sweep.from_mapping(asked(tmp_path_factory.mktemp("local")))
    assert not sweep.run(made).failures
    return made


@pytest.mark.parametrize("together", [1, 3])
def test_a_launched_sweep_is_that_of_this_process(local, tmp_path, together):
    made, told = sweep.from_mapping(asked(tmp_path)), []
    outcome = sweep.run(made, told.append, launcher=Here(runs=together))
    assert not outcome.failures and not outcome.left
    same(made, local)
    assert told[0] == f"{-(-4 // together)} tasks"
    assert sorted(line.partition(",")[0] for line in told[1:]) == [
        "[1/4] FedAvg",
        "[2/4] FedMR",
        "[3/4] FedAvg",
        "[4/4] FedMR",
    ]
    assert all(": run, accuracy 0." in line for line in told[1:])
    again = []
    assert not sweep.run(made, again.append, launcher=Here()).failures
    assert len(again) == 4 and all("finished before" in line for line in again)  # and no task was started


def test_failures_and_lost_tasks_are_noted_and_a_later_start_goes_on(tmp_path, monkeypatch):
    methods = {"good": {}, "bad": {"local.lr": 1e30}, "cut": {"execution.donate": False}}
    made, told = sweep.from_mapping(asked(tmp_path, methods=methods, seeds=[0])), []
    steps = Simulation.steps

    def cut(self, most=None):
        if self.round == 1 and "/cut/" in str(self.setup.config.output.dir):
            raise RuntimeError("the lights went out")
        return steps(self, 1)

    with monkeypatch.context() as patch:
        patch.setattr(Simulation, "steps", cut)
        outcome = sweep.run(made, told.append, launcher=Here(lost=(0,)))
    assert outcome.failures["good, seed 0"] == "the machine is gone"
    assert "not finite" in outcome.failures["bad, seed 0"]
    assert "the lights went out" in outcome.failures["cut, seed 0"]
    assert outcome.comparison is None and (tmp_path / "sweep.json").is_file()
    outcome = sweep.run(made, told.append, launcher=Here())
    assert list(outcome.failures) == ["bad, seed 0"]
    assert any(line.startswith("[3/3] cut, seed 0: resumed, accuracy") for line in told)
    found = [runs.load(job.config.output.dir) for job in made.jobs if job.method != "bad"]
    assert list(found[0].metrics) == list(found[1].metrics)


def test_a_run_that_a_lost_task_had_finished_counts(tmp_path):
    made = sweep.from_mapping(asked(tmp_path, seeds=[0]))

    class Late(Here):
        def launch(self, call, batches, folder, tell):
            call(batches[0][:1])
            yield 0, "killed"

    outcome = sweep.run(made, launcher=Late(runs=2))
    assert outcome.failures == {"FedMR, seed 0": "killed"} and list(outcome.seconds) == ["FedAvg, seed 0"]


def test_a_folder_of_other_settings_is_refused_and_left_alone(tmp_path):
    made = sweep.from_mapping(asked(tmp_path, seeds=[0]))
    sweep.run(made, launcher=Here())
    changed = sweep.from_mapping(asked(tmp_path, seeds=[0], base={**BASE, "rounds": 1}))
    with pytest.raises(UserError, match=r"2 runs of other settings, .*: rounds is 2, not 1"):
        sweep.run(changed, launcher=Here())


def test_what_is_only_submitted_is_left_for_a_later_start(tmp_path):
    made = sweep.from_mapping(asked(tmp_path, seeds=[0]))
    outcome = sweep.run(made, launcher=Here(wait=False))
    assert outcome.left == ("FedAvg, seed 0", "FedMR, seed 0") and not outcome.failures
    assert "2 of 2 runs are not finished" in outcome.report()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--launcher", "pbs"], "launcher = 'pbs': no such launcher. Choose local, slurm, ray."),
        (
            ["--launcher.cpus", "2"],
            "launcher.cpus = '2': the launcher is local. Choose --launcher slurm or ray.",
        ),
        (
            ["--launcher", "slurm", "--launcher.cpu", "2"],
            "launcher.cpu = '2': the launcher slurm has no such",
        ),
        (["--launcher", "slurm", "--launcher.resources", "{}"], "the launcher slurm has no such field"),
        (
            ["--launcher", "slurm", "--launcher.cpus", "none"],
            "launcher.cpus = 'none': a whole number (int) is",
        ),
        (["--launcher=slurm", "--launcher.cpus=0"], "launcher.cpus = 0: must be at least 1"),
        (["--launcher=slurm", "--launcher.minutes"], "--launcher.minutes = None: its value is missing"),
        (
            ["--launcher", "slurm", "--launcher.memory-gb", "-1"],
            "launcher.memory_gb = -1.0: must be a positive",
        ),
        (["--launcher", "ray", "--launcher.resources", "{TPU: four}"], "launcher.resources.TPU = 'four'"),
        (
            ["--launcher", "ray", "--part", "1/2"],
            "--part, --launcher, --pack and --unpack exclude each other",
        ),
    ],
)
def test_a_wrong_launcher_is_one_error(study, words, told, capsys):
    assert commands.main(["sweep", str(study), *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and told in said
    assert not (study.parent / "out").exists()


@pytest.mark.parametrize(("name", "module"), [("slurm", "submitit"), ("ray", "ray")])
def test_a_library_that_is_missing_is_named(study, name, module, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    assert commands.main(["sweep", str(study), "--launcher", name]) == 2
    assert f"pip install {module}, or in the clone pip install '.[{name}]'." in capsys.readouterr().err


def test_a_launcher_and_another_way_to_divide_exclude_each_other(tmp_path, monkeypatch):
    made = sweep.from_mapping(asked(tmp_path))
    with pytest.raises(UserError, match="a launcher starts all parts"):
        sweep.run(made, launcher=Here(), part=(1, 2))
    with pytest.raises(UserError, match="this is no launcher"):
        sweep.run(made, launcher=3)
    monkeypatch.setattr("jax.distributed.is_initialized", lambda: True)
    with pytest.raises(UserError, match="Leave --join out"):
        sweep.run(made, launcher=Here())


# --- Slurm --------------------------------------------------------------------------------------------------


def job(folder, number, done=None):
    """What submitit says of a task."""
    result = folder / f"{number}_result.pkl"
    if done is not None:
        result.touch()
    paths = types.SimpleNamespace(result_pickle=result, stdout=folder / f"{number}.out")

    def value():
        if isinstance(done, Exception):
            raise done
        return done

    return types.SimpleNamespace(job_id=f"7_{number}", paths=paths, result=value)


def test_tasks_that_leave_the_queue_without_a_result_are_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(launchers, "POLL", 0.01)
    monkeypatch.setattr(launchers, "GRACE", 0.02)
    monkeypatch.setattr(launchers, "SAY", -1.0)
    states = iter([{"7_1": "RUNNING (None)", "7_2": "PENDING (Resources)"}, None, {"7_2": "RUNNING (None)"}])
    monkeypatch.setattr(launchers, "_queue", lambda array: next(states, {}))
    jobs, told = [job(tmp_path, 0, {"a": ("run", None)}), job(tmp_path, 1), job(tmp_path, 2)], []
    jobs.append(job(tmp_path, 3, ValueError("line\nthe last line")))
    found = dict(launchers._results(jobs, "7", told.append))
    assert found[0] == {"a": ("run", None)}
    assert found[3] == f"Slurm's job 7_3 failed: the last line; see {tmp_path / '3.out'}"
    for number in (1, 2):
        assert found[number].startswith(f"Slurm's job 7_{number} ended without a result; see ")
    assert told == ["Slurm's job 7: 1 pending (resources), 1 running", "Slurm's job 7: 1 running"]


def test_tasks_that_can_never_start_are_one_error(tmp_path, monkeypatch):
    monkeypatch.setattr(launchers, "_queue", lambda array: {"7_0": "PENDING (PartitionConfig)"})
    with pytest.raises(UserError, match=r"would wait for ever: 1 pending \(partitionconfig\)"):
        list(launchers._results([job(tmp_path, 0)], "7", print))


@pytest.fixture
def handlers():
    """Puts those of the signals back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_task_that_is_asked_to_end_writes_a_checkpoint_and_goes_on_next_time(
    number, handlers, monkeypatch, tmp_path
):
    made = sweep.from_mapping(asked(tmp_path, seeds=[0], methods={"FedAvg": {}}))
    batch, steps = [sweep._plain(made.jobs[0], tmp_path)], Simulation.steps

    def signalled(self, most=None):
        os.kill(os.getpid(), number)
        return steps(self, 1)

    with monkeypatch.context() as patch:
        patch.setattr(Simulation, "steps", signalled)
        with pytest.raises(runs.Terminated, match="after round 1") as stop:
            launchers.slurm_task(sweep.run_batch, batch)
    assert stop.value.code == 143
    assert launchers.slurm_task(sweep.run_batch, batch) == {"FedAvg, seed 0": ("resumed", None)}


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_task_that_is_asked_to_end_between_runs_ends_at_once(number, handlers):
    with pytest.raises(SystemExit) as stop:
        launchers.slurm_task(lambda batch: os.kill(os.getpid(), number) or {}, [])
    assert stop.value.code == 143


@pytest.mark.parametrize(
    ("status", "state", "restarts", "again"),
    [
        (143, "RUNNING", "", True),
        (140, "RUNNING", "2", True),
        (143, "RUNNING", "3", False),
        (143, "COMPLETING", "", False),
        (1, "RUNNING", "", False),
        (0, "RUNNING", "", False),
    ],
)
def test_after_a_task_the_script_queues_it_again_where_it_was_asked_to_end(
    status, state, restarts, again, tmp_path
):
    for name, body in {"squeue": f"echo {state}", "scontrol": f'echo "$@" >{tmp_path}/asked'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    script = f"(exit {status})\n\n# teardown\n{launchers._AGAIN.format(most=3)}"
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    env = {"PATH": path, "SLURM_JOB_ID": "7", **({"SLURM_RESTART_COUNT": restarts} if restarts else {})}
    assert subprocess.run(["bash", "-c", script], env=env).returncode == status
    assert (tmp_path / "asked").is_file() == again


SBATCH = """#!/bin/bash
cp "$1" {log}
[ -e {refuse} ] && echo "sbatch: error: invalid partition specified: nope" >&2 && exit 1
for task in $(seq 0 $(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\)%.*/\\1/p' "$1")); do
  export SLURM_JOB_ID=7 SLURM_ARRAY_JOB_ID=7 SLURM_ARRAY_TASK_ID=$task SLURM_PROCID=0
  {start} bash "$1" >/dev/null 2>&1 &
done
echo "Submitted batch job 7"
"""
SRUN = """#!/bin/bash
while [ "${1#--}" != "$1" ]; do
  [ "$1" = --output ] && shift
  shift
done
exec "$@"
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A stand-in for Slurm on PATH: its tasks are processes. -> (the script that was submitted, `refuse`)."""
    pytest.importorskip("submitit")
    log, refuse, programs = tmp_path / "submitted.sh", tmp_path / "refuse", tmp_path / "programs"
    programs.mkdir()

    def install(start):
        texts = {
            "sbatch": SBATCH.format(log=log, refuse=refuse, start=start),
            "srun": SRUN,
            "squeue": '#!/bin/bash\necho "7_0 RUNNING (None)"; echo "7_1 RUNNING (None)"\n',
            "scancel": f'#!/bin/bash\necho "$@" >{tmp_path}/cancelled\n',
        }
        for name, text in texts.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)

    install("true")
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(launchers, "POLL", 0.1)
    return log, refuse, install


def test_what_is_asked_of_slurm(cluster, study, capsys):
    script, refuse, _ = cluster
    words = [
        "--launcher.partition",
        "gpu",
        "--launcher.minutes=30",
        "--launcher.gpus",
        "2",
        "--launcher.cpus=4",
    ]
    words += ["--launcher.memory-gb", "1.5", "--launcher.runs", "2", "--launcher.setup", "[module load cuda]"]
    words += [
        "--launcher.sbatch",
        "{constraint: a100}",
        "--launcher.wait",
        "false",
        "--launcher.at-once",
        "1",
    ]
    command = ["sweep", str(study), "--launcher", "slurm", *words]
    assert commands.main(command) == 0
    told = capsys.readouterr().out
    assert "submitted 2 tasks to Slurm as job 7" in told and "4 of 4 runs are not finished" in told
    text = script.read_text()
    for line in (
        "--array=0-1%1",
        "--constraint=a100",
        "--cpus-per-task=4",
        "--gpus-per-node=2",
        "--mem=1536M",
        "--partition=gpu",
        "--requeue",
        "--time=30",
    ):
        assert f"#SBATCH {line}\n" in text
    assert 'export JAX_NUM_CPU_DEVICES="${JAX_NUM_CPU_DEVICES:-4}"\nmodule load cuda\n' in text
    refuse.touch()
    assert commands.main(command) == 2
    told = capsys.readouterr().err
    assert told.startswith(
        "error: launcher = 'slurm': Slurm does not take the tasks: sbatch: error: invalid part"
    )
    assert told.count("\n") == 1


def test_stopping_cancels_the_array(cluster, study, monkeypatch, capsys):
    def stop(jobs, array, tell):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(launchers, "_results", stop)
    assert commands.main(["sweep", str(study), "--launcher", "slurm"]) == 130
    assert (study.parent / "cancelled").read_text() == "7\n"
    assert "continue with: fedjax-sim sweep" in capsys.readouterr().err


@pytest.mark.slow
def test_a_sweep_as_an_array(cluster, local, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", os.environ.get("JAX_NUM_CPU_DEVICES", "4"))
    cluster[2]("")
    made, told = sweep.from_mapping(asked(tmp_path / "out")), []
    outcome = sweep.run(made, told.append, launcher=launchers.Slurm(runs=2))
    assert not outcome.failures, told
    same(made, local)


# --- Ray ----------------------------------------------------------------------------------------------------


@pytest.fixture
def ray(monkeypatch):
    """Ray, which does not report its use, and of which no cluster is named."""
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return ray


@pytest.mark.filterwarnings("ignore")  # of Ray: sockets and files that it leaves to Python to close
def test_tasks_of_ray(ray, tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES", raising=False)

    def tell(line):
        told.append(line)
        monkeypatch.chdir(tmp_path)  # once the cluster runs, which is in another folder

    def call(batch):
        with (tmp_path / batch[0]["name"]).open("a") as starts:
            starts.write("x")
        if batch[0]["name"] == "lost":
            os._exit(1)
        return {run["name"]: (os.getcwd(), os.environ["JAX_NUM_CPU_DEVICES"]) for run in batch}

    batches, told = [[{"name": "a"}, {"name": "b"}], [{"name": "lost"}]], []
    launched = launchers.Ray(retries=1).launch(call, batches, tmp_path, tell)
    first = next(launched)
    with pytest.raises(UserError, match=r"launcher\.cpus = .*no machine of Ray's cluster has"):
        next(launchers.Ray(cpus=10_000).launch(call, batches, tmp_path, told.append))
    found = dict([first, *launched])
    assert found[0] == {"a": (str(tmp_path), "1"), "b": (str(tmp_path), "1")}
    assert found[1].startswith("WorkerCrashedError: ") and (tmp_path / "lost").read_text() == "xx"
    assert len(told) == 1 and told[0].startswith("2 tasks for Ray, which has ")
    assert not ray.is_initialized()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_sweep_on_ray(ray, local, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", os.environ.get("JAX_NUM_CPU_DEVICES", "4"))
    made, told = sweep.from_mapping(asked(tmp_path / "ray")), []
    outcome = sweep.run(made, told.append, launcher=launchers.Ray(runs=2))
    assert not outcome.failures, told
    same(made, local)
