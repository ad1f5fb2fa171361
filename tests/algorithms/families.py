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
"""name -> those that meet what is around them as it does; each is run by itself in `test_everywhere.py`."""


def one_of_each(names: Iterable[str], *further: str) -> list:
    """Parameters of a test; those that are alike to another are slow, and `further` ones."""
    more = {name for alike in ALIKE.values() for name in alike} | set(further)
    return [pytest.param(name, marks=[pytest.mark.slow] if name in more else []) for name in names]
