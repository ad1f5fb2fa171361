"""Compares this project with its peers: one command, one machine, alternating repetitions.

    python scripts/benchmark/run.py [--workloads lenet mlp-100] [--peers ours torch] [--repetitions 5]

Makes the peers' environments if need be, then starts one process for each (repetition, workload, peer,
variant), and writes `results.jsonl` and `results.md` under `--out`. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import envs
import machine
import measure
import peak
import plan
import report
from common import CHECKS, WORKLOADS

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
Write = Callable[[dict], None]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; a mistake ends with status 2 and a message which names the option."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--peers", nargs="+", choices=plan.PEERS, default=list(plan.PEERS))
    parser.add_argument("--repetitions", type=int, default=3, help="processes for each peer and workload")
    parser.add_argument(
        "--rounds", type=int, default=None, help="timed rounds in one process; None: the workload's"
    )
    parser.add_argument(
        "--warmup", type=int, default=2, help="untimed rounds first; the first is reported apart"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "build" / "benchmark", help="folder for the results"
    )
    parser.add_argument(
        "--envs", type=Path, default=ROOT / "build" / "benchmark-envs", help="peers' environments"
    )
    parser.add_argument(
        "--python", default=sys.executable, help="interpreter which has this project installed"
    )
    parser.add_argument(
        "--timeout", type=float, default=900.0, help="seconds after which a process is given up"
    )
    parser.add_argument("--skip-checks", action="store_true", help="do not first compare what peers compute")
    parser.add_argument(
        "--quick", action="store_true", help="one repetition, one timed round, one to warm up"
    )
    args = parser.parse_args(argv)
    if args.quick:
        args.repetitions = args.rounds = args.warmup = 1
    for name in ("repetitions", "rounds", "warmup", "timeout"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"argument --{name}: {value} is less than 1; give 1 or more")
    args.peers = list(dict.fromkeys(args.peers))
    args.workloads = list(dict.fromkeys(args.workloads))
    return args


def call(
    command: Sequence[str], timeout: float, environment: dict[str, str] | None = None
) -> tuple[str, str | None]:
    """Runs a command to its end in a process group of its own, which is ended with it.

    Returns:
      what it printed, and why it failed (its last line of error output), or None.
    """
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=HERE,
        env=os.environ | (environment or {}),
        start_new_session=True,
    )
    try:
        out, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        end(process)
        return "", f"took more than {timeout:g} s"
    except BaseException:
        end(process)
        raise
    if process.returncode:
        said = [line for line in errors.splitlines() if any(map(str.isalnum, line))]
        return out, f"status {process.returncode}: {said[-1].strip()[:300] if said else 'nothing was said'}"
    return out, None


def end(process: subprocess.Popen, grace: float = 15.0) -> None:
    """Interrupts a process group, so that a framework can end its daemons, and kills what is left of it."""
    for sign in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=grace)


def measure_peaks(interpreters: dict[str, str], write: Write) -> None:
    """One line for each library at hand and each width."""
    holders = {"numpy": plan.OURS, "jax": plan.OURS, "torch": "torch"}
    for library in peak.LIBRARIES:
        python = interpreters.get(holders[library])
        for threads in sorted({1, machine.cores()}) if python else ():
            out, why = call([str(python), "peak.py", "--package", library, "--threads", str(threads)], 120)
            if why is None:
                write({"kind": "peak", **json.loads(out.splitlines()[-1])})


def execute(run: plan.Run, python: str, args: argparse.Namespace) -> dict:
    """Runs one process; its line of results, of kind `run` or `failed`."""
    command = [python, *run.variant.launcher, f"runner_{run.peer}.py", "--workload", run.workload]
    command += ["--threads", str(run.variant.threads), "--devices", str(run.variant.devices)]
    command += ["--warmup", str(args.warmup), *run.variant.options]
    command += [] if args.rounds is None else ["--rounds", str(args.rounds)]
    environment = {"OMP_NUM_THREADS": str(run.variant.threads)}
    if run.peer == plan.OURS:  # this checkout, and not a version that happens to be installed
        environment["PYTHONPATH"] = str(ROOT)
    head = {
        "peer": run.peer,
        "variant": run.variant.name,
        "workload": run.workload,
        "repetition": run.repetition,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    neighbours = machine.Neighbours()
    out, why = call(command, args.timeout, environment)
    if why is None:
        try:
            # Ray's processes are not our children's children, and would be taken for neighbours.
            share = None if run.peer == "flwr" else neighbours.share()
            return {"kind": "run", **head, "neighbours": share, **measure.parse(out)}
        except ValueError as error:
            why = str(error)
    return {"kind": "failed", **head, "why": why}


def check(args: argparse.Namespace, interpreters: dict[str, str], write: Write) -> None:
    """Runs the check workloads of the models that will be timed, once on each peer; lines of kind `check`."""
    models = {WORKLOADS[name].model for name in args.workloads}
    names = [name for name, workload in CHECKS.items() if workload.model in models]
    short = argparse.Namespace(**vars(args) | {"rounds": 1, "warmup": 1})
    for run in plan.checks([peer for peer in args.peers if peer in interpreters], names, machine.cores()):
        line = execute(run, interpreters[run.peer], short)
        write(line | {"kind": "check"} if line["kind"] == "run" else line)
        outcome = line.get("loss_at_end", line.get("why"))
        say(f"{run.workload}, {run.peer}, {run.variant.name}: {outcome}")


def repeat(args: argparse.Namespace, interpreters: dict[str, str], write: Write) -> None:
    """Runs the schedule; a variant that is clearly slower than a sibling, or failed, is not repeated."""
    peers = [peer for peer in args.peers if peer in interpreters]
    best: dict[tuple[str, str], float] = {}
    took: dict[tuple[str, str, str], float] = {}
    failed: set[tuple[str, str, str]] = set()
    dropped: set[tuple[str, str, str]] = set()
    for run in plan.schedule(peers, args.workloads, args.repetitions, machine.cores()):
        pair, triple = (run.peer, run.workload), (run.peer, run.workload, run.variant.name)
        if triple in failed or triple in dropped:
            continue
        if run.repetition == 1 and plan.is_hopeless(took[triple], best[pair]):
            dropped.add(triple)
            head = {"peer": run.peer, "workload": run.workload, "variant": run.variant.name}
            write({"kind": "dropped", **head, "seconds": took[triple]})
            continue
        line = execute(run, interpreters[run.peer], args)
        write(line)
        if line["kind"] == "failed":
            failed.add(triple)
            say(f"{run.peer}, {run.variant.name}, {run.workload}: failed: {line['why']}")
            continue
        seconds = report.seconds_per_round(line)
        took.setdefault(triple, seconds)
        best[pair] = min(best.get(pair, seconds), seconds)
        place = f"[{run.repetition + 1}/{args.repetitions}] {run.workload}, {run.peer}, {run.variant.name}"
        say(f"{place}: {seconds:.4g} s a round")


def say(text: str) -> None:
    """Progress, for whoever watches."""
    print(text, file=sys.stderr, flush=True)


def _revision() -> str:
    out, why = call(["git", "describe", "--always", "--dirty"], 30)
    return "unknown" if why else out.strip()


def main() -> None:
    """Environments, machine, schedule, report."""
    args = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `call` ends its child then too
    if warning := machine.load_warning():
        say(warning)
    load = os.getloadavg()[0]
    interpreters: dict[str, str] = {}
    unavailable: dict[str, str] = {}
    for peer in args.peers:
        if peer == plan.OURS:
            interpreters[peer] = args.python
            continue
        try:
            say(f"environment of {peer}")
            interpreters[peer] = str(envs.ensure(peer, args.envs.resolve()))
        except envs.EnvironmentFailed as error:
            say(str(error))
            unavailable[peer] = "its environment could not be made"
    args.out.mkdir(parents=True, exist_ok=True)
    results = args.out / "results.jsonl"
    results.write_text("")

    def write(line: dict) -> None:
        with results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        results.with_suffix(".md").write_text(report.render(report.read(results)))

    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    write({"kind": "machine", **machine.describe(), "date": date, "load": load, "revision": _revision()})
    measure_peaks(interpreters, write)
    if not args.skip_checks:
        check(args, interpreters, write)
    for workload in args.workloads:
        for peer in args.peers:
            why = unavailable.get(peer) or plan.NOT_RUN.get((peer, workload))
            if why:
                write({"kind": "not_run", "peer": peer, "workload": workload, "why": why})
    repeat(args, interpreters, write)
    say(f"wrote {results} and {results.with_suffix('.md')}")


if __name__ == "__main__":
    main()
