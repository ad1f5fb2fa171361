"""The record of 24 runs: it covers every algorithm, and a comparison says what differs and by how much."""

import copy
import importlib.util
from pathlib import Path

import pytest

from fedjax_sim import algorithms, config

ROOT = Path(__file__).parents[2]
_SPEC = importlib.util.spec_from_file_location("fingerprint", ROOT / "scripts" / "fingerprint.py")
fingerprint = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(fingerprint)

RECORD = {
    "rounds": 3,
    "leaves": {
        "params/w": {"sha256": "a", "dtype": "float32", "shape": [2], "norm": 5.0, "first": [3.0, 4.0]},
        "params/b": {"sha256": "b", "dtype": "float32", "shape": [], "norm": 1.0, "first": [1.0]},
    },
    "rows": [[1, "accuracy", "", -1, "", (0.5).hex()], [1, "accuracy", "", 4, "", (0.25).hex()]],
}


def configurations():
    return {**fingerprint.ONE, **fingerprint.FOUR}


def test_24_configurations_cover_every_algorithm():
    found = set()
    for changes in configurations().values():
        run = config.from_dict(fingerprint.merged(fingerprint.BASE, changes))
        inside = run.algorithm
        while inside is not None:
            found.add(algorithms.name_of(inside))
            inside = getattr(inside, "inner", None)
    assert len(configurations()) == 24
    assert found == set(algorithms.CONFIGS)


def changed(change):
    other = copy.deepcopy(RECORD)
    change(other)
    return list(fingerprint.differences(RECORD, other))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda r: r.update(rounds=2), ["rounds: 3 -> 2"]),
        (
            lambda r: r["leaves"]["params/w"].update(sha256="c", norm=5.5, first=[3.0, 4.5]),
            ["leaf params/w: norm 5.0 -> 5.5, first values differ by up to 0.5"],
        ),
        (
            lambda r: r["leaves"]["params/b"].update(dtype="float64"),
            ["leaf params/b: float32[] -> float64[]"],
        ),
        (lambda r: r["leaves"].pop("params/b"), ["leaf params/b: only before"]),
        (
            lambda r: r["rows"][1].__setitem__(5, (0.375).hex()),
            ["row round 1, metric accuracy, client 4: 0.25 -> 0.375 (by 0.125)"],
        ),
        (
            lambda r: r["rows"][0].__setitem__(5, (0.75).hex()),
            ["row round 1, metric accuracy: 0.5 -> 0.75 (by 0.25)"],
        ),
        (lambda r: r["rows"].pop(), ["row round 1, metric accuracy, client 4: only before"]),
        (lambda r: r["rows"].reverse(), ["rows: the same, in another order"]),
        (lambda r: None, []),
    ],
)
def test_a_difference_is_told_with_its_place_and_size(change, told):
    assert changed(change) == told


def test_a_configuration_counts_once_however_much_differs(capsys):
    other = copy.deepcopy(RECORD)
    other["rows"] = []
    assert fingerprint.compare({"one": RECORD, "two": RECORD}, {"one": RECORD, "two": other}) == 1
    assert capsys.readouterr().out.endswith("1 of 2 configurations are the same to the bit\n")
