"""Breaks one line at a time of the engine and its mathematics, and says which breaks no test sees.

    python scripts/mutate.py                  all, some 20 minutes on one core
    python scripts/mutate.py waves probing    those of some modules

Each mutant is a line with one thing wrong, and runs the tests nearest to it, until the first that fails, in a
copy of the package. The whole suite sees more than they do. A survivor is either listed in `HARMLESS`, with
the reason why nothing changes, or a test is missing, and the exit status is 1.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMIT = 1200
"""Seconds of a mutant: beyond them it hangs, or the machine is too busy. It then counts as neither."""

PRIMITIVES = "tests/core/test_primitives.py"
NEAREST = {
    "core/stacked": ["tests/core/test_stacked.py", PRIMITIVES, "-k", "not five_and_six and not a_round"],
    "engine/round": ["tests/engine/test_round.py"],
    "engine/waves": ["tests/engine/test_waves.py"],
    "engine/clients": ["tests/engine/test_clients.py", "tests/engine/test_round.py"],
    "engine/evaluation": ["tests/engine/test_evaluation.py"],
    "tasks/regression": ["tests/tasks/test_regression.py"],
    "engine/placement": [
        "tests/engine/test_placement.py",
        PRIMITIVES,
        "-k",
        "not five_and_six and not a_round",
    ],
    "engine/client_rows": ["tests/engine/test_client_state.py"],
    "engine/client_state": ["tests/engine/test_client_state.py"],
    "engine/held": ["tests/engine/test_client_state.py"],
    "core/top_k": ["tests/core/test_top_k.py"],
    "probes/peel/moments": ["tests/peel/test_moments.py"],
    "probes/peel/layers": ["tests/peel/test_moments.py"],
    "probes/peel/alignment": ["tests/peel/test_alignment.py"],
    "probes/peel/linear_probes": ["tests/peel/test_linear_probes.py"],
}
EVALUATED = ["tests/engine/test_evaluation.py"]
REGRESSED = ["tests/tasks/test_regression.py"]
MOVEMENT = ["tests/inertia/test_movement.py"]
PEELED = ["tests/peel/test_feature_probe.py"]
TOGETHER = ["tests/runs/test_together.py", "-k", "each_run or cut_goes or diverges or equal"]
BY_HAND = ["tests/algorithms/test_server_rules.py", "-k", "fednova or scaffold"]

# (module, what stands there once, what the mutant has instead, tests other than the nearest)
MUTANTS: list[tuple] = [
    ("engine/client_rows", "moves[~moves] = self._fixed[old[~moves]]", "pass"),
    ("engine/client_rows", "self._fixed[needed[needed >= 0]] = True", "pass"),
    ("engine/client_rows", "self._places[ids] = _ELSEWHERE", "pass"),
    ("engine/client_rows", "return hosts.gathered(own).T.reshape", "return hosts.gathered(own).reshape"),
    ("engine/client_rows", "return process + self._own * processes", "return process + self._own"),
    ("engine/client_rows", "taken = self._fixed.copy()", "taken = np.zeros_like(self._fixed)"),
    ("engine/client_rows", "last = {client: row for", "last = {client: min(row, 0) for"),
    ("engine/client_rows", "sorted(self._needed)[:-keep]", "sorted(self._needed)[:-1]"),
    ("engine/client_state", "where_slot(fresh, new, old)", "where_slot(fresh, old, new)"),
    ("engine/client_state", "not np.isin(upcoming, ids).any()", "True"),
    (
        "engine/client_state",
        "leaf[:1], (rows, *leaf.shape[1:])) if cut",
        "leaf[:1] * 0, (rows, *leaf.shape[1:])) if cut",
    ),
    (
        "engine/client_state",
        "placement.own(leaf)[: len(seats.own)]",
        "np.roll(placement.own(leaf)[: len(seats.own)], 1, 0)",
    ),
    (
        "engine/client_state",
        "row[: len(ids)] = places[np.searchsorted(clients, ids)]",
        "row[: len(ids)] = places[0]",
        ["tests/engine/test_hosts.py", "-k", "personal"],
    ),
    (
        "engine/client_state",
        "slot[places] = last",
        "slot[places] = 0",
        ["tests/engine/test_hosts.py", "-k", "personal"],
    ),
    ("engine/held", "stacked.RowsOf(ids, stacked.cut_to(leaf, ids.shape[0]))", "stacked.RowsOf(ids, leaf)"),
    (
        "core/stacked",
        "own_ids - jax.lax.axis_index(AXIS) * leaf.shape[0]",
        "own_ids - jax.lax.axis_index(AXIS) * wanted",
    ),
    ("core/stacked", "(local >= 0) & (local < leaf.shape[0])", "(local > 0) & (local < leaf.shape[0])"),
    ("core/stacked", "(local >= 0) & (local < leaf.shape[0])", "(local >= 0) & (local <= leaf.shape[0])"),
    ("core/stacked", "share = -(-wanted // devices)", "share = max(wanted // devices, 1)"),
    ("core/stacked", "leaf[:count], P(AXIS)", "leaf[-count:], P(AXIS)"),
    (
        "core/stacked",
        "chunk - jax.lax.axis_index(AXIS) * leaf.shape[0]",
        "chunk - jax.lax.axis_index(AXIS) * given",
    ),
    ("core/stacked", "local < 0, leaf.shape[0], local", "local < 0, leaf.shape[0] - 1, local"),
    ("core/stacked", "share = -(-given // devices)", "share = max(given // devices, 1)"),
    ("core/stacked", "constant_values=nobody", "constant_values=0"),
    ("core/stacked", "jnp.minimum(index, count - 1), spare", "index, spare"),
    ("core/stacked", "room[leaf.dtype] -= size", "room[leaf.dtype] -= 0"),
    ("core/stacked", "widths = [-(-leaf[0].size // devices)", "widths = [leaf[0].size // devices + 1"),
    ("core/stacked", "_column(weights != 0, leaf)", "_column(weights >= 0, leaf)"),
    ("core/stacked", "else jnp.maximum(a, b), total, part", "else jnp.minimum(a, b), total, part"),
    ("core/stacked", "jax.lax.pmax(leaf, AXIS)", "jax.lax.pmin(leaf, AXIS)"),
    ("core/stacked", "leaf = jnp.where(weight > 0, leaf, _least(leaf.dtype))", "leaf = leaf"),
    ("core/stacked", "jnp.iinfo(dtype).min", "0"),
    ("core/stacked", "dtype=jnp.int32) >= number * strip", "dtype=jnp.int32) > number * strip"),
    ("core/stacked", "leaf.reshape(own, size), -(-size // strip)", "leaf.reshape(own, size), size // strip"),
    ("core/stacked", "jnp.where(when, -(-count // devices), 0)", "jnp.where(when, count // devices, 0)"),
    ("core/stacked", "/ (count * (count - 1))", "/ (count * count)"),
    ("core/stacked", "jnp.where(nonzero, apart, 0)", "apart"),
    ("core/stacked", "(d, (d + 1) % devices)", "(d, (d - 1) % devices)"),
    ("engine/round", "occupied = plan.slot_of_place < cohort", "occupied = plan.slot_of_place <= cohort"),
    (
        "engine/round",
        "weights=jnp.where(occupied, _take(weights, plan.slot_of_place), 0)",
        "weights=_take(weights, plan.slot_of_place)",
    ),
    ("engine/round", "share = jnp.where(finite, own.weights, 0) if shared", "share = own.weights if shared"),
    ("engine/round", "jnp.where(weight > 0, new, old), mean", "jnp.where(weight >= 0, new, old), mean"),
    ("engine/round", "all_, new, w * width, 0)", "all_, new, w, 0)"),
    (
        "engine/round",
        "loss, faults = _take(loss, plan.place_of_slot), _take",
        "loss, faults = loss[: len(plan.place_of_slot)], _take",
    ),
    ("engine/round", "(*stacked.where_slot(finite, new, old), _faults(", "(*new, _faults("),
    ("engine/round", "stacked.where_slot(finite, u, jnp.zeros_like(u))", "stacked.where_slot(finite, u, u)"),
    ("engine/round", "finite & (own.counts > 0)", "own.counts >= 0", MOVEMENT),
    ("engine/round", "leaf / jnp.maximum(read, 1), sums", "leaf / jnp.maximum(read, 4), sums", MOVEMENT),
    ("engine/round", "round=cohort.round + 1)", "round=cohort.round)", ["tests/algorithms/test_lips.py"]),
    (
        "engine/round",
        "jnp.full(plan.slot_of_place.shape, most, jnp.int32)",
        "jnp.full(plan.slot_of_place.shape, most - 1, jnp.int32)",
        PEELED,
    ),
    ("core/stacked", "jax.lax.pmax(number, SIDE)", "jax.lax.pmin(number, SIDE)", TOGETHER),
    ("core/stacked", "jax.lax.pmin(flag.astype", "jax.lax.pmax(flag.astype", TOGETHER),
    ("engine/clients", "(self.width > 1 or stacked.side_by_side())", "self.width > 1", TOGETHER),
    (
        "engine/together",
        "key=self._keys[self._seats]",
        "key=self._keys[sorted(self._seats)[:1] * 4]",
        TOGETHER,
    ),
    ("engine/together", "_taken(own, place % each)", "_taken(own, 0)", TOGETHER),
    (
        "engine/together",
        "if there and self._states is not None and",
        "if self._states is not None and",
        TOGETHER,
    ),
    ("runs/together", "if name not in arguments)", "if name in arguments)", ["tests/runs/test_together.py"]),
    (
        "engine/waves",
        "longest = steps[number, ranked[:, ::width]]",
        "longest = steps[number, ranked[:, :used]]",
    ),
    ("engine/waves", "(work + steps, device, place + 1)", "(work + 1, device, place + 1)"),
    ("engine/waves", "(work + steps, device, place + 1)", "(device, work + steps, place + 1)"),
    ("engine/waves", "np.argsort(-steps", "np.argsort(steps"),
    ("engine/waves", "return per_epoch * local.epochs", "return per_epoch"),
    ("engine/waves", "(steps == steps[..., :1]).all(-1)", "(steps <= steps[..., :1]).all(-1)"),
    ("engine/waves", "np.flatnonzero(~stay)", "np.flatnonzero(stay)"),
    ("engine/waves", "devices, width, beside=side > 1)", "devices, width, beside=False)"),
    ("engine/waves", ".max(1)  # of each block", ".min(1)  # of each block"),
    ("engine/waves", "np.minimum(rest * batch, counts)", "rest * batch"),
    (
        "engine/waves",
        "place_of_slot[number, flat] = np.arange(flat.shape[1])",
        "place_of_slot[:, :] = np.arange(count + 1)",
    ),
    ("engine/clients", "dtype=jnp.int32) < count, bits", "dtype=jnp.int32) <= count, bits"),
    ("engine/clients", "(position < counts[:, None])", "(position <= counts[:, None])"),
    ("engine/clients", "(position < counts[:, None]) & (t < total)[:, None]", "(position < counts[:, None])"),
    ("engine/clients", "last = jnp.maximum(counts - 1, 0)", "last = jnp.maximum(counts, 0)"),
    ("engine/clients", "(t == total - 1)", "(t == total - 2)", MOVEMENT),
    (
        "engine/clients",
        "jnp.where((within == 0)[:, None], ordered",
        "jnp.where((within >= 0)[:, None], ordered",
    ),
    ("engine/clients", "loss_sum / jnp.maximum(seen, 1)", "loss_sum / jnp.maximum(seen, 1) / 2"),
    ("engine/clients", "jnp.isfinite(loss_sum) & all_finite((trained, uploads))", "jnp.isfinite(loss_sum)"),
    ("engine/clients", "& all_finite((trained, uploads))", "& all_finite(trained)"),
    ("engine/clients", "jnp.isfinite(loss_sum) & all_finite(", "all_finite("),
    (
        "engine/clients",
        "new = stacked.where_slot(active, new, variables)",
        "new = stacked.where_slot(t >= 0 * total, new, variables)",
    ),
    (
        "engine/clients",
        "new_opt_state = stacked.where_slot(active, new_opt_state, opt_state)",
        "new_opt_state = new_opt_state",
    ),
    ("engine/clients", "loss_sum + loss * size, seen + size", "loss_sum + loss, seen + 1"),
    ("engine/evaluation", "leaf.shape[2:])[: self.count]", "leaf.shape[2:])[-self.count :]"),
    ("engine/evaluation", "batch = max(1, min(batch_size, width))", "batch = max(1, width)"),
    ("engine/evaluation", "leaf.shape[3:])[:, :width]", "leaf.shape[3:])[:, -width:]"),
    ("engine/evaluation", "weights=column, minlength", "weights=1 - column, minlength"),
    ("engine/evaluation", "metric.finish(sums / sizes[:, None])", "metric.finish(sums)"),
    ("tasks/classification", "jnp.argmax(logits, -1)", "jnp.argmin(logits, -1)", EVALUATED),
    ("tasks/regression", "1 - means[..., 0] / variance", "means[..., 0] / variance"),
    ("tasks/regression", "self.scale**2", "self.scale"),
    (
        "tasks/vectors",
        '(example["target"] - centre) / width',
        '(example["target"] - centre) * width',
        REGRESSED,
    ),
    ("tasks/vectors", "np.where(deviation > 0, deviation, 1.0)", "deviation", ["tests/data/test_tables.py"]),
    ("engine/placement", "if count > len(present):", "if count >= len(present):"),
    ("engine/placement", "-raw.ctypes.data % boundary", "raw.ctypes.data % boundary"),
    ("engine/placement", "array.ctypes.data % boundary == 0", "array.ctypes.data % boundary != 0"),
    ("engine/placement", "min(execution.wave, share)", "max(execution.wave, share)"),
    ("engine/placement", "-(-cohort_size // mesh.size)", "cohort_size // mesh.size"),
    ("engine/placement", "(wave > 1 or not on_cpu)", "(wave > 0 or not on_cpu)"),
    ("core/top_k", ">= candidate) >= count)", ">= candidate) > count)"),
    ("core/top_k", "keys > threshold, keys", "keys >= threshold, keys"),
    ("core/top_k", "enough = _sum(level) <= missing", "enough = _sum(level) < missing"),
    ("core/top_k", "(places < candidate)) <= missing", "(places < candidate)) < missing"),
    ("core/top_k", "len(scores).bit_length()", "len(scores).bit_length() - 1"),
    ("core/top_k", "size > jnp.uint32(0x7F800000)", "size >= jnp.uint32(0x7F800000)"),
    ("core/top_k", "jnp.where(size == 0, sign", "jnp.where(size == 1, sign"),
    ("probes/peel/moments", "(a.count * share)[:, None] * a.layers", "(b.count * share)[:, None] * a.layers"),
    ("probes/peel/moments", "mean = a.mean + share", "mean = a.mean - share"),
    ("probes/peel/moments", "(2 * jnp.where(pairs, apart, 1))", "(1 * jnp.where(pairs, apart, 1))"),
    ("probes/peel/moments", "[m.count, m.present.astype(jnp.float32)]", "[m.count, m.count]"),
    ("probes/peel/moments", "(reference[None] + means / 2)", "(reference[None] + means)"),
    ("probes/peel/moments", "return apart, cosine * pairs[None]", "return apart, cosine"),
    ("probes/peel/moments", "jnp.where(pairs, cosine, -jnp.inf)", "jnp.where(pairs, cosine, 0)"),
    ("probes/peel/alignment", "jnp.moveaxis(kernel, 2, 0)", "jnp.moveaxis(kernel, 3, 0)"),
    ("probes/peel/alignment", "vectors[:, ::-1][:, :most]", "vectors[:, :most]"),
    ("probes/peel/alignment", "s[:1] * len(s)", "s[:1] * 1e-9"),
    ("probes/peel/alignment", "r.ndim) < r[..., None]", "r.ndim) <= r[..., None]"),
    ("probes/peel/alignment", "matrix.shape[1] > matrix.shape[0]:", "matrix.shape[1] >= matrix.shape[0]:"),
    ("probes/peel/alignment", "np.linalg.svd(other[:r]", "np.linalg.svd(other[: r + 1]"),
    ("probes/peel/linear_probes", "bias[None] / (1 + penalty)", "bias[None]"),
    ("probes/peel/linear_probes", "penalty * n * jnp.eye", "penalty * jnp.eye"),
    ("probes/peel/linear_probes", "_product(x.T, solved(_product(x, x.T), target))", "_product(x.T, target)"),
    (
        "probes/peel/linear_probes",
        "for other in (products, products[:1])",
        "for other in (products, products)",
    ),
    ("probes/peel/linear_probes", "broadcast_to(turned[:1]", "broadcast_to(turned"),
    ("probes/peel/layers", "own = of_layer ==", "own = of_layer >="),
    ("probes/peel/linear_probes", "xy * xy / jnp.where", "xy / jnp.where"),
    ("probes/peel/linear_probes", "tolerance**2 * largest", "tolerance * largest"),
    ("probes/peel/linear_probes", "(x - mean[None]) * keep", "(x - mean[None])"),
]

# (module, what the mutant has) -> why nothing changes.
HARMLESS: dict[tuple[str, str], str] = {
    (
        "engine/clients",
        "jnp.where((within >= 0)[:, None], ordered",
    ): "an order is a function of client and epoch: drawn again within the epoch it is the same",
    (
        "core/stacked",
        "leaf = leaf",
    ): "where nothing weighs, it is the least already; to wait for the weight is the point",
    (
        "core/stacked",
        "room[leaf.dtype] -= 0",
    ): "more leaves travel together than memory is meant for",
    (
        "core/stacked",
        "widths = [leaf[0].size // devices + 1",
    ): "a column more than is needed is filled up with zeros",
    ("engine/waves", "rest * batch"): "fewer batches than an epoch has never reach a client's count",
    (
        "core/top_k",
        ">= candidate) > count)",
    ): "the threshold is one number lower, and none of that is missing",
    ("core/top_k", "enough = _sum(level) < missing"): "of a level that is wanted whole, the search takes all",
    (
        "engine/evaluation",
        "batch = max(1, width)",
    ): "batches of any size give the same; this one wants more memory",
    ("probes/peel/moments", "return apart, cosine"): "an absent class's mean is zero, and so are its cosines",
    (
        "probes/peel/alignment",
        "matrix.shape[1] >= matrix.shape[0]:",
    ): "a QR decomposition of a square matrix keeps both",
}


def main() -> int:
    """Runs the mutants of the modules that are named, or all."""
    wanted = sys.argv[1:]
    mutants = [m for m in MUTANTS if not wanted or any(word in m[0] for word in wanted)]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for part in ("fedjax_sim", "tests"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        outcomes = [_outcome(copy, *mutant) for mutant in mutants]
    told = {word: outcomes.count(word) for word in ("killed", "harmless", "SURVIVED", "UNTOLD")}
    print(f"{len(mutants)} mutants:", ", ".join(f"{count} {word}" for word, count in told.items()))
    return int(told["SURVIVED"] + told["UNTOLD"] > 0)


def _outcome(copy: Path, module: str, old: str, new: str, tests: list[str] | None = None) -> str:
    path, began = copy / "fedjax_sim" / f"{module}.py", time.monotonic()
    text = path.read_text()
    assert text.count(old) == 1, f"{module}: {text.count(old)} times: {old}"
    path.write_text(text.replace(old, new))
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-x", *(tests or NEAREST[module])]
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, text=True, timeout=LIMIT
        )
        code = done.returncode
        lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    except subprocess.TimeoutExpired:
        code, lines = None, []
    path.write_text(text)
    if code not in (0, 1, 2, None):
        raise SystemExit(f"{module}: {new}: pytest ended with {code}\n{done.stdout[-2000:]}")
    reason = HARMLESS.get((module, new))
    word = "UNTOLD" if code is None else "killed" if code else "harmless" if reason else "SURVIVED"
    why = reason if word == "harmless" else "".join(lines[:1])[:140]
    print(f"{word:9}{time.monotonic() - began:4.0f} s  {module}: {old}  ->  {new}  {why}", flush=True)
    return word


if __name__ == "__main__":
    sys.exit(main())
