"""Old names work, warn with the new name, and are refused beside the new one."""

import copy
import dataclasses
import pickle
import sys
import types

import pytest

from fedjax_sim import config
from fedjax_sim.cli import flags
from fedjax_sim.config import LocalConfig
from fedjax_sim.core import deprecation, rng
from fedjax_sim.core.deprecation import Renamed
from fedjax_sim.core.errors import UserError

SAID = r"is called {} since fedjax_sim 0\.2\. The old name ends with 0\.4\. Write {}\."


@deprecation.renamed_fields(speed=Renamed("rate", since="0.2", until="0.4"))
@dataclasses.dataclass(frozen=True)
class Settings:
    rate: float = 0.1
    steps: int = 1


def warns(new):
    return pytest.warns(FutureWarning, match=SAID.format(new, new))


def test_a_field_is_given_and_read_by_its_old_name():
    with warns(r"Settings\.rate") as caught:
        made = Settings(speed=0.5, steps=3)
    assert caught[0].filename == __file__
    assert made == Settings(0.5, 3)
    with warns(r"Settings\.rate") as caught:
        assert made.speed == 0.5
    assert caught[0].filename == __file__
    with pytest.raises(UserError, match="rate is set too"):  # by `replace`, which hands on all fields
        dataclasses.replace(made, speed=0.7)
    assert [field.name for field in dataclasses.fields(Settings)] == ["rate", "steps"]


def test_new_names_do_not_warn_and_copies_are_equal():
    made = dataclasses.replace(Settings(rate=0.5), steps=2)
    assert made == pickle.loads(pickle.dumps(made)) == copy.deepcopy(made)
    assert repr(made) == "Settings(rate=0.5, steps=2)" and hash(made) == hash(Settings(0.5, 2))
    with pytest.raises(TypeError, match="velocity"):
        Settings(velocity=1)


def test_files_have_old_fields_too_and_are_written_with_new_ones():
    with warns(r"local\.rate"):
        read = config.from_dict({"speed": 0.5}, Settings, "local.")
    assert config.to_dict(read) == {"rate": 0.5, "steps": 1}


@pytest.mark.parametrize(
    ("words", "steps", "kept"),
    [
        (["--local.passes", "3"], 3, False),
        (["--local.passes=3", "--local.remember-optimizer"], 3, True),
        (["--local.no-remember-optimizer", "--local.epochs", "4"], 4, False),
    ],
)
def test_flags_have_old_names_too(monkeypatch, words, steps, kept):
    old = {
        "passes": Renamed("epochs", since="0.2", until="0.4"),
        "remember_optimizer": Renamed("keep_optimizer", since="0.2", until="0.4"),
    }
    monkeypatch.setattr(LocalConfig, deprecation._FIELDS, old, raising=False)
    with pytest.warns(FutureWarning, match=r"--local\.\S+ is called --local\.\S+ since"):
        read, _ = flags.parse(words, "run", "")
    assert (read.local.epochs, read.local.keep_optimizer) == (steps, kept)


@pytest.mark.parametrize(
    "make", [lambda given: Settings(**given), lambda given: config.from_dict(given, Settings)]
)
def test_a_field_by_both_names_is_refused(make):
    with pytest.raises(UserError, match=r"rate is set too.*Write .*rate alone"):
        make({"speed": 0.5, "rate": 0.5})


def test_a_module_finds_what_has_gone_elsewhere(monkeypatch):
    module = types.ModuleType("old_module_for_tests")
    names = {"stream": Renamed("fedjax_sim.core.rng:key_for", "0.2", "0.4")}
    module.__getattr__ = deprecation.moved_names(module.__name__, names)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with warns(r"fedjax_sim\.core\.rng\.key_for") as caught:
        assert module.stream is rng.key_for
    assert caught[0].filename == __file__
    with pytest.raises(AttributeError, match="'old_module_for_tests' has no attribute 'other'"):
        _ = module.other


def test_an_old_name_stays_for_a_minor_release():
    for since, until in (("0.2", "0.2.5"), ("0.3", "0.2"), ("1.0", "0.9")):
        with pytest.raises(ValueError, match="one minor release"):
            Renamed("rate", since, until)
    Renamed("rate", "0.10", "0.11")
    with pytest.raises(ValueError, match="speed or pace"):
        deprecation.renamed_fields(speed=Renamed("pace", "0.2", "0.4"))(Settings)
