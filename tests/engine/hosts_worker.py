"""One of two processes that run together: `python hosts_worker.py ADDRESS PROCESS FOLDER`."""

import dataclasses
import os
import signal
import sys
import threading
import time
from pathlib import Path

import jax

import fedjax_sim as fs
from fedjax_sim import config as config_lib
from fedjax_sim import runs
from fedjax_sim.engine import hosts

PLAIN = fs.RunConfig(
    rounds=3,
    partition=fs.PartitionConfig(kind="dirichlet", clients=9, alpha=0.5, min_size=8, local_test="holdout"),
    model=fs.ModelConfig("mlp", options={"hidden": [16]}),
    local=fs.LocalConfig(epochs=1, batch_size=10, lr=0.05),
    cohort=fs.CohortConfig(size=6),
    evaluation=fs.EvaluationConfig(every=2, per_client=True),
    output=fs.OutputConfig(progress=False, tensorboard=False, figures=False),
)
MEASURED = dataclasses.replace(
    PLAIN,
    algorithm=fs.FedMR(first_stage=1),
    peel=fs.PeelConfig(every=2, clients=3, samples=40),
    inertia=fs.InertiaConfig(measure=True, every=2),
)
PERSONAL = dataclasses.replace(PLAIN, algorithm=fs.FedPer())
CLUSTERED = dataclasses.replace(PLAIN, algorithm=fs.algorithms.CONFIGS["clusamp"]())
# Whose private leaves are those of nine clients, on four devices.
CUT = dataclasses.replace(PERSONAL, rounds=100_000, evaluation=fs.EvaluationConfig(every=0))
CASES = {"measured": MEASURED, "personal": PERSONAL, "clustered": CLUSTERED}


def inside(config: fs.RunConfig, folder: Path) -> fs.RunConfig:
    return dataclasses.replace(config, output=dataclasses.replace(config.output, dir=str(folder)))


def terminate_after(journal: Path, rounds: int) -> None:
    """Sends this process SIGTERM once a run has come so far."""

    def watch():
        while not journal.is_file() or journal.read_bytes().count(b"\n") < rounds:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def main(address: str, process: int, folder: Path) -> None:
    hosts.join(address, 2, process)
    told = []
    started = dataclasses.replace(PLAIN, initial=fs.InitialConfig(run=str(folder / "measured")))
    for name, config in CASES.items():
        done = fs.run(inside(config, folder / name))
        told.append(f"{name}: {sorted(done.metrics.names())} {done.metrics.last('accuracy')!r}")
    for what in (
        lambda: fs.run(dataclasses.replace(PLAIN, seed=process)),
        lambda: fs.run(dataclasses.replace(PLAIN, cohort=fs.CohortConfig(size=6 + 10 * process))),
        lambda: fs.run(dataclasses.replace(started, data=fs.DataConfig(("digits", "nowhere")[process]))),
        lambda: fs.run(inside(PLAIN, folder / "measured")),
        lambda: fs.run(dataclasses.replace(PLAIN, execution=fs.ExecutionConfig(devices=2))),
        lambda: fs.run(dataclasses.replace(PLAIN, initial=fs.InitialConfig(pretrain=1))),
    ):
        try:
            what()
        except fs.UserError as error:
            told.append(f"refused: {error.field}")
    if process == 1:
        terminate_after(folder / "cut" / "journal.jsonl", 3)
    try:
        fs.run(inside(CUT, folder / "cut"))
    except runs.Terminated as stop:
        told.append(f"terminated after {stop.run.rounds}")

    def study(odd, name):
        return fs.sweep.from_mapping(
            {
                # Its round is FedAvg's with more besides, and is compiled already.
                "base": config_lib.to_dict(dataclasses.replace(CLUSTERED, rounds=2)),
                "methods": {"CluSamp": {}, "Odd": odd},
                "seeds": [0],
                "out": str(folder / name),
            }
        )

    try:
        fs.sweep.run(study({"cohort": {"size": 90}}, "refused"), tell=told.append)
    except fs.UserError as error:
        told.append(f"no sweep: {error.field}")
    for _ in range(2):
        outcome = fs.sweep.run(study({"local": {"lr": 1e30}}, "sweep"), tell=told.append)
        told.append(f"failed: {list(outcome.failures)}")
    (folder / f"told{process}").write_text("\n".join(told).replace(str(folder), ""))
    assert jax.process_count() == 2


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
