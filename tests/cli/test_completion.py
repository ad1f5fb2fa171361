"""Completion in real shells: commands, flags, names and files."""

import os
import pty
import re
import select
import shlex
import shutil
import subprocess
import time

import pytest

from fedjax_sim import algorithms, data
from fedjax_sim.cli import commands, completion, flags, overview
from fedjax_sim.config import RunConfig


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """Shell -> the file of its script."""
    folder = tmp_path_factory.mktemp("completion")
    for shell in completion.SHELLS:
        (folder / shell).write_text(completion.script(shell))
    return {shell: folder / shell for shell in completion.SHELLS}


@pytest.fixture
def place(tmp_path):
    """A folder with something to complete."""
    (tmp_path / "study.yaml").touch()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "runs").mkdir()
    return tmp_path


def by_bash(script, line, folder):
    """What bash offers after `line`, whose words are cut as bash cuts them."""
    words = shlex.split(line.replace("=", " = ")) + [""] * line.endswith(" ")
    code = (
        f"source {script}; complete -p fedjax-sim >/dev/null || exit 9\n"
        f"COMP_WORDS=({' '.join(map(shlex.quote, words))}); COMP_CWORD={len(words) - 1}\n"
        '_fedjax_sim; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    words = ["bash", "--norc", "-c", code]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True, timeout=60)
    assert not done.stderr, done.stderr
    return done.stdout.split()


def by_fish(script, line, folder):
    """What fish offers after `line`."""
    code = f"source {script}; complete -C {shlex.quote(line)}"
    words = ["fish", "--no-config", "-c", code]
    environment = {**os.environ, "HOME": str(folder)}
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    return [offer.split("\t")[0] for offer in done.stdout.splitlines()]


LINES = [
    ("fedjax-sim ", {"run", "sweep", "new"}, {"--seed"}),
    ("fedjax-sim tun", {"tune", "tune-machine"}, {"run"}),
    ("fedjax-sim run --al", {"--algorithm"}, {"--seed"}),
    ("fedjax-sim run --algorithm fedm", {"fedmr", "fedmut"}, {"fedavg"}),
    ("fedjax-sim run --algorithm fedmr --algorithm.", {"--algorithm.first-stage"}, {"--algorithm.weights"}),
    ("fedjax-sim plan --algorithm.", {"--algorithm.weights"}, {"--algorithm.first-stage"}),
    ("fedjax-sim run --algorithm fedprox --algorithm.distance ", {"squared", "norm"}, {"run"}),
    ("fedjax-sim run --data.source digits", {"digits", "digits-domains"}, {"cifar10"}),
    ("fedjax-sim run --local.schedule ", {"constant", "cosine"}, {"study.yaml"}),
    ("fedjax-sim sweep st", {"study.yaml"}, {"notes.txt"}),
    ("fedjax-sim sweep study.yaml --launcher ", {"local", "slurm", "ray"}, {"study.yaml"}),
    ("fedjax-sim sweep study.yaml --launcher.mi", {"--launcher.minutes"}, {"--together"}),
    ("fedjax-sim new ", {"method", "task", "diagnostic", "study"}, {"runs"}),
    ("fedjax-sim run --help ", {"local", "partition", "all"}, {"study.yaml", "seed"}),
    ("fedjax-sim plan my.yaml --on ", {"v5e-256", "8xh100", "cpu-8"}, {"study.yaml"}),
    ("fedjax-sim completion ", set(completion.SHELLS), {"runs"}),
]


@pytest.mark.parametrize(("line", "offered", "not_offered"), LINES, ids=[line for line, *_ in LINES])
def test_bash_offers(line, offered, not_offered, scripts, place):
    found = set(by_bash(scripts["bash"], line, place))
    assert offered <= found and not (not_offered & found), found


def test_bash_sees_through_an_equals_sign_and_join(scripts, place):
    assert by_bash(scripts["bash"], "fedjax-sim run --algorithm=fedm", place) == ["fedmr", "fedmut"]
    assert by_bash(scripts["bash"], "fedjax-sim --join auto resu", place) == ["resume"]
    assert "--algorithm.first-stage" in by_bash(
        scripts["bash"], "fedjax-sim run --algorithm=fedmr --algorithm.f", place
    )
    assert set(by_bash(scripts["bash"], "fedjax-sim peel ", place)) == {"study.yaml", "notes.txt", "runs"}


@pytest.mark.skipif(shutil.which("fish") is None, reason="needs fish")
@pytest.mark.parametrize(("line", "offered", "not_offered"), LINES, ids=[line for line, *_ in LINES])
def test_fish_offers(line, offered, not_offered, scripts, place):
    found = set(by_fish(scripts["fish"], line, place))
    assert offered <= found, found
    if "completion" not in line and "sweep st" not in line:
        assert not (not_offered & found), found


@pytest.mark.skipif(not (shutil.which("zsh") and shutil.which("setsid")), reason="needs zsh and setsid")
@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        ("fedjax-sim expo", "fedjax-sim export"),
        ("fedjax-sim run --algorithm fedpr", "fedprox"),
        ("fedjax-sim run --algorithm fedmr --algorithm.first-st", "--algorithm.first-stage"),
        ("fedjax-sim run --algorithm=fedpr", "--algorithm=fedprox"),
        ("fedjax-sim sweep st", "study.yaml"),
        ("fedjax-sim new diag", "diagnostic"),
    ],
)
def test_zsh_completes(typed, shown, scripts, place):
    assert shown not in typed
    screen = by_zsh(scripts["zsh"], typed, shown, place)
    assert shown in screen, screen


