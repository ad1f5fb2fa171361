import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import fedjax_sim
from fedjax_sim.core import versions

ROOT = Path(__file__).resolve().parents[1]
_SPEC = importlib.util.spec_from_file_location("release_checks", ROOT / "scripts" / "release_checks.py")
release_checks = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(release_checks)
SCRIPTS = [
    "scripts/demo.sh",
    "scripts/test.sh",
    "scripts/smoke.sh",
    "scripts/lock.sh",
    "scripts/release.sh",
    ".ci/run",
]
OLDEST, *NEWER = PYTHONS = ("3.11", "3.12", "3.13", "3.14")
PLATFORMS = [("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64")]


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def lock():
    """[(requirement, number of hashes)] of every entry in the lock."""
    entries = []
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        if re.match(r"[A-Za-z0-9]", line):
            entries.append([Requirement(line.removesuffix("\\").strip()), 0])
        elif re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}( \\)?", line):
            entries[-1][1] += 1
        else:
            assert line.lstrip().startswith("#"), line
    return entries


def _environment(python, platform, machine):
    return {
        **default_environment(),
        "python_version": python,
        "python_full_version": f"{python}.4",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "sys_platform": platform,
        "platform_machine": machine,
        "platform_system": {"linux": "Linux", "darwin": "Darwin"}[platform],
        "os_name": "posix",
        "extra": "",
    }


def test_the_lock_pins_and_hashes_every_entry(lock):
    assert len(lock) > 50
    for requirement, hashes in lock:
        assert re.fullmatch(r"==[^*,]+", str(requirement.specifier)), requirement
        assert requirement.url is None
        assert hashes >= 1, requirement


def test_the_lock_names_no_address_and_no_path():
    text = (ROOT / "requirements.lock").read_text()
    assert not re.search(r"://|index-url|find-links|trusted-host|file:|(^|\s)/\w", text)


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize(("platform", "machine"), PLATFORMS)
def test_the_lock_gives_each_machine_one_release_that_the_project_accepts(
    lock, project, python, platform, machine
):
    environment = _environment(python, platform, machine)
    pinned = {}
    for requirement, _ in lock:
        if requirement.marker is None or requirement.marker.evaluate(environment):
            name = canonicalize_name(requirement.name)
            assert name not in pinned, f"two releases of {name} for {environment}"
            pinned[name] = str(requirement.specifier).removeprefix("==")
    for line in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        wanted = Requirement(line)
        if wanted.marker is None or wanted.marker.evaluate(environment):
            assert wanted.specifier.contains(pinned[canonicalize_name(wanted.name)]), line
    versions.check_versions(pinned["jax"], pinned["jaxlib"])
    assert pinned["jax"] == pinned["jaxlib"]
    assert pinned["jax"] == "0.10.1" if python == "3.11" else pinned["jax"].startswith("0.1")


def test_heavy_extras_stay_out_of_the_lock(lock):
    names = {canonicalize_name(requirement.name) for requirement, _ in lock}
    heavy = {
        name for name in names if re.match(r"(tensorflow(-cpu)?|torch|libtpu|jax-cuda.*|nvidia-.*)$", name)
    }
    assert not heavy


@pytest.mark.smoke
def test_four_devices_and_strict_numerics():
    assert jax.device_count() == int(os.environ.get("JAX_NUM_CPU_DEVICES", "4"))
    with pytest.raises(Exception, match="promotion"):
        jnp.ones(2, jnp.float32) + jnp.ones(2, jnp.int32)
    with pytest.raises(ValueError, match="rank"):
        jnp.ones((2, 3)) + jnp.ones(3)


