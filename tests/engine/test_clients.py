"""The order of samples, the client optimiser, and the streams of randomness."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_sim.config import LocalConfig
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.rng import INIT, SERVER, key_for, run_key
from fedjax_sim.engine.clients import all_finite, batch_order, client_key, make_optimizer, shuffled

_shuffled = jax.jit(shuffled, static_argnums=3)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), client=st.integers(0, 10_000), count=st.integers(0, 64))
def test_an_order_is_a_permutation_and_does_not_depend_on_padding(seed, client, count):
    key = client_key(seed, 3, client)
    order = np.asarray(_shuffled(key, jnp.int32(1), jnp.int32(count), 64))
    np.testing.assert_array_equal(np.sort(order[:count]), np.arange(count))
    np.testing.assert_array_equal(order[count:], np.arange(count, 64))
    longer = np.asarray(_shuffled(key, jnp.int32(1), jnp.int32(count), 200))
    np.testing.assert_array_equal(longer[:64], order)


def test_orders_are_the_same_under_any_setting_of_jaxs_generator():
    """Other libraries set these for the whole process; `jax_threefry_partitionable` made the order of a
    client depend on the width of its table, and made `batch_order` another than the round's."""
    key, count = client_key(3, 0, 5), jnp.int32(10)
    wanted = batch_order(3, 0, 5, 0, 10)
    settings = (jax.threefry_partitionable(False), jax.default_prng_impl("rbg"), jax.enable_x64(True))
    for setting in settings:
        with setting:
            np.testing.assert_array_equal(batch_order(3, 0, 5, 0, 10), wanted)
            for width in (10, 12, 16):
                order = np.asarray(shuffled(key, jnp.int32(0), count, width))
                np.testing.assert_array_equal(order[:10], wanted)
    jax.config.update("jax_random_seed_offset", 7)
    try:
        np.testing.assert_array_equal(batch_order(3, 0, 5, 0, 10), wanted)
    finally:
        jax.config.update("jax_random_seed_offset", 0)


def test_the_root_is_the_key_of_the_seed():
    for seed in (0, 1, 2**31 - 1):
        want = jax.random.key(seed, impl="threefry2x32")
        np.testing.assert_array_equal(jax.random.key_data(run_key(seed)), jax.random.key_data(want))


def test_batch_order_differs_by_epoch_round_client_and_seed():
    base = {"seed": 1, "round_index": 2, "client": 3, "epoch": 4}
    orders = [batch_order(**base, count=30)]
    orders += [batch_order(**{**base, name: value + 1}, count=30) for name, value in base.items()]
    assert len({order.tobytes() for order in orders}) == 5
    np.testing.assert_array_equal(batch_order(**base, count=30), orders[0])


def test_orders_are_uniform():
    """All 6 permutations of 3 samples over 1,200 clients: chi-square with 5 degrees of freedom."""
    draw = jax.jit(jax.vmap(lambda c: shuffled(client_key(0, 0, c), jnp.int32(0), jnp.int32(3), 3)))
    _, seen = np.unique(np.asarray(draw(jnp.arange(1200))), axis=0, return_counts=True)
    assert len(seen) == 6
    assert ((seen - 200) ** 2 / 200).sum() < 20.5  # the 0.999 quantile


def test_all_streams_of_a_seed_are_disjoint():
    """The initial model, the server of each round, each client of each round: no key twice."""
    root = jax.random.key(7)
    keys = [key_for(root, INIT, n) for n in range(2)]
    keys += [key_for(root, SERVER, r, n) for r in range(4) for n in range(2)]
    keys += [key_for(root, SERVER, r) for r in range(4)]
    keys += [client_key(7, r, c) for r in range(4) for c in range(4)]
    keys += [key_for(client_key(7, r, c), n) for r in range(4) for c in range(4) for n in range(2)]
    assert len({np.asarray(jax.random.key_data(key)).tobytes() for key in keys}) == len(keys)


def test_orders_do_not_depend_on_the_wave_under_another_generator():
    """`jax_default_prng_impl` is the user's; under `rbg` a vmapped draw is another than a single one."""
    with jax.default_prng_impl("rbg"):
        order = lambda client: shuffled(client_key(0, 0, client), jnp.int32(0), jnp.int32(9), 9)  # noqa: E731
        together = jax.vmap(order)(jnp.arange(3))
        alone = [order(client) for client in range(3)]
    np.testing.assert_array_equal(together, np.stack(alone))


