"""What is measured of a run: its deployed model's surroundings, and what lies between its clients' models."""

import dataclasses
import itertools
from typing import Any, cast

import jax
import numpy as np
from jax.flatten_util import ravel_pytree

from fedjax_sim.core import fields
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.rng import key_for, run_key
from fedjax_sim.data.ragged import Ragged
from fedjax_sim.engine.device_data import DeviceData
from fedjax_sim.engine.programs import cached_jit
from fedjax_sim.engine.round import Round, RoundInputs, ServerState
from fedjax_sim.engine.simulation import Simulation
from fedjax_sim.probes.landscape.curvature import Spectrum, spectrum
from fedjax_sim.probes.landscape.directions import filter_normalised
from fedjax_sim.probes.landscape.objective import Objective, TaskLoss
from fedjax_sim.probes.landscape.sharpness import Scale, Sharpness, sharpness
from fedjax_sim.probes.landscape.surfaces import Barrier, Curve, Plane, Surface, barrier, line, plane, surface
from fedjax_sim.runs import Run
from fedjax_sim.runs.checkpoint import Checkpoints
from fedjax_sim.runs.folder import Folder

_LINE, _SURFACE, _HESSIAN, _BALL = range(4)  # below the key of the settings' seed


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to measure, and how finely.

    Attributes:
      points: of the random line and of the lines between models.
      grid: points on each side of a plane; 0 leaves planes out.
      radius: the random line and plane reach from −radius to radius.
      samples: training samples, and test samples, that losses are of; all if there are fewer.
      seed: of directions, samples and probes: the same for all runs that are compared.
      eigenvalues: how many of the largest.
      lanczos: steps.
      probes: of the trace.
      rho: radius of the ball of sharpness.
      scale: its unit; absolute, relative or filter, see `fedjax_sim.probes.landscape.sharpness`.
      ascent: steps of each of two ascents.
      draws: random pairs of average sharpness.
      models: how many of the cohort's models are compared; 0 leaves them out.
      batch: samples that a device takes at once.

    Raises:
      UserError: a number out of range.
    """

    points: int = 41
    grid: int = 21
    radius: float = 1.0
    samples: int = 1000
    seed: int = 0
    eigenvalues: int = 3
    lanczos: int = 20
    probes: int = 10
    rho: float = 0.05
    scale: Scale = "absolute"
    ascent: int = 20
    draws: int = 20
    models: int = 3
    batch: int = 250

    def __post_init__(self):
        fields.check(self)
        least = {"points": 3, "samples": 1, "seed": 0, "eigenvalues": 1, "lanczos": 1, "probes": 2}
        for name, value in {**least, "ascent": 1, "draws": 2, "batch": 1}.items():
            fields.at_least(name, getattr(self, name), value)
        for name in ("radius", "rho"):
            fields.positive(name, getattr(self, name))
        for name, value in {"grid": 3, "models": 2}.items():
            if getattr(self, name) != 0:
                fields.at_least(name, getattr(self, name), value)
        if self.eigenvalues > self.lanczos:
            why = f"{self.lanczos} Lanczos steps find no more than {self.lanczos}"
            raise UserError("eigenvalues", self.eigenvalues, why, "Ask for fewer, or raise lanczos.")


@dataclasses.dataclass(frozen=True, eq=False)
class Measured:
    """The landscape of one run; dicts are by `train` and `test`.

    Attributes:
      loss: of the deployed model.
      accuracy: likewise.
      lines: along a filter-normalised random direction.
      surfaces: over two; empty if not asked for.
      spectrum: of the Hessian, training samples.
      sharpness: training samples.
      between: of each pair of the cohort's models, (number, number, barriers).
      planes: through the first three of them; empty if not asked for, or if there are fewer.
      clients: who trained those models.
      samples: how many samples the losses are of.
      norm: L2, of all parameters of the deployed model: what curvature and an absolute ρ are to be seen
        beside, as both change where weights are only rescaled.
    """

    loss: dict[str, float]
    accuracy: dict[str, float]
    lines: dict[str, Curve]
    surfaces: dict[str, Surface]
    spectrum: Spectrum
    sharpness: Sharpness
    between: list[tuple[int, int, dict[str, Barrier]]]
    planes: dict[str, Plane]
    clients: tuple[int, ...]
    samples: dict[str, int]
    norm: float

    def pairs(self, name: str, part: str) -> np.ndarray:
        """A number of the `Barrier` of every pair, on `train` or `test` samples. -> f64[pairs]."""
        return np.asarray([getattr(both[name], part) for _, _, both in self.between])


def check_measurable(run: Run) -> None:
    """Raises UserError if it is seen at once that a run's final state cannot be read from its folder."""
    if run.folder is None:
        why, fix = "the run is in memory and has no folder", "Use measure() with its Simulation."
        raise UserError("run", str(run.title), why, fix)
    for name, told in run.config.given.items():
        if name not in ("partition", "observers", "callbacks"):
            why = f"the run was given this {name} from Python, which its folder does not hold: {told}"
            raise UserError("run", str(run.folder), why, "Use measure() with its Simulation.")
    place = Folder(run.folder)
    if not Checkpoints(place.checkpoints).rounds():
        raise UserError("run", str(run.folder), "it has no checkpoint, and so no model", place.run_again)