@pytest.mark.smoke
def test_the_stack_trains_and_checkpoints_under_strict_numerics_without_a_warning(tmp_path):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.Conv(4, (3, 3))(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
            x = nn.GroupNorm(num_groups=2)(x)
            x = nn.max_pool(x, (2, 2), (2, 2)).reshape(len(x), -1)
            x = nn.Dropout(0.2, deterministic=not train)(nn.LayerNorm()(x))
            return nn.Dense(3)(x)

    net = Net()
    key = jax.random.key(0)
    images = jax.random.normal(key, (6, 8, 8, 3))
    labels = jnp.arange(6) % 3
    variables = net.init(key, images, train=False)
    schedule = optax.exponential_decay(0.1, 10, 0.9)
    optimiser = optax.chain(
        optax.clip_by_global_norm(5.0), optax.add_decayed_weights(1e-3), optax.sgd(schedule, momentum=0.9)
    )

    @jax.jit
    def step(params, stats, state, key):
        def loss(params):
            logits, new = net.apply(
                {"params": params, "batch_stats": stats},
                images,
                True,
                rngs={"dropout": key},
                mutable=["batch_stats"],
            )
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new["batch_stats"]

        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimiser.update(grads, state, params)
        return optax.apply_updates(params, updates), stats, state, value

    params, stats = variables["params"], variables["batch_stats"]
    state = optimiser.init(params)
    losses = []
    for i in range(30):
        params, stats, state, value = step(params, stats, state, jax.random.fold_in(key, i))
        losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0]

    saved = {"params": params, "stats": stats}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "model", saved)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "model", jax.tree.map(jnp.zeros_like, saved))
    jax.tree.map(np.testing.assert_array_equal, restored, saved)


@pytest.mark.smoke
def test_compiled_programs_are_kept_between_runs():
    folder = jax.config.jax_compilation_cache_dir
    assert folder is not None
    assert Path(folder).is_dir()


@pytest.mark.smoke
def test_the_wheel_holds_the_package_and_its_command(tmp_path):
    pytest.importorskip("hatchling")
    build = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    run = subprocess.run(
        [sys.executable, "-c", build, tmp_path], cwd=ROOT, check=True, capture_output=True, text=True
    )
    with zipfile.ZipFile(tmp_path / run.stdout.split()[-1]) as wheel:
        names = wheel.namelist()
        (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
        assert "fedjax-sim = fedjax_sim.cli:main" in wheel.read(entry_points).decode()
        (metadata,) = (name for name in names if name.endswith("dist-info/METADATA"))
        said = wheel.read(metadata).decode()
    for line in (
        f"Version: {fedjax_sim.__version__}",
        "Requires-Python: >=3.11",
        "License-Expression: Apache-2.0 AND MIT",
        "License-File: LICENSE",
        "Classifier: Typing :: Typed",
        "Description-Content-Type: text/markdown",
    ):
        assert f"{line}\n" in said, line
    inside = {name for name in names if ".dist-info/" not in name}
    assert inside == _of_the_package()
    assert {"fedjax_sim/py.typed", "fedjax_sim/algorithms/ALGORITHMS.md"} <= inside
    assert {name.split("/")[0].split("-")[0] for name in names} == {"fedjax_sim"}


def _of_the_package():
    """Paths of every file of the package, from the root."""
    files = [path for path in (ROOT / "fedjax_sim").rglob("*") if path.is_file()]
    return {path.relative_to(ROOT).as_posix() for path in files if path.parent.name != "__pycache__"}


def test_the_sdist_builds_the_same_wheel_and_carries_tests_and_documents(tmp_path):
    pytest.importorskip("hatchling")
    build = "import sys; from hatchling.build import build_sdist; print(build_sdist(sys.argv[1]))"
    run = subprocess.run(
        [sys.executable, "-c", build, tmp_path], cwd=ROOT, check=True, capture_output=True, text=True
    )
    with tarfile.open(tmp_path / run.stdout.split()[-1]) as sdist:
        names = {name.split("/", 1)[1] for name in sdist.getnames()}
    documents = {
        path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    }
    assert _of_the_package() | documents <= names
    assert {"LICENSE", "CITATION.cff", "pyproject.toml", "requirements.lock", "mkdocs.yml"} <= names
    assert {"tests/conftest.py", "scripts/test.sh", "experiments/demo.yaml", "Containerfile"} <= names
    assert {".ci/run", ".pre-commit-config.yaml"} <= names


@pytest.mark.skipif("FEDJAX_SIM_INSTALLED" not in os.environ, reason="set by scripts/release.sh --test")
def test_the_installed_package_is_tested_and_not_these_sources():
    assert Path(fedjax_sim.__file__).is_relative_to(os.environ["FEDJAX_SIM_INSTALLED"])


def test_the_version_is_written_once_and_cited():
    assert re.fullmatch(r"\d+\.\d+\.\d+", fedjax_sim.__version__)
    written = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in written["project"] and "version" in written["project"]["dynamic"]
    assert written["tool"]["hatch"]["version"] == {"path": "fedjax_sim/__init__.py"}
    assert release_checks.version(ROOT) == fedjax_sim.__version__
    assert release_checks.disagreements(ROOT) == []
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == fedjax_sim.__version__
    assert citation["repository-code"] == written["project"]["urls"]["Repository"]
    assert (
        citation["license"] == "Apache-2.0"
        and written["project"]["license"].split(" AND ")[0] == "Apache-2.0"
    )
    vendored = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fedjax_sim").rglob("*LICENSE*")}
    assert {"LICENSE", *vendored} == set(written["project"]["license-files"])
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_the_papers_are_cited():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    where = [each.get("doi") or each["url"] for each in citation["references"]]
    assert where == [
        "10.1145/3637528.3671722",
        "https://arxiv.org/abs/2502.03231",
        "https://arxiv.org/abs/2506.00932",
    ]


@pytest.fixture
def tagged(tmp_path):
    """A repository of what `release_checks` reads, ready to be published, and `git(…)` in it."""

    def git(*words):
        who = ["-c", "user.name=x", "-c", "user.email=x@y.z", "-c", "commit.gpgsign=false"]
        return subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True, text=True)

    if shutil.which("git") is None:
        pytest.skip("needs git")
    for name in (
        "fedjax_sim/__init__.py",
        "CHANGELOG.md",
        "CITATION.cff",
        "pyproject.toml",
        "scripts/conda/recipe.yaml",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    changes = tmp_path / "CHANGELOG.md"
    changes.write_text(release_checks.TOP.sub(r"## \1 (2027-01-15)", changes.read_text(), count=1))
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "all")
    git("tag", f"v{fedjax_sim.__version__}")
    return tmp_path, git


