"""One of two processes that run together: `python hosts_worker.py ADDRESS PROCESS FOLDER`."""

import contextlib
import dataclasses
import os
import signal
import sys
import threading
import time
import warnings
from pathlib import Path
from unittest import mock

import jax
import numpy as np

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
ON_HOST = dataclasses.replace(PERSONAL, rounds=5, execution=fs.ExecutionConfig(client_state="host"))
CLUSTERED = dataclasses.replace(PLAIN, algorithm=fs.algorithms.CONFIGS["clusamp"]())
# Whose private leaves are those of nine clients, on four devices.
CUT = dataclasses.replace(PERSONAL, rounds=100_000, evaluation=fs.EvaluationConfig(every=0))
CASES = {"measured": MEASURED, "personal": ON_HOST, "clustered": CLUSTERED}


def inside(config: fs.RunConfig, folder: Path) -> fs.RunConfig:
    return dataclasses.replace(config, output=dataclasses.replace(config.output, dir=str(folder)))


def terminate_after(journal: Path, rounds: int) -> None:
    """Sends this process SIGTERM once a run has come so far."""

    def watch():
        while not journal.is_file() or journal.read_bytes().count(b"\n") < rounds:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


OTHER = ("images", "shape", "tests", "mapped")


def other_data(folder: Path) -> dict[str, fs.Dataset]:
    """Copies of the digits that another host might have."""
    digits = fs.data.load("digits")
    images = digits.train_images.copy()
    images[700, 2, 2, 0] ^= 1
    np.save(folder / "images.npy", images)
    mapped = np.load(folder / "images.npy", mmap_mode="r")
    # Too few for the clients, which the partition would find fault with.
    few = {"train_images": images[:20], "train_labels": digits.train_labels[:20]}
    changed = (
        {"train_images": images},
        few,
        {"test_labels": np.roll(digits.test_labels, 1)},
        {"train_images": mapped},
    )
    with warnings.catch_warnings(action="ignore"):
        return {name: dataclasses.replace(digits, **new) for name, new in zip(OTHER, changed, strict=True)}


def failing_alone(config: fs.RunConfig, process: int) -> None:
    """Starts a run that the second process, and no other, cannot prepare."""
    error = fs.UserError("alone", process, "it cannot", "Nothing.")
    failing = mock.patch("fedjax_sim.runs.opening.prepare", side_effect=error)
    with failing if process else contextlib.nullcontext():
        fs.run(config)


def contents(folder: Path) -> dict[str, bytes]:
    """What the files in a folder hold."""
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


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
        lambda: fs.run(dataclasses.replace(PLAIN, data=fs.DataConfig(("digits", "nowhere")[process]))),
        lambda: failing_alone(started, process),
        lambda: fs.run(inside(PLAIN, folder / "measured")),
        lambda: fs.run(dataclasses.replace(PLAIN, execution=fs.ExecutionConfig(devices=2))),
        lambda: fs.run(dataclasses.replace(PLAIN, initial=fs.InitialConfig(pretrain=1))),
    ):
        try:
            what()
        except fs.UserError as error:
            told.append(f"refused: {error.field}")
    others = other_data(folder) if process else dict.fromkeys(OTHER, fs.data.load("digits"))
    for name, dataset in others.items():
        try:
            fs.run(inside(PLAIN, folder / "differing"), dataset=dataset)
        except fs.UserError as error:
            told.append(f"differs: {name}: {error}")
    clients = [np.arange(20 * client, 20 * client + 20 - process) for client in range(9)]
    try:
        fs.run(dataclasses.replace(PLAIN, evaluation=fs.EvaluationConfig()), partition=clients)
    except fs.UserError as error:
        told.append(f"differs: partition: {error}")
    if process == 1:
        terminate_after(folder / "cut" / "journal.jsonl", 3)
    try:
        fs.run(inside(CUT, folder / "cut"))
    except runs.Terminated as stop:
        told.append(f"terminated after {stop.run.rounds}")
    before = contents(folder / "cut")
    try:
        fs.resume(folder / "cut", dataset=others["images"])
    except fs.UserError as error:
        told.append(f"differs: resumed: {error}")
    told.append(f"the same: {contents(folder / 'cut') == before}")

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
