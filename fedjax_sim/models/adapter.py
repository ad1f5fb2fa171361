"""Takes in a user's own Flax module."""

import dataclasses
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import errors as flax_errors
from flax import linen as nn
from flax import nnx

from fedjax_sim.core import imports
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.fields import nearest
from fedjax_sim.core.model import Model, PeelPoint
from fedjax_sim.models import tracing

_TRAIN_NAMES: dict[str, bool] = {
    "train": True,
    "training": True,
    "is_training": True,
    "deterministic": False,
    "use_running_average": False,
}
"""Keywords for "this is training" in the wild -> whether the value is the same or its opposite."""

_ADVICE = (
    "Give __call__ a keyword `train`, and write nn.Dropout(rate, deterministic=not train) and "
    "nn.BatchNorm(use_running_average=not train)."
)


def from_flax(
    module: nn.Module,
    input_shape: Sequence[int],
    num_classes: int,
    *,
    name: str,
    peel_points: Sequence[PeelPoint | str] = (),
    takes_mask: bool | None = None,
) -> Model:
    """A `Model` made of any Flax linen module that maps f32[B, H, W, C] to logits f[B, num_classes].

    The module's `__call__` may have a keyword for training (`train`, `training`, `is_training`, or the
    opposite `deterministic`, `use_running_average`) and a keyword `mask` (bool[B], False for padding); it
    need have neither. If it has no `mask`, its `flax.linen.BatchNorm` layers are given one behind its back,
    so that padding stays out of their statistics. Parameter paths stay as the module has them.

    Variables beside `params` may have any dtype. Where clients' models are averaged, what is no float, such
    as a counter or a flag, becomes the largest of their values (`fedjax_sim.core.stacked`).

    Args:
      module: the network, not yet bound to variables.
      input_shape: (H, W, C) of one image.
      num_classes: width of the logits, at least 2.
      name: short name for records.
      peel_points: names of weight layers, as paths ("block1/conv2"), or `PeelPoint`s, from input to
        classifier; each must be marked with `peel` in the module. Empty: all that are marked, in the order of
        marking.
      takes_mask: whether to pass `mask`; None: if the signature has it.

    Raises:
      UserError: a bad shape or number of classes, a module that cannot be called so, has no parameters or
        changes variables or draws in evaluation, an output which is not f[1, num_classes], parameters other
        than float32, a random key among the variables, a peel point that is not there.

    Warns:
      UserWarning: batch statistics that padding can reach; convolutions with slow gradients; probabilities
        in the place of logits.
    """
    shape = check_shapes(input_shape, num_classes)
    if not isinstance(module, nn.Module):
        raise UserError(
            "model", type(module).__name__, "this is not a flax.linen.Module", "Give an instance of one."
        )
    accepts = _keywords(module)
    own_mask = accepts("mask") if takes_mask is None else takes_mask
    if own_mask and not accepts("mask"):
        raise UserError(
            "model.takes_mask",
            True,
            "the module's __call__ has no keyword `mask`",
            "Add it, or leave this out.",
        )
    train_name = next((word for word in _TRAIN_NAMES if accepts(word)), None)
    wrapped = Adapted(module, train_name, own_mask)
    try:
        seen = tracing.trace(wrapped, shape, train=False, mask=None)
    except UserError:
        raise
    except Exception as error:
        # Flax's own words where a layer is not told whether this is training.
        untold = any(f'Parameter "{word}" must be passed' in str(error) for word in _TRAIN_NAMES)
        raise UserError(
            "model", name, f"the module fails on an image of shape {shape}: {type(error).__name__}: {error}",
            _ADVICE if untold else "Check `input_shape` and the module's __call__.",
        ) from error  # fmt: skip
    _check_output(seen, name, num_classes, hasattr(module, "num_classes"))
    if not seen.params:
        raise UserError("model", name, "the module has no parameters to train", "Give it a layer that has.")
    evaluated = _traced_evaluation(wrapped, shape, name)
    points = _points(seen, peel_points)
    _warn(seen, name, own_mask)
    if tracing.ends_in_softmax(evaluated):
        warnings.warn(
            f"{name} ends in a softmax or a sigmoid, and losses of classification take logits: with "
            "probabilities they hardly train. Return what goes into it. (Where a task of your own wants "
            "probabilities, this is meant.)",
            stacklevel=2,
        )
    return Model(name, wrapped, shape, num_classes, points, takes_mask=True)


