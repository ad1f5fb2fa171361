"""What one abstract trace tells about a module: its peel points, its output, and what it is built of.

Nothing is computed or compiled; a trace takes some tenths of a second for the largest network of the zoo.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from fedjax_sim.core import model
from fedjax_sim.core.errors import UserError
from fedjax_sim.models.kernels import conv

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Trace:
    """Seen while a module initialised itself.

    Attributes:
      output: what the module returned, abstract.
      params: path of each parameter, in the order of making -> its shape and dtype.
      batch_stats: paths of the leaves of that collection.
      keys: paths of random keys in any collection.
      peeled: names marked by `peel`, in order, as paths.
      misread: what is wrong with a mark, in words, by its path.
      plain_convs: paths of convolutions that do not use `fedjax_sim.models.kernels.conv`.
      batch_norms: paths of Flax's own batch norms.
    """

    output: Any
    params: dict[Path, jax.ShapeDtypeStruct]
    batch_stats: tuple[Path, ...]
    keys: tuple[Path, ...]
    peeled: tuple[Path, ...]
    misread: dict[Path, str]
    plain_convs: tuple[str, ...]
    batch_norms: tuple[Path, ...]


def trace(module: nn.Module, input_shape: Sequence[int], **keywords: Any) -> Trace:
    """Initialises `module` abstractly on one image f32[1, H, W, C], as called with `keywords`."""
    plain_convs: list[str] = []
    batch_norms: list[Path] = []
    order: dict[str, list[Path]] = {}
    marks: list[tuple[Path, jax.Array]] = []
    reads: list[tuple[Path, Any]] = []

    def watch(next_call, args, kwargs, context):
        layer = context.module
        if context.method_name == "__call__":
            reads.append((layer.path, args[0] if args else None))
            if isinstance(layer, nn.BatchNorm):
                batch_norms.append(layer.path)
            elif _is_plain_conv(layer):
                plain_convs.append("/".join(layer.path))
        return next_call(*args, **kwargs)

    def init(key):
        image = jnp.zeros((1, *input_shape), jnp.float32)
        result: Any = module.init_with_output({"params": key, "dropout": key}, image, **keywords)
        output, variables = result
        # Dictionaries come out of `eval_shape` with sorted keys: the order has to be noted in here.
        for collection in ("params", "batch_stats", "peel"):
            order[collection] = list(traverse_util.flatten_dict(dict(variables.get(collection, {}))))
        return output, variables

    token = model.MARKS.set(marks)
    try:
        with nn.intercept_methods(watch):
            output, variables = jax.eval_shape(init, jax.random.key(0))
    finally:
        model.MARKS.reset(token)
    every: Any = traverse_util.flatten_dict(dict(variables))
    params: Any = traverse_util.flatten_dict(dict(variables.get("params", {})))
    return Trace(
        output=output,
        params={path: params[path] for path in order["params"]},
        batch_stats=tuple(order["batch_stats"]),
        keys=tuple(path for path, leaf in every.items() if _is_key(leaf)),
        peeled=tuple((*path[:-1], path[-1].removeprefix(model._PREFIX)) for path in order["peel"]),
        misread=_misread(marks, reads, params),
        plain_convs=tuple(dict.fromkeys(plain_convs)),
        batch_norms=tuple(dict.fromkeys(batch_norms)),
    )


def peel_points(seen: Trace) -> tuple[model.PeelPoint, ...]:
    """The peel points that the module marked, in the order of the network.

    Raises:
      UserError: a marked name is no layer with a kernel.
    """
    points = []
    for path in seen.peeled:
        kernel = (*path, "kernel")
        if kernel not in seen.params:
            raise UserError(
                "model.peel_points", "/".join(path),
                "this name is marked with `peel`, but no layer of that name has a kernel",
                "Give `peel` the name of the layer that reads the feature.",
            )  # fmt: skip
        if path in seen.misread:
            raise UserError(
                "model.peel_points", "/".join(path), seen.misread[path],
                "Call fedjax_sim.models.peel(self, name, x) once a layer, just before it, with what it gets.",
            )  # fmt: skip
        points.append(model.PeelPoint("/".join(path), kernel))
    return tuple(points)


def _misread(
    marks: Sequence[tuple[Path, Any]], reads: Sequence[tuple[Path, Any]], params: Mapping[Path, Any]
) -> dict[Path, str]:
    """Path of a mark -> why it cannot be the input of its layer; those in order are left out.

    Args:
      marks: (path of the layer that is named, the array that is marked).
      reads: (path of a module, what it was called with).
      params: path of each parameter -> its shape.
    """
    layers = {path[:-1] for path in params if path[-1] == "kernel"}
    wrong: dict[Path, str] = {}
    for place, (path, marked) in enumerate(marks):
        readers = ["/".join(one) for one, given in reads if given is marked and one in layers]
        kernel = params.get((*path, "kernel"))
        if path in (one for one, _ in marks[:place]):
            wrong[path] = "it is marked more than once"
        elif readers and "/".join(path) not in readers:
            wrong[path] = f"what is marked with this name is read by the layer {readers[0]}"
        elif kernel is not None and len(kernel.shape) in (2, 4) and marked.shape[-1] % kernel.shape[-2]:
            wide = f"{marked.shape[-1]} wide, and the layer reads {kernel.shape[-2]}"
            wrong[path] = f"what is marked with this name is {wide}"
    return wrong


def ends_in_softmax(jaxpr: Any) -> bool:
    """Whether what a traced function returns first are exponentials over their sum, or a sigmoid.

    Args:
      jaxpr: `jax.make_jaxpr(function)(…).jaxpr`. Casts, reshapes and calls are looked through; what was
        spelt in another way is not found.
    """
    made = {id(result): equation for equation in jaxpr.eqns for result in equation.outvars}

    def source(value):
        equation = made.get(id(value))
        while equation is not None and equation.primitive.name in _CHANGE_THE_FORM:
            equation = made.get(id(equation.invars[0]))
        return equation

    last = source(jaxpr.outvars[0])
    if last is None:
        return False
    inner = next((last.params[name] for name in ("jaxpr", "call_jaxpr") if name in last.params), None)
    if inner is not None and len(last.outvars) == 1:
        return ends_in_softmax(getattr(inner, "jaxpr", inner))
    if last.primitive.name == "logistic":
        return True
    if last.primitive.name != "div":
        return False
    above, below = (source(value) for value in last.invars)
    summed = below is not None and below.primitive.name == "reduce_sum" and source(below.invars[0])
    return above is not None and above.primitive.name == "exp" and summed is above


_CHANGE_THE_FORM = ("convert_element_type", "reshape", "broadcast_in_dim", "squeeze", "copy", "stop_gradient")


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _is_plain_conv(layer: nn.Module) -> bool:
    if not isinstance(layer, nn.Conv | nn.ConvLocal | nn.ConvTranspose) or isinstance(layer, conv.Conv):
        return False
    spelled = getattr(layer, "conv_general_dilated", None), getattr(layer, "conv_general_dilated_cls", None)
    return all(f in (None, jax.lax.conv_general_dilated) for f in spelled)
