"""Clients' own state on the host: the same bits as on the devices, and rows that snapshots need stay."""

import dataclasses
import functools
import threading
from unittest import mock

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fedjax_sim as fs
from fedjax_sim.engine import client_state, hosts, placement
from fedjax_sim.engine.client_rows import ClientRows
from fedjax_sim.runs.federation import Simulation


def _config(algorithm, where, devices=1, **changes):
    return dataclasses.replace(
        fs.RunConfig(
            rounds=5,
            seed=3,
            data=fs.DataConfig("digits"),
            partition=fs.PartitionConfig(
                kind="dirichlet", clients=11, alpha=0.5, min_size=5, local_test="matching"
            ),
            model=fs.ModelConfig("mlp", options={"hidden": [8]}),
            local=fs.LocalConfig(epochs=1, batch_size=16, lr=0.1),
            cohort=fs.CohortConfig(size=4),
            algorithm=algorithm,
            execution=fs.ExecutionConfig(devices=devices, client_state=where),
            evaluation=fs.EvaluationConfig(every=5, per_client=True),
        ),
        **changes,
    )


def _outcome(config):
    simulation = Simulation(config)
    assert (simulation.client_state is not None) == (config.execution.client_state == "host")
    rows = [row for part in simulation.advance() for row in part]
    return jax.device_get(simulation.variables), [tuple(row) for row in rows], simulation


def _same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one[0], other[0])
    assert one[1] == other[1]


METHODS = {
    "control variates": fs.algorithms.Scaffold(),
    "models of their own": fs.algorithms.Ditto(),
    "private layers": fs.algorithms.FedPer(),
    "gradients, over private layers": fs.algorithms.LIPS(
        inner=fs.algorithms.FedPer(), period=2, leaves=("params/fc1/kernel",)
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_results_are_the_same_bits_as_on_the_devices(method):
    algorithm = METHODS[method]
    _same(_outcome(_config(algorithm, "device")), _outcome(_config(algorithm, "host")))


@pytest.mark.parametrize(
    ("devices", "algorithm"), [(2, fs.algorithms.FedPer()), (3, fs.algorithms.LayerInterpolation())]
)
def test_the_same_on_several_devices_also_where_they_do_not_divide_the_cohort(devices, algorithm):
    local = fs.LocalConfig(epochs=1, batch_size=16, lr=0.1, momentum=0.5, keep_optimizer=True)
    both = [_outcome(_config(algorithm, where, devices, local=local)) for where in ("device", "host")]
    _same(*both)


def test_the_same_by_way_of_page_locked_memory(monkeypatch):
    """As accelerators have it; CPU devices have such memory too."""
    config = _config(METHODS["models of their own"], "host", 2)
    plain, seen = _outcome(config), []

    def pinned(mesh):
        seen.append(placement.cut(mesh).with_memory_kind(client_state.PINNED))
        return seen[-1]

    monkeypatch.setattr(client_state, "staging", pinned)
    _same(_outcome(config), plain)
    assert seen[0].memory_kind == "pinned_host"


def test_clients_who_took_no_part_take_no_room():
    config = _config(METHODS["control variates"], "host", rounds=1)
    simulation = _outcome(config)[2]
    simulation.client_state.snapshot(1, keep=1)
    known = simulation.client_state.rows.known(np.arange(11))
    assert np.flatnonzero(known).tolist() == sorted(simulation.setup.draw(0).tolist())


def _rows(count=5, chunks=None):
    leaves = [jax.ShapeDtypeStruct((3,), np.float32), jax.ShapeDtypeStruct((), np.int32)]
    return ClientRows(count, leaves, *([chunks] if chunks else []))


def _put(rows, ids, value):
    ids = np.asarray(ids, np.int32)
    rows.put(ids, [np.full((len(ids), 3), value, np.float32), np.full(len(ids), value, np.int32)])


def _get(rows):
    floats, integers = rows.get(np.arange(rows.count))
    np.testing.assert_array_equal(floats[:, 0], integers)
    return integers.tolist()


@given(
    st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=4), min_size=1, max_size=12), st.integers(1, 3)
)
@settings(max_examples=60, deadline=None)
def test_every_snapshot_that_is_kept_stays_as_it_was(rounds, keep):
    rows, now, told = _rows(), [0] * 5, {}
    for number, ids in enumerate(rounds, 1):
        _put(rows, ids, number)
        now = [number if client in ids else old for client, old in enumerate(now)]
        assert _get(rows) == now
        if number % 2:
            told[number] = rows.snapshot(number, keep), list(now)
    kept = sorted(told)[-keep:]
    for number in kept:
        rows.load(number, {name: told[name][0] for name in kept})
        assert _get(rows) == told[number][1]
    _put(rows, [0, 1, 2, 3, 4], 99)
    rows.load(kept[0], {name: told[name][0] for name in kept})
    assert _get(rows) == told[kept[0]][1]


