#!/usr/bin/env bash
# Writes requirements.lock from pyproject.toml: one file for every supported Python and platform, hashed, naming
# no index. What is locked stays where it is unless asked; arguments go to `uv pip compile`:
#   scripts/lock.sh                          after a change in pyproject.toml
#   scripts/lock.sh --upgrade                everything to its newest release
#   scripts/lock.sh --upgrade-package flax   one of them
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

uv=.venv/bin/uv
[ -x "$uv" ] || uv="$(command -v uv)" || { echo "lock.sh: no uv; run scripts/test.sh once, it brings one" >&2; exit 1; }

"$uv" pip compile pyproject.toml --extra dev --universal --python-version 3.11 --generate-hashes \
  --no-emit-index-url --no-emit-find-links --no-header --quiet --output-file requirements.lock "$@"

if grep -nE '://|--(extra-)?index-url|--find-links|--trusted-host' requirements.lock; then
  echo "lock.sh: the lines above name an address; a lock must install from whatever index its user has" >&2
  exit 1
fi
