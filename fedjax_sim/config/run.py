"""What a run is: frozen dataclasses, each checked when it is made, read from and written to YAML.

Two kinds of settings never share a dataclass: those that may change results, and those that may change
only speed (`ExecutionConfig`). A test sweeps the second kind and demands equal results.
"""

import dataclasses
import typing
from typing import Any

from fedjax_sim import algorithms
from fedjax_sim.config import plugins
from fedjax_sim.config.sections import (
    CohortConfig,
    DataConfig,
    EvaluationConfig,
    ExecutionConfig,
    InertiaConfig,
    InitialConfig,
    LocalConfig,
    ModelConfig,
    OutputConfig,
    PeelConfig,
)
from fedjax_sim.core.algorithm import AlgorithmConfig
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.fields import Named, at_least, check, within
from fedjax_sim.data import PartitionConfig

VERSION = 2
"""Of the configuration's layout. Raised when a field changes its meaning; older ones are read."""

GIVEN = ("dataset", "partition", "model", "algorithm", *plugins.LISTS)
"""What `run` takes from Python."""

NAMED_BY = {"data": "source", "partition": "kind", "model": "name"}
"""Sections for which a bare name may stand, and the field that it is; an algorithm's name is `name`."""


@dataclasses.dataclass(frozen=True)
class RunConfig(Named):
    """One run, complete: the same RunConfig on the same versions gives the same numbers.

    Attributes:
      version: of this layout, see `VERSION`.
      seed: everything random in the run comes from it.
      rounds: of federation.
      data: which images.
      partition: which client holds which of them.
      model: which network.
      algorithm: one that `fedjax-sim list` names, or one's own; in YAML a mapping with `name`, which is
        `module:Class` for one's own.
      initial: what the first round starts from.
      local: what a client does.
      cohort: how many take part.
      evaluation: what is measured of the deployed model.
      peel: what is measured of every layer, before against after the merge.
      inertia: what is measured of layers' movement from round to round, and of the merge's gain.
      observers: diagnostics of one's own that look into measured rounds; in YAML a list of mappings with
        `name: module:Class` and its settings. See `fedjax_sim.engine.setup.ObserverConfig`.
      meters: diagnostics of one's own that look at every round, likewise; see
        `fedjax_sim.engine.setup.MeterConfig`.
      callbacks: what acts between rounds, likewise; `early_stopping` and `keep_best` have names. See
        `fedjax_sim.config.callbacks`.
      execution: layout; speed only.
      output: what is written.
      given: what the run had from Python and no file can hold, with a word for each: `dataset`, `partition`,
        `model`, `algorithm`, `observers`, `meters`, `callbacks`. `run` sets it; whoever
        runs this configuration again must give the same.
    """

    version: int = VERSION
    seed: int = 0
    rounds: int = 100
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    partition: PartitionConfig = dataclasses.field(default_factory=PartitionConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    algorithm: AlgorithmConfig = dataclasses.field(default_factory=lambda: algorithms.CONFIGS["fedavg"]())
    initial: InitialConfig = InitialConfig()
    local: LocalConfig = dataclasses.field(default_factory=LocalConfig)
    cohort: CohortConfig = CohortConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    peel: PeelConfig = PeelConfig()
    inertia: InertiaConfig = InertiaConfig()
    observers: tuple[Any, ...] = ()
    meters: tuple[Any, ...] = ()
    callbacks: tuple[Any, ...] = ()
    execution: ExecutionConfig = ExecutionConfig()
    output: OutputConfig = OutputConfig()
    given: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if not isinstance(self.algorithm, AlgorithmConfig):
            known = algorithms.CONFIGS.get(self.algorithm) if isinstance(self.algorithm, str) else None
            wanted = "FedAvg()" if known is None else f"{known.__name__}()"
            raise UserError(
                "algorithm",
                self.algorithm,
                "is not the configuration of an algorithm",
                f"Give one with a `build(context)` method, such as fs.{wanted}; names are for YAML.",
            )
        check(self)
        for kind in plugins.LISTS:
            plugins.check_entries(kind, getattr(self, kind))
        _check_version(self.version)
        at_least("rounds", self.rounds, 1)
        within("seed", self.seed, 0, 2**31 - 1)
        for name, told in self.given.items():
            if name not in GIVEN:
                raise UserError(
                    f"given.{name}", told, "no such thing is given", f"There are {', '.join(GIVEN)}."
                )

    @classmethod
    def _meant(cls, name: str, names: list[str]) -> str:
        for section, kind in sections_of(cls).items():
            if kind is not AlgorithmConfig and name in {field.name for field in dataclasses.fields(kind)}:
                written = f"{section}=fs.{kind.__name__}({name}=…)"
                return f"Did you mean {section}.{name}? Write {written}."
        return super()._meant(name, names)


def sections_of(cls: type) -> dict[str, Any]:
    """Field -> class, of the fields that have settings of their own: of a `RunConfig`, or a form of one."""
    hints: dict[str, Any] = typing.get_type_hints(cls)
    return {
        name: kind
        for name, kind in hints.items()
        if dataclasses.is_dataclass(kind) or kind is AlgorithmConfig
    }


_TRAINS = ("seed", "data", "partition", "model", "execution")


def nested(
    config: RunConfig,
    *,
    rounds: int,
    algorithm: AlgorithmConfig,
    local: LocalConfig,
    cohort: CohortConfig,
    execution: ExecutionConfig | None = None,
) -> RunConfig:
    """A run inside of `config`'s run, which only trains: it measures nothing, writes nothing, starts afresh.

    It takes over how `config` trains by name; whatever else a configuration has, or will have, is as in a
    fresh one. Diagnostics of rounds would cost their time, and nobody would see them.

    Args:
      config: of the run around it.
      rounds: how many to train.
      algorithm: its settings.
      local: what a client does in a round.
      cohort: who takes part.
      execution: None: that of `config`.
    """
    kept = {name: getattr(config, name) for name in _TRAINS}
    if execution is not None:
        kept["execution"] = execution
    evaluation = EvaluationConfig(every=0, batch_size=config.evaluation.batch_size)
    return RunConfig(
        rounds=rounds, algorithm=algorithm, local=local, cohort=cohort, evaluation=evaluation, **kept
    )


def check_given(config: RunConfig, **given: Any) -> None:
    """Raises UserError if the run that the configuration is of had from Python what is not among `given`."""
    for name, told in config.given.items():
        if name in plugins.LISTS:
            own = not plugins.namable(getattr(config, name))
        else:
            own = name == "algorithm" and not algorithms.namable(config.algorithm)
        if given.get(name) is None and not own:
            raise UserError(
                f"given.{name}",
                told,
                f"the {name} was given from Python, and no file can hold it",
                f"Give it again: run(config, {name}=…). Or take it out of `given`, for what the rest says.",
            )


def _check_version(version: Any) -> None:
    if version != VERSION:
        raise UserError(
            "version",
            version,
            f"this fedjax_sim reads version {VERSION}",
            "Rewrite the file for this version (a fresh one: fedjax-sim run --print-config), "
            "or use the fedjax_sim that wrote it.",
        )
