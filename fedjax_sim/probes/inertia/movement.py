"""How far each layer of the deployed model moves in a round, and whether clients' moves cancel.

w̄ʳ is the deployed model after round r, of which l is one weight tensor; Δ_k = w_k − (what k started from) and
g_k the gradient of client k's last step. One row a (round, layer, metric):

    inertia_step           ‖w̄ʳ_l − w̄ʳ⁻¹_l‖ / ‖w̄ʳ⁻¹_l‖, ρ
    inertia_displacement   ‖w̄ʳ_l − w̄ˢ_l‖ / ‖w̄ˢ_l‖ from the reference round s, and from it too:
    inertia_cosine         cosine of w̄ʳ_l and w̄ˢ_l
    inertia_l1, inertia_l2 their distances
    inertia_update         mean_k ‖Δ_k,l‖
    inertia_cancellation   ‖mean_k Δ_k,l‖ / mean_k ‖Δ_k,l‖: 1 where clients move alike, 0 where moves cancel
    gradient_norm          mean_k ‖g_k,l‖
    gradient_diversity     mean_k ‖g_k,l‖² / ‖mean_k g_k,l‖²: 1 where gradients agree,
                           K where they are orthogonal, more where they oppose
    gradient_spread        root of mean_k ‖g_k,l − mean_k g_k,l‖², to some 3e-4 of gradient_norm

FOUND in the code of LIPS (arXiv 2506.00932): cosine, L1 and L2 from the model after the third round, and the
norm of clients' gradients. Its own formal definition of inertia could not be read; that small steps of middle
layers are meant is INFERRED. OUR CHOICE: relative steps and displacement, which compare layers of different
size, and the ratio of cancellation, which tells layers that clients leave alone from layers whose moves
cancel. Gradient diversity is that of Yin et al., "Gradient Diversity: a Key Ingredient for Scalable
Distributed Learning", AISTATS 2018, times K. Means are over clients, uniform, without those left out.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct, traverse_util

from fedjax_sim.config import InertiaConfig
from fedjax_sim.core.algorithm import Cohort
from fedjax_sim.core.model import Model
from fedjax_sim.engine.setup import DiagnosticContext
from fedjax_sim.records import Row, make_row

Path = tuple[str, ...]

METRICS = (
    "inertia_step", "inertia_displacement", "inertia_cosine", "inertia_l1", "inertia_l2", "inertia_update",
    "inertia_cancellation", "gradient_norm", "gradient_diversity", "gradient_spread",
)  # fmt: skip
OF_REFERENCE = METRICS[1:5]


def weight_layers(model: Model) -> dict[str, Path]:
    """Name -> path of every weight tensor in network order: all parameters of two or more axes.

    A kernel is named after its module (`block1/conv2`), others by their whole path.
    """
    shapes: Any = traverse_util.flatten_dict(model.abstract)
    paths = [p for p in model.layer_order() if p[0] == "params" and len(shapes[p].shape) > 1]
    return {"/".join(path[1:-1] if path[-1] == "kernel" and path[1:-1] else path[1:]): path for path in paths}


@struct.dataclass
class Clients:
    """Of one client, L layers.

    Attributes:
      counted: f32[], 1.
      update: f32[L], ‖Δ_k,l‖.
      gradient: f32[L], ‖g_k,l‖.
    """

    counted: jax.Array
    update: jax.Array
    gradient: jax.Array


@dataclasses.dataclass(frozen=True)
class Movement:
    """The meter (`fedjax_sim.engine.round.Meter`).

    Attributes:
      model: the network.
      reference: s, the round, from 1, after which the reference is taken.
      gradients: it looks at clients' gradients.
    """

    model: Model
    reference: int
    gradients: bool = True

    @functools.cached_property
    def _paths(self) -> dict[str, Path]:
        return weight_layers(self.model)

    def _layers(self, variables: Any) -> list[jax.Array]:
        flat: Any = traverse_util.flatten_dict(variables)
        return [flat[path].astype(jnp.float32) for path in self._paths.values()]

    # --- inside the round ---------------------------------------------------------------------------

    def init(self, deployed: Any) -> list[jax.Array]:
        """The reference, of which nothing is read before it is taken."""
        return self._layers(deployed)

    def per_client(self, start: Any, trained: Any, gradient: Any) -> Clients:
        """One client's norms."""
        update = [b - a for a, b in zip(self._layers(start), self._layers(trained), strict=True)]
        return Clients(jnp.float32(1), _norms(update), _norms(self._layers({"params": gradient})))

    def summand(self, start: Any, trained: Any, gradient: Any) -> Any:
        """One client's update and gradient."""
        update = [b - a for a, b in zip(self._layers(start), self._layers(trained), strict=True)]
        return {"update": update, "gradient": self._layers({"params": gradient})}

    def finish(self, carried: Any, cohort: Cohort, old: Any, new: Any, each: Clients, mean: Any):
        """(reference, metric -> f32[L]).

        Args:
          carried: the reference, an array for each of L layers.
          cohort: of the round.
          old: the deployed model before the round.
          new: the deployed model after it.
          each: norms of each client, [K, …], zero where an update was left out.
          mean: of `summand` over the clients that were not left out.
        """
        before, after = self._layers(old), self._layers(new)
        number = cohort.round + 1
        reference = jax.lax.cond(number <= self.reference, lambda a, b: a, lambda a, b: b, after, carried)
        step = [b - a for a, b in zip(before, after, strict=True)]
        away = [b - a for a, b in zip(reference, after, strict=True)]
        count = jnp.maximum(each.counted.sum(), 1)
        update, gradient = each.update.sum(0) / count, each.gradient.sum(0) / count
        square = (each.gradient * each.gradient).sum(0) / count
        agreed = _norms(mean["gradient"])
        scale, length = _norms(reference), _norms(after)
        dots = jnp.stack([(a * b).sum() for a, b in zip(reference, after, strict=True)])
        return reference, {
            "inertia_step": _norms(step) / _norms(before),
            "inertia_displacement": _norms(away) / scale,
            "inertia_cosine": dots / (scale * length),
            "inertia_l1": jnp.stack([jnp.abs(a).sum() for a in away]),
            "inertia_l2": _norms(away),
            "inertia_update": update,
            "inertia_cancellation": _norms(mean["update"]) / update,
            "gradient_norm": gradient,
            "gradient_diversity": square / (agreed * agreed),
            "gradient_spread": jnp.sqrt(jnp.maximum(square - agreed * agreed, 0)),
        }

    # --- on the host --------------------------------------------------------------------------------

    def rows(self, number: int, said: dict[str, np.ndarray]) -> list[Row]:
        """The tidy rows of a round; up to the reference round without those that compare with it.

        Args:
          number: of the round, from 1.
          said: metric -> f32[L], what `finish` said of it.
        """
        return [
            make_row(number, metric, value, layer=layer)
            for metric in METRICS
            if number > self.reference or metric not in OF_REFERENCE
            for layer, value in zip(self._paths, said[metric], strict=True)
        ]


@dataclasses.dataclass(frozen=True)
class LayerMovement:
    """The diagnostic, as it plugs into a run.

    Attributes:
      settings: the section `inertia` of a configuration.
    """

    settings: InertiaConfig

    def build(self, context: DiagnosticContext) -> Movement:
        """See `fedjax_sim.engine.setup.MeterConfig`."""
        return Movement(context.setup.model, self.settings.reference)


def _norms(leaves: list[jax.Array]) -> jax.Array:
    return jnp.stack([jnp.sqrt((leaf * leaf).sum()) for leaf in leaves])
