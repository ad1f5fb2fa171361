"""What a run writes down: tidy rows."""

from typing import NamedTuple


class Row(NamedTuple):
    """One number of a run.

    Attributes:
      round: rounds of training that the model had behind it, from 1; for training metrics the round itself.
      metric: what was measured.
      value: the number.
      layer: at which layer, or "".
      client: of which client, or -1.
      state: of which model (`start`, `before`, `after` …), or "".
    """

    round: int
    metric: str
    value: float
    layer: str = ""
    client: int = -1
    state: str = ""
