"""How often do orderings of nine methods by three seeds hold under 64? Tables, a picture and text.

    python experiments/seeds/survival.py [STUDY …] [--out DIR] [--draws N]

STUDY is digits or femnist; both unless told otherwise. Where the runs of a study are there (`results/STUDY`,
in folders or packed), their accuracies go to `accuracy.csv`, and versions, hardware and cost to
`provenance.json`. All else is made of these two files, which the repository keeps: no runs are needed for it.
"""

import argparse
import csv
import io
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fedjax_sim import runs
from fedjax_sim.config.sweep_files import Sweep, read_sweep
from fedjax_sim.core import paths
from fedjax_sim.core.errors import UserError
from fedjax_sim.records import plots
from fedjax_sim.runs.folder import Folder
from fedjax_sim.studies import orderings
from fedjax_sim.studies.orderings import Gaps, Survival

HERE = Path(__file__).parent
STUDIES = ("digits", "femnist")
SEEDS = (1, 2, 3, 5, 10, 20)
PUBLISHED = 3
WAYS: dict[str, dict[str, bool]] = {
    "paired": {},
    "own seeds": {"paired": False},
    "paired, other half": {"halves": True},
}
"""How k seeds are drawn, and what is right; see `fedjax_sim.studies.orderings`."""
WAYS_IN_WORDS = {
    "paired": "the same for all methods",
    "own seeds": "of each method's own",
    "paired, other half": "the same for all methods, judged by seeds of which none is drawn",
}
RULES = {
    "deviations": "by more than both standard deviations together",
    "t-test": "by a t-test at 5 %",
}
TITLES = {
    "digits": "digits: an MLP, 50 clients, Dirichlet 0.3",
    "femnist": "FEMNIST: LeNet, 300 writers",
}
KINDS = {
    "end": "Scores: the mean of the last evaluations",
    "best round": "Scores: the best of all evaluations",
}
MADE_WITH = ("versions", "platform", "cpu", "devices", "git", "data")
"""What `provenance.json` repeats of the first run's."""


# --- what was run ---------------------------------------------------------------------------------------


def collect(sweep: Sweep) -> tuple[list[dict[str, Any]], dict[str, Any]] | None:
    """Accuracies of all runs of a sweep, and what they were made with; None if none of them is there.

    A run that diverged has neither accuracies nor a cost: it is not packed with the others.

    Raises:
      UserError: some are there, and others neither are nor have diverged.
    """
    there = [Folder(str(job.config.output.dir)) for job in sweep.jobs]
    done = [place.started and place.finished for place in there]
    if not any(done):
        return None
    diverged = _diverged(sweep)
    missing = [
        job for job, finished in zip(sweep.jobs, done, strict=True)
        if not finished and (job.method, job.seed) not in diverged
    ]  # fmt: skip
    if missing:
        why = f"{len(missing)} of {len(done)} runs are not finished"
        raise UserError("study", str(sweep.out), why, "Start the sweep again; it does what is missing.")
    rows, wall, cpu, made = [], 0.0, 0.0, {}
    for job, place in zip(sweep.jobs, there, strict=True):
        row = {"method": job.method, "seed": job.seed}
        if (job.method, job.seed) in diverged:
            rows.append(row | {"diverged": diverged[job.method, job.seed]})
            continue
        run = runs.load(place.path)
        rows.append(row | _named(*run.metrics.series(sweep.metric)))
        wall, cpu = wall + run.seconds, cpu + (run.cpu_seconds or 0.0)
        made = made or {key: place.records.provenance()[key] for key in MADE_WITH}
    made |= {"seconds": round(wall, 1), "cpu_seconds": round(cpu, 1), "runs": done.count(True)}
    return rows, made


def _diverged(sweep: Sweep) -> dict[tuple[str, int], str]:
    """By method and seed, in which round a run's updates ceased to be finite; of the sweep's last start."""
    path = Path(str(sweep.out)) / "sweep.json"
    jobs = json.loads(path.read_text())["jobs"] if path.is_file() else []
    found = {}
    for job in jobs:
        told = re.match(r"NonFiniteUpdate: .* in round (\d+) ", job["failure"] or "")
        if told:
            found[job["method"], job["seed"]] = told[1]
    return found


def _named(rounds: np.ndarray, values: np.ndarray) -> dict[str, float]:
    return {f"round {number}": float(value) for number, value in zip(rounds, values, strict=True)}


