"""Which layouts are tried, and how they are timed. The clock is made up; nothing here is a test of speed."""

import numpy as np
import pytest

from fedjax_sim import models
from fedjax_sim.config import ExecutionConfig, LocalConfig
from fedjax_sim.data.digits import digits as load_digits
from fedjax_sim.engine import placement, step_times
from fedjax_sim.engine.step_times import Layout, layouts, timings


class Machine:
    """Steps that take as long as it is told, on a clock that only they move."""

    def __init__(self, seconds, compiling=1.0):
        """`seconds`: of a step of a client in each layout, and in each turn if it is a list."""
        self.now, self.seconds, self.compiling = 0.0, seconds, compiling
        self.made, self.ran = [], []

    def clock(self):
        return self.now

    def make(self, layout):
        self.made.append(layout)
        self.now += self.compiling

        def run(steps):
            self.ran.append(layout)
            self.now += self.seconds[layout] * steps * layout.wave

        return run


LENET = models.create("lenet", (32, 32, 3), 10)
MLP = models.create("mlp", (4, 4, 1), 3, hidden=())


def test_the_default_comes_first_and_what_the_user_chose_stays():
    mesh = placement.make_mesh(2)
    found = layouts(ExecutionConfig(), LENET, 10, mesh)
    assert found[0] == Layout(1, "auto")
    assert set(found[1:]) == {
        *(Layout(1, conv) for conv in ("canonical", "patches", "xla")),
        *(Layout(wave, "patches") for wave in (2, 4, 5)),
    }
    assert {layout.wave for layout in layouts(ExecutionConfig(wave=1), LENET, 10, mesh)} == {1}
    assert {layout.conv for layout in layouts(ExecutionConfig(conv="canonical"), LENET, 10, mesh)} == {
        "canonical"
    }
    assert layouts(ExecutionConfig(wave=2, conv="xla"), LENET, 10, mesh) == (Layout(2, "xla"),)


def test_dense_models_differ_by_their_waves_alone():
    mesh = placement.make_mesh(2)
    found = layouts(ExecutionConfig(), MLP, 100, mesh)
    assert found[0] == Layout(*placement.speed_defaults(ExecutionConfig(), MLP, 100, mesh))
    assert [layout.wave for layout in found] == [10, 8, 16, 4, 2, 1]
    assert layouts(ExecutionConfig(wave=4), MLP, 100, mesh) == (Layout(4, "patches"),)


def test_a_convolution_that_rounds_more_coarsely_is_never_tried():
    for size in (1, 10, 100):
        assert all(
            one.conv != "winograd" for one in layouts(ExecutionConfig(), LENET, size, placement.make_mesh(2))
        )


def test_layouts_take_turns_and_are_compared_by_client():
    slow, fast = Layout(1, "auto"), Layout(4, "patches")
    machine = Machine({slow: 0.010, fast: 0.005})
    found = timings((slow, fast), machine.make, 20.0, machine.clock)
    assert [timing.layout for timing in found] == [slow, fast]
    np.testing.assert_allclose([timing.seconds for timing in found], [0.010, 0.005])
    np.testing.assert_allclose(found[0].ratios, 1)
    np.testing.assert_allclose(found[1].ratios, 0.5)
    turns = [tuple(machine.ran[-4:-2]), tuple(machine.ran[-2:])]
    assert set(turns) == {(slow, fast), (fast, slow)}


def test_what_is_far_slower_gets_no_turns_and_what_there_is_no_time_for_is_left_out():
    default, slower, late = Layout(1, "auto"), Layout(1, "xla"), Layout(2, "patches")
    machine = Machine({default: 0.01, slower: 0.8, late: 0.001}, compiling=3.0)
    found = timings((default, slower, late), machine.make, 8.0, machine.clock)
    assert machine.made == [default, slower]
    by_layout = {timing.layout: timing for timing in found}
    assert by_layout.keys() == {default, slower}
    np.testing.assert_allclose(by_layout[slower].ratios, [80])
    assert len(by_layout[default].ratios) >= step_times.LEAST


def test_wider_waves_of_a_kind_that_is_far_slower_are_not_tried():
    default, two, four, other = (
        Layout(1, "auto"),
        Layout(2, "patches"),
        Layout(4, "patches"),
        Layout(4, "xla"),
    )
    machine = Machine({default: 0.01, two: 0.03, four: 0.01, other: 0.009})
    found = timings((default, two, four, other), machine.make, 100.0, machine.clock)
    assert machine.made == [default, two, other]
    assert [timing.layout for timing in found] == [default, two, other]


def test_what_is_too_large_is_not_tried():
    default, large = Layout(1, "auto"), Layout(8, "patches")
    machine = Machine({default: 0.01, large: 0.001})

    def make(layout):
        return None if layout == large else machine.make(layout)

    assert [timing.layout for timing in timings((default, large), make, 5.0, machine.clock)] == [default]
    assert timings((large, default), make, 5.0, machine.clock) == ()

    digits, mesh = load_digits(), placement.make_mesh(2)
    model = models.create("mlp", digits.task.abstract_inputs(1)[0].shape[1:], 10, hidden=(64,))
    local = LocalConfig(batch_size=4)

    def fits(wave, room):
        make = step_times.step_of(model, digits.task, local, mesh, uneven=False, room=room)
        return make(Layout(wave, "patches")) is not None

    one = 4 * model.num_params()
    assert not fits(8, 8 * one) and fits(8, 80 * one) and not fits(80, 80 * one)
    assert fits(1, 0)  # that is what a run takes at least


def test_few_turns_are_had_however_short_the_time_and_not_too_many_however_long():
    default, other = Layout(1, "auto"), Layout(1, "patches")
    for seconds, turns in ((0.0, step_times.LEAST), (1e6, step_times.MOST)):
        machine = Machine({default: 0.01, other: 0.01}, compiling=0.0)
        found = timings((default, other), machine.make, seconds, machine.clock)
        assert len(found[0].ratios) == turns


@pytest.mark.parametrize("uneven", [False, True])
def test_what_is_timed_is_training(uneven):
    """Every client on every device, from one model, to another one."""
    digits, mesh = load_digits(), placement.make_mesh(2)
    model = models.create("mlp", digits.task.abstract_inputs(1)[0].shape[1:], 10, hidden=(4,))
    local = LocalConfig(epochs=2, batch_size=4)
    make = step_times.step_of(model, digits.task, local, mesh, uneven=uneven)
    for layout in (Layout(1, "auto"), Layout(3, "patches")):
        run, clients = make(layout), 2 * layout.wave
        before, after = (run(steps)[0]["params"]["fc1"]["kernel"] for steps in (0, 2))
        assert before.shape[0] == clients
        np.testing.assert_array_equal(before, np.broadcast_to(before[:1], before.shape))
        moved = np.abs(np.asarray(after) - np.asarray(before)).max((1, 2))
        assert (moved > 0).all() and (moved < 1e-3).all()
        assert np.isfinite(run(2)[1]).all()
