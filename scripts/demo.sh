#!/usr/bin/env bash
# Runs the demonstration sweep in the locked environment, which it makes first if need be. Arguments go to
# `fedjax-sim demo`.
source "$(dirname "${BASH_SOURCE[0]}")/_environment.sh"
ensure_environment

exec .venv/bin/fedjax-sim demo "$@"
