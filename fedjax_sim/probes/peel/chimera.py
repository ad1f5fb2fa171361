"""What causes a layer's change: models of which some layers are aggregated and the others are not.

A chimera takes each block of leaves (`Model.blocks`) from the client's model before or after the merge. The
feature that enters a layer depends on the blocks before it alone, so for the feature after block l

    total       blocks 1 … l aggregated
    injected    only block l
    inherited   blocks 1 … l-1, block l the client's own
    interaction total - injected - inherited

are changes of log C against the client's own model. Degradation is cumulative in the causal sense where the
inherited part grows with depth and outweighs the injected one. The same models, run to the end, give stitched
accuracies: blocks up to one, from one on, or one alone aggregated. OUR CHOICE throughout; single-layer and
cumulative averaging of accuracy is after Adilova et al., "Layer-wise Linear Mode Connectivity" (ICLR 2024).
"""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh

from fedjax_sim.engine.device_data import DeviceData
from fedjax_sim.engine.round import MergeView
from fedjax_sim.probes.peel import moments
from fedjax_sim.probes.peel.clients import each_client
from fedjax_sim.probes.peel.forward import Forward
from fedjax_sim.records import Row, make_row

PARTS = ("total", "injected", "inherited", "interaction")
STITCHES = ("prefix", "single", "suffix")


def masks(depth: int) -> np.ndarray:
    """Which blocks are aggregated in each chimera: bool[1 + 3 L, L].

    None; blocks 0 … b; block b alone; blocks b … L-1; for b = 0 … L-1 each.
    """
    block, upto = np.arange(depth)[None], np.arange(depth)[:, None]
    return np.concatenate([np.zeros((1, depth), bool), block <= upto, block == upto, block >= upto])


@dataclasses.dataclass(frozen=True)
class Chimeras:
    """Measures rounds; the engine compiles it (`fedjax_sim.engine.observing.Observer`).

    Attributes:
      forward: the model on samples.
      mesh: devices, over which the measured clients are sharded.
    """

    forward: Forward
    mesh: Mesh

    def observe(self, view: MergeView, inputs: Any, data: DeviceData) -> dict[str, jax.Array]:
        """log_c f32[m, 1 + 3 L, L] at each peel point, accuracy f32[m, 1 + 3 L]; in the order of `masks`."""
        models, pool = (view.before, view.after), inputs["test"] or data.train
        return each_client(self.mesh, self._client, models, inputs["measured"], pool)

    def _client(self, own, pool):
        (before, after), measured = own
        place = self.forward.model.blocks()

        def one(mask):
            pick: Any = traverse_util.path_aware_map(
                lambda path, _: jnp.int32(place[cast(Any, path)]), before
            )
            mixed = jax.tree.map(lambda b, old, new: jnp.where(mask[b], new, old), pick, before, after)

            def seen(images, labels, valid):
                logits, features = self.forward.features(mixed, images)
                right = ((jnp.argmax(logits, -1) == labels) & valid).sum().astype(jnp.float32)
                return right, self.forward.moments(features, labels, valid)

            def added(old, new):
                return old[0] + new[0], moments.merge(old[1], new[1])

            right, found = self.forward.over(measured, pool, seen, added)
            traces = moments.traces(found)
            count = measured["count"].astype(jnp.float32)  # of none the accuracy is not defined: 0/0
            return jnp.log(traces.within / traces.between), right / count

        log_c, accuracy = jax.lax.map(one, jnp.asarray(masks(len(self.forward.model.peel_points))))
        return {"log_c": log_c, "accuracy": accuracy}

    def rows(self, number: int, ids: np.ndarray, out: dict[str, np.ndarray], counts: np.ndarray) -> list[Row]:
        """The tidy rows of a round: `chimera_*` by layer, and `stitched_*` by block.

        Args:
          number: of the round, from 1.
          ids: i32[m], the clients that were looked at.
          out: what `observe` returned, log_c f32[m, 1 + 3 L, L] and accuracy f32[m, 1 + 3 L].
          counts: not used.
        """
        del counts
        made = []
        names = [point.name for point in self.forward.model.peel_points]
        depth = len(names)

        def add(metric, value, **where):
            made.append(make_row(number, metric, value, **where))

        for client, log_c, accuracy in zip(ids.tolist(), out["log_c"], out["accuracy"], strict=True):
            for part, values in decompose(log_c).items():
                for name, value in zip(names[1:], values, strict=True):
                    add(f"chimera_{part}", value, layer=name, client=client)
            add("stitched_none", accuracy[0], client=client)
            for kind, stitch in enumerate(STITCHES):
                for name, value in zip(names, accuracy[1 + kind * depth :][:depth], strict=True):
                    add(f"stitched_{stitch}", value, layer=name, client=client)
        return made


def decompose(log_c: np.ndarray) -> dict[str, np.ndarray]:
    """Log C of one client's chimeras, f64[1 + 3 L, L] -> part -> f64[L - 1], by layer from the second on."""
    log_c = np.asarray(log_c, np.float64)
    depth = log_c.shape[1]
    own, prefix, single = log_c[0], log_c[1 : depth + 1], log_c[depth + 1 : 2 * depth + 1]
    reads = np.arange(1, depth)  # the feature that enters layer j has come through blocks 0 … j-1
    with np.errstate(invalid="ignore"):
        total = prefix[reads - 1, reads] - own[reads]
        injected = single[reads - 1, reads] - own[reads]
        inherited = np.where(reads > 1, prefix[reads - 2, reads], own[reads]) - own[reads]
        parts = (total, injected, inherited, total - injected - inherited)
    return dict(zip(PARTS, parts, strict=True))