def _traced_evaluation(module: nn.Module, shape: tuple[int, ...], name: str) -> Any:
    """The jaxpr of the module while it is not trained.

    Raises:
      UserError: it changes a variable or draws there.
    """

    def evaluate(key):
        image, keywords = jnp.zeros((1, *shape), jnp.float32), {"train": False, "mask": None}
        variables = module.init({"params": key, "dropout": key}, image, **keywords)
        return module.apply(variables, image, **keywords)

    try:
        return jax.make_jaxpr(evaluate)(jax.random.key(0)).jaxpr
    except flax_errors.ModifyScopeVariableError as error:
        why = f"it changes a variable in evaluation too: {str(error).split(' (http')[0]}"
        fix = (
            "Give __call__ a keyword `train`, and change variables only where it is true "
            "(nn.BatchNorm(use_running_average=not train))."
        )
        raise UserError("model", name, why, fix) from None
    except flax_errors.InvalidRngError as error:
        why = f"it draws random numbers in evaluation too: {str(error).split(' (http')[0]}"
        fix = _ADVICE if '"dropout"' in why else 'Draw only in training, from `self.make_rng("dropout")`.'
        raise UserError("model", name, why, fix) from None


def adapted(
    given: Any,
    input_shape: Sequence[int],
    num_classes: int,
    *,
    name: str,
    field: str = "model",
    options: Mapping[str, Any] | None = None,
) -> Model:
    """A `Model` of whatever a user gives in the place of one.

    Args:
      given: a `Model`; a Flax linen module; the class of one, made with `options` and, if it has such a
        field, `num_classes`; or a function (input_shape, num_classes, **options) -> one of the first two.
      input_shape: (H, W, C) of one image.
      num_classes: width of the logits.
      name: for records, of what is not a `Model` yet.
      field: the setting that holds it, for messages.
      options: of a class or a function.

    Raises:
      UserError: it is none of these, does not take the options, or as `from_flax`.
    """
    options = imports.frozen(options or {})
    if isinstance(given, type) and issubclass(given, nn.Module):
        own = {one.name for one in dataclasses.fields(given) if one.init} - {"parent", "name"}
        if options.keys() - own:
            wrong = sorted(options.keys() - own)[0]
            fix = nearest(wrong, sorted(own)) if own else "Leave it out: it has no fields."
            raise UserError(f"model.{wrong}", options[wrong], f"{name} has no such field", fix)
        if "num_classes" in own:
            options = {"num_classes": num_classes, **options}
        given = imports.called(given, name, field, "model", **options)
    elif isinstance(given, type) and issubclass(given, nnx.Module):
        raise _not_linen(field, name, f"{given.__name__}, …")
    elif callable(given) and not isinstance(given, nn.Module | nnx.Module | Model):
        shape = check_shapes(input_shape, num_classes)
        given = imports.called(given, name, field, "model", shape, num_classes, **options)
    elif options:
        wrong = next(iter(options))
        why = "only a class or a function takes options"
        raise UserError(f"model.{wrong}", options[wrong], why, f"Name a class or a function in {field}.")
    if isinstance(given, nnx.Module):
        raise _not_linen(field, name, f"{type(given).__name__}, …")
    if isinstance(given, nn.Module):
        return from_flax(given, input_shape, num_classes, name=name)
    if not isinstance(given, Model):
        raise UserError(
            field, name, f"a model is wanted here, and this is a {type(given).__name__}",
            "Give a Flax linen module, what `fedjax_sim.from_flax` makes of one, or a function that is given "
            "the images' shape and the number of classes and makes either.",
        )  # fmt: skip
    return given


def name_of(given: Any) -> str:
    """What to call in records whatever stands in the place of a `Model`."""
    if isinstance(given, Model):
        return given.name
    return getattr(given, "__name__", type(given).__name__)


def _not_linen(field: str, name: str, made: str) -> UserError:
    fix = (
        f"Write it with flax.linen, or let Flax translate it: flax.nnx.bridge.to_linen({made}), of the class "
        "and its arguments but for rngs, is a linen module."
    )
    return UserError(field, name, "this is a flax.nnx module, and flax.linen's are trained here", fix)


class Adapted(nn.Module):
    """Calls `inner` as the engine calls a model: `(images, train=..., mask=...)`; logits are float32.

    Attributes:
      inner: the user's module. It shares this module's scope, so no path changes.
      train_name: its keyword for training, if any.
      own_mask: whether it takes `mask` itself; if not, its `nn.BatchNorm`s are given the mask.
    """

    inner: nn.Module
    train_name: str | None
    own_mask: bool

    def setup(self):
        """Puts the inner module's variables where they would be without this one."""
        nn.share_scope(self, self.inner)

    def __call__(self, x: jax.Array, *, train: bool = False, mask: jax.Array | None = None) -> jax.Array:
        """f32[B, H, W, C] -> f32[B, num_classes]."""
        keywords: dict[str, Any] = {}
        if self.train_name is not None:
            keywords[self.train_name] = train == _TRAIN_NAMES[self.train_name]
        if self.own_mask:
            keywords["mask"] = mask
        inner: Any = self.inner
        if self.own_mask or mask is None:
            out = inner(x, **keywords)
        else:
            # A batch of nothing but padding would divide by zero in Flax's statistics.
            rows = mask | ~jnp.any(mask)
            with nn.intercept_methods(_mask_batch_norms(rows)):
                out = inner(x, **keywords)
        return out.astype(jnp.float32) if isinstance(out, jax.Array) else out


