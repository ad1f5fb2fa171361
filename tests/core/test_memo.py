"""What is made once in a process, and what is made anew although its parts are equal."""

import dataclasses
import importlib
from collections.abc import Iterator

import jax
import optax
import pytest

import fedjax_sim as fs
from fedjax_sim.core import memo, paths, stacked
from fedjax_sim.core.task import Metric, task_loss
from fedjax_sim.engine import hosts
from fedjax_sim.engine.round import Round
from fedjax_sim.engine.simulation import Simulation
from fedjax_sim.runs import federation
from fedjax_sim.tasks.classification import ACCURACY


@dataclasses.dataclass(frozen=True)
class Own:
    """A user's record."""

    number: int = 0


def helper() -> None:
    """A user's function."""


@pytest.fixture
def made() -> Iterator[list[int]]:
    """What `twice` has counted."""
    memo.forget()
    memo.SHIPPED.remove("tests")
    yield []
    memo.SHIPPED.add("tests")
    memo.forget()


def asked(made: list[int], key, kind: str = "number") -> int:
    return memo.once(kind, key, lambda: made.append(len(made)) or len(made))


def test_equal_keys_have_one_value_and_others_their_own(made):
    assert [asked(made, key) for key in ((1, "a"), (1, "a"), (1, "b"), (2.0, "a"))] == [1, 1, 2, 3]
    assert asked(made, (1, "a"), kind="another") == 4
    memo.forget()
    assert asked(made, (1, "a")) == 5


def test_jax_settings_are_compared(made):
    assert asked(made, 1) == 1
    with jax.default_matmul_precision("highest"):
        assert asked(made, 1) == 2
    with jax.numpy_dtype_promotion("standard"):
        assert asked(made, 1) == 3
    assert asked(made, 1) == 1


@pytest.mark.parametrize(
    "key",
    [Own(), (1, Own()), {"a": [Own]}, helper, Metric("a", "max", lambda outputs, example: outputs), [1]],
    ids=["record", "inside", "class", "function", "field", "without a hash"],
)
def test_what_a_user_may_change_is_made_anew(key, made):
    assert [asked(made, key), asked(made, key)] == [1, 2]


@pytest.mark.parametrize("key", [task_loss, ACCURACY, optax.sgd, jax.nn.relu, (None, 1.5)])
def test_what_was_shipped_is_made_once(key, made):
    assert memo.shipped(key)
    assert [asked(made, key), asked(made, key)] == [1, 1]


def test_the_last_ones_are_kept(made, monkeypatch):
    monkeypatch.setattr(memo, "MAX_KEPT", 2)
    assert [asked(made, key) for key in (1, 2, 1, 3, 1, 2)] == [1, 2, 1, 3, 1, 4]


@pytest.mark.parametrize(
    ("where", "forgotten"),
    [
        ((fs, "run", None), False),
        (("sys.stderr", None), False),
        ((federation.Simulation, "step", None), False),
        ((Simulation, "step", None), False),
        ((hosts, "START", 0.0), False),
        ((stacked, "_STRIP", 1), True),
        ((Round, "personal", None), True),
        (("fedjax_sim.engine.simulation._Start", None), True),
        (("fedjax_sim.runs.finetune.rows", None), True),
        (("jax.default_backend", None), True),
    ],
)
def test_a_test_that_replaces_what_may_be_traced_empties_the_memory(where, forgotten, made, monkeypatch):
    before = asked(made, 1)
    monkeypatch.setattr(*where)
    assert (asked(made, 1) != before) == forgotten


def test_a_module_that_is_loaded_anew_empties_the_memory(made):
    assert [asked(made, 1), asked(made, 1)] == [1, 1]
    importlib.reload(paths)
    assert [asked(made, 1), asked(made, 1)] == [2, 2]


def test_what_fails_is_not_kept(made):
    with pytest.raises(ZeroDivisionError):
        memo.once("number", 1, lambda: 1 // 0)
    assert asked(made, 1) == 1
