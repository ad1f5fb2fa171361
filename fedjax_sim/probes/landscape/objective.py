"""What a landscape is of: the mean loss of a model over fixed samples, and its derivatives by the parameters.

Samples go through in batches, each cut over the devices. Losses are added up on the host in float64,
derivatives in float32 on each device and in float64 over devices. So memory does not grow with the number of
samples beyond the samples themselves.

Products with the Hessian are derivatives of ⟨gradient, v⟩ in reverse mode (Pearlmutter, "Fast Exact
Multiplication by the Hessian", Neural Computation 1994): the package's convolutions have reverse derivatives
of their own, which forward mode does not pass, and which make a product some ten times faster on a CPU.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from fedjax_sim.core.errors import UserError
from fedjax_sim.core.model import Model
from fedjax_sim.core.stacked import AXIS, averages, on_devices
from fedjax_sim.core.task import Task, evaluate
from fedjax_sim.engine.placement import cut, make_mesh, replicated
from fedjax_sim.tasks.preprocessing import Preprocessing, normalise

Function = Callable[[Any, Any, Any], tuple[jax.Array, jax.Array]]
"""(variables, inputs [B, …], targets [B, …]) -> (losses f32[B], whether right [B], NaN without classes).

Inputs and targets may be trees of arrays, or None.

