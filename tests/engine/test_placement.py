"""Meshes, shared buffers, and the defaults that may change speed only."""

import dataclasses
import os
import subprocess
import sys
import types
from typing import Any

import jax
import numpy as np
import pytest

from fedjax_sim import models
from fedjax_sim.config import EvaluationConfig, ExecutionConfig, ModelConfig
from fedjax_sim.core.conv_impl import CONV_IMPLS
from fedjax_sim.core.errors import UserError
from fedjax_sim.engine import placement
from fedjax_sim.engine.waves import Work


def test_a_mesh_has_one_axis_and_as_many_devices_as_asked_for():
    assert placement.make_mesh(2).shape == {"clients": 2}
    assert placement.make_mesh().size == len(jax.devices())
    with pytest.raises(UserError, match=r"execution\.devices = 99") as caught:
        placement.make_mesh(99)
    assert caught.value.field == "execution.devices"


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float32])
def test_cpu_devices_share_one_buffer(dtype):
    mesh = placement.make_mesh(4)
    raw = np.arange(4097, dtype=dtype)[1:].reshape(64, 64)  # starts off any boundary
    for array in (raw, raw.T, raw[::2]):
        placed = placement.put(array, placement.replicated(mesh))
        np.testing.assert_array_equal(placed, array)
        assert placed.sharding.is_fully_replicated
        pointers = {shard.data.unsafe_buffer_pointer() for shard in placed.addressable_shards}
        assert len(pointers) == 1


def test_defaults_of_the_cpu():
    """Convolutions alone, small dense models in narrow waves; never a grouped convolution under `vmap`."""
    auto, mesh = ExecutionConfig(), placement.make_mesh(2)
    mlp = models.create("mlp", (4, 4, 1), 3, hidden=())
    lenet = models.create("lenet", (32, 32, 3), 10)
    assert placement.speed_defaults(auto, lenet, 100, mesh) == (1, "auto")
    assert placement.speed_defaults(ExecutionConfig(wave=2), lenet, 100, mesh) == (2, "patches")
    assert placement.speed_defaults(auto, mlp, 100, mesh)[0] == 10
    assert placement.speed_defaults(auto, mlp, 3, mesh)[0] == 2


def test_waves_of_unequal_clients_are_as_narrow_as_pays():
    auto, mesh = ExecutionConfig(), placement.make_mesh(1)
    mlp = models.create("mlp", (4, 4, 1), 3, hidden=())
    unequal, alike, equal = (np.where(np.arange(100) % 10, 3, most) for most in (60, 5, 3))

    def width(steps, flops, **chosen):
        asked = dataclasses.replace(auto, **chosen)
        return placement.speed_defaults(asked, mlp, 20, mesh, Work(steps, flops))[0]

    assert width(unequal, 5e6) == 1  # waiting for the longest costs more than starting more steps
    assert width(alike, 1e3) == 10  # and less
    assert width(equal, 5e6) == 10
    assert width(unequal, 5e6, wave=4) == 4


def test_what_the_user_chose_is_taken_but_no_wave_is_wider_than_a_devices_share():
    mlp, mesh = models.create("mlp", (4, 4, 1), 3, hidden=()), placement.make_mesh(2)
    for impl in CONV_IMPLS:
        assert placement.speed_defaults(ExecutionConfig(wave=3, conv=impl), mlp, 8, mesh) == (3, impl)
    assert placement.speed_defaults(ExecutionConfig(wave=30), mlp, 7, mesh)[0] == 4


def test_forward_passes_are_small_for_convolutions_on_a_cpu_unless_asked_otherwise():
    lenet, mlp = (models.create(name, (32, 32, 3), 10) for name in ("lenet", "mlp"))
    auto, mesh = EvaluationConfig(), placement.make_mesh(2)
    assert [placement.forward_batch(auto, model, mesh) for model in (lenet, mlp)] == [50, 500]
    assert placement.forward_batch(EvaluationConfig(batch_size=7), lenet, mesh) == 7
    assert placement.forward_batch(auto, lenet, _mesh_of("gpu")) == 500


def test_defaults_are_those_of_the_mesh_and_not_of_this_machine():
    """A program may be compiled for devices that are not here."""
    lenet = models.create("lenet", (32, 32, 3), 10)
    assert placement.speed_defaults(ExecutionConfig(), lenet, 100, _mesh_of("tpu", 4)) == (25, "xla")
    assert placement.speed_defaults(ExecutionConfig(), lenet, 100, _mesh_of("gpu", 4)) == (25, "patches")
    resnet, mlp = models.create("resnet20", (32, 32, 3), 10), models.create("mlp", (8, 8, 1), 10)
    assert placement.speed_defaults(ExecutionConfig(), resnet, 100, _mesh_of("tpu", 4)) == (1, "xla")
    assert placement.speed_defaults(ExecutionConfig(), mlp, 100, _mesh_of("tpu", 4))[0] == 25
    assert placement.speed_defaults(ExecutionConfig(wave=7), resnet, 100, _mesh_of("tpu", 4))[0] == 7


