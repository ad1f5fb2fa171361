"""All of a run's phases in memory: its start, its rounds, and fine-tuning after the last one."""

from collections.abc import Callable
from typing import Any

from fedjax_sim.config import RunConfig
from fedjax_sim.engine import simulation
from fedjax_sim.engine.setup import Setup
from fedjax_sim.records import Row
from fedjax_sim.runs import finetune
from fedjax_sim.runs.assemble import prepare
from fedjax_sim.runs.start import with_start


class Simulation(simulation.Simulation):
    """A federated run: `for rows in simulation.advance(): …`.

    See `fedjax_sim.engine.simulation.Simulation`, which knows the rounds alone, for attributes and methods.
    """

    def __init__(self, config: RunConfig | Setup, **replacements: Any):
        """Takes a RunConfig and the keywords of `prepare`, or a Setup and the engine's keywords.

        Of a RunConfig, the state that the first round starts from is made at once.

        Raises:
          UserError: a setting that cannot work, before anything is compiled.
        """
        if isinstance(config, Setup):
            super().__init__(config, **replacements)
        else:
            super().__init__(with_start(prepare(config, **replacements)))
            _ = self.state

    def evaluate(self, *, last: bool = False) -> Callable[[], list[Row]]:
        """Starts an evaluation of the model as it now is; call the result for its rows.

        After the last round, clients are fine-tuned if the configuration says so.

        Args:
          last: whether the run ends here, before the last of its rounds.
        """
        evaluated, config = super().evaluate(last=last), self.setup.config
        if not config.evaluation.finetune or not (last or self.round == config.rounds):
            return evaluated
        number = self.round  # the last: no later one overwrites its state

        def rows() -> list[Row]:
            tuned = finetune.rows(self.setup, self.store, self.function, self.state_for, number)
            self.ending.update(row.metric for row in tuned)
            return evaluated() + tuned

        return rows