def check_shapes(input_shape: Sequence[int], num_classes: int) -> tuple[int, ...]:
    """(H, W, C) of an image or (d,) of a vector, as integers.

    Raises:
      UserError: neither three positive integers nor one, or no output.
    """
    shape = tuple(input_shape) if isinstance(input_shape, list | tuple) else ()
    if len(shape) not in (1, 3) or not all(isinstance(n, int) and n > 0 for n in shape):
        raise UserError(
            "model.input_shape", input_shape,
            "an image is (height, width, channels) and a vector (features,), positive integers",
            "Grey images have one channel: (28, 28, 1).",
        )  # fmt: skip
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
        why = "a classifier needs two classes or more, a regression one output"
        raise UserError("model.num_classes", num_classes, why, "Give 2 or more, or 1.")
    return shape


def _keywords(module: nn.Module) -> Callable[[str], bool]:
    parameters = inspect.signature(type(module).__call__).parameters
    return lambda name: name in parameters


def _mask_batch_norms(rows: jax.Array):
    def inject(next_call, args, kwargs, context):
        if isinstance(context.module, nn.BatchNorm) and context.method_name == "__call__":
            x = args[0] if args else kwargs["x"]
            if kwargs.get("mask") is None and x.shape[0] == rows.shape[0]:
                kwargs = {**kwargs, "mask": rows.reshape((-1,) + (1,) * (x.ndim - 1))}
        return next_call(*args, **kwargs)

    return inject


def _check_output(seen: tracing.Trace, name: str, num_classes: int, has_field: bool) -> None:
    shape = getattr(seen.output, "shape", None)
    if shape != (1, num_classes):
        found = f"an array of shape {shape}" if shape is not None else f"a {type(seen.output).__name__}"
        fix = "Let __call__ return the logits alone, one column per class."
        if has_field and shape is not None and len(shape) == 2:
            fix = (
                f"Give num_classes={num_classes}: an instance keeps its own, and only where the module is "
                "given by name is it filled in."
            )
        raise UserError(
            "model.num_classes", num_classes,
            f"for one image {name} returns {found}, not logits of shape (1, {num_classes})", fix,
        )  # fmt: skip
    for path, leaf in seen.params.items():
        if leaf.dtype != jnp.float32:
            raise UserError(
                "model", name, f"parameter {'/'.join(path)} is {leaf.dtype}",
                "Keep parameters float32 (`param_dtype`); `dtype` alone sets the precision of the work.",
            )  # fmt: skip
    if seen.keys:
        raise UserError(
            "model", name, f"{'/'.join(seen.keys[0])} is a random key; these have no mean over clients",
            "Draw from `self.make_rng(\"dropout\")`, which is new in every step.",
        )  # fmt: skip


def _points(seen: tracing.Trace, wanted: Sequence[PeelPoint | str]) -> tuple[PeelPoint, ...]:
    marked = {point.name: point for point in tracing.peel_points(seen)}
    if not wanted:
        return tuple(marked.values())
    points = []
    for point in wanted:
        point = PeelPoint(point, (*point.split("/"), "kernel")) if isinstance(point, str) else point
        if point.name not in marked:
            known = ", ".join(marked) or "none"
            raise UserError(
                "model.peel_points", point.name,
                f"the module does not mark this layer's input (marked: {known})",
                "Call `fedjax_sim.models.peel(self, layer_name, x)` just before the layer.",
            )  # fmt: skip
        if point.kernel not in seen.params:
            raise UserError(
                "model.peel_points", "/".join(point.kernel), "there is no such parameter",
                f"The kernels are {', '.join('/'.join(p) for p in seen.params if p[-1] == 'kernel')}.",
            )  # fmt: skip
        points.append(point)
    return tuple(points)


def _warn(seen: tracing.Trace, name: str, own_mask: bool) -> None:
    foreign = [path for path in seen.batch_stats if path[:-1] not in seen.batch_norms]
    if foreign and not own_mask:
        warnings.warn(
            f"{name} keeps batch statistics ({'/'.join(foreign[0])}) but its __call__ takes no `mask`. A "
            "client's last batch is padded, and the padding would count in those statistics. Take `mask` "
            "(bool[B]) and leave out rows that are False, as fedjax_sim.models.norms.BatchNorm does.",
            stacklevel=3,
        )
    if seen.plain_convs:
        warnings.warn(
            f"{name} uses plain Flax convolutions ({', '.join(seen.plain_convs[:3])}): on a CPU their "
            "gradients are about 80 times slower inside a compiled loop. fedjax_sim.models.Conv takes the "
            "same arguments and has the same parameters.",
            stacklevel=3,
        )
