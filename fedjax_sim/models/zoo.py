"""The table of networks, and `create`, which makes one of them by name."""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax.numpy as jnp
from flax import linen as nn

from fedjax_sim.core import imports, memo
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.model import Model
from fedjax_sim.models import norms, tracing
from fedjax_sim.models.adapter import adapted, check_shapes
from fedjax_sim.models.femnist_cnn import FemnistCNN
from fedjax_sim.models.lenet import LeNet
from fedjax_sim.models.mcmahan import McMahanCNN
from fedjax_sim.models.mlp import MLP
from fedjax_sim.models.resnet20 import ResNet20
from fedjax_sim.models.resnet_lips import ResNet
from fedjax_sim.models.vgg import VGG, VGG16Mnist
from fedjax_sim.models.vit import ViT


@dataclasses.dataclass(frozen=True)
class Entry:
    """One network of the zoo.

    Attributes:
      module: Flax module class with `num_classes`.
      summary: one line for listings.
      options: fields of the module which a user may set.
      preset: fields that make this network out of the class.
      min_side: smallest height and width at which every layer still has something to read.
      vectors: whether it takes vectors (d,) as well as images.
    """

    module: type[nn.Module]
    summary: str
    options: tuple[str, ...] = ()
    preset: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    min_side: int = 1
    vectors: bool = False


_VGG11 = {"stages": ((64,), (128,), (256,), (512,), (512,)), "hidden": (), "weights": "kaiming"}
_CNN8 = {"stages": ((8, 8), (16, 16), (32, 32)), "hidden": (64,), "dropout": 0.0, "norm": "none"}


def _lips(blocks: tuple[int, ...], summary: str, **preset: Any) -> Entry:
    return Entry(ResNet, summary, ("norm",), {"blocks": blocks, **preset}, 8)


TABLE: dict[str, Entry] = {
    "mlp": Entry(
        MLP, "dense layers, by default the 2NN (200, 200) of the FedAvg paper", ("hidden",), vectors=True
    ),
    "mcmahan": Entry(
        McMahanCNN, "two 5x5 convolutions and a dense 512, the CNN of the FedAvg paper", (), {}, 4
    ),
    "lenet": Entry(LeNet, "FedMR's CIFAR CNN: 62,006 parameters", (), {}, 16),
    "femnist_cnn": Entry(FemnistCNN, "FedMR's FEMNIST CNN: 160,510 parameters", (), {}, 16),
    "resnet20": Entry(
        ResNet20,
        "FedMR's pre-activation bottleneck ResNet-20: 219,482 parameters",
        ("norm", "unused_norm"),
        {},
        4,
    ),
    "resnet20_femnist": Entry(
        ResNet20,
        "the same with 3x3 max pooling after the stem, for FEMNIST: 232,558 parameters",
        ("norm", "unused_norm"),
        {"stem_pool": True},
        4,
    ),
    "vgg16_bn": Entry(
        VGG, "FedMR's VGG-16 with batch norm: 33.6 million", ("norm", "dropout", "hidden"), {}, 32
    ),
    "vgg16_mnist": Entry(VGG16Mnist, "FedMR's five-convolution net for FEMNIST: 8.0 million", (), {}, 14),
    "vgg11_bn": Entry(VGG, 'LIPS\'s five-convolution "vgg11_bn": 3.9 million', ("norm",), _VGG11, 32),
    "cnn8": Entry(
        VGG,
        "a plain CNN for layer-peeled studies, six 3x3 convolutions and two dense layers, no normalisation "
        "unless asked for: 51,666 parameters",
        ("norm", "weights"),
        _CNN8,
        8,
    ),
    "resnet6": _lips((1, 1), "LIPS's ResNet-6, 7x7 stem: 0.3 million"),
    "resnet8": _lips((1, 1, 1), "LIPS's ResNet-8, 7x7 stem: 1.2 million"),
    "resnet10": _lips((1, 1, 1, 1), "LIPS's ResNet-10, 7x7 stem: 4.9 million"),
    "resnet18": _lips((2, 2, 2, 2), "ResNet-18 as in LIPS's code, 7x7 stem: 11.2 million"),
    "resnet34": _lips((3, 4, 6, 3), "ResNet-34 as in LIPS's code, 7x7 stem: 21.3 million"),
    "resnet18_cifar": _lips(
        (2, 2, 2, 2), "ResNet-18 for CIFAR, 3x3 stem without pooling: 11.2 million", stem="3x3"
    ),
    "vit": Entry(
        ViT,
        "a small vision transformer with separate query, key and value kernels",
        ("patch", "width", "depth", "heads", "mlp_ratio", "pool", "dropout"),
    ),
}

