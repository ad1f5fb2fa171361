"""What is known of every algorithm beyond its settings: its cost, and what its tests hold.

What can be read off the records and docstrings is read off them; here stands the rest. `document` makes the
package's ALGORITHMS.md, with overheads from a measurement (`scripts/benchmark/methods.py`).
"""

import dataclasses
import inspect
import json
import re
from collections.abc import Mapping
from typing import Any

from fedjax_sim import algorithms


@dataclasses.dataclass(frozen=True)
class Entry:
    """One algorithm.

    Attributes:
      keeps: per client, between rounds.
      sends: a round's traffic relative to FedAvg's one model down and one up, both in models.
      passes: gradients a step in FedAvg's, a forward pass counting a third; E: local epochs.
      besides: other work.
      defaults: where the default settings come from.
      holds: the identities and invariants in its tests.
    """

    keeps: str = "nothing"
    sends: str = "1 + 1"
    passes: str = "1"
    besides: str = ""
    defaults: str = ""
    holds: str = ""


_PRIVATE = Entry(
    keeps="its private leaves",
    sends="the shared leaves, 1 + 1 without the private",
    holds="no private leaf is FedAvg; private leaves change by training alone",
)

ENTRIES: dict[str, Entry] = {
    "fedavg": Entry(defaults="McMahan et al.", holds="one client, identical clients"),
    "fedopt": Entry(
        besides="the optimiser's state on the server", defaults="ours", holds="SGD at 1 is what it wraps"
    ),
    "fedavgm": Entry(
        besides="1 momentum on the server",
        defaults="Hsu et al. (β); ours (η)",
        holds="β = 0, η = 1 is what it wraps",
    ),
    "fedadam": Entry(
        besides="2 moments on the server",
        defaults="Reddi et al.; ours (η)",
        holds="four rounds by hand, as optax has it",
    ),
    "fedyogi": Entry(
        besides="2 moments on the server",
        defaults="Reddi et al.; ours (η)",
        holds="four rounds by hand; a weight without gradients stays",
    ),
    "fedmr": Entry(
        besides="K models on the server",
        defaults="code of FedMR",
        holds="recombination keeps mean and dispersion; first stage ≥ rounds is uniform FedAvg",
    ),
    "fedindep": Entry(besides="K models on the server", defaults="none to set", holds="slots never mix"),
    "local": Entry(keeps="1 model", sends="0", defaults="none to set", holds="clients never mix"),
    "fedbn": dataclasses.replace(
        _PRIVATE, defaults="the paper (samples)", holds="private leaves change by training alone"
    ),
    "fedper": dataclasses.replace(_PRIVATE, defaults="ours: the classifier"),
    "fedrep": dataclasses.replace(
        _PRIVATE,
        defaults="ours",
        holds="private leaves change by training alone, and none while it is frozen",
    ),
    "lg_fedavg": dataclasses.replace(_PRIVATE, defaults="ours"),
    "fedbabu": Entry(sends="the body, 1 + 1 without the head", defaults="ours", holds="the head never moves"),
    "partial": dataclasses.replace(_PRIVATE, defaults="ours (a control)"),
    "interpolation": Entry(
        keeps="1 model", defaults="ours (a control)", holds="λ = 0 is FedAvg; λ = 1 and all clients is Local"
    ),
    "lips": Entry(
        keeps="the last gradient of the eligible tensors",
        besides="masks in sparse rounds",
        defaults="code of LIPS",
        holds="density 1 or no sparse round is what it wraps; counts kept are exact",
    ),
    "fedprox": Entry(defaults="both papers' code", holds="μ = 0 is what it wraps"),
    "fedsam": Entry(passes="2", defaults="Foret et al. (ρ)", holds="ρ = 0 is what it wraps"),
    "fedasam": Entry(passes="2", defaults="code of FedMR", holds="ρ = 0 is what it wraps"),
    "fedntd": Entry(passes="4/3", defaults="code of FedNTD", holds="β = 0 is what it wraps"),
    "moon": Entry(
        keeps="1 model",
        passes="5/3",
        defaults="an example of Li et al.'s; code LIPS builds on",
        holds="μ = 0 is what it wraps",
    ),
    "pfedsd": Entry(
        keeps="1 model", passes="4/3", defaults="code LIPS builds on", holds="λ = 0 trains what it wraps"
    ),
    "scaffold": Entry(
        keeps="1 control variate",
        sends="2 + 2",
        passes="1; option I 1 + 1/E",
        defaults="Karimireddy et al.; ours (divisor)",
        holds="the first round is uniform FedAvg; Σ c_i = N c; momentum does not drive the variates apart",
    ),
    "feddyn": Entry(
        keeps="1 gradient",
        defaults="code of FedDyn, CIFAR-10",
        holds="h is the mean of all clients' gradients",
    ),
    "fedexp": Entry(
        sends="1 + 1 and a number",
        defaults="ours (ε); code of FedMR in its variant",
        holds="ε → ∞ is uniform FedAvg, one iterate deployed",
    ),
    "fednova": Entry(defaults="Wang et al.", holds="equal steps are FedAvg"),
    "fedmut": Entry(
        besides="K models on the server",
        defaults="code of FedMut",
        holds="α = 0 is uniform FedAvg; after round T_b starts average to x",
    ),
    "clusamp": Entry(
        besides="N last updates and N² distances on the server; Ward's clustering on the host",
        defaults="code of FedMR (L1); Fraboni et al. (weights)",
        holds="places' distributions add up to p_i; draws are unbiased",
    ),
    "fedgen": Entry(
        keeps="its label counts",
        sends="1 + 1, the generator down, a head and counts up",
        passes="1, and the generator's forward",
        besides="50 generator steps on the server, on each device the same",
        defaults="code of FedMR, CIFAR-10",
        holds="a = b = 0 is FedAvg",
    ),
    "fedrod": Entry(
        keeps="1 classifier and label counts",
        defaults="of the paper (inferred)",
        holds="a client's model is the sum of heads",
    ),
    "fedcac": Entry(
        keeps="1 model",
        besides="K masks and their overlaps on the server",
        defaults="code LIPS builds on, CIFAR-10",
        holds="τ = 0 is FedAvg but for batch statistics; after β nobody shares",
    ),
    "ditto": Entry(
        keeps="1 model", passes="2", defaults="one of Li et al.'s", holds="the shared model is what it wraps"
    ),
}


