"""Plans: every slot once, its place and the place's slot inverse, steps of waves right, work balanced."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_sim.config import LocalConfig
from fedjax_sim.engine.waves import (
    in_order,
    make_plan,
    make_plans,
    padding_waste,
    rounds_seconds,
    step_seconds,
    steps_of,
)

SIZES = st.lists(st.integers(0, 60), min_size=1, max_size=30).map(np.array)


@settings(max_examples=200, deadline=None)
@given(steps=SIZES, devices=st.integers(1, 5), width=st.integers(1, 7))
def test_a_plan_holds_every_slot_once_and_runs_it_long_enough(steps, devices, width):
    plan = make_plan(steps, devices, width)
    slot_of_place, place_of_slot, wave_steps = (
        np.asarray(part) for part in (plan.slot_of_place, plan.place_of_slot, plan.wave_steps)
    )
    count, waves = len(steps), -(-len(steps) // (devices * width))
    assert slot_of_place.shape == (devices * waves * width,)
    assert wave_steps.shape == (devices * waves,)
    assert {slot_of_place.dtype, place_of_slot.dtype, wave_steps.dtype} == {np.dtype(np.int32)}
    assert sorted(slot_of_place[slot_of_place < count]) == list(range(count))
    assert np.all(slot_of_place <= count)
    np.testing.assert_array_equal(slot_of_place[place_of_slot], np.arange(count))
    padded = np.append(steps, 0)
    np.testing.assert_array_equal(wave_steps, padded[slot_of_place].reshape(-1, width).max(1))


@settings(max_examples=200, deadline=None)
@given(steps=SIZES, devices=st.integers(1, 5))
def test_work_is_balanced_as_longest_processing_time_first_promises(steps, devices):
    """At one client a wave: no device works longer than the average plus one job (Graham's bound)."""
    wave_steps = np.asarray(make_plan(steps, devices, 1).wave_steps).reshape(devices, -1)
    waves = wave_steps.shape[1]
    # A device has only `waves` places, hence the second term.
    assert wave_steps.sum(1).max() <= max(
        steps.sum() / devices + steps.max(), np.sort(steps)[::-1][:waves].sum()
    )
    assert wave_steps.sum() == steps.sum()
    assert wave_steps.sum(1).max() >= steps.sum() / devices


def test_the_next_client_goes_where_the_least_work_is():
    """Dealing in turn would give one device 13 of these steps, filling one device after the other as well."""
    plan = make_plan(np.array([4, 9, 1, 4]), 2, 1)
    np.testing.assert_array_equal(plan.slot_of_place, [1, 2, 0, 3])
    np.testing.assert_array_equal(plan.wave_steps, [9, 1, 4, 4])
    plan = make_plan(np.array([2, 9, 1, 2, 3, 2]), 3, 1)
    np.testing.assert_array_equal(np.asarray(plan.wave_steps).reshape(3, 2).sum(1), [10, 5, 4])


@settings(max_examples=100, deadline=None)
@given(steps=SIZES, devices=st.integers(1, 4), width=st.integers(1, 6))
def test_waves_hold_clients_of_like_length(steps, devices, width):
    """No plan of equally wide waves does less than the sorted one."""
    if in_order(steps, devices, width):
        return
    ranked = np.sort(steps)[::-1]
    best = sum(ranked[start] for start in range(0, len(steps), width))
    assert np.asarray(make_plan(steps, devices, width).wave_steps).sum() == best


def former_plan(steps, devices, width):
    """`make_plan` of unequal slots as it was first written: a list for each device, and a scan of all."""
    count, waves = len(steps), -(-len(steps) // (devices * width))
    ranked = np.argsort(-steps, kind="stable")
    load, lists = np.zeros(devices), [[] for _ in range(devices)]
    for group in (ranked[start : start + width] for start in range(0, count, width)):
        free = [d for d in range(devices) if len(lists[d]) < waves]
        target = min(free, key=lambda d: (load[d], d))
        lists[target].append(group)
        load[target] += steps[group].max()
    slot_of_place = np.full((devices, waves * width), count, np.int32)
    wave_steps = np.zeros((devices, waves), np.int32)
    for d, own in enumerate(lists):
        for w, group in enumerate(own):
            slot_of_place[d, w * width : w * width + len(group)] = group
            wave_steps[d, w] = steps[group].max()
    return slot_of_place.reshape(-1), wave_steps.reshape(-1)


@settings(max_examples=200, deadline=None)
@given(steps=SIZES, devices=st.integers(1, 9), width=st.integers(1, 7))
def test_waves_are_dealt_as_by_a_scan_of_all_devices(steps, devices, width):
    assert in_order(steps, devices, width) == ((devices, width) == (1, 1) or len(set(steps.tolist())) == 1)
    if in_order(steps, devices, width):
        return
    plan = make_plan(steps, devices, width)
    slot_of_place, wave_steps = former_plan(steps, devices, width)
    np.testing.assert_array_equal(plan.slot_of_place, slot_of_place)
    np.testing.assert_array_equal(plan.wave_steps, wave_steps)


def test_equal_clients_stay_where_they_are_and_so_do_all_on_one_lane():
    for steps, devices, width in ((np.full(6, 9), 3, 2), (np.array([5, 1, 9]), 1, 1)):
        plan = make_plan(steps, devices, width)
        assert in_order(steps, devices, width)
        np.testing.assert_array_equal(plan.slot_of_place, np.arange(len(steps)))
    assert not in_order(np.array([1, 2]), 2, 1)
    assert not in_order(np.array([1, 2]), 1, 2)


def test_the_shapes_of_a_plan_do_not_depend_on_the_steps():
    """Else a round would be compiled again whenever other clients are drawn."""
    drawn = [make_plan(np.random.default_rng(r).integers(1, 50, 10), 2, 3) for r in range(20)]
    drawn.append(make_plan(np.full(10, 4), 2, 3))
    shapes = {tuple(np.shape(leaf) for leaf in jax.tree.leaves(p)) for p in drawn}
    assert len(shapes) == 1


@pytest.mark.parametrize(
    ("counts", "local", "expected"),
    [
        ([1, 10, 11, 37, 0], {"epochs": 3}, [3, 3, 6, 12, 0]),
        ([1, 10, 11, 37, 0], {"epochs": None, "steps": 7}, [7, 7, 7, 7, 0]),
    ],
)
def test_steps_of_clients(counts, local, expected):
    np.testing.assert_array_equal(steps_of(np.array(counts), LocalConfig(batch_size=10, **local)), expected)


def _dirichlet_sizes(generator, count=100):
    """Log-normal sizes of CIFAR-10 under Dirichlet 0.1: 15 to 2,848, median about 360."""
    sizes = np.exp(generator.normal(np.log(360), 1.0, count)).astype(int).clip(15, 2848)
    sizes[:2] = 15, 2848
    return sizes


def test_one_client_a_wave_wastes_little_on_very_unequal_clients():
    sizes = _dirichlet_sizes(np.random.default_rng(0))
    local = LocalConfig(epochs=5, batch_size=50)
    wastes, wide = [], []
    for r in range(20):
        cohort = np.random.default_rng(r).choice(sizes, 10, replace=False)
        steps = steps_of(cohort, local)
        for devices in (1, 2):
            wastes.append(padding_waste(cohort, make_plan(steps, devices, 1), local, 1))
        wide.append(padding_waste(cohort, make_plan(steps, 1, 10), local, 10))
    assert np.mean(wastes) <= 1.10
    assert min(wastes) >= 1.0
    assert np.mean(wide) > 2


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=12).map(np.array),
    devices=st.integers(1, 3),
    width=st.integers(1, 4),
    local=st.sampled_from([{"epochs": 2}, {"epochs": None, "steps": 5}, {"epochs": None, "steps": 1}]),
)
def test_padding_waste_counts_what_a_loop_counts(counts, devices, width, local):
    config = LocalConfig(batch_size=7, **local)
    plan = make_plan(steps_of(counts, config), devices, width)
    wanted = 0
    for count in counts:
        batches = [min(7, count - start) for start in range(0, count, 7)]
        if config.epochs:
            wanted += sum(batches) * config.epochs
        elif batches:
            wanted += sum(batches[step % len(batches)] for step in range(config.steps))
    done = sum(int(bound) * width * 7 for bound in np.asarray(plan.wave_steps))
    waste = padding_waste(counts, plan, config, width)
    assert waste == pytest.approx(done / max(wanted, 1))
    assert wanted == 0 or waste >= 1