def test_the_optimiser_is_pytorchs_sgd():
    """Clip to the norm, then L2, then momentum, then Nesterov: one step and another by hand."""
    optimizer = make_optimizer(LocalConfig(momentum=0.9, nesterov=True, weight_decay=0.1, clip_norm=1.0))
    p, g = jnp.asarray([3.0, -4.0]), jnp.asarray([6.0, 8.0])
    state = optimizer.init(p)
    clipped = np.array([0.6, 0.8])
    first = clipped + 0.1 * np.array([3.0, -4.0])
    update, state = optimizer.update(g, state, p)
    np.testing.assert_allclose(update, -(first + 0.9 * first), rtol=1e-6)
    update, _ = optimizer.update(g, state, p)
    second = 0.9 * first + first
    np.testing.assert_allclose(update, -(first + 0.9 * second), rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in ("adamm", "apply_updates", "tree", "__doc__", "chain", "l2_loss", "optax")),
        ("adam", {"beta1": 0.9}),
    ],
)
def test_what_optax_cannot_make_is_a_users_error(name, options):
    with pytest.raises(UserError, match=r"optax.*no such (optimiser|option)") as caught:
        make_optimizer(LocalConfig(optimizer=name, options=options))
    field = f"local.options.{next(iter(options))}" if options else "local.optimizer"
    assert caught.value.field == field
    assert ("Did you mean" in str(caught.value)) or name != "adamm"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"b1": "0.9"}, r"local\.options\.b1 = '0\.9': a number \(float\) is wanted, and this is text"),
        ({"b1": None}, r"local\.options\.b1 = None: a number"),
        ({"b1": [0.9]}, r"local\.options\.b1 = \[0\.9\]: a number"),
        ({"b1": True}, r"local\.options\.b1 = True: a number"),
        ({"nesterov": "yes"}, r"local\.options\.nesterov = 'yes': true or false"),
        ({"learning_rate": 0.1}, r"local\.options\.learning_rate = 0\.1: the rate is local\.lr"),
        ({"mu_dtype": "float23"}, r"local\.options = .*float23"),
        ({"b_1": 0.9}, r"local\.options\.b_1 = 0\.9: .*no such option.*b1"),
        ({1: 0.9}, r"local\.options\.1 = 0\.9: .*no such option"),
    ],
)
def test_options_of_the_wrong_kind_are_named_before_anything_is_traced(options, told):
    with pytest.raises(UserError, match=f"^{told}"):
        make_optimizer(LocalConfig(optimizer="adam", options=options))


def test_options_that_are_no_number_by_right_are_taken():
    make_optimizer(LocalConfig(optimizer="adam", options={"mu_dtype": "bfloat16", "nesterov": True, "b1": 1}))
    make_optimizer(LocalConfig(optimizer="adafactor", options={"clipping_threshold": None, "momentum": None}))
    decay = optax.linear_schedule(0.1, 0.0, 10)
    make_optimizer(LocalConfig(optimizer="adamw", options={"weight_decay": decay, "mask": None}))


def test_options_which_sgd_does_not_read_are_refused():
    """Else `{b1: 0.9}` under sgd is a setting without any effect, and nobody says so."""
    with pytest.raises(UserError, match=r"local\.options"):
        make_optimizer(LocalConfig(optimizer="sgd", options={"b1": 0.9}))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_number_anywhere_marks_its_slot(bad):
    tree = {"a": np.full((3, 2, 2), 1e38, np.float32), "b": np.zeros((3, 4), np.float32)}
    assert np.asarray(all_finite(tree)).all()
    tree["b"][1, 2] = bad
    np.testing.assert_array_equal(all_finite(jax.tree.map(jnp.asarray, tree)), [True, False, True])


def test_of_state_that_is_no_float_nothing_can_be_infinite():
    """And of complex numbers either part can."""
    tree = {
        "count": jnp.full((4, 2), jnp.iinfo(jnp.int32).max),
        "flag": jnp.ones(4, bool),
        "pair": jnp.asarray([1 + 2j, jnp.inf, 1j * jnp.nan, 0], jnp.complex64),
    }
    np.testing.assert_array_equal(all_finite(tree), [True, False, False, True])
