"""A page of a run, of a sweep, or of one that is under way: one HTML file that needs nothing else.

import fedjax_sim as fs

fs.report("runs/first")                       # runs/first/report.html
fs.report("study.yaml", out="study.html")     # a sweep, by its file
fs.report(["runs/first", "runs/second"], out="both.html")
"""

import os
import time
import webbrowser
from collections.abc import Callable
from pathlib import Path

from fedjax_sim.core import paths
from fedjax_sim.core.errors import NotWritten, UserError
from fedjax_sim.reports import shared
from fedjax_sim.reports.page import entries
from fedjax_sim.runs import Run
from fedjax_sim.studies.sources import Given, Study, find

NAME = "report.html"


def report(
    given: Given,
    out: str | Path | None = None,
    *,
    watch: float | None = None,
    open: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> Path:
    """Writes one self-contained HTML page of a run, of several, or of a sweep, finished or under way.

    Args:
      given: what it is of, see `fedjax_sim.studies.sources.Given`.
      out: the file, or a folder for `report.html`; None: `report.html` in the folder of the run or of the
        sweep, or beside the first of several runs.
      watch: seconds between looks: the page is written again whenever a record changes, until every run is
        at its end, or until Ctrl-C; it then reads itself again in the browser. None: it is written once.
      open: whether the browser opens it, once it is there.
      tell: is given a line for each time that the page is written.

    Returns:
      The file.

    Raises:
      UserError: there is no run, its records are damaged, or the file cannot be written.
    """
    if watch is not None and not watch > 0:
        raise UserError("watch", watch, "it must be a number of seconds above 0", "Give one, such as 10.")
    known: dict[Path, Run] = {}
    study = find(given, known)
    path = _target(out, study)
    try:
        _write(path, study, _refresh(study, watch), tell)
        if open:
            webbrowser.open(path.as_uri())
        seen = None  # what changes while it is read, or written, is seen at the first look
        while watch is not None and not study.over:
            time.sleep(watch)
            found = entries.signature(study.folders)
            if found == seen and study.whole:
                continue
            known_before = study.folders
            study = find(given, known)
            if found != seen or study.folders != known_before:
                _write(path, study, _refresh(study, watch), tell)
            seen = found
    except KeyboardInterrupt:
        if watch is None:
            raise
        _write(path, find(given, known), None, tell)
    return path


def _refresh(study: Study, watch: float | None) -> int | None:
    return None if watch is None or study.over else max(1, round(watch))


# --- where it goes --------------------------------------------------------------------------------------


def _target(out: str | Path | None, study: Study) -> Path:
    if out is None:
        if study.home is None:
            raise UserError("out", None, "the run is in memory and has no folder", "Say where: out=….")
        return study.home / NAME
    path = paths.local(out, "out").absolute()
    return path / NAME if path.is_dir() else path


def _write(path: Path, study: Study, refresh: int | None, tell: Callable[[str], None]) -> None:
    from fedjax_sim.studies import pages  # with Matplotlib, which loads when something is drawn

    text = pages.html_of(study, path, refresh)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with paths.whole(path, f".{os.getpid()}") as unfinished:
            unfinished.write_text(text, encoding="utf-8")
    except OSError as error:
        raise NotWritten.of("out", str(path), error, shared.AGAIN) from None
    tell(f"wrote {path} ({len(text.encode()) / 1000:,.0f} kB)")
