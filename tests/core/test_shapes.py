"""Wrong shapes and dtypes are seen where they enter, if one asks for it; users' runs check nothing."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from fedjax_sim.config import LocalConfig
from fedjax_sim.core import rng, stacked, top_k
from fedjax_sim.engine import waves

HERE = Path(__file__).parent
ASKED = "FEDJAX_SIM_CHECK_SHAPES"
checked = pytest.mark.skipif(
    ASKED not in os.environ, reason="see test_primitives.py, test_five_and_six_devices"
)

TREE = {"w": jnp.ones((3, 2)), "b": jnp.ones(3)}


@pytest.mark.slow
@pytest.mark.skipif(ASKED in os.environ, reason="is what runs this")
def test_annotations_hold_where_they_are_checked():
    """In tests of the modules themselves; by default test_primitives.py has them checked, in whole rounds."""
    paths = [
        __file__,
        HERE / "test_stacked.py",
        HERE / "test_top_k.py",
        HERE.parent / "engine" / "test_waves.py",
    ]
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", *map(str, paths)]
    done = subprocess.run(command, env={**os.environ, ASKED: "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@checked
@pytest.mark.parametrize(
    "wrong",
    [
        lambda: stacked.weighted_sum(TREE, jnp.ones(2)),  # weights of two slots for three
        lambda: stacked.weighted_sum({**TREE, "b": jnp.ones(4)}, jnp.ones(3)),  # leaves that disagree
        lambda: stacked.mean(TREE, jnp.ones(3, jnp.int32)),
        lambda: stacked.where_slot(jnp.ones(3, bool), TREE, jax.tree.map(lambda leaf: leaf[:2], TREE)),
        lambda: stacked.take_rows(TREE, jnp.ones(2)),  # ids that are no integers
        lambda: stacked.put_rows(TREE, jnp.arange(2), TREE),  # three rows for two ids
        lambda: jax.eval_shape(stacked.mean, TREE, jnp.ones((3, 1))),  # while it is traced
        lambda: top_k.top_k_mask(jnp.ones((2, 3)), jnp.int32(1)),
        lambda: rng.key_for(jax.random.split(rng.run_key(0)), 1),
        lambda: waves.steps_of(jnp.ones(3), LocalConfig()),
    ],
)
def test_a_wrong_shape_is_seen_at_the_door(wrong):
    with pytest.raises(TypeCheckError):
        wrong()


def test_right_ones_pass_alone_and_under_vmap():
    assert stacked.mean(TREE, jnp.full(3, 1 / 3))["w"].shape == (2,)
    assert jax.vmap(top_k.top_k_mask, (0, None))(jnp.ones((2, 3)), jnp.int32(1)).shape == (2, 3)


@pytest.mark.skipif(ASKED in os.environ, reason="they are checked here")
def test_nothing_is_checked_unless_asked_for():
    stacked.where_slot(jnp.ones(3, bool), [jnp.ones((3, 1, 1))], [jnp.ones((1, 1, 1))])
    assert not any(
        hasattr(function, "__wrapped__") for function in (stacked.mean, rng.key_for, waves.steps_of)
    )
