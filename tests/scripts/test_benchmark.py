"""The comparison's own arithmetic: data, weights, operation counts, schedule, table. No peer is started."""

import argparse
import importlib
import json
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given
from hypothesis import strategies as st

from fedjax_sim import models
from fedjax_sim.config import ExecutionConfig
from fedjax_sim.engine import placement

ROOT = Path(__file__).parents[2]
NAMES = ("common", "measure", "machine", "envs", "peak", "plan", "report", "run")


def _load():
    """The scripts' modules, which import one another by plain names; those are taken back afterwards."""
    folder = str(ROOT / "scripts" / "benchmark")
    saved = {name: sys.modules.pop(name, None) for name in NAMES}
    sys.path.insert(0, folder)
    try:
        return [importlib.import_module(name) for name in NAMES]
    finally:
        sys.path.remove(folder)
        for name, module in saved.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module


common, measure, machine, envs, peak, plan, report, run = _load()


def test_parameter_counts_are_the_published_ones():
    counts = {name: workload.parameters for name, workload in common.WORKLOADS.items()}
    assert counts["lenet"] == 62_006  # FedMR
    assert counts["mcmahan-10"] == counts["mcmahan-100"] == 2_156_490
    assert counts["mlp-100"] == counts["mlp-1000"] == 64 * 64 + 64 + 64 * 10 + 10


def test_flops_by_hand():
    # MLP: forward 2(64·64 + 64·10), weight gradients the same, input gradient for the second layer only.
    assert common.WORKLOADS["mlp-100"].flops_per_image == 2 * (2 * (64 * 64 + 64 * 10)) + 2 * 64 * 10
    lenet = common.WORKLOADS["lenet"]
    conv1, conv2 = 28 * 28 * 6 * 75, 10 * 10 * 16 * 150
    dense = 400 * 120 + 120 * 84 + 84 * 10
    assert lenet.flops_per_image == 2 * (2 * conv1 + 3 * (conv2 + dense))
    assert lenet.images_per_round == 10 * 500 * 5 and lenet.steps == 50
    assert lenet.flops_per_round == 25_000 * lenet.flops_per_image


@pytest.mark.parametrize("name", ["mlp-100", "mcmahan-10"])
def test_data_are_a_function_of_seed_and_client(name):
    workload = common.WORKLOADS[name]
    images, labels = common.client_data(workload, 7)
    again, _ = common.client_data(workload, 7)
    assert images.dtype == np.uint8 and images.shape == (workload.samples, *workload.shape)
    assert labels.dtype == np.int32 and labels.min() >= 0 and labels.max() < common.CLASSES
    np.testing.assert_array_equal(images, again)
    assert (images != common.client_data(workload, 8)[0]).mean() > 0.9
    assert (images != common.client_data(workload, 7, seed=1)[0]).mean() > 0.9


def test_population_holds_the_clients_in_order_and_decoded():
    workload = common.WORKLOADS["mlp-100"]
    images, labels = common.population(workload)
    first, _ = common.decoded_population(workload, channels_first=True)
    one, one_labels = common.client_data(workload, 11)
    np.testing.assert_array_equal(images[11], one)
    np.testing.assert_array_equal(labels[11], one_labels)
    np.testing.assert_array_equal(first[11], np.moveaxis(common.decode(one), -1, 1))
    assert abs(first.mean()) < 0.1 and 0.8 < first.std() < 1.3


def test_classes_can_be_told_apart_by_their_means():
    workload = common.WORKLOADS["mlp-100"]
    images, labels = common.decoded_population(workload)
    images, labels = images.reshape(-1, 64)[:4000], labels.reshape(-1)[:4000]
    means = np.stack([images[labels == c].mean(0) for c in range(common.CLASSES)])
    held, truth = common.held_out(workload)
    nearest = ((held.reshape(-1, 1, 64) - means) ** 2).sum(-1).argmin(1)
    assert (nearest == truth).mean() > 0.8


def test_cohorts_are_reproducible_and_without_repetition():
    workload = common.WORKLOADS["mlp-1000"]
    one, two = common.cohorts(workload), common.cohorts(workload)
    drawn = [next(one) for _ in range(3)]
    for ids in drawn:
        np.testing.assert_array_equal(ids, next(two))
        assert len(set(ids.tolist())) == workload.cohort and ids.max() < workload.population
    assert (drawn[0] != drawn[1]).any()


