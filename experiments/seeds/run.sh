#!/usr/bin/env bash
# The whole study of seeds: runs, accuracies, tables, pictures. What is finished is not run again.
#
#   FEDJAX_SIM_DATA=DIR experiments/seeds/run.sh            # both; DIR holds femnist.npz
#   experiments/seeds/run.sh digits                         # one of them
#
# Needs .venv, which scripts/demo.sh makes. Of the runs the records are kept, packed; checkpoints are removed
# (7 GB of SCAFFOLD's and FedDyn's clients on FEMNIST).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if [ $# = 0 ]; then set -- digits femnist; fi
for study in "$@"; do
  # 1: some runs failed. Those that diverged are told of by survival.py, which stops at any other.
  .venv/bin/python -m fedjax_sim.cli sweep "experiments/seeds/$study.yaml" --together || [ $? = 1 ]
  .venv/bin/python experiments/seeds/survival.py "$study"
  .venv/bin/python -m fedjax_sim.cli sweep "experiments/seeds/$study.yaml" --pack
  rm -rf "experiments/seeds/results/$study/runs" "experiments/seeds/results/$study/compiled"
done
