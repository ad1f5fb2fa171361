"""Configurations: round trips, and every mistake named by its dotted field."""

import dataclasses
import sys

import numpy as np
import pytest
import yaml

from fedjax_sim import algorithms, config
from fedjax_sim.algorithms import FedAvg, FedMR, FedOpt, FedProx, Scaffold
from fedjax_sim.config import (
    CohortConfig,
    DataConfig,
    EvaluationConfig,
    ExecutionConfig,
    LocalConfig,
    ModelConfig,
    OutputConfig,
    RunConfig,
)
from fedjax_sim.core.errors import UserError
from fedjax_sim.data import PartitionConfig

UNUSUAL = RunConfig(
    seed=3,
    rounds=7,
    data=DataConfig("npz:a.npz", "somewhere"),
    partition=PartitionConfig(kind="dirichlet", clients=20, alpha=0.1, local_test="holdout"),
    model=ModelConfig("lenet", "group", "bfloat16", {"hidden": [3, 4]}),
    local=LocalConfig(
        epochs=None, steps=4, batch_size=3, optimizer="adam", lr=1e-3, options={"b1": 0.8}, clip_norm=1.0,
        schedule="cosine", decay=0.1, keep_optimizer=True, non_finite="skip",
    ),
    cohort=CohortConfig(size=5),
    evaluation=EvaluationConfig(0, 10, True, True),
    execution=ExecutionConfig(1, 2, "canonical", False),
    output=OutputConfig("out", 3, 4, False, False, False),
)  # fmt: skip


@pytest.mark.parametrize("base", [RunConfig(), UNUSUAL], ids=["defaults", "unusual"])
@pytest.mark.parametrize("name", algorithms.CONFIGS)
def test_a_configuration_survives_yaml(name, base, tmp_path):
    wanted = dataclasses.replace(base, algorithm=algorithms.CONFIGS[name]())
    text = config.dump(wanted)
    (tmp_path / "run.yaml").write_text(text)
    assert config.read_config(tmp_path / "run.yaml") == wanted
    assert yaml.safe_load(text)["algorithm"]["name"] == name
    assert config.dump(config.read_config(tmp_path / "run.yaml")) == text


def test_every_field_of_every_part_is_written_out():
    written = yaml.safe_load(config.dump(RunConfig()))
    for field in dataclasses.fields(RunConfig):
        part = getattr(RunConfig(), field.name)
        if dataclasses.is_dataclass(part):
            known = {inner.name for inner in dataclasses.fields(part)}
            assert set(written[field.name]) - {"name"} == known - {"name"}


def test_hyper_parameters_of_algorithms_survive_yaml():
    for algorithm in (
        FedOpt("adam", 0.1, {"eps": 1e-3}, FedAvg("uniform")),
        FedMR("block", 0.5, 3, "tied", False, 2),
    ):
        wanted = RunConfig(algorithm=algorithm)
        assert config.from_dict(yaml.safe_load(config.dump(wanted))) == wanted


def test_a_mapping_changes_only_what_it_names():
    base = dataclasses.replace(UNUSUAL, algorithm=FedMR(first_stage=9))
    changed = config.from_dict({"local": {"lr": 1}, "algorithm": {"granularity": "module"}}, base=base)
    assert changed == dataclasses.replace(
        base,
        local=dataclasses.replace(base.local, lr=1.0),
        algorithm=FedMR(granularity="module", first_stage=9),
    )
    assert config.from_dict({"algorithm": "fedavg"}, base=base).algorithm == FedAvg()


def test_numbers_that_mean_the_same_are_taken():
    """YAML reads 1e-2 as a string and 1 as an integer."""
    made = config.from_dict(yaml.safe_load("local: {lr: 1e-2, momentum: 0, clip_norm: 5}"))
    assert (made.local.lr, made.local.clip_norm) == (0.01, 5.0)
    assert isinstance(made.local.clip_norm, float)


