"""FedOpt: an optimiser on the server, on top of any algorithm that averages.

Reddi, Charles, Zaheer, Garrett, Rush, Konečný, Kumar, McMahan. Adaptive Federated Optimization. ICLR 2021.
https://arxiv.org/abs/2003.00295
Hsu, Qi, Brown. Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification.
2019. https://arxiv.org/abs/1909.06335

FedAdam and FedYogi are the first paper's, FedAvgM the second's. x: the server's model, x': what the algorithm
inside makes of it in a round (for FedAvg the mean).

    g        <-  x − x'                                        the pseudo-gradient
    FedAvgM      v ← β v + g,             x ← x − η v
    FedAdam      m ← β₁ m + (1 − β₁) g,   v ← β₂ v + (1 − β₂) g²,               x ← x − η m̂ / (√v̂ + τ)
    FedYogi      m ← β₁ m + (1 − β₁) g,   v ← v − (1 − β₂) g² sign(v − g²),     x ← x − η m̂ / (√v̂ + τ)

with m̂ = m / (1 − β₁^t) and v̂ = v / (1 − β₂^t) after t rounds. m and v are 0 at the start, and Yogi's v is
10⁻⁶. The optimisers are optax's, but for that m: optax's Yogi has 10⁻⁶ there as well, with which a weight
without any gradient moves (and does so under `fedopt`, which takes any of optax's as it is). FOUND in Reddi
et al.: β₁ = 0.9, β₂ = 0.99, τ = 10⁻³; no bias correction (m and v as they are), and v = τ² at the start. η is
tuned there for every task; OUR CHOICE as defaults: 0.01 for both, and for FedAvgM 1, with the β = 0.9 of Hsu
et al.'s experiments.

Batch statistics do not pass through the optimiser. After a round in which every client was left out nothing
has changed, the optimiser's memory neither. An algorithm is refused whose rounds are more than an
average (`Algorithm.with_model`): it has a step rule of its own, K models, or makes clients start from another
model than x (LIPS), of which the optimiser would take the difference for progress.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from flax import struct

from fedjax_sim.algorithms import shared
from fedjax_sim.algorithms.card import Card
from fedjax_sim.algorithms.fedavg import FedAvg
from fedjax_sim.algorithms.wrap import Layer, wrap
from fedjax_sim.core import optimizers
from fedjax_sim.core.algorithm import Algorithm, AlgorithmConfig, Context
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.fields import check, positive, within


@struct.dataclass
class FedOptState:
    """Attributes: inner: the state of the algorithm inside, with x. memory: the optimiser's."""

    inner: Any
    memory: Any


@dataclasses.dataclass(frozen=True)
class FedOpt:
    """Any optimiser of optax on the server of another algorithm.

    Attributes:
      optimizer: its name (`adam`, `sgd`, `lion` …).
      lr: η, its learning rate; None: 1, at which sgd is `inner`, and others must be told.
      options: its further arguments (`{b2: 0.99, eps: 1e-3}`); others are optax's defaults.
      inner: the algorithm that averages.
    """

    card: ClassVar[Card] = Card(
        "fedopt",
        besides="the optimiser's state on the server",
        defaults="ours",
        holds="SGD at 1 is what it wraps",
    )

    optimizer: str = "sgd"
    lr: float | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    inner: AlgorithmConfig = dataclasses.field(default_factory=FedAvg)

    def __post_init__(self):
        check(self, "algorithm.")
        if self.lr is not None:
            positive("algorithm.lr", self.lr)
        elif self.optimizer != "sgd":
            raise UserError(
                "algorithm.lr",
                None,
                f"what rate suits {self.optimizer} is not known; at 1 it may move every weight by about 1",
                "Set it (0.01, say).",
            )

    def build(self, context: Context) -> Algorithm:
        """The record of pure functions.

        Raises:
          UserError: optax has no such optimiser, or it takes no such option; it wants more than a gradient;
            the server inside does more than to average.
        """
        return with_server_optimizer(
            self.inner,
            optimizers.make(self.optimizer, self.lr or 1.0, self.options, "algorithm"),
            context,
        )


@dataclasses.dataclass(frozen=True)
class FedAvgM:
    """Server momentum on top of another algorithm (https://arxiv.org/abs/1909.06335).

    Attributes:
      lr: η, the server's learning rate.
      momentum: β; with 0 and η = 1 it is `inner`.
      nesterov: whether it is Nesterov's.
      inner: the algorithm that averages.
    """

    card: ClassVar[Card] = Card(
        "fedavgm",
        besides="1 momentum on the server",
        defaults="Hsu et al. (β); ours (η)",
        holds="β = 0, η = 1 is what it wraps",
    )

    lr: float = 1.0
    momentum: float = 0.9
    nesterov: bool = False
    inner: AlgorithmConfig = dataclasses.field(default_factory=FedAvg)

    def __post_init__(self):
        check(self, "algorithm.")
        positive("algorithm.lr", self.lr)
        within("algorithm.momentum", self.momentum, 0.0, 1.0, open_right=True)

    def build(self, context: Context) -> Algorithm:
        """The record of pure functions. Raises UserError if the server inside does more than to average."""
        # optax would keep one for 0 as well
        momentum = self.momentum if optimizers.is_on(self.momentum) else None
        return with_server_optimizer(
            self.inner, optax.sgd(self.lr, momentum=momentum, nesterov=self.nesterov), context
        )


