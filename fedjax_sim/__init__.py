"""fedjax_sim: federated learning as one compiled JAX program over stacked clients.

    import fedjax_sim as fs

    run = fs.run(fs.RunConfig(rounds=50, algorithm=fs.FedMR()))
    run.plot()

Importing it gives JAX one CPU device a core (see `fedjax_sim.engine.placement.use_all_cores`), so import it
before JAX starts.
"""

from fedjax_sim.core import versions

versions.check_versions()

from fedjax_sim.engine import placement  # noqa: E402

placement.use_all_cores()

from fedjax_sim import algorithms, data, models  # noqa: E402
from fedjax_sim.algorithms.table import *  # noqa: E402, F403
from fedjax_sim.algorithms.table import __all__ as _methods  # noqa: E402
from fedjax_sim.config import (  # noqa: E402
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
    RunConfig,
)
from fedjax_sim.config.callbacks import EarlyStopping, KeepBest  # noqa: E402
from fedjax_sim.config.spaces import choice, integers, log_uniform, uniform  # noqa: E402
from fedjax_sim.config.trackers import Aim, MLflow, Wandb  # noqa: E402
from fedjax_sim.core import stacked  # noqa: E402
from fedjax_sim.core.algorithm import Algorithm, Context, LocalRule, Starts, Step  # noqa: E402
from fedjax_sim.core.errors import UserError  # noqa: E402
from fedjax_sim.data import Dataset, Partition, PartitionConfig, TableDataset  # noqa: E402
from fedjax_sim.engine.clients import batch_order  # noqa: E402
from fedjax_sim.engine.observing import Measurement  # noqa: E402
from fedjax_sim.engine.setup import DiagnosticContext  # noqa: E402
from fedjax_sim.models import Model, PeelPoint, from_flax  # noqa: E402
from fedjax_sim.probes import landscape  # noqa: E402
from fedjax_sim.records import Row  # noqa: E402
from fedjax_sim.reports import inertia, peel  # noqa: E402
from fedjax_sim.runs import Run, Simulation, load, resume, run, run_many  # noqa: E402
from fedjax_sim.runs.plan import plan  # noqa: E402
from fedjax_sim.studies import sweep  # noqa: E402
from fedjax_sim.studies.report import report  # noqa: E402
from fedjax_sim.studies.search import tune  # noqa: E402
from fedjax_sim.studies.tables import compare  # noqa: E402

__version__ = "0.1.0"

__all__ = [  # pyright: ignore[reportUnsupportedDunderAll]
    "Aim",
    "Algorithm",
    "CohortConfig",
    "Context",
    "DataConfig",
    "Dataset",
    "DiagnosticContext",
    "EarlyStopping",
    "EvaluationConfig",
    "ExecutionConfig",
    "InertiaConfig",
    "InitialConfig",
    "KeepBest",
    "LocalConfig",
    "LocalRule",
    "MLflow",
    "Measurement",
    "Model",
    "ModelConfig",
    "OutputConfig",
    "Partition",
    "PartitionConfig",
    "PeelConfig",
    "PeelPoint",
    "Row",
    "Run",
    "RunConfig",
    "Simulation",
    "Starts",
    "Step",
    "TableDataset",
    "UserError",
    "Wandb",
    "algorithms",
    "batch_order",
    "choice",
    "compare",
    "data",
    "from_flax",
    "inertia",
    "integers",
    "landscape",
    "load",
    "log_uniform",
    "models",
    "peel",
    "plan",
    "report",
    "resume",
    "run",
    "run_many",
    "stacked",
    "sweep",
    "tune",
    "uniform",
    *_methods,
]
