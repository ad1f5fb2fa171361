#!/usr/bin/env bash
# Builds the site into build/site, in the locked environment, which it makes first if need be; a warning is an
# error. `scripts/docs.sh serve` shows it on http://127.0.0.1:8000 and follows changes.
source "$(dirname "${BASH_SOURCE[0]}")/_environment.sh"
ensure_environment

command="${1:-build}"
[ $# -eq 0 ] || shift
# MkDocs' own packages warn of changes to come in one another.
exec env NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs "$command" "$@"
