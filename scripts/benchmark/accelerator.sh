#!/usr/bin/env bash
# Measures one part of what a machine with one GPU or TPU is wanted for: accelerator.sh PART [--dry] [--out DIR].
# Takes $PYTHON, .venv or python3, whichever is there first: accelerator.py says the rest.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(dirname "$(dirname "$here")")"
python="${PYTHON:-}"
if [ -z "$python" ]; then
  python="$root/.venv/bin/python"
  [ -x "$python" ] || python=python3
fi
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$python" "$here/accelerator.py" "$@"
