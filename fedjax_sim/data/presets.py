"""Named sets: where each is found, and how the papers prepare it.

Preprocessing marked FedMR or LIPS was read in that paper's released code; the rest is our choice.
No preset downloads anything.
"""

import dataclasses
from types import MappingProxyType

from fedjax_sim.tasks.preprocessing import Preprocessing

_HALF = Preprocessing((0.5,), (0.5,))
_CIFAR100 = Preprocessing((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
_LIPS = Preprocessing((0.507, 0.487, 0.441), (0.267, 0.256, 0.276), flip=True, crop_padding=4, rotation=15.0)
_DUALFED = Preprocessing((0.0,), (1.0,), flip=True, rotation=30.0)
_UNKNOWN = "no licence stated by its authors; check before you publish or sell"


@dataclasses.dataclass(frozen=True)
class Preset:
    """One row of the table.

    Attributes:
      npz: stems of the `.npz` files that are looked for, in this order.
      num_classes: what the set has.
      preprocessing: the paper's.
      origin, licence: in words.
      tfds: its name in tensorflow-datasets, or "".
      tfds_label: the feature with the labels there.
      npz_labels: which labels of the file: "" or "coarse".
      idx: whether it is published as idx files as well, which `idx:FOLDER` reads.
      transpose: whether tensorflow-datasets stores it with height and width swapped.
      folder: names of image folders that are looked for.
      size: (H, W) to resize to, where images differ or the papers do so.
      classes: the classes to keep, where the papers use some only.
      class_names: for files that name none.
      members: presets of a union, one domain each.
      shape: (H, W, C) of its images as published; () where they differ.
      why: where the preprocessing comes from.
    """

    npz: tuple[str, ...]
    num_classes: int
    preprocessing: Preprocessing
    origin: str
    licence: str
    tfds: str = ""
    tfds_label: str = "label"
    npz_labels: str = ""
    idx: bool = False
    transpose: bool = False
    folder: tuple[str, ...] = ()
    size: tuple[int, int] | None = None
    classes: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    members: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()
    why: str = "our choice"


_DIGITS = tuple("0123456789")
_BYCLASS = _DIGITS + tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
_TEN = (
    "bird",
    "feather",
    "headphones",
    "ice_cream",
    "teapot",
    "tiger",
    "whale",
    "windmill",
    "wine_glass",
    "zebra",
)

_CIFAR = Preset(
    ("cifar10",),
    10,
    _HALF,
    "CIFAR-10 (Krizhevsky, 2009)",
    _UNKNOWN,
    tfds="cifar10",
    shape=(32, 32, 3),
    why="FedMR's code: no augmentation",
)
_FINE = Preset(
    ("cifar100",),
    100,
    _CIFAR100,
    "CIFAR-100, 100 classes (Krizhevsky, 2009)",
    _UNKNOWN,
    tfds="cifar100",
    shape=(32, 32, 3),
    why="FedMR's code",
)
_TINY = Preset(
    ("tiny-imagenet", "tiny_imagenet"),
    200,
    Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "Tiny ImageNet, 64x64, its validation folder as test (Stanford CS231n, from ImageNet)",
    "ImageNet's terms: non-commercial research",
    folder=("tiny-imagenet-200", "tiny-imagenet", "tiny_imagenet"),
    size=(64, 64),
    shape=(64, 64, 3),
)

PRESETS = MappingProxyType(
    {
        "cifar10": _CIFAR,
        "cifar10-lips": dataclasses.replace(
            _CIFAR,
            preprocessing=Preprocessing((0.0,), (1.0,)),
            why="LIPS's code: neither normalisation nor augmentation",
        ),
        "cifar100": _FINE,
        "cifar100-coarse": dataclasses.replace(
            _FINE,
            num_classes=20,
            npz_labels="coarse",
            tfds_label="coarse_label",
            origin="CIFAR-100, 20 superclasses (Krizhevsky, 2009)",
            why="FedMR's code, which trains on these 20",
        ),
        "cifar100-lips": dataclasses.replace(_FINE, preprocessing=_LIPS, why="LIPS's code"),
        "femnist": Preset(
            ("femnist",),
            62,
            Preprocessing((0.5,), (0.5,), invert=True),
            "FEMNIST (LEAF, Caldas et al., 2018, from NIST SD 19); white background, writer ids",
            "NIST SD 19 is a work of the United States government; LEAF's code is BSD-2-Clause",
            shape=(28, 28, 1),
            class_names=_BYCLASS,
            why="FedMR's code: (0.5 - x) / 0.5",
        ),
        "emnist": Preset(
            ("emnist",),
            62,
            _HALF,
            "EMNIST by class (Cohen et al., 2017); black background, no writer ids",
            "NIST SD 19 is a work of the United States government",
            tfds="emnist/byclass",
            shape=(28, 28, 1),
            idx=True,
            transpose=True,
            class_names=_BYCLASS,
            why="our choice; what FedMR's FEMNIST becomes after its inversion",
        ),
        "fashion_mnist": Preset(
            ("fashion_mnist",),
            10,
            _HALF,
            "Fashion-MNIST (Xiao et al., 2017)",
            "MIT",
            tfds="fashion_mnist",
            shape=(28, 28, 1),
            idx=True,
        ),
        "mnist": Preset(
            ("mnist",),
            10,
            _HALF,
            "MNIST (LeCun et al., 1998)",
            _UNKNOWN,
            tfds="mnist",
            shape=(28, 28, 1),
            class_names=_DIGITS,
            idx=True,
        ),
        "svhn_cropped": Preset(
            ("svhn_cropped", "svhn"),
            10,
            _HALF,
            "Street View House Numbers, cropped digits (Netzer et al., 2011)",
            "non-commercial use only",
            tfds="svhn_cropped",
            shape=(32, 32, 3),
            class_names=_DIGITS,
        ),
        "usps": Preset(
            ("usps",), 10, _HALF, "USPS digits (Hull, 1994)", _UNKNOWN, class_names=_DIGITS, shape=(16, 16, 1)
        ),
        "mnist_m": Preset(
            ("mnist_m",),
            10,
            _HALF,
            "MNIST-M (Ganin et al., 2016)",
            _UNKNOWN,
            class_names=_DIGITS,
            shape=(32, 32, 3),
        ),
        "synth_digits": Preset(
            ("synth_digits", "synth_digits_redrawn"),
            10,
            _HALF,
            "SynthDigits (Ganin and Lempitsky, 2015), or a redrawing of it: the file's name tells",
            _UNKNOWN,
            class_names=_DIGITS,
            shape=(32, 32, 3),
        ),
        "digit-five": Preset(
            ("digit-five",),
            10,
            Preprocessing((0.5,) * 3, (0.5,) * 3),
            "five sets of digits, one domain each",
            "as its members",
            size=(28, 28),
            members=("mnist", "svhn_cropped", "usps", "mnist_m", "synth_digits"),
            why="28x28 as in FedBN; the rest our choice",
        ),
        "tiny-imagenet": _TINY,
        "tiny-imagenet-lips": dataclasses.replace(
            _TINY, preprocessing=dataclasses.replace(_LIPS, crop_padding=0), why="LIPS's code"
        ),
        "pacs": Preset(
            ("pacs",),
            7,
            _DUALFED,
            "PACS (Li et al., 2017): art painting, cartoon, photo, sketch",
            _UNKNOWN,
            folder=("pacs", "PACS"),
            size=(64, 64),
            why="DualFed's code: flip, rotation by 30 degrees, no normalisation; 64x64 is ours (theirs: 227)",
        ),
        "domainnet": Preset(
            ("domainnet",),
            10,
            _DUALFED,
            "DomainNet (Peng et al., 2019), the ten classes that FedBN and DualFed use",
            "fair use for non-commercial research, says its page",
            folder=("domainnet", "DomainNet"),
            size=(64, 64),
            classes=_TEN,
            why="DualFed's code: flip, rotation by 30 degrees, no normalisation; 64x64 is ours (theirs: 256)",
        ),
    }
)
"""All presets by name."""
