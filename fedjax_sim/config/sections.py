"""The sections of a run's configuration, each a frozen dataclass that checks itself."""

import dataclasses
import math
from typing import Any, Literal

from fedjax_sim import data
from fedjax_sim.core import paths
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.fields import Named, at_least, check, positive, within
from fedjax_sim.data import Samples, sources


def _check_paths(config: Any, section: str, *names: str) -> None:
    """Raises UserError if one of the fields is set to an address."""
    for name in names:
        if getattr(config, name) is not None:
            paths.local(getattr(config, name), section + name)


# --- the parts of a run ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class DataConfig(Named):
    """Which images.

    Attributes:
      source: `digits`, `digits-domains`, a preset (`fedjax-sim list`), `tfds:NAME`, `npz:PATH`,
        `folder:PATH`, `idx:PATH`, `table:PATH`, or `module:function` of one's own, which returns a set.
      data_dir: where presets look for their files; default $FEDJAX_SIM_DATA, then ~/fedjax_sim_data.
      options: arguments of one's own function (`{side: 28}`).
    """

    source: str = "digits"
    data_dir: str | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        check(self, "data.")
        sources.check_path(self.source)
        _check_paths(self, "data.", "data_dir")

    def load(self) -> Samples:
        """The images. Raises UserError as `fedjax_sim.data.load` does."""
        return data.load(self.source, data_dir=self.data_dir, options=self.options)


@dataclasses.dataclass(frozen=True)
class ModelConfig(Named):
    """Which model.

    Attributes:
      name: of the zoo (`fedjax-sim list`), or of one's own: `module:Class` of a Flax linen module, or
        `module:function`, which is given the images' shape (H, W, C) and the number of classes.
      norm: batch, group or none, where the model has a choice; None leaves the model's own.
      dtype: of the arithmetic; parameters, means and logits stay float32. `auto`: bfloat16 on accelerators,
        float32 on CPUs.
      options: further fields of the model (`{hidden: [64, 64]}`), or arguments of one's own function.
      products: how finely accelerators multiply float32 factors. `float32`: fully, in several passes on TPUs;
        `tf32`: to 11 bits, on GPUs that can (three passes on TPUs); `bfloat16`: to 8, on TPUs alone. `auto`:
        float32 on GPUs, and on TPUs, whose products are of bfloat16 factors, bfloat16; but as JAX's own
        `jax_default_matmul_precision` where that is set. CPUs do it fully.
    """

    name: str = "mlp"
    norm: Literal["batch", "group", "none"] | None = None
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    options: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    products: Literal["auto", "float32", "tf32", "bfloat16"] = "auto"

    def __post_init__(self):
        check(self, "model.")
        for option, value in self.options.items():
            field = f"model.options.{option}"
            if not isinstance(option, str):
                raise UserError(field, value, "an option's name is text", "Name a field of the model.")
            if option in ("input_shape", "num_classes"):
                raise UserError(field, value, "the data set says it", "Leave it out.")
            if option == "name":
                raise UserError(field, value, "model.name is the model's name", "Set model.name.")
            if (option == "norm" and self.norm is not None) or (
                option == "dtype" and self.dtype != "float32"
            ):
                raise UserError(field, value, f"model.{option} is set too", "Keep one of them.")


