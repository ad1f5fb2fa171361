"""Folders of runs as a sweep leaves them, with made-up numbers: nothing is trained for the tests of pages."""

import json
import zlib
from pathlib import Path

import numpy as np
import yaml

from fedjax_sim import config as config_lib
from fedjax_sim import data, records
from fedjax_sim.config import sweep_files

BASE = {
    "rounds": 30,
    "data": "digits",
    "model": "mlp",
    "evaluation": {"every": 2},
    "partition": {"kind": "dirichlet", "clients": 12, "alpha": 0.5, "min_size": 5},
    "cohort": {"size": 4},
}


def written(home, name="study", **changes):
    """The file of a sweep. -> (its path, the sweep)."""
    spec = {
        "base": BASE,
        "methods": {"FedAvg": {"algorithm": "fedavg"}, "FedMR": {"algorithm": "fedmr"}},
        "seeds": [0, 1, 2],
        "reference": "FedAvg",
        "out": str(home / name),
        **changes,
    }
    path = home / f"{name}.yaml"
    path.write_text(yaml.safe_dump(spec, sort_keys=False))
    return path, sweep_files.read_sweep(path)


def rows_of(job, upto, headline="accuracy"):
    """Curves that end at 0.6 and more, better for later methods and seeds."""
    draw = np.random.default_rng([job.config.seed, job.method != "FedAvg"])
    better = 0.2 * (job.method != "FedAvg")
    for number in range(1, upto + 1):
        yield records.Row(number, "train_loss", 2 / number)
        if number % 2 == 0:
            value = (0.6 + better) * (1 - np.exp(-number / 8)) + 0.01 * draw.random()
            yield records.Row(number, headline, float(value))


def record(job, upto=None, rows=rows_of, headline="accuracy", **about):
    """A run's folder; of one that is under way (`upto`) the journal alone. -> its path."""
    folder, config = Path(str(job.config.output.dir)), job.config
    folder.mkdir(parents=True)
    kind = zlib.crc32(f"{job.column} {config.seed}".encode())
    told = {
        "versions": {"python": "3.11.7", "fedjax-sim": "0.1.0", "jax": "0.10.1", "jaxlib": "0.10.1"},
        "platform": "Linux x86_64",
        "devices": {"platform": "cpu", "kind": "cpu", "count": 2, "processes": 1},
        "cpu": {"model": "A <processor>", "cores": 2, "memory_bytes": 2**34},
        "git": {"package": {"commit": "b254fa7adaa3b4d4", "modified": False}, "working_directory": None},
        "data": {"name": "digits", "num_classes": 10},
        "partition": {
            "kind": config.partition.kind,
            "alpha": config.partition.alpha,
            "dataset": "digits",
            "clients": 12,
            "crc32": kind,
            "crc32_train": kind,
        },
        "layout": {"devices": 2, "wave": 2, "conv": "lax", "calibration": None},
        "headline": headline,
        "config": config_lib.to_dict(config),
        **about,
    }
    digits = data.load("digits")
    data.save(data.partition(digits, config.partition, config.seed), folder / "partition.json")
    (folder / "provenance.json").write_text(json.dumps(told))
    done = config.rounds if upto is None else upto
    made = records.encode_nonfinite(list(rows(job, done)))
    laps = [records.Lap(n, 1.5 if n == 1 else 0.02, 2.0 if n == 1 else 0.03, 4) for n in range(1, done + 1)]
    if upto is None:
        records.write_parquet(records.Table(made), folder / "metrics.parquet")
    else:
        lines = [{"round": n, "rows": [row for row in made if row.round == n]} for n in range(1, done + 1)]
        (folder / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "timing.csv").write_text(records.timing(laps))
    (folder / "config.yaml").write_text(config_lib.dump(config))
    return folder