def seconds_by_hand(cohorts, devices, width, flops, side):
    """`rounds_seconds` of runs one after another, plan by plan."""
    total = 0.0
    for start in range(0, len(cohorts), side):
        block = cohorts[start : start + side]
        for number in range(len(block[0])):
            plans = [make_plan(run[number], devices, width, beside=side > 1).wave_steps for run in block]
            total += np.max(plans, 0).reshape(devices, -1).sum(1).max() / len(block[0])
    return total * step_seconds(side * width, flops)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 9), st.integers(1, 3), st.integers(1, 3))
def test_seconds_of_runs_side_by_side_are_those_of_the_longest(runs, rounds, slots, width, side):
    rng = np.random.default_rng(runs * 100 + rounds * 10 + slots)
    cohorts = [rng.integers(0, 30, (rounds, slots)) for _ in range(runs)]
    found = rounds_seconds(cohorts, 1, width, 1e6, side)
    assert found == pytest.approx(seconds_by_hand(cohorts, 1, width, 1e6, side))


def test_seconds_of_several_devices_are_those_of_the_one_with_most():
    cohort = np.array([[9, 1, 1, 1]])  # 9 and 1 here, and 1 and 1 there
    assert rounds_seconds([cohort], 2, 1, 0.0) == pytest.approx(10 * step_seconds(1, 0.0))


def test_plans_of_several_rounds_are_those_of_each():
    rng = np.random.default_rng(0)
    for devices, width, beside in [(1, 1, False), (1, 1, True), (3, 2, False), (2, 4, True)]:
        steps = rng.integers(0, 9, (5, 7))
        steps[2] = 4
        plans = make_plans(steps, devices, width, beside=beside)
        for number, own in enumerate(steps):
            one = make_plan(own, devices, width, beside=beside)
            for name in ("slot_of_place", "place_of_slot", "wave_steps"):
                np.testing.assert_array_equal(getattr(plans, name)[number], getattr(one, name))
