#!/usr/bin/env bash
# Runs the tests in the locked environment, which it makes first if need be. Arguments go to pytest; paths are
# relative to the repository's root:
#   scripts/test.sh                  everything but the slow ones and the comparisons with other implementations
#   scripts/test.sh tests/models     one folder
#   scripts/test.sh -m slow          the slow ones;  -m parity: the comparisons;  -m aot: for TPUs;  -m "": all
#   scripts/test.sh -n 0             in one process (two otherwise)
source "$(dirname "${BASH_SOURCE[0]}")/_environment.sh"
ensure_environment

# Each process begins with one half of the tests, in order, so that a file's fixtures and programs are made once;
# one that is done takes from the other's end.
processes="-n2 --dist=worksteal"
for argument in "$@"; do
  case "$argument" in
    -n* | --numprocesses* | --pdb | no:xdist | -pno:xdist) processes="" ;;
  esac
done

# shellcheck disable=SC2086  # two words
exec .venv/bin/python -m pytest $processes "$@"
