"""One self-contained HTML page of a run or of several: what was run, and what came of it.

`fedjax_sim.studies.report` finds the runs and their comparison, and calls `render.write` here.
"""
