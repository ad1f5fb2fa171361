"""Machines by their names. What needs a compiler of their own is tried where it is installed."""

import importlib.util
import subprocess
import sys

import pytest

from fedjax_sim.core.errors import UserError
from fedjax_sim.runs.aot import machines


def test_devices_of_this_process_are_a_machine():
    found = machines.machine("cpu-3")
    assert (found.chips, found.kind, found.memory, found.clock) == (3, "CPU", None, None)


@pytest.mark.parametrize(
    "name", ["v5e", "tpu-8", "v5e_8", "", "h100x8", "0xh100", "2xcpu-2", "cpu-0", "v5e-"]
)
def test_a_wrong_name_gets_the_right_ones(name):
    with pytest.raises(UserError, match="no such machine") as caught:
        machines.machine(name)
    for example in ("v5e-8", "v5p-16", "2xv5e-256", "8xh100", "cpu-8"):
        assert example in str(caught.value)


@pytest.mark.parametrize(("name", "sizes"), [("v5e-12", "v5e-16"), ("v5p-9", "v5p-8"), ("v4-2", "v4-8")])
def test_a_slice_that_is_not_sold_gets_those_that_are(name, sizes):
    with pytest.raises(UserError, match=rf"no slice of that size.*{sizes}"):
        machines.machine(name)


def test_more_devices_than_this_process_has_are_refused():
    with pytest.raises(UserError, match=r"cpu-64.*JAX_NUM_CPU_DEVICES=64"):
        machines.machine("cpu-64")


@pytest.mark.parametrize(("name", "extra"), [("v5e-16", "tpu"), ("8xh100", "cuda-plan"), ("t4", "cuda-plan")])
def test_a_compiler_that_is_missing_is_named(name, extra, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"not installed.*fedjax-sim\[{extra}\]"):
        machines.machine(name)


def test_a_compiler_that_another_process_holds_is_waited_for_and_its_lock_is_left_alone(monkeypatch):
    from jax.experimental import topologies

    said = 'ABORTED: The TPU is already in use by process with pid 7. Run "$ sudo rm /tmp/libtpu_lockfile".'

    def refuse(*_, **__):
        raise RuntimeError(said)

    monkeypatch.setattr(topologies, "get_topology_desc", refuse)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(
        UserError, match=r"another process holds libtpu.*JAX_PLATFORMS=cpu.*of its own"
    ) as caught:
        machines.machine("v5e-4")
    assert "sudo" not in str(caught.value) and "lockfile" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "chips"),
    [("v5e-1", 1), ("v5e-256", 256), ("v6e-8", 8), ("v5p-512", 256), ("v4-32", 16), ("2xv5e-256", 512)],
)
def test_slices_have_the_chips_that_their_names_say(name, chips):
    """In a process of its own: libtpu is one process's at a time, and says a lot."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed (pip install 'fedjax-sim[tpu]')")
    code = f"from fedjax_sim.runs.aot import machines as m; m.start_for({name!r}); f = m.machine({name!r}); "
    code += "print('found', f.chips, f.mesh.devices.flat[0].platform)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert f"found {chips} tpu" in done.stdout, done.stderr[-2000:]


@pytest.mark.parametrize(("name", "cards"), [("8xh100", 8), ("a100", 1), ("a100-80", 1), ("t4", 1)])
def test_cards_are_described_without_a_driver(name, cards):
    if machines.cuda_compiler() is None:
        pytest.skip("JAX's CUDA plugin is not installed (pip install 'fedjax-sim[cuda-plan]')")
    code = f"from fedjax_sim.runs.aot import machines as m; m.start_for({name!r}); f = m.machine({name!r}); "
    code += "print('found', f.chips, f.mesh.devices.flat[0].platform)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert f"found {cards} gpu" in done.stdout, done.stderr[-2000:]