def scores_of(rows: Sequence[dict[str, Any]], last_k: int) -> tuple[list[str], dict[str, np.ndarray]]:
    """-> the methods of which no run diverged, and for each way to report a run f64[M, S]."""
    left_out = {row["method"] for row in rows if row.get("diverged")}
    methods = [method for method in dict.fromkeys(row["method"] for row in rows) if method not in left_out]
    seeds = sorted({int(row["seed"]) for row in rows})
    known = {(row["method"], int(row["seed"])): row for row in rows}
    rounds = list(dict.fromkeys(name for row in rows for name in row if name.startswith("round ")))
    curves = np.array([[[float(known[m, s][r]) for r in rounds] for s in seeds] for m in methods])
    return methods, {"end": curves[:, :, -last_k:].mean(2), "best round": curves.max(2)}


# --- what it says ---------------------------------------------------------------------------------------


def survivals(scores: np.ndarray, apart: np.ndarray, draws: int) -> dict[str, list[Survival]]:
    """For each of `WAYS`, what survives of 1, 2, … seeds."""
    most = {way: scores.shape[1] // (2 if "halves" in how else 1) for way, how in WAYS.items()}
    return {
        way: [orderings.survival(scores, k, apart=apart, draws=draws, **how) for k in SEEDS if k <= most[way]]
        for way, how in WAYS.items()
    }


def tables(
    methods: Sequence[str], gaps: Gaps, found: dict[str, list[Survival]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of survival.csv and of pairs.csv."""
    shares = []
    for way, several in found.items():
        for one in several:
            row: dict[str, Any] = {"drawn": way, "seeds": one.seeds}
            row |= {name: getattr(one, name) for name in ("best", "whole", "pair", "pair_apart", "tau")}
            for rule in RULES:
                for name in ("made", "reversed", "refuted"):
                    row[f"{rule}: {name}"] = getattr(one.claims[rule], name) if rule in one.claims else ""
            shares.append(row)
    pairs = []
    for a, b in itertools.combinations(range(len(methods)), 2):
        row = {"ahead": methods[a], "behind": methods[b], "gap": gaps.mean[a, b]}
        row |= {"low": gaps.low[a, b], "high": gaps.high[a, b], "apart": bool(gaps.apart[a, b])}
        for way, several in found.items():
            row |= {f"{way}, {one.seeds}": one.pairs[a, b] for one in several}
        pairs.append(row)
    return shares, pairs


def told_of_diverged(rows: Sequence[dict[str, Any]]) -> str:
    """A paragraph on methods that are left out; nothing if there are none."""
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows if row.get("diverged")):
        own = [row for row in rows if row["method"] == method]
        ended = sorted(int(row["diverged"]) for row in own if row["diverged"])
        where = ", ".join(map(str, ended))
        lines.append(
            f"**{method} is left out**: {len(ended)} of its {len(own)} runs diverged (an update was not "
            f"finite, in round {where}). What such a run should score would be a choice.\n"
        )
    return "\n".join(lines)


def report(
    name: str,
    methods: Sequence[str],
    scores: dict[str, np.ndarray],
    draws: int,
    made: dict[str, Any],
    left_out: str = "",
) -> tuple[dict[str, str], Figure]:
    """-> report.md and tables as CSV, by the file's name; the picture. Methods in the order of the truth."""
    texts, files, drawn = [f"# {TITLES[name]}\n", _cost(made), *filter(None, [left_out])], {}, None
    for kind, values in scores.items():
        order = orderings.order(values)
        names, values = [methods[int(place)] for place in order], values[order]
        gaps = orderings.gaps(values)
        found = survivals(values, gaps.apart, draws)
        shares, pairs = tables(names, gaps, found)
        suffix = "" if drawn is None else "_best_round"
        files |= {
            f"survival{suffix}.csv": comma_separated(shares),
            f"pairs{suffix}.csv": comma_separated(pairs),
        }
        texts += [f"## {KINDS[kind]}\n", *_in_words(names, gaps, found), _scores(names, values, gaps)]
        texts += [_level(names, values, gaps), _surviving(found)]
        if drawn is None:
            texts += [_claimed(found), *(_ahead(way, names, gaps, found) for way in ("paired", "own seeds"))]
            drawn = picture(f"{TITLES[name]}, {values.shape[1]} seeds", names, values, found)
    assert drawn is not None
    return files | {"report.md": "\n".join(texts)}, drawn


def _in_words(methods: Sequence[str], gaps: Gaps, found: dict[str, list[Survival]]) -> list[str]:
    """The answer in sentences, every number of them computed."""
    three = _published(found)
    lines = []
    for way, words in WAYS_IN_WORDS.items():
        best, whole, pair, apart = (
            _percent(getattr(three[way], share)) for share in ("best", "whole", "pair", "pair_apart")
        )
        lines.append(
            f"- {PUBLISHED} seeds, {words}: the best method is right in {best} of the draws, the whole order "
            f"in {whole}, a pair in {pair}, a pair that all seeds tell apart in {apart}."
        )
    for rule, meant in RULES.items():
        for way in ("paired", "own seeds"):
            claims = three[way].claims[rule]
            lines.append(
                f'- "A beats B" {meant}, {PUBLISHED} seeds, {way}: said of {_percent(claims.made)} of the '
                f"pairs. Of that {_percent(claims.reversed)} is the other way round under all seeds, and "
                f"{_percent(claims.refuted)} is so beyond doubt."
            )
    for way in ("paired", "own seeds"):
        needed = []
        for what, words in (("best", "best method"), ("whole", "whole order"), ("pair_apart", "pairs apart")):
            k = next((one.seeds for one in found[way] if getattr(one, what) >= 0.95), None)
            needed.append(f"{words} {f'more than {max(SEEDS)}' if k is None else k}")
        lines.append(f"- Seeds for 95 %, of the numbers tried, {way}: {', '.join(needed)}.")
    if not gaps.apart[0, 1]:
        lines.append(
            f"- {methods[0]} and {methods[1]}, first and second, are not apart: all seeds together do not "
            "know either which is best."
        )
    return [*lines, ""]


def _scores(methods: Sequence[str], values: np.ndarray, gaps: Gaps) -> str:
    wins = np.bincount(values.argmax(0), minlength=len(methods))
    rows = []
    for place, (method, row) in enumerate(zip(methods, values, strict=True)):
        ahead = _interval(gaps, place, place + 1) if place + 1 < len(methods) else ""
        numbers = [f"{number:.4f}" for number in (row.mean(), row.std(ddof=1), row.min(), row.max())]
        rows.append([method, *numbers, str(wins[place]), ahead])
    heads = ["method", "mean", "deviation", "lowest", "highest", "seeds under which it is best"]
    return _table([*heads, "ahead of the next by (95 %); * not apart"], rows)


def _level(methods: Sequence[str], values: np.ndarray, gaps: Gaps) -> str:
    upper = list(itertools.combinations(range(len(methods)), 2))
    level = [f"{methods[a]} and {methods[b]}" for a, b in upper if not gaps.apart[a, b]]
    shared = np.mean([np.corrcoef(values)[pair] for pair in upper])
    return (
        f"Of {len(upper)} pairs {values.shape[1]} seeds do not tell apart {len(level)}"
        f"{': ' if level else ''}{', '.join(level)}. (Paired bootstrap over seeds. Each interval stands by "
        "itself: of pairs that are level one in twenty would seem apart.) Scores of two methods under the "
        f"same seeds correlate by {shared:.2f} on average: that is what pairing takes out.\n"
    )


def _surviving(found: dict[str, list[Survival]]) -> str:
    rows = [
        [way, str(one.seeds)]
        + [_percent(share) for share in (one.best, one.whole, one.pair, one.pair_apart)]
        + [f"{one.tau:.2f}"]
        for way, several in found.items()
        for one in several
    ]
    heads = ["what k seeds have right", "k", "best", "whole order", "a pair", "a pair that is apart"]
    return _table([*heads, "Kendall's tau"], rows)


def _claimed(found: dict[str, list[Survival]]) -> str:
    rows = [
        [f"{rule}, {way}", str(one.seeds)]
        + [_percent(share) for share in (claims.made, claims.reversed, claims.refuted)]
        for rule in RULES
        for way in ("paired", "own seeds")
        for one in found[way]
        if (claims := one.claims.get(rule))
    ]
    return _table(['"A beats B" by', "k", "of all pairs", "of these reversed", "beyond doubt"], rows)


def _ahead(way: str, methods: Sequence[str], gaps: Gaps, found: dict[str, list[Survival]]) -> str:
    """How often the row is ahead of the column; `pairs` says how often the order is right."""
    right = _published(found)[way].pairs
    rows = []
    for a, method in enumerate(methods):
        shares = [right[a, b] if a < b else 1 - right[a, b] for b in range(len(methods))]
        marks = ["" if apart else " *" for apart in gaps.apart[a]]
        cells = [_percent(share) + mark for share, mark in zip(shares, marks, strict=True)]
        rows.append([method, *cells[:a], "", *cells[a + 1 :]])
    return _table([f"row ahead of column, {PUBLISHED} seeds, {way}; * not apart", *methods], rows)


def _published(found: dict[str, list[Survival]]) -> dict[str, Survival]:
    return {way: next(one for one in several if one.seeds == PUBLISHED) for way, several in found.items()}


def _cost(made: dict[str, Any]) -> str:
    if not made:
        return "What it was made with is not known: there is no provenance.json.\n"
    return (
        f"{made['runs']} runs, {made['seconds'] / 60:.0f} minutes of rounds "
        f"({made['cpu_seconds'] / 60:.0f} CPU minutes; of runs side by side each has its equal share). "
        "Versions and hardware: provenance.json.\n"
    )


def _interval(gaps: Gaps, a: int, b: int) -> str:
    text = f"{gaps.mean[a, b]:+.4f} ({gaps.low[a, b]:+.4f} to {gaps.high[a, b]:+.4f})"
    return text if gaps.apart[a, b] else f"{text} *"


def _percent(share: float) -> str:
    return "–" if np.isnan(share) else f"{100 * share:.1f} %"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def comma_separated(rows: Sequence[dict[str, Any]]) -> str:
    """CSV of rows, nothing where one lacks a key; numbers with six digits."""
    out = io.StringIO()
    writer = csv.DictWriter(
        out, list(dict.fromkeys(key for row in rows for key in row)), restval="", lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    return out.getvalue()


# --- the picture ----------------------------------------------------------------------------------------


def picture(
    title: str, methods: Sequence[str], values: np.ndarray, found: dict[str, list[Survival]]
) -> Figure:
    """Left the scores of all seeds, best method on top; right what survives of k seeds. values f64[M, S]."""
    figure, axes = plots.new_figure(2, width=4.6, height=3.6)
    left, right = axes.flat
    rng = np.random.default_rng(0)
    for place, row in enumerate(values):
        height = len(values) - 1 - place
        left.plot(
            row, height + rng.uniform(-0.28, 0.28, len(row)), "o", color=plots.COLOURS[0], alpha=0.35, ms=2.5
        )
        left.plot([row.mean()] * 2, [height - 0.38, height + 0.38], color=plots.COLOURS[1], lw=1.8)
    left.set_yticks(range(len(values)), list(reversed(methods)))
    plots.dress(left, "", along="test accuracy, a dot a seed")
    for colour, (what, label) in enumerate(
        (("best", "best method"), ("whole", "whole order"), ("pair", "a pair"))
    ):
        for dash, (way, several) in zip(("-", "--", ":"), found.items(), strict=True):
            seeds, shares = [one.seeds for one in several], [getattr(one, what) for one in several]
            right.plot(
                seeds,
                shares,
                dash,
                color=plots.COLOURS[colour],
                lw=1.4,
                marker="o",
                ms=3,
                label=f"{label}, {way}",
            )
    right.axvline(PUBLISHED, color="0.7", lw=0.8, zorder=0)
    right.set_xscale("log")
    right.set_xticks(SEEDS, [str(k) for k in SEEDS])
    right.minorticks_off()
    right.set_ylim(0, 1.02)
    plots.dress(right, "share of draws in which it is right", along="seeds")
    plots.legend(figure, np.array([[right]]), below=True)
    figure.suptitle(title, fontsize=9)
    return figure


# --- all of it ------------------------------------------------------------------------------------------


def analyse(name: str, out: Path, sweep: Sweep, draws: int) -> None:
    """Makes everything of one study in its folder."""
    out.mkdir(parents=True, exist_ok=True)
    if (collected := collect(sweep)) is not None:
        _write(out / "accuracy.csv", comma_separated(collected[0]))
        _write(out / "provenance.json", json.dumps(collected[1], indent=2) + "\n")
    if not (out / "accuracy.csv").is_file():
        fix = f"Run it: fedjax-sim sweep experiments/seeds/{name}.yaml --together"
        raise UserError("study", name, f"there are no runs of it in {sweep.out}", fix)
    with (out / "accuracy.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    methods, scores = scores_of(rows, sweep.last_k)
    made = out / "provenance.json"
    known = json.loads(made.read_text()) if made.is_file() else {}
    files, drawn = report(name, methods, scores, draws, known, told_of_diverged(rows))
    for file, content in files.items():
        _write(out / file, content)
    plots.save(drawn, out / "survival.png")


def _write(path: Path, text: str) -> None:
    with paths.whole(path) as unfinished:
        unfinished.write_text(text)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="What survives of an ordering by few seeds.")
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=f"of {', '.join(STUDIES)}; default: all")
    parser.add_argument(
        "--out", type=Path, default=HERE / "results", help="a folder for each study is made there"
    )
    parser.add_argument("--draws", type=int, default=20_000)
    given = parser.parse_args(arguments)
    for name in given.studies or STUDIES:
        if name not in STUDIES:
            parser.error(f"{name} is not one of {', '.join(STUDIES)}")
        analyse(name, given.out / name, read_sweep(HERE / f"{name}.yaml"), given.draws)
        print(f"written to {given.out / name}")


if __name__ == "__main__":
    main()
