"""FedGen: the server learns what clients' representations of each class look like, and hands that back.

Zhu, Hong, Zhou. Data-Free Knowledge Distillation for Heterogeneous Federated Learning. ICML 2021.
https://arxiv.org/abs/2105.10056

G(y, ε): a generator of representations (a dense layer of 512 with batch normalisation and ReLU, then one of
the representation's width) from a one-hot label and uniform noise of 100. h: the classifier of the model.

    server     min_G  Σ_k w_k(y) CE(h_k(G(y, ε)), y) + η exp(−mean_{i,j} ‖ε_i − ε_j‖ · |G_i − G_j|)
    client     CE(h(z), y) + a CE(h(G(ỹ, ε)), ỹ) + b KL(h(G(y, ε)) ‖ h(z)),   not in the first round

y: uniform over the cohort's classes; w_k(y): client k's share of its samples of class y; ỹ: uniform over the
classes that cohorts have shown so far. ‖ε_i − ε_j‖ is a mean of squares, |G_i − G_j| a mean of absolute
differences, over coordinates; i = j counts.

FOUND in the code of FedMR: the generator, which clients use with its running statistics; 50 steps a round of
a fresh Adam on 128 labels, weight decay 1e-2 within the gradient; η = 1, no adversarial student; the form of
the diversity term; no gradient for the teacher of the KL; and as settings (lr; a, b): CIFAR-10 3e-4; 0.2, 0.2
(the defaults here), CIFAR-100 1e-4; 10, 1, FEMNIST 3e-4; 10, 10. That code multiplies the mean of CE over y
by the mean of w_k(y), through a broadcast; here every y has its own weight, INFERRED as what was meant. Its ỹ
are uniform over all classes, 128 a step. OUR CHOICE: only such as have been shown, for which the generator
has been trained, and as many as a batch has places. The generator's weights are uniform within ±1/√(inputs),
like PyTorch's, its biases zero. FOUND in Zhu et al.'s own code, and not here: a and b decay by 0.98 a round,
and one Adam goes on over all rounds, its rate decaying likewise.

Clients send their classifier and label counts besides; they receive the generator.
"""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct

from fedjax_sim.algorithms.card import Card
from fedjax_sim.algorithms.distillation import divergence
from fedjax_sim.algorithms.fedavg import FedAvg
from fedjax_sim.core import gradients
from fedjax_sim.core.algorithm import Algorithm, Context, LocalRule, Starts
from fedjax_sim.core.fields import at_least, check, positive
from fedjax_sim.core.model import apply_dense
from fedjax_sim.core.task import masked_mean

NOISE, HIDDEN = 100, 512


class Generator(nn.Module):
    """G: f32[B, C] one-hot labels and f32[B, 100] noise -> f32[B, width]."""

    width: int

    @nn.compact
    def __call__(self, labels, noise, *, train=False):
        """`train`: batch statistics, which the running ones follow."""
        kernel = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        x = nn.Dense(HIDDEN, kernel_init=kernel)(jnp.concatenate([labels, noise], 1))
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return nn.Dense(self.width, kernel_init=kernel)(nn.relu(x))


@struct.dataclass
class FedGenState:
    """Attributes: model: x. generator: its variables. seen: f32[C], samples of each class shown so far."""

    model: Any
    generator: Any
    seen: jax.Array


@struct.dataclass
class Sent:
    """Attributes: generator: its variables. known: f32[C], 1 for classes shown so far; none: not trained."""

    generator: Any
    known: jax.Array


@dataclasses.dataclass(frozen=True)
class FedGen:
    """Data-free distillation through a generator.

    Attributes:
      a: weight of the generated samples; 0 with b = 0 is FedAvg.
      b: weight of the divergence from the generator's prediction for the sample's own class.
      diversity: η, weight of the term that keeps the generator's samples apart.
      generator_lr: of Adam.
      generator_decay: its weight decay.
      generator_steps: server steps a round.
      generator_batch: labels in each.
      weights: of the mean, by `samples` or `uniform`.
    """

    card: ClassVar[Card] = Card(
        "fedgen",
        keeps="its label counts",
        sends="1 + 1, the generator down, a head and counts up",
        passes="1, and the generator's forward",
        besides="50 generator steps on the server, on each device the same",
        defaults="code of FedMR, CIFAR-10",
        holds="a = b = 0 is FedAvg",
    )

    a: float = 0.2
    b: float = 0.2
    diversity: float = 1.0
    generator_lr: float = 3e-4
    generator_decay: float = 1e-2
    generator_steps: int = 50
    generator_batch: int = 128
    weights: Literal["samples", "uniform"] = "samples"

    def __post_init__(self):
        check(self, "algorithm.")
        for name in ("a", "b", "diversity", "generator_decay"):
            at_least(f"algorithm.{name}", getattr(self, name), 0)
        positive("algorithm.generator_lr", self.generator_lr)
        at_least("algorithm.generator_steps", self.generator_steps, 1)
        at_least("algorithm.generator_batch", self.generator_batch, 2)

    def build(self, context: Context) -> Algorithm:
        """The record of pure functions. Raises UserError if the model marks no representation."""
        model = context.model
        context.needs_classes("FedGen")
        model.check_classifier("FedGen")
        return _Built(self, context).algorithm()


