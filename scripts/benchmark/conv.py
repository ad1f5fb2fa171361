"""Which implementation of the convolution is fastest on this backend: forward and both gradients, in a loop.

    python scripts/benchmark/conv.py [--wave 1] [--layers lenet1,mcmahan2] [--impls xla,canonical]

Each line: a layer as the zoo has it, milliseconds a step (median, compile time apart) for each
implementation, the tile that `patches` took, and the arithmetic in units of GFLOP/s for the fastest. `--wave`
stacks that many clients by vmap, as the engine does. On a CPU the process's own CPU time is taken, which
other processes disturb less than the clock.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp

from fedjax_sim.core.conv_impl import CONV_IMPLS, conv_impl
from fedjax_sim.models.kernels import conv, tiles

# name: batch, side, channels in, channels out, kernel, stride, padding, fused with ReLU and pooling
LAYERS = {
    "lenet1": (50, 32, 3, 6, 5, 1, "VALID", True),
    "lenet2": (50, 14, 6, 16, 5, 1, "VALID", True),
    "femnist1": (50, 28, 1, 16, 5, 1, "VALID", True),
    "femnist2": (50, 12, 16, 32, 5, 1, "VALID", True),
    "mcmahan1": (10, 32, 3, 32, 5, 1, "SAME", True),
    "mcmahan2": (10, 16, 32, 64, 5, 1, "SAME", True),
    "resnet20_stem": (50, 32, 3, 16, 3, 1, "SAME", False),
    "resnet20_1x1_up": (50, 32, 16, 64, 1, 1, "VALID", False),
    "resnet20_1x1_down": (50, 32, 64, 16, 1, 1, "VALID", False),
    "resnet20_3x3_16": (50, 32, 16, 16, 3, 1, "SAME", False),
    "resnet20_3x3_32": (50, 16, 32, 32, 3, 1, "SAME", False),
    "resnet20_3x3_64": (50, 8, 64, 64, 3, 1, "SAME", False),
    "resnet20_stride2": (50, 32, 32, 32, 3, 2, "SAME", False),
    "resnet8_stem": (100, 32, 3, 64, 7, 2, "SAME", False),
    "resnet8_3x3_64": (100, 8, 64, 64, 3, 1, "SAME", False),
    "resnet8_3x3_256": (100, 2, 256, 256, 3, 1, "SAME", False),
    "vgg_3x3_64": (50, 32, 3, 64, 3, 1, "SAME", False),
    "vgg_3x3_128": (50, 16, 64, 128, 3, 1, "SAME", False),
    "vgg_3x3_512": (50, 4, 256, 512, 3, 1, "SAME", False),
}


def step_time(layer: str, impl: str, wave: int, loops: int = 5, repeats: int = 3) -> float:
    """Median milliseconds of one forward and backward pass of `wave` clients."""
    batch, side, inner, outer, k, stride, padding, fused = LAYERS[layer]
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (wave, batch, side, side, inner))
    kernel = jax.random.normal(keys[1], (wave, k, k, inner, outer)) / (k * k * inner) ** 0.5

    def loss(x, kernel):
        with conv_impl(impl):
            if fused:
                y = conv.conv_relu_pool(x, kernel, jnp.zeros(outer), padding=padding)
            else:
                y = conv.conv(x, kernel, strides=(stride, stride), padding=padding)
        return (y * y).sum()

    gradient = jax.grad(loss, (0, 1))
    gradient = jax.vmap(gradient) if wave > 1 else (lambda x, k, g=gradient: g(x[0], k[0]))

    @jax.jit
    def run(x, kernel):
        def body(_, carry):
            x, kernel = carry
            dx, dk = gradient(x, kernel)
            return x + 1e-9 * dx.reshape(x.shape), kernel + 1e-9 * dk.reshape(kernel.shape)

        return jax.lax.fori_loop(0, loops, body, (x, kernel))

    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    jax.block_until_ready(run(x, kernel))
    times = []
    for _ in range(repeats):
        begin = clock()
        jax.block_until_ready(run(x, kernel))
        times.append((clock() - begin) / loops * 1e3)
    return statistics.median(times)


def flops(layer: str) -> float:
    """Multiply-adds count two; forward and both gradients."""
    batch, side, inner, outer, k, stride, padding, _ = LAYERS[layer]
    out = -(-side // stride) if padding == "SAME" else (side - k) // stride + 1
    return 3 * 2.0 * batch * out * out * k * k * inner * outer


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--wave", type=int, default=1)
    parser.add_argument("--layers", default=",".join(LAYERS))
    parser.add_argument("--impls", default=",".join((*CONV_IMPLS[1:], "auto")))
    args = parser.parse_args()
    impls = args.impls.split(",")
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, wave {args.wave}")
    print(f"{'layer':20s}" + "".join(f"{s:>12s}" for s in impls) + f"{'tile':>8s}{'GFLOP/s':>9s}")
    for layer in args.layers.split(","):
        batch, side, inner, outer, k, stride, padding, fused = LAYERS[layer]
        times = [step_time(layer, s, args.wave) for s in impls]
        pads = jax.lax.padtype_to_pads((side, side), (k, k), (stride, stride), padding)
        top, left = (tuple(pad) for pad in pads)
        shape = tiles.Geometry((stride, stride), (top, left), (1, 1), 1)  # type: ignore[arg-type]
        tile = conv.best_tile((batch, side, side, inner), (k, k, inner, outer), shape, even=fused)
        rate = flops(layer) * args.wave / min(times) / 1e6
        row = "".join(f"{t:12.3f}" for t in times)
        print(f"{layer:20s}{row}{tile[0]:>5d}x{tile[1]}{rate:9.1f}", flush=True)


if __name__ == "__main__":
    main()
