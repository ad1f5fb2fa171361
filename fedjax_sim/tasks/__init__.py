"""Tasks: what a sample is, its loss and its metrics. One file each."""

from fedjax_sim.tasks.classification import classification, classification_of_tables
from fedjax_sim.tasks.regression import regression

__all__ = ["classification", "classification_of_tables", "regression"]
