"""The list of mutants: each still has its line in the code, and each reason its mutant."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]
_SPEC = importlib.util.spec_from_file_location("mutate", ROOT / "scripts" / "mutate.py")
mutate = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(mutate)


def test_each_mutant_has_its_line_once():
    for module, old, new, *_ in mutate.MUTANTS:
        text = (ROOT / "fedjax_sim" / f"{module}.py").read_text()
        assert text.count(old) == 1 and old != new, (module, old)


def test_each_reason_is_of_a_mutant_and_each_test_exists():
    assert mutate.HARMLESS.keys() <= {(module, new) for module, _, new, *_ in mutate.MUTANTS}
    named = [path for tests in mutate.NEAREST.values() for path in tests if path.startswith("tests/")]
    named += [
        path for mutant in mutate.MUTANTS for path in (mutant[3:] or [[]])[0] if path.startswith("tests/")
    ]
    assert all((ROOT / path).is_file() for path in named)
