"""FedSAM and FedASAM: clients seek flat minima, by the gradient at the worst point near the weights.

Foret, Kleiner, Mobahi, Neyshabur. Sharpness-Aware Minimization for Efficiently Improving Generalization.
ICLR 2021. https://arxiv.org/abs/2010.01412
Kwon, Kim, Park, Choi. ASAM: Adaptive Sharpness-Aware Minimization … ICML 2021.
https://arxiv.org/abs/2102.11600
Federated: Qu et al., Generalized Federated Learning via Sharpness Aware Minimization, ICML 2022
(FedSAM); Caldarola, Caputo, Ciccone, Improving Generalization in Federated Learning by Seeking Flat Minima,
ECCV 2022 (FedSAM and FedASAM, there also with weight averaging on the server, which is not here).

With g = ∇F_k(w) on a batch the step's gradient is taken at w + ε:

    SAM    ε = ρ g / ‖g‖                       over all parameters
    ASAM   ε = ρ T² g / ‖T g‖                  T = |w| + η for weights, 1 for biases and shifts

FOUND in the code of ASAM's authors: weights are the tensors that PyTorch names so, which are kernels and the
scales of normalisation; ρ = 0.5, η = 0.01 by default, and ρ = 0.05 for SAM on CIFAR-10. FOUND in the code of
FedMR: the same, ρ = 0.1, η = 0. In both, the second pass moves running batch statistics on as well; here the
first alone does, so that ρ = 0 is the algorithm inside (OUR CHOICE). The training loss in the records is that
at w. Leaves that the algorithm inside holds fixed take no part in ‖g‖ and ε.

Two passes a step.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from fedjax_sim.algorithms.addition import Addition, with_addition
from fedjax_sim.algorithms.card import Card
from fedjax_sim.algorithms.fedavg import FedAvg
from fedjax_sim.core.algorithm import Algorithm, AlgorithmConfig, Context
from fedjax_sim.core.fields import at_least, check


@dataclasses.dataclass(frozen=True)
class FedSAM:
    """SAM on the clients of another algorithm.

    Attributes:
      inner: the algorithm.
      rho: ρ, radius of the neighbourhood; 0 is `inner`.
    """

    card: ClassVar[Card] = Card(
        "fedsam", passes="2", defaults="Foret et al. (ρ)", holds="ρ = 0 is what it wraps"
    )

    inner: AlgorithmConfig = dataclasses.field(default_factory=FedAvg)
    rho: float = 0.05

    def __post_init__(self):
        check(self, "algorithm.")
        at_least("algorithm.rho", self.rho, 0)

    def build(self, context: Context) -> Algorithm:
        """The record of pure functions."""
        return _climbing(self, lambda w: jax.tree.map(jnp.ones_like, w), context, "FedSAM")


@dataclasses.dataclass(frozen=True)
class FedASAM:
    """ASAM on the clients of another algorithm (https://arxiv.org/abs/2102.11600).

    Attributes:
      inner: the algorithm.
      rho: ρ, radius of the neighbourhood, relative to the weights; 0 is `inner`.
      eta: η, added to |w|.
    """

    card: ClassVar[Card] = Card(
        "fedasam", passes="2", defaults="code of FedMR", holds="ρ = 0 is what it wraps"
    )

    inner: AlgorithmConfig = dataclasses.field(default_factory=FedAvg)
    rho: float = 0.1
    eta: float = 0.0

    def __post_init__(self):
        check(self, "algorithm.")
        at_least("algorithm.rho", self.rho, 0)
        at_least("algorithm.eta", self.eta, 0)

    def build(self, context: Context) -> Algorithm:
        """The record of pure functions."""

        def scale(w):
            def of(path, leaf):
                name = path[-1].key
                is_weight = name == "scale" or (leaf.ndim > 1 and name != "bias")
                return jnp.abs(leaf) + self.eta if is_weight else jnp.ones_like(leaf)

            return jax.tree_util.tree_map_with_path(of, w)

        return _climbing(self, scale, context, "FedASAM")


def _climbing(config: Any, scale: Any, context: Context, name: str) -> Algorithm:
    """Gradients at w + ρ T² g / ‖T g‖; scale: params -> T."""

    def direction(gradient, variables, batch, extra):
        del extra
        w = variables["params"]
        value, g = gradient(variables, batch)
        t = scale(w)
        square = sum((leaf * leaf).sum() for leaf in jax.tree.leaves(jax.tree.map(jnp.multiply, t, g)))
        length = jnp.sqrt(jnp.where(square > 0, square, 1))
        above = jax.tree.map(lambda w, t, g: w + config.rho / length * t * t * g, w, t, g)
        return value, gradient({**variables, "params": above}, batch)[1]

    return with_addition(config.inner, Addition(direction=direction), context, name)
