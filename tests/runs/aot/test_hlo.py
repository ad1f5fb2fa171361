"""Compiled programs as they are read: by a text that is counted by hand, and by programs of this machine."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fedjax_sim.core.stacked import permute
from fedjax_sim.engine import placement
from fedjax_sim.engine.jaxpr_flops import flops
from fedjax_sim.runs.aot import hlo

TEXT = """HloModule jit_f, is_scheduled=true

FileNames
1 "/a/round.py"
2 "/a/stacked.py"

FunctionNames
1 "merge"
2 "swap"

FileLocations
1 {file_name_id=1 function_name_id=1 line=10 end_line=10 column=1 end_column=2}
2 {file_name_id=2 function_name_id=2 line=20 end_line=20 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}

%pick (p.0: f32[100,128], p.1: s32[1]) -> f32[1,128] {
  %p.0 = f32[100,128]{1,0:T(8,128)} parameter(0)
  %p.1 = s32[1]{0:T(128)} parameter(1)
  ROOT %g = f32[1,128]{1,0:T(8,128)} gather(%p.0, %p.1), offset_dims={1}
}

%below (c: (s32[], f32[3,6])) -> pred[] {
  %c = (s32[], f32[3,6]{1,0:T(8,128)}) parameter(0)
  %i.1 = s32[] get-tuple-element(%c), index=0
  %five = s32[] constant(5)
  ROOT %lt = pred[] compare(%i.1, %five), direction=LT
}

%body (b: (s32[], f32[3,6])) -> (s32[], f32[3,6]) {
  %b = (s32[], f32[3,6]{1,0:T(8,128)}) parameter(0)
  %x = f32[3,6]{1,0:T(8,128)} get-tuple-element(%b), index=1
  %n = s32[] get-tuple-element(%b), index=0
  %y = f32[3,6]{1,0:T(8,128)} all-to-all(%x), dimensions={0}, metadata={op_name="jit(f)/a" stack_frame_id=2}
  %z = f32[3,6]{1,0:T(8,128)S(1)} negate(%y), backend_config={"window_config":{"estimated_cycles":"70"}}
  ROOT %t = (s32[], f32[3,6]{1,0:T(8,128)}) tuple(%n, %y)
}

%free (d: f32[2]) -> pred[] {
  %d = f32[2]{0} parameter(0)
  ROOT %maybe = pred[] custom-call(%d), custom_call_target="x"
}

%open (e: f32[2]) -> f32[2] {
  %e = f32[2]{0:T(128)} parameter(0)
  ROOT %w = f32[2]{0:T(128)} negate(%e), backend_config={"estimated_cycles":"10"}
}