@pytest.mark.parametrize("name", ["lenet", "mcmahan-10", "mlp-100"])
def test_channels_first_weights_are_the_same_function(name):
    """Convolution and first dense layer by einsum, in both layouts."""
    workload = common.WORKLOADS[name]
    last, first = common.initial_weights(workload), common.channels_first_weights(workload)
    assert sum(w.size + b.size for w, b in last.values()) == workload.parameters
    rng = np.random.default_rng(0)
    depth, side = workload.shape[2], 1
    for layer in workload.layers:
        ours, theirs = last[layer.name][0], first[layer.name][0]
        if layer.kernel:
            patch = rng.standard_normal((layer.kernel, layer.kernel, layer.inputs))
            np.testing.assert_allclose(
                np.einsum("hwc,hwco->o", patch, ours),
                np.einsum("chw,ochw->o", patch.transpose(2, 0, 1), theirs),
            )
            depth = layer.outputs
        else:
            side = int((layer.inputs // depth) ** 0.5) if depth > 1 else 1
            rest = layer.inputs // (side * side)
            features = rng.standard_normal((side, side, rest))
            np.testing.assert_allclose(
                features.reshape(-1) @ ours, theirs @ features.transpose(2, 0, 1).reshape(-1), rtol=1e-9
            )
            depth = 1


def _plain_cnn(params, x):
    """The McMahan CNN by JAX's and Flax's own functions, in the type of its arguments."""
    for name in ("conv1", "conv2"):
        kernel, bias = params[name]
        numbers = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)
        x = nn.max_pool(nn.relu(x + bias[None, None, None]), (2, 2), (2, 2))
    hidden = nn.relu(x.reshape(len(x), -1) @ params["fc1"][0] + params["fc1"][1][None])
    return hidden @ params["fc2"][0] + params["fc2"][1][None]


def _losses(apply, params, workload, steps=4):
    """The loss before each of some full-batch steps of one client, and on held-out samples at the end."""
    images, labels = common.client_data(workload, 0)
    dtype = jax.tree.leaves(params)[0].dtype
    x, held = (jnp.asarray(a, dtype) for a in (common.decode(images), common.held_out(workload)[0][:64]))

    def loss(params, x, labels):
        picked = jnp.take_along_axis(jax.nn.log_softmax(apply(params, x)), jnp.asarray(labels)[:, None], 1)
        return -picked.mean()

    step, rate, out = jax.jit(jax.value_and_grad(loss)), np.asarray(workload.learning_rate, dtype), []
    for _ in range(steps):
        value, gradient = step(params, x, labels)
        params = jax.tree.map(lambda a, g: a - rate * g, params, gradient)
        out.append(float(value))
    return [*out, float(step(params, held, common.held_out(workload)[1][:64])[0])]


def test_our_default_ends_the_check_of_the_cnn_where_float64_does():
    """To 1e-5. Winograd's rounding let pooling take other maxima, and moved the loss in the fourth digit."""
    workload = common.CHECKS["check-mcmahan"]
    weights, zoo = common.initial_weights(workload), models.create("mcmahan", workload.shape, 10)
    model = zoo.with_conv(
        placement.speed_defaults(ExecutionConfig(), zoo, workload.cohort, placement.make_mesh(2))[1]
    )

    def ours(params, x):
        named = {name: {"kernel": w, "bias": b} for name, (w, b) in params.items()}
        return model.apply({"params": named}, x)[0]

    found = _losses(ours, jax.tree.map(jnp.asarray, weights), workload)
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), weights)
        wanted = _losses(_plain_cnn, exact, workload)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_checks_leave_nothing_to_chance():
    assert {workload.model for workload in common.CHECKS.values()} == set(common.MODELS)
    for workload in common.CHECKS.values():
        assert workload.cohort == workload.population and workload.batch == workload.samples


@given(repetitions=st.integers(1, 6), peers=st.lists(st.sampled_from(plan.PEERS), min_size=1, unique=True))
def test_schedule_runs_each_pair_once_a_repetition_side_by_side(repetitions, peers):
    workloads = list(common.WORKLOADS)
    order = plan.schedule(peers, workloads, repetitions, cores=2)
    wanted = {
        (peer, variant.name, workload, repetition)
        for peer in peers
        for variant in plan.variants(peer, 2)
        for workload in workloads
        for repetition in range(repetitions)
        if (peer, workload) not in plan.NOT_RUN
    }
    assert len(order) == len(wanted)
    assert {(r.peer, r.variant.name, r.workload, r.repetition) for r in order} == wanted
    blocks = [(r.repetition, r.workload) for r in order]
    assert blocks == sorted(blocks, key=lambda b: (b[0], workloads.index(b[1])))


