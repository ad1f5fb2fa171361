"""Classification of images and of rows of tables: a class for each, cross-entropy, accuracy."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from fedjax_sim.core.task import Example, Metric, Task
from fedjax_sim.tasks import vectors
from fedjax_sim.tasks.preprocessing import Preprocessing, augment, normalise


def cross_entropy(logits: jax.Array, example: Example) -> jax.Array:
    """Of each sample. f32[B, C] and `label` i32[B] -> f32[B]."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, example["label"])


def correct(logits: jax.Array, example: Example) -> jax.Array:
    """1 where the largest logit is the label's. f32[B, C] and `label` i32[B] -> f32[B, 1]."""
    return (jnp.argmax(logits, -1).astype(jnp.int32) == example["label"]).astype(jnp.float32)[:, None]


ACCURACY = Metric("accuracy", "max", correct)


def classification(
    image_shape: Sequence[int], num_classes: int, preprocessing: Preprocessing | None = None
) -> Task:
    """The task of an image set. Its samples are `image` u8[H, W, C] and `label` i32[].

    Args:
      image_shape: (H, W, C).
      num_classes: C, the width of the logits.
      preprocessing: normalisation and augmentation; None: the default one.
    """
    how = preprocessing or Preprocessing()
    return Task(
        name="classification",
        spec={
            "image": jax.ShapeDtypeStruct(tuple(image_shape), jnp.uint8),
            "label": jax.ShapeDtypeStruct((), jnp.int32),
        },
        outputs=num_classes,
        prepare=_Prepare(how),
        augment=_Augment(how) if how.augments else None,
        inputs=_inputs,
        loss=cross_entropy,
        metrics=(ACCURACY,),
        label="label",
    )


def classification_of_tables(mean: Sequence[float], scale: Sequence[float], num_classes: int) -> Task:
    """The task of a table with classes. Its samples are `x` f32[d] and `label` i32[].

    Args:
      mean: of each of the d features, by which they are standardised.
      scale: of each, positive.
      num_classes: C, the width of the logits.
    """
    spec = {
        "x": jax.ShapeDtypeStruct((len(mean),), jnp.float32),
        "label": jax.ShapeDtypeStruct((), jnp.int32),
    }
    return Task(
        name="classification",
        spec=spec,
        outputs=num_classes,
        prepare=vectors.Standardise(tuple(map(float, mean)), tuple(map(float, scale))),
        inputs=vectors.inputs,
        loss=cross_entropy,
        metrics=(ACCURACY,),
        label="label",
    )


@dataclasses.dataclass(frozen=True)
class _Prepare:
    """`Task.prepare`: normalises. A dataclass, so that equal tasks are equal and share compiled programs."""

    how: Preprocessing

    def __call__(self, example: Example) -> Example:
        return {**example, "image": normalise(example["image"], self.how)}


@dataclasses.dataclass(frozen=True)
class _Augment:
    """`Task.augment`."""

    how: Preprocessing

    def __call__(self, key: jax.Array, example: Example) -> Example:
        return {**example, "image": augment(key, example["image"], self.how)}


def _inputs(example: Example) -> tuple[jax.Array, ...]:
    return (example["image"],)
