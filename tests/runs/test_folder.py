import pytest

from fedjax_sim.cli import commands
from fedjax_sim.core.errors import UserError
from fedjax_sim.reports import shared
from fedjax_sim.reports.inertia import report as inertia
from fedjax_sim.reports.landscape import report as landscape
from fedjax_sim.reports.peel import report as peel
from fedjax_sim.studies import sweep


@pytest.mark.parametrize("report", [peel, inertia, landscape])
def test_of_two_processes_one_draws_into_a_folder(tmp_path, report):
    with report.drawing(tmp_path / "out") as home:
        (home.path / "report.md").write_text("of the first")
        with pytest.raises(UserError, match="another process is drawing"), report.drawing(tmp_path / "out"):
            pass
        with shared.drawing(tmp_path / "other"):
            pass
    assert [path.name for path in home.path.iterdir()] == ["report.md"]  # and no lock
    with report.drawing(tmp_path / "out"):
        pass


def test_of_a_start_that_is_refused_nothing_remains(tmp_path, capsys):
    run = "run --data.source digits --model.name mlp --partition.clients 4 --rounds 1 --evaluation.per-client"
    assert commands.main([*run.split(), "--output.dir", str(tmp_path / "runs/one")]) == 2
    assert not list(tmp_path.iterdir())
    (tmp_path / "runs").mkdir()
    assert commands.main([*run.split(), "--output.dir", str(tmp_path / "runs/one")]) == 2
    assert [path.name for path in tmp_path.rglob("*")] == ["runs"]
    assert commands.main(run.split()) == 2
    told = capsys.readouterr()
    assert "evaluation.per_client" in told.err and "output.dir is not set" not in told.out + told.err


def test_of_a_sweep_that_is_refused_nothing_remains(tmp_path):
    base = {"data": "digits", "model": "mlp", "rounds": 1, "partition": {"kind": "iid", "clients": 4}}
    base["evaluation"] = {"per_client": True}
    asked = sweep.from_mapping({"base": base, "out": str(tmp_path / "a/study")})
    with pytest.raises(UserError, match="per_client"):
        sweep.run(asked)
    assert not list(tmp_path.iterdir())
    (tmp_path / "a/study").mkdir(parents=True)
    (tmp_path / "a/study/sweep.json").write_text('{"of": "before"}')
    with pytest.raises(UserError, match="per_client"):
        sweep.run(asked)
    assert (tmp_path / "a/study/sweep.json").read_text() == '{"of": "before"}'
