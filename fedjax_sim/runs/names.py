"""The names of metrics that a run records itself, which nothing of one's own may take."""

import re

from fedjax_sim.core.task import Task

_OF_CLIENTS = ("_mean", "_p10", "_p90")


def recorded_by_run(metric: str, task: Task, *, of_client: bool = False) -> bool:
    """Whether a run records numbers under this name, or would under other settings of `evaluation`.

    Args:
      metric: the name.
      task: of the run.
      of_client: whether it is a number of one client, and not one number a round.
    """
    client = f"client_{task.headline.name}"
    each = {"left_out", client, "finetuned"}
    if of_client:
        return metric in each
    once = {"padding_waste", "lr", "train_loss", "loss", *(one.name for one in task.metrics)}
    once |= {name + part for name in (client, "finetuned") for part in _OF_CLIENTS}
    numbered = f"{re.escape(task.headline.name)}_class_[0-9]+|finetuned_mean_[0-9]+"
    return metric in each | once or re.fullmatch(numbered, metric) is not None
