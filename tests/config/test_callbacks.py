"""What the shipped callbacks decide of a series of measurements; lists of plug-ins in YAML."""

import types

import numpy as np
import pytest

import fedjax_sim as fs
from fedjax_sim import config as config_lib
from fedjax_sim.config import RunConfig, sweep_files
from fedjax_sim.core.errors import UserError
from fedjax_sim.records import Row, Table


class Faked:
    """A run under way whose metric takes given values, None where it is not measured."""

    def __init__(self, callback, values, every=1):
        self.metrics = Table()
        self.config = RunConfig(evaluation=fs.EvaluationConfig(every=every))
        self.kept, self.stopped = [], None
        for self.number, value in enumerate(values, 1):
            rows = [Row(self.number, "lr", 0.1), Row(self.number, callback.metric, 0.0, client=3)]
            rows += [] if value is None else [Row(self.number, callback.metric, value)]
            self.metrics.extend(rows)
            callback.on_round(self.number, rows, self)
            if self.stopped:
                break

    def stop(self, reason):
        self.stopped = (self.number, reason)

    def keep(self):
        self.kept.append(self.number)


@pytest.mark.parametrize(
    ("settings", "values", "end"),
    [
        ({"patience": 2}, [0.1, 0.3, 0.2, 0.3, 0.9], 4),
        ({"patience": 2}, [0.1, 0.3, None, 0.2, None, 0.4, 0.4, 0.4], 8),
        ({"patience": 1}, [0.1, 0.2, 0.3], None),
        ({"patience": 2, "min_delta": 0.15}, [0.1, 0.2, 0.3, 0.4, 0.4], 5),
        ({"patience": 1, "metric": "loss"}, [3.0, 2.0, 2.5], 3),
        ({"patience": 1, "goal": "min"}, [0.3, 0.2, 0.2], 3),
        ({"patience": 1}, [None, None], None),
    ],
)
@pytest.mark.filterwarnings("ignore:EarlyStopping waits")
def test_early_stopping_counts_measurements_without_improvement(settings, values, end):
    stopped = Faked(fs.EarlyStopping(**settings), values).stopped
    assert (stopped and stopped[0]) == end
    assert not end or settings.get("metric", "accuracy") in stopped[1]


def test_keep_best_keeps_the_first_of_the_best():
    assert Faked(fs.KeepBest(), [0.2, 0.1, 0.4, None, 0.4, 0.5]).kept == [1, 3, 6]
    assert Faked(fs.KeepBest("loss"), [0.2, 0.1, 0.4, 0.0]).kept == [1, 2, 4]


def test_a_metric_that_nobody_records_is_told_once():
    with pytest.warns(UserWarning, match="EarlyStopping waits for 'acuracy'.*there are lr") as told:
        Faked(fs.EarlyStopping("acuracy"), [None] * 6, every=3)
    assert len(told) == 1


LISTS = {"callbacks": ["keep_best", {"name": "early_stopping", "patience": 3}]}


def test_lists_are_written_and_read_back_and_are_absent_where_they_are_empty():
    config = config_lib.from_dict(LISTS)
    assert config.callbacks == (fs.KeepBest(), fs.EarlyStopping(patience=3))
    assert config_lib.from_dict(config_lib.to_dict(config)) == config
    assert config_lib.flat(config)["callbacks.1.patience"] == 3
    assert not {"observers", "meters", "callbacks"} & set(config_lib.to_dict(RunConfig()))


def test_a_sweep_varies_callbacks_as_it_does_algorithms():
    made = sweep_files.from_mapping({"methods": {"whole": {}, "short": LISTS}, "base": {"rounds": 3}})
    assert [len(job.config.callbacks) for job in made.jobs] == [0, 2]


@pytest.mark.parametrize(
    ("mapping", "told"),
    [
        ({"callbacks": ["early_stoping"]}, r"callbacks\.0\.name = 'early_stoping'.*mean early_stopping"),
        ({"callbacks": ["keep_best", {"name": "early_stopping", "patiense": 3}]}, r"callbacks\.1\.patiense"),
        ({"callbacks": [{"name": "early_stopping", "patience": "x"}]}, r"patience = 'x'.*whole number"),
        ({"callbacks": [{"name": "early_stopping", "patience": 0}]}, r"early_stopping\.patience = 0"),
        ({"callbacks": "keep_best"}, r"a list is wanted.*Write \[keep_best\]"),
        ({"callbacks": [{"patience": 3}]}, r"a mapping with `name` is wanted"),
        ({"callbacks": ["nowhere:Thing"]}, r"callbacks\.0\.name.*cannot be imported"),
        ({"observers": ["peel"]}, r"observers\.0\.name = 'peel'.*section.*peel: \{every"),
        ({"meters": ["collections:OrderedDict"]}, r"it cannot be used as a meter.*build\(context\)"),
    ],
)
def test_what_no_file_may_say_of_them(mapping, told):
    with pytest.raises(UserError, match=told):
        config_lib.from_dict(mapping)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"callbacks": [fs.KeepBest]}, r"this is a class.*KeepBest\(\)"),
        ({"callbacks": ["keep_best"]}, r"such as KeepBest\(\); names are for YAML"),
        (
            {"observers": [types.SimpleNamespace()]},
            r"observers\.0.*used as an observer.*method build\(context\)",
        ),
        ({"meters": [np.zeros(2)]}, r"meters\.0.*this cannot be used as a meter"),
    ],
)
def test_what_python_may_not_give(given, told):
    with pytest.raises(UserError, match=told):
        RunConfig(**given)
