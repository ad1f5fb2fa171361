"""No size falls back to everything everywhere: rounds compiled for TPU slices, each in its own process."""

import importlib.util
import json
import subprocess
import sys
import textwrap

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (pip install -e '.[tpu]')"
)

LENET = (("lenet", (32, 32, 3)), 50)
MLP = (("mlp", (8, 8, 1)), 10)


def compiled(on, network, algorithm, cohort, clients, execution=None):
    """The plan of a round of one step a client, as `MachinePlan.to_dict` has it."""
    (model, shape), batch = network
    code = f"""
        import numpy as np
        import fedjax_sim as fs
        from fedjax_sim.config import from_dict
        from fedjax_sim.runs.aot.machines import start_for

        start_for({on!r})
        count = {clients * batch}
        images, labels = np.zeros((count, *{shape}), np.uint8), np.arange(count) % 10
        dataset = fs.Dataset("black", images, labels, images[:100], labels[:100], 10)
        config = from_dict({{
            "rounds": 9,
            "algorithm": {algorithm!r},
            "model": {{"name": {model!r}}},
            "partition": {{"kind": "iid", "clients": {clients}}},
            "local": {{"epochs": 1, "batch_size": {batch}}},
            "cohort": {{"size": {cohort}}},
            "evaluation": {{"every": 0}},
            "execution": {execution or {}!r},
        }})
        print("found", fs.plan(config, on={on!r}, dataset=dataset).to_json().replace(chr(10), " "))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=900
    )
    line = next((line for line in done.stdout.splitlines() if line.startswith("found ")), None)
    assert line is not None, done.stderr[-3000:]
    return json.loads(line.removeprefix("found "))


def parts(found, *starts):
    return sum(part["bytes"] for part in found["memory"]["parts"] if part["name"].startswith(starts))


def assert_shared(found, most=1.5):
    """A chip has its share, and no exchange brings more than twice of it to a chip, but for the model."""
    assert found["memory"]["total"] <= most * found["memory"]["needed"]
    # The model travels once with whatever is added up over chips.
    model = parts(found, "server: mean", "server: model", "server: params") or 2**20
    share = parts(found, "server:", "clients' own state") + found["wave"] * model
    largest = max((one["bytes"] for one in found["collectives"]), default=0)
    assert largest <= 2 * max(share, model), found["collectives"][0]


def test_a_small_round_for_four_chips():
    """By default, where libtpu is there. Neither K nor N is a multiple of the chips."""
    found = compiled("v5e-4", MLP, {"name": "fedmr"}, 10, 21)
    assert found["chips"] == 4 and found["fits"] and found["cycles"] > 0
    assert_shared(found, most=8)  # of so little, tiles and one step of ten images take most


@pytest.mark.aot
@pytest.mark.parametrize("granularity", ["tensor", "module", "block"])
def test_recombination_of_slots(granularity):
    found = compiled("v5e-16", LENET, {"name": "fedmr", "granularity": granularity}, 160, 1_000)
    assert_shared(found)
    moved = [one for one in found["collectives"] if one["op"] == "all-to-all"]
    assert sum(one["times"] for one in moved) == 2  # there and back, all tensors together
    assert all("fedmr.py" in one["where"] for one in moved)


@pytest.mark.aot
@pytest.mark.parametrize(
    "algorithm",
    [
        {"name": "fedavg"},
        {"name": "fedopt"},
        {"name": "scaffold"},
        {"name": "feddyn"},
        {"name": "ditto"},
        {"name": "moon"},
        {"name": "lips", "inner": {"name": "fedmr"}},
        {"name": "clusamp"},
    ],
    ids=lambda algorithm: algorithm["name"],
)
def test_what_clients_and_the_server_keep(algorithm):
    """N = 1,000 is no multiple of 16. Rows are written where they lie, into no copy of the stack."""
    assert_shared(compiled("v5e-16", LENET, algorithm, 160, 1_000), most=1.3)


@pytest.mark.aot
@pytest.mark.parametrize("chips", [64, 256])
def test_more_chips(chips):
    """On 256 chips of K = 2,560 each has ten slots, and not the 2,352 MiB of all of them."""
    cohort, clients = (160, 1_000) if chips == 64 else (2_560, 10_007)
    assert_shared(compiled(f"v5e-{chips}", LENET, {"name": "fedmr"}, cohort, clients))


@pytest.mark.aot
@pytest.mark.parametrize("data", ["cut", "streamed"])
def test_samples_that_are_not_whole_on_every_chip(data):
    found = compiled("v5e-16", LENET, {"name": "fedavg"}, 160, 1_000, {"data": data})
    whole = 1_000 * 50 * 32 * 32 * 3
    assert found["memory"]["total"] < whole
    assert_shared(found, most=2.5)
