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

PRIMITIVES = "tests/test_primitives.py"
NEAREST = {
    (
        "training",
        "jnp.where((within >= 0)[:, None], _samples",
    ): "an order is a function of client and epoch: drawn again within the epoch it is the same",
    "stacked": ["tests/test_stacked.py", PRIMITIVES, "-k", "not five_and_six and not a_round"],
    "rounds": ["tests/test_rounds.py"],
    "waves": ["tests/test_waves.py"],
    "training": ["tests/test_training.py", "tests/test_rounds.py"],
    "evaluation": ["tests/test_evaluation.py"],
    "placement": ["tests/test_placement.py", PRIMITIVES, "-k", "not five_and_six and not a_round"],
    "selection": ["tests/test_selection.py"],
    "peel/moments": ["tests/peel/test_moments.py"],
    "peel/alignment": ["tests/peel/test_alignment.py"],
    "peel/probing": ["tests/peel/test_probing.py"],
}
MOVEMENT = ["tests/inertia/test_movement.py"]
PEELED = ["tests/peel/test_probe.py"]
BY_HAND = ["tests/algorithms/test_server_rules.py", "-k", "fednova or scaffold"]

# (module, what stands there once, what the mutant has instead, tests other than the nearest)
MUTANTS: list[tuple] = [
    (
        "stacked",
        "own_ids - jax.lax.axis_index(AXIS) * leaf.shape[0]",
        "own_ids - jax.lax.axis_index(AXIS) * wanted",
    ),
    ("stacked", "(local >= 0) & (local < leaf.shape[0])", "(local > 0) & (local < leaf.shape[0])"),
    ("stacked", "(local >= 0) & (local < leaf.shape[0])", "(local >= 0) & (local <= leaf.shape[0])"),
    ("stacked", "share, even = -(-wanted // devices)", "share, even = wanted // devices"),
    ("stacked", "leaf[:wanted], rows)", "leaf[-wanted:], rows)"),
    (
        "stacked",
        "chunk - jax.lax.axis_index(AXIS) * leaf.shape[0]",
        "chunk - jax.lax.axis_index(AXIS) * given",
    ),
    ("stacked", "local < 0, leaf.shape[0], local", "local < 0, leaf.shape[0] - 1, local"),
    ("stacked", "(jax.lax.axis_index(AXIS) - number) % hops", "(jax.lax.axis_index(AXIS) + number) % hops"),
    ("stacked", "hops = devices if given % devices == 0 else 1", "hops = devices if given >= devices else 1"),
    ("stacked", "_column(weights != 0, leaf)", "_column(weights >= 0, leaf)"),
    ("stacked", "else jnp.maximum(a, b), total, part", "else jnp.minimum(a, b), total, part"),
    ("stacked", "jax.lax.pmax(", "jax.lax.pmin("),
    ("stacked", "jnp.where(weight > 0, leaf, _least(leaf.dtype)), AXIS", "leaf, AXIS"),
    ("stacked", "jnp.iinfo(dtype).min", "0"),
    ("stacked", "dtype=jnp.int32) >= number * strip", "dtype=jnp.int32) > number * strip"),
    ("stacked", "strips = -(-size // strip)", "strips = size // strip"),
    ("stacked", "jnp.where(when, count // devices, 0)", "jnp.where(when, count // devices - 1, 0)"),
    ("stacked", "/ (count * (count - 1))", "/ (count * count)"),
    ("stacked", "(d, (d + 1) % devices)", "(d, (d - 1) % devices)"),
    ("stacked", "or index.shape[0] % devices:", "or False:"),
    ("rounds", "occupied = plan.layout < cohort", "occupied = plan.layout <= cohort"),
    (
        "rounds",
        "weights=jnp.where(occupied, _take(weights, plan.layout), 0)",
        "weights=_take(weights, plan.layout)",
    ),
    ("rounds", "share = jnp.where(finite, own.weights, 0) if shared", "share = own.weights if shared"),
    ("rounds", "jnp.where(weight > 0, new, old), mean", "jnp.where(weight >= 0, new, old), mean"),
    ("rounds", "all_, new, w * width, 0)", "all_, new, w, 0)"),
    (
        "rounds",
        "loss, faults = _take(loss, plan.places), _take",
        "loss, faults = loss[: len(plan.places)], _take",
    ),
    ("rounds", "(*stacked.select(finite, new, old), _faults(", "(*new, _faults("),
    ("rounds", "stacked.select(finite, u, jnp.zeros_like(u))", "stacked.select(finite, u, u)"),
    ("rounds", "finite & (own.counts > 0)", "own.counts >= 0", MOVEMENT),
    ("rounds", "leaf / jnp.maximum(read, 1), sums", "leaf / jnp.maximum(read, 4), sums", MOVEMENT),
    ("rounds", "round=cohort.round + 1)", "round=cohort.round)", ["tests/algorithms/test_lips.py"]),
    (
        "rounds",
        "jnp.full(plan.layout.shape, count, jnp.int32)",
        "jnp.full(plan.layout.shape, count - 1, jnp.int32)",
        PEELED,
    ),
    ("waves", ".reshape(devices * waves, width).max(1)", ".reshape(devices * waves, width).min(1)"),
    ("waves", "load[target] += steps[group].max()", "load[target] += 1"),
    ("waves", "key=lambda d: (load[d], d)", "key=lambda d: (d, load[d])"),
    ("waves", "np.argsort(-steps", "np.argsort(steps"),
    ("waves", "return per_epoch * local.epochs", "return per_epoch"),
    ("waves", "len(np.unique(steps)) <= 1", "len(np.unique(steps)) <= 2"),
    ("waves", "np.minimum(rest * batch, counts)", "rest * batch"),
    (
        "waves",
        "places[flat[flat < count]] = np.flatnonzero(flat < count)",
        "places[:] = np.flatnonzero(flat < count)",
    ),
    ("training", "dtype=jnp.int32) < count, bits", "dtype=jnp.int32) <= count, bits"),
    ("training", "(position < counts[:, None])", "(position <= counts[:, None])"),
    ("training", "(position < counts[:, None]) & (t < total)[:, None]", "(position < counts[:, None])"),
    ("training", "last = jnp.maximum(counts - 1, 0)", "last = jnp.maximum(counts, 0)"),
    ("training", "(t == total - 1)", "(t == total - 2)", MOVEMENT),
    ("training", "jnp.where((within == 0)[:, None], _samples", "jnp.where((within >= 0)[:, None], _samples"),
    ("training", "loss_sum / jnp.maximum(seen, 1)", "loss_sum / jnp.maximum(seen, 1) / 2"),
    ("training", "jnp.isfinite(loss_sum) & all_finite(trained)", "jnp.isfinite(loss_sum)"),
    ("training", "jnp.isfinite(loss_sum) & all_finite(trained)", "all_finite(trained)"),
    (
        "training",
        "new = stacked.select(active, new, variables)",
        "new = stacked.select(t >= 0 * total, new, variables)",
    ),
    ("training", "new_memory = stacked.select(active, new_memory, memory)", "new_memory = new_memory"),
    ("training", "loss_sum + loss * size, seen + size", "loss_sum + loss, seen + 1"),
    ("evaluation", "losses.reshape(-1)[:count], predicted", "losses.reshape(-1)[-count:], predicted"),
    ("evaluation", "batch = max(1, min(batch_size, width))", "batch = max(1, width)"),
    ("evaluation", "predicted.reshape(-1, padded)[:, :width]", "predicted.reshape(-1, padded)[:, -width:]"),
    ("evaluation", "jnp.argmax(logits, -1)", "jnp.argmin(logits, -1)"),
    ("evaluation", "weights=correct, minlength", "weights=1 - correct, minlength"),
    ("placement", "if count > len(present):", "if count >= len(present):"),
    ("placement", "leading % mesh.size == 0", "leading % mesh.size != 1"),
    ("placement", "-raw.ctypes.data % boundary", "raw.ctypes.data % boundary"),
    ("placement", "array.ctypes.data % boundary == 0", "array.ctypes.data % boundary != 0"),
    ("placement", "min(execution.wave, share)", "max(execution.wave, share)"),
    ("placement", "share = -(-cohort_size // devices)", "share = cohort_size // devices"),
    ("placement", "(wave > 1 or not on_cpu)", "(wave > 0 or not on_cpu)"),
    ("selection", ">= candidate) >= count)", ">= candidate) > count)"),
    ("selection", "keys > threshold, keys", "keys >= threshold, keys"),
    ("selection", "enough = _sum(level) <= missing", "enough = _sum(level) < missing"),
    ("selection", "(places < candidate)) <= missing", "(places < candidate)) < missing"),
    ("selection", "len(scores).bit_length()", "len(scores).bit_length() - 1"),
    ("selection", "size > jnp.uint32(0x7F800000)", "size >= jnp.uint32(0x7F800000)"),
    ("selection", "jnp.where(size == 0, sign", "jnp.where(size == 1, sign"),
    ("peel/moments", "a.count * share * (step", "b.count * share * (step"),
    ("peel/moments", "mean = a.mean + share", "mean = a.mean - share"),
    ("peel/moments", "(2 * jnp.where(pairs, apart, 1))", "(1 * jnp.where(pairs, apart, 1))"),
    ("peel/moments", "weight = present if balanced else m.count", "weight = m.count"),
    ("peel/moments", "(means * means).sum(1)[None] / 2", "(means * means).sum(1)[None]"),
    ("peel/moments", "return apart, cosine * pairs", "return apart, cosine"),
    ("peel/moments", "1 - jnp.where(pairs, cosine, -jnp.inf)", "1 - jnp.where(pairs, cosine, 0)"),
    ("peel/alignment", "jnp.moveaxis(kernel, 2, 0)", "jnp.moveaxis(kernel, 3, 0)"),
    ("peel/alignment", "return vectors[:, ::-1]", "return vectors"),
    ("peel/alignment", "values[0] * len(values)", "values[0] * 1e-9"),
    ("peel/alignment", "dtype=jnp.int32) < r)", "dtype=jnp.int32) <= r)"),
    ("peel/alignment", "matrix.shape[1] > matrix.shape[0]:", "matrix.shape[1] >= matrix.shape[0]:"),
    ("peel/alignment", "np.linalg.svd(other[:r]", "np.linalg.svd(other[: r + 1]"),
    ("peel/probing", "c.y / (1 + penalty)", "c.y"),
    ("peel/probing", "penalty * n * jnp.eye", "penalty * jnp.eye"),
    ("peel/probing", "a.xy + b.xy + weight", "a.xy + b.xy + share"),
    ("peel/probing", "xy * xy / jnp.where", "xy / jnp.where"),
    ("peel/probing", "tolerance**2 * largest", "tolerance * largest"),
    ("peel/probing", "(x - mean_x[None]) * keep", "(x - mean_x[None])"),
]

# (module, what the mutant has) -> why nothing changes.
HARMLESS: dict[tuple[str, str], str] = {
    (
        "stacked",
        "leaf, AXIS",
    ): "where nothing weighs, it is the least already; to wait for the weight is the point",
    ("stacked", "or False:"): "an axis that the devices do not divide is filled up by XLA; only slower",
    ("waves", "rest * batch"): "fewer batches than an epoch has never reach a client's count",
    ("selection", ">= candidate) > count)"): "the threshold is one number lower, and none of that is missing",
    ("selection", "enough = _sum(level) < missing"): "of a level that is wanted whole, the search takes all",
    ("evaluation", "batch = max(1, width)"): "batches of any size give the same; this one wants more memory",
    ("peel/moments", "return apart, cosine"): "an absent class's mean is zero, and so are its cosines",
    (
        "peel/alignment",
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
