"""What the engine knows of a model: pure functions of a variables pytree, and its peel points."""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from fedjax_sim.core import memo
from fedjax_sim.core.conv_impl import conv_impl
from fedjax_sim.core.errors import UserError

Variables = Mapping[str, Any]
"""{'params': …, and, where the model has them, other collections such as 'batch_stats'}."""


def peel(module: nn.Module, name: str, x: jax.Array) -> jax.Array:
    """Marks `x` as the input of the weight layer `name` of `module`: a peel point. Free unless asked for.

    Args:
      module: the module whose method calls this.
      name: of the weight layer in it.
      x: f[B, …], what that layer gets.

    Returns:
      `x`, for the layer to read.
    """
    one, noted = _ONE.get(), MARKS.get()
    if one is not None:
        x = x / one.astype(x.dtype)
    if noted is not None:
        noted.append(((*module.path, name), x))
    module.sow("peel", _PREFIX + name, x)
    return x


_ONE: contextvars.ContextVar[jax.Array | None] = contextvars.ContextVar("_ONE", default=None)
"""A 1 that XLA does not know to be one, while features are looked at.

A quotient by it is written to memory. Otherwise XLA's CPU backend computes a ReLU and its pooling anew for
everything that reads them, and they are read by the next layer and by all that is measured.
"""


MARKS: contextvars.ContextVar[list[tuple[tuple[str, ...], jax.Array]] | None] = contextvars.ContextVar(
    "MARKS", default=None
)
"""What `peel` marks, (path of the layer, array) each, while a module is looked at (`models.tracing`)."""


_PREFIX = "input_of_"