def _mesh_of(platform: str, devices: int = 2) -> Any:
    return types.SimpleNamespace(
        size=devices, devices=np.full(devices, types.SimpleNamespace(platform=platform))
    )


def test_devices_once_chosen_are_not_chosen_again(monkeypatch):
    """The environment and an earlier `jax.config.update` take precedence, silently."""
    before = jax.config.jax_num_cpu_devices
    assert before > 0
    placement.use_all_cores()
    assert jax.config.jax_num_cpu_devices == before
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "3")
    placement.use_all_cores()
    assert jax.config.jax_num_cpu_devices == before


@pytest.mark.parametrize("form", ["flag", "among others", "file"])
def test_devices_that_xlas_flag_asks_for_are_not_overruled(monkeypatch, tmp_path, form):
    """The way that most instructions on the web name; the flag may stand in a file as well."""
    flag, chosen = "--xla_force_host_platform_device_count=8", []
    (tmp_path / "flags").write_text(flag)
    value = {"flag": flag, "among others": f"--xla_foo=1 {flag}", "file": str(tmp_path / "flags")}[form]
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES", raising=False)
    config = types.SimpleNamespace(jax_num_cpu_devices=-1, update=lambda *change: chosen.append(change))
    monkeypatch.setattr(placement.jax, "config", config)
    monkeypatch.setenv("XLA_FLAGS", value)
    placement.use_all_cores()
    assert chosen == []
    monkeypatch.setenv("XLA_FLAGS", "--xla_foo=1")
    monkeypatch.delattr("os.sched_getaffinity", raising=False)  # which macOS does not have
    placement.use_all_cores()
    assert chosen == [("jax_num_cpu_devices", os.cpu_count())]


@pytest.mark.slow
def test_xlas_flag_gives_its_number_of_devices():
    environment = {name: value for name, value in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"}
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=3"
    code = "import fedjax_sim, jax; print(len(jax.devices()))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["3"], done.stderr


class _Devices:
    """Of a machine that is not here."""

    def __init__(self, platform):
        self.devices = np.array([type("Device", (), {"platform": platform})()])


@pytest.mark.parametrize(
    ("platform", "dtype", "products", "expected"),
    [
        ("cpu", "auto", "auto", ("float32", None)),
        ("cpu", "bfloat16", "tf32", ("bfloat16", None)),
        ("gpu", "float32", "auto", ("float32", "float32")),
        ("gpu", "auto", "tf32", ("bfloat16", "tensorfloat32")),
        ("tpu", "auto", "auto", ("bfloat16", None)),
        ("tpu", "float32", "float32", ("float32", "float32")),
    ],
)
def test_numerics_by_machine(platform, dtype, products, expected):
    config = ModelConfig(dtype=dtype, products=products)
    assert placement.numerics(config, _Devices(platform)) == expected


def test_a_setting_of_jax_goes_before_the_machines_default_and_gpus_have_no_products_of_bfloat16():
    with jax.default_matmul_precision("tensorfloat32"):
        assert placement.numerics(ModelConfig(), _Devices("gpu")) == ("float32", None)
        assert placement.numerics(ModelConfig(products="float32"), _Devices("gpu"))[1] == "float32"
    with pytest.raises(UserError, match=r"model\.products = 'bfloat16'"):
        placement.numerics(ModelConfig(products="bfloat16"), _Devices("gpu"))


@pytest.mark.parametrize("conv", CONV_IMPLS)
def test_every_product_of_a_step_is_as_fine_as_the_model_says(conv):
    """Of gradients too, whose convolutions have derivatives of their own."""
    model = dataclasses.replace(models.create("lenet", (32, 32, 3), 10), conv=conv, products="float32")
    images, variables = np.zeros((2, 32, 32, 3), np.float32), model.abstract

    def loss(params, x):
        return model.apply({"params": params}, x)[0].sum()

    def gradient(params, x):
        with model.precisely():
            return jax.grad(loss)(params, x)

    jaxpr = jax.make_jaxpr(gradient)(variables["params"], images)
    found = [
        equation.params["precision"]
        for equation in _equations(jaxpr.jaxpr)
        if equation.primitive.name in ("dot_general", "conv_general_dilated")
    ]
    assert len(found) >= 10
    highest = jax.lax.Precision.HIGHEST
    assert all(one in (highest, (highest, highest)) for one in found)


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda leaf: hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr"),
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)