def test_schedule_turns_the_order_of_peers():
    order = plan.schedule(["ours", "torch", "pfl"], ["lenet"], 3, cores=2)
    firsts = [next(r.peer for r in order if r.repetition == repetition) for repetition in range(3)]
    assert firsts == ["ours", "torch", "pfl"]


def test_one_core_leaves_one_variant_of_each():
    for peer in plan.PEERS:
        assert len(plan.variants(peer, 1)) == 1
    assert {v.name for v in plan.variants("torch", 2)} == {"1 thread", "2 threads"}


def _run_line(peer, variant, repetition, seconds, start=2.5, **more):
    return {
        "kind": "run", "peer": peer, "variant": variant, "workload": "mlp-100", "repetition": repetition,
        "seconds": seconds, "warmup_seconds": [1.5], "peak_rss_mb": 300.0, "loss_of_start": start,
        "loss_at_end": 1.25, "neighbours": 0.0, "versions": {"python": "3.11", peer: "1"}, **more,
    }  # fmt: skip


def _lines():
    return [
        {"kind": "machine", "cpu": "Abacus", "cores": 2, "memory_gib": 4.0, "system": "Linux x",
         "date": "2000-01-01", "load": 0.1, "revision": "abc"},
        {"kind": "peak", "library": "numpy", "threads": 1, "gflops": 9.0, "best_gflops": 10.0},
        _run_line("ours", "2 devices", 0, [0.010, 0.012, 0.011]),
        _run_line("ours", "2 devices", 1, [0.020, 0.022, 0.021]),
        _run_line("torch", "1 thread", 0, [0.033]),
        _run_line("torch", "1 thread", 1, [0.084]),
        _run_line("torch", "2 threads", 0, [0.030]),
        {"kind": "dropped", "peer": "torch", "workload": "mlp-100", "variant": "2 threads", "seconds": 0.03},
        {"kind": "not_run", "peer": "flwr", "workload": "mlp-100", "why": "too slow"},
        {"kind": "failed", "peer": "pfl", "workload": "mlp-100", "variant": "1 thread", "repetition": 0,
         "why": "status 1: no"},
    ]  # fmt: skip


def test_ratios_are_paired_by_repetition():
    lines = _lines()
    torch = report.best_variant(x for x in lines if x["kind"] == "run" and x["peer"] == "torch")
    ours = [x for x in lines if x.get("peer") == "ours"]
    assert {x["variant"] for x in torch} == {"1 thread"}  # a single lucky repetition does not win
    np.testing.assert_allclose(report.ratios(torch, ours), [3.0, 4.0])