_CHOICES: dict[str, tuple[str, ...]] = {
    "norm": tuple(norms.KINDS),
    "pool": ("mean", "cls"),
    "weights": ("torch", "kaiming"),
}
_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def names() -> dict[str, str]:
    """Name of each network -> one line about it."""
    return {name: entry.summary for name, entry in TABLE.items()}


def create(name: str, input_shape: Sequence[int], num_classes: int, **options: Any) -> Model:
    """A network of the zoo, or one's own by its name.

    Args:
      name: one of `names()`; or `module:Class` or `module:function` of one's own, see
        `fedjax_sim.models.adapter.adapted`.
      input_shape: (H, W, C) of one image, or (d,) of a vector.
      num_classes: width of the outputs.
      **options: `dtype` ("float32" or "bfloat16", the precision of the computation; parameters and logits are
        float32 always), and what the network allows, for example `norm="group"`, `hidden=(64,)`, `patch=8`.

    Raises:
      UserError: unknown name or option, a value that does not fit, images too small for the network. Nothing
        has been traced by then.
    """
    if imports.is_own(name):
        found = imports.imported(name, "model.name")
        model = adapted(found, input_shape, num_classes, name=name, field="model.name", options=options)
        return dataclasses.replace(model, name=name)
    if name not in TABLE:
        near = difflib.get_close_matches(str(name), TABLE, n=3, cutoff=0.5)
        fix = f"Did you mean {' or '.join(near)}?" if near else f"There are {', '.join(TABLE)}."
        raise UserError(
            "model.name", name, "the zoo has no such network", f"{fix} One's own is module:Class."
        )
    shape = check_shapes(input_shape, num_classes)
    entry = TABLE[name]
    fields = {**entry.preset}
    for option, value in options.items():
        fields[option] = _check_option(name, entry, option, value)
    if len(shape) == 1 and not entry.vectors:
        fitting = " or ".join(other for other, found in TABLE.items() if found.vectors)
        why = f"it takes images, and these samples are vectors of {shape[0]} numbers"
        raise UserError("model.name", name, why, f"Choose {fitting}, or one's own (module:Class).")
    if len(shape) == 3 and min(shape[:2]) < entry.min_side:
        raise UserError(
            "model.name", name,
            f"it needs images of at least {entry.min_side}×{entry.min_side}, these are {shape[0]}×{shape[1]}",
            f"Choose a network for small images, such as {_small(min(shape[:2]))}, or resize.",
        )  # fmt: skip
    module: Any = entry.module(num_classes=num_classes, **fields)  # pyright: ignore[reportCallIssue]
    if isinstance(module, ViT):
        _check_vit(module, cast(tuple[int, int, int], shape))

    def traced() -> Model:
        points = tracing.peel_points(tracing.trace(module, shape, train=False, mask=None))
        return Model(name, module, shape, num_classes, points)

    return memo.once("model", (name, module, shape), traced)


def _check_option(name: str, entry: Entry, option: str, value: Any) -> Any:
    field = f"model.{option}"
    allowed = (*entry.options, "dtype")
    if option not in allowed:
        raise UserError(field, value, f"{name} has no such option", f"Its options are {', '.join(allowed)}.")
    if option == "dtype":
        text = value if isinstance(value, str) else jnp.dtype(value).name
        if text not in _DTYPES:
            raise UserError(field, value, "no such compute dtype", f"Choose one of {', '.join(_DTYPES)}.")
        return _DTYPES[text]
    if option in _CHOICES:
        if value not in _CHOICES[option]:
            raise UserError(
                field, value, "there is no such choice", f"Choose one of {', '.join(_CHOICES[option])}."
            )
        return value
    if option == "hidden":
        if not isinstance(value, list | tuple) or not all(_is_positive(n) for n in value):
            raise UserError(field, value, "widths are a list of positive integers", "For example [200, 200].")
        return tuple(value)
    if option == "dropout":
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
            raise UserError(field, value, "a dropout rate lies in [0, 1)", "0 switches it off.")
        return float(value)
    if option == "unused_norm":
        if not isinstance(value, bool):
            raise UserError(field, value, "this is a switch", "Give true or false.")
        return value
    if not _is_positive(value):
        raise UserError(field, value, "this is a positive integer", "Give 1 or more.")
    return value


def _is_positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _check_vit(module: ViT, shape: tuple[int, int, int]) -> None:
    if shape[0] % module.patch or shape[1] % module.patch:
        raise UserError(
            "model.patch", module.patch, f"patches must tile the image, which is {shape[0]}×{shape[1]}",
            "Choose a divisor of both sides.",
        )  # fmt: skip
    if module.width % module.heads:
        raise UserError(
            "model.heads", module.heads, f"the heads share the width of a token, {module.width}, equally",
            "Choose a divisor of the width.",
        )  # fmt: skip


def _small(side: int) -> str:
    fitting = [name for name in ("resnet20", "mcmahan", "mlp") if TABLE[name].min_side <= side]
    return " or ".join(fitting)
