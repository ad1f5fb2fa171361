#!/usr/bin/env bash
# Runs the tests marked `smoke` on the newest supported Python that is here, with the newest JAX that the lock has for
# it, in an environment of its own beside .venv. Where there is none after the oldest it says so and ends without a
# fault. Arguments go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/_environment.sh"

if ! found="$(find_newest_python)"; then
  say "no Python of ${PYTHONS% *} on the path or under pyenv: nothing is tried on it here"
  exit 0
fi
version="${found%% *}"
PYTHON="${found#* }" ensure_environment ".venv-$version"
exec ".venv-$version/bin/python" -m pytest -n2 -m smoke "$@"