def test_a_release_is_dated_committed_and_tagged_by_its_version(tagged):
    root, git = tagged
    assert release_checks.disagreements(root) == release_checks.unready(root) == []
    git("tag", "-d", f"v{fedjax_sim.__version__}")
    git("tag", f"{fedjax_sim.__version__}")
    (root / "new.py").write_text("")
    changes = root / "CHANGELOG.md"
    changes.write_text(changes.read_text().replace("(2027-01-15)", "(unreleased)"))
    dated, tag, committed = release_checks.unready(root)
    assert "no date at" in dated and f"no tag v{fedjax_sim.__version__}" in tag
    assert "CHANGELOG.md" in committed and "new.py" in committed


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        ("CITATION.cff", "version: 0", "version: 9", "version in CITATION.cff"),
        ("CITATION.cff", "github.com", "gitlab.com", "repository in CITATION.cff"),
        ("CHANGELOG.md", "## 0", "## 9", "CHANGELOG.md's first release"),
        ("CHANGELOG.md", " (2027", " [2027", "CHANGELOG.md's first release"),
        ("scripts/conda/recipe.yaml", 'version: "0', 'version: "9', "version in scripts/conda/recipe.yaml"),
    ],
)
def test_a_version_or_an_address_that_differs_is_named(tagged, name, old, new, said):
    root, _ = tagged
    path = root / name
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    (wrong,) = release_checks.disagreements(root)
    assert said in wrong


def test_a_file_too_many_or_too_few_in_a_distribution_is_named(tmp_path):
    files = {"fedjax_sim/__init__.py", "fedjax_sim/a.md", "tests/test_x.py"}
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as wheel:
        for name in ("fedjax_sim/__init__.py", "fedjax_sim/b.md", "fedjax_sim-0.dist-info/METADATA"):
            wheel.writestr(name, "")
    assert release_checks.of_wheel(tmp_path / "x.whl", files) == [
        "x.whl lacks fedjax_sim/a.md",
        "x.whl holds fedjax_sim/b.md, which git does not track",
    ]
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as sdist:
        for name in (*sorted(files)[:2], "PKG-INFO"):
            sdist.addfile(tarfile.TarInfo(f"fedjax_sim-0/{name}"), io.BytesIO())
    assert release_checks.of_sdist(tmp_path / "x.tar.gz", files) == ["x.tar.gz lacks tests/test_x.py"]