@pytest.mark.parametrize(
    ("text", "field", "told"),
    [
        ("roundz: 3", "roundz", "rounds"),
        ("local: {learning_rate: 0.1}", "local.learning_rate", "Did you mean lr?"),
        ("local: {momentun: 0.1}", "local.momentun", "momentum"),
        ("lr: 0.1", "lr", "Did you mean local.lr? Write local: {lr: …}."),
        ("local.lr: 0.1", "local.lr", "Write local: {lr: …}."),
        ("local: {clients: 5}", "local.clients", "partition.clients or peel.clients"),
        ("algorithm: {name: fedavg, weight: uniform}", "algorithm.weight", "weights"),
        ("algorithm: fedvag", "algorithm.name", "fedavg"),
        ("algorithm: {granularity: tensor}", "algorithm.name", "fedmr"),
        ("algorithm: 3", "algorithm", "name"),
        ("algorithm: {name: [fedavg]}", "algorithm.name", "fedavg"),
        ("algorithm: {name: fedmr, granularity: layer}", "algorithm.granularity", "tensor"),
        ("algorithm: {name: fedmr, partition: 0}", "algorithm.partition", "(0, 1]"),
        ("algorithm: {name: fedmr, partition: 1.5}", "algorithm.partition", "(0, 1]"),
        ("algorithm: {name: fedmr, first_stage: -1}", "algorithm.first_stage", "negative"),
        ("algorithm: {name: fedmr, similarity_group: 0}", "algorithm.similarity_group", "below 1"),
        ("rounds: 0", "rounds", "at least 1"),
        ("rounds: 2.5", "rounds", "int"),
        ("rounds: true", "rounds", "int"),
        ("rounds: 1.0e+3", "rounds", "Write 1000"),
        ("partition: {kind: natural, clients: none}", "partition.clients", "such as 10, or null."),
        ("rounds: '1:30'", "rounds", "int"),
        ("rounds: '0x10'", "rounds", "int"),
        ("output: {dir: 10}", "output.dir", "in quotes"),
        ("output: {figures: maybe}", "output.figures", "true or false"),
        ("local: {optimizer: adam, options: {b1:0.9}}", "local.options", "Write b1: 0.9"),
        ("seed: -1", "seed", "outside"),
        ("local: 3", "local", "mapping"),
        ("local:", "local", "mapping"),
        ("local: {lr: fast}", "local.lr", "float"),
        ("local: {lr: 0}", "local.lr", "positive"),
        ("local: {lr: .nan}", "local.lr", "positive"),
        ("local: {lr: .inf}", "local.lr", "positive"),
        ("local: {lr: null}", "local.lr", "float"),
        ("local: {nesterov: 1}", "local.nesterov", "bool"),
        ("local: {epochs: 0}", "local.epochs", "at least 1"),
        ("local: {epochs: null}", "local.epochs", "exactly one"),
        ("local: {steps: 3}", "local.epochs", "exactly one"),
        ("local: {batch_size: 0}", "local.batch_size", "at least 1"),
        ("local: {momentum: 1.0}", "local.momentum", "outside"),
        ("local: {weight_decay: -0.1}", "local.weight_decay", "at least 0"),
        ("local: {clip_norm: 0}", "local.clip_norm", "positive"),
        ("local: {decay: 2}", "local.decay", "outside"),
        ("local: {decay: 0.9}", "local.decay", "nothing decays"),
        ("algorithm: {name: fedmr, partition: 0.5}", "algorithm.partition", "granularity is tensor"),
        ("algorithm: {name: lips, leaves: params/fc2/kernel}", "algorithm.leaves", "a list is wanted"),
        ("peel: {every: 1, controls: perturbed}", "peel.controls", "a list is wanted"),
        ("local: {schedule: step}", "local.schedule", "cosine"),
        ("local: {non_finite: ignore}", "local.non_finite", "skip"),
        ("local: {optimizer: adam, momentum: 0.9}", "local.optimizer", "local.options"),
        ("cohort: {fraction: 0}", "cohort.fraction", "outside"),
        ("cohort: {size: 0}", "cohort.size", "at least 1"),
        ("partition: {alpha: -1}", "partition.alpha", "positive"),
        ("partition: {kind: dirichlett}", "partition.kind", "dirichlet"),
        ("model: {norm: layer}", "model.norm", "group"),
        ("model: {dtype: float16}", "model.dtype", "bfloat16"),
        ("model: {options: [1]}", "model.options", "dict"),
        ("model: {options: {num_classes: 3}}", "model.options.num_classes", "the data set says it"),
        ("model: {options: {input_shape: 3}}", "model.options.input_shape", "the data set says it"),
        ("model: {options: {name: lenet}}", "model.options.name", "Set model.name"),
        ("model: {norm: batch, options: {norm: group}}", "model.options.norm", "Keep one"),
        ("model: {options: {1: 3}}", "model.options.1", "text"),
        ("evaluation: {every: -1}", "evaluation.every", "at least 0"),
        ("execution: {conv: fft}", "execution.conv", "canonical"),
        ("execution: {devices: 0}", "execution.devices", "at least 1"),
        ("output: {keep: 0}", "output.keep", "at least 1"),
        ("version: 0", "version", "reads version"),
        ("{version: 0, learning_rate: 3}", "version", "reads version"),
    ],
)
def test_a_mistake_is_named_by_its_field_and_says_the_way_out(text, field, told):
    with pytest.raises(UserError) as caught:
        config.from_dict(yaml.safe_load(text))
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field} = ")
    assert told in str(caught.value)


