"""Ditto: every client also trains a model of its own, held near the global one.

Li, Hu, Beirami, Smith. Ditto: Fair and Robust Federated Learning Through Personalization. ICML 2021.
https://arxiv.org/abs/2012.04221

    v_k ← v_k − η (∇F_k(v_k) + λ (v_k − x))

x: the model received. v_k starts as the initial model and stays with its client, which uses it; the algorithm
inside never sees it. v_k takes a step on each batch on which the global model takes one, as FOUND in the
authors' code (litian96/ditto). Its scripts have λ = 1, or let a client choose among 0.1, 1 and 2. OUR CHOICE:
the default 0.1, and that v_k has the clients' optimiser with all its settings, where the code has plain SGD.
F_k is the plain cross-entropy, whatever the algorithm inside adds to its own; and if clients inside have
personal models of another kind, v_k takes their place. Ditto is in neither of the code
bases of FedMR and LIPS.

Two passes a step; one model a client is kept. The training loss in the records is the global model's. With
`local.clip_norm` the gradients of both models are clipped as one, and a client of which either model is not
finite is left out with both.
"""

import dataclasses
from typing import ClassVar

import jax

from fedjax_sim.algorithms import shared
from fedjax_sim.algorithms.card import Card
from fedjax_sim.algorithms.fedavg import FedAvg
from fedjax_sim.algorithms.wrap import Layer, wrap
from fedjax_sim.core.algorithm import Algorithm, AlgorithmConfig, Context, Step
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.fields import at_least, check

OWN = "own model"
"""Where v_k stands during training, in each collection of the variables beside the global model's modules."""


@dataclasses.dataclass(frozen=True)
class Ditto:
    """A personal model beside those of another algorithm.

    Attributes:
      inner: the algorithm.
      strength: λ; 0 lets clients train alone, as far as their own models go.
    """

    card: ClassVar[Card] = Card(
        "ditto",
        keeps="1 model",
        passes="2",
        defaults="one of Li et al.'s",
        holds="the shared model is what it wraps",
    )

    inner: AlgorithmConfig = dataclasses.field(default_factory=FedAvg)
    strength: float = 0.1

    def __post_init__(self):
        check(self, "algorithm.")
        at_least("algorithm.strength", self.strength, 0)

    def build(self, context: Context) -> Algorithm:
        """The record of pure functions. Raises UserError if clients inside train more than the model sent."""
        inner = shared.build_inner(self.inner, context)
        if inner.local.send is not None:
            raise UserError(
                "algorithm.inner",
                type(self.inner).__name__,
                "its clients already train something of their own beside the model they were sent",
                "Choose another algorithm for Ditto to go around.",
            )

        def init_client(inside, variables, labels):
            return {"v": dict(variables), "inner": inside(variables, labels)}

        def receive(inside, model, kept, broadcast, key):
            return _joined(inside(model, kept, broadcast, key), kept["v"])

        def start_round(inside, start, kept, broadcast):
            x = _shared(start)
            return {"x": x["params"], "inner": inside(x, kept, broadcast)}

        def gradient(inside, loss_and_grad, variables, batch, extra):
            step = Step(*inside(loss_and_grad, _shared(variables), batch, extra))
            v = _own(variables)
            (_, moved), g = loss_and_grad(v, batch)
            g = jax.tree.map(lambda g, v, x: g + self.strength * (v - x), g, v["params"], extra["x"])
            return step._replace(
                variables=_joined(step.variables, moved),
                gradient={**step.gradient, OWN: g},
                moves=step.moves and _joined(step.moves, jax.tree.map(lambda leaf: True, v)),
            )

        def finish_round(inside, start, trained, kept, extra, steps, lr, gradient):
            rest = (kept, extra, steps, lr, gradient and _without(gradient))
            new, upload = inside(_shared(start), _shared(trained), *rest)
            return new | {"v": _own(trained)}, upload

        return wrap(
            inner,
            Layer(
                pairs=("client", "extra"),
                init_client=init_client,
                receive=receive,
                start_round=start_round,
                gradient=gradient,
                finish_round=finish_round,
                send=lambda inside, variables: _shared(variables),
                personal=lambda inside, kept, model: kept["v"],
            ),
        )


def _joined(model, v):
    """Both models as one."""
    return {name: {**model[name], OWN: v[name]} for name in model}


def _shared(variables):
    """The global model of both."""
    return {name: _without(part) for name, part in variables.items()}


def _own(variables):
    """The personal model of both."""
    return {name: part[OWN] for name, part in variables.items()}


def _without(part):
    return {name: leaf for name, leaf in part.items() if name != OWN}