CONDA = {"importlib-resources": "importlib_resources", "matplotlib": "matplotlib-base"}
"""What conda-forge calls a package otherwise."""


def test_the_recipe_has_the_projects_dependencies(project):
    recipe = yaml.safe_load((ROOT / "scripts/conda/recipe.yaml").read_text())
    wanted = {
        CONDA.get(one.name, one.name): one.specifier for one in map(Requirement, project["dependencies"])
    }
    lines = [line for line in recipe["requirements"]["run"] if not line.startswith(("python ", "__"))]
    assert {one.name: one.specifier for one in map(Requirement, lines)} == wanted
    assert f">={recipe['context']['python_min']}" == project["requires-python"] == f">={OLDEST}"
    assert recipe["build"]["python"]["entry_points"] == [
        f"{name} = {place}" for name, place in project["scripts"].items()
    ]


def test_the_container_runs_a_supported_python_and_the_command(project):
    text = (ROOT / "Containerfile").read_text()
    (python,) = re.findall(r"^ARG PYTHON=(.+)$", text, re.M)
    assert f"Programming Language :: Python :: {python}" in project["classifiers"]
    assert re.findall(r"EXTRA=(\w+)", text) and set(re.findall(r"EXTRA=(\w+)", text)) <= set(
        project["optional-dependencies"]
    )
    (command,) = re.findall(r'^ENTRYPOINT \["(.+)"\]$', text, re.M)
    assert command in project["scripts"]
    assert "\nUSER 1000\n" in text
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.M)
    assert all((ROOT / name).exists() for line in copied for name in line.split())


