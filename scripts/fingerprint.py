#!/usr/bin/env python
"""What 24 small runs come to, to the last bit: recorded before a change of structure, compared after it.

    python scripts/fingerprint.py before.json
    python scripts/fingerprint.py after.json --compare before.json     # exit 1 if anything differs
    python scripts/fingerprint.py after.json --compare before.json --only lips-fedmr

Between them the configurations cover every algorithm, peel, inertia, one device and four, waves, a run that
was cut and resumed, batch norm, dropout, augmentation, evaluation per client, fine-tuning, pre-training and
kept optimisers. Recorded are a checksum of every leaf of the deployed model and every row of the metrics.
Only public names are used, and settings are YAML: the script stays the same while files move. Bits depend
on the processor and on the versions of JAX and NumPy: compare on one machine. It takes about four minutes
of one core.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ["FEDJAX_SIM_CALIBRATION"] = ""  # bits must not go by what was measured on this machine
os.environ["FEDJAX_SIM_PROGRAMS"] = ""  # nor by programs that another state of the source has left

import jax
import numpy as np
from flax import linen as nn

import fedjax_sim as fs

ROW = ("round", "metric", "layer", "client", "state")
SHOWN = 8
"""Differences that are printed for one configuration."""


class Small(nn.Module):
    """Two hidden layers with batch norm and dropout, marked for the peel probe; it compiles in seconds."""

    num_classes: int

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        """f32[B, H, W, C] -> f32[B, num_classes]."""
        x = x.reshape(len(x), -1)
        for name in ("fc1", "fc2"):
            fs.models.peel(self, name, x)
            x = nn.Dense(12, name=name)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.Dropout(0.1, deterministic=not train)(x)
        fs.models.peel(self, "fc3", x)
        return nn.Dense(self.num_classes, name="fc3")(x)


# --- the configurations ---------------------------------------------------------------------------------

BASE = {
    "seed": 3,
    "rounds": 3,
    "data": {"source": "digits"},
    "partition": {"kind": "dirichlet", "clients": 8, "alpha": 0.5, "min_size": 10},
    "model": {"name": "mlp", "options": {"hidden": [16, 12]}},
    "local": {"epochs": 1, "batch_size": 20, "lr": 0.05, "momentum": 0.5},
    "cohort": {"size": 4},
    "evaluation": {"every": 1},
    "output": {"progress": False},
}
SMALL = {"name": "fingerprint:Small", "options": {}}
LENET = {"name": "lenet", "options": {}}
RESNET = {"name": "resnet6", "norm": "batch", "options": {}}
AUGMENTED = {"source": "cifar10-lips", "data_dir": "{data}"}
PER_CLIENT = {"partition": {"local_test": "holdout"}, "evaluation": {"per_client": True, "per_class": True}}
FINETUNED = {**PER_CLIENT, "evaluation": {"per_client": True, "finetune": 1}}
PEEL = {
    **{"every": 2, "clients": 3, "samples": 60, "class_samples": 3, "finetune": 1},
    **{"chimeras": True, "others": True, "ranks": True, "angles": True},
    "controls": ["perturbed", "reestimated", "local_statistics"],
}
INERTIA = {"measure": True, "reference": 1, "every": 2, "clients": 3, "samples": 60}


def around(*names: Any) -> dict[str, Any]:
    """Algorithms around one another, outermost first; each a name or a mapping."""
    inside: dict[str, Any] = {}
    for name in reversed(names):
        fields = {"name": name} if isinstance(name, str) else dict(name)
        inside = fields | ({"inner": inside} if inside else {})
    return inside


ONE: dict[str, dict[str, Any]] = {
    "fedavg": {
        **{"algorithm": "fedavg", **PER_CLIENT},
        "local": {"optimizer": "adam", "momentum": 0.0, "lr": 0.01, "schedule": "cosine", "clip_norm": 1.0},
    },
    "fedmr-peel": {"algorithm": "fedmr", "model": SMALL, "partition": {"kind": "iid"}, "peel": PEEL},
    "fedbn-resnet": {
        **{"algorithm": "fedbn", "model": RESNET, "data": {"source": "digits-domains"}, "rounds": 2},
        "partition": {"kind": "domain", "clients": 5, "samples_per_client": 40, "local_test": "matching"},
        "evaluation": {"per_client": True},
    },
    "feddyn-resumed": {"algorithm": "feddyn", "rounds": 5, "model": SMALL},
    "pfedsd-fedper": {"algorithm": around("pfedsd", "fedper"), **FINETUNED},
    "fedrep": {"algorithm": {"name": "fedrep", "head_epochs": 1}, "local": {"epochs": 2}, **PER_CLIENT},
    "ditto-lg_fedavg": {"algorithm": around("ditto", "lg_fedavg"), **PER_CLIENT},
    "fedbabu": {"algorithm": "fedbabu", **FINETUNED},
    "local-pretrain": {"algorithm": "local", "initial": {"pretrain": 2, "holdout": 0.2}, **PER_CLIENT},
    "interpolation": {"algorithm": "interpolation", **PER_CLIENT},
    "fedexp": {"algorithm": "fedexp", "partition": {"kind": "quantity"}},
    "fedmut": {"algorithm": "fedmut", "local": {"keep_optimizer": True}},
    "clusamp-fedsam": {"algorithm": around("fedsam", "clusamp")},
    "fedgen": {"algorithm": {"name": "fedgen", "generator_steps": 3, "generator_batch": 16}},
    "fedyogi-fedrod": {"algorithm": around("fedyogi", "fedrod"), **PER_CLIENT},
}
"""On one device."""

FOUR: dict[str, dict[str, Any]] = {
    "fedavg-waves": {
        **{
            "algorithm": {"name": "fedavg", "weights": "uniform"},
            "cohort": {"size": 7, "sampling": "by_size"},
        },
        **{"partition": {"kind": "dirichlet-classes"}, "execution": {"wave": 1}},
        "local": {"keep_optimizer": True, "schedule": "exponential", "decay": 0.9},
    },
    "fedmr-lenet-augmented": {
        **{"algorithm": {"name": "fedmr", "first_stage": 1}, "model": LENET, "data": AUGMENTED, "rounds": 2},
        "partition": {"kind": "natural", "clients": None},
    },
    "lips-fedmr": {
        "algorithm": around({"name": "lips", "period": 2, "layers": "inner"}, "fedmr"),
        **{"model": SMALL, "inertia": INERTIA, "rounds": 4},
        "partition": {"local_test": "holdout", "samples_per_client": 60},
    },
    "scaffold": {"algorithm": "scaffold", "partition": {"kind": "pathological"}},
    "fedavgm-fednova": {
        **{"algorithm": around("fedavgm", "fednova"), "local": {"epochs": None, "steps": 4}},
        **{"peel": {"every": 2, "clients": 4, "samples": 40}, "cohort": {"size": 6, "sampling": "cyclic"}},
    },
    "fedopt-moon-partial": {
        "algorithm": around(
            {"name": "fedopt", "optimizer": "adagrad", "lr": 0.05}, "moon", {"name": "partial", "last": 1}
        ),
        **PER_CLIENT,
    },
    "fedadam-fedntd-fedprox": {"algorithm": around("fedadam", "fedntd", "fedprox"), "model": SMALL},
    "fedasam-fedindep": {"algorithm": around("fedasam", "fedindep"), "execution": {"wave": 2}},
    "fedcac": {"algorithm": "fedcac", "partition": {"kind": "shards", "local_test": "matching"}},
}
"""On four."""

RESUMED = "feddyn-resumed"


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes`, sections field by field."""
    sections = {name for name in base if isinstance(base[name], Mapping) and name in changes}
    return {**base, **changes, **{name: {**base[name], **changes[name]} for name in sections}}


