"""The script that measures how cost grows: what of it needs no clock."""

import importlib.util
from pathlib import Path

PATH = Path(__file__).parents[2] / "scripts" / "benchmark" / "scaling.py"


def test_clients_that_train_alone_waste_little(capsys):
    spec = importlib.util.spec_from_file_location("scaling", PATH)
    assert spec is not None and spec.loader is not None
    scaling = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(scaling)
    scaling.padding()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 0.")]
    table = [line.strip("| ").split(" | ") for line in lines]
    assert len(table) == 8
    for alpha, _, wave, devices, waste in table:
        assert float(waste) >= 1, (alpha, wave, devices)
        assert wave != "1" or float(waste) <= 1.10, (alpha, wave, devices)