def reference(config: type) -> str:
    """The first address in the docstring of an algorithm, or else of its module; "" if there is none."""
    found = re.search(_ADDRESS, f"{config.__doc__} {_module_text(config)}")
    return found.group(0).rstrip(".") if found else ""


def citation(config: type) -> str:
    """`Karimireddy et al., ICML 2020`, of what stands before the address in the module's docstring; or ""."""
    address = reference(config)
    before = " ".join(_module_text(config).split()).partition(address)[0] if address else ""
    # After the last address before it: authors, title, venue and year, each with its full stop.
    last = re.split(_ADDRESS, before)[-1]
    found = re.search(r"([A-Z][^.:;]*)\. [A-Z][^.]*(?:\.|…) ([^.]*\b20\d\d\b[^.]*)\.\s*$", last)
    if found is None:
        return ""
    authors = [name.strip() for name in re.sub(r"^\(.*?\) ", "", found.group(1)).split(",")]
    who = f"{authors[0]} et al." if len(authors) > 2 else " and ".join(authors)
    return f"{who}, {re.sub(r' [(].*', '', found.group(2))}"


_ADDRESS = r"https?://[^\s),;]+"


def _module_text(config: type) -> str:
    return getattr(inspect.getmodule(config), "__doc__", None) or ""


def costs(measured: Mapping[str, Any]) -> str:
    """What each algorithm keeps, sends and computes, as a Markdown table.

    Args:
      measured: {"setup": text, "ratios": name -> seconds of a round over FedAvg's, "explained": name -> what
        its passes and other work make of that}.
    """
    rows = [
        "| name | | paper | kept per client | traffic a round | passes a step | further work "
        "| measured | explained |",
        "|---|---|---|---|---|---|---|---:|---:|",
    ]
    for name, config in algorithms.CONFIGS.items():
        entry, address = ENTRIES[name], reference(config)
        paper = f"[{citation(config) or 'paper'}]({address})" if address else ""
        cells = (
            f"`{name}`", summary(config), paper, entry.keeps, entry.sends, entry.passes, entry.besides,
            _numbers(measured["ratios"], name), _numbers(measured["explained"], name),
        )  # fmt: skip
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def settings() -> str:
    """Each algorithm's settings, where they come from, and what its tests hold, as a Markdown table."""
    rows = ["| name | settings | from | tests hold |", "|---|---|---|---|"]
    for name, config in algorithms.CONFIGS.items():
        told = ", ".join(f"`{field} {value}`" for field, value in defaults(config).items())
        rows.append(f"| `{name}` | {told} | {ENTRIES[name].defaults} | {ENTRIES[name].holds} |")
    return "\n".join(rows)


