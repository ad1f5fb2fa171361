# Sourced by the other scripts, not run. Leaves the working directory at the repository's root. `ensure_environment`
# then brings .venv (or the folder that it is given) into the state that requirements.lock asks for: made if it is
# missing, brought up to date if the lock has changed.
#
# Needs bash and a Python of 3.11 or later ($PYTHON, or python3). Everything else comes from the lock, by hash:
# pip installs uv, uv installs the rest. Packages that you added to .venv yourself (jax[cuda12], say) stay,
# unless the lock pins them to another version.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset PYTHONHOME VIRTUAL_ENV

say() { printf 'fedjax-sim: %s\n' "$*" >&2; }

# The Pythons that the project supports (its classifiers in pyproject.toml), newest first. The lock has a newer JAX for
# those after the oldest.
PYTHONS="3.14 3.13 3.12 3.11"
OLDEST=3.11

python_is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

# The Python to build .venv with, on stdout.
find_python() {
  local candidate
  if [ -n "${PYTHON:-}" ]; then set -- "$PYTHON"; else set -- python3 python3.14 python3.13 python3.12 python3.11; fi
  for candidate in "$@"; do
    if command -v "$candidate" >/dev/null 2>&1 && python_is_new_enough "$candidate"; then
      command -v "$candidate"
      return
    fi
  done
  say "needs Python 3.11 or later; $1 is $("$1" --version 2>&1 || echo 'not there')."
  say "Install a newer one, and name it if it is not python3:  PYTHON=/path/to/python3.12 $0"
  return 1
}

python_is() { [ "$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" = "$2" ]; }

# A Python of a version, as 3.13, on stdout: the one on the path, or pyenv's. Fails where there is none.
find_python_of() {
  local candidate
  for candidate in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python; do
    if python_is "$candidate" "$1"; then
      command -v "$candidate"
      return
    fi
  done
  return 1
}

# What the environment is made from: a digest of Python's version, where we are (a moved .venv has stale paths in
# its scripts), the lock and the project's metadata.
fingerprint() {
  "$venv/bin/python" - <<'PY'
import hashlib, os, pathlib, sys
told = [sys.version.encode(), os.getcwdb(), *(pathlib.Path(name).read_bytes() for name in ("requirements.lock", "pyproject.toml"))]
print(hashlib.sha256(b"\0".join(told)).hexdigest())
PY
}

# The newest supported Python that is here, as VERSION PATH on stdout. Fails where there is none after the oldest.
find_newest_python() {
  local version python
  for version in $PYTHONS; do
    if [ "$version" = "$OLDEST" ]; then return 1; fi
    if python="$(find_python_of "$version")"; then
      echo "$version $python"
      return
    fi
  done
  return 1
}

# Lets uv reach the index and trust the certificates that pip is configured with, where uv has no word of its own.
# Asks the pip of the environment `venv`, or of the one that it is given.
inherit_from_pip() {
  local index certificates venv="${1:-$venv}"
  pip_setting() { "$venv/bin/python" -m pip config get "$1.$2" 2>/dev/null; }
  if [ -z "${UV_DEFAULT_INDEX:-}${UV_INDEX_URL:-}" ]; then
    index="$(pip_setting :env: index-url || pip_setting global index-url || true)"
    if [ -n "$index" ]; then export UV_DEFAULT_INDEX="$index"; fi
  fi
  if [ -z "${SSL_CERT_FILE:-}" ]; then
    certificates="$(pip_setting :env: cert || pip_setting global cert || true)"
    if [ -f "$certificates" ]; then export SSL_CERT_FILE="$certificates"; fi
  fi
}

# uv links files out of its cache: copy where the cache is on another disk, do without one where none can be kept.
choose_uv_cache() {
  local cache disks
  cache="$("$venv/bin/uv" cache dir 2>/dev/null)" || cache=""
  if [ -z "$cache" ] || ! mkdir -p "$cache" 2>/dev/null || ! [ -w "$cache" ]; then
    export UV_NO_CACHE=1
    return
  fi
  disks="$("$venv/bin/python" -c 'import os, sys; print(len({os.stat(p).st_dev for p in sys.argv[1:]}))' "$venv" "$cache")"
  if [ "$disks" != 1 ]; then export UV_LINK_MODE="${UV_LINK_MODE:-copy}"; fi
}

install_lock() {
  # The lines of the lock that are uv's own: its name up to the next name.
  awk '/^[^ #]/ {mine = /^uv==/} mine' requirements.lock >"$venv/uv.lock"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r "$venv/uv.lock"
  inherit_from_pip
  choose_uv_cache
  # The project itself is built by the locked back end, so that nothing unlocked is fetched for it.
  if "$venv/bin/uv" pip install --python "$venv/bin/python" --require-hashes -r requirements.lock &&
    "$venv/bin/uv" pip install --python "$venv/bin/python" --no-deps --no-build-isolation -e .; then
    return
  fi
  say "uv could not install the lock (its message is above); trying pip, which is slower."
  "$venv/bin/python" -m pip install --require-hashes -r requirements.lock
  "$venv/bin/python" -m pip install --no-deps --no-build-isolation -e .
}

# ensure_environment [FOLDER]: makes it with $PYTHON, or with the first new enough Python that it finds.
ensure_environment() {
  local venv="${1:-.venv}"
  local python="$venv/bin/python"
  python_is_new_enough "$python" || python="$(find_python)"
  # Two scripts started at once take turns: the lock belongs to the open file, and goes with this shell. It is not
  # .venv/.lock, which is uv's own: uv would wait five minutes for us.
  mkdir -p "$venv"
  exec 9>"$venv/.fedjax-sim-lock"
  "$python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'
  if ! python_is_new_enough "$venv/bin/python"; then
    if [ -e "$venv/bin" ]; then say "$venv does not run, or is older than Python 3.11: making it anew"; fi
    say "making $venv with $("$python" --version)"
    if ! "$python" -m venv --clear "$venv"; then
      rm -rf "$venv"
      say "$python cannot make a virtual environment. On Debian and Ubuntu: apt install python3-venv"
      return 1
    fi
  fi
  if [ "$(cat "$venv/.fedjax-sim" 2>/dev/null)" != "$(fingerprint)" ]; then
    say "installing requirements.lock into $venv (some minutes the first time)"
    rm -f "$venv/.fedjax-sim"
    install_lock
    fingerprint >"$venv/.fedjax-sim"
  fi
  exec 9>&-
}
