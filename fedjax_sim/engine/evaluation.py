"""Evaluation: of the deployed model on the global test set, and of what each client uses on its own.

The forward passes are compiled, batched and sharded over devices; they give a loss and a prediction for
every sample, and all figures are computed from these on the host.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from fedjax_sim.core.model import Model
from fedjax_sim.core.stacked import AXIS
from fedjax_sim.data import Preprocessing, normalise
from fedjax_sim.engine.placement import put, readable, sharded
from fedjax_sim.engine.programs import Program


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluator:
    """Evaluates models on one fixed set of images.

    Attributes:
      model: the network.
      preprocessing: its normalisation; no augmentation happens here.
      mesh: devices; each takes its share of the images.
      images: u8[n, H, W, C].
      labels: i32[n].
      batch_size: images in one forward pass.
    """

    model: Model
    preprocessing: Preprocessing
    mesh: Mesh
    images: np.ndarray
    labels: np.ndarray
    batch_size: int
    _data: tuple[jax.Array, jax.Array] = dataclasses.field(init=False, repr=False)
    _forward: Callable[..., tuple[jax.Array, jax.Array]] = dataclasses.field(init=False, repr=False)

    def __post_init__(self):
        count, devices = len(self.labels), self.mesh.size
        batch = max(1, min(self.batch_size, -(-count // devices)))
        batches = -(-count // (devices * batch))
        padded = devices * batches * batch

        def place(array: np.ndarray) -> jax.Array:
            rest = np.zeros((padded - count, *array.shape[1:]), array.dtype)
            whole = np.concatenate([array, rest]).reshape(devices * batches, batch, *array.shape[1:])
            return put(whole, sharded(self.mesh, devices))

        object.__setattr__(self, "_data", (place(self.images), place(self.labels)))
        object.__setattr__(self, "_forward", Program(self._compiled, self.mesh, **readable(self.mesh)))

    def __call__(self, variables: Any) -> tuple[jax.Array, jax.Array]:
        """One model on all images. -> (loss f32[n], predicted class i32[n]), on the device."""
        return self._forward(variables, *self._data)

    def _compiled(self, variables, images, labels):
        def share(variables, images, labels):
            def batch(_, data):
                return None, _forward(self.model, self.preprocessing, variables, *data)

            return jax.lax.scan(batch, None, (images, labels))[1]

        run = jax.shard_map(
            share, mesh=self.mesh, in_specs=(P(), P(AXIS), P(AXIS)), out_specs=P(AXIS), check_vma=False
        )
        losses, predicted = run(variables, images, labels)
        count = len(self.labels)
        return losses.reshape(-1)[:count], predicted.reshape(-1)[:count]


@dataclasses.dataclass(frozen=True, eq=False)
class ClientEvaluator:
    """Evaluates a stack of models, each on the samples of its own client.

    Attributes:
      model, preprocessing, mesh: as in `Evaluator`.
      images: u8[n, H, W, C], a pool on all devices.
      labels: i32[n], likewise.
      batch_size: images in one forward pass.
    """

    model: Model
    preprocessing: Preprocessing
    mesh: Mesh
    images: jax.Array
    labels: jax.Array
    batch_size: int
    _forward: Callable[..., tuple[jax.Array, jax.Array]] = dataclasses.field(init=False, repr=False)

    def __post_init__(self):
        object.__setattr__(self, "_forward", Program(self._compiled, self.mesh, **readable(self.mesh)))

    def __call__(self, variables: Any, indices: np.ndarray) -> tuple[jax.Array, jax.Array]:
        """Model c on the samples indices[c].

        Args:
          variables: [C, …], C a multiple of the number of devices.
          indices: i32[C, t], into the pool; padding is the caller's to ignore.

        Returns:
          (loss f32[C, t], predicted class i32[C, t]).
        """
        cut = sharded(self.mesh, self.mesh.size)
        return self._forward(jax.device_put(variables, cut), put(indices, cut), self.images, self.labels)

    def _compiled(self, variables, indices, images, labels):
        settings = self.model, self.preprocessing, self.mesh, self.batch_size
        return of_clients(*settings, variables, indices, images, labels)


def of_clients(
    model: Model,
    preprocessing: Preprocessing,
    mesh: Mesh,
    batch_size: int,
    variables: Any,
    indices: jax.Array,
    images: jax.Array,
    labels: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """What `ClientEvaluator` computes, as a function to be traced; arguments as there."""
    width = indices.shape[1]
    batch = max(1, min(batch_size, width))
    padded = -(-width // batch) * batch
    indices = jnp.pad(indices, ((0, 0), (0, padded - width)))

    def client(args, images, labels):
        own, index = args

        def one(chosen):
            return _forward(model, preprocessing, own, images[chosen], labels[chosen])

        return jax.lax.map(one, index.reshape(-1, batch))

    run = jax.shard_map(
        lambda v, i, x, y: jax.lax.map(lambda args: client(args, x, y), (v, i)),
        mesh=mesh,
        in_specs=(P(AXIS), P(AXIS), P(), P()),
        out_specs=P(AXIS),
        check_vma=False,
    )
    losses, predicted = run(variables, indices, images, labels)
    return losses.reshape(-1, padded)[:, :width], predicted.reshape(-1, padded)[:, :width]


def _forward(model, preprocessing, variables, images, labels):
    """A batch's (loss f32[B], predicted class i32[B])."""
    logits, _ = model.apply(variables, normalise(images, preprocessing))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses, jnp.argmax(logits, -1).astype(jnp.int32)


def by_client(correct: np.ndarray, owners: np.ndarray, num_clients: int) -> np.ndarray:
    """Accuracy of each client: bool[m] and the client of each sample i64[m] -> f64[N], NaN where none."""
    hits = np.bincount(owners, weights=correct, minlength=num_clients)
    sizes = np.bincount(owners, minlength=num_clients)
    with np.errstate(invalid="ignore", divide="ignore"):
        return hits / sizes
