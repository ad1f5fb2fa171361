"""From a run's records to how aggregation changes every layer: per client, per layer, and through depth.

`measurements` reads the whole table once; `layers`, `degradation` and `summary` are questions to it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedjax_sim.core.errors import UserError
from fedjax_sim.records import Table
from fedjax_sim.reports.peel import cfd

OF_KERNELS = ("pabs", "spread", "update_cosine", "stitched")
"""Prefixes of metrics that say something of the first layer too; the others are of its input, the image."""
ENOUGH = "Measure clients with two classes or more, and enough samples of each (peel.class_samples)."


@dataclass(frozen=True)
class Layers:
    """One metric of one round, at every layer, before and after the merge.

    Attributes:
      names: L weight layers, from the input to the classifier; the value is that of the layer's input.
      clients: i32[M].
      before: f64[M, L]; NaN where the client's samples do not define it.
      after: f64[M, L].
    """

    names: tuple[str, ...]
    clients: np.ndarray
    before: np.ndarray
    after: np.ndarray

    @property
    def change(self) -> np.ndarray:
        """After - before. f64[M, L]."""
        return self.after - self.before

    @property
    def relative(self) -> np.ndarray:
        """(after - before) / |before|. f64[M, L]."""
        return cfd.relative_change(self.before, self.after)


@dataclass(frozen=True)
class Measurements:
    """What was measured of clients, in a run or in several that differ in their seed.

    Attributes:
      names: L weight layers, from the input to the classifier.
      seeds, rounds, clients: i64[n], of each measurement.
      by_layer: (metric, state) -> f64[n, L]; NaN where it is undefined or was not recorded.
      plain: (metric, state) -> f64[n], of metrics without a layer.
    """

    names: tuple[str, ...]
    seeds: np.ndarray
    rounds: np.ndarray
    clients: np.ndarray
    by_layer: dict[tuple[str, str], np.ndarray]
    plain: dict[tuple[str, str], np.ndarray]

    def __len__(self):
        return len(self.rounds)

    def where(self, chosen: np.ndarray) -> "Measurements":
        """Those of `chosen`, bool[n]."""
        return Measurements(
            self.names,
            self.seeds[chosen],
            self.rounds[chosen],
            self.clients[chosen],
            {key: values[chosen] for key, values in self.by_layer.items()},
            {key: values[chosen] for key, values in self.plain.items()},
        )

    def numbers(self) -> list[int]:
        """The measured rounds."""
        return np.unique(self.rounds).tolist()

    def at(self, number: int | None) -> "Measurements":
        """Those of a round, of the newest if None.

        Raises:
          UserError: it was not measured.
        """
        numbers = self.numbers()
        if number is not None and number not in numbers:
            listed = ", ".join(map(str, numbers))
            raise UserError("round", number, "nothing was measured in it", f"It was in {listed}.")
        return self.where(self.rounds == (numbers[-1] if number is None else number))

    def states(self, metric: str) -> list[str]:
        """Of which states a metric by layer was recorded, `before` and `after` first."""
        found = [state for name, state in self.by_layer if name == metric and state]
        return sorted(found, key=lambda state: {"before": 0, "after": 1}.get(state, 2))

    def first(self, metric: str) -> int:
        """Which layer is the first that a metric says something of: 0 or 1."""
        return 0 if metric.startswith(OF_KERNELS) else 1

    def values(self, metric: str, state: str = "") -> np.ndarray:
        """A metric from its `first` layer on, f64[n, L]; all NaN if it was not recorded."""
        empty = np.full((len(self), len(self.names)), np.nan)
        return self.by_layer.get((metric, state), empty)[:, self.first(metric) :]

    def scalar(self, metric: str, state: str = "") -> np.ndarray:
        """A metric without a layer, f64[n]; all NaN if it was not recorded."""
        return self.plain.get((metric, state), np.full(len(self), np.nan))

    def pair(self, metric: str, after: str = "after") -> Layers:
        """A metric before, and in the state `after`."""
        before, other = self.values(metric, "before"), self.values(metric, after)
        return Layers(self.names[self.first(metric) :], self.clients.astype(np.int32), before, other)


def measurements(table: Table, seed: int = 0) -> Measurements:
    """All of a run's rows by layer, and those without a layer of the same clients in the same rounds.

    Args:
      table: `Run.metrics`.
      seed: of the run.

    Raises:
      UserError: the run was not probed.
    """
    rows = table.to_arrow()
    coded = [rows[name].combine_chunks() for name in ("metric", "layer", "state")]
    metric, layer, state = (column.indices.to_numpy().astype(np.int64) for column in coded)
    metrics, layers_, states = (column.dictionary.to_pylist() for column in coded)
    number, client = (rows[name].to_numpy().astype(np.int64) for name in ("round", "client"))
    value = rows["value"].to_numpy()

    by_layer = np.asarray([name != "" for name in layers_], bool)[layer]
    probed = by_layer & np.asarray([name == "before" for name in states], bool)[state]
    if not probed.any():
        raise UserError(
            "run", f"{len(rows)} rows", "none of them is the probe's", "Run it with --peel.every."
        )
    # Layers in the order of their first row; a measurement is a client in a round.
    found = list(dict.fromkeys(layer[probed].tolist()))
    depth = np.zeros(len(layers_), np.int64)
    depth[found] = np.arange(len(found))
    key = (number << 32) + client
    spots = np.unique(key[probed])
    row = np.searchsorted(spots, key).clip(max=len(spots) - 1)
    kept = np.flatnonzero((spots[row] == key) & (client >= 0))

    deep: dict[tuple[str, str], np.ndarray] = {}
    plain: dict[tuple[str, str], np.ndarray] = {}
    kind = (metric * len(states) + state) * 2 + by_layer
    kept = kept[np.argsort(kind[kept], kind="stable")]
    for block in np.split(kept, np.flatnonzero(np.diff(kind[kept])) + 1):
        one = block[0]
        name = metrics[metric[one]]
        label = name.removeprefix("undefined/"), states[state[one]]
        shape, into = ((len(spots), len(found)), deep) if by_layer[one] else ((len(spots),), plain)
        values = into.setdefault(label, np.full(shape, np.nan))
        if name == label[0]:
            values[(row[block], depth[layer[block]]) if by_layer[one] else row[block]] = value[block]
    names = tuple(layers_[code] for code in found)
    seeds = np.full(len(spots), seed, np.int64)
    return Measurements(names, seeds, spots >> 32, spots & 0xFFFFFFFF, deep, plain)


def pooled(parts: Sequence[Measurements]) -> Measurements:
    """The measurements of several runs of one model, one after the other.

    Raises:
      UserError: the runs have different layers.
    """
    _check_names([part.names for part in parts])

    def joined(name: str) -> dict[tuple[str, str], np.ndarray]:
        keys = dict.fromkeys(key for part in parts for key in getattr(part, name))
        shape = (len(parts[0].names),) if name == "by_layer" else ()
        return {
            key: np.concatenate(
                [getattr(part, name).get(key, np.full((len(part), *shape), np.nan)) for part in parts]
            )
            for key in keys
        }

    seeds, rounds, clients = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("seeds", "rounds", "clients")
    )
    return Measurements(parts[0].names, seeds, rounds, clients, joined("by_layer"), joined("plain"))


def layers(table: Table, metric: str, round_index: int | None = None, *, after: str = "after") -> Layers:
    """What a run's probe recorded of `metric` in a round, the newest that has a value if None.

    The first weight layer, whose input is the image, is left out unless the metric depends on its weights
    (the `pabs` family): no merge changes an image.

    Args:
      table: `Run.metrics`.
      metric: one that has a layer and a state.
      round_index: from 1.
      after: the state that is compared with `before`; a control, say.

    Raises:
      UserError: the run has no such record, or no client's samples define it.
    """
    return _layers(measurements(table), metric, round_index, after)


def degradation(
    *tables: Table, round_index: int | None = None, metric: str = "log_c", after: str = "after"
) -> cfd.Verdict:
    """Whether degradation accumulates with depth, over all measured clients of all given runs (seeds).

    Clients with an undefined value are left out.

    Args:
      *tables: `Run.metrics` of runs that differ in their seed only.
      round_index: which measured round; None: the newest of each.
      metric: of which the change is judged.
      after: the state whose difference to `before` is judged.

    Raises:
      UserError: nothing was recorded, the runs have other layers, or no client has all values.
    """
    parts = [measurements(table) for table in tables]
    _check_names([part.names for part in parts])
    found = np.concatenate([_layers(part, metric, round_index, after).change for part in parts])
    whole = found[np.isfinite(found).all(1)]
    if not len(whole):
        raise UserError("metric", metric, f"no client has it at every layer, before and {after}", ENOUGH)
    return cfd.verdict(whole)


@dataclass(frozen=True)
class Cause:
    """Whether the change of log C is handed down through depth, from chimeras of one round.

    Attributes:
      inherited: how the inherited part runs through depth.
      injected: mean, low, high at the classifier's input.
      excess: mean, low, high of inherited - injected there.
    """

    inherited: cfd.Verdict
    injected: np.ndarray
    excess: np.ndarray

    @property
    def cumulative(self) -> bool:
        """The inherited part grows with depth and outweighs the injected one at the last layer."""
        return bool(self.inherited.low > 0 and self.excess[1] > 0)

    def words(self) -> str:
        """The judgement and its reason, a sentence."""
        slope = f"slope {self.inherited.slope:+.3f} [{self.inherited.low:+.3f}, {self.inherited.high:+.3f}]"
        excess = f"exceeds it by {self.excess[0]:+.3f} [{self.excess[1]:+.3f}, {self.excess[2]:+.3f}]"
        told = (
            f"the inherited change has {slope} over depth; at the last layer {self.injected[0]:+.3f} is "
            f"injected, and the inherited change {excess}"
        )
        return f"{'Cumulative' if self.cumulative else 'Not shown to be cumulative'}: {told}."


def cause(measured: Measurements) -> Cause | None:
    """What the chimeras of a round say; None if there are none, or none is defined at every layer."""
    parts = np.stack([measured.values(f"chimera_{part}") for part in ("inherited", "injected")], 1)
    parts = parts[np.isfinite(parts).all((1, 2))]
    if not len(parts) or parts.shape[2] < 2:
        return None
    inherited, injected = parts[:, 0], parts[:, 1]
    excess = cfd.estimate(inherited[:, -1:] - injected[:, -1:])[:, 0]
    return Cause(cfd.verdict(inherited), cfd.estimate(injected[:, -1:])[:, 0], excess)


PARTS = ("before", "after", "change", "relative")


def means(
    measured: Measurements, metric: str, state: str = "after"
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """A metric in a state against that before the merge, averaged over measurements that have both.

    A stitched accuracy is compared with that of the client's own model. What has no value before the merge
    (shift, spread, the chimeras' parts) has its own as `change`.

    Returns:
      `before`, `after`, `change` and `relative` (as of `Layers`) -> f64[3, L]: mean, low and high of the 95%
      bootstrap interval, NaN where nothing is defined; and how many measurements each is of, i64[L].
    """
    after = measured.values(metric, state)
    before = measured.values(metric, "before")
    none = np.full_like(after, np.nan)
    if metric.startswith("stitched_"):
        before = np.broadcast_to(measured.scalar("stitched_none")[:, None], after.shape)
    if (metric, "before") in measured.by_layer or metric.startswith("stitched_"):
        known = np.isfinite(before) & np.isfinite(after)
        before, after = np.where(known, before, np.nan), np.where(known, after, np.nan)
        parts = (before, after, after - before, cfd.relative_change(before, after))
    else:
        known, parts = np.isfinite(after), (none, none, after, none)
    found = cfd.estimate(np.concatenate(parts, 1)).reshape(3, len(PARTS), -1)
    return {part: found[:, place] for place, part in enumerate(PARTS)}, known.sum(0)


def summary(measured: Measurements) -> list[dict[str, Any]]:
    """`means` of every metric by round, layer and state, a row each; what is not defined is None.

    Columns: round, layer, metric, state, measurements, and before, after, change and relative, each with
    `_low` and `_high`.
    """
    rows = []
    for number in measured.numbers():
        here = measured.at(number)
        for metric, state in here.by_layer:
            if state == "before":
                continue
            found, counts = means(here, metric, state)
            for depth, name in enumerate(here.names[here.first(metric) :]):
                row = {"round": number, "layer": name, "metric": metric, "state": state}
                row["measurements"] = int(counts[depth])
                for part, values in found.items():
                    for suffix, value in zip(("", "_low", "_high"), values[:, depth].tolist(), strict=True):
                        row[part + suffix] = None if math.isnan(value) else value
                rows.append(row)
    return rows


def _layers(whole: Measurements, metric: str, number: int | None, after: str) -> Layers:
    states = whole.states(metric)
    if not states:
        known = ", ".join(sorted({name for name, state in whole.by_layer if state}))
        why = "this run has no record of it by layer and state"
        raise UserError("metric", metric, why, f"It has {known}.")
    if after not in states:
        known = ", ".join(states)
        raise UserError("after", after, f"{metric} was not measured of it", f"It was of {known}.")
    defined = np.isfinite(whole.pair(metric, after).change).any(1)
    if not defined.any():
        raise UserError("metric", metric, "no client's samples define it, in any round", ENOUGH)
    if number is None:
        number = int(whole.rounds[defined].max())
    found = whole.at(number).pair(metric, after)
    if not np.isfinite(found.change).any():
        listed = ", ".join(map(str, np.unique(whole.rounds[defined])))
        raise UserError("round", number, f"no client's samples define {metric}", f"They do in {listed}.")
    return found


def _check_names(names: Sequence[tuple[str, ...]]) -> None:
    if len(set(names)) > 1:
        told = " and ".join(f"{one[0]} … {one[-1]} ({len(one)})" for one in dict.fromkeys(names))
        raise UserError("runs", told, "the runs have different layers", "Compare runs of one model.")
