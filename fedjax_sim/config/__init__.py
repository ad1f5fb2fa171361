"""What a run is told: its settings, their YAML, and sweeps of them."""

from fedjax_sim.config.run import GIVEN, NAMED_BY, VERSION, RunConfig, check_given, nested
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
from fedjax_sim.config.yaml import as_config, dump, flat, from_dict, read_config, read_yaml, to_dict

__all__ = [
    "GIVEN",
    "NAMED_BY",
    "VERSION",
    "CohortConfig",
    "DataConfig",
    "EvaluationConfig",
    "ExecutionConfig",
    "InertiaConfig",
    "InitialConfig",
    "LocalConfig",
    "ModelConfig",
    "OutputConfig",
    "PeelConfig",
    "RunConfig",
    "as_config",
    "check_given",
    "dump",
    "flat",
    "from_dict",
    "nested",
    "read_config",
    "read_yaml",
    "to_dict",
]