class _Processes:
    """Rows of several processes that see the same chunks. What they do together each does in a thread."""

    def __init__(self, count, files):
        self.count, self.files = count, files
        leaves = [jax.ShapeDtypeStruct((3,), np.float32), jax.ShapeDtypeStruct((), np.int32)]
        self.rows = [
            ClientRows(7, leaves, functools.partial(self._chunk, p), part=(p, count)) for p in range(count)
        ]
        self._calls, self._barrier = {}, threading.Barrier(count)

    def _chunk(self, process, number, shape, own):
        assert not own or number % self.count == process
        chunk = self.files.setdefault(number, np.full(shape, 255, np.uint8)) if own else self.files[number]
        view = chunk.view()
        view.flags.writeable = own
        return view

    def together(self, what):
        def gathered(array):
            self._calls[threading.current_thread().name[-1]] = array
            self._barrier.wait()
            found = np.stack([self._calls[name] for name in sorted(self._calls)])
            self._barrier.wait()
            return found

        with mock.patch.object(hosts, "gathered", gathered):
            results = [None] * self.count

            def call(process):
                results[process] = what(self.rows[process])

            threads = [threading.Thread(target=call, args=(p,), name=f"p{p}") for p in range(self.count)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(20)
        return results

    def put(self, ids, value):
        for process, rows in enumerate(self.rows):
            keeper = rows.keeper(ids)
            mine = ids[keeper == process]
            rows.put(mine, [np.full((len(mine), 3), value, np.float32), np.full(len(mine), value, np.int32)])
            rows.put_elsewhere(ids[keeper != process])

    def get(self):
        now, known, everyone = np.zeros(7, int), [], np.arange(7)
        for process, rows in enumerate(self.rows):
            mine = everyone[rows.keeper(everyone) == process]
            floats, integers = rows.get(mine)
            np.testing.assert_array_equal(floats[:, 0], integers)
            now[mine] = integers
            known.append(rows.known(everyone).tolist())
        assert known.count(known[0]) == len(known)
        assert known[0] == (now != 0).tolist()
        return now.tolist()


@given(
    st.lists(
        st.tuples(
            st.integers(0, 3), st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=5), max_size=6)
        ),
        min_size=1,
        max_size=4,
    )
)
@settings(max_examples=60, deadline=None)
def test_another_number_of_processes_goes_on_from_any_snapshot(legs):
    """Each leg: how many processes, from 1, and the cohorts of its rounds; it starts at a kept snapshot."""
    files, kept, told, number = {}, {}, {}, 0
    with mock.patch("fedjax_sim.engine.client_rows.CHUNK", 32):  # two rows
        for more, rounds in legs:
            processes = _Processes(1 + more, files)
            now = [0] * 7
            if kept:
                start = sorted(kept)[-1 - more % len(kept)]
                kept = {name: one for name, one in kept.items() if name <= start}
                processes.together(lambda rows: rows.load(start, kept))  # noqa: B023
                now, number = list(told[start]), start
            assert processes.get() == now
            for ids in rounds:
                number += 1
                processes.put(np.asarray(ids, np.int32), number)
                now = [number if client in ids else old for client, old in enumerate(now)]
                if number % 3 != 1:
                    found = processes.together(lambda rows: rows.snapshot(number, keep=2))  # noqa: B023
                    for one in found[1:]:
                        jax.tree.map(np.testing.assert_array_equal, one, found[0])
                    kept[number], told[number] = found[0], list(now)
                    kept = {name: kept[name] for name in sorted(kept)[-2:]}
                assert processes.get() == now
            for name in kept:
                fresh = _Processes(1 + name % 3, files)
                fresh.together(lambda rows: rows.load(name, kept))  # noqa: B023
                assert fresh.get() == told[name]


def test_places_are_used_again_once_no_snapshot_needs_them(monkeypatch):
    monkeypatch.setattr("fedjax_sim.engine.client_rows.CHUNK", 32)  # two rows
    rows = _rows()
    for number in range(1, 40):
        _put(rows, [number % 5, (number + 1) % 5], number)
        rows.snapshot(number, keep=2)
    assert rows.places <= 12  # five rows, what two snapshots need beside, and what fills a chunk up


def test_a_damaged_row_is_told():
    rows = _rows()
    _put(rows, [0, 1], 7)
    snapshot = rows.snapshot(1, keep=2)
    rows._row(int(snapshot["places"][1]))[0] ^= 1
    with pytest.raises(ValueError, match="client 1 does not have the checksum"):
        rows.load(1, {1: snapshot})


def test_no_room_changes_no_row(monkeypatch):
    monkeypatch.setattr("fedjax_sim.engine.client_rows.CHUNK", 32)

    def chunks(number, shape, own):
        if number:
            raise OSError(28, "No space left on device")
        return np.empty(shape, np.uint8)

    rows = _rows(chunks=chunks)
    _put(rows, [0, 1], 7)
    with pytest.raises(OSError, match="No space"):
        _put(rows, [1, 2], 8)
    assert _get(rows) == [7, 7, 0, 0, 0]


def test_keys_stay_on_the_devices():
    class WithKey:
        def build(self, context):
            inner = fs.algorithms.FedAvg().build(context)
            rule = dataclasses.replace(inner.local, init_client=lambda variables, labels: jax.random.key(0))
            return dataclasses.replace(inner, local=rule)

    with pytest.raises(fs.UserError, match=r"execution.client_state.*random keys"):
        Simulation(_config(WithKey(), "host"))