ENTRY %main (a: f32[100,128], s: s32[1], u: f32[2]) -> f32[1,128] {
  %a = f32[100,128]{1,0:T(8,128)} parameter(0)
  %s = s32[1]{0:T(128)} parameter(1)
  %u = f32[2]{0:T(128)} parameter(2)
  %zero = s32[] constant(0)
  %first = f32[3,6]{1,0:T(8,128)} broadcast(%zero), dimensions={}
  %start = (s32[], f32[3,6]{1,0:T(8,128)}) tuple(%zero, %first)
  %loop = (s32[], /*index=1*/f32[3,6]{1,0:T(8,128)}) while(%start), condition=%below, body=%body
  %steps = f32[2]{0:T(128)} while(%u), condition=%free, body=%open, metadata={op_name="jit(f)/wave/while"}
  ROOT %r = f32[1,128]{1,0:T(8,128)} fusion(%a, %s), calls=%pick, backend_config={"estimated_cycles":"1"}
}
"""


@pytest.fixture(scope="module")
def module():
    return hlo.read(TEXT)


def test_loops_count_as_often_as_they_run(module):
    times = {one.name: count for one, count in module.executed({"/wave/while": 7})}
    assert times["z"] == 5  # the constant that its counter is compared with
    assert times["w"] == 7  # told by the end of its name
    assert "g" not in times  # part of a fusion
    assert module.unknown_loops({"/wave/while": 7}) == 0
    assert module.unknown_loops({}) == 1


def test_estimated_cycles_are_added_up(module):
    assert module.cycles({"/wave/while": 7}) == 5 * 70 + 7 * 10 + 1
    assert hlo.read(TEXT.replace("estimated_cycles", "guessed")).cycles({}) is None


def test_an_exchange_has_its_size_and_the_calls_that_asked_for_it(module):
    (one,) = module.collectives({})
    assert (one.op, one.bytes, one.times) == ("all-to-all", 3 * 6 * 4, 5)
    assert [(frame.file, frame.line, frame.function) for frame in one.stack] == [
        ("/a/stacked.py", 20, "swap"),
        ("/a/round.py", 10, "merge"),
    ]


def test_what_a_host_passes_on_to_other_slices_is_an_exchange():
    """As XLA writes it: the shape that is sent, a context and a token; the line is that of what is sent."""
    name = '_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="ALL_TO_ALL"'
    sent = (
        '  %ready = f32[5,32]{1,0:T(8,128)} copy(%first), metadata={op_name="a" stack_frame_id=2}\n'
        "  %given = (f32[5,32]{1,0:T(8,128)}, u32[]{:S(2)}, token[]) send(%ready, %zero), channel_id=3, "
        f"is_host_transfer=true, frontend_attributes={{{name}}}\n"
        "  %gone = token[] send-done(%given), channel_id=3, is_host_transfer=true\n"
    )
    largest, other = hlo.read(TEXT.replace("  ROOT %r =", f"{sent}  ROOT %r =")).collectives({})
    assert (largest.op, largest.bytes, largest.times) == ("all-to-all between slices", 5 * 32 * 4, 1)
    assert largest.stack[0].file == "/a/stacked.py" and other.op == "all-to-all"


def test_tiles_are_filled_up(module):
    (array,) = next(one for one, _ in module.executed({}) if one.name == "first").arrays
    assert (array.size, array.padded) == (72, 8 * 128 * 4)
    turned = hlo.Array("f32", (3, 6), (0, 1), (8, 128))  # the first dimension lies innermost
    assert turned.padded == 8 * 128 * 4
    assert hlo.Array("u8", (9, 130), (1, 0), (8, 128)).padded == 16 * 256
    assert hlo.Array("pred", (3,), (0,)).padded == 3
    used, taken = 72 * (1 + 5 + 5) + 8 * 7 + 512, 4096 * (1 + 5 + 5) + 512 * 7 + 4096
    assert module.padding({"/wave/while": 7}) == pytest.approx(1 - used / taken)


def test_traffic_is_what_main_memory_gives_and_takes(module):
    tile, small = 8 * 128 * 4, 128 * 4
    # The first fills a tile; in each pass an exchange reads and writes one, and another reads it and writes
    # elsewhere; the last reads one row of the hundred, and where it is.
    wanted = tile + 4 + 5 * (2 * tile + tile) + 7 * 2 * small + (tile + small + tile)
    assert module.traffic({"/wave/while": 7}) == pytest.approx(wanted, abs=8)


def test_a_program_of_this_machine_is_read():
    """Its exchanges are found, with our own lines; so is how often a loop of known length runs."""
    mesh = placement.make_mesh(2)
    rows = jax.ShapeDtypeStruct((4, 6), jnp.float32, sharding=NamedSharding(mesh, P("clients")))
    index = jax.ShapeDtypeStruct((4,), jnp.int32)

    def shuffled(leaf, index):
        return jax.lax.fori_loop(0, 3, lambda _, leaf: permute(leaf, index) * 2, leaf)

    with jax.set_mesh(mesh), hlo.with_lines():
        module = hlo.read(jax.jit(shuffled).lower(rows, index).compile().as_text())
    found = [one for one in module.collectives({}) if one.op == "all-to-all"]
    assert found and all(one.times == 3 for one in found)
    assert any(frame.file.endswith("core/stacked.py") for frame in found[0].stack)
    assert module.unknown_loops({}) == 0


def test_operations_of_a_traced_program_are_counted():
    def dense(x, w):
        return jax.lax.fori_loop(0, x.shape[0], lambda _, y: y @ w, x)  # known: five times

    def network(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    of = functools.partial(flops, length=lambda body: None, share=lambda array: 1.0)
    square = jnp.ones((5, 5))
    assert of(jax.make_jaxpr(dense)(square, square)) == 5 * 2 * 5**3
    images, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((5, 5, 3, 6))
    traced = jax.make_jaxpr(network)(images, kernel)
    assert of(traced) == 2 * (2 * 4 * 4 * 6) * (5 * 5 * 3)
    compiled = jax.jit(network).lower(images, kernel).compile().cost_analysis()
    assert of(traced) == pytest.approx(compiled["flops"], rel=0.01)


def test_operations_of_a_loop_whose_length_is_decided_inside():
    def until(x, n):
        return jax.lax.fori_loop(0, n, lambda _, y: y @ y, x)

    traced = jax.make_jaxpr(until)(jnp.ones((4, 4)), jnp.int32(3))
    assert flops(traced, lambda body: 9.0, lambda array: 1.0) == 9 * 2 * 4**3
    assert flops(traced, lambda body: None, lambda array: 0.5) == 0.5 * 2 * 4**3
