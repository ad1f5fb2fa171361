#!/usr/bin/env bash
# Runs the tests in the locked environment, which it makes first if need be. Arguments go to pytest; paths are
# relative to the repository's root:
#   scripts/test.sh                  everything but the slow ones and the comparisons with other implementations
#   scripts/test.sh tests/models     one folder
#   scripts/test.sh -m slow          the slow ones;  -m parity: the comparisons;  -m "": all of them
#   scripts/test.sh -n 0             in one process (two otherwise)
source "$(dirname "${BASH_SOURCE[0]}")/_environment.sh"
ensure_environment

processes="-n2"
for argument in "$@"; do
  case "$argument" in
    -n* | --numprocesses* | --pdb | no:xdist | -pno:xdist) processes="" ;;
  esac
done

exec .venv/bin/python -m pytest ${processes:+"$processes"} "$@"