@dataclasses.dataclass(frozen=True)
class LocalConfig(Named):
    """What a client does in a round.

    Attributes:
      epochs: passes over the client's samples (reshuffled each); exclusive with `steps`.
      steps: optimiser steps, whatever the client's size; exclusive with `epochs`.
      batch_size: samples in a step; a last partial batch is used and counts as what it holds.
      optimizer: `sgd`, or any optax optimiser by name (`adam`, `adamw`, `lion` …) that steps by gradient and
        weights alone; not `polyak_sgd` or a line search (`lbfgs`), which look at the loss's value.
      lr: learning rate in round 0.
      momentum: of `sgd`.
      nesterov: of `sgd`.
      weight_decay: of `sgd`, added to the gradient before momentum (PyTorch's L2 form).
      options: further arguments of the optax optimiser (`{b1: 0.9}`).
      clip_norm: bound on the gradient's global norm; None does not clip.
      schedule: of the learning rate over rounds.
      decay: `exponential`: factor a round; `cosine`: final fraction of `lr` at the last round; `inverse`: d
        in lr / (1 + d r) of round r, from 0.
      keep_optimizer: keep each client's optimiser state between its rounds instead of a fresh one.
      non_finite: a client whose update is not finite stops the run, or is left out of the merge.
    """

    epochs: int | None = 5
    steps: int | None = None
    batch_size: int = 50
    optimizer: str = "sgd"
    lr: float = 0.01
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    options: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    clip_norm: float | None = None
    schedule: Literal["constant", "exponential", "cosine", "inverse"] = "constant"
    decay: float = 1.0
    keep_optimizer: bool = False
    non_finite: Literal["stop", "skip"] = "stop"

    def __post_init__(self):
        check(self, "local.")
        if (self.epochs is None) == (self.steps is None):
            why = f"exactly one of epochs and steps says how long a client trains, and steps = {self.steps!r}"
            fix = "Set one of them."
            if self.epochs is not None:
                fix = "Set local.epochs to null (None in Python), or leave out local.steps."
            raise UserError("local.epochs", self.epochs, why, fix)
        for name in ("epochs", "steps"):
            if getattr(self, name) is not None:
                at_least(f"local.{name}", getattr(self, name), 1)
        at_least("local.batch_size", self.batch_size, 1)
        positive("local.lr", self.lr)
        within("local.momentum", self.momentum, 0.0, 1.0, open_right=True)
        at_least("local.weight_decay", self.weight_decay, 0.0)
        if self.clip_norm is not None:
            positive("local.clip_norm", self.clip_norm, divides=True)
        within("local.decay", self.decay, 0.0, 1.0)
        if self.schedule == "constant" and self.decay != 1:
            raise UserError(
                "local.decay",
                self.decay,
                "local.schedule is constant, and nothing decays",
                "Set local.schedule to exponential, cosine or inverse.",
            )
        if self.optimizer == "sgd" and self.options:
            raise UserError(
                "local.options",
                self.options,
                "sgd takes its arguments from momentum, nesterov and weight_decay",
                "Set those, or name another optimiser.",
            )
        if self.optimizer != "sgd" and (self.momentum or self.nesterov or self.weight_decay):
            raise UserError(
                "local.optimizer",
                self.optimizer,
                "momentum, nesterov and weight_decay are sgd's",
                "Give this optimiser's own arguments under local.options.",
            )

    def lr_at(self, round_index: int, rounds: int) -> float:
        """The learning rate of round `round_index` (from 0) of `rounds`."""
        if self.schedule == "exponential":
            return self.lr * self.decay**round_index
        if self.schedule == "cosine":
            progress = round_index / max(rounds - 1, 1)
            return self.lr * (self.decay + (1 - self.decay) * 0.5 * (1 + math.cos(math.pi * progress)))
        if self.schedule == "inverse":
            return self.lr / (1 + self.decay * round_index)
        return self.lr

    def last_lr(self, done: int, rounds: int) -> float:
        """The rate of the newest of `done` rounds (of `rounds`) that had one: a cosine may end at 0."""
        return next(filter(None, (self.lr_at(i, rounds) for i in reversed(range(max(done, 1))))), self.lr)