@dataclasses.dataclass(frozen=True)
class _Built:
    """The pure functions of one FedGen."""

    config: FedGen
    context: Context

    def algorithm(self) -> Algorithm:
        """The record."""
        return dataclasses.replace(
            FedAvg(weights=self.config.weights).build(self.context),
            init=self.init,
            dispatch=self.dispatch,
            merge=self.merge,
            deploy=lambda state: state.model,
            local=LocalRule(
                start_round=lambda start, labels, sent: {"labels": labels, "sent": sent},
                gradient=gradients.of_loss(self.loss),
                finish_round=self.finish_round,
                init_client=lambda variables, labels: labels,
            ),
        )

    @property
    def _classes(self) -> int:
        return self.context.model.outputs

    @property
    def _optimizer(self) -> optax.GradientTransformation:
        decay = optax.add_decayed_weights(self.config.generator_decay)
        return optax.chain(decay, optax.adam(self.config.generator_lr))

    def _generator(self, variables: Any) -> Generator:
        return Generator(self.context.model.head(variables)["kernel"].shape[0])

    def _drawn(self, key: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What G takes for labels i32[B]."""
        noise = jax.random.uniform(key, (len(labels), NOISE), jnp.float32)
        return jax.nn.one_hot(labels, self._classes), noise

    # --- server -------------------------------------------------------------------------------------

    def init(self, key, variables):
        """Everything fresh, nothing seen."""
        labels, noise = self._drawn(key, jnp.zeros(2, jnp.int32))
        generator = dict(self._generator(variables).init(key, labels, noise))
        return FedGenState(variables, generator, jnp.zeros(self._classes))

    def dispatch(self, state, cohort, key):
        """The model, and the generator."""
        del cohort, key
        return Starts(state.model, Sent(state.generator, (state.seen > 0).astype(jnp.float32)))

    def merge(self, state, cohort, starts, results, key):
        """Averages, and trains the generator under the clients' classifiers."""
        del cohort, starts
        heads, counts = results.uploads["head"], results.uploads["labels"]
        shown = counts.sum(0)
        shares = counts / jnp.maximum(shown, 1)[None]
        generator = self._generator(state.model)
        chances = jnp.log((shown > 0).astype(jnp.float32))
        before = {name: part for name, part in state.generator.items() if name != "params"}

        def loss(params, statistics, key):
            of_label, of_noise = jax.random.split(key)
            y = jax.random.categorical(of_label, chances, shape=(self.config.generator_batch,))
            labels, noise = self._drawn(of_noise, y)
            made, moved = generator.apply(
                {"params": params, **statistics}, labels, noise, train=True, mutable=list(statistics)
            )

            def teacher(head, share):
                logits = apply_dense(head, made)
                losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
                return (share[y] * losses).mean()

            taught = jax.vmap(teacher)(heads, shares).sum()
            return taught + self.config.diversity * _diversity(noise, made), dict(moved)

        def step(number, carry):
            params, statistics, memory, _ = carry
            (value, statistics), g = jax.value_and_grad(loss, has_aux=True)(
                params, statistics, jax.random.fold_in(key, number)
            )
            with jax.numpy_dtype_promotion("standard"):  # optax's bias correction: a float and an int32
                updates, memory = self._optimizer.update(g, memory, params)
            return optax.apply_updates(params, updates), statistics, memory, value

        def train(params):
            carry = (params, before, self._optimizer.init(params), jnp.float32(0))
            params, statistics, _, value = jax.lax.fori_loop(0, self.config.generator_steps, step, carry)
            return params, statistics, value

        def wait(params):
            return params, before, jnp.float32(0)

        old = state.generator["params"]
        params, statistics, value = jax.lax.cond(shown.sum() > 0, train, wait, old)
        new = FedGenState(results.mean, {"params": params, **statistics}, state.seen + shown)
        return new, {"generator_loss": value}

    # --- client -------------------------------------------------------------------------------------

    def loss(self, apply, variables, batch, extra):
        """The batch's own loss, and both terms of the generator."""
        sent: Sent = extra["sent"]
        logits, moved = apply(variables, batch)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        own = masked_mean(losses, batch.mask)
        generator, head = self._generator(variables), self.context.model.head(variables)

        def generated(key, labels):
            made: Any = generator.apply(sent.generator, *self._drawn(key, labels))
            return apply_dense(head, made)

        keys = jax.random.split(jax.random.fold_in(batch.rng, 1), 3)
        others = jax.random.categorical(keys[0], jnp.log(sent.known), shape=batch["label"].shape)
        losses = optax.softmax_cross_entropy_with_integer_labels(generated(keys[1], others), others)
        told = self.config.a * losses.mean()
        told = told + self.config.b * divergence(generated(keys[2], batch["label"]), logits, batch.mask, 1)
        return own + jnp.where(sent.known.sum() > 0, told, 0), moved

    def finish_round(self, start, trained, labels, extra, steps, lr, gradient):
        """Sends the classifier and the label counts."""
        del start, extra, steps, lr, gradient
        return labels, {"head": self.context.model.head(trained), "labels": labels.astype(jnp.float32)}


def _diversity(noise: jax.Array, made: jax.Array) -> jax.Array:
    """exp(−mean_{i,j} ‖ε_i − ε_j‖ · |G_i − G_j|). f32[B, n], f32[B, d] -> f32[]."""
    square = (noise * noise).sum(1)
    products = jnp.matmul(noise, noise.T, precision=jax.lax.Precision.HIGHEST)
    apart = square[:, None] + square[None, :] - 2 * products
    apart = jnp.maximum(apart, 0) / noise.shape[1]
    layers = jnp.abs(made[:, None, :] - made[None, :, :]).mean(-1)
    return jnp.exp(-(apart * layers).mean())