def test_report_shows_what_ran_and_what_did_not(tmp_path, monkeypatch):
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in _lines()))
    monkeypatch.setattr(sys, "argv", ["report.py", str(path)])
    report.main()
    text = path.with_suffix(".md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| PyTorch loop"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert len(cells) == len(report.HEADINGS)
    assert cells[1] == "1 thread" and cells[4] == "3.50× (3.00–4.00)" and cells[7] == "300"
    flops = common.WORKLOADS["mlp-100"].flops_per_round / 0.0585 / 1e9
    assert cells[5].startswith(f"{flops:.3g} (") and cells[5].endswith(f"({flops / 10:.1%})")
    assert "Flower simulation: not run: too slow." in text
    assert "pfl-research, 1 thread, repetition 0: failed: status 1: no." in text
    assert "PyTorch loop, 2 threads: 0.03 s a round; not repeated." in text
    assert "Abacus, 2 cores" in text and "## lenet" not in text and "differs" not in text


def test_report_marks_noise_and_differing_models():
    lines = [*_lines(), _run_line("fedjax", "jit", 0, [0.1], start=2.6, neighbours=0.4)]
    text = report.render(lines)
    assert "| FedJAX * |" in text
    assert "mlp-100: loss_of_start differs" in text
    check = {**_run_line("ours", "x", 0, [1.0]), "kind": "check", "workload": "check-mlp"}
    other = {**check, "peer": "torch", "loss_at_end": 1.3}
    assert not report.disagreements([check])
    assert "check-mlp: loss_at_end differs: ours 1.25, torch 1.3" in report.disagreements([check, other])[0]


def test_a_torn_results_file_is_named(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"kind": "peak"}\n{"kind": \n')
    with pytest.raises(ValueError, match=r"results\.jsonl, line 2"):
        report.read(path)


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--peers", "tff"], "--peers"), (["--repetitions", "0"], "--repetitions: 0 is less than 1")],
)
def test_a_wrong_option_is_named(options, said, capsys):
    with pytest.raises(SystemExit) as status:
        run.parse(options)
    assert status.value.code == 2 and said in capsys.readouterr().err


def test_quick_is_one_of_each():
    args = run.parse(["--quick", "--peers", "ours", "torch", "ours"])
    assert (args.repetitions, args.rounds, args.warmup, args.peers) == (1, 1, 1, ["ours", "torch"])


def test_call_ends_what_takes_too_long_and_says_why_it_failed():
    assert run.call([sys.executable, "-c", "print('x')"], 30) == ("x\n", None)
    _, why = run.call([sys.executable, "-c", "raise KeyError('gone')"], 30)
    assert why == "status 1: KeyError: 'gone'"
    # A background job of a shell ignores an interrupt unless it asks for it, and is killed 15 s later.
    heeds = "import signal, time; signal.signal(signal.SIGINT, signal.default_int_handler); time.sleep(60)"
    _, why = run.call([sys.executable, "-c", heeds], 0.5)
    assert why == "took more than 0.5 s"


def test_repeat_does_not_repeat_slow_variants_or_failures(monkeypatch):
    speed = {"1 thread": 1.0, "2 threads": 2.0, "2 processes": 1.1}
    written = []

    def execute(item, python, args):
        if item.peer == "fedjax":
            return {"kind": "failed", "peer": item.peer, "variant": item.variant.name, "why": "no"}
        return _run_line(item.peer, item.variant.name, item.repetition, [speed[item.variant.name]])

    monkeypatch.setattr(run, "execute", execute)
    monkeypatch.setattr(run.machine, "cores", lambda: 2)
    args = argparse.Namespace(peers=["pfl", "fedjax"], workloads=["mlp-100"], repetitions=3)
    run.repeat(args, {"pfl": "python", "fedjax": "python"}, written.append)
    done = [(x["variant"], x["repetition"]) for x in written if x["kind"] == "run"]
    assert sum(variant == "2 threads" for variant, _ in done) == 1
    assert sum(variant == "1 thread" for variant, _ in done) == 3
    assert sum(variant == "2 processes" for variant, _ in done) == 3
    assert [x["variant"] for x in written if x["kind"] == "dropped"] == ["2 threads"]
    assert sum(x["kind"] == "failed" for x in written) == len(plan.variants("fedjax", 2))


def test_runner_line_survives_a_talkative_framework(capsys):
    args, workload = measure.arguments("x", ["--workload", "mlp-100", "--rounds", "2"])
    clock = measure.Clock()
    clock.start()
    for _ in range(3):
        clock.tick()
    facts = {"loss_of_start": 2.0, "parameters": workload.parameters, "packages": ("numpy",)}
    measure.report(args, workload, clock, loss_at_end=1.0, **facts)
    line = measure.parse("hello\n" + capsys.readouterr().out + "goodbye\n")
    assert len(line["seconds"]) == 2 and len(line["warmup_seconds"]) == 1 and line["peak_rss_mb"] > 1
    assert line["versions"]["numpy"] == np.__version__
    with pytest.raises(RuntimeError, match="nothing was learnt"):
        measure.report(args, workload, clock, loss_at_end=float("nan"), **facts)
    with pytest.raises(RuntimeError, match="4811 parameters"):
        measure.report(args, workload, clock, loss_at_end=1.0, **facts | {"parameters": 4811})
    with pytest.raises(ValueError, match="no result"):
        measure.parse("hello")


def test_memory_of_a_process_tree_is_at_least_its_roots():
    assert measure.peak_rss_mb(os.getpid()) >= 0.9 * measure.peak_rss_mb() > 1


def test_environments_are_pinned_and_fingerprinted(tmp_path, monkeypatch):
    for steps in envs.ENVIRONMENTS.values():
        assert all("==" in requirement for step in steps for requirement in step)
        if any(r.startswith("torch") for step in steps for r in step):
            assert steps[0][0].startswith("torch==")
    assert set(envs.ENVIRONMENTS) == set(plan.PEERS) - {plan.OURS}
    assert not envs.is_ready("torch", tmp_path)
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "fingerprint").write_text(envs.fingerprint("torch"))
    assert envs.ensure("torch", tmp_path) == tmp_path / "torch" / "bin" / "python"
    monkeypatch.setitem(envs.ENVIRONMENTS, "torch", (("torch==0",),))
    assert not envs.is_ready("torch", tmp_path)


def test_peak_counts_two_operations_a_product():
    median, best = peak.gflops(peak.product("numpy", 64), 64, repetitions=3)
    assert 0 < median <= best
