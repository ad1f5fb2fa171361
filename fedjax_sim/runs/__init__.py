"""Runs on disk and in memory: started, driven, resumed, opened and planned."""

from fedjax_sim.runs.api import resume, run, run_prepared, validate
from fedjax_sim.runs.describe import differing, portable
from fedjax_sim.runs.federation import Simulation
from fedjax_sim.runs.loading import load_run as load
from fedjax_sim.runs.loading import restored
from fedjax_sim.runs.result import Interrupted, Run, Terminated, title_of
from fedjax_sim.runs.together import run_many

__all__ = [
    "Interrupted",
    "Run",
    "Simulation",
    "Terminated",
    "differing",
    "load",
    "portable",
    "restored",
    "resume",
    "run",
    "run_many",
    "run_prepared",
    "title_of",
    "validate",
]
