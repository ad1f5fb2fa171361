"""The configurations that the repository publishes are ones that it can run."""

from pathlib import Path

import pytest

from fedjax_sim import config, data, models, runs
from fedjax_sim.config import search_files, sweep_files
from fedjax_sim.runs import packs

ROOT = Path(__file__).parents[1]
STUDIES = sorted(path for depth in ("*", "*/*") for path in (ROOT / "experiments").glob(f"{depth}.yaml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_study_loads_and_says_its_command(path):
    if "space" in config.read_yaml(path):
        assert search_files.read_search(path).out.name == path.stem
        assert f"fedjax-sim tune {path.relative_to(ROOT)}" in path.read_text().split("\nbase:")[0]
        return
    sweep = "base" in config.read_yaml(path)
    wanted = (
        [job.config for job in sweep_files.read_sweep(path).jobs] if sweep else [config.read_config(path)]
    )
    for one in wanted:
        assert one.model.name in models.names()
        assert one.data.source in data.names() or one.data.source in data.PRESETS
    folders = {one.output.dir for one in wanted}
    assert len(folders) == len(wanted) and None not in folders
    command = f"fedjax-sim {'sweep' if sweep else 'run'} {path.relative_to(ROOT)}"
    if path.stem == "demo":  # which comes with the package
        command = "fedjax-sim demo"
    head = path.read_text().split("\nbase:" if sweep else "\nrounds:")[0]
    assert command in head


def test_published_runs_are_packed_and_still_load():
    """Every configuration is read, and of each study the records of one run."""
    published = sorted((ROOT / "experiments").rglob(packs.RUNS + ".json"))
    assert published and not list((ROOT / "experiments").rglob("runs/**/config.yaml"))
    for path in published:
        pack = packs.Pack(path.with_name(packs.RUNS))
        for name in pack.names():
            packs.Packed(pack, name).config()
        assert runs.load(pack.runs / pack.names()[-1]).finished
