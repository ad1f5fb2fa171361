"""FedRoD: one body, a head that is fair to all classes, and a private head for the client's own mix.

Chen, Chao. On Bridging Generic and Personalized Federated Learning for Image Classification. ICLR 2022.
https://arxiv.org/abs/2107.00778

With z the representation, W the generic head, P the private one, and n_c the client's samples of class c,

    generic    CE(W z + log n, y)          the balanced softmax, which trains body and W
    personal   CE(sg(W z) + P sg(z), y)    which trains P alone; sg: no gradient

and a client predicts by W z + P z, the generic model by W z. FOUND in the code that LIPS builds on: both
losses, their sum minimised by one optimiser, P kept on its client. In that code z has a gradient in the
personal loss too, which so trains the body: `personal_loss: both`. By default it has none, as the paper's two
predictors are decoupled (INFERRED; PFLlib has it so too). OUR CHOICE: P starts at zero, so that a client that
has not taken part predicts as the generic model does. The paper's other form of P, made by a hypernetwork
from the client's mix of classes, is not here: its authors' repository held no code, so that its sizes are NOT
FOUND.

One more classifier a client is kept. The training loss in the records is the generic one. With
`local.clip_norm` the gradients of both losses are clipped as one.
"""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import optax
from flax import struct

from fedjax_sim.algorithms.card import Card
from fedjax_sim.algorithms.fedavg import FedAvg
from fedjax_sim.algorithms.wrap import Layer, wrap
from fedjax_sim.core import gradients
from fedjax_sim.core.algorithm import Algorithm, Context
from fedjax_sim.core.fields import check
from fedjax_sim.core.model import apply_dense
from fedjax_sim.core.task import masked_mean

OWN = "personal head"
"""Where P stands during training, in the parameters beside the model's modules."""


@struct.dataclass
class Client:
    """Attributes: head: P, like the model's classifier. labels: i32[C], n."""

    head: Any
    labels: jax.Array


@dataclasses.dataclass(frozen=True)
class FedRoD:
    """Robust decoupling, over averaging.

    Attributes:
      weights: of the mean, by `samples` or `uniform`.
      personal_loss: what it trains, P alone (`head`) or the body too (`both`), see above.
    """

    card: ClassVar[Card] = Card(
        "fedrod",
        keeps="1 classifier and label counts",
        defaults="of the paper (inferred)",
        holds="a client's model is the sum of heads",
    )

    weights: Literal["samples", "uniform"] = "samples"
    personal_loss: Literal["head", "both"] = "head"

    def __post_init__(self):
        check(self, "algorithm.")

    def build(self, context: Context) -> Algorithm:
        """The record of pure functions. Raises UserError if the model marks no representation."""
        model = context.model
        context.needs_classes("FedRoD")
        model.check_classifier("FedRoD")

        def receive(inside, variables, client, broadcast, key):
            del inside, broadcast, key
            return {**variables, "params": {**variables["params"], OWN: client.head}}

        def send(variables):
            params = {name: part for name, part in variables["params"].items() if name != OWN}
            return {**variables, "params": params}

        def start_round(inside, start, client, broadcast):
            del inside, start, broadcast
            n = client.labels
            return jnp.where(n > 0, jnp.log(jnp.maximum(n, 1).astype(jnp.float32)), -1e9)

        def loss(apply, variables, batch, log_n):
            entropy = optax.softmax_cross_entropy_with_integer_labels
            head = variables["params"][OWN]
            logits, z, moved = apply.represent(send(variables), batch)
            generic = masked_mean(entropy(logits + log_n[None], batch["label"]), batch.mask)
            seen = z if self.personal_loss == "both" else jax.lax.stop_gradient(z)
            beside = jax.lax.stop_gradient(logits) + apply_dense(head, seen)
            personal = masked_mean(entropy(beside, batch["label"]), batch.mask)
            told = generic + personal - jax.lax.stop_gradient(personal)
            return told, {**moved, "params": {**moved["params"], OWN: head}}

        def finish_round(inside, start, trained, client, *rest):
            del inside, start, rest
            return Client(trained["params"][OWN], client.labels), None

        def personal(inside, client, variables):
            del inside
            return _with_head(variables, model.classifier, client.head)

        def init_client(inside, variables, labels):
            del inside
            return Client(optax.tree.zeros_like(model.head(variables)), labels)

        own_loss = gradients.of_loss(loss)
        return wrap(
            FedAvg(weights=self.weights).build(context),
            Layer(
                init_client=init_client,
                receive=receive,
                start_round=start_round,
                gradient=lambda inside, *args: own_loss(*args),
                finish_round=finish_round,
                send=lambda inside, variables: send(variables),
                personal=personal,
            ),
        )


def _with_head(variables, path, head):
    """The variables with `head` added to the classifier: W z + P z is one dense layer."""

    def added(tree, path):
        if not path:
            return jax.tree.map(jnp.add, tree, head)
        return {**tree, path[0]: added(tree[path[0]], path[1:])}

    return {**variables, "params": added(variables["params"], path)}
