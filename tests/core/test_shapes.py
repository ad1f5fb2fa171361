"""Wrong shapes and dtypes are seen where they enter: tests check the annotations, users' runs do not."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from fedjax_sim.config import LocalConfig
from fedjax_sim.core import rng, stacked, top_k
from fedjax_sim.engine import waves

TREE = {"w": jnp.ones((3, 2)), "b": jnp.ones(3)}


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


def test_nothing_is_checked_outside_of_tests():
    program = (
        "import sys, jax.numpy as jnp; from fedjax_sim.core import stacked; "
        "stacked.where_slot(jnp.ones(3, bool), [jnp.ones((3, 1, 1))], [jnp.ones((1, 1, 1))]); "
        "sys.exit('beartype' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
