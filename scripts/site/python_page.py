"""The pages `reference/python.md` and `reference/python/*.md`: Python names, from their docstrings."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
from typing import Any

import generated

import fedjax_sim as fs
from fedjax_sim.algorithms.table import __all__ as METHODS


@dataclasses.dataclass(frozen=True)
class Page:
    """A page of the reference of Python names.

    Attributes:
      title: its heading.
      about: what stands below.
      names: public names, `fs.NAME`.
      modules: module -> members that are shown, or all of its public ones if there are none here.
      storeys: where a public name comes from that no page has in its list, to be put here.
    """

    title: str
    about: str
    names: tuple[str, ...] = ()
    modules: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    storeys: tuple[str, ...] = ()


PAGES = {
    "running": Page(
        "Running",
        "Start a run, go on with it, open it, and ask what it will need.",
        ("run", "resume", "load", "run_many", "plan", "Run", "Simulation", "UserError"),
        {"fedjax_sim.runs": ("Interrupted", "Terminated")},
        ("runs", "core", "engine"),
    ),
    "configuration": Page(
        "Configuration",
        "The sections of a run's configuration. The [configuration](../configuration.md) has every "
        "field, with what "
        "it takes and what it changes.",
        (
            "RunConfig",
            "DataConfig",
            "PartitionConfig",
            "ModelConfig",
            "LocalConfig",
            "CohortConfig",
            "EvaluationConfig",
            "PeelConfig",
            "InertiaConfig",
            "InitialConfig",
            "ExecutionConfig",
            "OutputConfig",
        ),
        {"fedjax_sim.config": ("read_config", "from_dict", "to_dict", "dump")},
        ("config",),
    ),
    "methods": Page(
        "Methods",
        "The settings of each method, as a Python class. [Methods](../methods.md) has what each does,"
        " its source "
        "and its cost.",
        ("algorithms", *METHODS),
        {},
        ("algorithms",),
    ),
    "your-method": Page(
        "Your own method",
        "An algorithm is a record of pure functions: [the tutorial](../../tutorials/your-method.md) "
        "writes one.",
        ("Algorithm", "Context", "LocalRule", "Starts", "Step", "stacked", "batch_order"),
        {
            "fedjax_sim.core.algorithm": (
                "Cohort",
                "Results",
                "CohortChooser",
                "Init",
                "Dispatch",
                "Merge",
                "Deploy",
                "Weights",
                "PersonalModels",
                "SlotModels",
                "WithModel",
                "InitClient",
                "Receive",
                "Send",
                "StartRound",
                "GradientRule",
                "WantsLastGradient",
                "FinishRound",
                "PersonalModel",
            ),
            "fedjax_sim.core.gradients": (),
            "fedjax_sim.algorithms.wrap": (),
        },
    ),
    "data": Page(
        "Data and partitions",
        "Sets, where they come from, and which client holds what. [Concept](../../data.md), "
        "[tutorial](../../tutorials/your-data.md).",
        ("data", "Dataset", "TableDataset", "Partition"),
        {},
        ("data",),
    ),
    "models": Page(
        "Models",
        "The networks that are shipped, and what adapts one of your own. "
        "[Tutorial](../../tutorials/your-model.md).",
        ("models", "Model", "PeelPoint", "from_flax"),
        {},
        ("models",),
    ),
    "tasks": Page(
        "Tasks",
        "What is learned: what a sample is, its loss, and its metrics. "
        "[Tutorial](../../tutorials/your-task.md).",
        (),
        {
            "fedjax_sim.core.task": (),
            "fedjax_sim.tasks.classification": (),
            "fedjax_sim.tasks.regression": ("regression", "squared_error"),
        },
        ("tasks",),
    ),
    "diagnostics": Page(
        "Diagnostics",
        "What measures rounds, and what reads the measurements. [Concept](../../diagnostics.md), "
        "[tutorial](../../tutorials/your-diagnostic.md), [every metric](../metrics.md).",
        ("Measurement", "DiagnosticContext", "peel", "inertia", "landscape"),
        {
            "fedjax_sim.engine.observing": ("Observer", "Instrument", "ObserverRequest"),
            "fedjax_sim.engine.setup": ("ObserverConfig", "MeterConfig", "Setup"),
            "fedjax_sim.engine.round": ("MergeView", "Meter"),
            "fedjax_sim.engine.device_data": ("DeviceData",),
            "fedjax_sim.reports.peel.report": ("draw",),
            "fedjax_sim.reports.inertia.report": ("draw",),
            "fedjax_sim.reports.landscape.report": ("draw",),
        },
        ("probes",),
    ),
    "callbacks": Page(
        "Callbacks",
        "What acts on a run between its rounds. [Tutorial](../../tutorials/your-callback.md).",
        ("EarlyStopping", "KeepBest"),
        {"fedjax_sim.config.callbacks": ("Callback", "UnderWay")},
    ),
    "records": Page(
        "Records",
        "What a run writes down, and how to read it. [Every metric](../metrics.md), [a run's "
        "folder](../folder.md).",
        ("Row",),
        {"fedjax_sim.records": ("Table", "Lap", "read_parquet", "write_parquet", "goal_of")},
        ("records",),
    ),
    "studies": Page(
        "Studies",
        "Sweeps, comparisons and searches. [How-to](../../runs.md), [a sweep's file](../sweep-file.md).",
        ("sweep", "compare", "tune", "choice", "integers", "log_uniform", "uniform"),
        {
            "fedjax_sim.studies.comparison": ("Comparison",),
            "fedjax_sim.studies.search": ("Found",),
            "fedjax_sim.config.sweep_files": ("Sweep", "Job"),
        },
        ("studies", "reports"),
    ),
}


def names() -> dict[str, list[str]]:
    """Page -> the public names on it; each is on exactly one."""
    found = {page: list(about.names) for page, about in PAGES.items()}
    placed = {name for listed in found.values() for name in listed}
    for name in fs.__all__:
        if name not in placed:
            found[_home(getattr(fs, name))].append(name)
    return {page: [name for name in listed if name in fs.__all__] for page, listed in found.items()}


def _home(thing: Any) -> str:
    """The page of a name that no page lists, by the module that it comes from."""
    module = getattr(thing, "__module__", getattr(thing, "__name__", ""))
    if "callbacks" in module:
        return "callbacks"
    storey = module.split(".")[1] if "." in module else ""
    return next((page for page, about in PAGES.items() if storey in about.storeys), "running")


def page(name: str) -> str:
    """The Markdown of a page of `PAGES`."""
    about = PAGES[name]
    out = [f"# {about.title}", "", about.about, ""]
    listed = names()[name]
    for one in listed:
        thing, path = getattr(fs, one), f"fedjax_sim.{one}"
        if one == "algorithms":
            out += _directive(path, members=[])
        elif inspect.ismodule(thing):
            out += _public(path, thing, listed)
        elif one in METHODS:  # whose names are made by the table, which is not executed to be read
            out += [f"[](){{ #{path} }}", "", *_directive(f"{thing.__module__}.{one}")]
        else:
            out += _directive(path)
    for module, members in about.modules.items():
        for path in [f"{module}.{member}" for member in members] or [module]:
            out += _directive(path)
    return "\n".join(out)


def members(module: Any, elsewhere: list[str]) -> tuple[list[str], list[str]]:
    """(What a public module shows, what of it has a submodule's name); without what is `elsewhere`."""
    shown = [one for one in getattr(module, "__all__", []) if one not in elsewhere]
    hidden = [one for one in shown if _hidden(module, one)]
    return [one for one in shown if one not in hidden], hidden


def _hidden(module: Any, name: str) -> bool:
    """Whether a reader of the sources would take a function or class for the submodule of its name."""
    package = hasattr(module, "__path__") and not inspect.ismodule(getattr(module, name))
    return package and importlib.util.find_spec(f"{module.__name__}.{name}") is not None


def _public(path: str, module: Any, listed: list[str]) -> list[str]:
    """A public module with what is in it."""
    if not hasattr(module, "__all__"):
        return _directive(path)
    shown, hidden = members(module, listed)
    out = _directive(path, members=shown)
    for name in hidden:
        out += [f"[](){{ #{path}.{name} }}", ""]
        out += _directive(f"{getattr(module, name).__module__}.{name}", level=3)
    return out


def _directive(path: str, level: int = 2, members: list[str] | None = None) -> list[str]:
    """What mkdocstrings replaces with the documentation of a name; members: None for all of them."""
    shown = (
        []
        if members is None
        else [f"      members: [{', '.join(members)}]" if members else "      members: false"]
    )
    return [f"::: {path}", "    options:", f"      heading_level: {level}", *shown, ""]


def overview() -> str:
    """The page `reference/python.md`: every public name in a line."""
    out = [
        "# Python",
        "",
        "`import fedjax_sim as fs` has all of it. A public name is one of `fs.__all__`: it does not "
        "change or go "
        "without [notice](../about/releases.md). The pages show modules besides, to which examples "
        "refer by their "
        "path.",
        "",
    ]
    for name, listed in names().items():
        about = PAGES[name]
        # Written for a page one folder below.
        out += [f"## [{about.title}](python/{name}.md)", "", about.about.replace("](../", "]("), ""]
        rows = [
            [f"[`fs.{one}`](python/{name}.md#fedjax_sim.{one})", _line(getattr(fs, one))] for one in listed
        ]
        for module, members in about.modules.items():
            links = ", ".join(f"[`{one}`](python/{name}.md#{module}.{one})" for one in members)
            link = f"`{module}`" if members else f"[`{module}`](python/{name}.md#{module})"
            rows.append([link, links or _line(importlib.import_module(module))])
        out += [generated.table(["name", "what it is"], rows), ""]
    return "\n".join(out)


def _line(thing: Any) -> str:
    """The first sentence of a docstring."""
    doc = inspect.getdoc(thing) or ""
    first = " ".join(doc.split("\n\n")[0].split())
    return generated.escaped(first)
