"""The page `reference/methods.md`: every method with its settings, source, cost and what its tests hold."""

from __future__ import annotations

import dataclasses
import inspect
import json
import typing
from typing import Any

import generated

from fedjax_sim import algorithms
from fedjax_sim.core.algorithm import AlgorithmConfig
from fedjax_sim.core.documents import dump_yaml
from fedjax_sim.reports import algorithm_docs

MEASURED = "scripts/benchmark/results/methods.json"
EXAMPLES: dict[str, dict[str, Any]] = {
    "fedbn": {"model": {"name": "resnet8"}},
    "fedmr": {"algorithm": {"first_stage": 5}},
    "lips": {"algorithm": {"density": 0.5, "period": 5, "inner": "fedmr"}, "model": {"name": "cnn8"}},
    "fedprox": {"algorithm": {"mu": 0.1, "inner": "fedavg"}},
    "partial": {"algorithm": {"first": 1}},
}
"""Method -> what its example says besides the name."""
PERSONALISED = (
    "local", "fedbn", "fedper", "fedrep", "lg_fedavg", "partial", "interpolation", "pfedsd", "fedrod",
    "fedcac", "ditto",
)  # fmt: skip
"""Methods under which clients use models of their own."""
OWN = {"evaluation": {"per_client": True}, "partition": {"clients": 20, "local_test": "holdout"}}
"""What has these models measured."""

_INTRO = """# Methods

Each method is one file of `fedjax_sim/algorithms`: formula and source on top, then a frozen dataclass of
settings whose `build` makes a record of pure functions. In YAML a method is `algorithm: NAME`, or a mapping
with `name` and its settings; on the command line `--algorithm NAME --algorithm.SETTING VALUE`; in Python
`fs.FedMR(first_stage=5)`.

{inner}

**Weights.** FedAvg weighs clients by their samples (`weights: samples`). FedMR, FedIndep, SCAFFOLD, FedDyn,
FedExP (as in its paper) and FedMut weigh them equally by definition: compare these with `weights: uniform`.
Weights by samples and `cohort.sampling: by_size` together count a client's size twice.

**Clients' own models.** What a personalised method is for is its clients' own accuracy. It is recorded with
[`evaluation.per_client`](configuration.md#evaluation.per_client) on test samples that
[`partition.local_test`](configuration.md#partition.local_test) gives them.

**Marks.** Formulas and constants are marked: <span class="mark">FOUND</span> was read in the source that is
named, <span class="mark">INFERRED</span> follows from it, <span class="mark">OUR CHOICE</span> is ours
([more](../../CONTRIBUTING.md#found-inferred-our-choice)).

## Overview

Traffic is in models down + up for each client of a cohort. *Time*: {setup}

{overview}
"""


def page() -> str:
    """The page's Markdown."""
    measured = json.loads(generated.of_file(MEASURED))
    wrapping = [f"[{cls.__name__}](#{name})" for name, cls in algorithms.CONFIGS.items() if _inner(cls)]
    inner = (
        f"**Around another.** {', '.join(wrapping)} have a setting `inner`, the method that they go around: "
        "FedAvg unless told otherwise. In YAML `algorithm: {name: fedprox, inner: fedmr}`, at any depth; on "
        "the command line `--algorithm fedprox --algorithm.inner fedmr`. What makes no sense together is "
        "refused, with the reason, before anything is compiled."
    )
    rows = []
    for name, cls in algorithms.CONFIGS.items():
        rows.append(
            [
                f"[`{name}`](#{name})",
                generated.sentence(generated.escaped(algorithm_docs.summary(cls))),
                _paper(cls) or "–",
                cls.card.keeps,
                cls.card.sends,
                _ratio(measured["ratios"], name),
            ]
        )
    heads = ["name", "what it is", "source", "kept per client", "traffic", "time"]
    out = [_INTRO.format(inner=inner, setup=measured["setup"], overview=generated.table(heads, rows))]
    told: dict[str, str] = {}
    for name, cls in algorithms.CONFIGS.items():
        out.append(_section(name, cls, measured, told))
    return "\n".join(out)


def example(name: str) -> dict[str, Any]:
    """A configuration that runs the method, as YAML has it."""
    more = dict(EXAMPLES.get(name, {}))
    chosen = more.pop("algorithm", {})
    made: dict[str, Any] = {"algorithm": {"name": name, **chosen} if chosen else name, **more}
    return made | OWN if name in PERSONALISED else made


def _section(name: str, cls: type, measured: dict[str, Any], told: dict[str, str]) -> str:
    card, module = cls.card, inspect.getmodule(cls)
    path = f"fedjax_sim/algorithms/{module.__name__.rsplit('.', 1)[-1]}.py" if module else ""
    out = [f'## {cls.__name__} {{ #{name} data-toc-label="{cls.__name__}" }}', ""]
    paper = _paper(cls)
    facts = [f"`{name}`", *([paper] if paper else [])]
    facts += [f"[Python](python/methods.md#fedjax_sim.{cls.__name__})", f"[source](../../{path})"]
    out += [" · ".join(facts), "{ .facts }", "", generated.about(cls), ""]
    out += ["```yaml", dump_yaml(example(name)).rstrip(), "```", ""]
    fields = dataclasses.fields(cls)
    out += ["**Settings**", ""] if fields else ["It has no settings.", ""]
    if fields:
        hints, texts, plain = typing.get_type_hints(cls), generated.attributes(cls), cls()
        rows = [
            [
                f'<span id="{name}.{field.name}">`{field.name}`</span>',
                generated.kind(hints[field.name]),
                generated.shown(getattr(plain, field.name)),
                generated.sentence(generated.escaped(texts.get(field.name, ""))),
            ]
            for field in fields
        ]
        out += [generated.table(["setting", "takes", "default", "what it is"], rows), ""]
    if card.defaults:
        out += [f"Defaults are from: {card.defaults}.", ""]
    lines = [f"- Kept per client between rounds: {card.keeps}", f"- Traffic: {card.sends}"]
    lines.append(f"- Passes a step, in FedAvg's: {card.passes}")
    lines += [f"- Further work: {card.besides}"] if card.besides else []
    ratio = _ratio(measured["ratios"], name)
    if ratio != "–":
        why = _ratio(measured["explained"], name)
        lines.append(f"- Time of a round over FedAvg's: {ratio} measured, {why} by its arithmetic")
    if card.holds:
        lines.append(f"- Tests hold: {card.holds}")
    out += ["**Cost and invariants**", "", *lines, ""]
    text = inspect.getdoc(module) or "" if module else ""
    if path in told:
        out += [f"Formula and source: see [{told[path]}](#{_named(told[path])}), in the same file.", ""]
    elif text:
        told[path] = cls.__name__
        out += ['??? info "Formula and source"', ""]
        out += ["    " + line if line else "" for line in generated.markdown(text).splitlines()]
        out.append("")
    return "\n".join(out)


def _named(class_name: str) -> str:
    return next(name for name, cls in algorithms.CONFIGS.items() if cls.__name__ == class_name)


def _inner(cls: type) -> bool:
    hints = typing.get_type_hints(cls)
    return any(hints[field.name] is AlgorithmConfig for field in dataclasses.fields(cls))


def _paper(cls: type) -> str:
    address = algorithm_docs.reference(cls)
    return f"[{algorithm_docs.citation(cls) or 'paper'}]({address})" if address else ""


def _ratio(values: dict[str, float], name: str) -> str:
    own = [key for key in values if key.split()[0] == name]
    return "; ".join(" ".join([*key.split()[1:], f"{values[key]:.2f}"]) for key in own) or "–"
