"""Where compiled programs are kept between processes: a folder for all runs on this kind of machine.

On CPUs; on accelerators JAX's own cache does it, for whoever sets `JAX_COMPILATION_CACHE_DIR`. Where that is
set, nothing is kept here.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax

from fedjax_sim.core import paths
from fedjax_sim.engine import hosts, programs
from fedjax_sim.runs import provenance


def folder() -> Path | None:
    """In the user's cache folder, or at `FEDJAX_SIM_PROGRAMS`; None: nowhere, as it says if it is empty."""
    return paths.kept("FEDJAX_SIM_PROGRAMS", "programs")


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Programs that are compiled meanwhile are kept, and those that were kept are not compiled again."""
    place = folder()
    own = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue] dynamic attribute
    if place is None or own:
        yield
        return
    hosts.check_backend()
    if jax.process_count() > 1:
        yield
        return
    with programs.kept_in(place / provenance.machine()):
        yield
