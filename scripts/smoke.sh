#!/usr/bin/env bash
# Runs the tests marked `smoke` on the newest Python that the project supports, with the newest JAX that the lock
# has for it, in an environment of its own beside .venv. Where that Python is not to be found it says so and ends
# without a fault. Arguments go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/_environment.sh"

if ! python="$(find_python_of "$NEWEST")"; then
  say "no Python $NEWEST on the path or under pyenv: nothing is tried on it here"
  exit 0
fi
PYTHON="$python" ensure_environment ".venv-$NEWEST"
exec ".venv-$NEWEST/bin/python" -m pytest -n2 -m smoke "$@"
