"""What `run` takes in the place of a RunConfig, data, partition and model, and what it says of the rest."""

import dataclasses

import numpy as np
import pytest
from flax import linen as nn

import fedjax_sim as fs
from fedjax_sim import config as config_lib
from fedjax_sim.core.algorithm import CohortChooser
from fedjax_sim.core.errors import UserError

CONFIG = fs.RunConfig(
    rounds=1,
    model=fs.ModelConfig("mlp", options={"hidden": [4]}),
    partition=fs.PartitionConfig(kind="iid", clients=4),
    local=fs.LocalConfig(steps=1, epochs=None),
    cohort=fs.CohortConfig(size=2),
    execution=fs.ExecutionConfig(devices=1),
    output=fs.OutputConfig(progress=False),
)
CLIENTS = [np.arange(k, 200, 4) for k in range(4)]


class Net(nn.Module):
    """A module that nobody has adapted."""

    @nn.compact
    def __call__(self, x):
        """Logits."""
        return nn.Dense(10)(x.reshape(len(x), -1))


@pytest.mark.filterwarnings("ignore:.*held by nobody:UserWarning", "ignore:.*belong to no client:UserWarning")
def test_a_file_a_list_of_clients_and_a_bare_module_run(tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text(config_lib.dump(CONFIG))
    run = fs.run(str(file), partition=CLIENTS, model=Net())
    assert run.rounds == 1 and run.recipe["clients"] == 4 and run.config.given["model"] == "Net"
    for mine, theirs in zip(run.partition.train, CLIENTS, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert set(run.variables["params"]) == {"Dense_0"}


def test_clients_by_number_are_a_partition():
    made = fs.data.as_partition(dict(enumerate(CLIENTS)))
    assert made.num_clients == 4 and fs.data.as_partition(made) is made


IMAGES = np.zeros((4, 8, 8, 1), np.uint8)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"config": {"rounds": 1}}, r"config = 'dict': .*fs\.RunConfig.*from_dict"),
        ({"config": "nothing.yaml"}, r"config = 'nothing.yaml': no such file"),
        ({"dataset": (IMAGES, IMAGES)}, r"dataset = 'tuple': .*fs\.Dataset\(name, train_images"),
        ({"partition": np.arange(4)}, r"partition = 'ndarray': .*list of arrays"),
        ({"partition": {1: [0], 2: [1]}}, r"partition = \[1, 2\]: .*Number the clients from 0"),
        ({"partition": []}, r"partition\.train = \(\): no clients"),
        ({"algorithm": "fedmr"}, r"algorithm = 'fedmr': .*such as fs\.FedMR\(\)"),
    ],
)
def test_what_is_none_of_these_is_said_with_what_to_write(given, told):
    for start in (fs.run, fs.Simulation):
        with pytest.raises(UserError, match=told):
            start(**{"config": CONFIG, **given})


class Counting(nn.Module):
    """Counts its calls, in evaluation too."""

    @nn.compact
    def __call__(self, x):
        """Logits."""
        calls = self.variable("counters", "calls", lambda: np.int32(0))
        if not self.is_initializing():
            calls.value = calls.value + 1
        return nn.Dense(10)(x.reshape(len(x), -1))


class Bare(nn.Module):
    """Nothing to train."""

    @nn.compact
    def __call__(self, x):
        """Logits."""
        return x.reshape(len(x), -1)[:, :10]


@pytest.mark.parametrize(
    ("module", "told"),
    [
        (Counting(), "it changes a variable in evaluation too.*calls.*keyword `train`"),
        (Bare(), "the module has no parameters to train"),
    ],
)
def test_a_module_that_cannot_be_trained_or_evaluated_is_refused(module, told):
    with pytest.raises(UserError, match=told):
        fs.from_flax(module, (8, 8, 1), 10, name="net")


@pytest.mark.parametrize("chosen", [[0, 99], [0], [0.0, 1.0], [-1, 0], 3])
def test_an_algorithm_that_chooses_no_clients_is_named(chosen):
    @dataclasses.dataclass(frozen=True)
    class Choosing:
        def build(self, context):
            selection = CohortChooser(
                lambda state: (), lambda measured, counts, wanted, generator: np.asarray(chosen)
            )
            return dataclasses.replace(fs.FedAvg().build(context), cohort_chooser=selection)

    with pytest.raises(
        UserError, match=r"algorithm\.cohort_chooser\.choose = .*did not choose 2 of clients 0 to 3"
    ):
        fs.Simulation(CONFIG, algorithm=Choosing()).inputs(0)
