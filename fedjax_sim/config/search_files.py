"""What a search of settings is: its YAML file, read and checked.

base: {rounds: 90, …}             # a configuration, or the path of one
space:                            # dotted field -> where to look, see `fedjax_sim.config.spaces`
  local.lr: {log_uniform: [0.001, 1]}
  local.momentum: {choice: [0, 0.9]}
runs: 27                          # trials
rungs: 3                          # times that they are compared; after the last one all rounds are done
factor: 3                         # one in so many goes on
metric: accuracy                  # what they are compared by; the default is the task's headline
goal: max                         # or min; the default is the task's
seeds: 1                          # runs of each trial, which its value is the mean of
sampler: qmc                      # or random, or tpe
out: runs/search                  # where everything goes
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedjax_sim.config import spaces
from fedjax_sim.config import yaml as config_yaml
from fedjax_sim.config.run import RunConfig, check_given
from fedjax_sim.config.spaces import Space
from fedjax_sim.config.sweep_files import set_fields
from fedjax_sim.core import paths
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.fields import check, nearest

SAMPLERS = ("qmc", "random", "tpe")
"""Names of Optuna's samplers that a file may have."""


@dataclasses.dataclass(frozen=True)
class Search:
    """A search, checked: its spaces lie within what the fields take.

    Attributes:
      config: what all trials have in common.
      space: where to look, by dotted field.
      runs: trials.
      rungs: times that they are compared.
      factor: one in so many goes on from a rung to the next.
      metric: what they are compared by; None: the task's headline.
      goal: `max` or `min`; None: the task's, or by the metric's name.
      sampler: what proposes trials, of `SAMPLERS`.
      seeds: runs of each trial, of the seed of `config` and those after it.
      out: folder of everything; None: a temporary one.
    """

    config: RunConfig
    space: Mapping[str, Space]
    runs: int = 27
    rungs: int = 3
    factor: int = 3
    metric: str | None = None
    goal: str | None = None
    sampler: str = "qmc"
    seeds: int = 1
    out: Path | None = None

    def __post_init__(self):
        made = {str(field): spaces.from_dict(str(field), given) for field, given in self.space.items()}
        object.__setattr__(self, "space", made)
        if self.out is not None:
            object.__setattr__(self, "out", paths.local(str(self.out), "out").absolute())
        check(self)
        for name, least in {"runs": 1, "rungs": 1, "factor": 2, "seeds": 1}.items():
            if getattr(self, name) < least:
                raise UserError(name, getattr(self, name), f"it must be at least {least}", "Raise it.")
        if self.goal not in (None, "max", "min"):
            raise UserError("goal", self.goal, "not one of the choices", "Choose max or min.")
        if self.sampler not in SAMPLERS:
            raise UserError("sampler", self.sampler, "no such sampler", nearest(self.sampler, SAMPLERS))
        if not self.space:
            raise UserError("space", {}, "it has no field", 'Write {"local.lr": fs.log_uniform(1e-3, 1.0)}.')
        least = self.factor ** (self.rungs - 1)
        if self.runs < least:
            fitting = 1 + int(math.log(self.runs + 0.5, self.factor))
            why = f"with rungs = {self.rungs} and factor = {self.factor} there are at least {least}"
            fix = f"Ask for as many, or for rungs = {fitting}."
            raise UserError("runs", self.runs, why, fix)
        for field, space in self.space.items():
            self._check(field, space)
        self.rounds  # noqa: B018  which raises

    @property
    def kept(self) -> tuple[int, ...]:
        """How many trials at most do the rounds of each rung."""
        return tuple(self.runs // self.factor**number for number in range(self.rungs))

    @property
    def rounds(self) -> tuple[int, ...]:
        """The round at which each rung ends: a power of 1 / factor of all, rounded up to an evaluated one."""
        every, last = self.config.evaluation.every, self.config.rounds
        if not every:
            fix = "Set evaluation.every: a rung ends in an evaluated round."
            raise UserError("evaluation.every", every, "trials are compared by what is evaluated", fix)
        least = [-(-last // self.factor**number) for number in range(self.rungs)]
        ends = tuple(min(last, -(-rounds // every) * every) for rounds in reversed(least))
        if len(set(ends)) < len(ends):
            why = f"{self.rungs} rungs end in evaluated rounds, which would be {', '.join(map(str, ends))}"
            fix = "Lower evaluation.every or rungs, or raise rounds."
            raise UserError("evaluation.every", every, why, fix)
        return ends

    def trial(self, parameters: Mapping[str, Any]) -> RunConfig:
        """The configuration of a trial, field -> Optuna's parameter."""
        values = {field: self.space[field].value(parameter) for field, parameter in parameters.items()}
        return set_fields(self.config, values)

    def _check(self, field: str, space: Space) -> None:
        """Raises UserError unless a field takes what its space has."""
        if field in _ITS_OWN or field.split(".")[0] in ("output", "given", "version"):
            why = _ITS_OWN.get(field, "no result goes by it")
            raise UserError(f"space.{field}", str(space), why, "Leave it out.")
        rest = {name: other.examples()[0] for name, other in self.space.items()}
        for example in space.examples():
            try:
                self.trial(rest | {field: example})
            except UserError as error:
                fix = error.fix
                if isinstance(space, spaces.Interval) and not space.whole and float(example).is_integer():
                    fix = self._whole(field, space) or fix
                why = f"{error.field} = {error.value!r}: {error.why}"
                raise UserError(f"space.{field}", str(space), why, fix) from None

    def _whole(self, field: str, space: spaces.Interval) -> str | None:
        """What to write instead if the field takes whole numbers."""
        try:
            set_fields(self.config, {field: int(space.high)})
        except UserError:
            return None
        log = ", log=True" if space.log else ""
        return f"Write integers({math.ceil(space.low)}, {int(space.high)}{log})."


_ITS_OWN = {
    "seed": "a search takes its seeds from `seeds`, so that all trials share them",
    "rounds": "trials are compared after as many rounds",
    "evaluation.every": "rungs end in evaluated rounds, which all trials share",
}
"""Fields that a search sets itself: why."""
_FIELDS = ("base", *(field.name for field in dataclasses.fields(Search) if field.name != "config"))
_OF_A_RUN = {field.name for field in dataclasses.fields(RunConfig)}


def read_search(path: str | Path) -> Search:
    """A search from its file; relative paths of `base` are seen from the file's folder.

    Raises:
      UserError: the file is missing, or anything in it is wrong.
    """
    mapping = config_yaml.read_yaml(path)
    of_a_sweep = next((key for key in ("methods", "grid") if key in mapping), None)
    if of_a_sweep and "space" not in mapping:
        why = f"this is the file of a sweep (it has {of_a_sweep}), and that of a search is wanted"
        raise UserError("tune", str(path), why, f"Start it with: fedjax-sim sweep {path}.")
    for key in mapping:
        if key not in _FIELDS:
            fix = f"Put {key} under `base`." if key in _OF_A_RUN else nearest(str(key), _FIELDS)
            raise UserError(f"tune.{key}", mapping[key], "no such field", fix)
    space = mapping.get("space")
    if not isinstance(space, Mapping):
        raise UserError("space", space, "a mapping is wanted", "Write `local.lr: {log_uniform: [0.001, 1]}`.")
    base = mapping.get("base", {})
    if isinstance(base, str):
        base = config_yaml.read_yaml(Path(path).parent / paths.local(base, "tune.base"))
    config = config_yaml.from_dict(base)
    check_given(config)
    rest: dict[str, Any] = {key: value for key, value in mapping.items() if key not in ("base", "space")}
    rest.setdefault("out", Path("runs") / Path(path).stem)
    return Search(config, space, **rest)
