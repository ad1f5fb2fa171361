"""From a configuration to what a run is made of: `prepare`."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fedjax_sim import algorithms, data, models
from fedjax_sim.config import RunConfig, as_config, check_given
from fedjax_sim.core.algorithm import Algorithm, AlgorithmConfig, Context, Prolonged
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.model import Model
from fedjax_sim.data import Partition, Samples, as_dataset, as_partition
from fedjax_sim.data.partition_files import check_partition
from fedjax_sim.engine import debugging, hosts, placement, waves
from fedjax_sim.engine.clients import make_optimizer
from fedjax_sim.engine.setup import Setup
from fedjax_sim.runs import calibration, contract, diagnostics


def prepare(
    config: RunConfig,
    *,
    dataset: Samples | None = None,
    partition: Partition | None = None,
    model: Model | None = None,
    algorithm: AlgorithmConfig | None = None,
    observers: Sequence[Any] | None = None,
    meters: Sequence[Any] | None = None,
    callbacks: Sequence[Any] | None = None,
    began: int | None = None,
    mesh: Mesh | None = None,
    calibrated: bool = False,
) -> Setup:
    """Resolves a RunConfig; the keywords take the place of what it would load or build.

    Args:
      config: what to run.
      dataset: in the place of what `config` names, as the next six.
      partition: likewise.
      model: likewise.
      algorithm: likewise.
      observers: likewise.
      meters: likewise.
      callbacks: likewise; whoever drives the run calls them.
      began: rounds that the run was to have when its first ones were done, if it has others now.
      mesh: devices to lay it out for, also of a machine that is not here; None: `execution.devices` of those
        that are present.
      calibrated: what `execution` leaves open goes by what was measured on this machine, and `Setup.config`
        says it from then on. For runs that begin: one that goes on has it in its configuration.

    Raises:
      UserError: anything that cannot work, before anything is compiled; with `began`, perhaps later, see
        `fedjax_sim.core.algorithm.Prolonged`.
    """
    hosts.check_backend()
    config, dataset, partition = as_config(config), as_dataset(dataset), as_partition(partition)
    lists = {"observers": observers, "meters": meters, "callbacks": callbacks}
    check_given(config, dataset=dataset, partition=partition, model=model, algorithm=algorithm, **lists)
    if algorithm is not None:
        config = replace(config, algorithm=algorithm)
    config = replace(config, **{name: entries for name, entries in lists.items() if entries is not None})
    dataset = dataset or config.data.load()
    execution = debugging.layout(config.execution)
    mesh = placement.make_mesh(execution.devices) if mesh is None else mesh
    dtype, products = placement.numerics(config.model, mesh)
    task, model = dataset.task, _model(config, dataset, model, dtype)
    if config.evaluation.per_class and task.label is None:
        why = f"the samples of {dataset.name} have no classes"
        raise UserError("evaluation.per_class", True, why, "Leave it out.")
    wanted = config.initial.put_aside
    partition = data.partition(dataset, config.partition, config.seed, wanted, partition)
    check_partition(partition, dataset)
    cohort_size = config.cohort.count(partition.num_clients)
    if config.evaluation.per_client and partition.test is None:
        raise UserError(
            "evaluation.per_client",
            True,
            "the partition gives clients no test samples of their own",
            "Set partition.local_test to holdout or matching.",
        )
    make_optimizer(config.local)
    model, measured = replace(model, products=products), None
    sizes = partition.sizes()
    by_sizes = placement.platform_of(mesh) == "cpu" and execution.wave is None and not model.convolves
    if by_sizes and len(np.unique(waves.steps_of(sizes, config.local))) > 1:
        sizes = _typical_sizes(dataset, config, partition)
    if calibrated and not execution.debug:
        execution, measured = calibration.applied(calibration.Case(model, task, config, sizes, mesh))
        config = replace(config, execution=execution)
    work = waves.Work.of(sizes, config.local, model.num_params())
    wave, conv = placement.speed_defaults(execution, model, cohort_size, mesh, work)
    model = replace(model, conv=conv)
    makes = Context if began is None else partial(Prolonged, began=began)
    context = makes(
        model=model,
        task=task,
        num_clients=partition.num_clients,
        cohort_size=cohort_size,
        rounds=config.rounds,
        local=config.local,
    )
    name = algorithms.label(config.algorithm)
    record = contract.build(config.algorithm, context, name)
    _check_together(config, record)
    setup = Setup(
        config=config,
        dataset=dataset,
        partition=partition,
        model=model,
        algorithm=record,
        algorithm_name=name,
        cohort_size=cohort_size,
        wave=wave,
        mesh=mesh,
        calibration=measured,
    )
    if execution.debug:
        setup = debugging.watched(setup)
    setup = replace(setup, **diagnostics.of(setup))
    _ = setup.draw, setup.placement  # which may find fault with a schedule, and with where samples lie
    if execution.debug:  # own functions are called with numbers only
        return setup
    diagnostics.check_diagnostics(setup)
    if not algorithms.builtin(config.algorithm):  # those are held to it by a test
        contract.check_contract(
            record,
            setup.trainer,
            name=name,
            num_clients=setup.num_clients,
            cohort_size=cohort_size,
            mesh=mesh,
        )
    return setup


def _typical_sizes(dataset: Samples, config: RunConfig, partition: Partition) -> np.ndarray:
    """i64[N], what clients hold if seed 0 draws who holds what: all seeds are laid out alike, as one program.

    Where the configuration does not say how `partition` was drawn, what its clients hold.
    """
    own, asked = partition.sizes(), config.partition
    said = asked.kind != "file" and asked.kind == partition.recipe.get("kind")
    if not said or asked.seed is not None or config.seed == 0:
        return own
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            drawn = data.partition(dataset, asked, 0, config.initial.put_aside).sizes()
    except UserError:  # seed 0 may have no luck
        return own
    return drawn if len(drawn) == len(own) else own


def _model(config: RunConfig, dataset: Samples, given: Any, dtype: str) -> Model:
    """The network for the samples of `dataset`: `given`, or the one that `config` names, in this `dtype`."""
    shape, outputs = dataset.task.abstract_inputs(1)[0].shape[1:], dataset.task.outputs
    if given is None:
        options = dict(config.model.options)
        if config.model.norm is not None:
            options["norm"] = config.model.norm
        if dtype != "float32":
            options["dtype"] = jnp.dtype(dtype)
        model = models.create(config.model.name, shape, outputs, **options)
    else:
        model = models.adapted(given, shape, outputs, name=models.name_of(given))
    if tuple(model.input_shape) != tuple(shape) or model.outputs < outputs:
        raise UserError(
            "model",
            model.name,
            f"it takes samples of shape {tuple(model.input_shape)} and has {model.outputs} outputs, and "
            f"{dataset.name} has samples of {tuple(shape)} and wants {outputs}",
            "Make the model for these samples.",
        )
    return model


def _check_together(config: RunConfig, record: Algorithm) -> None:
    """Raises UserError, or warns, for settings that do not go with the algorithm."""
    if record.local.send is not None and config.local.keep_optimizer:
        raise UserError(
            "local.keep_optimizer",
            True,
            "the algorithm's clients train more than the model that they are sent; of that no state is kept",
            "Leave it out, or take another algorithm.",
        )
    if record.cohort_chooser is not None and config.cohort.sampling != "uniform":
        raise UserError(
            "cohort.sampling",
            config.cohort.sampling,
            "the algorithm chooses its clients itself",
            "Leave cohort.sampling out, or take another algorithm.",
        )
    if config.cohort.sampling == "by_size" and record.weighs_by_samples:
        warnings.warn(
            "cohort.sampling = 'by_size' draws large clients more often, and the algorithm weighs those that "
            "it got by their samples: a client's size enters the mean model twice. Unless that is meant, set "
            "the algorithm's weights to uniform, or leave cohort.sampling at uniform.",
            stacklevel=3,
        )
