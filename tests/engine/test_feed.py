"""Three placements of the training set: results are the same bits, and each device has what it needs."""

import dataclasses

import jax
import numpy as np
import pytest

import fedjax_sim as fs
from fedjax_sim.data.ragged import Ragged
from fedjax_sim.engine import feed, placement, waves
from fedjax_sim.runs.assemble import prepare
from tests.oracles import state_of

ALL = (feed.COPIED, feed.CUT, feed.STREAMED)
DIGITS = fs.data.load("digits")


def config(data, devices=3, algorithm=None, **changes):
    return fs.RunConfig(
        rounds=3,
        algorithm=algorithm or fs.FedAvg(),
        model=fs.ModelConfig("mlp", options={"hidden": [8]}),
        partition=fs.PartitionConfig(kind="dirichlet", clients=11, alpha=0.5),
        local=fs.LocalConfig(epochs=2, batch_size=16, momentum=0.5),
        cohort=fs.CohortConfig(size=5),
        evaluation=fs.EvaluationConfig(every=3),
        execution=fs.ExecutionConfig(devices=devices, data=data),
        output=fs.OutputConfig(progress=False),
        **changes,
    )


def assert_same(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("devices", "algorithm"), [(1, fs.Scaffold()), (3, fs.FedAvg()), (4, fs.FedMR(similarity=False))]
)
def test_results_are_the_same_bits_wherever_samples_lie(devices, algorithm):
    found = {}
    for data in ALL:
        simulation = fs.Simulation(config(data, devices, algorithm))
        assert simulation.feed.kind == data
        rows = [row for part in simulation.advance() for row in part]
        found[data] = state_of(simulation), [row for row in rows if "seconds" not in row.metric]
        assert simulation.feed._worker is None  # after the last round nothing is prepared
    for data in ALL[1:]:
        assert_same(found[feed.COPIED][0], found[data][0])
        assert found[feed.COPIED][1] == found[data][1]


def test_each_device_has_the_samples_of_its_own_clients():
    counts = np.asarray([5, 0, 3, 8, 1])
    held = Ragged.cut(np.random.default_rng(0).permutation(17), counts)
    ids = np.asarray([3, 0, 2, 4], np.int32)
    plan = waves.make_plan(counts[ids], 2, 1)
    made = feed.places_of(ids, plan, held, 2)
    slots = plan.slot_of_place.reshape(2, -1)
    firsts = made.first.reshape(2, -1)
    for device in range(2):
        for place, slot in enumerate(slots[device]):
            if slot < len(ids):
                begin, client = firsts[device][place], ids[slot]
                own = made.rows[device][begin : begin + counts[client]]
                np.testing.assert_array_equal(own, held[client])
    assert sum(map(len, made.rows)) == counts[ids].sum()