def by_zsh(script, typed, shown, folder):
    """The screen of a zsh in which a line and a tabulator were typed, as soon as it shows what is awaited."""
    environment = {**os.environ, "TERM": "dumb", "ZDOTDIR": str(folder), "PS1": "", "COLUMNS": "200"}
    terminal, inside = pty.openpty()  # pty.fork would warn of the threads that JAX has in this process
    zsh = subprocess.Popen(
        ["setsid", "--ctty", "zsh", "-f", "-i"],
        stdin=inside,
        stdout=inside,
        stderr=inside,
        cwd=folder,
        env=environment,
    )
    os.close(inside)
    try:
        setup = f"stty cols 200; autoload -Uz compinit; compinit -u -D; source {script}; echo rea''dy\n"
        os.write(terminal, setup.encode())
        read_until(terminal, "ready")
        os.write(terminal, f"{typed}\t".encode())
        return read_until(terminal, shown)
    finally:
        zsh.kill()
        zsh.wait()
        os.close(terminal)


def read_until(terminal, mark, seconds=30.0):
    """What a terminal shows until there is a mark; without colours and movements."""
    text, until = "", time.monotonic() + seconds
    while time.monotonic() < until and mark not in text:
        if select.select([terminal], [], [], 0.1)[0]:
            text += os.read(terminal, 4096).decode(errors="replace")
            text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    return text


def test_the_scripts_know_every_command_algorithm_and_name():
    made = completion.table()
    assert set(made["flags"]) == set(made["takes"]) == set(overview.COMMANDS)
    assert set(made["algorithms"]) == set(algorithms.CONFIGS)
    of_run = {flag.name: flag for flag in made["flags"]["run"]}
    assert of_run["--partition.kind"].choices.split() == list(data.KINDS)
    assert of_run["--output.no-progress"].takes == "" and of_run["--local.lr"].takes == "value"
    for own in [*made["flags"].values(), *made["algorithms"].values()]:
        names = [flag.name for flag in own]
        assert len(names) == len(set(names))


def test_the_flags_that_are_offered_are_those_of_the_parser():
    made, form = completion.table(), flags._form(RunConfig, RunConfig(), "")
    known = {flag.replace("_", "-") for flag in flags._flags(form, "")}
    offered = {flag.name for flag in made["flags"]["run"]} - {"--help", "--print-config", "--algorithm"}
    assert offered | {flag.name for flag in made["algorithms"]["fedavg"]} == known
    for name, config in algorithms.CONFIGS.items():
        form = flags._form(config, config(), "algorithm.")
        known = {flag.replace("_", "-") for flag in flags._flags(form, "algorithm.") if ".inner." not in flag}
        assert {flag.name for flag in made["algorithms"][name]} - {"--algorithm.inner"} == known


def test_the_command_prints_the_script_and_refuses_other_shells(capsys):
    assert commands.main(["completion", "bash"]) == 0
    assert "complete -F _fedjax_sim fedjax-sim" in capsys.readouterr().out
    assert commands.main(["completion", "zhs"]) == 2
    assert "Did you mean zsh?" in capsys.readouterr().err
