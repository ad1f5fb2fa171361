"""YAML and JSON as users write them, read so that nothing is lost or taken for something else.

A key that is there twice in one mapping is refused: both formats forbid it, and both parsers would drop the
first one. YAML's plain words are those of version 1.2 (https://yaml.org/spec/1.2.2/#103-core-schema), where
PyYAML has those of 1.1: `1e-4` is a number, `010` is ten, and `no`, `1:30` and `2026-01-01` are text.
"""

import json
import re
from collections.abc import Hashable
from typing import Any

import yaml


def parse_yaml(text: str) -> Any:
    """What a YAML document holds: dicts, lists, text, numbers, true, false and null.

    Merge keys (`<<: *defaults`) work, and a key beside them takes the place of a merged one.

    Raises:
      ValueError: it is not valid YAML, or a mapping has a key twice. The message is one line, with the place.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        place = error.problem_mark or error.context_mark
        where = "" if place is None else f"line {place.line + 1}, column {place.column + 1}: "
        what = ", ".join(part for part in (error.context, error.problem) if part)
        what += "; YAML is indented with blanks, not tabs" * ("'\\t'" in what)
        raise ValueError(f"{where}{what}") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def dump_yaml(value: Any) -> str:
    """A mapping as YAML that any reader, of version 1.1 or 1.2, reads back as the same."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)


def parse_json(text: str) -> Any:
    """What a JSON document holds.

    Raises:
      ValueError: it is not valid JSON, or an object has a key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        again = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"an object has the key {again!r} twice")
    return made


# --- the core schema of YAML 1.2 ------------------------------------------------------------------------

_WORDS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),  # of 1.1, and kept: it has no other spelling
)
"""Tag, which words have it, and their first characters. A whole number is tried before a float."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # not those of 1.1  # noqa: RUF012

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """As in PyYAML; a key that is there twice is an error, before anything is merged."""
        node = super().compose_mapping_node(anchor)  # pyright: ignore[reportAttributeAccessIssue] untyped
        lines: dict[Hashable, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == _TAG + "merge":
                continue
            name, line = self.construct_object(key), key.start_mark.line + 1
            if name in lines:
                problem = f"the key {key.value!r} is there twice, first in line {lines[name]}"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            lines[name] = line
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Puts merged mappings (`<<`) in the place of their names: of several the first one has a key.

        So it is in the merge type of YAML 1.1, and in PyYAML up to 6.0.3. In 6.0.4 the last one has it.
        """
        given, node.value = node.value, []
        own, merged = [], []
        for key, value in given:
            if key.tag != _TAG + "merge":
                own.append((key, value))
                continue
            named = value.value if isinstance(value, yaml.SequenceNode) else [value]
            for one in reversed(named):
                if not isinstance(one, yaml.MappingNode):
                    problem = "what is merged by << is no mapping"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=one.start_mark)
                self.flatten_mapping(one)
                merged += one.value
        node.value = merged + own  # of equal keys the later one counts

    def construct_int(self, node: yaml.ScalarNode) -> int:
        """`010` is 10, `0o10` is 8 and `0x10` is 16."""
        word = self.construct_scalar(node)
        return int(word, {"0o": 8, "0x": 16}.get(word[:2], 10))


_Emitter: Any = getattr(
    yaml, "CSafeDumper", yaml.SafeDumper
)  # libyaml is ten times as fast, and may be missing


class _Dumper(_Emitter):
    """Puts in quotes what either version takes for something else than text."""


_TAG = "tag:yaml.org,2002:"
for _tag, _words, _first in _WORDS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _tag, re.compile(f"^(?:{_words})$"), _first)
_Loader.add_constructor(_TAG + "int", _Loader.construct_int)
