"""From JSON lines to a Markdown report: medians, spread, ratios, memory, and what was not run.

`python report.py results.jsonl` writes `results.md` beside it; `run.py` does so by itself. A line's `kind` is
`machine` (once, first), `peak`, `check`, `run`, `failed`, `not_run` or `dropped`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from common import ALL, CHECKS, WORKLOADS, Workload
from plan import OURS, TITLES

Line = dict[str, Any]
NOISE = 0.1
"""Neighbours' share of the machine from which a run is called noisy."""


def read(path: Path) -> list[Line]:
    """The lines of a results file.

    Raises:
      ValueError: a line is not a JSON object with a `kind`; names file and line number.
    """
    lines = []
    for number, text in enumerate(path.read_text().splitlines(), 1):
        try:
            line = json.loads(text)
            line["kind"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not a line of results: {text[:80]!r}") from error
        lines.append(line)
    return lines


def seconds_per_round(run: Line) -> float:
    """Median over the timed rounds of one process."""
    return statistics.median(run["seconds"])


def _median_of(runs: Sequence[Line]) -> float:
    """Median over repetitions of a process's median round."""
    return statistics.median(seconds_per_round(run) for run in runs)


def best_variant(runs: Iterable[Line]) -> list[Line]:
    """Of one peer's runs on one workload, those of its fastest variant.

    Only variants with as many repetitions as the most-repeated one compete: the others were dropped
    after their first because a sibling was clearly faster.
    """
    by_name: dict[str, list[Line]] = {}
    for run in runs:
        by_name.setdefault(run["variant"], []).append(run)
    if not by_name:
        return []
    most = max(len(group) for group in by_name.values())
    return min((group for group in by_name.values() if len(group) == most), key=_median_of)


def ratios(theirs: Sequence[Line], ours: Sequence[Line]) -> list[float]:
    """Their seconds over ours, one for each repetition that both have: above 1, we are faster."""
    own = {run["repetition"]: seconds_per_round(run) for run in ours}
    return [seconds_per_round(run) / own[run["repetition"]] for run in theirs if run["repetition"] in own]


def _number(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f}" if value >= 1 else f"{value:.3g}"


def _spread(values: Sequence[float], suffix: str = "") -> str:
    """Median, and smallest to largest where there are several."""
    middle = _number(statistics.median(values)) + suffix
    if len(values) == 1:
        return middle
    return f"{middle} ({_number(min(values))}–{_number(max(values))})"


def row(peer: str, runs: Sequence[Line], ours: Sequence[Line], workload: Workload, peak: float | None) -> str:
    """One line of a workload's table; `runs` are those of the peer's best variant, `peak` in GFLOP/s."""
    seconds = [s for run in runs for s in run["seconds"]]
    middle = _median_of(runs)
    rate = workload.flops_per_round / middle / 1e9
    against = ratios(runs, ours)
    noisy = any((run.get("neighbours") or 0) > NOISE for run in runs)
    cells = [
        TITLES[peer] + (" *" if noisy else ""),
        runs[0]["variant"],
        _spread([middle, min(seconds), max(seconds)]),
        _number(workload.images_per_round / middle),
        _spread(against, "×") if against else "–",
        _number(rate) + (f" ({rate / peak:.1%})" if peak else ""),
        _spread([run["warmup_seconds"][0] for run in runs]),
        _number(max(run["peak_rss_mb"] for run in runs)),
        f"{runs[0]['loss_of_start']:.3f} → {statistics.median(run['loss_at_end'] for run in runs):.3f}",
    ]
    return "| " + " | ".join(cells) + " |"


HEADINGS = (
    "simulator",
    "best variant",
    "s/round (min–max)",
    "images/s",
    "time against ours (min–max)",
    "GFLOP/s (of peak)",
    "first round, s",
    "peak RSS, MiB",
    "held-out loss",
)


def table(workload: Workload, lines: Sequence[Line]) -> str:
    """A workload's section: what it is, one row for each peer that ran, a list of those that did not."""
    here = [line for line in lines if line.get("workload") == workload.name]
    peaks = [line["best_gflops"] for line in lines if line["kind"] == "peak"]
    best = {
        peer: best_variant(line for line in here if line["kind"] == "run" and line["peer"] == peer)
        for peer in TITLES
    }
    text = [
        f"## {workload.name}",
        "",
        f"{workload.model}, {workload.parameters:,} parameters; {workload.cohort} of {workload.population} "
        f"clients a round, {workload.samples} samples each, batch {workload.batch}, {workload.epochs} local "
        f"epoch{'s' * (workload.epochs > 1)}; {workload.flops_per_round / 1e9:,.3g} GFLOP a round.",
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "|" + "---|" * len(HEADINGS),
    ]
    text += [
        row(peer, runs, best[OURS], workload, max(peaks, default=None)) for peer, runs in best.items() if runs
    ]
    notes = []
    for line in here:
        name = TITLES.get(line.get("peer", ""), "")
        if line["kind"] == "not_run":
            notes.append(f"- {name}: not run: {line['why']}.")
        elif line["kind"] == "failed":
            notes.append(
                f"- {name}, {line['variant']}, repetition {line['repetition']}: failed: {line['why']}."
            )
        elif line["kind"] == "dropped":
            notes.append(f"- {name}, {line['variant']}: {_number(line['seconds'])} s a round; not repeated.")
    return "\n".join([*text, *([""] if notes else []), *dict.fromkeys(notes)])


def disagreements(lines: Sequence[Line], tolerance: float = 1e-3) -> list[str]:
    """Where frameworks did not compute the same thing: each a sentence that names the workload.

    The shared initial weights must have the same held-out loss everywhere, and so must the model after the
    rounds of a check workload.
    """
    notes = []
    for name in ALL:
        here = [line for line in lines if line["kind"] in ("run", "check") and line["workload"] == name]
        for key in ("loss_of_start", "loss_at_end") if name in CHECKS else ("loss_of_start",):
            values = {f"{line['peer']} {line[key]}": line[key] for line in here}
            if values and max(values.values()) - min(values.values()) > tolerance:
                notes.append(
                    f"**{name}: {key} differs: {', '.join(values)}. Not the same model, data or steps.**"
                )
    return notes


def check_table(lines: Sequence[Line]) -> list[str]:
    """What each peer computed on the check workloads; nothing if they were not run."""
    done = [line for line in lines if line["kind"] == "check"]
    if not done:
        return []
    peers = [peer for peer in TITLES if any(line["peer"] == peer for line in done)]
    text = [
        "## The same arithmetic",
        "",
        "Held-out loss after two rounds of full batches and full cohorts.",
        "",
    ]
    text += ["| check | " + " | ".join(TITLES[peer] for peer in peers) + " |", "|---|" + "---|" * len(peers)]
    for name in CHECKS:
        ends = {line["peer"]: f"{line['loss_at_end']:.5f}" for line in done if line["workload"] == name}
        if ends:
            text.append(f"| {name} | " + " | ".join(ends.get(peer, "–") for peer in peers) + " |")
    failed = [line for line in lines if line["kind"] == "failed" and line["workload"] in CHECKS]
    text += [""] * bool(failed)
    text += [f"- {TITLES[line['peer']]}, {line['workload']}: failed: {line['why']}." for line in failed]
    return [*text, ""]


def _versions(lines: Sequence[Line]) -> list[str]:
    out = []
    for peer, title in TITLES.items():
        found = {
            ", ".join(f"{name} {version}" for name, version in line["versions"].items())
            for line in lines
            if line["kind"] in ("run", "check") and line["peer"] == peer
        }
        out += [f"- {title}: {text}" for text in sorted(found)]
    return out


def render(lines: Sequence[Line]) -> str:
    """The whole report in Markdown."""
    text = ["# Benchmark", ""]
    for line in lines:
        if line["kind"] == "machine":
            text.append(
                f"{line['cpu']}, {line['cores']} cores, {line['memory_gib']} GiB, {line['system']}; "
                f"{line['date']}; load average at the start {line['load']:.2f}; revision {line['revision']}."
            )
    peaks = [
        f"{line['library']}, {line['threads']} thread{'s' * (line['threads'] > 1)}: "
        f"{line['gflops']:g} (best {line['best_gflops']:g})"
        for line in lines
        if line["kind"] == "peak"
    ]
    if peaks:
        text += ["", "Matrix product, float32, GFLOP/s: " + "; ".join(peaks) + "."]
    text += ["", *disagreements(lines), "", *check_table(lines)]
    present = {line.get("workload") for line in lines}
    for workload in WORKLOADS.values():
        if workload.name in present:
            text += [table(workload, lines), ""]
    if any((line.get("neighbours") or 0) > NOISE for line in lines):
        text += [f"\\* other processes used more than {NOISE:.0%} of the machine during a run.", ""]
    text += ["## Versions", "", *_versions(lines), ""]
    return "\n".join(text)


def main() -> None:
    """Writes the report beside the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("results", type=Path, help="a file of JSON lines written by run.py")
    path = parser.parse_args().results
    if not path.exists():
        parser.error(f"argument results: {str(path)!r} does not exist; give a file that run.py wrote")
    path.with_suffix(".md").write_text(render(read(path)))


if __name__ == "__main__":
    main()