@pytest.mark.parametrize("content", ["- 1\n- 2", "a: [", "just words"])
def test_files_that_are_no_configuration(content, tmp_path):
    (tmp_path / "bad.yaml").write_text(content)
    with pytest.raises(UserError, match=r"bad\.yaml"):
        config.read_config(tmp_path / "bad.yaml")


def test_a_key_that_is_there_twice(tmp_path):
    (tmp_path / "run.yaml").write_text("local: {lr: 0.5}\nrounds: 3\nlocal: {momentum: 0.9}\n")
    with pytest.raises(
        UserError, match=r"run\.yaml.*line 3.*the key 'local' is there twice, first in line 1"
    ):
        config.read_config(tmp_path / "run.yaml")


def test_words_of_other_yaml_versions_in_a_file(tmp_path):
    """Numbers in every way of writing them, nested ones too; switches as YAML 1.1 has them."""
    (tmp_path / "run.yaml").write_text(
        "seed: 010\nrounds: 1_000\nlocal: {optimizer: adamw, lr: 1e-2, options: {weight_decay: 1e-4}}\n"
        "algorithm: {name: fedopt, optimizer: adam, lr: 1e-1, options: {eps: 1e-3}}\n"
        "model: {options: {hidden: [010]}}\n"
        "evaluation: {per_class: yes, per_client: off}\noutput: {dir: 2026-01-01}\n"
    )
    read = config.read_config(tmp_path / "run.yaml")
    assert (read.seed, read.rounds, read.local.lr, read.output.dir) == (10, 1000, 0.01, "2026-01-01")
    assert (read.evaluation.per_class, read.evaluation.per_client) == (True, False)
    assert read.local.options == {"weight_decay": 1e-4} and read.model.options == {"hidden": [10]}
    assert read.algorithm == FedOpt("adam", 0.1, {"eps": 1e-3})
    (tmp_path / "again.yaml").write_text(config.dump(read))
    assert config.read_config(tmp_path / "again.yaml") == read


def test_a_bare_name_stands_for_a_section():
    read = config.from_dict({"model": "lenet", "data": "cifar10", "partition": "iid"}, base=UNUSUAL)
    assert read.model == dataclasses.replace(UNUSUAL.model, name="lenet")
    assert (read.data.source, read.partition.kind, read.partition.alpha) == ("cifar10", "iid", 0.1)
    for section in ("local", "cohort", "peel"):
        with pytest.raises(UserError, match=f"^{section} = 'adam': a mapping is wanted"):
            config.from_dict({section: "adam"})


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        config.read_config(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: FedAvg(weights="unifrom"), "algorithm.weights"),
        (lambda: FedMR(granularity="layer"), "algorithm.granularity"),
        (lambda: FedMR(batch_stats="together"), "algorithm.batch_stats"),
        (lambda: LocalConfig(schedule="step"), "local.schedule"),
        (lambda: LocalConfig(non_finite="ignore"), "local.non_finite"),
        (lambda: LocalConfig(epochs=2.5), "local.epochs"),
        (lambda: LocalConfig(lr="fast"), "local.lr"),
        (lambda: LocalConfig(momentum="0.9"), "local.momentum"),
        (lambda: CohortConfig(size=2.5), "cohort.size"),
        (lambda: RunConfig(rounds=2.5), "rounds"),
        (lambda: RunConfig(seed=0.5), "seed"),
        (lambda: RunConfig(algorithm="fedavg"), "algorithm"),
        (lambda: ModelConfig(norm="layer"), "model.norm"),
    ],
)  # fmt: skip
def test_what_yaml_refuses_python_refuses_too(make, field):
    """In a notebook configurations are made in Python: a misspelt choice must not fall through to another."""
    with pytest.raises(UserError) as caught:
        make()
    assert caught.value.field == field


