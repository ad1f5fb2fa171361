"""The command line: `fedjax-sim COMMAND`, each of its commands one call of the library."""

import contextlib
import dataclasses
import os
import re
import shlex
import subprocess
import sys
import typing
import warnings
from collections.abc import Iterator, Sequence

from fedjax_sim.core.errors import NotWritten, UserError

USAGE = """usage: fedjax-sim COMMAND …

  run [FILE.yaml] [--flags]    run a configuration (--help lists every flag; --print-config prints the YAML)
  resume FOLDER                continue a run that was cut, or give a finished one more rounds (--help)
  sweep FILE.yaml              run a grid of configurations and compare them (--help)
  tune FILE.yaml               search settings by successive halving, over runs side by side (--help)
  peel FOLDER|SWEEP.yaml …     figures, tables and report of runs with --peel.every (--help)
  inertia FOLDER|SWEEP.yaml …  the same of runs with --inertia.measure: how far layers move (--help)
  landscape RUN|SWEEP.yaml …   how flat the minima of finished runs are: curves, Hessian, barriers (--help)
  compare RUN|SWEEP.yaml …     the table of finished runs: mean and deviation over seeds (--help)
  report PATH …                one HTML page of a run, a sweep or a study under way (--help)
  export FOLDER FILE           a run's weights as .npz or .safetensors (--help)
  plan [FILE.yaml] [--flags]   what a configuration will need in memory (--exact compiles it; --on v5e-256
                               compiles it for a machine that is not here)
  tune-machine [FILE.yaml] [--flags]
                               measures which layout of such runs is fastest on this machine, and keeps it for
                               those that begin later (--json; --forget drops what was kept)
  list                         algorithms, models, data sets, partitions

On several hosts start the same command on each, with --join: --join auto on a TPU pod or under Slurm, or
--join HOST:PORT --processes COUNT --process THIS, HOST being the first. They share one folder.

A first run: fedjax-sim run --algorithm fedmr --partition.clients 20 --output.dir runs/first
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
      The exit status: 0 done, 1 a sweep had failures, a plan does not fit, another process was lost, or
      something could not be written (a full disk; where that is standard output, the work was done),
      2 the user's mistake, 130 and 143 cut short by SIGINT and SIGTERM.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    _open_closed()
    out = _Output(sys.stdout)
    with contextlib.redirect_stdout(typing.cast(typing.TextIO, out)):
        status = _status(words)
        out.flush()
    if out.lost is None or isinstance(out.lost, BrokenPipeError):  # of `fedjax-sim list | head`
        return status
    _complain(f"error: standard output cannot be written: {getattr(out.lost, 'strerror', None) or out.lost}")
    return status or 1


def _status(words: list[str]) -> int:
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            return _dispatch(words)
    except UserError as error:
        if error.detail:
            _complain(error.detail)
        _complain("error: " + " ".join(str(error).split()))
        return 1 if isinstance(error, NotWritten) else 2
    except KeyboardInterrupt as stop:
        _complain(str(stop) or "interrupted")
        return 130
    except SystemExit as stop:
        if type(stop) is not SystemExit:
            _complain(str(stop))
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 2


def _dispatch(words: list[str]) -> int:
    commands = {
        "run": _run,
        "resume": _resume,
        "sweep": _sweep,
        "tune": _tune,
        "peel": _peel,
        "inertia": _inertia,
        "landscape": _landscape,
        "compare": _compare,
        "report": _report,
        "export": _export,
        "plan": _plan,
        "tune-machine": _tune_machine,
        "list": _list,
    }
    words = _joined(words)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        from fedjax_sim.runs.provenance import describe_versions

        print(", ".join(f"{name} {version}" for name, version in describe_versions().items()))
        return 0
    name, *rest = words
    if name not in commands:
        from fedjax_sim.core.fields import nearest

        raise UserError("command", name, "no such command", nearest(name, commands))
    return commands[name](rest)


def _joined(words: list[str]) -> list[str]:
    """Becomes one of several processes, if the command line asks for it anywhere. -> the other words."""
    given: dict[str, str] = {}
    others, left = [], list(words)
    while left:
        name, equals, value = left.pop(0).partition("=")
        if name not in ("--join", "--processes", "--process"):
            others.append(name + equals + value)
            continue
        if not equals and left and not left[0].startswith("--"):
            value = left.pop(0)
        if not value:
            raise UserError(name, None, "its value is missing", "See fedjax-sim --help.")
        if name in given:
            raise UserError(name, value, f"it is there twice, also as {given[name]}", "Give it once.")
        given[name] = value
    words = others
    if given:
        from fedjax_sim.engine import hosts

        if words and words[0] not in ("run", "resume", "sweep"):
            raise UserError("command", words[0], "this command runs in one process", "Leave --join out.")
        counts = {}
        for name in ("--processes", "--process"):
            if name in given and not given[name].isdecimal():
                raise UserError(name, given[name], "it must be a whole number", "Give one, such as 2.")
            counts[name[2:]] = int(given[name]) if name in given else None
        hosts.join(given.get("--join", ""), **counts)
    return words


def _run(words: list[str]) -> int:
    from fedjax_sim import runs
    from fedjax_sim.cli import flags
    from fedjax_sim.config import dump
    from fedjax_sim.engine import hosts

    switches = {"print-config": "print the configuration as YAML, and stop"}
    config, chosen = flags.parse(words, "run", "Runs a configuration.", switches)
    if chosen:
        print(dump(config), end="")
        return 0
    hosts.check_backend()
    if config.output.dir is None and hosts.first():
        print(
            "output.dir is not set: nothing of this run is kept. Set --output.dir FOLDER to keep it.",
            flush=True,
        )
    _told(runs.run(config))
    return 0


def _resume(words: list[str]) -> int:
    from fedjax_sim import runs

    usage = "fedjax-sim resume FOLDER [--rounds N] [--execution.debug]"
    switches = {"--execution.debug": True, "--execution.no-debug": False}
    debug = next((switches[word] for word in reversed(words) if word in switches), None)
    given, flags = _given([word for word in words if word not in switches], usage, _RESUME, "--rounds")
    if not isinstance(given, str):
        raise UserError("resume", " ".join(given), "it takes one FOLDER", f"Write {usage}.")
    rounds = flags.get("--rounds")
    if rounds is not None and not rounds.isdecimal():
        raise UserError(
            "--rounds", rounds, "it must be a whole number", "Give how many rounds the run is to have in all."
        )
    _told(runs.resume(given, rounds=None if rounds is None else int(rounds), debug=debug))
    return 0


_RESUME = """Continues a run that was cut, to the numbers that it would have had uncut. A finished run is only
shown, unless more rounds are asked of it.

  --rounds N    how many the run is to have in all. Its config.yaml will say so, and its numbers will be those
                of a run of so many from the start; where they cannot be, as under a cosine, it is refused
  --execution.debug    the rounds to come without jit, one client after another; see execution.debug of run"""


def _sweep(words: list[str]) -> int:
    from fedjax_sim import runs
    from fedjax_sim.engine import hosts
    from fedjax_sim.studies import sweep

    usage = "fedjax-sim sweep FILE.yaml [--together] [--part I/N | --launcher NAME | --pack | --unpack]"
    moves = {"--pack": sweep.pack, "--unpack": sweep.unpack}
    chosen = [word for word in words if word in moves]
    together = "--together" in words
    others, of_launcher = _of_launcher([word for word in words if word not in (*moves, "--together")])
    given, flags = _given(others, usage, _SWEEP, "--part", "--launcher")
    if not isinstance(given, str):
        raise UserError("sweep", " ".join(given), "it takes one FILE.yaml", f"Write {usage}.")
    part = re.fullmatch(r"(\d+)/(\d+)", flags.get("--part", "1/1"))
    if part is None:
        raise UserError(
            "--part", flags["--part"], "this is not I/N", "Write 1/4 for the first of four parts."
        )
    launcher = _launcher(flags.get("--launcher", "local"), of_launcher)
    asked = sweep.load(given)
    if len(chosen) + len(flags) > 1:
        why = "--part, --launcher, --pack and --unpack exclude each other"
        raise UserError("sweep", " ".join(words), why, f"Write {usage}.")
    if chosen:
        moved = hosts.on_first(lambda: moves[chosen[0]](asked))
        if hosts.first():
            print(moved.report())
        return 0
    again = f"continue with: {shlex.join(['fedjax-sim', 'sweep', *words])}"
    # Before a launcher's tasks have ended JAX does not start here, and there is one process.
    first = hosts.first if launcher == "local" else lambda: True
    try:
        with _without_loader_noise():
            outcome = sweep.run(
                asked,
                tell=lambda line: print(line, flush=True) if first() else None,
                part=(int(part[1]), int(part[2])),
                launcher=launcher,
                together=together,
            )
    except (runs.Interrupted, runs.Terminated) as stop:
        stop.advice = again
        raise
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; {again}") from None
    if hosts.first():
        print(outcome.report())
    return 1 if outcome.failures else 0


def _of_launcher(words: list[str]) -> tuple[list[str], dict[str, str]]:
    """(the other words, what is said by `--launcher.FIELD VALUE`)."""
    others: list[str] = []
    given: dict[str, str] = {}
    left = list(words)
    while left:
        word = left.pop(0)
        name, equals, value = word.partition("=")
        if not name.startswith("--launcher."):
            others.append(word)
            continue
        if not equals:
            if not left:
                raise UserError(name, None, "its value is missing", "See fedjax-sim sweep --help.")
            value = left.pop(0)
        given[name.removeprefix("--launcher.").replace("-", "_")] = value
    return others, given


def _launcher(name: str, given: dict[str, str]) -> typing.Any:
    """What `--launcher NAME` and its fields mean; the name itself where it stands for this process."""
    from fedjax_sim.cli.flags import meant
    from fedjax_sim.core import fields
    from fedjax_sim.studies import launchers

    if launchers.launcher_of(name) is None:  # which refuses a wrong name
        for field, value in given.items():
            fix = f"Choose --launcher {' or '.join(launchers.LAUNCHERS)}."
            raise UserError(f"launcher.{field}", value, f"the launcher is {name}", fix)
        return name
    kind = launchers.LAUNCHERS[name]
    hints, values = typing.get_type_hints(kind), {}
    known = [field.name for field in dataclasses.fields(kind)]
    for field, text in given.items():
        if field not in known:
            why = f"the launcher {name} has no such field"
            raise UserError(f"launcher.{field}", text, why, fields.nearest(field, known))
        value = meant(text, hints[field], f"launcher.{field}")
        values[field] = fields.coerce(value, hints[field], f"launcher.{field}", text=True)
    return kind(**values)


_SWEEP = """Runs every method in every setting with every seed, and writes tables, curves and sweep.json in
the sweep's folder. What is finished is not run again, what was cut goes on; a failure does not end the rest.

  --together       runs that differ in numbers alone (seeds, rates, a method's own) go side by side, as one
                   program, up to three times as fast where each is small; numbers are those of a run alone on
                   one device, up to rounding
  --part I/N       run the I-th of N parts alone: every N-th run, from the I-th. Start one part on each
                   machine, with one folder for all on a file system that they share, or each with its own,
                   and copy the runs together. Another start, without --part, writes the whole table
  --launcher NAME  where the runs are started: local, here, one after another (default); slurm, in one job
                   array; ray, as tasks of Ray. The last two need an extra (pip install submitit, or ray) and
                   a folder that all machines share. This process waits for them, and writes the table
  --launcher.FIELD VALUE    what each of its tasks asks for, and how many runs of the sweep it does:
                   both: cpus 1, gpus 0, memory-gb, runs 1
                   slurm: partition, account, qos, minutes 60, at-once (tasks side by side), requeues 20,
                   setup "[module load cuda]", sbatch "{constraint: a100}", wait true (false only submits)
                   ray: address (auto, or HOST:PORT), resources "{TPU: 4}", retries 3
  --pack           runs nothing. Moves the records of the finished runs into two files, runs.json and
                   runs.parquet. Later starts and all reports read them from there. Checkpoints, figures and
                   whatever else is in the runs' folders stay where they are
  --unpack         the reverse: writes the records into the runs' folders, and removes the two files"""


def _tune(words: list[str]) -> int:
    from fedjax_sim import runs
    from fedjax_sim.studies import search

    usage = "fedjax-sim tune FILE.yaml [--out DIR]"
    given, flags = _given(words, usage, _TUNE, "--out")
    if not isinstance(given, str):
        raise UserError("tune", " ".join(given), "it takes one FILE.yaml", f"Write {usage}.")
    asked = search.load(given)
    if "--out" in flags:
        asked = dataclasses.replace(asked, out=flags["--out"])
    again = f"continue with: {shlex.join(['fedjax-sim', 'tune', *words])}"
    try:
        with _without_loader_noise():
            found = search.run(asked, tell=lambda line: print(line, flush=True))
    except (runs.Interrupted, runs.Terminated) as stop:
        stop.advice = again
        raise
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; {again}") from None
    print(found.report())
    return 0


_TUNE = """Searches settings by successive halving: all trials come side by side to a first round, one in so
many goes on to a later one, and so on; those of the last comparison do all rounds. Needs an extra
(pip install optuna). The same command goes on with a search that was cut. The file says:

  base     a configuration, or the path of one
  space    dotted field -> {log_uniform: [0.001, 1]}, or uniform, integers, choice
  runs     trials; default: 27
  rungs    how often they are compared, the last time after all rounds; default: 3
  factor   one in so many goes on; default: 3
  metric   what they are compared by, and goal, max or min; default: the headline of the task
  seeds    runs of each trial, whose mean counts; default: 1
  sampler  what proposes trials: qmc, random or tpe; default: qmc
  out      the folder; default: runs/FILE

  --out DIR    another folder"""


def _compare(words: list[str]) -> int:
    from fedjax_sim.reports import shared
    from fedjax_sim.studies import tables

    usage = (
        "fedjax-sim compare RUN|SWEEP.yaml … [--out DIR] [--metric NAME] [--reference ROW] [--last-k K] "
        "[--rounds R,R]"
    )
    known = ("--metric", "--reference", "--last-k", "--rounds")
    given, flags = _given(words, usage, _COMPARE, "--out", *known)
    numbers = [flags.get("--last-k", "1"), *filter(None, flags.get("--rounds", "").split(","))]
    for number in numbers:
        if not number.isdecimal() or not int(number):
            raise UserError(
                "--last-k" if number is numbers[0] else "--rounds", number, "no number", "From 1."
            )
    table = tables.compare(
        given,
        metric=flags.get("--metric", "accuracy"),
        reference=flags.get("--reference"),
        last_k=int(numbers[0]),
        rounds_of_interest=tuple(map(int, numbers[1:])),
    )
    print(table.markdown())
    if "--out" in flags:
        for path in tables.write(shared.writable(flags["--out"]), table):
            print(f"wrote {path}")
    return 0


_COMPARE = """Prints the table of finished runs, as a sweep's: a row for each group of runs that differ in
nothing but the seed, mean and deviation over seeds, the best in bold. Of a sweep's file the finished runs are
taken, named as in its table.

  --out DIR          writes table.md, table.csv, table.tex, curves.png and curves.pdf there
  --metric NAME      of the table; default: accuracy
  --reference ROW    differences to that row as well, seed by seed
  --last-k K         mean of the newest K values; default: 1
  --rounds R,R       further tables, of the newest values up to these rounds"""


def _report(words: list[str]) -> int:
    from fedjax_sim.studies import report

    usage = "fedjax-sim report PATH … [--out FILE] [--watch [SECONDS]] [--open]"
    number = re.compile(r"\d+(\.\d*)?")
    others = [word for word in words if word != "--open"]
    if "--watch" in others:  # whose value may be left out
        place = others.index("--watch") + 1
        if not number.fullmatch("".join(others[place : place + 1])):
            others.insert(place, str(report.WATCH))
    given, flags = _given(others, usage, _REPORT, "--out", "--watch")
    seconds = flags.get("--watch")
    if seconds is not None and not number.fullmatch(seconds):
        raise UserError("--watch", seconds, "it must be a number of seconds", "Give one, such as 10.")
    report.report(
        given,
        flags.get("--out"),
        watch=None if seconds is None else float(seconds),
        open="--open" in words,
        tell=lambda line: print(line, flush=True),
    )
    return 0


_REPORT = """Writes one self-contained HTML page: what ran and on what, curves to zoom into, the table with
paired differences and their intervals, the partition, diagnostics where they were measured, bytes, time,
warnings, the configuration, and how to repeat it. PATH is the folder of a run or of a sweep, finished or
under way, or the file of a sweep, by which the runs to come are known too.

  --out FILE           default: report.html in that folder; of several runs beside the first
  --watch [SECONDS]    writes it again whenever a record has changed, until all runs are at their ends, or
                       Ctrl-C; the page then reads itself again. Looks every so many seconds; default: 10
  --open               opens it in the browser"""


def _peel(words: list[str]) -> int:
    from fedjax_sim.reports.peel import report

    usage = (
        "fedjax-sim peel FOLDER|SWEEP.yaml … [--out DIR] [--round N] [--only overview] [--at-accuracy A] "
        "[--reference G]"
    )
    known = ("--round", "--at-accuracy", "--only", "--reference")
    given, flags = _given(words, usage, _PEEL, "--out", *known)
    number, accuracy, only, reference = (flags.get(flag) for flag in known)
    if only not in (None, "overview"):
        raise UserError("--only", only, "only the overview can be written alone", "Write --only overview.")
    if number is not None and not number.isdecimal():
        raise UserError("--round", number, "a round is a whole number, from 1", "Give one, such as 10.")
    try:
        level = None if accuracy is None else float(accuracy)
    except ValueError:
        raise UserError("--at-accuracy", accuracy, "it must be a number", "Give one, such as 0.6.") from None
    report.draw(
        given,
        flags.get("--out"),
        round_index=None if number is None else int(number),
        accuracy=level,
        reference=reference,
        figures=only is None,
        tell=lambda line: print(line, flush=True),
    )
    return 0


_PEEL = """Draws what the layer-peeled probe recorded (PNG and PDF), and writes layers.csv and report.md.
Runs that differ only in their seed are pooled, others compared; several groups have an overview too. Of a
sweep's file the finished runs are taken.

  --out DIR          default: FOLDER/figures/peel for one run, peel in a sweep's folder, else beside the first
  --round N          which round is shown and judged; default: the newest
  --only overview    of several groups, the overview without the figures of each
  --at-accuracy A    the overview compares in each group's first round with this accuracy before the merge
  --reference G      the overview has differences to the group G as well, client by client"""


def _inertia(words: list[str]) -> int:
    from fedjax_sim.reports.inertia import report

    usage = "fedjax-sim inertia FOLDER|SWEEP.yaml … [--out DIR] [--metric NAME]"
    given, flags = _given(words, usage, _INERTIA, "--out", "--metric")
    report.draw(
        given,
        flags.get("--out"),
        metric=flags.get("--metric", "inertia_step"),
        tell=lambda line: print(line, flush=True),
    )
    return 0


_INERTIA = """Draws how far each layer moved and what merges gained (PNG and PDF), and writes inertia.csv and
report.md. Runs that differ only in their seed are pooled, others compared. Of a sweep's file the finished
runs are taken.

  --out DIR        default: FOLDER/figures/inertia for one run, inertia in a sweep's folder, else beside the
                   first run's
  --metric NAME    what says how far a layer moves; default: inertia_step"""


def _landscape(words: list[str]) -> int:
    from fedjax_sim.cli.flags import meant
    from fedjax_sim.core import fields
    from fedjax_sim.reports.landscape import report
    from fedjax_sim.reports.landscape.measurement import Settings

    usage = "fedjax-sim landscape RUN|SWEEP.yaml … [--out DIR] [--points N] [options]"
    names = [field.name for field in dataclasses.fields(Settings)]
    about = _LANDSCAPE.format(**vars(Settings()))
    given, flags = _given(words, usage, about, "--out", *(f"--{name}" for name in names))
    hints = typing.get_type_hints(Settings)
    chosen = {
        name: fields.coerce(meant(flags[f"--{name}"], hints[name], name), hints[name], name, text=True)
        for name in names
        if f"--{name}" in flags
    }
    report.draw(given, flags.get("--out"), Settings(**chosen), tell=lambda line: print(line, flush=True))
    return 0


_LANDSCAPE = """Measures how flat the loss is around the model that a finished run deploys, and what lies
between the models of its clients: figures (PNG and PDF), flatness.csv, curves.csv and report.md. Runs that
differ only in their seed are pooled, others compared, all in the same directions and on samples drawn alike.
Needs the runs' checkpoints. Of a sweep's file the finished runs are taken.

  --out DIR          default: FOLDER/landscape for one run, landscape in a sweep's folder, else beside the
                     first run's
  --points N         points of a line; default: {points}
  --grid N           points on each side of a plane; 0 leaves planes out; default: {grid}
  --radius R         lines and planes reach from -R to R, in filter-normalised directions; default: {radius}
  --samples N        training samples, and as many test samples; default: {samples}
  --seed N           of directions, samples and probes; default: {seed}
  --eigenvalues K    how many of the largest eigenvalues of the Hessian; default: {eigenvalues}
  --lanczos N        Lanczos steps; default: {lanczos}
  --probes N         Hutchinson probes of the trace; default: {probes}
  --rho R            radius of the ball of sharpness; default: {rho}
  --scale UNIT       its unit: absolute, relative (to the norm of the weights), filter; default: {scale}
  --ascent N         gradient steps of worst-case sharpness; default: {ascent}
  --draws N          random pairs of average sharpness; default: {draws}
  --models N         clients' models that are compared; 0 leaves them out; default: {models}
  --batch N          samples that a device takes at once; default: {batch}"""


def _given(words: list[str], usage: str, about: str, *known: str) -> tuple[str | list[str], dict[str, str]]:
    """(what is given, a list unless it is one; flag -> value) of a command that takes files or folders."""
    if words in (["-h"], ["--help"]):
        print(f"usage: {usage}\n\n{about}")
        raise SystemExit(0)
    given, flags = [], {}
    left = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    while left:
        word = left.pop(0)
        if not word.startswith("-"):
            given.append(word)
        elif word in known and left and not left[0].startswith("-"):
            flags[word] = left.pop(0)
        else:
            raise UserError(
                usage.split()[1], word, "no such flag, or its value is missing", f"Write {usage}."
            )
    return given[0] if len(given) == 1 else given, flags


def _export(words: list[str]) -> int:
    from fedjax_sim import runs
    from fedjax_sim.runs import export

    usage = "fedjax-sim export FOLDER FILE [--best]"
    best = "--best" in words
    given, _ = _given([word for word in words if word != "--best"], usage, _EXPORT)
    if isinstance(given, str) or len(given) != 2:
        raise UserError("export", " ".join(words), "it takes a FOLDER and a FILE", f"Write {usage}.")
    export.checked_path(given[1])
    print(f"wrote {runs.load(given[0]).export(given[1], best=best)}")
    return 0


_EXPORT = """Writes the weights of a run's deployed model at its newest checkpoint into one file, each under
its path: params/fc1/kernel and so on. The data need not be there.

  FOLDER    of the run
  FILE      ends in .npz, or in .safetensors, for which that package has to be installed"""


def _plan(words: list[str]) -> int:
    from fedjax_sim.cli import flags
    from fedjax_sim.runs.aot import machines
    from fedjax_sim.runs.plan import plan

    switches = {
        "exact": "compile the round, and add what XLA says of it",
        "on=MACHINE": "compile the programs for a machine that need not be here, and say what they take on a "
        f"chip and what chips exchange: {', '.join(machines.names())}. v5e and v6e are counted in chips, v4 "
        "and v5p in TensorCores, of which a chip has two. Takes one to several minutes",
        "together=S": "compile the rounds of S such runs side by side (sweep --together) instead; with --on",
        "json": "print one object for programs; with --on",
    }
    config, chosen = flags.parse(words, "plan", "Says what a configuration will need in memory.", switches)
    on = chosen.get("on")
    if on is None:
        if "json" in chosen:
            raise UserError("command line", "--json", "it says what --on finds", "Name a machine with --on.")
        if "together" in chosen:
            raise UserError("command line", "--together", "it is of a machine", "Name one with --on.")
        found = plan(config, exact="exact" in chosen)
    else:
        together = chosen.get("together")
        if together is not None and not together.isdecimal():
            raise UserError(
                "--together", together, "it is no number", "Write how many runs, as in --together 64."
            )
        machines.start_for(on)
        runs = None if together is None else int(together)
        found = plan(config, exact="exact" in chosen, on=on, together=runs, say=_complain)
        if "json" in chosen:
            print(found.to_json())
            return 1 if found.fits is False else 0
    print(found)
    return 1 if found.fits is False else 0


def _tune_machine(words: list[str]) -> int:
    from fedjax_sim.cli import flags
    from fedjax_sim.runs import calibration

    switches = {
        "seconds=S": f"how long comparing layouts takes, roughly; default: {calibration.SECONDS:.0f}",
        "no-devices": "do not try other numbers of CPU devices, which takes about as long again",
        "json": "print one object for programs",
        "forget": "measure nothing, and remove the file of all that was measured on this machine",
    }
    about = (
        "Measures which width of waves and implementation of the convolution is fastest on this machine for "
        "runs like this one, and keeps it for those that begin later (execution.calibration)."
    )
    config, chosen = flags.parse(words, "tune-machine", about, switches)
    if "forget" in chosen:
        gone = calibration.forget()
        print(f"removed {gone}" if gone else "nothing is kept")
        return 0
    given = chosen.get("seconds", f"{calibration.SECONDS}")
    seconds = float(given) if re.fullmatch(r"\d+(\.\d*)?", given) else 0.0
    if not seconds:
        raise UserError("--seconds", given, "it must be a number above 0", "Give one, such as 30.")
    from fedjax_sim.runs import tuning

    found = tuning.tune(config, seconds=seconds, devices="no-devices" not in chosen)
    print(found.to_json() if "json" in chosen else found)
    return 0


def _list(words: list[str]) -> int:
    from fedjax_sim import algorithms, data, models
    from fedjax_sim.reports import algorithm_docs

    if words in (["-h"], ["--help"]):
        print("usage: fedjax-sim list\n\nPrints the names of all algorithms, models, data and partitions.")
        return 0
    if words:
        raise UserError("list", " ".join(words), "this command takes no arguments", "Write fedjax-sim list.")
    print("algorithms (--algorithm NAME)")
    for name, cls in algorithms.CONFIGS.items():
        print(f"  {name:18} {algorithm_docs.summary(cls)}.")
        fields = ", ".join(
            f"{f.replace('_', '-')} {value}" for f, value in algorithm_docs.defaults(cls).items()
        )
        if fields:
            print(f"  {'':18}   {fields}")
    print("\nmodels (--model.name NAME)")
    for name, about in models.names().items():
        print(f"  {name:18} {about}")
    print("\ndata (--data.source NAME)")
    for name in data.names():
        about = data.PRESETS[name].origin if name in data.PRESETS else _SOURCES.get(name, "")
        print(f"  {name:18} {about}")
    for scheme, about in data.SCHEMES.items():
        print(f"  {scheme + ':PATH' if scheme != 'tfds' else 'tfds:NAME':18} {about}")
    print("\npartitions (--partition.kind NAME)")
    for name in data.KINDS:
        print(f"  {name:18} {_PARTITIONS.get(name, '')}")
    return 0


_SOURCES = {
    "digits": "8x8 handwritten digits, part of this package",
    "digits-domains": "the same in several renderings, one domain each",
}
_PARTITIONS = {
    "iid": "random and even",
    "dirichlet": "each class spread over clients by Dirichlet(alpha); sizes differ (FedMR)",
    "dirichlet-classes": "each client's class mix from Dirichlet(alpha); clients may share samples (LIPS)",
    "pathological": "exactly classes_per_client classes each",
    "shards": "McMahan's sorted shards, classes_per_client of them each",
    "domain": "one or more clients for each domain",
    "natural": "one client for each writer",
    "quantity": "even classes, log-normal sizes (sigma)",
    "identical": "the same samples in the same order for all: a control",
    "file": "as a JSON file says (path)",
}


@contextlib.contextmanager
def _without_loader_noise() -> Iterator[None]:
    """Keeps XLA's complaint about `prefer-no-gather` off the screen: kilobytes for each cached CPU program.

    That is a hint to the code generator and no property of a processor; XLA compares it as if it were one.
    The messages come from C++, so the whole of stderr goes through a filter process. Real differences between
    machines cannot occur: the cache's folder is named after the processor's features.
    """
    try:
        own = os.dup(2)
    except OSError:
        yield
        return
    # What Python writes needs no filter, and goes to where it went: a progress bar on a terminal stays one.
    ours = open(own, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    source = (
        "import sys\nfor line in sys.stdin.buffer:\n"
        "    if not (b'cpu_aot_loader' in line and b'feature +prefer-no-' in line):\n"
        "        sys.stderr.buffer.write(line); sys.stderr.flush()"
    )
    # In a session of its own, or Ctrl-C would end it before us.
    command = [sys.executable, "-S", "-c", source]
    filtering = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=own, start_new_session=True)
    assert filtering.stdin is not None
    os.dup2(filtering.stdin.fileno(), 2)
    filtering.stdin.close()
    before = sys.stderr
    if before is sys.__stderr__:
        sys.stderr = ours
    try:
        yield
    finally:
        sys.stderr = before
        ours.close()
        sys.stderr.flush()
        os.dup2(own, 2)
        os.close(own)
        filtering.wait(timeout=10)


def _told(run) -> None:
    from fedjax_sim.engine import hosts, programs

    if not hosts.first():
        return
    print(run)
    if (made := programs.count()).seconds:
        print(made)
    if run.folder is not None:
        print(f"written to {run.folder}")


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    """A warning as a user reads it: one line, without the place in the source."""
    del category, filename, lineno, line
    _complain(f"warning: {message}", file)


def _complain(line: str, file: typing.TextIO | None = None) -> None:
    """A line on standard error, if that can be written: where it cannot, there is nobody to tell."""
    with contextlib.suppress(OSError, ValueError):
        print(line, file=file or sys.stderr, flush=True)


class _Output:
    """Standard output whose loss does not end the work: of a full disk, or a pipe that nobody reads.

    Attributes:
      lost: what went wrong; from then on nothing is written.
    """

    def __init__(self, stream: typing.TextIO):
        self._stream = stream
        self.lost: Exception | None = None

    def write(self, text: str) -> int:
        """See TextIO."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """See TextIO."""
        self._try(self._stream.flush)

    def _try(self, action: typing.Callable[[], object]) -> None:
        if self.lost is not None:
            return
        try:
            action()
        except UnicodeError:
            raise
        except (OSError, ValueError) as error:  # the second: it is closed
            self.lost = error
            # What its buffer holds would fail again when Python ends.
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)

    def __getattr__(self, name: str) -> typing.Any:
        return getattr(self._stream, name)


def _open_closed() -> None:
    """Opens what a shell has closed (`>&-`): the next file would get its number, and others' messages."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115


if __name__ == "__main__":
    sys.exit(main())
