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
        entry, address = config.card, reference(config)
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
        rows.append(f"| `{name}` | {told} | {config.card.defaults} | {config.card.holds} |")
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