def test_numpy_numbers_can_be_written():
    """A sweep over np.arange gives such numbers."""
    made = RunConfig(seed=np.int64(3), local=LocalConfig(lr=np.float64(0.5)))
    assert yaml.safe_load(config.dump(made))["seed"] == 3


def test_learning_rate_schedules():
    constant = LocalConfig(lr=0.5)
    assert [constant.lr_at(r, 9) for r in (0, 4, 8)] == [0.5, 0.5, 0.5]
    falling = LocalConfig(lr=0.5, schedule="exponential", decay=0.9)
    assert falling.lr_at(0, 9) == 0.5
    assert falling.lr_at(3, 9) == pytest.approx(0.5 * 0.9**3)
    cosine = LocalConfig(lr=0.5, schedule="cosine", decay=0.2)
    assert cosine.lr_at(0, 9) == pytest.approx(0.5)
    assert cosine.lr_at(4, 9) == pytest.approx((0.5 + 0.1) / 2)
    assert cosine.lr_at(8, 9) == pytest.approx(0.1)
    assert LocalConfig(lr=0.5, schedule="cosine", decay=0.2).lr_at(0, 1) == pytest.approx(0.5)
    to_zero = LocalConfig(lr=0.5, schedule="cosine", decay=0.0)
    assert to_zero.lr_at(4, 5) == 0 and to_zero.last_lr(5, 5) == to_zero.lr_at(3, 5) > 0
    assert to_zero.last_lr(0, 5) == 0.5 and falling.last_lr(3, 5) == falling.lr_at(2, 5)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: RunConfig(rouns=3), "RunConfig.rouns = 3: no such field. Did you mean rounds?"),
        (
            lambda: PartitionConfig(client=3),
            "PartitionConfig.client = 3: no such field. Did you mean c",
        ),
        (
            lambda: LocalConfig(learning_rate=1),
            "LocalConfig.learning_rate = 1: no such field. Did you",
        ),
        (lambda: RunConfig(lr=1), "Did you mean local.lr? Write local=fs.LocalConfig(lr=…)."),
        (lambda: dataclasses.replace(RunConfig(), alpha=1), "Write partition=fs.PartitionConfig(alpha=…)."),
    ],
)
def test_a_field_that_there_is_not_is_told_in_python_too(make, told):
    with pytest.raises(UserError) as caught:
        make()
    assert told in str(caught.value)


def test_a_section_that_is_named_starts_from_what_is_there_without_it():
    for field in dataclasses.fields(RunConfig):
        section = getattr(RunConfig(), field.name)
        if dataclasses.is_dataclass(section) and field.name != "algorithm":
            assert section == type(section)(), field.name
            assert config.from_dict({field.name: {}}) == RunConfig()


@pytest.mark.parametrize(
    ("cohort", "clients", "expected"),
    [
        (CohortConfig(), 100, 50),
        (CohortConfig(), 5, 2),
        (CohortConfig(), 1, 1),
        (CohortConfig(0.29), 100, 29),
        (CohortConfig(0.999), 100, 99),
        (CohortConfig(1.0), 7, 7),
        (CohortConfig(size=3), 3, 3),
    ],
)
def test_cohort_sizes(cohort, clients, expected):
    assert cohort.count(clients) == expected


def test_a_cohort_larger_than_the_population():
    with pytest.raises(UserError, match=r"cohort\.size = 4.*only 3 clients"):
        CohortConfig(size=4).count(3)


def test_a_mistake_inside_an_inner_algorithm_names_the_whole_path():
    inside = {"name": "ditto", "inner": {"name": "fedprox", "mu": -1}}
    with pytest.raises(
        UserError, match=r"^algorithm\.inner\.inner\.mu = -1\.0: must be at least 0\. Raise it\."
    ):
        config.from_dict({"algorithm": {"name": "lips", "inner": inside}})
    with pytest.raises(UserError, match=r"^algorithm\.density = 2\.0"):
        config.from_dict({"algorithm": {"name": "lips", "density": 2}})