def test_memory_of_a_device_is_its_share(monkeypatch):
    setup = prepare(config(feed.CUT, 4))
    simulation = fs.Simulation(setup)
    inputs, _ = simulation.inputs(0)
    data = simulation.data_of(0, inputs)
    share = -(-len(DIGITS.train["image"]) // 4)
    image = data.train["image"].flat
    assert image.sharding.shard_shape(image.shape) == (share, 64)
    assert not simulation.store.has(setup.dataset.train)


def test_a_round_reads_of_the_host_what_its_clients_hold(tmp_path):
    """Of a memory-mapped set, which is streamed by itself."""
    paths = {}
    for key, leaf in DIGITS.train.items():
        np.save(tmp_path / f"{key}.npy", leaf)
        paths[key] = np.load(tmp_path / f"{key}.npy", mmap_mode="r")
    mapped = dataclasses.replace(DIGITS, train_images=paths["image"], train_labels=paths["label"])
    plain = config("auto")
    run = fs.run(plain, dataset=mapped)
    other = fs.run(plain, dataset=DIGITS)
    assert_same(run.variables, other.variables)
    setup = prepare(plain, dataset=mapped)
    assert setup.placement == feed.STREAMED
    assert prepare(plain, dataset=DIGITS).placement == feed.COPIED


def test_cut_and_resumed_is_uncut(tmp_path):
    whole = fs.run(config(feed.STREAMED))
    made = config(feed.STREAMED)
    made = dataclasses.replace(made, output=fs.OutputConfig(dir=str(tmp_path / "a"), progress=False))
    fs.run(dataclasses.replace(made, rounds=2))
    again = fs.resume(tmp_path / "a", rounds=3)
    assert_same(whole.variables, again.variables)


def test_rounds_to_come_are_prepared_meanwhile_and_no_more_than_some():
    simulation = fs.Simulation(dataclasses.replace(config(feed.STREAMED), rounds=20))
    simulation.step()()
    ahead = simulation.feed._ahead
    assert sorted(ahead) == [1, 2]
    ahead[1].result()
    simulation.restore(simulation.state, 7)  # what was prepared is of no use any more
    simulation.step()()
    assert sorted(simulation.feed._ahead) == [8, 9]
    simulation.feed.close()
    assert not simulation.feed._ahead


def test_lengths_grow_and_do_not_shrink():
    """So that a round of smaller clients finds the program of a larger one."""
    setup = prepare(config(feed.STREAMED, 1))
    simulation = fs.Simulation(setup)
    large = np.argsort(-setup.counts)[:5].astype(np.int32)
    small = np.argsort(setup.counts)[:5].astype(np.int32)
    sizes = []
    for number, ids in enumerate((small, large, small)):
        inputs, _ = simulation.inputs_of(number, ids)
        sizes.append(len(simulation.data_of(number, inputs).train["label"]))
    assert sizes[0] < sizes[1] == sizes[2]


@pytest.mark.faults
def test_a_file_that_shrank_is_named(tmp_path):
    np.save(tmp_path / "image.npy", DIGITS.train["image"])
    images = np.load(tmp_path / "image.npy", mmap_mode="r")
    mapped = dataclasses.replace(DIGITS, train_images=images)
    simulation = fs.Simulation(dataclasses.replace(config("auto"), rounds=20), dataset=mapped)
    simulation.step()()
    with open(tmp_path / "image.npy", "r+b") as file:
        file.truncate(5000)
    with pytest.raises(fs.UserError, match=r"image\.npy.*has 5,000 bytes.*resume"):
        for _ in simulation.advance():
            pass


@pytest.mark.parametrize(
    "changes",
    [
        {"peel": fs.PeelConfig(every=1)},
        {
            "evaluation": fs.EvaluationConfig(every=1, per_client=True),
            "partition": fs.PartitionConfig(clients=11, local_test="holdout"),
        },
    ],
    ids=["peel", "tests-of-clients"],
)
def test_what_reads_all_samples_wants_them_copied(changes):
    made = dataclasses.replace(config(feed.CUT), **changes)
    with pytest.raises(fs.UserError, match=r"execution\.data = 'cut'.*copied"):
        prepare(made)
    auto = dataclasses.replace(made, execution=fs.ExecutionConfig(devices=2))
    assert prepare(auto).placement == feed.COPIED


def test_the_choice_goes_by_size_on_accelerators(monkeypatch):
    monkeypatch.setattr(feed, "_LARGE", DIGITS.train["image"].nbytes // 2)
    mesh = placement.make_mesh(4)
    of = lambda wanted, mesh: feed.placement_of(wanted, DIGITS, mesh, {})  # noqa: E731
    assert of("auto", mesh) == feed.COPIED  # a CPU's devices share one buffer
    monkeypatch.setattr(feed, "platform_of", lambda mesh: "tpu")
    assert of("auto", mesh) == feed.CUT
    assert of("copied", mesh) == feed.COPIED
    monkeypatch.setattr(feed, "_LARGE", 10)
    assert of("auto", mesh) == feed.STREAMED
    monkeypatch.setattr(feed, "_LARGE", 2**31)
    assert of("auto", mesh) == feed.COPIED


@pytest.mark.parametrize("data", [feed.CUT, feed.STREAMED])
def test_a_plan_counts_it(data):
    found = fs.plan(config(data, 2))
    names = [part.name for part in found.parts]
    assert any("share" in name or "rounds' clients" in name for name in names)
    assert "training samples" not in names
    assert fs.plan(config(data, None), on="cpu-2").fits