@dataclasses.dataclass(frozen=True)
class CohortConfig(Named):
    """How many clients take part in a round, and which; each once, unless the algorithm chooses (CluSamp).

    Attributes:
      fraction: of the population; K = max(floor(fraction * N), 1).
      size: K itself; takes the place of `fraction`.
      sampling: `uniform`; `by_size`, drawn one after another with chances proportional to the samples of
        those that remain; `cyclic`, K after K of a shuffled list; or `schedule`. With `by_size` set an
        algorithm's weights to uniform: by samples, as FedAvg's are, size counts twice. An algorithm that
        chooses its clients itself (CluSamp) wants `uniform` here, and does not look at it.
      schedule: file of the cohorts, see `fedjax_sim.engine.cohorts`.
    """

    fraction: float = 0.5
    size: int | None = None
    sampling: Literal["uniform", "by_size", "cyclic", "schedule"] = "uniform"
    schedule: str | None = None

    def __post_init__(self):
        check(self, "cohort.")
        _check_paths(self, "cohort.", "schedule")
        if (self.sampling == "schedule") != (self.schedule is not None):
            raise UserError(
                "cohort.schedule",
                self.schedule,
                f"cohort.sampling is {self.sampling}",
                "A schedule needs both: cohort.sampling = schedule, and its file in cohort.schedule.",
            )
        if self.size is not None:
            at_least("cohort.size", self.size, 1)
        within("cohort.fraction", self.fraction, 0.0, 1.0, open_left=True)

    def count(self, num_clients: int) -> int:
        """K for a population of `num_clients`.

        Raises:
          UserError: if the cohort would be larger than the population.
        """
        if self.size is None:
            # 0.29 * 100 is 28.999… in binary; the fraction that was written is meant.
            return max(math.floor(self.fraction * num_clients + 1e-9), 1)
        if self.size > num_clients:
            raise UserError(
                "cohort.size",
                self.size,
                f"the population has only {num_clients} clients",
                f"Choose at most {num_clients}, or raise partition.clients.",
            )
        return self.size


@dataclasses.dataclass(frozen=True)
class EvaluationConfig(Named):
    """What is measured on the deployed model, and how often.

    Attributes:
      every: rounds between evaluations (the last round is always evaluated); 0 never.
      batch_size: images in one forward pass; speed and memory only. None: 50 on CPUs if the model has
        convolutions, else 500, see `fedjax_sim.engine.placement.forward_batch`.
      per_class: accuracy of each class of the global test set.
      per_client: accuracy on every client's own test split: mean, 10th and 90th percentile.
      finetune: epochs that every client trains on alone after the last round, and accuracy on its own test
        split then; 0 for none. See `fedjax_sim.finetuning`.
    """

    every: int = 10
    batch_size: int | None = None
    per_class: bool = False
    per_client: bool = False
    finetune: int = 0

    def __post_init__(self):
        check(self, "evaluation.")
        at_least("evaluation.every", self.every, 0, "Raise it; 0 is never.")
        if self.batch_size is not None:
            at_least("evaluation.batch_size", self.batch_size, 1)
        at_least("evaluation.finetune", self.finetune, 0)
        if self.finetune and not (self.per_client and self.every):
            raise UserError(
                "evaluation.finetune",
                self.finetune,
                "what it gives is measured on clients' own test samples, with the last evaluation",
                "Set evaluation.per_client, and evaluation.every above 0.",
            )