# --- older files ----------------------------------------------------------------------------------------


def test_a_file_of_version_1_means_what_it_meant():
    """FedAvg had the server's optimiser, and SCAFFOLD counted steps."""
    server = {"server_optimizer": "adam", "server_lr": 0.1, "server_options": {"eps": 1e-3}}
    plain = {"server_optimizer": "none", "server_lr": 1.0, "server_options": {}}
    cases = [
        ({"name": "fedavg", "weights": "uniform", **plain}, FedAvg("uniform")),
        ({"name": "fedavg", **server}, FedOpt("adam", 0.1, {"eps": 1e-3})),
        ({"name": "fedprox", "mu": 1.0, "inner": {"name": "fedavg", **server}},
         FedProx(FedOpt("adam", 0.1, {"eps": 1e-3}), mu=1.0)),
        ({"name": "scaffold", "option": "II", "server_lr": 0.5}, Scaffold(server_lr=0.5, divisor="steps")),
        ("fedmr", FedMR()),
    ]  # fmt: skip
    for given, wanted in cases:
        read = config.from_dict({"version": 1, "rounds": 3, "algorithm": given})
        assert read == RunConfig(rounds=3, algorithm=wanted)
        assert config.from_dict(config.to_dict(read)) == read
    assert config.from_dict({"version": 1}) == RunConfig()


@pytest.mark.parametrize("version", [0, 3, "2", None])
def test_other_versions_are_refused(version):
    with pytest.raises(UserError, match="reads version 2"):
        config.from_dict({"version": version, "nonsense": 1})


# --- one's own algorithm --------------------------------------------------------------------------------

OWN = """
import dataclasses
from fedjax_sim.algorithms import FedAvg

@dataclasses.dataclass(frozen=True)
class Halved:
    \"\"\"Half a step to the mean.\"\"\"
    share: float = 0.5
    def build(self, context):
        inner = FedAvg().build(context)
        return inner

@dataclasses.dataclass(frozen=True)
class Needy:
    share: float
    def build(self, context): ...

class Plain: ...
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "halved_for_tests.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    yield "halved_for_tests"
    sys.modules.pop("halved_for_tests", None)


def test_ones_own_algorithm_has_a_name(own_module):
    before = list(sys.path)
    name = f"{own_module}:Halved"
    read = config.from_dict({"algorithm": {"name": name, "share": "0.25"}})
    assert read.algorithm.share == 0.25
    assert config.to_dict(read)["algorithm"] == {"name": name, "share": 0.25}
    assert config.from_dict(config.to_dict(read)) == read
    inside = config.from_dict({"algorithm": {"name": "fedprox", "inner": name}})
    assert inside.algorithm.inner.share == 0.5
    assert sys.path == before


@pytest.mark.parametrize(
    ("algorithm", "field", "told"),
    [
        ("{}:Other", "algorithm.name", "cannot be imported"),
        ("{}_:Halved", "algorithm.name", "No module named"),
        ("{}:Plain", "algorithm.name", "cannot be used as"),
        ("{}:Halved:more", "algorithm.name", "cannot be imported"),
        ({"name": "{}:Halved", "shares": 1}, "algorithm.shares", "Did you mean share"),
        ({"name": "{}:Halved", "share": "much"}, "algorithm.share", "float"),
        ("{}:Needy", "algorithm.share", "no default"),
    ],
)
def test_what_is_wrong_with_it_is_named(own_module, algorithm, field, told):
    if isinstance(algorithm, str):
        algorithm = algorithm.format(own_module)
    else:
        algorithm = {**algorithm, "name": algorithm["name"].format(own_module)}
    with pytest.raises(UserError, match=told) as caught:
        config.from_dict({"algorithm": algorithm})
    assert caught.value.field == field


def test_a_class_is_not_taken_for_one_of_it():
    for make in (
        lambda: RunConfig(algorithm=algorithms.FedMR),
        lambda: algorithms.FedProx(inner=algorithms.FedMR),
    ):  # type: ignore[arg-type]
        with pytest.raises(UserError, match=r"Write FedMR\(\)"):
            make()
    with pytest.raises(UserError, match="algorithm = 'fedmr'"):
        RunConfig(algorithm="fedmr")  # type: ignore[arg-type]