Differentiable twice in reverse mode.
"""


@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy of a model in evaluation mode: batch norm uses its running statistics, dropout is off.

    The model computes in float32 whatever its compute dtype, as curvature drowns in bfloat16, and its
    convolutions are implemented as is fastest for a single model: `auto` on a CPU, `xla` elsewhere.

    Attributes:
      model: the network.
      preprocessing: of 8-bit images; None: images are f32[B, H, W, C] as the model takes them.
    """

    model: Model
    preprocessing: Preprocessing | None = None

    def __post_init__(self):
        object.__setattr__(self, "model", _exact(self.model))

    def __call__(self, variables: Any, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See `Function`."""
        if self.preprocessing is not None:
            images = normalise(images, self.preprocessing)
        logits, _ = self.model.apply(variables, images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses, jnp.argmax(logits, -1).astype(labels.dtype) == labels


@dataclasses.dataclass(frozen=True)
class TaskLoss:
    """A task's loss of a model, and with classes its accuracy; likewise in evaluation mode and in float32.

    Called with samples as they are stored; there are no targets besides.

    Attributes:
      model: the network.
      task: whose loss.
    """

    model: Model
    task: Task

    def __post_init__(self):
        object.__setattr__(self, "model", _exact(self.model))

    def __call__(self, variables: Any, example: Any, targets: None) -> tuple[jax.Array, jax.Array]:
        """See `Function`."""
        del targets
        losses, statistics = evaluate(self.model, self.task, variables, example)
        if self.task.label is None:
            return losses, jnp.full_like(losses, jnp.nan)
        return losses, statistics[self.task.headline.name][:, 0]


def _exact(model: Model) -> Model:
    """The model computing in float32, its convolutions implemented as is fastest for one model.

    Its products are those of who calls it, whatever the run trains with.
    """
    module = model.module
    if any(field.name == "dtype" for field in dataclasses.fields(module)):
        module = module.clone(dtype=jnp.float32)
    impl = "auto" if jax.default_backend() == "cpu" else "xla"
    return dataclasses.replace(model, module=module, conv=impl, products=None)


@dataclasses.dataclass(frozen=True, eq=False)
class Values:
    """Loss and accuracy at n points.

    Attributes:
      loss: f64[n], mean over the samples.
      accuracy: f64[n], share of the samples that is right; NaN where they have no classes.
    """

    loss: np.ndarray
    accuracy: np.ndarray


class Objective:
    """The mean of a loss over n samples, as a function of a model's variables.

    Attributes:
      function: loss of single samples.
      samples: n.
    """

    def __init__(
        self,
        function: Model | Function,
        images: Any,
        labels: Any,
        *,
        preprocessing: Preprocessing | None = None,
        batch_size: int = 250,
        mesh: Mesh | None = None,
    ):
        """Places the samples on the devices.

        Args:
          function: a model, whose cross-entropy it is then; or any loss.
          images: [n, …], u8 with `preprocessing`, else f32; or a tree of arrays [n, …].
          labels: i32[n]; likewise, or None.
          preprocessing: of a model's images.
          batch_size: samples that one device takes at once.
          mesh: devices; None: all.

        Raises:
          UserError: no samples, or not as many labels as images.
        """
        sizes = [len(leaf) for leaf in jax.tree.leaves((images, labels))]
        count = sizes[-1]
        if not count or len(set(sizes)) > 1:
            why = f"there are {len(images)} images and {len(labels)} labels"
            raise UserError("samples", count, why, "Give one label or more, and an image for each.")
        self.function = CrossEntropy(function, preprocessing) if isinstance(function, Model) else function
        self.samples = count
        self._mesh = make_mesh() if mesh is None else mesh
        devices = self._mesh.size
        width = devices * max(1, min(batch_size, -(-count // devices)))
        place = partial(jax.device_put, device=cut(self._mesh))
        self._batches = []
        for first in range(0, count, width):
            index = np.arange(first, first + width)
            counted = index < count  # the others fill the batch up, with samples over again
            index %= count
            pick = lambda tree, index=index: jax.tree.map(lambda leaf: place(leaf[index]), tree)  # noqa: E731
            self._batches.append((pick(images), pick(labels), place(counted)))

    def values(self, variables: Any, directions: Any, coefficients: np.ndarray) -> Values:
        """Loss and accuracy at variables + Σ_j c_j · direction j, for n lists of coefficients.

        Leaves that are no floats stay as they are.

        Args:
          variables: one model.
          directions: like `variables`, leaves [d, …].
          coefficients: f[n, d].
        """
        variables, directions = self._placed(variables), self._placed(directions)
        wanted = np.asarray(coefficients, np.float32)
        step, parts = min(len(wanted), _POINTS), []
        for first in range(0, len(wanted), step):
            index = np.minimum(np.arange(first, first + step), len(wanted) - 1)
            sums = np.zeros((2, step))
            for images, labels, counted in self._batches:
                found = _values(
                    self.function, self._mesh, variables, directions, wanted[index], images, labels
                )
                mask = np.asarray(counted)
                sums += [np.asarray(part)[:, mask].astype(np.float64).sum(1) for part in found]
            parts.append(sums[:, : len(wanted) - first])
        loss, accuracy = np.concatenate(parts, 1) / self.samples
        return Values(loss, accuracy)

    def gradient(self, variables: Any, offset: np.ndarray | None = None) -> tuple[float, np.ndarray]:
        """Loss and its gradient by the parameters, with `offset` added to them. f32[P] -> (loss, f64[P]).

        P counts the leaves of variables["params"] in the order of `jax.tree.leaves`.
        """
        offset = np.zeros(size(variables), np.float32) if offset is None else offset.astype(np.float32)
        return self._derivative(_gradient, variables, offset)

    def hessian_product(self, variables: Any, vector: np.ndarray) -> np.ndarray:
        """Hessian of the loss by the parameters times a vector. f[P] -> f64[P]."""
        return self._derivative(_hessian_product, variables, vector.astype(np.float32))[1]

    def _derivative(self, program, variables, vector) -> tuple[float, np.ndarray]:
        """Mean loss, and mean over the samples of what `program` adds to a vector of each device."""
        variables, vector = self._placed(variables), self._placed(vector)
        shape = self._mesh.size, len(vector)
        total = jnp.zeros(shape, jnp.float32, device=cut(self._mesh))
        losses = []
        for batch in self._batches:
            total, loss = program(self.function, self._mesh, variables, vector, total, *batch)
            losses.append((loss, batch[2]))
        loss = sum(np.asarray(part)[np.asarray(mask)].astype(np.float64).sum() for part, mask in losses)
        return float(loss) / self.samples, np.asarray(total).astype(np.float64).sum(0) / self.samples

    def _placed(self, tree: Any) -> Any:
        return jax.device_put(tree, replicated(self._mesh))


_POINTS = 16
"""Points in one call: few, so that any number of them is one program, called several times."""


def size(variables: Mapping[str, Any]) -> int:
    """P, the number of trainable scalars."""
    return sum(np.size(leaf) for leaf in jax.tree.leaves(variables["params"]))


# --- compiled, on one batch ---------------------------------------------------------------------------

_program = partial(jax.jit, static_argnames=("function", "mesh"))
_EXACT = "highest"  # or accelerators would round the factors of products to fewer bits


@_program
def _values(function, mesh, variables, directions, coefficients, images, labels):
    """(losses f32[n, B], right bool[n, B])."""

    def share(variables, directions, coefficients, images, labels):
        def point(own):
            def add(leaf, moves):
                return (
                    leaf + jnp.tensordot(own.astype(moves.dtype), moves, axes=1) if averages(leaf) else leaf
                )

            return function(jax.tree.map(add, variables, directions), images, labels)

        with jax.default_matmul_precision(_EXACT):
            return jax.lax.map(point, coefficients)

    specs = (P(), P(), P(), P(AXIS), P(AXIS))
    run = on_devices(share, mesh, specs, P(None, AXIS))
    return run(variables, directions, coefficients, images, labels)


def _derived(function, mesh, derive, variables, vector, total, images, labels, counted):
    """(total + the batch's part f32[devices, P], losses f32[B]).

    derive: (loss of an offset of the parameters, vector) -> (f32[P], losses f32[B]).
    """

    def share(variables, vector, total, images, labels, counted):
        flat, tree = ravel_pytree(variables["params"])

        def loss(offset):
            losses, _ = function({**variables, "params": tree(flat + offset)}, images, labels)
            return jnp.where(counted, losses, 0).sum(), losses

        with jax.default_matmul_precision(_EXACT):
            part, losses = derive(loss, vector)
        return total + part[None], losses

    specs = (P(), P(), P(AXIS), P(AXIS), P(AXIS), P(AXIS))
    run = on_devices(share, mesh, specs, (P(AXIS), P(AXIS)))
    return run(variables, vector, total, images, labels, counted)


@partial(_program, donate_argnames="total")
def _gradient(function, mesh, variables, vector, total, images, labels, counted):
    derive = lambda loss, vector: jax.grad(loss, has_aux=True)(vector)  # noqa: E731
    return _derived(function, mesh, derive, variables, vector, total, images, labels, counted)


@partial(_program, donate_argnames="total")
def _hessian_product(function, mesh, variables, vector, total, images, labels, counted):
    def derive(loss, vector):
        def slope(offset):
            gradient, losses = jax.grad(loss, has_aux=True)(offset)
            return jnp.vdot(gradient, vector), losses

        return jax.grad(slope, has_aux=True)(jnp.zeros_like(vector))

    return _derived(function, mesh, derive, variables, vector, total, images, labels, counted)
