"""The settings of a partition, checked where they are made."""

import dataclasses
import math
import os

import numpy as np

from fedjax_sim.core.errors import UserError
from fedjax_sim.core.fields import Named
from fedjax_sim.core.paths import local

KINDS = (
    "iid",
    "dirichlet",
    "dirichlet-classes",
    "pathological",
    "shards",
    "domain",
    "natural",
    "quantity",
    "identical",
    "file",
)
LOCAL_TESTS = ("none", "holdout", "matching")
_FROM_DATA = ("domain", "natural", "file")
"""Kinds that can tell the number of clients themselves."""


@dataclasses.dataclass(frozen=True)
class PartitionConfig(Named):
    """How to cut a set into clients.

    Attributes:
      kind: `iid`; `dirichlet` (over clients for each class, FedMR's); `dirichlet-classes` (over
        classes for each client, LIPS's; clients may share samples); `pathological` (exactly
        `classes_per_client` classes each); `shards` (McMahan's sorted shards, as many for each
        client); `domain` (one or more clients for each domain); `natural` (one client for each
        writer); `quantity` (log-normal sizes); `identical` (the same samples for all, walked through in
        the same order: a control, in which clients of equal weight are one client); `file`. See
        `fedjax_sim.data.splits`.
      clients: N. None lets `domain`, `natural` and `file` take as many as there are.
      alpha: concentration of the Dirichlet kinds; small is heterogeneous.
      min_size: training samples that every client holds at least (before `holdout`), 0 counting as 1; for
        `natural`, writers with fewer are left out. Not applied to `file`.
      max_tries: draws of `dirichlet` before it gives up.
      classes_per_client: for `pathological`; shards for each client for `shards`.
      samples_per_client: exactly so many for each client: their size for `dirichlet-classes`
        (None: samples / clients), a random subset for the other kinds; for `identical` one subset of
        all samples, the same for all.
      test_samples_per_client: size of a `matching` test set (None: test samples / clients, or all that
        match for `domain` and `natural`).
      local_test: `none`; `holdout` takes a share of the client's own training samples, on which then nobody
        trains; `matching` draws from the test set what resembles the client: its writer, its domain, or its
        label mix.
      holdout: that share; where clients share samples, as near to it as can be.
      sigma: standard deviation of log size for `quantity`.
      path: of `file`: our own format, or the JSON files that FedMR's authors publish.
      seed: instead of the seed given to `partition`.

    Raises:
      UserError: naming `partition.<field>`.
    """

    kind: str = "dirichlet"
    clients: int | None = 20
    alpha: float = 0.5
    min_size: int = 10
    max_tries: int = 1000
    classes_per_client: int = 2
    samples_per_client: int | None = None
    test_samples_per_client: int | None = None
    local_test: str = "none"
    holdout: float = 0.2
    sigma: float = 1.0
    path: str | None = None
    seed: int | None = None

    def __post_init__(self):
        for field, known in (("kind", KINDS), ("local_test", LOCAL_TESTS)):
            if getattr(self, field) not in known:
                raise wrong(field, getattr(self, field), "not known", f"Use one of: {', '.join(known)}.")
        low = {"clients": 1, "min_size": 0, "max_tries": 1, "classes_per_client": 1, "seed": 0}
        low |= {"samples_per_client": 1, "test_samples_per_client": 1}
        optional = ("clients", "samples_per_client", "test_samples_per_client", "seed")
        for field, least in low.items():
            value = getattr(self, field)
            if value is None and field in optional:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
                raise wrong(field, value, f"not a whole number >= {least}", f"Use {least} or more.")
            object.__setattr__(self, field, int(value))
        for field, good, why in (
            ("alpha", lambda v: v > 0, "not a positive number"),
            ("sigma", lambda v: v >= 0, "not a number >= 0"),
            ("holdout", lambda v: 0 < v < 1, "not between 0 and 1"),
        ):
            value = getattr(self, field)
            number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or not good(value):
                fix = (
                    "Use 0.1 to 1 for strong heterogeneity, kind 'iid' for none."
                    if field == "alpha"
                    else "0.2 is usual."
                )
                raise wrong(field, value, why, fix if field != "sigma" else "0 gives equal sizes.")
            object.__setattr__(self, field, float(value))
        if self.clients is None and self.kind not in _FROM_DATA:
            raise wrong("clients", None, f"kind {self.kind!r} needs their number", "Say how many.")
        if self.kind == "file" and not self.path:
            raise wrong("path", self.path, "kind 'file' needs it", "Give the JSON file with the partition.")
        if isinstance(self.path, str | os.PathLike):
            local(self.path, "partition.path")
        if self.samples_per_client is not None:
            if self.kind in ("quantity", "file"):
                why = f"kind {self.kind!r} sets the sizes itself"
                raise wrong("samples_per_client", self.samples_per_client, why, "Leave it out.")
            if self.samples_per_client < self.min_size:
                why = f"less than partition.min_size = {self.min_size}"
                raise wrong("samples_per_client", self.samples_per_client, why, "Lower partition.min_size.")


def wrong(field: str, value: object, why: str, fix: str) -> UserError:
    """The error for one field of `PartitionConfig`.

    Args:
      field: its name, without `partition.`.
      value: what it is.
      why: what is wrong with it.
      fix: what to do.
    """
    return UserError(f"partition.{field}", value, why, fix)
