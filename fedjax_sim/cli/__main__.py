"""`python -m fedjax_sim.cli`."""

from fedjax_sim.cli.commands import main

main()