@dataclasses.dataclass(frozen=True)
class PeelPoint:
    """One depth at which a model is peeled: the input of a weight layer.

    Attributes:
      name: the weight layer that reads the feature, as a path (`"block1/conv2"`).
      kernel: path of that layer's kernel in `variables["params"]`.
    """

    name: str
    kernel: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Model:
    """A model as the engine sees it. Everything that is trained or kept lives in `variables`.

    Attributes:
      name: short name for records.
      module: Flax linen module, called as `module(x, train=..., mask=...)`. It marks the input
        of each weight layer with `peel(self, name, x)`.
      input_shape: of one sample as the module takes it: (H, W, C) of an image, (d,) of a vector.
      outputs: width of what it returns: the number of classes of a classifier.
      peel_points: ordered from the input to the classifier.
      takes_mask: whether `module` accepts `mask` (needed by batch norm: padding must not count).
      conv: implementation of the convolution, see `fedjax_sim.models.kernels.conv`; speed only.
      products: how finely products of float32 factors are computed where a layer does not say so, one of
        `jax.default_matmul_precision`'s; None: as JAX is set.
    """

    name: str
    module: nn.Module
    input_shape: tuple[int, ...]
    outputs: int
    peel_points: tuple[PeelPoint, ...] = ()
    takes_mask: bool = True
    conv: str = "canonical"
    products: str | None = None

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Fresh variables, `params` in float32.

        Args:
          key: key[], typed.
        """
        images = jnp.zeros((1, *self.input_shape), jnp.float32)
        variables = dict(self._call(key, images, init=True))
        variables.pop("peel", None)
        return variables

    def apply(
        self,
        variables: Variables,
        *inputs: jax.Array,
        train: bool = False,
        mask: jax.Array | None = None,
        rng: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Outputs, and the variables with their state (batch statistics) moved on if `train`.

        Args:
          variables: one model (no slot axis).
          *inputs: of the module: one array f32[B, …] mostly, prepared (images normalised).
          train: batch statistics instead of running ones, dropout on.
          mask: bool[B], False for padding; None counts all.
          rng: key for dropout; needed only by models that have it, and only if `train`.

        Returns:
          (f32[B, outputs], variables).
        """
        state = [name for name in variables if name != "params"] if train else False
        out = self._call(variables, *inputs, train=train, mask=mask, rng=rng, mutable=state)
        if not train:
            return out, dict(variables)
        logits, new = out
        return logits, {**variables, **new}

    def features(self, variables: Variables, *inputs: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Outputs and, for each peel point, the input of its weight layer (evaluation mode).

        Args:
          variables: one model.
          *inputs: of the module, prepared; one array f32[B, …] mostly.

        Returns:
          (outputs f32[B, outputs], name of each peel point -> [B, …]).
        """
        # Of any number at all, NaN too, this is 1.
        token = _ONE.set(jnp.where(inputs[0].ravel()[0].astype(jnp.float32) > jnp.inf, 2.0, 1.0))
        try:
            logits, sown = self._call(variables, *inputs, mutable=["peel"])
        finally:
            _ONE.reset(token)
        return logits, self._peeled(sown.get("peel", {}))

    def _peeled(self, sown: Any) -> dict[str, jax.Array]:
        """What a call has sown under "peel", by peel point."""
        flat: Any = traverse_util.flatten_dict(dict(sown))
        by_name = {"/".join(path).replace(_PREFIX, ""): values[0] for path, values in flat.items()}
        return {point.name: by_name[point.name] for point in self.peel_points}

    def represent(
        self,
        variables: Variables,
        *inputs: jax.Array,
        train: bool = False,
        mask: jax.Array | None = None,
        rng: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
        """As `apply`, and after the outputs the representation: the classifier's input f32[B, d].

        The model must have a classifier (`check_classifier`).

        Args:
          variables: one model.
          *inputs: of the module, prepared; one array f32[B, …] mostly.
          train: batch statistics instead of running ones, dropout on.
          mask: bool[B], False for padding; None counts all.
          rng: key[] for dropout.

        Returns:
          (f32[B, outputs], representation f32[B, d], variables).
        """
        state = [name for name in variables if name != "params"] if train else []
        out = self._call(variables, *inputs, train=train, mask=mask, rng=rng, mutable=[*state, "peel"])
        logits, new = out
        new = dict(new)
        representation = self._peeled(new.pop("peel"))[self.peel_points[-1].name]
        return logits, representation.astype(jnp.float32), {**variables, **new}

    def head(self, variables: Variables) -> Any:
        """The classifier's own parameters, kernel f32[d, C] and perhaps bias f32[C]; see `apply_dense`."""
        layer: Any = variables["params"]
        for name in self.classifier:
            layer = layer[name]
        return layer

    @property
    def classifier(self) -> tuple[str, ...]:
        """Path of the classifier's module in `variables["params"]`: the last peel point's layer."""
        return self.peel_points[-1].kernel[:-1]

    def check_classifier(self, name: str) -> None:
        """Raises UserError if the last peel point is no dense layer that gives the logits. name: who asks."""
        shapes: Any = self.abstract["params"]
        for step in self.peel_points[-1].kernel if self.peel_points else ():
            shapes = shapes[step]
        if not self.peel_points or len(shapes.shape) != 2 or shapes.shape[1] != self.outputs:
            raise UserError(
                "model",
                self.name,
                f"{name} wants the representation before a dense classifier, and the model does not mark it",
                "Mark the input of the last dense layer with fedjax_sim.models.peel.",
            )

    @functools.cached_property
    def _traced(self) -> tuple[dict[str, Any], tuple[tuple[str, ...], ...]]:
        """(`abstract`, `layer_order()`), of one trace: a deep network takes some tenths of a second."""

        def traced() -> tuple[dict[str, Any], tuple[tuple[str, ...], ...]]:
            order: list[tuple[str, ...]] = []

            def trace(key: jax.Array) -> dict[str, Any]:
                variables = self.init(key)
                order.extend(traverse_util.flatten_dict(variables))  # not yet sorted by name
                return variables

            return jax.eval_shape(trace, jax.random.key(0)), tuple(order)

        return memo.once("shapes of a model", self, traced)

    @property
    def abstract(self) -> dict[str, Any]:
        """Shape and dtype of each leaf of the variables, as `jax.eval_shape` gives them of `init`."""
        return jax.tree.map(lambda leaf: leaf, self._traced[0])

    def layer_order(self) -> tuple[tuple[str, ...], ...]:
        """Paths of all leaves ("params", "conv1", "kernel") in the order in which the model makes them."""
        return self._traced[1]

    def blocks(self) -> dict[tuple[str, ...], int]:
        """Path of each leaf -> its block, from 0 in network order; there are as many as peel points.

        The block of a weight layer is its own leaves and all others up to the next peel point's kernel, such
        as a normalisation that follows it. Statistics go with the parameters of their module.
        """
        kernels: dict[tuple[str, ...], int] = {
            ("params", *point.kernel): number for number, point in enumerate(self.peel_points)
        }
        order, block, out = self.layer_order(), 0, {}
        modules: dict[tuple[str, ...], int] = {}
        for path in order:
            if path[0] == "params":
                block = max(block, kernels.get(path, block))
                # A layer whose bias is made before its kernel is one layer all the same.
                own = kernels.get((*path[:-1], "kernel"))
                out[path] = modules[path[1:-1]] = block if own is None else own
        for path in order:
            if path[0] != "params":
                out[path] = modules.get(path[1:-1], 0)
        return out

    def num_params(self) -> int:
        """Trainable scalars (batch statistics do not count)."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.abstract["params"]))

    def with_conv(self, conv: str) -> "Model":
        """The same model with its convolutions computed by `conv`, one of CONV_IMPLS or auto."""
        return dataclasses.replace(self, conv=conv)

    def precisely(self) -> contextlib.AbstractContextManager[None]:
        """Products that are traced inside, gradients' too, are computed as `products` says."""
        if self.products is None:
            return contextlib.nullcontext()
        return jax.default_matmul_precision(self.products)

    @property
    def convolves(self) -> bool:
        """Whether any kernel is a convolution's."""
        return any(leaf.ndim == 4 for leaf in jax.tree.leaves(self.abstract["params"]))

    def _call(
        self,
        first: Any,  # a key to `init`, variables to apply
        *inputs: jax.Array,
        train: bool = False,
        mask: jax.Array | None = None,
        rng: jax.Array | None = None,
        mutable: list[str] | bool = False,
        init: bool = False,
    ) -> Any:
        keywords: dict[str, Any] = {"train": train}
        if self.takes_mask:
            keywords["mask"] = mask
        with conv_impl(self.conv), self.precisely():
            if init:
                return self.module.init(first, *inputs, **keywords)
            rngs = None if rng is None else {"dropout": rng}
            return self.module.apply(first, *inputs, rngs=rngs, mutable=mutable, **keywords)


def apply_dense(layer: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
    """A dense layer's output. f32[B, d] -> f32[B, width]."""
    out = x @ layer["kernel"]
    return out + layer["bias"][None] if "bias" in layer else out


ModelFactory = Callable[..., Model]
