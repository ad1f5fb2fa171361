"""The page `reference/configuration.md`: every field of a `RunConfig`, made from the dataclasses."""

from __future__ import annotations

import dataclasses
import typing

import generated

from fedjax_sim import config as config_lib
from fedjax_sim.config import RunConfig
from fedjax_sim.config.callbacks import CALLBACKS
from fedjax_sim.config.run import sections_of
from fedjax_sim.core.conv_impl import CONV_IMPLS
from fedjax_sim.data import partition_config

RESULTS = "results"
RECORDS = "what is recorded; not how the model is trained"
SPEED = "speed and memory; results by float rounding at most"
FILES = "what is written and shown"
CHANGES = {
    "evaluation": RECORDS,
    "peel": RECORDS,
    "inertia": RECORDS,
    "observers": RECORDS,
    "meters": RECORDS,
    "execution": SPEED,
    "output": FILES,
    "evaluation.batch_size": SPEED,
    "version": "nothing: it says how the file is to be read",
    "given": "nothing: a note of what Python gave",
    "callbacks": "when the run ends, or what is kept of it",
    "data.data_dir": "where files are looked for",
}
"""Section or field -> what it changes; anything else changes results."""
CHOICES = {
    "partition.kind": partition_config.KINDS,
    "partition.local_test": partition_config.LOCAL_TESTS,
    "execution.conv": ("auto", *CONV_IMPLS),
}
"""Where the annotation is text, and only some texts are taken."""
TYPES = {
    "algorithm": "the name of a [method](methods.md), or a mapping with `name` and its settings",
    "observers": "list of mappings with `name` and settings",
    "meters": "list of mappings with `name` and settings",
    "callbacks": "list of names, or of mappings with `name` and settings",
}
LINKS = {
    "observers": "[Your diagnostic](../tutorials/your-diagnostic.md)",
    "meters": "[Your diagnostic](../tutorials/your-diagnostic.md)",
    "callbacks": "[Your callback](../tutorials/your-callback.md), and [those shipped](#callbacks-shipped)",
    "algorithm": "[Methods](methods.md)",
}

_INTRO = """# Configuration

Every field of a run's configuration, `fs.RunConfig`. A field has one name everywhere:

=== "YAML"

    ```yaml
    rounds: 50
    local: {lr: 0.05, epochs: 2}
    ```

=== "Command line"

    ```console
    fedjax-sim run --rounds 50 --local.lr 0.05 --local.epochs 2
    ```

=== "Python"

    ```python
    fs.RunConfig(rounds=50, local=fs.LocalConfig(lr=0.05, epochs=2))
    ```

On the command line `_` may be written `-`, as in `--evaluation.per-client`, and a field that is true or
false is switched off with `no-`: `--output.no-progress`. Three sections may be a bare name in YAML: {bare}.
`fedjax-sim run --print-config` prints a configuration with every field.

What is wrong is refused before anything is compiled, with the field, its value, why, and what to do.

**What a field changes** stands with it. Those of [`execution`](#execution) change speed and memory alone; a
test runs the same configuration under different values of them and wants equal results.

"""


def sections() -> dict[str, type]:
    """Name of each section -> its class."""
    return {name: cls for name, cls in sections_of(RunConfig).items() if name != "algorithm"}


def changes(dotted: str) -> str:
    """What a field changes, in words."""
    return CHANGES.get(dotted, CHANGES.get(dotted.split(".")[0], RESULTS))


def page() -> str:
    """The page's Markdown."""
    bare = ", ".join(
        f"`{section}: {getattr(getattr(RunConfig(), section), field)}` is `{section}.{field}`"
        for section, field in config_lib.NAMED_BY.items()
    )
    out = [_INTRO.replace("{bare}", bare), _overview()]
    out += ["## Top level { #run }", "", "`fs.RunConfig`. " + generated.about(RunConfig), ""]
    inside = sections()
    texts = generated.attributes(RunConfig)
    for field in dataclasses.fields(RunConfig):
        if field.name not in inside:
            out += _field(RunConfig, field.name, field.name, texts.get(field.name, ""))
    for name, cls in inside.items():
        out += [f'## `{name}` {{ #{name} data-toc-label="{name}" }}', ""]
        out += [f"`fs.{cls.__name__}`. " + generated.about(cls), ""]
        texts = generated.attributes(cls)
        for field in dataclasses.fields(cls):
            out += _field(cls, field.name, f"{name}.{field.name}", texts.get(field.name, ""))
    out += ["## Callbacks that are shipped { #callbacks-shipped }", ""]
    out += [
        "Each is an entry of the list [`callbacks`](#callbacks): `callbacks: [{name: early_stopping}]`.",
        "",
    ]
    for name, cls in CALLBACKS.items():
        out += [f'### `{name}` {{ #callbacks.{name} data-toc-label="{name}" }}', "", generated.about(cls), ""]
        out += [_settings(cls, f"callbacks.{name}"), ""]
    return "\n".join(out)


def _overview() -> str:
    rows = []
    for name, cls in sections().items():
        fields = ", ".join(f"[`{field.name}`](#{name}.{field.name})" for field in dataclasses.fields(cls))
        rows.append([f"[`{name}`](#{name})", fields])
    top = [field.name for field in dataclasses.fields(RunConfig) if field.name not in sections()]
    rows.insert(0, ["[top level](#run)", ", ".join(f"[`{name}`](#{name})" for name in top)])
    return generated.table(["section", "fields"], rows) + "\n"


def _field(cls: type, name: str, dotted: str, text: str) -> list[str]:
    """A heading, what the field takes, and what it says."""
    hint = typing.get_type_hints(cls)[name]
    takes = TYPES.get(dotted) or generated.kind(hint, CHOICES.get(dotted, ()))
    facts = [f"**Takes** {takes}", f"**Default** {generated.shown(getattr(cls(), name))}"]
    facts.append(f"**Changes** {changes(dotted)}")
    link = f" See {LINKS[dotted]}." if dotted in LINKS else ""
    return [
        f'### `{dotted}` {{ #{dotted} data-toc-label="{name}" }}',
        "",
        " · ".join(facts),
        "{ .facts }",
        "",
        generated.sentence(generated.escaped(text)) + link,
        "",
    ]


def _settings(cls: type, path: str) -> str:
    """A table of a class's fields."""
    hints, texts = typing.get_type_hints(cls), generated.attributes(cls)
    rows = [
        [
            f'<span id="{path}.{field.name}">`{field.name}`</span>',
            generated.kind(hints[field.name]),
            generated.shown(getattr(cls(), field.name)),
            generated.sentence(generated.escaped(texts.get(field.name, ""))),
        ]
        for field in dataclasses.fields(cls)
    ]
    return generated.table(["setting", "takes", "default", "what it is"], rows)