@dataclasses.dataclass(frozen=True)
class _Adaptive:
    """What FedAdam and FedYogi have in common: their settings."""

    lr: float = 0.01
    b1: float = 0.9
    b2: float = 0.99
    tau: float = 1e-3
    inner: AlgorithmConfig = dataclasses.field(default_factory=FedAvg)

    def __post_init__(self):
        check(self, "algorithm.")
        positive("algorithm.lr", self.lr)
        positive("algorithm.tau", self.tau, divides=True)
        within("algorithm.b1", self.b1, 0.0, 1.0, open_right=True)
        within("algorithm.b2", self.b2, 0.0, 1.0, open_right=True)


@dataclasses.dataclass(frozen=True)
class FedAdam(_Adaptive):
    """Adam on the server of another algorithm.

    Attributes:
      lr: η, the server's learning rate.
      b1: β₁, how slowly m forgets.
      b2: β₂, how slowly v forgets.
      tau: τ, how adaptive it is.
      inner: the algorithm that averages.
    """

    card: ClassVar[Card] = Card(
        "fedadam",
        besides="2 moments on the server",
        defaults="Reddi et al.; ours (η)",
        holds="four rounds by hand, as optax has it",
    )

    def build(self, context: Context) -> Algorithm:
        """The record of pure functions. Raises UserError if the server inside does more than to average."""
        return with_server_optimizer(
            self.inner, optax.adam(self.lr, b1=self.b1, b2=self.b2, eps=self.tau), context
        )


@dataclasses.dataclass(frozen=True)
class FedYogi(_Adaptive):
    """Yogi on the server of another algorithm.

    Attributes:
      lr: η, the server's learning rate.
      b1: β₁, how slowly m forgets.
      b2: β₂, how slowly v forgets.
      tau: τ, how adaptive it is.
      inner: the algorithm that averages.
    """

    card: ClassVar[Card] = Card(
        "fedyogi",
        besides="2 moments on the server",
        defaults="Reddi et al.; ours (η)",
        holds="four rounds by hand; a weight without gradients stays",
    )

    def build(self, context: Context) -> Algorithm:
        """The record of pure functions. Raises UserError if the server inside does more than to average."""
        yogi = optax.yogi(self.lr, b1=self.b1, b2=self.b2, eps=self.tau)

        def init(params):
            return optax.tree.set(yogi.init(params), mu=optax.tree.zeros_like(params))

        return with_server_optimizer(self.inner, optax.GradientTransformation(init, yogi.update), context)


def with_server_optimizer(
    config: AlgorithmConfig, optimizer: optax.GradientTransformation, context: Context
) -> Algorithm:
    """The algorithm of `config` with an optimiser on its server."""
    inner = shared.build_inner(config, context)
    with_model = inner.with_model
    if with_model is None:
        # What goes around another algorithm has as much of a server as that one.
        depth, culprit = max(
            (depth, one)
            for depth, one in enumerate([config, *shared.nested(config)], 1)
            if one.build(context).with_model is None
        )
        raise UserError(
            "algorithm" + depth * ".inner",
            type(culprit).__name__,
            "a round of it is more than an average, and leaves no step to an optimiser",
            "Choose one that averages (fedavg, fedprox, fednova, clusamp, fedgen, fedper …).",
        )

    def merge(inside, state, cohort, starts, results, key):
        x = inner.deploy(state.inner)["params"]
        new, metrics = inside(state, cohort, starts, results, key)
        model = inner.deploy(new.inner)
        gradient = jax.tree.map(jnp.subtract, x, model["params"])
        with jax.numpy_dtype_promotion("standard"):  # optax's bias correction: a float and an int32
            updates, memory = optimizer.update(gradient, state.memory, x)
        # Where nobody is left, momentum alone would go on.
        anyone = results.included.any()
        keep = lambda new, old: jnp.where(anyone, new, old)  # noqa: E731
        params = jax.tree.map(keep, optax.apply_updates(x, updates), x)
        memory = jax.tree.map(keep, memory, state.memory)
        return FedOptState(with_model(new.inner, {**model, "params": params}), memory), metrics

    def init(inside, key, variables):
        return FedOptState(inside(key, variables), optimizer.init(variables["params"]))

    layer = Layer(pairs=("state",), init=init, merge=merge, keeps_model=False, steps_beyond_mean=True)
    return wrap(inner, layer)