def write_images(folder: Path) -> None:
    """A small set of colour images with writers, where the preset `cifar10-lips` looks for its file."""
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    for part, count in (("train", 160), ("test", 60)):
        labels = np.arange(count) % 10
        noise = rng.integers(0, 120, (count, 32, 32, 3))
        arrays[f"{part}_images"] = (noise + 13 * labels[:, None, None, None]).astype(np.uint8)
        arrays[f"{part}_labels"], arrays[f"{part}_writer"] = labels, rng.integers(0, 6, count)
    np.savez(folder / "cifar10.npz", **arrays)  # pyright: ignore[reportArgumentType] keywords are arrays


# --- recording ------------------------------------------------------------------------------------------


def record(changes: Mapping[str, Any], scratch: Path, *, cut: bool) -> dict[str, Any]:
    """Runs one configuration. -> what it came to."""
    settings = merged(BASE, changes)
    if "data_dir" in settings["data"]:
        settings["data"] = {**settings["data"], "data_dir": str(scratch)}
    if cut:
        where = {"dir": str(scratch / "run"), "checkpoint_every": 2, "keep": 9, "figures": False}
        settings = merged(settings, {"output": {**where, "tensorboard": False}})
    file = scratch / "config.yaml"
    file.write_text(json.dumps(settings))  # JSON is YAML
    found = described(fs.run(file))
    if cut:
        cut_short(scratch / "run", after=3, checkpoint=2)
        resumed = described(fs.resume(scratch / "run"))
        told = list(differences(found, resumed))
        if told:
            raise SystemExit(f"a run that was cut differs from one that was not: {told[:SHOWN]}")
    return found


def cut_short(folder: Path, *, after: int, checkpoint: int) -> None:
    """Leaves of a finished run what a kill after round `after` leaves, with the newest checkpoint before."""
    (folder / "metrics.parquet").unlink()
    journal = folder / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:after]) + lines[after][:20])
    for path in (folder / "checkpoints").iterdir():
        if path.name.isdigit() and int(path.name) > checkpoint:
            shutil.rmtree(path)