@dataclasses.dataclass(frozen=True)
class PeelConfig(Named):
    """What the layer-peeled probe measures, and how often.

    `fedjax_sim.probes.peel.feature_probe` says what comes of it.

    Attributes:
      every: rounds between measurements (the first round is measured too); 0 never.
      clients: how many of a round's clients are measured.
      samples: of each of them, at most: one half is measured, to the other probes are fitted.
      split: `test` measures clients' own test samples, `train` halves of their training samples, `auto` the
        first where the partition has them.
      class_samples: a client's classes with fewer measured samples are left out. With split `train` half of a
        client's samples are measured: with the default 5 it needs about ten of each of two classes.
      pool: average a convolution's features over places before taking variances.
      angles: record the cosine of every principal angle, not only their mean and the smallest.
      chimeras: measure models of which only some layers are aggregated, see
        `fedjax_sim.probes.peel.chimera`; three more forward passes a layer.
      controls: models to measure besides, in the place of `after`; see `fedjax_sim.probes.peel.controls`.
      finetune: epochs of training the classifier alone after the merge, whose outcome is measured as state
        `finetuned`; 0 for none. See `fedjax_sim.probes.peel.head_finetuning`.
      others: measure each client's models on the other measured clients' samples and on the global test set,
        see `fedjax_sim.probes.peel.generality`; its cost grows with the square of `clients`.
      ranks: record numerical and stable ranks, which take the eigenvalues of a covariance for each layer.
    """

    every: int = 0
    clients: int = 16
    samples: int = 500
    split: Literal["auto", "test", "train"] = "auto"
    class_samples: int = 5
    pool: bool = False
    angles: bool = False
    chimeras: bool = False
    controls: tuple[Literal["perturbed", "reestimated", "local_statistics"], ...] = ()
    finetune: int = 0
    others: bool = False
    ranks: bool = False

    def __post_init__(self):
        check(self, "peel.")
        at_least("peel.every", self.every, 0, "Raise it; 0 is never.")
        at_least("peel.clients", self.clients, 1)
        at_least("peel.samples", self.samples, 2)
        at_least("peel.class_samples", self.class_samples, 1)
        at_least("peel.finetune", self.finetune, 0)


@dataclasses.dataclass(frozen=True)
class InertiaConfig(Named):
    """How far layers move, and what a merge gains; `fedjax_sim.reports.inertia` says what comes of it.

    Attributes:
      measure: record every round how far each layer of the deployed model moved, and clients' gradients.
      reference: the round, from 1, whose deployed model displacements are measured from.
      every: rounds between measurements of aggregation effectiveness (the first round is measured too); 0
        never. Under LIPS take a number that shares no divisor with its period, to meet sparse rounds too.
      clients: how many of a round's clients it is measured on; the probe's, where `peel` measures that round.
      samples: of each client's own test samples, and of the global test set, at most.
    """

    measure: bool = False
    reference: int = 3
    every: int = 0
    clients: int = 16
    samples: int = 500

    def __post_init__(self):
        check(self, "inertia.")
        at_least("inertia.reference", self.reference, 1)
        at_least("inertia.every", self.every, 0, "Raise it; 0 is never.")
        at_least("inertia.clients", self.clients, 1)
        at_least("inertia.samples", self.samples, 1)


@dataclasses.dataclass(frozen=True)
class InitialConfig(Named):
    """What the first round starts from.

    Attributes:
      run: folder of another run, relative to the working directory, whose deployed model at its newest
        sound checkpoint is taken; None: fresh random weights, which come from the seed.
      pretrain: epochs of central training of the fresh model with the run's local settings, on samples that
        no client gets, see `fedjax_sim.runs.start`; 0 for none.
      holdout: the fraction of the training images that are put aside for it before clients get theirs, every
        class in its share; without `pretrain` none are.
    """

    run: str | None = None
    pretrain: int = 0
    holdout: float = 0.1

    def __post_init__(self):
        check(self, "initial.")
        _check_paths(self, "initial.", "run")
        at_least("initial.pretrain", self.pretrain, 0)
        within("initial.holdout", self.holdout, 0.0, 1.0, open_left=True, open_right=True)
        if self.run is not None and self.pretrain:
            raise UserError(
                "initial.pretrain",
                self.pretrain,
                f"the model already comes from the run {self.run}",
                "Set one of initial.run and initial.pretrain.",
            )

    @property
    def put_aside(self) -> float:
        """The fraction of the training images that no client gets."""
        return self.holdout if self.pretrain else 0.0


