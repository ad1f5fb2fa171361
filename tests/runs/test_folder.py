import pytest

from fedjax_sim.core.errors import UserError
from fedjax_sim.reports import shared
from fedjax_sim.reports.inertia import report as inertia
from fedjax_sim.reports.landscape import report as landscape
from fedjax_sim.reports.peel import report as peel


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
