"""Runs in experiment trackers: Weights & Biases, MLflow and Aim, each in a file, imported where it is used.

`session` says what all of them can do; `fedjax_sim.config.trackers` has the settings and calls them.
"""