def test_tests_beside_the_package_need_what_is_in_dev(project):
    asked = release_checks.tools(ROOT)
    assert set(asked) <= set(project["optional-dependencies"]["dev"]) and len(asked) == len(
        release_checks.TOOLS
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_run_and_parse(script):
    assert os.access(ROOT / script, os.X_OK)
    subprocess.run(["bash", "-n", ROOT / script], check=True)


@pytest.mark.faults
@pytest.mark.parametrize("script", ["scripts/demo.sh", "scripts/test.sh", ".ci/run"])
def test_an_old_python_is_refused_before_anything_is_made(tmp_path, script):
    checkout = _copy_scripts(tmp_path)
    old = _executable(
        tmp_path / "python3", '[ "$1" = --version ] && echo "Python 3.9.18" && exit 0\nexit 1\n'
    )
    run = subprocess.run(
        [checkout / script], env={**os.environ, "PYTHON": str(old)}, capture_output=True, text=True
    )
    assert run.returncode == 1
    assert "needs Python 3.11 or later" in run.stderr
    assert "Python 3.9.18" in run.stderr
    assert not (checkout / ".venv").exists()


@pytest.mark.faults
def test_a_python_without_venv_is_told_what_to_install(tmp_path):
    checkout = _copy_scripts(tmp_path)
    broken = _executable(tmp_path / "python3", f'[ "$2" = venv ] && exit 1\nexec "{sys.executable}" "$@"\n')
    run = subprocess.run(
        [checkout / "scripts/test.sh"],
        env={**os.environ, "PYTHON": str(broken)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert "python3-venv" in run.stderr
    assert not (checkout / ".venv").exists()


@pytest.fixture
def stand_in(tmp_path):
    """A checkout whose environments only write down how their programs are called.

    `call(script, *arguments)` gives what was called and what stderr said. Of the newest Python there is
    what `tmp_path/path/python3.14` and its like make of it, which is nothing at first.
    """
    checkout, log = _copy_scripts(tmp_path), tmp_path / "calls"
    programs = {
        "python": f'[ "$1" = -m ] || exec "{sys.executable}" "$@"\n[ "$3" = config ] && exit 1\n',
        "uv": f'[ "$1" = cache ] && echo "{tmp_path}/cache" && exit\n',
        "fedjax-sim": "",
    }
    for folder, prefix in ((".venv", ""), *((f".venv-{one}", f"{one}:") for one in NEWER)):
        (checkout / folder / "bin").mkdir(parents=True)
        for name, before in programs.items():
            _executable(
                checkout / folder / "bin" / name, f'{before}echo {prefix}{name} "$PWD" "$@" >>"{log}"\n'
            )
    (tmp_path / "path").mkdir()
    for one in NEWER:
        _executable(tmp_path / "path" / f"python{one}", "exit 127\n")
    path = f"{tmp_path / 'path'}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYENV_ROOT": str(tmp_path / "pyenv")}

    def call(script, *arguments, code=0):
        log.write_text("")
        run = subprocess.run(
            [checkout / script, *arguments], cwd=tmp_path, capture_output=True, text=True, env=environment
        )
        assert run.returncode == code, run.stderr
        return [line.replace(f" {checkout}", "") for line in log.read_text().splitlines()], run.stderr

    return checkout, call


@pytest.mark.faults
def test_an_environment_of_another_lock_is_brought_up_to_date(stand_in):
    checkout, call = stand_in
    stamp = checkout / ".venv/.fedjax-sim"
    for outdated in (None, "of an older lock\n"):
        if outdated:
            stamp.write_text(outdated)
        (pip, uv_lock, uv_project, tests), said = call("scripts/test.sh")
        assert "installing requirements.lock" in said
        assert pip.startswith("python -m pip install") and pip.endswith(
            "--require-hashes --no-deps -r .venv/uv.lock"
        )
        assert uv_lock == "uv pip install --python .venv/bin/python --require-hashes -r requirements.lock"
        assert uv_project == "uv pip install --python .venv/bin/python --no-deps --no-build-isolation -e ."
        assert tests == "python -m pytest -n2 --dist=worksteal"
        assert re.fullmatch(r"[0-9a-f]{64}\n", stamp.read_text())
        assert not (checkout / ".venv/.lock").exists(), "uv's own lock: uv waits for its holder"
    only_uv = (checkout / ".venv/uv.lock").read_text()
    assert re.fullmatch(r"uv==[^\n]+(\n {4}[^\n]+)+\n", only_uv)


def test_a_ready_environment_is_used_as_it_is_and_arguments_pass_through(stand_in):
    _, call = stand_in
    call("scripts/test.sh")
    for script, arguments, expected in [
        (
            "scripts/test.sh",
            ["tests/models", "-m", "a b"],
            "python -m pytest -n2 --dist=worksteal tests/models -m a b",
        ),
        ("scripts/test.sh", ["-n", "0"], "python -m pytest -n 0"),
        ("scripts/test.sh", ["-x", "--pdb"], "python -m pytest -x --pdb"),
        ("scripts/demo.sh", ["--out", "x"], "fedjax-sim demo --out x"),
    ]:
        assert call(script, *arguments) == ([expected], "")


CHECKS = ["python -m ruff check .", "python -m ruff format --check .", "python -m pyright"]


def test_continuous_integration_tests_lints_and_types_and_passes_over_a_python_that_is_not_there(stand_in):
    _, call = stand_in
    call("scripts/test.sh")
    calls, said = call(".ci/run", "-x")
    assert calls == ["python -m pytest -n2 --dist=worksteal -x", *CHECKS]
    assert said.count("no Python of 3.14 3.13 3.12 on the path or under pyenv") == 1


@pytest.mark.parametrize(
    ("version", "place"), [("3.14", "path"), ("3.14", "pyenv/versions/3.14.7/bin"), ("3.13", "path")]
)
def test_continuous_integration_tries_the_newest_python_in_an_environment_of_its_own(
    stand_in, tmp_path, version, place
):
    _, call = stand_in
    call("scripts/test.sh")
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    name = f"python{version}" if place == "path" else "python"
    _executable(tmp_path / place / name, f"echo {version}\n")
    calls, said = call(".ci/run")
    assert calls[:4] == ["python -m pytest -n2 --dist=worksteal", *CHECKS]
    assert f"installing requirements.lock into .venv-{version}" in said
    assert all(line.startswith(f"{version}:") for line in calls[4:])
    assert (
        f"{version}:uv pip install --python .venv-{version}/bin/python --require-hashes -r requirements.lock"
        in calls
    )
    assert calls[-1] == f"{version}:python -m pytest -n2 -m smoke"


@pytest.mark.faults
def test_a_step_of_continuous_integration_that_fails_is_named_at_the_end_and_keeps_none_from_running(
    stand_in,
):
    checkout, call = stand_in
    call("scripts/test.sh")
    python = checkout / ".venv/bin/python"
    python.write_text(python.read_text() + 'case "$2 $3" in "ruff check" | "pytest -n2") exit 3 ;; esac\n')
    calls, said = call(".ci/run", code=1)
    assert calls == ["python -m pytest -n2 --dist=worksteal", *CHECKS]
    failed = said.split("failed:")[1].split("\n")
    assert [line.strip() for line in failed if line] == [
        "scripts/test.sh",
        ".venv/bin/python -m ruff check .",
    ]


def test_the_scripts_know_the_pythons_that_the_project_names(project):
    named = re.findall(r"Python :: (3\.\d+)", " ".join(project["classifiers"]))
    assert tuple(named) == PYTHONS
    assert project["requires-python"] == f">={OLDEST}"
    written = (ROOT / "scripts/_environment.sh").read_text()
    assert f'\nPYTHONS="{" ".join(reversed(PYTHONS))}"\nOLDEST={OLDEST}\n' in written


@pytest.mark.faults
@pytest.mark.parametrize(
    ("words", "said"), [(["--publish"], "--publish is none of"), (["tests"], "tests is none of")]
)
def test_a_word_that_the_release_does_not_know_is_refused(stand_in, words, said):
    _, call = stand_in
    calls, told = call("scripts/release.sh", *words, code=2)
    assert calls == [] and said in told


def test_pip_takes_over_where_uv_cannot_install(stand_in):
    checkout, call = stand_in
    _executable(checkout / ".venv/bin/uv", "exit 2\n")
    calls, said = call("scripts/test.sh")
    assert "trying pip" in said
    assert calls[1:3] == [
        "python -m pip install --require-hashes -r requirements.lock",
        "python -m pip install --no-deps --no-build-isolation -e .",
    ]


def test_hooks_fetch_nothing():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [repo["repo"] for repo in config["repos"]] == ["local"]
    hooks = config["repos"][0]["hooks"]
    assert {hook["language"] for hook in hooks} <= {"system", "pygrep"}
    pattern = next(hook["entry"] for hook in hooks if hook["language"] == "pygrep")
    assert not re.search(pattern, (ROOT / "requirements.lock").read_text())
    assert re.search(pattern, "--index-url somewhere")


@pytest.mark.slow
def test_a_fresh_copy_sets_itself_up_and_passes(tmp_path):
    """Needs a package index. Takes a minute or two, and 1.5 GB for the time being."""
    checkout = _copy_scripts(tmp_path)
    shutil.copytree(
        ROOT / "fedjax_sim", checkout / "fedjax_sim", ignore=shutil.ignore_patterns("__pycache__")
    )
    (checkout / "tests" / "core").mkdir(parents=True)
    for name in ("conftest.py", "core/test_versions.py"):
        shutil.copy(ROOT / "tests" / name, checkout / "tests" / name)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment["PYTHON"] = sys.executable
    first = [checkout / "scripts/test.sh", "tests/core/test_versions.py", "-q"]
    run = subprocess.run(first, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout
    again = subprocess.run(first, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 0
    assert "installing" not in again.stderr


def _copy_scripts(tmp_path):
    checkout = tmp_path / "a checkout"
    for name in [
        *SCRIPTS,
        "scripts/_environment.sh",
        "requirements.lock",
        "pyproject.toml",
        "README.md",
        "LICENSE",
    ]:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, checkout / name)
    return checkout


def _executable(path, body):
    path.write_text(f"#!/bin/sh\n{body}")
    path.chmod(0o755)
    return path