@dataclasses.dataclass(frozen=True)
class ExecutionConfig(Named):
    """How the arithmetic is laid out. May change speed and memory, never results beyond float rounding.

    Attributes:
      devices: how many to use; None uses all.
      wave: clients trained side by side on one device (`vmap`); None: by the kind of device and the model,
        see `fedjax_sim.engine.placement.speed_defaults`.
      conv: implementation of the convolution, see `fedjax_sim.models.kernels.conv`; `auto`: likewise, of
        those that round as finely as XLA's own. `winograd` is faster for some layers on CPUs, and
        rounds ten times as coarsely: a loss may move in its fourth digit.
      donate: let a round overwrite the state that it came from.
      debug: train clients one after another on one device, without jit, `vmap` or `shard_map`, whatever
        `devices` and `wave` say. Slow: `print` and `breakpoint()` see values, an error names round, client
        and step, and the run stops at the first NaN or infinity and says where it came up.
      data: where training samples lie. `copied`: all of them on every device; `cut`: a share on each, and a
        round's samples are exchanged; `streamed`: on the host, also memory-mapped, and those of the next
        rounds are sent while one runs. `auto` goes by the set, see `fedjax_sim.engine.feed.placement_of`.
      client_state: where that lies which clients keep between rounds. `device`: cut over the devices; `host`:
        on the host, in mapped files of the run's folder, and a round's rows are sent and fetched. `auto` goes
        by its size, see `fedjax_sim.engine.client_state.where`.
      rounds_per_call: how many rounds at most run as one program, where neither an evaluation nor anything
        else has the host look in between. `auto`: as many as take a quarter of a second. 1: one by one.
      calibration: whether `wave` and `conv`, where they are left open, go by what was measured on this
        machine (`fedjax-sim tune-machine`). `use`: on CPUs, if that was done for such a run; `make`: on any
        device, and where it was not done the start of the run does it, in about half a minute; `ignore`:
        they do not. A run that is resumed keeps what it began with. See `fedjax_sim.runs.calibration`.
    """

    devices: int | None = None
    wave: int | None = None
    conv: str = "auto"
    donate: bool = True
    debug: bool = False
    data: Literal["auto", "copied", "cut", "streamed"] = "auto"
    client_state: Literal["auto", "device", "host"] = "auto"
    rounds_per_call: int | Literal["auto"] = "auto"
    calibration: Literal["use", "make", "ignore"] = "use"

    def __post_init__(self):
        check(self, "execution.")
        for name in ("devices", "wave"):
            if getattr(self, name) is not None:
                at_least(f"execution.{name}", getattr(self, name), 1)
        if self.rounds_per_call != "auto":
            at_least("execution.rounds_per_call", self.rounds_per_call, 1)
        from fedjax_sim.core.conv_impl import CONV_IMPLS

        if self.conv not in ("auto", *CONV_IMPLS):
            fix = f"Choose auto, {', '.join(CONV_IMPLS)}."
            raise UserError("execution.conv", self.conv, "no such implementation", fix)


@dataclasses.dataclass(frozen=True)
class OutputConfig(Named):
    """What a run leaves behind, and how often.

    Attributes:
      dir: the run's folder; None keeps everything in memory (notebooks).
      checkpoint_every: rounds between checkpoints; 0 writes one at the end only.
      keep: newest checkpoints kept.
      tensorboard: write TensorBoard events: all metrics but those of single clients, hyper-parameters, and at
        the end the figures if they are drawn.
      figures: draw curves and the partition at the end.
      progress: show a progress bar; a line now and then where standard error is no terminal.
      histograms: with the events, histograms of each weight of the deployed model at evaluated rounds. The
        model is fetched from the devices for them, and the next round waits meanwhile.
    """

    dir: str | None = None
    checkpoint_every: int = 50
    keep: int = 2
    tensorboard: bool = True
    figures: bool = True
    progress: bool = True
    histograms: bool = False

    def __post_init__(self):
        check(self, "output.")
        _check_paths(self, "output.", "dir")
        at_least("output.checkpoint_every", self.checkpoint_every, 0)
        at_least("output.keep", self.keep, 1)
