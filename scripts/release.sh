#!/usr/bin/env bash
# Builds what is published, checks it, and tries it apart from the clone. Uploads nothing.
#   scripts/release.sh                  dist/*.tar.gz and dist/*.whl, made from that, and what they hold
#   scripts/release.sh --final          also: CHANGELOG's top is dated, nothing is uncommitted, HEAD is tagged vX.Y.Z
#   scripts/release.sh --test [ARGS]    then the tests of the .tar.gz against the installed .whl, with the lock's versions
#   scripts/release.sh --lowest [ARGS]  likewise on the oldest Python, with the oldest direct dependencies
#   scripts/release.sh --newest [ARGS]  likewise on the newest Python, with the newest dependencies, whatever the lock says
# ARGS go to pytest; without them --test runs the default tests, and the others those marked `smoke` and the folders
# of FOLDERS. Each has a fresh environment in a folder of its own under ${TMPDIR:-/tmp}, which is removed at the end.
source "$(dirname "${BASH_SOURCE[0]}")/_environment.sh"

# What --lowest and --newest run beside `-m smoke`.
FOLDERS="tests/config tests/core tests/data tests/records"

mode="" final=""
case "${1:-}" in
  --final) final=--final && shift ;;
  --test | --lowest | --newest) mode="${1#--}" && shift ;;
  "") ;;
  *) say "$1 is none of --final, --test, --lowest, --newest" && exit 2 ;;
esac
if [ -z "$mode" ] && [ $# -gt 0 ]; then say "$1: only --test, --lowest and --newest take arguments" && exit 2; fi

python=""
case "$mode" in
  lowest) python="$(find_python_of "$OLDEST")" || { say "no Python $OLDEST on the path or under pyenv" && exit 1; } ;;
  newest) python="$(find_newest_python)" || { say "no Python of ${PYTHONS% *} on the path or under pyenv" && exit 1; } ;;
esac
ensure_environment
inherit_from_pip .venv
uv="$PWD/.venv/bin/uv"

.venv/bin/python scripts/release_checks.py versions $final
rm -rf dist
.venv/bin/python -m build --no-isolation --outdir dist .
.venv/bin/python scripts/release_checks.py contents
# Metadata as an index reads them, and what does not belong into a wheel: by their own tools, outside of the lock.
"$uv" tool run --from "twine>=6" twine check --strict dist/*
# W002, a file that is there twice: uPlot's licence lies beside its source and among the wheel's licences.
"$uv" tool run --from "check-wheel-contents>=0.6" check-wheel-contents --no-config --ignore W002 dist/*.whl
if [ -z "$mode" ]; then exit; fi

# --- apart from the clone -------------------------------------------------------------------------------
root="$PWD" work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
venv="$work/venv"
mkdir "$work/elsewhere"
tar -xzf dist/*.tar.gz -C "$work"
sdist="$(echo "$work"/fedjax_sim-*)"
python="${python#* }"
"${python:-$root/.venv/bin/python}" -m venv "$venv"
export UV_LINK_MODE="${UV_LINK_MODE:-copy}"
install() { "$uv" pip install --quiet --python "$venv/bin/python" "$@"; }
# What the tests need beside the package, where the lock is not asked.
tools="$(.venv/bin/python scripts/release_checks.py tools)"
case "$mode" in
  test) install --require-hashes -r requirements.lock ;;
  lowest)
    "$uv" pip compile --quiet --python "$venv/bin/python" --resolution lowest-direct --output-file "$work/lowest.txt" pyproject.toml
    install -r "$work/lowest.txt" $tools
    # Of old releases nothing is wanted but that they work: what others have deprecated since is no fault of ours.
    export PYTEST_ADDOPTS="-W ignore::DeprecationWarning ${PYTEST_ADDOPTS:-}"
    ;;
  newest)
    "$uv" pip compile --quiet --python "$venv/bin/python" --output-file "$work/newest.txt" pyproject.toml
    install -r "$work/newest.txt" $tools
    ;;
esac
install --no-deps dist/*.whl
"$uv" pip check --python "$venv/bin/python"

# Nothing of the clone, nor of the unpacked sources, may be what is imported: tests start in an empty folder.
cd "$work/elsewhere"
unset PYTHONPATH
where="$("$venv/bin/python" -c 'import fedjax_sim; print(fedjax_sim.__file__)')"
case "$where" in
  "$venv"/*) say "testing $where with $("$venv/bin/python" --version)" ;;
  *) say "$where is not the wheel's" && exit 1 ;;
esac
"$venv/bin/fedjax-sim" run --rounds 2 --partition.clients 10 --output.dir first
try() {
  local words=() word
  for word in "$@"; do
    if [ -e "$sdist/${word%%::*}" ]; then word="$sdist/$word"; fi
    words+=("$word")
  done
  FEDJAX_SIM_INSTALLED="$venv" "$venv/bin/pytest" -c "$sdist/pyproject.toml" --rootdir "$sdist" -n2 "${words[@]}"
}
if [ $# -gt 0 ]; then
  try "$@"
elif [ "$mode" = test ]; then
  try tests
else
  try tests -m smoke
  # shellcheck disable=SC2086
  try $FOLDERS
fi
