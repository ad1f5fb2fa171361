"""What others build on stays as it is unless a change is meant: `scripts/public_names.py --write` then."""

import importlib
import importlib.util
import re
from pathlib import Path

import pytest

import fedjax_sim as fs

ROOT = Path(__file__).parents[1]
_SPEC = importlib.util.spec_from_file_location("public_names", ROOT / "scripts" / "public_names.py")
public_names = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(public_names)


def test_public_names_and_their_parameters_are_those_that_are_kept():
    kept, found = public_names.KEPT.read_text().splitlines(), list(public_names.lines())
    gone, new = [line for line in kept if line not in found], [line for line in found if line not in kept]
    why = "deprecate it (docs/about/releases.md), or run scripts/public_names.py --write if it is meant"
    assert not gone, f"public names that are gone or have other parameters: {gone}; now: {new}. {why}"
    assert found == kept, f"new public names: {new}. Run scripts/public_names.py --write"


def test_names_carry_parameters_defaults_and_members():
    found = set(public_names.lines())
    assert "fedjax_sim.UserError(field, value, why, fix)" in found
    assert any(line.startswith("fedjax_sim.run(config") and "callbacks=" in line for line in found)
    assert "fedjax_sim.Run.metrics" in found or any(line.startswith("fedjax_sim.Run(") for line in found)
    assert any(line.startswith("fedjax_sim.LocalConfig(") and "lr=0." in line for line in found)
    assert "fedjax_sim.sweep: module fedjax_sim.studies.sweep" in found
    assert not any(re.search(r"0x[0-9a-f]{6}|\._", line) for line in found)


def test_what_the_reference_documents_is_public(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts" / "site")
    pages = pytest.importorskip("python_page", reason="the reference of Python names is not there").PAGES
    for page in pages.values():
        for module, members in page.modules.items():
            known = public_names.PUBLIC[module] or importlib.import_module(module).__all__
            assert set(members) <= set(known), module


def test_everything_public_is_there_and_said_to_be():
    page = (ROOT / "docs/about/releases.md").read_text()
    for module in public_names.PUBLIC:
        assert f"`{module}`" in page or f"{module}.main`" in page or module == "fedjax_sim", module
    assert len(set(fs.__all__)) == len(fs.__all__)
    assert all(hasattr(fs, name) for name in fs.__all__)
