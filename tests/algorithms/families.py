"""Algorithms that differ in the same place, of which a test of combinations takes one by default."""

from collections.abc import Iterable

import pytest

ALIKE = {
    "fedprox": (
        "fedntd",
        "moon",
        "fedsam",
        "fedasam",
        "pfedsd",
    ),  # another local objective
    "fedper": ("fedrep", "lg_fedavg", "fedbabu", "partial"),  # private leaves around an average
}
"""name -> those that meet what is around them as it does."""

PRESETS = ("fedavgm", "fedyogi", "fedasam")
"""Other settings of FedOpt, which FedAdam shows as well, and of FedSAM."""

STATELESS = ("fedntd", "fedsam", "fedbabu")
"""As FedProx they keep no more than FedAvg between rounds, and differ from it on clients alone."""


def one_of_each(names: Iterable[str], *further: str) -> list:
    """Parameters of a test; those that are alike to another are slow, and `further` ones."""
    return but_slow(names, *(name for alike in ALIKE.values() for name in alike), *further)


WIDE_OR_SINGLE = [
    pytest.param({"devices": 2, "wave": 2}, id="wide"),
    pytest.param({}, id="single", marks=pytest.mark.slow),
]
"""Layouts of a test against NumPy; that both give the same is asked in `test_everywhere.py`."""


def but_slow(names: Iterable[str], *slow: str) -> list:
    """Parameters of a test, some of them slow."""
    return [pytest.param(name, marks=[pytest.mark.slow] if name in slow else []) for name in names]