def described(run: fs.Run) -> dict[str, Any]:
    """Rounds, a checksum of each leaf of the deployed model, and all rows, values in hexadecimal."""
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(run.variables):
        array = np.ascontiguousarray(leaf)
        leaves[jax.tree_util.keystr(path, simple=True, separator="/")] = {
            "sha256": hashlib.sha256(array.tobytes()).hexdigest(),
            "dtype": str(array.dtype),
            "shape": list(array.shape),
            "norm": float(np.linalg.norm(array.astype(np.float64))),
            "first": [float(value) for value in array.ravel()[:4]],
        }
    columns = [run.metrics.column(name).tolist() for name in ROW]
    values = [float(value).hex() for value in run.metrics.column("value")]
    rows = [[*where, value] for *where, value in zip(*columns, values, strict=True)]
    return {"rounds": run.rounds, "leaves": leaves, "rows": rows}


def of_group(names: list[str], out: Path) -> None:
    """Records configurations in this process, on the devices that it has."""
    found = {}
    for name in names:
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as scratch:
            write_images(Path(scratch))
            found[name] = record({**ONE, **FOUR}[name], Path(scratch), cut=name == RESUMED)
        seconds = time.monotonic() - start
        print(f"{name}: {len(found[name]['rows'])} rows, {seconds:.1f} s", file=sys.stderr, flush=True)
    out.write_text(json.dumps(found))


def recorded(names: list[str]) -> dict[str, Any]:
    """Records configurations, each in a process with the number of devices that it wants."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for count, group in ((1, ONE), (4, FOUR)):
            chosen = [name for name in group if name in names]
            if not chosen:
                continue
            out = Path(scratch) / f"{count}.json"
            flags = f"--xla_force_host_platform_device_count={count}"
            env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
            line = [sys.executable, __file__, str(out), "--here", "--only", *chosen]
            subprocess.run(line, env=env, check=True)
            found |= json.loads(out.read_text())
    return found


# --- comparing ------------------------------------------------------------------------------------------


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """A line for everything in which two records of one configuration differ."""
    if old["rounds"] != new["rounds"]:
        yield f"rounds: {old['rounds']} -> {new['rounds']}"
    for path in sorted({*old["leaves"], *new["leaves"]}):
        one, other = old["leaves"].get(path), new["leaves"].get(path)
        if one is None or other is None:
            yield f"leaf {path}: only {'before' if other is None else 'after'}"
        elif (one["dtype"], one["shape"]) != (other["dtype"], other["shape"]):
            yield f"leaf {path}: {one['dtype']}{one['shape']} -> {other['dtype']}{other['shape']}"
        elif one["sha256"] != other["sha256"]:
            away = max((abs(a - b) for a, b in zip(one["first"], other["first"], strict=True)), default=0.0)
            norms = f"norm {one['norm']!r} -> {other['norm']!r}"
            yield f"leaf {path}: {norms}, first values differ by up to {away:.3g}"
    before, after = ({tuple(row[:-1]): row[-1] for row in side["rows"]} for side in (old, new))
    for where in [*before, *(key for key in after if key not in before)]:
        one, other = before.get(where), after.get(where)
        told = ", ".join(
            f"{name} {value}" for name, value in zip(ROW, where, strict=True) if value not in ("", -1)
        )
        if one is None or other is None:
            yield f"row {told}: only {'before' if other is None else 'after'}"
        elif one != other:
            a, b = float.fromhex(one), float.fromhex(other)
            yield f"row {told}: {a!r} -> {b!r} (by {b - a:.3g})"
    if list(before) != list(after) and before.keys() == after.keys():
        yield "rows: the same, in another order"


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> int:
    """Prints what differs. -> in how many configurations."""
    count = 0
    for name, record in new.items():
        told = ["it was not recorded before"] if name not in old else list(differences(old[name], record))
        count += bool(told)
        for line in told[:SHOWN]:
            print(f"{name}: {line}")
        if len(told) > SHOWN:
            print(f"{name}: … {len(told) - SHOWN} more")
    print(f"{len(new) - count} of {len(new)} configurations are the same to the bit")
    return count


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="JSON file that is written")
    parser.add_argument("--compare", type=Path, metavar="OLD", help="an earlier JSON file")
    parser.add_argument("--only", nargs="+", choices=[*ONE, *FOUR], default=[*ONE, *FOUR], metavar="NAME")
    parser.add_argument("--here", action="store_true", help="in this process, on the devices that it has")
    args = parser.parse_args()
    if args.here:
        of_group(args.only, args.out)
        return 0
    found = recorded(args.only)
    args.out.write_text(json.dumps(found, indent=1))
    return 0 if args.compare is None else int(bool(compare(json.loads(args.compare.read_text()), found)))


if __name__ == "__main__":
    sys.exit(main())
