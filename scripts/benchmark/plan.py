"""What runs in which order: the peers, the variants each is tried in, and the alternating schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

OURS = "ours"


@dataclass(frozen=True)
class Variant:
    """One way to run a peer.

    Attributes:
      name: what the table calls it.
      threads: threads in one operation.
      devices: workers side by side.
      launcher: arguments for the interpreter that come before the runner's file.
      options: further arguments of the runner.
    """

    name: str
    threads: int
    devices: int
    launcher: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """One process to start."""

    peer: str
    variant: Variant
    workload: str
    repetition: int


PEERS = (OURS, "torch", "fedjax", "pfl", "flwr")

TITLES = {
    OURS: "fedjax_sim",
    "torch": "PyTorch loop",
    "fedjax": "FedJAX",
    "pfl": "pfl-research",
    "flwr": "Flower simulation",
}

_SLOW = "a choice to save time: it needs tens of seconds to start and sends each model between processes; "
NOT_RUN = {
    ("flwr", "lenet"): _SLOW + "mcmahan-10 and mlp-100 show it",
    ("flwr", "mcmahan-100"): _SLOW + "mcmahan-10 and mlp-100 show it",
    ("flwr", "mlp-1000"): _SLOW + "mcmahan-10 and mlp-100 show it",
}
"""By (peer, workload), why a pair is left out on purpose; the table says so."""


def variants(peer: str, cores: int) -> tuple[Variant, ...]:
    """The ways a peer is tried on a machine of `cores` cores; the table shows the fastest and names it.

    Each peer gets the chance to use all cores in the way that it knows: threads within an operation, or
    workers side by side.
    """
    one, all_threads = Variant("1 thread", 1, 1), Variant(f"{cores} threads", cores, 1)
    spread = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={cores}")
    choices = {
        OURS: (Variant(f"{cores} devices", 1, cores),),
        "torch": (one, all_threads),
        "fedjax": (
            Variant("jit, 1 thread", 1, 1),
            Variant(f"jit, {cores} threads", cores, 1),
            Variant(f"pmap, {cores} devices", 1, cores),
        ),
        "pfl": (one, all_threads, Variant(f"{cores} processes", 1, cores, spread)),
        "flwr": (Variant(f"{cores} actors", 1, cores),),
    }[peer]
    if cores > 1:
        return choices
    return tuple(v for v in choices if v.devices == 1 and v is not all_threads)[:1]


def schedule(peers: Sequence[str], workloads: Sequence[str], repetitions: int, cores: int) -> tuple[Run, ...]:
    """All processes in the order in which they start.

    Repetitions are outermost and peers innermost: within one repetition of one workload all peers run next
    to one another, so that a drift of the machine's speed hits all alike and a ratio is taken between
    neighbours in time. The peers' order turns by one place with each repetition, so that none always comes
    first.
    """
    order = []
    for repetition in range(repetitions):
        turn = repetition % len(peers)
        for workload in workloads:
            for peer in (*peers[turn:], *peers[:turn]):
                if (peer, workload) not in NOT_RUN:
                    order += [Run(peer, variant, workload, repetition) for variant in variants(peer, cores)]
    return tuple(order)


def checks(peers: Sequence[str], names: Sequence[str], cores: int) -> tuple[Run, ...]:
    """One process for each peer (all its variants' arithmetic is the same: the last is run) and check."""
    return tuple(Run(peer, variants(peer, cores)[-1], name, 0) for name in names for peer in peers)


def is_hopeless(seconds: float, best: float, slack: float = 1.3) -> bool:
    """Whether a variant that took `seconds` a round need not be repeated, as a sibling took `best`."""
    return seconds > slack * best
