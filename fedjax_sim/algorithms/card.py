"""What is known of a method beyond its settings: its name, what it costs, and what its tests hold."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Card:
    """One algorithm, as the attribute `card` of its configuration has it. `ALGORITHMS.md` is made of these.

    Attributes:
      name: in YAML and on the command line.
      keeps: per client, between rounds.
      sends: a round's traffic relative to FedAvg's one model down and one up, both in models.
      passes: gradients a step in FedAvg's, a forward pass counting a third; E: local epochs.
      besides: other work.
      defaults: where the default settings come from.
      holds: the identities and invariants in its tests.
    """

    name: str
    keeps: str = "nothing"
    sends: str = "1 + 1"
    passes: str = "1"
    besides: str = ""
    defaults: str = ""
    holds: str = ""
