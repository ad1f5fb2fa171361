"""The command line, `fedjax-sim`."""

from fedjax_sim.cli.commands import main

__all__ = ["main"]
