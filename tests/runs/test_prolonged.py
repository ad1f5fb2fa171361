"""Which runs may get another number of rounds: those of algorithms that never ask for it."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim import models
from fedjax_sim.algorithms import CONFIGS
from fedjax_sim.config import CohortConfig, LocalConfig, ModelConfig, RunConfig
from fedjax_sim.core.algorithm import CohortChooser, Context, Prolonged
from fedjax_sim.core.errors import UserError
from fedjax_sim.engine import cohorts
from fedjax_sim.runs import drive
from fedjax_sim.runs.assemble import prepare
from fedjax_sim.runs.federation import Simulation
from fedjax_sim.runs.folder import Folder
from tests import oracles

SMALL = RunConfig(
    rounds=7,
    model=ModelConfig(options={"hidden": [6, 6]}),
    local=LocalConfig(epochs=None, steps=1),
    cohort=CohortConfig(size=3),
)


def test_of_these_algorithms_lips_alone_goes_by_the_number_of_rounds():
    model = models.create("cnn8", (8, 8, 1), 10, norm="batch")
    context = Prolonged(
        model, oracles.task_of(model), num_clients=6, cohort_size=3, rounds=7, local=LocalConfig(), began=3
    )
    refused, options = set(), {"partial": {"first": 2}}
    for name, config in CONFIGS.items():
        try:
            config(**options.get(name, {})).build(context)
        except UserError as error:
            assert (error.field, error.value) == ("rounds", 7)
            refused.add(name)
    assert refused == {"lips"}
    CONFIGS["lips"](density=1.0).build(context)  # which is never sparse
    with pytest.raises(UserError, match=r"rounds = 7: the run began with 3, .*initial\.run"):
        CONFIGS["fedprox"](inner=CONFIGS["lips"]()).build(context)


@dataclasses.dataclass(frozen=True)
class Planned:
    """FedAvg that asks for the number of rounds somewhere, as one's own algorithm may."""

    where: str

    def build(self, context: Context):
        record = CONFIGS["fedavg"]().build(context)

        def late(function):
            def asking(*args):
                return jnp.float32(context.rounds), function(*args)

            return lambda *args: asking(*args)[1]

        def choose(measured, counts, size, drawn):
            return np.arange(size, dtype=np.int32) * (context.rounds > 0)

        if self.where == "choose":
            return dataclasses.replace(record, cohort_chooser=CohortChooser(lambda state: (), choose))
        if self.where in ("start_round", "gradient", "finish_round"):
            rule = record.local
            rule = dataclasses.replace(rule, **{self.where: late(getattr(rule, self.where))})
            return dataclasses.replace(record, local=rule)
        return dataclasses.replace(record, **{self.where: late(getattr(record, self.where))})


@pytest.mark.parametrize(
    "where", ["init", "dispatch", "start_round", "gradient", "finish_round", "merge", "deploy", "choose"]
)
def test_wherever_an_algorithm_asks_it_is_refused_before_a_round_is_run(where):
    with pytest.raises(UserError, match=r"^rounds = 7"):
        Simulation(prepare(SMALL, algorithm=Planned(where), began=3)).trace()


def test_cohorts_that_go_by_the_number_of_rounds_are_refused(tmp_path, monkeypatch):
    config = dataclasses.replace(SMALL, output=dataclasses.replace(SMALL.output, dir=str(tmp_path)))
    sampler = cohorts.sampler
    monkeypatch.setattr(cohorts, "sampler", lambda c, n, rounds, seed: sampler(c, n, rounds, seed + rounds))
    simulation = Simulation(prepare(config, began=3))
    simulation.round = 2
    with pytest.raises(UserError, match=r"rounds = 7: .*other cohorts"):
        drive._prolong(Folder(tmp_path), simulation, 3)
    assert list(tmp_path.iterdir()) == []
