"""YAML and JSON as users write them: nothing is lost, and nothing is taken for something else."""

import math

import pytest
import yaml

from fedjax_sim.core.documents import dump_yaml, parse_json, parse_yaml

TWICE = {
    "at the top": (
        "local: {lr: 0.5}\nrounds: 3\nlocal: {momentum: 0.9}\n",
        "line 3, column 1: .*'local'.*line 1",
    ),
    "nested": ("a:\n  b: 1\n  c: 2\n  b: 3\n", "line 4, column 3: .*'b'.*line 2"),
    "a tab": ("a:\n\tb: 1\n", "line 2, column 1: .*blanks, not tabs"),
    "in one line": ("a: {b: 1, b: 2}", "line 1, column 11: .*'b'"),
    "in a list": ("- {a: 1}\n- {a: 1, a: 1}", "line 2, column 10: .*'a'"),
    "once in quotes": ("a: 1\n'a': 2\n", "line 2, column 1: .*'a'"),
    "numbers that are equal": ("16: 1\n0x10: 2\n", "line 2, column 1: .*'0x10'"),
    "beside a merge": ("d: &d {x: 1}\ne: {<<: *d, x: 2, x: 3}\n", "line 2, column 19: .*'x'"),
    "in what is merged": ("d: &d {x: 1, x: 2}\ne: {<<: *d}\n", "line 1, column 14: .*'x'"),
}


@pytest.mark.parametrize("name", TWICE)
def test_a_key_that_is_there_twice_is_refused_with_its_place(name):
    text, told = TWICE[name]
    with pytest.raises(ValueError, match=f"^{told}"):
        parse_yaml(text)


def test_merge_keys_work_and_may_be_overridden():
    text = """
    first: &first {a: 1, b: 2}
    second: &second {<<: *first, b: 3}
    before: {b: 4, <<: *first}
    after: {<<: *first, b: 4}
    both: {<<: [*second, *first], c: 5}
    other: {<<: [*first, *second], d: 6}
    """
    read = parse_yaml(text)
    assert read["second"] == {"a": 1, "b": 3}
    assert read["before"] == read["after"] == {"a": 1, "b": 4}
    assert read["both"] == {"a": 1, "b": 3, "c": 5}
    assert read["other"] == {"a": 1, "b": 2, "d": 6}


WORDS = {
    "1e-4": 1e-4, "1E4": 1e4, "-2e+3": -2000.0, "1.5": 1.5, "1.": 1.0, ".5": 0.5, "-.inf": -math.inf,
    "010": 10, "-07": -7, "0": 0, "+3": 3, "0o10": 8, "0x1F": 31, "089": 89,
    "true": True, "FALSE": False, "null": None, "~": None, "": None,
    "no": "no", "yes": "yes", "on": "on", "Off": "Off", "1:30": "1:30", "1_000": "1_000",
    "2026-01-01": "2026-01-01", "1e": "1e", "=": "=", "nUll": "nUll", ".": ".",
}  # fmt: skip


@pytest.mark.parametrize("word", WORDS)
def test_plain_words_are_those_of_yaml_1_2(word):
    assert repr(parse_yaml(f"- {word}")) == repr([WORDS[word]])


@pytest.mark.parametrize("word", [*WORDS, "<<", "1_0.5", "12e03", "0b1", "1:30:00.5"])
def test_text_that_looks_like_something_else_survives_readers_of_either_version(word):
    written = dump_yaml({"text": word})
    assert parse_yaml(written) == yaml.safe_load(written) == {"text": word}


def test_numbers_survive_readers_of_either_version():
    values = {"a": [1e-5, 1e22, 0.1, 10, -3, True, None, math.inf], "b": {"c": 123456789.123}}
    assert parse_yaml(dump_yaml(values)) == yaml.safe_load(dump_yaml(values)) == values


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: [1\nb: 2", "line 2, column "),
        ("a: *b", "undefined alias 'b'"),
        ("{[a]: 1}", "line 1, column 2: .*unhashable"),
        ("a: !!python/none x", "tag"),
        ("a: 1\n---\nb: 2", "single document"),
        ("a: \x00", "control characters|not allowed"),
        ("[" * 3000, "too deeply"),
    ],
)
def test_what_is_no_yaml_is_said_in_one_line(text, told):
    with pytest.raises(ValueError, match=told) as caught:
        parse_yaml(text)
    assert "\n" not in str(caught.value)


def test_json_objects_have_each_key_once():
    assert parse_json('{"a": {"b": 1}, "c": [{"b": 1}, {"b": 2}]}') == {
        "a": {"b": 1},
        "c": [{"b": 1}, {"b": 2}],
    }
    for text in ('{"a": 1, "a": 1}', '[{"x": {"b": 1, "a": 2, "a": 3}}]'):
        with pytest.raises(ValueError, match="the key 'a' twice"):
            parse_json(text)
    with pytest.raises(ValueError, match="too deeply"):
        parse_json("[" * 100_000)
