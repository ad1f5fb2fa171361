"""The machine's float32 matrix-product peak, so that a workload's time can be set against its arithmetic.

`python peak.py --package numpy|torch|jax --threads T` prints one JSON line, in whichever environment has
that library. The number of threads must be fixed before a library starts them, so each figure takes a
process of its own (`run.py` starts them) and libraries are imported late.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable

SIDE = 1536
"""Rows and columns of the factors: 9 MiB each, so that arithmetic and not memory is measured."""

LIBRARIES = ("numpy", "torch", "jax")


def limit_threads(threads: int) -> None:
    """Confines this process, and the thread pools it will start, to `threads` cores."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"):
        os.environ[name] = str(threads)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-threads:])


def product(library: str, side: int) -> Callable[[], object]:
    """A call that multiplies two f32[side, side] matrices and waits for the result."""
    import numpy as np

    left, right = np.random.default_rng(0).standard_normal((2, side, side), dtype=np.float32)
    if library == "torch":
        import torch

        a, b = torch.from_numpy(left), torch.from_numpy(right)
        return lambda: a @ b
    if library == "jax":
        import jax

        x, y = jax.device_put(left), jax.device_put(right)
        matmul = jax.jit(lambda x, y: x @ y)
        return lambda: jax.block_until_ready(matmul(x, y))
    return lambda: left @ right


def gflops(call: Callable[[], object], side: int, repetitions: int = 15) -> tuple[float, float]:
    """Median and best rate of `call` in 10⁹ operations a second, after two calls to warm up."""
    seconds = []
    for _ in range(repetitions + 2):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    timed = seconds[2:]
    return 2e-9 * side**3 / statistics.median(timed), 2e-9 * side**3 / min(timed)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--package", choices=LIBRARIES, required=True)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if args.threads < 1:
        parser.error(f"argument --threads: {args.threads} is less than 1; give 1 or more")
    limit_threads(args.threads)
    median, best = gflops(product(args.package, SIDE), SIDE)
    print(
        json.dumps(
            {
                "library": args.package,
                "threads": args.threads,
                "gflops": round(median, 1),
                "best_gflops": round(best, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