def objectives(simulation: Simulation, settings: Settings) -> dict[str, Objective]:
    """The loss on random training samples, of those that clients hold, and on random test samples.

    Which ones depends on the settings' seed and on the data alone. There is no augmentation.
    """
    setup, dataset = simulation.setup, simulation.setup.dataset
    draw = np.random.default_rng(settings.seed)
    train = draw.permutation(dataset.train_size)
    train = train[np.isin(train, Ragged.of(setup.partition.train).flat)][: settings.samples]
    test = draw.permutation(dataset.test_size)[: settings.samples]
    function = TaskLoss(setup.model, dataset.task)
    chosen = {"train": (dataset.train, train), "test": (dataset.test, test)}
    return {
        name: Objective(
            function,
            {key: leaf[index] for key, leaf in samples.items()},
            None,
            batch_size=settings.batch,
            mesh=simulation.mesh,
        )
        for name, (samples, index) in chosen.items()
    }


def trained(simulation: Simulation, count: int) -> tuple[list[Any], tuple[int, ...]]:
    """Models of the next round's clients, trained and not merged. The simulation stays as it is.

    One more round is begun from the run's final state, with the cohort that it would draw (with a schedule of
    cohorts, the last round's) at the learning rate of the last round that had one (a cosine may end at 0),
    and its merge is left out.

    Args:
      simulation: of the run.
      count: how many clients, at most K.

    Returns:
      (up to `count` models, NumPy leaves; their clients).
    """
    setup, config = simulation.setup, simulation.setup.config
    # A schedule ends with the run.
    number = simulation.round - (config.cohort.sampling == "schedule" and simulation.round > 0)
    inputs, _ = simulation.inputs(number)
    lr = config.local.last_lr(simulation.round, config.rounds)
    inputs = dataclasses.replace(inputs, lr=cast(Any, np.float32(lr)))
    slots = np.arange(min(count, setup.cohort_size), dtype=np.int32)
    trainer = dataclasses.replace(setup.trainer, gradients=False)  # which no meter is here to look at
    one_more = _Trained(dataclasses.replace(simulation.function, trainer=trainer, in_order=False, meters={}))
    with jax.set_mesh(simulation.mesh):
        models = cached_jit(one_more, simulation.mesh)
        state = simulation.state_for(np.asarray(inputs.cohort.ids))
        found = models(state, inputs, simulation.data, slots)
    found = jax.device_get(found)
    clients = tuple(int(client) for client in np.asarray(inputs.cohort.ids)[slots])
    return [jax.tree.map(lambda leaf, k=k: leaf[k], found) for k in range(len(slots))], clients


@dataclasses.dataclass(frozen=True)
class _Trained:
    """The watched clients' models before the merge, [m, …], as a function of what the round is one of."""

    round: Round

    def __call__(self, state: ServerState, inputs: RoundInputs, data: DeviceData, watched: jax.Array) -> Any:
        view = self.round(state, inputs, data, watched)[1].view
        assert view is not None
        return view.counted().before


def measure(simulation: Simulation, settings: Settings | None = None, *, planes: bool = True) -> Measured:
    """Everything that is measured of a run.

    Args:
      simulation: at the run's end.
      settings: how finely; None: the defaults.
      planes: False leaves out whatever is two-dimensional.

    Raises:
      UserError: more eigenvalues are asked for than the model has parameters, or it is not finite.
    """
    settings = settings or Settings()
    variables = jax.device_get(simulation.variables)
    wanted, key = objectives(simulation, settings), run_key(settings.seed)
    first, second = (filter_normalised(key_for(key, number), variables) for number in (_LINE, _SURFACE))
    reach, train = settings.radius, wanted["train"]
    here = {name: line(one, variables, first, np.zeros(1)) for name, one in wanted.items()}
    along = np.linspace(-reach, reach, settings.points)
    over = np.linspace(-reach, reach, settings.grid)
    two = planes and settings.grid > 0
    models, clients = trained(simulation, settings.models) if settings.models else ([], ())
    between = [
        (i, j, {name: barrier(one, models[i], models[j], settings.points) for name, one in wanted.items()})
        for i, j in itertools.combinations(range(len(models)), 2)
    ]
    return Measured(
        loss={name: float(one.loss[0]) for name, one in here.items()},
        accuracy={name: float(one.accuracy[0]) for name, one in here.items()},
        lines={name: line(one, variables, first, along) for name, one in wanted.items()},
        surfaces={
            name: surface(one, variables, first, second, over, over) for name, one in wanted.items() if two
        },
        spectrum=spectrum(
            train,
            variables,
            key_for(key, _HESSIAN),
            k=settings.eigenvalues,
            steps=settings.lanczos,
            probes=settings.probes,
        ),
        sharpness=sharpness(
            train,
            variables,
            key_for(key, _BALL),
            rho=settings.rho,
            scale=settings.scale,
            steps=settings.ascent,
            draws=settings.draws,
        ),
        between=between,
        planes=_planes(wanted, models, settings.grid) if two and len(models) > 2 else {},
        clients=clients,
        samples={name: one.samples for name, one in wanted.items()},
        norm=float(np.linalg.norm(ravel_pytree(variables["params"])[0])),
    )


def _planes(wanted: dict[str, Objective], models: list[Any], points: int) -> dict[str, Plane]:
    """Through the first three models; none if they span none, as of clients that are all alike."""
    try:
        return {name: plane(one, models[:3], points) for name, one in wanted.items()}
    except UserError:
        return {}
