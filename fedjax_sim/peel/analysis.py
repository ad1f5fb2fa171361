"""From a run's records to how aggregation changes every layer: per client, per layer, and through depth."""

from dataclasses import dataclass

import numpy as np

from fedjax_sim.errors import UserError
from fedjax_sim.peel import cfd
from fedjax_sim.records import Table


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


def layers(table: Table, metric: str, round_index: int | None = None) -> Layers:
    """What a run's probe recorded of `metric` in a round, the newest if None.

    The first weight layer, whose input is the image, is left out unless the metric depends on its weights
    (the `pabs` family): no merge changes an image.

    Args:
      table: `Run.metrics`.
      metric: one that has a layer and a state.
      round_index: from 1.

    Raises:
      UserError: the run has no such record.
    """
    columns = {name: table.column(name) for name in ("round", "client", "layer", "state", "metric", "value")}
    mine = (columns["metric"] == metric) & (columns["state"] != "") & (columns["layer"] != "")
    if not mine.any():
        known = sorted(set(columns["metric"][columns["layer"] != ""].tolist()))
        why = "this run has no record of it by layer and state"
        fix = f"It has {', '.join(known)}." if known else "Run with --peel.every."
        raise UserError("metric", metric, why, fix)
    rounds = np.unique(columns["round"][mine])
    number = int(rounds[-1]) if round_index is None else round_index
    mine &= columns["round"] == number
    if not mine.any():
        listed = ", ".join(map(str, rounds))
        raise UserError("round", number, f"{metric} was not measured in it", f"It was in {listed}.")
    # Layers and clients in the order of their first row, undefined ones among them.
    peeled = (columns["round"] == number) & (columns["layer"] != "")
    names = list(dict.fromkeys(columns["layer"][peeled].tolist()))
    clients = list(dict.fromkeys(columns["client"][peeled].tolist()))
    values = np.full((2, len(clients), len(names)), np.nan)
    place = {name: n for n, name in enumerate(names)}, {client: n for n, client in enumerate(clients)}
    state = {"before": 0, "after": 1}
    for client, layer, which, value in zip(
        *(columns[name][mine].tolist() for name in ("client", "layer", "state", "value")), strict=True
    ):
        values[state[which], place[1][client], place[0][layer]] = value
    first = 0 if metric.startswith("pabs") else 1
    return Layers(tuple(names[first:]), np.asarray(clients, np.int32), *values[:, :, first:])


def degradation(*tables: Table, round_index: int | None = None, metric: str = "log_c") -> cfd.Verdict:
    """Whether degradation accumulates with depth, over all measured clients of all given runs (seeds).

    Clients with an undefined value are left out.

    Args:
      *tables: `Run.metrics` of runs that differ in their seed only.
      round_index: which measured round; None: the newest of each.
      metric: of which the change is judged.

    Raises:
      UserError: nothing was recorded, the runs have other layers, or no client has all values.
    """
    found = [layers(table, metric, round_index) for table in tables]
    if len({one.names for one in found}) > 1:
        why = "the runs have different layers"
        raise UserError("tables", [one.names for one in found], why, "Compare runs of one model.")
    changes = np.concatenate([one.change for one in found])
    whole = changes[np.isfinite(changes).all(1)]
    if not len(whole):
        why = "no client has it at every layer, before and after"
        fix = "Measure clients with two classes or more, and enough samples of each (peel.class_samples)."
        raise UserError("metric", metric, why, fix)
    return cfd.verdict(whole)
