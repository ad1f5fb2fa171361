import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from fedjax_sim.algorithms import FedMR, Scaffold
from fedjax_sim.core.errors import UserError
from fedjax_sim.engine import placement
from fedjax_sim.engine.simulation import Simulation
from fedjax_sim.runs.checkpoint import Checkpoints
from tests import oracles

# Orbax reads leaves side by side; when one fails, the others' answers find its event loop closed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@struct.dataclass
class State:
    slots: object
    kept: object
    key: object


def make(seed, mesh=None, count=8):
    key = jax.random.key(seed)
    slots = {"w": jax.random.normal(key, (count, 3, 5)), "n": jnp.int32(seed), "none": jnp.zeros((0, 2))}
    if mesh is not None:
        slots["w"] = jax.device_put(slots["w"], placement.cut(mesh))
    return State(slots, {"rule": None, "h": jnp.arange(4, dtype=jnp.bfloat16)}, key)


def abstract(state):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)


def same(one, other):
    flat = lambda tree: [  # noqa: E731
        np.asarray(jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
        for x in jax.tree.leaves(tree)
    ]
    return all(
        a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(flat(one), flat(other), strict=True)
    )


def saved(folder, rounds, keep=5):
    store = Checkpoints(folder / "checkpoints", keep)
    for number in rounds:
        store.save(number, make(number))
    store.close()
    return store


def test_what_was_saved_comes_back_bit_for_bit(tmp_path):
    mesh = placement.make_mesh()
    store = Checkpoints(tmp_path / "checkpoints")
    state = make(4, mesh)
    store.save(4, state)
    store.wait()
    found, number = store.restore(abstract(state))
    assert number == 4 and same(found, state)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    store.close()


def test_the_newest_few_are_kept(tmp_path):
    store = saved(tmp_path, range(1, 7), keep=2)
    assert store.rounds() == [5, 6]
    assert store.restore(abstract(make(0)))[1] == 6


def test_none_where_there_is_none(tmp_path):
    assert Checkpoints(tmp_path / "checkpoints").restore(abstract(make(0))) is None


def test_a_state_that_the_next_round_overwrites_is_saved_as_it_was(tmp_path):
    store = Checkpoints(tmp_path / "checkpoints")
    advance = jax.jit(lambda x: jax.tree.map(lambda leaf: leaf + 1, x), donate_argnums=0)
    state = {"w": jnp.zeros((400_000,))}
    for number in range(1, 6):
        state = advance(state)
        store.save(number, state)
        for _ in range(3):
            state = advance(state)
        state = jax.tree.map(lambda leaf, n=number: leaf * 0 + n, state)
    store.close()
    for number in store.rounds():
        found = Checkpoints(tmp_path / "checkpoints")._read(number, abstract(state), abstract(state))
        assert np.unique(found["w"]).tolist() == [number]


def test_a_half_written_checkpoint_is_passed_over(tmp_path):
    store = saved(tmp_path, [1, 2])
    shutil.copytree(store.folder / "2", store.folder / "3.orbax-checkpoint-tmp-17")
    with pytest.warns(UserWarning, match="round 3 is half-written"):
        _, number = store.restore(abstract(make(0)))
    assert number == 2


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("damage", ["flip", "empty", "remove"])
def test_a_damaged_checkpoint_is_passed_over_whatever_file_is_hit(tmp_path, damage):
    passed = 0
    count = len(files_of(saved(tmp_path / "first", [1, 2]).folder / "2"))
    for place in range(count):
        store = saved(tmp_path / str(place), [1, 2])
        files = files_of(store.folder / "2")  # how many there are depends on how the writers met
        victim = files[place % len(files)]
        content = bytearray(victim.read_bytes())
        if damage == "flip":
            for i in range(0, len(content), 5):
                content[i] ^= 0x5A
            victim.write_bytes(bytes(content))
        elif damage == "empty":
            victim.write_bytes(b"")
        else:
            victim.unlink()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found, number = store.restore(abstract(make(0)))
        # Some files are Orbax's own notes, which a restore does not read: then nothing is lost.
        assert same(found, make(number))
        if number == 1:
            passed += 1
            assert any("round 2 is damaged" in str(w.message) for w in told)
            assert (tmp_path / str(place) / "damaged" / "2").is_dir()
    assert passed >= 2


def test_a_round_can_be_saved_again_after_its_damaged_checkpoint_was_put_aside(tmp_path):
    store = saved(tmp_path, [1, 2])
    shutil.rmtree(store.folder / "2" / "state")
    with pytest.warns(UserWarning, match="damaged"):
        assert store.restore(abstract(make(0)))[1] == 1
    store.save(2, make(2))
    store.close()
    assert store.restore(abstract(make(0)))[1] == 2


def test_a_checkpoint_beyond_the_journal_is_passed_over(tmp_path):
    store = saved(tmp_path, [1, 2])
    with pytest.warns(UserWarning, match="journal ends at round 1"):
        assert store.restore(abstract(make(0)), at_most=1)[1] == 1


def test_a_state_of_other_shapes_is_refused_and_left_alone(tmp_path):
    store = saved(tmp_path, [1])
    with pytest.raises(UserError, match="slots"):
        store.restore(abstract(make(0, count=6)))
    assert store.rounds() == [1]


@pytest.mark.parametrize("written_by", ["one process", "several"])
@pytest.mark.parametrize("algorithm", [FedMR(similarity=False), Scaffold()], ids=lambda a: type(a).__name__)
def test_stacks_that_the_devices_do_not_divide_go_on_on_another_number_of_them(
    tmp_path, algorithm, written_by, monkeypatch
):
    """Seven clients and a cohort of five; one process writes their rows alone, several what fills up too."""
    sizes = (12, 7, 20, 3, 31, 9, 5)

    def on(devices):
        return Simulation(oracles.prepared(sizes, algorithm=algorithm, cohort=5, devices=devices, epochs=1))

    first = on(4)
    oracles.run(first, 1)
    store = Checkpoints(tmp_path)
    with monkeypatch.context() as patch:
        if written_by == "several":  # which leave to Orbax what none of them has as a whole
            patch.setattr("fedjax_sim.runs.checkpoint._to_host", jnp.copy)
        store.save(1, first.state, first.variables, first.shapes)
        store.close()
    kept = oracles.state_of(first)
    oracles.run(first)
    for devices in (4, 3, 1):
        again = on(devices)
        again.restore(*Checkpoints(tmp_path).restore(again.abstract_state(), again.shapes))
        jax.tree.map(np.testing.assert_array_equal, oracles.state_of(again), kept)
        oracles.run(again)
        oracles.assert_trees_close(again.variables, first.variables, rtol=1e-4, atol=1e-5)
        if devices == 4:
            jax.tree.map(
                np.testing.assert_array_equal, jax.device_get(again.state), jax.device_get(first.state)
            )