def defaults(config: type) -> dict[str, str]:
    """An algorithm's settings by default, each as one word, as flags and YAML take it."""
    out = {}
    for field in dataclasses.fields(config):
        value = getattr(config(), field.name)
        name = algorithms.name_of(value)
        plain = list(value) if isinstance(value, tuple) else value
        out[field.name] = name or (plain if isinstance(plain, str) else json.dumps(plain).replace(" ", ""))
    return out


def summary(config: type) -> str:
    """The first line of the docstring, without an address."""
    line = (config.__doc__ or "").split("\n")[0]
    return re.sub(rf" \({_ADDRESS}\)", "", line).rstrip(".")


def _numbers(values: Mapping[str, float], name: str) -> str:
    """`1.20`, or with a method's further measurements `1.20; I 1.45`."""
    own = [key for key in values if key.split()[0] == name]
    return "; ".join(" ".join([*key.split()[1:], f"{values[key]:.2f}"]) for key in own) or "–"


_TEXT = """# Algorithms

Every algorithm is a file in `fedjax_sim/algorithms`, whose docstring gives its source, its formulas, and what
in it is FOUND, INFERRED or OUR CHOICE ([what that means](../../CONTRIBUTING.md#found-inferred-our-choice)).
`fedjax-sim list` shows all settings.

Methods that act on the client alone (FedProx, FedSAM, FedASAM, FedNTD, MOON, pFedSD) or on the server's step
(FedOpt, FedAvgM, FedAdam, FedYogi), LIPS and Ditto take an `inner` algorithm, FedAvg unless told otherwise:
`--algorithm fedprox --algorithm.inner fedmr`; in YAML at any depth. What makes no sense together is refused,
with the reason, before anything is compiled.

FedAvg weighs clients by their samples (`weights: samples`). FedMR, FedIndep, SCAFFOLD, FedDyn, FedExP (as in
its paper) and FedMut weigh them equally by definition: compare these with `--algorithm.weights uniform`.
Weights by samples and `--cohort.sampling by-size` together count a client's size twice, once in how often it
is drawn and once in the mean; either alone makes what a client counts, over the rounds, grow with its size.

What a personalised algorithm is for is its clients' own accuracy, which `--evaluation.per-client` records, on
test samples that `--partition.local-test holdout` (or `matching`) gives them; `accuracy` is of the deployed
model on the global test set.

## What they cost

{costs}

Traffic counts models down + up for each client of a cohort, FedAvg's being 1 + 1. Passes count a step's
gradients, a forward pass being a third of one; E is the number of epochs. Measured: {setup}
Explained: what passes and further work make of that by their arithmetic; the test suite holds every measured
number to less than 1.3 times its explanation.

## What they are set to

{settings}
"""


def document(measured: Mapping[str, Any]) -> str:
    """The whole of ALGORITHMS.md; `measured` as of `costs`."""
    return _TEXT.format(costs=costs(measured), settings=settings(), setup=measured["setup"])
