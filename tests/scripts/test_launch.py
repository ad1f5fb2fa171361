"""The scripts that launch runs elsewhere: their course, with stand-ins for the programs that they call."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parents[2] / "scripts" / "launch"


def call(script: Path, programs: dict[str, str], home: Path, *words: str, **settings: str):
    """Runs a script with stand-ins on PATH, each of which writes a line to `calls`. -> (process, lines)."""
    folder = home / "programs"
    folder.mkdir(exist_ok=True)
    for name, body in programs.items():
        text = f"#!/bin/bash\necho {name} \"$(echo \"$*\" | tr '\\n' ' ')\" >>{home}/calls\n{body}\n"
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (home / "calls").write_text("")
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", script, *words],
        env={**os.environ, "PATH": path, **settings},
        cwd=home,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done, [line.strip() for line in (home / "calls").read_text().splitlines()]


@pytest.mark.parametrize("script", ["tpu_pod.sh", "slurm.sbatch"])
def test_scripts_parse_and_say_what_was_tried(script):
    assert os.access(LAUNCH / script, os.X_OK)
    subprocess.run(["bash", "-n", LAUNCH / script], check=True)
    assert "# Tried:" in (LAUNCH / script).read_text() and "Not tried:" in (LAUNCH / script).read_text()


SRUN = """case $BEHAVE in
  ended) exit 143 ;;
  signalled) kill -TERM $PPID; while [ ! -e told ]; do sleep 0.05; done; exit 143 ;;
  failed) exit 1 ;;
esac"""


@pytest.mark.parametrize(
    ("behave", "state", "status", "again"),
    [
        ("done", "RUNNING", 0, False),
        ("failed", "RUNNING", 1, False),
        ("ended", "RUNNING", 143, True),
        ("ended", "COMPLETING", 143, False),  # cancelled by the user
        ("signalled", "RUNNING", 143, True),
    ],
)
def test_a_run_under_slurm_is_queued_again_where_it_was_asked_to_end(behave, state, status, again, tmp_path):
    programs = {"srun": SRUN, "scontrol": "", "squeue": f"echo {state}", "scancel": "touch told"}
    settings = {"CONFIG": "my.yaml", "OUT": str(tmp_path / "out"), "SLURM_JOB_ID": "7", "BEHAVE": behave}
    done, lines = call(LAUNCH / "slurm.sbatch", programs, tmp_path, **settings)
    assert done.returncode == status, done.stderr
    assert f"fedjax-sim run my.yaml --output.dir {tmp_path}/out --join auto" in lines[0]
    assert ("scontrol requeue 7" in lines) == again
    assert ("scancel --signal=TERM 7" in lines) == (behave == "signalled")  # srun itself gets no signal


def test_a_run_under_slurm_that_has_begun_is_resumed(tmp_path):
    (tmp_path / "config.yaml").touch()
    settings = {"CONFIG": "my.yaml", "OUT": str(tmp_path), "SLURM_JOB_ID": "7"}
    _, lines = call(LAUNCH / "slurm.sbatch", {"srun": "", "scontrol": "", "squeue": ""}, tmp_path, **settings)
    assert f"fedjax-sim resume {tmp_path} --join auto" in lines[0]


def test_what_slurm_needs_to_be_told_is_asked_for(tmp_path):
    done, lines = call(LAUNCH / "slurm.sbatch", {"srun": ""}, tmp_path)
    assert done.returncode and "CONFIG" in done.stderr and not lines


# A pod whose first run is broken off by preemption. `ssh` with the run is the one that joins.
GCLOUD = """case "$*" in
  *describe*) cat state ;;
  *"queued-resources create"*) echo ACTIVE >state ;;
  *"queued-resources delete"*) rm -f state ;;
  *--join*)
    [ ! -e gone ] && [ "$BEHAVE" = preempted ] && touch gone && echo SUSPENDED >state && exit 255
    [ "$BEHAVE" != failed ] ;;
esac"""
POD = {"PROJECT": "p", "ZONE": "z", "NFS": "10.0.0.2:/share", "POLL": "0"}


@pytest.mark.parametrize(
    ("behave", "status", "pods"), [("fine", 0, 1), ("preempted", 0, 2), ("failed", 1, 1)]
)
def test_a_pod_is_asked_for_used_replaced_and_deleted(behave, status, pods, tmp_path):
    words = ("my.yaml", "runs/first")
    done, lines = call(LAUNCH / "tpu_pod.sh", {"gcloud": GCLOUD}, tmp_path, *words, BEHAVE=behave, **POD)
    assert done.returncode == status, done.stdout + done.stderr
    created = [line for line in lines if "queued-resources create" in line]
    assert len(created) == pods and "--accelerator-type=v5litepod-16" in created[0] and "--spot" in created[0]
    assert sum("queued-resources delete" in line for line in lines) == pods - (behave == "failed")
    joined = [line for line in lines if "--join auto" in line]
    assert len(joined) == pods and all("--worker=all" in line for line in joined)
    assert "resume /mnt/shared/runs/first --join auto" in joined[0]
    assert "run my.yaml --output.dir /mnt/shared/runs/first --join auto" in joined[0]
    if behave == "failed":
        assert "look at it" in done.stderr


def test_the_jobset_has_a_pod_a_host_that_begins_again_and_resumes():
    volume, jobset = yaml.safe_load_all((LAUNCH / "gke" / "jobset.yaml").read_text())
    assert volume["spec"]["accessModes"] == ["ReadWriteMany"]
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert spec["parallelism"] == spec["completions"] and spec["backoffLimit"] == 0
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert container["resources"]["requests"]["google.com/tpu"] == chips
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert rows * columns == chips * spec["parallelism"]
    claims = {one["name"]: one for one in pod["volumes"]}
    assert claims["shared"]["persistentVolumeClaim"]["claimName"] == volume["metadata"]["name"]
    (script,) = container["args"]
    checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert checked.returncode == 0 and script.count("exec fedjax-sim") == 2 == script.count("--join auto")
