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

import jax

from fedjax_sim.algorithms import shared
from fedjax_sim.algorithms.fedavg import FedAvg
from fedjax_sim.core.algorithm import Algorithm, AlgorithmConfig, Context
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.fields import at_least, check
from fedjax_sim.core.task import task_loss

OWN = "own model"
"""Where v_k stands during training, in each collection of the variables beside the global model's modules."""


@dataclasses.dataclass(frozen=True)
class Ditto:
    """A personal model beside those of another algorithm.

    Attributes:
      inner: the algorithm.
      strength: λ; 0 lets clients train alone, as far as their own models go.
    """

    inner: AlgorithmConfig = dataclasses.field(default_factory=FedAvg)
    strength: float = 0.1

    def __post_init__(self):
        check(self, "algorithm.")
        at_least("algorithm.strength", self.strength, 0)

    def build(self, context: Context) -> Algorithm:
        """The record of pure functions. Raises UserError if clients inside train more than the model sent."""
        inner = shared.build_inner(self.inner, context)
        rule = inner.local
        if rule.send is not None:
            raise UserError(
                "algorithm.inner",
                type(self.inner).__name__,
                "its clients already train something of their own beside the model they were sent",
                "Choose another algorithm for Ditto to go around.",
            )

        def init_client(variables, labels):
            inside = rule.init_client(variables, labels) if rule.init_client else None
            return {"v": dict(variables), "inner": inside}

        def receive(model, kept, broadcast, key):
            if rule.receive is not None:
                model = rule.receive(model, kept["inner"], broadcast, key)
            return _joined(model, kept["v"])

        def start_round(start, kept, broadcast):
            x = _shared(start)
            return {"x": x["params"], "inner": rule.start_round(x, kept["inner"], broadcast)}

        # The gradient is asked for twice: of the model inside, and of v alone.
        def loss(apply, variables, batch, extra):
            if OWN not in variables["params"]:
                return rule.loss(apply, variables, batch, extra["inner"])
            value, moved = task_loss(apply, _own(variables), batch, None)
            return value, _joined({name: {} for name in moved}, moved)

        def direction(loss_and_grad, variables, batch, extra):
            (told, moved), g = rule.direction(loss_and_grad, _shared(variables), batch, extra["inner"])
            v = _own(variables)
            alone = _joined({name: {} for name in v}, v)
            (_, moved_v), g_v = loss_and_grad(alone, batch)
            g_v = jax.tree.map(lambda g, v, x: g + self.strength * (v - x), g_v[OWN], v["params"], extra["x"])
            return (told, _joined(moved, _own(moved_v))), {**g, OWN: g_v}

        def gather(loss_and_grad, batch, extra):
            assert rule.gather is not None
            return extra | {"inner": rule.gather(loss_and_grad, batch, extra["inner"])}

        def trains(variables, batch):
            assert rule.trains is not None
            every = jax.tree.map(lambda leaf: True, _own(variables))
            return _joined(rule.trains(_shared(variables), batch), every)

        def finish_round(start, trained, kept, extra, steps, lr, gradient):
            gradient = gradient and _without(gradient)
            start, model = _shared(start), _shared(trained)
            inside, upload = rule.finish_round(
                start, model, kept["inner"], extra["inner"], steps, lr, gradient
            )
            return {"v": _own(trained), "inner": inside}, upload

        return dataclasses.replace(
            inner,
            local=dataclasses.replace(
                rule,
                init_client=init_client,
                receive=receive,
                send=_shared,
                start_round=start_round,
                loss=loss,
                direction=direction,
                gather=rule.gather and gather,
                trains=rule.trains and trains,
                finish_round=finish_round,
                personal=lambda kept, model: kept["v"],
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
